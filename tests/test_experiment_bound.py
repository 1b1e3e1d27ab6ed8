"""The bound of an experiment: its plan flown on the virtual satellites, and real policies that must stay under it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from firmware_sim import satellite, scenario
from firmware_sim.bus import AVIONICS
from firmware_sim.thermal import SIGMA_W_M2_K4, advance
from ground_station import dispatch, evaluate, experiment_bound, selection
from ground_station.experiment_bound import ceiling, flown, mixes_of, points_of
from ground_station.experiment_orbit import Costs, Setting, Surroundings, play, surroundings
from ground_station.experiment_text import PASSAGE_TOKENS, Rehearsal, passages
from ground_station.fluid_bound import BoundError
from ground_station.placement import round_robin
from ground_station.selection_world import PRECISIONS, Calibration
from ground_station.text import Text
from node_agent import frame, shard

REFERENCE = Path(__file__).resolve().parents[1] / "quantize" / "reference"

TEXT = """
name = "ring"
[time]
start = 2026-06-21T00:00:00Z
[constellation]
per_plane = 4
[bus]
kind = "12U"
start_c = 5
[power]
battery_wh = 40
array_w = {array_w}
platform_w = 6
start_soc = 0.8
floor_soc = 0.3
[payload]
idle_w = 3.8
busy_w = 8
limit_c = {limit_c}
r_k_per_w = [3.0, 13.6]
tau_s = [8.0, 400.0]
""" + "".join(f'[[board]]\nnode = "sat-{i}"\nprofile = "any"\n' for i in range(2))


def numbers(**of: float) -> np.ndarray:
    """[PRECISIONS]"""
    out = np.zeros(PRECISIONS)
    for precision, value in of.items():
        out[frame.PRECISION_ID[precision]] = value
    return out


COSTS = Costs(numbers(int8=0.02, int4=0.008), numbers(int8=4.0, int4=2.0), "made up for a test")
MIXES = mixes_of(
    np.array([numbers(int8=8, int4=0), numbers(int8=0, int4=8), numbers(int8=0, int4=4)]), np.array([1, 0.9, 0.6])
)


def setting(slots: int = 90, limit_c: float = 85.0, array_w: float = 40.0, tokens_per_s: float = 200.0) -> Setting:
    ring = scenario.parse(TEXT.format(limit_c=limit_c, array_w=array_w))
    return Setting(ring, COSTS, slots, 60.0, tokens_per_s, 0.5, 0.1)


@pytest.fixture(scope="module")
def hot() -> tuple[Setting, Surroundings]:
    found = setting()
    return found, surroundings(found)


def test_the_branches_never_warm_more_than_the_bus_does_and_hardly_less():
    """A step of 4 W on the avionics node, against the bus's own network with T^4, stepped."""
    network = satellite.make(setting().scenario).constellation.network
    heat = np.array([[0.0], [60.0], [10.0], [0.0]])
    cold = advance(network, np.full((4, 1), 270.0), heat, 200_000.0)
    hot = advance(network, cold, heat + np.array([[0.0], [0.0], [4.0], [0.0]]), 200_000.0)
    secant = SIGMA_W_M2_K4 * np.array(network.radiating_m2) * ((hot**2 + cold**2) * (hot + cold))[:, 0]
    r, tau = experiment_bound.bus_branches(network, secant, 0.0)
    assert (tau > 0).all() and (r > 0).all()
    # settled, the secant is exact: that is the T^4 balance itself
    assert 4 * r.sum() == pytest.approx((hot - cold)[AVIONICS, 0], rel=2e-3)
    # on the way there it never warms more than the network
    now = cold
    for minute in range(1, 120):
        now = advance(network, now, heat + np.array([[0.0], [0.0], [4.0], [0.0]]), 60.0)
        rise = (now - cold)[AVIONICS, 0]
        assert 0.97 * rise <= 4 * r @ (1 - np.exp(-60.0 * minute / tau)) <= rise + 1e-3
    # negative control: radiators as weak as on the cold bus warm more than the true ones
    weak = 4 * SIGMA_W_M2_K4 * np.array(network.radiating_m2) * cold[:, 0] ** 3
    assert 4 * experiment_bound.bus_branches(network, weak, 0.0)[0].sum() > 1.01 * (hot - cold)[AVIONICS, 0]


def test_the_best_plan_comes_true_on_the_satellites(hot):
    found, around = hot
    plan = ceiling(found, around, MIXES, 0.5)
    truth = flown(found, plan)
    assert plan.bound.temp_c.max() == pytest.approx(85.0, abs=1e-4)  # heat binds
    assert 0 <= truth.over_k <= 0.5  # an upper bound, and a tight one
    assert truth.final_soc >= 0.5 - 0.01 and 0 < plan.useful_share < 1
    assert plan.bound.tokens.sum(1).max() <= 200 * 60 + 1e-6


def test_without_the_bus_the_plan_would_be_too_hot(hot, monkeypatch):
    """Negative control: a bus that does not answer the payload's watts."""
    found, around = hot
    monkeypatch.setattr(experiment_bound, "bus_branches", lambda *_: (np.zeros(1), np.ones(1)))
    assert flown(found, ceiling(found, around, MIXES, 0.5)).over_k > 0.5


