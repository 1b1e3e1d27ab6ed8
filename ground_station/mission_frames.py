"""Messages of an archive as the frames of the live stream, so that a replay is drawn by what draws the present. Pure.

Leaves out how fast they are shown, and alarms, whose changes the archive has by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ground_station import mission_fleet
from ground_station.archive_records import Kept
from ground_station.fleet import Taken
from node_agent.wire import Birth, Event, Telemetry

STEP_S = 0.25
MAX_MESSAGES = 20_000


def steps(
    messages: Iterable[Kept],
    until_utc_s: float,
    most: int = MAX_MESSAGES,
    levels: Callable[[str, str, Telemetry], dict[str, str]] | None = None,
) -> dict[str, Any]:
    """{"sets", "steps": [{"at", "rows", "births", "events"}], "until"}: at most `most` messages, all before `until`, which is
    where to go on. No node has two rows in one step, so that a replay draws every value. `levels`: letters by signal, of the limits now."""
    sets: dict[str, Any] = {}
    rows: dict[str, mission_fleet.Row] = {}
    boards: dict[str, str] = {}
    made: list[dict[str, Any]] = []
    step: dict[str, Any] | None = None
    for count, kept in enumerate(messages):
        if count >= most:  # a step may be cut in two: what comes next only adds to it
            until_utc_s = kept.at_utc_s
            break
        again = step is not None and kept.node in step["rows"] and isinstance(kept.message, Taken)
        if step is None or again or kept.at_utc_s >= step["at"] + STEP_S:
            step = {"at": round(kept.at_utc_s, 3), "rows": {}, "births": [], "events": []}
            made.append(step)
        message = kept.message
        if isinstance(message, Taken):
            if not message.late:
                known = {} if levels is None else levels(kept.node, boards.get(kept.node, ""), message.telemetry)
                row = rows[kept.node] = mission_fleet.row_of(message, known, rows.get(kept.node))
                sets[row.set_id] = row.signals
                step["rows"][kept.node] = row.wire("online")
        elif isinstance(message, Birth):
            boards[kept.node] = message.board
            step["births"].append({"node": kept.node, **mission_fleet.birth_of(message)})
        elif isinstance(message, Event):
            step["events"].append(mission_fleet.event_row(message, kept.at_utc_s, kept.source))
    for step in made:
        step["rows"] = list(step["rows"].values())
    return {"sets": sets, "steps": made, "until": until_utc_s}
