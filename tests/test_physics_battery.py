"""Batteries against hand calculation, Xu's published model and ASTM E1049's series."""

from __future__ import annotations

import numpy as np
import pytest

from firmware_sim import ageing, battery, eclipse, orbit
from firmware_sim.ageing import AgeingError
from firmware_sim.battery import Battery, BatteryError

PERIOD_S = float(orbit.period_s(orbit.EARTH_RADIUS_KM + 550.0))
SHARE = float(eclipse.eclipse_fraction(550.0, 0.0))


def test_array_for_12_w_at_550_km():
    store = Battery(80.0)
    array_w = battery.array_needed_w(12.0, PERIOD_S, SHARE, store)
    assert array_w == pytest.approx(19.887, abs=5e-4)
    assert 12.0 * SHARE * PERIOD_S / 3600.0 == pytest.approx(7.122, abs=5e-4)
    drawn_wh = battery.eclipse_draw_wh(12.0, PERIOD_S, SHARE, store)
    assert drawn_wh == pytest.approx(7.497, abs=5e-4)
    assert drawn_wh / 80.0 == pytest.approx(0.0937, abs=5e-5)


@pytest.mark.parametrize("surplus_w, change", [(0.0, 0), (-0.5, -1), (0.5, 1)])
def test_that_array_carries_the_load_and_a_smaller_one_does_not(surplus_w, change):
    """Stepped through ten orbits; the energy returns exactly to where it was only with the array as sized."""
    store = Battery(80.0)
    array_w = battery.array_needed_w(12.0, PERIOD_S, SHARE, store) + surplus_w
    energy_j, steps = np.array([0.5 * store.capacity_j]), 300
    for _ in range(10):
        for lit, length_s in ((1.0, (1.0 - SHARE) * PERIOD_S), (0.0, SHARE * PERIOD_S)):
            for _ in range(steps):
                energy_j = battery.step(store, energy_j, array_w * lit, 12.0, length_s / steps).energy_j
    gained_j = float(energy_j[0]) - 0.5 * store.capacity_j
    if change:
        assert np.sign(gained_j) == change and abs(gained_j) > 1000.0
    else:
        assert gained_j == pytest.approx(0.0, abs=1e-3)


def test_energy_is_kept():
    """What the array gives goes into the load, the store, heat or is spilled; nothing below empty, nothing above full."""
    store, rng = Battery(1.0), np.random.default_rng(0)
    energy_j = rng.uniform(0.0, store.capacity_j, 500)
    for _ in range(200):
        array_w, load_w = rng.uniform(0.0, 60.0, (2, 500))
        flow = battery.step(store, energy_j, array_w, load_w, 10.0, rng.uniform(-30.0, 40.0, 500))
        into_load_j = load_w * 10.0 - flow.unmet_j
        balance_j = array_w * 10.0 - flow.spilled_j - into_load_j - flow.heat_w * 10.0 - (flow.energy_j - energy_j)
        np.testing.assert_allclose(balance_j, 0.0, atol=1e-8)
        assert flow.energy_j.min() >= 0.0 and flow.energy_j.max() <= store.capacity_j
        assert min(flow.unmet_j.min(), flow.spilled_j.min(), flow.heat_w.min()) >= -1e-9
        energy_j = flow.energy_j


def test_a_cold_battery_takes_little_or_nothing():
    store, half = Battery(10.0), np.array([18000.0])
    gained = [
        float(battery.step(store, half, 20.0, 0.0, 10.0, temp_c).energy_j[0] - 18000.0)
        for temp_c in (5.0, -10.0, -25.0)
    ]
    assert gained == pytest.approx([190.0, 95.0, 0.0])
    given = battery.step(store, half, 0.0, 20.0, 10.0, -25.0)
    assert float(given.unmet_j[0]) == 0.0, "discharging is not throttled"


