"""Costs per expert: a self-test under a simulated board's meter, stored in a bundle and read again; and files of strangers.

The simulated Raspberry Pi takes 3 W at rest and 8 W with its four cores busy (firmware_sim.profiles), so that a second of
processor time is 1.25 J over idle, whatever else this machine does. Left out: real boards.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from node_rig import make_bundle

from ground_station import cli, costs, experiment
from node_agent import bundle_file, frame, selftest, selftest_costs, shard, toml_file
from node_agent.costs import CostsError, Energy, from_selftest, per_run
from node_agent.selftest_costs import Phase, Round

ROOT = Path(__file__).resolve().parent.parent
JOULES_PER_CPU_S = (8.0 - 3.0) / 4
BOARD = "raspberry-pi-5-ina226"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A bundle of 8-bit experts alone: each precision takes its own bursts."""
    root = make_bundle(tmp_path_factory.mktemp("costs") / "bundle").root
    manifest = shard.read_manifest(root)
    shards = tuple(entry for entry in manifest.shards if entry.precision == "int8")
    shard.write_manifest(root, dataclasses.replace(manifest, shards=shards))
    return root


@pytest.fixture(scope="module")
def measured(bundle, tmp_path_factory) -> Path:
    """What `node-agent selftest` prints on a simulated board, whose load is that process."""
    home = tmp_path_factory.mktemp("board")
    board = {"node": "n1", "profile": BOARD, "sysroot": str(home / "sysroot"), "pid_file": str(home / "pid")}
    (home / "spec.json").write_text(json.dumps({"boards": [board]}))
    simulator = subprocess.Popen([sys.executable, "-m", "firmware_sim.run", "--spec", home / "spec.json"], cwd=ROOT)
    try:
        end_s = time.monotonic() + 15
        while not any((home / "sysroot").rglob("power1_input")) and time.monotonic() < end_s:
            assert simulator.poll() is None
            time.sleep(0.02)
        arguments = ["--bundle", bundle, "--sysroot", home / "sysroot", "--board", BOARD, "--burst-s", "0.4", "--json"]
        with open(home / "selftest.json", "wb") as out:
            agent = subprocess.Popen(
                [sys.executable, "-m", "node_agent.cli", "selftest", *arguments], stdout=out, cwd=ROOT
            )
            (home / "pid").write_text(str(agent.pid))
            assert agent.wait(60) == 0
    finally:
        simulator.terminate()
        simulator.wait(10)
    return home / "selftest.json"


def spacemoe(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(each) for each in arguments])
    return code, *capsys.readouterr()


# --- a simulated board -----------------------------------------------------------------------------------------------


def test_joules_are_the_simulators_watts_times_the_processors_time(measured):
    found = from_selftest(measured)
    (cost,) = found.costs
    assert (found.board, found.simulated, cost.precision) == (BOARD, True, "int8")
    energy = cost.energy
    assert energy.joules == pytest.approx(JOULES_PER_CPU_S * energy.cpu_ms / 1e3, rel=0.25)
    assert energy.provenance == "simulated" and energy.scope == "the board's supply"
    assert energy.idle_w == pytest.approx(3.0, abs=0.15) and 3.05 < energy.burst_w < 4.6  # one core of four at most
    assert energy.n == selftest_costs.ROUNDS and energy.runs > 100
    assert cost.row.n == 8 * selftest_costs.TIMED_RUNS and cost.row.median_ms < cost.batch.median_ms < 8 * 1.5
    assert energy.cpu_ms == pytest.approx(cost.row.median_ms, rel=2)  # of one run, not of a batch or a round


