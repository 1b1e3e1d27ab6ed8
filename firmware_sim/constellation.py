"""All satellites of a constellation, one step after another: orbit, eclipse, heat and battery. Memory is O(satellites).

A step moves every satellite along its orbit (J2), finds how much of the sun it sees (cone), and advances its four nodes (RK4) and
its battery. Where a shadow's edge falls into the step, the step is split there. States are not kept: whoever wants a history
looks at each state as it comes. Leaves out links, payload boards and attitude (the panel follows the sun, the body is convex).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from firmware_sim import battery, eclipse, environment, orbit, sun, thermal
from firmware_sim.battery import Battery
from firmware_sim.bus import AVIONICS, BATTERY, BODY, PANEL, Bus
from firmware_sim.orbit import Orbits
from firmware_sim.thermal import KELVIN, Network

MAX_STEP_S = thermal.MAX_STEP_S


class ConstellationError(ValueError):
    """A constellation or a step of it cannot be; the text says which value and what to give."""


@dataclass(frozen=True)
class Constellation:
    """n satellites of one kind. `epoch_days`: UTC days from J2000 to time 0. The rest is worked out from these, once."""

    orbits: Orbits
    epoch_days: float
    bus: Bus
    battery: Battery
    array_w: float
    network: Network = field(init=False)
    # Of each satellite, what does not change on its way: rates, the Earth's angular radius, view factor.
    raan_rate_rad_s: np.ndarray = field(init=False)
    argument_rate_rad_s: np.ndarray = field(init=False)
    cos_inclination: np.ndarray = field(init=False)
    sin_inclination: np.ndarray = field(init=False)
    earth_rad: np.ndarray = field(init=False)
    view_factor: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.array_w < 1e9 or not np.isfinite(self.epoch_days):
            raise ConstellationError(
                f"array {self.array_w} W, epoch {self.epoch_days}; give 0 W or more and a finite epoch"
            )
        radius_km, inclination = self.orbits.radius_km, self.orbits.inclination_rad
        for name, value in (
            ("network", self.bus.network(self.array_w)),
            ("raan_rate_rad_s", orbit.raan_rate_rad_s(radius_km, inclination)),
            ("argument_rate_rad_s", orbit.argument_rate_rad_s(radius_km, inclination)),
            ("cos_inclination", np.cos(inclination)),
            ("sin_inclination", np.sin(inclination)),
            ("earth_rad", np.arcsin(orbit.EARTH_RADIUS_KM / radius_km)),
            ("view_factor", environment.sphere_view_factor(radius_km)),
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.orbits)


@dataclass(frozen=True)
class State:
    """Where the constellation is after `time_s`. Shapes: temp_k (4, n), the rest (n,).

    limb_rad: height of the sun's centre above the Earth's limb; cos_zenith: of the sun's zenith angle. `unmet_j` (load that the
    battery could not carry) and `spilled_j` (array power that nobody took) are sums since the start.
    """

    time_s: float
    temp_k: np.ndarray
    energy_j: np.ndarray
    limb_rad: np.ndarray
    cos_zenith: np.ndarray
    unmet_j: np.ndarray
    spilled_j: np.ndarray
    sun_rad: float
    flux_w_m2: float

    @property
    def lit_share(self) -> np.ndarray:
        """Visible share of the sun's disc now, (n,)."""
        return eclipse.lit_share(self.limb_rad, self.sun_rad)


def start(constellation: Constellation, temp_c: float = 20.0, charge: float = 0.9) -> State:
    """The state at time 0: every node at one temperature, the battery filled to `charge`.  Raises: ConstellationError."""
    if not 0.0 <= charge <= 1.0 or not -150.0 <= temp_c <= 200.0:
        raise ConstellationError(f"start at {temp_c} C with charge {charge}; give -150 to 200 C and 0 to 1")
    count = len(constellation)
    limb, cos_zenith, sun_rad, flux = view(constellation, 0.0)
    return State(
        time_s=0.0,
        temp_k=np.full((4, count), temp_c + KELVIN),
        energy_j=np.full(count, charge * constellation.battery.capacity_j),
        limb_rad=limb,
        cos_zenith=cos_zenith,
        unmet_j=np.zeros(count),
        spilled_j=np.zeros(count),
        sun_rad=sun_rad,
        flux_w_m2=flux,
    )


