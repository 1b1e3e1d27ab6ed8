"""Battery lives under policies: one cycle's ageing by hand, prices against differences of the model, the study with its controls."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from firmware_sim import ageing, thermal
from firmware_sim.bus import AVIONICS, BATTERY, BUSES
from ground_station import battery_life, experiment, experiment_orbit, scenario_demo, selection, wear_price
from ground_station import study_battery as study
from ground_station.cli_shared import reference_bundle
from ground_station.experiment_text import Rehearsal, passages
from ground_station.text import Text

CONTROL = study.Variant("budgeted, wear free", "budgeted")
PRICED = study.Variant(study.OURS, "budgeted", study.WEAR_NATS)
BASE = study.VARIANTS[0]
PERIOD_S = 5739.0


@pytest.fixture(scope="module")
def scenario():
    return scenario_demo.find("small-battery")


def coarse(patch: pytest.MonkeyPatch) -> None:
    """Slots of a minute and fewer orbits: a test's size."""
    patch.setattr(study, "SLOT_S", 60.0)
    patch.setattr(study, "SETTLING", 4)
    patch.setattr(study, "AGED", 2)
    patch.setattr(study, "TEXT_TOKENS", 1024)


@pytest.fixture(scope="module")
def result(scenario):
    with pytest.MonkeyPatch.context() as patch:
        coarse(patch)
        return study.run(reference_bundle(), scenario, 2, (0,), 120.0, (BASE, CONTROL, PRICED))


@pytest.fixture(scope="module")
def cell():
    fleet = np.full(2, 20 * 3600.0)
    return wear_price.Cell(fleet, 0.95, 24.0, np.full(2, PERIOD_S), 0.9)


# the model and its sums


def test_the_ageing_model_gives_the_published_figures_and_a_wrong_one_would_be_seen(monkeypatch):
    found = battery_life.checks()
    assert len(found) == 11 and all(each["holds"] for each in found)
    assert {each["published"] for each in found} >= {18686, 14184, 9582, 4592, 0.163924, 0.151, 2.69}
    assert max(abs(each["deviation"]) for each in found[:8]) < 1e-4
    monkeypatch.setitem(battery_life.PUBLISHED, "cycles to 80 %, depth 0.4", 9580)
    assert [each["name"] for each in battery_life.checks() if not each["holds"]] == ["cycles to 80 %, depth 0.4"]


def test_one_node_s_orbit_ages_as_by_hand():
    # full, down to 0.7 in a line, back, and full: depth 0.3, middle 0.85, the battery at 10 C
    samples = np.concatenate([np.linspace(1, 0.7, 20), np.linspace(0.7, 1, 20), np.ones(20)])
    soc = np.tile(samples, 3)[:, None]
    found = battery_life.aged(soc, np.full_like(soc, 10.0), PERIOD_S, 3)
    depth = 1 / (1.4e5 * 0.3**-0.501 - 1.23e5)
    f = (depth + 4.14e-10 * 5739) * math.exp(1.04 * 0.35) * math.exp(0.0693 * -15 * 298 / 283)
    assert found.linear == pytest.approx([f], rel=1e-12)
    assert found.cycles == pytest.approx([0.163924 / f], rel=1e-5)
    assert found.depth[0, 0] == pytest.approx(0.3) and found.soc_gap == 0 and found.drift_k == 0
    # 10 K warmer: S_T alone
    warm = battery_life.aged(soc, np.full_like(soc, 20.0), PERIOD_S, 3)
    factor = math.exp(0.0693 * (-5 * 298 / 293 + 15 * 298 / 283))
    assert found.cycles / warm.cycles == pytest.approx([factor])
    parts = battery_life.factors(found, warm, PERIOD_S)
    assert parts == pytest.approx({"depth": 1.0, "charge": 1.0, "temperature": factor})
    # in the sun for ever: the calendar alone
    full = np.ones_like(soc)
    still = 4.14e-10 * 5739 * math.exp(1.04 * 0.5)
    assert battery_life.aged(full, full * 25, PERIOD_S, 3).linear == pytest.approx([still])
    with pytest.raises(battery_life.BatteryStudyError, match="equally"):
        battery_life.aged(soc[:-1], soc[:-1], PERIOD_S, 3)


def test_what_if_traces_keep_the_joules_and_equal_ones_share_nothing():
    base = 3.8 + np.array([[1.0, 1.0], [1.0, 1.0]])
    ours = 3.8 + np.array([[0.0, 1.5], [1.5, 0.0]])
    joules_only, shift_only = battery_life.what_if(base, ours, 3.8)
    assert joules_only == pytest.approx(3.8 + np.full((2, 2), 0.75))
    assert (shift_only - 3.8).sum() == pytest.approx(4.0) and shift_only[0, 0] == 3.8 and shift_only[0, 1] == 5.8
    lit = np.array([[1.0, 0.0], [0.0, 0.0]])  # in the second slot nobody is in the sun
    assert battery_life.sunny_only(base, lit, 3.8) == pytest.approx(3.8 + np.array([[2.0, 0.0], [1.0, 1.0]]))
    assert battery_life.shares(1.0, 1.0, 1.0) is None
    assert battery_life.shares(1.21, 1.1, 1.1) == pytest.approx(0.5)
    assert battery_life.shares(1.2, 1.2, 1.0) == pytest.approx(1.0)


