"""Simulated boards: physics against hand calculation, files against the kernel's formats, the process against a real load.

Expected numbers are worked out in the comments or come from the INA226 / INA3221 data sheets and the kernel's documentation,
not from the code under test.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from firmware_sim import faults, videocore
from firmware_sim.board import Branch, die_c, power_w, rail_w, step
from firmware_sim.monitor import PowerHistory, fixed_files, ina226_files, ina3221_files, ina3221x_files, register_w
from firmware_sim.profiles import PROFILES
from firmware_sim.run import Cap, Load, SimulatedBoard
from firmware_sim.spec import BoardSpec, SpecError, Trace, read_spec
from firmware_sim.sysfs import SensorTree, temp_text, trip_files
from firmware_sim.throttle import plateau

PI, ORIN, AGX = (PROFILES[name] for name in ("raspberry-pi-5-ina226", "jetson-orin-nano", "jetson-agx-orin"))
PI5, PI4, NANO = (PROFILES[name] for name in ("raspberry-pi-5", "raspberry-pi-4-ina226", "jetson-nano"))
INA226 = PI.monitors[0]
# PHYSICS: a 7 W step into (3 K/W, 8 s) and (12 K/W, 300 s), from a board that was off.
WORKED = replace(
    PI, idle_w=0.0, max_w=7.0, ambient_c=20.0, foster=(Branch(3.0, 8.0), Branch(12.0, 300.0)), throttle=None
)


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
    total, *parts = [rail_w(ORIN, rail, state.power_w) for rail in ORIN.monitors[0].rails]
    assert total == pytest.approx(state.power_w)
    assert 0 < sum(parts) < total
    # An AGX Orin has no total: its rails are all there is.
    rails = [rail for monitor in AGX.monitors for rail in monitor.rails]
    assert sum(rail_w(AGX, rail, 31.0) for rail in rails) == pytest.approx(31.0)


# ---------------------------------------------------------------- throttling


def settled(profile, load, seconds=7200.0, cap=1.0):
    return step(profile, step(profile, profile.equilibrium(profile.idle_w), load, seconds, cap), load, 60.0, cap)


def test_a_throttled_board_settles_where_its_clock_and_its_heat_agree():
    """By hand: 40 C around, P = 3 + 5 c, c = 1 - 0.6 (T - 80) / 5, T = 40 + 7.28 P: T = 447.68 / 5.368 = 83.398 C, 5.961 W."""
    state = settled(replace(PI, ambient_c=40.0), 1.0)
    assert die_c(replace(PI, ambient_c=40.0), state) == pytest.approx(83.398, abs=0.01)
    assert state.power_w == pytest.approx(5.961, abs=0.01)
    assert state.throttled and videocore.throttled_text(state.flags) == "throttled=0xa000a"
    # The closed form of the plateau.
    watts, temp_c = plateau(8.0, 3.0, 40.0, 7.28, PI.throttle)
    assert (state.power_w, die_c(replace(PI, ambient_c=40.0), state)) == (pytest.approx(watts), pytest.approx(temp_c))


def test_a_cool_board_keeps_its_clock():
    state = settled(replace(PI, ambient_c=20.0), 1.0)
    # 20 + 7.28 * 8 = 78.24 C: under 80
    assert (state.power_w, state.clock, state.flags) == (8.0, 1.0, 0)


def test_beyond_the_hard_limit_the_clock_is_at_its_floor_and_the_flags_stay_after_it():
    hot = settled(replace(PI, ambient_c=60.0), 1.0)
    # 3 + 5 * 0.4 = 5 W; 60 + 36.4 = 96.4 C
    assert (hot.power_w, hot.clock) == (pytest.approx(5.0), 0.4)
    assert videocore.throttled_text(hot.flags) == "throttled=0xe000e"
    cold = step(replace(PI, ambient_c=0.0), hot, 0.0, 3600.0)
    assert not cold.throttled and videocore.throttled_text(cold.flags) == "throttled=0xe0000"


def test_a_cap_from_elsewhere_lowers_the_power_and_is_no_throttling():
    state = settled(replace(PI, ambient_c=20.0), 1.0, cap=0.5)
    assert (state.power_w, state.clock, state.throttled) == (5.5, 0.5, False)


def test_a_jetson_throttles_from_its_passive_trip_point_on():
    hot = replace(ORIN, ambient_c=70.0)
    state = settled(hot, 1.0)
    # P = 4.5 + 10.5 c, c = 1 - 0.7 (T - 95) / 4, T = 70 + 2.5 P: T = 70 + 2.5 (15 + 174.5625 - 1.8375 T) = 543.90625 / 5.59375
    assert die_c(hot, state) == pytest.approx(97.235, abs=0.02) and state.throttled


def test_energy_is_the_exact_integral_of_power():
    state = WORKED.equilibrium(0.0)
    for load, seconds in ((0.5, 2.0), (1.0, 0.001), (0.0, 7.0), (0.25, 4.0)):
        state = step(WORKED, state, load, seconds)
    # 3.5 * 2 + 7 * 0.001 + 0 + 1.75 * 4
    assert state.energy_j == pytest.approx(14.007) and state.time_s == pytest.approx(13.001)


# ---------------------------------------------------------------- power monitors


def test_new_data_come_as_often_as_the_data_sheets_say():
    # 4 averages x (588 + 588) us; one sample x three channels x (1.1 + 1.1) ms
    assert (INA226.period_s, ORIN.monitors[0].period_s) == (pytest.approx(4.704e-3), pytest.approx(6.6e-3))
    assert fixed_files(INA226)["update_interval"] == "5"
    orin = fixed_files(ORIN.monitors[0])
    assert (orin["update_interval"], orin["samples"]) == ("7", "1")
    # The limits' register after power-on is 163.8 mV: through 5 mOhm 32.76 A.
    assert (orin["curr1_max"], orin["curr1_crit"]) == ("32760", "32760")


def brute_force_w(power, start_us: int, samples: int, conversion_us: int) -> float:
    """Mean power over the shunt conversions, microsecond by microsecond."""
    at = [start_us + 2 * conversion_us * n + k for n in range(samples) for k in range(conversion_us)]
    return sum(power(us) for us in at) / len(at)


def test_the_register_holds_the_mean_over_the_shunt_conversions():
    def power(us: int) -> float:
        return 3.0 + 6.0 * (us // 700 % 3 == 1)

    history = PowerHistory(3.0)
    # Three and a bit rounds of 4704 us, in pieces of 700 us.
    for piece in range(21):
        history.add(700e-6, power(piece * 700))
    profile = replace(PI, idle_w=3.0, max_w=9.0)
    (got_w,) = register_w(INA226, profile, history)
    assert got_w == pytest.approx(brute_force_w(power, 2 * 4704, 4, 588), abs=1e-6)
    history.forget(2 * 4704e-6)
    assert register_w(INA226, profile, history) == (pytest.approx(got_w),)
    # The next round is not complete yet; the one before it was another.
    assert got_w != pytest.approx(brute_force_w(power, 1 * 4704, 4, 588), abs=0.05)


def test_a_load_in_step_with_the_conversions_is_read_wrong():
    """3 and 9 W in turn, 588 us each: all shunt conversions see one of them. The truth is 6 W: why 'measured' needs a rate."""
    for first_w, other_w in ((9.0, 3.0), (3.0, 9.0)):
        history = PowerHistory(3.0)
        for piece in range(40):
            history.add(588e-6, other_w if piece % 2 else first_w)
        assert register_w(INA226, replace(PI, idle_w=3.0, max_w=9.0), history) == (pytest.approx(first_w, abs=1e-6),)


def test_the_rails_of_an_ina3221_are_converted_one_after_the_other():
    history = PowerHistory(4.5)
    # One round: shunt and bus of channel 1, 2, 3, 1.1 ms each. Only during the shunt conversion of channel 2 is there a load.
    for slot in range(6):
        history.add(1.1e-3, 15.0 if slot == 2 else 4.5)
    total, cpu, soc = register_w(ORIN.monitors[0], ORIN, history)
    assert (total, soc) == (pytest.approx(4.5), pytest.approx(0.30 * 4.5))
    assert cpu == pytest.approx(0.15 * 4.5 + 0.65 * 10.5)


def test_ina226_gives_the_numbers_of_its_data_sheet():
    """SBOS547's example: 10 A through 2 mOhm at 11.98 V. Shunt 20 mV = 8000 steps, bus 9584 steps; the driver's calibration
    makes a current step 2.5 µV / 2 mOhm = 1.25 mA; power 8000 * 9584 / 20000 = 3833 steps of 25 * 1.25 mA = 119.78125 W."""
    assert ina226_files(119.8, 11.98, 2000) == {
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
    files = ina3221_files([(10.0, 5.0, 5000), (5.015, 5.0, 5000), (0.0, 0.0, 5000)])
    assert (files["in1_input"], files["curr1_input"], files["in4_input"]) == ("5000", "2000", "10000")
    assert (files["in2_input"], files["curr2_input"], files["in5_input"]) == ("5000", "1000", "5000")
    assert (files["in3_input"], files["curr3_input"], files["in6_input"]) == ("0", "0", "0")
    # in7 and, with equal shunts, curr4 are sums
    assert (files["in7_input"], files["curr4_input"]) == ("15000", "3000")
    assert "curr4_input" not in ina3221_files([(1.0, 5.0, 5000), (1.0, 5.0, 2000)])
    assert not [name for name in files if name.startswith("power")]
    # 3.3 V is between 412 and 413 steps of 8 mV: 3296 or 3304.
    assert ina3221_files([(0.0, 3.3, 5000)])["in1_input"] in ("3296", "3304")


def test_ina3221x_divides_as_nvidias_driver_does():
    """drivers/staging/iio/meter/ina3221.c of kernel 4.9: steps of 8 mV and 40 uV; mA = (2 uV / mOhm + 1) / 2 and
    mW = mV mA / 1000, both cut off."""
    # 2.15 W at 5.12 V: 419.92 mA, 2099.6 uV -> 52 steps, 2080 uV, 416 mA; 5120 mV x 416 mA = 2129.92 mW.
    # 0.3 W at 5.112 V: 58.69 mA, 293.4 uV -> 7 steps, 280 uV, 56 mA; 5112 x 56 = 286.27 mW.
    # -20 mA through 3 mOhm: -60 uV -> -2 steps (of -1.5, to even), -80 uV, (-53 - 1) / 2 = -27 mA; 5000 x -27 = -135 mW.
    files = ina3221x_files([(2.15, 5.12, 5000), (0.3, 5.112, 5000), (-0.1, 5.0, 3000)])
    volts, amps, watts = ([files[f"in_{what}{n}_input"] for n in range(3)] for what in ("voltage", "current", "power"))
    assert (volts, amps, watts) == (["5120", "5112", "5000"], ["416", "56", "-27"], ["2129", "286", "-135"])
    assert files["ui_input_0"] == "5120 416" and files["in_power0_trigger_input"] == "2129"
    # 163.8 mV through 5 mOhm is the most: 32760 mA
    assert ina3221x_files([(400.0, 5.0, 5000)])["in_current0_input"] == "32760"
    fixed = fixed_files(NANO.monitors[0])
    assert (fixed["name"], fixed["crit_current_limit_2"], fixed["crit_power_limit_0"]) == (
        "ina3221x",
        "32760 ma",
        "163800 mw",
    )


def test_a_jetson_nano_has_its_monitor_in_iio_and_the_zones_of_its_device_tree(tmp_path):
    """The path of every Nano owner's script; tegra210-p3448-0000-p3449-0000-b00."""
    tree_of(tmp_path, NANO, 4.0)
    iio = tmp_path / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    assert iio.resolve() == tmp_path / "sys/devices/50000000.host1x/546c0000.i2c/i2c-6/6-0040/iio:device0"
    assert iio.resolve() == (tmp_path / "sys/bus/iio/devices/iio:device0").resolve()
    assert [(iio / f"rail_name_{n}").read_text() for n in range(3)] == ["POM_5V_IN\n", "POM_5V_GPU\n", "POM_5V_CPU\n"]
    assert 3900 <= int((iio / "in_power0_input").read_text()) <= 4100 and not (tmp_path / "sys/class/hwmon").exists()
    kinds = [(tmp_path / f"sys/class/thermal/thermal_zone{n}/type").read_text().strip() for n in range(6)]
    assert kinds == ["AO-therm", "CPU-therm", "GPU-therm", "PLL-therm", "PMIC-Die", "thermal-fan-est"]
    zone = tmp_path / "sys/class/thermal/thermal_zone1"
    trips = [[(zone / f"trip_point_{n}_{what}").read_text().strip() for what in ("temp", "type")] for n in range(5)]
    assert trips == [
        ["66000", "active"],
        ["86000", "active"],
        ["102000", "critical"],
        ["100500", "hot"],
        ["97000", "passive"],
    ]
    assert (tmp_path / "sys/class/thermal/thermal_zone4/temp").read_text() == "100000\n"
    assert (tmp_path / "sys/class/thermal/thermal_zone0/trip_point_1_temp").read_text() == "-25000\n"


