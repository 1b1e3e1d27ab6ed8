"""From telemetry to prices: virtual queues (drift plus penalty) for heat, battery energy and link bytes, and barriers. Pure.

ALGORITHMS.md, "Thermal and energy budget of a node": Z <- max(Z + E - budget, 0), and the price of a joule on a node from its queues
and from barriers kappa / (x_max - x) on temperature, depth of discharge and queue length. A queue remembers what was spent over
the budget; a barrier keeps the node from its limit however the budget was set. Leaves out: identifying C and R (twin.py),
what a joule costs a battery's life (wear_price.py), and what a policy does with a price.

All arrays are [N], one value per node; nan in an observation: unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KNEE = 0.5
"""A barrier is 0 until this share of the way from `rest` to the limit: a node with room to spare costs nothing for its heat."""
NEAREST = 0.999
"""Barriers are evaluated no nearer to a limit than this share of the way; at the limit and past it they stay there: a thousandfold."""


@dataclass(frozen=True, eq=False)
class Limits:
    """What a node may do. The units of weights: price units (of `Budgeted.value`) per joule or byte.

    temp_limit_c, heat_c_j_per_k (C), heat_r_k_per_w (R): the one-node model, identified on line; horizon_s: over which heat may be used
    up; harvest_w: average watts from the array that the battery's budget rests on; dod_limit: deepest discharge (0..1);
    link_bytes_per_s: what the link is given; wait_limit_s: longest queue of work on the node.
    heat_weight, battery_weight: price of a joule when the queue holds `scale_j`; link_weight: of a byte when it holds `scale_bytes`;
    barrier_weight: price of a joule where a barrier is three quarters of the way to the limit.
    """

    temp_limit_c: np.ndarray
    heat_c_j_per_k: np.ndarray
    heat_r_k_per_w: np.ndarray
    harvest_w: np.ndarray
    dod_limit: np.ndarray
    link_bytes_per_s: np.ndarray
    wait_limit_s: np.ndarray
    horizon_s: float = 60.0
    scale_j: float = 100.0
    scale_bytes: float = 1e6
    heat_weight: float = 0.01
    battery_weight: float = 0.01
    link_weight: float = 1e-6
    barrier_weight: float = 0.01

    def __post_init__(self) -> None:
        for name in ("heat_c_j_per_k", "heat_r_k_per_w", "dod_limit", "wait_limit_s"):
            if not (getattr(self, name) > 0).all():
                raise ValueError(f"{name} must be above 0 on every node")
        if not (self.horizon_s > 0 and self.scale_j > 0 and self.scale_bytes > 0):
            raise ValueError("horizon_s, scale_j and scale_bytes must be above 0")


@dataclass(frozen=True, eq=False)
class Observation:
    """One look at the fleet. energy_j and link_bytes: since the last one; ambient_c: what the node would settle at without power.
    heat_w: watts that heat allows now where somebody knows better than the one-node model (a virtual satellite's duty cap)."""

    temp_c: np.ndarray
    ambient_c: np.ndarray
    energy_j: np.ndarray
    dod: np.ndarray
    link_bytes: np.ndarray
    wait_s: np.ndarray
    heat_w: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Queues:
    """Virtual queues: what was spent over the budget and not yet made good. heat_j, battery_j, link_bytes [N]."""

    heat_j: np.ndarray
    battery_j: np.ndarray
    link_bytes: np.ndarray

    @classmethod
    def empty(cls, nodes: int) -> Queues:
        return cls(np.zeros(nodes), np.zeros(nodes), np.zeros(nodes))


def allowed_w(limits: Limits, seen: Observation) -> np.ndarray:
    """P_allow [N]: watts that bring a node to its limit in `horizon_s`: (T_lim - T) C / horizon + (T - T_amb) / R, at least 0.

    Where the temperature is unknown: what holds the node at its limit for ever.
    """
    if seen.heat_w is not None:
        return seen.heat_w
    temp = np.where(np.isnan(seen.temp_c), limits.temp_limit_c, seen.temp_c)
    rise = (limits.temp_limit_c - temp) * limits.heat_c_j_per_k / limits.horizon_s
    return np.maximum(rise + (temp - seen.ambient_c) / limits.heat_r_k_per_w, 0)


def update(queues: Queues, seen: Observation, dt_s: float, limits: Limits) -> Queues:
    """The queues after `dt_s` seconds in which `seen` was spent.  Raises: ValueError for a negative time.

    What was not observed (nan) is taken to be the budget: it neither fills nor empties a queue.
    """
    if not dt_s >= 0:
        raise ValueError(f"dt_s is {dt_s}: time does not run backwards")

    def after(queue: np.ndarray, spent: np.ndarray, budget: np.ndarray) -> np.ndarray:
        return np.maximum(queue + np.where(np.isnan(spent), 0, spent - budget), 0)

    return Queues(
        after(queues.heat_j, seen.energy_j, allowed_w(limits, seen) * dt_s),
        after(queues.battery_j, seen.energy_j, limits.harvest_w * dt_s),
        after(queues.link_bytes, seen.link_bytes, limits.link_bytes_per_s * dt_s),
    )


def barrier(x: np.ndarray, limit: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """y / (1 - y) with y the share of the way from the knee to the limit: 0 at the knee and below, 1 half-way on, without bound
    towards the limit. The form kappa / (x_max - x), less its value at the knee. Unknown x: as half-way on.
    """
    knee = rest + KNEE * (limit - rest)
    y = np.clip((np.where(np.isnan(x), (knee + limit) / 2, x) - knee) / np.maximum(limit - knee, 1e-9), 0, NEAREST)
    return y / (1 - y)


def prices(queues: Queues, seen: Observation, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """(price of a joule mu_n, price of a byte), both [N]: what `World` takes as joule_price and byte_price."""
    zero = np.zeros_like(queues.heat_j)
    joule = (limits.heat_weight * queues.heat_j + limits.battery_weight * queues.battery_j) / limits.scale_j
    joule = joule + limits.barrier_weight * (
        barrier(seen.temp_c, limits.temp_limit_c, seen.ambient_c)
        + barrier(seen.dod, limits.dod_limit, zero)
        + barrier(seen.wait_s, limits.wait_limit_s, zero)
    )
    return joule, limits.link_weight * queues.link_bytes / limits.scale_bytes
