"""Calibration: the command `burn` on a real agent, the fit of its power step against a board whose network is known.

Expected values: a Foster network's closed form worked out here, and the branches given to the simulator. The end-to-end boards
are a stock agent each, one broker, one simulator. Board `wired` takes a load that a switch of the test turns on and off with the
burn, so that its watts do not depend on how busy this machine is; board `cpu` takes the agent's own CPU time.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from node_rig import AgentProcess, agent_tables, make_bundle

from firmware_sim.foster import FitError
from ground_station import calibrate as calibration
from ground_station import calibrate_report, cli
from ground_station.broker import Broker
from ground_station.power_step import CalibrateError, Measurement, Options, drift_k_per_min, power_between, reading
from node_agent import burn, experts, frame, wire
from node_agent.errors import CommandError
from node_agent.pacing import Pacer

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

BRANCHES = ((3.0, 1.5), (6.0, 8.0))
SUM, AMBIENT_C = 9.0, 20.0
ROOT = str(Path(__file__).resolve().parent.parent)


# ---------------------------------------------------------------- burn: orders and allowance


def test_orders_are_read_with_their_bounds():
    assert burn.parse_order({"seconds": "60", "duty": "0.5"}, 100.0) == burn.Order(0.5, 160.0)
    assert burn.parse_order({"seconds": "3600"}, 0.0) == burn.Order(1.0, 3600.0)
    assert burn.parse_order({"seconds": "0"}, 5.0) is None
    for duty in ("7", "nonsense", ""):  # a mistake beside it must not keep a load going
        assert burn.parse_order({"seconds": "0", "duty": duty}, 5.0) is None
    for arguments, says in (
        ({}, "seconds is ''"),
        ({"seconds": "3601"}, "0 to 3600"),
        ({"seconds": "nan"}, "seconds is 'nan'"),
        ({"seconds": "-1"}, "0 to 3600"),
        ({"seconds": "1" * 40}, "give a number"),
        ({"seconds": "9", "duty": "0"}, "0.01 to 1"),
        ({"seconds": "9", "duty": "2"}, "0.01 to 1"),
        ({"seconds": "9", "watts": "2"}, "'watts', which is unknown"),
    ):
        with pytest.raises(CommandError, match=says):
            burn.parse_order(arguments, 0.0)


def test_the_allowance_charges_burn_and_data_plane_on_one_line():
    """By hand, at duty 0.25 with a credit of 0.05 s: bursts of 0.02 s; a second of them is a share of 0.25 and the credit."""
    allowance, now_s, computed_s = burn.Allowance(0.0), 0.0, 0.0
    while now_s < 40.0:
        now_s += allowance.wait_s(now_s)
        now_s, computed_s = now_s + 0.02, computed_s + 0.02
        allowance.charge(now_s, 0.02, 0.25)
    assert computed_s / 40.0 == pytest.approx(0.25, abs=(0.05 + 0.02) / 40.0 + 1e-9)
    # the data plane computes its whole share, 0.01 s in each 0.04 s: a burn finds the credit once (0.05 s and a burst) and no more
    other, burned_s = burn.Allowance(0.0), 0.0
    for step in range(1, 1001):
        now_s = step * 0.04
        other.charge(now_s, 0.01, 0.25)
        if not other.wait_s(now_s):
            burned_s += 0.02
            other.charge(now_s + 0.02, 0.02, 0.25)
    assert burned_s <= 0.05 + 0.02
    # control: of a data plane that computes half of its share, the other half is left: 5 s of 40
    half, burned_s = burn.Allowance(0.0), 0.0
    for step in range(1, 1001):
        now_s = step * 0.04
        half.charge(now_s, 0.005, 0.25)
        if not half.wait_s(now_s):
            burned_s += 0.02
            half.charge(now_s + 0.02, 0.02, 0.25)
    assert burned_s == pytest.approx(5.0, abs=0.1)
    # at duty 1 nothing is ever held back
    free = burn.Allowance(0.0)
    free.charge(5.0, 5.0, 1.0)
    assert free.wait_s(5.0) == 0.0


class Rig:
    """A burn with nothing of an agent around it."""

    def __init__(self, loaded: experts.Experts | None = None):
        self.serving, self.pacer, self.events = burn.Serving(), Pacer(), []
        self.burn = burn.Burn(
            loaded or experts.Experts(hidden=1), self.serving, self.pacer, lambda *event: self.events.append(event)
        )

    def computed_s(self) -> float:
        return self.serving.burning.seconds("compute")

    def over(self, count: int = 1) -> None:
        until(lambda: sum("over after" in text for _, _, text in self.events) == count)


def until(condition, limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.02)


def test_a_burn_begins_ends_and_counts_as_computing():
    rig = Rig()
    with rig.burn:
        assert "duty 1 for 0.3 s" in rig.burn.order({"seconds": "0.3"})
        rig.over()
        assert rig.serving.seconds("compute") == rig.computed_s() > 0.1
        assert rig.serving.served_s("compute") == 0.0 and rig.serving.seconds("radio") == 0.0
        assert [kind for _, kind, _ in rig.events] == ["burn", "burn"] and "begins" in rig.events[0][2]
        # stopped before its time; and once more: there is none
        rig.burn.order({"seconds": "3000"})
        assert rig.burn.order({"seconds": "0"}) == "the burn is stopped"
        rig.over(2)
        assert rig.burn.order({"seconds": "0"}) == "there is no burn"
        rig.burn.order({"seconds": "3000"})
    # the agent ended: so has the burn, and no other begins
    rig.over(3)
    with pytest.raises(CommandError, match="about to stop"):
        rig.burn.order({"seconds": "1"})
    assert not [thread for thread in threading.enumerate() if thread.name == "burn"]


def test_a_second_order_replaces_the_first_in_one_thread():
    rig = Rig()
    with rig.burn:
        for _ in range(5):
            rig.burn.order({"seconds": "3000"})
        assert [thread.name for thread in threading.enumerate()].count("burn") == 1
        rig.burn.order({"seconds": "0.2"})
        rig.over()
        assert len(rig.events) == 2


def share(rig: Rig, seconds: float = 1.5) -> float:
    before_s, start_s = rig.computed_s(), time.monotonic()
    time.sleep(seconds)
    return (rig.computed_s() - before_s) / (time.monotonic() - start_s)


def test_the_guards_cap_holds_for_a_burn():
    """A share of wall-clock time, so a busy machine makes no difference. Control: without the cap it is nearly all."""
    rig = Rig()
    with rig.burn:
        rig.burn.order({"seconds": "3000"})
        until(lambda: rig.computed_s() > 0.0)
        assert share(rig) > 0.7
        rig.pacer.set(0.1)
        time.sleep(0.3)
        assert share(rig) < 0.45
        rig.pacer.set(1.0, "memory", "no memory")  # no work is taken: no burn either
        time.sleep(0.3)
        assert share(rig, 0.5) == 0.0
        rig.pacer.set(0.0)
        assert share(rig, 0.5) == 0.0
        rig.pacer.set(1.0)
        assert share(rig) > 0.5


def test_a_burn_gives_way_to_a_data_plane_that_takes_the_whole_cap():
    rig = Rig()
    rig.pacer.set(0.3)
    with rig.burn:
        rig.serving.enter("compute")  # what follows is computing without end, over any cap
        rig.burn.order({"seconds": "3000"})
        time.sleep(0.5)
        assert share(rig, 1.0) < 0.05
        rig.serving.leave()
        # control: after what was computed is paid off (2 s cost 6.7), it goes on
        until(lambda: share(rig, 0.5) > 0.05)


def test_a_burn_that_cannot_run_says_so_and_ends(monkeypatch):
    rig = Rig()
    monkeypatch.setattr(burn, "open_session", lambda graph: 1 / 0)
    with rig.burn:
        rig.burn.order({"seconds": "3000"})
        rig.over()
        assert [severity for severity, _, _ in rig.events] == ["info", "warning", "info"]
        assert "ZeroDivisionError" in rig.events[1][2] and "selftest" in rig.events[1][2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def test_a_burn_leaves_the_data_planes_results_alone(bundle):
    """The same requests beside a burn of the same experts: bit for bit what they were before."""
    loaded = experts.load(bundle.root, bundle.stems, 10**12)
    x = np.random.default_rng(7).standard_normal((1, 64)).astype(np.float32)
    pairs = np.array([(0, 1, frame.PRECISION_ID["int8"], 0.7), (0, 2, frame.PRECISION_ID["fp32"], 0.3)], frame.PAIR)
    before = [loaded.run(layer, x * scale, pairs).copy() for layer in (0, 1) for scale in (1, 2, 3)]
    np.testing.assert_allclose(before[0], bundle.partial(0, x, [tuple(pair) for pair in pairs.tolist()]), atol=2e-2)
    rig = Rig(loaded)
    with rig.burn:
        rig.burn.order({"seconds": "3000"})
        until(lambda: rig.computed_s() > 0.05)
        for _ in range(300):
            beside = [loaded.run(layer, x * scale, pairs).copy() for layer in (0, 1) for scale in (1, 2, 3)]
            assert all(np.array_equal(a, b) for a, b in zip(before, beside))
        assert rig.computed_s() > 0.05 and not [event for event in rig.events if event[0] == "warning"]


# ---------------------------------------------------------------- the measurement, without a network


def message(number: int, uptime_s: float, temp_c: float, power_w: float, energy_j: float, **more) -> wire.Telemetry:
    """As an agent sends it: the temperature was read 50 ms before the message was made."""
    at = 1_800_000_000.0 + uptime_s
    values = {"uptime_s": uptime_s, "power_w": power_w, "energy_j": energy_j, "duty": 1.0, "duty_cap": 1.0} | more
    samples = [wire.Sample(name, value, "", "ok", "measured", "x", at) for name, value in values.items()]
    samples.append(wire.Sample("temp_c", temp_c, "degC", "ok", "measured", "module", at - 0.05))
    return wire.Telemetry("n1", 1, number, at, tuple(samples), 1, number)


def messages(seed: int | None = None, period_s: float = 0.2, idle_w: float = 1.25, busy_w: float = 6.0) -> list:
    """10 s idle and 25 s busy of BRANCHES by their closed form; with a seed 0.3 K of noise and steps of 0.55 K."""
    random = np.random.default_rng(seed)
    found, energy_j = [], 0.0
    for index in range(175):
        made_s = (index - 50) * period_s
        read_s = made_s - 0.05
        rise_k = sum(r * (1.0 - np.exp(-max(read_s + 0.05, 0.0) / tau)) for r, tau in BRANCHES)
        temp_c = AMBIENT_C + SUM * idle_w + (busy_w - idle_w) * rise_k
        if seed is not None:
            temp_c = round((temp_c + random.normal(0.0, 0.3)) / 0.55) * 0.55
        power_w = busy_w if made_s > 1e-9 else idle_w
        energy_j += power_w * period_s
        found.append(message(index + 1, 100.0 + made_s, temp_c, power_w, energy_j))
    return found


OPTIONS = Options("n1", window_s=8.0, settle_s=10.0, step_s=25.0)


def measured(found: list[wire.Telemetry], options: Options = OPTIONS) -> Measurement:
    readings = [reading(each) for each in found]
    measurement = Measurement(readings[:50], options)
    for index, each in enumerate(readings[50:]):
        measurement.add(each, burning_s=index * 0.2)
    return measurement


def test_the_closed_form_comes_back():
    """Exact to the fit's grid (0.1 %), idle and busy watts too."""
    measurement = measured(messages())
    found = measurement.estimate()
    assert [(b.r_k_per_w, b.tau_s) for b in found.branches] == [pytest.approx(b, rel=2e-3) for b in BRANCHES]
    assert found.ambient_c == pytest.approx(AMBIENT_C, abs=0.02) and found.residual_k < 0.01
    assert (measurement.idle_w, measurement.busy_w) == (pytest.approx(1.25), pytest.approx(6.0))
    assert measurement.cautions == [] and measurement.skipped == 0


