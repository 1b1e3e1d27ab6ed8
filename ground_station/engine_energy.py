"""Joules of requests that run together: what the boards took between two readings, divided by the rows that each request had.

The part of that time in which nothing ran is nobody's. What is not known stays unknown, with the reason. Leaves out how boards are
read (engine_meter.py) and when (engine.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ground_station.engine_request import Energy

SCOPE = "meters of all boards of the fleet, as far as requests ran; not the ground station, which runs the trunk"
METHOD = (
    "joules of the boards between two readings of their counters, less the share of that time in which no request ran, divided among "
    "the requests by the rows (tokens) that each had in the steps that ended in it; idle power of the boards during steps is included"
)
NO_METER = Energy(None, reason="this ground station reads no meters for it")


@dataclass(frozen=True)
class Metered:
    """Joules of all boards since the reading before; None where they are not known, with the reason."""

    joules: float | None
    provenance: str = ""
    reason: str = ""


Meter = Callable[[], Metered]
"""Reads all boards now; may wait for their answers. Called by one thread, never by two at a time."""


class Shares:
    """Who has had what so far. Not thread safe."""

    def __init__(self, now_s: float):
        self._since_s = now_s
        self._rows: Counter[str] = Counter()
        self._busy_s = 0.0
        self._first = True
        self._joules: dict[str, float] = {}
        self._unknown: dict[str, str] = {}
        self._provenance: dict[str, set[str]] = {}

    def ran(self, rows: Mapping[str, int], busy_s: float) -> None:
        """A step of `busy_s` seconds has ended, with some rows of each request."""
        self._rows.update(rows)
        self._busy_s += busy_s

    def reading(self, metered: Metered, at_s: float) -> None:
        """What the boards took since the reading before is divided. The first one only begins the count."""
        length_s, rows, busy_s = at_s - self._since_s, self._rows, self._busy_s
        self._since_s, self._rows, self._busy_s = at_s, Counter(), 0.0
        first, self._first = self._first, False
        reason = "it ran before the boards were first read" if first else metered.reason or "the meters gave no joules"
        known = metered.joules is not None and not first
        whole = sum(rows.values())
        for request, count in rows.items():
            if known:
                share = min(1.0, busy_s / length_s) if length_s > 0 else 1.0
                part_j = metered.joules * share * count / whole
                self._joules[request] = self._joules.get(request, 0.0) + part_j
                self._provenance.setdefault(request, set()).add(metered.provenance)
            else:
                self._unknown.setdefault(request, reason)

    def leave(self, request: str) -> Energy:
        """What a request has had, which is forgotten; rows that no reading has followed yet make it unknown."""
        open_rows = self._rows.pop(request, 0)
        joules = self._joules.pop(request, None)
        kinds = self._provenance.pop(request, set())
        reason = self._unknown.pop(request, "")
        if open_rows:
            reason = reason or "no reading came after its last step"
        if reason or joules is None:
            return Energy(None, reason=reason or "none of its steps was metered")
        return Energy(joules, kinds.pop() if len(kinds) == 1 else "mixed")
