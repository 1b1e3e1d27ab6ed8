"""The archive's writer: what is handed over is kept once and comes back exact, hostile text as text."""

from __future__ import annotations

from dataclasses import replace

from archive_rig import NOW_UTC_S, birth, event, taken, telemetry_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ground_station.archive import Archive
from ground_station.archive_read import ArchiveReader
from ground_station.archive_records import (
    AlarmRecord,
    CommandRecord,
    RequestRecord,
    Retention,
    TokenRecord,
)
from ground_station.archive_telemetry import clean, pack, signals_of, signals_text, unpack
from ground_station.fleet import Instant, Taken
from node_agent.wire import Sample, Telemetry

HOSTILE = (
    "<script>alert(1)</script>",
    "'; DROP TABLE telemetry; --",
    "a\x00b",
    "\x1b[31mred\r\n",
    "\u202egnp.exe",
    "\U0001f6f0\ufe0f",
    "half \ud83d of a pair",
    '"quoted",=1+1',
    "%_",
    "",
)


# ---------------------------------------------------------------- telemetry as it was

texts = st.text(st.characters(), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
one_sample = st.builds(
    Sample,
    texts,
    st.none() | numbers,
    texts,
    st.sampled_from(["ok", "stale", "missing", "invalid"]),
    st.sampled_from(["measured", "derived", "estimated", "simulated", "virtual"]),
    texts,
    st.floats(1.7e9, 1.7e9 + 60),
)
int64 = st.integers(-(2**62), 2**62)
messages = st.builds(
    Telemetry, st.just("n1"), int64, int64, st.just(1.7e9), st.lists(one_sample, max_size=8).map(tuple), int64, int64
)


@settings(max_examples=60, deadline=None)
@given(messages, st.booleans(), st.none() | numbers, st.none() | numbers)
def test_a_message_becomes_a_row_and_the_same_message(telemetry, late, ground_s, uncertainty_s):
    came = Taken(telemetry, Instant(1.7e9, 1.0), late, ground_s, uncertainty_s)
    packed = pack("n1", came)
    run, *rest = packed.row
    back = unpack("n1", run, signals_of(signals_text(packed.signals)[1]), rest)
    assert (back.late, back.generated_utc_s, back.uncertainty_s) == (late, ground_s, uncertainty_s)
    assert back.received.utc_s == 1.7e9
    assert replace(back.telemetry, samples=()) == replace(telemetry, samples=())
    assert len(back.telemetry.samples) == len(telemetry.samples)
    for one, other in zip(back.telemetry.samples, telemetry.samples):
        assert abs(one.generated_at - other.generated_at) < 1e-5
        cleaned = {name: clean(getattr(other, name)) for name in ("name", "unit", "scope")}
        assert one == replace(other, generated_at=one.generated_at, **cleaned)


@settings(max_examples=15, deadline=None)
@given(st.lists(messages, min_size=1, max_size=6, unique_by=lambda message: (message.run, message.number)))
def test_messages_go_through_the_file_in_their_order(tmp_path_factory, sent):
    folder = tmp_path_factory.mktemp("archive")
    with Archive(folder, Retention(None)) as kept:
        for place, telemetry in enumerate(sent):
            kept.telemetry("n1", Taken(telemetry, Instant(1.7e9 + place, 1.0), False))
    with ArchiveReader(folder) as reader:
        back = telemetry_of(reader)
    for one, other in zip(back, sent, strict=True):
        assert [sample.value for sample in one.telemetry.samples] == [sample.value for sample in other.samples]
        assert [sample.validity for sample in one.telemetry.samples] == [sample.validity for sample in other.samples]
        assert (one.telemetry.run, one.telemetry.number) == (other.run, other.number)


def test_a_stamp_far_from_the_message_is_kept_exactly(tmp_path):
    far = (Sample("a", 1.0, "", "ok", "measured", "", 1e300), Sample("b", 1.0, "", "ok", "measured", "", 0.0))
    with Archive(tmp_path) as kept:
        kept.telemetry("n1", Taken(Telemetry("n1", 1, 1, NOW_UTC_S, far, 1, 1), Instant(NOW_UTC_S, 1.0), False))
    with ArchiveReader(tmp_path) as reader:
        (back,) = telemetry_of(reader)
    assert [sample.generated_at for sample in back.telemetry.samples] == [1e300, 0.0]


def test_a_message_that_comes_again_is_kept_once(tmp_path):
    with Archive(tmp_path) as kept:
        for number in (1, 2, 3):
            kept.telemetry("n1", taken("n1", number, [1.0], NOW_UTC_S + number))
        kept.flush()
        for number in (1, 2, 3, 4):
            kept.telemetry("n1", taken("n1", number, [2.0], NOW_UTC_S + number, late=True))
        # not the same: another node, another run, and messages that are not counted
        kept.telemetry("n2", taken("n2", 1, [3.0], NOW_UTC_S))
        kept.telemetry("n1", taken("n1", 1, [4.0], NOW_UTC_S, run=8))
        for _ in range(2):
            kept.telemetry("n1", taken("n1", 0, [5.0], NOW_UTC_S))
        kept.flush()
        assert (kept.counts.written, kept.counts.repeated) == ({"telemetry": 8}, 3)
    with ArchiveReader(tmp_path) as reader:
        values = sorted(one.telemetry.samples[0].value for one in telemetry_of(reader))
    assert values == [1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0]


def test_numbers_that_no_column_holds_are_counted_and_take_nothing_with_them(tmp_path):
    with Archive(tmp_path) as kept:
        kept.telemetry("n1", taken("n1", 2**63, [1.0], NOW_UTC_S))
        kept.token(TokenRecord("r", 2**70, 1, "x", NOW_UTC_S, 1.0))
        kept.token(TokenRecord("r", 1, 1, "x", NOW_UTC_S, 1.0))
        kept.event(event("n1", NOW_UTC_S, "x", severity="fatal"), NOW_UTC_S)
        kept.telemetry("n1", taken("n1", 1, [1.0], NOW_UTC_S))
        assert kept.flush()
        assert kept.counts.refused == {"telemetry": 1, "token": 1, "event": 1}
        assert kept.counts.written == {"telemetry": 1, "token": 1} and kept.counts.trouble is None


# ---------------------------------------------------------------- records

COMMAND = CommandRecord("c1", "ann", NOW_UTC_S, "n1", "reboot", {"why": "test"}, "sent")
REQUEST = RequestRecord("r1", "chat", NOW_UTC_S, 5)
ALARM = AlarmRecord("a1", NOW_UTC_S, "n1", "temp_c", "red high", "critical", "active", 91.5, "hot")


def test_records_come_back_as_they_stand_now(tmp_path):
    done = replace(COMMAND, state="ok", text="done", done_utc_s=NOW_UTC_S + 1)
    finished = replace(REQUEST, tokens=2, state="done", energy_j=1.5, energy_scope="boards")
    changes = [ALARM, replace(ALARM, at_utc_s=NOW_UTC_S + 1, state="acknowledged", who="ann", value=None)]
    tokens = [TokenRecord("r1", index, 9, " a", NOW_UTC_S, 12.5, 1, 2, 3, 4, 5, 600, 700, 1) for index in (1, 0)]
    with Archive(tmp_path) as kept:
        for record in (COMMAND, replace(COMMAND, id="c2", at_utc_s=NOW_UTC_S + 2, node="n2")):
            kept.command(record)
        kept.request(REQUEST)
        kept.flush()
        kept.command(done)
        kept.request(finished)
        for token in (*tokens, replace(tokens[0], piece="again")):
            kept.token(token)
        for change in changes:
            kept.alarm(change)
        kept.birth("n1", birth("n1", NOW_UTC_S), NOW_UTC_S)
        kept.event(event("n1", NOW_UTC_S, "hi", "warning"), NOW_UTC_S + 1, "ground")
    with ArchiveReader(tmp_path) as reader:
        assert [each.id for each in reader.commands()] == ["c1", "c2"]
        assert reader.commands(node="n1") == [done]
        assert reader.requests() == [finished]
        assert reader.tokens("r1") == [tokens[1], replace(tokens[0], piece="again")]
        assert reader.tokens("r2") == []
        assert reader.alarms() == changes
        assert [kept.message for kept in reader.messages()] == [
            birth("n1", NOW_UTC_S),
            event("n1", NOW_UTC_S, "hi", "warning"),
        ]
        assert reader.events()[0].source == "ground"


def test_hostile_text_is_kept_as_text(tmp_path):
    with Archive(tmp_path) as kept:
        for place, text in enumerate(HOSTILE):
            made = (Sample(text, 1e308, text, "ok", "measured", text, NOW_UTC_S),)
            telemetry = Telemetry("n1", 1, 1, NOW_UTC_S, made, 1, place + 1)
            kept.telemetry("n1", Taken(telemetry, Instant(NOW_UTC_S + place, 1.0), False))
            kept.event(event("n1", NOW_UTC_S, text, kind=text), NOW_UTC_S + place)
            kept.command(replace(COMMAND, id=f"{place}{text}", who=text, arguments={text: text}, text=text))
            kept.alarm(replace(ALARM, signal=text, text=text))
            kept.token(TokenRecord(text, place, 1, text, NOW_UTC_S, float("nan")))
        kept.flush()
        assert kept.counts.refused == {}
    with ArchiveReader(tmp_path) as reader:
        cleaned = [text.replace("\ud83d", "\\ud83d") for text in HOSTILE]
        back = [one.telemetry.samples[0] for one in telemetry_of(reader)]
        assert [(one.name, one.unit, one.scope, one.value) for one in back] == [
            (text,) * 3 + (1e308,) for text in cleaned
        ]
        assert [one.event.text for one in reader.events()] == [one.event.kind for one in reader.events()] == cleaned
        assert [one.text for one in reader.commands()] == cleaned
        assert [one.arguments for one in reader.commands()] == [{text: text} for text in HOSTILE]
        assert [one.signal for one in reader.alarms()] == cleaned
        assert sorted(one.name for one in reader.signals("n1")) == sorted(cleaned)
        for text in cleaned:
            assert reader.trend("n1", text, NOW_UTC_S - 60, NOW_UTC_S + 60).last == [1e308]
            assert reader.tokens(text)[0].piece == text and reader.tokens(text)[0].total_ms is None