def test_power_belongs_to_the_time_before_its_message():
    """Negative control: watts taken for what flows after their message, one period late, are noticed."""
    late = messages()
    watts = [reading(each).power_w for each in late]
    wrong = [
        message(i + 1, reading(m).time_s + 0.05, reading(m).temp_c, watts[max(0, i - 3)], 0.0)
        for i, m in enumerate(late)
    ]
    readings = [reading(each) for each in wrong]
    joules = np.cumsum([each.power_w * 0.2 for each in readings])
    readings = [replace(each, energy_j=float(j)) for each, j in zip(readings, joules)]
    measurement = Measurement(readings[:50], OPTIONS)
    for each in readings[50:]:
        measurement.add(each, 5.0)
    try:
        assert measurement.estimate().residual_k > 0.2  # 0.01 at most when it is right
    except FitError:
        pass


@pytest.mark.parametrize("first", [0, 5])
def test_noise_and_steps_of_a_raspberry_pi_leave_five_percent_and_half_a_kelvin(first):
    for seed in range(first, first + 5):
        found = measured(messages(seed)).estimate()
        assert found.r_k_per_w == pytest.approx(SUM, rel=0.05), seed
        assert found.ambient_c == pytest.approx(AMBIENT_C, abs=0.5), seed


def test_lost_messages_are_bridged_by_joules():
    kept = [each for each in messages() if each.number % 7 and not 55 < each.number < 60]
    readings = [reading(each) for each in kept]
    idle = [each for each in readings if each.number <= 50]
    measurement = Measurement(idle, OPTIONS)
    for each in readings[len(idle) :]:
        measurement.add(each, 5.0)
    assert measurement.estimate().r_k_per_w == pytest.approx(SUM, rel=5e-3)
    # by hand: 1.25 W for one period and 6 W for two
    a, b = reading(messages()[48]), reading(messages()[52])
    assert power_between(a, b) == pytest.approx((2 * 1.25 + 2 * 6.0) / 4)


