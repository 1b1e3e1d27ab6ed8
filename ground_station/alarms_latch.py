"""An alarm that latches until someone acknowledges it: a pure state machine for one condition, and what people do with it.

States follow ISA-18.2 as Yamcs has them: unacknowledged, acknowledged, returned (all is well again and nobody has acknowledged),
shelved, cleared. Unlike Yamcs, a graver severity asks for a new acknowledgement, and an alarm that was cleared by force while
its cause holds is raised again only when that gets graver, or has ended and comes back. Leaves out what
the conditions are (alarms.py, alarms_fleet.py), locks and numbers.
Source: docs.yamcs.org/yamcs-server-manual/processors/alarms.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

from ground_station.archive_records import AlarmRecord
from ground_station.fleet import Instant
from ground_station.limits import NOMINAL, SEVERITIES

STALE, OFFLINE, EVENT = "stale", "offline", "event"  # levels that are no limit's
MAX_TEXT = 500
SHELF_S = (1.0, 7 * 86_400.0)

Kind = Literal["limit", "stale", "offline", "event"]
What = Literal[
    "raised", "graver", "level", "returned", "back", "acknowledged", "shelved", "unshelved", "cleared", "restored"
]


class AlarmError(ValueError):
    """That cannot be done with this alarm. `fix`: what to do."""

    def __init__(self, text: str, fix: str) -> None:
        super().__init__(text)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Bad:
    """What is wrong now. `severity` is a rank above 0; `limit` the one that was crossed."""

    level: str
    severity: int
    value: float | None = None
    unit: str = ""
    limit: float | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Alarm:
    """`level`, `severity`, `limit` and `text` are of the gravest moment, `now` is the level at present; `value` and `last_utc_s` are
    of the last time it was bad, `count` how often. `until`: of the shelf."""

    id: str
    node: str
    signal: str
    level: str
    severity: int
    now: str
    value: float | None
    unit: str
    limit: float | None
    since_utc_s: float
    last_utc_s: float
    text: str
    count: int = 1
    acknowledged: bool = False
    cleared: bool = False
    until: Instant | None = None
    who: str = ""
    comment: str = ""

    @property
    def active(self) -> bool:
        """What raised it still holds, as far as is known."""
        return self.now != NOMINAL

    @property
    def kind(self) -> Kind:
        return kind_of(self.level)

    @property
    def state(self) -> str:
        if self.cleared:
            return "cleared"
        if self.until is not None:
            return "shelved"
        if self.acknowledged:
            return "acknowledged"
        return "unacknowledged" if self.active else "returned"

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Texts come from nodes and people: whoever shows them shows them as text."""
        return {
            "id": self.id,
            "node": self.node,
            "signal": self.signal,
            "kind": self.kind,
            "level": self.level,
            "now": self.now,
            "severity": SEVERITIES[self.severity],
            "state": self.state,
            "value": self.value,
            "unit": self.unit,
            "limit": self.limit,
            "since_utc_s": self.since_utc_s,
            "last_utc_s": self.last_utc_s,
            "count": self.count,
            "shelved_until_utc_s": None if self.until is None else self.until.utc_s,
            "who": self.who,
            "comment": self.comment,
            "text": self.text,
        }


def kind_of(level: str) -> Kind:
    """The kind of alarm that has that level."""
    return level if level in (STALE, OFFLINE, EVENT) else "limit"


@dataclass(frozen=True, slots=True)
class Change:
    """What has happened to an alarm, which is as it is after that."""

    what: What
    alarm: Alarm
    at_utc_s: float

    def record(self) -> AlarmRecord:
        """For the archive. `text` is the comment where someone did it."""
        alarm = self.alarm
        by_hand = self.what in ("acknowledged", "shelved", "cleared", "unshelved") and alarm.who
        return AlarmRecord(
            alarm.id,
            self.at_utc_s,
            alarm.node,
            alarm.signal,
            alarm.level,
            SEVERITIES[alarm.severity],
            alarm.state,
            alarm.value,
            alarm.comment if by_hand else alarm.text,
            alarm.who if by_hand else "",
        )


Changes = tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Latch:
    """One condition of one signal. `waived`: the rank up to which it raises no alarm until it has ended."""

    node: str
    signal: str
    alarm: Alarm | None = None
    waived: int = 0


