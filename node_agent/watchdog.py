"""Tells systemd how the agent is: READY=1, STATUS=, WATCHDOG=1 while its loops come round, STOPPING=1.

A datagram to the socket that NOTIFY_SOCKET names, as sd_notify(3) describes; without that variable nothing is sent. It is
written here because the protocol is ten lines and stable, and the package for it on PyPI is not looked after any more.
Leaves out: sockets of the kind vsock: (virtual machines), barriers, and what alive means (agent.py).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping
from typing import Callable

from node_agent.errors import ConfigError

log = logging.getLogger("node_agent.watchdog")

MAX_STATUS_CHARS = 200
IDLE_PERIOD_S = 10.0  # between STATUS where systemd wants no watchdog


class Notifier:
    """Sends states to systemd; never raises: a manager that is not there must not stop the agent."""

    def __init__(self, environment: Mapping[str, str] = os.environ):
        """Raises: ConfigError for a WATCHDOG_USEC or a socket that cannot be used."""
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address and self._address[0] not in "/@":
            raise ConfigError(
                f"NOTIFY_SOCKET is {self._address[:80]!r}: only /path and @abstract sockets are supported"
            )
        self.watchdog_s = self._watchdog_s(environment) if self._address else None
        self._told = False

    @staticmethod
    def _watchdog_s(environment: Mapping[str, str]) -> float | None:
        """Within which systemd wants to hear of us; None where it does not, or means another process."""
        text, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        if not text or (pid and pid != str(os.getpid())):
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) > 0):
            raise ConfigError(
                f"WATCHDOG_USEC is {text[:40]!r}: systemd gives microseconds; set WatchdogSec= in the unit"
            )
        return int(text) / 1e6

    @property
    def wanted(self) -> bool:
        return bool(self._address)

    def send(self, *states: str) -> bool:
        """Sends states such as 'READY=1' in one datagram; False where nobody takes it."""
        if not self._address:
            return False
        # A leading @ stands for the zero byte of the abstract namespace (unix(7)).
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(1.0)
                sender.sendto("\n".join(states).encode(), address)
            return True
        except (OSError, ValueError) as error:
            if not self._told:
                log.warning("systemd cannot be told at %s: %s", self._address, error)
            self._told = True
            return False


class Watchdog:
    """A thread that reports at half of what systemd allows. Use as a context manager around the time of service.

    `hung()` says what does not come round any more, or an empty text: then alone WATCHDOG=1 is sent. `status()`: a line.
    `on_hang(text)` is called when a hang begins.
    """

    def __init__(
        self,
        notifier: Notifier,
        hung: Callable[[], str],
        status: Callable[[], str],
        on_hang: Callable[[str], None],
    ):
        self._notifier, self._hung, self._status, self._on_hang = notifier, hung, status, on_hang
        watchdog_s = notifier.watchdog_s
        self._period_s = IDLE_PERIOD_S if watchdog_s is None else watchdog_s / 2
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._said = ""

    def __enter__(self) -> Watchdog:
        self._notifier.send("READY=1", self._status_line())
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._notifier.send("STOPPING=1")
        self._thread.join(5.0)

    def _status_line(self) -> str:
        return "STATUS=" + " ".join(self._status().split())[:MAX_STATUS_CHARS]

    def _run(self) -> None:
        while not self._stop.is_set():
            self.report()
            self._stop.wait(self._period_s)

    def report(self) -> None:
        """One report: WATCHDOG=1 with the status, or what hangs."""
        hung = self._hung()
        if hung and hung != self._said:
            log.error("%s: systemd is told no more that all is well", hung)
            self._on_hang(hung)
        self._said = hung
        if hung:
            self._notifier.send("STATUS=" + hung[:MAX_STATUS_CHARS])
        elif self._notifier.watchdog_s is None:
            self._notifier.send(self._status_line())
        else:
            self._notifier.send("WATCHDOG=1", self._status_line())
