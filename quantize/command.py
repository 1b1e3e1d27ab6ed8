"""`spacemoe quantize`: its arguments, one call of the pipeline, and what is printed.

Leaves out: everything else; heavy imports happen in `run`, so that `spacemoe --help` stays quick.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face folder: config.json, tokenizer.json, safetensors"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="BUNDLE", help="folder to write the bundle to"
    )
    parser.add_argument(
        "--precision",
        default="int8,int4",
        metavar="LIST",
        help="of int8, int4, int2, fp32, int8dyn (default: %(default)s)",
    )
    parser.add_argument("--fp32", action="store_true", help="float32 shards too")
    parser.add_argument(
        "--trunk-precision", default="fp32", metavar="NAME", help="fp32, int8 or int4 (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text to calibrate on (default: the model's calibration.txt)"
    )
    parser.add_argument("--rtn", action="store_true", help="round to nearest, without calibration")
    parser.add_argument(
        "--max-tokens", type=int, default=32_768, metavar="N", help="of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--max-context", type=int, default=4096, metavar="N", help="longest context in tokens (default: %(default)s)"
    )
    parser.add_argument("--name", help="name in the manifest (default: the folder's)")
    parser.add_argument("--force", action="store_true", help="replace a bundle of another model or recipe")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """0 when the bundle is complete.  Raises: the ValueErrors and OSErrors of `quantize.pipeline.quantize`."""
    from quantize.pipeline import quantize

    manifest = quantize(
        args.model,
        args.output,
        precisions=tuple(part.strip() for part in args.precision.split(",") if part.strip()),
        fp32=args.fp32,
        trunk_precision=args.trunk_precision,
        calibration_text=args.calibration,
        rtn=args.rtn,
        max_tokens=args.max_tokens,
        max_context=args.max_context,
        progress=not args.json,
        name=args.name,
        force=args.force,
    )
    summary = {
        "bundle": str(args.output),
        "name": manifest.name,
        "family": manifest.family,
        "shards": len(manifest.shards),
        "precisions": {},
    }
    for precision in manifest.precisions:
        shards = [shard for shard in manifest.shards if shard.precision == precision]
        errors = [shard.rel_error for shard in shards if shard.rel_error is not None]
        summary["precisions"][precision] = {
            "bytes": sum(shard.bytes for shard in shards),
            "rel_error_mean": sum(errors) / len(errors) if errors else None,
            "recipe": manifest.recipe[precision],
        }
    if args.json:
        print(json.dumps(summary))
        return 0
    print(f"{args.output}: {summary['shards']} shards of {manifest.name} ({manifest.family})")
    for precision, item in summary["precisions"].items():
        error = "not measured" if item["rel_error_mean"] is None else f"{item['rel_error_mean']:.4f}"
        print(f"  {precision:6} {item['bytes'] / 1e6:9.1f} MB  relative error {error}  {item['recipe']}")
    return 0
