"""An experiment into a folder: what is in it, going on after kill -9, several processes and a Dask cluster, and folders of others."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import lacking

from ground_station import cli, evaluate, experiment, experiment_identity, experiment_report, experiment_sweep
from ground_station.experiment_store import StoreError
from ground_station.experiment_sweep import SweepError, Where
from ground_station.scenario_demo import find as scenario_of

BUNDLE = Path(evaluate.__file__).parents[1] / "quantize" / "reference" / "bundle"
LABELS = ["topk", "random", "budgeted"]
COMMAND = [sys.executable, "-m", "ground_station.cli", "experiment", "run", "hot-eclipse", "--no-bound", "--json"]

try:
    import joblib  # noqa: F401
    from pyarrow import parquet
except ModuleNotFoundError as missing:
    lacking(missing.name, "pip install -c constraints.txt -e .[experiments]")


@pytest.fixture(scope="module")
def small():
    return experiment.find("hot-eclipse").narrowed([0, 1], 3, LABELS)


@pytest.fixture(scope="module")
def scenario():
    return scenario_of("hot-eclipse")


@pytest.fixture(scope="module")
def plain(small, scenario):
    """As played in this process, without a folder."""
    return experiment_report.run(small, scenario, BUNDLE, False)


@pytest.fixture(scope="module")
def written(small, scenario, tmp_path_factory):
    """A folder with everything; read it, or use a copy."""
    folder = tmp_path_factory.mktemp("written") / "out"
    experiment_report.run(small, scenario, BUNDLE, False, out=folder)
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy"))


def without_out(result: dict) -> dict:
    return {name: value for name, value in result.items() if name != "out"}


def decisions(result: dict) -> dict:
    return {(each["label"], each["seed"]): each["decisions_sha256"] for each in result["runs"]}


def test_the_same_seed_decides_the_same_and_another_one_not(plain, small, scenario):
    found = decisions(plain)
    assert set(found) == {(label, seed) for label in LABELS for seed in (0, 1)}
    again = experiment_report.run(small.narrowed([1], None, None), scenario, BUNDLE, False)
    assert decisions(again) == {key: value for key, value in found.items() if key[1] == 1}
    assert len(set(found.values())) == len(found)  # other policies and other seeds: other choices


def test_the_tables_hold_what_the_summary_says(written, plain, small, scenario):
    assert sorted(os.listdir(written)) == sorted(
        ["experiment.json", "parts", "summary.json", *(f"{t}.parquet" for t in ("runs", "slots", "nodes", "tokens"))]
    )
    summary = json.loads((written / "summary.json").read_text())
    assert without_out(summary) == without_out(plain) and summary["out"] == str(written) and plain["out"] is None
    tables = {t: parquet.read_table(written / f"{t}.parquet") for t in ("runs", "slots", "nodes", "tokens")}
    assert {name: table.num_rows for name, table in tables.items()} == {
        "runs": 6,
        "slots": 6 * 3,
        "nodes": 6 * 3 * 4,
        "tokens": 6 * 3 * 32,
    }
    runs = tables["runs"].to_pylist()
    for label in LABELS:
        row = next(each for each in summary["policies"] if each["label"] == label)
        mine = [each for each in runs if each["label"] == label]
        assert [each["seed"] for each in mine] == [0, 1]
        for figure in ("useful_tokens", "perplexity_ratio", "joules_per_token", "latency_ms_p99", "bytes_per_token"):
            assert np.mean([each[figure] for each in mine]) == pytest.approx(row[figure]["mean"], abs=1e-6)

    def column(table: str, name: str, label: str, seed: int) -> np.ndarray:
        chosen = [each for each in tables[table].to_pylist() if (each["label"], each["seed"]) == (label, seed)]
        return np.array([each[name] for each in chosen], float)

    for run in runs:
        key = run["label"], run["seed"]
        assert column("slots", "tokens", *key).sum() == pytest.approx(run["tokens"])
        assert column("nodes", "temp_c", *key).max() == run["hottest_c"]
        assert column("nodes", "soc", *key).min() == run["lowest_soc"]
        assert np.percentile(column("tokens", "latency_ms", *key), 99) == pytest.approx(run["latency_ms_p99"])
        assert column("tokens", "bytes", *key).mean() == pytest.approx(run["bytes_per_token"])
        assert column("slots", "mission_s", *key).tolist() == [10, 20, 30]
    runs_of_a_token = column("nodes", "runs_int8", "topk", 0) + column("nodes", "runs_int4", "topk", 0)
    assert runs_of_a_token.reshape(3, 4).sum(1) == pytest.approx([16, 16, 16])  # 4 layers, top 4
    head = json.loads((written / "experiment.json").read_text())
    assert head["format"] == 1 and head["provenance"] == "simulated" and len(head["digest"]) == 64
    assert head["experiment"]["slots"] == 3 and head["scenario"]["nodes"] == [b.node for b in scenario.boards]
    assert head["scenario"]["limit_c"] == scenario.payload.limit_c and head["versions"]["numpy"] == np.__version__


def test_several_processes_decide_the_same_and_none_is_left(plain, small, scenario, tmp_path):
    found = experiment_report.run(small, scenario, BUNDLE, False, Where(jobs=2), tmp_path / "out")
    assert without_out(found) == without_out(plain)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if "popen_loky" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.fixture
def kept_environment():
    """LocalCluster leaves OMP_NUM_THREADS=1 and its like behind, and whatever is started later rounds otherwise."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    gc.collect()  # what the cluster leaves with finalisers ends here, not in the middle of another test


