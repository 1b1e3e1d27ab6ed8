"""Quality of a bundle on held-out text: bits per byte per domain and perplexity, one precision beside the other.

Every token is scored exactly once with at least `context - stride` tokens before it (but for the start of a text). Runs in
this process on onnxruntime alone. Leaves out: quality under faults and budgets (experiments).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ground_station import selection
from ground_station.decode import Decoder
from ground_station.dispatch import Table
from ground_station.local import LocalExperts
from ground_station.placement import round_robin
from ground_station.text import Text
from ground_station.trunk import Trunk
from node_agent import shard

CONTEXT = 512
STRIDE = 256


class EvaluationError(ValueError):
    """There is nothing to evaluate on; the text names the next step."""


@dataclass(frozen=True)
class Score:
    """Sums over one text; `nats` is the negative log-likelihood of `tokens` tokens that stand for `bytes` bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


def domains(path: Path) -> dict[str, list[str]]:
    """Domain -> documents of a folder of .txt (one document each) or .jsonl files ({"text": ...} per line), or of one file.

    Raises: EvaluationError when there is none.
    """
    import json

    files = sorted([*path.glob("*.txt"), *path.glob("*.jsonl")]) if path.is_dir() else [path]
    found: dict[str, list[str]] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            found[file.stem] = (
                [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
                if file.suffix == ".jsonl"
                else [text]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{file} is not readable as text ({str(error)[:80]}): give .txt or .jsonl") from None
    if not any(any(documents) for documents in found.values()):
        raise EvaluationError(f"{path} holds no text: give a .txt or .jsonl file or a folder of them")
    return found


class CountingTopK:
    """The model's own routing, which counts who is chosen. `counts[layer]`: choices per expert so far."""

    def __init__(self, manifest: shard.Manifest):
        self.policy = selection.make("topk", manifest.routing, manifest.dims.top_k, manifest.dims.experts)
        self.experts = manifest.dims.experts
        self.counts = {layer: np.zeros(self.experts, np.int64) for layer in manifest.moe_layers}

    def __call__(self, layer: int, logits: np.ndarray) -> selection.Choice:
        choice = self.policy(layer, logits)
        self.counts[layer] += np.bincount(choice.experts.ravel(), minlength=self.experts)
        return choice

    def take(self) -> list[list[float]]:
        """Shares [L][E] since the last call."""
        shares = [(count / max(1, count.sum())).tolist() for count in self.counts.values()]
        for count in self.counts.values():
            count[:] = 0
        return shares


def mutual_information_bits(shares: list[list[float]]) -> float:
    """How much one choice of expert in a layer says about the domain, domains equally likely; `shares` is [domains][E]."""
    conditional = np.asarray(shares)
    marginal = conditional.mean(0)
    ratio = np.divide(conditional, marginal, out=np.ones_like(conditional), where=conditional > 0)
    return float((conditional * np.log2(ratio)).sum() / len(conditional))


def model(root: Path, manifest: shard.Manifest, precision: str, threads: int) -> Decoder:
    """The whole bundle in this process, all experts in one precision, no codec."""
    holdings = round_robin(manifest, {"local": 2**62}, precision)
    experts = LocalExperts(root, manifest, Table(holdings), None, threads)
    return Decoder(Trunk(root, manifest, threads), CountingTopK(manifest), experts, manifest.eos_ids)


def score(decoder: Decoder, ids: list[int], n_bytes: int, context: int = CONTEXT, stride: int = STRIDE) -> Score:
    """Likelihood of ids[1:] (ids[0] is context: the begin-of-text token)."""
    nats, scored = 0.0, 1
    while scored < len(ids):
        begin = max(0, scored - (context - stride))
        end = min(begin + context, len(ids))
        sequence = decoder.trunk.sequence(end - begin)
        logits = sequence.prefill(ids[begin : end - 1], decoder.moe, every_position=True).astype(np.float64)
        targets = np.asarray(ids[scored:end])
        rows = logits[scored - 1 - begin :]
        top = rows.max(1)
        log_sum = top + np.log(np.exp(rows - top[:, None]).sum(1))
        nats += float((log_sum - rows[np.arange(len(targets)), targets]).sum())
        scored = end
    return Score(nats, len(ids) - 1, n_bytes)


@dataclass(frozen=True)
class Evaluation:
    """Of one precision: domain -> Score, and domain -> shares [L][E] of the experts (each domain's windows overlap)."""

    scores: dict[str, Score]
    expert_use: dict[str, list[list[float]]]


def evaluate(
    root: Path, precision: str, texts: dict[str, list[str]], threads: int = 2, limit_bytes: int | None = None
) -> Evaluation:
    """Scores a bundle in one precision; `limit_bytes` cuts each domain. Shows a progress bar on a terminal.

    Raises: shard.BundleError, EvaluationError.
    """
    from tqdm import tqdm

    manifest = shard.read_manifest(root)
    text = Text(root, manifest)
    decoder = model(root, manifest, precision, threads)
    start = manifest.bos_id if manifest.bos_id is not None else next(iter(manifest.eos_ids), None)
    if start is None:
        raise EvaluationError(f"{root} names no begin- or end-of-text token: cannot start a text")
    scores: dict[str, Score] = {}
    use: dict[str, list[list[float]]] = {}
    for domain, documents in tqdm(texts.items(), desc=f"evaluate {precision}", disable=None, leave=False):
        ids: list[int] = []
        n_bytes = 0
        for document in documents:
            data = document.encode()
            if limit_bytes is not None:
                data = data[: max(0, limit_bytes - n_bytes)]
            if not data:
                break
            ids += [start, *text.encode(data.decode(errors="ignore"))]
            n_bytes += len(data)
        scores[domain] = score(decoder, ids, n_bytes)
        use[domain] = decoder.policy.take()
    return Evaluation(scores, use)


def summary(result: Evaluation) -> dict:
    """For JSON: per domain and the unweighted mean of bits per byte, perplexity over all tokens, use of experts."""
    scores = result.scores
    total = Score(
        sum(s.nats for s in scores.values()),
        sum(s.tokens for s in scores.values()),
        sum(s.bytes for s in scores.values()),
    )
    by_layer = zip(*result.expert_use.values())
    return {
        "domains": {name: round(s.bits_per_byte, 4) for name, s in scores.items()},
        "mean_bits_per_byte": round(sum(s.bits_per_byte for s in scores.values()) / len(scores), 4),
        "perplexity": round(total.perplexity, 4),
        "tokens": total.tokens,
        "bytes": total.bytes,
        "expert_use": {
            "mutual_information_bits": [round(mutual_information_bits(list(shares)), 4) for shares in by_layer],
            "domains": {
                name: [[round(share, 4) for share in layer] for layer in shares]
                for name, shares in result.expert_use.items()
            },
        },
    }
