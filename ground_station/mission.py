"""One object per ground station that joins the control plane, archive, alarms, commands and tokens, for whoever watches and operates.

Snapshots are ready for JSON; changes go out by `feed`. Whatever is heard comes in paho's thread and only writes down; a thread
of its own makes the frames, four a second. Leaves out HTTP (web_app.py), who may do what (web_access.py) and where tokens come from.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from ground_station import mission_commands, mission_fleet
from ground_station.alarms_latch import Change
from ground_station.archive_records import CommandRecord, RequestRecord, TokenRecord
from ground_station.control import COMMAND_TIMEOUT_S, Control, Heard, Source
from ground_station.fleet import NodeState, Taken
from ground_station.limits_file import LimitsWatch
from ground_station.mission_alarms import AlarmRefused, MissionAlarms
from ground_station.mission_contacts import Contacts
from ground_station.mission_feed import Feed
from ground_station.mission_tokens import Heat, LiveTokens
from node_agent import wire

log = logging.getLogger("spacemoe.mission")

FRAME_S = 0.25
SECOND_S = 1.0
EVENTS_KEPT = 300
COMMANDS_KEPT = 200
CONTACTS_S = 3600.0


class NoSuchNode(KeyError):
    """Nothing was ever heard of that node."""


class Mission:
    """Listens as soon as it is made; use as a context manager for its frames.

    Args:
        control: connected or to be connected.
        archive: archive.Archive, or None: nothing is kept.
        reader: archive_read.ArchiveReader of the same file, or None: only what is in memory can be asked for.
        limits: the file of limits, followed as it changes; None: no limits, no alarms.
        planned: contacts that a scenario plans, as (source, target, from_utc_s, until_utc_s).
    """

    def __init__(
        self,
        control: Control,
        archive: Any = None,
        reader: Any = None,
        limits: LimitsWatch | None = None,
        planned: Callable[[], Iterable[tuple[str, str, float, float]]] | None = None,
    ) -> None:
        self.control, self.archive, self.reader = control, archive, reader
        self.feed = Feed()
        self.tokens, self.heat, self.satellites = LiveTokens(), Heat(), Contacts()
        self._planned = planned
        self._lock = threading.Lock()
        self._rows: dict[str, mission_fleet.Row] = {}
        self._births: dict[str, wire.Birth] = {}
        self._changed: set[str] = set()
        self._states: dict[str, str] = {}
        self._told_sets: set[str] = set()
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self._commands: deque[CommandRecord] = deque(maxlen=COMMANDS_KEPT)
        self._heat_told: dict[int, list[int]] = {}
        self._bands_told: dict[str, Any] | None = None
        self.started_utc_s = control.now().utc_s
        self.alarms = None
        if limits is not None:
            self.alarms = MissionAlarms(limits, self._alarm, self._found, reader, control.now())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mission", daemon=True)
        control.listen(self.hear_telemetry, self.hear)
        for node, state in control.snapshot().items():  # who was there before us
            if state.birth is not None:
                self.hear(node, state.birth, "node")

    def __enter__(self) -> Mission:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    # ------------------------------------------------------------ what is heard, in paho's thread

    def hear_telemetry(self, node: str, taken: Taken) -> None:
        if self.archive is not None:
            self.archive.telemetry(node, taken)
        if taken.late:  # it tells of then, not of now
            return
        with self._lock:
            birth = self._births.get(node)
        board = "" if birth is None else birth.board
        levels = {} if self.alarms is None else self.alarms.telemetry(node, board, taken)
        with self._lock:
            self._rows[node] = mission_fleet.row_of(taken, levels, self._rows.get(node))
            self._changed.add(node)

    def hear(self, node: str, message: Heard, source: Source) -> None:
        now = self.control.now()
        at_utc_s = now.utc_s
        if isinstance(message, wire.Birth):
            with self._lock:
                known = self._births.get(node)
                self._births[node] = message
                self._changed.add(node)
            if message != known:
                if self.archive is not None:
                    self.archive.birth(node, message, at_utc_s)
                self.feed.publish("birth", {"node": node, **mission_fleet.birth_of(message)})
        elif isinstance(message, wire.Status):
            with self._lock:
                self._changed.add(node)
        elif isinstance(message, wire.Event):
            self._event(message, at_utc_s, source)
            if self.alarms is not None:
                self.alarms.event(message, now)
        elif isinstance(message, wire.Satellite):
            if (told := self.satellites.heard(message, at_utc_s)) is not None:
                self.feed.publish("satellite", told)
            if self.alarms is not None:
                self.alarms.satellite(message, now)

    def _event(self, event: wire.Event, at_utc_s: float, source: str) -> None:
        if self.archive is not None:
            self.archive.event(event, at_utc_s, source)
        row = mission_fleet.event_row(event, at_utc_s, source)
        with self._lock:
            self._events.append(row)
        self.feed.publish("event", row)

    def _alarm(self, change: Change) -> None:
        if self.archive is not None:
            self.archive.alarm(change.record())
        self.feed.publish("alarm", {**change.alarm.as_dict(), "what": change.what})

    def _found(self, severity: str, text: str) -> None:
        """Something that the ground station has to say of itself."""
        at_utc_s = self.control.now().utc_s
        log.log(logging.INFO if severity == "info" else logging.WARNING, "%s", text)
        self._event(wire.Event("ground", at_utc_s, severity, "limits", text), at_utc_s, "ground")

    # ------------------------------------------------------------ frames

    def _run(self) -> None:
        due_s = second_s = time.monotonic()
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            due_s = max(due_s + FRAME_S, time.monotonic())
            try:
                self.frame()
                if time.monotonic() >= second_s:
                    second_s = max(second_s + SECOND_S, time.monotonic())
                    self.second()
            except Exception:  # the page must not stand still for ever for one fault; it is logged with its place
                log.exception("a frame was not made")

    def frame(self) -> None:
        """Publishes the rows of what has changed since the last frame."""
        now, states = self.control.now(), self.control.snapshot()
        with self._lock:
            changed, self._changed = self._changed, set()
            now_states = {node: mission_fleet.state_of(state, now) for node, state in states.items()}
            changed |= {node for node, state in now_states.items() if self._states.get(node) != state}
            self._states = now_states
            rows = {node: self._rows.get(node) for node in sorted(changed)}
            in_use = {row.set_id: row.signals for row in self._rows.values()}
            new = in_use.keys() - self._told_sets
            self._told_sets = set(in_use)
        if not rows:
            return
        self.feed.publish(
            "fleet",
            {
                "at": round(now.utc_s, 3),
                "sets": {set_id: in_use[set_id] for set_id in sorted(new)},
                "rows": [
                    [node, "", None, now_states.get(node, "offline"), [], "", ""]
                    if row is None
                    else row.wire(now_states.get(node, "offline"))
                    for node, row in rows.items()
                ],
            },
        )

    def second(self) -> None:
        """Once a second: staleness of alarms, heat of experts."""
        if self.alarms is not None:
            self.alarms.tick(self.control.snapshot(), self.control.now())
            if (bands := self.alarms.bands()) != self._bands_told:
                self._bands_told = bands
                self.feed.publish("limits", bands)
        if (heat := self.heat.counts()) != self._heat_told:
            self._heat_told = heat
            self.feed.publish("heat", heat)

    # ------------------------------------------------------------ what is known

    def fleet(self) -> dict[str, Any]:
        """Everything a page needs to begin with: see mission_fleet for the rows."""
        now, states = self.control.now(), self.control.snapshot()
        with self._lock:
            rows = dict(self._rows)
            births = dict(self._births)
        names = sorted({*states, *rows, *births})
        blank = NodeState("")
        told = {name: mission_fleet.state_of(states.get(name, blank), now) for name in names}
        return {
            "at": round(now.utc_s, 3),
            "sets": {row.set_id: row.signals for row in rows.values()},
            "rows": [
                rows[name].wire(told[name]) if name in rows else [name, "", None, told[name], [], "", ""]
                for name in names
            ],
            "births": [{"node": name, **mission_fleet.birth_of(births.get(name))} for name in names],
        }

    def nodes(self) -> list[dict[str, Any]]:
        """Every node with all its signals, for people and scripts."""
        now, states = self.control.now(), self.control.snapshot()
        with self._lock:
            rows, births = dict(self._rows), dict(self._births)
        return [
            mission_fleet.readable(
                name,
                mission_fleet.state_of(states.get(name, NodeState(name)), now),
                births.get(name),
                rows.get(name),
                now.utc_s,
            )
            for name in sorted({*states, *rows, *births})
        ]

    def node(self, name: str) -> dict[str, Any]:
        """One node, with its counts of messages and what it holds.  Raises: NoSuchNode."""
        now, state = self.control.now(), self.control.snapshot().get(name)
        with self._lock:
            row, birth = self._rows.get(name), self._births.get(name)
        if state is None and row is None and birth is None:
            raise NoSuchNode(name)
        state = state or NodeState(name)
        return {
            **mission_fleet.readable(name, mission_fleet.state_of(state, now), birth, row, now.utc_s),
            "counts": asdict(state.counts),
            "dropped_on_board": state.dropped_on_board,
            "hosted": [] if birth is None else [[s.layer, s.expert, s.precision] for s in birth.shards],
            "sensors": [] if birth is None else [asdict(sensor) for sensor in birth.sensors],
        }

    def events(self) -> list[dict[str, Any]]:
        """The last ones, oldest first; the archive has all."""
        with self._lock:
            return list(self._events)

    def experts(self) -> dict[str, Any]:
        """Who holds which expert in which precision: `holds` rows [layer, expert, node index, precision index]; `runs` by layer."""
        with self._lock:
            births = sorted(self._births.items())
        nodes = [node for node, _ in births]
        precisions = sorted({shard.precision[:20] for _, birth in births for shard in birth.shards})
        index = {name: i for i, name in enumerate(precisions)}
        holds = [
            [shard.layer, shard.expert, i, index[shard.precision[:20]]]
            for i, (_, birth) in enumerate(births)
            for shard in birth.shards
        ]
        return {"nodes": nodes, "precisions": precisions, "holds": holds, "runs": self.heat.counts()}

    def contacts(self, since_utc_s: float, until_utc_s: float) -> dict[str, Any]:
        planned = () if self._planned is None else self._planned()
        return {
            **self.satellites.snapshot(since_utc_s, until_utc_s),
            "planned": [list(each) for each in planned if each[3] >= since_utc_s and each[2] <= until_utc_s],
        }

    def snapshot(self) -> dict[str, Any]:
        """What the stream begins with."""
        now_utc_s = self.control.now().utc_s
        latest = self.tokens.requests()[:1]
        return {
            "fleet": self.fleet(),
            "events": self.events(),
            "alarms": self.alarm_list(),
            "commands": self.commands(),
            "requests": self.tokens.requests(),
            "tokens": [] if not latest else self.tokens.one(latest[0]["request"])[1],
            "experts": self.experts(),
            "contacts": self.contacts(now_utc_s - CONTACTS_S, now_utc_s + CONTACTS_S),
            "limits": self.limits(),
        }

    def health(self) -> dict[str, Any]:
        counts = None if self.archive is None else self.archive.counts
        return {
            "connected": self.control.connected,
            "uptime_s": round(self.control.now().utc_s - self.started_utc_s, 1),
            "malformed": self.control.malformed,
            "archive": None if counts is None else asdict(counts),
            "watchers": self.feed.watchers,
            "frames": self.feed.frames,
            "frames_lost": self.feed.lost,
        }

    # ------------------------------------------------------------ alarms

    def alarm_list(self) -> list[dict[str, Any]]:
        """The alarms that stand, the gravest first."""
        return [] if self.alarms is None else self.alarms.standing()

    def limits(self) -> dict[str, Any]:
        """The bands of each signal that has limits, as they hold now."""
        return {"set": "", "sets": {}, "signals": {}, "nodes": {}} if self.alarms is None else self.alarms.bands()

    def act(
        self, alarm: str, action: str, who: str, comment: str = "", for_s: float | None = None, force: bool = False
    ) -> dict[str, Any]:
        """Acknowledges, shelves, unshelves or clears an alarm; the alarm as it is then.  Raises: mission_alarms.AlarmRefused."""
        return self._with_limits().act(alarm, action, who, comment, for_s, force, self.control.now())

    def switch_limits(self, name: str, who: str) -> dict[str, Any]:
        """Puts another set of limits in force; the limits as they are then.  Raises: mission_alarms.AlarmRefused."""
        self._with_limits().switch(name, self.control.now())
        self._found("info", f"{who} put the limit set {name} in force")
        return self.limits()

    def _with_limits(self) -> MissionAlarms:
        if self.alarms is None:
            raise AlarmRefused(404, "this ground station has no limits", "start it with a file of limits")
        return self.alarms

    # ------------------------------------------------------------ commands

    def commands(self) -> list[dict[str, Any]]:
        """The last ones, oldest first."""
        with self._lock:
            return [asdict(record) for record in self._commands]

    def command(
        self, who: str, node: str, name: str, arguments: Mapping[str, str], dry_run: bool = False, yes: bool = False
    ) -> dict[str, Any]:
        """Sends a command, waits for its outcome and keeps both; with `dry_run` only says what would be sent.

        Raises: mission_commands.CommandRefused, NoSuchNode.
        """
        known, given = mission_commands.check(name, arguments, yes or dry_run)
        if node not in self.control.snapshot():
            raise NoSuchNode(node)
        if dry_run:
            return {
                "dry_run": True,
                "hazard": known.hazard,
                "topic": self.control.topics.command(node, name),
                "arguments": given,
                "valid_s": COMMAND_TIMEOUT_S,
            }
        record = CommandRecord(secrets.token_hex(8), who, self.control.now().utc_s, node, name, given, "sent", "", None)
        self._keep(record)
        result = self.control.command(node, name, COMMAND_TIMEOUT_S, given)
        state = "ok" if result.ok else "refused"
        if not result.ok and result.text.startswith("not sent"):
            state = "not sent"
        elif not result.ok and result.text.startswith("no answer to"):
            state = "no answer"
        record = replace(record, state=state, text=result.text[:1000], done_utc_s=self.control.now().utc_s)
        self._keep(record)
        return asdict(record)

    def _keep(self, record: CommandRecord) -> None:
        if self.archive is not None:
            self.archive.command(record)
        with self._lock:
            for i, old in enumerate(self._commands):
                if old.id == record.id:
                    self._commands[i] = record
                    break
            else:
                self._commands.append(record)
        self.feed.publish("command", asdict(record))

    # ------------------------------------------------------------ tokens

    def request(self, record: RequestRecord) -> None:
        """A request begins, or has ended."""
        if self.archive is not None:
            self.archive.request(record)
        self.tokens.request(record)
        self.feed.publish("request", asdict(record))

    def token(self, record: TokenRecord) -> None:
        if self.archive is not None:
            self.archive.token(record)
        self.tokens.token(record)
        self.feed.publish("token", asdict(record))
