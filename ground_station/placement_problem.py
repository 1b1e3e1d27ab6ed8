"""What a placement decides and what it costs: the problem, a placement, and the one evaluator that every policy is judged by.

Costs are in ms of one token (ALGORITHMS.md, "Expert placement"): sum over layers of E[max over the chosen experts of tau], plus
prices for gate mass out of reach, precision, bytes stored and bytes moved. tau of an expert is the path of its node (both ways)
plus the work of all experts that this node runs for that token and layer, one after the other: what one request per node
means. Contact states are scenarios with a chance each; a share of time with half of the nodes out of contact, no matter which,
prices the gate mass that is then expected to be out of reach (it depends on the number of copies alone). A node that would draw
more than it may on average is held at its limit by its duty cap, so its work takes longer by that ratio. Leaves out: queues of
several tokens at once, the trunk, the combine, who serves (placement_serving).

Letters: L layers, E experts, K chosen, N nodes, V variants (precisions, best first), C scenarios, R routing sets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ground_station.placement import PlacementError

NOWHERE = -1


class Copy(NamedTuple):
    """An expert in one precision on one node; all four are indices."""

    layer: int
    expert: int
    node: int
    variant: int


@dataclass(frozen=True)
class Prices:
    """What is worth how many ms of a token. These are choices, not measurements."""

    miss_ms: float = 1000.0  # the whole gate mass of one layer out of reach
    error_ms: float = 5.0  # a relative error of 1 in a whole layer's output
    store_ms_per_mb: float = 0.0005
    move_ms_per_mb: float = 0.005


@dataclass(frozen=True, eq=False)
class Problem:
    """All that a policy may look at. Arrays are copied nowhere and never changed.

    use [L, E]: share of tokens that choose the expert (a layer sums to K). mass [L, E]: share of the layer's gate mass (sums
    to 1). sets int [L, R, K] with weights [L, R] (sum 1): routing sets. successive [L - 1, E, E]: counts of (expert, expert in
    the next layer), or empty. bytes, ms, joules, error [V]: of one expert in each variant, resident bytes, work on a node of
    speed 1, relative error. memory [N] bytes, speed [N], limit_w [N] (heat, above idle), energy_j [N] (battery that may be
    drawn over horizon_s, above idle). path_ms [C, L, N]: from the layer's gateway to the node and on, infinite without contact.
    chances [C] (sum 1). fleet_bytes: bound on all copies together. rings [N]: number of the ring subnet (for `ring`).
    held: what is on the nodes now. dark_share: share of time in which a random half of the nodes is out of contact.
    nats [L, V + 1]: what the text's likelihood loses per token if a whole layer runs in a variant, and last if its experts are out of
    reach, each counted for itself; empty where it was not measured. Only `coverage` looks at it.
    """

    use: np.ndarray
    mass: np.ndarray
    sets: np.ndarray
    weights: np.ndarray
    variants: tuple[str, ...]
    bytes: np.ndarray
    ms: np.ndarray
    joules: np.ndarray
    error: np.ndarray
    nodes: tuple[str, ...]
    memory: np.ndarray
    speed: np.ndarray
    limit_w: np.ndarray
    energy_j: np.ndarray
    path_ms: np.ndarray
    chances: np.ndarray
    tokens_per_s: float
    horizon_s: float
    fleet_bytes: int
    successive: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    rings: tuple[int, ...] = ()
    held: frozenset[Copy] = frozenset()
    dark_share: float = 0.0
    nats: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    prices: Prices = Prices()
    gateway: str = "the ground station"

    def __post_init__(self) -> None:
        layers, experts = np.shape(self.use)
        nodes, variants, sets = len(self.nodes), len(self.variants), np.shape(self.sets)
        if not (nodes and variants and layers and experts):
            raise PlacementError("a placement needs at least one node, one variant and one expert")
        shapes = {
            "mass": (layers, experts),
            "sets": (layers, sets[1], sets[2]) if len(sets) == 3 else (),
            "weights": (layers, sets[1]) if len(sets) == 3 else (),
            "path_ms": (len(self.chances), layers, nodes),
            **dict.fromkeys(("bytes", "ms", "joules", "error"), (variants,)),
            **dict.fromkeys(("memory", "speed", "limit_w", "energy_j"), (nodes,)),
        }
        for name, shape in shapes.items():
            value = np.asarray(getattr(self, name))
            if value.shape != shape or np.isnan(value).any() or (value.size and value.min() < 0):
                raise PlacementError(
                    f"{name} of the placement problem is {value.shape}: numbers of at least 0 in {shape} are needed"
                )
        if self.nats.size and (self.nats.shape != (layers, variants + 1) or not (self.nats >= 0).all()):
            raise PlacementError(
                f"nats of the placement problem is {self.nats.shape}: [{layers}, {variants + 1}] are needed"
            )
        if not 0 <= self.dark_share < 1:
            raise PlacementError(f"dark_share {self.dark_share:g} is not in [0, 1): give the share of time as 0.1")
        if (self.speed <= 0).any() or not self.tokens_per_s > 0 or not self.horizon_s > 0:
            raise PlacementError("speeds, tokens per second and the horizon are above 0")
        if self.sets.size and not 0 <= self.sets.min() <= self.sets.max() < experts:
            raise PlacementError(f"a routing set names an expert outside 0..{experts - 1}")

    @property
    def layers(self) -> int:
        return self.use.shape[0]

    @property
    def experts(self) -> int:
        return self.use.shape[1]

    @property
    def cap_w(self) -> np.ndarray:
        """Average watts that each node may draw for experts [N]: the lower of heat and battery."""
        return np.minimum(self.limit_w, self.energy_j / self.horizon_s)

    @property
    def watts_per_use(self) -> np.ndarray:
        """[L, E, V]: what serving an expert costs on average."""
        return self.tokens_per_s * self.use[:, :, None] * self.joules

    @property
    def dark_ms(self) -> np.ndarray:
        """[L, E, N + 1]: price of an expert that has 0..N copies, for the time with half of the nodes out of contact."""
        return self.dark_share * self.prices.miss_ms * self.mass[:, :, None] * all_out(len(self.nodes))

    def copy_price_ms(self, copy: Copy) -> float:
        """Storage, and migration unless it is there already."""
        mb = float(self.bytes[copy.variant]) / 1e6
        moved = 0.0 if copy in self.held else self.prices.move_ms_per_mb
        return mb * (self.prices.store_ms_per_mb + moved)


@dataclass(frozen=True, eq=False)
class Placement:
    """Copies, and which of them serves each expert in each scenario: serve int [C, L, E], an index into copies or NOWHERE."""

    policy: str
    copies: tuple[Copy, ...]
    serve: np.ndarray


@dataclass(frozen=True, eq=False)
class Assessment:
    """What a placement costs. `objective_ms` is what policies minimise; the rest are its parts and the state of the bounds.

    reach: share of gate mass served, over scenarios; dark_reach: share expected to have a copy when any half of the nodes is out
    of contact.
    """

    latency_ms: float
    scenario_ms: np.ndarray
    reach: float
    dark_reach: float
    objective_ms: float
    store_bytes: int
    moved_bytes: int
    watts: np.ndarray
    stretch: np.ndarray
    node_bytes: np.ndarray
    violations: tuple[str, ...]


def all_out(nodes: int) -> np.ndarray:
    """Chance [N + 1] that 0..N given nodes are all among the floor(N / 2) that are out of contact."""
    half = nodes // 2
    return np.array(
        [math.comb(nodes - k, half - k) / math.comb(nodes, half) if k <= half else 0.0 for k in range(nodes + 1)]
    )


def layer_ms(problem: Problem, layer: int, path: np.ndarray, node: np.ndarray, work: np.ndarray) -> np.ndarray:
    """E[max tau] of a layer for B serving choices at once, [B].

    path [B, N] ms; node int [B, E] (NOWHERE: not served, which takes no time); work [B, E] ms.
    """
    sets = problem.sets[layer]
    where, runs = node[:, sets], work[:, sets]  # [B, R, K]
    served = where != NOWHERE
    runs = np.where(served, runs, 0.0)
    rows = np.arange(len(node))[:, None, None]
    total = np.where(served, path[rows, np.where(served, where, 0)], 0.0)
    for other in range(sets.shape[1]):
        total += np.where(where == where[:, :, other : other + 1], runs[:, :, other : other + 1], 0.0)
    return np.where(served, total, 0.0).max(2) @ problem.weights[layer]


def served_by(problem: Problem, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Node and variant that serve, int [C, L, E] each (NOWHERE, 0 where none does)."""
    nodes = np.array([copy.node for copy in placement.copies] + [NOWHERE])
    variants = np.array([copy.variant for copy in placement.copies] + [0])
    return nodes[placement.serve], variants[placement.serve]  # index -1 is the last: nowhere


