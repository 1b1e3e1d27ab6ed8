"""Sensors from files written by the kernel's documentation (not by our simulator), and joules from them.

Sources: Documentation/hwmon/{ina3221,ina2xx,sysfs-interface}.rst, Documentation/ABI/testing/sysfs-class-thermal (temp in
m°C), Documentation/power/powercap/powercap.rst (energy_uj, max_energy_range_uj in µJ). Labels of the boards: NVIDIA's Jetson
Linux developer guide, "Power monitor" tables.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from node_agent import cli, energy, sensors, sensors_table, sensors_tree, telemetry
from node_agent.counters import Counters

REPOSITORY = Path(__file__).resolve().parent.parent


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


def orin_nano_power(root: Path) -> None:
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


def orin_nano(root: Path) -> None:
    orin_nano_power(root)
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
    assert [s.name for s in found.sensors] == ["power_w.ppt", "flag.under_voltage_alarm"] and found.total == ()
    assert found.total_scope == ""


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


def test_provenance_is_simulated_below_any_other_root(tmp_path, monkeypatch):
    orin_nano(tmp_path)
    assert {sample.provenance for sample in read_all(tmp_path).values()} == {"simulated"}
    # the same files as if they were this machine's: powers are products, so derived; temperatures are measured
    monkeypatch.setattr(sensors_tree, "is_simulated", lambda sysroot: False)
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


def test_rapl_without_its_range_or_counter_is_left_out_with_its_reason(tmp_path):
    folder = rapl(tmp_path, 1)
    (folder / "max_energy_range_uj").write_text("0\n")
    found = sensors.find(tmp_path)
    assert found.total == () and any("wrap would go unseen" in item.reason for item in found.left_out)
    (folder / "energy_uj").unlink()
    found = sensors.find(tmp_path)
    assert found.total == () and any("no such file" in item.reason for item in found.left_out)


LIBC = ctypes.CDLL(None, use_errno=True)


def without_roots_rights() -> None:
    """In a child before exec: modes count also where the tests run as root (prctl PR_CAPBSET_DROP of CAP_DAC_OVERRIDE and
    CAP_DAC_READ_SEARCH, capabilities(7))."""
    if os.geteuid() == 0 and any(LIBC.prctl(24, capability, 0, 0, 0) for capability in (1, 2)):
        os._exit(77)


def as_a_user(root: Path) -> dict:
    """`node-agent sensors --json` without the right to read everything."""
    done = subprocess.run(
        [sys.executable, "-m", "node_agent.cli", "sensors", "--json", "--sysroot", str(root)],
        preexec_fn=without_roots_rights,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 77:
        pytest.skip("root's rights cannot be given up here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_permission_denied_is_told_and_the_rest_is_read(tmp_path):
    """energy_uj is root's alone since Linux 5.10 (CVE-2020-8694): here mode 000, so that its owner may not read it either."""
    root = tmp_path
    (rapl(root, 5) / "energy_uj").chmod(0)
    (zone(root, 0, "cpu-thermal", 40000) / "temp").chmod(0)
    zone(root, 1, "gpu-thermal", 41000)
    orin_nano_power(root)
    (root / "sys/class/hwmon/hwmon3/curr1_input").chmod(0)  # of VDD_IN
    tree = as_a_user(root)
    reasons = {item["path"].rpartition("sys/class/")[2]: item["reason"] for item in tree["left_out"]}
    assert "5.10" in reasons["powercap/intel-rapl:0/energy_uj"]
    assert "permission denied" in reasons["thermal/thermal_zone0/temp"]
    assert "permission denied" in reasons["hwmon/hwmon3/in1_input"]
    names = {sensor["name"]: sensor["value"] for sensor in tree["sensors"]}
    assert names["temp_c.gpu_thermal"] == 41.0 and "temp_c.cpu_thermal" not in names
    # its parts are still there, and are not taken for the whole
    assert "power_w.vdd_soc" in names and tree["total"] == []


