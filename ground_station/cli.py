"""The umbrella command `spacemoe`: parse -> one library call -> print.

The one place that may import sibling rooms, inside sub-commands only, so that `spacemoe --help` stays fast and needs no
extra. Exit codes: 0 done, 1 the work failed, 2 wrong usage (an argument, or what is in a file that it names, cannot be used: a
ValueError), 3 a check did not hold (parity, verify), 130 interrupted, 143 told to end (SIGTERM, SIGHUP).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
import threading
from pathlib import Path

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_CHECK, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 3, 130, 143
UNSTEADY = 1.3  # the slowest round over the quickest
COLUMNS = 80


class UsageError(ValueError):
    """An argument's value cannot be used; the text says what to give."""


def reference_bundle() -> Path:
    """The reference model's bundle in this clone (it is not part of an installed wheel)."""
    return Path(__file__).resolve().parent.parent / "quantize" / "reference" / "bundle"


def _bundle(args: argparse.Namespace) -> Path:
    path = args.bundle or reference_bundle()
    if not path.is_dir():
        hint = "give --bundle DIR" if args.bundle is None else "make one by `spacemoe quantize MODEL -o BUNDLE`"
        raise UsageError(f"there is no bundle at {path}: {hint}")
    return path


def _check_writable(path: Path | None, option: str) -> None:
    """Raises: UsageError for a path that can never be a file."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"{path} cannot be written: give {option} a file in a folder that is there")


def _wrapped(line: str) -> str:
    """A line of output as lines of at most 80 columns; words stay whole, so that paths can be copied."""
    return textwrap.fill(line, COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 5:
        raise argparse.ArgumentTypeError(f"{text!r} is not HIDDEN,INTERMEDIATE,LAYERS,EXPERTS,TOPK")
    return tuple(_positive(part) for part in parts)


CODECS = (
    "fp32",
    "fp16",
    "q8",
    "q4",
    "importance",
)  # of node_agent.compress, POLICIES of selection: named here so that --help stays fast
PLACEMENTS = ("random", "intra", "roundrobin", "ring", "eplb", "affinity", "hotcore", "budgeted", "exact")
POLICIES = ("topk", "random", "coolest", "topp", "naee", "des", "wlr", "similarity", "equinox", "budgeted")


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="spacemoe",
        description="Mixture-of-experts language models spread over small boards that stand in for satellites.",
        epilog="exit codes: 0 done; 1 the work failed; 2 wrong usage: an argument's value, or what is in a file that it names, cannot "
        "be used; 3 a check did not hold; 130 interrupted; 143 terminated",
    )
    root.add_argument("--version", action="store_true", help="print the version and exit")
    commands = root.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help: str, run, group=commands) -> argparse.ArgumentParser:
        sub = group.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return sub

    demo = command("demo", "the main job on this machine: broker, four simulated boards, ground station, tokens", _demo)
    demo.add_argument("--prompt", default="In the beginning", help="text to go on from (default: %(default)r)")
    demo.add_argument("--tokens", type=_positive, default=64, help="tokens to write (default: %(default)s)")
    _sampling_arguments(demo)
    demo.add_argument("--bundle", type=Path, help="bundle to run (default: the reference model)")
    demo.add_argument("--precision", default="int8", help="precision of the primary shards (default: %(default)s)")
    demo.add_argument("--replica", default="int4", help="precision of the replicas, or 'none' (default: %(default)s)")
    demo.add_argument(
        "--codec", choices=CODECS, default="q8", help="of hidden states on the wire (default: %(default)s)"
    )
    demo.add_argument(
        "--bits-per-value",
        type=float,
        metavar="BITS",
        help="payload that --codec importance is steered to (default: free, at a quality of about +1 %% perplexity)",
    )
    demo.add_argument(
        "--policy", choices=POLICIES, default="topk", help="which experts a token uses (default: %(default)s)"
    )
    demo.add_argument(
        "--temp-limit",
        type=float,
        default=85.0,
        metavar="C",
        help="of the boards, for budgeted (default: %(default)s °C)",
    )
    demo.add_argument("--nodes", type=_positive, help="simulated boards (default: 4, or those of the scenario)")
    demo.add_argument(
        "--scenario",
        metavar="FILE",
        help="virtual satellites for the boards: a scenario file, or one of the kit's by name (hot-eclipse)",
    )
    demo.add_argument("--broker", default="auto", help="auto, mosquitto, embedded or HOST:PORT (default: %(default)s)")
    demo.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and simulated boards in DIR")
    demo.add_argument("--ledger", type=Path, metavar="FILE", help="write one JSON line per token to FILE")
    demo.add_argument(
        "--no-parity", action="store_true", help="skip the single-process run that the text is checked against"
    )

    quantize = commands.add_parser("quantize", help="write a bundle of expert shards from a Hugging Face folder")
    quantize.set_defaults(run=_quantize)
    # its arguments live in the quantize room; they are added only when this sub-command is used
    if len(sys.argv) > 1 and sys.argv[1] == "quantize":
        from quantize import command as quantize_command

        quantize_command.add_arguments(quantize)

    bundle = commands.add_parser("bundle", help="look into a bundle, or check every file of it")
    parts = bundle.add_subparsers(dest="part", metavar="PART", required=True)
    for name, help in (("show", "what a bundle holds"), ("verify", "check size and sha256 of every file")):
        part = command(name, help, _bundle_show if name == "show" else _bundle_verify, parts)
        part.add_argument("bundle", type=Path, nargs="?", help="bundle (default: the reference model)")

    evaluate = command("evaluate", "bits per byte and perplexity of a bundle on held-out text", _evaluate)
    evaluate.add_argument("bundle", type=Path, nargs="?", help="bundle (default: the reference model)")
    evaluate.add_argument(
        "--text", type=Path, help="folder of .txt/.jsonl or one file (default: reference held-out text)"
    )
    evaluate.add_argument("--precision", default="all", help="comma-separated, or all that the bundle has")
    evaluate.add_argument("--limit-bytes", type=_positive, help="use only that much text of each domain")
    evaluate.add_argument("--threads", type=_positive, default=2)

    calibrate = command(
        "calibrate", "fit a board's Foster network, or its power model, to loads that it is given", _calibrate
    )
    calibrate.add_argument("node", metavar="NODE", help="id of the board's node")
    where = calibrate.add_mutually_exclusive_group()
    where.add_argument("--broker", default="127.0.0.1:1883", metavar="HOST:PORT", help="default: %(default)s")
    where.add_argument("--simulated", metavar="PROFILE", help="try it on a simulated board of this profile")
    calibrate.add_argument("--fleet", default="demo", help="default: %(default)s")
    for name, default, help in (
        ("settle-s", 1800.0, "idle so long at most before the step"),
        ("window-s", 120.0, "of the drift's measurement"),
        ("drift", 0.2, "K/min: a board that drifts less is at rest"),
        ("step-s", 1200.0, "the step's seconds"),
        ("cool-s", 0.0, "watch it cool for so long"),
    ):
        calibrate.add_argument(f"--{name}", type=float, default=default, help=f"{help} (default: %(default)s)")
    calibrate.add_argument(
        "--power-model",
        action="store_true",
        help="fit watts to busy cores instead, for like boards that have no power sensor",
    )
    calibrate.add_argument(
        "--level-s",
        type=float,
        default=20.0,
        help="of --power-model: seconds at each of six loads (default: %(default)s)",
    )
    calibrate.add_argument("--branches", type=_positive, default=2, help="of the network (default: %(default)s)")
    calibrate.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write a TOML fragment for a scenario, or for an agent's configuration",
    )
    calibrate.add_argument("--bundle", type=Path, help="of a simulated board (default: the reference model)")
    calibrate.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")

    plan = command("plan", "who would hold which expert, the expected latency, and what binds", _plan)
    plan.add_argument("bundle", type=Path, nargs="?", help="bundle (default: the reference model)")
    plan.add_argument("--nodes", default="4", metavar="N|FILE", help="equal nodes, or a TOML file (default: 4)")
    plan.add_argument("--memory", type=float, metavar="MB", help="per node for experts, resident (with --nodes N)")
    plan.add_argument("--policy", choices=PLACEMENTS, default="budgeted", help="default: %(default)s")
    plan.add_argument("--seed", type=int, default=0, help="of routing sets and of random (default: %(default)s)")

    experiment = commands.add_parser("experiment", help="selection policies side by side on one scenario")
    experiments = experiment.add_subparsers(dest="kind", metavar="KIND", required=True)
    played = command("run", "play a scenario with each policy, in mission time", _experiment_run, experiments)
    played.add_argument("file", help="experiment file (TOML), or the name of one of the kit, such as hot-eclipse")
    played.add_argument("--bundle", type=Path, help="bundle (default: the reference model)")
    played.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="instead of the file's")
    played.add_argument("--slots", type=_positive, help="instead of the file's")
    played.add_argument("--only", nargs="+", metavar="LABEL", help="only these of the file's policies")
    study = commands.add_parser("study", help="studies without boards: constellations, placement")
    studies = study.add_subparsers(dest="kind", metavar="KIND", required=True)
    xnet = command("space-xnet", "placements on 1056 satellites, beside the published figures", _study_xnet, studies)
    xnet.add_argument("--slots", type=_positive, default=200, help="of one orbit (default: %(default)s)")
    xnet.add_argument("--seeds", type=_positive, default=5, help="default: %(default)s")
    gap = command("placement", "budgeted against the exact optimum; half of the nodes dark", _study_placement, studies)
    gap.add_argument("--bundle", type=Path, help="bundle of the second part (default: the reference model)")
    gap.add_argument("--instances", type=_positive, default=20, help="random small fleets (default: %(default)s)")
    gap.add_argument("--seed", type=int, default=0, help="of the first instance (default: %(default)s)")
    gap.add_argument("--nodes", type=_positive, default=8, help="of the second part (default: %(default)s)")
    gap.add_argument("--limit-s", type=_positive, default=30, help="per exact programme (default: %(default)s)")

    benchmark = commands.add_parser("benchmark", help="measure speed, side by side, with spread")
    kinds = benchmark.add_subparsers(dest="kind", metavar="KIND", required=True)
    decode = command("decode", "one process beside agents on this machine, interleaved", _benchmark_decode, kinds)
    source = decode.add_mutually_exclusive_group()
    source.add_argument("--bundle", type=Path, help="bundle to run (default: the reference model)")
    source.add_argument(
        "--synthetic",
        nargs="?",
        type=_shape,
        const=(1024, 1408, 4, 16, 4),
        metavar="HIDDEN,INTERMEDIATE,LAYERS,EXPERTS,TOPK",
        help="a random-weight Qwen3-MoE of this shape (default shape: 1024,1408,4,16,4)",
    )
    decode.add_argument("--precision", default="int8", help="precision of the experts (default: %(default)s)")
    decode.add_argument("--trunk-precision", default="fp32", help="of a synthetic bundle: fp32, int8 or int4")
    decode.add_argument(
        "--codec", choices=CODECS, default="fp32", help="on the wire; on loopback bytes are free (default: %(default)s)"
    )
    decode.add_argument("--nodes", type=_positive, default=4)
    decode.add_argument(
        "--copies", type=_positive, default=2, help="nodes that hold each expert (default: %(default)s)"
    )
    decode.add_argument("--tokens", type=_positive, default=32, help="per round (default: %(default)s)")
    decode.add_argument("--rounds", type=_positive, default=15, help="counted rounds (default: %(default)s)")
    decode.add_argument("--threads", type=_positive, default=2, help="of the single process (default: %(default)s)")
    decode.add_argument(
        "--trunk-threads", type=_positive, default=2, help="of the trunk beside agents (default: %(default)s)"
    )
    select = command("selection", "microseconds per decision of every selection policy", _benchmark_selection, kinds)
    select.add_argument("--decisions", type=_positive, default=400, help="counted ones (default: %(default)s)")
    quality = command(
        "quality", "perplexity against joules of every selection policy on held-out text", _benchmark_quality, kinds
    )
    quality.add_argument("--bundle", type=Path, help="bundle to run (default: the reference model)")
    quality.add_argument("--text", type=Path, help="folder of .txt/.jsonl or one file (default: held-out text)")
    quality.add_argument(
        "--setting", choices=("runs", "fleet"), default="runs", help="what a run costs (default: %(default)s, 1 each)"
    )
    quality.add_argument(
        "--limit-bytes", type=_positive, default=1500, help="scored of each domain (default: %(default)s)"
    )
    compression = command("compression", "bytes on the wire against perplexity", _benchmark_compression, kinds)
    compression.add_argument("--bundle", type=Path, help="bundle to run (default: the reference model)")
    compression.add_argument("--text", type=Path, help="folder of .txt/.jsonl or one file (default: held-out text)")
    compression.add_argument("--precision", default="int8", help="precision of the experts (default: %(default)s)")
    compression.add_argument("--draws", type=_positive, default=3, help="held-out texts (default: %(default)s)")
    compression.add_argument("--threads", type=_positive, default=2, help="default: %(default)s")
    simulate = command("sim", "a constellation's physics for one orbit: seconds and memory", _benchmark_sim, kinds)
    simulate.add_argument("--satellites", type=_positive, default=10_000, help="default: %(default)s")
    simulate.add_argument("--step-s", type=float, default=10.0, help="default: %(default)s s, at most 10")
    simulate.add_argument("--rounds", type=_positive, default=5, help="counted rounds (default: %(default)s)")
    simulate.add_argument(
        "--accelerator",
        choices=("auto", "numba", "none"),
        default="auto",
        help="auto takes numba where it is installed (extra sim-fast)",
    )
    route = command("routing", "shards over paced links beside the contact plan (emulated)", _benchmark_routing, kinds)
    route.add_argument("--rounds", type=_positive, default=5, help="counted transfers per link (default: %(default)s)")
    return root


def _sampling_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    sub.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of sampling and of the random policy (default: %(default)s)")


def _scenario(name: str):
    try:
        from ground_station import scenario_demo
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"--scenario needs {error.name}, which is not installed: pip install 'spacemoe-kit[sim]'"
        ) from None
    return scenario_demo.find(name)


def _demo(args: argparse.Namespace) -> int:
    from ground_station import demo
    from ground_station.local_fleet import FleetError
    from ground_station.sampling import Sampling

    if args.scenario and args.nodes:
        raise UsageError("--nodes goes without --scenario: a scenario names its boards")
    _check_writable(args.ledger, "--ledger")
    if args.keep is not None and args.keep.exists() and not args.keep.is_dir():
        raise UsageError(f"{args.keep} is no folder: give another --keep DIR")
    options = demo.Options(
        bundle=_bundle(args),
        prompt=args.prompt,
        tokens=args.tokens,
        sampling=Sampling(args.temperature, args.top_p, args.seed),
        precision=args.precision,
        replica=None if args.replica == "none" else args.replica,
        codec=args.codec,
        bits_per_value=args.bits_per_value,
        policy=args.policy,
        temp_limit_c=args.temp_limit,
        nodes=args.nodes or 4,
        broker=args.broker,
        keep=args.keep,
        ledger=args.ledger,
        parity=not args.no_parity,
        scenario=_scenario(args.scenario) if args.scenario else None,
    )
    quiet = args.json
    try:
        result = demo.run(options, (lambda text: None) if quiet else demo.show)
    except FleetError as error:
        # the temporary folder that the text names is gone by now
        if args.keep is not None or isinstance(error, ValueError):  # what was asked for cannot be: there is no log
            raise
        raise FleetError(f"{error}; --keep DIR keeps the logs") from None
    print(json.dumps(result) if args.json else demo.report(result))
    return EXIT_OK if result["parity"] is None or result["parity"]["equal"] is not False else EXIT_CHECK


def _quantize(args: argparse.Namespace) -> int:
    from quantize import command as quantize_command

    return quantize_command.run(args)


def _bundle_show(args: argparse.Namespace) -> int:
    from node_agent import shard

    manifest = shard.read_manifest(_bundle(args))
    facts = {
        "name": manifest.name,
        "family": manifest.family,
        "base_model": manifest.base_model,
        "licence": manifest.licence,
        "dims": vars(manifest.dims),
        "trunk_precision": manifest.trunk_precision,
        "trunk_bytes": sum(item.bytes for segment in manifest.segments for item in segment.files),
        "precisions": {},
        "recipe": manifest.recipe,
        "created_at": manifest.created_at,
    }
    for precision in manifest.precisions:
        shards = [entry for entry in manifest.shards if entry.precision == precision]
        errors = [entry.rel_error for entry in shards if entry.rel_error is not None]
        facts["precisions"][precision] = {
            "shards": len(shards),
            "bytes": sum(entry.bytes for entry in shards),
            "mean_rel_error": round(sum(errors) / len(errors), 5) if errors else None,
        }
    if args.json:
        print(json.dumps(facts))
        return EXIT_OK
    dims = manifest.dims
    print(_wrapped(f"{manifest.name}: {manifest.family}, {manifest.licence}, made {manifest.created_at}"))
    experts = f"{dims.experts} experts top-{dims.top_k}"
    print(_wrapped(f"  {dims.layers} layers, hidden {dims.hidden}, {experts}, vocabulary {dims.vocab}"))
    print(f"  trunk {manifest.trunk_precision}: {facts['trunk_bytes'] / 1e6:.1f} MB")
    for precision, row in facts["precisions"].items():
        error = "" if row["mean_rel_error"] is None else f", mean error {row['mean_rel_error']:.3%} of fp32"
        print(_wrapped(f"  {precision:8} {row['shards']} shards, {row['bytes'] / 1e6:.1f} MB{error}"))
    for what, text in manifest.recipe.items():
        print(_wrapped(f"  {what}: {text}"))
    return EXIT_OK


def _bundle_verify(args: argparse.Namespace) -> int:
    from node_agent import shard

    root = _bundle(args)
    manifest = shard.read_manifest(root)
    entries = [
        *manifest.files,
        *(f for s in manifest.segments for f in s.files),
        *(f for s in manifest.shards for f in s.files),
    ]
    problems = []
    for entry in entries:
        try:
            shard.verify_file(root, entry)
        except shard.BundleError as error:
            problems.append(str(error))
    if args.json:
        print(json.dumps({"files": len(entries), "bytes": sum(e.bytes for e in entries), "problems": problems}))
    else:
        for problem in problems:
            print(problem)
        print(f"{len(entries) - len(problems)} of {len(entries)} files are as the manifest says")
    return EXIT_CHECK if problems else EXIT_OK


def _evaluate(args: argparse.Namespace) -> int:
    from ground_station import evaluate
    from node_agent import shard

    root = _bundle(args)
    manifest = shard.read_manifest(root)
    texts = evaluate.domains(args.text or reference_bundle().parent / "heldout")
    wanted = manifest.precisions if args.precision == "all" else tuple(args.precision.split(","))
    results = {
        name: evaluate.summary(evaluate.evaluate(root, name, texts, args.threads, args.limit_bytes)) for name in wanted
    }
    if "fp32" in results:
        for row in results.values():
            row["perplexity_ratio_to_fp32"] = round(row["perplexity"] / results["fp32"]["perplexity"], 5)
    if args.json:
        print(json.dumps(results))
        return EXIT_OK
    print(f"{'bits per byte':18}" + "".join(f"{name:>10}" for name in results))
    for domain in texts:
        print(f"{domain:18}" + "".join(f"{row['domains'][domain]:10.3f}" for row in results.values()))
    print(f"{'mean':18}" + "".join(f"{row['mean_bits_per_byte']:10.3f}" for row in results.values()))
    print(f"{'perplexity':18}" + "".join(f"{row['perplexity']:10.3f}" for row in results.values()))
    if "fp32" in results:
        print(f"{'  to fp32':18}" + "".join(f"{row['perplexity_ratio_to_fp32']:10.4f}" for row in results.values()))
    return EXIT_OK


def _calibrate(args: argparse.Namespace) -> int:
    import contextlib

    from ground_station import calibrate, calibrate_power, calibrate_report, power_fit, power_step
    from ground_station.broker import Broker

    method = calibrate_power if args.power_model else calibrate
    if args.power_model:
        options = power_fit.Options(args.node, args.fleet, args.level_s)
    else:
        options = power_step.Options(
            args.node, args.fleet, args.settle_s, args.window_s, args.drift, args.step_s, args.cool_s, args.branches
        )
    _check_writable(args.output, "--output")
    if args.dry_run:
        from ground_station import calibrate_check

        if args.simulated:
            found = calibrate_check.simulated_board(args.simulated, _bundle(args))
        else:
            broker = Broker(Path(), "external", external=args.broker)
            found = calibrate_check.node(args.node, args.fleet, broker.host, broker.port)
        steps, note = method.plan(options), "this was a dry run: nothing was sent or started"
        tree = {"found": found, "plan": steps, "note": note}
        print(json.dumps(tree) if args.json else "\n".join(_wrapped(line) for line in (found, *steps, note)))
        return EXIT_OK
    if args.output is not None:
        calibrate_report.check_writable(args.output)
    with contextlib.ExitStack() as stack:
        if args.simulated:
            source = calibrate.simulated(args.simulated, args.node, _bundle(args), args.fleet)
            host, port = stack.enter_context(source)
        else:
            broker = Broker(Path(), "external", external=args.broker)
            host, port = broker.host, broker.port
        result = method.calibrate(options, host, port)
    if args.power_model:
        table = power_fit.fragment(result)
        result["toml"], text = table, power_fit.report(result, table)
    else:
        table, text = calibrate_report.fragment(result), calibrate_report.report(result)
    print(json.dumps(result) if args.json else text, flush=True)
    if args.output is not None:  # last: what was measured is not lost with a disk that is full by now
        calibrate_report.write(args.output, table)
    return EXIT_OK


def _plan(args: argparse.Namespace) -> int:
    from ground_station import plan, plan_fleet

    if args.nodes.isascii() and args.nodes.isdigit():
        if args.memory is None:
            raise UsageError("--nodes N needs --memory MB: what each node has for experts")
        fleet = plan_fleet.alike(int(args.nodes[:9]), args.memory)
    elif args.memory is not None:
        raise UsageError("--memory goes with --nodes N: a file of nodes names each one's memory_mb")
    else:
        fleet = plan_fleet.read(Path(args.nodes))
    result = plan.plan(_bundle(args), fleet, args.policy, args.seed)
    print(json.dumps(result) if args.json else "\n".join(map(_wrapped, plan.report(result).splitlines())))
    return EXIT_OK


def _experiment_run(args: argparse.Namespace) -> int:
    from ground_station import experiment, experiment_report

    chosen = experiment.find(args.file).narrowed(args.seeds, args.slots, args.only)
    result = experiment_report.run(chosen, _scenario(chosen.scenario), _bundle(args))
    print(json.dumps(result) if args.json else experiment_report.text(result))
    return EXIT_OK


def _study_xnet(args: argparse.Namespace) -> int:
    from ground_station import study_space_xnet as study

    result = study.run(study.Options(slots=args.slots, seeds=args.seeds))
    print(json.dumps(result) if args.json else study.report(result))
    return EXIT_OK


def _study_placement(args: argparse.Namespace) -> int:
    from ground_station import study_placement as study

    result = study.run(_bundle(args), args.instances, args.seed, args.limit_s, args.nodes)
    print(json.dumps(result) if args.json else study.report(result))
    return EXIT_OK


def _benchmark_decode(args: argparse.Namespace) -> int:
    import contextlib

    from ground_station import benchmark
    from ground_station.run_folder import run_folder

    with contextlib.ExitStack() as stack:
        if args.synthetic:
            from quantize.synthetic import synthetic

            hidden, intermediate, layers, experts, top_k = args.synthetic
            bundle = stack.enter_context(run_folder("synthetic")) / "bundle"
            synthetic(
                bundle,
                hidden,
                intermediate,
                layers,
                experts,
                top_k,
                precision=(args.precision,),
                trunk_precision=args.trunk_precision,
            )
        else:
            bundle = _bundle(args)
        result = benchmark.decode(
            bundle,
            args.precision,
            args.codec,
            args.nodes,
            args.copies,
            args.tokens,
            args.rounds,
            args.threads,
            args.trunk_threads,
        )
    result["unsteady"] = _unsteady(result)
    if args.json:
        print(json.dumps(result))
        return EXIT_OK
    for name, value in result["tokens_per_s"].items():
        print(f"{name:12} {value:8.1f} tokens/s")
    spread = result["spread"]
    print(
        f"ratio distributed / single {result['ratio']:.3f} (min {spread['min']:.3f}, max {spread['max']:.3f}, n {result['n']})"
    )
    print(f"control: one process / bare onnxruntime loop {result['control']:.3f}")
    if result["unsteady"]:
        print(
            "unsteady: the rounds differ by more than 30 %, the machine was busy; close other programs and measure again"
        )
    print(f"overhead {result['overhead_ms_per_layer']:.3f} ms per layer; breakdown of a distributed token in ms:")
    print("  " + ", ".join(f"{name} {value:.2f}" for name, value in result["breakdown_ms"].items()))
    return EXIT_OK


def _unsteady(result: dict) -> bool:
    """Whether the rounds differ so much that the machine must have been busy."""
    return result["spread"]["max"] > UNSTEADY * result["spread"]["min"]


def _benchmark_selection(args: argparse.Namespace) -> int:
    from ground_station import benchmark_selection

    result = benchmark_selection.selection_times(args.decisions)
    print(json.dumps(result) if args.json else benchmark_selection.table(result))
    return EXIT_OK


def _benchmark_quality(args: argparse.Namespace) -> int:
    from ground_station import benchmark_quality, evaluate

    bundle = _bundle(args)
    texts = evaluate.domains(args.text or reference_bundle().parent / "heldout")
    result = benchmark_quality.quality(bundle, texts, args.setting, args.limit_bytes)
    print(json.dumps(result) if args.json else benchmark_quality.table_of(result))
    return EXIT_OK


def _benchmark_compression(args: argparse.Namespace) -> int:
    from ground_station import benchmark_compression

    text = args.text or reference_bundle().parent / "heldout"
    result = benchmark_compression.compression(_bundle(args), text, args.precision, args.draws, args.threads)
    print(json.dumps(result) if args.json else benchmark_compression.report(result))
    return EXIT_OK


def _benchmark_sim(args: argparse.Namespace) -> int:
    from firmware_sim import benchmark

    result = benchmark.as_dict(benchmark.sim(args.satellites, args.step_s, args.accelerator, args.rounds))
    result["unsteady"] = _unsteady(result)
    if args.json:
        print(json.dumps(result))
        return EXIT_OK
    spread = result["spread"]
    print(f"{result['satellites']} satellites, {result['steps']} steps of {result['step_s']:g} s, one orbit:")
    print(
        f"{result['seconds']:.2f} s (min {spread['min']:.2f}, max {spread['max']:.2f}, n {result['n']}), "
        f"{result['cpu_s']:.2f} s of processor time, accelerator {result['accelerator']}"
    )
    print(f"memory: {result['peak_mb']:.0f} MB in all, {result['step_peak_mb']:.1f} MB of it for the satellites")
    if result["unsteady"]:
        print("unsteady: the rounds differ by more than 30 %, the machine was busy; go by the processor time")
    return EXIT_OK


def _benchmark_routing(args: argparse.Namespace) -> int:
    from ground_station import benchmark_routing
    from ground_station.run_folder import run_folder
    from quantize.synthetic import synthetic

    with run_folder("synthetic") as folder:  # shards large enough for 100 Mb/s
        synthetic(folder / "bundle", 512, 512, 1, 2, 1, precision=("fp32", "int8", "int4"), vocab=256)
        result = benchmark_routing.routing(folder / "bundle", args.rounds)
    print(json.dumps(result) if args.json else benchmark_routing.report(result))
    return EXIT_OK if result["holds"] else EXIT_CHECK


class _Terminated(BaseException):
    """SIGTERM or SIGHUP came. A BaseException, as KeyboardInterrupt is: nobody may take it for an error of the work."""


def _unwind_when_told_to_end() -> None:
    """Lets SIGTERM and SIGHUP stop children and remove temporary folders as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        return

    def terminate(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # one is enough: a second must not cut the stopping short
        raise _Terminated

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup's choice stands
            signal.signal(number, terminate)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Errors are one line that names the next step; a bug shows its traceback."""
    try:
        root = parser()
        args = root.parse_args(argv)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if args.version:
        from importlib import metadata

        try:
            print(f"spacemoe-kit {metadata.version('spacemoe-kit')}")
        except metadata.PackageNotFoundError:
            print("spacemoe-kit source")
        return EXIT_OK
    if args.command is None:
        root.print_help()
        return EXIT_USAGE
    try:
        _unwind_when_told_to_end()
        code = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a closed pipe shows here, not after the exit code was chosen
        return code
    except _Terminated:
        print("terminated: everything that was started has been stopped", file=sys.stderr)
        return EXIT_TERMINATED
    except BrokenPipeError:
        # the reader has gone (`spacemoe ... | head`); what is left in the buffer must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("spacemoe: nobody reads the output any more: stopped", file=sys.stderr)
        return EXIT_FAILED
    except MemoryError as error:
        text = " ".join(str(error).split()) or "out of memory"
        print(f"spacemoe: {text}: free memory or take a smaller model or context", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("\ninterrupted: everything that was started has been stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        print(
            f"spacemoe: {error.name} is not installed: in a clone: pip install -c constraints.txt -e '.[all]'",
            file=sys.stderr,
        )
        return EXIT_FAILED
    except (ValueError, RuntimeError, OSError) as error:
        # RuntimeError's and OSError's own text can span lines; users get one
        print(f"spacemoe: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
