"""Ten thousand malformed MQTT messages over each real broker, half to a real agent and half to a real ground station.

What each message must count as is fuzz_cases' verdict. The negative controls run the same flood against processes with a defect
put in. Packets that MQTT itself does not allow are sent as far as a broker passes them on.
"""

from __future__ import annotations

import functools
import gc
import json
import random
import secrets
import socket
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import paho.mqtt.client as mqtt
import psutil
import pytest
from fuzz_cases import FIELDS, MEMORY_MB, collected, mutations, nested, random_messages, read_message, real_messages
from fuzz_station import Station
from node_rig import WAIT_S, Observer, agent_tables
from test_fuzz_dataplane import DefectiveAgent

from ground_station.broker import Broker
from node_agent import wire

pytestmark = [pytest.mark.broker, pytest.mark.slow]

MESSAGES = 10_000  # that are wrong
FOREVER_S = 4e9  # the year 2096: what is stamped with it has not expired, and its bytes are the same in every run
WINDOW = 200  # below the queue limits of both brokers, so that none is lost on the way
ROOT = "spacemoe/v1/test"
REMEMBERED = 256  # commands whose ids a node knows again
LEAVES = [leaf for leaf in FIELDS if leaf not in ("command", "ground_status")]
Message = tuple[str, bytes]  # topic below ROOT, payload


# ---------------------------------------------------------------- what is sent


@functools.cache
def examples(kind: str) -> list[bytes]:
    return collected(random_messages(kind), 100)


