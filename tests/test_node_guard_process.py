"""The guard in real agent processes: the command `duty` over real brokers, a silent ground station, short memory, and heat
below a simulated sysroot. Messages are read as plain JSON, not through our decoder.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import pytest
from node_rig import AgentProcess, Ground, Observer, agent_tables, make_bundle
from test_node_guard_pacing import work

from ground_station.broker import Broker
from node_agent import frame, guard

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def ask(observer: Observer, name: str, arguments: dict[str, str]) -> dict:
    identity = secrets.token_hex(4)
    tree = {"name": name, "id": identity, "expires_at": time.time() + 30, "arguments": arguments}
    observer.command(name, tree)
    return observer.next("result", lambda result: result["id"] == identity)


def telemetry(observer: Observer, condition) -> dict[str, float | None]:
    """Values by name of the next telemetry message for which the condition on them holds."""

    def values(tree: dict) -> dict[str, float | None]:
        return {sample["name"]: sample["value"] for sample in tree["samples"]}

    return values(observer.next("telemetry", lambda tree: condition(values(tree))))


def test_duty_command_and_its_fall_back(bundle, broker, tmp_path):
    """The cap acts, runs out to the silent duty, and cap 1 lifts it; then the ground station goes, comes back, and is heard."""
    tables = agent_tables(tmp_path, "", bundle, broker) | {"guard": {"silent_s": 2, "silent_duty": 0.4}}
    with Ground() as ground, Observer(broker.host, broker.port) as observer:
        tables["data"]["endpoint"] = ground.endpoint
        with AgentProcess(tmp_path, tables):
            observer.next("status", lambda tree: tree["status"] == "online")
            first = telemetry(observer, lambda v: True)
            assert first["duty_cap"] == 1.0 and not int(first["guard_state"]) & (guard.SILENT | guard.GROUND)
            for bad in ({"cap": "2", "valid_s": "1"}, {"cap": "0.5"}, {"cap": "x", "valid_s": "1"}):
                result = ask(observer, "duty", bad)
                assert not result["ok"] and "give a number" in result["text"]
            result = ask(observer, "duty", {"cap": "0.25", "valid_s": "1.5"})
            assert result["ok"] and "0.25" in result["text"]
            got = telemetry(observer, lambda v: v["duty_cap"] == 0.25)
            assert int(got["guard_state"]) & guard.GROUND
            assert "0.25" in observer.next("event", lambda tree: tree["kind"] == "duty")["text"]
            got = telemetry(observer, lambda v: v["duty_cap"] == 0.4)
            assert int(got["guard_state"]) & guard.SILENT
            assert observer.next("event", lambda tree: tree["kind"] == "ground_silent")["severity"] == "warning"
            assert ask(observer, "duty", {"cap": "1", "valid_s": "10"})["ok"]
            telemetry(observer, lambda v: v["duty_cap"] == 1.0)
            # nobody says anything from here on
            text = observer.next(
                "event", lambda tree: tree["kind"] == "ground_silent" and tree["severity"] == "warning"
            )
            assert "silent for over 2 s" in text["text"]
            telemetry(observer, lambda v: v["duty_cap"] == 0.4)
            assert ground.ask_until_answered(work(1, 60_000))[0].kind == frame.PARTIAL  # heard again, and served
            telemetry(observer, lambda v: v["duty_cap"] == 1.0)


def test_before_a_ground_station_was_ever_there_the_board_serves_by_its_own_guard(bundle, tmp_path):
    with Broker(tmp_path, "embedded") as broker, Observer(broker.host, broker.port) as observer:
        tables = agent_tables(tmp_path, "tcp://127.0.0.1:9", bundle, broker) | {"guard": {"silent_s": 1}}
        with AgentProcess(tmp_path, tables):
            got = telemetry(observer, lambda v: v["uptime_s"] > 3)
            assert got["duty_cap"] == 1.0 and not int(got["guard_state"]) & guard.SILENT


def test_short_memory_refuses_new_work_and_says_so(bundle, tmp_path):
    """The floor is set above what any machine has, so that memory is short in truth."""
    with Broker(tmp_path, "embedded") as broker, Observer(broker.host, broker.port) as observer, Ground() as ground:
        tables = agent_tables(tmp_path, ground.endpoint, bundle, broker) | {"guard": {"memory_floor_mb": 2**24}}
        with AgentProcess(tmp_path, tables):
            answer, _ = ground.ask_until_answered(work(5))
            assert answer.kind == frame.ERROR and answer.text.startswith("n1: memory: ") and "MB" in answer.text
            ping = frame.Frame(frame.PING, request_id=6)
            assert ground.ask(ping).kind == frame.PONG
            event = observer.next("event", lambda tree: tree["kind"] == "memory")
            assert event["severity"] == "warning" and "floor" in event["text"]
            assert observer.next("event", lambda tree: tree["kind"] == "refused")
            got = telemetry(observer, lambda v: v.get("errors.link.memory", 0) >= 1)
            assert int(got["guard_state"]) & guard.MEMORY and got["duty_cap"] == 1.0


def write_zone(root: Path, temp_mc: str) -> None:
    """A zone as Documentation/ABI/testing/sysfs-class-thermal has it, with an Orin's trip points."""
    zone = root / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True, exist_ok=True)
    files = {"type": "tj-thermal", "trip_point_0_temp": "104500", "trip_point_0_type": "critical"}
    files |= {"trip_point_1_temp": "95000", "trip_point_1_type": "passive", "temp": temp_mc}
    for name, text in files.items():
        partial = zone / f".{name}"
        partial.write_text(text + "\n")
        partial.rename(zone / name)


def test_heat_and_lost_sensors_below_a_sysroot(bundle, tmp_path):
    root = tmp_path / "root"
    write_zone(root, "50000")
    with Broker(tmp_path, "embedded") as broker, Observer(broker.host, broker.port) as observer, Ground() as ground:
        tables = agent_tables(tmp_path, ground.endpoint, bundle, broker)
        tables["node"]["sysroot"] = str(root)
        tables["guard"] = {"floor_duty": 0.05, "unknown_duty": 0.3}
        with AgentProcess(tmp_path, tables) as agent:
            got = telemetry(observer, lambda v: v["uptime_s"] > 1)
            assert (got["guard_limit_c"], got["duty_cap"]) == (95.0, 1.0)
            write_zone(root, "73000")  # over the limit, in steps that a sensor is believed at once
            telemetry(observer, lambda v: v["temp_c"] == 73.0)
            write_zone(root, "96000")
            telemetry(observer, lambda v: v["duty_cap"] == 0.05)
            kinds = {observer.next("event", lambda t: t["kind"] in ("thermal", "over_limit"))["kind"] for _ in range(2)}
            assert kinds == {"thermal", "over_limit"}
            write_zone(root, "73000")
            telemetry(observer, lambda v: v["temp_c"] == 73.0)
            write_zone(root, "50000")
            telemetry(observer, lambda v: v["duty_cap"] == 1.0)
            write_zone(root, "-256000")  # an unpowered zone: invalid
            got = telemetry(observer, lambda v: v["duty_cap"] == 0.3)
            assert int(got["guard_state"]) & guard.UNKNOWN_TEMP
            (root / "sys/class/thermal/thermal_zone0/temp").unlink()
            assert telemetry(observer, lambda v: True)["duty_cap"] == 0.3
            write_zone(root, "50000")
            telemetry(observer, lambda v: v["duty_cap"] == 1.0)
            assert "heat is not guarded" not in agent.text()
