"""A plain ZMTP 3.0 DEALER that talks to a libzmq ROUTER from the caller's own thread (RFC 23, NULL mechanism).

libzmq hands every message to an I/O thread and back; with several agents on a small machine those two extra wake-ups cost
more than the arithmetic (measured: four agents on two cores, ratio to one process 0.55-0.64 with libzmq, 0.63-0.75 with
this). Only for links without encryption: with CURVE the agent uses libzmq. A link that fails raises, and the caller makes it
anew. Leaves out: other socket types and mechanisms, multipart messages (each part is a message), listening.
"""

from __future__ import annotations

import select
import socket
import time

CHUNK_BYTES = 256 * 1024
STALL_S = 10.0  # a message that has begun must be whole by then
SEND_S = 10.0
_MORE, _LONG, _COMMAND = 1, 2, 4
_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_MECHANISM = b"NULL".ljust(20, b"\0")


class ZmtpError(ConnectionError):
    """The other side closed, stalled, or speaks something else."""


class HandshakeError(ZmtpError):
    """Somebody answers, but not a plain ZeroMQ ground station: waiting will not mend that."""


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


class ZmtpDealer:
    """One connection; use as a context manager and from one thread."""

    def __init__(self, host: str, port: int, routing_id: bytes, max_bytes: int, connect_timeout_s: float):
        """Connects and shakes hands.  Raises: OSError (ZmtpError among them)."""
        self._max_bytes = max_bytes
        self._broken = False
        self._in = bytearray()
        self._socket = socket.create_connection((host, port), connect_timeout_s)
        try:
            self._prepare()
            self._shake_hands(routing_id)
        except BaseException:
            self._socket.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

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

    def _shake_hands(self, routing_id: bytes) -> None:
        self._socket.sendall(_SIGNATURE + b"\x03\x00" + _MECHANISM + bytes(32))
        try:
            greeting = self._exactly(64)
        except ZmtpError as error:  # libzmq closes without a word when it wants another mechanism
            raise HandshakeError(f"{error} in the handshake: if it wants encryption, give server_public_key") from None
        if greeting[0] != 0xFF or greeting[9] != 0x7F or greeting[10] < 3:
            raise HandshakeError("what answers is no ZeroMQ of version 4 or newer")
        if bytes(greeting[12:32]) != _MECHANISM:
            raise HandshakeError("the ground station wants encryption: give server_public_key")
        ready = b"\x05READY" + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", routing_id)
        self._socket.sendall(bytes((_COMMAND, len(ready))) + ready)
        flags, body = self._frame(STALL_S)
        if not flags & _COMMAND or not body.startswith(b"\x05READY"):
            raise HandshakeError("the ground station refused the handshake")

    def _fill(self, timeout_s: float) -> bool:
        """Takes in what comes within `timeout_s`; False when nothing did.  Raises: OSError."""
        self._socket.settimeout(timeout_s)
        try:
            chunk = self._socket.recv(CHUNK_BYTES)
        except (TimeoutError, BlockingIOError):
            return False
        if not chunk:
            raise ZmtpError("the ground station closed the connection")
        self._in += chunk
        return True

    def _exactly(self, n: int) -> bytes:
        end_s = time.monotonic() + STALL_S
        while len(self._in) < n:
            if not self._fill(max(0.001, end_s - time.monotonic())) and time.monotonic() >= end_s:
                raise ZmtpError("the ground station stalled")
        data = bytes(self._in[:n])
        del self._in[:n]
        return data

    def _whole(self) -> tuple[int, int] | None:
        """(start, end) of the first frame's body if it is in the buffer.  Raises: ZmtpError for one that is too long."""
        if len(self._in) < 2:
            return None
        start, size = 2, self._in[1]
        if self._in[0] & _LONG:
            if len(self._in) < 9:
                return None
            start, size = 9, int.from_bytes(self._in[1:9], "big")
        if size > self._max_bytes:
            raise ZmtpError(f"a message of {size} bytes is over the limit of {self._max_bytes}")
        return (start, start + size) if len(self._in) >= start + size else None

    def _frame(self, wait_s: float) -> tuple[int, bytes] | None:
        """(flags, body) of the next frame, or None when none has begun within `wait_s`."""
        stalled_s = 0.0
        while (place := self._whole()) is None:
            begun = bool(self._in)
            if begun and not stalled_s:
                stalled_s = time.monotonic() + STALL_S
            if begun and time.monotonic() >= stalled_s:
                raise ZmtpError("a message of the ground station stalled")
            if not self._fill(STALL_S if begun else wait_s) and not begun:
                return None
        flags, body = self._in[0], bytes(self._in[place[0] : place[1]])
        del self._in[: place[1]]
        return flags, body

    def receive(self, wait_s: float) -> bytes | None:
        """The next message part, or None when none has begun within `wait_s` seconds.  Raises: OSError."""
        if self._broken:
            raise ZmtpError("sending failed")
        got = self._frame(wait_s)
        if got is None or got[0] & _COMMAND:  # a 3.0 peer has no command for us after READY
            return None
        return got[1]

    def more(self) -> bool:
        """Whether another message is there already.  Raises: OSError."""
        if self._whole() is None and self._poll.poll(0):
            self._fill(0.001)
        return self._whole() is not None

    def send(self, data: bytes) -> bool:
        """Sends one message; False when the link failed, which the next `receive` raises."""
        n = len(data)
        header = bytes((0, n)) if n < 256 else bytes((_LONG,)) + n.to_bytes(8, "big")
        self._socket.settimeout(SEND_S)
        try:
            self._socket.sendall(header + data)
        except OSError:  # part of it may be on its way: this connection is of no use any more
            self._broken = True
        return not self._broken

    def alive(self, now_s: float) -> bool:
        return not self._broken
