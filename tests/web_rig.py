"""What the tests of mission control share: boards that are MQTT clients with JSON written by hand, and a station that serves its page.

Everything is real but the boards' sensors: broker, sockets, archive, web server. HTTP goes by the standard library's client.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt

from ground_station.archive import Archive
from ground_station.archive_read import ArchiveReader
from ground_station.broker import Broker
from ground_station.control import Control
from ground_station.limits_file import LimitsWatch
from ground_station.mission import Mission
from ground_station.web_server import Options, Served, serving

FLEET = "test"
ROOT = f"spacemoe/v1/{FLEET}"
WAIT_S = 15.0


def until(condition, what: str = "", wait_s: float = WAIT_S) -> Any:
    """The first true value of `condition()`."""
    end = time.monotonic() + wait_s
    while not (found := condition()):
        assert time.monotonic() < end, what or "did not happen"
        time.sleep(0.02)
    return found


def sample(name: str, value: float | None, unit: str, provenance: str = "measured", validity: str = "ok") -> dict:
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "validity": validity,
        "provenance": provenance,
        "scope": "board",
        "generated_at": time.time(),
    }


class Board:
    """An MQTT client that behaves as a node: birth, will, telemetry when told, answers to commands."""

    def __init__(self, broker: Broker, node: str, board: str = "test board", keepalive_s: int = 2, shards: int = 4):
        self.node, self.board, self.shards = node, board, shards
        self.bd_seq, self.seq, self.number = 1, 0, 0
        self.run = 1
        self.commands: list[dict] = []
        self.values: dict[str, tuple[float | None, str, str]] = {
            "temp_c": (45.0, "degC", "simulated"),
            "power_w": (5.5, "W", "simulated"),
            "energy_j": (1000.0, "J", "derived"),
            "duty": (0.5, "1", "measured"),
        }
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=f"{node}-{secrets.token_hex(3)}", protocol=mqtt.MQTTv5
        )
        self.client.will_set(f"{ROOT}/node/{node}/status", json.dumps(self._status("offline")), qos=1, retain=True)
        self.client.on_connect = lambda client, *_: client.subscribe(f"{ROOT}/node/{node}/command/+", 1)
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.on_message = self._command
        self.client.connect(broker.host, broker.port, keepalive=keepalive_s)
        self.client.loop_start()
        assert self._ready.wait(WAIT_S)
        self.born()

    def _status(self, text: str) -> dict:
        return {"node": self.node, "status": text, "bd_seq": self.bd_seq}

    def publish(self, leaf: str, tree: dict | bytes, retain: bool = False, qos: int = 1) -> None:
        payload = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        self.client.publish(f"{ROOT}/node/{self.node}/{leaf}", payload, qos=qos, retain=retain)

    def born(self) -> None:
        self.seq = 0
        birth = {
            "node": self.node,
            "bd_seq": self.bd_seq,
            "agent_version": "0.1.0",
            "board": self.board,
            "generated_at": time.time(),
            "sensors": [],
            "shards": [
                {"layer": i % 2, "expert": i // 2, "precision": "int8" if i % 3 else "int4", "sha256": "ab"}
                for i in range(self.shards)
            ],
            "bundle": "rig",
            "memory_bytes": 10**9,
            "data_endpoint": "",
            "protocol": 1,
        }
        self.publish("birth", birth, retain=True)
        self.publish("status", self._status("online"), retain=True)

    def telemetry(self, *samples: dict) -> None:
        self.seq += 1
        self.number += 1
        given = list(samples) or [sample(name, value, unit, how) for name, (value, unit, how) in self.values.items()]
        self.publish(
            "telemetry",
            {
                "node": self.node,
                "bd_seq": self.bd_seq,
                "seq": self.seq,
                "generated_at": time.time(),
                "samples": given,
                "run": self.run,
                "number": self.number,
            },
            qos=0,
        )

    def event(self, severity: str, kind: str, text: str) -> None:
        self.publish(
            "event",
            {"node": self.node, "generated_at": time.time(), "severity": severity, "kind": kind, "text": text},
        )

    def _command(self, _client, _userdata, message) -> None:
        command = json.loads(message.payload)
        self.commands.append(command)
        if command["name"] == "rebirth":
            self.born()
        answer = {"node": self.node, "id": command["id"], "ok": True, "text": f"did {command['name']}"}
        self.publish("result", answer)

    def run_at(self, period_s: float) -> Board:
        """Telemetry from a thread of its own until `close` or `fall_silent`."""

        def loop() -> None:
            while not self._stop.wait(period_s):
                self.telemetry()

        self._thread = threading.Thread(target=loop, daemon=True)
        self._thread.start()
        return self

    def fall_silent(self) -> None:
        """Sends nothing more, also no keep-alive, and does not close the connection: as a board that hangs."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.client.loop_stop()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.client.disconnect()
        self.client.loop_stop()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def tree(self) -> Any:
        def refuse(text: str) -> None:
            raise AssertionError(f"{text} in JSON")

        return json.loads(self.body, parse_constant=refuse)