def test_20_percent_are_gone_at_0_163924():
    assert ageing.linear_until(0.2) == pytest.approx(0.163924, abs=5e-7)
    assert float(ageing.capacity_lost(0.163924)) == pytest.approx(0.2, abs=1e-6)
    assert float(ageing.capacity_lost(0.0)) == 0.0


@pytest.mark.parametrize(
    "depth, with_calendar, without", [(0.1, 18686, 32927), (0.2, 14184, 20606), (0.4, 9582, 11826), (0.8, 4592, 4958)]
)
def test_cycles_to_80_percent(depth, with_calendar, without):
    """25 C, mean charge 1 - d/2, one cycle per orbit of 5739 s."""
    mean = 1.0 - depth / 2.0
    limit = ageing.linear_until(0.2)
    assert limit / float(ageing.cycle_ageing(depth, mean, 25.0, 5739.0)) == pytest.approx(with_calendar, abs=0.6)
    assert limit / float(ageing.cycle_ageing(depth, mean, 25.0)) == pytest.approx(without, abs=0.6)


def test_temperature_stress():
    stress = ageing.temperature_stress(np.array([0.0, 25.0, 40.0]))
    np.testing.assert_allclose(stress, [0.151, 1.0, 2.690], atol=5e-4)


ASTM = [-2, 1, -3, 5, -1, 3, -4, 4, -2]


def counted(series) -> dict[float, float]:
    counts: dict[float, float] = {}
    for cycle in ageing.cycles(series):
        counts[cycle.depth] = counts.get(cycle.depth, 0.0) + cycle.count
    return counts


def test_astm_series():
    """ASTM E1049-85, figure 6."""
    expected = {3: 0.5, 4: 1.5, 6: 0.5, 8: 1.0, 9: 0.5}
    assert counted(ASTM) == expected
    assert counted(iter(ASTM)) == expected, "a stream is enough"
    # control: counting every turn as half a cycle of its own is something else
    turns = np.abs(np.diff(ASTM))
    assert {float(turn): 0.5 * float((turns == turn).sum()) for turn in np.unique(turns)} != expected


def test_a_history_ages_as_its_cycles_do():
    """30 equal cycles by hand: f = sum of S_d S_s S_T, plus the calendar's."""
    depth, top, count, step_s = 0.2, 0.9, 30, 60.0
    one = np.concatenate([np.linspace(top, top - depth, 48)[:-1], np.linspace(top - depth, top, 49)[:-1]])
    charge = np.append(np.tile(one, count), top)
    aged = ageing.history_ageing(charge, 25.0, step_s)
    mean = top - depth / 2.0
    stress_c = float(ageing.charge_stress(charge.mean()))
    by_hand = count * float(ageing.cycle_ageing(depth, mean, 25.0)) + 4.14e-10 * (charge.size - 1) * step_s * stress_c
    assert aged == pytest.approx(by_hand, rel=1e-9)
    assert ageing.history_ageing(charge, 40.0, step_s) == pytest.approx(2.690 * by_hand, rel=1e-3)
    # deep cycles cost more than as many shallow ones
    assert ageing.history_ageing(0.9 - 2.0 * (0.9 - charge), 25.0, step_s) > 1.3 * aged


def test_what_cannot_be_is_refused():
    for arguments in ((0.0,), (80.0, 0.0), (80.0, 0.9, 1.1), (80.0, 0.9, 0.9, -30.0)):
        with pytest.raises(BatteryError):
            Battery(*arguments)
    with pytest.raises(BatteryError):
        battery.array_needed_w(12.0, PERIOD_S, 1.0, Battery())
    for depth in (0.0, -0.1, 1.1):
        with pytest.raises(AgeingError):
            ageing.depth_stress(depth)
    for charge in (np.array([0.5, 0.6]), np.array([0.5, 1.5, 0.5]), np.array([0.5, np.nan, 0.5])):
        with pytest.raises(AgeingError):
            ageing.history_ageing(charge, 25.0, 1.0)
    with pytest.raises(AgeingError):
        ageing.linear_until(1.0)
