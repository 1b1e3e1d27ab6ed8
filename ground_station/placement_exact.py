"""The exact placement by a mixed-integer programme (HiGHS), for small fleets: the yardstick of the heuristics.

Binary x[l, e, n, v]: a copy is there; y[c, l, e, n, v] <= x: it serves in scenario c; z[c, l, e]: nothing serves (its gate mass is
priced). The maximum is made linear by one variable T[c, l, r] per routing set with, for each expert k of the set and node n,
    T >= path_n sum_v y[k, n, v] + sum over k' of the set, v of ms_v / speed_n y[k', n, v]:
with y binary, the right side is tau of k where n serves it and never more than the true maximum elsewhere, so the minimum over
T is exact. (T >= the solo time of each k, summed over nodes, is implied, and tightens the relaxation.) The price of copies all out of
contact is convex in their number: its chords bound it. Heat and battery are hard bounds on average watts, so no duty cap
stretches any work. Leaves out: sharing one expert's work between two copies in a scenario.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ground_station.placement import PlacementError
from ground_station.placement_problem import NOWHERE, Copy, Placement, Problem, all_out

MAX_BINARIES = 20_000


@dataclass(frozen=True, eq=False)
class Exact:
    """The best placement found, and a bound that no placement can be under (equal up to `gap` when solved)."""

    placement: Placement
    bound_ms: float
    gap: float
    solved: bool


def solve(problem: Problem, time_limit_s: float = 60.0, gap: float = 1e-3) -> Exact:
    """Raises: PlacementError when it is too large, infeasible, or nothing was found in time."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    scenarios, layers, experts = len(problem.chances), problem.layers, problem.experts
    nodes, variants, sets = len(problem.nodes), len(problem.variants), problem.sets.shape[1]
    places = layers * experts * nodes * variants
    if places * (1 + scenarios) > MAX_BINARIES:
        raise PlacementError(
            f"the exact programme would have {places * (1 + scenarios)} binaries (at most {MAX_BINARIES}): use budgeted"
        )
    x = np.arange(places).reshape(layers, experts, nodes, variants)
    y = places + np.arange(scenarios * places).reshape(scenarios, layers, experts, nodes, variants)
    z = y.size + places + np.arange(scenarios * layers * experts).reshape(scenarios, layers, experts)
    t = z.size + y.size + places + np.arange(scenarios * layers * sets).reshape(scenarios, layers, sets)
    d = t.size + z.size + y.size + places + np.arange(layers * experts).reshape(layers, experts)
    size = places + y.size + z.size + t.size + d.size
    prices = problem.prices
    mass = problem.mass[None] * problem.chances[:, None, None]  # [C, L, E]
    cost = np.zeros(size)
    for copy in map(tuple, np.ndindex(x.shape)):
        cost[x[copy]] = problem.copy_price_ms(Copy(*copy))
    cost[y] = prices.error_ms * mass[..., None, None] * problem.error
    cost[z] = prices.miss_ms * mass
    cost[t] = problem.chances[:, None, None] * problem.weights[None]
    cost[d] = problem.dark_share * prices.miss_ms * problem.mass
    out = all_out(nodes)
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    low: list[float] = []
    high: list[float] = []

    def rule(indices, factors, least: float, most: float) -> None:
        indices = np.asarray(indices).ravel()
        rows.append(np.full(indices.size, len(low)))
        columns.append(indices)
        values.append(np.broadcast_to(np.asarray(factors, float), indices.size))
        low.append(least)
        high.append(most)

    solo = problem.ms[None] / problem.speed[:, None]  # [N, V]
    finite = np.isfinite(problem.path_ms)
    path = np.where(finite, problem.path_ms, 0.0)
    upper = np.ones(size)
    upper[t] = np.inf
    upper[y] = np.where(finite[:, :, None, :, None], 1.0, 0.0)
    for layer in range(layers):
        for expert in range(experts):
            rule(x[layer, expert], 1, 1, np.inf)
            for k in range(nodes if problem.dark_share else 0):  # convex in the number of copies: its chords bound it
                slope = out[k + 1] - out[k]
                factors = np.append(np.full(x[layer, expert].size, -slope), 1.0)
                rule(np.append(x[layer, expert].ravel(), d[layer, expert]), factors, out[k] - slope * k, np.inf)
            for node in range(nodes):
                rule(x[layer, expert, node], 1, 0, 1)
            for scenario in range(scenarios):
                rule(np.append(y[scenario, layer, expert].ravel(), z[scenario, layer, expert]), 1, 1, 1)
    for scenario in range(scenarios):
        for served, held in zip(y[scenario].ravel(), x.ravel()):
            rule([served, held], [1, -1], -np.inf, 0)
    for node in range(nodes):
        rule(
            x[:, :, node],
            np.broadcast_to(problem.bytes / 1e6, (layers, experts, variants)).ravel(),
            0,
            problem.memory[node] / 1e6,
        )
        if np.isfinite(problem.cap_w[node]):
            draw = problem.chances[:, None, None, None] * problem.watts_per_use[None]
            rule(y[:, :, :, node], draw.ravel(), 0, problem.cap_w[node])
    rule(x, np.broadcast_to(problem.bytes / 1e6, x.shape).ravel(), 0, problem.fleet_bytes / 1e6)
    for scenario, layer, number in np.ndindex(t.shape):
        if problem.weights[layer, number] == 0:
            continue
        members = problem.sets[layer, number]
        top, way = t[scenario, layer, number], path[scenario, layer]
        for member in members:
            rule(
                np.append(y[scenario, layer, member].ravel(), top),
                np.append((way[:, None] + solo).ravel(), -1),
                -np.inf,
                0,
            )
            for node in range(nodes):
                if not finite[scenario, layer, node]:
                    continue
                factors = np.tile(solo[node], (len(members), 1))
                factors[members == member] += way[node]
                rule(
                    np.append(y[scenario, layer, members, node].ravel(), top),
                    np.append(factors.ravel(), -1),
                    -np.inf,
                    0,
                )
    matrix = coo_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(len(low), size)
    ).tocsr()
    whole = np.zeros(size)
    whole[: places + y.size] = 1
    result = milp(
        cost,
        integrality=whole,
        bounds=Bounds(np.zeros(size), upper),
        constraints=LinearConstraint(matrix, low, high),
        options={"time_limit": time_limit_s, "mip_rel_gap": gap},
    )
    if result.x is None:
        why = "no placement keeps all bounds" if result.status == 2 else result.message.strip()[:80]
        raise PlacementError(f"the exact programme has no answer ({why}): add memory, or lower the tokens per second")
    held, served = result.x[x] > 0.5, result.x[y] > 0.5
    copies = tuple(Copy(*map(int, index)) for index in np.argwhere(held))
    number = {copy: i for i, copy in enumerate(copies)}
    table = np.full((scenarios, layers, experts), NOWHERE)
    for scenario, *index in np.argwhere(served):
        table[scenario, index[0], index[1]] = number[Copy(*map(int, index))]
    bound = result.mip_dual_bound if result.mip_dual_bound is not None else -np.inf
    return Exact(Placement("exact", copies, table), float(bound), float(result.mip_gap or 0.0), result.status == 0)
