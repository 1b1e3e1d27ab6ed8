"""Batteries that age while their history comes in: against the batch model with the `rainflow` package, and Xu's published cycles."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from conftest import lacking

from firmware_sim import ageing, constellation, orbit, satellite, scenario, wear
from firmware_sim.ageing import AgeingError
from firmware_sim.bus import BATTERY, BUSES
from firmware_sim.constellation import ConstellationError
from firmware_sim.thermal import KELVIN

STEP_S = 10.0


def worn(charge: np.ndarray, temp_c: np.ndarray, **given) -> wear.Wear:
    """After series (m, n)."""
    state = wear.start(charge[0], temp_c[0], **given)
    for row, warmth in zip(charge[1:], temp_c[1:]):
        state = wear.step(state, row, warmth, STEP_S)
    return state


def batch(charge: np.ndarray, temp_c: np.ndarray) -> float:
    return ageing.history_ageing(charge, temp_c, STEP_S, least_depth=wear.LEAST_DEPTH)


def series(kind: str, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Charges and temperatures (m, n)."""
    rng = np.random.default_rng(5)
    time = np.arange(600)[:, None]
    warm = 20.0 + 15.0 * np.sin(time / 37.0 + np.arange(count)) + rng.normal(0.0, 1.0, (600, count))
    if kind == "walk":
        charge = 0.5 + np.cumsum(rng.normal(0.0, 0.03, (600, count)), axis=0)
        charge = np.abs((charge % 2.0) - 1.0)  # reflected at empty and full
    elif kind == "orbits":  # full in the sun: a plateau, with a flicker while it discharges
        charge = np.minimum(
            1.0, 0.95 + 0.15 * np.sin(time / 50.0 + np.arange(count)) + rng.normal(0.0, 0.002, warm.shape)
        )
    else:
        charge = np.repeat(rng.uniform(0.0, 1.0, (200, count)), 3, axis=0)  # steps with plateaus
    return charge, warm


@pytest.mark.parametrize("kind", ["walk", "orbits", "plateaus"])
def test_a_stream_ages_as_the_whole_history_does_at_every_moment(kind):
    charge, temp_c = series(kind)
    state = wear.start(charge[0], temp_c[0])
    compared = 0
    for index in range(1, len(charge)):
        state = wear.step(state, charge[index], temp_c[index], STEP_S)
        if index >= 2 and index % 7 == 0:
            expected = [batch(charge[: index + 1, i], temp_c[: index + 1, i]) for i in range(charge.shape[1])]
            np.testing.assert_allclose(wear.linear(state), expected, rtol=1e-9)
            compared += 1
    assert compared > 80 and state.used.max() < wear.DEPTH and not state.forced.any()
    # controls: a series backwards, or at one temperature, is another history
    assert abs(batch(charge[:, 0], temp_c[::-1, 0]) / wear.linear(state)[0] - 1.0) > 1e-3


def test_astm_series_in_a_stream():
    """ASTM E1049-85, figure 6, brought into 0 to 1: what has closed at its end are 4:1 and the halves 3 and 8 that hold the
    series' begin (4 between -1 and 3), the rest is open."""
    charge = (np.array([-2, 1, -3, 5, -1, 3, -4, 4, -2], float)[:, None] + 4.0) / 10.0
    state = worn(charge, np.full_like(charge, 25.0))
    assert float(state.cycles[0]) == 0.5 + 0.5 + 1.0 + 0.5  # 3, 4 and 8 as halves, 4 whole
    by_hand = sum(
        count * float(ageing.cycle_ageing(depth / 10.0, (mean + 4.0) / 10.0, 25.0))
        for depth, mean, count in ((3, -0.5, 0.5), (4, -1.0, 0.5), (8, 1.0, 0.5), (4, 1.0, 1.0))
    )
    assert float(state.closed[0]) == pytest.approx(by_hand, rel=1e-12)
    assert float(wear.linear(state)[0]) == pytest.approx(batch(charge[:, 0], np.full(9, 25.0)), rel=1e-12)


