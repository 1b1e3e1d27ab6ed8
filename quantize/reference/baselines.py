"""What general compressors make of the held-out text: the yardstick beside the reference model's bits per byte.

    python -m quantize.reference.baselines --work DIR

`xz -9e` and PPMd (variant H as in 7-Zip, order 8) on the same bytes, and PPMd primed with all training text that the model
saw. A primed state cannot be copied, so each domain is coded in a forked child of the primed process. JSON on stdout.
Needs pyppmd. Leaves out: the model's own figures (`spacemoe evaluate`).
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
from pathlib import Path

from quantize.reference.sources import DOMAINS, default_work

PPMD_ORDER = 8
PPMD_MEMORY_BYTES = 1 << 30
SEPARATOR = "\n\n"


def held_out_text(work: Path, domain: str, part: str = "heldout") -> bytes:
    """A domain's documents of one part, joined by blank lines."""
    with open(work / part / f"{domain}.jsonl", encoding="utf-8") as file:
        return SEPARATOR.join(json.loads(line)["text"] for line in file).encode()


def xz_bits_per_byte(text: bytes) -> float:
    """Size under xz -9e."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def _encoder():
    import pyppmd

    return pyppmd.Ppmd7Encoder(PPMD_ORDER, PPMD_MEMORY_BYTES)


def ppmd_bits_per_byte(text: bytes, primed=None) -> float:
    """Size under PPMd; `primed` is an encoder that has read other text, which is used up."""
    encoder = primed if primed is not None else _encoder()
    size = len(encoder.encode(text)) + len(encoder.flush(endmark=False))
    return 8 * size / len(text)


def _in_child(primed, text: bytes) -> float:
    """`ppmd_bits_per_byte` with a copy of `primed`: the child's."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(writing, repr(ppmd_bits_per_byte(text, primed)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    if os.waitpid(child, 0)[1] or not answer:
        raise RuntimeError("the child that codes a domain failed: is there 2 GB of memory?")
    return float(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work(), help="folder of the corpus (default: %(default)s)")
    work = parser.parse_args().work
    primed = _encoder()
    trained_bytes = 0
    for domain in (
        d.name for d in DOMAINS
    ):  # the order matters little: PPMd keeps all statistics that its memory holds
        text = held_out_text(work, domain, "train")
        primed.encode(text)
        trained_bytes += len(text)
    rows = {}
    for domain in (d.name for d in DOMAINS):
        text = held_out_text(work, domain)
        rows[domain] = {
            "bytes": len(text),
            "xz_9e": round(xz_bits_per_byte(text), 4),
            "ppmd_o8": round(ppmd_bits_per_byte(text), 4),
            "ppmd_o8_primed": round(_in_child(primed, text), 4),
        }
    mean = {
        key: round(sum(row[key] for row in rows.values()) / len(rows), 4)
        for key in ("xz_9e", "ppmd_o8", "ppmd_o8_primed")
    }
    print(json.dumps({"domains": rows, "mean": mean, "primed_with_bytes": trained_bytes}, indent=1))


if __name__ == "__main__":
    main()