def average_watts(problem: Problem, node: np.ndarray, variant: np.ndarray) -> np.ndarray:
    """[N] over scenarios; node and variant [C, L, E]."""
    each = np.take_along_axis(
        np.broadcast_to(problem.watts_per_use, (*node.shape, len(problem.variants))), variant[..., None], 3
    )
    weighted = each[..., 0] * problem.chances[:, None, None]
    on = node != NOWHERE
    return np.bincount(node[on], weighted[on], len(problem.nodes))


def evaluate(problem: Problem, placement: Placement) -> Assessment:
    """Judges a placement exactly (over the problem's routing sets).  Raises: PlacementError when `serve` is not one."""
    shape = (len(problem.chances), problem.layers, problem.experts)
    if placement.serve.shape != shape or not (NOWHERE <= placement.serve).all():
        raise PlacementError(f"the serving table is {placement.serve.shape}, not {shape}")
    node, variant = served_by(problem, placement)
    watts = average_watts(problem, node, variant)
    cap = problem.cap_w
    with np.errstate(divide="ignore", invalid="ignore"):
        stretch = np.where(watts > cap * (1 + 1e-9), watts / cap, 1.0)
    work = problem.ms[variant] / problem.speed[node] * stretch[node]
    scenario_ms = np.zeros(shape[0])
    for layer in range(problem.layers):
        scenario_ms += layer_ms(problem, layer, problem.path_ms[:, layer], node[:, layer], work[:, layer])
    missed = np.where(node == NOWHERE, problem.mass, 0.0).sum((1, 2))
    errors = np.where(node == NOWHERE, 0.0, problem.mass * problem.error[variant]).sum((1, 2))
    prices, chances = problem.prices, problem.chances
    latency = float(scenario_ms @ chances)
    objective = latency + float(missed @ chances) * prices.miss_ms + float(errors @ chances) * prices.error_ms
    objective += sum(problem.copy_price_ms(copy) for copy in placement.copies)
    count = np.zeros((problem.layers, problem.experts), int)
    for layer, expert, _ in {copy[:3] for copy in placement.copies}:
        count[layer, expert] += 1
    dark = float((problem.mass * all_out(len(problem.nodes))[count]).sum())
    objective += problem.dark_share * prices.miss_ms * dark
    sizes = [int(problem.bytes[copy.variant]) for copy in placement.copies]
    node_bytes = np.bincount([copy.node for copy in placement.copies], sizes, len(problem.nodes)).astype(np.int64)
    moved = sum(size for copy, size in zip(placement.copies, sizes) if copy not in problem.held)
    return Assessment(
        latency,
        scenario_ms,
        1.0 - float(missed @ chances) / problem.layers,
        1.0 - dark / problem.layers,
        objective,
        sum(sizes),
        moved,
        watts,
        stretch,
        node_bytes,
        violations(problem, placement, node_bytes, watts, stretch),
    )


