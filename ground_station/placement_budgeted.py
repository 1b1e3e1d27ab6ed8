"""`budgeted`: this project's placement: several experts per node, replicas by marginal gain per byte, several precisions, heat
and battery, migration price. Construction and local search, pure and without a clock: the same problem and seed give the same answer.

Starts: every expert once in the smallest precision, the most used first, each where it costs least; what is held now; baselines.
Sweeps over the experts move, shrink, grow and drop copies, add copies by gain per byte (at the price of another copy where memory
is full) and swap two; kicks (some experts laid down anew at random) lead out of local optima. Leaves out: optimality
(placement_exact is the yardstick).
"""

from __future__ import annotations

import numpy as np

from ground_station import placement_baselines as baselines
from ground_station import placement_steps as steps
from ground_station.placement import PlacementError
from ground_station.placement_problem import Copy, Placement, Problem
from ground_station.placement_search import MIN_GAIN_MS, Search

MAX_SWEEPS = 10
HEAT_WEIGHTS = (0.003, 0.03, 0.3, 5.0)  # light at first, so that work may pass through a crowded state
SMALL_EXPERTS = 32  # up to so many experts every start is improved to the end, swaps included
FEW_SWEEPS = 2
SWAP_EXPERTS = 160  # up to so many experts every pair is looked at for a swap, in the best search
KICK_SHARES = (0.2, 0.4, 0.7)  # of the experts, in turn


def budgeted(
    problem: Problem,
    seed: int = 0,
    near: int | None = None,
    kicks: int | None = None,
    starts: tuple[str, ...] = ("ring", "eplb", "roundrobin"),
) -> Placement:
    """The best of several searches.

    `near`: only that many nodes per layer, those of least expected path, may hold its experts (for large fleets; None: all).
    `kicks`: None chooses by size. `starts`: baselines to start from as well.
    Raises: PlacementError when not even one copy of each expert fits.
    """
    baselines.fitting_variant(problem)
    candidates = np.ones((problem.layers, len(problem.nodes)), bool)
    if near is not None and near < len(problem.nodes):
        closest = np.argsort(baselines.expected_path_ms(problem), axis=1, kind="stable")[:, :near]
        candidates[:] = False
        np.put_along_axis(candidates, closest, True, axis=1)
    size = problem.layers * problem.experts
    small = size <= SMALL_EXPERTS
    if kicks is None:
        kicks = 12 if small else 0
    offers = [_start(problem, candidates)]
    if problem.held:
        offers += _held(problem)
    for name in starts:
        try:
            offers.append(getattr(baselines, name)(problem, seed))
        except PlacementError:
            continue  # a baseline that finds no room is no start
    best: tuple[float, Search] | None = None
    for copies in offers:
        search = Search(problem, copies, candidates)
        for weight in _weights(problem):
            search.heat = weight
            search.settle()
            _improve(search, small, MAX_SWEEPS if small else FEW_SWEEPS)
        cost = search.objective()
        if best is None or cost < best[0] - MIN_GAIN_MS:
            best = (cost, search)
    search = best[1]
    if not small:
        _improve(search, size <= SWAP_EXPERTS)
    _kick(search, kicks, np.random.default_rng(seed))
    return search.placement()


def improved(problem: Problem, placement: Placement) -> Placement:
    """A placement after local search alone, for asking what a small change of the problem would be worth."""
    search = Search(problem, placement.copies, np.ones((problem.layers, len(problem.nodes)), bool))
    search.load(placement)
    search.heat = HEAT_WEIGHTS[-1]
    _improve(search, problem.layers * problem.experts <= SMALL_EXPERTS)
    return search.placement()


def _weights(problem: Problem) -> tuple[float, ...]:
    return HEAT_WEIGHTS if np.isfinite(problem.cap_w).any() else HEAT_WEIGHTS[-1:]


def _start(problem: Problem, candidates: np.ndarray) -> list[Copy]:
    """Every expert once in the smallest variant, the most used first, where it costs least."""
    room, variant = baselines.Room(problem), int(problem.bytes.argmin())
    path = baselines.expected_path_ms(problem)
    busy = np.zeros((problem.layers, len(problem.nodes)))
    watts, cap = np.zeros(len(problem.nodes)), problem.cap_w
    solo = problem.ms[variant] / problem.speed
    for flat in np.argsort(-problem.use.ravel(), kind="stable"):
        layer, expert = divmod(int(flat), problem.experts)
        draw = problem.watts_per_use[layer, expert, variant]
        # what the node already does for this layer is in the way of about as many tokens as use it
        cost = path[layer] + solo + busy[layer]
        cost = np.where(watts + draw > cap, cost + problem.prices.miss_ms, cost)
        cost = np.where(candidates[layer], cost, cost + 10 * problem.prices.miss_ms)
        room.first(layer, expert, variant, np.argsort(cost, kind="stable"))
        node = room.copies[-1].node
        busy[layer, node] += solo[node] * problem.use[layer, expert]
        watts[node] += draw
    return room.copies


def _held(problem: Problem) -> list[list[Copy]]:
    """What is there now, as a start, if it is whole and within bounds."""
    copies = sorted(problem.held)
    sizes = np.bincount([c.node for c in copies], [int(problem.bytes[c.variant]) for c in copies], len(problem.nodes))
    whole = len({copy[:2] for copy in copies}) == problem.layers * problem.experts
    fits = (sizes <= problem.memory).all() and sizes.sum() <= problem.fleet_bytes
    return [copies] if whole and fits and len({copy[:3] for copy in copies}) == len(copies) else []


def _improve(search: Search, pairs: bool, sweeps: int = MAX_SWEEPS) -> None:
    for _ in range(sweeps):
        gain = steps.each(search) + steps.add(search)
        if pairs:
            gain += steps.swap(search)
        if gain <= 1e-5 * max(float(search.layer_cost.sum()), 1e-9):
            return


def _kick(search: Search, kicks: int, rng: np.random.Generator) -> None:
    """Takes some experts away and lays them down again in random order, each where it costs least (at random, every other
    time), and improves; kept when it pays."""
    best, state = search.objective(), search.snapshot()
    keys = list(search.held)
    for kick in range(kicks):
        search.heat = _weights(search.problem)[0]
        chosen = [keys[i] for i in rng.permutation(len(keys))[: max(2, int(KICK_SHARES[kick % 3] * len(keys)))]]
        for key in chosen:
            search._swap_copies([Copy(*key, n, v) for n, v in search.held[key].items()], [])
            search.serve_expert(*key)
        for layer, expert in chosen:
            nodes = search.near[layer]
            served, missed = search.offers(layer, expert, nodes)
            cost = np.minimum(missed[:, None, None], served).sum(0) + search.price[layer, expert, nodes]
            if kick % 2:
                cost = rng.random(cost.shape)
            cost[np.minimum(search.free[nodes], search.fleet)[:, None] < search.sizes] = np.inf
            i, v = np.unravel_index(int(np.argmin(cost)), cost.shape)
            if not np.isfinite(cost[i, v]):
                break
            search._swap_copies([], [Copy(layer, expert, int(nodes[i]), int(v))])
            search.serve_expert(layer, expert)
        if all(search.held.values()):
            for weight in _weights(search.problem)[-3:]:
                search.heat = weight
                search.settle()
                _improve(search, True)
            found = search.objective()
            if found < best - MIN_GAIN_MS:
                best, state = found, search.snapshot()
                continue
        search.restore(state)
    search.heat = HEAT_WEIGHTS[-1]
