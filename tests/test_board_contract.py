"""One contract for every kind of board: what the agent claims is what the kernel's documentation says is there, and nothing else.

The simulator runs as a process and writes below a folder; `node-agent sensors --json --sysroot DIR` reads it as a board's
owner would. The table of what must be claimed is written from these pages and not from the agent:
  T  Documentation/ABI/testing/sysfs-class-thermal: `type`, `temp` in m°C of each zone
  3  Documentation/hwmon/ina3221.rst: in[123]_label, in[123]_input mV, curr[123]_input mA; in[456] are shunts in µV, in7 their
     sum, curr4 the sum of currents: no rails
  2  Documentation/hwmon/ina2xx.rst: power1_input µW, curr1_input mA, in1_input mV
  J  NVIDIA Jetson Linux guide and tegra234-p3767/p3701.dtsi: rails of the module; VDD_IN is the total where there is one
  V  raspberrypi.com, vcgencmd: get_throttled's bits; pmic_read_adc's pairs of rails
  R  drivers/hwmon/raspberrypi-hwmon.c: rpi_volt, in0_lcrit_alarm
  4  NVIDIA's driver ina3221x of kernel 4.9 (drivers/staging/iio/meter/ina3221.c): rail_name_[012], in_voltage, in_current and
     in_power[012]_input in mV, mA, mW; the `trigger` and `ui_input` ones say the same again. Zones: the device tree
     tegra210-p3448-0000-p3449-0000-b00; rails: NVIDIA's L4T 32 guide, POM_5V_IN being the total
  P  Documentation/power/powercap/powercap.rst: energy_uj of a package
With SPACEMOE_TEST_SYSROOT=/ the last part checks the machine it runs on.
"""

from __future__ import annotations

import copy
import ctypes
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from node_rig import AgentProcess, Ground, Observer, agent_tables

from firmware_sim.faults import parse
from firmware_sim.profiles import PROFILES
from firmware_sim.run import SimulatedBoard
from firmware_sim.spec import BoardSpec, Trace
from ground_station.broker import Broker
from node_agent import config, guard, reading, sensors

ROOT = str(Path(__file__).resolve().parent.parent)
ENVIRONMENT = os.environ | {"PYTHONPATH": ROOT}
WAIT_S = 20.0
VALIDITIES = {"ok", "stale", "missing", "invalid"}
FAULTS_S = 60.0
HABITS = 40  # messages
IDLE, BUSY = 0.0, 0.6


@dataclass(frozen=True)
class Expected:
    """A quantity that must be claimed: its name, unit, scopes that are right, and about what it is, from the simulator's truth.

    `within`: how far from it a reading may be (noise, register steps, an offset between sensors), in its unit.
    """

    source: str
    name: str
    unit: str
    scopes: str
    value: Callable[[dict], float]
    within: float


@dataclass(frozen=True)
class Contract:
    """What must be claimed of a board at a load; `hidden`: what is not believed or left out, as (files, reason)."""

    expected: tuple[Expected, ...]
    total: Callable[[dict], float] | None
    hidden: tuple[tuple[str, str], ...] = ()
    may: str = "(?!)"


def die(name: str) -> Expected:
    # offsets of the zones to the hottest are up to 2 K, noise 0.3 K, steps 0.55 K
    return Expected("T", f"temp_c.{name}", "degC", "module", lambda truth: truth["die_c"], 4.0)


def rail(label: str, scope: str, share: Callable[[dict], float], within: float) -> Expected:
    return Expected("3J", f"power_w.{label}", "W", scope, share, within)


def power(truth: dict) -> float:
    return truth["power_w"]


def between(low: float, high: float) -> tuple[Callable[[dict], float], float]:
    return lambda truth: truth["power_w"] * (low + high) / 2, (high - low) / 2


def pmic_sum(truth: dict) -> float:
    # the community's fit, W = 1.1451 sum(V I) + 0.5879, turned round
    return (truth["power_w"] - 0.5879) / 1.1451


