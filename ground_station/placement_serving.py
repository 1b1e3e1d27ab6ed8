"""Which copy serves an expert in each contact state, by one rule for every policy, and the holdings that the dispatcher takes.

Leaves out: what it costs (placement_problem), sharing one expert's work between copies (dispatch does that live).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ground_station.placement import EMERGENCY, Holding
from ground_station.placement_problem import NOWHERE, Copy, Placement, Problem, layer_ms


def serve(problem: Problem, policy: str, copies: Iterable[Copy], passes: int = 3) -> Placement:
    """The serving rule that every policy gets: least exact cost, by coordinate descent from the least expected finish.

    A node's watts above its cap are priced like gate mass out of reach, so that work goes to another copy where there is one.
    """
    unique = tuple(sorted(set(copies)))
    by_expert: dict[tuple[int, int], list[int]] = {}
    for index, copy in enumerate(unique):
        by_expert.setdefault((copy.layer, copy.expert), []).append(index)
    scenarios = len(problem.chances)
    table = np.full((scenarios, problem.layers, problem.experts), NOWHERE)
    watts = np.zeros(len(problem.nodes))
    node = np.array([copy.node for copy in unique] + [NOWHERE])
    variant = np.array([copy.variant for copy in unique] + [0])
    cost = problem.ms[variant] / problem.speed[node]
    for attempt in range(passes):
        moved = False
        for layer in range(problem.layers):
            order = np.argsort(-problem.use[layer], kind="stable")
            for scenario in range(scenarios):
                path = problem.path_ms[scenario, layer]
                row = table[scenario, layer]
                for expert in order:
                    options = [i for i in by_expert.get((layer, int(expert)), ()) if np.isfinite(path[node[i]])]
                    if not options or (attempt and len(options) == 1):
                        continue
                    chance = problem.chances[scenario]
                    draw = chance * problem.watts_per_use[layer, expert]
                    if row[expert] != NOWHERE:
                        watts[node[row[expert]]] -= draw[variant[row[expert]]]
                    best = options[0]
                    if len(options) > 1:
                        trial = np.repeat(row[None], len(options), 0)
                        trial[:, expert] = options
                        paths = np.broadcast_to(path, (len(options), path.size))
                        price = layer_ms(problem, layer, paths, node[trial], cost[trial]) * chance
                        price += (
                            problem.prices.error_ms
                            * problem.mass[layer, expert]
                            * problem.error[variant[options]]
                            * chance
                        )
                        price += [over_price(problem, watts, node[i], draw[variant[i]]) for i in options]
                        best = options[int(np.argmin(price))]
                    watts[node[best]] += draw[variant[best]]
                    moved |= row[expert] != best
                    row[expert] = best
        if not moved:
            break
    return Placement(policy, unique, table)


def over_price(problem: Problem, watts: np.ndarray, node: int, more_w: float) -> float:
    """Price of drawing `more_w` on a node on top of `watts` [N], as far as it is over the cap."""
    cap = problem.cap_w[node]
    before, after = max(watts[node] - cap, 0.0), max(watts[node] + more_w - cap, 0.0)
    return problem.prices.miss_ms * (after - before) / max(cap, 1e-9)


def holdings(problem: Problem, placement: Placement, moe_layers: tuple[int, ...]) -> tuple[Holding, ...]:
    """For the dispatcher: rank 0 serves in the likeliest scenario, the others follow by their solo latency there, emergency copies last."""
    likeliest = int(np.argmax(problem.chances))
    groups: dict[tuple[int, int], list[int]] = {}
    for index, copy in enumerate(placement.copies):
        groups.setdefault((copy.layer, copy.expert), []).append(index)
    result = []
    for (layer, expert), indices in groups.items():
        first = placement.serve[likeliest, layer, expert]

        def order(index: int, first=first, layer=layer) -> tuple[bool, bool, float]:
            copy = placement.copies[index]
            solo = problem.path_ms[likeliest, layer, copy.node] + problem.ms[copy.variant] / problem.speed[copy.node]
            return index != first, problem.variants[copy.variant] in EMERGENCY, solo

        for rank, index in enumerate(sorted(indices, key=order)):
            copy = placement.copies[index]
            name = problem.nodes[copy.node]
            result.append(Holding(name, moe_layers[layer], expert, problem.variants[copy.variant], rank))
    return tuple(result)
