"""The control plane of a node: MQTT 5 with Sparkplug's semantics (birth, death by last will, bdSeq, seq, rebirth, commands).

A broker that is absent stops nothing else on the node (connection.py tries for ever). While it is, or while the ground
station says that it is offline, telemetry is kept and not sent; it goes out as history when both are back, oldest first.
Everything received is untrusted: malformed, oversized, expired, replayed or retained commands are counted and refused.
Leaves out: what a birth or telemetry contains (agent.py, telemetry.py), and what a command does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Callable

from paho.mqtt import client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from node_agent import wire
from node_agent.births import BirthCounter
from node_agent.clock import GroundClock
from node_agent.config import BrokerConfig, Config
from node_agent.connection import STOP_WAIT_S, Connection
from node_agent.counters import Counters
from node_agent.forwarding import Forwarder
from node_agent.history import History

log = logging.getLogger("node_agent.control")

MAX_EVENTS = 100  # held until the broker has acknowledged them
REMEMBERED_COMMANDS = 256


class _Event:
    """An event that is to reach the broker; `sent` is paho's record of it, on the connection that is up."""

    def __init__(self, payload: bytes):
        self.payload = payload
        self.sent: mqtt.MQTTMessageInfo | None = None

    @property
    def arrived(self) -> bool:
        try:
            return self.sent is not None and self.sent.is_published()
        except (RuntimeError, ValueError):  # paho says so of a message that it was given as the connection broke
            return False


