"""Sensors from files written by the kernel's documentation (not by our simulator), and joules from them.

Sources: Documentation/hwmon/{ina3221,ina2xx,sysfs-interface}.rst, Documentation/ABI/testing/sysfs-class-thermal (temp in
m°C), Documentation/power/powercap/powercap.rst (energy_uj, max_energy_range_uj in µJ). Labels of the boards: NVIDIA's Jetson
Linux developer guide, "Power monitor" tables.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from node_agent import cli, energy, sensors, telemetry
from node_agent.counters import Counters


def write(folder: Path, **attributes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in attributes.items():
        (folder / name).write_text(f"{value}\n")
    return folder


def zone(root: Path, number: int, kind: str, temp: object) -> Path:
    return write(
        root / f"sys/class/thermal/thermal_zone{number}", type=kind, temp=temp, mode="enabled", policy="step_wise"
    )


def hwmon(root: Path, number: int, name: str, **attributes: object) -> Path:
    return write(root / f"sys/class/hwmon/hwmon{number}", name=name, update_interval=2, **attributes)


def orin_nano(root: Path) -> None:
    """JetPack 6: ina3221 at 1-0040 with the module's total on channel 1; in4..6 and in7 are shunt voltages in µV."""
    hwmon(
        root,
        3,
        "ina3221",
        in1_label="VDD_IN",
        in1_input=4936,
        curr1_input=1232,
        in2_label="VDD_CPU_GPU_CV",
        in2_input=4928,
        curr2_input=320,
        in3_label="VDD_SOC",
        in3_input=4920,
        curr3_input=288,
        in4_input=6160,
        in5_input=1600,
        in6_input=1440,
        in7_label="sum of shunt voltages",
        in7_input=9200,
        curr4_input=1840,
        shunt1_resistor=5000,
    )
    zone(root, 0, "cpu-thermal", 48500)
    zone(root, 1, "gpu-thermal", -256000)
    zone(root, 2, "cv0-thermal", -256000)
    zone(root, 10, "tj-thermal", 48937)


def read_all(root: Path) -> dict[str, object]:
    return {sensor.name: sensors.read(sensor) for sensor in sensors.find(root).sensors}


def test_orin_nano(tmp_path):
    orin_nano(tmp_path)
    got = read_all(tmp_path)
    # by hand: 4936 mV * 1232 mA = 6.081152 W and so on; 48500 m°C = 48.5 °C
    assert got["power_w.vdd_in"].value == pytest.approx(6.081152)
    assert got["power_w.vdd_cpu_gpu_cv"].value == pytest.approx(1.57696)
    assert got["power_w.vdd_soc"].value == pytest.approx(1.41696)
    assert got["temp_c.cpu_thermal"].value == pytest.approx(48.5)
    assert got["temp_c.tj_thermal"].value == pytest.approx(48.937)
    for idle in ("temp_c.gpu_thermal", "temp_c.cv0_thermal"):
        assert (got[idle].value, got[idle].validity) == (None, "invalid")
    assert set(got) == {
        "power_w.vdd_in",
        "power_w.vdd_cpu_gpu_cv",
        "power_w.vdd_soc",
        "temp_c.cpu_thermal",
        "temp_c.gpu_thermal",
        "temp_c.cv0_thermal",
        "temp_c.tj_thermal",
    }
    found = sensors.find(tmp_path)
    assert [(s.name, s.scope) for s in found.total] == [("power_w.vdd_in", "module")]  # never added to its parts
    assert any("three channels" in item.reason for item in found.left_out)


def test_agx_orin_is_a_sum_of_rails_without_those_not_connected(tmp_path):
    hwmon(
        tmp_path,
        0,
        "ina3221",
        in1_label="VDD_GPU_SOC",
        in1_input=19000,
        curr1_input=200,
        in2_label="VDD_CPU_CV",
        in2_input=19000,
        curr2_input=100,
        in3_label="VIN_SYS_5V0",
        in3_input=5000,
        curr3_input=800,
    )
    hwmon(
        tmp_path,
        1,
        "ina3221",
        in1_label="NC",
        in1_input=0,
        curr1_input=0,
        in2_label="VDDQ_VDD2_1V8AO",
        in2_input=5000,
        curr2_input=100,
        in3_label="NC",
        in3_input=0,
        curr3_input=0,
    )
    found = sensors.find(tmp_path)
    assert sum(sensors.read(s).value for s in found.total) == pytest.approx(3.8 + 1.9 + 4.0 + 0.5)
    assert len(found.total) == 4 and not [s for s in found.sensors if "nc" in s.name.split(".")[1].split("_")]
    assert [item.reason for item in found.left_out] == ["labelled NC: not connected"] * 2


