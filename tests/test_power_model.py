"""Joules of a board without a power sensor: the model against boards whose law of power is known, the fit, and what is never done.

Outside truth: the simulator's noiseless joules, which follow P = idle + (max - idle) * load, four cores being a load of 1: 3 W and
1.25 W for a busy core of a Raspberry Pi 4; /proc/stat as proc_stat(5) shows it, and as psutil reads it. `pytest -s` prints figures.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from node_rig import AgentProcess, agent_tables, toml

from firmware_sim.faults import parse as parse_faults
from firmware_sim.profiles import PROFILES
from firmware_sim.run import SimulatedBoard
from firmware_sim.spec import BoardSpec, Trace
from ground_station import calibrate_power, cli, ledger, power_fit
from ground_station.broker import Broker
from ground_station.control import Control
from ground_station.power_fit import Options, Window
from ground_station.power_step import CalibrateError, reading
from node_agent import cli as node_cli
from node_agent import config, energy, power_model, sensors, wire
from node_agent.config import PowerModelConfig
from node_agent.counters import Counters
from node_agent.errors import ConfigError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = str(Path(__file__).resolve().parent.parent)
PROFILE = "raspberry-pi-4-ina226"
IDLE_W, CORE_W = 3.0, 1.25
MODEL = PowerModelConfig(2.0, 1.5, "a bench", 0.1)
# of proc_stat(5), "cpu"
EXAMPLE = "cpu  10132153 290696 3084719 46828483 16683 0 25195 0 175628 0"
NO_METER = [{"kind": "missing", "target": "ina226"}]


# ---------------------------------------------------------------- CPU time


def test_busy_time_by_hand():
    """user + nice + system + irq + softirq; 175,628 of guests are in user already, waiting for I/O is idling."""
    assert power_model.busy_ticks(EXAMPLE) == 10_132_153 + 290_696 + 3_084_719 + 0 + 25_195
    # what a hypervisor stole, 128, is not here
    assert power_model.busy_ticks("cpu  1 2 4 8 16 32 64 128") == 1 + 2 + 4 + 32 + 64


@pytest.mark.parametrize(
    "line", ["", "cpu", "cpu0 1 2 3 4 5 6 7", "cpu  1 2 3", "cpu  1 2 3 4 5 -6 7", "cpu  1 2 3 4 5 6 7 x"]
)
def test_other_lines_are_refused(line):
    with pytest.raises(ValueError, match="no line of CPU time"):
        power_model.busy_ticks(line)


def stat(root: Path, busy_ticks: int, idle_ticks: int = 0) -> None:
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/stat").write_text(f"cpu  {busy_ticks} 0 0 {idle_ticks} 0 0 0 0 0 0\nintr {'0 ' * 9000}\n")


def test_only_the_boards_own_file_is_read(tmp_path):
    assert power_model.CpuTime(Path("/")).busy_s() > 0 and not power_model.CpuTime(Path("/")).simulated
    board = tmp_path / "board"
    assert power_model.CpuTime(board).busy_s() is None
    stat(board, 250)
    assert power_model.CpuTime(board).busy_s() == 2.5 and power_model.CpuTime(board).simulated
    (board / "proc/stat").unlink()
    os.mkfifo(board / "proc/stat")
    assert power_model.CpuTime(board).busy_s() is None  # and it did not wait for a writer
    (tmp_path / "escapes").mkdir()
    (tmp_path / "escapes/proc").symlink_to("/proc")
    assert power_model.CpuTime(tmp_path / "escapes").busy_s() is None


def simulated(root: Path, loads: list[tuple[float, float]], faults: list | None = None, **more) -> SimulatedBoard:
    """A Raspberry Pi 4 with an INA226, loads (0-1) from given times on."""
    profile = PROFILES[PROFILE]
    trace = Trace(tuple(t for t, _ in loads), tuple(load for _, load in loads))
    return SimulatedBoard(BoardSpec("n1", profile, root, None, trace, parse_faults(faults or [], profile), **more))


def test_the_simulators_cpu_time_is_what_a_kernel_would_say(tmp_path, monkeypatch):
    """Four cores, 10 s at a quarter and 2 s at full load: 10 + 8 s busy of 48. psutil reads it as it reads a real one."""
    board = simulated(tmp_path, [(0, 0.25), (10, 1.0)])
    for _ in range(24):
        board.advance(0.5)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    whole, cores = psutil.cpu_times(), psutil.cpu_times(percpu=True)
    assert (whole.user, whole.idle, whole.system, whole.iowait) == (18.0, 30.0, 0.0, 0.0)
    assert len(cores) == 4 and {(core.user, core.idle) for core in cores} == {(4.5, 7.5)}
    assert (tmp_path / "proc/stat").read_text().startswith("cpu  1800 0 0 3000 0 0 0 0 0 0\ncpu0 450 0 0 750 ")
    assert power_model.CpuTime(tmp_path).busy_s() == 18.0


# ---------------------------------------------------------------- the counter


def test_the_counter_by_hand(tmp_path):
    stat(tmp_path, 400)
    clock = {"now": 10.0}
    estimate = power_model.Estimate(MODEL, power_model.CpuTime(tmp_path), lambda: clock["now"])
    assert estimate.ask()[0] == pytest.approx(2.0 * 10 + 1.5 * 4)
    clock["now"] = 20.0
    stat(tmp_path, 1000)
    assert estimate.ask()[0] == pytest.approx(26.0 + 2.0 * 10 + 1.5 * 6)
    # it goes back (the simulator began anew): said once, and nothing of the time between is counted
    clock["now"] = 21.0
    stat(tmp_path, 100)
    with pytest.raises(ValueError, match="went back"):
        estimate.ask()
    clock["now"] = 22.0
    stat(tmp_path, 200)
    assert estimate.ask()[0] == pytest.approx(55.0 + 2.0 + 1.5)
    # a file that nobody writes any more is no idle board
    clock["now"] = 26.9
    estimate.ask()
    clock["now"] = 27.1
    with pytest.raises(ValueError, match="stood still for 5 s"):
        estimate.ask()


def test_an_estimate_is_made_only_where_it_is_configured_and_there_is_no_meter(tmp_path):
    bare, metered = tmp_path / "bare", tmp_path / "metered"
    simulated(bare, [(0, 0.0)], NO_METER)
    simulated(metered, [(0, 0.0)])
    with_table = power_model.with_model(sensors.find(bare), power_model.CpuTime(bare), MODEL)
    assert [(s.name, s.unit, s.scope, s.provenance) for s in with_table.total] == [
        ("counter_j.power_model", "J", "board", "estimated")
    ]
    assert with_table.total_scope.startswith("the board, estimated from its CPU time: 2 W and 1.5 W for each busy core")
    assert "0.1 W rms" in with_table.total_scope and "from a bench" in with_table.total_scope
    # without the table there is nothing, as ever
    without = sensors.find(bare)
    assert power_model.with_model(without, power_model.CpuTime(bare), None) is without and not without.total
    # a meter goes before it, and that is said
    found = power_model.with_model(sensors.find(metered), power_model.CpuTime(metered), MODEL)
    assert [s.name for s in found.total] == ["power_w.ina226"] and not found.estimate
    assert any("goes before an estimate" in item.reason for item in found.left_out)
    # a table without CPU time gives nothing, and says why
    (bare / "proc/stat").unlink()
    blind = power_model.with_model(sensors.find(bare), power_model.CpuTime(bare), MODEL)
    assert not blind.total and any("no CPU time to go by: no such file" in item.reason for item in blind.left_out)


def test_what_is_published_is_labelled(tmp_path):
    simulated(tmp_path, [(0, 0.0)], NO_METER)
    cpu = power_model.CpuTime(tmp_path)
    found = power_model.with_model(sensors.find(tmp_path), cpu, MODEL)
    meter = energy.EnergyMeter(found, 10, Counters(), cpu=cpu, model=MODEL)
    meter.sample()
    meter.snapshot()
    time.sleep(0.05)
    meter.sample()
    got = {sample.name: sample for sample in energy.samples(meter.snapshot(), 1.0)}
    for name in ("energy_j", "energy_compute_j", "energy_radio_j", "energy_idle_j", "energy_telemetry_j", "power_w"):
        assert (got[name].provenance, got[name].scope, got[name].validity) == ("estimated", "board", "ok"), name
    # nothing is busy; the clock is looked at again after the reading
    assert got["power_w"].value == pytest.approx(2.0, rel=0.3)
    assert (got["cpu_busy_s"].value, got["cpu_busy_s"].provenance) == (0.0, "simulated")
    assert "power_model_residual_w" not in got  # it would be judged by itself
    # control: without the table
    bare = energy.EnergyMeter(sensors.find(tmp_path), 10, Counters(), cpu=cpu)
    bare.sample()
    got = {sample.name: sample for sample in energy.samples(bare.snapshot(), 1.0)}
    assert (got["energy_j"].validity, got["power_w"].validity, got["cpu_busy_s"].value) == ("missing", "missing", 0.0)


def test_a_meter_judges_the_model(tmp_path, monkeypatch):
    """By hand: 10 J in 2 s are 5 W, one busy second in 2 is half a core: the model says 2 + 0.75 W, the meter 2.25 W more."""
    judge = power_model.Judge(MODEL)
    first = power_model.Moment(valid_s=0.0, energy_j=1.0, gap_s=0.5, now_s=0.1, busy_s=10.0)
    assert judge.add(first) is None
    assert judge.add(power_model.Moment(2.0, 11.0, 0.5, 2.1, 11.0)) == pytest.approx(2.25)
    assert judge.add(power_model.Moment(2.5, 99.0, 0.5, 2.6, 11.0)) == pytest.approx(2.25)  # too soon for another
    assert judge.add(power_model.Moment(3.5, 99.0, 0.9, 3.6, 11.0)) is None  # over a gap
    # as published: a board at 3 W and no load, model 2 W
    monkeypatch.setattr(power_model, "JUDGED_OVER_S", 0.05)
    simulated(tmp_path, [(0, 0.0)])
    cpu = power_model.CpuTime(tmp_path)
    found = power_model.with_model(sensors.find(tmp_path), cpu, MODEL)
    meter = energy.EnergyMeter(found, 10, Counters(), cpu=cpu, model=MODEL)
    meter.sample()
    assert {s.name: s.validity for s in energy.samples(meter.snapshot(), 1.0)}["power_model_residual_w"] == "missing"
    time.sleep(0.06)
    meter.sample()
    got = {sample.name: sample for sample in energy.samples(meter.snapshot(), 1.0)}
    assert got["power_model_residual_w"].value == pytest.approx(1.0, abs=0.02)
    assert got["power_w"].value == pytest.approx(3.0, abs=0.02) and got["power_w"].provenance == "simulated"


# ---------------------------------------------------------------- the file


BASE = {"node": {"id": "a", "fleet": "b", "state_dir": "/s"}, "data": {"endpoint": "tcp://127.0.0.1:9"}}


def test_the_table_of_the_configuration():
    table = {"idle_w": 2, "w_per_busy_core": 1.5, "from": "a bench", "residual_w": 0.1}
    assert config.parse(toml(BASE | {"power_model": table}), Path()).power_model == MODEL
    assert config.parse(toml(BASE), Path()).power_model is None
    for change, said in (
        ({"idle_w": None}, "[power_model] lacks idle_w: give a number of 0 to 1000"),
        ({"w_per_busy_core": None}, "lacks w_per_busy_core"),
        ({"idle_w": -1}, "idle_w is '-1'"),
        ({"w_per_busy_core": "much"}, "w_per_busy_core is 'much'"),
        ({"from": 3}, "from is '3'"),
        ({"watts": 3}, "has 'watts', which is unknown"),
    ):
        wrong = {key: value for key, value in (table | change).items() if value is not None}
        with pytest.raises(ConfigError) as caught:
            config.parse(toml(BASE | {"power_model": wrong}), Path())
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_boards_command_shows_the_estimate(tmp_path, capsys):
    simulated(tmp_path / "root", [(0, 0.0)], NO_METER)
    tables = BASE | {"node": BASE["node"] | {"sysroot": str(tmp_path / "root")}}
    tables["power_model"] = {"idle_w": 2, "w_per_busy_core": 1.5, "from": "a bench"}
    (tmp_path / "a.toml").write_text(toml(tables))
    assert node_cli.main(["sensors", "--config", str(tmp_path / "a.toml"), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    row = next(row for row in tree["sensors"] if row["name"] == "counter_j.power_model")
    assert (row["provenance"], row["unit"], row["scope"], row["validity"]) == ("estimated", "J", "board", "ok")
    assert tree["total"] == ["counter_j.power_model"] and "estimated" in tree["total_scope"]
    assert node_cli.main(["sensors", "--config", str(tmp_path / "a.toml")]) == 0
    assert "estimated" in capsys.readouterr().out
    # control: the same folder without the table
    assert node_cli.main(["sensors", "--sysroot", str(tmp_path / "root"), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["total"] == [] and not any(row["provenance"] == "estimated" for row in tree["sensors"])


# ---------------------------------------------------------------- the fit


def windows(idle_w: float, core_w: float, noise_w: float = 0.0) -> list[Window]:
    busy = np.repeat([0.0, 1.0, 0.5, 0.75, 0.25, 0.0], 5)
    noise = np.random.default_rng(3).normal(0.0, 1.0, len(busy)) * noise_w
    return [Window(b, 1.0, b, idle_w + core_w * b + e) for b, e in zip(busy.tolist(), noise.tolist())]


def test_the_fit_is_least_squares():
    exact = power_fit.fit(windows(2.0, 1.5))
    assert (exact.idle_w, exact.w_per_busy_core) == (pytest.approx(2.0), pytest.approx(1.5))
    assert exact.residual_w < 1e-9 and (exact.n, exact.busy_cores_max) == (30, 1.0)
    noisy = windows(2.0, 1.5, 0.05)
    found = power_fit.fit(noisy)
    slope, idle = np.polyfit([w.busy_cores for w in noisy], [w.power_w for w in noisy], 1)
    assert (found.idle_w, found.w_per_busy_core) == (pytest.approx(idle), pytest.approx(slope))
    covariance = np.polyfit([w.busy_cores for w in noisy], [w.power_w for w in noisy], 1, cov=True)[1]
    assert found.w_per_busy_core_error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert found.idle_error_w == pytest.approx(math.sqrt(covariance[1, 1]))
    assert found.residual_w == pytest.approx(0.05, rel=0.3)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (windows(2.0, 1.5)[:5], "5 windows of telemetry are too few"),
        ([replace(w, busy_cores=w.busy_cores * 0.1) for w in windows(2.0, 1.5)], "from 0.00 to 0.10 busy cores only"),
        (windows(2.0, 0.0, 0.05), "check that the sensor is in"),
        (windows(2.0, -1.0), "check that the sensor is in"),
        (windows(-2.0, 1.5), "check the sensor's scale"),
    ],
)
def test_what_is_no_model_is_refused_with_the_next_step(made, says):
    with pytest.raises(CalibrateError, match=says):
        power_fit.fit(made)


def message(number: int, uptime_s: float, energy_j: float | None, busy_s: float, gap_s: float = 0.0):
    values = {"uptime_s": uptime_s, "energy_j": energy_j, "cpu_busy_s": busy_s, "energy_gap_s": gap_s}
    samples = [
        wire.Sample(name, value, "", "missing" if value is None else "ok", "measured", "board", uptime_s)
        for name, value in values.items()
    ]
    return reading(wire.Telemetry("n1", 1, number, uptime_s, tuple(samples), 1, number))


def test_a_window_is_a_difference_of_counters():
    first = message(1, 10.0, 100.0, 5.0)
    assert power_fit.window(0.5, first, message(2, 12.0, 109.0, 6.0)) == Window(0.5, 2.0, 0.5, 4.5)
    assert power_fit.window(0.5, first, message(2, 12.0, 109.0, 6.0, gap_s=1.0)) is None
    assert power_fit.window(0.5, first, message(2, 12.0, None, 6.0)) is None
    assert power_fit.window(0.5, first, message(2, 12.0, 109.0, 4.0)) is None


def run_board(board: SimulatedBoard, seconds: float, each, step_s: float = 0.05) -> None:
    for _ in range(round(seconds / step_s)):
        board.advance(step_s)
        each()


def test_a_like_board_without_a_meter_is_estimated_within_two_percent(tmp_path):
    """Fitted through the INA226's steps and noise and the kernel's ticks; then bursts that the fit has not seen."""
    level_s, duties = 5.0, (0.0, 0.25, 0.125, 0.1875, 0.0625, 0.0)
    board = simulated(tmp_path / "metered", [(i * level_s, duty) for i, duty in enumerate(duties)])
    found, cpu = sensors.find(tmp_path / "metered"), power_model.CpuTime(tmp_path / "metered")
    meter, readings = energy.EnergyMeter(found, 10), []
    run_board(
        board,
        level_s * len(duties),
        lambda: (
            meter.take(board.state.time_s, [sensors.read(found.total[0]).value]),
            readings.append((board.state.time_s, meter._division.split.total_j, cpu.busy_s())),
        ),
    )
    made = []
    for (t0, e0, b0), (t1, e1, b1) in zip(readings[::20], readings[20::20]):
        made.append(Window(0.0, t1 - t0, (b1 - b0) / (t1 - t0), (e1 - e0) / (t1 - t0)))
    fitted = power_fit.fit(made)
    print(
        f"\nfit {fitted.idle_w:.4f} W of {IDLE_W}, {fitted.w_per_busy_core:.4f} W a core of {CORE_W}, rms {fitted.residual_w:.4f}"
    )
    assert fitted.idle_w == pytest.approx(IDLE_W, rel=0.01)
    assert fitted.w_per_busy_core == pytest.approx(CORE_W, rel=0.03)
    result = power_fit.tree(Options("n1"), PROFILE, fitted, made, "simulated", [])
    model = config.parse(toml(BASE) + power_fit.fragment(result), Path()).power_model
    assert model.idle_w == pytest.approx(fitted.idle_w, abs=1e-5)
    assert model.w_per_busy_core == pytest.approx(fitted.w_per_busy_core, abs=1e-5)

    def error(root: Path, model: PowerModelConfig, cap: float = 1.0) -> float:
        """Percent of the noiseless truth over 60 s of bursts."""
        rng = np.random.default_rng(5)
        starts = np.concatenate([[0.0], np.cumsum(rng.uniform(0.005, 0.5, 400))])
        root.mkdir()
        (root / "cap").write_text(f"{cap}\n")
        loads = [(float(t), float(rng.uniform(0, 1)) if i % 2 else 0.0) for i, t in enumerate(starts)]
        bare = simulated(root / "sysroot", loads, NO_METER, cap_file=root / "cap")
        assert not sensors.find(root / "sysroot").total
        cpu = power_model.CpuTime(root / "sysroot")
        estimate = power_model.Estimate(model, cpu, lambda: bare.state.time_s)
        start_j = estimate.ask()[0]
        run_board(bare, 60.0, estimate.ask, 0.25)
        return 100 * ((estimate.ask()[0] - start_j) / bare.state.energy_j - 1)

    errors = {
        "fitted": error(tmp_path / "a", model),
        "half a core's watts": error(tmp_path / "b", replace(model, w_per_busy_core=model.w_per_busy_core / 2)),
        "throttled to 0.4": error(tmp_path / "c", model, 0.4),
    }
    print("errors in percent:", {name: round(value, 2) for name, value in errors.items()})
    assert abs(errors["fitted"]) < 2.0
    assert errors["half a core's watts"] < -5.0  # control: the right form with a wrong number fails
    assert errors["throttled to 0.4"] > 5.0  # the limit that power_model.py states: clocks are not in the model


# ---------------------------------------------------------------- the command line


def test_bad_use_is_one_line_with_the_next_step(capsys):
    for arguments, says in (
        (("n1", "--power-model", "--level-s", "1"), "level_s is 1.0: give a number from 3"),
        (("n1", "--power-model", "--broker", "127.0.0.1:9"), "no MQTT 5 broker answers at 127.0.0.1:9"),
    ):
        code = cli.main(["calibrate", *arguments])
        captured = capsys.readouterr()
        assert code in (1, 2) and says in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert "burn at the duties 0, 1, 0.5, 0.75, 0.25, 0, for 20 s each" in calibrate_power.plan(Options("n1"))[1]


# ---------------------------------------------------------------- end to end


class TruthOf:
    """A simulated board's noiseless joules over the machine's monotonic clock, from its truth file."""

    def __init__(self, path: Path):
        self._path, self._stop, self.points = path, threading.Event(), []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.03):
            tree = json.loads(self._path.read_text())
            self.points.append((tree["monotonic_s"], tree["energy_j"]))

    def __enter__(self) -> TruthOf:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def between_j(self, start_s: float, end_s: float) -> float:
        times, joules = zip(*self.points)
        assert times[0] <= start_s < end_s <= times[-1] + 0.2
        return float(np.diff(np.interp([start_s, end_s], times, joules))[0])


def until(condition, limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.broker
def test_from_the_calibration_of_one_board_to_the_ledger_of_another(tmp_path):
    """Stock agents on two boards alike, whose watts follow the agents' own CPU time; one core is full load, so 5 W for it. The
    second has no meter and is given the first one's table."""
    boards = []
    for node, faults in (("metered", []), ("bare", NO_METER)):
        home = tmp_path / node
        home.mkdir()
        board = {"node": node, "profile": PROFILE, "cores": 1.0, "faults": faults, "sysroot": str(home / "sysroot")}
        boards.append(board | {"pid_file": str(home / "pid"), "state_file": str(home / "truth.json")})
    (tmp_path / "spec.json").write_text(json.dumps({"boards": boards}))

    def agent(node: str, **more) -> AgentProcess:
        tables = agent_tables(tmp_path / node, "tcp://127.0.0.1:9", broker=broker) | more
        tables["node"] |= {"id": node, "sysroot": str(tmp_path / node / "sysroot")}
        tables["telemetry"] = {"period_s": 0.3}
        return AgentProcess(tmp_path / node, tables)

    def began(node: str, running: AgentProcess) -> None:
        (tmp_path / node / "pid").write_text(str(running.process.pid))

    simulator = subprocess.Popen(
        [sys.executable, "-m", "firmware_sim.run", "--spec", str(tmp_path / "spec.json")], cwd=ROOT
    )
    try:
        until(lambda: all((tmp_path / node / "truth.json").exists() for node in ("metered", "bare")))
        with Broker(tmp_path) as broker:
            with agent("metered") as running:
                began("metered", running)
                options = Options("metered", "test", 4.0, (0.0, 0.8, 0.4, 0.0))
                result = calibrate_power.calibrate(options, broker.host, broker.port)
            print(json.dumps(result["power_model"]), result["cautions"])
            assert result["provenance"] == {"power_w": "simulated"} and result["cautions"] == []
            assert result["power_model"]["idle_w"] == pytest.approx(IDLE_W, rel=0.05)
            assert result["power_model"]["w_per_busy_core"] == pytest.approx(5.0, rel=0.1)
            table = tomllib.loads(power_fit.fragment(result))["power_model"]
            assert "metered" in table["from"] and table["idle_w"] == result["power_model"]["idle_w"]
            with agent("bare", power_model=table) as running, Control("test", broker.host, broker.port) as control:
                began("bare", running)
                with TruthOf(tmp_path / "bare" / "truth.json") as truth:
                    until(lambda: not control.wait_for(["bare"], 1.0))
                    ledger.wait_for_baselines(control, ["bare"])
                    time.sleep(0.5)
                    before = ledger.take(control, ["bare"])
                    start_s, busy = time.monotonic(), control.snapshot()["bare"].value("cpu_busy_s")
                    assert control.command("bare", "burn", arguments={"seconds": "2", "duty": "0.8"}).ok
                    time.sleep(3.0)
                    after = ledger.take(control, ["bare"])
                    end_s, busy = time.monotonic(), control.snapshot()["bare"].value("cpu_busy_s") - busy
                    time.sleep(0.3)
                found = ledger.of(["bare"], before, after)
                spent, truth_j = found.nodes["bare"], truth.between_j(start_s, end_s)
                print(f"estimated {spent.joules.total:.2f} J of {truth_j:.2f}, divided {spent.joules.tree()}")
                assert (spent.provenance, spent.scope, found.unknown) == ("estimated", "board", {})
                assert spent.joules.total == pytest.approx(truth_j, rel=0.05)
                # control: half of a core's watts is farther off by more than twice, however little this machine let it compute
                wrong_j = table["idle_w"] * (end_s - start_s) + table["w_per_busy_core"] / 2 * busy
                assert abs(wrong_j - truth_j) > 2 * abs(spent.joules.total - truth_j)
                # by hand: what is not idling at 3 W was the burn
                assert spent.joules.parts[0] == pytest.approx(truth_j - IDLE_W * (end_s - start_s), rel=0.25)
                # a model cannot be fitted to a model
                with pytest.raises(CalibrateError, match="its joules are a model's already"):
                    calibrate_power.calibrate(replace(options, node="bare"), broker.host, broker.port)
                running.kill()
                gone = ledger.of(["bare"], before, ledger.take(control, ["bare"]))
                assert gone.total is None and "after the request: no answer" in gone.unknown["bare"]
                running.restart()
                until(lambda: not control.wait_for(["bare"], 1.0))
                again = ledger.of(["bare"], before, ledger.take(control, ["bare"]))
                assert again.unknown == {"bare": "its agent started again during the request"}
    finally:
        simulator.terminate()
        simulator.wait(10)
