"""Virtual satellites over a real broker: what boards say goes in, states and duty caps come out as MQTT messages.

The board is a paho client with JSON written by hand.
"""

from __future__ import annotations

import json
import queue
import time

import paho.mqtt.client as mqtt
import pytest

from firmware_sim import contact, scenario
from ground_station.control import Control
from ground_station.scenario_demo import SHIPPED, find, table
from ground_station.twin import Twin
from ground_station.twin_summary import summary

pytestmark = pytest.mark.broker
WAIT_S = 10.0
SCENARIO = """
name = "one"
[time]
start = 2026-06-21T00:00:00Z
scale = 50
[bus]
start_c = 10
[payload]
limit_c = {limit_c}
idle_w = 3
busy_w = 9
[[board]]
node = "n1"
profile = "raspberry-pi-4-ina226"
"""


class Board:
    """A node that says hand-written things and keeps what it is told."""

    def __init__(self, broker):
        self.told: queue.Queue = queue.Queue()
        self._seq = 0
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="board-n1", protocol=mqtt.MQTTv5)
        self._client.on_message = lambda _c, _u, message: self.told.put((message.topic, json.loads(message.payload)))
        self._client.connect(broker.host, broker.port)
        self._client.subscribe([("spacemoe/v1/test/node/n1/command/+", 1), ("spacemoe/v1/test/satellite/+", 1)])
        self._client.loop_start()
        birth = {
            "node": "n1",
            "bd_seq": 1,
            "agent_version": "0.1.0",
            "board": "bench",
            "generated_at": time.time(),
            "sensors": [],
            "shards": [],
            "bundle": "",
            "memory_bytes": 1000,
            "data_endpoint": "",
            "data_public_key": "",
        }
        self._say("birth", birth, retain=True)
        self._say("status", {"node": "n1", "status": "online", "bd_seq": 1}, retain=True)

    def _say(self, leaf: str, tree: dict, retain: bool = False) -> None:
        topic = f"spacemoe/v1/test/node/n1/{leaf}"
        self._client.publish(topic, json.dumps(tree), qos=1, retain=retain).wait_for_publish(WAIT_S)

    def telemetry(self, **values: float) -> None:
        self._seq += 1
        units = {"power_w": "W", "temp_c": "degC", "guard_state": "bits"}
        samples = [
            {
                "name": name,
                "value": value,
                "unit": units.get(name, "flag"),
                "validity": "ok",
                "provenance": "measured",
                "scope": "board",
                "generated_at": time.time(),
            }
            for name, value in values.items()
        ]
        message = {"node": "n1", "bd_seq": 1, "seq": self._seq, "generated_at": time.time(), "samples": samples}
        self._say("telemetry", message)

    def next(self, leaf: str) -> dict:
        """The next message whose topic ends with `leaf`."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            topic, tree = self.told.get(timeout=max(0.01, end - time.monotonic()))
            if topic.endswith(leaf):
                return tree
        raise AssertionError(f"nothing on {leaf}")

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def board(broker):
    made = Board(broker)
    yield made
    made.close()


@pytest.fixture
def control(broker, board):
    with Control("test", broker.host, broker.port) as running:
        end = time.monotonic() + WAIT_S
        while (
            "n1" not in running.snapshot()
        ):  # its subscriptions have reached the broker: nothing is said too early to be heard
            assert time.monotonic() < end
            time.sleep(0.01)
        yield running


def heard(control: Control, name: str, value: float) -> None:
    """Waits until the ground station knows that sample of the board."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        state = control.snapshot().get("n1")
        if state is not None and name in state.samples and state.samples[name].value == value:
            return
        time.sleep(0.01)
    raise AssertionError(f"{name} = {value} was not heard")


def one(limit_c: float = 90.0) -> scenario.Scenario:
    return scenario.parse(SCENARIO.format(limit_c=limit_c))


def test_measured_watts_warm_the_satellite_and_its_cap_reaches_the_board(board, control):
    twin = Twin(one(), control)
    board.telemetry(power_w=9.0, temp_c=41.5)
    heard(control, "power_w", 9.0)
    for _ in range(30):
        twin.advance(1.0)
    state = board.next("satellite/n1")
    values = {sample["name"]: sample for sample in state["samples"]}
    assert {sample["provenance"] for sample in values.values()} == {"virtual"}
    assert values["payload_w"]["value"] == pytest.approx(9.0)
    assert state["scale"] == 50.0 and state["invalid"] == ""
    assert state["mission_at"] == pytest.approx(1782000000 + 50.0)  # 2026-06-21T00:00:00Z and one step
    assert values["temp_c"]["value"] > 50.0  # 16.6 K/W times 3 W and more; the bench says 41.5
    order = board.next("command/duty")
    cap = float(order["arguments"]["cap"])
    assert 0.05 <= cap < 1.0 and float(order["arguments"]["valid_s"]) == 5.0
    assert order["expires_at"] > time.time()
    [view] = twin.views()
    assert view.board_c == 41.5 and view.temp_c > 90.0  # 9 W for 25 minutes of mission time, whatever the cap says
    rows = summary(twin).satellites["n1"]
    assert rows["over_limit_s"] > 0 and rows["lowest_duty_cap"] == pytest.approx(0.05)