INA226 = Expected("2", "power_w.ina226", "W", "board", power, 0.05)
# What else is really there: the same zone as a hwmon, flags, the rails of a Pi 5's power chip and its supply's voltage.
PI_MAY = r"temp_c\.cpu_thermal(_\d+)?|.*(throttl|under_?voltage|capped|soft|lcrit_alarm|rpi_volt).*"
PMIC_RAILS = "3v7_wl_sw|3v3_sys|1v8_sys|ddr_vdd2|ddr_vddq|1v1_sys|0v8_sw|vdd_core|3v3_dac|3v3_adc|0v8_aon|hdmi"
PI5_MAY = PI_MAY + rf"|power_w\.(pmic.*|(pmic_)?({PMIC_RAILS}))|\w+\.(pmic_)?(ext5v|batt)(_v)?"
PMIC = Expected("V", "power_w.pmic*", "W", "module|rail|rails", pmic_sum, 0.2)
ORIN_HIDDEN = (("thermal_zone5", "PMIC"), ("hwmon0/in[47]_input|hwmon0/curr4_input", "shunt|three channels|sum"))
JETSON_MAY = r"temp_c\.(gpu|cv\d)_thermal|flag.*|throttl.*"


# A Nano's always-on part is warmer than its processor, in both listings that profiles.py goes by.
OFFSETS_K = {"temp_c.ao_therm": 6.0}
NANO_HIDDEN = (("thermal_zone4", "PMIC"), ("thermal_zone5", "weighted sum"))


def nano(_: bool) -> Contract:
    always_on = Expected("T", "temp_c.ao_therm", "degC", "module", lambda truth: truth["die_c"] + 6.0, 4.0)
    rails = (
        rail("pom_5v_in", "module", power, 0.3),
        rail("pom_5v_gpu", "rail", *between(-0.2, 0.4)),  # nothing uses it: what is left is the monitor's noise
        rail("pom_5v_cpu", "rail", *between(0.0, 1.0)),
    )
    zones = tuple(die(name) for name in ("cpu_therm", "gpu_therm", "pll_therm"))
    return Contract((always_on, *zones, *(replace(each, source="4") for each in rails)), power, NANO_HIDDEN)


def orin(gpu: bool) -> Contract:
    zones = ("cpu_thermal", "soc0_thermal", "tj_thermal") + (("gpu_thermal",) if gpu else ())
    rails = (
        rail("vdd_in", "module", power, 0.3),
        rail("vdd_cpu_gpu_cv", "rail", *between(0.0, 1.0)),
        rail("vdd_soc", "rail", *between(0.0, 1.0)),
    )
    return Contract((*map(die, zones), *rails), power, ORIN_HIDDEN, JETSON_MAY)


def agx(gpu: bool) -> Contract:
    zones = ("cpu_thermal", "soc0_thermal", "tj_thermal") + (("gpu_thermal",) if gpu else ())
    labels = ("vdd_gpu_soc", "vdd_cpu_cv", "vin_sys_5v0", "vddq_vdd2_1v8ao")
    rails = tuple(rail(label, "rail", *between(0.0, 1.0)) for label in labels)
    nc = (("hwmon1/in1_(input|label)", "(?i)nc|not connected"), ("hwmon1/in3_(input|label)", "(?i)nc|not connected"))
    return Contract((*map(die, zones), *rails), power, (*ORIN_HIDDEN, *nc), JETSON_MAY)


CONTRACTS: dict[str, Callable[[bool], Contract]] = {
    "jetson-orin-nano": orin,
    "jetson-agx-orin": agx,
    "jetson-nano": nano,
    "raspberry-pi-5": lambda _: Contract((die("cpu_thermal"), PMIC), None, may=PI5_MAY),
    "raspberry-pi-5-ina226": lambda _: Contract((die("cpu_thermal"), INA226, PMIC), power, may=PI5_MAY),
    "raspberry-pi-4-ina226": lambda _: Contract((die("cpu_thermal"), INA226), power, may=PI_MAY),
}