def test_a_dask_cluster_decides_the_same(plain, small, scenario, tmp_path, kept_environment):
    try:
        from distributed import LocalCluster
    except ModuleNotFoundError:
        lacking("distributed", "pip install -c constraints.txt -e .[cluster]")
    with LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, local_directory=str(tmp_path)
    ) as cluster:
        found = experiment_report.run(small, scenario, BUNDLE, False, Where(dask=cluster.scheduler_address))
        assert without_out(found) == without_out(plain)
        cluster.scale(0)
        while cluster.scheduler_info["workers"]:
            time.sleep(0.05)
        with pytest.raises(SweepError, match="0 of the 2 threads"):
            experiment_report.run(small, scenario, BUNDLE, False, Where(dask=cluster.scheduler_address))


def test_a_killed_run_goes_on_where_it_was(tmp_path, small, scenario):
    out = tmp_path / "out"
    arguments = [*COMMAND, "--slots", "12", "--seeds", "0", "--only", "topk", "budgeted"]
    victim = subprocess.Popen([*arguments, "-o", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while victim.poll() is None and not list(out.glob("parts/*.npz")):
            time.sleep(0.01)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    done = len(list(out.glob("parts/*.npz")))
    assert done == 1 and not (out / "summary.json").exists()
    resumed = subprocess.run([*arguments, "-o", str(out)], capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0 and f"{done} of 2 runs are in {out} already" in resumed.stderr, resumed.stderr
    fresh = experiment_report.run(small.narrowed([0], 12, ["topk", "budgeted"]), scenario, BUNDLE, False)
    assert without_out(json.loads(resumed.stdout)) == without_out(fresh)
    assert json.loads((out / "summary.json").read_text()) == json.loads(resumed.stdout)


def test_only_what_is_missing_or_damaged_is_played_again(copied, plain, small, scenario, monkeypatch, capsys):
    played = []
    play = experiment.Stage.play
    monkeypatch.setattr(
        experiment.Stage, "play", lambda self, who, seed: played.append((who.label, seed)) or play(self, who, seed)
    )
    experiment_report.run(small, scenario, BUNDLE, False, out=copied)
    assert played == [] and "6 of 6" in capsys.readouterr().err
    (copied / "parts" / "0-1.npz").unlink()
    damaged = copied / "parts" / "2-0.npz"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    found = experiment_report.run(small, scenario, BUNDLE, False, out=copied)
    assert sorted(played) == [("budgeted", 0), ("topk", 1)] and without_out(found) == without_out(plain)
    assert f"{damaged} cannot be used" in capsys.readouterr().err
    # another run's part under this name, or one of another experiment, put there by hand, is no part of this one
    (copied / "parts" / "0-1.npz").write_bytes((copied / "parts" / "0-0.npz").read_bytes())
    played.clear()
    experiment_report.run(small, scenario, BUNDLE, False, out=copied)
    assert played == [("topk", 1)]
    with np.load(damaged) as archive:
        arrays = dict(archive)
    np.savez(damaged, **(arrays | {"digest": np.zeros(32, np.uint8)}))
    played.clear()
    experiment_report.run(small, scenario, BUNDLE, False, out=copied)
    assert played == [("budgeted", 0)]


def test_a_folder_of_another_experiment_is_left_alone_until_told(copied, small, scenario):
    before = {path.name: path.read_bytes() for path in copied.glob("*.*")}
    other = dataclasses.replace(small, kl_nats=0.2)
    with pytest.raises(StoreError, match=r"another experiment \(experiment differ\).*--no-resume") as caught:
        experiment_report.run(other, scenario, BUNDLE, False, out=copied)
    assert "\n" not in str(caught.value)
    warmer = dataclasses.replace(scenario, bus=dataclasses.replace(scenario.bus, start_c=25.0))
    with pytest.raises(StoreError, match="scenario differ"):
        experiment_report.run(small, warmer, BUNDLE, False, out=copied)
    assert {path.name: path.read_bytes() for path in copied.glob("*.*")} == before
    (copied / "notes.txt").write_text("mine")
    found = experiment_report.run(
        other.narrowed([0], None, ["topk"]), scenario, BUNDLE, False, out=copied, resume=False
    )
    assert [each.name for each in (copied / "parts").iterdir()] == ["0-0.npz"] and found["n"] == 1
    assert (copied / "notes.txt").read_text() == "mine"


def test_a_stranger_s_folder_and_one_in_use_are_refused(tmp_path, small, scenario):
    import fcntl

    (tmp_path / "thesis.txt").write_text("mine")
    for resume in (True, False):
        with pytest.raises(StoreError, match="thesis.txt"):
            experiment_report.run(small, scenario, BUNDLE, False, out=tmp_path, resume=resume)
    with pytest.raises(StoreError, match="no folder"):
        experiment_report.run(small, scenario, BUNDLE, False, out=tmp_path / "thesis.txt")
    assert os.listdir(tmp_path) == ["thesis.txt"]
    (tmp_path / "thesis.txt").unlink()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="in use"):
        experiment_report.run(small, scenario, BUNDLE, False, out=tmp_path)
    os.close(descriptor)
    (tmp_path / "experiment.json").write_text("[" * 100_000)
    with pytest.raises(StoreError, match="damaged"):
        experiment_report.run(small, scenario, BUNDLE, False, out=tmp_path)


def test_a_worker_that_would_play_another_experiment_refuses(small, scenario):
    parts = experiment_identity.parts(small, scenario, BUNDLE)
    for name, value in (("libraries", "numpy 1.0"), ("text", "0" * 64), ("code", "0" * 64)):
        sweep = experiment_sweep.Sweep(small, scenario, BUNDLE, parts | {name: value})
        with pytest.raises(SweepError, match=rf"\({name} differ\)"):
            experiment_sweep._played(sweep, (0, 0), None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-resume"], "-o DIR"),
        (["--jobs", "2", "--dask", "127.0.0.1:8786"], "--jobs or --dask"),
        (["--jobs", "5000"], "from 1 to 1024"),
        (["--dask", "somewhere"], "HOST:PORT"),
        (["--dask", "127.0.0.1:99999"], "HOST:PORT"),
    ],
)
def test_options_that_cannot_be_are_told_in_one_line(arguments, said, capsys):
    assert cli.main(["experiment", "run", "hot-eclipse", "--slots", "2", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1 and said in err


def test_no_scheduler_is_told_in_one_line(small, scenario, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(experiment_sweep, "DASK_WAIT_S", 1)
    with pytest.raises(SweepError, match="no Dask scheduler answers at 127.0.0.1:9"):
        experiment_report.run(small, scenario, BUNDLE, False, Where(dask="127.0.0.1:9"))