@pytest.mark.parametrize("depth, cycles", [(0.1, 18686), (0.2, 14184), (0.4, 9582), (0.8, 4592)])
def test_cycles_to_80_percent_from_a_stream(depth, cycles):
    """Twenty cycles of 5739 s at 25 C between full and 1 - depth, prolonged to a loss of 20 %."""
    half = np.linspace(1.0, 1.0 - depth, 288)
    charge = np.append(np.tile(np.concatenate([half[:-1], half[:0:-1]]), 20), 1.0)[:, None]
    state = wear.start(charge[0], np.array([25.0]))
    dt_s = 20 * 5739.0 / (len(charge) - 1)
    for row in charge[1:]:
        state = wear.step(state, row, np.array([25.0]), dt_s)
    per_cycle = float(wear.linear(state)[0]) / 20
    assert ageing.linear_until(0.2) / per_cycle == pytest.approx(cycles, rel=2e-4)
    # the year that follows: 5498.8 such orbits more
    then = 20 * per_cycle + wear.YEAR_S / 5739.0 * per_cycle
    expected = float(ageing.capacity_lost(then) - ageing.capacity_lost(20 * per_cycle))
    assert float(wear.lost_in_a_year(state)[0]) == pytest.approx(expected, rel=1e-9)


def test_an_old_battery_goes_on_from_its_age_and_loses_less_than_a_new_one():
    charge, temp_c = series("orbits")
    new, old = worn(charge, temp_c), worn(charge, temp_c, capacity_share=0.9)
    assert wear.capacity_share(wear.start(charge[0], temp_c[0], 0.9)) == pytest.approx(0.9, abs=1e-9)
    np.testing.assert_allclose(wear.linear(old) - ageing.linear_until(0.1), wear.linear(new), rtol=1e-9)
    lost_new, lost_old = 1.0 - wear.capacity_share(new), 0.9 - wear.capacity_share(old)
    assert (lost_old > 0.0).all() and (lost_new > 3.0 * lost_old).all()  # the film forms first


def test_flicker_is_no_cycle_and_a_stack_that_would_grow_is_bounded():
    flicker = 0.9 + 1e-4 * (np.arange(2001) % 2)[:, None]
    state = worn(flicker, np.full_like(flicker, 25.0))
    calendar = 4.14e-10 * 2000 * STEP_S * float(ageing.charge_stress(flicker.mean()))
    assert float(wear.linear(state)[0]) == pytest.approx(calendar, rel=1e-6) and state.cycles[0] == 0.0
    # every swing a little smaller than the one before: nothing ever closes
    swings = 0.5 + 0.45 * (-1.0) ** np.arange(300) * np.linspace(1.0, 0.05, 300)
    state = worn(swings[:, None], np.full((300, 1), 25.0))
    assert int(state.used[0]) == wear.DEPTH and state.points.shape == (5, 1, wear.DEPTH)
    assert float(state.forced[0]) == 299 - wear.DEPTH
    assert float(wear.linear(state)[0]) == pytest.approx(batch(swings, np.full(300, 25.0)), rel=1e-9)


def test_what_cannot_be_is_refused():
    state = wear.start(np.array([0.5]), np.array([20.0]))
    for charge, temp_c, dt_s in (
        ([1.1], [20.0], 1.0),
        ([0.5], [np.nan], 1.0),
        ([0.5], [20.0], 0.0),
        ([0.5] * 2, [20.0] * 2, 1.0),
    ):
        with pytest.raises(AgeingError):
            wear.step(state, np.array(charge), np.array(temp_c), dt_s)
    assert np.isnan(wear.lost_in_a_year(state)).all() and wear.capacity_share(state) == 1.0


SCENARIO = """
name = "ring"
[time]
start = 2026-06-21T00:00:00Z
[constellation]
per_plane = 2
[power]
battery_wh = 40
""" + "".join(f'[[board]]\nnode = "sat-{i}"\nprofile = "any"\n' for i in range(2))