class Simulator:
    """`python -m firmware_sim.run` on some boards, started until all have written their truth."""

    def __init__(self, folder: Path, boards: list[dict], rate_hz: float = 20):
        folder.mkdir(parents=True, exist_ok=True)
        self.truths = {board["node"]: folder / f"{board['node']}.json" for board in boards}
        for board in boards:
            board.setdefault("state_file", str(self.truths[board["node"]]))
            self.truths[board["node"]].unlink(missing_ok=True)
        spec = folder / "spec.json"
        spec.write_text(json.dumps({"boards": boards, "rate_hz": rate_hz}))
        self.log = folder / "simulator.log"
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "firmware_sim.run", "--spec", str(spec)]
            self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
        try:
            until(lambda: all(path.exists() and self.truth(node)["time_s"] > 0.2 for node, path in self.truths.items()))
        except BaseException:
            self.stop()
            raise

    def truth(self, node: str) -> dict:
        assert self.process.poll() is None, self.log.read_text()
        return json.loads(self.truths[node].read_text())

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(10) == 0, self.log.read_text()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.stop()


def until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


# Root reads what it has no right to; a board's agent is not root. These two rights make the difference (capabilities(7)).
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _PR_CAPBSET_DROP = 1, 2, 24
_LIBC = ctypes.CDLL(None, use_errno=True)


def as_a_user() -> None:
    """In the child before exec: without root's right to read everything."""
    if os.geteuid() == 0:
        for right in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            if _LIBC.prctl(_PR_CAPBSET_DROP, right, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "cannot give up root's rights")


def claims(sysroot: Path) -> dict:
    """What `node-agent sensors --json` prints."""
    command = [sys.executable, "-m", "node_agent.cli", "sensors", "--json", "--sysroot", str(sysroot)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, preexec_fn=as_a_user)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def matches(pattern: str, name: str) -> bool:
    """Whether a claimed name is an expected one: letters as they are, '*' for any ending."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\w*"), name) is not None


def complaints(contract: Contract, tree: dict, truth: dict) -> list[str]:
    """What is wrong with a board's claims; empty where they keep the contract."""
    wrong = []
    sensors = tree["sensors"]
    names = [sensor["name"] for sensor in sensors]
    wrong += [f"{name} is claimed twice" for name in set(names) if names.count(name) > 1]
    for expected in contract.expected:
        found = [sensor for sensor in sensors if matches(expected.name, sensor["name"])]
        good = [
            sensor
            for sensor in found
            if (sensor["unit"], sensor["validity"]) == (expected.unit, "ok")
            and sensor["scope"] in expected.scopes.split("|")
            and abs(sensor["value"] - expected.value(truth)) <= expected.within * _unit_w(expected, truth)
        ]
        if not good:
            wrong.append(f"{expected.name} ({expected.source}) is not there as it should be: {found}")
    for sensor in sensors:
        required = any(matches(expected.name, sensor["name"]) for expected in contract.expected)
        if not required and not re.fullmatch(contract.may, sensor["name"]):
            wrong.append(f"{sensor['name']} is claimed, and there is no such thing")
        if sensor["provenance"] != "simulated":
            wrong.append(f"{sensor['name']} is simulated and says {sensor['provenance']}")
        if sensor["validity"] not in VALIDITIES or (sensor["value"] is None) != (
            sensor["validity"] in ("missing", "invalid")
        ):
            wrong.append(f"{sensor['name']} has validity {sensor['validity']} and value {sensor['value']}")
        offset_k = OFFSETS_K.get(sensor["name"], 0.0)
        far = sensor["validity"] == "ok" and not abs(sensor["value"] - truth["die_c"] - offset_k) <= 4
        if sensor["unit"] == "degC" and far:
            wrong.append(f"{sensor['name']} says {sensor['value']} and the die has {truth['die_c']:.1f}")
    for files, reason in contract.hidden:
        told = [
            item for item in tree["left_out"] if re.search(files, item["path"]) and re.search(reason, item["reason"])
        ]
        if not told:
            wrong.append(f"nobody is told why {files} is left out")
    return wrong + _wrong_total(contract, tree, truth)


def _unit_w(expected: Expected, truth: dict) -> float:
    """A rail's range is a share of the board's power; every other one is in its own unit."""
    return truth["power_w"] if expected.scopes == "rail" else 1.0


def _wrong_total(contract: Contract, tree: dict, truth: dict) -> list[str]:
    by_name = {sensor["name"]: sensor for sensor in tree["sensors"]}
    if contract.total is None:
        return []
    if not tree["total"] or not all(name in by_name for name in tree["total"]):
        return [f"the total is {tree['total']}"]
    watts = sum(by_name[name]["value"] or math.nan for name in tree["total"])
    # Register steps: 0.4 W on an AGX Orin's 19 V rails, two of them and their noise.
    allowed = 2.5 if len(tree["total"]) > 1 else 0.3
    return [] if abs(watts - contract.total(truth)) <= allowed else [f"the total is {watts}, not {truth['power_w']}"]