def test_ina226_in_the_supply_is_the_board_and_goes_before_the_module(tmp_path):
    hwmon(
        tmp_path, 0, "ina226", in0_input=10, in1_input=5100, curr1_input=980, power1_input=4997500, shunt_resistor=10000
    )
    found = sensors.find(tmp_path)
    assert [(s.name, s.scope) for s in found.total] == [("power_w.ina226", "board")]
    assert sensors.read(found.total[0]).value == pytest.approx(4.9975)  # µW; not 5.1 V * 0.98 A again
    orin_nano(tmp_path)
    found = sensors.find(tmp_path)
    assert [s.name for s in found.total] == ["power_w.ina226"]  # the module is part of the board


def test_other_devices_are_no_total(tmp_path):
    """A graphics card's power and the voltages of a Raspberry Pi are no board power."""
    hwmon(tmp_path, 0, "amdgpu", power1_input=20_000_000, power1_label="PPT")
    hwmon(tmp_path, 1, "rpi_volt", in0_lcrit_alarm=0)
    found = sensors.find(tmp_path)
    assert [s.name for s in found.sensors] == ["power_w.ppt"] and found.total == ()


def test_number_of_hwmon_and_zone_does_not_matter_and_names_are_unique(tmp_path):
    zone(tmp_path, 9, "cpu-thermal", 1000)
    zone(tmp_path, 10, "cpu-thermal", 2000)
    zone(tmp_path, 2, "cpu-thermal", 3000)
    got = read_all(tmp_path)
    assert {name: sample.value for name, sample in got.items()} == {
        "temp_c.cpu_thermal": 3.0,
        "temp_c.cpu_thermal_2": 1.0,
        "temp_c.cpu_thermal_3": 2.0,
    }


def test_pmic_zone_is_left_out_by_name(tmp_path):
    zone(tmp_path, 0, "PMIC-Die", 100000)
    zone(tmp_path, 1, "CPU-therm", 100000)  # another zone at 100 °C is hot, not broken
    found = sensors.find(tmp_path)
    assert [s.name for s in found.sensors] == ["temp_c.cpu_therm"]
    assert "PMIC" in found.left_out[0].reason


@pytest.mark.parametrize(
    "content, validity", [("", "invalid"), ("4x", "invalid"), ("999999", "invalid"), (None, "missing")]
)
def test_what_cannot_be_read_has_no_value(tmp_path, content, validity):
    path = zone(tmp_path, 0, "cpu-thermal", 40000) / "temp"
    (sensor,) = sensors.find(tmp_path).sensors
    assert sensors.read(sensor).value == 40.0
    path.write_text(content) if content is not None else path.unlink()
    sample = sensors.read(sensor)
    assert (sample.value, sample.validity) == (None, validity)


def test_a_hung_read_costs_its_limit_once_and_comes_back(tmp_path):
    """A FIFO without a writer hangs in open, as an offline zone's driver does."""
    folder = zone(tmp_path, 0, "hung", 1)
    zone(tmp_path, 1, "good", 30000)
    (folder / "temp").unlink()
    os.mkfifo(folder / "temp")
    reader = sensors.TimedReader(limit_s=0.2)
    hung, good = sensors.find(tmp_path).sensors
    threads = threading.active_count()
    for _ in range(20):
        assert sensors.read(hung, reader).validity == "missing"
        assert sensors.read(good, reader).value == 30.0
    assert threading.active_count() <= threads + 2  # one hangs, one serves: not one more for each try
    with open(folder / "temp", "w") as file:  # the driver returns
        file.write("55000\n")
    end = time.monotonic() + 10
    while reader._hung[folder / "temp"].done() is False and time.monotonic() < end:
        time.sleep(0.01)
    (folder / "temp").unlink()
    (folder / "temp").write_text("56000\n")
    assert sensors.read(hung, reader).value == 56.0


def test_provenance_is_simulated_below_any_other_root(tmp_path, monkeypatch):
    orin_nano(tmp_path)
    assert {sample.provenance for sample in read_all(tmp_path).values()} == {"simulated"}
    # the same files as if they were this machine's: powers are products, so derived; temperatures are measured
    monkeypatch.setattr(sensors, "is_simulated", lambda sysroot: False)
    got = read_all(tmp_path)
    assert got["power_w.vdd_in"].provenance == "derived" and got["temp_c.cpu_thermal"].provenance == "measured"


def test_is_simulated():
    assert not sensors.is_simulated(Path("/")) and not sensors.is_simulated(Path("/sys/.."))
    assert sensors.is_simulated(Path("/sys"))


def test_nothing_there_is_nothing_found(tmp_path):
    assert sensors.find(tmp_path) == sensors.Found((), ())
    assert sensors.find(tmp_path / "missing").total == ()


def rapl(root: Path, energy_uj: int) -> Path:
    write(root / "sys/class/powercap/intel-rapl:0:0", name="core", energy_uj=5, max_energy_range_uj=262143328850)
    return write(
        root / "sys/class/powercap/intel-rapl:0",
        name="package-0",
        energy_uj=energy_uj,
        max_energy_range_uj=262143328850,
    )