def view(constellation: Constellation, time_s: float) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The sun as satellites see it: height of its centre above the limb (n,), cosine of its zenith angle (n,), its angular
    radius, and its flux (W/m2)."""
    days = constellation.epoch_days + time_s / orbit.DAY_S
    sun_x, sun_y, sun_z = (float(part) for part in sun.direction(days))
    orbits = constellation.orbits
    raan = orbits.raan_rad + constellation.raan_rate_rad_s * time_s
    argument = orbits.argument_rad + constellation.argument_rate_rad_s * time_s
    cos_raan, sin_raan = np.cos(raan), np.sin(raan)
    # the sun along the node, and across it in the orbit's plane
    along = sun_x * cos_raan + sun_y * sin_raan
    across = (
        constellation.cos_inclination * (sun_y * cos_raan - sun_x * sin_raan) + constellation.sin_inclination * sun_z
    )
    cos_zenith = along * np.cos(argument) + across * np.sin(argument)
    limb = np.pi - np.arccos(np.clip(cos_zenith, -1.0, 1.0)) - constellation.earth_rad
    return limb, cos_zenith, float(eclipse.sun_radius_rad(sun.distance_km(days))), float(sun.flux_w_m2(days))


def step(
    constellation: Constellation,
    state: State,
    dt_s: float,
    load_w: np.ndarray | float,
    capacity_j: np.ndarray | None = None,
) -> State:
    """The state `dt_s` later while each satellite draws `load_w` (n,) or one number. `capacity_j` (n,): of aged batteries, at
    least the energy in each; without it all are new.  Raises: ConstellationError."""
    load_w = checked_load(constellation, dt_s, load_w)
    capacity_j = checked_capacity(constellation, state, capacity_j)
    time_s = state.time_s + dt_s
    limb, cos_zenith, sun_rad, flux = view(constellation, time_s)
    day = 0.5 * (np.maximum(state.cos_zenith, 0.0) + np.maximum(cos_zenith, 0.0))
    lit = (state.limb_rad >= sun_rad) & (limb >= sun_rad)
    dark = (state.limb_rad <= -sun_rad) & (limb <= -sun_rad)
    split = np.flatnonzero(~(lit | dark))
    temp_k, flow = _stretch(
        constellation, state.temp_k, state.energy_j, lit.astype(float), day, flux, dt_s, load_w, None, capacity_j
    )
    energy_j, unmet_j, spilled_j = flow.energy_j, state.unmet_j + flow.unmet_j, state.spilled_j + flow.spilled_j
    if split.size:
        # These few are done again, in stretches that end where the sun's disc touches the limb.
        before, after = state.limb_rad[split], limb[split]
        change = np.where(before == after, 1e-300, after - before)
        cuts = np.sort(np.clip(np.stack([(sun_rad - before) / change, (-sun_rad - before) / change]), 0.0, 1.0), axis=0)
        edges = np.concatenate([np.zeros((1, split.size)), cuts, np.ones((1, split.size))])
        part_k, part_j = state.temp_k[:, split], state.energy_j[split]
        unmet_j[split], spilled_j[split] = state.unmet_j[split], state.spilled_j[split]
        for first, last in zip(edges[:-1], edges[1:]):
            share = _mean_lit(before, change, first, last, sun_rad)
            part_k, flow = _stretch(
                constellation,
                part_k,
                part_j,
                share,
                day[split],
                flux,
                (last - first) * dt_s,
                load_w[split],
                split,
                capacity_j[split],
            )
            part_j = flow.energy_j
            unmet_j[split] += flow.unmet_j
            spilled_j[split] += flow.spilled_j
        temp_k[:, split] = part_k
        energy_j[split] = part_j
    return State(time_s, temp_k, energy_j, limb, cos_zenith, unmet_j, spilled_j, sun_rad, flux)


def run(
    constellation: Constellation,
    state: State,
    step_s: float,
    steps: int,
    load_w: np.ndarray | float,
    accelerator: str = "none",
) -> Iterator[State]:
    """The next `steps` states, one by one; keep only what you need of each. `accelerator`: see `accelerated`."""
    advance = accelerated(accelerator)
    for _ in range(steps):
        state = advance(constellation, state, step_s, load_w)
        yield state


def accelerators() -> tuple[str, ...]:
    """What `accelerated` takes on this machine: "none", and "numba" where it is installed."""
    import importlib.util

    return ("none", "numba") if importlib.util.find_spec("numba") else ("none",)


def accelerated(name: str):
    """The function `step`, or the same compiled by numba (extra `sim-fast`).  Raises: ConstellationError."""
    if name == "none":
        return step
    if name != "numba":
        raise ConstellationError(f"{name!r} is no accelerator; use one of {', '.join(accelerators())}")
    try:
        from firmware_sim import constellation_numba
    except ModuleNotFoundError as error:
        raise ConstellationError(
            f"{error.name} is not installed; use the accelerator none, or pip install 'spacemoe-kit[sim-fast]'"
        ) from None
    return constellation_numba.step


def checked_load(constellation: Constellation, dt_s: float, load_w: np.ndarray | float) -> np.ndarray:
    """`load_w` as (n,).  Raises: ConstellationError for a step or a load that cannot be."""
    if not 0.0 < dt_s <= MAX_STEP_S:
        raise ConstellationError(f"a step of {dt_s} s; give more than 0 and at most {MAX_STEP_S:g} s")
    load_w = np.asarray(load_w, float)
    if (
        load_w.shape not in ((), (len(constellation),))
        or not np.isfinite(load_w).all()
        or load_w.min(initial=0.0) < 0.0
    ):
        raise ConstellationError(
            f"load of shape {load_w.shape}; give one number, or {len(constellation)}, of 0 W or more"
        )
    return np.ascontiguousarray(np.broadcast_to(load_w, (len(constellation),)))


def checked_capacity(constellation: Constellation, state: State, capacity_j: np.ndarray | None) -> np.ndarray:
    """`capacity_j` as (n,).  Raises: ConstellationError where a battery is nothing, or holds more than its capacity."""
    if capacity_j is None:
        return np.full(len(constellation), constellation.battery.capacity_j)
    capacity_j = np.ascontiguousarray(capacity_j, float)
    if capacity_j.shape != (len(constellation),) or not ((capacity_j > 0.0) & (capacity_j >= state.energy_j)).all():
        raise ConstellationError(
            f"capacities of shape {capacity_j.shape}; give {len(constellation)}, each above 0 J and no less than it holds"
        )
    return capacity_j


def _mean_lit(
    before: np.ndarray, change: np.ndarray, first: np.ndarray, last: np.ndarray, sun_rad: float
) -> np.ndarray:
    """Mean visible share between two points of the step (shares of it), by Simpson's rule: between cuts it is smooth."""
    values = [eclipse.lit_share(before + change * at, sun_rad) for at in (first, 0.5 * (first + last), last)]
    return (values[0] + 4.0 * values[1] + values[2]) / 6.0


