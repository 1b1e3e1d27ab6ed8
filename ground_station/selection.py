"""Which experts a token uses: policies by name, the model's own rule, and what repeats or records a policy.

The interface is in selection_choice.py, baselines in selection_baselines.py, `budgeted` in selection_budgeted.py; what a policy sees
of the fleet in selection_world.py, and how prices follow from telemetry in selection_prices.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ground_station import selection_baselines
from ground_station.selection_budgeted import Budgeted
from ground_station.selection_choice import Choice, Policy
from ground_station.selection_world import Calibration, World
from node_agent import routing
from node_agent.shard import Routing

__all__ = [
    "POLICIES",
    "Budgeted",
    "Choice",
    "Policy",
    "Random",
    "Recorder",
    "Replay",
    "TopK",
    "make",
    "price_from_headroom",
]


@dataclass(frozen=True)
class TopK:
    """The model's own routing, blind to budgets."""

    routing: Routing
    top_k: int

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        experts = routing.largest(logits, self.top_k)
        return Choice(experts, routing.gates_of(logits, experts, self.routing))


@dataclass(frozen=True)
class Random:
    """K experts drawn without regard to the router, weighted by its gates: the floor that any policy must beat."""

    routing: Routing
    top_k: int
    rng: np.random.Generator

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        experts = np.argsort(self.rng.random(logits.shape), axis=1)[:, : self.top_k]
        return Choice(experts, routing.gates_of(logits, experts, self.routing))


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


class Replay:
    """Repeats recorded choices call by call, so that a run whose prices moved can be compared with its reference."""

    def __init__(self, choices: list[Choice]):
        self._choices = iter(choices)

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        return next(self._choices)


class Recorder:
    """A policy that remembers what the policy inside it chose."""

    def __init__(self, policy: Policy):
        self.policy, self.choices = policy, []

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        self.choices.append(self.policy(layer, logits, world))
        return self.choices[-1]


POLICIES = ("topk", "random", "coolest", "topp", "naee", "des", "wlr", "similarity", "equinox", "budgeted")


def make(
    name: str,
    rule: Routing,
    top_k: int,
    experts: int,
    seed: int = 0,
    coverage: float = 0.5,
    calibration: Calibration | None = None,
    **knobs: float,
) -> Policy:
    """A policy by its name; `knobs` are fields of its class. Without `calibration` all experts count as alike.

    Raises: ValueError that lists the names, or names a knob's value that cannot be; TypeError for a knob that the policy does not have.
    """
    if knobs and name in ("topk", "random"):
        raise TypeError(f"{name} has no knob {min(knobs)}")
    if name == "topk":
        return TopK(rule, top_k)
    if name == "random":
        return Random(rule, top_k, np.random.default_rng(seed))
    if name == "budgeted":
        return Budgeted(rule, top_k, experts, coverage, calibration, **knobs)
    if name in POLICIES:
        return selection_baselines.make(name, rule, top_k, calibration, **knobs)
    raise ValueError(f"policy {name!r} is unknown: use one of {', '.join(POLICIES)}")
