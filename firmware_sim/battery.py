"""A satellite's energy: what the array gives, what the battery takes and gives back. Vectorised over satellites.

    E += (eta_c P+ - P- / eta_d) dt, never outside [0, capacity]

Leaves out voltage, current limits and self-discharge; ageing.py says what the cycles cost. Energies in J, unless named Wh.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

J_PER_WH = 3600.0


class BatteryError(ValueError):
    """A battery or array cannot be; the text says which value and what to give."""


@dataclass(frozen=True)
class Battery:
    """Capacity and efficiencies. Below `cold_c` charging is throttled, to nothing at `no_charge_c`: lithium plates [U]."""

    capacity_wh: float = 80.0
    charge_efficiency: float = 0.95
    discharge_efficiency: float = 0.95
    cold_c: float = 0.0
    no_charge_c: float = -20.0

    def __post_init__(self) -> None:
        if not 0.0 < self.capacity_wh < np.inf:
            raise BatteryError(f"a battery of {self.capacity_wh} Wh; give more than 0")
        if not (0.0 < self.charge_efficiency <= 1.0 and 0.0 < self.discharge_efficiency <= 1.0):
            raise BatteryError("an efficiency is not above 0 and at most 1; 0.95 is usual")
        if not self.no_charge_c < self.cold_c:
            raise BatteryError(f"no_charge_c {self.no_charge_c} is not below cold_c {self.cold_c}; give a lower one")

    @property
    def capacity_j(self) -> float:
        return self.capacity_wh * J_PER_WH


@dataclass(frozen=True)
class Flow:
    """What a step did, each (n,): stored energy after it; the battery's losses as heat; what was short, what was too much."""

    energy_j: np.ndarray
    heat_w: np.ndarray
    unmet_j: np.ndarray
    spilled_j: np.ndarray


def charge_share(battery: Battery, temp_c: np.ndarray | float) -> np.ndarray:
    """How much of the offered charging power a battery takes at its temperature, 0 to 1."""
    return np.clip((np.asarray(temp_c, float) - battery.no_charge_c) / (battery.cold_c - battery.no_charge_c), 0.0, 1.0)


def step(
    battery: Battery,
    energy_j: np.ndarray,
    array_w: np.ndarray | float,
    load_w: np.ndarray | float,
    dt_s: np.ndarray | float,
    temp_c: np.ndarray | float = 25.0,
    capacity_j: np.ndarray | float | None = None,
) -> Flow:
    """The state `dt_s` later while the array gives `array_w` and the satellite draws `load_w`. `capacity_j`: of aged batteries."""
    full_j = battery.capacity_j if capacity_j is None else capacity_j
    balance_w = np.asarray(array_w, float) - load_w
    offered_w = np.maximum(balance_w, 0.0)
    drawn_w = np.maximum(-balance_w, 0.0)
    room_w = (full_j - energy_j) / (battery.charge_efficiency * np.maximum(dt_s, 1e-12))
    charge_w = np.minimum(offered_w * charge_share(battery, temp_c), room_w)
    stored_w = energy_j * battery.discharge_efficiency / np.maximum(dt_s, 1e-12)
    discharge_w = np.minimum(drawn_w, stored_w)
    gained_w = battery.charge_efficiency * charge_w
    lost_w = discharge_w / battery.discharge_efficiency
    return Flow(
        energy_j=np.clip(energy_j + (gained_w - lost_w) * dt_s, 0.0, full_j),
        heat_w=(charge_w - gained_w) + (lost_w - discharge_w),
        unmet_j=(drawn_w - discharge_w) * dt_s,
        spilled_j=(offered_w - charge_w) * dt_s,
    )


def array_needed_w(load_w: float, period_s: float, eclipse_share: float, battery: Battery) -> float:
    """Array power in the sun that carries a constant load through each orbit and leaves the battery as it was."""
    if not 0.0 <= eclipse_share < 1.0:
        raise BatteryError(f"an eclipse of {eclipse_share:g} of the orbit; give a share from 0 to below 1")
    dark_s = eclipse_share * period_s
    lit_s = period_s - dark_s
    return load_w * (lit_s + dark_s / (battery.charge_efficiency * battery.discharge_efficiency)) / lit_s


def eclipse_draw_wh(load_w: float, period_s: float, eclipse_share: float, battery: Battery) -> float:
    """What one eclipse takes out of the battery, Wh."""
    return load_w * eclipse_share * period_s / battery.discharge_efficiency / J_PER_WH
