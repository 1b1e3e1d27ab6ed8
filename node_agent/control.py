"""The control plane of a node: MQTT 5 with Sparkplug's semantics (birth, death by last will, bdSeq, seq, rebirth, commands).

paho's own thread keeps the connection and reconnects for ever; a broker that is absent stops nothing else on the node.
Everything received is untrusted: malformed, oversized, expired, replayed or retained commands are counted and refused.
Leaves out: what a birth or telemetry contains (agent.py, telemetry.py), and what a command does.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import sys
import threading
import time
from collections import deque
from typing import Any, Callable

from paho.mqtt import client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from node_agent import wire
from node_agent.births import BirthCounter
from node_agent.config import BrokerConfig, Config
from node_agent.counters import Counters
from node_agent.errors import ConfigError

log = logging.getLogger("node_agent.control")

KEEPALIVE_S = 10
RECONNECT_S = (0.2, 2.0)
CONNECT_TIMEOUT_S = 3.0
MAX_QUEUED = 100  # QoS 1 messages held while the broker is away
REMEMBERED_COMMANDS = 256
STOP_WAIT_S = 0.4


class Control:
    """Connection to the broker. Use as a context manager.

    `make_birth(bd_seq)` gives the birth certificate; `on_command(name, arguments) -> (ok, text)` carries out a command that
    is none of rebirth and ping. Both are called in paho's thread.
    """

    def __init__(
        self,
        config: Config,
        broker: BrokerConfig,
        counters: Counters,
        make_birth: Callable[[int], wire.Birth],
        on_command: Callable[[str, dict[str, str]], tuple[bool, str]],
    ):
        self._node = config.node.id
        self._broker = broker
        self._topics = wire.Topics(config.node.fleet)
        self._counters = counters
        self._make_birth = make_birth
        self._on_command = on_command
        self._births = BirthCounter(config.node.state_dir)
        self._bd_seq = self._births.next()
        self._bd_seq_used = False
        self._seq = 0
        self._born = threading.Event()
        self._stopping = False
        self._sending = threading.Lock()  # seq and the birth it counts from change together
        self._seen: deque[str] = deque(maxlen=REMEMBERED_COMMANDS)
        self._reported: set[str] = set()
        self._client = self._make_client()

    def _make_client(self) -> mqtt.Client:
        # A client id that is used twice takes the connection over and fires the other's will: it is never the same twice.
        name = f"{self._node}-{secrets.token_hex(4)}"
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5)
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.reconnect_delay_set(*RECONNECT_S)
        client.max_queued_messages_set(MAX_QUEUED)
        if self._broker.username:
            client.username_pw_set(self._broker.username, self._broker.password or None)
        if self._broker.ca:
            try:
                client.tls_set(
                    str(self._broker.ca),
                    str(self._broker.cert) if self._broker.cert else None,
                    str(self._broker.key) if self._broker.key else None,
                    tls_version=ssl.PROTOCOL_TLS_CLIENT,
                )
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"[broker] ca, cert or key cannot be used ({error}): copy the node's certificates again"
                ) from None
        client.on_pre_connect = self._before_connect
        client.on_socket_open = self._socket_open
        client.on_connect = self._connected
        client.on_connect_fail = self._connect_failed
        client.on_disconnect = self._disconnected
        client.on_message = self._message
        return client

    def __enter__(self) -> Control:
        properties = Properties(PacketTypes.CONNECT)
        properties.MaximumPacketSize = wire.MAX_MESSAGE_BYTES + 4096
        self._client.connect_async(
            self._broker.host,
            self._broker.port,
            KEEPALIVE_S,
            clean_start=True,
            properties=properties,
        )
        self._client.loop_start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping = True
        if self.connected:
            status = wire.Status(self._node, "offline", self._bd_seq)
            sent = self._client.publish(self._topics.status(self._node), wire.encode(status), 1, retain=True)
            try:
                sent.wait_for_publish(STOP_WAIT_S)
            except (RuntimeError, ValueError):
                pass  # the connection broke in this moment: the will says the same
            self._born.clear()
            self._client.disconnect()
            # loop_stop joins paho's thread, which a stalled broker could hold: it gets a moment, and is a daemon
            flush = threading.Thread(target=self._client.loop_stop, daemon=True)
            flush.start()
            flush.join(STOP_WAIT_S)
        else:
            self._client.disconnect()
        self._births.close()

    @property
    def connected(self) -> bool:
        return self._born.is_set() and self._client.is_connected()

    # ------------------------------------------------------------ sending

    def telemetry(self, samples: tuple[wire.Sample, ...], generated_at: float) -> bool:
        """Publishes samples, QoS 0, with the next seq; False while there is no birth that it could count from."""
        with self._sending:
            if not self.connected:
                return False
            self._seq += 1
            message = wire.Telemetry(self._node, self._bd_seq, self._seq, generated_at, samples)
            self._client.publish(self._topics.telemetry(self._node), wire.encode(message), 0)
            return True

    def event(self, severity: str, kind: str, text: str) -> None:
        """Publishes an event, QoS 1; kept (up to a limit) while the broker is away."""
        message = wire.Event(self._node, time.time(), severity, kind, text[:1000])
        self._client.publish(self._topics.event(self._node), wire.encode(message), 1)

    def rebirth(self) -> None:
        """Publishes the birth certificate and 'online' (both retained); telemetry's seq starts again, at 1."""
        birth = wire.encode(self._make_birth(self._bd_seq))
        with self._sending:
            self._seq = 0
            self._client.publish(self._topics.birth(self._node), birth, 1, retain=True)
            self._say_online()

    # ------------------------------------------------------------ paho's thread

    def _before_connect(self, client: mqtt.Client, userdata: Any) -> None:
        if self._bd_seq_used:  # a try that reached no broker costs no number, and no write to the SD card
            self._bd_seq = self._births.next()
            self._bd_seq_used = False
        will = wire.Status(self._node, "offline", self._bd_seq)
        client.will_set(self._topics.status(self._node), wire.encode(will), 1, retain=True)

    def _socket_open(self, client: mqtt.Client, userdata: Any, sock: Any) -> None:
        self._bd_seq_used = True
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # without it QoS 1 takes 40 ms and more

    def _connected(self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._report("refused", f"broker refuses this node ({reason}): check its user, password and certificate")
            return
        self._reported.clear()
        client.subscribe([(self._topics.command(self._node), 1), (self._topics.status(self._node), 1)])
        self.rebirth()
        self._born.set()
        log.info("connected to the broker at %s:%d, bdSeq %d", self._broker.host, self._broker.port, self._bd_seq)

    def _say_online(self) -> None:
        status = wire.Status(self._node, "online", self._bd_seq)
        self._client.publish(self._topics.status(self._node), wire.encode(status), 1, retain=True)

    def _connect_failed(self, client: mqtt.Client, userdata: Any) -> None:
        error = sys.exc_info()[1]  # paho calls this inside its except clause and passes nothing
        if isinstance(error, ssl.SSLError):
            self._report("tls", f"TLS with the broker fails ({error}): check ca, cert, key and this machine's clock")
        else:
            self._report(
                "absent", f"no broker at {self._broker.host}:{self._broker.port} ({error}): trying again for ever"
            )

    def _disconnected(self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        was_born = self._born.is_set()
        self._born.clear()
        if was_born and reason.is_failure:
            self._report("lost", f"connection to the broker lost ({reason}): trying again")
        elif reason.is_failure:  # refused by TLS: the handshake is done on our side before the broker's alert comes
            self._report(
                "closed", f"broker closes the connection before it answers ({reason}): check cert, key and the port"
            )

    def _report(self, kind: str, text: str) -> None:
        Counters.count(self._counters.control_errors, kind)
        if kind not in self._reported:
            self._reported.add(kind)
            log.warning("%s", text)

    def _message(self, client: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
        if message.topic == self._topics.status(self._node):
            self._own_status(message.payload)
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
        elif command.expires_at < time.time():
            self._refuse(
                message,
                "expired",
                identity,
                f"command {command.name[:40]} came {time.time() - command.expires_at:.1f} s late",
            )
        elif identity in self._seen:
            self._refuse(
                message, "replayed", identity, f"command {command.name[:40]} with this id was carried out already"
            )
        else:
            self._seen.append(identity)
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
        if status.status == "offline" and self._born.is_set() and not self._stopping:
            self._say_online()

    def _carry_out(self, command: wire.Command) -> tuple[bool, str]:
        if command.name == "rebirth":
            self.rebirth()
            return True, f"born again with bdSeq {self._bd_seq}"
        if command.name == "ping":
            return True, "pong"
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
        self._client.publish(self._topics.result(self._node), result, 1, properties=properties)
