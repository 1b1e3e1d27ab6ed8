"""Broker, fleet state and control plane, with real MQTT 5 clients on loopback.

The node side is paho with JSON written out by hand, so that the contract is checked from outside our own encoder. The
rules are Sparkplug 3.0's (sessions by bdSeq, telemetry by seq, death by last will).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import replace

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from ground_station import broker as broker_module
from ground_station.broker import Broker, BrokerError, accepts_mqtt5
from ground_station.control import Control, ControlError
from ground_station.fleet import ASK_AGAIN_AFTER_S, AskRebirth, Instant, NodeState, apply
from node_agent.wire import Birth, Event, Sample, Status, Telemetry

ROOT = "spacemoe/v1/test"
WAIT_S = 10.0

# ---------------------------------------------------------------- an MQTT peer


class Peer:
    """A paho client that keeps what it receives: topic -> list of (payload, retain, properties)."""

    def __init__(self, broker: Broker, *subscriptions: str, will: tuple[str, bytes] | None = None):
        self.received = defaultdict(list)
        self._lock = threading.Condition()
        self._ready = threading.Event()
        # An id of its own: rumqttd refuses an empty one on the reconnection.
        self.client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=f"peer-{secrets.token_hex(4)}", protocol=mqtt.MQTTv5
        )
        self.client.reconnect_delay_set(0.1, 0.5)
        if will:
            self.client.will_set(*will, qos=1, retain=True)
        self.client.on_message = self._on_message
        self.client.on_connect = lambda client, *_: (
            [client.subscribe(topic, 1) for topic in subscriptions] or self._ready.set()
        )
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.connect(broker.host, broker.port, keepalive=10)
        self.client.loop_start()
        assert self._ready.wait(WAIT_S)

    def _on_message(self, _client, _userdata, message):
        with self._lock:
            self.received[message.topic].append((message.payload, message.retain, message.properties))
            self._lock.notify_all()

    def publish(self, topic: str, payload: bytes | dict, retain: bool = False, properties=None) -> None:
        if isinstance(payload, dict):
            payload = json.dumps(payload).encode()
        self.client.publish(topic, payload, qos=1, retain=retain, properties=properties).wait_for_publish(WAIT_S)

    def wait(self, topic: str, count: int = 1):
        """The first `count` messages on `topic`."""
        with self._lock:
            assert self._lock.wait_for(lambda: len(self.received[topic]) >= count, WAIT_S), dict(self.received)
            return self.received[topic][:count]

    def vanish(self) -> None:
        """Ends the connection without a DISCONNECT, as a crash would."""
        self.client.loop_stop()
        self.client.socket().close()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def peer(broker):
    peers = []

    def make(*subscriptions, **options) -> Peer:
        peers.append(Peer(broker, *subscriptions, **options))
        return peers[-1]

    yield make
    for each in peers:
        each.close()


@pytest.fixture
def control(broker):
    with Control("test", broker.host, broker.port) as running:
        yield running


def until(condition, what: str = "") -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what or "did not happen"
        time.sleep(0.01)


def birth_json(node: str = "n1", bd_seq: int = 4, **more) -> dict:
    return {
        "node": node,
        "bd_seq": bd_seq,
        "agent_version": "0.1.0",
        "board": "bench",
        "generated_at": 100.0,
        "sensors": [],
        "shards": [{"layer": 0, "expert": 3, "precision": "int8", "sha256": "ab"}],
        "bundle": "b",
        "memory_bytes": 1000,
        "data_endpoint": "",
        "protocol": 1,
    } | more


def telemetry_json(seq: int, node: str = "n1", bd_seq: int = 4, value: float | None = 41.5) -> dict:
    sample = {
        "name": "temp_c",
        "value": value,
        "unit": "degC",
        "validity": "ok",
        "provenance": "simulated",
        "scope": "board",
        "generated_at": 101.0,
    }
    return {"node": node, "bd_seq": bd_seq, "seq": seq, "generated_at": 101.0, "samples": [sample]}


def status_json(text: str = "online", node: str = "n1", bd_seq: int = 4) -> dict:
    return {"node": node, "status": text, "bd_seq": bd_seq}


def announce(node: Peer, name: str = "n1", bd_seq: int = 4) -> None:
    node.publish(f"{ROOT}/node/{name}/birth", birth_json(name, bd_seq), retain=True)
    node.publish(f"{ROOT}/node/{name}/status", status_json("online", name, bd_seq), retain=True)


# ---------------------------------------------------------------- broker


@pytest.mark.broker
def test_broker_keeps_retained_messages_and_clears_them(broker, peer):
    writer = peer()
    writer.publish("a/kept", b"1", retain=True)
    writer.publish("a/gone", b"2", retain=True)
    writer.publish("a/gone", b"", retain=True)
    reader = peer("a/#")
    assert reader.wait("a/kept")[0][:2] == (b"1", True)
    writer.publish("a/end", b"3")
    reader.wait("a/end")
    assert "a/gone" not in reader.received


@pytest.mark.broker
def test_broker_fires_and_keeps_a_last_will(broker, peer):
    watcher = peer("w/#")
    victim = peer(will=("w/status", b"offline"))
    victim.publish("w/status", b"online", retain=True)
    victim.vanish()
    assert [part[0] for part in watcher.wait("w/status", 2)] == [b"online", b"offline"]
    assert peer("w/#").wait("w/status")[0][:2] == (b"offline", True)


@pytest.mark.broker
def test_broker_passes_mqtt5_properties_and_the_largest_message(broker, peer):
    reader, writer = peer("p/#"), peer()
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic, properties.CorrelationData, properties.MessageExpiryInterval = "p/answer", b"\x00\x01", 30
    largest = b"x" * (256 * 1024)
    writer.publish("p/large", largest, properties=properties)
    payload, _, got = reader.wait("p/large")[0]
    assert payload == largest
    assert (got.ResponseTopic, got.CorrelationData) == ("p/answer", b"\x00\x01")


@pytest.mark.broker
def test_broker_restart_keeps_the_port_and_only_mosquitto_keeps_retained_messages(broker, peer):
    port = broker.port
    first = peer()
    first.publish("r/kept", b"1", retain=True)
    broker.restart()
    assert (broker.port, broker.running) == (port, True)
    until(first.client.is_connected, "the client did not come back")
    reader = peer("r/#")
    peer().publish("r/end", b"2")
    reader.wait("r/end")
    # The documented difference of the two kinds.
    assert ("r/kept" in reader.received) == (broker.kind == "mosquitto")


@pytest.mark.broker
def test_broker_stops_and_refuses_a_taken_port(broker, tmp_path):
    with pytest.raises(BrokerError, match=f"port {broker.port} cannot be used"):
        Broker(tmp_path / "second", broker.kind, port=broker.port).start()
    assert accepts_mqtt5(broker.host, broker.port)
    broker.stop()
    broker.stop()
    assert not broker.running
    assert not accepts_mqtt5(broker.host, broker.port)


@pytest.mark.broker
def test_broker_ends_when_its_owner_is_killed(broker, tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from ground_station.broker import Broker\n"
        f"b = Broker(Path({str(tmp_path / 'owned')!r}), {broker.kind!r}).start(); print(b.port, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=_environment())
    port = int(owner.stdout.readline())
    assert accepts_mqtt5("127.0.0.1", port)
    owner.kill()
    owner.wait()
    until(lambda: not accepts_mqtt5("127.0.0.1", port), "the broker outlived its owner")


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_named_kind_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(broker_module, "find_mosquitto", lambda: None)
    with pytest.raises(BrokerError, match="apt-get install mosquitto"):
        Broker(tmp_path, "mosquitto")
    assert Broker(tmp_path, "auto").kind == "embedded"


def test_mosquitto_that_dies_at_once_is_reported_with_its_last_words(mosquitto, tmp_path, monkeypatch):
    monkeypatch.setattr(broker_module, "mosquitto_config", lambda port, folder: "no_such_option 1\n")
    with pytest.raises(BrokerError, match=r"did not start.*mosquitto.conf:1\b") as caught:
        Broker(tmp_path, "mosquitto").start()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1883", "host:0", "host:70000", "host:x"])
def test_external_address_is_checked(tmp_path, address):
    with pytest.raises(BrokerError, match="HOST:PORT"):
        Broker(tmp_path, "external", external=address)


@pytest.mark.broker
def test_external_broker_is_used_and_left_alone(broker, tmp_path):
    with Broker(tmp_path, external=f"{broker.host}:{broker.port}") as other:
        assert (other.kind, other.port, other.running) == ("external", broker.port, True)
        with pytest.raises(BrokerError, match="restart it where it runs"):
            other.restart()
    assert broker.running


def test_readiness_needs_an_mqtt5_answer(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(reply: bytes) -> None:
            link, _ = server.accept()
            with link:
                link.recv(200)
                link.sendall(reply)

        for reply, expected in [
            (b"HTTP/1.1 400\r\n", False),
            (b"\x20\x03\x00\x84\x00", False),  # CONNACK, reason 0x84: unsupported protocol version
            (b"\x20\x03", False),
            (b"\x20\x03\x00\x00\x00", True),
        ]:
            thread = threading.Thread(target=answer, args=(reply,))
            thread.start()
            assert accepts_mqtt5("127.0.0.1", server.getsockname()[1]) is expected
            thread.join()
        port = server.getsockname()[1]
    assert not accepts_mqtt5("127.0.0.1", port)
    with pytest.raises(BrokerError, match="no MQTT 5 broker answers"):
        Broker(tmp_path, external=f"127.0.0.1:{port}").start()


# ---------------------------------------------------------------- fleet state, pure

BIRTH = Birth("n1", 4, "0.1.0", "bench", 100.0, (), (), "b", 1000, "")
ONLINE = Status("n1", "online", 4)


def at(seconds: float) -> Instant:
    return Instant(1e9 + seconds, seconds)


def telemetry(seq: int, bd_seq: int = 4) -> Telemetry:
    return Telemetry("n1", bd_seq, seq, 101.0, (Sample("temp_c", 41.5, "degC", "ok", "simulated", "board", 101.0),))


def play(*messages, state: NodeState | None = None, retained: bool = False):
    """State and all actions after messages one second apart."""
    state, actions = state or NodeState("n1"), []
    for second, message in enumerate(messages):
        state, more = apply(state, message, at(second), retained)
        actions += more
    return state, actions


def test_birth_status_telemetry_make_a_node_ready():
    state, actions = play(BIRTH, ONLINE, telemetry(0), telemetry(1))
    assert actions == []
    assert state.online and state.ready(at(3.5))
    assert (state.last_seq, state.samples["temp_c"].value, state.counts.telemetry) == (1, 41.5, 2)
    assert state.telemetry_at == at(3)


def test_order_of_birth_and_status_does_not_matter():
    assert play(ONLINE, BIRTH)[0].online


def test_silence_makes_a_node_stale_but_not_offline():
    state, _ = play(BIRTH, ONLINE, telemetry(0))
    assert not state.is_stale(at(6.9)) and state.is_stale(at(7.1))
    assert state.online and not state.ready(at(7.1))


def test_what_was_retained_proves_nothing():
    state, _ = play(BIRTH, ONLINE, retained=True)
    assert state.online and not state.proven and not state.ready(at(1))
    state, _ = play(telemetry(812), state=state)
    assert state.ready(at(1))


def test_a_gap_is_counted_and_asks_for_one_rebirth_at_a_time():
    state, actions = play(BIRTH, ONLINE, telemetry(0), telemetry(4))
    assert [type(action) for action in actions] == [AskRebirth] and "3 telemetry messages lost" in actions[0].reason
    assert state.counts.telemetry_lost == 3
    state, again = apply(state, telemetry(9), at(4))
    assert again == () and state.counts.telemetry_lost == 7
    _, later = apply(state, telemetry(12), at(3 + ASK_AGAIN_AFTER_S))
    assert len(later) == 1


def test_telemetry_before_birth_or_of_a_newer_session_asks_for_a_rebirth():
    state, actions = play(telemetry(0))
    assert "before a birth" in actions[0].reason and state.samples == {}
    state, actions = play(BIRTH, ONLINE, telemetry(0, bd_seq=5))
    assert "session 5" in actions[0].reason and state.samples == {}


def test_telemetry_after_death_asks_for_a_rebirth():
    state, actions = play(BIRTH, ONLINE, telemetry(0), Status("n1", "offline", 4), telemetry(1))
    assert not state.online and len(actions) == 1


def test_replayed_telemetry_is_counted_and_dropped():
    state, actions = play(BIRTH, ONLINE, telemetry(7), telemetry(7), telemetry(3), telemetry(9, bd_seq=3))
    assert (state.counts.telemetry_replayed, state.last_seq, actions) == (3, 7, [])


def test_death_of_an_old_session_is_ignored_and_of_this_one_is_not():
    state, _ = play(BIRTH, ONLINE, Status("n1", "offline", 3))
    assert state.online and state.counts.deaths_ignored == 1
    state, _ = play(BIRTH, ONLINE, Status("n1", "offline", 4))
    assert not state.online and state.counts.deaths == 1


def test_a_new_birth_starts_the_count_anew():
    reborn = replace(BIRTH, bd_seq=5, generated_at=200.0)
    state, actions = play(BIRTH, ONLINE, telemetry(50), reborn, replace(ONLINE, bd_seq=5), telemetry(0, bd_seq=5))
    assert (actions, state.last_seq, state.counts.births, state.online) == ([], 0, 2, True)
    # A rebirth in the same session, sent live, starts the count as well ...
    state, actions = play(BIRTH, ONLINE, telemetry(50), BIRTH, telemetry(0))
    assert (actions, state.last_seq) == ([], 0)
    # ... but the broker's copy of the birth that is known, delivered after a reconnection, does not.
    state, _ = play(BIRTH, ONLINE, telemetry(50))
    state, _ = apply(state, BIRTH, at(4), retained=True)
    assert state.last_seq == 50


def test_what_is_known_of_the_sensors_outlives_a_rebirth_and_repeated_deaths_count_once():
    state, _ = play(BIRTH, ONLINE, telemetry(50), replace(BIRTH, bd_seq=5))
    assert state.samples["temp_c"].value == 41.5 and state.telemetry_at == at(2)
    dead = Status("n1", "offline", 5)
    state, _ = play(dead, dead, state=state)
    assert state.counts.deaths == 1


def test_a_restarted_node_is_not_online_until_it_says_so():
    state, _ = play(BIRTH, ONLINE, replace(BIRTH, bd_seq=5))
    assert not state.online


def test_events_are_kept_up_to_a_bound():
    events = [Event("n1", float(i), "info", "kind", "text") for i in range(100)]
    state, _ = play(BIRTH, *events)
    assert state.counts.events == 100 and len(state.events) == 32 and state.events[-1].generated_at == 99.0


# ---------------------------------------------------------------- control


@pytest.mark.broker
def test_a_node_is_seen_from_birth_to_death(broker, peer, control):
    assert control.wait_for(["n1"], 0.0) == {"n1"}
    node = peer(will=(f"{ROOT}/node/n1/status", json.dumps(status_json("offline")).encode()))
    announce(node)
    node.publish(f"{ROOT}/node/n1/telemetry", telemetry_json(0))
    assert control.wait_for(["n1"], WAIT_S) == set()
    until(lambda: "temp_c" in control.snapshot()["n1"].samples)
    state = control.snapshot()["n1"]
    assert (state.birth.shards[0].expert, state.samples["temp_c"].value) == (3, 41.5)
    assert abs(state.telemetry_at.utc_s - time.time()) < 60
    node.vanish()
    until(lambda: not control.snapshot()["n1"].online, "the last will was not heard")
    assert control.wait_for(["n1"], 0.0) == {"n1"}


@pytest.mark.broker
def test_a_late_ground_station_finds_retained_births_and_waits_for_a_sign_of_life(broker, peer):
    node = peer()
    announce(node)
    with Control("test", broker.host, broker.port) as late:
        until(lambda: "n1" in late.snapshot() and late.snapshot()["n1"].online)
        assert late.wait_for(["n1"], 0.2) == {"n1"}
        node.publish(f"{ROOT}/node/n1/telemetry", telemetry_json(77))
        assert late.wait_for(["n1"], WAIT_S) == set()


@pytest.mark.broker
def test_a_gap_makes_the_node_be_asked_for_a_rebirth(broker, peer, control):
    node = peer(f"{ROOT}/node/n1/command/+")
    announce(node)
    node.publish(f"{ROOT}/node/n1/telemetry", telemetry_json(0))
    node.publish(f"{ROOT}/node/n1/telemetry", telemetry_json(5))
    payload, _, properties = node.wait(f"{ROOT}/node/n1/command/rebirth")[0]
    command = json.loads(payload)
    assert command["name"] == "rebirth" and command["expires_at"] > time.time()
    assert properties.ResponseTopic == f"{ROOT}/node/n1/result"
    assert properties.CorrelationData == command["id"].encode()


@pytest.mark.broker
def test_an_old_death_certificate_does_not_kill_a_reborn_node(broker, peer, control):
    node = peer()
    announce(node, bd_seq=5)
    node.publish(f"{ROOT}/node/n1/telemetry", telemetry_json(0, bd_seq=5))
    assert control.wait_for(["n1"], WAIT_S) == set()
    node.publish(f"{ROOT}/node/n1/status", status_json("offline", bd_seq=4))
    until(lambda: control.snapshot()["n1"].counts.deaths_ignored == 1)
    assert control.snapshot()["n1"].online and control.wait_for(["n1"], 0.0) == set()
    node.publish(f"{ROOT}/node/n1/status", status_json("offline", bd_seq=5))  # its own does
    until(lambda: not control.snapshot()["n1"].online)


@pytest.mark.broker
def test_command_gets_the_answer_that_carries_its_id(broker, peer, control):
    node = peer(f"{ROOT}/node/n1/command/+")

    def answer(_client, _userdata, message):
        command = json.loads(message.payload)
        result = {"node": "n1", "id": "somebody-else", "ok": True, "text": "wrong"}
        node.client.publish(message.properties.ResponseTopic, json.dumps(result), qos=1)
        result |= {"id": command["id"], "text": f"{command['name']} {command['arguments']}"}
        node.client.publish(message.properties.ResponseTopic, json.dumps(result), qos=1)

    node.client.on_message = answer
    result = control.command("n1", "sample", WAIT_S, {"a": "b"})
    assert (result.ok, result.text) == (True, "sample {'a': 'b'}")
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: control.command("n1", f"c{i}", WAIT_S)}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: result.text for i, result in results.items()} == {i: f"c{i} {{}}" for i in range(8)}


@pytest.mark.broker
def test_command_without_an_answer_says_so(broker, control):
    result = control.command("nobody", "sample", 0.1)
    assert not result.ok and "no answer to 'sample' within 0.1 s" in result.text
    broker.stop()
    until(lambda: not control.connected)
    assert "not connected" in control.command("nobody", "sample", 0.1).text


@pytest.mark.broker
def test_malformed_messages_are_counted_logged_once_and_survived(broker, peer, control, caplog):
    node = peer()
    topic = f"{ROOT}/node/n1"
    bad = [
        (f"{topic}/birth", b"\xff\x00"),
        (f"{topic}/birth", b"{}"),
        (f"{topic}/birth", b"[" * 100_000),
        (f"{topic}/birth", json.dumps(birth_json("n2")).encode()),  # in another node's name
        (f"{topic}/telemetry", json.dumps(telemetry_json(0) | {"seq": "0"}).encode()),
        (f"{topic}/telemetry", json.dumps(telemetry_json(0, value=1.0)).replace("1.0", "NaN").encode()),
        (f"{topic}/status", b" " * 300_000),  # over the limit, and allowed by the broker
        (f"{ROOT}/node/Not_An_Id/birth", json.dumps(birth_json()).encode()),
    ]
    for where, payload in bad:
        node.publish(where, payload)
    announce(node)
    assert control.wait_for(["n1"], WAIT_S) == set()
    until(lambda: sum(control.malformed.values()) == len(bad), f"{control.malformed}")
    assert control.malformed == {"birth": 4, "telemetry": 2, "status": 1, "topic": 1}
    assert len([r for r in caplog.records if "dropped a malformed message" in r.message]) == 4
    assert set(control.snapshot()) == {"n1"}


@pytest.mark.broker
def test_ground_status_is_retained_and_its_will_fires(broker, peer):
    topic = f"{ROOT}/ground/status"
    script = (
        "import sys, time; from ground_station.control import Control\n"
        f"Control('test', {broker.host!r}, {broker.port}).start(); print('up', flush=True); time.sleep(60)"
    )
    watcher = peer(topic)
    station = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=_environment())
    assert station.stdout.readline() == b"up\n"
    assert json.loads(watcher.wait(topic)[0][0])["status"] == "online"
    assert json.loads(peer(topic).wait(topic)[0][0])["status"] == "online"
    station.send_signal(signal.SIGKILL)
    station.wait()
    assert json.loads(watcher.wait(topic, 2)[1][0])["status"] == "offline"


@pytest.mark.broker
def test_a_second_ground_station_that_goes_does_not_silence_the_nodes(broker, peer, control):
    topic = f"{ROOT}/ground/status"
    watcher = peer(topic)
    with Control("test", broker.host, broker.port):
        pass
    until(lambda: [json.loads(part[0])["status"] for part in watcher.received[topic]][-2:] == ["offline", "online"])
    assert json.loads(peer(topic).wait(topic)[0][0])["status"] == "online"
    watcher.publish(topic, b"{", retain=False)  # rubbish is counted
    until(lambda: control.malformed.get("ground status") == 1)


@pytest.mark.broker
def test_orderly_stop_says_offline(broker, peer):
    watcher = peer(f"{ROOT}/ground/status")
    with Control("test", broker.host, broker.port):
        pass
    assert [json.loads(part[0])["status"] for part in watcher.wait(f"{ROOT}/ground/status", 2)] == ["online", "offline"]


@pytest.mark.broker
def test_control_comes_back_by_itself_after_a_broker_restart(broker, peer, control):
    node = peer()
    announce(node)
    node.publish(f"{ROOT}/node/n1/telemetry", telemetry_json(0))
    assert control.wait_for(["n1"], WAIT_S) == set()
    broker.stop()
    until(lambda: not control.connected)
    broker.start()
    until(lambda: control.connected, "the ground station did not reconnect")
    until(node.client.is_connected)
    announce(node, bd_seq=5)
    node.publish(f"{ROOT}/node/n1/telemetry", telemetry_json(0, bd_seq=5))
    until(lambda: control.snapshot()["n1"].bd_seq == 5 and control.snapshot()["n1"].last_seq == 0)
    assert control.snapshot()["n1"].online


def test_control_without_a_broker_is_a_one_line_error():
    before = set(threading.enumerate())  # another file's client may still be ending
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ControlError, match=f"127.0.0.1:{port}.*check that it runs") as caught:
        Control("test", "127.0.0.1", port).start()
    assert "\n" not in str(caught.value)
    assert not [thread for thread in set(threading.enumerate()) - before if "paho" in thread.name]