def test_a_cool_satellite_sends_no_order(board, control):
    twin = Twin(one(limit_c=190.0), control)
    board.telemetry(power_w=3.0, temp_c=40.0)
    heard(control, "power_w", 3.0)
    twin.advance(1.0)
    board.next("satellite/n1")
    assert board.told.empty() and summary(twin).valid


@pytest.mark.parametrize(
    ("says", "because"),
    [({"flag.throttled": 1.0}, "throttled"), ({"guard_state": 1.0}, "its own guard"), ({"flag.throttled": 0.0}, "")],
)
def test_a_board_that_slows_down_although_its_satellite_allows_all_makes_the_run_invalid(board, control, says, because):
    twin = Twin(one(limit_c=190.0), control)
    board.telemetry(power_w=3.0, temp_c=84.0, **says)
    heard(control, "temp_c", 84.0)
    twin.advance(1.0)
    result = summary(twin)
    assert result.valid is (not because) and all(because in reason for reason in result.reasons)
    assert because in board.next("satellite/n1")["invalid"]


def test_the_same_board_is_no_fault_of_the_run_while_its_satellite_caps_it(board, control):
    twin = Twin(one(limit_c=60.0), control)
    board.telemetry(power_w=9.0, temp_c=84.0)
    heard(control, "temp_c", 84.0)
    twin.advance(2.0)
    assert twin.views()[0].cap < 1.0
    board.telemetry(power_w=4.0, temp_c=84.5, **{"flag.throttled": 1.0})
    heard(control, "temp_c", 84.5)
    twin.advance(1.0)
    assert summary(twin).valid


def test_a_board_that_is_not_heard_counts_as_busy_and_the_time_is_told(control):
    twin = Twin(one(), control)
    twin.advance(2.0)
    assert twin.views()[0].payload_w == 9.0
    assert summary(twin).satellites["n1"]["unknown_power_s"] == pytest.approx(100.0)


def test_a_meter_that_is_wired_the_wrong_way_round_counts_as_unknown(board, control):
    twin = Twin(one(), control)
    board.telemetry(power_w=-5.0, temp_c=40.0)
    heard(control, "power_w", -5.0)
    twin.advance(2.0)
    assert twin.views()[0].payload_w == 9.0
    assert summary(twin).satellites["n1"]["unknown_power_s"] == pytest.approx(100.0)


def test_physics_that_diverge_end_the_twin_with_a_reason_and_the_run_is_invalid(board, control):
    extreme = "[payload]\nleak_w_per_k = 100\nr_k_per_w = [1000]\ntau_s = [0.001]"
    scale = SCENARIO.format(limit_c=90).replace("scale = 50", "scale = 5000").replace("[payload]", extreme)
    twin = Twin(scenario.parse(scale), control, period_s=0.02)
    board.telemetry(power_w=5.0, temp_c=40.0)
    heard(control, "power_w", 5.0)
    with twin:
        end = time.monotonic() + WAIT_S
        while twin.failed is None and time.monotonic() < end:
            time.sleep(0.01)
    assert "lower leak_w_per_k" in str(twin.failed)
    result = summary(twin)
    assert not result.valid and "the virtual satellites stopped" in result.reasons[0]


LINKS = """
[links]
gateway = "ground"
latitude_deg = 0
longitude_deg = {longitude_deg}
least_elevation_deg = 10
gsl_rate_bps = 3e6
[[board]]"""


def linked(longitude_deg: float) -> scenario.Scenario:
    text = SCENARIO.format(limit_c=90).replace("[[board]]", LINKS.format(longitude_deg=longitude_deg))
    return scenario.parse(text)


def test_links_are_published_as_virtual_signals_and_missing_where_there_is_no_way(board, control):
    """The satellite starts over the equator, at the longitude that is under the vernal equinox at that time: 90.5 degrees east."""
    twin = Twin(linked(90.5), control)
    board.telemetry(power_w=3.0, temp_c=40.0)
    heard(control, "power_w", 3.0)
    seen = []
    for _ in range(12):  # ten minutes of mission time; the pass ends after four
        twin.advance(1.0)
        seen.append({sample["name"]: sample for sample in board.next("satellite/n1")["samples"]})
    first, last = seen[0], seen[-1]
    names = ("link_up", "link_delay_s", "link_rate_bps", "link_hops")
    assert {first[name]["provenance"] for name in names} == {"virtual"} and {
        first[name]["scope"] for name in names
    } == {"satellite"}
    assert [first[name]["value"] for name in ("link_up", "link_rate_bps", "link_hops")] == [1.0, 3e6, 1.0]
    assert 550 / 299792.458 < first["link_delay_s"]["value"] < 1000 / 299792.458
    assert last["link_up"]["value"] == 0.0 and last["link_up"]["validity"] == "ok"
    for name in names[1:]:
        assert last[name]["value"] is None and last[name]["validity"] == "missing"
    row = summary(twin).satellites["n1"]["link"]
    [planned] = contact.contact_plan(twin.scenario, 0.0, 600.0, 20.0)
    assert row["watched_s"] == 600.0 and row["contact_s"] == pytest.approx(planned.to_s, abs=0.02)
    assert 150.0 < planned.to_s < 300.0 and row["provenance"] == "emulated" and row["most_hops"] == 1
    assert row["delay_ms"][0] == pytest.approx(1e3 * first["link_delay_s"]["value"], abs=1e-3)


