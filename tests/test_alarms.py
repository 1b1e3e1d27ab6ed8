"""The alarm of one signal: tables worked by hand through ISA-18.2's states, and what must hold of any sequence."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ground_station import alarms, alarms_latch
from ground_station.alarms import Reading, SignalState
from ground_station.alarms_latch import Bad, Latch
from ground_station.archive_records import AlarmRecord
from ground_station.fleet import Instant
from ground_station.limits import Limit

LIMIT = Limit(
    "temp_c",
    high=(75.0, 80.0),
    high_bands=("yellow", "red"),
    high_severity=(2, 4),
    hysteresis=2.0,
    text="cool it",
)
UTC_S = 1_800_000_000.0


def at(second: float) -> Instant:
    return Instant(UTC_S + second, second)


class Signal:
    """One signal that is fed a value a second."""

    def __init__(self, limit: Limit = LIMIT) -> None:
        self.state = SignalState(limit, Latch("sat-1", "temp_c"))
        self.second, self.changes = 0.0, []

    def feed(self, value: float | None, validity: str = "ok") -> str:
        self.second += 1.0
        self.state, changes = alarms.apply(self.state, Reading(value, "degC", validity), at(self.second))
        return self._told(changes)

    def do(self, function, *arguments) -> str:
        latch, changes = function(self.state.latch, *arguments, at(self.second))
        self.state = SignalState(self.state.limit, latch, self.state.standing, self.state.outcome)
        return self._told(changes)

    def _told(self, changes) -> str:
        self.changes += changes
        return " ".join(change.what for change in changes)

    @property
    def alarm(self):
        return self.state.latch.alarm

    @property
    def now(self) -> str:
        return "-" if self.alarm is None else self.alarm.state


def test_it_latches_until_acknowledged():
    signal = Signal()
    table = [
        (70, "", "-"),
        (76, "raised", "unacknowledged"),
        (77, "", "unacknowledged"),
        (74, "", "unacknowledged"),  # within the hysteresis
        (70, "returned", "returned"),
        (70, "", "returned"),
        (76, "back", "unacknowledged"),
        (81, "graver", "unacknowledged"),
        (76, "level", "unacknowledged"),
        (60, "returned", "returned"),
    ]
    for value, told, state in table:
        assert (signal.feed(value), signal.now) == (told, state), value
    alarm = signal.alarm
    assert (alarm.level, alarm.severity, alarm.now, alarm.limit) == ("red_high", 4, "nominal", 80.0)
    assert (alarm.count, alarm.value, alarm.since_utc_s, alarm.last_utc_s) == (6, 76, UTC_S + 2, UTC_S + 9)
    assert alarm.text == "81 degC above red_high 80: cool it"
    assert signal.do(alarms_latch.acknowledge, "ann", "seen") == "cleared" and signal.now == "-"
    last = signal.changes[-1].record()
    assert (last.state, last.who, last.text, last.id) == ("cleared", "ann", "seen", alarm.id)
    assert signal.feed(76) == "raised" and signal.alarm.id != alarm.id


def test_acknowledged_it_goes_with_its_cause():
    signal = Signal()
    signal.feed(76)
    assert signal.do(alarms_latch.acknowledge, "ann", "") == "acknowledged" and signal.now == "acknowledged"
    with pytest.raises(alarms_latch.AlarmError, match="acknowledged already, by ann"):
        signal.do(alarms_latch.acknowledge, "bob", "")
    assert signal.feed(77) == "" and signal.now == "acknowledged"
    assert signal.feed(60) == "cleared" and signal.now == "-"
    with pytest.raises(alarms_latch.AlarmError, match="no such alarm"):
        signal.do(alarms_latch.acknowledge, "bob", "")


def test_graver_asks_anew():
    signal = Signal()
    signal.feed(76)
    signal.do(alarms_latch.acknowledge, "ann", "")
    assert signal.feed(81) == "graver" and signal.now == "unacknowledged"
    signal.do(alarms_latch.acknowledge, "ann", "")
    assert signal.feed(77) == "level" and signal.now == "acknowledged", "less is no news for who has seen more"
    assert signal.feed(81) == "level" and signal.now == "acknowledged", "and not more than was seen"


@pytest.mark.parametrize(
    ("value", "validity", "outcome"),
    [
        (None, "missing", "missing"),
        (None, "invalid", "invalid"),
        (50.0, "stale", "stale"),
        (math.nan, "ok", "invalid"),
        (math.inf, "ok", "invalid"),
        (None, "ok", "missing"),
    ],
)
def test_what_is_not_valid_is_neither_well_nor_bad(value, validity, outcome):
    signal = Signal()
    assert signal.feed(value, validity) == "" and signal.now == "-" and signal.state.outcome == outcome
    signal.feed(81)
    for _ in range(5):
        assert signal.feed(value, validity) == "" and signal.now == "unacknowledged"
        assert signal.state.outcome == outcome
    assert signal.feed(50) == "returned"


def test_the_shelf():
    signal = Signal()
    signal.feed(76)
    for for_s in (0.0, -1.0, math.nan, math.inf, 8 * 86_400.0):
        with pytest.raises(alarms_latch.AlarmError, match="for_s"):
            signal.do(alarms_latch.shelve, "ann", "", for_s)
    assert signal.do(alarms_latch.shelve, "ann", "known", 60.0) == "shelved"
    assert signal.alarm.as_dict()["shelved_until_utc_s"] == UTC_S + 61
    assert signal.feed(81) == "graver" and signal.now == "shelved"
    assert alarms_latch.wake(signal.state.latch, at(60.9)) == (signal.state.latch, ())
    latch, (change,) = alarms_latch.wake(signal.state.latch, at(61.0))
    assert (change.what, latch.alarm.state, latch.alarm.severity) == ("unshelved", "unacknowledged", 4)


@pytest.mark.parametrize("acknowledged", [False, True])
@pytest.mark.parametrize(("end", "told"), [(81.0, "unacknowledged"), (50.0, "returned")])
def test_off_the_shelf(acknowledged, end, told):
    """Still bad: it is to be acknowledged, also if it was. Well: gone if someone had acknowledged it, else it waits for that."""
    signal = Signal()
    signal.feed(76)
    if acknowledged:
        signal.do(alarms_latch.acknowledge, "ann", "")
    signal.do(alarms_latch.shelve, "ann", "", 2.0)
    signal.feed(end)
    assert signal.now == "shelved"
    signal.feed(end)
    assert signal.do(alarms_latch.wake) == ("cleared" if acknowledged and end == 50.0 else "unshelved")
    assert signal.now == ("-" if acknowledged and end == 50.0 else told)


def test_clearing_needs_a_good_value_or_force():
    signal = Signal()
    signal.feed(76)
    with pytest.raises(alarms_latch.AlarmError, match="temp_c of sat-1 is yellow_high still") as refused:
        signal.do(alarms_latch.clear, "ann", "")
    assert "by force" in refused.value.fix
    signal.feed(50)
    assert signal.do(alarms_latch.clear, "ann", "") == "cleared" and signal.now == "-"


def test_cleared_by_force_it_comes_back_graver_or_anew():
    signal = Signal()
    signal.feed(76)
    latch, (change,) = alarms_latch.clear(signal.state.latch, "ann", "sensor is broken", at(1), force=True)
    assert change.alarm.state == "cleared"
    signal.do(lambda latch, now: alarms_latch.clear(latch, "ann", "", now, force=True))
    assert [signal.feed(value) for value in (76, 77, 76)] == ["", "", ""]
    assert signal.feed(81) == "raised"
    signal.do(lambda latch, now: alarms_latch.clear(latch, "ann", "", now, force=True))
    assert [signal.feed(value) for value in (81, 60, 76)] == ["", "", "raised"]


def test_events_last_until_someone_or_an_info_ends_them():
    latch, changes = alarms_latch.step(Latch("n", "event:hang"), Bad(alarms_latch.EVENT, 4, text="x" * 9999), at(0))
    assert changes[0].alarm.kind == "event" and len(latch.alarm.text) == alarms_latch.MAX_TEXT
    assert alarms_latch.clear(latch, "ann", "", at(1))[0].alarm is None, "no force: its end would never be known"
    assert alarms_latch.step(latch, None, at(1))[0].alarm.state == "returned"


def test_as_dict_is_json_whatever_the_texts():
    signal = Signal(Limit("temp_c", high=(1.0,), high_bands=("red",), high_severity=(4,)))
    signal.state = SignalState(signal.state.limit, Latch("n", '<script>\x1b[2J\u202e"'))
    signal.feed(1e308)
    signal.do(alarms_latch.acknowledge, "ann</td>" * 100, "\x00" * 9999)
    tree = json.loads(json.dumps(signal.alarm.as_dict(), allow_nan=False))
    assert tree["signal"] == '<script>\x1b[2J\u202e"' and tree["state"] == "acknowledged" and tree["value"] == 1e308
    assert len(tree["who"]) == 120 and len(tree["comment"]) == 500 and tree["severity"] == "critical"
    assert set(tree) >= {
        "id", "node", "signal", "level", "severity", "state", "value", "unit", "limit", "since_utc_s", "last_utc_s",
        "count", "who", "comment", "text",
    }  # fmt: skip


def test_other_limits_do_not_end_an_alarm_before_a_reading_does():
    signal = Signal()
    signal.feed(76)
    wider = Limit("temp_c", high=(90.0,), high_bands=("red",), high_severity=(4,), up=3)
    signal.state = alarms.relimit(signal.state, wider)
    assert signal.now == "unacknowledged"
    assert signal.feed(91) == "" and signal.now == "unacknowledged", "one of three: it may be bad by the new limit too"
    assert signal.feed(85) == "returned"


# ---------------------------------------------------------------- any sequence

readings = st.one_of(
    st.floats(60, 90).map(lambda value: ("feed", value, "ok")),
    st.sampled_from([math.nan, None]).map(lambda value: ("feed", value, "ok")),
    st.sampled_from(["stale", "missing", "invalid"]).map(lambda validity: ("feed", 50.0, validity)),
)
harmless = st.one_of(readings, st.just(("shelve",)), st.just(("wake",)))
limits = st.builds(
    lambda up, down, hysteresis: Limit(**{**LIMIT.__dict__, "up": up, "down": down, "hysteresis": hysteresis}),
    st.integers(1, 3), st.integers(1, 3), st.floats(0, 5),
)  # fmt: skip


def play(signal: Signal, operation: tuple) -> None:
    if operation[0] == "feed":
        signal.feed(*operation[1:])
    elif operation[0] == "shelve" and signal.alarm is not None:
        signal.do(alarms_latch.shelve, "ann", "", 3.0)
    elif operation[0] == "wake":
        signal.do(alarms_latch.wake)
    elif operation[0] == "acknowledge" and signal.alarm is not None and not signal.alarm.acknowledged:
        signal.do(alarms_latch.acknowledge, "ann", "")


@given(limits, st.lists(harmless, max_size=60))
def test_nothing_vanishes_that_nobody_acknowledged(limit, operations):
    signal, first, severity = Signal(limit), None, 0
    for operation in operations:
        play(signal, operation)
        if first is not None:
            assert signal.alarm is not None and signal.alarm.id == first
            assert signal.alarm.severity >= severity and not signal.alarm.acknowledged
        if signal.alarm is not None:
            first, severity = signal.alarm.id, signal.alarm.severity
    assert not any(change.what == "cleared" for change in signal.changes)


@given(limits, st.lists(st.one_of(harmless, st.just(("acknowledge",))), max_size=60))
def test_a_restart_loses_no_alarm(limit, operations):
    """What records say after any sequence is what stood, but that a shelf is over."""
    signal = Signal(limit)
    for operation in operations:
        play(signal, operation)
    found = alarms.restored(change.record() for change in signal.changes)
    if signal.alarm is None:
        assert found == []
    else:
        (latch,) = found
        alarm, old = latch.alarm, signal.alarm
        assert (latch.node, latch.signal, alarm.id) == ("sat-1", "temp_c", old.id)
        assert (alarm.level, alarm.severity, alarm.since_utc_s) == (old.level, old.severity, old.since_utc_s)
        if old.until is None:
            assert alarm.state == old.state
        else:
            assert alarm.state == "unacknowledged"


def test_acknowledging_is_what_makes_them_vanish():
    """The control of the two above: with it, alarms do go."""
    signal = Signal()
    for operation in (("feed", 76.0, "ok"), ("acknowledge",), ("feed", 60.0, "ok")):
        play(signal, operation)
    assert signal.alarm is None and alarms.restored(change.record() for change in signal.changes) == []


def test_restored_it_goes_on():
    records = [
        AlarmRecord("a1", UTC_S, "sat-1", "temp_c", "yellow_high", "warning", "unacknowledged", 76.0, "76 degC"),
        AlarmRecord("a2", UTC_S, "sat-1", "(node)", "offline", "critical", "unacknowledged", None, "offline"),
        AlarmRecord("a1", UTC_S + 5, "sat-1", "temp_c", "yellow_high", "warning", "acknowledged", 77.0, "ok", "ann"),
        AlarmRecord("a3", UTC_S + 6, "sat-1", "event:hang", "event", "critical", "unacknowledged", None, "hangs"),
        AlarmRecord("a3", UTC_S + 7, "sat-1", "event:hang", "event", "critical", "cleared", None, "", "ann"),
        AlarmRecord("a4", UTC_S + 7, "sat-1", "x", "red_high", "no severity", "unacknowledged", None, ""),
    ]
    first, second = alarms.restored(records)
    assert (first.alarm.id, first.alarm.who, first.alarm.comment, first.alarm.text) == ("a1", "ann", "ok", "76 degC")
    assert second.alarm.kind == "offline"
    state = SignalState(LIMIT, first)
    bad, changes = alarms.apply(state, Reading(77.0, "degC"), at(9))
    assert changes == () and bad.latch.alarm.limit == 75.0 and bad.latch.alarm.unit == "degC"
    _, (gone,) = alarms.apply(state, Reading(60.0, "degC"), at(9))
    assert gone.what == "cleared"