def test_a_satellites_battery_ages_by_its_own_charge_and_temperature():
    """Three orbits: the stream inside the satellite's step against the batch of what its states said."""
    satellites = satellite.make(scenario.parse(SCENARIO))
    state = satellite.start(satellites, 20.0, 0.9)
    charge, temp_c, shares = [satellite.soc(satellites, state)], [np.full(2, 20.0)], [1.0]
    for _ in range(3 * 574):
        state = satellite.step(satellites, state, np.full(2, 7.0), np.full(2, 40.0), STEP_S)
        charge.append(satellite.soc(satellites, state))
        temp_c.append(state.bus.temp_k[BATTERY] - KELVIN)
        shares.append(float(state.capacity_share[0]))
    assert state.wear.cycles.min() >= 2.0 and np.ptp(charge, axis=0).min() > 0.1
    expected = [batch(np.array(charge)[:, i], np.array(temp_c)[:, i]) for i in range(2)]
    np.testing.assert_allclose(wear.linear(state.wear), expected, rtol=1e-4)  # the capacity shrinks on the way
    np.testing.assert_allclose(state.capacity_share, 1.0 - ageing.capacity_lost(np.array(expected)), rtol=1e-7)
    assert all(after <= before for before, after in zip(shares, shares[1:])) and shares[-1] < 1.0 - 1e-5
    # one long step of a minute looks at the battery as often
    coarse = satellite.start(satellites, 20.0, 0.9)
    for _ in range(3 * 574 // 6):
        coarse = satellite.step(satellites, coarse, np.full(2, 7.0), np.full(2, 40.0), 6 * STEP_S)
    np.testing.assert_allclose(1.0 - coarse.capacity_share, 1.0 - state.capacity_share, rtol=1e-3)


def test_an_aged_battery_holds_less_and_what_the_sun_gives_beyond_it_is_spilled():
    satellites = satellite.make(scenario.parse(SCENARIO))
    full_j = 40.0 * 3600.0
    aged = satellite.start(satellites, 20.0, 0.5, 0.8)
    assert aged.bus.energy_j == pytest.approx(0.5 * 0.8 * full_j) and satellite.soc(satellites, aged) == pytest.approx(
        0.5
    )
    new, least = satellite.start(satellites, 20.0, 0.5), np.ones((2, 2))
    for index in range(3 * 574):
        for row, state in enumerate((aged, new)):
            if index > 574:  # both have been full
                least[row] = np.minimum(least[row], satellite.soc(satellites, state))
        aged = satellite.step(satellites, aged, np.full(2, 7.0), np.full(2, 40.0), STEP_S)
        new = satellite.step(satellites, new, np.full(2, 7.0), np.full(2, 40.0), STEP_S)
        assert (aged.bus.energy_j <= aged.capacity_share * full_j * (1 + 1e-5)).all()
    assert (least[0] < least[1] - 0.01).all()  # the same eclipse takes a larger share of a smaller battery
    assert (aged.bus.spilled_j > new.bus.spilled_j).all()


def test_the_compiled_constellation_knows_aged_batteries_too():
    if importlib.util.find_spec("numba") is None:
        lacking("numba", "pip install -c constraints.txt -e .[sim-fast]")
    from firmware_sim.battery import Battery

    orbits = orbit.walker("delta", 550.0, 53.0, 4, 5, 1)
    fleet = constellation.Constellation(orbits, 9497.0, BUSES["6U"], Battery(8.0), 40.0)
    capacity_j = fleet.battery.capacity_j * np.linspace(0.5, 1.0, 20)
    plain = fast = unaged = constellation.start(fleet, 20.0, 0.3)
    for _ in range(400):
        plain = constellation.step(fleet, plain, STEP_S, 14.0, capacity_j)
        fast = constellation.accelerated("numba")(fleet, fast, STEP_S, 14.0, capacity_j)
        unaged = constellation.step(fleet, unaged, STEP_S, 14.0)
    for name in ("temp_k", "energy_j", "unmet_j", "spilled_j"):
        np.testing.assert_allclose(getattr(fast, name), getattr(plain, name), rtol=1e-10, atol=1e-6, err_msg=name)
    assert (plain.energy_j <= capacity_j).all() and (plain.spilled_j[:10] > unaged.spilled_j[:10]).all()
    with pytest.raises(ConstellationError, match="capacities"):
        constellation.step(fleet, plain, STEP_S, 14.0, capacity_j[:3])
    with pytest.raises(ConstellationError, match="capacities"):
        constellation.step(fleet, plain, STEP_S, 14.0, 0.5 * plain.energy_j)
