"""The node's clock against the ground station's: four stamps of an exchange, and a filter that takes the quickest of them.

A board without an RTC wakes up in the past, and its UTC clock may jump later: so what is measured is the ground station's
time against the monotonic clock, and the offset of UTC follows from both at the moment it is asked for. Source: RFC 5905,
section 8 (offset and delay from four stamps) and section 10 (of the last eight exchanges the one with the smallest bound on
its error counts). Leaves out: setting the machine's clock; messages and sockets (control.py).
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Callable

from node_agent.wire import Sample

KEPT_EXCHANGES = 8
DRIFT = 50e-6  # of a board's crystal, s per s; NTP's own bound is 15e-6
FAST_S, SLOW_S = 1.0, 16.0  # between exchanges: until the filter is filled, and then
MAX_DELAY_S = 30.0


@dataclass(frozen=True)
class Exchange:
    """Seconds: `sent` and `returned` on the node's monotonic clock, `received` and `answered` on the ground's UTC clock."""

    sent_s: float
    received_s: float
    answered_s: float
    returned_s: float

    @property
    def offset_s(self) -> float:
        """Ground's UTC minus the node's monotonic clock, true where both ways take the same time."""
        return ((self.received_s - self.sent_s) + (self.answered_s - self.returned_s)) / 2

    @property
    def delay_s(self) -> float:
        """Time on the way, both ways together; the offset is wrong by half of it at most."""
        return (self.returned_s - self.sent_s) - (self.answered_s - self.received_s)


@dataclass(frozen=True)
class Offset:
    """`offset_s` is to be added to the node's clock; it is wrong by `uncertainty_s` at most, as long as DRIFT holds."""

    offset_s: float
    uncertainty_s: float


class OffsetFilter:
    """The last exchanges, and the best of them at a moment."""

    def __init__(self) -> None:
        self._exchanges: deque[Exchange] = deque(maxlen=KEPT_EXCHANGES)

    @property
    def full(self) -> bool:
        return len(self._exchanges) == KEPT_EXCHANGES

    def add(self, exchange: Exchange) -> bool:
        """False for one that cannot be: not finite, quicker than nothing, or too slow to be of use."""
        stamps = (exchange.sent_s, exchange.received_s, exchange.answered_s, exchange.returned_s)
        usable = all(map(math.isfinite, stamps)) and exchange.answered_s >= exchange.received_s
        # The ground station's clock ticks in steps: a delay of nothing may come out a hair below it.
        if not usable or not -1e-3 <= exchange.delay_s <= MAX_DELAY_S:
            return False
        self._exchanges.append(exchange)
        return True

    def best(self, now_s: float) -> Offset | None:
        """The offset with the smallest bound on its error at monotonic time `now_s`; None before the first exchange."""
        offsets = (
            Offset(each.offset_s, max(0.0, each.delay_s) / 2 + DRIFT * max(0.0, now_s - each.returned_s))
            for each in self._exchanges
        )
        return min(offsets, key=lambda offset: offset.uncertainty_s, default=None)


class GroundClock:
    """When to ask, whom to believe, and what the time is. Any thread; one question is open at a time."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, utc: Callable[[], float] = time.time) -> None:
        self._monotonic, self._utc = monotonic, utc
        self._lock = threading.Lock()
        self._filter = OffsetFilter()
        self._asked: tuple[str, float] | None = None  # id and time of the open question
        self._due_s = -math.inf

    def ask_soon(self) -> None:
        """There is a new connection: the next question is due at once, and the one that was open gets no answer."""
        with self._lock:
            self._asked, self._due_s = None, -math.inf

    def question(self) -> tuple[str, float] | None:
        """(id, this node's UTC) of a question that is to be sent now; None while none is due."""
        with self._lock:
            now_s = self._monotonic()
            if now_s < self._due_s:
                return None
            self._due_s = now_s + (SLOW_S if self._filter.full else FAST_S)
            self._asked = (secrets.token_hex(8), now_s)
            return self._asked[0], self._utc()

    def answered(self, identity: str, received_s: float, answered_s: float) -> bool:
        """Takes the answer to the open question; False for any other, and for stamps that cannot be."""
        with self._lock:
            now_s = self._monotonic()
            if self._asked is None or self._asked[0] != identity:
                return False
            sent_s, self._asked = self._asked[1], None
            return self._filter.add(Exchange(sent_s, received_s, answered_s, now_s))

    def offset(self) -> Offset | None:
        """What is to be added to this node's UTC clock to get the ground station's; None before the first answer."""
        with self._lock:
            now_s = self._monotonic()
            best = self._filter.best(now_s)
            return None if best is None else Offset(best.offset_s + now_s - self._utc(), best.uncertainty_s)

    def utc_s(self) -> float:
        """The ground station's UTC as far as it is known, else this node's."""
        offset = self.offset()
        return self._utc() + (0.0 if offset is None else offset.offset_s)

    def samples(self, generated_at: float) -> tuple[Sample, ...]:
        """Telemetry: `clock_offset_s` (ground minus node) and `clock_uncertainty_s`, its bound."""
        offset = self.offset()
        values = (None, None) if offset is None else (offset.offset_s, offset.uncertainty_s)
        validity = "missing" if offset is None else "ok"
        names = ("clock_offset_s", "clock_uncertainty_s")
        return tuple(
            Sample(name, value, "s", validity, "derived", "agent", generated_at) for name, value in zip(names, values)
        )
