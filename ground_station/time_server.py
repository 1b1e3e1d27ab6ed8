"""Time for boards without a clock: answers SNTP requests (RFC 5905, client mode) with this machine's own time, on a socket of its own.

Boards have no battery-backed clock and may reach nothing but the ground station, so it says what time it is. Stratum 10 marks a clock
that follows no better one here; an operator who runs chrony or ntpd has that instead, on the same port. An answer is as long as
its question and every question is answered by at most one, so nobody can use it to flood others.
Leaves out: being set by other servers, authentication (a board's TLS refuses certificates by dates of days, not of milliseconds).
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time

log = logging.getLogger("spacemoe.time")

PORT = 123
PACKET_BYTES = 48
_UNIX_TO_NTP_S = 2_208_988_800  # from 1900 to 1970, RFC 5905 figure 4
_CLIENT, _SERVER = 3, 4
_STRATUM = 10
_PRECISION = -20  # log2 of seconds: a microsecond
_DISPERSION = (
    1 << 12
)  # 1/16 s in 16.16 fixed point: what a machine without a better clock may be off, said and not measured
_PACKET = struct.Struct(">BBbb II 4s QQQQ")


class TimeServerError(OSError):
    """The port is not to be had; the text names the next step."""


def ntp_time(utc_s: float) -> int:
    """64-bit NTP timestamp: seconds since 1900 modulo 2^32, and their 2^-32 parts."""
    return (int(utc_s + _UNIX_TO_NTP_S) & 0xFFFFFFFF) << 32 | int(utc_s % 1.0 * 2**32)


def answer(question: bytes, received_utc_s: float, sent_utc_s: float) -> bytes | None:
    """The server's packet for a client's; None for what is no client's question."""
    if len(question) < PACKET_BYTES or question[0] & 7 != _CLIENT or not 1 <= (version := question[0] >> 3 & 7) <= 4:
        return None
    # leap indicator 0: no warning
    head = version << 3 | _SERVER
    origin = int.from_bytes(question[40:48], "big")  # the client's transmit time, given back
    return _PACKET.pack(
        head,
        _STRATUM,
        question[2] - 256 if question[2] > 127 else question[2],
        _PRECISION,
        0,
        _DISPERSION,
        b"LOCL",
        ntp_time(received_utc_s),
        origin,
        ntp_time(received_utc_s),
        ntp_time(sent_utc_s),
    )


class TimeServer:
    """A thread that answers on `host`:`port`. Use as a context manager.  Raises: TimeServerError."""

    def __init__(self, host: str, port: int = PORT):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            text = f"no time for boards: UDP port {port} cannot be had ({error.strerror})"
            raise TimeServerError(
                error.errno, f"{text}: run chrony or ntpd here, or allow the port to this program"
            ) from None
        self._socket.settimeout(0.5)
        self.port: int = self._socket.getsockname()[1]
        self.answered = self.ignored = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="time", daemon=True)

    def __enter__(self) -> TimeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(2.0)
        self._socket.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                question, peer = self._socket.recvfrom(512)
            except TimeoutError:
                continue
            except OSError as error:  # an ICMP answer to what was sent: the client has gone
                log.debug("time: %s", error)
                continue
            received = time.time()
            packet = answer(question, received, time.time())
            if packet is None:
                self.ignored += 1
                continue
            self.answered += 1
            try:
                self._socket.sendto(packet, peer)
            except OSError as error:
                log.debug("time: %s", error)