def test_little_sun_and_a_charge_to_give_back_bind(hot):
    dark = setting(array_w=18.0, limit_c=120.0)
    around = surroundings(dark)
    free, owed = (ceiling(dark, around, MIXES, soc) for soc in (0.3, 0.8))
    assert owed.bound.worth < 0.98 * free.bound.worth
    assert flown(dark, owed).final_soc >= 0.79 and flown(dark, free).lowest_soc >= 0.29


def test_out_of_contact_nothing_runs(hot):
    found, around = hot
    cut = dataclasses.replace(around, up=around.up & (np.arange(90) >= 30)[:, None])
    plan = ceiling(found, cut, MIXES, 0.3)
    assert plan.bound.runs[:30].sum() == pytest.approx(0, abs=1e-6) and plan.bound.runs[30:].sum() > 0


def test_a_long_run_is_put_into_longer_slots(hot):
    found, around = hot
    fine, coarse = ceiling(found, around, MIXES, 0.5), ceiling(found, around, MIXES, 0.5, most_slots=40)
    assert coarse.slot_s == pytest.approx(135.0) and coarse.power_w.shape == (90, 2)
    assert coarse.bound.worth == pytest.approx(fine.bound.worth, rel=1e-2)


def test_points_that_a_mean_of_others_beats_are_left_out():
    runs = np.array([[8.0, 0], [4.0, 0], [6.0, 0], [5.9, 0], [8.0, 1], [2.0, 0]])
    worth = np.array([1.0, 0.6, 0.75, 0.85, 1.0, 0.1])
    assert {(*mix.runs, mix.worth) for mix in mixes_of(runs, worth)} == {(8, 0, 1), (4, 0, 0.6), (5.9, 0, 0.85)}
    # of two alike one stays
    assert len(mixes_of(np.ones((2, 1)), np.array([0.5, 0.5]))) == 1


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: mixes_of(np.zeros((1, 2)), np.ones(1)), "no runs"),
        (lambda: mixes_of(np.ones((1, 2)), np.full(1, 1.5)), "outside 0 to 1"),
        (lambda: mixes_of(np.ones(2), np.ones(2)), "shape"),
        (lambda: ceiling(setting(), surroundings(setting(5)), MIXES, 1.5), "shares from 0 to 1"),
        (lambda: ceiling(setting(5), surroundings(setting(5)), (), 0.5), "give mixes"),
    ],
)
def test_bad_input_is_refused_by_name(call, text):
    with pytest.raises(BoundError, match=text):
        call()


@pytest.fixture(scope="module")
def played() -> tuple[Setting, Surroundings, list]:
    """The reference model on a hot ring, all experts in int8 and int4 on two nodes: two policies over 20 minutes."""
    bundle = REFERENCE / "bundle"
    manifest = shard.read_manifest(bundle)
    found = dataclasses.replace(setting(60, limit_c=82.0, tokens_per_s=60.0), slot_s=20.0, looks=1)
    around = surroundings(found)
    table = dispatch.Table(round_robin(manifest, {"sat-0": 10**9, "sat-1": 10**9}, "int8", ("int4",)))
    documents = [text for texts in evaluate.domains(REFERENCE / "heldout").values() for text in texts]
    texts = passages(Text(bundle, manifest), documents, manifest.eos_ids[0], PASSAGE_TOKENS, np.random.default_rng(0))
    rehearsal = Rehearsal(bundle, manifest, table, texts, 8)
    calibration = Calibration.load(bundle / "calibration.npz", manifest.moe_layers, manifest.dims.experts)
    traces = []
    for name in ("topk", "budgeted"):
        dims = manifest.dims
        policy = selection.make(
            name, manifest.routing, dims.top_k, dims.experts, 0, calibration=calibration, coverage=0.5
        )
        traces.append(play(found, around, rehearsal, policy, "cap"))
    return found, around, traces


def test_no_policy_does_better_than_the_bound(played):
    found, around, traces = played
    points = [points_of(trace, 1) for trace in traces]
    mixes = mixes_of(np.concatenate([runs for runs, _ in points]), np.concatenate([worth for _, worth in points]))
    best = ceiling(found, around, mixes, 0.0)
    for trace in traces:
        assert trace.over_s.max() == 0 and 0 < trace.useful.sum() < 60 * 20 * 60
        assert trace.useful.sum() <= best.bound.worth * (1 + 1e-6)
        # on its own mixes too, where the bound is tightest; final charge as the policy left it
        own = mixes_of(*points_of(trace, 1))
        assert trace.useful.sum() <= ceiling(found, around, own, trace.soc[-1].min()).bound.worth * (1 + 1e-6)
    assert flown(found, best).over_k <= 0.5
    # negative control: with 5 K less room the "bound" is below what was done, so it is heat that bounds
    payload = dataclasses.replace(found.scenario.payload, limit_c=77.0)
    cooler = dataclasses.replace(found, scenario=dataclasses.replace(found.scenario, payload=payload))
    own = mixes_of(*points_of(traces[0], 1))
    assert ceiling(cooler, around, own, 0.0).bound.worth < traces[0].useful.sum()