# the price of wear


def test_the_price_is_the_model_s_derivative(cell):
    depth, temp_c, step = np.array([0.1, 0.35]), np.array([5.0, 30.0]), 1e-4

    def log_f(d, t):
        return np.log(ageing.cycle_ageing(d, 1 - d / 2, t, PERIOD_S))

    by_depth = (log_f(depth + step, temp_c) - log_f(depth - step, temp_c)) / (2 * step) / (0.95 * 72000)
    assert wear_price.depth_wear(cell, depth) == pytest.approx(by_depth, rel=1e-5)
    by_heat = (log_f(depth, temp_c + step) - log_f(depth, temp_c - step)) / (2 * step) * 0.9 / PERIOD_S
    assert wear_price.heat_wear(cell, temp_c) == pytest.approx(by_heat, rel=1e-5)
    assert (wear_price.depth_wear(cell, depth) > wear_price.heat_wear(cell, temp_c)).all()


def test_a_joule_costs_depth_in_the_dark_and_in_the_sun_only_its_heat(cell):
    load, warm, dod = np.array([8.0, 8.0]), np.array([5.0, 5.0]), np.zeros(2)
    price = wear_price.joule_price(cell, dod, warm, load, np.array([1.0, 0.0]), np.array([0.0, 2000.0]), 1e5, 0.1)
    heat = 0.1 * 1e5 * wear_price.heat_wear(cell, warm)
    assert price[0] == pytest.approx(heat[0]) and price[1] > 3 * heat[1]
    # the forecast: 8 W for 2000 s out of 72 kJ at 0.95
    assert wear_price.depth_at_dawn(cell, dod, load, np.array([0.0, 2000.0])) == pytest.approx([0.01, 0.2339181])
    depth = wear_price.depth_wear(cell, np.array([0.2339181, 0.2339181]))
    assert price[1] - heat[1] == pytest.approx(0.1 * 1e5 * depth[1], rel=1e-6)
    # with the array gone from sunlight's full share to too little for the load, a battery discharges in the sun too
    weak = replace(cell, array_w=7.0)
    assert wear_price.joule_price(weak, dod, warm, load, np.ones(2), np.zeros(2), 1e5, 0.1)[0] > heat[0]
    assert not wear_price.joule_price(cell, dod, warm, load, np.zeros(2), np.ones(2), 1e5, 0.0).any()
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="wear price"):
            wear_price.joule_price(cell, dod, warm, load, np.ones(2), np.zeros(2), 1e5, weight)


def test_shadow_ahead_counts_down_and_ends_at_dawn():
    lit = np.array([[1, 1, 0, 0, 0.2, 0.9, 0], [0, 1, 1, 1, 1, 1, 1]]).T
    assert wear_price.shadow_ahead_s(lit, 10.0).T.tolist() == [[0, 0, 30, 20, 10, 0, 10], [10, 0, 0, 0, 0, 0, 0]]


def test_a_watt_warms_the_battery_as_the_network_says():
    network, rest_w = BUSES["6U"].network(24.0), np.array([100.0, 60.0, 5.0, 0.0])

    def settled(extra_w: float) -> np.ndarray:
        heat_w, temp_k = rest_w.copy(), np.full((4, 1), 270.0)
        heat_w[AVIONICS] += extra_w
        for _ in range(4000):
            temp_k = thermal.rk4_step(network, temp_k, heat_w[:, None], 30.0)
        assert np.abs(thermal.net_heat_w(network, temp_k, heat_w[:, None])).max() < 1e-6
        return temp_k[:, 0]

    before, after = settled(0.0), settled(0.1)
    # the panel is at another temperature than the body, and linked to it by 0.1 W/K only
    found = wear_price.battery_k_per_w(network, before[BATTERY])
    assert found == pytest.approx((after - before)[BATTERY] / 0.1, rel=0.03)


# the study