class Control:
    """The node as the broker sees it. Use as a context manager.

    `make_birth(bd_seq)` gives the birth certificate; `on_command(name, arguments) -> (ok, text)` carries out a command that
    is none of rebirth, ping, history and clock; `on_heard()` says that the ground station lives. All are called in paho's thread.
    `history` is injected by tests.
    """

    def __init__(
        self,
        config: Config,
        broker: BrokerConfig,
        counters: Counters,
        make_birth: Callable[[int], wire.Birth],
        on_command: Callable[[str, dict[str, str]], tuple[bool, str]],
        history: History | None = None,
        on_heard: Callable[[], None] = lambda: None,
    ):
        """Raises: ConfigError, AlreadyRunningError."""
        self._node = config.node.id
        self._topics = wire.Topics(config.node.fleet)
        self._counters = counters
        self._make_birth = make_birth
        self._on_command, self._on_heard = on_command, on_heard
        self._births = BirthCounter(config.node.state_dir)
        self._bd_seq = self._births.next()
        self._bd_seq_used = False
        self._run = self._bd_seq  # no other process of this node ever has it
        self._session = self._bd_seq  # of the last birth; telemetry belongs to it until the next
        self._seq = 0
        self._number = 0
        self._born = self._was_born = False
        self._stopping = False
        self._sending = threading.Lock()  # seq and the birth it counts from change together
        self._forwarder = Forwarder(
            self._node,
            self._run,
            publish=lambda payload: self._connection.publish(self._topics.history(self._node), payload, 1),
            unheard=lambda mid: mid in self._connection.unheard,
            history=History(config.history.max_messages, config.history.max_bytes) if history is None else history,
        )
        self.clock = GroundClock()
        self._events: deque[_Event] = deque(maxlen=MAX_EVENTS)
        self._seen: deque[str] = deque(maxlen=REMEMBERED_COMMANDS)
        self._connection = Connection(
            self._node,
            broker,
            before=self._will,
            tried=self._use_bd_seq,
            up=self._up,
            down=self._down,
            message=self._message,
            count=lambda kind: Counters.count(counters.control_errors, kind),
        )

    def __enter__(self) -> Control:
        self._connection.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping = True
        sent = self._say("offline")
        if sent is not None:
            try:
                sent.wait_for_publish(STOP_WAIT_S)
            except (RuntimeError, ValueError):
                pass  # the connection broke in this moment: the will says the same
        self._connection.__exit__()
        self._births.close()

    # ------------------------------------------------------------ sending

    def telemetry(self, samples: tuple[wire.Sample, ...], generated_at: float, asked: bool = False) -> bool:
        """Publishes samples, QoS 0, with the next seq and number; keeps them, to be sent later, where nobody is there to
        take them in. `asked`: a command wants them, so somebody is, be it not the ground station. Returns whether they were sent.
        """
        with self._sending:
            self._number += 1
            if self._was_born:
                self._seq += 1
            message = wire.Telemetry(
                self._node, self._session, self._seq, generated_at, samples, self._run, self._number
            )
            payload = wire.encode(message)
            sent = self._born and (asked or not self._forwarder.ground_away)
            if sent:
                info = self._connection.publish(self._topics.telemetry(self._node), payload, 0)
                sent = info is not None and info.rc == mqtt.MQTT_ERR_SUCCESS
            self._forwarder.keep(self._number, payload, sent)
            self._forwarder.send()
            self._ask_time()
            return sent

    def samples(self, generated_at: float) -> tuple[wire.Sample, ...]:
        """What telemetry says of the control plane: the clock's offset, and the messages that are kept."""
        with self._sending:
            return (*self.clock.samples(generated_at), *self._forwarder.samples(generated_at))

    def _ask_time(self) -> None:
        if self._born and (question := self.clock.question()) is not None:
            query = wire.encode(wire.ClockQuery(self._node, *question))
            self._connection.publish(self._topics.clock(self._node), query, 0)

    def event(self, severity: str, kind: str, text: str) -> None:
        """Publishes an event, QoS 1; kept (up to a limit) until a broker has acknowledged it."""
        message = wire.Event(self._node, time.time(), severity, kind, text[:1000])
        with self._sending:
            self._events.append(_Event(wire.encode(message)))
            self._send_events()

    def _send_events(self) -> None:
        while self._events and self._events[0].arrived:
            self._events.popleft()
        if self._born:
            for event in self._events:
                if event.sent is None:
                    event.sent = self._connection.publish(self._topics.event(self._node), event.payload, 1)

    def rebirth(self) -> None:
        """Publishes the birth certificate and 'online' (both retained); telemetry's seq starts again, at 1."""
        with self._sending:
            self._rebirth()

    def changed(self) -> None:
        """What the birth certificate says has changed: a new one, if there is a broker. From any thread."""
        with self._sending:
            if self._connection.is_up:  # else the next connection begins with one
                self._rebirth()

    @property
    def connected(self) -> bool:
        return self._connection.is_up

    def reconnect(self) -> None:
        """Connects again with the certificate that is in its files now; a birth follows. From any thread.  Raises: ConfigError."""
        self._connection.reconnect()

    def _rebirth(self) -> None:
        birth = wire.encode(self._make_birth(self._bd_seq))  # under the lock: an older one must not be sent after it
        self._seq = 0
        self._session = self._bd_seq
        self._connection.publish(self._topics.birth(self._node), birth, 1, retain=True)
        self._say("online")
        self._born = self._was_born = True
        self._forwarder.up()
        self._send_events()

    def _say(self, text: wire.StatusText) -> mqtt.MQTTMessageInfo | None:
        status = wire.Status(self._node, text, self._bd_seq)
        return self._connection.publish(self._topics.status(self._node), wire.encode(status), 1, retain=True)

    # ------------------------------------------------------------ called by the connection

    def _will(self) -> tuple[str, bytes]:
        if self._bd_seq_used:  # a try that reached no broker costs no number, and no write to the SD card
            self._bd_seq = self._births.next()
            self._bd_seq_used = False
        return self._topics.status(self._node), wire.encode(wire.Status(self._node, "offline", self._bd_seq))

    def _use_bd_seq(self) -> None:
        self._bd_seq_used = True

    def _up(self) -> None:
        self._connection.subscribe(
            self._topics.command(self._node), self._topics.status(self._node), self._topics.ground_status()
        )
        self.clock.ask_soon()
        self.rebirth()

    def _down(self) -> None:
        with self._sending:
            self._born = False
            self._forwarder.down()
            for event in self._events:
                if not event.arrived:
                    event.sent = None  # its fate is unknown: it is sent again, at least once

    def _message(self, message: mqtt.MQTTMessage) -> None:
        if message.topic == self._topics.status(self._node):
            self._own_status(message.payload)
            return
        if message.topic == self._topics.ground_status():
            self._ground_status(message.payload, message.retain)
            return
        try:
            _, leaf = self._topics.parse_node(message.topic)
            command = wire.decode(wire.Command, message.payload)
            if leaf != f"command/{command.name}":
                raise wire.WireError(f"command {command.name[:40]!r} came on topic {leaf[:60]!r}")
        except wire.WireError as error:
            self._refuse(message, "malformed", "", f"malformed command: {error}")
            return
        identity = command.id[:100]
        if message.retain:
            self._refuse(message, "retained", identity, "commands must not be retained")
        elif command.name == "clock":  # before its first answer this node cannot tell what has expired
            self._on_heard()
            self._take_time(command)
        elif (late_s := self.clock.utc_s() - command.expires_at) > 0:
            self._refuse(message, "expired", identity, f"command {command.name[:40]} came {late_s:.1f} s late")
        elif identity in self._seen:
            self._refuse(
                message, "replayed", identity, f"command {command.name[:40]} with this id was carried out already"
            )
        else:
            self._seen.append(identity)
            self._on_heard()
            ok, text = self._carry_out(command)
            if not ok:
                Counters.count(self._counters.control_errors, "command")
            self._answer(message, identity, ok, text)

    def _own_status(self, payload: bytes) -> None:
        """The will of an earlier connection, fired late, would stay as the retained status: it is put right."""
        try:
            status = wire.decode(wire.Status, payload)
        except wire.WireError:
            Counters.count(self._counters.control_errors, "malformed")
            return
        if status.status == "offline" and self._born and not self._stopping:
            self._say("online")

    def _ground_status(self, payload: bytes, retained: bool) -> None:
        if not payload:  # somebody cleared the retained one: nothing is known any more
            status = "online"
        else:
            try:
                status = wire.decode(wire.GroundStatus, payload).status
            except wire.WireError:
                Counters.count(self._counters.control_errors, "malformed")
                return
        with self._sending:
            self._forwarder.ground(status == "online", retained)

    def _take_time(self, command: wire.Command) -> None:
        """An answer that nobody waits for, or of another's question, is counted and no more."""
        try:
            stamps = [float(command.arguments[name][:40]) for name in ("received_at", "answered_at")]
        except (KeyError, ValueError):
            Counters.count(self._counters.control_errors, "malformed")
            return
        if not self.clock.answered(command.id, *stamps):
            Counters.count(self._counters.control_errors, "clock")

    def _carry_out(self, command: wire.Command) -> tuple[bool, str]:
        if command.name == "rebirth":
            self.rebirth()
            return True, f"born again with bdSeq {self._bd_seq}"
        if command.name == "ping":
            return True, "pong"
        if command.name == "history":
            with self._sending:
                return self._forwarder.owe_again(command.arguments.get("run", ""), command.arguments.get("ranges", ""))
        return self._on_command(command.name, command.arguments)

    def _refuse(self, message: mqtt.MQTTMessage, kind: str, identity: str, text: str) -> None:
        if Counters.count(self._counters.control_errors, kind):
            log.warning("%s", text)
        self._answer(message, identity, False, text)

    def _answer(self, message: mqtt.MQTTMessage, identity: str, ok: bool, text: str) -> None:
        """Always on the node's own result topic: a sender's response topic could name any other."""
        properties = Properties(PacketTypes.PUBLISH)
        correlation = getattr(message.properties, "CorrelationData", None)
        if isinstance(correlation, bytes) and len(correlation) <= 256:
            properties.CorrelationData = correlation
        result = wire.encode(wire.Result(self._node, identity, ok, text[:1000]))
        self._connection.publish(self._topics.result(self._node), result, 1, properties=properties)
