"""The virtual satellites: coupling by hand, the cap in closed loop over orbits, and what is not known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from firmware_sim import satellite, scenario
from firmware_sim.bus import AVIONICS
from firmware_sim.thermal import KELVIN

TEXT = """
name = "ring"
[time]
start = 2026-06-21T00:00:00Z
[constellation]
per_plane = 4
[power]
battery_wh = {battery_wh}
array_w = {array_w}
[payload]
limit_c = {limit_c}
kappa = {kappa}
leak_w_per_k = {leak}
fan_w = {fan_w}
r_k_per_w = [3.0, 13.6]
tau_s = [8.0, 400.0]
""" + "".join(f'[[board]]\nnode = "sat-{i}"\nprofile = "any"\n' for i in range(4))


def ring(
    limit_c: float = 90.0,
    kappa: float = 1.0,
    leak: float = 0.0,
    fan_w: float = 0.0,
    battery_wh: float = 80.0,
    array_w: float = 40.0,
) -> satellite.Satellites:
    text = TEXT.format(limit_c=limit_c, kappa=kappa, leak=leak, fan_w=fan_w, battery_wh=battery_wh, array_w=array_w)
    return satellite.make(scenario.parse(text))


def flown(satellites, orbits: float, capped: bool = True, dt_s: float = 10.0):
    """(state, highest T_v, lowest charge) after so many orbits of boards that draw what their cap allows."""
    payload = satellites.payload
    state = satellite.start(satellites, 20.0, 0.9)
    hottest, emptiest = -math.inf, 1.0
    for _ in range(int(orbits * 5739 / dt_s)):
        cap = state.cap if capped else np.ones(4)
        watts = payload.idle_w + cap * (payload.busy_w - payload.idle_w)
        state = satellite.step(satellites, state, watts, np.full(4, 50.0), dt_s)
        hottest = max(hottest, float(state.temp_c.max()))
        emptiest = min(emptiest, float(satellite.soc(satellites, state).min()))
    return state, hottest, emptiest


def test_the_payloads_rise_above_the_avionics_node_is_the_foster_network_by_hand():
    satellites = ring()
    state = satellite.start(satellites, 20.0, 0.9)
    assert state.temp_c == pytest.approx(20.0 + 16.6 * 3.0)
    after = satellite.step(satellites, state, np.full(4, 5.0), np.full(4, 40.0), 10.0)
    rise_k = sum(3.0 * r + 2.0 * r * (1 - math.exp(-10 / tau)) for r, tau in ((3.0, 8.0), (13.6, 400.0)))
    assert after.temp_c - (after.bus.temp_k[AVIONICS] - KELVIN) == pytest.approx(np.full(4, rise_k), rel=1e-9)
    assert after.payload_w == pytest.approx(5.0) and after.bus.time_s == 10.0


def test_the_payload_draws_from_the_battery_what_the_bus_balance_says():
    satellites = ring(array_w=0.0)
    state = satellite.start(satellites, 20.0, 0.9)
    after = satellite.step(satellites, state, np.full(4, 5.0), np.full(4, 40.0), 10.0)
    assert state.bus.energy_j - after.bus.energy_j == pytest.approx(np.full(4, (5.0 + 6.0) / 0.95 * 10.0), rel=1e-9)


def test_kappa_fan_and_leak_enter_as_written():
    satellites = ring(kappa=0.5, fan_w=1.0, leak=0.1)
    state = satellite.start(satellites, 20.0, 0.9)
    gap_k = state.temp_c - 40.0
    after = satellite.step(satellites, state, np.full(4, 7.0), np.full(4, 40.0), 1.0)
    assert after.payload_w == pytest.approx(0.5 * 6.0 + 0.1 * gap_k)
    unknown = satellite.step(satellites, state, np.full(4, 7.0), np.full(4, np.nan), 1.0)
    assert unknown.payload_w == pytest.approx(3.0)


def test_a_board_that_is_not_seen_counts_as_one_at_work():
    satellites = ring()
    state = satellite.start(satellites, 20.0, 0.9)
    watts = np.array([np.nan, satellites.payload.busy_w, 3.0, 3.0])
    after = satellite.step(satellites, state, watts, np.full(4, 40.0), 10.0)
    assert after.payload_w[0] == after.payload_w[1] == satellites.payload.busy_w and after.payload_w[2] == 3.0


def test_the_cap_keeps_every_satellite_under_its_limit_through_eclipses_and_without_it_they_pass_it():
    satellites = ring(limit_c=90.0)
    state, hottest, _ = flown(satellites, 6)
    assert 89.0 < hottest < 90.0  # near the set point of 89.5, never above the limit
    assert ((state.cap > satellite.FLOOR_CAP) & (state.cap < 1.0)).all()
    _, free, _ = flown(satellites, 6, capped=False)
    assert free > 110.0  # the control


def test_the_cap_also_holds_when_orders_take_effect_late():
    """As in a run at 60 mission seconds per second: an order shows in the watts two to three steps of a minute later."""
    satellites = ring(limit_c=95.0)
    state = satellite.start(satellites, 5.0, 0.9)
    hottest, caps = -math.inf, [state.cap] * 3
    for _ in range(600):
        state = satellite.step(satellites, state, 3.0 + 5.0 * caps[-3], np.full(4, 50.0), 60.0)
        caps.append(state.cap)
        hottest = max(hottest, float(state.temp_c.max()))
    assert (caps[0] < 1.0).all() and 94.0 < hottest < 95.0


def test_all_four_pass_through_the_shadow_one_after_the_other():
    satellites = ring()
    state = satellite.start(satellites, 20.0, 0.9)
    dark = np.zeros(4)
    for _ in range(574):
        state = satellite.step(satellites, state, np.full(4, 4.0), np.full(4, 40.0), 10.0)
        dark += satellite.lit_share(state) < 0.5
    assert (dark * 10 / 60 > 25).all() and (dark * 10 / 60 < 36).all()  # minutes; 35.6 at most (PHYSICS, 550 km)


def test_a_board_that_draws_more_than_its_cap_says_is_capped_further():
    satellites = ring(limit_c=90.0)
    state = satellite.start(satellites, 20.0, 0.9)
    hottest = -math.inf
    for _ in range(3000):
        watts = 3.0 + 5.0 * state.cap + np.array([0.4, 0.2, 0.0, 0.0])  # another program on the first two boards
        state = satellite.step(satellites, state, watts, np.full(4, 50.0), 10.0)
        hottest = max(hottest, float(state.temp_c.max()))
    assert state.excess_w == pytest.approx([0.4, 0.2, 0.0, 0.0], abs=1e-6)
    assert hottest < 90.0 and state.cap[0] < state.cap[2]


def test_an_empty_battery_caps_too():
    satellites = ring(battery_wh=10.0, array_w=0.0, limit_c=190.0)
    state, _, _ = flown(satellites, 0.05)
    assert (state.cap == 1.0).all()
    state, _, emptiest = flown(satellites, 1.0)
    assert emptiest < satellites.floor_soc and state.cap == pytest.approx(satellite.FLOOR_CAP)
    # between floor and floor + margin the cap is the share of the margin that is left
    half = satellite.start(satellites, -40.0, satellites.floor_soc + satellite.SOC_MARGIN / 2)
    assert satellite.cap(satellites, half) == pytest.approx(0.5)