def step(latch: Latch, bad: Bad | None, at: Instant) -> tuple[Latch, Changes]:
    """After the condition was looked at: `bad`, or None for all is well."""
    alarm = latch.alarm
    if bad is None:
        return _well(latch, at)
    if alarm is None:
        if bad.severity <= latch.waived:
            return latch, ()
        alarm = Alarm(
            _id(latch, bad, at), latch.node, latch.signal, bad.level, bad.severity, bad.level, bad.value, bad.unit,
            bad.limit, at.utc_s, at.utc_s, bad.text[:MAX_TEXT],
        )  # fmt: skip
        return replace(latch, alarm=alarm, waived=0), (Change("raised", alarm, at.utc_s),)
    before, graver = alarm.now, bad.severity > alarm.severity
    alarm = replace(
        alarm,
        now=bad.level,
        value=bad.value,
        unit=bad.unit or alarm.unit,
        last_utc_s=at.utc_s,
        count=alarm.count + 1,
    )
    if graver:
        alarm = replace(
            alarm,
            level=bad.level,
            severity=bad.severity,
            limit=bad.limit,
            text=bad.text[:MAX_TEXT],
            acknowledged=False,
        )
    elif alarm.limit is None and alarm.level == bad.level:
        alarm = replace(alarm, limit=bad.limit)  # it was restored from a record, which holds none
    what: What | None = (
        "graver" if graver else "back" if before == NOMINAL else "level" if before != bad.level else None
    )
    return Latch(latch.node, latch.signal, alarm), () if what is None else (Change(what, alarm, at.utc_s),)


def _well(latch: Latch, at: Instant) -> tuple[Latch, Changes]:
    alarm = latch.alarm
    if alarm is None:
        return (replace(latch, waived=0) if latch.waived else latch), ()
    if not alarm.active:
        return latch, ()
    return _settle(latch, replace(alarm, now=NOMINAL), "returned", at)


def _settle(latch: Latch, alarm: Alarm, what: What, at: Instant) -> tuple[Latch, Changes]:
    """`alarm` takes its place, or is gone where nothing holds it any more."""
    if alarm.acknowledged and not alarm.active and alarm.until is None:
        alarm = replace(alarm, cleared=True)
        return replace(latch, alarm=None), (Change("cleared", alarm, at.utc_s),)
    return replace(latch, alarm=alarm), (Change(what, alarm, at.utc_s),)


def _id(latch: Latch, bad: Bad, at: Instant) -> str:
    text = "\0".join((latch.node, latch.signal, kind_of(bad.level), repr(at.utc_s), repr(at.mono_s)))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


# ---------------------------------------------------------------- what people do


def _standing(latch: Latch) -> Alarm:
    if latch.alarm is None:
        raise AlarmError("there is no such alarm any more", "list the alarms again")
    return latch.alarm


def acknowledge(latch: Latch, who: str, comment: str, at: Instant) -> tuple[Latch, Changes]:
    """Someone has seen it. Where all is well again it is cleared.  Raises: AlarmError."""
    alarm = _standing(latch)
    if alarm.acknowledged:
        raise AlarmError(f"it is acknowledged already, by {alarm.who or 'someone'}", "nothing is to be done")
    return _settle(latch, _by(alarm, who, comment, acknowledged=True), "acknowledged", at)


def shelve(latch: Latch, who: str, comment: str, for_s: float, at: Instant) -> tuple[Latch, Changes]:
    """Out of sight for `for_s` seconds, then back.  Raises: AlarmError."""
    alarm = _standing(latch)
    if not SHELF_S[0] <= for_s <= SHELF_S[1]:
        raise AlarmError(f"for_s is {for_s}", f"give {SHELF_S[0]:g} to {SHELF_S[1]:g} seconds")
    until = Instant(at.utc_s + for_s, at.mono_s + for_s)
    alarm = _by(alarm, who, comment, until=until)
    return replace(latch, alarm=alarm), (Change("shelved", alarm, at.utc_s),)


def wake(latch: Latch, at: Instant, who: str = "", comment: str = "") -> tuple[Latch, Changes]:
    """Takes it off the shelf if its time is over, or if `who` says so: still bad, it is to be acknowledged (anew)."""
    alarm = latch.alarm
    if alarm is None or alarm.until is None or (not who and at.mono_s < alarm.until.mono_s):
        return latch, ()
    alarm = replace(alarm, until=None, acknowledged=alarm.acknowledged and not alarm.active)
    if who:
        alarm = _by(alarm, who, comment)
    else:
        alarm = replace(alarm, who="", comment="") if alarm.active else alarm
    return _settle(latch, alarm, "unshelved", at)


def clear(latch: Latch, who: str, comment: str, at: Instant, force: bool = False) -> tuple[Latch, Changes]:
    """Ends it, as a rule once all is well again. An event has no end that is known, so its alarm may be cleared at any time.

    Raises: AlarmError where its cause still holds and `force` is not given.
    """
    alarm = _standing(latch)
    if alarm.active and alarm.kind != EVENT and not force:
        raise AlarmError(
            f"{alarm.signal} of {alarm.node} is {alarm.now} still",
            "mend the cause, shelve it for a time, or clear by force",
        )
    waived = alarm.severity if alarm.active and alarm.kind != EVENT else 0
    alarm = _by(alarm, who, comment, cleared=True, until=None)
    return replace(latch, alarm=None, waived=waived), (Change("cleared", alarm, at.utc_s),)


def _by(alarm: Alarm, who: str, comment: str, **more: Any) -> Alarm:
    return replace(alarm, who=who[:120], comment=comment[:MAX_TEXT], **more)