def test_temperatures_are_in_millidegrees_and_in_the_sensors_steps():
    assert (temp_text(45.0, 550), temp_text(45.0004, 1), temp_text(-256.0, 1)) == ("45100", "45000", "-256000")


def test_trip_points_are_those_of_the_device_trees():
    """bcm2712-rpi-5-b.dts: fan from 50, 60, 67.5 and 75 C, 5 K of hysteresis; tegra234-p3768: passive 95, hot 99 C."""
    pi = trip_files(PI5.zones[0])
    active = [int(pi[f"trip_point_{n}_temp"]) for n in range(5) if pi[f"trip_point_{n}_type"] == "active"]
    assert active == [50000, 60000, 67500, 75000] and pi["trip_point_1_hyst"] == "5000"
    orin = trip_files(ORIN.zones[0])
    passive = next(n for n in range(3) if orin[f"trip_point_{n}_type"] == "passive")
    assert (orin[f"trip_point_{passive}_temp"], orin[f"trip_point_{passive}_hyst"]) == ("95000", "2000")


def tree_of(root: Path, profile, watts: float = 5.0) -> SensorTree:
    tree = SensorTree(root, profile)
    tree.write(tree.truth(profile.equilibrium(watts)))
    return tree


def meters(root: Path) -> list[Path]:
    return sorted(p for p in (root / "sys/class/hwmon").iterdir() if (p / "name").read_text().startswith("ina"))