def test_a_step_that_is_too_small_is_refused_with_a_next_step():
    with pytest.raises(CalibrateError, match=r"rose by 0\.40 W only, 0\.5 W are needed: check that the sensor"):
        measured(messages(busy_w=1.65)).check_step()
    measured(messages(busy_w=1.85)).check_step()


def test_guard_and_flags_become_cautions():
    found = messages()
    hot = replace(reading(found[90]), guard=1 | 8, cap=0.4, duty=0.4, limit_c=80.0, flags=frozenset({"throttled"}))
    measurement = Measurement([reading(each) for each in found[:50]], OPTIONS)
    for index, each in enumerate(found[50:]):
        measurement.add(hot if index == 40 else reading(each), burning_s=index * 0.2)
    text = " ".join(measurement.cautions)
    assert "for heat" in text and "duty cap" in text and "throttled" in text and len(measurement.cautions) == 3
    flags = reading(
        message(1, 1.0, 50.0, 3.0, 3.0, **{"flag.throttled": 1.0, "flag.throttled_since_boot": 1.0, "flag.x": 0.0})
    )
    assert flags.flags == {"throttled"}
    early = Measurement([reading(each) for each in found[:50]], OPTIONS)
    early.add(replace(reading(found[50]), guard=16), burning_s=0.1)  # of before the step
    assert early.cautions == []


