"""Broker or ground station away, with real brokers, agents and ground stations: nothing of that time is missing afterwards.

What came is taken from the ground station's listener and checked against the numbers and stamps of the messages themselves.
"""

from __future__ import annotations

import json
import threading
import time

import pytest
from node_rig import WAIT_S, AgentProcess, Ground, Observer, agent_tables, toml

from ground_station import control as ground_control
from ground_station.broker import Broker
from ground_station.fleet import Taken
from node_agent import config, wire
from node_agent.clock import GroundClock
from node_agent.control import Control
from node_agent.counters import Counters
from node_agent.history import History

pytestmark = pytest.mark.broker


class Station:
    """A ground station that notes all telemetry it takes."""

    def __init__(self, broker: Broker):
        self._lock = threading.Lock()
        self._taken: list[Taken] = []
        self.control = ground_control.Control("test", broker.host, broker.port, on_telemetry=self._take)

    def _take(self, node: str, taken: Taken) -> None:
        with self._lock:
            self._taken.append(taken)

    def taken(self) -> list[Taken]:
        with self._lock:
            return list(self._taken)

    def numbers(self) -> list[int]:
        return [taken.telemetry.number for taken in self.taken()]

    @property
    def state(self):
        return self.control.snapshot()["n1"]

    def __enter__(self) -> Station:
        self.control.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.control.stop()


def until(condition, what: str = "", timeout_s: float = 2 * WAIT_S) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, what or "did not happen"
        time.sleep(0.02)


def whole(numbers: list[int], up_to: int) -> bool:
    return set(range(min(numbers), up_to + 1)) <= set(numbers)


def outage(broker: Broker, folder, away_s: float, period_s: float) -> None:
    with Ground() as data, Station(broker) as station:
        tables = agent_tables(folder, data.endpoint, broker=broker)
        tables["telemetry"]["period_s"] = period_s
        with AgentProcess(folder, tables):
            until(lambda: len(station.numbers()) >= 3, "no telemetry")
            bd_seq = station.state.bd_seq
            broker.stop()
            gone_s = time.time()
            time.sleep(away_s)
            back_s = time.time()
            broker.start()
            until(lambda: station.state.latest.telemetry.bd_seq > bd_seq, "the node was not born again")
            newest = station.state.received.spans[-1][1] + 3
            until(lambda: whole(station.numbers(), newest), f"missing: {station.state.received.missing()}")
            state, taken = station.state, station.taken()
    numbers = [each.telemetry.number for each in taken]
    assert len(numbers) == len(set(numbers)), "a message was taken twice"
    assert state.received.missing() == () and state.received.gone == state.counts.telemetry_gone == 0
    stamps = sorted(each.telemetry.generated_at for each in taken)
    assert max(late - early for early, late in zip(stamps, stamps[1:])) < max(3 * period_s, 1.0)
    inside = [each for each in taken if gone_s < each.telemetry.generated_at < back_s]
    assert len(inside) >= 0.8 * away_s / period_s
    assert all(each.late for each in inside[2:])
    # (bd_seq, seq) of what was kept goes on counting in the session that was lost
    kept = sorted((each.telemetry.number, each.telemetry.seq, each.telemetry.bd_seq) for each in inside)
    assert {session for _, _, session in kept} == {bd_seq}
    assert [seq for _, seq, _ in kept] == list(range(kept[0][1], kept[0][1] + len(kept)))
    assert state.counts.rebirths_asked == 0
    # both clocks are this machine's: corrected times are the raw ones within the bound that is published
    checked = [each for each in taken if each.generated_utc_s is not None]
    assert len(checked) > len(taken) / 2
    for each in checked:
        assert abs(each.generated_utc_s - each.telemetry.generated_at) <= each.uncertainty_s + 5e-3


def test_broker_away_for_seconds_and_no_sample_is_missing(broker, tmp_path):
    outage(broker, tmp_path, away_s=8.0 if broker.kind == "mosquitto" else 4.0, period_s=0.1)


@pytest.mark.slow
def test_broker_away_for_60_s_and_no_sample_is_missing(mosquitto, tmp_path):
    with Broker(tmp_path, "mosquitto") as broker:
        outage(broker, tmp_path, away_s=60.0, period_s=0.5)


def node_control(folder, broker: Broker, history: History | None = None) -> Control:
    settings = config.parse(toml(agent_tables(folder, "tcp://127.0.0.1:1", broker=broker)), folder)

    def birth(bd_seq: int) -> wire.Birth:
        return wire.Birth("n1", bd_seq, "0", "b", time.time(), (), (), "", 0, "tcp://127.0.0.1:1")

    return Control(settings, settings.broker, Counters(), birth, lambda *_: (False, "no"), history)


