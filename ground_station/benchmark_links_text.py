"""Held-out text for `spacemoe benchmark links`: what rates that follow the link are worth, and the ladder's rung "similar expert".

The text is fed token by token, as decoding does it, in this process; every message is encoded and decoded as on the wire, with a frame's
header and pairs, and a layer takes as long as its slowest node's two messages by delay + size / rate: times are computed, not
measured (benchmark_links.py measures two of these settings on agents). Experts and trunk take no time here.
Leaves out: links that change under way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ground_station import dispatch, evaluate, rates, selection
from ground_station.experiment_text import PASSAGE_TOKENS, passages
from ground_station.local import LocalExperts
from ground_station.local_wire import Coded, Importance, WiredExperts
from ground_station.placement import round_robin
from ground_station.text import Text
from ground_station.trunk import Trunk
from node_agent import frame, shard

NODES = 4
FAST_BPS, SLOW_BPS, DELAY_S = 1e6, 1e5, 0.005  # one node of four at a tenth of the others' rate
LEVELS = (0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4)
FOLLOWING_BITS = (0.6, 1.0, 1.5, 2.0, 2.5, 3.0)  # bits per value that fit on the slow link
FOLLOWING_LEVEL = 0.05  # of nodes that have the time
DRAWS = 3

Moe = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


def slow_links(layer_s: float = math.inf) -> rates.Links:
    """Node 0 is the slow one."""
    return rates.Links.of([SLOW_BPS] + [FAST_BPS] * (NODES - 1), [DELAY_S] * NODES, layer_s)


def layer_s_for(bits: float, hidden: int, pairs: float = 1.4) -> float:
    """layer_s in which `bits` per value fit on the slow link, with about so many pairs in a request."""
    size_bits = 8 * (2 * frame.HEADER_BYTES + pairs * frame.PAIR.itemsize) + bits * 2 * hidden
    return 2 * DELAY_S + size_bits / SLOW_BPS


class Timed(Importance):
    """The codec, with the time that every message would be under way. `link_s`: of the slowest node of each layer, summed."""

    def __init__(self, allocator: rates.Allocator, links: rates.Links):
        super().__init__(allocator)
        self.links = links
        self.link_s, self.bytes = 0.0, 0
        self._layer_s = self._bytes = 0

    def begin(self, layer: int) -> None:
        self.end()
        super().begin(layer)

    def end(self) -> None:
        """The layer is over."""
        self.link_s += self._layer_s
        self._layer_s = 0.0

    def request(self, layer: int, x: np.ndarray, pairs: np.ndarray) -> Coded:
        back, size = super().request(layer, x, pairs)
        self._bytes = frame.HEADER_BYTES + pairs.nbytes + size
        return back, size

    def reply(self, layer: int, y: np.ndarray) -> Coded:
        back, size = super().reply(layer, y)
        both = self._bytes + frame.HEADER_BYTES + size
        links, node = self.links, self.node
        self.bytes += both
        self._layer_s = max(self._layer_s, 2 * float(links.delay_s[node]) + 8 * both / float(links.rate_bps[node]))
        return back, size


@dataclass(frozen=True, eq=False)
class Point:
    """A setting on the text: nats and seconds on links of each passage [n], bytes in all."""

    nats: np.ndarray
    link_s: np.ndarray
    bytes: int


@dataclass(frozen=True)
class Curve:
    """(milliseconds on links per token, loss in percent of perplexity) of the settings of one kind, in one draw."""

    points: tuple[tuple[float, float], ...]

    def loss_at(self, ms: float) -> float | None:
        """Straight in log loss between the two points around it; None outside."""
        ordered = sorted(self.points)
        for (before, high), (after, low) in zip(ordered, ordered[1:]):
            if before <= ms <= after:
                share = (ms - before) / max(after - before, 1e-12)
                return math.exp((1 - share) * math.log(max(high, 0.05)) + share * math.log(max(low, 0.05)))
        return None

    def ms_at(self, loss: float) -> float | None:
        """The least time at which the loss is no more; None where the curve does not cross it."""
        ordered = sorted(self.points, reverse=True)
        for (more, low), (less, high) in zip(ordered, ordered[1:]):
            if low <= loss < high:
                start, end = math.log(max(low, 0.05)), math.log(max(high, 0.05))
                return more - (more - less) * (math.log(loss) - start) / max(end - start, 1e-12)
        return None


class HeldOut:
    """A bundle over four nodes without replicas, and passages of held-out text."""

    def __init__(self, bundle: Path, heldout: Path, tokens: int, seed: int = 0):
        """Raises: shard.BundleError, evaluate.EvaluationError, experiment_text.TextTooShort, ValueError for too few tokens."""
        if tokens < DRAWS * PASSAGE_TOKENS:
            raise ValueError(f"{tokens} held-out tokens make no {DRAWS} draws: give {DRAWS * PASSAGE_TOKENS} or more")
        self.bundle, self.manifest = bundle, shard.read_manifest(bundle)
        manifest = self.manifest
        names = {f"node-{n + 1}": 2**62 for n in range(NODES)}
        self.table = dispatch.Table(round_robin(manifest, names, manifest.precisions[0]))
        self.trunk = Trunk(bundle, manifest, 1)
        self.topk = selection.make("topk", manifest.routing, manifest.dims.top_k, manifest.dims.experts)
        start = manifest.bos_id if manifest.bos_id is not None else next(iter(manifest.eos_ids), None)
        if start is None:
            raise evaluate.EvaluationError(f"{bundle} names no begin- or end-of-text token: cannot start a text")
        documents = [text for texts in evaluate.domains(heldout).values() for text in texts]
        self.texts = passages(Text(bundle, manifest), documents, start, tokens, np.random.default_rng(seed))
        self.tokens = len(self.texts) * (PASSAGE_TOKENS - 1)
        self.wired = WiredExperts(bundle, manifest, self.table, None)

    def stepped(self, moe: Moe, after: Callable[[], None] = lambda: None) -> np.ndarray:
        """Nats of each passage, token by token; `after` each passage."""
        nats = []
        for ids in self.texts:
            sequence = self.trunk.sequence(PASSAGE_TOKENS)
            nats.append(sum(_nats(sequence.step(int(now), moe), int(then)) for now, then in zip(ids, ids[1:])))
            after()
        return np.array(nats)

    def whole(self, moe: Moe) -> np.ndarray:
        """The same, a passage at a time."""
        found = []
        for ids in self.texts:
            logits = self.trunk.sequence(PASSAGE_TOKENS).prefill(ids[:-1].tolist(), moe, every_position=True)
            found.append(sum(_nats(row, int(then)) for row, then in zip(logits, ids[1:])))
        return np.array(found)

    def plain(self, layer: int, hidden: np.ndarray, logits: np.ndarray) -> np.ndarray:
        choice = self.topk(layer, logits)
        return self.wired.run(layer, hidden, choice.experts, choice.gates)

    def point(self, allocator: rates.Allocator, links: rates.Links) -> Point:
        """The text over these links with an allocator's rates."""
        coder = Timed(allocator, links)
        seconds = []

        def after() -> None:
            coder.end()
            seconds.append(coder.link_s - sum(seconds))

        self.wired.coder = coder
        nats = self.stepped(self.plain, after)
        self.wired.coder = None
        return Point(nats, np.array(seconds), coder.bytes)


