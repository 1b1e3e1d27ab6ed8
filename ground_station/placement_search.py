"""The state of the local search behind `budgeted`: who holds and serves what, and what any change of one expert would cost.

For one expert of one layer, all else as it is, `offers` costs every (scenario, node, variant) that could serve it in one vectorised
call; moving, adding, shrinking and dropping copies are read off that table. A change is then applied exactly and undone if it did
not help. Watts over a node's cap are priced, by a weight that the search raises as it goes. Leaves out: which changes are tried
when (placement_budgeted).
"""

from __future__ import annotations

import numpy as np

from ground_station.placement_baselines import expected_path_ms
from ground_station.placement_problem import NOWHERE, Copy, Placement, Problem, layer_ms
from ground_station.placement_serving import serve

MIN_GAIN_MS = 1e-7


class Search:
    """Copies by expert as {node: variant}; serving node, variant and work [L, C, E]; what is free and drawn by node."""

    def __init__(self, problem: Problem, copies, candidates: np.ndarray):
        """candidates bool [L, N]: nodes on which experts of a layer may be put."""
        self.problem, self.candidates = problem, candidates
        self.heat = 1.0
        self.solo = problem.ms[None] / problem.speed[:, None]  # [N, V]
        self.cap = problem.cap_w
        self.draw = problem.watts_per_use[:, :, None] * problem.chances[:, None]  # [L, E, C, V]
        self.sizes = problem.bytes.astype(np.int64)
        prices, mb = problem.prices, problem.bytes / 1e6
        self.price = np.broadcast_to(
            mb * (prices.store_ms_per_mb + prices.move_ms_per_mb),
            (problem.layers, problem.experts, len(problem.nodes), len(mb)),
        ).copy()
        for copy in problem.held:
            self.price[copy] = mb[copy.variant] * prices.store_ms_per_mb
        self.dark = problem.dark_ms
        self.near = [np.flatnonzero(row) for row in candidates]
        self.paths = expected_path_ms(problem)
        self.load(serve(problem, "budgeted", copies))

    def load(self, placement: Placement) -> None:
        """Takes over a placement whole."""
        problem = self.problem
        shape = (problem.layers, len(problem.chances), problem.experts)
        self.held: dict[tuple[int, int], dict[int, int]] = {key: {} for key in np.ndindex(shape[0], shape[2])}
        for copy in placement.copies:
            self.held[copy.layer, copy.expert][copy.node] = copy.variant
        nodes = np.array([copy.node for copy in placement.copies] + [NOWHERE])
        kinds = np.array([copy.variant for copy in placement.copies] + [0])
        index = placement.serve.transpose(1, 0, 2)
        self.node, self.variant = nodes[index], kinds[index]
        self.recount()

    def snapshot(self) -> tuple:
        return {key: dict(copies) for key, copies in self.held.items()}, self.node.copy(), self.variant.copy()

    def restore(self, state: tuple) -> None:
        held, node, variant = state
        self.held = {key: dict(copies) for key, copies in held.items()}
        self.node, self.variant = node.copy(), variant.copy()
        self.recount()

    def recount(self) -> None:
        """Everything that follows from copies and serving."""
        problem = self.problem
        self.work = np.where(self.node == NOWHERE, 0.0, self.solo[self.node, self.variant])
        used = np.zeros(len(problem.nodes), np.int64)
        for copies in self.held.values():
            for node, variant in copies.items():
                used[node] += self.sizes[variant]
        self.free = problem.memory.astype(np.int64) - used
        self.fleet = int(problem.fleet_bytes) - int(used.sum())
        self.watts = np.zeros(len(problem.nodes))
        layer, scenario, expert = np.nonzero(self.node != NOWHERE)
        draw = self.draw[layer, expert, scenario, self.variant[layer, scenario, expert]]
        self.watts += np.bincount(self.node[layer, scenario, expert], draw, len(problem.nodes))
        self.layer_cost = np.array([self.cost_of(layer) for layer in range(problem.layers)])

    def cost_of(self, layer: int) -> float:
        """Latency, gate mass out of reach and precision of a layer, ms."""
        problem, prices = self.problem, self.problem.prices
        ms = layer_ms(problem, layer, problem.path_ms[:, layer], self.node[layer], self.work[layer])
        each = np.where(
            self.node[layer] == NOWHERE, prices.miss_ms, prices.error_ms * problem.error[self.variant[layer]]
        )
        return float((ms + each @ problem.mass[layer]) @ problem.chances)

    def over(self, watts: np.ndarray) -> float:
        """Price of all watts over their caps; watts [N]."""
        share = np.maximum(watts - self.cap, 0.0) / np.maximum(self.cap, 1e-9)
        return float(np.where(np.isfinite(self.cap), share, 0.0).sum()) * self.problem.prices.miss_ms * self.heat

    def copies(self) -> list[Copy]:
        return [Copy(*key, node, variant) for key, held in self.held.items() for node, variant in held.items()]

    def objective(self) -> float:
        stored = sum(self.price[copy] for copy in self.copies())
        stored += sum(self.dark[key][len(held)] for key, held in self.held.items())
        return float(self.layer_cost.sum() + stored) + self.over(self.watts)

    def placement(self) -> Placement:
        copies = tuple(sorted(self.copies()))
        number = {copy[:3]: i for i, copy in enumerate(copies)}
        table = np.full(self.problem.path_ms.shape[:2] + (self.problem.experts,), NOWHERE)
        for layer, scenario, expert in np.argwhere(self.node != NOWHERE):
            table[scenario, layer, expert] = number[int(layer), int(expert), int(self.node[layer, scenario, expert])]
        return Placement("budgeted", copies, table)

    def without(self, layer: int, expert: int) -> np.ndarray:
        """Watts [N] without what serves this expert."""
        watts = self.watts.copy()
        for scenario, node in enumerate(self.node[layer, :, expert]):
            if node != NOWHERE:
                watts[node] -= self.draw[layer, expert, scenario, self.variant[layer, scenario, expert]]
        return watts

    def offers(self, layer: int, expert: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cost [C, len(nodes), V] if this expert is served there, and [C] if it is not, ms weighted by chance.

        Infinite without contact. Watts over a cap are priced scenario by scenario, as if the others did not draw.
        """
        problem, prices = self.problem, self.problem.prices
        scenarios, variants = len(problem.chances), len(problem.variants)
        options = len(nodes) * variants
        where = np.append(np.repeat(nodes, variants), NOWHERE)
        kind = np.append(np.tile(np.arange(variants), len(nodes)), 0)
        path = problem.path_ms[:, layer]  # [C, N]
        apart = ~np.isfinite(path[:, where[:-1]])
        row = np.repeat(self.node[layer], options + 1, 0)
        work = np.repeat(self.work[layer], options + 1, 0)
        row[:, expert] = np.tile(where, scenarios)
        row[:, expert][np.append(apart, np.zeros((scenarios, 1), bool), 1).ravel()] = NOWHERE
        work[:, expert] = np.tile(np.append(self.solo[nodes].ravel(), 0.0), scenarios)
        ms = layer_ms(problem, layer, np.repeat(path, options + 1, 0), row, work).reshape(scenarios, options + 1)
        each = np.append(prices.error_ms * problem.error[kind[:-1]], prices.miss_ms)
        cost = (ms + problem.mass[layer, expert] * each) * problem.chances[:, None]
        served = cost[:, :-1].reshape(scenarios, len(nodes), variants)
        watts, cap = self.without(layer, expert)[nodes], self.cap[nodes]
        after = watts[:, None] + self.draw[layer, expert][:, None, :]  # [C, nodes, V]
        base = np.maximum(watts - cap, 0.0)[:, None]
        more = np.maximum(after - cap[:, None], 0.0) - base
        served = served + np.where(more > 0, more, 0.0) / np.maximum(cap, 1e-9)[:, None] * prices.miss_ms * self.heat
        served[apart.reshape(served.shape)] = np.inf
        return served, cost[:, -1]

    def serve_expert(self, layer: int, expert: int) -> None:
        """Gives the expert, in each scenario, to its copy of least cost, all else as it is."""
        held = self.held[layer, expert]
        nodes = np.array(sorted(held), int)
        served, missed = self.offers(layer, expert, nodes)
        own = served[:, np.arange(len(nodes)), [held[n] for n in nodes]]  # [C, copies]
        self.watts = self.without(layer, expert)
        for scenario in range(len(missed)):
            best = int(np.argmin(own[scenario])) if len(nodes) else 0
            if not len(nodes) or own[scenario, best] > missed[scenario]:
                self.node[layer, scenario, expert], self.variant[layer, scenario, expert] = NOWHERE, 0
                self.work[layer, scenario, expert] = 0.0
                continue
            node = int(nodes[best])
            self.node[layer, scenario, expert], self.variant[layer, scenario, expert] = node, held[node]
            self.work[layer, scenario, expert] = self.solo[node, held[node]]
            self.watts[node] += self.draw[layer, expert, scenario, held[node]]

    def settle(self, layers=None) -> None:
        """Serves every expert anew, the most used first."""
        for layer in range(self.problem.layers) if layers is None else layers:
            for expert in np.argsort(-self.problem.use[layer], kind="stable"):
                self.serve_expert(layer, int(expert))
            self.layer_cost[layer] = self.cost_of(layer)

    def fits(self, remove: list[Copy], add: list[Copy]) -> bool:
        need: dict[int, int] = {}
        for sign, copies in ((1, add), (-1, remove)):
            for copy in copies:
                need[copy.node] = need.get(copy.node, 0) + sign * int(self.sizes[copy.variant])
        return sum(need.values()) <= self.fleet and all(size <= self.free[node] for node, size in need.items())

    def attempt(self, remove: list[Copy], add: list[Copy], wide: bool = False) -> float:
        """Applies a change and returns by how much the objective fell; one that does not help is undone (0.0).

        `wide`: the other experts of the layers that have several copies are served anew as well.
        """
        if not self.fits(remove, add):
            return 0.0
        touched = list(dict.fromkeys(copy[:2] for copy in (*remove, *add)))
        layers = list(dict.fromkeys(layer for layer, _ in touched))
        before = [
            (self.node[i].copy(), self.variant[i].copy(), self.work[i].copy(), self.layer_cost[i]) for i in layers
        ]
        watts, over = self.watts, self.over(self.watts)
        stored = sum(self.price[copy] for copy in add) - sum(self.price[copy] for copy in remove)
        stored -= sum(self.dark[key][len(self.held[key])] for key in touched)
        self._swap_copies(remove, add)
        stored += sum(self.dark[key][len(self.held[key])] for key in touched)
        helps = all(self.held[key] for key in touched)
        fall = 0.0
        if helps:
            for layer, expert in touched:
                self.serve_expert(layer, expert)
            if wide:
                for layer in layers:
                    for expert in range(self.problem.experts):
                        if len(self.held[layer, expert]) > 1:
                            self.serve_expert(layer, expert)
            for layer in layers:
                self.layer_cost[layer] = self.cost_of(layer)
            fall = sum(old[3] - self.layer_cost[layer] for layer, old in zip(layers, before))
            fall += over - self.over(self.watts) - stored
        if helps and fall > MIN_GAIN_MS:
            return float(fall)
        self._swap_copies(add, remove)
        for layer, (node, variant, work, cost) in zip(layers, before):
            self.node[layer], self.variant[layer], self.work[layer], self.layer_cost[layer] = node, variant, work, cost
        self.watts = watts
        return 0.0

    def _swap_copies(self, remove: list[Copy], add: list[Copy]) -> None:
        for copy in remove:
            del self.held[copy.layer, copy.expert][copy.node]
            self.free[copy.node] += self.sizes[copy.variant]
            self.fleet += int(self.sizes[copy.variant])
        for copy in add:
            self.held[copy.layer, copy.expert][copy.node] = copy.variant
            self.free[copy.node] -= self.sizes[copy.variant]
            self.fleet -= int(self.sizes[copy.variant])
