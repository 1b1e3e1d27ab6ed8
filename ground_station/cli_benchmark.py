"""`spacemoe benchmark`: its kinds, their arguments, and what is printed of their results.

Leaves out: the measuring (the benchmark modules of each room).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ground_station.cli_shared import CODECS, EXIT_CHECK, EXIT_OK, bundle_of, positive, reference_bundle

UNSTEADY = 1.3  # the slowest round over the quickest


def add(commands, command) -> None:
    """Declares them in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
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
    decode.add_argument("--nodes", type=positive, default=4)
    decode.add_argument("--copies", type=positive, default=2, help="nodes that hold each expert (default: %(default)s)")
    decode.add_argument("--tokens", type=positive, default=32, help="per round (default: %(default)s)")
    decode.add_argument("--rounds", type=positive, default=15, help="counted rounds (default: %(default)s)")
    decode.add_argument("--threads", type=positive, default=2, help="of the single process (default: %(default)s)")
    decode.add_argument(
        "--trunk-threads", type=positive, default=2, help="of the trunk beside agents (default: %(default)s)"
    )
    select = command("selection", "microseconds per decision of every selection policy", _benchmark_selection, kinds)
    select.add_argument("--decisions", type=positive, default=400, help="counted ones (default: %(default)s)")
    quality = command(
        "quality", "perplexity against joules of every selection policy on held-out text", _benchmark_quality, kinds
    )
    quality.add_argument("--bundle", type=Path, help="bundle to run (default: the reference model)")
    quality.add_argument("--text", type=Path, help="folder of .txt/.jsonl or one file (default: held-out text)")
    quality.add_argument(
        "--setting", choices=("runs", "fleet"), default="runs", help="what a run costs (default: %(default)s, 1 each)"
    )
    quality.add_argument(
        "--limit-bytes", type=positive, default=1500, help="scored of each domain (default: %(default)s)"
    )
    compression = command("compression", "bytes on the wire against perplexity", _benchmark_compression, kinds)
    compression.add_argument("--bundle", type=Path, help="bundle to run (default: the reference model)")
    compression.add_argument("--text", type=Path, help="folder of .txt/.jsonl or one file (default: held-out text)")
    compression.add_argument("--precision", default="int8", help="precision of the experts (default: %(default)s)")
    compression.add_argument("--draws", type=positive, default=3, help="held-out texts (default: %(default)s)")
    compression.add_argument("--threads", type=positive, default=2, help="default: %(default)s")
    simulate = command("sim", "a constellation's physics for one orbit: seconds and memory", _benchmark_sim, kinds)
    simulate.add_argument("--satellites", type=positive, default=10_000, help="default: %(default)s")
    simulate.add_argument("--step-s", type=float, default=10.0, help="default: %(default)s s, at most 10")
    simulate.add_argument("--rounds", type=positive, default=5, help="counted rounds (default: %(default)s)")
    simulate.add_argument(
        "--accelerator",
        choices=("auto", "numba", "none"),
        default="auto",
        help="auto takes numba where it is installed (extra sim-fast)",
    )
    route = command("routing", "shards over paced links beside the contact plan (emulated)", _benchmark_routing, kinds)
    route.add_argument("--rounds", type=positive, default=5, help="counted transfers per link (default: %(default)s)")
    links = command(
        "links", "hidden states over emulated links beside the plan, and what follows the link", _benchmark_links, kinds
    )
    links.add_argument("--bundle", type=Path, help="bundle to run (default: the reference model)")
    links.add_argument("--text", type=Path, help="folder of .txt/.jsonl or one file (default: held-out text)")
    links.add_argument("--rounds", type=positive, default=3, help="counted rounds per link (default: %(default)s)")
    links.add_argument("--tokens", type=positive, default=24, help="decoded per round (default: %(default)s)")
    links.add_argument("--text-tokens", type=positive, default=2560, help="held-out tokens (default: %(default)s)")
    bears = command("mission", "what a ground station bears: many nodes, a watcher, kill -9", _benchmark_mission, kinds)
    bears.add_argument("--nodes", type=positive, default=200, help="publishers at 1 Hz (default: %(default)s)")
    bears.add_argument("--seconds", type=positive, default=300, help="default: %(default)s")
    bears.add_argument(
        "--kill", action="store_true", help="kill -9 of the station halfway, and a restart on its archive"
    )
    idle = command("agent", "processor time of idle agents: sampling, guard and telemetry", _benchmark_agent, kinds)
    idle.add_argument("--bundle", type=Path, help="bundle (default: the reference model)")
    idle.add_argument("--seconds", type=positive, default=10, help="of one window (default: %(default)s)")
    idle.add_argument("--rounds", type=positive, default=3, help="windows (default: %(default)s)")


def _benchmark_mission(args: argparse.Namespace) -> int:
    from ground_station import benchmark_mission

    def say(text: str) -> None:
        print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)

    live = sys.stderr.isatty()
    result = benchmark_mission.measure(args.nodes, args.seconds, args.kill, say=say if live else lambda text: None)
    if live:
        print(file=sys.stderr)
    print(json.dumps(result) if args.json else benchmark_mission.report(result))
    return EXIT_OK if result["holds"] else EXIT_CHECK


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 5:
        raise argparse.ArgumentTypeError(f"{text!r} is not HIDDEN,INTERMEDIATE,LAYERS,EXPERTS,TOPK")
    return tuple(positive(part) for part in parts)


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
            bundle = bundle_of(args)
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

    bundle = bundle_of(args)
    texts = evaluate.domains(args.text or reference_bundle().parent / "heldout")
    result = benchmark_quality.quality(bundle, texts, args.setting, args.limit_bytes)
    print(json.dumps(result) if args.json else benchmark_quality.table_of(result))
    return EXIT_OK


def _benchmark_compression(args: argparse.Namespace) -> int:
    from ground_station import benchmark_compression

    text = args.text or reference_bundle().parent / "heldout"
    result = benchmark_compression.compression(bundle_of(args), text, args.precision, args.draws, args.threads)
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


def _benchmark_links(args: argparse.Namespace) -> int:
    from ground_station import benchmark_links

    text = args.text or reference_bundle().parent / "heldout"
    result = benchmark_links.run(bundle_of(args), text, args.rounds, args.tokens, args.text_tokens)
    print(json.dumps(result) if args.json else benchmark_links.report(result))
    return EXIT_OK if result["holds"] else EXIT_CHECK


def _benchmark_agent(args: argparse.Namespace) -> int:
    from ground_station import benchmark_agent

    result = benchmark_agent.measure(bundle_of(args), args.seconds, args.rounds)
    print(json.dumps(result) if args.json else benchmark_agent.report(result))
    return EXIT_OK if result["holds"] else EXIT_CHECK