# ---------------------------------------------------------------- every profile, idle and busy


@pytest.fixture(scope="module")
def boards(tmp_path_factory):
    """(simulator, folder): every profile twice, `<profile>-idle` and `<profile>-busy`."""
    folder = tmp_path_factory.mktemp("boards")
    entries = [
        {
            "node": _node(profile, load),
            "profile": profile,
            "sysroot": str(folder / _node(profile, load)),
            "load_trace": [[0, load]],
        }
        for profile in PROFILES
        for load in (IDLE, BUSY)
    ]
    with Simulator(folder, entries) as simulator:
        yield simulator, folder


def _node(profile: str, load: float) -> str:
    return f"{profile}-{'busy' if load else 'idle'}"


def test_there_is_a_contract_for_every_profile():
    assert set(CONTRACTS) == set(PROFILES)


@pytest.mark.parametrize("load", [IDLE, BUSY], ids=["idle", "busy"])
@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_claimed_is_what_is_there(boards, profile, load):
    simulator, folder = boards
    tree = claims(folder / _node(profile, load))
    truth = simulator.truth(_node(profile, load))
    contract = CONTRACTS[profile](load > 0)
    assert complaints(contract, tree, truth) == []
    by_name = {sensor["name"]: sensor for sensor in tree["sensors"]}
    if profile.startswith("jetson") and profile != "jetson-nano":
        # Zones without power: told apart from a temperature, or left out.
        for zone in ("cv0_thermal", *(() if load else ("gpu_thermal",))):
            sensor = by_name.get(f"temp_c.{zone}")
            assert sensor is None or (sensor["validity"], sensor["value"]) == ("invalid", None)
    elif profile == "raspberry-pi-5":
        # Without a meter in its supply nothing may pass for the board's measured power.
        assert not [
            n for n in tree["total"] if by_name[n]["scope"] == "board" and by_name[n]["provenance"] == "measured"
        ]


def test_claims_that_break_the_contract_are_noticed(boards):
    """Negative control: each change is one that a wrong agent could make."""
    simulator, folder = boards
    node = _node("jetson-orin-nano", BUSY)
    contract, tree, truth = orin(True), claims(folder / node), simulator.truth(node)
    assert complaints(contract, tree, truth) == []

    def broken(change: Callable[[dict, dict], object]) -> list[str]:
        copied = copy.deepcopy(tree)
        change(copied, {sensor["name"]: sensor for sensor in copied["sensors"]})
        return complaints(contract, copied, truth)

    total = "power_w.vdd_in"
    changes: dict[str, Callable[[dict, dict], object]] = {
        "not there": lambda t, s: t["sensors"].remove(s[total]),
        "no such thing": lambda t, s: t["sensors"].append(s[total] | {"name": "power_w.sum_of_shunt_voltages"}),
        "claimed twice": lambda t, s: t["sensors"].append(s[total]),
        "is not there as it should be": lambda t, s: s[total].update(unit="mW"),
        "as it should be": lambda t, s: s[total].update(value=s[total]["value"] * 1000),
        "is not there": lambda t, s: s[total].update(scope="board"),
        "simulated and says measured": lambda t, s: s[total].update(provenance="measured"),
        "has validity invalid": lambda t, s: s["temp_c.tj_thermal"].update(validity="invalid"),
        "and the die has": lambda t, s: t["sensors"].append(
            s["temp_c.tj_thermal"] | {"name": "temp_c.cv0_thermal", "value": 100.0}
        ),
        "nobody is told why thermal_zone5": lambda t, s: t["left_out"].clear(),
        "the total is 1": lambda t, s: t["total"].append("power_w.vdd_cpu_gpu_cv"),
        "the total is []": lambda t, s: t["total"].clear(),
    }
    for told, change in changes.items():
        assert any(told in text for text in broken(change)), told


