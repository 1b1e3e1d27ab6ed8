"""A plain ZMTP 3.0 link (RFC 23, NULL mechanism): how messages are cut, and the node's end of it, a DEALER.

Talks to any ZeroMQ, from the caller's own thread. libzmq hands every message to an I/O thread and back; with several agents
on a small machine those two extra wake-ups cost more than the arithmetic (LOG.md has the figures). Only for links without
encryption: with CURVE both ends use libzmq. A link that fails raises, and the caller makes it anew.
Leaves out: the listening end (the ground station's), other mechanisms, multipart messages (each part is a message).
"""

from __future__ import annotations

import select
import socket
import time

CURVE_BYTES = (
    64  # room in a limit: CurveZMQ (RFC 26) adds 33 bytes to a message, and libzmq measures what is on the wire
)
CHUNK_BYTES = 256 * 1024
STALL_S = 10.0  # a message that has begun must be whole by then
SEND_S = 10.0
MORE, LONG, COMMAND = 1, 2, 4  # flags of a frame
GREETING_BYTES = 64
_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_MECHANISM = b"NULL".ljust(20, b"\0")
GREETING = _SIGNATURE + b"\x03\x00" + _MECHANISM + bytes(32)
_READY = b"\x05READY"


class ZmtpError(ConnectionError):
    """The other side closed, stalled, or speaks something else."""


class HandshakeError(ZmtpError):
    """Somebody answers, but not a plain ZeroMQ of our kind: waiting will not mend that."""


class OversizedError(ZmtpError):
    """A message is longer than this link takes: it is not read, and the connection is of no use any more."""


def check_greeting(greeting: bytes) -> None:
    """Raises: HandshakeError unless these 64 bytes are a greeting of ZMTP 3 without encryption."""
    if greeting[0] != 0xFF or greeting[9] != 0x7F or greeting[10] < 3:
        raise HandshakeError("what answers is no ZeroMQ of version 4 or newer")
    if bytes(greeting[12:32]) != _MECHANISM:
        raise HandshakeError("the other side wants encryption: give server_public_key")


def ready(socket_type: bytes, routing_id: bytes | None = None) -> bytes:
    """The READY command, with its frame's header."""
    body = _READY
    for name, value in ((b"Socket-Type", socket_type), (b"Identity", routing_id)):
        if value is not None:
            body += bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value
    return command(body)


def read_ready(flags: int, body: bytes) -> dict[bytes, bytes]:
    """The properties of a READY command, names in lower case.  Raises: HandshakeError for anything else."""
    if not flags & COMMAND or not body.startswith(_READY):
        raise HandshakeError("the other side refused the handshake")
    properties, at = {}, len(_READY)
    while at < len(body):
        name_end = at + 1 + body[at]
        start = name_end + 4
        end = start + int.from_bytes(body[name_end:start], "big")
        if end > len(body):
            raise HandshakeError("a READY command is cut short")
        properties[body[at + 1 : name_end].lower()] = body[start:end]
        at = end
    return properties


def command(body: bytes) -> bytes:
    """A command of at most 255 bytes as a frame."""
    return bytes((COMMAND, len(body))) + body


def message(data: bytes) -> bytes:
    """A message of one part as a frame."""
    n = len(data)
    return (bytes((0, n)) if n < 256 else bytes((LONG,)) + n.to_bytes(8, "big")) + data


class FrameBuffer:
    """Bytes as they come in, frames as they go out. `data` is what has not been taken yet."""

    def __init__(self, max_bytes: int):
        self.data = bytearray()
        self._max_bytes = max_bytes

    def whole(self) -> tuple[int, int] | None:
        """(start, end) of the first frame's body if all of it is here.  Raises: OversizedError."""
        data = self.data
        if len(data) < 2:
            return None
        start, size = 2, data[1]
        if data[0] & LONG:
            if len(data) < 9:
                return None
            start, size = 9, int.from_bytes(data[1:9], "big")
        if size > self._max_bytes:
            raise OversizedError(f"a message of {size} bytes is over the limit of {self._max_bytes}")
        return (start, start + size) if len(data) >= start + size else None

    def take(self) -> tuple[int, bytes] | None:
        """(flags, body) of the first frame, which leaves the buffer; None while it is not whole.  Raises: ZmtpError."""
        place = self.whole()
        if place is None:
            return None
        flags, body = self.data[0], bytes(self.data[place[0] : place[1]])
        del self.data[: place[1]]
        return flags, body