def send(control: Control, value: float = 1.0) -> bool:
    """One telemetry message with one sample and those of the control plane, as the agent sends them."""
    now = time.time()
    sample = wire.Sample("x", value, "W", "ok", "measured", "agent", now)
    return control.telemetry((sample, *control.samples(now)), now)


def test_more_than_fits_is_dropped_oldest_first_and_counted_exactly(mosquitto, tmp_path):
    """Room for 60; 100 are made while the broker is away."""
    with Broker(tmp_path, "mosquitto") as broker, Station(broker) as station:
        with node_control(tmp_path, broker, History(max_messages=60)) as control:
            until(lambda: send(control) or time.sleep(0.05))
            until(lambda: len(station.numbers()) >= 1)
            broker.stop()
            until(lambda: not send(control) or time.sleep(0.01), "the node did not notice")
            for _ in range(99):
                assert not send(control)
            broker.start()
            while not station.state.dropped_on_board or station.state.received.missing():
                send(control)
                time.sleep(0.1)
            last = control._number
            until(lambda: station.state.received.has(last))
            state = station.state
    numbers = station.numbers()
    assert len(numbers) == len(set(numbers))
    assert len(numbers) + state.counts.telemetry_gone == last - min(numbers) + 1
    assert state.dropped_on_board >= 40 and state.counts.history > 0
    # only what was handed to a connection that was dying may be gone beyond what the node knows it dropped
    assert state.counts.telemetry_gone - state.dropped_on_board <= 3


def test_ground_station_away_telemetry_is_kept_and_goes_to_the_next_one(broker, tmp_path):
    with node_control(tmp_path, broker) as control, Observer(broker.host, broker.port) as observer:
        until(lambda: send(control) or time.sleep(0.05))  # nobody said that the ground station is away
        observer.next("telemetry")
        with Station(broker) as first:
            until(lambda: send(control) and len(first.numbers()) >= 2)
        until(lambda: not send(control) or time.sleep(0.02), "the node did not hear that it is offline")
        before = control._number
        for _ in range(30):
            assert not send(control)
        asked = control.telemetry((), time.time(), asked=True)  # a command wants it: somebody is there
        assert asked
        with Station(broker) as second:
            wanted = set(range(before, before + 32))
            until(lambda: (send(control) or True) and wanted <= set(second.numbers()), "something is missing")
            numbers = second.numbers()
            state = second.state
    assert len(numbers) == len(set(numbers))
    assert state.counts.rebirths_asked == 0
    batches = [tree for leaf, tree, _ in observer.all if leaf == "history"]
    seen = [message["number"] for tree in batches for message in tree["messages"]]
    lived = [tree["number"] for leaf, tree, _ in observer.all if leaf == "telemetry"]
    assert set(seen) & set(lived) == {before + 31}  # nothing was sent twice but what was asked for
    assert len(seen) == len(set(seen))
    assert batches[-1]["owed"] == 0 and batches[-1]["dropped"] == 0


def test_what_a_dying_connection_took_is_asked_for(mosquitto, tmp_path):
    """Messages that the node believes to be sent and that never came: the ground station finds them missing by number."""
    with Broker(tmp_path, "mosquitto") as broker, node_control(tmp_path, broker) as control:
        until(lambda: send(control) or time.sleep(0.05))
        with Observer(broker.host, broker.port) as observer:
            observer.next("birth")
            numbers = [send(control) and control._number for _ in range(5)]
            observer.command("history", command("history", run=str(control._run), ranges=f"{numbers[1]}-{numbers[3]}"))
            batch = observer.next("history", lambda tree: tree["messages"] and tree["messages"][-1]["number"] > 1)
            # with them may come what was made before the first birth
            came = [message for message in batch["messages"] if message["number"] > 1]
            assert [message["number"] for message in came] == numbers[1:4]
            assert [message["samples"][0]["value"] for message in came] == [1.0] * 3
            for run, ranges in (("999", "1-2"), (str(control._run), "x"), (str(control._run), "")):
                refused = command("history", run=run, ranges=ranges)
                observer.command("history", refused)
                assert not observer.next("result", lambda tree, id=refused["id"]: tree["id"] == id)["ok"]
            none = command("history", run=str(control._run), ranges="900-901")
            observer.command("history", none)
            assert observer.next("history", lambda tree: not tree["messages"])["oldest"] == 1


