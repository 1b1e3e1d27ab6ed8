"""The listening end of plain links: a ZMTP 3.0 ROUTER without an I/O thread, for nodes on this machine.

Speaks with any ZeroMQ DEALER (RFC 23 and 28, NULL mechanism), from the caller's own thread, for the reason that
node_agent.zmtp gives. What comes is untrusted: sizes, numbers of connections and the time of a handshake are bounded, and a
connection that breaks the protocol is closed, which costs the others nothing.
Leaves out: encryption (link.py uses libzmq for that), what a message means.
"""

from __future__ import annotations

import errno
import resource
import selectors
import socket
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Iterator

from node_agent import zmtp

MAX_CONNECTIONS = 1024  # or half of the process's descriptors, if that is less
FRAMES_AT_ONCE = 16  # of one connection per `receive`: whoever floods must not keep the others waiting
PONG_QUEUE_BYTES = 64 * 1024
SILENT_S = 30.0  # boards say HELLO each second; when all places are taken, who was silent for longer gives way
NO_DESCRIPTOR_S = 1.0  # without a free descriptor, nobody is let in for so long
MAX_SHAKING = 256  # connections that have not named themselves yet
HANDSHAKE_S = 5.0
SEND_QUEUE_BYTES = 256 * 1024 * 1024  # a node that takes nothing in is told of no more than this


class Unreachable(ConnectionError):
    """No connection under that name."""


class QueueFull(BlockingIOError):
    """The node has not taken in what it was sent before."""


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    incoming: zmtp.FrameBuffer
    began_s: float
    greeted: bool = False
    identity: bytes | None = None  # None until its READY
    outgoing: bytearray = field(default_factory=bytearray)
    in_parts: bool = False  # inside a message of several parts
    heard_s: float = 0.0