def test_costs_go_into_the_bundle_and_come_out_by_board(measured, bundle, capsys):
    code, out, _ = spacemoe(capsys, "bundle", "costs", bundle, measured)
    assert code == 0 and BOARD in out and "simulated" in out
    assert spacemoe(capsys, "bundle", "verify", bundle)[0] == 0
    manifest = shard.read_manifest(bundle)
    found = costs.read(bundle, manifest, BOARD)
    stored = from_selftest(measured).costs[0]
    int8 = frame.PRECISION_ID["int8"]
    assert found.joules[int8] == stored.energy.joules and found.ms[int8] == stored.row.median_ms
    others = np.arange(len(frame.PRECISIONS)) != int8
    assert np.isnan(found.joules[others]).all() and np.isnan(found.ms[others]).all()
    assert "simulated sensors" in found.source and "joules simulated" in found.source
    code, out, _ = spacemoe(capsys, "bundle", "show", bundle, "--json")
    assert json.loads(out)["costs"][BOARD]["joules"] == {"int8": stored.energy.joules}
    assert f"{BOARD} (simulated)" in spacemoe(capsys, "bundle", "show", bundle)[1]
    # a second board goes beside it, the same again in its place
    assert spacemoe(capsys, "bundle", "costs", bundle, measured, "--board", "other")[0] == 0
    assert spacemoe(capsys, "bundle", "costs", bundle, measured)[0] == 0
    assert set(costs.boards(bundle, shard.read_manifest(bundle))) == {BOARD, "other"}
    with pytest.raises(CostsError, match="costs of board 'mars'.*other, raspberry"):
        costs.read(bundle, shard.read_manifest(bundle), "mars")
    content = (bundle / "costs.json").read_bytes()
    (bundle / "costs.json").write_bytes(content + b" ")
    with pytest.raises(shard.BundleError, match="costs.json"):
        costs.read(bundle, shard.read_manifest(bundle), BOARD)
    (bundle / "costs.json").write_bytes(content)


def test_without_a_meter_there_are_times_and_no_joules(bundle, tmp_path):
    report = selftest.run(bundle, tmp_path, "bare")
    (cost,) = report.costs.costs
    assert cost.energy is None and "no power sensor" in cost.no_energy and cost.row.median_ms > 0
    (tmp_path / "bare.json").write_text(json.dumps(selftest.as_tree(report)))
    joules, ms = per_run(from_selftest(tmp_path / "bare.json"))
    int8 = frame.PRECISION_ID["int8"]
    assert math.isnan(joules[int8]) and ms[int8] == cost.row.median_ms
    assert "no joules" in selftest.as_table(report)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_joules_over_idle_by_hand():
    rounds = [
        Round(Phase(3.0, 1.0, 0, 0.1), Phase(8.5, 2.0, 1000, 1.2)),  # (8.5 - 2 x 3) / 1000 = 2.5 mJ
        Round(Phase(6.0, 2.0, 0, 0.2), Phase(9.5, 2.0, 1000, 2.2)),  # (9.5 - 2 x 3) / 1000 = 3.5 mJ
    ]
    found = selftest_costs.energy_of(rounds, "measured", "the board's supply")
    assert isinstance(found, Energy)
    assert (found.joules, found.least_j, found.most_j) == pytest.approx((3.0e-3, 2.5e-3, 3.5e-3))
    assert (found.idle_w, found.burst_w, found.n, found.runs) == pytest.approx((3.0, 4.5, 2, 2000))
    assert found.cpu_ms == pytest.approx(1e3 * (1.2 - 0.2 + 2.2 - 0.2) / 2000)


def test_work_that_does_not_stand_out_has_no_joules():
    busy = [
        Round(Phase(4.0, 1.0, 0, 0), Phase(4.1, 1.0, 100, 1)),
        Round(Phase(4.2, 1.0, 0, 0), Phase(4.3, 1.0, 100, 1)),  # the second rest took more than the first burst
    ]
    assert "cannot tell" in selftest_costs.energy_of(busy, "measured", "")


# --- files of strangers ----------------------------------------------------------------------------------------------

GOOD = {
    "costs": {
        "board": "pi",
        "agent_version": "1",
        "at": "2026-11-24T00:00:00+00:00",
        "bundle": "rig",
        "hidden": 64,
        "intermediate": 48,
        "threads": 1,
        "machine": "aarch64, 4 cores",
        "simulated": False,
        "costs": [
            {
                "precision": "int8",
                "row": {"n": 30, "median_ms": 2.0, "p10_ms": 1.0, "p90_ms": 3.0},
                "batch": {"n": 30, "median_ms": 9.0, "p10_ms": 8.0, "p90_ms": 10.0},
                "energy": {
                    "joules": 0.01,
                    "least_j": 0.009,
                    "most_j": 0.011,
                    "n": 3,
                    "runs": 300,
                    "idle_w": 3.0,
                    "burst_w": 4.0,
                    "cpu_ms": 2.0,
                    "provenance": "derived",
                    "scope": "the board's supply",
                },
            }
        ],
    }
}


def changed(*path_and_value: object) -> bytes:
    *path, last, value = path_and_value
    tree = copy.deepcopy(GOOD)
    node = tree
    for key in path:
        node = node[key]
    node[last] = value
    return json.dumps(tree).encode()