def test_a_slow_branch_that_was_not_waited_for_is_said():
    measurement = measured(messages(), replace(OPTIONS, step_s=12.0))
    measurement.judge(measurement.estimate())
    assert "give a longer --step-s" in measurement.cautions[0]
    free = measured(messages())
    free.judge(free.estimate())
    assert free.cautions == []


def test_progress_without_a_terminal_is_one_plain_line_for_each_phase(capsys):
    for phase, total_s in (("settle", 1800.0), ("step", 60.0), ("cool", 0.0)):
        with calibration.Progress(phase, total_s) as progress:
            progress.show(reading(messages()[0]), "more")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "calibrate: waiting until the board rests, at most 1800 s",
        "calibrate: burning for 60 s",
    ]
    assert captured.out == ""


def test_drift_is_the_slope_of_a_line():
    """3 K in a minute by construction."""
    readings = [replace(reading(each), temp_c=20.0 + 0.05 * reading(each).time_s) for each in messages()[:50]]
    assert drift_k_per_min(readings) == pytest.approx(3.0)


# ---------------------------------------------------------------- errors of the command line


def run_cli(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["calibrate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("n1", "--broker", "127.0.0.1:9"), "no MQTT 5 broker answers at 127.0.0.1:9: start"),
        (("n1", "--broker", ""), "is not HOST:PORT"),
        (("Not Legal", "--broker", "127.0.0.1:9"), "not legal"),
        (("n1", "--step-s", "1"), "step_s is 1.0: give a number from 10"),
        (("n1", "--branches", "9"), "branches is 9"),
        (("n1", "--drift", "nan"), "drift_k_per_min is nan"),
        (("n1", "--output", "/nowhere/x.toml"), "give --output a file"),
    ],
)
def test_bad_use_is_one_line_with_the_next_step(capsys, arguments, says):
    code, out, err = run_cli(capsys, *arguments)
    assert code in (1, 2) and out == "" and says in err and err.count("\n") == 1


