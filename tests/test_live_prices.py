"""Prices from looks at the fleet: against hand calculation, the thermal fit against firmware_sim's, and what is not known is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from firmware_sim import foster
from firmware_sim.scenario import Payload
from ground_station import heat_fit, live_costs, live_prices, scenario_demo
from ground_station.dispatch import Table
from ground_station.fleet import Instant, NodeState
from ground_station.live_prices import COLUMNS, Costs, Look, Orbit, Setting
from ground_station.placement import Holding
from ground_station.price_loop import look_at
from ground_station.selection_world import PRECISIONS, World
from ground_station.twin import View
from node_agent import frame, wire

INT8 = frame.PRECISION_ID["int8"]
TABLE = Table((Holding("a", 0, 0, "int8", 0), Holding("b", 0, 1, "int8", 0)))
RUN_J = 2e-5
ORBIT = Orbit(90.0, 16.6, 24.0, 0.7, np.array([5.0, 5.0]), 4.0, 60.0)


def costs(joules: float = RUN_J, ms: float = 0.01) -> Costs:
    made = np.zeros((2, PRECISIONS)), np.zeros((2, PRECISIONS))
    made[0][:, INT8], made[1][:, INT8] = joules, ms
    return Costs(*made, np.full(2, 200.0), ("test",) * 2)


def setting(orbit: Orbit | None = None, first: Costs | None = None) -> Setting:
    return Setting(("a", "b"), 85.0, 16, INT8, first or costs(), orbit)


def look(time_s: float, **values: object) -> Look:
    """A look at two boards that have run nothing so far."""
    known = {"temp_c": 40.0, "uptime_s": time_s, "up": 1.0, "wait_s": 0.0, "asked": 1.0, "energy_j": 3.0 * time_s}
    known |= {"rows": 0.0, "requests": 0.0, "bytes": 0.0, "compute_s": 0.0, "compute_j": 0.0}
    known |= {f"runs_{name}": 0.0 for name in frame.PRECISIONS} | values
    rows = [np.broadcast_to(np.asarray(known.get(name, np.nan), float), 2) for name in COLUMNS]
    return Look(1e9 + time_s, time_s, time_s, np.stack(rows))


def after(given: Setting, *looks: Look) -> tuple[live_prices.State, World]:
    state, world = live_prices.start(given), World.of(TABLE, 2, given.costs.joules, given.costs.ms)
    for each in looks:
        state, world = live_prices.step(given, state, each, world)
    return state, world


def test_the_barrier_prices_a_board_half_way_from_its_knee_to_the_lower_limit():
    """Limit 85 °C: the knee is 20 K below, half-way on is 75 °C, where a run costs 0.01 nat. With the node's own limit of 75 °C half-way is
    65 °C."""
    state, world = after(setting(), look(1.0, temp_c=[75.0, 64.9]))
    assert state.joule_price.tolist() == pytest.approx([0.01 / RUN_J, 0.0])
    assert (world.joule_price * world.joules[:, INT8]).tolist() == pytest.approx([0.01, 0.0])
    state, _ = after(setting(), look(1.0, temp_c=[75.0, 65.0], limit_c=[np.nan, 75.0]))
    assert state.joule_price.tolist() == pytest.approx([0.01 / RUN_J] * 2)
    # a board that cannot be seen is priced as half-way, and one that is down is not used
    state, world = after(setting(), look(1.0, temp_c=[np.nan, 40.0], up=[1.0, 0.0]))
    assert state.joule_price.tolist() == pytest.approx([0.01 / RUN_J, 0.0])
    assert world.up.tolist() == [True, False]


def test_without_any_nodes_joules_nothing_is_priced():
    state, world = after(setting(first=costs(joules=0.0)), look(1.0, temp_c=[84.9, 84.9]))
    assert not state.joule_price.any() and world.free


def test_the_virtual_satellites_heat_and_battery_queues_fill_in_mission_seconds():
    """60 mission seconds in a look, boards at 6 and 3 W: heat allows 4 W and the array gives 5 W on average, so that the first board's
    queues hold (6 - 4) 60 = 120 J and (6 - 5) 60 = 60 J, the second's nothing. A queue of 4 W x 200 s prices a token of topk at a nat."""

    def at(mission_s: float, joules: list[float]) -> Look:
        values = {"ambient_c": 20.0, "dod": 0.1, "heat_w": 4.0, "energy_j": joules, "uptime_s": mission_s / 60}
        return look(mission_s, **values)

    state, _ = after(setting(ORBIT), at(0.0, [0.0, 0.0]), at(60.0, [6.0, 3.0]))
    assert state.queues.heat_j.tolist() == pytest.approx([120.0, 0.0])
    assert state.queues.battery_j.tolist() == pytest.approx([60.0, 0.0])
    assert state.joule_price.tolist() == pytest.approx([(120 + 60) / 800 / (16 * RUN_J), 0.0])
    # at a depth of discharge of 0.525, three quarters of 0.7, the battery's barrier is half-way: 0.01 nat per run
    state, _ = after(setting(ORBIT), look(0.0, ambient_c=20.0, dod=[0.525, 0.1], heat_w=4.0))
    assert state.joule_price.tolist() == pytest.approx([0.01 / RUN_J, 0.0])


