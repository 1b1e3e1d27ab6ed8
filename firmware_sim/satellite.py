"""The virtual satellites that boards stand in for: measured watts in; temperature, battery and how much a board may work out.

Coupling, per board and satellite (mission time; powers are constant during a step):

    P_v = kappa (P_board - fan) + leak (T_v - T_board)          what the payload draws in orbit
    T_v = T_avionics + sum_i x_i,   x_i' = (R_i P_v - x_i) / tau_i   its temperature there

P_v loads the satellite's battery and heats its avionics node. A bench temperature is never used as one in orbit: both are
kept apart. The battery ages by its own charge and temperature (wear.py), and what it holds shrinks. Pure; leaves out where
watts come from and how the cap reaches a board (the ground station), and links (contact.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from firmware_sim import constellation, eclipse, foster, orbit, sun, wear
from firmware_sim.battery import Battery
from firmware_sim.board import Branch
from firmware_sim.bus import AVIONICS, BATTERY, BUSES
from firmware_sim.scenario import Payload, Scenario
from firmware_sim.thermal import KELVIN
from firmware_sim.wear import Wear

SET_POINT_K = 0.5  # below the limit
HORIZONS_S = np.array([30.0, 120.0, 480.0])  # of mission time: how far ahead the limit has to hold
FLOOR_CAP = 0.05  # a board always keeps what telemetry and its own housekeeping need
EXCESS_S = 120.0
DIVERGED = "the scenario's physics diverge: lower leak_w_per_k, r_k_per_w or array_w"
SOC_MARGIN = 0.10  # above its floor: there the cap begins to fall


class SatelliteError(ValueError):
    """The virtual satellites cannot go on; the text says what to change in the scenario."""


@dataclass(frozen=True)
class Satellites:
    """The n satellites that boards stand in for, in the order of the scenario's boards."""

    nodes: tuple[str, ...]
    constellation: constellation.Constellation
    payload: Payload
    platform_w: float
    floor_soc: float
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class State:
    """After `bus.time_s` of mission time. Each array (n,), rises_k (branches, n).

    `temp_c`: T_v; `payload_w`: P_v of the last step; `cap`: how much of the time each board may compute, 0 to 1; `excess_w`: by
    how much a board draws more than idle_w, busy_w and its cap say (smoothed over EXCESS_S): other programs, a wrong idle_w;
    `warming_k_per_s`: of the avionics node; `wear`: the batteries' history; `capacity_share`: of a new battery's capacity, what
    is left; it never grows.
    """

    bus: constellation.State
    rises_k: np.ndarray
    temp_c: np.ndarray
    payload_w: np.ndarray
    cap: np.ndarray
    excess_w: np.ndarray
    warming_k_per_s: np.ndarray
    wear: Wear
    capacity_share: np.ndarray


def make(scenario: Scenario) -> Satellites:
    """The satellites of a scenario's boards.  Raises: ValueError of the physics' own kinds."""
    every = orbits_of(scenario)
    chosen = [board.satellite for board in scenario.boards]
    orbits = orbit.Orbits(
        every.radius_km[chosen], every.inclination_rad[chosen], every.raan_rad[chosen], every.argument_rad[chosen]
    )
    power, payload = scenario.power, scenario.payload
    battery = Battery(power.battery_wh, power.charge_efficiency, power.discharge_efficiency)
    return Satellites(
        tuple(board.node for board in scenario.boards),
        constellation.Constellation(
            orbits, sun.j2000_days(scenario.time.start), BUSES[scenario.bus.kind], battery, power.array_w
        ),
        payload,
        power.platform_w,
        power.floor_soc,
        tuple(Branch(r, tau) for r, tau in zip(payload.r_k_per_w, payload.tau_s)),
    )


def orbits_of(scenario: Scenario) -> orbit.Orbits:
    """All satellites of a scenario's constellation."""
    shape = scenario.constellation
    return orbit.walker(
        shape.kind,
        shape.altitude_km,
        shape.inclination_deg,
        shape.planes,
        shape.per_plane,
        shape.phasing,
        shape.raan_deg,
        shape.argument_deg,
    )


def start(satellites: Satellites, temp_c: float, soc: float, capacity_share: float = 1.0) -> State:
    """At time 0: the bus at one temperature, boards idle for long, batteries aged to that share of a new one's capacity."""
    count = len(satellites.nodes)
    bus = constellation.start(satellites.constellation, temp_c, soc)
    bus = replace(bus, energy_j=bus.energy_j * capacity_share)
    begun = wear.start(np.full(count, soc), np.full(count, temp_c), capacity_share)
    payload_w = np.full(count, _payload_w(satellites.payload, satellites.payload.idle_w))
    rises_k = np.outer([branch.r_k_per_w for branch in satellites.branches], payload_w)
    state = State(
        bus,
        rises_k,
        temp_c + rises_k.sum(0),
        payload_w,
        cap=np.ones(count),
        excess_w=np.zeros(count),
        warming_k_per_s=np.zeros(count),
        wear=begun,
        capacity_share=np.full(count, capacity_share),
    )
    return replace(state, cap=cap(satellites, state))


