"""`spacemoe quantize`, `bundle` and `evaluate`: make a bundle of expert shards, look into it, add what was measured, score it on text.

Leaves out: the work (the quantize room, node_agent.shard, evaluate.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ground_station.cli_shared import EXIT_CHECK, EXIT_OK, bundle_of, positive, reference_bundle, wrapped


def add(commands, command) -> None:
    """Declares them in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
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
        if name == "verify":
            part.add_argument("--signer", metavar="HEX", help="and that this Ed25519 key signed it and each shard")
            part.add_argument("--dir", type=Path, metavar="FLEET", help="and that the key of this fleet's folder did")
    part = command("sign", "sign a bundle and each of its shards, for boards that take no others", _bundle_sign, parts)
    part.add_argument("bundle", type=Path, metavar="BUNDLE")
    whose = part.add_mutually_exclusive_group(required=True)
    whose.add_argument(
        "--key", type=Path, metavar="FILE", help="private Ed25519 key in PEM, readable by its owner only"
    )
    whose.add_argument("--dir", type=Path, metavar="FLEET", help="a fleet's folder: its signing key")
    part = command("calibrate", "measure a bundle's layer sensitivities on a text, and store them", _recalibrate, parts)
    part.add_argument("bundle", type=Path, metavar="BUNDLE")
    part.add_argument("--text", type=Path, required=True, metavar="FILE", help="text that nothing is reported on")
    part.add_argument("--max-tokens", type=positive, metavar="N", help="of the text's start, to choose from")
    part = command("costs", "store what boards' self-tests measured: ms and joules per expert", _bundle_costs, parts)
    part.add_argument("bundle", type=Path, metavar="BUNDLE")
    part.add_argument(
        "selftest", type=Path, nargs="+", metavar="FILE", help="from node-agent selftest --bundle DIR --json"
    )
    part.add_argument("--board", metavar="NAME", help="the kind of board of the one self-test that does not say it")

    evaluate = command("evaluate", "bits per byte and perplexity of a bundle on held-out text", _evaluate)
    evaluate.add_argument("bundle", type=Path, nargs="?", help="bundle (default: the reference model)")
    evaluate.add_argument(
        "--text", type=Path, help="folder of .txt/.jsonl or one file (default: reference held-out text)"
    )
    evaluate.add_argument("--precision", default="all", help="comma-separated, or all that the bundle has")
    evaluate.add_argument("--limit-bytes", type=positive, help="use only that much text of each domain")
    evaluate.add_argument("--threads", type=positive, default=2)


def _quantize(args: argparse.Namespace) -> int:
    from quantize import command as quantize_command

    return quantize_command.run(args)


def _bundle_show(args: argparse.Namespace) -> int:
    from ground_station import bundle_sign, costs
    from node_agent import shard
    from node_agent.costs import words
    from node_agent.frame import PRECISIONS

    root = bundle_of(args)
    manifest = shard.read_manifest(root)
    boards = costs.boards(root, manifest)
    signer, signature_words = bundle_sign.words(root, manifest)
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
        "costs": {name: vars(costs.read(root, manifest, name)) for name in boards},
        "signer": signer,
        "signature": signature_words,
    }
    for row in facts["costs"].values():
        row |= {key: {p: v for p, v in zip(PRECISIONS, row[key].tolist()) if v == v} for key in ("joules", "ms")}
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
    print(wrapped(f"{manifest.name}: {manifest.family}, {manifest.licence}, made {manifest.created_at}"))
    experts = f"{dims.experts} experts top-{dims.top_k}"
    print(wrapped(f"  {dims.layers} layers, hidden {dims.hidden}, {experts}, vocabulary {dims.vocab}"))
    print(wrapped(f"  {signature_words}"))
    print(f"  trunk {manifest.trunk_precision}: {facts['trunk_bytes'] / 1e6:.1f} MB")
    for precision, row in facts["precisions"].items():
        error = "" if row["mean_rel_error"] is None else f", mean error {row['mean_rel_error']:.3%} of fp32"
        print(wrapped(f"  {precision:8} {row['shards']} shards, {row['bytes'] / 1e6:.1f} MB{error}"))
    for what, text in manifest.recipe.items():
        print(wrapped(f"  {'recipe hash' if what == 'hash' else what}: {text}"))
    for found in boards.values():
        print("\n".join(wrapped(f"  {line}") for line in words(found)))
    return EXIT_OK


def _recalibrate(args: argparse.Namespace) -> int:
    from node_agent import bundle_file
    from quantize import recalibrate

    found = recalibrate.recalibrate(args.bundle, args.text, args.max_tokens, progress=not args.json)
    note = bundle_file.stale_signature(args.bundle)
    if args.json:
        print(json.dumps({name: value.tolist() for name, value in found.items()} | {"note": note}))
        return EXIT_OK
    print(f"nats per relative noise energy in a layer's output, {int(found['sensitivity_tokens'])} tokens:")
    for position, (value, error) in enumerate(zip(found["sensitivity"], found["sensitivity_error"])):
        print(f"  MoE layer {position + 1}: {value:.3f} +- {error:.3f}")
    if note:
        print(wrapped(note))
    return EXIT_OK


def _bundle_costs(args: argparse.Namespace) -> int:
    from ground_station import costs
    from node_agent import bundle_file
    from node_agent.costs import words

    known = costs.store(args.bundle, args.selftest, args.board)
    note = bundle_file.stale_signature(args.bundle)
    if args.json:
        print(json.dumps({"boards": sorted(known), "note": note}))
        return EXIT_OK
    for found in known.values():
        print("\n".join(wrapped(line) for line in words(found)))
    if note:
        print(wrapped(note))
    return EXIT_OK


def _bundle_verify(args: argparse.Namespace) -> int:
    from ground_station import bundle_sign
    from node_agent import shard, signature

    root = bundle_of(args)
    manifest = shard.read_manifest(root)
    signers = () if args.signer is None else (signature.check_signer(args.signer),)
    if args.dir is not None:
        from ground_station.fleet_records import FleetFolder

        signers += (FleetFolder.open(args.dir).signer(),)
    entries = bundle_sign.files_of(manifest)
    problems = []
    for entry in entries:
        try:
            shard.verify_file(root, entry)
        except shard.BundleError as error:
            problems.append(str(error))
    altered = len(problems)
    if signers:
        problems += bundle_sign.problems(root, manifest, signers)
    if args.json:
        facts = {"files": len(entries), "bytes": sum(e.bytes for e in entries), "problems": problems}
        print(json.dumps(facts | {"signers": list(signers)}))
    else:
        for problem in problems:
            print(problem)
        print(f"{len(entries) - altered} of {len(entries)} files are as the manifest says")
        if signers and len(problems) == altered:
            print(wrapped(f"manifest and {len(manifest.shards)} shards are signed by {' or '.join(signers)}"))
    return EXIT_CHECK if problems else EXIT_OK


def _bundle_sign(args: argparse.Namespace) -> int:
    from ground_station import bundle_sign

    path = args.key
    if path is None:
        from ground_station import fleet_records

        path = fleet_records.FleetFolder.open(args.dir).path(fleet_records.SIGNING_KEY)
    signed = bundle_sign.sign(args.bundle, bundle_sign.load_key(path))
    if args.json:
        print(json.dumps(vars(signed)))
    else:
        print(wrapped(f"{args.bundle}: manifest and {signed.shards} shards are signed by {signed.signer}"))
    return EXIT_OK


def _evaluate(args: argparse.Namespace) -> int:
    from ground_station import evaluate
    from node_agent import shard

    root = bundle_of(args)
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