def test_flown_again_a_run_is_the_run_itself(scenario):
    costs = replace(experiment.find("hot-eclipse"), slots=30, slot_s=30.0, tokens_per_s=120.0, contenders=())
    stage = experiment.Stage(costs, scenario, reference_bundle())
    text, documents = Text(reference_bundle(), stage.manifest), experiment.documents(reference_bundle())
    texts = passages(text, documents, stage.start, 256, np.random.default_rng(0))
    rehearsal = Rehearsal(reference_bundle(), stage.manifest, stage.table, texts, 16)
    setting = replace(stage.setting, looks=1, wear_nats=0.1)
    policy = selection.make("budgeted", stage.manifest.routing, 4, 16, calibration=stage.calibration)
    trace = experiment_orbit.play(setting, stage.around, rehearsal, policy, "cap")
    assert trace.soc.min() < 0.9  # batteries were used
    soc, battery_c, unmet_j = battery_life.fly(scenario, np.stack([trace.power_w] * 2, 1), 30.0)
    assert soc.shape == (90, 2, 5) and not unmet_j.any()
    for run in (0, 1):
        assert np.allclose(soc[2::3, run], trace.soc, rtol=0, atol=1e-6)  # the capacity ages per step: by 1e-7
        assert np.allclose(battery_c[2::3, run], trace.battery_c, rtol=0, atol=1e-5)


def test_equal_joules_in_equal_places_make_no_difference(result):
    base, control, _ = result["policies"]
    for row in (base, control):
        assert row["valid"] and row["ratio_mean_node"]["mean"] == row["ratio_worst_node"]["mean"] == 1
        assert row["share_from_joules"] is None and row["factor_depth"]["mean"] == 1
    assert control["joules_per_token"] == base["joules_per_token"]


def test_a_price_of_wear_makes_batteries_last_at_the_same_tokens(result):
    base, _, ours = result["policies"]
    demand = result["demand_tokens_per_day"]
    assert result["valid"] and demand == 120 * 86400
    assert base["tokens_per_day"]["mean"] == pytest.approx(demand) == ours["tokens_per_day"]["mean"]
    assert base["joules_per_token"]["mean"] == pytest.approx(16 * 0.00357)
    assert result["ratio"]["mean"] > 1.05 and result["ratio_worst_node"]["mean"] > 1.05
    assert 1 < result["ratio"]["mean"] < result["most_that_could_be"]["no work at all"]["mean"]
    assert ours["share_of_joules_in_shadow"]["mean"] < 0.1 < 0.3 < base["share_of_joules_in_shadow"]["mean"]
    assert ours["perplexity_ratio"]["mean"] < 1.02 and ours["useful_share"]["mean"] > 0.98
    # both halves of it, each less than the whole; and what the parts of the model say multiplies to it
    parts = [ours[f"ratio_{half}"]["mean"] for half in ("joules_only", "shift_only")]
    assert all(1 < part < result["ratio"]["mean"] for part in parts) and 0 < ours["share_from_joules"]["mean"] < 0.5
    product = math.prod(ours[f"factor_{name}"]["mean"] for name in ("depth", "charge", "temperature"))
    assert product == pytest.approx(result["ratio"]["mean"], rel=1e-3)
    assert ours["factor_charge"]["mean"] < 1  # a battery that stays fuller ages more by its charge
    assert ours["ratio_by_rainflow"]["mean"] == pytest.approx(result["ratio"]["mean"], rel=0.03)
    # the topk row's mean node, aged by hand from its own figures
    node = base["nodes"][0]
    f = ageing.cycle_ageing(node["depth"], 1 - node["depth"] / 2, node["battery_c"], result["period_s"])
    assert node["cycles"] == pytest.approx(0.163924 / f, rel=0.01)
    text = study.report(result)
    assert "18686" in text and "of the gain is joules" in text and max(map(len, text.splitlines())) <= 120


def test_a_demand_that_is_not_served_has_no_ratio(scenario, monkeypatch):
    coarse(monkeypatch)
    monkeypatch.setattr(study, "SETTLING", 2)
    result = study.run(reference_bundle(), scenario, 2, (0,), 500.0, (BASE,))
    assert not result["valid"] and result["ratio"] is None and result["policies"][0]["ratio_mean_node"] is None
    assert "of the demand: lower --tokens-per-s" in result["policies"][0]["invalid_because"][0]
    assert "invalid" in study.report(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"orbits": 1}, "give 2 to"),
        ({"seeds": (-1,)}, "seeds are"),
        ({"seeds": tuple(range(11))}, "seeds are"),
        ({"tokens_per_s": math.nan}, "demand"),
    ],
)
def test_what_cannot_be_played_is_refused(scenario, arguments, message):
    with pytest.raises(battery_life.BatteryStudyError, match=message):
        study.run(reference_bundle(), scenario, **arguments)


def test_boards_of_another_power_are_refused(scenario):
    other = replace(scenario, payload=replace(scenario.payload, busy_w=15.0))
    with pytest.raises(battery_life.BatteryStudyError, match="correct its busy_w"):
        study.run(reference_bundle(), other)


def test_the_command_refuses_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "ground_station.cli", "study", "battery", "--orbits", "1", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1 and "2 to 10" in done.stderr