def violations(
    problem: Problem, placement: Placement, node_bytes: np.ndarray, watts: np.ndarray, stretch: np.ndarray
) -> tuple[str, ...]:
    """Bounds that a placement breaks, in words."""
    found = []
    for number, name in enumerate(problem.nodes):
        if node_bytes[number] > problem.memory[number]:
            found.append(
                f"memory of {name}: {node_bytes[number] / 1e6:.2f} MB of {problem.memory[number] / 1e6:.2f} MB"
            )
        if stretch[number] > 1.0:
            which = "heat" if problem.limit_w[number] <= problem.energy_j[number] / problem.horizon_s else "battery"
            found.append(f"{which} of {name}: {watts[number]:.3g} W of {problem.cap_w[number]:.3g} W")
    if node_bytes.sum() > problem.fleet_bytes:
        found.append(f"memory of the fleet: {node_bytes.sum() / 1e6:.2f} MB of {problem.fleet_bytes / 1e6:.2f} MB")
    missing = problem.layers * problem.experts - len({(copy.layer, copy.expert) for copy in placement.copies})
    if missing:
        found.append(f"{missing} experts are on no node")
    return tuple(found)


def reachable_mass(problem: Problem, copies: Iterable[Copy], out: np.ndarray) -> np.ndarray:
    """Share of each layer's gate mass [L] that has a copy on a node that is not out of contact; out bool [N]."""
    has = np.zeros((problem.layers, problem.experts), bool)
    for copy in copies:
        has[copy.layer, copy.expert] |= not out[copy.node]
    return np.where(has, problem.mass, 0.0).sum(1)


def halves(nodes: int, count: int, seed: int) -> np.ndarray:
    """bool [count, N]: random halves that are out of contact."""
    rng = np.random.default_rng(seed)
    out = np.zeros((count, nodes), bool)
    for row in out:
        row[rng.permutation(nodes)[: nodes // 2]] = True
    return out