@pytest.mark.parametrize("profile", [p for p in PROFILES.values() if p is not NANO], ids=lambda p: p.name)
def test_files_are_laid_out_as_the_kernel_lays_them_out(tmp_path, profile):
    tree_of(tmp_path, profile)
    assert [(path / "name").read_text() for path in meters(tmp_path)] == [m.chip + "\n" for m in profile.monitors]
    assert all(path.is_symlink() for path in (tmp_path / "sys/class/hwmon").iterdir())
    for monitor in profile.monitors:
        driver = "ina3221" if monitor.chip == "ina3221" else "ina2xx"
        # The path that a Jetson's documentation gives, and the numbers in it.
        assert list((tmp_path / "sys/bus/i2c/drivers" / driver).glob(f"{monitor.address}/hwmon/hwmon*/curr1_input"))
    zones = {(zone / "type").read_text().strip() for zone in (tmp_path / "sys/class/thermal").iterdir()}
    assert zones == {zone.kind for zone in profile.zones}
    for path in tmp_path.rglob("*_input"):
        assert path.read_bytes().rstrip(b"\n").isdigit() and path.read_bytes().endswith(b"\n")
    assert not list(tmp_path.rglob("*.partial"))
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    assert (moved / "sys/class/hwmon/hwmon0/name").exists()