def test_a_satellite_that_never_has_a_way_has_no_contact_and_a_scenario_without_links_no_signals(board, control):
    twin = Twin(linked(-90.0), control)
    twin.advance(1.0)
    assert board.next("satellite/n1")["samples"][-4]["value"] == 0.0
    row = summary(twin).satellites["n1"]["link"]
    assert row["contact_s"] == 0.0 and row["delay_ms"] is None and row["most_hops"] is None
    plain = Twin(one(), control)
    plain.advance(1.0)
    assert not [sample for sample in board.next("satellite/n1")["samples"] if sample["name"].startswith("link")]
    assert summary(plain).satellites["n1"]["link"] is None


def test_the_batterys_age_is_published_and_summed_up(board, control):
    aged = scenario.parse(
        SCENARIO.format(limit_c=90).replace("[[board]]", "[power]\nstart_capacity_share = 0.85\n[[board]]")
    )
    for case, begun in ((one(), 1.0), (aged, 0.85)):
        twin = Twin(case, control)
        for _ in range(60):
            twin.advance(2.0)
            state = board.next("satellite/n1")
        sample = {sample["name"]: sample for sample in state["samples"]}["battery_capacity_share"]
        assert sample["provenance"] == "virtual" and begun - 1e-3 < sample["value"] < begun
        row = summary(twin).satellites["n1"]["battery"]
        assert row["capacity_share"] == pytest.approx(sample["value"], abs=1e-9)
        assert row["lost_in_run"] == pytest.approx(begun - sample["value"], abs=2e-9)
        assert row["run_orbits"] == pytest.approx(6000.0 / 5738.99, abs=1e-3)
        # a year of such orbits: more than the run's loss, less than as many times as much
        assert row["lost_in_run"] < row["lost_in_next_year"] < row["lost_in_run"] * 365.25 * 86400 / 6000.0
        assert row["cycles"] >= 0.5


def test_the_kits_scenarios_are_found_by_name_and_files_by_path(tmp_path):
    assert find("hot-eclipse").name == "hot-eclipse"
    path = tmp_path / "mine.toml"
    path.write_text(SCENARIO.format(limit_c=80))
    assert find(str(path)).payload.limit_c == 80.0
    with pytest.raises(scenario.ScenarioError, match="there are hot-eclipse"):
        find("absent")
    for shipped in SHIPPED.glob("*.toml"):
        assert scenario.read(shipped).name == shipped.stem


def test_the_table_fits_eighty_columns():
    row = {"hottest_c": 99.5, "limit_c": 85.0, "over_limit_s": 7336.0, "umbra_s": 2044.0, "lowest_soc": 0.8}
    battery = {
        "capacity_share": 0.9999,
        "lost_in_run": 0.001234,
        "lost_in_next_year": 0.123,
        "run_orbits": 0.6,
        "cycles": 0.5,
    }
    link = {"contact_s": 123456.7, "watched_s": 200000.0, "delay_ms": [100.123, 200.456], "most_hops": 123}
    part = {
        "name": "hot-eclipse",
        "time_scale": 60.0,
        "load": {"tokens": 3168, "seconds": 60.2},
        "satellites": {"sat-1-a-long-name": row | {"lowest_duty_cap": 0.05, "battery": battery, "link": link}},
        "benches": {
            "sat-1-a-long-name": {
                "first_c": 79.9,
                "hottest_c": 80.8,
                "limit_c": 84.0,
                "over_limit_s": 0.0,
                "own_guard_acted": True,
            }
        },
        "alone": {"sat-1-a-long-name": {"guard_silent_messages": 7}},
        "valid": True,
        "invalid_because": [],
    }
    text = table(part)
    assert max(map(len, text.splitlines())) <= 80
    assert "100.1-200.5  123" in text and "emulated" in text and "rough, less than one whole orbit" in text
    row = part["satellites"]["sat-1-a-long-name"]
    part["satellites"]["sat-1-a-long-name"] = row | {"link": None, "battery": battery | {"run_orbits": 3.0}}
    assert "contact" not in table(part) and "rough" not in table(part)