def test_a_board_without_its_meter_claims_no_power(boards, tmp_path):
    """Control: the power comes from the files and not from the name of the board."""
    _, folder = boards
    shutil.copytree(folder / _node("raspberry-pi-4-ina226", IDLE), tmp_path / "root", symlinks=True)
    meter = next(p for p in (tmp_path / "root/sys/class/hwmon").iterdir() if (p / "name").read_text() == "ina226\n")
    shutil.rmtree(meter.resolve())
    tree = claims(tmp_path / "root")
    assert [sensor["name"] for sensor in tree["sensors"] if sensor["unit"] in ("W", "J")] == [] == tree["total"]
    assert "temp_c.cpu_thermal" in [sensor["name"] for sensor in tree["sensors"]]


def test_a_hot_raspberry_pi_says_which_limits_act(tmp_path):
    """V: bits 1 capped, 2 throttled, 3 soft limit; 16 higher: since boot. Under-voltage (0 and 16, and R) is not there."""
    board = {"node": "n1", "profile": "raspberry-pi-4-ina226", "sysroot": str(tmp_path / "n1"), "load_trace": [[0, 1]]}
    with Simulator(tmp_path, [board | {"ambient_c": 75.0}]) as simulator:
        tree, truth = claims(tmp_path / "n1"), simulator.truth("n1")
    assert truth["throttled"] and truth["flags"] == 0xE000E
    flags = {sensor["name"]: sensor["value"] for sensor in tree["sensors"] if sensor["unit"] == "flag"}
    for part in ("capped", "throttled", "soft"):
        assert sorted(value for name, value in flags.items() if part in name) == [1, 1], flags
    assert {value for name, value in flags.items() if "under_voltage" in name} == {0}
    assert abs(next(s["value"] for s in tree["sensors"] if s["unit"] == "degC") - truth["die_c"]) < 4


# ---------------------------------------------------------------- faults, as `node-agent sensors` sees them


AT_ONCE = [
    # profile, kind, target, the claim that must be gone
    ("jetson-orin-nano", "missing", "tj-thermal", "temp_c.tj_thermal"),
    ("jetson-orin-nano", "late", "cpu-thermal", "temp_c.cpu_thermal"),
    ("jetson-orin-nano", "minus_256", "soc0-thermal", "temp_c.soc0_thermal"),
    ("jetson-orin-nano", "nc", "VDD_SOC", "power_w.vdd_soc"),
    ("jetson-orin-nano", "denied", "VDD_CPU_GPU_CV", "power_w.vdd_cpu_gpu_cv"),
    ("jetson-agx-orin", "late", "VDD_CPU_CV", "power_w.vdd_cpu_cv"),
    ("jetson-agx-orin", "missing", "VIN_SYS_5V0", "power_w.vin_sys_5v0"),
    ("jetson-nano", "nc", "POM_5V_GPU", "power_w.pom_5v_gpu"),
    ("jetson-nano", "late", "POM_5V_CPU", "power_w.pom_5v_cpu"),
    ("jetson-nano", "denied", "POM_5V_IN", "power_w.pom_5v_in"),
    ("jetson-nano", "minus_256", "GPU-therm", "temp_c.gpu_therm"),
    ("raspberry-pi-4-ina226", "denied", "temp", "temp_c.cpu_thermal"),
    ("raspberry-pi-4-ina226", "missing", "power", "power_w.ina226"),
    ("raspberry-pi-5", "denied", "pmic", "power_w.pmic*"),
    ("raspberry-pi-5-ina226", "late", "pmic", "power_w.pmic*"),
    ("raspberry-pi-5-ina226", "late", "power", "power_w.ina226"),
]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """(simulator, folder) with board n<i> having the i-th fault of AT_ONCE."""
    folder = tmp_path_factory.mktemp("faulty")
    entries = [
        {
            "node": f"n{index}",
            "profile": profile,
            "sysroot": str(folder / f"n{index}"),
            "load_trace": [[0, BUSY]],
            "faults": [{"kind": kind, "target": target}],
        }
        for index, (profile, kind, target, _) in enumerate(AT_ONCE)
    ]
    with Simulator(folder, entries) as simulator:
        yield simulator, folder


