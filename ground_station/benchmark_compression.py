"""`spacemoe benchmark compression`: bytes on the wire against perplexity, for uniform blocks and for importance-aware rates.

One process computes what four nodes would, with every (token, node) input and partial sum encoded and decoded, and counts whole
frames: headers, pairs, payloads, both ways. Settings (a block size, and the levels for +1 % and +5 %) are chosen on one part of the
held-out text and reported on others, draw by draw. Bytes at a given loss are read off each curve between its neighbouring points.
Leaves out: time on a link (`benchmark decode`), and transforms between channels, which need tables on the nodes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ground_station import evaluate, selection
from ground_station.benchmark_coders import Blocks, FewerExperts, Half, OneRow, Stepped, reversed_order
from ground_station.decode import Decoder
from ground_station.dispatch import Table
from ground_station.local_wire import Coder, Importance, WiredExperts
from ground_station.placement import round_robin
from ground_station.rates import Allocator, Sensitivity
from ground_station.text import Text
from ground_station.trunk import Trunk
from node_agent import compress, frame, shard

NODES = 4
WINDOW = evaluate.CONTEXT
CHOOSING_WINDOWS = 2  # of every domain; the constants of rates.py were chosen on the same tokens
BLOCK_BITS, BLOCK_SIZES = (2, 3, 4, 5, 6, 8), (32, 64)
LEVELS = (0.035, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4)
FLAT_STEPS = (0.2, 0.3, 0.45, 0.65, 0.9, 1.3)
LOSSES_PERCENT = (1.0, 5.0)
SPEED_ROWS, SPEED_HIDDEN, SPEED_RUNS = 64, 2048, 40


@dataclass(frozen=True)
class Point:
    """One setting on one text: nats of its `tokens` scored tokens; whole-frame bytes of so many values in so many messages."""

    nats: float
    tokens: int
    bytes: int
    values: int
    messages: int

    def __add__(self, other: Point) -> Point:
        return Point(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.values + other.values,
            self.messages + other.messages,
        )

    def loss_percent(self, base: Point) -> float:
        return 100 * math.expm1((self.nats - base.nats) / base.tokens)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


def bytes_at(loss_percent: float, curve: list[tuple[float, float]]) -> float | None:
    """Bytes per token at a loss, from (bytes per token, loss in percent): straight in log loss between the two points around it.

    The crossing at most bytes counts. None where the curve does not cross.
    """
    points = sorted(curve, reverse=True)
    for (more, below), (less, above) in zip(points, points[1:]):
        if below <= loss_percent < above:
            start = math.log(max(below, 0.05))
            share = (math.log(loss_percent) - start) / (math.log(above) - start)
            return more - share * (more - less)
    return None


class _Bench:
    def __init__(self, bundle: Path, precision: str, threads: int):
        self.manifest = shard.read_manifest(bundle)
        dims = self.manifest.dims
        names = {f"node-{n + 1}": 2**62 for n in range(NODES)}
        self.table = Table(round_robin(self.manifest, names, precision))
        self.experts = WiredExperts(bundle, self.manifest, self.table, None, threads=threads)
        self.topk = selection.make("topk", self.manifest.routing, dims.top_k, dims.experts)
        self.trunk = Trunk(bundle, self.manifest, threads)

    def point(self, texts: list[list[int]], coder: Coder | None, kept: int | None = None) -> Point:
        policy = self.topk if kept is None else FewerExperts(self.topk, kept)
        decoder = Decoder(self.trunk, policy, self.experts, self.manifest.eos_ids)
        self.experts.coder = coder
        experts = self.experts
        experts.sent_bytes = experts.received_bytes = experts.values = experts.messages = 0
        scores = [evaluate.score(decoder, ids, 1) for ids in texts]
        return Point(
            sum(score.nats for score in scores),
            sum(score.tokens for score in scores),
            experts.sent_bytes + experts.received_bytes,
            experts.values,
            experts.messages,
        )


def _texts(bundle: Path, manifest: shard.Manifest, heldout: Path, draws: int) -> list[list[list[int]]]:
    """First the choosing text, then one text per draw: windows of WINDOW tokens, one of every domain for each draw.

    Raises: evaluate.EvaluationError where the held-out text is too short.
    """
    text = Text(bundle, manifest)
    start = manifest.bos_id if manifest.bos_id is not None else next(iter(manifest.eos_ids), None)
    parts: list[list[list[int]]] = [[] for _ in range(draws + 1)]
    needed = (CHOOSING_WINDOWS + draws) * (WINDOW - 1)
    for domain, documents in evaluate.domains(heldout).items():
        ids: list[int] = []
        for document in documents:
            if len(ids) >= needed:
                break
            ids += ([] if start is None else [start]) + text.encode(document)
        if len(ids) < needed:
            raise evaluate.EvaluationError(
                f"{domain} has {len(ids)} tokens and {draws} draws need {needed}: ask for fewer draws"
            )
        windows = [ids[i : i + WINDOW - 1] for i in range(0, needed, WINDOW - 1)]
        windows = [window if start is None else [start, *window] for window in windows]
        parts[0] += windows[:CHOOSING_WINDOWS]
        for draw in range(draws):
            parts[draw + 1].append(windows[CHOOSING_WINDOWS + draw])
    return parts


def _one_row(batch: Point, single: Point, uniform: float | None, hidden: int) -> dict:
    """Bytes per token when every row is a message of its own, as in decoding: payloads of blocks stay, headers are added."""
    headers = frame.HEADER_BYTES * (batch.values / hidden - batch.messages) / batch.tokens
    ours = single.bytes_per_token + headers
    return {
        "frame_headers_per_token": round(frame.HEADER_BYTES * batch.values / hidden / batch.tokens, 1),
        "bytes_per_token_importance": round(ours, 1),
        "bytes_per_token_uniform": None if uniform is None else round(uniform + headers, 1),
        "uniform_over_importance": None if uniform is None else round((uniform + headers) / ours, 3),
    }


def _spread(values: list[float | None]) -> dict | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"min": round(min(known), 3), "max": round(max(known), 3), "n": len(known)}


def speed() -> dict:
    """Encode + decode of Gaussian rows of unlike norms, on one core: the fastest of SPEED_RUNS, which other programs disturb least."""
    rng = np.random.default_rng(0)
    figures = {}
    for rows in (SPEED_ROWS, 1):
        x = rng.standard_normal((rows, SPEED_HIDDEN)) * np.exp(0.5 * rng.standard_normal((rows, 1)))
        x = x.astype(np.float32)
        for name, step in (("q8", None), ("q4", None), *((f"importance step {s:g}", s) for s in (0.3, 0.6, 1.2, 2.4))):
            codec = name.split()[0]
            best, payload = [math.inf, math.inf], b""
            for _ in range(SPEED_RUNS if rows > 1 else 10 * SPEED_RUNS):
                started = time.perf_counter()
                payload = compress.encode(codec, x, step)
                encoded = time.perf_counter()
                compress.decode(compress.CODECS[codec].id, payload, *x.shape)
                best = [min(best[0], encoded - started), min(best[1], time.perf_counter() - encoded)]
            figures[f"{rows}x{SPEED_HIDDEN} {name}"] = {
                "bits_per_value": round(8 * len(payload) / x.size, 3),
                "encode_us": round(best[0] * 1e6, 1),
                "decode_us": round(best[1] * 1e6, 1),
                "mb_per_s": round(x.nbytes / sum(best) / 1e6, 1),
            }
    return figures


def compression(bundle: Path, heldout: Path, precision: str = "int8", draws: int = 3, threads: int = 2) -> dict:
    """The figures of `spacemoe benchmark compression --json`.

    Raises: shard.BundleError, rates.RatesError, evaluate.EvaluationError, placement.PlacementError, ValueError.
    """
    from tqdm import tqdm

    bench = _Bench(bundle, precision, threads)
    sensitivity = Sensitivity.read(bundle, bench.manifest)
    choosing, *reporting = _texts(bundle, bench.manifest, heldout, draws)

    def level(value: float) -> Importance:
        return Importance(Allocator(sensitivity, value))

    def curve(points: list[Point], base: Point) -> list[tuple[float, float]]:
        return [(point.bytes_per_token, point.loss_percent(base)) for point in points]

    bar = tqdm(desc="benchmark", disable=None, leave=False, unit=" runs")

    def point(texts: list[list[int]], coder: Coder | None, kept: int | None = None) -> Point:
        bar.update()
        return bench.point(texts, coder, kept)

    # choosing
    base = point(choosing, None)
    blocks = {size: [point(choosing, Blocks(bits, size)) for bits in (3, 4, 5)] for size in BLOCK_SIZES}
    at = {size: bytes_at(LOSSES_PERCENT[-1], curve(points, base)) or math.inf for size, points in blocks.items()}
    tried = [(value, point(choosing, level(value)).loss_percent(base)) for value in LEVELS]
    chosen_levels = {}
    for loss in LOSSES_PERCENT:
        found = bytes_at(loss, [(-math.log(value), loss_found) for value, loss_found in tried])
        if found is None:
            raise ValueError(f"no level between {LEVELS[0]} and {LEVELS[-1]} loses {loss} % on this model")
        chosen_levels[f"{loss:g}"] = math.exp(-found)

    # reporting
    settings: dict[str, tuple[Callable[[int], Coder], int | None]] = {"fp16": (lambda draw: Half(), None)}
    for size in BLOCK_SIZES:
        for bits in BLOCK_BITS:
            settings[f"blocks of {size}, {bits} bits"] = (lambda draw, b=bits, s=size: Blocks(b, s), None)
    for kept in range(1, bench.manifest.dims.top_k):
        settings[f"top-{kept} at 4 bits"] = (lambda draw: Blocks(4, 32), kept)
    for value in LEVELS:
        settings[f"importance {value:g}"] = (lambda draw, v=value: level(v), None)
    for name, value in chosen_levels.items():
        settings[f"chosen for {name} %"] = (lambda draw, v=value: level(v), None)
        settings[f"random order at the level for {name} %"] = (
            lambda draw, v=value: Stepped(Allocator(sensitivity, v), np.random.default_rng(draw).permutation),
            None,
        )
        settings[f"reversed at the level for {name} %"] = (
            lambda draw, v=value: Stepped(Allocator(sensitivity, v), reversed_order),
            None,
        )
    for value in FLAT_STEPS:
        settings[f"no importance {value:g}"] = (
            lambda draw, v=value: Stepped(Allocator(sensitivity), lambda r, v=v: np.full(len(r), v)),
            None,
        )
    bases = [point(texts, None) for texts in reporting]
    points = {
        name: [point(texts, make(draw), kept) for draw, texts in enumerate(reporting)]
        for name, (make, kept) in settings.items()
    }
    one_row = {
        name: point(reporting[0], OneRow(Allocator(sensitivity, value))) for name, value in chosen_levels.items()
    }
    bar.close()
    pooled = {name: sum(parts[1:], parts[0]) for name, parts in points.items()}
    pooled_base = sum(bases[1:], bases[0])
    values = pooled["fp16"].values / pooled["fp16"].tokens  # of the uncut dispatch, both ways

    def family(prefix: str, draw: int | None) -> list[tuple[float, float]]:
        chosen = [name for name in points if name.startswith(prefix)]
        if draw is None:
            return curve([pooled[name] for name in chosen], pooled_base)
        return curve([points[name][draw] for name in chosen], bases[draw])

    def uniform(loss: float, draw: int | None) -> float | None:
        found = [bytes_at(loss, family(f"blocks of {size},", draw)) for size in BLOCK_SIZES]
        return min((each for each in found if each is not None), default=None)

    def ratio(theirs: float | None, ours: float | None) -> float | None:
        return None if theirs is None or ours is None else round(theirs / ours, 3)

    ratios = {}
    for loss in LOSSES_PERCENT:
        per_draw = [ratio(uniform(loss, d), bytes_at(loss, family("importance", d))) for d in range(draws)]
        ours = bytes_at(loss, family("importance", None))
        theirs = uniform(loss, None)
        flat = bytes_at(loss, family("no importance", None))
        name = f"{loss:g}"
        chosen = points[f"chosen for {name} %"][0]
        reached = pooled[f"chosen for {name} %"].loss_percent(pooled_base)
        ratios[name] = {
            "uniform_over_importance": ratio(theirs, ours),
            "spread": _spread(per_draw),
            "bytes_per_token_uniform": None if theirs is None else round(theirs, 1),
            "bytes_per_token_importance": None if ours is None else round(ours, 1),
            "entropy_code_without_importance_over_importance": ratio(flat, ours),
            "at_the_chosen_level": {
                "loss_percent": round(reached, 3),
                "bytes_per_token": round(pooled[f"chosen for {name} %"].bytes_per_token, 1),
                "uniform_over_importance": ratio(
                    uniform(reached, None), pooled[f"chosen for {name} %"].bytes_per_token
                ),
            },
            "one_row_per_message": _one_row(
                chosen, one_row[name], uniform(chosen.loss_percent(bases[0]), 0), bench.manifest.dims.hidden
            ),
        }
    fewer = {}
    for kept in range(1, bench.manifest.dims.top_k):
        name = f"top-{kept} at 4 bits"
        loss = pooled[name].loss_percent(pooled_base)
        fewer[name] = {
            "loss_percent": round(loss, 2),
            "bytes_per_token": round(pooled[name].bytes_per_token, 1),
            "over_importance": ratio(pooled[name].bytes_per_token, bytes_at(loss, family("importance", None))),
        }
    return {
        "bundle": bench.manifest.name,
        "precision": precision,
        "nodes": NODES,
        "rows_per_message": f"up to {min(WINDOW, 256)}",
        "tokens": {"choosing": base.tokens, "per_draw": bases[0].tokens},
        "n": draws,
        "perplexity": [round(math.exp(each.nats / each.tokens), 4) for each in bases],
        "values_per_token": round(values, 1),
        "chosen": {
            "block": min(at, key=at.get),
            "levels": {name: round(value, 5) for name, value in chosen_levels.items()},
        },
        "ratios": ratios,
        "fewer_experts": fewer,
        "curve": {
            name: {
                "bits_per_value": round(8 * pooled[name].bytes_per_token / values, 3),
                "bytes_per_token": round(pooled[name].bytes_per_token, 1),
                "loss_percent": round(pooled[name].loss_percent(pooled_base), 3),
                "spread": _spread([p.loss_percent(b) for p, b in zip(parts, bases)]),
            }
            for name, parts in points.items()
        },
        "speed": speed(),
    }


def report(result: dict) -> str:
    """The figures as text of at most 80 columns."""
    lines = [f"{result['bundle']}, {result['tokens']['per_draw']} tokens a draw, n {result['n']}; headers included"]
    lines.append(f"{'':38}{'bits/value':>12}{'bytes/token':>13}{'loss %':>9}")
    for name, each in result["curve"].items():
        lines.append(
            f"{name:38}{each['bits_per_value']:12.2f}{each['bytes_per_token']:13.0f}{each['loss_percent']:9.2f}"
        )
    for loss, each in result["ratios"].items():
        spread = each["spread"]
        between = "" if spread is None else f" ({spread['min']} to {spread['max']}, n {spread['n']})"
        lines.append(f"at +{loss} %: uniform blocks need {each['uniform_over_importance']} times the bytes{between}")
        lines.append(f"  one row a message: {each['one_row_per_message']['uniform_over_importance']} times")
    for name, each in result["fewer_experts"].items():
        lines.append(f"{name}: +{each['loss_percent']} %, {each['over_importance']} times the bytes at that loss")
    for name, each in result["speed"].items():
        lines.append(f"{name:28}{each['bits_per_value']:7.2f} bits{each['mb_per_s']:8.0f} MB/s")
    return "\n".join(lines)
