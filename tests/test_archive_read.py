"""Reading an archive: trends against the same sums done by hand, gaps, filters, limits, and indexes that are really used."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from archive_rig import NOW_UTC_S, birth, event, taken
from hypothesis import given, settings
from hypothesis import strategies as st

from ground_station import archive_schema, archive_trend
from ground_station.archive import Archive
from ground_station.archive_read import MAX_LINES, MAX_POINTS, ArchiveReader
from ground_station.archive_records import AlarmRecord, CommandRecord, RequestRecord, Retention
from ground_station.fleet import Taken
from node_agent.wire import Birth

START_UTC_S = NOW_UTC_S - 7200
SECONDS = 3600
QUIET = range(1500, 1800)  # nothing came then


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """An archive of an hour at about 1 Hz of two nodes, with a gap; (folder, {second: value of s0 of n1})."""
    folder, chance, sent = tmp_path_factory.mktemp("hour"), random.Random(5), {}
    with Archive(folder, Retention(None)) as kept:
        for second in range(SECONDS):
            if second in QUIET:
                continue
            value = None if second % 100 == 7 else chance.gauss(50, 5)
            sent[second] = value
            at_s = START_UTC_S + second + chance.uniform(0, 0.2)
            kept.telemetry("n1", taken("n1", second + 1, [value, float(second)], at_s))
            kept.telemetry("n2", taken("n2", second + 1, [-1.0, -2.0, -3.0], at_s, unit="W", provenance="simulated"))
    return folder, sent


def test_buckets_hold_what_is_in_them(hour):
    folder, sent = hour
    with ArchiveReader(folder) as reader:
        trend = reader.trend("n1", "s0", START_UTC_S, START_UTC_S + SECONDS, 60)
    assert (trend.bucket_s, len(trend.at_utc_s), trend.unit, trend.provenance) == (60.0, 60, "degC", "measured")
    assert trend.provenances == ("measured",) and not trend.cut and trend.other_units == ()
    for place in range(60):
        inside = [sent[second] for second in range(60 * place, 60 * place + 60) if second in sent]
        good = [value for value in inside if value is not None]
        assert (trend.count[place], trend.bad[place]) == (len(good), len(inside) - len(good))
        assert trend.at_utc_s[place] == pytest.approx(START_UTC_S + 60 * place + 30)
        if good:
            assert (trend.min[place], trend.max[place], trend.last[place]) == (min(good), max(good), good[-1])
            assert trend.mean[place] == pytest.approx(math.fsum(good) / len(good), rel=1e-12)
        else:
            assert (trend.min[place], trend.max[place], trend.mean[place], trend.last[place]) == (None,) * 4
    assert [place for place in range(60) if trend.count[place] == 0] == list(range(25, 30))


def test_few_values_are_shown_as_they_are_with_the_gap_between(hour):
    folder, sent = hour
    with ArchiveReader(folder) as reader:
        trend = reader.trend("n1", "s0", START_UTC_S + 1490, START_UTC_S + 1810, 600)
    values = [sent[second] for second in range(1490, 1810) if second in sent]
    at_gap = trend.count.index(0)
    assert trend.bucket_s == 0.0 and trend.last[:at_gap] + trend.last[at_gap + 1 :] == values
    assert START_UTC_S + 1600 < trend.at_utc_s[at_gap] < START_UTC_S + 1700 and trend.last[at_gap] is None
    assert trend.min == trend.max == trend.mean == trend.last


def test_points_close_to_the_rate_leave_no_holes(hour):
    """600 buckets for 1000 values at about 1 Hz: narrower ones would be empty here and there."""
    folder, _ = hour
    with ArchiveReader(folder) as reader:
        trend = reader.trend("n1", "s1", START_UTC_S, START_UTC_S + 1000, 900)
    assert min(trend.count) > 0 and sum(trend.count) == 1000 and len(trend.count) <= 900


def test_what_the_archive_holds(hour):
    folder, _ = hour
    with ArchiveReader(folder) as reader:
        assert [each.node for each in reader.nodes()] == ["n1", "n2"]
        assert reader.nodes()[0].last_utc_s - reader.nodes()[0].first_utc_s == pytest.approx(3599, abs=0.5)
        shown = [(each.name, each.unit, each.provenance, each.scope) for each in reader.signals("n2")]
        assert shown == [(f"s{place}", "W", "simulated", "board") for place in range(3)]
        assert reader.signals("n2")[0].last_utc_s - reader.signals("n2")[0].first_utc_s == pytest.approx(3599, abs=61)
        assert reader.signals("n3") == [] and reader.trend("n3", "s0", 0, 1, 5) is None
        assert reader.trend("n1", "s2", 0, 1, 5) is None
        nothing = reader.trend("n1", "s0", 0, 1, 5)
        assert nothing.unit == "degC" and nothing.at_utc_s == []


def test_a_signal_that_changes_keeps_to_its_latest_unit(tmp_path):
    with Archive(tmp_path, Retention(None)) as kept:
        for second in range(300):
            unit = "K" if second < 100 else "degC"
            provenance = "simulated" if second < 200 else "measured"
            # from 200 on it stands elsewhere in the message
            made = taken("n1", second + 1, [0.0] * (second >= 200) + [float(second)], NOW_UTC_S + second, unit=unit)
            samples = tuple(replace(each, provenance=provenance) for each in made.telemetry.samples)
            samples = (*samples[:-1], replace(samples[-1], name="temp_c"))
            kept.telemetry("n1", replace(made, telemetry=replace(made.telemetry, samples=samples)))
    with ArchiveReader(tmp_path) as reader:
        trend = reader.trend("n1", "temp_c", NOW_UTC_S, NOW_UTC_S + 400, 1000)
        assert trend.last == [float(second) for second in range(100, 300)]
        assert (trend.unit, trend.provenance, trend.other_units) == ("degC", "measured", ("K",))
        assert trend.provenances == ("measured", "simulated")


def test_time_is_that_of_making_as_well_as_it_is_known(tmp_path):
    """Corrected by the ground's clock; else the arrival of what came at once, and the node's stamp of what came late."""
    wrong = taken("n1", 1, [1.0], 1000.0)  # a board without a clock
    with Archive(tmp_path, Retention(None)) as kept:
        kept.telemetry("n1", replace(wrong, received=replace(wrong.received, utc_s=NOW_UTC_S)))
        kept.telemetry("n1", replace(taken("n1", 2, [2.0], 1001.0), generated_utc_s=NOW_UTC_S + 5, uncertainty_s=0.1))
        kept.telemetry("n1", taken("n1", 3, [3.0], NOW_UTC_S - 60, late=True))
    with ArchiveReader(tmp_path) as reader:
        trend = reader.trend("n1", "s0", NOW_UTC_S - 100, NOW_UTC_S + 100, 1000)
        shown = [(at_s, value) for at_s, value in zip(trend.at_utc_s, trend.last) if value is not None]
        assert shown == [(NOW_UTC_S - 60, 3.0), (NOW_UTC_S, 1.0), (NOW_UTC_S + 5, 2.0)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1000), st.floats(-1e308, 1e308), st.booleans()), max_size=60),
    st.integers(1, 50),
)
def test_no_value_is_lost_or_made_up(rows, points):
    rows.sort(key=lambda row: row[0])
    at_s, values, ok = (np.array([row[place] for row in rows], kind) for place, kind in enumerate((float, float, bool)))
    found = archive_trend.down(at_s, values, ok, 0.0, 1000.0, points)
    assert len(found.at_utc_s) <= points
    assert len({*map(len, (found.at_utc_s, found.min, found.max, found.mean, found.last, found.count, found.bad))}) == 1
    assert sum(found.count) == ok.sum() and sum(found.bad) == (~ok).sum()
    good = values[ok].tolist()
    assert [low is None for low in found.min] == [count == 0 for count in found.count]
    if good:
        assert min(low for low in found.min if low is not None) == min(good)
        assert max(high for high in found.max if high is not None) == max(good)
        for low, mean, high, last in zip(found.min, found.mean, found.max, found.last):
            if low is not None:
                slack = 1e-9 * max(abs(low), abs(high))
                assert low - slack <= mean <= high + slack and last in good


# ---------------------------------------------------------------- records


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    with Archive(folder, Retention(None)) as kept:
        for place in range(100):
            at_s, node = START_UTC_S + place, f"n{place % 2}"
            severity = ("info", "watch", "critical")[place % 3]
            kept.event(event(node, at_s, f"Text {place} 100%_\\", severity, "kind"), at_s)
            kept.command(CommandRecord(f"c{place}", "ann", at_s, node, "ping", {}, "ok"))
            kept.request(RequestRecord(f"r{place}", "chat", at_s))
            kept.alarm(AlarmRecord("a", at_s, node, "s0", "red high", "critical", "active", float(place)))
    return folder


def test_records_are_filtered_and_limited(records):
    with ArchiveReader(records) as reader:
        for ask in (reader.events, reader.commands, reader.requests, reader.alarms):
            assert len(ask()) == 100
            some = ask(START_UTC_S + 10, START_UTC_S + 20)
            assert [each.at_utc_s for each in some] == [START_UTC_S + place for place in range(10, 21)]
            assert ask(lines=3) == ask()[-3:]
            for lines in (0, -1, MAX_LINES + 1):
                with pytest.raises(ValueError, match="lines: give 1 to"):
                    ask(lines=lines)
        assert (
            {each.node for each in reader.commands(node="n1")}
            == {each.node for each in reader.alarms(node="n1")}
            == {"n1"}
        )
        assert {each.event.node for each in reader.events(node="n1")} == {"n1"}
        assert {each.event.severity for each in reader.events(severity="watch")} == {"watch", "critical"}
        assert [each.event.text for each in reader.events(text="tEXT 42 ")] == ["Text 42 100%_\\"]
        assert len(reader.events(text="KIND")) == 100 and len(reader.events(text="100%_\\")) == 100
        assert reader.events(text="0_100") == [] and reader.events(text="\ud800") == []
        with pytest.raises(ValueError, match="no severity: give one of info, watch"):
            reader.events(severity="bad")


def test_questions_that_cannot_be_are_refused(hour):
    with ArchiveReader(hour[0]) as reader:
        for since_s, until_s, points in (
            (5, 5, 10),
            (math.nan, 5, 10),
            (0, math.inf, 10),
            (0, 5, 0),
            (0, 5, MAX_POINTS + 1),
        ):
            with pytest.raises(ValueError):
                reader.trend("n1", "s0", since_s, until_s, points)


def test_messages_come_in_the_order_of_arrival(tmp_path):
    with Archive(tmp_path, Retention(None)) as kept:
        for place in range(1200):
            at_s = NOW_UTC_S + place // 10  # ten at the same moment, of all kinds
            if place % 3 == 0:
                kept.birth("n1", birth("n1", at_s, place), at_s)
            elif place % 3 == 1:
                kept.event(event("n1", at_s, str(place)), at_s)
            else:
                made = taken("n1", place, [1.0], at_s)
                kept.telemetry("n1", replace(made, received=replace(made.received, utc_s=at_s)))
    with ArchiveReader(tmp_path) as reader:
        order = []
        for kept in reader.messages():
            if isinstance(kept.message, Taken):
                order.append(kept.message.telemetry.number)
            else:
                order.append(kept.message.bd_seq if isinstance(kept.message, Birth) else int(kept.message.text))
        assert order == list(range(1200))
        some = list(reader.messages(NOW_UTC_S + 10, NOW_UTC_S + 11))
        assert len(some) == 20 and {kept.at_utc_s for kept in some} == {NOW_UTC_S + 10, NOW_UTC_S + 11}


def test_times_and_nodes_are_found_by_indexes(hour):
    """What SQLite says it would do, of the questions that were really asked."""
    asked = []
    with ArchiveReader(hour[0]) as reader:
        with reader._connection() as db:
            db.set_trace_callback(asked.append)
        reader.trend("n1", "s0", START_UTC_S, START_UTC_S + 10, 10)
        reader.nodes()
        for ask in (reader.events, reader.commands, reader.requests, reader.alarms):
            ask(START_UTC_S, START_UTC_S + 1)
        reader.tokens("r1")
        list(reader.messages(START_UTC_S, START_UTC_S + 1))
    db = archive_schema.open_to_read(hour[0] / archive_schema.FILE)
    plans = [
        (sql, " | ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}")))
        for sql in asked
        if sql.startswith(("SELECT", "WITH"))
    ]
    db.close()
    assert len(plans) >= 10
    for sql, plan in plans:
        for table in ("t", "telemetry", "events", "births", "commands", "requests", "alarms", "tokens"):
            assert f"SCAN {table}" not in {part.strip() for part in plan.split("|")}, (sql, plan)
    trend = next(plan for sql, plan in plans if sql.startswith("WITH"))
    assert "telemetry_of_node (node=? AND at_utc_s>? AND at_utc_s<?)" in trend
