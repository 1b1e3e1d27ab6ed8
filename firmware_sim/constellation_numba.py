"""The step of constellation.py compiled by numba, satellite by satellite on all cores: the same numbers, several times faster.

Optional (extra `sim-fast`). The arithmetic is written out a second time because a compiled loop needs no arrays in between; a
test holds both to the same numbers. Change one, change both.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from numba import njit

from firmware_sim import environment
from firmware_sim.bus import AVIONICS, BATTERY, BODY, PANEL
from firmware_sim.constellation import Constellation, ConstellationError, State, checked_capacity, checked_load
from firmware_sim.eclipse import sun_radius_rad
from firmware_sim.orbit import DAY_S
from firmware_sim.sun import direction, distance_km, flux_w_m2
from firmware_sim.thermal import KELVIN, SIGMA_W_M2_K4

_ALBEDO = environment.ALBEDO
_LINKS = ((PANEL, BODY), (AVIONICS, BODY), (BATTERY, BODY))
_CORES = len(os.sched_getaffinity(0))
# Below that, waking a thread costs more than it brings.
_FEWEST_PER_THREAD = 500


def step(
    constellation: Constellation,
    state: State,
    dt_s: float,
    load_w: np.ndarray | float,
    capacity_j: np.ndarray | None = None,
) -> State:
    """As constellation.step.  Raises: ConstellationError."""
    load_w = checked_load(constellation, dt_s, load_w)
    capacity_j = checked_capacity(constellation, state, capacity_j)
    if tuple(link[:2] for link in constellation.network.links) != _LINKS:
        raise ConstellationError(
            f"this bus links {constellation.network.links}; compiled are {_LINKS}: use accelerator none"
        )
    time_s = state.time_s + dt_s
    days = constellation.epoch_days + time_s / DAY_S
    sun_rad, flux = float(sun_radius_rad(distance_km(days))), float(flux_w_m2(days))
    orbits, network, store = constellation.orbits, constellation.network, constellation.battery
    after = State(
        time_s,
        np.empty_like(state.temp_k),
        *(np.empty_like(state.energy_j) for _ in range(5)),
        sun_rad,
        flux,
    )
    fixed = np.stack(
        [
            orbits.raan_rad,
            constellation.raan_rate_rad_s,
            orbits.argument_rad,
            constellation.argument_rate_rad_s,
            constellation.cos_inclination,
            constellation.sin_inclination,
            constellation.earth_rad,
            constellation.view_factor,
        ]
    )
    radiating_m2 = network.radiating_m2
    _spread(
        len(constellation),
        fixed,
        (state.temp_k, state.energy_j, state.limb_rad, state.cos_zenith, state.unmet_j, state.spilled_j),
        (after.temp_k, after.energy_j, after.limb_rad, after.cos_zenith, after.unmet_j, after.spilled_j),
        load_w,
        capacity_j,
        (time_s, float(dt_s), sun_rad, flux, constellation.array_w * flux / environment.SOLAR_W_M2),
        tuple(float(part) for part in direction(days)),
        (
            *constellation.bus.sun_absorbing_m2(constellation.array_w),
            *constellation.bus.earth_absorbing_m2(constellation.array_w),
            radiating_m2[PANEL] * environment.EARTH_INFRARED_W_M2,
            radiating_m2[BODY] * environment.EARTH_INFRARED_W_M2,
        ),
        (
            radiating_m2[PANEL] * SIGMA_W_M2_K4,
            radiating_m2[BODY] * SIGMA_W_M2_K4,
            *(conductance for _, _, conductance in network.links),
            *(1.0 / capacity for capacity in network.capacity_j_per_k),
        ),
        (store.charge_efficiency, store.discharge_efficiency, store.cold_c, store.no_charge_c),
    )
    return after


def _spread(count: int, *arguments) -> None:
    """Runs `_range` on all cores. Threads of our own: numba's parallel loops cost 8 ms each on a busy machine."""
    parts = min(_CORES, max(1, count // _FEWEST_PER_THREAD))
    bounds = [count * part // parts for part in range(parts + 1)]
    others = [_pool().submit(_range, *pair, *arguments) for pair in zip(bounds[1:-1], bounds[2:])]
    _range(bounds[0], bounds[1], *arguments)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CORES, thread_name_prefix="constellation")


@njit(cache=True)
def _lit(limb, sun_rad):
    height = min(1.0, max(-1.0, limb / sun_rad))
    return 1.0 - (math.acos(height) - height * math.sqrt(1.0 - height * height)) / math.pi


@njit(cache=True)
def _rates(panel, body, avionics, battery, heat, thermal):
    """Kelvin per second of the four nodes: bus.py's network, whose links all end at the body."""
    (
        radiating_panel,
        radiating_body,
        to_panel,
        to_avionics,
        to_battery,
        per_panel,
        per_body,
        per_avionics,
        per_battery,
    ) = thermal
    squared_panel, squared_body = panel * panel, body * body
    from_panel = (body - panel) * to_panel
    from_avionics = (body - avionics) * to_avionics
    from_battery = (body - battery) * to_battery
    return (
        (heat[0] - squared_panel * squared_panel * radiating_panel + from_panel) * per_panel,
        (heat[1] - squared_body * squared_body * radiating_body - from_panel - from_avionics - from_battery) * per_body,
        (heat[2] + from_avionics) * per_avionics,
        (heat[3] + from_battery) * per_battery,
    )


@njit(cache=True)
def _stretch(temp, sums, lit, load_w, full_j, dt_s, array_w, steady, thermal, store):
    """Temperatures (4) and sums (energy, unmet, spilled) after a stretch of constant sunlight; `steady`: heat dark and lit."""
    charge_eff, discharge_eff, cold_c, no_charge_c = store
    energy_j, unmet_j, spilled_j = sums
    panel, body, avionics, battery = temp
    shortest_s = max(dt_s, 1e-12)
    balance_w = array_w * lit - load_w
    offered_w, drawn_w = max(balance_w, 0.0), max(-balance_w, 0.0)
    taken = min(1.0, max(0.0, (battery - KELVIN - no_charge_c) / (cold_c - no_charge_c)))
    charge_w = min(offered_w * taken, (full_j - energy_j) / (charge_eff * shortest_s))
    discharge_w = min(drawn_w, energy_j * discharge_eff / shortest_s)
    gained_w, lost_w = charge_eff * charge_w, discharge_w / discharge_eff
    short_w = drawn_w - discharge_w
    sums = (
        min(full_j, max(0.0, energy_j + (gained_w - lost_w) * dt_s)),
        unmet_j + short_w * dt_s,
        spilled_j + (offered_w - charge_w) * dt_s,
    )
    heat = (
        steady[0] + steady[2] * lit,
        steady[1] + steady[3] * lit,
        load_w - short_w,
        (charge_w - gained_w) + (lost_w - discharge_w),
    )
    half = 0.5 * dt_s
    a = _rates(panel, body, avionics, battery, heat, thermal)
    b = _rates(panel + half * a[0], body + half * a[1], avionics + half * a[2], battery + half * a[3], heat, thermal)
    c = _rates(panel + half * b[0], body + half * b[1], avionics + half * b[2], battery + half * b[3], heat, thermal)
    d = _rates(panel + dt_s * c[0], body + dt_s * c[1], avionics + dt_s * c[2], battery + dt_s * c[3], heat, thermal)
    sixth = dt_s / 6.0
    temp = (
        panel + sixth * (a[0] + 2.0 * (b[0] + c[0]) + d[0]),
        body + sixth * (a[1] + 2.0 * (b[1] + c[1]) + d[1]),
        avionics + sixth * (a[2] + 2.0 * (b[2] + c[2]) + d[2]),
        battery + sixth * (a[3] + 2.0 * (b[3] + c[3]) + d[3]),
    )
    return temp, sums


@njit(cache=True, nogil=True)
def _range(start, stop, fixed, before, after, load_w, capacity_j, moment, sun, absorbing, thermal, store):
    """Satellites `start` to `stop`."""
    time_s, dt_s, sun_rad, flux, array_w = moment
    sun_x, sun_y, sun_z = sun
    sun_panel, sun_body, earth_panel, earth_body, infrared_panel, infrared_body = absorbing
    temp_k, energy_j, limb_before, cos_before, unmet_j, spilled_j = before
    temp_after, energy_after, limb_after, cos_after, unmet_after, spilled_after = after
    for index in range(start, stop):
        raan = fixed[0, index] + fixed[1, index] * time_s
        argument = fixed[2, index] + fixed[3, index] * time_s
        cos_raan, sin_raan = math.cos(raan), math.sin(raan)
        along = sun_x * cos_raan + sun_y * sin_raan
        across = fixed[4, index] * (sun_y * cos_raan - sun_x * sin_raan) + fixed[5, index] * sun_z
        cos_zenith = along * math.cos(argument) + across * math.sin(argument)
        limb = math.pi - math.acos(min(1.0, max(-1.0, cos_zenith))) - fixed[6, index]
        view, load, full_j = fixed[7, index], load_w[index], capacity_j[index]
        reflected = _ALBEDO * flux * view * (0.5 * (max(cos_before[index], 0.0) + max(cos_zenith, 0.0)))
        steady = (
            earth_panel * reflected + infrared_panel * view,
            earth_body * reflected + infrared_body * view,
            sun_panel * flux,
            sun_body * flux,
        )
        temp = (temp_k[0, index], temp_k[1, index], temp_k[2, index], temp_k[3, index])
        sums = (energy_j[index], unmet_j[index], spilled_j[index])
        first = limb_before[index]
        lit = first >= sun_rad and limb >= sun_rad
        if lit or (first <= -sun_rad and limb <= -sun_rad):
            temp, sums = _stretch(temp, sums, 1.0 if lit else 0.0, load, full_j, dt_s, array_w, steady, thermal, store)
        else:
            change = limb - first
            if change == 0.0:
                change = 1e-300
            one = min(1.0, max(0.0, (sun_rad - first) / change))
            two = min(1.0, max(0.0, (-sun_rad - first) / change))
            left = 0.0
            for part in range(3):
                right = min(one, two) if part == 0 else (max(one, two) if part == 1 else 1.0)
                share = (
                    _lit(first + change * left, sun_rad)
                    + 4.0 * _lit(first + change * (0.5 * (left + right)), sun_rad)
                    + _lit(first + change * right, sun_rad)
                ) / 6.0
                temp, sums = _stretch(
                    temp, sums, share, load, full_j, (right - left) * dt_s, array_w, steady, thermal, store
                )
                left = right
        for node in range(4):
            temp_after[node, index] = temp[node]
        energy_after[index], unmet_after[index], spilled_after[index] = sums
        cos_after[index], limb_after[index] = cos_zenith, limb