# ---------------------------------------------------------------- end to end


class Fleet:
    """One broker, one simulator, four agents: wired, cpu, faint (a step of 0.2 W) and blind (a temperature and no power)."""

    BOARDS = ("wired", "cpu", "faint")

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        self.broker = stack.enter_context(Broker(folder))
        boards = []
        for node in self.BOARDS:
            (folder / node).mkdir()
            board = {
                "node": node,
                "profile": "raspberry-pi-5-ina226",
                "sysroot": str(folder / node / "sysroot"),
                "state_file": str(folder / node / "truth.json"),
                "ambient_c": AMBIENT_C,
                "foster": [list(branch) for branch in BRANCHES],
                "idle_w": 1.0,
                "max_w": 6.0,
            }
            if node == "cpu":
                # a quarter of a core is full load: what even a busy machine may give
                boards.append(board | {"pid_file": str(folder / node / "agent.pid"), "cores": 0.25})
            else:
                self.switch(node, 0.0)
                more = {"load_trace": [[0, 1]], "cap_file": str(folder / node / "cap")}
                boards.append(board | more | ({"max_w": 1.2} if node == "faint" else {}))
        (folder / "spec.json").write_text(json.dumps({"boards": boards}))
        self.simulator = subprocess.Popen(
            [sys.executable, "-m", "firmware_sim.run", "--spec", str(folder / "spec.json")], cwd=ROOT
        )
        stack.callback(self._stop_simulator)
        zone = folder / "blind" / "sysroot" / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True)
        (zone / "type").write_text("cpu-thermal\n")
        (zone / "temp").write_text("45000\n")
        until(lambda: all((folder / node / "truth.json").exists() for node in self.BOARDS))
        self.agents = {}
        for node in (*self.BOARDS, "blind"):
            tables = agent_tables(folder / node, "tcp://127.0.0.1:9", broker=self.broker)
            tables["node"] |= {"id": node, "sysroot": str(folder / node / "sysroot")}
            tables["telemetry"]["period_s"] = 0.2
            if node == "wired":
                tables["guard"] = {"temp_limit_c": 110}  # so that its guard has nothing to do; the others' have 80 °C
            self.agents[node] = stack.enter_context(AgentProcess(folder / node, tables))
            (folder / node / "agent.pid").write_text(str(self.agents[node].process.pid))

    def _stop_simulator(self) -> None:
        self.simulator.terminate()
        self.simulator.wait(10)

    def switch(self, node: str, load: float) -> None:
        partial = self.folder / node / "cap.new"
        partial.write_text(f"{load}\n")
        partial.rename(self.folder / node / "cap")

    def burns(self, node: str) -> tuple[int, int]:
        """How many burns began and ended."""
        text = self.agents[node].text()
        return text.count("burn: begins"), text.count("burn: over")

    def follow(self, node: str, ended: threading.Event) -> None:
        """Turns the load of a board on when its burn begins, off when it ends."""
        while not ended.wait(0.02):
            begun, over = self.burns(node)
            self.switch(node, 1.0 if begun > over else 0.0)

    def command(self, options: Options) -> dict | Exception:
        """The same by the command line, which also writes its fragment."""
        call = [sys.executable, "-m", "ground_station.cli", "calibrate", options.node, "--json"]
        for name, value in (
            ("broker", f"{self.broker.host}:{self.broker.port}"),
            ("fleet", options.fleet),
            ("settle-s", options.settle_s),
            ("window-s", options.window_s),
            ("drift", options.drift_k_per_min),
            ("step-s", options.step_s),
            ("output", self.folder / "fragment.toml"),
        ):
            call += [f"--{name}", str(value)]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=200)
        return json.loads(done.stdout) if done.returncode == 0 else CalibrateError(done.stderr)

    def simulate(self, options: Options, bundle: Path) -> dict | Exception:
        """A board of `--simulated`: broker, link, agent with shards and simulator are all its own."""
        keys = {"foster": [list(branch) for branch in BRANCHES], "ambient_c": AMBIENT_C, "idle_w": 1.0, "max_w": 6.0}
        try:
            with calibration.simulated("raspberry-pi-5-ina226", "sim", bundle, "test", cores=0.25, **keys) as address:
                return calibration.calibrate(options, *address)
        except Exception as error:
            return error

    def calibrate(self, options: Options) -> dict | Exception:
        try:
            return calibration.calibrate(options, self.broker.host, self.broker.port)
        except Exception as error:
            return error


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with ExitStack() as stack:
        yield Fleet(tmp_path_factory.mktemp("fleet"), stack)