def damaged(kind: str, node: str, count: int, seed: int, **changes: object) -> list[bytes]:
    """Bytes and trees from hypothesis, and those and a real message damaged; a few as long and as deep as may be, or more."""
    real = json.dumps(real_messages(node, FOREVER_S)[kind] | changes).encode()
    extreme = [*nested(kind, node, (950, 100_000)), b"", b" " * (wire.MAX_MESSAGE_BYTES + 900), real]
    chosen = [*examples(kind)[: count // 4], *extreme]
    return [*chosen, *mutations([*examples(kind), *[real] * 200], count - len(chosen), seed)]


def to_agent(count: int) -> list[Message]:
    """To n1's commands and status and to the ground station's status; of right ones only commands that do no harm."""
    sent = []
    stamps = {"received_at": "1800000000.5", "answered_at": "1800000000.6"}
    for index, (name, arguments) in enumerate(
        (("ping", {}), ("clock", stamps), ("x", {"a": "b"}), ("history", stamps))
    ):
        share = count // (2, 6, 12, 12)[index]
        sent += [
            (f"node/n1/command/{name}", p)
            for p in damaged("command", "n1", share, index, name=name, arguments=arguments)
        ]
    for kind, topic in (("status", "node/n1/status"), ("ground_status", "ground/status")):
        # an empty one on ground/status clears what is retained, which is no error
        share = damaged(kind, "n1", count - len(sent) if kind == "ground_status" else count // 12, 32)
        sent += [(topic, p) for p in share if read_message(kind, p) is None and p]
    random.Random(33).shuffle(sent)
    return [one for one in sent if not is_dangerous(*one)]


def is_dangerous(topic: str, payload: bytes) -> bool:
    """A right command that stops the agent, or of which it depends on the moment whether it comes too late."""
    tree = read_message("command", payload) if "/command/" in topic else None
    return tree is not None and (tree["name"] == "stop" or abs(tree["expires_at"] - time.time()) < 300)


def to_ground(count: int) -> list[Message]:
    """In the name of nodes that do not exist, right ones among them; in n1's name and in no node's only wrong ones."""
    sent = []
    for index, leaf in enumerate(LEAVES):
        for number, payload in enumerate(damaged(leaf, "g1", count // len(LEAVES), seed=40 + index)):
            node = ("g1", "g1", "g1", "n1", "g2", "Not_An_Id")[number % 6]
            if node != "n1" or read_message(leaf, payload) is None:
                sent.append((f"node/{node}/{leaf}", payload))
    random.Random(50).shuffle(sent)
    return sent


# ---------------------------------------------------------------- what must come of it


@dataclass
class AgentModel:
    """Errors by kind after the messages so far, as the contract has them."""

    errors: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=lambda: {""})
    seen: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def take(self, topic: str, payload: bytes) -> None:
        kind = self._command(topic, payload) if "/command/" in topic else "malformed"
        if kind:
            self.errors[kind] += 1

    def _command(self, topic: str, payload: bytes) -> str:
        tree = read_message("command", payload)
        if tree is None or tree["name"] != topic.rpartition("/")[2]:
            return "malformed"
        arguments = tree.get("arguments", {})
        if tree["name"] == "clock":
            return "clock" if all(map(_is_stamp, map(arguments.get, ("received_at", "answered_at")))) else "malformed"
        identity = tree["id"][:100]
        self.ids.add(identity)
        if tree["expires_at"] < time.time():
            return "expired"
        if identity in self.seen:
            return "replayed"
        self.seen.append(identity)
        return "" if tree["name"] == "ping" else "command"


def _is_stamp(text: str | None) -> bool:
    try:
        return text is not None and float(text[:40]) is not None
    except ValueError:
        return False


@dataclass
class GroundModel:
    malformed: Counter[str] = field(default_factory=Counter)
    taken: Counter[tuple[str, str]] = field(default_factory=Counter)  # by node and leaf; for history its messages

    def take(self, topic: str, payload: bytes) -> None:
        if topic == "ground/status":  # wrong ones alone are sent there
            self.malformed["ground status"] += 1
            return
        _, node, leaf = topic.split("/")
        tree = read_message(leaf, payload)
        if node == "Not_An_Id":
            self.malformed["topic"] += 1
        elif tree is None or tree["node"] != node or (leaf == "clock" and len(tree["id"]) > 64):
            self.malformed[leaf] += 1
        elif leaf == "result":
            self.malformed["unasked result"] += 1
        else:
            self.taken[node, leaf] += len(tree["messages"]) if leaf == "history" else 1


# ---------------------------------------------------------------- the rig


class Watcher(Observer):
    """An observer that what is no JSON does not stop.

    `results`: ids of all results that come from n1. `questions`: how often it asked for the time (nobody else does in its
    name).
    """

    def __init__(self, host: str, port: int):
        self.results: list[str] = []
        self.questions = 0
        super().__init__(host, port)

    def _message(self, client: mqtt.Client, userdata: object, message: mqtt.MQTTMessage) -> None:
        if message.topic == f"{self.prefix}result":
            tree = read_message("result", message.payload)
            if tree is not None:
                self.results.append(tree["id"])
        elif message.topic == f"{self.prefix}clock":
            self.questions += read_message("clock", message.payload) is not None
        elif message.topic == f"{self.prefix}telemetry" and read_message("telemetry", message.payload):
            super()._message(client, userdata, message)


class Flood:
    """An agent, a ground station and a client that sends them everything, on a broker that runs.

    `wait_s`: for each answer; `count_s`: for the counters at the end. Only where a defect is put in they are short.
    """

    def __init__(
        self,
        broker: Broker,
        folder: Path,
        agent_defect: str = "",
        station_defect: str = "",
        wait_s: float = WAIT_S,
        count_s: float = WAIT_S,
    ):
        self.wait_s, self.count_s = wait_s, count_s
        self.agent_model, self.ground_model = AgentModel(), GroundModel()
        self.fences = 0
        self.station = Station(folder, broker.host, broker.port, defect=station_defect)
        self.watcher = Watcher(broker.host, broker.port)
        self.agent = DefectiveAgent(folder, agent_tables(folder, self.station.endpoint, None, broker), agent_defect)
        self.client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=f"flood-{secrets.token_hex(4)}", protocol=mqtt.MQTTv5
        )
        self.client.max_inflight_messages_set(WINDOW)
        self.client.on_connect = lambda *_: self._ready.set()
        self._ready = threading.Event()
        self.client.connect(broker.host, broker.port, 10)
        self.client.loop_start()

    def __enter__(self) -> Flood:
        try:
            assert self._ready.wait(WAIT_S)
            self.until(lambda: "n1" in self.station.ask("counts")["ready"], "n1 is not ready", WAIT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()
        self.agent.__exit__()
        self.watcher.__exit__()
        self.station.__exit__()

    def until(self, condition, what: str, wait_s: float | None = None) -> None:
        end = time.monotonic() + (wait_s or self.wait_s)
        while not condition():
            assert time.monotonic() < end, what
            time.sleep(0.01)

    def send(self, messages: list[Message]) -> None:
        """Sends a window of messages and waits until both ends have taken in what came with it."""
        for topic, payload in messages:
            model = self.agent_model if "/command/" in topic or topic in AGENT_TOPICS else self.ground_model
            model.take(topic, payload)
            if topic in AGENT_TOPICS:  # the ground station hears them as well
                self.ground_model.take(topic, payload)
            self.client.publish(f"{ROOT}/{topic}", payload, 1)
        self.fences += 1
        identity = f"fence-{self.fences}"
        ping = {"name": "ping", "id": identity, "expires_at": time.time() + 1e6, "arguments": {}}
        event = real_messages("fence", FOREVER_S)["event"]
        self.agent_model.take("node/n1/command/ping", json.dumps(ping).encode())
        self.client.publish(f"{ROOT}/node/n1/command/ping", json.dumps(ping), 1)
        self.client.publish(f"{ROOT}/node/fence/event", json.dumps(event), 1)
        self.until(lambda: identity in self.watcher.results[-50:], "the agent answers no ping")
        self.until(lambda: self._fence_events() == self.fences, "the ground station takes no event")

    def _fence_events(self) -> int:
        return self.station.ask("counts")["nodes"].get("fence", {}).get("events", 0)

    def agent_errors(self) -> dict[str, int]:
        """The control plane's errors in the agent's latest telemetry."""
        prefix = "errors.control."
        tree = self.watcher.next("telemetry", timeout_s=self.wait_s)
        samples = {sample["name"]: sample["value"] for sample in tree["samples"]}
        return {name.removeprefix(prefix): n for name, n in samples.items() if name.startswith(prefix)}


AGENT_TOPICS = ("node/n1/status", "ground/status")


def run_flood(flood: Flood, messages: list[Message]) -> None:
    """Sends everything; checks memory, counters, and that ping and rebirth still work."""
    processes = {
        name: psutil.Process(each.process.pid) for name, each in (("agent", flood.agent), ("station", flood.station))
    }
    flood.send(messages[:20])  # every import and cache is there before memory is measured
    before = {name: process.memory_info().rss for name, process in processes.items()}
    grown = dict.fromkeys(processes, 0)
    for start in range(20, len(messages), WINDOW):
        flood.send(messages[start : start + WINDOW])
        for name, process in processes.items():
            grown[name] = max(grown[name], process.memory_info().rss - before[name])
    for name, more in grown.items():
        assert more <= MEMORY_MB * 1e6, f"the {name} grew by {more / 1e6:.1f} MB"

    # the agent: what it counted, as telemetry has it a moment later
    want = flood.agent_model.errors
    flood.watcher._cursor["telemetry"] = len(flood.watcher.all)
    flood.until(lambda: Counter(flood.agent_errors()) >= want, f"the agent did not count all of {want}", flood.count_s)
    got = Counter(flood.agent_errors())
    # an answer of the ground station that comes after the agent's next question is one too many, and rightly counted
    late = got["clock"] - want["clock"]
    assert got - Counter(clock=late) == want and late <= flood.watcher.questions

    # the ground station: every message was dropped and counted, or taken and counted
    ground = flood.ground_model
    answers = sum(identity in flood.agent_model.ids for identity in flood.watcher.results)
    ground.malformed["unasked result"] += answers
    flood.until(
        lambda: sum(flood.station.ask("counts")["malformed"].values()) >= ground.malformed.total(),
        f"the ground station did not count all of {ground.malformed}",
        flood.count_s,
    )
    counts = flood.station.ask("counts")
    assert counts["malformed"] == +ground.malformed
    for node in ("g1", "g2"):
        got, taken = counts["nodes"].get(node, Counter()), ground.taken
        assert got["births"] == taken[node, "birth"] and got["events"] == taken[node, "event"]
        parts = ("telemetry", "telemetry_replayed", "telemetry_unborn")
        assert sum(got[name] for name in parts) == taken[node, "telemetry"]
        assert sum(got[name] for name in ("history", "history_repeated", "history_refused")) == taken[node, "history"]

    for name in ("ping", "rebirth"):
        result = flood.station.ask("command", node="n1", name=name, timeout_s=flood.wait_s)
        assert result["ok"], result
    flood.until(lambda: "n1" in flood.station.ask("counts")["ready"], "n1 is not ready any more")
    for each in (flood.agent.log, flood.station.log):
        assert "Traceback" not in each.read_text()
    assert flood.agent.process.poll() is None and flood.station.process.poll() is None
    print(f"{len(messages)} messages: agent {dict(want)}, ground station {dict(+ground.malformed)}, {grown}")


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    half = MESSAGES * 6 // 10  # some are right
    mixed = to_agent(half) + to_ground(half)
    random.Random(51).shuffle(mixed)
    return mixed


def test_agent_and_ground_station_survive_ten_thousand_messages_and_count_every_drop(broker, messages, tmp_path):
    with Flood(broker, tmp_path) as flood:
        run_flood(flood, messages)
        agent, ground = flood.agent_model.errors, flood.ground_model
        assert agent.total() + ground.malformed.total() - ground.malformed["unasked result"] >= MESSAGES
        assert set(agent) == {"malformed", "expired", "replayed", "command", "clock"} and ground.taken.total() > 30


RAISES = """
from node_agent import wire
right = wire.decode
def decode(*arguments):
    try:
        return right(*arguments)
    except wire.WireError:
        raise KeyError("field") from None
wire.decode = decode"""
# where it is put in, and the method that drops
PLACES = {"agent": ("node_agent.control", "_refuse"), "station": ("ground_station.control", "_drop")}
DEFECTS = {
    "raises": (lambda module, method: RAISES, "answers no ping|takes no event|did not count"),
    "drops in silence": (
        lambda module, method: f"import {module} as m; m.Control.{method} = lambda *_: None",
        "did not count all",
    ),
    "keeps everything": (
        lambda module, method: (
            f"""
import {module} as m
kept, drop = [], m.Control.{method}
m.Control.{method} = lambda *a: kept.append(b"x" * 400_000) or drop(*a)"""
        ),
        "grew by",
    ),
}


@pytest.fixture
def no_collection():
    """Messages nest as deep as Python allows: a finaliser of an earlier test's that ran down there would fail this one."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "who, defect",
    [(who, defect) for who in PLACES for defect in DEFECTS if (who, defect) != ("agent", "keeps everything")],
)
@pytest.mark.usefixtures("no_collection")
def test_the_control_a_defect_fails_the_same_check(messages, tmp_path, who, defect):
    put_in, said = DEFECTS[defect]
    with Broker(tmp_path) as broker:
        waits = {"wait_s": 2.0 if defect == "raises" else WAIT_S, "count_s": 1.0}
        with Flood(broker, tmp_path, **waits, **{f"{who}_defect": put_in(*PLACES[who])}) as flood:
            with pytest.raises(AssertionError, match=said):
                run_flood(flood, messages[:400])


# ---------------------------------------------------------------- packets that MQTT does not allow


def text(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


class RawClient:
    """MQTT 5 bytes by hand (sections 3.1 and 3.3 of the standard), for what no library would send."""

    def __init__(self, broker: Broker):
        self._socket = socket.create_connection((broker.host, broker.port), WAIT_S)
        client_id = f"raw-{secrets.token_hex(4)}".encode()
        body = text(b"MQTT") + b"\x05\x02\x00\x3c\x00" + text(client_id)
        self.send(0x10, body)
        assert self._socket.recv(100)[0] == 0x20

    def send(self, first: int, body: bytes) -> None:
        assert len(body) < 16_384
        self._socket.sendall(bytes((first,)) + bytes((len(body) & 127 | 128, len(body) >> 7)) + body)

    def publish(self, topic: str, payload: bytes, properties: bytes, retain: bool = False, mid: int = 0) -> None:
        """QoS 1 with a packet identifier, else QoS 0."""
        head = text(f"{ROOT}/{topic}".encode()) + (mid.to_bytes(2, "big") if mid else b"")
        self.send(0x30 | (2 if mid else 0) | retain, head + bytes((len(properties),)) + properties + payload)

    def close(self) -> None:
        self._socket.close()


OUT_OF_RANGE = b"\x01\x07"  # payload format indicator: 0 and 1 are allowed; both brokers pass 7 on


def packets_counted(flood: Flood) -> int:
    return flood.station.ask("counts")["malformed"].get("packet", 0)


def flood_with_packets(flood: Flood, broker: Broker, many: int) -> None:
    event = json.dumps(real_messages("g1", FOREVER_S)["event"]).encode()
    raw = RawClient(broker)
    for topic in ("node/g1/event", "node/n1/command/ping"):
        raw.publish(topic, event, OUT_OF_RANGE, retain=True, mid=1)
        raw.publish(topic, event, OUT_OF_RANGE)
    for mid in range(2, many + 2):  # more than may be under way: each has to be acknowledged
        raw.publish("node/g1/event", event, OUT_OF_RANGE, mid=mid)
    flood.until(lambda: packets_counted(flood) >= many + 2, "not every packet was counted")
    assert packets_counted(flood) == many + 2
    assert flood.station.ask("command", node="n1", name="ping", timeout_s=flood.wait_s)["ok"]
    raw.publish("node/g1/event", event, b"")
    flood.until(lambda: flood.station.ask("counts")["nodes"].get("g1", {}).get("events") == 1, "the event did not come")
    raw.close()


@pytest.mark.parametrize("sound", [True, False])
def test_a_packet_that_cannot_be_decoded_is_dropped_even_if_the_broker_keeps_it(broker, tmp_path, sound):
    """The control runs paho as it is, which disconnects over such a packet and gets it again with the next subscription."""
    as_it_is = "import ground_station.control as m; m._Client = m.mqtt.Client"
    if not sound:
        with Flood(broker, tmp_path, station_defect=as_it_is, wait_s=1.5) as flood:
            with pytest.raises(AssertionError, match="not every packet was counted"):
                flood_with_packets(flood, broker, 1)
            assert not flood.station.ask("command", node="n1", name="ping", timeout_s=1.0)["ok"]
        return
    with Flood(broker, tmp_path) as flood:
        flood_with_packets(flood, broker, 500)
        flood.agent.kill()
        flood.agent.restart()  # and again it gets what the broker keeps
        flood.until(
            lambda: flood.station.ask("command", node="n1", name="ping", timeout_s=1.0)["ok"],
            "the agent does not answer",
        )
        raw = RawClient(broker)
        for topic in ("node/g1/event", "node/n1/command/ping"):
            raw.publish(topic, b"", b"", retain=True)  # cleared, so that a client without our patience can look
        with Watcher(broker.host, broker.port) as flood.watcher:
            flood.until(lambda: flood.agent_errors().get("packet") == 1, f"{flood.agent_errors()}")
        raw.close()
        assert "Traceback" not in flood.agent.text() and flood.agent.text().count("MQTT does not allow") == 2
