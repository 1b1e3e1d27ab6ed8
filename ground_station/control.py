"""The ground station's end of the control plane: an MQTT 5 client that keeps the fleet's state and sends commands.

Decisions are `fleet.apply`'s; here are the socket, the lock and the counters. paho's own thread reads the network; whatever
comes from it is counted, logged once per kind and dropped when it is malformed, and never ends that thread. The client
reconnects by itself, subscribes again and says that the ground station is online. Leaves out TLS and user names.
"""

from __future__ import annotations

import logging
import secrets
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import paho.mqtt.client as mqtt
from paho.mqtt import MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from ground_station.broker_fleet import use_certificates
from ground_station.fleet import Action, AskHistory, Instant, NodeState, Taken, apply, reconnected
from node_agent import wire
from node_agent.mqtt_mend import Mended

log = logging.getLogger("spacemoe.control")

CONNECT_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 5.0
KEEPALIVE_S = 10
MAX_NODES = 10_000
MAX_ID_CHARS = 64
MAX_ASKED = 256


Heard = wire.Birth | wire.Status | wire.Event | wire.Satellite
Source = Literal["node", "ground"]


class ControlError(RuntimeError):
    """The control plane cannot be used; the text names the next step."""


def now() -> Instant:
    """This moment on the machine's two clocks."""
    return Instant(time.time(), time.monotonic())


class _Client(Mended, mqtt.Client):
    """paho's client, which lives on after a message that it cannot decode."""

    decode_errors = (MQTTException,)