def test_a_reading_that_has_not_changed_neither_fills_nor_empties_a_queue():
    first, second = (look(t, ambient_c=20.0, dod=0.1, heat_w=4.0, energy_j=10.0 * t) for t in (0.0, 10.0))
    stale = replace(look(30.0, ambient_c=20.0, dod=0.1, heat_w=4.0, energy_j=100.0, uptime_s=10.0))
    before, _ = after(setting(ORBIT), first, second)
    then, _ = after(setting(ORBIT), first, second, stale)
    assert before.queues.heat_j.tolist() == then.queues.heat_j.tolist() == pytest.approx([60.0, 60.0])


def test_what_a_duty_cap_held_back_fills_the_queue_all_the_same():
    """A board at 5 W over a baseline of 3 W that waited for half of the time asked for 2 W more: 7 W x 10 s, where heat allows 4 W."""
    values = {"ambient_c": 20.0, "dod": 0.1, "heat_w": 4.0, "baseline_w": 3.0, "asked": [2.0, 1.0]}
    state, _ = after(setting(ORBIT), look(0.0, **values, energy_j=0.0), look(10.0, **values, energy_j=50.0))
    assert state.queues.heat_j.tolist() == pytest.approx([30.0, 10.0])


def test_costs_follow_the_nodes_own_counters():
    """100 runs of int8 in 2 ms and 6 mJ: 0.02 ms and 6e-5 J each, twice and three times of what was said first. 49 are too few."""
    runs = {"runs_int8": [60.0, 0.0]}  # the rest was dispatch's, in the first copy's precision
    ran = {"rows": [100.0, 49.0], "compute_s": 0.002, "compute_j": 0.006, "requests": 50.0, "bytes": 50 * 321.0}
    state, world = after(setting(), look(1.0), look(2.0, **ran, **runs))
    assert state.ms_factor.tolist() == pytest.approx([2.0, 1.0])
    assert world.joules[:, INT8].tolist() == pytest.approx([6e-5, RUN_J])
    assert world.row_bytes.tolist() == pytest.approx([321.0, 321.0])
    # a later look moves it by three tenths: 200 more runs at 0.01 ms and 2e-5 J
    ran = {"rows": [300.0, 49.0], "compute_s": 0.004, "compute_j": 0.010, "requests": 50.0, "bytes": 50 * 321.0}
    state, _ = after(setting(), look(1.0), look(2.0, rows=100.0, compute_s=0.002, compute_j=0.006), look(3.0, **ran))
    assert state.ms_factor[0] == pytest.approx(2.0 + 0.3 * (1.0 - 2.0))
    assert state.joules_factor[0] == pytest.approx(3.0 + 0.3 * (1.0 - 3.0))


