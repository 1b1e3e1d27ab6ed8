"""Writes the reference model's card from recorded figures, so that no number in it is typed by hand.

    python -m quantize.reference.card --collect --work DIR      # copies the run's records into figures/
    python -m quantize.reference.card                           # writes checkpoint/README.md (and the bundle's copy) from figures/

figures/: sources.json (corpus), curve.json and training.json (training run), baselines.json (compressors), evaluation.json
(`spacemoe evaluate --json` on a bundle with fp32 shards), control_curve.json (the dense control's run) and control.json (its
held-out figures, `train --evaluate --name dense`, once it has seen as many tokens as the model).
Leaves out: measuring anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from node_agent import shard
from node_agent.shard import atomic_file

HERE = Path(__file__).resolve().parent
FIGURES, CHECKPOINT, BUNDLE = HERE / "figures", HERE / "checkpoint", HERE / "bundle"
CURVE_POINTS = 40
MODEL_RUN = "moe"

PREAMBLE = """---
license: apache-2.0
language: en
tags: [mixture-of-experts, qwen3_moe, reference-model]
---
# The reference model of spacemoe-kit

A small mixture-of-experts language model in Qwen3-MoE form, trained from scratch by the scripts in `quantize/reference`, so that
the kit can be run, tested and measured on a *trained* model without a download. It is a test object: it writes text that looks
like its sources, knows nothing reliably, and must not be used for anything else.

| | |
|---|---|
| parameters | 8,145,664, of which 3.43 M are active per token |
| form | hidden 256, 4 layers, 16 experts top-4 (SwiGLU, intermediate 128, gates renormalised), 4 heads / 2 KV heads of 64 |
| vocabulary | 4,096, byte-level BPE trained on the training text; embeddings tied |
| context | trained and evaluated at 512 tokens |
| weights | bf16 safetensors under transformers' names; Apache-2.0 |
"""

REBUILD = """## Rebuild

```sh
pip install -c constraints.txt -e '.[all,reference]'
python -m quantize.reference.corpus                  # packages to tokens (programs it needs are named if they are missing)
python -m quantize.reference.train --name moe --minutes 180 --decay-minutes 28   # resumable: --resume
python -m quantize.reference.train --name dense --dense --follow moe             # the control
python -m quantize.reference.train --name moe --export quantize/reference/checkpoint
spacemoe quantize quantize/reference/checkpoint -o quantize/reference/bundle --name spacemoe-reference-8m --precision int8,int4,int2
```

The text comes from packages whose versions move on, so a rebuilt corpus can differ slightly from the one recorded above; the
tokenizer that is shipped is the one the weights belong to.
"""


def _read(name: str) -> dict | list | None:
    path = FIGURES / name
    return json.loads(path.read_text()) if path.is_file() else None


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _rate_at(losses: list[dict], tokens: int) -> float:
    """Learning-rate multiplier that was logged last before `tokens`."""
    return next((line["lr"] for line in reversed(losses) if line["tokens"] <= tokens), 0.0)


def final_branch(lines: list[dict]) -> list[dict]:
    """A run's log without what was given up: a run that goes on from an earlier step than it had reached repeats from there."""
    kept: list[dict] = []
    for line in lines:
        if line.get("start"):
            kept = [earlier for earlier in kept if earlier["step"] <= line["step"]]
        kept.append(line)
    return kept