def test_an_agx_orin_has_two_monitors_and_channels_without_a_rail(tmp_path):
    tree_of(tmp_path, AGX)
    labels = [(path / f"in{n}_label").read_text().strip() for path in meters(tmp_path) for n in (1, 2, 3)]
    assert labels == ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "NC", "VDDQ_VDD2_1V8AO", "NC"]
    assert all((path / "in7_label").read_text() == "sum of shunt voltages\n" for path in meters(tmp_path))


def test_a_raspberry_pi_shows_its_zone_as_a_hwmon_too_and_its_supply_alarm(tmp_path):
    tree_of(tmp_path, PI4)
    by_name = {(p / "name").read_text().strip(): p for p in (tmp_path / "sys/class/hwmon").iterdir()}
    assert set(by_name) == {"cpu_thermal", "rpi_volt", "ina226"}
    assert (by_name["cpu_thermal"] / "temp1_input").read_text() == (
        tmp_path / "sys/class/thermal/thermal_zone0/temp"
    ).read_text()
    assert (by_name["rpi_volt"] / "in0_lcrit_alarm").read_text() == "0\n"
    assert not (tmp_path / "usr/bin/vcgencmd").is_symlink()


def vcgencmd(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([root / "usr/bin/vcgencmd", *arguments], capture_output=True, text=True, timeout=10)


def test_vcgencmd_answers_as_a_raspberry_pi_5_does(tmp_path):
    tree_of(tmp_path, PI5, 6.0)
    assert vcgencmd(tmp_path, "get_throttled").stdout == "throttled=0x0\n"
    lines = vcgencmd(tmp_path, "pmic_read_adc").stdout.splitlines()
    # As a Pi 5 prints them: twelve currents, then as many volts and those of the supply and the clock's battery.
    assert (
        len(lines) == 26
        and lines[0].startswith(" 3V7_WL_SW_A current(0)=")
        and lines[-2].startswith("     EXT5V_V volt(24)=")
    )
    pairs = [re.fullmatch(r" +(\w+)_([AV]) (?:current|volt)\((\d+)\)=(\d+\.\d{8})([AV])", line) for line in lines]
    assert all(pair and pair[2] == pair[5] for pair in pairs)
    assert len({pair[3] for pair in pairs}) == 26
    amperes = {pair[1]: float(pair[4]) for pair in pairs if pair[2] == "A"}
    volts = {pair[1]: float(pair[4]) for pair in pairs if pair[2] == "V"}
    rails_w = sum(amperes[rail] * volts[rail] for rail in amperes)
    # The community's fit from the rails to what the board takes, 1.1451 W/W and 0.5879 W.
    assert 1.1451 * rails_w + 0.5879 == pytest.approx(6.0, abs=0.01)


def test_vcgencmd_refuses_as_the_real_one_does(tmp_path):
    tree_of(tmp_path, PI4)
    done = vcgencmd(tmp_path, "pmic_read_adc")
    assert (done.returncode, done.stdout) == (255, 'error=1 error_msg="Command not registered"\n')
    assert vcgencmd(tmp_path, "../../etc/passwd").returncode == 255
    (tmp_path / videocore.ANSWERS / "get_throttled").unlink()
    (tmp_path / videocore.ANSWERS / "get_throttled").mkdir()  # what cannot be read, also by root
    done = vcgencmd(tmp_path, "get_throttled")
    assert done.returncode == 255 and done.stdout.startswith("Can't open device file: /dev/vcio\n")


def test_a_reader_never_sees_half_a_number(tmp_path):
    tree, stop, bad, read = tree_of(tmp_path, PI), threading.Event(), [], 0
    states = [tree.truth(PI.equilibrium(watts)) for watts in (0.5, 8.0)]
    path = meters(tmp_path)[0] / "power1_input"
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


# ---------------------------------------------------------------- faults


def faulty(tmp_path: Path, profile, kind: str, target: str, at_s: float = 1.0, until_s: float = 2.0) -> SimulatedBoard:
    entry = {"at_s": at_s, "until_s": until_s, "kind": kind, "target": target}
    trace = Trace((0.0, 0.5), (0.0, 1.0))
    return SimulatedBoard(BoardSpec("n1", profile, tmp_path, None, trace, faults.parse([entry], profile)))


def say(tmp_path: Path, board: SimulatedBoard, path: Path, times: int = 12, dt_s: float = 0.2) -> list[str | None]:
    texts = []
    for _ in range(times):
        board.advance(dt_s)
        texts.append(path.read_text().strip() if path.exists() else None)
    return texts


def test_a_stuck_file_says_what_it_said_until_it_is_mended(tmp_path):
    board = faulty(tmp_path, PI, "stuck", "power")
    texts = say(tmp_path, board, meters(tmp_path)[0] / "power1_input")
    # at 1.0, 1.2 ... 1.8 s
    assert len(set(texts[4:9])) == 1 and len(set(texts[9:])) > 1
    assert texts[4] != texts[9]


def test_a_missing_file_is_gone_and_comes_back(tmp_path):
    board = faulty(tmp_path, ORIN, "missing", "tj-thermal")
    texts = say(tmp_path, board, tmp_path / "sys/class/thermal/thermal_zone4/temp")
    assert [text is None for text in texts] == [False] * 4 + [True] * 5 + [False] * 3
    assert (tmp_path / "sys/class/thermal/thermal_zone0/temp").exists()


@pytest.mark.parametrize(("kind", "text"), [("minus_256", "-256000"), ("hundred", "100000")])
def test_a_zone_that_lies_lies_only_for_a_time(tmp_path, kind, text):
    board = faulty(tmp_path, PI4, kind, "cpu-thermal")
    texts = say(tmp_path, board, tmp_path / "sys/class/thermal/thermal_zone0/temp")
    assert [got == text for got in texts] == [False] * 4 + [True] * 5 + [False] * 3


def test_what_jumps_jumps(tmp_path):
    board = faulty(tmp_path, PI4, "jumping", "temp", 0.0, 100.0)
    values = [
        int(text) / 1000 for text in say(tmp_path, board, tmp_path / "sys/class/thermal/thermal_zone0/temp", 40, 0.1)
    ]
    assert {-1, 1} == {1 if value > 50 else -1 for value in values}
    assert all(abs(abs(value - 46.6) - 30) < 4 for value in values)
    watts = say(
        tmp_path, faulty(tmp_path, PI4, "jumping", "power", 0.0, 9e8), meters(tmp_path)[0] / "power1_input", 40, 0.1
    )
    assert max(map(int, watts)) > 20 * min(map(int, watts))


def test_a_channel_that_loses_its_rail_is_labelled_nc(tmp_path):
    board = faulty(tmp_path, ORIN, "nc", "VDD_SOC", 0.0)
    board.advance(0.1)
    meter = meters(tmp_path)[0]
    assert [(meter / f"in{n}_label").read_text().strip() for n in (1, 2, 3)] == ["VDD_IN", "VDD_CPU_GPU_CV", "NC"]
    assert ((meter / "in3_input").read_text(), (meter / "curr3_input").read_text()) == ("0\n", "0\n")
    assert int((meter / "curr1_input").read_text()) > 0


def test_a_denied_file_has_no_rights(tmp_path):
    board = faulty(tmp_path, PI, "denied", "power", 0.0, 0.5)
    path = meters(tmp_path)[0] / "power1_input"
    board.advance(0.1)
    assert path.stat().st_mode & 0o777 == 0
    board.advance(0.5)
    assert path.stat().st_mode & 0o444 == 0o444 and int(path.read_text()) > 0


def test_a_late_file_answers_after_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr("firmware_sim.sysfs.LATE_S", 0.3)
    board = faulty(tmp_path, ORIN, "late", "tj-thermal", 0.0, 1e6)
    got: list[str] = []
    path = tmp_path / "sys/class/thermal/thermal_zone4/temp"
    board.advance(0.1)
    reader = threading.Thread(target=lambda: got.append(path.read_text()), daemon=True)
    began = time.monotonic()
    reader.start()
    while reader.is_alive() and time.monotonic() < began + 15:
        board.advance(0.01)
        time.sleep(0.01)
    assert len(got) == 1 and int(got[0]) == pytest.approx(36_000, abs=3000)
    assert time.monotonic() - began >= 0.25
    # Mended while someone waits: that one is let go.
    reader = threading.Thread(target=lambda: got.append(path.read_text()), daemon=True)
    reader.start()
    while reader.is_alive() and not _waits(reader):
        time.sleep(0.01)
    board.advance(2e6)
    reader.join(15)
    assert not reader.is_alive() and int(path.read_text()) > 0


def test_a_new_simulator_lets_go_who_waits_for_a_late_file_of_the_last(tmp_path):
    board = faulty(tmp_path, ORIN, "late", "tj-thermal", 0.0, 1e6)
    board.advance(0.1)
    got: list[str] = []
    path = tmp_path / "sys/class/thermal/thermal_zone4/temp"
    reader = threading.Thread(target=lambda: got.append(path.read_text()), daemon=True)
    reader.start()
    while reader.is_alive() and not _waits(reader):
        time.sleep(0.01)
    (path.parent / ".temp.partial").write_text("1")
    SimulatedBoard(BoardSpec("n1", ORIN, tmp_path, None, Trace((0.0,), (0.0,))))
    reader.join(15)
    assert not reader.is_alive() and int(path.read_text()) > 0
    assert not list(tmp_path.rglob("*.partial"))


def _waits(thread: threading.Thread) -> bool:
    """Whether a thread waits in opening a FIFO or elsewhere in the kernel (proc(5): state S)."""
    return Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "broken", "target": "temp"}, "no fault 'broken'; there are stuck, missing"),
        ({"kind": "nc", "target": "temp"}, "there are VDD_IN, VDD_CPU_GPU_CV, VDD_SOC"),
        ({"kind": "hundred", "target": "VDD_IN"}, "cannot have the target"),
        ({"kind": "stuck", "target": "get_throttled"}, "cannot have the target"),
        ({"kind": "stuck", "target": "temp", "at_s": 5, "until_s": 5}, "give more than its at_s"),
        ({"kind": "stuck", "target": "temp", "at_s": -1}, "seconds from 0"),
        ({"kind": "stuck", "target": "temp", "how": 1}, "a fault is {"),
        ({"kind": ["stuck"], "target": "temp"}, "no fault"),
        ({"kind": "stuck", "target": ["temp"]}, "cannot have the target"),
        ("stuck", "a fault is {"),
    ],
)
def test_a_bad_fault_is_refused_in_one_line(entry, message):
    with pytest.raises(faults.FaultError, match=re.escape(message)) as caught:
        faults.parse([entry], ORIN)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- a recorded load