@pytest.mark.parametrize("index", range(len(AT_ONCE)), ids=[" ".join(case[:3]) for case in AT_ONCE])
def test_a_fault_from_the_start_is_no_reading(faulty, index):
    simulator, folder = faulty
    profile, kind, target, gone = AT_ONCE[index]
    tree, truth = claims(folder / f"n{index}"), simulator.truth(f"n{index}")
    believed = [s for s in tree["sensors"] if matches(gone, s["name"]) and s["validity"] == "ok"]
    assert believed == []
    told = [s for s in tree["sensors"] if matches(gone, s["name"])] or [
        item for item in tree["left_out"] if len(item["reason"]) > 5 and _belongs(item["path"], target, profile)
    ]
    assert told, "neither claimed as not ok nor left out with a reason"
    # Nothing else suffers.
    contract = CONTRACTS[profile](True)
    for expected in contract.expected:
        if expected.name != gone and not (target in ("power", "temp") and expected.unit == INA226.unit):
            assert [s for s in tree["sensors"] if matches(expected.name, s["name"]) and s["validity"] == "ok"], expected
    assert truth["die_c"] > 25


def _belongs(path: str, target: str, profile: str) -> bool:
    """Whether a file that is left out is one of a fault's target."""
    zones = {zone.kind: f"thermal_zone{n}" for n, zone in enumerate(PROFILES[profile].zones)} | {
        "temp": "thermal_zone0"
    }
    meter = "iio:device0" if profile == "jetson-nano" else "hwmon"
    return zones.get(target, "vcgencmd" if target == "pmic" else meter) in path


def test_a_nanos_limit_is_its_processors_and_not_its_memorys(boards):
    """Device tree of 4: the processor is slowed down from 97 °C on, the graphics from 97.5 °C; PLL-therm's 70 °C are passive
    too, and refresh the memory more often."""
    _, folder = boards
    root = folder / _node("jetson-nano", IDLE)
    trips = sensors.trip_points(root)
    assert guard.limit_c(config.GuardConfig(), trips) == 97.0
    zone = next(z for z in (root / "sys/class/thermal").iterdir() if (z / "type").read_text() == "PLL-therm\n")
    assert (zone / "trip_point_0_temp").read_text() == "70000\n"  # control: it is there
    assert {trip.zone for trip in trips} == {"AO-therm", "CPU-therm", "GPU-therm"}


# ---------------------------------------------------------------- faults that a running agent meets


WHILE_RUNNING = {
    # node: profile and (kind, target, sensor) of each fault. nc is not among them: a label does not change while a board runs.
    "n1": (
        "jetson-orin-nano",
        (
            ("missing", "tj-thermal", "temp_c.tj_thermal"),
            ("jumping", "soc0-thermal", "temp_c.soc0_thermal"),
            ("stuck", "cpu-thermal", "temp_c.cpu_thermal"),
            ("stuck", "VDD_IN", "power_w.vdd_in"),
            ("denied", "VDD_CPU_GPU_CV", "power_w.vdd_cpu_gpu_cv"),
            ("late", "VDD_SOC", "power_w.vdd_soc"),
        ),
    ),
    "n2": (
        "jetson-orin-nano",
        (
            ("minus_256", "cpu-thermal", "temp_c.cpu_thermal"),
            ("hundred", "soc0-thermal", "temp_c.soc0_thermal"),
            ("late", "tj-thermal", "temp_c.tj_thermal"),
            ("jumping", "VDD_IN", "power_w.vdd_in"),
            ("missing", "VDD_SOC", "power_w.vdd_soc"),
        ),
    ),
    "n3": (
        "raspberry-pi-4-ina226",
        (("denied", "cpu-thermal", "temp_c.cpu_thermal"), ("stuck", "power", "power_w.ina226")),
    ),
}
FAULTS = {node: [(kind, name) for kind, _, name in faults] for node, (_, faults) in WHILE_RUNNING.items()}


class UserAgent(AgentProcess):
    """An agent without root's right to read everything, as on a board."""

    def _start(self) -> subprocess.Popen:
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "node_agent.cli", "run", "--config", str(self.config)]
            return subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=ENVIRONMENT, preexec_fn=as_a_user
            )


def simulated(folder: Path, faulty: bool) -> Simulator:
    return Simulator(
        folder,
        [
            {
                "node": node,
                "profile": profile,
                "sysroot": str(folder / node),
                "load_trace": [[0, BUSY]],
                "faults": [{"kind": kind, "target": target} for kind, target, _ in faults] if faulty else [],
            }
            for node, (profile, faults) in WHILE_RUNNING.items()
        ],
    )