def ask(
    url: str, path: str, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None, context=None
) -> Answer:
    """One request by the standard library's client, which sends just the headers that are given."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        link = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=WAIT_S, context=context)
    else:
        link = http.client.HTTPConnection(parts.hostname, parts.port, timeout=WAIT_S)
    with contextlib.closing(link):
        payload = body if isinstance(body, (bytes, str)) or body is None else json.dumps(body)
        given = dict(headers or {})
        if payload is not None and "Content-Type" not in given:
            given["Content-Type"] = "application/json"
        link.request(method, path, payload, given)
        answer = link.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())


class Events:
    """The stream, read line by line as the standard says: (event, data)."""

    def __init__(self, url: str, headers: dict[str, str] | None = None):
        parts = urlsplit(url)
        self._link = http.client.HTTPConnection(parts.hostname, parts.port, timeout=WAIT_S)
        self._link.request("GET", "/api/v1/stream", headers=headers or {})
        self.answer = self._link.getresponse()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def next(self, kind: str, condition=lambda tree: True) -> Any:
        """The next event of that kind for which the condition holds."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            name, data = "", b""
            while (line := self.answer.readline().rstrip(b"\n")) != b"":
                field_, _, value = line.partition(b": ")
                name, data = (value.decode(), data) if field_ == b"event" else (name, data + value)
            if not name:
                raise AssertionError("the stream has ended")
            if name == kind and condition(tree := json.loads(data)):
                return tree
        raise AssertionError(f"no {kind} came")


@dataclass
class Station:
    """A ground station that serves its page."""

    broker: Broker
    control: Control
    mission: Mission
    served: Served
    boards: list[Board] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.served.url

    def board(self, node: str, **options: Any) -> Board:
        self.boards.append(Board(self.broker, node, **options))
        return self.boards[-1]

    def get(self, path: str, **options: Any) -> Answer:
        return ask(self.url, path, **options)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
        return ask(self.url, path, "POST", body, headers)


@contextlib.contextmanager
def station(folder: Path, options: Options = Options(port=0), limits: Path | None = None, broker: Broker | None = None):
    """`limits`: the TOML file of them."""
    with contextlib.ExitStack() as stack:
        broker = broker or stack.enter_context(Broker(folder, "embedded"))
        archive = stack.enter_context(Archive(folder / "archive"))
        reader = stack.enter_context(ArchiveReader(folder / "archive"))
        control = stack.enter_context(Control(FLEET, broker.host, broker.port))
        watch = None if limits is None else LimitsWatch(limits)
        mission = stack.enter_context(Mission(control, archive, reader, watch))
        served = stack.enter_context(serving(mission, options))
        running = Station(broker, control, mission, served)
        try:
            yield running
        finally:
            for board in running.boards:
                board.close()