def test_a_trace_gives_each_piece_of_time_its_load():
    trace = Trace((0.0, 1.0, 1.5), (0.1, 0.9, 0.2))
    assert list(trace.pieces(0.5, 3.0)) == [(0.5, 0.1), (0.5, 0.9), (1.5, 0.2)]
    again = Trace((0.0, 0.25), (1.0, 0.0), repeat_s=1.0)
    pieces = list(again.pieces(0.5, 2.5))
    assert [load for _, load in pieces] == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert [seconds for seconds, _ in pieces] == pytest.approx([0.5, 0.25, 0.75, 0.25, 0.25])


def test_a_square_wave_of_1_khz_loses_no_time_to_rounding():
    trace = Trace((0.0, 0.0005), (1.0, 0.0), repeat_s=0.001)
    board_s, busy_s, at_s = 0.0, 0.0, 0.0
    for _ in range(2000):
        for seconds, load in trace.pieces(at_s, at_s + 4.704e-3):
            board_s, busy_s = board_s + seconds, busy_s + seconds * load
        at_s += 4.704e-3
    assert board_s == pytest.approx(9.408, rel=1e-6) and busy_s == pytest.approx(9.408 / 2, rel=1e-4)


def bursts(seconds: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pseudo-random bursts of 5-500 ms, high and low in turn."""
    draw, times, loads = random.Random(3), [0.0], [0.0]
    while times[-1] < seconds:
        times.append(times[-1] + draw.uniform(0.005, 0.5))
        loads.append(1.0 - loads[-1])
    return tuple(times), tuple(loads)


def read_board(tmp_path: Path, trace: Trace, seconds: float, step_s: float) -> tuple[SimulatedBoard, list[float]]:
    """A board between 3 and 9 W under a trace, and what its power file said after each step."""
    profile = replace(PI, idle_w=3.0, max_w=9.0, ambient_c=0.0)
    board = SimulatedBoard(BoardSpec("n1", profile, tmp_path, None, trace))
    power = meters(tmp_path)[0] / "power1_input"
    watts = []
    for _ in range(round(seconds / step_s)):
        board.advance(step_s)
        watts.append(int(power.read_text()) / 1e6)
    return board, watts


def test_the_truth_of_a_trace_is_its_closed_form_and_its_registers_add_up_to_it(tmp_path):
    times, loads = bursts(20.0)
    board, watts = read_board(tmp_path, Trace(times, loads), 20.0, INA226.period_s)
    ends = [*times[1:], 1e9]
    until_s = board.state.time_s
    high_s = sum(max(0.0, min(end, until_s) - t) for t, end, load in zip(times, ends, loads) if load)
    assert board.state.energy_j == pytest.approx(3.0 * until_s + 6.0 * high_s, rel=1e-9)
    # Every register once: a mean over half of the time (the shunt conversions), so not exact, but without bias.
    assert sum(watts) * INA226.period_s == pytest.approx(board.state.energy_j, rel=0.01)
    # Control: one of them a second.
    each_second = watts[:: round(1 / INA226.period_s)]
    assert abs(sum(each_second) / len(each_second) - board.state.energy_j / until_s) > 0.3


def test_a_file_has_new_data_no_more_often_than_the_chip(tmp_path):
    _, watts = read_board(tmp_path, Trace(*bursts(4.0)), 4.0, 1e-3)
    changes = sum(a != b for a, b in zip(watts, watts[1:]))
    # 4 s / 4.704 ms = 850 loads; noise of one step leaves few of them equal to the last, as the power step is 6.25 mW.
    assert 60 <= changes <= 851


def test_the_same_trace_gives_the_same_files(tmp_path):
    trace = Trace(*bursts(1.0))
    texts = []
    for name in ("a", "b"):
        board, watts = read_board(tmp_path / name, trace, 1.0, 0.02)
        texts.append((watts, (tmp_path / name / "sys/class/thermal/thermal_zone0/temp").read_text(), board.state))
    assert texts[0] == texts[1]


def test_the_state_file_is_the_noiseless_truth(tmp_path):
    path = tmp_path / "truth.json"
    spec = BoardSpec("n1", PI, tmp_path / "root", None, Trace((0.0,), (1.0,)), (), path)
    board = SimulatedBoard(spec)
    assert json.loads(path.read_text())["energy_j"] == 0
    before = time.monotonic()
    for _ in range(10):
        board.advance(1.0)
    truth = json.loads(path.read_text())
    assert (truth["node"], truth["power_w"], truth["throttled"]) == ("n1", 8.0, False)
    assert truth["energy_j"] == pytest.approx(80.0) and truth["time_s"] == pytest.approx(10.0)
    assert before <= truth["monotonic_s"] <= time.monotonic()
    # From 24.7 + 7.28 * 3: + 5 W * (3 (1 - e^(-10/80)) + 4.28 (1 - e^(-10/600)))
    want_c = 46.54 + 5 * (3 * (1 - math.exp(-0.125)) + 4.28 * (1 - math.exp(-1 / 60)))
    assert truth["die_c"] == pytest.approx(want_c, abs=1e-6)


def test_a_cap_file_is_read_and_rubbish_in_it_is_told_once(tmp_path, capsys):
    path = tmp_path / "cap"
    cap = Cap(path)
    assert cap.read() == 1.0
    for text, want in (("0.25", 0.25), ("7", 0.25), ("nan", 0.25), ("0", 0.0)):
        path.write_text(text)
        assert cap.read() == want
    assert capsys.readouterr().err.count("warning") == 1
    path.unlink()
    assert cap.read() == 1.0


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
    power = tmp_path / "sysroot/sys/bus/i2c/drivers/ina2xx/1-0040/hwmon/hwmon2/power1_input"

    def watts() -> float:
        return int(power.read_text()) / 1e6 if power.exists() else math.nan

    worker = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        _until(lambda: watts() == pytest.approx(3.0, abs=0.02))
        (tmp_path / "agent.pid").write_text(str(worker.pid))
        # A board's core is a quarter of 5 W; the machine is shared, so any clear part of it will do.
        _until(lambda: watts() > 3.3)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        _until(lambda: watts() == pytest.approx(3.0, abs=0.02))
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
        (
            {"profile": "pdp-11"},
            "no profile 'pdp-11'; there are jetson-agx-orin, jetson-nano, jetson-orin-nano",
        ),
        ({"node": "Not An Id"}, "not legal"),
        ({"sysroot": "/"}, "this machine's own root"),
        ({"pid_file": 5}, "needs the texts"),
        ({"state_file": 5}, "give a file's path"),
        ({"ambient_c": "hot"}, "ambient_c is 'hot'; give -100 to 150"),
        ({"max_w": 1}, "max_w is '1'; give 3 to 1000"),
        ({"fault": []}, "'fault', which is unknown"),
        ({"faults": {}}, "faults is no list"),
        ({"faults": [{"kind": "nc", "target": "temp"}]}, "there are none"),
        ({"load_trace": [[0, 1]]}, "both load_trace and pid_file"),
        ({"load_trace": [[1, 1]]}, "begin with 0"),
        ({"load_trace": [[0, 1], [0, 0]]}, "begin with 0 and rise"),
        ({"load_trace": [[0, 2]]}, "loads from 0 to 1"),
        ({"load_trace": [[0, True]]}, "give .seconds, load."),
        ({"load_trace": [[0, 10**400]]}, "give .seconds, load."),
        ({"load_trace": [[0, 1], [5, 0]], "load_trace_repeat_s": 5}, "more than the last time"),
        ({"load_trace": [[0, 1], [1e-9, 0]]}, "farther apart"),
        ({"load_trace": [[0, 1]], "load_trace_repeat_s": 1e-5}, "load_trace_repeat_s"),
        ({"state_file": "/proc"}, "is no plain file"),
        ({"cap_file": "/dev/zero"}, "is no plain file"),
        ({"state_file": "a\0b"}, "is no plain file"),
        ({"foster": []}, "foster is no list of 1 to 8"),
        ({"foster": [[1, 1]] * 9}, "foster is no list of 1 to 8"),
        ({"foster": [[3.0]]}, "give .K/W, seconds."),
        ({"foster": [[3.0, True]]}, "give .K/W, seconds."),
        ({"foster": [[3.0, 0]]}, "give 0.001 to 1000 K/W"),
        ({"foster": [[10**400, 8]]}, "give 0.001 to 1000 K/W"),
        ({"foster": [[3.0, float("nan")]]}, "give 0.001 to 1000 K/W"),
    ],
)
def test_a_bad_board_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(SpecError, match=message) as caught:
        read_spec(spec_file(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_branches_of_a_spec_replace_the_profiles(tmp_path):
    """By hand: 20 C + 2 W * (3 + 6) K/W = 38 C at rest; without the key the profile's 7.28 K/W stand."""
    (board,) = read_spec(spec_file(tmp_path, foster=[[3, 1.5], [6, 8]], ambient_c=20.0)).boards
    assert die_c(board.profile, board.profile.equilibrium(2.0)) == pytest.approx(38.0)
    (plain,) = read_spec(spec_file(tmp_path)).boards
    assert plain.profile.foster == PI.foster


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
