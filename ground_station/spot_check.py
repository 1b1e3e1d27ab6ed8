"""Spot re-computation, the decisions: which answers of nodes to compute again elsewhere, when two results are the same, who is wrong.

Pure. A node may answer every request in time and still be wrong: an altered shard, a bad memory cell. So some answers are
computed a second time by a node that holds the same experts in the same precision, or from the ground station's own bundle;
where the two differ, a third opinion decides. Leaves out: asking (spot_checker.py), and what a wrong node costs (the ladder).

Tolerances (measured; onnxruntime 1.32 on x86-64, 1.23.2 on Arm processors that QEMU emulates, experts of the reference model and of a
synthetic one, relative to a row's norm). On one kind of machine 8, 4 and 2 bit differ by 0 whatever the number of rows (1 to 64)
and threads; 4 bit on Arm by 6e-7. From x86 to a Cortex-A72, which has no dot product and so does not quantise what goes into an
8- or 4-bit product: 1.44e-2; to a Neoverse N1, which has it: 3.6e-3 (a value that falls to the other side of a rounding); fp32 6e-8.
So nodes that are known to compute alike must agree to 1e-4, and between others a difference under 5 % says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ground_station.dispatch import Copy
from node_agent import frame

GROUND = "the ground station"  # whose opinion it is, where it computed the sum itself
NOT_FINITE = "values that are not finite"  # compress says so of a payload, and a node of a result that it cannot send
MAX_ENERGY = (
    1e20  # squared norm of a believable sum: scaled by the ladder and squared by the trunk's norm it stays a float32
)
DOUBTFUL = 12.0  # times the calibrated norm: 68,478 sums of the reference model, held-out text, came to 8.2 at most
ABSURD = 1000.0  # from here on a sum is not taken at all
ALIKE = 1e-4  # largest relative difference of a row between machines of one kind, and in fp32 between any
ACROSS = 0.05  # of 8, 4 and 2 bit between machines that may not be of one kind: 3.5 times the largest that was measured
DYNAMIC = "int8dyn"  # its activations are scaled in one piece, and processors differ in how
LEAST_TOLD = 5e-3  # of two that compute alike, a difference from which on a third of another kind can tell who is right
NEAR = 0.25  # of the way between the two, from either end


@dataclass(frozen=True)
class Rules:
    """How often: `first` answers of each node always, `new_rate` of those with a copy that was never checked, `rate` of the rest.

    `max_rows`: of a longer request so many rows are computed again. `waiting`: checks that may wait; more are not begun.
    `answer_s`: how long an opinion may take. `strikes`: sums that are not finite, of which nobody can say what they should be.
    """

    rate: float = 0.01
    first: int = 4
    new_rate: float = 0.1
    max_rows: int = 16
    waiting: int = 4
    answer_s: float = 5.0
    strikes: int = 3

    def __post_init__(self) -> None:
        for name in ("rate", "new_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is no share: give 0 to 1")
        if self.first < 0 or min(self.max_rows, self.waiting, self.strikes) < 1 or not self.answer_s > 0:
            raise ValueError("first must be 0 or more; max_rows, waiting and strikes 1 or more; answer_s above 0")


def why_check(rules: Rules, seen: int, new: bool, draw: float) -> str:
    """Why the next answer of a node is computed again ('first', 'new', 'random'), or ''.

    seen: answers of this node so far; new: it holds a copy that was never checked; draw: uniform in [0, 1).
    """
    if seen < rules.first:
        return "first"
    if new and draw < rules.new_rate:
        return "new"
    return "random" if draw < rules.rate else ""


def energy_of(partial: np.ndarray) -> float:
    """Squared norm of all rows; infinite or NaN where a value is not finite or too large for one."""
    flat = partial.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(flat, flat))


def too_large(energy: float) -> bool:
    """True for a sum that must not reach the hidden state: not finite, or so large that the trunk's norm would not be."""
    return not energy <= MAX_ENERGY


def norm_over_expected(partial: np.ndarray, energy: float, pairs: np.ndarray, norms: list[float]) -> float:
    """Largest over the rows of ||sum|| / (sum of |gate| * calibrated norm of the expert's output).

    partial float32 [R, D] and its `energy_of`; pairs frame.PAIR [P] with rows into it; norms: mean ||E(x)|| of each expert.
    """
    if len(partial) == 1:  # decoding one token: plain numbers are faster than arrays of a few
        expected = sum([abs(gate) * norms[expert] for _, expert, _, gate in pairs.tolist()])
        return math.sqrt(energy) / max(expected, 1e-30)
    norms = np.array(norms)
    expected = np.bincount(pairs["row"], np.abs(pairs["gate"]) * norms[pairs["expert"]], len(partial))
    rows = np.einsum("ij,ij->i", partial, partial, dtype=np.float64)
    return float(np.sqrt(rows / np.maximum(expected, 1e-30) ** 2).max())


