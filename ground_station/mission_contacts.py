"""When each satellite was in sunlight and when it reached the hub, as intervals, from its states as they are published.

In memory and bounded. What a scenario plans for later is given by whoever runs it (`planned`). Times are this machine's UTC;
`mission_at` and `scale` say what they are in the mission. Leaves out the orbit (firmware_sim) and the twin (twin.py).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from node_agent.wire import Satellite

MAX_INTERVALS = 500  # of one kind and node
MAX_SATELLITES = 1000
GAP_S = 5.0  # a state that is older says nothing of now


@dataclass
class _Track:
    """One satellite: [from_utc_s, until_utc_s] of contact and of shadow, the last ones growing."""

    latest: Satellite | None = None
    heard_utc_s: float | None = None
    contact: list[list[float]] = field(default_factory=list)
    eclipse: list[list[float]] = field(default_factory=list)


def _extend(intervals: list[list[float]], holds: bool, held: bool, before_s: float | None, now_s: float) -> None:
    """`holds` now, and `held` at the last state, which came at `before_s`."""
    if not holds:
        return
    joined = held and before_s is not None and now_s - before_s <= GAP_S
    if joined and intervals:
        intervals[-1][1] = now_s
    else:
        intervals.append([now_s, now_s])
        del intervals[:-MAX_INTERVALS]


class Contacts:
    """Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tracks: dict[str, _Track] = {}

    def heard(self, state: Satellite, now_utc_s: float) -> dict[str, Any] | None:
        """The satellite's state for a watcher; None for one too many."""
        values = {sample.name: sample.value for sample in state.samples}
        with self._lock:
            if state.node not in self._tracks and len(self._tracks) >= MAX_SATELLITES:
                return None
            track = self._tracks.setdefault(state.node, _Track())
            before = track.latest
            was = {} if before is None else {sample.name: sample.value for sample in before.samples}
            before_s = track.heard_utc_s
            _extend(track.contact, values.get("link_up") == 1.0, was.get("link_up") == 1.0, before_s, now_utc_s)
            dark, was_dark = values.get("lit_share"), was.get("lit_share")
            _extend(
                track.eclipse,
                dark is not None and dark < 0.5,
                was_dark is not None and was_dark < 0.5,
                before_s,
                now_utc_s,
            )
            track.latest, track.heard_utc_s = state, now_utc_s
        return satellite(state)

    def snapshot(self, since_utc_s: float, until_utc_s: float) -> dict[str, Any]:
        with self._lock:
            return {
                "satellites": [
                    {
                        **satellite(track.latest),
                        "contact": _within(track.contact, since_utc_s, until_utc_s),
                        "eclipse": _within(track.eclipse, since_utc_s, until_utc_s),
                    }
                    for _, track in sorted(self._tracks.items())
                    if track.latest is not None
                ]
            }


def _within(intervals: list[list[float]], since_s: float, until_s: float) -> list[list[float]]:
    return [
        [round(max(begin, since_s), 3), round(min(end, until_s), 3)]
        for begin, end in intervals
        if end >= since_s and begin <= until_s
    ]


def satellite(state: Satellite) -> dict[str, Any]:
    return {
        "node": state.node,
        "at_utc_s": state.generated_at,
        "mission_at_utc_s": state.mission_at,
        "scale": state.scale,
        "invalid": state.invalid[:300],
        "values": {sample.name[:60]: sample.value for sample in state.samples[:64]},
    }
