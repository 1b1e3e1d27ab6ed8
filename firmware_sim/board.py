"""A simulated board's power, die temperature and clock throttling: pure steps. Leaves out fans, supply droop and orbit.

Power follows the load, temperature follows power through a Foster network:

    P = P_idle + (P_max - P_idle) u c,   dT = sum_i T_i,   T_i(t + dt) = T_i(t) e^(-dt/tau_i) + P R_i (1 - e^(-dt/tau_i))

u is the load and c <= 1 the clock that the firmware allows. The step is exact while P is constant, whatever dt is; the firmware
looks at the die every CONTROL_S. Throttling lowers the power that a load takes; it does not slow the process that makes it.
These are bench boards: a temperature from here must never be used as one in orbit (the BUPT-1 satellite's Raspberry Pi 4B
gains 16.6 K/W in orbit and 7.28 K/W on the ground, arXiv 2401.03435).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

CONTROL_S = 0.1
MAX_PARTS = 1000  # of one step: beyond 100 s the firmware looks less often
UNPOWERED_C = -256.0  # what a Jetson's zone says while its part of the chip has no power
# Bits of `vcgencmd get_throttled` (raspberrypi.com, os.html#get_throttled); each again 16 higher: has been since boot.
UNDER_VOLTAGE, CAPPED, THROTTLED, SOFT_LIMIT = 1, 2, 4, 8
SINCE_BOOT = 16


@dataclass(frozen=True)
class Branch:
    """One resistor and capacitor of a Foster network."""

    r_k_per_w: float
    tau_s: float


@dataclass(frozen=True)
class Rail:
    """A rail of a power monitor: its share of idle power and of what the load adds, its voltage and its shunt."""

    label: str
    idle_share: float
    load_share: float
    volts: float
    shunt_uohm: int


@dataclass(frozen=True)
class Monitor:
    """A power monitor on I2C. Each of `samples` averages takes a shunt and a bus conversion of every rail, one by one."""

    chip: str  # what the kernel driver's `name` says
    address: str
    rails: tuple[Rail, ...]
    conversion_us: int
    samples: int

    @property
    def period_s(self) -> float:
        """Time between new data: samples x channels x (bus + shunt conversion)."""
        return self.samples * len(self.rails) * 2 * self.conversion_us * 1e-6


@dataclass(frozen=True)
class Trip:
    """A trip point of a thermal zone, in degrees Celsius and K; `kind` as the kernel calls it."""

    temp_c: float
    kind: str
    hysteresis_k: float


@dataclass(frozen=True)
class Zone:
    """A thermal zone: the die plus an offset, or what it always says. Without power below a load of `powered_from`."""

    kind: str
    trips: tuple[Trip, ...] = ()
    offset_k: float = 0.0
    says_c: float | None = None
    powered_from: float = 0.0


@dataclass(frozen=True)
class Throttle:
    """Firmware that takes the clock from 1 at `soft_c` down to `floor` at `hard_c`, in proportion."""

    soft_c: float
    hard_c: float
    floor: float


@dataclass(frozen=True)
class Profile:
    """What a kind of board is like. `cores` make a load of 1. `pmic`: its firmware reports rails by `vcgencmd`."""

    name: str
    maker: str
    cores: float
    idle_w: float
    max_w: float
    ambient_c: float
    foster: tuple[Branch, ...]
    throttle: Throttle | None
    monitors: tuple[Monitor, ...]
    zones: tuple[Zone, ...]
    zone_step_mc: int
    zone_noise_k: float
    pmic: bool = False

    @property
    def core_count(self) -> int:
        """Cores that the board's kernel knows: a full load keeps all of them busy, also where `cores` is no whole number."""
        return max(1, math.ceil(self.cores - 1e-9))

    def equilibrium(self, power_w: float) -> BoardState:
        """The state after a long time at `power_w`."""
        return BoardState(power_w, tuple(power_w * branch.r_k_per_w for branch in self.foster))


