"""What a joule costs a battery's life: the marginal ageing of the cycle that is under way, as a price per joule and node. Pure.

Over one orbit of `period_s` seconds t a battery ages, by Xu et al. 2016 (firmware_sim.ageing), by

    f = (S_d(d) + k_t t) S_s(1 - d/2) S_T(T)

with d the depth at the end of the shadow and T its mean temperature. Of ln f, which is what counts where life (f of 80 % / f) is
compared as a ratio, one joule more of the payload changes

    depth   d ln f / dJ = [S_d'(d) / (S_d(d) + k_t t) - charge / 2] / (eta_d capacity)      while the array gives less than the load
    heat    d ln f / dJ = temperature ((T_ref + 273) / (T + 273))^2 R / t                   always: a joule per orbit is 1/t W

where R (K/W) is how much warmer the battery is per watt in the avionics (`battery_k_per_w`). A joule in the sun draws on the array, of
which a full battery leaves over: it costs no depth as long as the battery is full again before the next shadow. What counts is the depth
at dawn and not the present one: the cycle closes there, and S_d' is without bound towards depth 0. `depth_at_dawn` forecasts it: a
station knows the orbit. `weight` is the exchange rate: nats of loss per token that a factor e in life is worth; for a node that
serves n tokens per orbit the price of a joule is weight n d ln f / dJ, in nats.

Leaves out: the charge's mean as it falls with joules drawn in the sun (which ages less), heat of the battery's own losses, arrays
that do not fill the battery before the next shadow, and joules saved by serving later.

All arrays are [N], one value per node, where nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from firmware_sim import ageing
from firmware_sim.ageing import Chemistry
from firmware_sim.bus import AVIONICS, BATTERY
from firmware_sim.thermal import SIGMA_W_M2_K4, Network
from firmware_sim.wear import LEAST_DEPTH

SUNLIT = 0.5
"""A node is in shadow while it sees less than this share of the sun's disc: penumbra lasts seconds."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A node's battery and what feeds it. capacity_j [N]: at its age; array_w: in full sun; period_s [N]: of the orbit;
    heat_k_per_w: see `battery_k_per_w`."""

    capacity_j: np.ndarray
    discharge_efficiency: float
    array_w: float
    period_s: np.ndarray
    heat_k_per_w: float
    chemistry: Chemistry = Chemistry()


def battery_k_per_w(network: Network, temp_k: float) -> float:
    """Steady warming of the battery per watt in the avionics node of a bus near `temp_k`: the network, linearised there.

    G = diag(4 sigma eps A T^3) + links; the temperatures of a watt at node j are column j of G^-1.
    """
    g = np.diag([4 * SIGMA_W_M2_K4 * area * temp_k**3 for area in network.radiating_m2])
    for a, b, conductance in network.links:
        g[[a, b], [a, b]] += conductance
        g[[a, b], [b, a]] -= conductance
    return float(np.linalg.inv(g)[BATTERY, AVIONICS])


def shadow_ahead_s(lit: np.ndarray, slot_s: float) -> np.ndarray:
    """Seconds of shadow from the beginning of each slot on without a break [S, N], 0 in the sun; lit [S, N]: visible share of the sun.

    What comes after the last slot is not known and counts as sun.
    """
    ahead = np.zeros(lit.shape)
    left = np.zeros(lit.shape[1])
    for slot in range(len(lit) - 1, -1, -1):
        left = np.where(lit[slot] < SUNLIT, left + slot_s, 0.0)
        ahead[slot] = left
    return ahead


def depth_at_dawn(cell: Cell, dod: np.ndarray, load_w: np.ndarray, ahead_s: np.ndarray) -> np.ndarray:
    """Depth at which the running discharge will end if `load_w` (payload and platform) goes on, from LEAST_DEPTH to 1."""
    drawn = load_w * ahead_s / (cell.discharge_efficiency * cell.capacity_j)
    return np.clip(dod + drawn, LEAST_DEPTH, 1.0)


def depth_wear(cell: Cell, depth: np.ndarray) -> np.ndarray:
    """d ln f per joule drawn from the battery in a cycle of `depth`: at least 0 (a shallow cell that sits full may gain by a discharge:
    no reason to spend)."""
    chemistry = cell.chemistry
    stress = ageing.depth_stress(depth, chemistry)
    slope = -(stress**2) * chemistry.depth_1 * chemistry.depth_2 * depth ** (chemistry.depth_2 - 1)
    calendar = chemistry.calendar_per_s * cell.period_s
    return np.maximum(slope / (stress + calendar) - chemistry.charge / 2, 0) / (
        cell.discharge_efficiency * cell.capacity_j
    )


def heat_wear(cell: Cell, battery_c: np.ndarray) -> np.ndarray:
    """d ln f per joule that warms the satellite, whoever gives it."""
    chemistry = cell.chemistry
    ratio = (chemistry.temperature_ref_c + 273.0) / (battery_c + 273.0)  # the model's own rounding of 273.15
    return chemistry.temperature * ratio**2 * cell.heat_k_per_w / cell.period_s


def joule_price(
    cell: Cell,
    dod: np.ndarray,
    battery_c: np.ndarray,
    load_w: np.ndarray,
    lit: np.ndarray,
    ahead_s: np.ndarray,
    tokens_per_orbit: np.ndarray | float,
    weight: float,
) -> np.ndarray:
    """Nats per joule, for what `load_w` (payload and platform) is now. tokens_per_orbit: of one node.  Raises: ValueError."""
    if not 0 <= weight < np.inf:
        raise ValueError(f"a wear price of {weight} nats: give 0 or more")
    discharging = lit * cell.array_w < load_w
    depth = depth_wear(cell, depth_at_dawn(cell, dod, load_w, ahead_s))
    return weight * tokens_per_orbit * (np.where(discharging, depth, 0.0) + heat_wear(cell, battery_c))
