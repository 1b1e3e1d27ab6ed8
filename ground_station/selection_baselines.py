"""The baselines that `budgeted` is measured against, by the names of ALGORITHMS.md; pure, vectorised over tokens but for `des`.

Each sees what its paper sees and no more: gates, and of the fleet joules or latencies. All keep the sum of the model's own gates.
Without a `World` every expert costs 1 J and 1 ms. Leaves out: each paper's joint power and bandwidth allocation.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from ground_station.selection_choice import Choice, Policy
from ground_station.selection_world import Calibration, Offers, World
from node_agent import routing
from node_agent.shard import Routing

MAX_CELLS = 1 << 22  # tokens x subsets x K^2 that `similarity` looks at in one go


def kept(experts: np.ndarray, gates: np.ndarray, keep: np.ndarray) -> Choice:
    """The choice with only the pairs of `keep` bool [T, K], renormalised to the sum that the gates had."""
    left = np.where(keep, gates, 0)
    scale = gates.sum(1) / np.maximum(left.sum(1), 1e-30)
    return Choice(experts, (left * scale[:, None]).astype(np.float32))


def named(choice: Choice, offer: Offers | None) -> Choice:
    """The choice with the copies of `offer` named."""
    if offer is None:
        return choice
    return Choice(choice.experts, choice.gates, offer.node[choice.experts], offer.precision[choice.experts])


@dataclass(frozen=True)
class Coolest:
    """`topk`, each expert on the coolest node that holds it."""

    routing: Routing
    top_k: int

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        experts = routing.largest(logits, self.top_k)
        offer = None if world is None else world.coolest[world.position[layer]]
        return named(Choice(experts, routing.gates_of(logits, experts, self.routing)), offer)


@dataclass(frozen=True)
class TopP:
    """The fewest experts whose router probabilities sum to p, at most K.  Source: Huang et al. 2024, arXiv 2403.07652 (p = 0.4)."""

    routing: Routing
    top_k: int
    p: float = 0.4

    def __post_init__(self) -> None:
        _share("p", self.p)

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        experts = routing.largest(logits, self.top_k)
        share = np.take_along_axis(routing.softmax(logits), experts, 1)
        before = share.cumsum(1) - share
        return kept(experts, routing.gates_of(logits, experts, self.routing), before < self.p)


@dataclass(frozen=True)
class Naee:
    """Skips an expert when its gate is under beta_l times the largest one.  Source: Lu et al. 2024, arXiv 2402.14800.

    `betas` [M]: the calibration median of w2/w1 in each layer (`gate_ratio_medians`); the paper skips the second of two, here
    every expert but the first is judged by the same rule. `scale` multiplies them. A layer without a beta takes 0.5.
    """

    routing: Routing
    top_k: int
    betas: dict[int, float] | None = None
    scale: float = 1.0

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        experts = routing.largest(logits, self.top_k)
        gates = routing.gates_of(logits, experts, self.routing)
        beta = self.scale * (self.betas or {}).get(layer, 0.5)
        keep = gates >= beta * gates[:, :1]
        keep[:, 0] = True
        return kept(experts, gates, keep)


def gate_ratio_medians(logits: dict[int, np.ndarray], rule: Routing) -> dict[int, float]:
    """beta_l of `Naee`: per layer the median of w2/w1 over calibration logits [T, E]."""
    medians = {}
    for layer, rows in logits.items():
        gates = routing.gates_of(rows, routing.largest(rows, 2), rule)
        medians[layer] = float(np.median(gates[:, 1] / gates[:, 0]))
    return medians


@dataclass(frozen=True)
class Des:
    """Least energy subject to a sum of gates of at least z * gamma_l, at most K experts, any expert of the layer; exact.

    The sum is a share of what the K largest gates have together. Energies are joules of the thriftiest copy. Depth-first branch and
    bound in ascending energy per gate, bounded by the fractional knapsack.  Source: Qin et al. 2025, arXiv 2503.13421, whose
    gamma_l falls with the layer: `gamma` by layer id, 1 where none is given.
    """

    routing: Routing
    top_k: int
    z: float = 0.8
    gamma: dict[int, float] | None = None

    def __post_init__(self) -> None:
        _share("z", self.z)

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        t, e = logits.shape
        offer = None if world is None else world.thriftiest[world.position[layer]]
        energy = np.ones(e) if offer is None else offer.joules
        share = routing.softmax(logits).astype(np.float64)
        whole = routing.gates_of(logits, routing.largest(logits, self.top_k), self.routing).sum(1)
        target = self.z * (self.gamma or {}).get(layer, 1.0)
        experts, gates = np.zeros((t, self.top_k), np.int64), np.zeros((t, self.top_k), np.float32)
        cost = energy.tolist()
        for row, g in enumerate(share.tolist()):
            most = sum(sorted(g, reverse=True)[: self.top_k])
            chosen = least_energy(g, cost, target * most, self.top_k)
            experts[row] = _filled(chosen, g, self.top_k)
            scale = float(whole[row]) / sum(g[i] for i in chosen)
            gates[row, : len(chosen)] = [g[i] * scale for i in chosen]
        return named(Choice(experts, gates), offer)


def least_energy(gates: list[float], energy: list[float], target: float, most: int) -> list[int]:
    """Expert ids of the set of at most `most` experts with the least energy whose gates sum to `target`; the largest gates where no
    such set exists (of those that have a copy at all: infinite energy is none). gates, energy: one for each expert.
    """
    every = sorted(range(len(gates)), key=lambda i: -gates[i])
    reachable = [i for i in every if energy[i] < float("inf") and gates[i] > 0]
    by_gate = reachable[:most]
    if not by_gate:
        return every[:most]
    slack = 1e-9 * max(target, 1e-30)
    if sum(gates[i] for i in by_gate) <= target + slack:
        return by_gate
    order = sorted(reachable, key=lambda i: energy[i] / gates[i])
    g, c = [gates[i] for i in order], [energy[i] for i in order]
    best_set = by_gate
    best = sum(energy[i] for i in by_gate)
    tops: dict[int, list[float]] = {}  # sums of the largest 0, 1, ... gates from a position on: is the target in reach?
    stack: list[tuple[int, float, float, tuple[int, ...]]] = [(0, target, 0.0, ())]
    while stack:
        at, need, spent, chosen = stack.pop()
        if need <= slack:
            if spent < best:
                best, best_set = spent, [order[i] for i in chosen]
            continue
        left = most - len(chosen)
        if at not in tops:
            tops[at] = [0.0, *accumulate(sorted(g[at:], reverse=True)[:most])]
        if tops[at][min(left, len(tops[at]) - 1)] < need - slack:
            continue
        bound, missing = spent, need
        for i in range(at, len(g)):  # fractional knapsack: cheapest per gate first, the last one in part
            if g[i] >= missing:
                bound += c[i] * missing / g[i]
                break
            bound += c[i]
            missing -= g[i]
        if bound >= best * (1 - 1e-12):
            continue
        stack.append((at + 1, need, spent, chosen))
        stack.append((at + 1, need - g[at], spent + c[at], (*chosen, at)))  # looked at first
    return best_set


def _filled(chosen: list[int], gates: list[float], k: int) -> list[int]:
    """K expert ids: the chosen ones, then others (their gate is 0) by falling gate."""
    rest = sorted((i for i in range(len(gates)) if i not in chosen), key=lambda i: -gates[i])
    return chosen + rest[: k - len(chosen)]


@dataclass(frozen=True)
class Wlr:
    """Drops experts whose gate per millisecond is under `theta` times the token's best.  Source: WDMoE, arXiv 2405.03131."""

    routing: Routing
    top_k: int
    theta: float = 0.3

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        experts = routing.largest(logits, self.top_k)
        gates = routing.gates_of(logits, experts, self.routing)
        offer = None if world is None else world.fastest[world.position[layer]]
        ratio = gates / (1.0 if offer is None else np.maximum(offer.ms[experts], 1e-9))
        return named(kept(experts, gates, ratio >= self.theta * ratio.max(1, keepdims=True)), offer)


