"""The alarm of a signal that has a limit, reading by reading, and the alarms that stood before a restart. Pure.

What an alarm is, and what people do with it, is in alarms_latch.py; levels are in limits.py. Leaves out staleness, events and the
fleet (alarms_fleet.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ground_station.alarms_latch import MAX_TEXT, Alarm, Bad, Changes, Latch, step
from ground_station.archive_records import AlarmRecord
from ground_station.fleet import Instant
from ground_station.limits import NOMINAL, NOTHING_YET, SEVERITIES, Limit, Standing, advance, skip
from node_agent.wire import Validity


@dataclass(frozen=True, slots=True)
class Reading:
    """One sample of a signal."""

    value: float | None
    unit: str = ""
    validity: Validity = "ok"


@dataclass(frozen=True, slots=True)
class SignalState:
    """A signal of a node with its limit. `outcome`: of the last reading, a level or 'stale', 'missing', 'invalid'."""

    limit: Limit
    latch: Latch
    standing: Standing = NOTHING_YET
    outcome: str = "missing"


def apply(state: SignalState, reading: Reading, at: Instant) -> tuple[SignalState, Changes]:
    """After one more reading. What is not valid is neither well nor bad: nothing is raised and nothing returns."""
    limit = state.limit
    if reading.validity != "ok" or not limit.usable(reading.value):
        outcome = reading.validity
        if outcome == "ok":
            outcome = "missing" if reading.value is None else "invalid"
        return replace(state, standing=skip(limit, state.standing), outcome=outcome), ()
    standing = advance(limit, state.standing, reading.value)
    zone, latch, changes = standing.zone, state.latch, ()
    if zone != 0:
        alarm, level = latch.alarm, limit.level(zone)
        if (
            alarm is not None
            and alarm.now == level
            and alarm.severity >= limit.severity(zone)
            and alarm.limit is not None
        ):
            bad = Bad(
                level, alarm.severity, reading.value, alarm.unit, alarm.limit
            )  # no news: words are not made again
        else:
            bad = _bad(limit, zone, reading)
        latch, changes = step(latch, bad, at)
    elif not standing.pending:
        latch, changes = step(latch, None, at)
    return SignalState(limit, latch, standing, limit.level(zone)), changes


def relimit(state: SignalState, limit: Limit) -> SignalState:
    """`state` under another limit: its alarm stands until a reading says that all is well by the new one."""
    return replace(state, limit=limit, standing=NOTHING_YET, latch=replace(state.latch, waived=0))


def _bad(limit: Limit, zone: int, reading: Reading) -> Bad:
    level, crossed = limit.level(zone), limit.crossed(zone)
    if limit.bits:
        set_bits = [each for each in limit.bits if int(reading.value) >> each.bit & 1]
        # of a standing that has not come down yet, the bits may be gone
        text = "; ".join(each.text or f"bit {each.bit}" for each in set_bits) or limit.text
    else:
        side = "above" if zone > 0 else "below"
        text = f"{reading.value:.6g} {reading.unit[:20]} {side} {level} {crossed:.6g}"
        text += f": {limit.text}" if limit.text else ""
    return Bad(level, limit.severity(zone), reading.value, reading.unit[:20], crossed, text)


# ---------------------------------------------------------------- after a restart


def restored(records: Iterable[AlarmRecord]) -> list[Latch]:
    """The alarms that stood when the last of `records`, given from the oldest, was written.

    Whether they still hold is not known, so they count as active until something says that all is well; what was shelved is to be
    acknowledged, for no record says until when.
    """
    first: dict[str, AlarmRecord] = {}
    last: dict[str, AlarmRecord] = {}
    count: dict[str, int] = {}
    for record in records:
        first.setdefault(record.id, record)
        last[record.id] = record
        count[record.id] = count.get(record.id, 0) + (record.state == "unacknowledged")
    latches: dict[tuple[str, str, str], Latch] = {}
    for id_, end in last.items():
        if end.state == "cleared" or end.severity not in SEVERITIES[1:]:
            continue
        start, by_hand = first[id_], bool(end.who)
        alarm = Alarm(
            id_, end.node, end.signal, end.level, SEVERITIES.index(end.severity),
            NOMINAL if end.state == "returned" else end.level, end.value, "", None, start.at_utc_s, end.at_utc_s,
            (start.text if by_hand else end.text)[:MAX_TEXT], max(1, count[id_]), end.state == "acknowledged",
            who=end.who if end.state == "acknowledged" else "",
            comment=end.text[:MAX_TEXT] if by_hand and end.state == "acknowledged" else "",
        )  # fmt: skip
        latches[(end.node, end.signal, alarm.kind)] = Latch(end.node, end.signal, alarm)
    return list(latches.values())
