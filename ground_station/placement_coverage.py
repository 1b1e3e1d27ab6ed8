"""`coverage`: a placement for any half of the nodes out of contact: what each expert holds by its importance, and which nodes hold it so
that no half loses much more than another.

An expert's copies differ in precision: a good one for when it is in reach, low ones (int2) that stand in for it. Damage is what the
text's likelihood loses, in nats per token, by calibration: of a precision, and of an expert out of reach; by layer it differs tenfold.
How many copies of which precision an expert gets follows from a closed form, the chance that its best i copies are all out: a
knapsack, solved along the convex hull of (bytes, damage). Then copies are laid on nodes and exchanged between nodes while the
damage over all halves (the worst weighing most) falls. Leaves out: latency, heat and battery (`budgeted` knows those).

Letters: L layers, E experts, N nodes, V variants (precisions, best first), H halves.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ground_station import placement_baselines as baselines
from ground_station.placement import PlacementError
from ground_station.placement_problem import NOWHERE, Copy, Placement, Problem, all_out, halves

DARK_SHARE = 0.5
"""Of the time, where the problem names none: as much for half of the nodes as for all."""
LOST_NATS = 2.5
"""A layer's damage if its experts are out of reach, where it was not measured; that of a precision is then its squared relative error."""
CROWD = 1.0
"""How much more a loss costs the larger it is within a layer: damage + CROWD * damage^2. Measured on the reference model: 4 and 8 of
16 experts of its first layer out of reach cost 0.49 and 1.59 nats, one by one 0.40 and 0.86."""
WORST = 12.0
"""Halves weigh by exp(WORST * damage): the worst count most."""
MOST_COPIES = 4
MOST_HALVES = 512
ROUNDS = 60
TRIES = 4000  # exchanges that are tried in a round
SMALL_GAIN = 1e-4


