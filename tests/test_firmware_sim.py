"""Simulated boards: physics against hand calculation, files against the kernel's formats, the process against a real load.

Expected numbers are worked out in the comments or come from the INA226 / INA3221 data sheets and the kernel's documentation,
not from the code under test.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from firmware_sim.board import PROFILES, Branch, die_c, power_w, rail_w, step
from firmware_sim.run import Load, SpecError, read_spec
from firmware_sim.sysfs import SensorTree, ina226_files, ina3221_files, zone_files
from node_agent import sensors

PI, ORIN = PROFILES["raspberry-pi-5-ina226"], PROFILES["jetson-orin-nano"]
# PHYSICS: a 7 W step into (3 K/W, 8 s) and (12 K/W, 300 s), from a board that was off.
WORKED = replace(PI, idle_w=0.0, max_w=7.0, ambient_c=20.0, foster=(Branch(3.0, 8.0), Branch(12.0, 300.0)))


@pytest.mark.parametrize(
    ("seconds", "rise_k"),
    [
        # 21 (1 - e^-1) + 84 (1 - e^(-8/300)) = 13.2745 + 2.2104
        (8.0, 15.4849),
        # 21 (1 - e^-37.5) + 84 (1 - e^-1) = 21.0000 + 53.0981
        (300.0, 74.0981),
        # 21 + 84 (1 - e^-4) = 21 + 82.4615: the end of a 20 min step
        (1200.0, 103.4615),
    ],
)
@pytest.mark.parametrize("parts", [1, 10, 997])
def test_foster_step_is_exact_whatever_the_step(seconds, rise_k, parts):
    state = WORKED.equilibrium(0.0)
    for _ in range(parts):
        state = step(WORKED, state, 1.0, seconds / parts)
    assert die_c(WORKED, state) - 20.0 == pytest.approx(rise_k, abs=1e-4)


def test_foster_steady_state_and_cooling():
    hot = WORKED.equilibrium(7.0)
    assert die_c(WORKED, hot) == pytest.approx(20.0 + 7.0 * 15.0)
    assert die_c(WORKED, step(WORKED, hot, 1.0, 1e6)) == pytest.approx(125.0)
    # After one slow time constant without power: 84 / e, the fast branch is gone.
    assert die_c(WORKED, step(WORKED, hot, 0.0, 300.0)) == pytest.approx(20.0 + 84.0 / math.e, abs=1e-6)


def test_a_wrong_time_constant_is_noticed():
    """Negative control of the worked numbers above: 5 % in one tau moves them by far more than the tolerance."""
    wrong = replace(WORKED, foster=(Branch(3.0, 8.4), Branch(12.0, 300.0)))
    moved = die_c(wrong, step(wrong, wrong.equilibrium(0.0), 1.0, 8.0)) - 20.0
    assert abs(moved - 15.4849) > 0.3


def test_power_is_linear_in_the_load_and_clipped():
    assert [power_w(PI, u) for u in (-1.0, 0.0, 0.25, 1.0, 1.7)] == [3.0, 3.0, 4.25, 8.0, 8.0]


def test_bench_profile_matches_the_published_ground_fit():
    """arXiv 2401.03435's Pi 4B on the ground: T = 24.7 + 7.28 K/W P, rmse 0.7 K."""
    for watts in (3.2, 5.25):
        assert die_c(PI, PI.equilibrium(watts)) == pytest.approx(24.7 + 7.28 * watts, abs=0.01)
    assert 53 <= PI.foster[0].tau_s <= 126 and 366 <= PI.foster[1].tau_s <= 1382


def test_rails_are_parts_of_the_total():
    state = step(ORIN, ORIN.equilibrium(ORIN.idle_w), 0.6, 1.0)
    total, *parts = [rail_w(ORIN, rail, state) for rail in ORIN.rails]
    assert total == pytest.approx(state.power_w)
    assert 0 < sum(parts) < total


def test_ina226_gives_the_numbers_of_its_data_sheet():
    """SBOS547's example: 10 A through 2 mOhm at 11.98 V. Shunt 20 mV = 8000 steps, bus 9584 steps; the driver's calibration
    makes a current step 2.5 µV / 2 mOhm = 1.25 mA; power 8000 * 9584 / 20000 = 3833 steps of 25 * 1.25 mA = 119.78125 W."""
    assert ina226_files(119.8, 11.98, 2000) == {
        "name": "ina226",
        "shunt_resistor": "2000",
        "in0_input": "20",
        "in1_input": "11980",
        "curr1_input": "10000",
        "power1_input": "119781250",
    }