@dataclass(frozen=True)
class BoardState:
    """Power now, each branch's temperature above ambient, clock allowed (0-1), get_throttled's bits, joules, time, and time that
    all cores together were busy so far."""

    power_w: float
    rises_k: tuple[float, ...]
    clock: float = 1.0
    flags: int = 0
    energy_j: float = 0.0
    time_s: float = 0.0
    utilisation: float = 0.0
    busy_s: float = 0.0

    @property
    def throttled(self) -> bool:
        """Whether the firmware holds the clock down now."""
        return bool(self.flags & (CAPPED | THROTTLED))


def power_w(profile: Profile, utilisation: float, clock: float = 1.0) -> float:
    """Power at a load between 0 and 1 (beyond: clipped)."""
    return profile.idle_w + (profile.max_w - profile.idle_w) * min(1.0, max(0.0, utilisation)) * clock


def clock(throttle: Throttle | None, temp_c: float) -> float:
    """The clock that the firmware allows at a die temperature, 1 being full speed."""
    if throttle is None or temp_c <= throttle.soft_c:
        return 1.0
    excess = (temp_c - throttle.soft_c) / (throttle.hard_c - throttle.soft_c)
    return max(throttle.floor, 1.0 - (1.0 - throttle.floor) * excess)


def flags(throttle: Throttle | None, temp_c: float, before: int) -> int:
    """Bits of get_throttled at a die temperature; `before`: the last ones, whose upper half stays.

    Which bits a Raspberry Pi sets at 80 and at 85 C is not documented: [U] soft limit and cap from the first, throttled from
    the second.
    """
    now = 0
    if throttle is not None and temp_c > throttle.soft_c:
        now = CAPPED | SOFT_LIMIT | (THROTTLED if temp_c >= throttle.hard_c else 0)
    return now | (before >> SINCE_BOOT | now) << SINCE_BOOT


def step(profile: Profile, state: BoardState, utilisation: float, dt_s: float, cap: float = 1.0) -> BoardState:
    """The state `dt_s` later when the load was `utilisation` all the while. `cap`: a clock limit (0-1) from elsewhere."""
    parts = 1
    if profile.throttle is not None:
        parts = min(MAX_PARTS, max(1, math.ceil(dt_s / CONTROL_S)))
    for _ in range(parts):
        state = _part(profile, state, utilisation, dt_s / parts, cap)
    return state


def _part(profile: Profile, state: BoardState, utilisation: float, dt_s: float, cap: float) -> BoardState:
    power = power_w(profile, utilisation, min(cap, clock(profile.throttle, die_c(profile, state))))
    rises = []
    for branch, rise_k in zip(profile.foster, state.rises_k):
        decay = math.exp(-dt_s / branch.tau_s)
        rises.append(rise_k * decay + power * branch.r_k_per_w * (1.0 - decay))
    after = replace(
        state,
        power_w=power,
        rises_k=tuple(rises),
        energy_j=state.energy_j + power * dt_s,
        time_s=state.time_s + dt_s,
        utilisation=utilisation,
        busy_s=state.busy_s + profile.core_count * min(1.0, max(0.0, utilisation)) * dt_s,
    )
    temp_c = die_c(profile, after)
    return replace(
        after, clock=min(cap, clock(profile.throttle, temp_c)), flags=flags(profile.throttle, temp_c, state.flags)
    )


def die_c(profile: Profile, state: BoardState) -> float:
    """Die temperature in degrees Celsius."""
    return profile.ambient_c + sum(state.rises_k)


def zone_c(profile: Profile, zone: Zone, state: BoardState) -> float:
    """What a zone's sensor says, without noise and steps."""
    if zone.says_c is not None:
        return zone.says_c
    if state.utilisation < zone.powered_from:
        return UNPOWERED_C
    return die_c(profile, state) + zone.offset_k


def rail_w(profile: Profile, rail: Rail, board_w: float) -> float:
    """Power through one rail while the board takes `board_w`."""
    return rail.idle_share * profile.idle_w + rail.load_share * (board_w - profile.idle_w)