@dataclass(frozen=True)
class Similarity:
    """Least energy subject to a summed replacement error of at most eps and a latency of at most `limit_ms`; exact over all subsets.

    An expert that is not run is replaced by the nearest one that is (its gate goes there, error g ||E_e - E_r||), or left out
    (error g ||E_e||), whichever is less; eps is a share of sum g ||E_e||. Where no subset meets both limits, the one of least
    error. Source: the problem of SiftMoE, arXiv 2603.23888, with one channel state; the paper's bandwidth is left out.
    """

    routing: Routing
    top_k: int
    calibration: Calibration | None = None
    eps: float = 0.2
    limit_ms: float = np.inf

    def __post_init__(self) -> None:
        if self.top_k > 12:
            raise ValueError(
                f"similarity looks at all subsets of {self.top_k} experts: it is for models with at most 12"
            )

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        most = max(1, MAX_CELLS // (2**self.top_k * self.top_k**2))
        if len(logits) > most:  # memory stays bounded
            parts = [self(layer, logits[start : start + most], world) for start in range(0, len(logits), most)]
            names = ("experts", "gates") if parts[0].nodes is None else ("experts", "gates", "nodes", "precisions")
            return Choice(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
        experts = routing.largest(logits, self.top_k)
        gates = routing.gates_of(logits, experts, self.routing)
        t, k = gates.shape
        if self.calibration is None:
            norm, distance = np.ones((t, k)), np.full((t, k, k), np.sqrt(2))
        else:
            m = self.calibration.position[layer]
            norm = self.calibration.output_norm[m][experts]
            distance = self.calibration.distance[m][experts[:, :, None], experts[:, None, :]]
        offer = None if world is None else world.thriftiest[world.position[layer]]
        joules = np.ones((t, k)) if offer is None else offer.joules[experts]
        ms = np.zeros((t, k)) if offer is None else offer.ms[experts]
        sets = _subsets(k)  # [S, K]
        to = np.where(sets[None, :, None, :], distance[:, None], np.inf)  # [T, S, K, K]
        nearest = to.argmin(3)
        apart = to.min(3)
        error = (gates[:, None] * np.where(sets, 0, np.minimum(apart, norm[:, None]))).sum(2)
        energy = np.where(sets, joules[:, None], 0).sum(2)
        runs = np.isfinite(energy)
        if self.limit_ms < np.inf:
            runs &= np.where(sets, ms[:, None], 0).max(2) <= self.limit_ms
        possible = runs & (error <= self.eps * (gates * norm).sum(1, keepdims=True) + 1e-12)
        # least energy among the possible, then least error; without any, least error among those that can be run at all
        energy = np.where(possible, energy, np.where(runs, 1e30, 1e31))
        best = np.where(energy == energy.min(1, keepdims=True), error, np.inf).argmin(1)
        rows = np.arange(t)
        run, target, moved = sets[best], nearest[rows, best], apart[rows, best] < norm
        result = np.where(run, gates, 0).astype(np.float64)
        np.add.at(result, (rows[:, None], target), np.where(~run & moved, gates, 0))
        result *= (gates.sum(1) / np.maximum(result.sum(1), 1e-30))[:, None]
        return named(Choice(experts, result.astype(np.float32)), offer)


@lru_cache
def _subsets(k: int) -> np.ndarray:
    """bool [2^K - 1, K]: all but the empty one."""
    return (np.arange(1, 2**k)[:, None] >> np.arange(k) & 1).astype(bool)


@dataclass(frozen=True)
class Equinox:
    """One marginal cost: an expert runs where `value` times its share of the gates is at least the price of its cheapest copy, the way
    there included; the largest always runs. (The form in ALGORITHMS.md: run where the value exceeds mu, move where mu is less.)
    """

    routing: Routing
    top_k: int
    value: float = 1.0

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        experts = routing.largest(logits, self.top_k)
        gates = routing.gates_of(logits, experts, self.routing)
        if world is None or world.free:
            return Choice(experts, gates)
        offer = world.marginal[world.position[layer]]
        keep = self.value * gates >= offer.price[experts] * gates.sum(1, keepdims=True)
        keep[:, 0] = True
        return named(kept(experts, gates, keep), offer)


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} {value} is not in (0, 1]")


def make(name: str, rule: Routing, top_k: int, calibration: Calibration | None = None, **knobs) -> Policy:
    """A baseline by its name; `selection.make` is the door."""
    if name == "similarity":
        return Similarity(rule, top_k, calibration, **knobs)
    kinds = {"coolest": Coolest, "topp": TopP, "naee": Naee, "des": Des, "wlr": Wlr, "equinox": Equinox}
    return kinds[name](rule, top_k, **knobs)