def _nats(logits: np.ndarray, target: int) -> float:
    row = logits.astype(np.float64)
    top = row.max()
    return float(top + np.log(np.exp(row - top).sum()) - row[target])


def following(text: HeldOut, step: Callable[[], None]) -> dict:
    """One level for all nodes against rates that follow the link, one node of four at a tenth of the rate."""
    sensitivity = rates.Sensitivity.read(text.bundle, text.manifest)
    hidden = text.manifest.dims.hidden
    base = text.stepped(text.plain)
    step()
    uniform, follow = {}, {}
    for level in LEVELS:
        uniform[level] = text.point(rates.Allocator(sensitivity, level), slow_links())
        step()
    for bits in FOLLOWING_BITS:
        links = slow_links(layer_s_for(bits, hidden))
        allocator = rates.Allocator(sensitivity, FOLLOWING_LEVEL)
        allocator.follow(links, hidden)
        follow[bits] = text.point(allocator, links)
        step()
    each = PASSAGE_TOKENS - 1
    parts = [np.arange(len(base))[draw::DRAWS] for draw in range(DRAWS)]

    def curve(points: dict[float, Point], rows: np.ndarray) -> Curve:
        return Curve(
            tuple(
                (
                    1e3 * float(point.link_s[rows].sum()) / (len(rows) * each),
                    100 * math.expm1(float((point.nats[rows] - base[rows]).sum()) / (len(rows) * each)),
                )
                for point in points.values()
            )
        )

    whole = np.arange(len(base))
    pooled = curve(uniform, whole), curve(follow, whole)
    at_ms = pooled[0].points[LEVELS.index(rates.LEVEL)][0]
    compared = []
    for loss in (1.0, 2.0, 5.0):
        ms = [[kind.ms_at(loss) for kind in (curve(uniform, rows), curve(follow, rows))] for rows in [whole, *parts]]
        compared.append({"loss_percent": loss, **_ratio(ms)})
    equal = []
    for factor in (0.9, 0.83, 0.76):
        losses = [
            [kind.loss_at(factor * at_ms) for kind in (curve(uniform, rows), curve(follow, rows))]
            for rows in [whole, *parts]
        ]
        equal.append({"ms_per_token": round(factor * at_ms, 2), **_ratio(losses)})
    return {
        "rate_bps": [SLOW_BPS] + [FAST_BPS] * (NODES - 1),
        "delay_s": DELAY_S,
        "times": "computed from frame sizes: delay + size / rate of the slowest node of each layer",
        "perplexity_without_coding": round(math.exp(float(base.sum()) / text.tokens), 4),
        "tokens": text.tokens,
        "draws": DRAWS,
        "uniform": _rows(uniform, pooled[0], text.tokens, "level"),
        "following": _rows(follow, pooled[1], text.tokens, "bits_on_slow_link"),
        "equal_perplexity": compared,
        "equal_time": equal,
    }