@pytest.fixture(scope="module")
def results(fleet, bundle) -> dict:
    """All calibrations at once: they take half a minute, nearly all of it waiting."""
    found, ended = {}, threading.Event()
    options = Options("wired", "test", settle_s=30.0, window_s=8.0, drift_k_per_min=4.0, step_s=25.0)

    def run(node: str) -> None:
        mine = replace(options, node=node)
        if node == "sim":
            found[node] = fleet.simulate(replace(mine, window_s=12.0), bundle.root)
        else:
            found[node] = (fleet.command if node == "cpu" else fleet.calibrate)(mine)

    threads = [threading.Thread(target=run, args=(node,)) for node in (*Fleet.BOARDS, "blind", "absent", "sim")]
    switches = [threading.Thread(target=fleet.follow, args=(node, ended)) for node in ("wired", "faint")]
    for thread in (*switches, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    for thread in switches:
        thread.join()
    return found


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.broker
def test_a_known_board_is_found_again(results, fleet):
    """Through a real agent's sampler, MQTT and the fit on line: the branches given to the simulator."""
    result = results["wired"]
    print(json.dumps(result) if isinstance(result, dict) else repr(result))
    assert isinstance(result, dict), result
    assert result["fit"]["r_k_per_w"] == pytest.approx(SUM, rel=0.05)
    assert result["fit"]["ambient_c"] == pytest.approx(AMBIENT_C, abs=0.5)
    assert (result["idle_w"], result["busy_w"]) == (pytest.approx(1.0, abs=0.03), pytest.approx(6.0, abs=0.1))
    assert result["fit"]["residual_k"] < 0.6 and result["fit"]["n"] > 60
    assert result["cautions"] == [] and result["limit_c"] == 110.0
    assert result["provenance"] == {"temp_c": "simulated", "power_w": "simulated"}
    assert fleet.burns("wired") == (1, 1)
    # negative control: the profile's own network (7.28 K/W) is not what was found
    assert abs(result["fit"]["r_k_per_w"] / 7.28 - 1.0) > 0.15
    # what is written is TOML with the fields of a scenario
    tree = tomllib.loads(calibrate_report.fragment(result))
    assert tree["payload"] == {"idle_w": result["idle_w"], "busy_w": result["busy_w"]}
    assert sum(r for r, _ in tree["board"][0]["foster"]) == pytest.approx(result["fit"]["r_k_per_w"], abs=1e-3)
    assert "K/W" in calibrate_report.report(result) and "simulated" in calibrate_report.report(result)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.broker
@pytest.mark.parametrize("node", ["cpu", "sim"])
def test_the_agents_own_computing_heats_its_board(results, fleet, node):
    """Watts from the agent's CPU time, which comes in ticks of 10 ms: coarser than the wired board's, and so are the bounds.

    `cpu` runs the self-test's expert and was asked for by the command line, `sim` runs a bundle's shards.
    """
    result = results[node]
    print(json.dumps(result) if isinstance(result, dict) else repr(result))
    if isinstance(result, CalibrateError) and os.getloadavg()[0] > 2 * len(os.sched_getaffinity(0)):
        pytest.skip(f"this machine is too busy for a load to show: {result}")
    assert isinstance(result, dict), result
    assert result["busy_w"] - result["idle_w"] > 0.5
    assert result["fit"]["r_k_per_w"] == pytest.approx(SUM, rel=0.2)
    if node == "cpu":
        assert fleet.burns("cpu") == (1, 1)
        assert tomllib.loads((fleet.folder / "fragment.toml").read_text())["payload"]["idle_w"] == result["idle_w"]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.broker
@pytest.mark.parametrize(
    ("node", "says"),
    [
        ("absent", "no node absent in fleet test within 10 s; there are blind, cpu, faint, wired"),
        ("blind", "blind has no power sensor that measures the whole board: attach one"),
        ("faint", r"the power of faint rose by 0\.\d\d W only, 0.5 W are needed"),
    ],
)
def test_boards_that_cannot_be_calibrated(results, fleet, node, says):
    assert isinstance(results[node], CalibrateError)
    assert re.search(says, str(results[node])), results[node]
    if node == "faint":  # refused in the step: the burn is over
        assert fleet.burns("faint") == (1, 1)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.broker
def test_ctrl_c_ends_the_burn_on_the_board(results, fleet):
    """Also when the agent is ended in the middle of a burn, it ends cleanly."""
    begun, over = fleet.burns("wired")
    command = [sys.executable, "-m", "ground_station.cli", "calibrate", "wired", "--fleet", "test", "--broker"]
    command += [f"{fleet.broker.host}:{fleet.broker.port}", "--settle-s", "5", "--window-s", "5", "--drift", "100"]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until(lambda: fleet.burns("wired")[0] == begun + 1 or child.poll() is not None, 60)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, ""), err
    assert "interrupted" in err and "did not confirm" not in err
    until(lambda: fleet.burns("wired") == (begun + 1, over + 1), 3.0)  # a burn that nobody renews would go on for 20 s
    agent = fleet.agents["wired"]
    with calibration.Control("test", fleet.broker.host, fleet.broker.port) as control:
        assert not control.wait_for(["wired"], 10.0)
        assert control.command("wired", "burn", arguments={"seconds": "7"}).ok
        assert "seconds is 'x'" in control.command("wired", "burn", arguments={"seconds": "x"}).text
        until(lambda: fleet.burns("wired") == (begun + 2, over + 1))
        agent.process.terminate()
        assert agent.process.wait(10) == 0
        until(
            lambda: any(event.kind == "burn" and "over" in event.text for event in control.snapshot()["wired"].events)
        )


@pytest.mark.parametrize("path", ["/dev/full", "/dev/null", "/proc/1/x", ".", "absent/x.toml", "a\0b"])
def test_a_file_that_cannot_be_written_is_told_before_the_step(path):
    with pytest.raises(OSError, match="give --output a file in a folder that is there") as caught:
        calibrate_report.check_writable(Path(path))
    assert "\n" not in str(caught.value)


def test_asking_whether_a_file_can_be_written_leaves_nothing_and_changes_nothing(tmp_path):
    path = tmp_path / "x.toml"
    calibrate_report.check_writable(path)
    assert not list(tmp_path.iterdir())
    path.write_text("kept")
    calibrate_report.check_writable(path)
    assert path.read_text() == "kept" and len(list(tmp_path.iterdir())) == 1
