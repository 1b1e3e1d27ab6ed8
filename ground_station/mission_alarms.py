"""The fleet's alarms inside mission control: what changes goes to the archive and to whoever watches; limits follow their file.

Leaves out the rules (limits.py, alarms.py) and the book-keeping of a fleet (alarms_fleet.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ground_station.alarms_fleet import FleetAlarms, Sight
from ground_station.alarms_latch import AlarmError, Change, Changes
from ground_station.archive_records import AlarmRecord
from ground_station.fleet import Instant, NodeState, Taken
from ground_station.limits import LimitsError
from ground_station.limits_file import LimitsWatch
from node_agent.wire import Event, Satellite, Telemetry

log = logging.getLogger("spacemoe.mission")

ACTIONS = ("ack", "shelve", "unshelve", "clear")
SHELF_S = 1800.0
RESTORED_RECORDS = 100_000
RESTORED_S = 30 * 86_400.0


class AlarmRefused(ValueError):
    """That is not done with this alarm; `status` as HTTP has it, `fix` says what to do."""

    def __init__(self, status: int, text: str, fix: str):
        super().__init__(text)
        self.status, self.fix = status, fix


class MissionAlarms:
    """Thread safe. `changed` gets each change; `say` gets (severity, text) of what is wrong with the file of limits, once."""

    def __init__(
        self,
        watch: LimitsWatch,
        changed: Callable[[Change], None],
        say: Callable[[str, str], None],
        reader: Any = None,
        at: Instant | None = None,
    ) -> None:
        self.watch, self._changed, self._say = watch, changed, say
        self.fleet = FleetAlarms(watch.limits)
        if reader is not None and at is not None:
            records: list[AlarmRecord] = reader.alarms(at.utc_s - RESTORED_S, None, RESTORED_RECORDS)
            self.fleet.restore(records, at)

    def _tell(self, changes: Changes) -> None:
        for change in changes:
            self._changed(change)

    # ------------------------------------------------------------ what is heard

    def telemetry(self, node: str, board: str, taken: Taken) -> dict[str, str]:
        """The letters of limits.LETTERS by signal, of those that have limits."""
        letters, changes = self.fleet.telemetry(node, board, taken.telemetry.samples, taken.received)
        self._tell(changes)
        return letters

    def satellite(self, state: Satellite, at: Instant) -> None:
        self._tell(self.fleet.satellite(state, at)[1])

    def event(self, event: Event, at: Instant) -> None:
        self._tell(self.fleet.event(event, at))

    def tick(self, states: Mapping[str, NodeState], now: Instant) -> None:
        """Once a second: silence, shelves, and whether the file of limits is another one."""
        limits, wrong = self.watch.look()
        if limits is not None:
            self._tell(self.fleet.use(limits, now))
            self._say("info", f"limits are read again from {self.watch.path.name}: set {limits.active}")
        if wrong is not None:
            self._say("warning", wrong)
        sights = {
            name: Sight(state.online, state.age_s(now))
            for name, state in states.items()
            if state.birth is not None or state.status is not None
        }
        self._tell(self.fleet.tick(sights, now))

    def levels(self, node: str, board: str, telemetry: Telemetry) -> dict[str, str]:
        """Letters of a message of another time, by the limits of now."""
        return self.fleet.letters(node, board, telemetry.samples)

    # ------------------------------------------------------------ what stands, and what people do

    def standing(self) -> list[dict[str, Any]]:
        return self.fleet.standing()

    def bands(self) -> dict[str, Any]:
        """{"set", "sets", "signals": {signal: {"yellow_high": 80.0, ...}}, "nodes": {node: the same where it differs}}."""
        return self.fleet.bands()

    def switch(self, name: str, at: Instant) -> None:
        """Puts another set of limits in force.  Raises: AlarmRefused."""
        try:
            limits = self.watch.switch(name)
        except LimitsError as error:
            raise AlarmRefused(400, str(error), "GET /api/v1/limits names the sets") from None
        self._tell(self.fleet.use(limits, at))

    def act(
        self, alarm: str, action: str, who: str, comment: str, for_s: float | None, force: bool, at: Instant
    ) -> dict[str, Any]:
        """The alarm as it is then.  Raises: AlarmRefused."""
        if action not in ACTIONS:
            raise AlarmRefused(404, f"{action[:40]!r} cannot be done with an alarm", f"use {', '.join(ACTIONS)}")
        if self.fleet.alarm(alarm) is None:
            raise AlarmRefused(404, f"there is no alarm {alarm[:40]!r}", "GET /api/v1/alarms names those that stand")
        try:
            if action == "ack":
                changes = self.fleet.acknowledge(alarm, who, comment, at)
            elif action == "shelve":
                changes = self.fleet.shelve(alarm, who, comment, SHELF_S if for_s is None else float(for_s), at)
            elif action == "unshelve":
                changes = self.fleet.unshelve(alarm, who, comment, at)
            else:
                changes = self.fleet.clear(alarm, who, comment, at, force)
        except AlarmError as error:
            raise AlarmRefused(409, str(error), error.fix) from None
        self._tell(changes)
        if not changes:
            raise AlarmRefused(409, "nothing has changed", "GET /api/v1/alarms says how it stands")
        return changes[-1].alarm.as_dict()