def test_ina226_with_a_tenth_of_an_ohm_clips_at_0_82_a():
    files = ina226_files(8.0, 5.1, 100_000)
    # 0x7FFF steps of 2.5 µV = 81.9 mV: 819 mA, though 8 W / 5.1 V = 1568.6 mA flow.
    assert files["curr1_input"] == "819"
    # With 10 mOhm a step is 0.25 mA: 6275 steps (of 6274.5) = 1568.75 mA.
    assert ina226_files(8.0, 5.1, 10_000)["curr1_input"] == "1569"


def test_ina3221_has_steps_of_8_mv_and_40_uv():
    # 10 W at 5 V: 2 A through 5 mOhm = 10 mV = 250 steps. 1.003 A: 5015 µV -> 125 steps = 5000 µV = 1000 mA.
    files = ina3221_files([("VDD_IN", 10.0, 5000), ("VDD_SOC", 5.015, 5000)], 5.0)
    assert files["in1_label"] == "VDD_IN" and files["in1_input"] == "5000"
    assert (files["curr1_input"], files["in4_input"]) == ("2000", "10000")
    assert (files["curr2_input"], files["in5_input"]) == ("1000", "5000")
    assert (files["in7_label"], files["in7_input"]) == ("sum of shunt voltages", "15000")
    assert "power1_input" not in files and "in3_label" not in files
    assert ina3221_files([], 3.3)["name"] == "ina3221"
    # 3.3 V is between 412 and 413 steps of 8 mV: 3296 or 3304.
    assert ina3221_files([("X", 0.0, 5000)], 3.3)["in1_input"] in ("3296", "3304")


def test_zone_is_in_millidegrees_and_in_the_sensors_steps():
    assert zone_files("cpu-thermal", 45.0, 550) == {"type": "cpu-thermal", "temp": "45100"}
    assert zone_files("tj-thermal", 45.0004, 1)["temp"] == "45000"


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda p: p.name)
def test_files_are_laid_out_as_the_kernel_lays_them_out(tmp_path, profile):
    SensorTree(tmp_path, profile).write(profile.equilibrium(5.0))
    meter = tmp_path / "sys/class/hwmon/hwmon1"
    assert meter.is_symlink() and (meter / "name").read_text() == profile.meter + "\n"
    driver = "ina3221" if profile.meter == "ina3221" else "ina2xx"
    # The path that a Jetson's documentation gives, and the numbers in it.
    assert list((tmp_path / "sys/bus/i2c/drivers" / driver).glob("1-004*/hwmon/hwmon*/curr1_input"))
    for zone in (tmp_path / "sys/class/thermal").iterdir():
        assert zone.name.startswith("thermal_zone") and (zone / "type").read_text().strip() in profile.zones
    for path in tmp_path.rglob("*_input"):
        assert path.read_bytes().rstrip(b"\n").isdigit() and path.read_bytes().endswith(b"\n")
    assert not list(tmp_path.rglob("*.partial"))
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    assert (moved / "sys/class/hwmon/hwmon1/name").exists()


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda p: p.name)
def test_a_stock_agent_reads_the_true_power_and_temperature_and_says_simulated(tmp_path, profile):
    state = profile.equilibrium(5.0)
    SensorTree(tmp_path, profile).write(state)
    found = sensors.find(tmp_path)
    assert len(found.total) == 1
    power = sensors.read(found.total[0])
    # Half a current step of 8 mA (Orin) at 5 V.
    assert power.value == pytest.approx(5.0, abs=0.021) and power.provenance == "simulated"
    temperatures = [sensors.read(sensor) for sensor in found.sensors if sensor.unit == "degC"]
    assert temperatures
    for sample in temperatures:
        assert sample.value == pytest.approx(die_c(profile, state), abs=profile.zone_step_mc / 2000 + 1e-3)
        assert (sample.validity, sample.provenance) == ("ok", "simulated")


