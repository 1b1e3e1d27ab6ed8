"""Keeps a connection to the MQTT broker: one after the other, each with a client of its own, for as long as the agent runs.

A client that reconnects would send what was not acknowledged before after the new birth, and an old birth would win: so
every connection begins with nothing, under a client id of its own (a client id that is used twice takes the connection over
and fires the other's will). Leaves out: topics and messages (control.py).
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import threading
from typing import Any, Callable

from paho.mqtt import MQTTException
from paho.mqtt import client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from node_agent import key_pair, wire
from node_agent.config import BrokerConfig
from node_agent.errors import ConfigError
from node_agent.mqtt_mend import Mended

log = logging.getLogger("node_agent.control")

KEEPALIVE_S = 10
RECONNECT_S = (0.2, 2.0)
CONNECT_TIMEOUT_S = 3.0
STOP_WAIT_S = 0.4
NO_SUBSCRIBERS = 0x10  # MQTT 5, section 3.4.2.1: a PUBACK may say so


class _Client(Mended, mqtt.Client):
    """Tells when its loop has ended, for whatever reason: an exception in a callback would end it without a callback."""

    ended: Callable[[Exception | None], None]
    decode_errors = (MQTTException,)

    def loop_forever(self, *args: Any, **kwargs: Any) -> mqtt.MQTTErrorCode:
        failure: Exception | None = None
        try:
            return super().loop_forever(*args, **kwargs)
        except Exception as error:
            failure = error
            return mqtt.MQTTErrorCode.MQTT_ERR_UNKNOWN
        finally:
            self.ended(failure)


class Connection:
    """A thread that connects, waits for the end of the connection, and connects again. Use as a context manager.

    `before()` is called before each try and gives (topic, payload) of the will; `tried()` once the broker's port is open;
    `up()` when the broker has taken us; `down()` when the connection has ended; `message(m)` for what arrives; `count(kind)`
    for what goes wrong. All of them are called in threads of this class, one at a time.
    """

    def __init__(
        self,
        node: str,
        broker: BrokerConfig,
        before: Callable[[], tuple[str, bytes]],
        tried: Callable[[], None],
        up: Callable[[], None],
        down: Callable[[], None],
        message: Callable[[mqtt.MQTTMessage], None],
        count: Callable[[str], object],
    ):
        """Raises: ConfigError for certificates that cannot be used."""
        self._node, self._broker = node, broker
        self._before, self._tried, self._up, self._down, self._received = before, tried, up, down, message
        self._count = count
        self._tls = self._tls_context()
        self._client: mqtt.Client | None = None
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._taken = self._renewing = False
        self._reported: set[str] = set()
        self.unheard: set[int] = set()  # message ids of this connection that the broker had no subscriber for
        self._thread = threading.Thread(target=self._run, name="broker", daemon=True)

    def __enter__(self) -> Connection:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._client is not None:
            self._client.disconnect()
        self._thread.join(STOP_WAIT_S)  # it is a daemon: a broker that stalls does not keep the agent from its end

    @property
    def is_up(self) -> bool:
        return self._taken

    def publish(
        self, topic: str, payload: bytes, qos: int, retain: bool = False, properties: Properties | None = None
    ) -> mqtt.MQTTMessageInfo | None:
        """Hands a message to paho; None where there is no connection."""
        client = self._client
        return client.publish(topic, payload, qos, retain, properties) if client is not None and self._taken else None

    def reconnect(self) -> None:
        """Takes this node's certificate from its files anew, and connects again with it at once. From any thread.

        Raises: ConfigError for certificates that cannot be used: the connection stays as it is.
        """
        self._tls = self._tls_context()
        client = self._client
        if client is not None and self._taken:
            self._renewing = True
            client.disconnect()

    def subscribe(self, *topics: str) -> None:
        self._client.subscribe([(topic, 1) for topic in topics])

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        delay_s = RECONNECT_S[0]
        while not self._stop.is_set():
            delay_s = RECONNECT_S[0] if self._connect_once() else min(2 * delay_s, RECONNECT_S[1])
            self._stop.wait(delay_s)

    def _connect_once(self) -> bool:
        """One connection from its first try to its end; True when the broker had taken it."""
        self._ended.clear()
        self._renewing = False
        client = self._client = self._make_client()
        self.unheard.clear()
        properties = Properties(PacketTypes.CONNECT)
        properties.MaximumPacketSize = wire.MAX_MESSAGE_BYTES + 4096
        try:
            topic, payload = self._before()
        except OSError as error:
            self._report("state", f"the state folder cannot be written ({error}): free space on the disk")
            return False
        client.will_set(topic, payload, 1, retain=True)
        try:
            client.connect(self._broker.host, self._broker.port, KEEPALIVE_S, clean_start=True, properties=properties)
        except ssl.SSLError as error:
            self._report("tls", f"TLS with the broker fails ({error}): check ca, cert, key and this machine's clock")
            return False
        except (OSError, UnicodeError) as error:  # UnicodeError: a host name that IDNA cannot write
            where = f"{self._broker.host}:{self._broker.port}"
            self._report("absent", f"no broker at {where} ({error}): trying again for ever")
            return False
        client.loop_start()
        self._ended.wait()
        taken, self._taken = self._taken, False
        self._down()
        client.loop_stop()
        return taken

    def _tls_context(self) -> ssl.SSLContext | None:
        broker = self._broker
        if not broker.ca:
            return None
        try:
            if broker.cert:
                key_pair.settle(broker.cert, broker.key)
            context = ssl.create_default_context(cafile=str(broker.ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if broker.cert:
                context.load_cert_chain(str(broker.cert), str(broker.key))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"[broker] ca, cert or key cannot be used ({error}): copy the node's certificates again"
            ) from None
        return context

    def _make_client(self) -> mqtt.Client:
        client = _Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=f"{self._node}-{secrets.token_hex(4)}",
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        if self._broker.username:
            client.username_pw_set(self._broker.username, self._broker.password or None)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        client.ended = self._loop_ended
        client.unreadable = self._unreadable
        client.on_socket_open = self._socket_open
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_publish = self._published
        client.on_message = lambda client, userdata, message: self._received(message)
        return client

    # ------------------------------------------------------------ paho's thread

    def _socket_open(self, client: mqtt.Client, userdata: Any, sock: Any) -> None:
        self._tried()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # without it QoS 1 takes 40 ms and more

    def _connected(self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._report("refused", f"broker refuses this node ({reason}): check its user, password and certificate")
            client.disconnect()
            return
        self._reported.clear()
        self._taken = True
        log.info("connected to the broker at %s:%d", self._broker.host, self._broker.port)
        self._up()

    def _disconnected(self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if self._renewing:
            log.info("connecting to the broker again, with the new certificate")
        elif not self._stop.is_set() and self._taken:
            self._report("lost", f"connection to the broker lost ({reason}): trying again")
        elif not self._stop.is_set() and "refused" not in self._reported:
            # As when TLS refuses our certificate: the handshake is done on our side before the broker's alert comes.
            self._report(
                "closed", f"broker closes the connection before it answers ({reason}): check cert, key and the port"
            )

    def _published(self, client: mqtt.Client, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        if reason.value == NO_SUBSCRIBERS:
            self.unheard.add(mid)
        else:
            self.unheard.discard(mid)  # ids are used again

    def _loop_ended(self, failure: Exception | None) -> None:
        if failure is not None:
            self._report("internal", f"control plane: {failure!r}: connecting again; report this")
        self._ended.set()

    def _unreadable(self, error: Exception) -> None:
        self._report("packet", f"a message that MQTT does not allow is dropped ({error})")

    def _report(self, kind: str, text: str) -> None:
        """One line for the first of a kind since the last good connection; every one is counted."""
        self._count(kind)
        if kind not in self._reported:
            self._reported.add(kind)
            log.warning("%s", text)
