"""Alarms of a fleet: real messages in, changes and standing alarms out; silence, events, restarts, other limits, and bounds."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ground_station import alarms, alarms_fleet, limits_file
from ground_station.alarms import Reading, SignalState
from ground_station.alarms_fleet import FULL, NODE, FleetAlarms, Sight
from ground_station.alarms_latch import AlarmError, Latch
from ground_station.archive import Archive
from ground_station.archive_read import ArchiveReader
from ground_station.fleet import Instant
from node_agent.wire import Event, Sample, Satellite

UTC_S = 1_800_000_000.0
FILE = b"""
active = "bench"
[node]
stale_after_s = 5
[sets.bench]
[[sets.bench.signals]]
name = "temp_c*"
yellow_high = 75
red_high = 80
stale_after_s = 10
[[sets.bench.signals]]
name = "satellite.soc"
red_low = 0.2
[[sets.bench.signals]]
name = "*x"
red_high = 1
[sets.flight]
[[sets.flight.signals]]
name = "temp_c*"
red_high = 60
"""


def at(second: float) -> Instant:
    return Instant(UTC_S + second, second)


def fleet(file: bytes = FILE) -> FleetAlarms:
    return FleetAlarms(limits_file.loads(file))


def sample(name: str, value: float | None, validity: str = "ok") -> Sample:
    return Sample(name, value, "degC", validity, "measured", "module", UTC_S)


def told(changes) -> list[tuple[str, str]]:
    return [(change.what, change.alarm.signal) for change in changes]


def feed(of: FleetAlarms, second: float, **values: float | None):
    return of.telemetry("sat-1", "pi", [sample(name, value) for name, value in values.items()], at(second))


def test_a_limit_is_crossed_acknowledged_and_well_again():
    of = fleet()
    assert feed(of, 0, temp_c=50.0, power_w=3.0) == ({"temp_c": "g"}, ())
    letters, changes = feed(of, 1, temp_c=76.0)
    assert letters == {"temp_c": "y"} and told(changes) == [("raised", "temp_c")]
    letters, changes = feed(of, 2, temp_c=81.0)
    assert letters == {"temp_c": "r"} and told(changes) == [("graver", "temp_c")]
    (standing,) = of.standing()
    assert (standing["level"], standing["severity"], standing["state"], standing["limit"]) == (
        "red_high", "critical", "unacknowledged", 80.0,
    )  # fmt: skip
    assert told(of.acknowledge(standing["id"], "ann", "fan", at(3))) == [("acknowledged", "temp_c")]
    assert of.standing()[0]["who"] == "ann" and of.alarm(standing["id"]).comment == "fan"
    assert told(feed(of, 4, temp_c=50.0)[1]) == [("cleared", "temp_c")] and of.standing() == []
    with pytest.raises(AlarmError, match="there is no alarm"):
        of.acknowledge(standing["id"], "ann", "", at(5))


def test_not_valid_is_unknown_and_stale_after_a_while():
    of, here = fleet(), {"sat-1": Sight(True, 0.5)}
    assert feed(of, 0, temp_c=None) == ({"temp_c": "?"}, ())
    assert of.tick(here, at(50)) == (), "it never had a value: missing, and not stale"
    feed(of, 51, temp_c=50.0)
    for second in range(52, 62):
        assert feed(of, second, temp_c=math.nan) == ({"temp_c": "?"}, ()) and of.tick(here, at(second)) == ()
    assert told(of.tick(here, at(61.5))) == [("raised", "temp_c")]
    assert of.standing()[0]["kind"] == "stale" and of.standing()[0]["level"] == "stale"
    assert of.tick(here, at(62)) == ()
    feed(of, 63, temp_c=50.0)
    assert told(of.tick(here, at(63))) == [("returned", "temp_c")]


def test_silent_is_stale_and_offline_is_another_alarm():
    of = fleet()
    feed(of, 0, temp_c=50.0)
    assert of.tick({"sat-1": Sight(True, 5.0)}, at(5)) == ()
    (change,) = of.tick({"sat-1": Sight(True, 5.1)}, at(5.1))
    assert (change.what, change.alarm.signal, change.alarm.kind, change.alarm.severity) == ("raised", NODE, "stale", 2)
    assert of.tick({"sat-1": Sight(True, 30.0)}, at(30)) == (), "signals of a silent node are not stale one by one"
    (change,) = of.tick({"sat-1": Sight(False, 31.0)}, at(31))
    assert (change.what, change.alarm.kind, change.alarm.severity) == ("raised", "offline", 4)
    assert {row["kind"] for row in of.standing()} == {"stale", "offline"}
    feed(of, 40, temp_c=50.0)
    changes = of.tick({"sat-1": Sight(True, 0.1)}, at(40))
    assert [change.what for change in changes] == ["returned", "returned"]
    assert all(row["state"] == "returned" for row in of.standing())


def test_events_of_a_severity_raise_and_an_info_of_the_kind_returns():
    of = fleet()

    def event(severity: str, kind: str = "guard", text: str = "hot") -> Event:
        return Event("sat-1", UTC_S, severity, kind, text)

    assert of.event(event("info"), at(0)) == () and of.event(event("watch"), at(0)) == ()
    assert told(of.event(event("warning"), at(1))) == [("raised", "event:guard")]
    assert told(of.event(event("critical"), at(2))) == [("graver", "event:guard")]
    assert of.event(event("info", "started"), at(3)) == (), "another kind"
    assert told(of.event(event("info"), at(3))) == [("returned", "event:guard")]
    assert of.standing()[0]["count"] == 2
    strict = fleet(b'[events]\nseverity = "critical"\n'.join(FILE.partition(b'active = "bench"\n')[1:]))
    assert strict.event(event("distress"), at(0)) == () and strict.event(event("critical"), at(0))


def test_the_satellite_is_not_its_board():
    of = fleet()
    message = Satellite("sat-1", UTC_S, 1.0, UTC_S, (sample("temp_c", 99.0), sample("soc", 0.1)))
    letters, changes = of.satellite(message, at(0))
    assert letters == {"satellite.soc": "r"} and told(changes) == [("raised", "satellite.soc")]
    for name in ("satellite.soc", "event:hangx", "(alarms)x"):
        assert feed(of, 1, **{name: 0.0}) == ({}, ()), "a node does not speak for its satellite, nor for us"
    assert feed(of, 1, **{"x": 2.0})[0] == {"x": "r"}


def test_shelves_end_by_the_clock():
    of = fleet()
    feed(of, 0, temp_c=76.0)
    id_ = of.standing()[0]["id"]
    assert told(of.shelve(id_, "ann", "", 10.0, at(1))) == [("shelved", "temp_c")]
    assert of.tick({}, at(10.9)) == () and of.standing()[0]["state"] == "shelved"
    assert told(of.tick({}, at(11))) == [("unshelved", "temp_c")] and of.standing()[0]["state"] == "unacknowledged"
    of.shelve(id_, "ann", "", 10.0, at(12))
    assert told(of.unshelve(id_, "bob", "", at(13))) == [("unshelved", "temp_c")] and of.standing()[0]["who"] == "bob"
    with pytest.raises(AlarmError, match="no shelf"):
        of.unshelve(id_, "bob", "", at(13))
    with pytest.raises(AlarmError, match="still"):
        of.clear(id_, "ann", "", at(14))
    assert told(of.clear(id_, "ann", "", at(14), force=True)) == [("cleared", "temp_c")] and of.standing() == []
    assert feed(of, 15, temp_c=76.0)[1] == () and told(feed(of, 16, temp_c=81.0)[1]) == [("raised", "temp_c")]


def test_a_node_that_is_gone_for_good_is_cleared_by_force_once():
    of = fleet()
    gone = {"sat-1": Sight(False, None)}
    (change,) = of.tick(gone, at(0))
    of.clear(change.alarm.id, "ann", "taken apart", at(1), force=True)
    assert of.tick(gone, at(2)) == () and of.standing() == []
    assert of.tick({"sat-1": Sight(True, 0.0)}, at(3)) == () and len(of.tick(gone, at(4))) == 1


def test_other_limits_at_run_time():
    of = fleet()
    feed(of, 0, temp_c=70.0, x=2.0)
    assert told(of.use(of.limits.using("flight"), at(1))) == [("returned", "x")], "which has no limit now"
    assert of.bands()["set"] == "flight" and of.bands()["signals"] == {"temp_c": {"red_high": 60.0}}
    assert told(feed(of, 2, temp_c=70.0, x=2.0)[1]) == [("raised", "temp_c")]
    assert of.use(of.limits.using("bench"), at(3)) == ()
    assert told(feed(of, 4, temp_c=70.0, x=2.0)[1]) == [("returned", "temp_c"), ("back", "x")]


def test_limits_by_board():
    file = b'active = "a"\n[sets.a]\n[[sets.a.signals]]\nname = "t"\nboard = "Pi*"\nred_high = 1\n'
    of = fleet(file)
    assert of.telemetry("n", "Jetson", [sample("t", 2.0)], at(0)) == ({}, ())
    assert of.telemetry("n", "Pi 5", [sample("t", 2.0)], at(1))[0] == {"t": "r"}
    letters, changes = of.telemetry("n", "Jetson", [sample("t", 2.0)], at(2))
    assert letters == {} and told(changes) == [("returned", "t")]


def test_replay_letters_leave_no_trace():
    of = fleet()
    assert of.letters("sat-1", "pi", [sample("temp_c", 81.0), sample("temp_c.a", None), sample("y", 1.0)]) == {
        "temp_c": "r",
        "temp_c.a": "?",
    }
    assert of.standing() == []


# ---------------------------------------------------------------- bounds


def test_one_node_does_not_crowd_out_the_others():
    of = fleet()
    for second in range(3):
        of.telemetry("evil", "", [sample(f"{i}x", 2.0) for i in range(1000)], at(second))
        for i in range(200):
            of.event(Event("evil", UTC_S, "severe", f"kind{i}", ""), at(second))
    rows = of.standing()
    assert len(rows) == alarms_fleet.MAX_ALARMS + 1 and [row["signal"] for row in rows].count(FULL) == 1
    assert of.not_kept > 0
    assert told(feed(of, 5, temp_c=81.0)[1]) == [("raised", "temp_c")]
    for row in rows:
        of.clear(row["id"], "ann", "", at(6), force=True)
    assert [row["node"] for row in of.standing()] == ["sat-1"]
    assert told(of.event(Event("evil", UTC_S, "severe", "later", ""), at(7))) == [("raised", "event:later")]


def test_nodes_are_bounded():
    of = fleet()
    for i in range(alarms_fleet.MAX_NODES + 5):
        of.telemetry(f"n{i}", "", [sample("temp_c", 81.0)], at(0))
    assert len(of.standing()) == alarms_fleet.MAX_NODES and of.not_kept == 5


# ---------------------------------------------------------------- restart


def test_alarms_outlive_the_ground_station(tmp_path):
    of = fleet()
    with Archive(tmp_path / "archive.db") as archive:

        def keep(changes) -> None:
            for change in changes:
                archive.alarm(change.record())

        keep(feed(of, 0, temp_c=81.0, x=2.0)[1])
        keep(of.event(Event("sat-1", UTC_S, "critical", "hang", "it hangs"), at(1)))
        keep(of.tick({"sat-1": Sight(False, 9.0)}, at(2)))
        by_signal = {row["signal"]: row["id"] for row in of.standing()}
        keep(of.acknowledge(by_signal["temp_c"], "ann", "fan ordered", at(3)))
        keep(of.clear(by_signal["event:hang"], "ann", "", at(4)))
        before = of.standing()
    records = ArchiveReader(tmp_path / "archive.db").alarms()
    again = fleet()
    assert again.restore(records, at(0)) == 3
    after = again.standing()
    told_of = ("id", "node", "signal", "kind", "level", "severity", "state", "since_utc_s", "who", "comment", "text")
    assert [{key: row[key] for key in told_of} for row in after] == [
        {key: row[key] for key in told_of} for row in before
    ]
    assert again.restore(records, at(0)) == 0, "not twice"
    assert told(feed(again, 5, temp_c=50.0, x=2.0)[1]) == [("cleared", "temp_c")]
    assert told(again.tick({"sat-1": Sight(True, 0.1)}, at(5))) == [("returned", NODE)]
    assert told(feed(again, 6, x=0.0)[1]) == [("returned", "x")]
    assert fleet().standing() == [], "without the archive they would be lost"
    without = fleet(b'active = "a"\n[sets.a]\n')
    without.restore(records, at(0))
    assert sorted(told(feed(without, 5, x=2.0)[1])) == [("cleared", "temp_c"), ("returned", "x")], (
        "they have no limit now"
    )


# ---------------------------------------------------------------- the quick way is the same way


@given(
    st.lists(
        st.tuples(
            st.sampled_from([50.0, 74.0, 76.0, 79.0, 81.0, None, math.nan]),
            st.sampled_from(["ok", "ok", "ok", "stale"]),
        ),
        max_size=40,
    )
)
def test_it_does_what_the_state_machine_does(samples):
    file = FILE.replace(b"red_high = 80", b"red_high = 80\npersistence_up = 2\npersistence_down = 2\nhysteresis = 2", 1)
    of = fleet(file)
    state = SignalState(of.limits.of_node("sat-1", "pi")["temp_c"], Latch("sat-1", "temp_c"))
    for second, (value, validity) in enumerate(samples):
        letters, changes = of.telemetry("sat-1", "pi", [sample("temp_c", value, validity)], at(second))
        state, expected = alarms.apply(state, Reading(value, "degC", validity), at(second))
        assert changes == expected
        known = validity == "ok" and value is not None and not math.isnan(value)
        assert letters == {"temp_c": "gwydrs"[state.limit.severity(state.standing.zone)] if known else "?"}
    assert [row["id"] for row in of.standing()] == ([] if state.latch.alarm is None else [state.latch.alarm.id])


def test_threads_do_not_disturb_each_other():
    """Telemetry, ticks and operators at once: at the end what stands is what the changes say."""
    of, all_changes, lock, failed = fleet(), [], threading.Lock(), []

    def run(work) -> None:
        try:
            for i in range(150):
                changes = work(i)
                with lock:
                    all_changes.extend(changes)
        except Exception as error:  # a thread's exception would be lost
            failed.append(error)

    def operate(i: int):
        changes = ()
        for row in of.standing()[:3]:
            try:
                changes += of.acknowledge(row["id"], "ann", "", at(i))
            except AlarmError:
                pass
        return changes

    def telemetry(node: str):
        return lambda i: of.telemetry(node, "pi", [sample("temp_c", 81.0 if i % 3 else 50.0)], at(i))[1]

    works = [telemetry("a"), telemetry("b"), operate, lambda i: of.tick({"c": Sight(i % 2 == 0, 0.0)}, at(i))]
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed

    def ids(what: str) -> set[str]:
        return {change.alarm.id for change in all_changes if change.what == what}

    assert ids("raised") - ids("cleared") == {row["id"] for row in of.standing()}
    for node in "ab":
        all_changes += of.telemetry(node, "pi", [sample("temp_c", 50.0)], at(200))[1]
    all_changes += of.tick({"c": Sight(True, 0.0)}, at(200))
    for row in of.standing():
        all_changes += of.acknowledge(row["id"], "ann", "", at(201)) if row["state"] != "acknowledged" else ()
    assert of.standing() == [] and ids("raised") == ids("cleared") and ids("raised")