def _rows(points: dict[float, Point], curve: Curve, tokens: int, name: str) -> list[dict]:
    return [
        {
            name: key,
            "link_ms_per_token": round(ms, 3),
            "loss_percent": round(loss, 3),
            "bytes_per_token": round(point.bytes / tokens, 1),
        }
        for (key, point), (ms, loss) in zip(points.items(), curve.points)
    ]


def _ratio(pairs: list[list[float | None]]) -> dict:
    """Of (uniform, following): the first pair is of all the text, the rest of its draws."""
    ratios = [None if None in pair else pair[1] / pair[0] for pair in pairs]
    known = [ratio for ratio in ratios[1:] if ratio is not None]
    return {
        "uniform": None if pairs[0][0] is None else round(pairs[0][0], 3),
        "following": None if pairs[0][1] is None else round(pairs[0][1], 3),
        "ratio": None if ratios[0] is None else round(ratios[0], 4),
        "ratio_of_draws": [round(min(known), 4), round(max(known), 4)] if known else None,
        "n": len(known),
    }


RUNGS = {"skip": None, "similar_expert": "router", "similar_expert_with_the_lost_gate": "lost"}
"""What is done about an expert that nobody can run -> the rule of dispatch.stand_ins. All restore the row's sum of gates."""


def ladder(text: HeldOut, step: Callable[[], None]) -> dict:
    """Perplexity with each of the nodes dead in turn and no replicas, for what the ladder may do about it."""
    experts = LocalExperts(text.bundle, text.manifest, text.table)
    base = text.whole(text.plain)
    found: dict = {}
    for name, rule in RUNGS.items():
        ratios = []
        for dead in range(NODES):
            moe = partial(_without, text, experts, dead, rule)
            ratios.append(math.exp(float((text.whole(moe) - base).sum()) / text.tokens))
            step()
        found[name] = {
            "perplexity_ratio": round(float(np.mean(ratios)), 4),
            "of_each_dead_node": [round(ratio, 4) for ratio in ratios],
        }
    return {
        "nodes": NODES,
        "dead": 1,
        "replicas": 0,
        "tokens": text.tokens,
        "n": NODES,
        "perplexity": round(math.exp(float(base.sum()) / text.tokens), 4),
        "rungs": found,
    }


def _without(
    text: HeldOut,
    experts: LocalExperts,
    dead: int,
    rule: str | None,
    layer: int,
    hidden: np.ndarray,
    logits: np.ndarray,
) -> np.ndarray:
    """A layer as remote.RemoteExperts runs it with one node gone."""
    table = text.table
    choice = text.topk(layer, logits)
    usable = [node != dead for node in range(NODES)]
    reachable = np.array([any(usable[n] for n, _ in table.copies[layer, e]) for e in range(logits.shape[1])])
    chosen, gates = choice.experts, choice.gates
    whole = gates.sum(1)
    if rule is None:
        lost = np.where(reachable[chosen], 0, gates).sum(1)
    else:
        chosen, gates, lost, _ = dispatch.stand_ins(chosen, gates, logits, reachable, rule=rule)
    work = dispatch.split(layer, chosen, gates, partial(dispatch.assign, table, usable=usable))
    out = experts.run_work(layer, hidden, work)
    kept = whole - lost
    scale = np.divide(whole, kept, out=np.zeros_like(whole), where=kept > 1e-6 * whole)
    return out * scale[:, None].astype(np.float32)
