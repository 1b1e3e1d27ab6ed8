"""A simulated board's power and die temperature: pure steps. Leaves out throttling, fans, supply droop and orbit.

Power follows the load, temperature follows power through a Foster network:

    P = P_idle + (P_max - P_idle) u,   dT = sum_i T_i,   T_i(t + dt) = T_i(t) e^(-dt/tau_i) + P R_i (1 - e^(-dt/tau_i))

The step is exact while P is constant, whatever dt is. These are bench boards: a temperature from here must never be used as
one in orbit (the BUPT-1 satellite's Raspberry Pi 4B gains 16.6 K/W in orbit and 7.28 K/W on the ground, arXiv 2401.03435).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Branch:
    """One resistor and capacitor of a Foster network."""

    r_k_per_w: float
    tau_s: float


@dataclass(frozen=True)
class Rail:
    """A rail of a power monitor: its share of idle power and of what the load adds."""

    label: str
    idle_share: float
    load_share: float
    shunt_uohm: int


@dataclass(frozen=True)
class Profile:
    """What a kind of board is like. `meter` is the power monitor's kernel driver name; `cores` make a load of 1."""

    name: str
    meter: str
    cores: int
    idle_w: float
    max_w: float
    supply_v: float
    ambient_c: float
    foster: tuple[Branch, ...]
    rails: tuple[Rail, ...]
    zones: tuple[str, ...]
    zone_step_mc: int

    def equilibrium(self, power_w: float) -> BoardState:
        """The state after a long time at `power_w`."""
        return BoardState(power_w, tuple(power_w * branch.r_k_per_w for branch in self.foster))


@dataclass(frozen=True)
class BoardState:
    """Power now, and each branch's temperature above ambient."""

    power_w: float
    rises_k: tuple[float, ...]


# Values that no source backs are common engineering values, marked [U]: parameters to be fitted to a board, not facts.
PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="raspberry-pi-5-ina226",
            meter="ina226",
            cores=4,
            idle_w=3.0,  # [U]
            max_w=8.0,  # [U]
            supply_v=5.1,
            ambient_c=24.7,  # BUPT-1's fit on the ground
            # Their sum, 7.28 K/W, is BUPT-1's Raspberry Pi 4B on the ground, their times lie in its fitted ranges (53-126 s,
            # 366-1382 s); how the sum is split is [U], and so is that a Pi 5 is like a Pi 4B.
            foster=(Branch(3.0, 80.0), Branch(4.28, 600.0)),
            # 10 mOhm: 0.1 Ohm, common on INA226 modules, clips at 0.82 A.
            rails=(Rail("", 1.0, 1.0, 10_000),),
            zones=("cpu-thermal",),
            zone_step_mc=550,
        ),
        Profile(
            name="jetson-orin-nano",
            meter="ina3221",
            cores=6,
            idle_w=4.5,  # [U]
            max_w=15.0,  # the module's 15 W power budget (NVIDIA data sheet)
            supply_v=5.0,
            ambient_c=24.7,
            foster=(Branch(0.6, 5.0), Branch(1.9, 180.0)),  # [U], with the developer kit's fan
            # Labels are the module's; shares and shunts are [U]. VDD_IN is the total, the others are parts of it.
            rails=(
                Rail("VDD_IN", 1.0, 1.0, 5_000),
                Rail("VDD_CPU_GPU_CV", 0.15, 0.65, 5_000),
                Rail("VDD_SOC", 0.30, 0.15, 5_000),
            ),
            zones=("cpu-thermal", "tj-thermal"),
            zone_step_mc=1,
        ),
    )
}


def power_w(profile: Profile, utilisation: float) -> float:
    """Power at a load between 0 and 1 (beyond: clipped)."""
    return profile.idle_w + (profile.max_w - profile.idle_w) * min(1.0, max(0.0, utilisation))


def step(profile: Profile, state: BoardState, utilisation: float, dt_s: float) -> BoardState:
    """The state `dt_s` later when the load was `utilisation` all the while."""
    power = power_w(profile, utilisation)
    rises = []
    for branch, rise_k in zip(profile.foster, state.rises_k):
        decay = math.exp(-dt_s / branch.tau_s)
        rises.append(rise_k * decay + power * branch.r_k_per_w * (1.0 - decay))
    return replace(state, power_w=power, rises_k=tuple(rises))


def die_c(profile: Profile, state: BoardState) -> float:
    """Die temperature in degrees Celsius."""
    return profile.ambient_c + sum(state.rises_k)


def rail_w(profile: Profile, rail: Rail, state: BoardState) -> float:
    """Power through one rail."""
    return rail.idle_share * profile.idle_w + rail.load_share * (state.power_w - profile.idle_w)