def deviation(one: np.ndarray, other: np.ndarray) -> float:
    """Largest over the rows of ||one - other|| / the larger norm; 0 where both are 0, inf where a value is not finite."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    apart = np.linalg.norm(a - b, axis=1)
    scale = np.maximum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    return float(np.divide(apart, scale, out=np.zeros_like(apart), where=scale > 0).max())


def tolerance(pairs: np.ndarray, alike: bool) -> float:
    """What two honest machines may differ by, for the coarsest precision among the pairs."""
    names = {frame.PRECISIONS[precision] for precision in pairs["precision"].tolist()}
    return ALIKE if names <= {"fp32"} or (alike and DYNAMIC not in names) else ACROSS


def between(first: np.ndarray, second: np.ndarray, judge: np.ndarray) -> float:
    """Where the judge's sum lies on the way from the second (0) to the first (1), over all rows.

    What machines of another kind compute differs in directions that have nothing to do with the error that is looked for, so over
    some thousand values it averages out.
    """
    a, b, c = (item.astype(np.float64).ravel() for item in (first, second, judge))
    way = a - b
    return float(np.dot(c - b, way) / max(np.dot(way, way), 1e-300))


def rounding(codec: str, reply_step: float, like: np.ndarray) -> float:
    """How far (relative, as `deviation`) one codec may carry apart two vectors that are almost equal.

    A value next to the edge of a step falls to either side. fp16: 2^-11 of a value. Blocks: a step of all 32 values of a
    block whose energy is in one value, sqrt(32) / 127 and sqrt(32) / 8. Importance: one step of every value of a row.
    """
    if codec == "importance":
        smallest = float(np.linalg.norm(like, axis=1).min())
        return math.inf if smallest == 0 else reply_step * math.sqrt(like.shape[1]) / smallest
    return {"fp32": 0.0, "fp16": 1e-3, "q8": 0.045, "q4": 0.71}[codec]


class Part(NamedTuple):
    """What one second node can compute of a request: `node` (index in dispatch.Table) and the pairs, bool [P]."""

    node: int
    pairs: np.ndarray


def parts(
    pairs: np.ndarray,
    layer: int,
    copies: dict[tuple[int, int], tuple[Copy, ...]],
    usable: list[bool],
) -> tuple[list[Part], bool]:
    """Who could compute the pairs again, over as few nodes as a greedy choice needs; and whether that covers all of them.

    pairs: frame.PAIR [P]; copies: of dispatch.Table; usable[node]: not the one that is checked, not quarantined, reachable.
    """
    keys = list(zip(pairs["expert"].tolist(), pairs["precision"].tolist()))
    holders = {
        (expert, precision): {
            node for node, held in copies.get((layer, expert), ()) if held == precision and usable[node]
        }
        for expert, precision in set(keys)
    }
    left = {key for key, nodes in holders.items() if nodes}
    found = []
    while left:
        can = {node: {key for key in left if node in holders[key]} for key in left for node in holders[key]}
        best = max(sorted(can), key=lambda node: len(can[node]))
        found.append(Part(best, np.array([key in can[best] for key in keys])))
        left -= can[best]
    return found, all(holders.values())


class Opinion(NamedTuple):
    """A sum float32 [R, D] of the same pairs on the same rows, and whose it is."""

    who: str
    sum: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """`wrong`: who is to be quarantined; `undecided`: results differ and nobody can say whose is right. `deviation`: the largest seen,
    `allowed`: what it may be; `why`: in words, without names of layers and experts."""

    wrong: tuple[str, ...] = ()
    undecided: bool = False
    deviation: float = 0.0
    allowed: float = 0.0
    why: str = ""


def vote(
    first: Opinion, second: Opinion, third: Opinion | None, pairs: np.ndarray, alike: Callable[[str, str], bool]
) -> Verdict:
    """Who is wrong among up to three. The ground station's own opinion, from a bundle that it verified, settles it alone.

    alike(who, who): they are known to compute the same to the last bit or nearly so.
    """

    def allowed(one: Opinion, other: Opinion) -> float:
        return tolerance(pairs, alike(one.who, other.who))

    apart = deviation(first.sum, second.sum)
    if apart <= allowed(first, second):
        return Verdict(deviation=apart, allowed=allowed(first, second))
    judge = next((item for item in (second, third) if item is not None and item.who == GROUND), third)
    if judge is None:
        why = f"{first.who} and {second.who} differ, and nobody else holds these experts"
        return Verdict((), True, apart, allowed(first, second), why)
    others = [item for item in (first, second) if item is not judge]
    away = [item for item in others if not deviation(item.sum, judge.sum) <= allowed(item, judge)]
    if judge.who != GROUND and len(away) == len(others):
        why = f"{first.who}, {second.who} and {judge.who} all differ"
        return Verdict((), True, apart, allowed(first, second), why)
    if not away:  # of another kind of machine: it is near both
        place = between(first.sum, second.sum, judge.sum) if apart >= LEAST_TOLD else 0.5
        if NEAR < place < 1 - NEAR:
            why = f"{first.who} and {second.who} differ, and {judge.who} is too far from both to tell who is right"
            return Verdict((), True, apart, allowed(first, second), why)
        away = [first if place <= NEAR else second]
    agree = [item.who for item in (first, second, judge) if item not in away]
    why = f"it differs from {' and '.join(dict.fromkeys(agree))}"
    return Verdict(tuple(dict.fromkeys(item.who for item in away)), False, apart, allowed(first, second), why)


def judge_answer(node: str, answer: np.ndarray | None, reference: np.ndarray, allowed: float) -> Verdict:
    """Whether the answer that was used is what `reference` says (through the same codec); None: it was not finite."""
    if answer is None:
        if not np.isfinite(reference).all():
            return Verdict()
        return Verdict((node,), False, math.inf, allowed, "its sum is not finite, another computes a finite one")
    apart = deviation(answer, reference)
    if apart <= allowed:
        return Verdict(deviation=apart, allowed=allowed)
    return Verdict((node,), False, apart, allowed, "it answered otherwise than when it was asked again")


def may_quarantine(quarantined: int, nodes: int) -> bool:
    """Half of the fleet at most: when more of it seems wrong, the one who judges may be (its bundle, its memory)."""
    return quarantined < max(1, nodes // 2)