class ZmtpDealer:
    """One connection; use as a context manager and from one thread."""

    def __init__(self, host: str, port: int, routing_id: bytes, max_bytes: int, connect_timeout_s: float):
        """Connects and shakes hands.  Raises: OSError (ZmtpError among them)."""
        self._broken = False
        self._in = FrameBuffer(max_bytes)
        self._socket = socket.create_connection((host, port), connect_timeout_s)
        try:
            self._prepare()
            self._readable, self._writable = select.poll(), select.poll()
            self._readable.register(self._socket, select.POLLIN)
            self._writable.register(self._socket, select.POLLOUT)
            self._shake_hands(routing_id)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> ZmtpDealer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _prepare(self) -> None:
        for level, option, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        ):
            self._socket.setsockopt(level, option, value)
        self._socket.setblocking(False)  # a time limit of the socket's own would cost a system call each time

    def _shake_hands(self, routing_id: bytes) -> None:
        self._send_all(GREETING)
        try:
            greeting = self._exactly(GREETING_BYTES)
        except ZmtpError as error:  # libzmq closes without a word when it wants another mechanism
            raise HandshakeError(f"{error} in the handshake: if it wants encryption, give server_public_key") from None
        check_greeting(greeting)
        self._send_all(ready(b"DEALER", routing_id))
        got = self._frame(STALL_S)
        if got is None:
            raise ZmtpError("the ground station stalled")
        read_ready(*got)

    def _send_all(self, data: bytes) -> None:
        """Sends all of it, waiting as long as some goes out every SEND_S.  Raises: OSError."""
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                if not self._writable.poll(SEND_S * 1000):
                    raise ZmtpError("the ground station takes nothing in") from None

    def _fill(self, timeout_s: float) -> bool:
        """Takes in what comes within `timeout_s`; False when nothing did.  Raises: OSError."""
        if not self._readable.poll(timeout_s * 1000):
            return False
        try:
            chunk = self._socket.recv(CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            raise ZmtpError("the ground station closed the connection")
        self._in.data += chunk
        return True

    def _exactly(self, n: int) -> bytes:
        end_s = time.monotonic() + STALL_S
        while len(self._in.data) < n:
            if not self._fill(max(0.001, end_s - time.monotonic())) and time.monotonic() >= end_s:
                raise ZmtpError("the ground station stalled")
        data = bytes(self._in.data[:n])
        del self._in.data[:n]
        return data

    def _frame(self, wait_s: float) -> tuple[int, bytes] | None:
        """(flags, body) of the next frame, or None when none has begun within `wait_s`."""
        stalled_s = 0.0
        while (got := self._in.take()) is None:
            begun = bool(self._in.data)
            if begun and not stalled_s:
                stalled_s = time.monotonic() + STALL_S
            if begun and time.monotonic() >= stalled_s:
                raise ZmtpError("a message of the ground station stalled")
            if not self._fill(STALL_S if begun else wait_s) and not begun:
                return None
        return got

    def receive(self, wait_s: float) -> bytes | None:
        """The next message part, or None when none has begun within `wait_s` seconds.  Raises: OSError."""
        if self._broken:
            raise ZmtpError("sending failed")
        got = self._frame(wait_s)
        if got is None or got[0] & COMMAND:  # a 3.0 peer has no command for us after READY
            return None
        return got[1]

    def more(self) -> bool:
        """Whether another message is there already.  Raises: OSError."""
        if self._in.whole() is None:
            self._fill(0)
        return self._in.whole() is not None

    def send(self, data: bytes) -> bool:
        """Sends one message; False when the link failed, which the next `receive` raises."""
        try:
            self._send_all(message(data))
        except OSError:  # part of it may be on its way: this connection is of no use any more
            self._broken = True
        return not self._broken

    def alive(self, now_s: float) -> bool:
        return not self._broken