def _payload_w(payload: Payload, board_w: np.ndarray | float, gap_k: np.ndarray | float = 0.0) -> np.ndarray:
    return np.maximum(payload.kappa * (np.asarray(board_w) - payload.fan_w) + payload.leak_w_per_k * gap_k, 0.0)


def step(satellites: Satellites, state: State, board_w: np.ndarray, board_c: np.ndarray, dt_s: float) -> State:
    """The state `dt_s` of mission time later.

    board_w, board_c float64 [n]: mean measured power of the boards in that time and their die temperature now, in degrees
    Celsius; NaN where it is not known. An unknown power counts as a board at work: not seeing a board is no reason to think
    it cold. An unknown temperature leaves the leak out.  Raises: SatelliteError.
    """
    payload = satellites.payload
    known_w = np.where(np.isnan(board_w), payload.busy_w, board_w)
    gap_k = np.nan_to_num(state.temp_c - board_c, nan=0.0)
    payload_w = _payload_w(payload, known_w, gap_k)
    aged, capacity_j = state.wear, state.capacity_share * satellites.constellation.battery.capacity_j
    # charge that a shrunken battery cannot hold any more is gone
    bus = replace(state.bus, energy_j=np.minimum(state.bus.energy_j, capacity_j))
    steps = max(1, int(np.ceil(dt_s / constellation.MAX_STEP_S)))
    load_w = payload_w + satellites.platform_w
    for _ in range(steps):
        bus = constellation.step(satellites.constellation, bus, dt_s / steps, load_w, capacity_j)
        if not np.isfinite(bus.temp_k).all():
            raise SatelliteError(DIVERGED)
        charge = np.clip(bus.energy_j / capacity_j, 0.0, 1.0)
        aged = wear.step(aged, charge, bus.temp_k[BATTERY] - KELVIN, dt_s / steps)
    rises_k = foster.filter_step(satellites.branches, state.rises_k, payload_w, dt_s)
    temp_c = bus.temp_k[AVIONICS] - KELVIN + rises_k.sum(0)
    if not np.isfinite(temp_c).all():
        raise SatelliteError(DIVERGED)
    over_w = np.maximum(known_w - payload.idle_w - state.cap * (payload.busy_w - payload.idle_w), 0.0)
    excess_w = over_w + (state.excess_w - over_w) * np.exp(-dt_s / EXCESS_S)
    warming = (bus.temp_k[AVIONICS] - state.bus.temp_k[AVIONICS]) / dt_s
    after = replace(
        state,
        bus=bus,
        rises_k=rises_k,
        temp_c=temp_c,
        payload_w=payload_w,
        excess_w=excess_w,
        warming_k_per_s=warming,
        wear=aged,
        capacity_share=np.minimum(state.capacity_share, wear.capacity_share(aged)),
    )
    return replace(after, cap=cap(satellites, after))


def soc(satellites: Satellites, state: State) -> np.ndarray:
    """State of charge, 0 to 1, (n,): of what the battery holds at its age."""
    return np.minimum(state.bus.energy_j / (state.capacity_share * satellites.constellation.battery.capacity_j), 1.0)


def lit_share(state: State) -> np.ndarray:
    """Visible share of the sun's disc, (n,): 0 in the umbra."""
    return eclipse.lit_share(state.bus.limb_rad, state.bus.sun_rad)


def cap(satellites: Satellites, state: State) -> np.ndarray:
    """The largest duty in [FLOOR_CAP, 1], (n,), that keeps T_v at its set point and the battery above its floor.

    At each horizon H the power is bounded by
    T_av + sum_i [x_i e^(-H/tau_i) + R_i P (1 - e^(-H/tau_i))] <= limit - 0.5 K, with the avionics node as warm as it will be at
    the first horizon if it goes on warming as now; the smallest bound counts, and goes to a duty by idle_w, busy_w and the excess. Near the
    battery's floor the cap falls linearly to FLOOR_CAP.
    """
    payload = satellites.payload
    r = np.array([branch.r_k_per_w for branch in satellites.branches])
    decay = np.exp(-HORIZONS_S[:, None] / np.array([branch.tau_s for branch in satellites.branches]))  # [H, branches]
    avionics_c = state.bus.temp_k[AVIONICS] - KELVIN + np.maximum(state.warming_k_per_s, 0.0) * HORIZONS_S[0]
    room_k = payload.limit_c - SET_POINT_K - avionics_c - decay @ state.rises_k  # [H, n]
    allowed_w = (room_k / ((1.0 - decay) @ r)[:, None]).min(0)
    board_w = allowed_w / max(payload.kappa, 1e-9) + payload.fan_w - state.excess_w
    heat = (board_w - payload.idle_w) / (payload.busy_w - payload.idle_w)
    charge = (soc(satellites, state) - satellites.floor_soc) / SOC_MARGIN
    return np.clip(np.minimum(heat, charge), FLOOR_CAP, 1.0)