class Control:
    """Connected between `start` and `stop` (or inside `with`). Every method may be called from any thread but paho's.

    Args:
        fleet: id of the fleet, part of every topic.
        clock: gives the time; injected so that tests can move it.
        on_telemetry: called in paho's thread with (node, telemetry) for each message that comes for the first time, live or as
            history, in the order of its arrival.
        tls: (authority, certificate, key), PEM files: of a broker that asks for certificates.
    Raises: wire.WireError for an illegal fleet id, ControlError for certificates that cannot be used, and from `start` when no
    broker answers.
    """

    def __init__(
        self,
        fleet: str,
        host: str,
        port: int,
        clock: Callable[[], Instant] = now,
        on_telemetry: Callable[[str, Taken], None] | None = None,
        tls: tuple[Path, Path, Path] | None = None,
    ) -> None:
        self.topics = wire.Topics(fleet)
        self.host, self.port = host, port
        self._clock = clock
        self._on_telemetry = () if on_telemetry is None else (on_telemetry,)
        self._listeners: tuple[Callable[[str, Heard, Source], None], ...] = ()
        self._states: dict[str, NodeState] = {}
        self._malformed: Counter[str] = Counter()
        self._pending: dict[str, list[wire.Result]] = {}
        self._asked: deque[str] = deque(maxlen=MAX_ASKED)  # ids of what `_carry_out` sent: nobody waits for its answers
        # One lock for all of the above; notified whenever something changed.
        self._changed = threading.Condition()
        self._connected = False
        self._stopping = False
        self._refusal = ""
        # Two clients with one id would take turns in throwing each other out.
        self._client = _Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=f"ground-{fleet}-{secrets.token_hex(4)}", protocol=mqtt.MQTTv5
        )
        self._client.unreadable = lambda error: self._drop("packet", error)
        self._client.reconnect_delay_set(min_delay=0.2, max_delay=2.0)
        self._client.will_set(self.topics.ground_status(), self._ground_status("offline"), qos=1, retain=True)
        self._client.on_socket_open = _no_delay
        if tls is not None:
            try:
                use_certificates(self._client, *tls)
            except (OSError, ValueError) as error:
                raise ControlError(
                    f"{tls[0]}, {tls[1]} or {tls[2]} cannot be used ({error}): run as the fleet folder's owner, or restore them"
                ) from None
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message

    # ------------------------------------------------------------ life

    def start(self) -> Control:
        """Connects, subscribes and announces the ground station.  Raises: ControlError."""
        self._client.connect_async(self.host, self.port, keepalive=KEEPALIVE_S, clean_start=True)
        self._client.loop_start()
        with self._changed:
            if not self._changed.wait_for(lambda: self._connected or self._refusal, CONNECT_TIMEOUT_S):
                self._refusal = f"no answer within {CONNECT_TIMEOUT_S:.0f} s"
            refusal = "" if self._connected else self._refusal
        if refusal:
            self.stop()
            certificates = "" if "no answer" in refusal else ", and, where it asks for certificates, whose they are"
            raise ControlError(
                f"broker at {self.host}:{self.port}: {refusal}; check that it runs and the address{certificates}"
            )
        return self

    def stop(self) -> None:
        """Says that the ground station is offline and disconnects. Safe to call twice."""
        self._stopping = True
        if self.connected:
            info = self._client.publish(self.topics.ground_status(), self._ground_status("offline"), qos=1, retain=True)
            try:
                info.wait_for_publish(1.0)
            except (RuntimeError, ValueError):
                pass  # the broker is gone: its will says the same
        self._client.disconnect()
        self._client.loop_stop()

    def __enter__(self) -> Control:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def listen(
        self,
        telemetry: Callable[[str, Taken], None] | None = None,
        message: Callable[[str, Heard, Source], None] | None = None,
    ) -> None:
        """Adds listeners beside the constructor's; each is called in paho's thread and must not wait.

        telemetry: as `on_telemetry`. message: (node, message, source) for each birth that is new, status, event (of a node, or of
        the ground station itself: source "ground") and virtual satellite's state; the last two kinds are subscribed to only then.
        """
        with self._changed:
            if telemetry is not None:
                self._on_telemetry = (*self._on_telemetry, telemetry)
            if message is not None:
                self._listeners = (*self._listeners, message)
            connected = self._connected and message is not None
        if connected:
            self._client.subscribe([(topic, mqtt.SubscribeOptions(qos=1)) for topic in self._extra_topics()])

    def _extra_topics(self) -> list[str]:
        return [self.topics.ground_event(), self.topics.satellite("+")]

    # ------------------------------------------------------------ what is known

    @property
    def connected(self) -> bool:
        with self._changed:
            return self._connected

    @property
    def malformed(self) -> dict[str, int]:
        """How many messages were dropped, by kind."""
        with self._changed:
            return dict(self._malformed)

    def now(self) -> Instant:
        """The time by the clock that stamps what is received."""
        return self._clock()

    def snapshot(self) -> dict[str, NodeState]:
        """The state of every node that was ever heard of; the values never change."""
        with self._changed:
            return dict(self._states)

    def wait_for(self, nodes: Iterable[str], timeout_s: float) -> set[str]:
        """Waits until all of `nodes` are ready (see `NodeState.ready`); returns those that still are not."""
        wanted = set(nodes)

        def missing() -> set[str]:
            at = self._clock()
            return {node for node in wanted if node not in self._states or not self._states[node].ready(at)}

        with self._changed:
            self._changed.wait_for(lambda: not missing(), timeout_s)
            return missing()

    # ------------------------------------------------------------ commands

    def command(
        self, node: str, name: str, timeout_s: float = COMMAND_TIMEOUT_S, arguments: dict[str, str] | None = None
    ) -> wire.Result:
        """Sends a command and waits for the node's answer; `ok` is False, and `text` says why, when none came in time.

        Raises: wire.WireError for an illegal node id.
        """
        identity = secrets.token_hex(8)
        with self._changed:
            self._pending[identity] = []
        try:
            if not self._send(node, name, identity, timeout_s, arguments or {}):
                return wire.Result(node, identity, False, "not sent: the broker is not connected")
            with self._changed:
                answers = self._pending[identity]
                self._changed.wait_for(lambda: answers, timeout_s)
                if answers:
                    return answers[0]
            return wire.Result(node, identity, False, f"no answer to {name!r} within {timeout_s:g} s")
        finally:
            with self._changed:
                del self._pending[identity]

    def tell(self, node: str, name: str, arguments: dict[str, str], valid_s: float) -> bool:
        """Sends a command without waiting for its answer; False when the broker is not connected."""
        identity = secrets.token_hex(8)
        with self._changed:
            self._asked.append(identity)
        return self._send(node, name, identity, valid_s, arguments)

    def publish(self, topic: str, message: object) -> None:
        """Publishes one of wire's messages, QoS 0: dropped while the broker is not connected."""
        if self.connected:
            self._client.publish(topic, wire.encode(message), qos=0)

    def alarm(self, event: wire.Event) -> None:
        """Publishes what the ground station itself found, QoS 1: it is kept until the broker is connected."""
        self._client.publish(self.topics.ground_event(), wire.encode(event), qos=1)

    def _send(self, node: str, name: str, identity: str, timeout_s: float, arguments: dict[str, str]) -> bool:
        topic = self.topics.command(node, name)
        if not self.connected:
            # paho would keep it and send it after the reconnection, when nobody waits for it any more.
            return False
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = self.topics.result(node)
        properties.CorrelationData = identity.encode()
        properties.MessageExpiryInterval = max(1, round(timeout_s))
        message = wire.Command(name, identity, self._clock().utc_s + timeout_s, arguments)
        self._client.publish(topic, wire.encode(message), qos=1, properties=properties)
        return True

    # ------------------------------------------------------------ paho's thread

    def _on_connect(self, client: mqtt.Client, _userdata, _flags, reason, _properties) -> None:
        if reason.is_failure:
            self._set_link(False, f"refused: {reason}")
            return
        with self._changed:
            self._states = {node: reconnected(state) for node, state in self._states.items()}
        topics = self.topics
        leaves = (
            topics.birth,
            topics.status,
            topics.telemetry,
            topics.history,
            topics.clock,
            topics.event,
            topics.result,
        )
        wanted = [*(topic("+") for topic in leaves), topics.ground_status()]
        if self._listeners:
            wanted += self._extra_topics()
        client.subscribe([(topic, mqtt.SubscribeOptions(qos=1)) for topic in wanted])
        client.publish(self.topics.ground_status(), self._ground_status("online"), qos=1, retain=True)
        self._set_link(True, "")

    def _on_connect_fail(self, _client, _userdata) -> None:
        error = sys.exc_info()[1]  # paho tells nobody but the one who asks here
        self._set_link(False, "cannot connect" + (f" ({error})" if error else ""))

    def _on_disconnect(self, _client, _userdata, _flags, reason, _properties) -> None:
        self._set_link(False, f"disconnected: {reason}")

    def _set_link(self, connected: bool, refusal: str) -> None:
        with self._changed:
            if self._connected and not connected and not self._stopping:
                log.warning("control plane: %s; trying again", refusal)
            self._connected, self._refusal = connected, refusal
            self._changed.notify_all()

    def _on_message(self, _client, _userdata, message: mqtt.MQTTMessage) -> None:
        try:
            if message.topic == self.topics.ground_status():
                self._own_status(message)
                return
            if self._listeners and message.topic == self.topics.ground_event():
                self._tell(wire.decode(wire.Event, message.payload), "ground")
                return
            if self._listeners and message.topic.startswith(self.topics.satellite("+")[:-1]):
                self._take_satellite(message)
                return
            node, leaf = self.topics.parse_node(message.topic)
            kind = wire.MESSAGE_OF_LEAF.get(leaf)
            if kind is None:
                raise wire.WireError(f"no message type belongs to {leaf[:40]!r}")
        except (wire.WireError, UnicodeDecodeError) as error:
            self._drop("topic", error)
            return
        try:
            content = wire.decode(kind, message.payload)
            if content.node != node:
                raise wire.WireError(f"{kind.__name__} on the topic of {node} says it is from {content.node[:40]!r}")
        except wire.WireError as error:
            self._drop(leaf, error)
            return
        if isinstance(content, wire.Result):
            self._take_result(content)
        elif isinstance(content, wire.ClockQuery):
            self._answer_clock(node, content)
        else:
            self._take(node, content, message.retain)

    def _own_status(self, message: mqtt.MQTTMessage) -> None:
        """Another ground station that goes, or the late will of an earlier one, must not make the nodes keep to themselves."""
        if message.retain or not message.payload or self._stopping:
            return
        try:
            status = wire.decode(wire.GroundStatus, message.payload)
        except wire.WireError as error:
            self._drop("ground status", error)
            return
        if status.status == "offline":
            self._client.publish(self.topics.ground_status(), self._ground_status("online"), qos=1, retain=True)

    def _take_satellite(self, message: mqtt.MQTTMessage) -> None:
        content = wire.decode(wire.Satellite, message.payload)
        if message.topic != self.topics.satellite(wire.check_id(content.node)):
            raise wire.WireError(f"Satellite of {content.node} on another's topic")
        self._tell(content, "ground")

    def _tell(self, content: Heard, source: Source) -> None:
        for listener in self._listeners:
            try:
                listener(wire.check_id(content.node), content, source)
            except Exception as error:  # an exception here would end paho's thread, and with it the control plane
                self._drop("listener", error)

    def _take_result(self, result: wire.Result) -> None:
        with self._changed:
            if result.id in self._pending:
                self._pending[result.id].append(result)
                self._changed.notify_all()
            elif result.id not in self._asked:  # came too late, or is another ground station's: no reason for a warning
                self._malformed["unasked result"] += 1

    def _take(self, node: str, content, retained: bool) -> None:
        with self._changed:
            full = node not in self._states and len(self._states) >= MAX_NODES
            if not full:
                before = self._states.get(node, NodeState(node))
                state, actions = apply(before, content, self._clock(), retained)
                self._states[node] = state
                self._changed.notify_all()
        if full:
            self._drop("too many nodes", wire.WireError(f"{node} is over the limit of {MAX_NODES} nodes"))
            return
        for taken in state.taken:
            for listener in self._on_telemetry:
                try:
                    listener(node, taken)
                except Exception as error:  # an exception here would end paho's thread, and with it the control plane
                    self._drop("listener", error)
        new_birth = isinstance(content, wire.Birth) and state.birth != before.birth
        if self._listeners and (new_birth or isinstance(content, (wire.Status, wire.Event))):
            self._tell(content, "node")
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, AskHistory):
            ranges = ",".join(f"{first}-{last}" for first, last in action.ranges)
            log.info("asking %s for its history: %s", action.node, ranges[:100])
            name, arguments = "history", {"run": str(action.run), "ranges": ranges}
        else:
            log.info("asking %s for a rebirth: %s", action.node, action.reason)
            name, arguments = "rebirth", {}
        identity = secrets.token_hex(8)
        with self._changed:
            self._asked.append(identity)
        self._send(action.node, name, identity, COMMAND_TIMEOUT_S, arguments)

    def _answer_clock(self, node: str, query: wire.ClockQuery) -> None:
        """Both stamps are taken here: what the message waited in our own queues counts as its way."""
        received_s = self._clock().utc_s
        if len(query.id) > MAX_ID_CHARS:
            self._drop("clock", wire.WireError(f"an id of {len(query.id)} characters"))
            return
        answered_s = self._clock().utc_s
        stamps = {"received_at": f"{received_s:.6f}", "answered_at": f"{answered_s:.6f}"}
        message = wire.Command("clock", query.id, answered_s + COMMAND_TIMEOUT_S, stamps)
        self._client.publish(self.topics.command(node, "clock"), wire.encode(message), qos=0)

    def _drop(self, kind: str, error: Exception) -> None:
        with self._changed:
            self._malformed[kind] += 1
            first = self._malformed[kind] == 1
        if first:
            log.warning("dropped a malformed message (%s; more of its kind are only counted): %s", kind, error)

    def _ground_status(self, text: wire.StatusText) -> bytes:
        return wire.encode(wire.GroundStatus(text, self._clock().utc_s))


def _no_delay(_client, _userdata, link: socket.socket) -> None:
    """Without it small messages wait up to 40 ms for the acknowledgement of the one before."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