def test_agx_orin_with_a_rail_missing_has_no_total(tmp_path):
    """Three of four rails are less than the module; their sum would be a false number."""
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
        in3_enable=0,
    )
    hwmon(tmp_path, 1, "ina3221", in2_label="VDDQ_VDD2_1V8AO", in2_input=5000, curr2_input=100)
    found = sensors.find(tmp_path)
    assert len(found.sensors) == 3 and found.total == ()
    assert any("in3_enable" in item.reason for item in found.left_out)
    assert any("no total" in item.reason for item in found.left_out)


@pytest.mark.parametrize("power_file", [True, False])
def test_jetpack_4_nano(tmp_path, power_file):
    """NVIDIA Jetson Linux 32 guide, Jetson Nano: rails POM_5V_IN, POM_5V_GPU, POM_5V_CPU of 6-0040; mV, mA, mW."""
    folder = tmp_path / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    for n, (rail, volt, current) in enumerate(
        [("POM_5V_IN", 5120, 420), ("POM_5V_GPU", 5112, 39), ("POM_5V_CPU", 5112, 156)]
    ):
        write(folder, **{f"rail_name_{n}": rail, f"in_voltage{n}_input": volt, f"in_current{n}_input": current})
        if power_file:
            write(folder, **{f"in_power{n}_input": volt * current // 1000})
    found = sensors.find(tmp_path)
    assert [(s.name, s.scope) for s in found.total] == [("power_w.pom_5v_in", "module")]
    assert sensors.read(found.total[0]).value == pytest.approx(2.1504, abs=0.001)  # 5.12 V * 0.42 A
    assert len(found.sensors) == 3


def test_jetpack_4_agx_xavier_is_a_sum_over_two_devices_without_nc(tmp_path):
    """Jetson AGX Xavier: 1-0040 GPU, CPU, SOC; 1-0041 CV, VDDRQ, SYS5V. TX2's second monitor has channels without a rail."""
    base = tmp_path / "sys/bus/i2c/drivers/ina3221x"
    write(base / "1-0040/iio:device0", rail_name_0="GPU", in_power0_input=304)
    write(base / "1-0040/iio:device0", rail_name_1="CPU", in_power1_input=608)
    write(base / "1-0040/iio:device0", rail_name_2="SOC", in_power2_input=1216)
    write(base / "1-0041/iio:device1", rail_name_0="CV", in_power0_input=0)
    write(base / "1-0041/iio:device1", rail_name_1="VDDRQ", in_power1_input=152)
    write(base / "1-0041/iio:device1", rail_name_2="SYS5V", in_power2_input=1516)
    write(base / "1-0042/iio:device2", rail_name_0="NC", in_power0_input=7)
    found = sensors.find(tmp_path)
    assert sum(sensors.read(s).value for s in found.total) == pytest.approx(3.796)  # mW by hand
    assert "sum of its 6 rails" in found.total_scope and "without its carrier" in found.total_scope
    assert [item.reason for item in found.left_out] == ["labelled NC: not connected"]


def test_ina3221_by_its_driver_is_the_same_device_as_by_its_class(tmp_path):
    """The paths of NVIDIA's guide alone, then with the class's link to the same device: one sensor each."""
    device = tmp_path / "sys/devices/platform/c240000.i2c/i2c-1/1-0040"
    write(device / "hwmon/hwmon3", name="ina3221", in1_label="VDD_IN", in1_input=5000, curr1_input=1000)
    driver = tmp_path / "sys/bus/i2c/drivers/ina3221"
    driver.mkdir(parents=True)
    (driver / "1-0040").symlink_to("../../../../devices/platform/c240000.i2c/i2c-1/1-0040")
    for _ in range(2):
        found = sensors.find(tmp_path)
        assert [s.name for s in found.sensors] == ["power_w.vdd_in"]
        assert sensors.read(found.total[0]).value == 5.0
        (tmp_path / "sys/class/hwmon").mkdir(parents=True, exist_ok=True)
        link = tmp_path / "sys/class/hwmon/hwmon3"
        link.exists() or link.symlink_to("../../devices/platform/c240000.i2c/i2c-1/1-0040/hwmon/hwmon3")


def test_a_link_out_of_the_sysroot_is_not_followed(tmp_path):
    """A simulated board whose links are absolute would show this machine's sensors as its own."""
    outside = zone(tmp_path / "machine", 0, "cpu-thermal", 40000)
    (tmp_path / "board/sys/class/thermal").mkdir(parents=True)
    (tmp_path / "board/sys/class/thermal/thermal_zone0").symlink_to(outside)
    folder = zone(tmp_path / "board", 1, "soc-thermal", 30000)
    (folder / "temp").unlink()
    (folder / "temp").symlink_to(outside / "temp")  # the kernel's attributes are no links
    found = sensors.find(tmp_path / "board")
    assert [sensors.read(s).validity for s in found.sensors] == ["missing"]
    assert [item.reason for item in found.left_out] == ["a link that leads out of the sysroot"]


def test_negative_current_is_a_negative_power(tmp_path):
    """A battery that is charged through its meter: currents are signed in the kernel's documentation."""
    hwmon(tmp_path, 0, "ina219", in1_input=8200, curr1_input=-500)
    (sensor,) = sensors.find(tmp_path).total
    assert sensors.read(sensor).value == pytest.approx(-4.1)


def test_several_meters_are_no_total_until_one_is_labelled(tmp_path):
    hwmon(tmp_path, 0, "ina226", power1_input=5_000_000)
    hwmon(tmp_path, 1, "ina226", power1_input=1_000_000)
    found = sensors.find(tmp_path)
    assert [s.name for s in found.sensors] == ["power_w.ina226", "power_w.ina226_2"] and found.total == ()
    assert any("2 meters" in item.reason for item in found.left_out)
    # An INA3221 as an external meter of three loads: no channel is known to be the supply
    hwmon(tmp_path, 0, "ina3221", in1_input=5000, curr1_input=100, in2_input=5000, curr2_input=200)
    (tmp_path / "sys/class/hwmon/hwmon0/power1_input").unlink()
    (tmp_path / "sys/class/hwmon/hwmon1/name").write_text("amdgpu\n")
    found = sensors.find(tmp_path)
    assert found.total == () and any("label that one VDD_IN" in item.reason for item in found.left_out)
    write(tmp_path / "sys/class/hwmon/hwmon0", in2_label="VDD_IN")
    assert [sensors.read(s).value for s in sensors.find(tmp_path).total] == [pytest.approx(1.0)]


def test_rate_is_what_the_driver_says(tmp_path):
    """ina3221.rst: update_interval is the whole conversion time in ms; 3 channels x 2 x 1.1 ms x 16 samples = 105.6 ms."""
    folder = hwmon(tmp_path, 0, "ina3221", in1_label="VDD_IN", in1_input=5000, curr1_input=1000, samples=16)
    write(folder, update_interval=106)
    (sensor,) = sensors.find(tmp_path).sensors
    assert sensor.rate_hz == pytest.approx(9.434, abs=0.001)
    write(folder, update_interval=0)  # under half a millisecond, rounded
    assert sensors.find(tmp_path).sensors[0].rate_hz is None
    write(folder, update_interval=50000, samples=1024)  # the driver waits for new data in each read
    found = sensors.find(tmp_path)
    assert found.sensors == () and "lower `samples`" in found.left_out[0].reason


def test_a_pc(tmp_path):
    """coretemp.rst, k10temp.rst, sysfs-class-thermal: packages and Tdie, not every core, not Tctl, not the disk."""
    zone(tmp_path, 0, "acpitz", 27800)
    zone(tmp_path, 3, "x86_pkg_temp", 51000)
    hwmon(tmp_path, 0, "acpitz", temp1_input=27800)
    write(tmp_path / "sys/class/hwmon/hwmon1", name="coretemp")
    for n, (label, temp) in enumerate([("Package id 0", 52000), ("Core 0", 50000), ("Core 1", 51000)], start=1):
        write(tmp_path / "sys/class/hwmon/hwmon1", **{f"temp{n}_label": label, f"temp{n}_input": temp})
    hwmon(tmp_path, 2, "k10temp", temp1_label="Tctl", temp1_input=77000, temp2_label="Tdie", temp2_input=50000)
    hwmon(tmp_path, 4, "nvme", temp1_label="Composite", temp1_input=60000)
    got = {name: sample.value for name, sample in read_all(tmp_path).items()}
    assert got == {
        "temp_c.acpitz": 27.8,
        "temp_c.x86_pkg_temp": 51.0,
        "temp_c.package_id_0": 52.0,
        "temp_c.tdie": 50.0,
    }
    reasons = " ".join(item.reason for item in sensors.find(tmp_path).left_out)
    assert all(word in reasons for word in ("acpitz once more", "2 single cores", "Tctl", "another part (nvme)"))


def test_trip_points(tmp_path):
    """sysfs-class-thermal: trip_point_N_temp in m°C, trip_point_N_type one of critical, hot, passive, active."""
    folder = zone(tmp_path, 7, "tj-thermal", 40000)
    write(folder, trip_point_0_temp=104500, trip_point_0_type="critical")
    write(folder, trip_point_1_temp=97000, trip_point_1_type="passive", trip_point_1_hyst=0)
    write(folder, trip_point_2_temp=-274000, trip_point_2_type="hot")  # THERMAL_TEMP_INVALID: not set
    write(folder, trip_point_3_temp=0, trip_point_3_type="passive")
    write(folder, trip_point_4_temp=50000, trip_point_4_type="nonsense")
    write(folder, trip_point_5_temp="x" * 9, trip_point_5_type="active")
    write(zone(tmp_path, 1, "PMIC-Die", 100000), trip_point_0_temp=60000, trip_point_0_type="passive")
    points = sensors.trip_points(tmp_path)
    assert [(p.zone, p.kind, p.temp_c) for p in points] == [
        ("tj-thermal", "passive", 97.0),
        ("tj-thermal", "critical", 104.5),
    ]
    assert sensors.trip_points(tmp_path / "nothing") == ()


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
    zone(tmp_path, 20, "PMIC-Die" + "x" * 300, 100000)
    assert cli.main(["sensors", "--sysroot", str(tmp_path), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["total"] == ["power_w.vdd_in"] and len(tree["sensors"]) == 7
    assert tree["total_scope"] == "the module, without its carrier board"
    keys = {"name", "value", "unit", "scope", "provenance", "validity", "rate_hz", "reason", "generated_at"}
    assert all(keys <= set(sensor) for sensor in tree["sensors"])
    vdd_in = next(sensor for sensor in tree["sensors"] if sensor["name"] == "power_w.vdd_in")
    assert (vdd_in["rate_hz"], vdd_in["rate_source"]) == (500.0, "driver")  # update_interval 2 ms
    assert all(set(item) == {"path", "reason"} for item in tree["left_out"])
    assert cli.main(["sensors", "--sysroot", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "temp_c.tj_thermal" in text and "left out:" in text and "-256 degC is no possible value" in text
    assert max(map(len, text.splitlines())) <= 100


def test_table_stays_within_100_columns_for_the_longest_names(tmp_path, capsys):
    hwmon(tmp_path, 0, "ina3221", in1_label="W" * 500, in1_input=26000, curr1_input=-163800, in2_label="\x1b[31mred")
    write(tmp_path / "sys/class/hwmon/hwmon0", in2_input=1, curr2_input=1)
    zone(tmp_path, 123456789, "z" * 4000, 1)
    assert cli.main(["sensors", "--sysroot", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100 and "\x1b" not in text
    assert "-4258.800" in text  # 26 V * -163.8 A


def test_a_machine_without_sensors_says_so_and_a_missing_sysroot_is_an_error(tmp_path, capsys):
    assert cli.main(["sensors", "--sysroot", str(tmp_path)]) == 0
    assert "no sensors below" in capsys.readouterr().out
    assert cli.main(["sensors", "--sysroot", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"sensors": [], "total": [], "total_scope": "", "left_out": []}
    assert cli.main(["sensors", "--sysroot", str(tmp_path / "none")]) == 2
    got = capsys.readouterr()
    assert got.out == "" and got.err.count("\n") == 1 and "is no folder" in got.err


def test_rate_by_a_burst_is_seen_only_where_values_change(tmp_path):
    """Asked for with --rate: something new 40 times a second is seen at that rate or less; what never changes has none."""
    new = sensors.Sensor("x", "W", "rail", "measured", (), 1.0, (0, 1e9), ask=lambda: (time.monotonic() * 40 // 1, 0.0))
    assert 5 < sensors.measured_rate_hz(new, 0.5) <= 42
    zone(tmp_path, 1, "stays", 1000)
    (stays,) = sensors.find(tmp_path).sensors
    assert sensors.measured_rate_hz(stays, 0.05) is None


def test_this_machine_or_another_given_one():
    """With SPACEMOE_TEST_SYSROOT=/ on a board: what is claimed reads, is named once, and is within what the unit can be."""
    sysroot = os.environ.get("SPACEMOE_TEST_SYSROOT")
    if not sysroot:
        pytest.skip("SPACEMOE_TEST_SYSROOT is not set")
    found = sensors.find(Path(sysroot))
    names = [sensor.name for sensor in found.sensors]
    assert len(set(names)) == len(names)
    for sensor in found.sensors:
        sample = sensors.read(sensor)
        assert (sample.value is None) == (sample.validity in ("missing", "invalid"))
        if sample.value is not None:
            assert sensor.limits[0] <= sample.value <= sensor.limits[1]
    assert {s.provenance == "simulated" for s in found.sensors} <= {sensors.is_simulated(Path(sysroot))}
    assert len({s.scope for s in found.total}) <= 1
    assert all(0 < point.temp_c <= 200 for point in sensors.trip_points(Path(sysroot)))


def test_whatever_the_files_say_nothing_is_raised_and_nothing_is_made_up(tmp_path):
    """A tree with every kind of sensor, of which some files are rubbish, gone, folders or links to themselves."""
    chance = random.Random(5)
    words = [
        b"",
        b"\xff\x00\x1b[2J",
        b"-",
        b"9" * 30,
        b"1e9",
        b"NC",
        b"ina3221",
        b"package-9",
        b"7",
        b"-7",
        bytes(5000),
    ]
    for number in range(30):
        root = tmp_path / str(number)
        orin_nano(root)
        rapl(root, 5)
        hwmon(root, 9, "coretemp", temp1_label="Package id 0", temp1_input=5, temp2_label="Core 0", temp2_input=5)
        write(root / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0", rail_name_0="POM_5V_IN", in_power0_input=5)
        hwmon(root, 4, "rpi_volt", in0_lcrit_alarm=0)
        for path in sorted(root.rglob("*")):
            if path.is_file() and chance.random() < 0.3:
                kind = chance.randrange(5)
                path.unlink()
                if kind < 3:
                    path.write_bytes(chance.choice(words))
                elif kind == 3:
                    path.mkdir()
                elif chance.random() < 0.5:
                    path.symlink_to(path.name)
        found = sensors.find(root)
        rows = sensors_table.rows(found)
        for row in rows:
            value, validity = row.sample.value, row.sample.validity
            assert (value is None) == (validity in ("missing", "invalid")) == (row.reason is not None)
            assert value is None or math.isfinite(value)
        assert max(map(len, sensors_table.as_table(found, rows, root).splitlines())) <= 100
        json.dumps(sensors_table.as_tree(found, rows), allow_nan=False)
        assert all(math.isfinite(point.temp_c) for point in sensors.trip_points(root))
        assert set(sensors.flags(found).values()) <= {True, False}