def test_a_reader_never_sees_half_a_number(tmp_path):
    tree, stop, bad, read = SensorTree(tmp_path, PI), threading.Event(), [], 0
    states = [PI.equilibrium(watts) for watts in (0.5, 8.0)]
    tree.write(states[0])
    path = tmp_path / "sys/class/hwmon/hwmon1/power1_input"
    allowed = set()
    for state in states:
        tree.write(state)
        allowed.add(path.read_bytes())

    def write() -> None:
        while not stop.is_set():
            for state in states:
                tree.write(state)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(3000):
        content = path.read_bytes()
        read += 1
        if content not in allowed:
            bad.append(content)
    stop.set()
    writer.join()
    assert len(allowed) == 2 and read == 3000 and bad == []


# ---------------------------------------------------------------- the process


def spec_file(tmp_path: Path, **changes) -> Path:
    board = {
        "node": "sat-1",
        "profile": PI.name,
        "sysroot": str(tmp_path / "sysroot"),
        "pid_file": str(tmp_path / "agent.pid"),
    }
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"boards": [board | changes], "rate_hz": 20}))
    return path


BUSY = "while True: pass"


def test_load_is_the_cpu_time_of_the_process_in_the_pid_file(tmp_path):
    load = Load(tmp_path / "pid")
    assert load.busy_cores(1.0) == 0.0
    worker = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        (tmp_path / "pid").write_text(str(worker.pid))
        load.busy_cores(1.0)
        before = os.times()
        first = _cpu_s(worker.pid)
        while _cpu_s(worker.pid) - first < 0.3:
            time.sleep(0.02)
        # Whatever the machine gave the worker, over a second of it: 0.3 cores and what came between the readings.
        assert 0.28 <= load.busy_cores(1.0) <= 0.5 + os.times().elapsed - before.elapsed
    finally:
        worker.kill()
        worker.wait()
    assert load.busy_cores(1.0) == 0.0
    (tmp_path / "pid").write_text("not a number")
    assert load.busy_cores(1.0) == 0.0


def _cpu_s(pid: int) -> float:
    """utime + stime of /proc/PID/stat (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_power_follows_a_real_load_and_falls_back_when_the_agent_dies(tmp_path):
    simulator = subprocess.Popen(
        [sys.executable, "-m", "firmware_sim.run", "--spec", str(spec_file(tmp_path))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    power = tmp_path / "sysroot/sys/class/hwmon/hwmon1/power1_input"

    def watts() -> float:
        return int(power.read_text()) / 1e6 if power.exists() else math.nan

    worker = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        _until(lambda: watts() == pytest.approx(3.0, abs=0.01))
        (tmp_path / "agent.pid").write_text(str(worker.pid))
        # A board's core is a quarter of 5 W; the machine is shared, so any clear part of it will do.
        _until(lambda: watts() > 3.3)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        _until(lambda: watts() == pytest.approx(3.0, abs=0.01))
        simulator.send_signal(signal.SIGTERM)
        assert simulator.wait(10) == 0
    finally:
        for process in (worker, simulator):
            process.kill()
            process.wait()


def _until(condition) -> None:
    end = time.monotonic() + 15.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "pdp-11"}, "no profile 'pdp-11'; there are jetson-orin-nano, raspberry-pi-5-ina226"),
        ({"node": "Not An Id"}, "not legal"),
        ({"sysroot": "/"}, "this machine's own root"),
        ({"pid_file": 5}, "needs the texts"),
    ],
)
def test_a_bad_board_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(SpecError, match=message) as caught:
        read_spec(spec_file(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_bad_spec_is_refused_in_one_line(tmp_path):
    path = tmp_path / "spec.json"
    for text in ("{", "[]", '{"boards": []}', '{"boards": [{}], "rate_hz": 0}', "[" * 100_000, " " * 2_000_000):
        path.write_text(text)
        with pytest.raises(SpecError):
            read_spec(path)
    done = subprocess.run(
        [sys.executable, "-m", "firmware_sim.run", "--spec", str(tmp_path / "absent.json")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot read" in done.stderr
    board = json.loads(spec_file(tmp_path).read_text())["boards"][0]
    path.write_text(json.dumps({"boards": [board, board]}))
    with pytest.raises(SpecError, match="twice"):
        read_spec(path)
