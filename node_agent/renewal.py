"""Rotation of the node's certificate: long before it ends the agent gets a new key and certificate, and connects with them.

`Plan` decides, a thread does it. What fails is tried again, ever more slowly; each failure is an event, a critical
one when little time is left. A certificate that another process has put in place is taken up too.
Leaves out: the exchange (enrol.py), the connection (connection.py), a certificate that has ended: that takes a new claim.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Callable

from node_agent import enrol
from node_agent.errors import AgentError
from node_agent.wire import Sample

log = logging.getLogger("node_agent")

CRITICAL_S = 7 * 86_400.0
LOOK_S = 60.0
"""How often the clock and the file are looked at: a board's clock may jump by years once there is NTP."""


@dataclass(frozen=True)
class Plan:
    """When a certificate of this life is renewed, and how failures are spaced. All in seconds; `due_s`, `end_s` UTC."""

    due_s: float
    end_s: float
    first_retry_s: float
    last_retry_s: float
    critical_s: float

    def retry_s(self, failures: int) -> float:
        """Pause after so many failures in a row."""
        return min(self.last_retry_s, self.first_retry_s * 2 ** min(failures - 1, 32))

    def severity(self, now_s: float) -> str:
        return "critical" if self.end_s - now_s < self.critical_s else "warning"


def plan(not_before_s: float, not_after_s: float, share: float) -> Plan:
    """For certificates of months: a minute to an hour between tries, critical in the last week; in proportion for short ones."""
    life_s = not_after_s - not_before_s
    first_s = min(60.0, life_s / 1000)
    rest_s = (1 - share) * life_s
    return Plan(
        not_before_s + share * life_s, not_after_s, first_s, min(3600.0, 60 * first_s), min(CRITICAL_S, rest_s / 3)
    )


class Renewal:
    """The thread. Use as a context manager. `reload()` takes the new certificate into use; `event(severity, kind, text)`."""

    def __init__(
        self, who: enrol.Identity, share: float, reload: Callable[[], None], event: Callable[[str, str, str], None]
    ):
        self._who, self._share, self._reload, self._event = who, share, reload, event
        self._held: enrol.Certificate | None = None
        self._stamp = self._look()
        self._rest_until_s = 0.0  # monotonic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def __enter__(self) -> Renewal:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(0.2)  # a daemon: an exchange in its middle does not keep the agent from its end

    def samples(self, now_s: float) -> tuple[Sample, ...]:
        """`certificate_left_s`, once the certificate has been read."""
        held = self._held
        if held is None:
            return ()
        return (Sample("certificate_left_s", held.not_after_utc_s - now_s, "s", "ok", "derived", "agent", now_s),)

    def _look(self) -> int:
        try:
            return self._who.cert.stat().st_mtime_ns
        except OSError:
            return 0

    def _run(self) -> None:
        failures = 0
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            try:
                wait_s = self._round()
                failures = 0
            except Exception as error:  # whatever it is, the agent serves on, and the next try may do better
                failures += 1
                wait_s = self._failed(error, failures)

    def _round(self) -> float:
        """Seconds until there is something to do again."""
        stamp = self._look()
        if stamp != self._stamp:
            self._held = None
            self._reload()
            self._stamp = stamp
        if self._held is None:
            self._held = enrol.current(self._who)
        held = self._held
        due_s = plan(held.not_before_utc_s, held.not_after_utc_s, self._share).due_s
        left_s = max(due_s - time.time(), self._rest_until_s - time.monotonic())
        if left_s > 0:
            return min(left_s, LOOK_S)
        made = enrol.renew(self._who)
        self._held = made
        stamp = self._look()
        self._reload()
        self._stamp = stamp
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(made.not_after_utc_s))
        log.info("certificate renewed: %s, valid until %s", made.serial, until)
        self._event("info", "renewal", f"certificate {made.serial}, valid until {until}")
        # one that is due at once, as at the end of the authority's own life, is not asked for again and again
        self._rest_until_s = (
            time.monotonic() + plan(made.not_before_utc_s, made.not_after_utc_s, self._share).last_retry_s
        )
        return 0.0

    def _failed(self, error: Exception, failures: int) -> float:
        """Says so; seconds until the next try."""
        text = str(error) if isinstance(error, (AgentError, OSError)) else f"{error!r}: report this"
        now_s, held = time.time(), self._held
        if held is None:
            severity, pause_s = "critical", min(3600.0, LOOK_S * 2 ** min(failures - 1, 32))
        else:
            times = plan(held.not_before_utc_s, held.not_after_utc_s, self._share)
            severity, pause_s = times.severity(now_s), times.retry_s(failures)
            if now_s >= held.not_after_utc_s:
                text += "; the certificate has ended: add this node again, and put its new pack on the card"
        text = f"the certificate could not be {'renewed' if held else 'read'}: {text}"[:900]
        if failures == 1:
            log.warning("%s", text)
        self._event(severity, "renewal", text)
        return pause_s