def warmed(r: float, tau_s: float, noise_k: float, seconds: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(time, power until the reading, temperature) of one resistor and capacitor over 30 °C, 3 W and 8 W in turn."""
    rng, rise, rows = np.random.default_rng(5), 3.0 * r, []
    for t in range(seconds):
        power = 8.0 if (t // 60) % 2 else 3.0
        rise = rise if t == 0 else rise + (power * r - rise) * (1 - np.exp(-1 / tau_s))
        rows.append((float(t), power, 30.0 + rise + noise_k * rng.standard_normal()))
    return tuple(np.array(rows).T)


def fitted(time_s: np.ndarray, power_w: np.ndarray, temp_c: np.ndarray) -> heat_fit.HeatModel:
    fit = heat_fit.start(1)
    for row in zip(time_s, power_w, temp_c):
        fit = heat_fit.update(fit, *(np.array([value]) for value in row))
    return heat_fit.estimate(fit)


def test_a_nodes_r_and_c_are_found_from_its_own_readings_as_firmware_sim_finds_them():
    time_s, power_w, temp_c = warmed(3.0, 40.0, 0.3)
    model = fitted(time_s, power_w, temp_c)
    assert model.known[0] and model.why[0].startswith("identified from 239 readings")
    other = foster.fit(time_s, np.append(power_w[1:], power_w[-1]), temp_c, branches=1)
    assert model.r_k_per_w[0] == pytest.approx(other.r_k_per_w, rel=0.04) == pytest.approx(3.0, rel=0.04)
    # time constants are looked for on a grid of steps of 28 %
    assert model.c_j_per_k[0] == pytest.approx(40.0 / 3.0, rel=0.2)
    assert model.ambient_c[0] == pytest.approx(30.0, abs=1.0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t, p, c: (t[:15], p[:15], c[:15]), "14 readings of 20"),
        (lambda t, p, c: (t, np.full_like(p, 3.0), c), "power moved by 0.00 W"),
        (lambda t, p, c: (t, p, c + 6 * np.sin(t)), "are left over"),
        (lambda t, p, c: (t[:55], p[:55] + np.sin(t[:55]), c[:55]), "too rough"),
    ],
)
def test_readings_that_say_nothing_identify_nothing(change, why):
    model = fitted(*change(*warmed(3.0, 40.0, 0.3)))
    assert not model.known[0] and np.isnan(model.r_k_per_w[0]) and why in model.why[0]


def test_on_the_bench_the_heat_queue_waits_for_the_model():
    """A board of 3 K/W and 40 s over 30 °C at 8 W, and a limit of 45 °C: once that is identified, its queue gains in each second what is
    drawn over (45 - T) C / 60 s + (T - 30) / R; before, it stands still."""
    time_s, power_w, temp_c = warmed(3.0, 40.0, 0.0, 231)
    joules = np.cumsum(power_w)
    hot = replace(setting(), asked_limit_c=45.0)
    looks = [look(t, temp_c=c, energy_j=e) for t, c, e in zip(time_s, temp_c, joules)]
    before, _ = after(hot, *looks[:-1])
    then, _ = after(hot, *looks)
    assert then.model.known.all() and temp_c[-1] > 50
    allowed_w = (45 - temp_c[-1]) * (40 / 3) / 60 + (temp_c[-1] - 30) / 3
    gained_j = then.queues.heat_j - before.queues.heat_j
    assert gained_j.tolist() == pytest.approx([8.0 - allowed_w] * 2, rel=0.1) and gained_j[0] > 1.5
    few, _ = after(hot, *looks[:20])
    assert not few.model.known.any() and not few.queues.heat_j.any()


def test_a_look_reads_telemetry_and_with_a_scenario_the_virtual_satellite():
    def samples(**values: float) -> dict[str, wire.Sample]:
        return {name: wire.Sample(name, value, "1", "ok", "simulated", "board", 0.0) for name, value in values.items()}

    told = samples(temp_c=50.0, uptime_s=9.0, energy_j=30.0, bytes_received=7.0, bytes_sent=5.0, duty=0.5, duty_cap=0.5)
    states = {"a": NodeState("a", samples=told)}
    runs = np.arange(2 * PRECISIONS).reshape(2, PRECISIONS).astype(float)
    seen = look_at(("a", "b"), states, Instant(5.0, 2.0), [True, False], runs, 0.125, 0.75)
    assert seen["temp_c"].tolist()[0] == 50.0 and np.isnan(seen["temp_c"][1])
    assert seen["bytes"][0] == 12.0 and seen["up"].tolist() == [1.0, 0.0] and seen.time_s == 2.0
    assert seen["asked"].tolist() == [4.0, 1.0] and seen["wait_s"].tolist() == [
        0.125,
        0.0,
    ]  # the board at its cap is the one that is waited for
    assert seen.values[-PRECISIONS:].T.tolist() == runs.tolist()
    view = View("a", 120.0, 70.0, 50.0, 4.0, 0.6, 1.0, 0.5, 1.0, True, 0.01, 8e6, 1.0, avionics_c=25.0)
    views = {"a": view, "b": replace(view, node="b", link_up=False, temp_c=71.0)}
    payload = Payload(idle_w=3.0, busy_w=8.0)
    seen = look_at(("a", "b"), states, Instant(5.0, 2.0), [True, True], runs, 0.0, 0.0, views, payload)
    assert seen.time_s == 120.0 and seen["temp_c"].tolist() == [70.0, 71.0]
    assert seen["heat_w"].tolist() == [5.5, 5.5] and seen["dod"].tolist() == pytest.approx([0.4, 0.4])
    assert seen["link_bytes_per_s"][0] == 1e6 and np.isnan(seen["link_bytes_per_s"][1])


def test_first_costs_say_what_was_not_measured():
    ms, per_s = np.full((2, PRECISIONS), np.nan), np.array([1.5, np.nan])
    ms[:, INT8] = [0.01, 0.03]
    made = live_costs.of(TABLE, ms, per_s, ["simulated", "it has no power sensor"], 99.0)
    assert made.joules[:, INT8].tolist() == pytest.approx([1.5e-5, 4.5e-5])
    assert made.source[1].endswith("the other nodes' mean (it has no power sensor)")
    blind = live_costs.of(TABLE, ms, np.full(2, np.nan), ["no", "no"], 99.0)
    assert not blind.joules.any() and blind.source[0].endswith("nothing is priced")


def test_a_scenarios_harvest_is_physics_mds_balance():
    """The kit's scenario: 40 W arrays, 6 W platform, 53°, 550 km: between no eclipse (34 W) and that of beta 0 (f = 0.3723)."""
    scenario = scenario_demo.find("hot-eclipse")
    nodes = tuple(board.node for board in scenario.boards)
    found = scenario_demo.orbit(scenario, nodes)
    darkest = 40 * 0.627689 / (0.627689 + 0.372311 / 0.9025) - 6
    assert (found.harvest_w > darkest - 0.3).all() and (found.harvest_w < 34.0).all()
    assert found.limit_c == 94.5 and found.r_k_per_w == pytest.approx(16.6) and found.scale == 60
    assert found.dod_limit == pytest.approx(0.7)