class ZmtpRouter:
    """Owns the listening socket and every connection; use it from one thread."""

    def __init__(self, host: str, port: int, max_bytes: int):
        """Listens; port 0 takes any.  Raises: OSError."""
        self._max_bytes = max_bytes
        self._max_connections = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._backlog: set[_Connection] = set()  # with whole frames that have not been taken yet
        self._closed_until_s = 0.0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._named: dict[bytes, _Connection] = {}
        self._shaking: set[_Connection] = set()
        self._received: deque[tuple[bytes, bytes | None]] = deque()
        self._unnamed = 0
        self.dropped: Counter[str] = Counter()  # connections that ended by our will, by kind
        self.port: int = self._listener.getsockname()[1]

    def close(self) -> None:
        """Drops every connection, without waiting for what is still to be sent."""
        for connection in [*self._named.values(), *self._shaking]:
            self._drop(connection)
        self._selector.close()
        self._listener.close()

    def send(self, identity: bytes, data: bytes) -> None:
        """Sends one message, as far as the kernel takes it now; the rest goes out during `receive`.

        Raises: Unreachable, QueueFull.
        """
        connection = self._named.get(identity)
        if connection is None:
            raise Unreachable("not connected")
        if len(connection.outgoing) + len(data) > SEND_QUEUE_BYTES:
            raise QueueFull("its send queue is full")
        self._write(connection, zmtp.message(data))
        if self._named.get(identity) is not connection:
            raise Unreachable("the connection broke")

    def receive(self, timeout_s: float) -> Iterator[tuple[bytes, bytes | None]]:
        """(identity, message) of what has come, waiting up to `timeout_s` for the first; None for one of several parts.

        The caller may stop early: what it has not taken comes first the next time.
        """
        if not self._received:
            if self._closed_until_s and time.monotonic() > self._closed_until_s:
                self._closed_until_s = 0.0
                self._selector.register(self._listener, selectors.EVENT_READ)
            backlog, self._backlog = self._backlog, set()
            for connection in backlog:
                self._take(connection)
            for key, events in self._selector.select(0.0 if backlog else timeout_s):
                if key.data is None:
                    self._accept()
                    continue
                if events & selectors.EVENT_WRITE:
                    self._write(key.data, b"")
                if events & selectors.EVENT_READ and key.data not in backlog:
                    self._read(key.data)
            if self._shaking:
                self._end_stalled_handshakes()
        while self._received:
            yield self._received.popleft()

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                # the one who waits stays ready, and would be tried again without end
                self._selector.unregister(self._listener)
                self._closed_until_s = time.monotonic() + NO_DESCRIPTOR_S
            return
        if len(self._named) >= self._max_connections:
            silent = min(self._named.values(), key=lambda one: one.heard_s)
            if time.monotonic() - silent.heard_s > SILENT_S:
                self.dropped["silent"] += 1
                self._drop(silent)
        if len(self._shaking) >= MAX_SHAKING or len(self._named) >= self._max_connections:
            self.dropped["too many"] += 1
            accepted.close()
            return
        accepted.setblocking(False)
        for level, option, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        ):
            accepted.setsockopt(level, option, value)
        connection = _Connection(accepted, zmtp.FrameBuffer(self._max_bytes), time.monotonic())
        self._shaking.add(connection)
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        self._write(connection, zmtp.GREETING)

    def _drop(self, connection: _Connection) -> None:
        """Closes a connection, once."""
        if connection.socket.fileno() < 0:
            return
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._shaking.discard(connection)
        self._backlog.discard(connection)
        if self._named.get(connection.identity) is connection:
            del self._named[connection.identity]

    def _end_stalled_handshakes(self) -> None:
        oldest_s = time.monotonic() - HANDSHAKE_S
        for connection in [one for one in self._shaking if one.began_s < oldest_s]:
            self.dropped["stalled"] += 1
            self._drop(connection)

    def _write(self, connection: _Connection, data: bytes) -> None:
        """Sends what was left and `data`; drops the connection when it broke."""
        waiting = connection.outgoing
        if waiting:
            waiting += data
            data = waiting
        try:
            sent = connection.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(connection)
            return
        if not waiting:
            if sent == len(data):
                return
            waiting += memoryview(data)[sent:]
            self._selector.modify(connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)
            return
        del waiting[:sent]
        if not waiting:
            self._selector.modify(connection.socket, selectors.EVENT_READ, connection)

    def _read(self, connection: _Connection) -> None:
        """Takes in one chunk and every frame that it completes."""
        try:
            chunk = connection.socket.recv(zmtp.CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._drop(connection)
            return
        connection.incoming.data += chunk
        connection.heard_s = time.monotonic()
        self._take(connection)

    def _take(self, connection: _Connection) -> None:
        """Some of the frames that are whole; what is left comes with the next `receive`, before more is read."""
        incoming = connection.incoming
        try:
            if not connection.greeted:
                if not self._greeted(connection):
                    return
            for _ in range(FRAMES_AT_ONCE):
                if (got := incoming.take()) is None:
                    return
                self._frame(connection, *got)
            if incoming.whole() is not None and connection.socket.fileno() >= 0:
                self._backlog.add(connection)
        except zmtp.ZmtpError:
            self.dropped["protocol"] += 1
            self._drop(connection)

    @staticmethod
    def _greeted(connection: _Connection) -> bool:
        """Whether the greeting is whole.  Raises: zmtp.HandshakeError."""
        data = connection.incoming.data
        if data[:1] not in (b"", b"\xff"):
            raise zmtp.HandshakeError("no ZeroMQ")
        if len(data) < zmtp.GREETING_BYTES:
            return False
        zmtp.check_greeting(bytes(data[: zmtp.GREETING_BYTES]))
        del data[: zmtp.GREETING_BYTES]
        connection.greeted = True
        return True

    def _frame(self, connection: _Connection, flags: int, body: bytes) -> None:
        """One whole frame.  Raises: zmtp.ZmtpError."""
        identity = connection.identity
        if identity is None:
            self._name(connection, zmtp.read_ready(flags, body))
        elif flags & zmtp.COMMAND:
            if body.startswith(b"\x04PING"):  # ZMTP 3.1: time to live of 2 bytes, then a context to give back
                if len(connection.outgoing) > PONG_QUEUE_BYTES:
                    raise zmtp.ZmtpError("asks for answers and takes none in")
                self._write(connection, zmtp.command(b"\x04PONG" + body[7:23]))
        elif flags & zmtp.MORE:
            connection.in_parts = True
        elif connection.in_parts:
            connection.in_parts = False
            self._received.append((identity, None))
        else:
            self._received.append((identity, body))

    def _name(self, connection: _Connection, properties: dict[bytes, bytes]) -> None:
        """Takes a node in; one that comes again (a restarted board) takes the place of its old connection."""
        if properties.get(b"socket-type") not in (b"DEALER", b"REQ", b"ROUTER"):
            raise zmtp.HandshakeError("not a DEALER")
        identity = properties.get(b"identity", b"")
        if not identity:
            self._unnamed += 1
            identity = b"\0" + self._unnamed.to_bytes(4, "big")
        elif identity[0] == 0 or len(identity) > 255:
            raise zmtp.HandshakeError("that identity is not a node's to choose")
        self._write(connection, zmtp.ready(b"ROUTER"))
        if connection.socket.fileno() < 0:
            return
        old = self._named.get(identity)
        if old is not None:
            self._drop(old)
        connection.identity = identity
        self._shaking.discard(connection)
        self._named[identity] = connection