def _stretch(
    constellation: Constellation,
    temp_k: np.ndarray,
    energy_j: np.ndarray,
    lit_share: np.ndarray,
    day: np.ndarray,
    flux_w_m2: float,
    dt_s: np.ndarray | float,
    load_w: np.ndarray,
    chosen: np.ndarray | None,
    capacity_j: np.ndarray | None = None,
) -> tuple[np.ndarray, battery.Flow]:
    """Temperatures and battery after a stretch of constant sunlight, for all satellites or the chosen ones."""
    bus, array_w = constellation.bus, constellation.array_w
    view_factor = constellation.view_factor if chosen is None else constellation.view_factor[chosen]
    given_w = array_w * (flux_w_m2 / environment.SOLAR_W_M2) * lit_share
    flow = battery.step(constellation.battery, energy_j, given_w, load_w, dt_s, temp_k[BATTERY] - KELVIN, capacity_j)
    heat_w = np.empty_like(temp_k)
    sun_m2, earth_m2 = bus.sun_absorbing_m2(array_w), bus.earth_absorbing_m2(array_w)
    for node in (PANEL, BODY):
        heat_w[node] = environment.sunlight_w(sun_m2[node], lit_share, flux_w_m2)
        heat_w[node] += environment.albedo_w(earth_m2[node], view_factor, day, flux_w_m2)
        heat_w[node] += environment.infrared_w(constellation.network.radiating_m2[node], view_factor)
    heat_w[AVIONICS] = load_w - flow.unmet_j / np.maximum(dt_s, 1e-12)
    heat_w[BATTERY] = flow.heat_w
    return thermal.rk4_step(constellation.network, temp_k, heat_w, dt_s), flow