def test_rapl_counts_across_its_wrap(tmp_path):
    folder = rapl(tmp_path, 262143000000)
    found = sensors.find(tmp_path)
    assert [(s.name, s.unit) for s in found.total] == [("counter_j.package_0", "J")]  # core is part of package
    meter = energy.EnergyMeter(found, 10)
    meter.sample()
    (folder / "energy_uj").write_text("1671150\n")
    meter.sample()
    # by hand: 262143.328850 - 262143.000000 + 1.671150 = 2.0 J
    assert meter.snapshot().energy_j == pytest.approx(2.0)


def test_rapl_that_cannot_be_read_is_left_out_with_its_reason(tmp_path):
    (rapl(tmp_path, 1) / "energy_uj").unlink()
    found = sensors.find(tmp_path)
    assert found.total == () and "5.10" in found.left_out[0].reason


# ---------------------------------------------------------------- energy


def test_trapezoid_over_the_real_times():
    integral = energy.Integral()
    for time_s, power_w in ((10.0, 2.0), (10.5, 4.0), (10.6, 4.0), (11.6, 0.0)):
        integral.add(time_s, power_w)
    # by hand: 0.5*3 + 0.1*4 + 1.0*2
    assert integral.energy_j == pytest.approx(3.9) and integral.gap_s == 0


def test_a_gap_is_told_and_not_filled():
    integral = energy.Integral()
    for time_s, power_w in ((0.0, None), (1.0, 5.0), (1.5, None), (2.0, 5.0), (2.5, None), (8.0, 5.0), (9.0, 5.0)):
        integral.add(time_s, power_w)
    # 0-1 unknown; 1-2 bridged (one failed reading); 2-8 longer than the limit: unknown; 8-9 known
    assert integral.energy_j == pytest.approx(10.0) and integral.gap_s == pytest.approx(1.0 + 6.0)


def test_meter_integrates_a_sensor_that_changes(tmp_path):
    """A step from 2 W to 6 W: joules against the same integral over the times at which this test wrote the file."""
    folder = hwmon(tmp_path, 0, "ina226", power1_input=2_000_000)
    with energy.EnergyMeter(sensors.find(tmp_path), 200) as meter:
        end = time.monotonic() + 10
        while meter.snapshot().energy_j is None and time.monotonic() < end:
            time.sleep(0.002)
        start_j, start_s = meter.snapshot().energy_j, time.monotonic()
        time.sleep(0.5)
        step_s = time.monotonic()
        (folder / "new").write_text("6000000\n")
        os.replace(folder / "new", folder / "power1_input")
        time.sleep(0.5)
        state, end_s = meter.snapshot(), time.monotonic()
    want_j = 2.0 * (step_s - start_s) + 6.0 * (end_s - step_s)
    assert state.energy_j - start_j == pytest.approx(want_j, rel=0.15)
    assert state.provenance == "simulated" and state.scope == "board"
    assert 2.0 < state.power_w < 6.0  # a mean over the time since the last snapshot
    assert state.rate_hz > 10


def test_no_power_sensor_is_missing_and_not_zero(tmp_path):
    with energy.EnergyMeter(sensors.find(tmp_path), 100) as meter:
        state = meter.snapshot()
    got = {sample.name: sample for sample in energy.samples(state, 1.0)}
    assert (got["energy_j"].value, got["energy_j"].validity) == (None, "missing")
    assert (got["power_w"].value, got["power_w"].validity) == (None, "missing")
    assert got["energy_rate_hz"].value == 0.0


# ---------------------------------------------------------------- telemetry


def test_snapshot_takes_the_hottest_zone_and_counts(tmp_path):
    orin_nano(tmp_path)
    counters = Counters(requests=4, tokens=9)
    Counters.count(counters.link_errors, "deadline")
    probe = telemetry.ProcessProbe()
    first = probe.read()
    assert first.agent_cpu_percent is None  # no fake zero before there is a difference
    sum(i * i for i in range(2_000_000))
    second = probe.read()
    assert 0 < second.agent_cpu_percent and 0 <= second.machine_cpu_percent <= 100
    readings = tuple(sensors.read(s) for s in sensors.find(tmp_path).sensors)
    meter = energy.EnergyMeter(sensors.find(tmp_path), 10).snapshot()
    got = {s.name: s for s in telemetry.snapshot(readings, meter, second, counters, 3.0, True, 100.0)}
    assert (got["temp_c"].value, got["temp_c"].provenance) == (pytest.approx(48.937), "simulated")
    assert (got["tokens_served"].value, got["requests_served"].value) == (9, 4)
    assert got["errors.link.deadline"].value == 1
    assert got["agent_cpu_s"].provenance == "measured"  # the process is real, also on a simulated board


def test_no_temperature_is_missing():
    got = telemetry.hottest((), False, 5.0)
    assert (got.value, got.validity, got.provenance) == (None, "missing", "measured")


def test_sensors_command(tmp_path, capsys):
    orin_nano(tmp_path)
    assert cli.main(["sensors", "--sysroot", str(tmp_path), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["total"] == ["power_w.vdd_in"] and len(tree["sensors"]) == 7
    assert cli.main(["sensors", "--sysroot", str(tmp_path)]) == 0
    assert "temp_c.tj_thermal" in capsys.readouterr().out