COST = ("costs", "costs", 0)
HOSTILE = {
    "nothing": b"",
    "deep": b"[" * 100_000,
    "large": b" " * (1 << 20) + b"{}",
    "nan": json.dumps(GOOD).encode().replace(b"0.01,", b"NaN,"),
    "no costs": b'{"ok": true}',
    "a list": b"[1]",
    "precision": changed(*COST, "precision", "int7"),
    "twice": changed("costs", "costs", GOOD["costs"]["costs"] * 2),
    "negative": changed(*COST, "energy", "joules", -0.01),
    "huge": changed(*COST, "row", "p90_ms", 1e300),
    "unordered": changed(*COST, "row", "median_ms", 0.5),
    "no reason": changed(*COST, "energy", None),
    "provenance": changed(*COST, "energy", "provenance", "guessed"),
    "a lie": changed("costs", "simulated", True).replace(b"derived", b"measured"),
    "escape": changed("costs", "board", "pi\x1b[2J"),
    "long": changed("costs", "board", "p" * 300),
    "empty": changed("costs", "board", ""),
    "another bundle": changed("costs", "bundle", "other"),
    "another size": changed("costs", "hidden", 128),
    "no board": changed("costs", "board", "unknown"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_selftest_that_is_none_is_refused_in_one_line(name, bundle, tmp_path, capsys):
    before = (bundle / "manifest.json").read_bytes()
    (tmp_path / "selftest.json").write_bytes(HOSTILE[name])
    code, _, err = spacemoe(capsys, "bundle", "costs", bundle, tmp_path / "selftest.json")
    assert code == 2 and err.count("\n") == 1 and "\x1b" not in err and len(err) < 500
    assert (bundle / "manifest.json").read_bytes() == before


def test_the_good_one_is_taken_and_a_hostile_costs_json_is_refused(tmp_path, capsys):
    root = make_bundle(tmp_path / "bundle").root
    (tmp_path / "selftest.json").write_text(json.dumps(GOOD))
    assert spacemoe(capsys, "bundle", "costs", root, tmp_path / "selftest.json")[0] == 0
    good = json.loads((root / "costs.json").read_text())
    hostile = [
        {**good, "format": "x"},
        {**good, "format_version": 2},
        {**good, "boards": good["boards"] * 300},
        {**good, "boards": {}},
        {**good, "boards": [{**good["boards"][0], "costs": []}]},
    ]
    for tree in hostile:
        manifest = bundle_file.put(root, "costs.json", json.dumps(tree).encode())
        with pytest.raises(CostsError) as caught:
            costs.read(root, manifest, "pi")
        assert "\n" not in str(caught.value)
    manifest = bundle_file.put(root, "costs.json", json.dumps(good).encode())
    assert costs.read(root, manifest, "pi").joules[frame.PRECISION_ID["int8"]] == 0.01
    with pytest.raises(CostsError, match="experts of 64 x 48"):
        costs.read(root, dataclasses.replace(manifest, dims=dataclasses.replace(manifest.dims, hidden=32)), "pi")


# --- used ------------------------------------------------------------------------------------------------------------


def test_an_experiment_takes_a_boards_costs_from_the_bundle(tmp_path, capsys):
    root = make_bundle(tmp_path / "bundle").root
    (tmp_path / "selftest.json").write_text(json.dumps(GOOD))
    assert spacemoe(capsys, "bundle", "costs", root, tmp_path / "selftest.json")[0] == 0
    tree = toml_file.loads((experiment.SHIPPED / "hot-eclipse.toml").read_bytes())
    figures = tree["costs"]
    assert experiment.parse(tree).priced(tmp_path / "none") == experiment.parse(tree)  # figures need no bundle
    tree |= {"costs": {"board": "pi"}, "precisions": ["int8"]}
    found = experiment.parse(tree).priced(root)
    assert found.costs == {"int8": (0.01, 2.0)} and "self-test of pi: ms on aarch64" in found.source
    assert found.priced(tmp_path / "none") == found
    with pytest.raises(CostsError, match="no costs of board 'mars'"):
        experiment.parse(tree | {"costs": {"board": "mars"}}).priced(root)
    with pytest.raises(experiment.ExperimentError, match="no joules of int4 on pi"):
        experiment.parse(tree | {"precisions": ["int4"]}).priced(root)
    with pytest.raises(experiment.ExperimentError, match="one of both"):
        experiment.parse(tree | {"costs": {**figures, "board": "pi"}} | {"precisions": ["int8"]})
    with pytest.raises(experiment.ExperimentError, match="precisions names"):
        experiment.parse(tree | {"precisions": ["int7"]})