def disbelieved(seen: list[str]) -> bool:
    """Not just once, as while a simulator starts."""
    return len(seen) - seen.count("ok") >= 5


def validity(tree: dict, name: str) -> str:
    return next((sample["validity"] for sample in tree["samples"] if sample["name"] == name), "left out")


@pytest.fixture(scope="module")
def lived_through(tmp_path_factory):
    """What three running agents said of their faults: {(node, sensor): validities seen}, from the broken time alone; also those
    sensors that were not 'ok' before or after, and which agents ended."""
    folder = tmp_path_factory.mktemp("running")
    names = {node: [name for _, name in faults] for node, faults in FAULTS.items()}
    during: dict[tuple[str, str], list[str]] = {(node, name): [] for node in names for name in names[node]}
    not_ok: list[str] = []

    def all_ok(observer: Observer, node: str, when: str) -> None:
        try:
            observer.next("telemetry", lambda tree: all(validity(tree, name) == "ok" for name in names[node]))
        except AssertionError:
            last = [tree for leaf, tree, _ in observer.all if leaf == "telemetry"][-1]
            not_ok.extend(f"{when} {node}: {name} {validity(last, name)}" for name in names[node])

    with Broker(folder, "auto") as broker, Ground() as ground:
        simulator = simulated(folder, False)
        agents, observers = {}, {}
        try:
            for node in names:
                (folder / f"agent-{node}").mkdir()
                tables = agent_tables(folder / f"agent-{node}", ground.endpoint, broker=broker)
                tables["node"] |= {"id": node, "sysroot": str(folder / node)}
                observers[node] = Observer(broker.host, broker.port, node=node)
                agents[node] = UserAgent(folder / f"agent-{node}", tables)
            for node, observer in observers.items():
                all_ok(observer, node, "before")
            # Long enough for an agent to know how its sensors move.
            observers["n3"].next("telemetry", lambda tree: tree["seq"] >= HABITS)
            simulator.stop()
            simulator = simulated(folder, True)
            end = time.monotonic() + FAULTS_S
            for observer in observers.values():
                observer.next("telemetry", lambda tree: tree["generated_at"] > time.time() - 0.2)
            while time.monotonic() < end and not all(map(disbelieved, during.values())):
                for node, observer in observers.items():
                    tree = observer.next("telemetry")
                    for name in names[node]:
                        during[node, name].append(validity(tree, name))
            simulator.stop()
            simulator = simulated(folder, False)
            for node, observer in observers.items():
                all_ok(observer, node, "after")
            ended = {node: agent.text()[-2000:] for node, agent in agents.items() if agent.process.poll() is not None}
        finally:
            for agent in agents.values():
                agent.__exit__()
            for observer in observers.values():
                observer.__exit__()
            simulator.__exit__()
    return during, not_ok, ended


def test_agents_live_through_every_fault_and_believe_what_is_mended(lived_through):
    _, not_ok, ended = lived_through
    assert ended == {} and not_ok == []


@pytest.mark.parametrize(
    ("node", "kind", "name"), [(node, kind, name) for node, faults in FAULTS.items() for kind, name in faults]
)
def test_a_running_agent_does_not_believe_a_fault(lived_through, node, kind, name):
    seen = lived_through[0][node, name]
    assert disbelieved(seen), f"{kind}: of {len(seen)} messages {seen.count('ok')} say that {name} is ok"


