"""Experiments: what a policy's tokens cost and are worth on real text, the loop through an orbit, and files that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from firmware_sim.scenario_table import ScenarioError
from ground_station import (
    dispatch,
    evaluate,
    experiment,
    experiment_orbit,
    experiment_report,
    experiment_text,
    scenario_demo,
    selection,
)
from ground_station.experiment_report import summary
from ground_station.placement import round_robin
from ground_station.selection_world import Calibration, World
from ground_station.text import Text
from node_agent import frame, shard

BUNDLE = Path(evaluate.__file__).parents[1] / "quantize" / "reference" / "bundle"
INT8, INT4 = frame.PRECISION_ID["int8"], frame.PRECISION_ID["int4"]


@pytest.fixture(scope="module")
def manifest():
    return shard.read_manifest(BUNDLE)


@pytest.fixture(scope="module")
def scenario():
    return scenario_demo.find("hot-eclipse")


@pytest.fixture(scope="module")
def rehearsal(manifest, scenario):
    documents = evaluate.domains(BUNDLE.parent / "heldout")["bible_kjv"]
    texts = experiment_text.passages(Text(BUNDLE, manifest), documents, 0, 512, np.random.default_rng(0))
    memory = {board.node: 10**9 for board in scenario.boards}
    table = dispatch.Table(round_robin(manifest, memory, "int8", ("int4",)))
    return experiment_text.Rehearsal(BUNDLE, manifest, table, texts, 64)


@pytest.fixture(scope="module")
def setting(scenario):
    found = experiment.find("hot-eclipse").narrowed([0], 12, None)
    return experiment.setting_of(found, scenario)


def policy(name: str, manifest: shard.Manifest, **knobs: float):
    calibration = Calibration.load(BUNDLE / "calibration.npz", manifest.moe_layers, manifest.dims.experts)
    return selection.make(
        name, manifest.routing, manifest.dims.top_k, manifest.dims.experts, calibration=calibration, **knobs
    )


def world(rehearsal, setting, **state) -> World:
    return World.of(rehearsal.table, 16, setting.costs.joules, setting.costs.ms, **state)


def test_the_likelihood_is_that_of_evaluate_and_topk_differs_from_nothing(rehearsal, manifest, setting):
    playing = rehearsal.play(policy("topk", manifest))
    batch = experiment_text.joined([playing.next(world(rehearsal, setting)) for _ in range(4)])
    assert len(batch.kl) == 256 and np.isnan(batch.nats).sum() == 1  # the last token of the passage has no next one
    # sums over four nodes instead of one round otherwise, and 8-bit activations now and then with them
    assert batch.kl.max() < 1e-3 and abs(np.nanmean(batch.nats)) < 1e-3 and batch.coverage.min() == 1
    assert batch.runs.sum() == 256 * 4 * 4 and batch.runs[:, INT8].sum() == batch.runs.sum()
    # the same passage scored by evaluate.score
    ids = rehearsal.texts[0].tolist()
    score = evaluate.score(evaluate.model(BUNDLE, manifest, "int8", 1), ids, 1)
    assert rehearsal.unconstrained_nats()[:255].sum() == pytest.approx(score.nats, rel=1e-4)


def test_a_node_that_is_out_of_reach_runs_nothing_and_costs_quality(rehearsal, manifest, setting):
    up = np.array([True, True, False, True])
    lame = experiment_text.Rehearsal(
        BUNDLE,
        manifest,
        dispatch.Table(round_robin(manifest, dict.fromkeys(rehearsal.table.nodes, 10**9), "int8")),
        rehearsal.texts,
        64,
    )
    batch = lame.play(policy("topk", manifest)).next(world(lame, setting, up=up))
    assert batch.runs[2].sum() == 0 and batch.visits[2] == 0 and batch.coverage.min() < 1
    assert batch.kl.mean() > 0.01
    # with a replica of every expert elsewhere nothing is lost but precision
    held = rehearsal.play(policy("topk", manifest)).next(world(rehearsal, setting, up=up))
    assert held.runs[2].sum() == 0 and held.coverage.min() == 1 and held.runs[:, INT4].sum() > 0
    assert held.kl.mean() < 0.1 * batch.kl.mean()


def test_the_loop_s_watts_and_tokens_by_hand(rehearsal, manifest, setting):
    around = experiment_orbit.surroundings(setting)
    trace = experiment_orbit.play(setting, around, rehearsal, policy("topk", manifest), "throttle")
    # 16 runs of 3.57 mJ per token, 120 tokens/s, over idle; all nodes together, nobody is near a limit yet
    assert trace.tokens == pytest.approx(np.full(12, 1200.0))
    above_w = (trace.power_w - setting.scenario.payload.idle_w).sum(1)
    assert above_w == pytest.approx(np.full(12, 120 * 16 * 0.00357), rel=1e-9)
    assert (np.diff(trace.temp_c, axis=0) > 0).all() and (trace.over_s == 0).all()
    again = experiment_orbit.play(setting, around, rehearsal, policy("topk", manifest), "throttle")
    for each in dataclasses.fields(trace):  # nats of a passage's last token are nan in both
        np.testing.assert_array_equal(getattr(trace, each.name), getattr(again, each.name), each.name)


def test_without_a_cap_the_limit_is_passed_and_with_one_it_is_not(rehearsal, manifest, setting):
    hot = dataclasses.replace(setting, slots=60, slot_s=20.0, tokens_per_s=400.0, looks=1)
    around = experiment_orbit.surroundings(hot)
    runs = {
        admission: experiment_orbit.play(hot, around, rehearsal, policy("topk", manifest), admission)
        for admission in ("throttle", "cap")
    }
    assert runs["throttle"].over_s.max() > 0 and runs["throttle"].temp_c.max() > hot.scenario.payload.limit_c
    assert runs["cap"].over_s.max() == 0 and runs["cap"].temp_c.max() <= hot.scenario.payload.limit_c
    assert runs["cap"].tokens.sum() < 0.9 * 400 * 1200  # the cap did something
    # budgeted, under the same caps, serves more, of which most is useful, and also passes no limit
    thrifty = experiment_orbit.play(hot, around, rehearsal, policy("budgeted", manifest), "cap")
    assert thrifty.over_s.max() == 0 and thrifty.useful.sum() > 1.1 * runs["cap"].useful.sum()
    assert thrifty.price.max() > 0


class Remembering:
    """A policy that keeps its choices, with their layers."""

    def __init__(self, policy):
        self.policy, self.calls = policy, []

    def __call__(self, layer, logits, world=None):
        choice = self.policy(layer, logits, world)
        self.calls.append((layer, choice))
        return choice


def test_a_token_s_latency_and_bytes_by_hand(rehearsal, manifest, setting):
    """Primary copies alone: where an expert is says which node runs it; real frames say how long they are."""
    memory = dict.fromkeys(rehearsal.table.nodes, 10**9)
    table = dispatch.Table(round_robin(manifest, memory, "int8"))
    alone = experiment_text.Rehearsal(BUNDLE, manifest, table, rehearsal.texts[:1], 64)
    kept = Remembering(policy("topk", manifest))
    batch = alone.play(kept).next(world(alone, setting))
    x = np.ones((1, manifest.dims.hidden), np.float32)
    reply = len(frame.pack(frame.Frame(frame.PARTIAL, x=x, codec="q8")))
    assert len(kept.calls) == 4 and batch.wire_bytes.shape == (64,)
    for token in (0, 17, 63):
        ms, wire = 0.0, 0
        for layer, choice in kept.calls:
            nodes = [table.copies[layer, expert][0][0] for expert in choice.experts[token].tolist()]
            ms += 0.85 * max(nodes.count(node) for node in nodes)
            for node in set(nodes):
                pairs = np.zeros(nodes.count(node), frame.PAIR)
                wire += len(frame.pack(frame.Frame(frame.EXPERTS, x=x, pairs=pairs, codec="q8"))) + reply
        assert batch.latency_ms[token] == pytest.approx(ms) and batch.wire_bytes[token] == wire
    assert len(set(batch.latency_ms)) > 2  # tokens differ: the equality above says something
    # one node does all 16 runs one after the other, for four messages each way
    whole = dispatch.Table(round_robin(manifest, {"only": 10**10}, "int8"))
    one = experiment_text.Rehearsal(BUNDLE, manifest, whole, rehearsal.texts[:1], 64)
    batch = one.play(policy("topk", manifest)).next(world(one, setting))
    assert batch.latency_ms == pytest.approx(np.full(64, 16 * 0.85))
    request = len(frame.pack(frame.Frame(frame.EXPERTS, x=x, pairs=np.zeros(4, frame.PAIR), codec="q8")))
    assert (batch.wire_bytes == 4 * (request + reply)).all()


def test_the_digest_of_decisions_follows_experts_nodes_precisions_and_their_order():
    choice = selection.Choice(np.array([[3, 1], [2, 0]]), np.array([[0.6, 0.4], [1.0, 0.0]], np.float32))
    pairs = np.array([(0, 3, INT8, 0.6), (0, 1, INT8, 0.4), (1, 2, INT4, 1.0)], frame.PAIR)

    def digest(*calls) -> str:
        decisions = experiment_text.Decisions()
        for layer, made, work in calls:
            decisions.add(layer, made, work)
        return decisions.sha256()

    work = [dispatch.Work(0, np.array([4, 5]), pairs)]
    known = digest((0, choice, work))
    assert known == digest((0, choice, [dispatch.Work(0, np.array([4, 5]), pairs.copy())]))
    precise = pairs.copy()
    precise["precision"] = INT8
    swapped = selection.Choice(choice.experts[:, ::-1], choice.gates[:, ::-1])
    others = [
        digest((1, choice, work)),
        digest((0, choice, [dispatch.Work(1, np.array([4, 5]), pairs)])),
        digest((0, choice, [dispatch.Work(0, np.array([4, 6]), pairs)])),
        digest((0, choice, [dispatch.Work(0, np.array([4, 5]), precise)])),
        digest((0, choice, [dispatch.Work(0, np.array([4, 5]), pairs[::-1])])),
        digest((0, swapped, work)),
        digest((0, choice, work), (0, choice, work)),
        digest((0, choice, [])),
    ]
    assert len({known, *others}) == 1 + len(others)
    # an expert with a gate of 0 is not run, whichever it is
    unused = selection.Choice(np.array([[3, 1], [2, 9]]), choice.gates)
    assert digest((0, unused, work)) == known


def test_every_experiment_of_the_kit_can_be_read_and_its_report_holds_every_policy(setting, scenario):
    for path in experiment.SHIPPED.glob("*.toml"):
        found = experiment.find(path.stem)
        assert found == experiment.find(str(path)) and scenario_demo.find(found.scenario)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ground_station.cli", "experiment", "run", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_gives_a_row_per_policy_with_n_and_spread():
    done = run("hot-eclipse", "--slots", "3", "--seeds", "0", "1", "--only", "topk", "budgeted", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["n"] == 2 and result["provenance"] == "simulated" and result["mission_s"] == 30
    assert [row["label"] for row in result["policies"]] == ["topk", "budgeted"]
    row = result["policies"][0]
    assert 3000 < row["tokens"]["mean"] <= 3600 == result["demand_tokens"] and row["tokens"]["sd"] is not None
    assert row["perplexity_ratio"]["mean"] == pytest.approx(1.0, abs=1e-2)


GOOD = """name = "x"
scenario = "hot-eclipse"
slots = 2
slot_s = 10
tokens_per_s = 10
precisions = ["int8"]
[costs]
source = "made up for a test"
int8 = { ms = 1, joules = 0.01 }
[[policy]]
name = "topk"
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("slots = 2", "slots = 0", "slots"),
        ("slots = 2", "slots = 10_000_000", "slots"),
        ("tokens_per_s = 10", "tokens_per_s = nan", "tokens_per_s"),
        ('name = "topk"', 'name = "best"', "best is unknown"),
        ('name = "topk"', 'name = "topk"\nadmission = "none"', "admission none"),
        ('name = "topk"', 'name = "topk"\nknob = "x"', "no number"),
        ('name = "topk"', 'name = "topp"\np = 7', "correct its knobs"),
        ('name = "topk"', 'name = "topk"\nspeed = 7', "correct its knobs"),
        ('precisions = ["int8"]', 'precisions = ["int4"]', "int4"),
        ('precisions = ["int8"]', 'precisions = [["int8"]]', "precisions"),
        ("joules = 0.01", "joules = -1", "joules"),
        ('source = "made up for a test"\n', "", "source"),
        ('scenario = "hot-eclipse"', 'scenario = "cold"', "cold is no file"),
        ("[costs]", "more = 1\n[costs]", "more is unknown"),
        ("[costs]", "[costs", "not TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(tmp_path, old, new, said):
    assert old in GOOD
    path = tmp_path / "x.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises((experiment.ExperimentError, ScenarioError)) as caught:
        found = experiment.find(str(path))
        experiment.run(found, scenario_demo.find(found.scenario), BUNDLE)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_tells_a_bad_file_in_one_line(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(GOOD.replace("slots = 2", "slots = 0"))
    for name in (str(path), str(tmp_path), str(tmp_path / "nowhere.toml"), "nowhere"):
        done = run(name)
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_the_good_file_does_run(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(GOOD)
    done = run(str(path))
    assert done.returncode == 0 and "topk" in done.stdout and "made up for a test" in done.stdout


def test_summary_means_are_over_seeds(rehearsal, manifest, setting, scenario):
    found = experiment.find("hot-eclipse").narrowed([0, 1], 12, ["topk"])
    trace = experiment_orbit.play(
        setting, experiment_orbit.surroundings(setting), rehearsal, policy("topk", manifest), "cap"
    )
    half = dataclasses.replace(trace, tokens=trace.tokens / 2)
    runs = tuple(experiment.Run(found.contenders[0], seed, each, 0.0) for seed, each in enumerate((trace, half)))
    (row,) = summary(found, scenario, runs)["policies"]
    assert row["tokens"]["mean"] == pytest.approx(0.75 * trace.tokens.sum())
    assert row["tokens"]["sd"] == pytest.approx(trace.tokens.sum() / 2 / np.sqrt(2), abs=1e-5)


def test_the_bound_is_above_what_policies_reached_and_a_run_over_the_limit_has_no_share(scenario):
    found = dataclasses.replace(
        experiment.find("hot-eclipse").narrowed([0], 60, None), slot_s=20.0, tokens_per_s=400.0, coverage=0.5
    )
    chosen = dataclasses.replace(
        found, contenders=tuple(c for c in found.contenders if "topk" in c.label or c.label == "des")
    )
    result = experiment_report.run(chosen, scenario, BUNDLE)
    rows = {row["label"]: row for row in result["policies"]}
    assert rows["topk, throttled by its firmware"]["share_of_bound"] is None
    assert 0.2 < rows["topk"]["share_of_bound"] < rows["des"]["share_of_bound"] <= 1.0
    bound = result["bound"]
    assert bound["disagreement_of_two_formulations"] < 1e-6 and bound["too_kind_k"] < 0.5
    assert rows["des"]["useful_tokens"]["mean"] <= bound["useful_tokens"] <= result["demand_tokens"]
    text = experiment_report.text(result)
    assert "of bound" in text and max(map(len, text.splitlines())) <= 110
