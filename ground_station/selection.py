"""Which experts a token uses: every policy behind one interface, pure functions of router logits and prices.

A policy maps router logits [T, E] of a layer to chosen experts [T, K] and gates [T, K]; a gate of 0 means "not run". The
model's own rule is `topk`. `budgeted` is ours in its first form: it drops an expert when its share of the output costs more
than it is worth at the current price of a joule on its node, guarded by a least coverage of the gate mass.
Leaves out: replicas and precisions as part of the choice, similarity substitution, link prices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from node_agent import routing
from node_agent.shard import Routing


@dataclass(frozen=True)
class Choice:
    """Experts int64 [T, K] and gates float32 [T, K] of one layer."""

    experts: np.ndarray
    gates: np.ndarray


class Policy(Protocol):
    """Callable with (layer, router logits float32 [T, E]) -> Choice."""

    def __call__(self, layer: int, logits: np.ndarray) -> Choice: ...


@dataclass(frozen=True)
class TopK:
    """The model's own routing, blind to budgets."""

    routing: Routing
    top_k: int

    def __call__(self, layer: int, logits: np.ndarray) -> Choice:
        experts = routing.largest(logits, self.top_k)
        return Choice(experts, routing.gates_of(logits, experts, self.routing))


@dataclass(frozen=True)
class Random:
    """K experts drawn without regard to the router, weighted by its gates: the floor that any policy must beat."""

    routing: Routing
    top_k: int
    rng: np.random.Generator

    def __call__(self, layer: int, logits: np.ndarray) -> Choice:
        experts = np.argsort(self.rng.random(logits.shape), axis=1)[:, : self.top_k]
        return Choice(experts, routing.gates_of(logits, experts, self.routing))


@dataclass
class Budgeted:
    """`topk`, less the experts that are not worth their joules.

    joule_price[layer][e]: price of running expert e of a layer where it is placed, in units of gate mass (0: free). Kept by
    `price_from_headroom`. An expert is dropped when gate < price, smallest gate first, while the gate mass that stays is at
    least `coverage` of that of topk. What stays is renormalised to the whole.
    """

    routing: Routing
    top_k: int
    experts: int
    coverage: float = 0.5
    joule_price: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage {self.coverage} is not in (0, 1]")

    def __call__(self, layer: int, logits: np.ndarray) -> Choice:
        experts = routing.largest(logits, self.top_k)
        gates = routing.gates_of(logits, experts, self.routing)
        price = self.joule_price.get(layer)
        if price is None:
            return Choice(experts, gates)
        whole = gates.sum(1)
        kept = whole.copy()
        result = gates.copy()
        for column in np.argsort(gates, axis=1, kind="stable").T:  # smallest gate of each token first
            rows = np.arange(len(gates))
            gate = gates[rows, column]
            drop = (gate < price[experts[rows, column]] * whole) & (kept - gate >= self.coverage * whole)
            result[rows[drop], column[drop]] = 0
            kept -= np.where(drop, gate, 0)
        result *= (whole / kept)[:, None]
        return Choice(experts, result.astype(np.float32))


def price_from_headroom(temp_c: float | None, limit_c: float, knee_c: float, price_at_limit: float) -> float:
    """Price of a joule on a node from its temperature: 0 below `knee_c`, then a barrier (x / (1 - x)) scaled so that it is
    `price_at_limit` half-way to the limit and grows without bound towards it. Unknown temperature: as at the half-way point,
    since a node that cannot be seen must not be used as if it were cold.
    """
    if limit_c <= knee_c:
        raise ValueError(f"limit {limit_c} °C is not above the knee {knee_c} °C")
    if temp_c is None:
        return price_at_limit
    x = min(max((temp_c - knee_c) / (limit_c - knee_c), 0.0), 0.999)
    return price_at_limit * x / (1 - x)


def expert_prices(
    copies: dict[tuple[int, int], tuple[tuple[int, int], ...]], node_price: list[float], experts: int
) -> dict[int, np.ndarray]:
    """Price [E] per layer from a price per node: an expert costs what its cheapest copy costs (`copies` of dispatch.Table)."""
    prices: dict[int, np.ndarray] = {}
    for (layer, expert), where in copies.items():
        row = prices.setdefault(layer, np.zeros(experts))
        row[expert] = min(node_price[node] for node, _ in where)
    return prices


class Replay:
    """Repeats recorded choices call by call, so that a run whose prices moved can be compared with its reference."""

    def __init__(self, choices: list[Choice]):
        self._choices = iter(choices)

    def __call__(self, layer: int, logits: np.ndarray) -> Choice:
        return next(self._choices)


class Recorder:
    """A policy that remembers what the policy inside it chose."""

    def __init__(self, policy: Policy):
        self.policy, self.choices = policy, []

    def __call__(self, layer: int, logits: np.ndarray) -> Choice:
        self.choices.append(self.policy(layer, logits))
        return self.choices[-1]


POLICIES = ("topk", "random", "budgeted")


def make(name: str, rule: Routing, top_k: int, experts: int, seed: int = 0, coverage: float = 0.5) -> Policy:
    """A policy by its name.  Raises: ValueError that lists the names."""
    if name == "topk":
        return TopK(rule, top_k)
    if name == "random":
        return Random(rule, top_k, np.random.default_rng(seed))
    if name == "budgeted":
        return Budgeted(rule, top_k, experts, coverage)
    raise ValueError(f"policy {name!r} is unknown: use one of {', '.join(POLICIES)}")