def collect(work: Path, run: str) -> None:
    """Copies what a run and its corpus recorded into figures/ (a curve of at most CURVE_POINTS losses, every evaluation)."""
    log = (work / "runs" / run / "log.jsonl").read_text()
    lines = final_branch([json.loads(line) for line in log.splitlines()])
    losses = [line for line in lines if "loss" in line]
    step = max(1, -(-len(losses) // (CURVE_POINTS - 1)))  # and the last one
    dev = [
        {"tokens": line["tokens"], "mean_bits_per_byte": line["dev_mean"], "lr": _rate_at(losses, line["tokens"])}
        for line in lines
        if "dev_mean" in line
    ]
    if run != MODEL_RUN:
        _write(FIGURES / "control_curve.json", json.dumps({"dev": dev}, indent=1) + "\n")
        return
    kept = [{key: line[key] for key in ("tokens", "loss", "lr")} for line in losses[::step] + losses[-1:]]
    curve = {"loss": kept, "dev": dev}
    _write(FIGURES / "curve.json", json.dumps(curve, indent=1) + "\n")
    _write(FIGURES / "sources.json", (work / "sources.json").read_text())
    _write(FIGURES / "training.json", (CHECKPOINT / "training.json").read_text())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _control_so_far(model: list[dict], control: list[dict]) -> str:
    """The two runs' dev figures side by side, the model's interpolated to the control's tokens (both at the full rate)."""
    stable = [item for item in model if item["lr"] == 1.0]
    rows = []
    for item in control:
        before = [m for m in stable if m["tokens"] <= item["tokens"]]
        after = [m for m in stable if m["tokens"] >= item["tokens"]]
        if item["lr"] != 1.0 or not before or not after:
            continue
        a, b = before[-1], after[0]
        share = (item["tokens"] - a["tokens"]) / (b["tokens"] - a["tokens"]) if b is not a else 0.0
        value = a["mean_bits_per_byte"] + share * (b["mean_bits_per_byte"] - a["mean_bits_per_byte"])
        rows.append([f"{item['tokens'] / 1e6:.1f}", f"{value:.3f}", f"{item['mean_bits_per_byte']:.3f}"])
    text = (
        "\nThe dense control (the same active size: SwiGLU of 512 in place of 4 of 16 experts of 128; the same data in the same "
        "order at the same rates) has not been trained to the model's number of tokens yet."
    )
    if not rows:
        return text + "\n"
    return (
        text
        + " So far, mean dev bits per byte at equal tokens, both at the full learning rate (the model's values interpolated "
        "between its evaluations):\n\n" + _table(["M tokens", "model", "dense control"], rows)
    )


def _quality(evaluation: dict, baselines: dict, control: dict | None, so_far: str) -> str:
    names = list(evaluation)
    head = ["domain", *names, "dense control", "xz -9e", "PPMd o8", "PPMd primed"]
    rows = []
    for domain, row in baselines["domains"].items():
        rows.append(
            [
                domain,
                *(f"{evaluation[name]['domains'][domain]:.3f}" for name in names),
                f"{control['domains'][domain]:.3f}" if control else "-",
                *(f"{row[key]:.3f}" for key in ("xz_9e", "ppmd_o8", "ppmd_o8_primed")),
            ]
        )
    mean = [
        "**mean**",
        *(f"**{evaluation[name]['mean_bits_per_byte']:.3f}**" for name in names),
        f"**{control['mean_bits_per_byte']:.3f}**" if control else "-",
        *(f"**{baselines['mean'][key]:.3f}**" for key in ("xz_9e", "ppmd_o8", "ppmd_o8_primed")),
    ]
    ratios = ", ".join(f"{name} {evaluation[name]['perplexity_ratio_to_fp32']:.4f}" for name in names if name != "fp32")
    text = (
        "## Held-out bits per byte\n\n"
        "About 90 kB per domain that were never trained on, every token scored once, windows of 512 tokens that move by 256. "
        "The compressors see the same bytes; the primed PPMd has read all "
        f"{baselines['primed_with_bytes'] / 1e6:.0f} MB of the training text first.\n\n"
        + _table(head, [*rows, mean])
        + f"\nPerplexity of the quantized bundle over fp32: {ratios}.\n"
    )
    if control:
        text += (
            f"\nThe dense control has the same active size (SwiGLU of 512 in place of 4 of 16 experts of 128), saw the same "
            f"{control['tokens'] / 1e6:.1f} M tokens in the same order at the same rates.\n"
        )
    else:
        text += so_far
    return text


def _experts(use: dict) -> str:
    bits = use["mutual_information_bits"]
    rows = []
    for domain, layers in use["domains"].items():
        cells = []
        for shares in layers:
            top = sorted(range(len(shares)), key=lambda e: -shares[e])[:3]
            cells.append(", ".join(f"{e} ({shares[e]:.0%})" for e in top))
        rows.append([domain, *cells])
    return (
        "## Use of experts\n\nThe three experts that each domain's held-out text uses most, with their share of the choices "
        "(1/16 = 6 % if all were equal), and what one choice tells about the domain:\n\n"
        + _table(["domain", *(f"layer {n}" for n in range(len(bits)))], rows)
        + "\nMutual information of expert and domain per layer: "
        + ", ".join(f"{value:.3f}" for value in bits)
        + " bit.\n"
    )


def render() -> str:
    """The card's text.  Raises: FileNotFoundError that names the figures file which is missing."""
    for name in ("sources.json", "curve.json", "training.json", "baselines.json", "evaluation.json"):
        if not (FIGURES / name).is_file():
            raise FileNotFoundError(f"{FIGURES / name} is missing: see the head of {Path(__file__).name}")
    sources, curve, training = _read("sources.json"), _read("curve.json"), _read("training.json")
    baselines, evaluation, control = _read("baselines.json"), _read("evaluation.json"), _read("control.json")
    recipe = training["recipe"]
    data = _table(
        ["domain", "package (version)", "licence", "documents", "training bytes"],
        [
            [
                item["domain"],
                ", ".join(f"{name} ({version})" for name, version in item["packages"].items()),
                item["licence"],
                str(item["documents"]["train"]),
                f"{item['bytes']['train']:,}",
            ]
            for item in sources
        ],
    )
    dropped = sum(item["documents"]["near_duplicates_dropped"] for item in sources)
    worst = max(item["heldout_containment_in_train"] for item in sources)
    losses, dev = curve["loss"], curve["dev"]
    picked = losses[:: max(1, len(losses) // 10)] + losses[-1:]
    parts = [
        PREAMBLE,
        "## Data\n\n"
        + data
        + f"\n{dropped} near-duplicates were dropped (more than half of a document's word 8-grams in those kept before). Documents "
        f"are split by hash; at most {worst:.1%} of a domain's held-out 8-grams occur in the training text. Domains are drawn in "
        "proportion to the square root of their size.\n",
        "## Training\n\n"
        f"{training['tokens'] / 1e6:.1f} M tokens in {training['step']:,} steps of "
        f"{recipe['sequences_per_step']} x 512, {training['elapsed_s'] / 60:.0f} minutes of wall time on 2 cores of a server that "
        "did other work beside. Muon "
        f"(rate {recipe['matrix_rate']}, momentum {recipe['matrix_momentum']}, decay {recipe['matrix_decay']}) for all "
        f"matrices, AdamW ({recipe['other_rate']}) for embedding, norms and router, bf16 arithmetic; warm-up "
        f"{recipe['warmup_steps']} steps, stable, linear fall to 0; balance loss {recipe['balance_weight']}, z-loss "
        f"{recipe['z_weight']}, clip {recipe['clip']}.\n\n"
        + _table(
            ["M tokens", *(f"{item['tokens'] / 1e6:.1f}" for item in picked)],
            [["training loss (nats/token)", *(f"{item['loss']:.2f}" for item in picked)]],
        )
        + "\n"
        + _table(
            ["M tokens", *(f"{item['tokens'] / 1e6:.1f}" for item in dev)],
            [["dev bits per byte (mean)", *(f"{item['mean_bits_per_byte']:.3f}" for item in dev)]],
        ),
        _quality(
            evaluation, baselines, control, _control_so_far(dev, (_read("control_curve.json") or {"dev": []})["dev"])
        ),
        _experts(next(iter(evaluation.values()))["expert_use"]),
        REBUILD,
    ]
    return "\n".join(parts)


def _refresh_bundle(card: str) -> None:
    """The bundle carries the card too: its copy and the manifest's entry follow."""
    manifest = shard.read_manifest(BUNDLE)
    entry = shard.write_file(BUNDLE, "README.md", card.encode())
    files = tuple(entry if item.path == entry.path else item for item in manifest.files)
    shard.write_manifest(BUNDLE, dataclasses.replace(manifest, files=files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", action="store_true", help="copy the records of a run into figures/ and stop")
    parser.add_argument("--work", type=Path, help="folder of corpus and runs, for --collect")
    parser.add_argument("--name", default=MODEL_RUN, help="run, for --collect (default: %(default)s)")
    args = parser.parse_args()
    if args.collect:
        if args.work is None:
            parser.error("--collect needs --work DIR")
        collect(args.work, args.name)
    else:
        card = render()
        _write(CHECKPOINT / "README.md", card)
        if BUNDLE.is_dir():
            _refresh_bundle(card)


if __name__ == "__main__":
    main()