@pytest.mark.parametrize("stuck", [True, False], ids=["stuck", "sound"])
@pytest.mark.parametrize("profile", [name for name, profile in PROFILES.items() if profile.monitors])
def test_a_power_that_stays_the_same_to_the_last_bit_grows_stale(tmp_path, monkeypatch, profile, stuck):
    """The agent takes its time over it, so the clock is turned by hand. Control: a sound board under a constant load, whose
    meter's noise is one step, never is."""
    now_s = [1000.0]
    monkeypatch.setattr(reading, "time", SimpleNamespace(monotonic=lambda: now_s[0], time=time.time))
    spec = BoardSpec("n1", PROFILES[profile], tmp_path, None, Trace((0.0,), (BUSY,)))
    entry = [{"kind": "stuck", "target": "power", "at_s": 30}]
    board = SimulatedBoard(replace(spec, faults=parse(entry, spec.profile) if stuck else ()))
    total = [sensor for sensor in sensors.find(tmp_path).total if sensor.unit == "W"]
    stale_s = {sensor.name: [] for sensor in total}
    while board.state.time_s < 120:
        board.advance(0.2)
        now_s[0] += 0.2
        for sensor in total:
            if reading.take(sensor)[0].validity == "stale":
                stale_s[sensor.name].append(board.state.time_s)
    assert stale_s
    for times_s in stale_s.values():
        assert (30 < times_s[0] < 100 and times_s[-1] > 119) if stuck else not times_s


# ---------------------------------------------------------------- the machine it runs on


MACHINE_LIMITS = {"degC": (-50, 150), "W": (0, 5000), "J": (0, 1e9), "V": (0, 60), "flag": (0, 1)}


def inventory(root: Path) -> dict[str, int]:
    """How many readings of each unit there can be below a root, from the kernel's files alone (T, 3, 2, P and
    Documentation/hwmon/sysfs-interface.rst)."""

    def files(pattern: str) -> int:
        return sum(1 for path in root.glob(pattern) if path.is_file())

    watts = files("sys/class/hwmon/hwmon*/power*_input") + files("sys/class/hwmon/hwmon*/power*_average")
    watts += files("sys/class/hwmon/hwmon*/curr*_input")
    watts += files("sys/bus/i2c/drivers/ina3221x/*/iio:device*/in_power*_input")
    return {
        "degC": files("sys/class/thermal/thermal_zone*/temp") + files("sys/class/hwmon/hwmon*/temp*_input"),
        "W": watts + (14 if (root / "usr/bin/vcgencmd").exists() else 0),
        "J": files("sys/class/powercap/*/energy_uj"),
    }


def machine_complaints(root: Path, tree: dict) -> list[str]:
    """What is wrong with the claims of any machine, simulated or not."""
    wrong = []
    there = inventory(root)
    for unit, most in there.items():
        claimed = [s["name"] for s in tree["sensors"] if s["unit"] == unit]
        if len(claimed) > most:
            wrong.append(f"{claimed} are claimed, and there are {most} readings in {unit}")
    for sensor in tree["sensors"]:
        low, high = MACHINE_LIMITS.get(sensor["unit"], (-math.inf, math.inf))
        if sensor["validity"] == "ok" and not low <= sensor["value"] <= high:
            wrong.append(f"{sensor['name']} is {sensor['value']} {sensor['unit']}")
        if (sensor["provenance"] == "simulated") != (root.resolve() != Path("/")):
            wrong.append(f"{sensor['name']} is {sensor['provenance']}")
    for sensor in sensors.find(root).sensors:
        for path in sensor.paths:
            if not path.is_relative_to(root) or not path.read_bytes():
                wrong.append(f"{sensor.name}: {path} does not read")
    return wrong


def test_every_claim_of_this_machine_is_there():
    root = os.environ.get("SPACEMOE_TEST_SYSROOT")
    if not root:
        pytest.skip("give SPACEMOE_TEST_SYSROOT=/ to check this machine")
    tree = claims(Path(root))
    assert machine_complaints(Path(root), tree) == []
    if not any(inventory(Path(root)).values()):
        assert tree["sensors"] == [] == tree["total"]


def test_the_machines_check_holds_for_a_board_and_notices_inventions(boards):
    _, folder = boards
    root = folder / _node("jetson-agx-orin", BUSY)
    tree = claims(root)
    assert machine_complaints(root, tree) == []
    invented = copy.deepcopy(tree)
    invented["sensors"] += [tree["sensors"][0] | {"name": f"temp_c.invented_{n}"} for n in range(20)]
    assert any("are claimed, and there are" in text for text in machine_complaints(root, invented))
    measured = copy.deepcopy(tree)
    measured["sensors"][0]["provenance"] = "measured"
    assert machine_complaints(root, measured)
    nonsense = copy.deepcopy(tree)
    nonsense["sensors"][0]["value"] = -256.0
    assert machine_complaints(root, nonsense)