def all_halves(nodes: int, most: int = MOST_HALVES, seed: int = 0) -> np.ndarray:
    """bool [H, N]: every way that floor(N / 2) nodes can be out of contact, or `most` random ones where there are more."""
    if math.comb(nodes, nodes // 2) > most:
        return halves(nodes, most, seed)
    chosen = list(itertools.combinations(range(nodes), nodes // 2))
    out = np.zeros((len(chosen), nodes), bool)
    for row, each in zip(out, chosen):
        row[list(each)] = True
    return out


@dataclass(frozen=True)
class Option:
    """What one expert may hold: variants of its copies, best first; bytes; damage in nats, expected over time, of a whole layer."""

    variants: tuple[int, ...]
    bytes: int
    damage: float


def damages(problem: Problem) -> np.ndarray:
    """[L, V + 1] nats, as Problem.nats."""
    if problem.nats.size:
        return problem.nats
    return np.tile([*np.asarray(problem.error, float) ** 2, LOST_NATS], (problem.layers, 1))


def worth(problem: Problem) -> np.ndarray:
    """[L, E], a layer sums to 1: an expert's part of the layer's damage. Rare experts matter more than their gate mass says (on the
    reference model its correlation with measured damage is 0.2 to 0.3): its root."""
    root = np.sqrt(problem.mass)
    return root / np.maximum(root.sum(1, keepdims=True), 1e-30)


def options(problem: Problem, nats: np.ndarray) -> list[Option]:
    """The convex hull, from the smallest to the best: bytes rise and damage falls, ever less per byte; nats [V + 1] of a layer."""
    share, out = problem.dark_share or DARK_SHARE, all_out(len(problem.nodes))
    found = []
    for count in range(1, min(MOST_COPIES, len(problem.nodes)) + 1):
        for variants in itertools.combinations_with_replacement(range(len(problem.variants)), count):
            dark = nats[-1] * out[count]
            dark += sum(nats[v] * (out[i] - out[i + 1]) for i, v in enumerate(variants))
            damage = (1 - share) * nats[variants[0]] + share * dark
            found.append(Option(variants, int(sum(int(problem.bytes[v]) for v in variants)), float(damage)))
    found.sort(key=lambda option: (option.bytes, option.damage))
    hull: list[Option] = []
    for option in found:
        if hull and option.damage >= hull[-1].damage - 1e-12:
            continue
        while len(hull) > 1 and _slope(hull[-1], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        if hull and option.bytes == hull[-1].bytes:
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (a.damage - b.damage) / max(b.bytes - a.bytes, 1)


def shares(problem: Problem, bound: int) -> dict[tuple[int, int], Option]:
    """An option for each expert, within `bound` bytes: steps along the hulls in the order of their gain per byte (the smallest fits)."""
    hulls = [options(problem, nats) for nats in damages(problem)]
    keys = list(np.ndindex(problem.layers, problem.experts))
    left = bound - sum(hulls[layer][0].bytes for layer, _ in keys)
    part = worth(problem)
    steps = sorted(
        (-part[key] * _slope(a, b), i, key)
        for key in keys
        for i, (a, b) in enumerate(itertools.pairwise(hulls[key[0]]))
    )
    at = dict.fromkeys(keys, 0)
    for _, i, key in steps:
        hull = hulls[key[0]]
        need = hull[i + 1].bytes - hull[i].bytes
        if at[key] == i and need <= left:
            at[key], left = i + 1, left - need
    return {key: hulls[key[0]][i] for key, i in at.items()}


class _Layout:
    """Where the copies are: [copy] node, and the damage that follows for every half."""

    def __init__(self, problem: Problem, wanted: dict[tuple[int, int], Option], rng: np.random.Generator):
        self.problem, self.rng = problem, rng
        self.nats = damages(problem)[:, None] * worth(problem)[..., None]  # [L, E, V + 1]
        self.out = all_halves(len(problem.nodes))
        self.keys = list(wanted)
        self.copies: list[list[tuple[int, int]]] = []  # per expert (variant, node), best first
        self.free = problem.memory.astype(np.int64).copy()
        self._lay(wanted)
        self.damage = np.array(
            [self.of(e, copies) for e, copies in enumerate(self.copies)]
        )  # [experts of all layers, H]
        self.layer = np.array([key[0] for key in self.keys])
        self.sums = np.zeros((problem.layers, len(self.out)))
        np.add.at(self.sums, self.layer, self.damage)

    def _lay(self, wanted: dict[tuple[int, int], Option]) -> None:
        """First the best copy of each expert, the largest first, then the others; each where most is free (at random among nearly
        equal nodes)."""
        held: dict[int, dict[int, int]] = {e: {} for e in range(len(self.keys))}
        sizes = self.problem.bytes.astype(np.int64)
        todo = [(e, v, i > 0) for e, key in enumerate(self.keys) for i, v in enumerate(wanted[key].variants)]
        todo.sort(key=lambda item: (item[2], -sizes[item[1]], self.rng.random()))
        for e, v, further in todo:
            room = np.where(self.free >= sizes[v], self.free + self.rng.random(len(self.free)) * sizes[v], -1.0)
            room[list(held[e])] = -1.0
            node = int(room.argmax())
            if room[node] < 0:
                if not further:
                    raise PlacementError(
                        f"memory binds: a {self.problem.variants[v]} copy of an expert ({sizes[v] / 1e6:.2f} MB) fits no node "
                        "any more: give nodes a little more memory than their share"
                    )
                continue  # a further copy that finds no room is left out
            held[e][node] = v
            self.free[node] -= sizes[v]
        self.copies = [sorted((v, node) for node, v in held[e].items()) for e in range(len(self.keys))]

    def of(self, expert: int, copies: list[tuple[int, int]]) -> np.ndarray:
        """[H]: damage by the best copy in reach."""
        nats = self.nats[self.keys[expert]]
        best = np.full(len(self.out), len(nats) - 1)
        for variant, node in reversed(copies):
            best = np.where(self.out[:, node], best, variant)
        return nats[best]

    def cost(self, sums: np.ndarray) -> float:
        """Of sums [L, H], in nats: between the mean over the halves and the worst of them."""
        half = (sums + CROWD * sums**2).sum(0)
        return float(np.logaddexp.reduce(WORST * half) / WORST)

    def settle(self) -> None:
        """Exchanges copies of equal size between nodes, and moves copies to where there is room, while that helps."""
        sizes = self.problem.bytes.astype(np.int64)
        now = self.cost(self.sums)
        places = [(e, i) for e, copies in enumerate(self.copies) for i in range(len(copies))]
        for _ in range(ROUNDS):
            before = now
            for _ in range(TRIES):
                (a, i), (b, j) = (places[k] for k in self.rng.integers(len(places), size=2))
                (va, na), (vb, nb) = self.copies[a][i], self.copies[b][j]
                if a == b or na == nb or any(n == nb for _, n in self.copies[a]):
                    continue
                change = int(sizes[va] - sizes[vb])
                swap = (
                    not any(n == na for _, n in self.copies[b]) and self.free[nb] >= change and self.free[na] >= -change
                )
                if not swap and self.free[nb] < sizes[va]:
                    continue
                new = {a: self._with(a, i, nb)}
                if swap:
                    new[b] = self._with(b, j, na)
                sums, damage = self.sums.copy(), {}
                for e, copies in new.items():
                    damage[e] = self.of(e, copies)
                    sums[self.layer[e]] += damage[e] - self.damage[e]
                cost = self.cost(sums)
                if cost < now:
                    now, self.sums = cost, sums
                    for e, copies in new.items():
                        self.copies[e], self.damage[e] = copies, damage[e]
                    shift = change if swap else int(sizes[va])
                    self.free[nb] -= shift
                    self.free[na] += shift
            if now > before - SMALL_GAIN:
                return

    def _with(self, expert: int, index: int, node: int) -> list[tuple[int, int]]:
        copies = list(self.copies[expert])
        copies[index] = (copies[index][0], node)
        return sorted(copies)


def coverage(problem: Problem, seed: int = 0) -> Placement:
    """The placement; the same problem and seed give the same one.  Raises: PlacementError naming what binds."""
    baselines.fitting_variant(problem)
    bound = min(int(problem.fleet_bytes), int(problem.memory.sum()))
    layout = _Layout(problem, shares(problem, bound), np.random.default_rng(seed))
    layout.settle()
    copies = tuple(sorted(Copy(*key, n, v) for key, held in zip(layout.keys, layout.copies) for v, n in held))
    return Placement("coverage", copies, _best_first(problem, copies))


def _best_first(problem: Problem, copies: tuple[Copy, ...]) -> np.ndarray:
    """serve [C, L, E]: in each scenario the best precision in contact, the quickest of its copies."""
    serve = np.full((len(problem.chances), problem.layers, problem.experts), NOWHERE)
    for scenario, path in enumerate(problem.path_ms):

        def order(index: int, path=path) -> tuple[int, float]:
            copy = copies[index]
            return copy.variant, path[copy.layer, copy.node] + problem.ms[copy.variant] / problem.speed[copy.node]

        for index in sorted(range(len(copies)), key=order, reverse=True):
            copy = copies[index]
            if np.isfinite(path[copy.layer, copy.node]):
                serve[scenario, copy.layer, copy.expert] = index
    return serve