def command(name: str, **arguments: str) -> dict:
    return {"name": name, "id": f"{name}-{time.monotonic_ns()}", "expires_at": time.time() + 30, "arguments": arguments}


def test_a_board_without_an_rtc_learns_the_time_and_commands_reach_it(broker, tmp_path):
    """Its clock is 50 years behind, then 20 years ahead: without the offset every command would have expired."""
    for off_s in (-1.6e9, 6e8):
        folder = tmp_path / f"{off_s}"
        folder.mkdir()
        with Station(broker) as station, node_control(folder, broker) as control:
            control.clock = GroundClock(utc=lambda off_s=off_s: time.time() + off_s)

            def made(control=control, off_s=off_s) -> bool:
                now = time.time() + off_s
                control.telemetry((*control.samples(now),), now)
                return control.clock.offset() is not None

            until(lambda: made() or time.sleep(0.05), "no offset")
            offset = control.clock.offset()
            assert offset.offset_s == pytest.approx(-off_s, abs=offset.uncertainty_s + 5e-3)
            assert offset.uncertainty_s < 1.0
            made()
            until(lambda: station.taken() and station.taken()[-1].generated_utc_s is not None)
            last = station.taken()[-1]
            assert last.telemetry.generated_at == pytest.approx(time.time() + off_s, abs=WAIT_S)  # raw, as it said
            assert last.generated_utc_s == pytest.approx(time.time(), abs=WAIT_S)
            assert station.control.command("n1", "ping").ok


def test_forged_and_malformed_clock_answers_are_counted_and_change_nothing(mosquitto, tmp_path):
    with Broker(tmp_path, "mosquitto") as broker, node_control(tmp_path, broker) as control:
        with Observer(broker.host, broker.port) as observer:
            until(lambda: send(control) or time.sleep(0.05))
            query = observer.next("clock")
            assert set(query) == {"node", "id", "sent_at"}
            forged = command("clock", received_at="5", answered_at="5")
            observer.command("clock", forged)
            for arguments in (
                {},
                {"received_at": "x", "answered_at": "5"},
                {"received_at": "nan", "answered_at": "nan"},
            ):
                observer.command("clock", command("clock", **arguments))
            observer.command(
                "clock", command("clock") | {"id": query["id"], "arguments": {"received_at": "9", "answered_at": "5"}}
            )
            until(lambda: sum(control._counters.control_errors.values()) >= 5, f"{control._counters.control_errors}")
            assert control._counters.control_errors == {"clock": 3, "malformed": 2}
            assert control.clock.offset() is None


def test_a_listener_that_fails_is_counted_and_ends_nothing(mosquitto, tmp_path):
    def fail(node: str, taken: Taken) -> None:
        raise ZeroDivisionError("a defect")

    with Broker(tmp_path, "mosquitto") as broker, node_control(tmp_path, broker) as control:
        with ground_control.Control("test", broker.host, broker.port, on_telemetry=fail) as station:
            until(lambda: (send(control) or True) and station.malformed.get("listener", 0) >= 3)
            assert station.snapshot()["n1"].counts.telemetry >= 2


def owed(control: Control) -> float:
    return {sample.name: sample.value for sample in control.samples(0.0)}["history_owed"]


@pytest.mark.parametrize("late_s", [0.0, 5.0])
def test_a_plain_client_finds_each_sample_of_an_outage(mosquitto, tmp_path, late_s):
    """Without our decoder, and also when it comes later than the node has begun to send: MQTT 5's "no matching subscribers"."""
    with Broker(tmp_path, "mosquitto") as broker, node_control(tmp_path, broker) as control:
        until(lambda: send(control, -3.0) or time.sleep(0.05))
        broker.stop()
        until(lambda: not send(control, -1.0) or time.sleep(0.01))
        for value in range(200):
            assert not send(control, float(value))
        broker.start()
        until(lambda: send(control, -2.0) or time.sleep(0.05))
        end_s = time.monotonic() + late_s
        while time.monotonic() < end_s:
            send(control, -2.0)
            time.sleep(0.1)
        assert owed(control) >= 200  # nobody was there: it is not given away
        with Observer(broker.host, broker.port) as observer:
            until(lambda: (send(control, -2.0) or True) and owed(control) == 0)
            got: list[float] = []
            while len(got) < 200:
                batch = observer.next("history")
                assert len(json.dumps(batch)) < wire.MAX_MESSAGE_BYTES
                got += [m["samples"][0]["value"] for m in batch["messages"] if m["samples"][0]["value"] >= 0]
    assert got == [float(value) for value in range(200)]
