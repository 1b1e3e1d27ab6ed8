"""Joules of a fleet's boards from one reading to the next, by the ledger's method, for the token engine.

Leaves out who gets them (engine_energy.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from ground_station import ledger
from ground_station.control import Control
from ground_station.engine_energy import Metered

MOST_REASONS = 3


class FleetMeter:
    """Call it to read all boards: each is asked for a sample."""

    def __init__(self, control: Control, nodes: Iterable[str]):
        self._control, self._nodes = control, tuple(nodes)
        self._before: dict[str, ledger.Counters | ledger.Unknown] | None = None

    def __call__(self) -> Metered:
        after = ledger.take(self._control, self._nodes)
        before, self._before = self._before, after
        if before is None:
            return Metered(None, reason="it is the first reading")
        found = ledger.of(self._nodes, before, after)
        if found.total is None:
            missing = {n: e.reason for n, e in found.nodes.items() if isinstance(e, ledger.Unknown)}
            words = "; ".join(f"{node}: {reason}" for node, reason in list(missing.items())[:MOST_REASONS])
            more = f" and {len(missing) - MOST_REASONS} more" if len(missing) > MOST_REASONS else ""
            return Metered(None, reason=words + more or "there are no boards")
        return Metered(found.total.total, found.provenance or "")
