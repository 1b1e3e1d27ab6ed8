"""Store-and-forward, pure: what a node keeps, which numbers the ground station has, the clock's offset, and their merging.

References: sets of integers for the spans, hand calculation for the ring, RFC 5905 (section 8) for the four stamps.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_rig import toml

from ground_station import received
from ground_station.fleet import ASK_HISTORY_AFTER_S, AskHistory, AskRebirth, Instant, NodeState, apply, reconnected
from ground_station.received import Received
from node_agent import clock, config, wire
from node_agent.control import Control as NodeControl
from node_agent.counters import Counters
from node_agent.history import History, RangesError, parse_ranges

# ---------------------------------------------------------------- the ring on the node


def filled(count: int, owed=lambda number: True, **limits) -> History:
    history = History(**limits)
    for number in range(1, count + 1):
        history.keep(number, f'{{"n":{number}}}'.encode(), owed(number))
    return history


def drain(history: History, max_bytes: int = 100) -> list[int]:
    """Numbers of all batches, each of which arrives."""
    got = []
    while (batch := history.next_batch(max_bytes))[0]:
        got += batch[0]
        history.arrived(batch[0])
    return got


def test_the_oldest_goes_first_and_only_what_nobody_got_is_counted():
    history = filled(50, owed=lambda number: number > 10, max_messages=20)
    # by hand: 31..50 are held; of the 30 that went, 10 had been sent
    assert (len(history), history.oldest, history.dropped, history.owed) == (20, 31, 20, 20)
    assert drain(history) == list(range(31, 51)) and history.owed == 0 and len(history) == 20


def test_bytes_are_bounded():
    history = History(max_bytes=10_000)
    for number in range(1, 101):
        history.keep(number, random.Random(number).randbytes(1000), True)  # noise does not get smaller
    assert history.kept_bytes <= 10_000 and len(history) == 9 and history.dropped == 91


def test_an_hour_of_telemetry_fits_the_default_bounds():
    samples = tuple(
        wire.Sample(f"power_w.rail_{i}", random.Random(i).random(), "W", "ok", "measured", "rail", 1.7e9 + i)
        for i in range(50)
    )
    history = History()
    for number in range(1, 3601):
        message = wire.Telemetry("n1", 1, number, 1.7e9 + number, samples, 1, number)
        history.keep(number, wire.encode(message), True)
    assert 3600 * len(wire.encode(message)) > 2 * 8_000_000 > history.kept_bytes  # as JSON it would not fit
    assert (len(history), history.dropped, history.oldest) == (3600, 0, 1)
    history.keep(3601, b"{}", True)
    assert (len(history), history.dropped, history.oldest) == (3600, 1, 2)


def test_the_table_history_of_the_configuration_is_what_counts(tmp_path):
    tables = {
        "node": {"id": "n1", "fleet": "test", "state_dir": str(tmp_path)},
        "data": {"endpoint": "tcp://127.0.0.1:5555"},
        "broker": {"host": "127.0.0.1", "port": 9},
        "history": {"max_messages": 7},
    }
    settings = config.parse(toml(tables), tmp_path)
    control = NodeControl(settings, settings.broker, Counters(), lambda _: None, lambda *_: (True, ""))
    for number in range(1, 11):
        control._forwarder.keep(number, b"{}", sent=False)
    counts = {sample.name: sample.value for sample in control._forwarder.samples(0.0)}
    assert counts == {"history_kept": 7.0, "history_owed": 7.0, "history_dropped": 3.0}  # 10 - 7


def test_batches_are_bounded_in_order_and_never_twice_under_way():
    history = filled(30)
    first, payloads = history.next_batch(100)
    assert first == tuple(range(1, len(first) + 1)) and sum(map(len, payloads)) + len(payloads) <= 100
    second, _ = history.next_batch(100)
    assert second[0] == first[-1] + 1
    history.came_back(first)  # its connection broke
    history.arrived(second)
    assert drain(history) == [*first, *range(second[-1] + 1, 31)]


def test_a_message_above_the_batch_limit_goes_alone():
    history = History()
    history.keep(1, b"x" * 500, True)
    history.keep(2, b"y", True)
    assert history.next_batch(100)[0] == (1,) and history.next_batch(100)[0] == (2,)


def test_what_was_sent_can_be_asked_for_again_and_dropped_is_not_counted_twice():
    history = filled(20, owed=lambda number: False, max_messages=10)
    assert history.next_batch()[0] == () and history.dropped == 0
    assert history.owe(((1, 12), (15, 15), (19, 10**18))) == 2 + 1 + 2
    assert drain(history) == [11, 12, 15, 19, 20]


def test_a_batch_is_what_wire_decodes():
    messages = [wire.Telemetry("n1", 2, seq, 5.0 + seq, (), 1, seq + 1) for seq in range(3)]
    head = wire.History("n1", 1, 1, 0, 7, ())
    payload = wire.encode_history(head, [wire.encode(message) for message in messages])
    assert wire.decode(wire.History, payload) == replace(head, messages=tuple(messages))
    assert json.loads(wire.encode_history(head, []))["messages"] == []


def test_ranges():
    assert parse_ranges("3-9,12-12") == ((3, 9), (12, 12))
    for bad in (
        "",
        "3",
        "3-",
        "a-b",
        "-1-3",
        "1-2,",
        "1-2;3-4",
        "1-2," * 100 + "1-2",
        "9" * 5000 + "-1",
        "1-" + "9" * 20,
    ):
        with pytest.raises(RangesError):
            parse_ranges(bad)


# ---------------------------------------------------------------- spans against sets


@given(st.lists(st.one_of(st.integers(1, 40), st.integers(-40, -1)), max_size=60))
@settings(max_examples=150, deadline=None)
def test_spans_are_what_sets_say(steps):
    """A positive step is a number that comes, a negative one gives up what is missing below it."""
    spans, came, gone = Received(), set(), set()
    for step in steps:
        known = came | gone
        if step > 0:
            spans = spans.add(step)
            came |= {step} - gone
        else:
            spans = spans.give_up(-step)
            if known and min(known) < -step:
                gone |= {n for n in range(min(known), min(-step, max(known))) if n not in known}
        known = came | gone
        assert {n for n in range(0, 45) if spans.has(n)} == known
        assert spans.gone == len(gone)
        missing = {n for first, last in spans.missing() for n in range(first, last + 1)}
        assert missing == ({n for n in range(min(known), max(known)) if n not in known} if known else set())


def test_spans_are_bounded(monkeypatch):
    monkeypatch.setattr(received, "MAX_SPANS", 3)
    spans = Received()
    for number in (1, 3, 5, 7, 9):
        spans = spans.add(number)
    assert len(spans.spans) == 3 and spans.gone == 2 and spans.spans[0] == (1, 5)


# ---------------------------------------------------------------- clock


def test_four_stamps_by_hand():
    # the ground is 100 s ahead, 30 ms there, 10 ms in the ground station, 50 ms back
    exchange = clock.Exchange(10.000, 110.030, 110.040, 10.090)
    assert exchange.delay_s == pytest.approx(0.080)
    assert exchange.offset_s == pytest.approx(99.990)  # wrong by half of the difference of both ways, 10 ms


@given(
    st.lists(st.tuples(st.floats(1e-4, 2.0), st.floats(1e-4, 2.0), st.floats(0, 0.5)), min_size=1, max_size=30),
    st.floats(-1e9, 1e9),
    st.floats(-clock.DRIFT, clock.DRIFT),
)
@settings(max_examples=200, deadline=None)
def test_the_truth_is_within_the_bound(ways, offset_s, drift):
    """Whatever both ways take, and however the crystal drifts within its bound."""
    filtered, now_s = clock.OffsetFilter(), 1000.0

    def ground(node_s: float) -> float:
        return node_s + offset_s + drift * (node_s - 1000.0)

    for there_s, back_s, inside_s in ways:
        sent_s = now_s
        now_s += there_s
        received_s = ground(now_s)
        now_s += inside_s
        answered_s = ground(now_s)
        now_s += back_s
        assert filtered.add(clock.Exchange(sent_s, received_s, answered_s, now_s))
        now_s += 16.0
        best = filtered.best(now_s)
        slack_s = 1e-6 + clock.DRIFT * (there_s + inside_s + back_s)
        assert abs(best.offset_s - (ground(now_s) - now_s)) <= best.uncertainty_s + slack_s


def test_the_quickest_exchange_counts_until_it_is_old():
    filtered = clock.OffsetFilter()
    filtered.add(clock.Exchange(0.0, 100.0, 100.0, 0.002))
    filtered.add(clock.Exchange(16.0, 116.9, 116.9, 17.0))  # a second on the way
    assert filtered.best(17.0).offset_s == pytest.approx(99.999)
    assert filtered.best(17.0).uncertainty_s == pytest.approx(0.001 + 50e-6 * 16.998)
    filtered.add(clock.Exchange(20_000.0, 20_100.9, 20_100.9, 20_001.0))
    assert filtered.best(20_001.0).offset_s == pytest.approx(100.4)  # the first may be 1 s off by now, this one 0.5 s
    for exchange in (
        clock.Exchange(0, float("nan"), 0, 1),
        clock.Exchange(0, 5, 4, 1),
        clock.Exchange(0, 5, 9, 1),
        clock.Exchange(0, 5, 5, 31),
    ):
        assert not filtered.add(exchange)


def test_the_offset_follows_a_utc_clock_that_is_set():
    now = {"mono": 50.0, "utc": 20.0}  # a board without an RTC: 1970
    board = clock.GroundClock(lambda: now["mono"], lambda: now["utc"])
    assert board.offset() is None and board.utc_s() == 20.0
    assert [sample.validity for sample in board.samples(0.0)] == ["missing", "missing"]
    identity, sent_utc_s = board.question()
    assert sent_utc_s == 20.0 and board.question() is None  # not again at once
    now["mono"], now["utc"] = 50.2, 20.2
    assert not board.answered("another", 1.7e9, 1.7e9)
    assert board.answered(identity, 1.7e9 + 0.1, 1.7e9 + 0.1)
    assert not board.answered(identity, 1.7e9, 1.7e9)  # replayed
    assert board.utc_s() == pytest.approx(1.7e9 + 0.2, abs=1e-3)
    now["utc"] = 1.7e9 + 7.2  # somebody sets it, 7 s wrong
    assert board.offset().offset_s == pytest.approx(-7.0, abs=1e-3)
    got = {sample.name: sample.value for sample in board.samples(0.0)}
    assert got["clock_offset_s"] == pytest.approx(-7.0, abs=1e-3) and got["clock_uncertainty_s"] == pytest.approx(0.1)


# ---------------------------------------------------------------- merging at the ground station

BIRTH = wire.Birth("n1", 4, "0.1.0", "bench", 100.0, (), (), "b", 1000, "")
ONLINE = wire.Status("n1", "online", 4)


def at(seconds: float) -> Instant:
    return Instant(1e9 + seconds, seconds)


def telemetry(number: int, seq: int | None = None, bd_seq: int = 4, run: int = 4, **values: float) -> wire.Telemetry:
    samples = tuple(
        wire.Sample(name, value, "s", "ok", "derived", "agent", 100.0 + number) for name, value in values.items()
    )
    return wire.Telemetry("n1", bd_seq, number if seq is None else seq, 100.0 + number, samples, run, number)


def history(*messages: wire.Telemetry, oldest: int = 1, dropped: int = 0, run: int = 4) -> wire.History:
    return wire.History("n1", run, oldest, dropped, 0, messages)


def play(state: NodeState, *messages, start_s: float = 0.0) -> tuple[NodeState, list, list[int]]:
    """State, actions and the numbers that were taken, of messages one second apart."""
    actions, numbers = [], []
    for second, message in enumerate(messages):
        state, more = apply(state, message, at(start_s + second))
        actions += more
        numbers += [taken.telemetry.number for taken in state.taken]
    return state, actions, numbers


def test_history_after_an_outage_fills_the_gap_once_and_asks_for_no_rebirth():
    reborn = (replace(BIRTH, bd_seq=5), replace(ONLINE, bd_seq=5))
    state, actions, numbers = play(
        NodeState("n1"),
        *(BIRTH, ONLINE, telemetry(1), telemetry(2)),
        *(*reborn, telemetry(6, 1, 5)),
        *(history(telemetry(3), telemetry(4)), history(telemetry(4), telemetry(5))),
        telemetry(7, 2, 5),
    )
    assert actions == [] and numbers == [1, 2, 6, 3, 4, 5, 7]
    assert (state.counts.history, state.counts.history_repeated, state.counts.telemetry) == (3, 1, 4)
    assert (state.counts.telemetry_gone, state.received.missing(), state.samples) == (0, (), {})


def test_what_is_gone_is_counted_exactly():
    state, _, numbers = play(
        NodeState("n1"),
        *(BIRTH, ONLINE, telemetry(1), telemetry(50)),
        history(*map(telemetry, range(31, 41)), oldest=31, dropped=29),
        history(*map(telemetry, range(41, 50)), oldest=31, dropped=29),
    )
    # by hand: 2..30 are gone
    assert (state.counts.telemetry_gone, state.dropped_on_board, len(numbers)) == (29, 29, 21)
    assert state.received.missing() == ()


def test_what_stays_away_is_asked_for():
    state, actions, _ = play(NodeState("n1"), BIRTH, ONLINE, telemetry(1), telemetry(3, 2))
    later = [telemetry(number, number - 1) for number in range(4, 17)]
    state, actions, _ = play(state, *later, start_s=4.0)
    assert actions == [AskHistory("n1", 4, ((2, 2),))]
    # while history comes nothing is asked for, and what the node no longer has is given up
    state, actions, _ = play(state, history(oldest=3), telemetry(17, 16), start_s=3 + 2 * ASK_HISTORY_AFTER_S)
    assert actions == [] and state.counts.telemetry_gone == 1 and state.received.missing() == ()


def test_a_lost_live_message_asks_for_a_rebirth_and_comes_as_history():
    """As before: a gap in seq may mean a session that was missed. The message itself is not lost."""
    state, actions, _ = play(NodeState("n1"), BIRTH, ONLINE, telemetry(1), telemetry(3), history(telemetry(2)))
    assert [type(action) for action in actions] == [AskRebirth]
    assert (state.counts.telemetry_lost, state.counts.history, state.counts.telemetry_gone) == (1, 1, 0)


def test_after_the_ground_station_was_away_itself_a_gap_is_no_fault_of_the_node():
    state, _, _ = play(NodeState("n1"), BIRTH, ONLINE, telemetry(1))
    state, actions, numbers = play(
        reconnected(state), telemetry(60), history(*map(telemetry, range(2, 60))), telemetry(60)
    )
    assert actions == [] and numbers == [60, *range(2, 60)]
    assert (state.counts.telemetry_replayed, state.counts.telemetry_lost) == (1, 0)


def test_an_agent_that_starts_again_counts_anew():
    state, _, _ = play(NodeState("n1"), BIRTH, ONLINE, telemetry(900))
    assert state.received.missing() == ()  # what came before we did is not ours to ask for
    second = {"bd_seq": 5, "run": 5}
    state, actions, numbers = play(
        state,
        *(replace(BIRTH, bd_seq=5), replace(ONLINE, bd_seq=5)),
        *(telemetry(3, **second), history(telemetry(1, **second), telemetry(2, **second), run=5)),
        history(telemetry(899), run=4),
    )
    assert (actions, numbers, state.received.spans) == ([], [3, 1, 2], ((0, 3),))
    assert state.counts.history_repeated == 1


def test_history_of_others_is_refused():
    strange = (replace(telemetry(5), node="n2"), telemetry(6, run=9), telemetry(0))
    state, _, numbers = play(NodeState("n1"), history(*strange))
    assert numbers == [] and state.counts.history_refused == 3


def test_times_are_kept_raw_and_corrected():
    """A board that wakes up in 1970, learns its offset in message 3, and has its clock set before message 4."""
    kept = [telemetry(number, uptime_s=10.0 + number) for number in (1, 2)]
    known = telemetry(3, uptime_s=13.0, clock_offset_s=1e9, clock_uncertainty_s=0.01)
    set_right = replace(
        telemetry(4, uptime_s=14.0, clock_offset_s=0.5, clock_uncertainty_s=0.01), generated_at=1e9 + 103.5
    )
    state, _, _ = play(NodeState("n1"), BIRTH, ONLINE, known, set_right)
    assert state.latest.generated_utc_s == pytest.approx(1e9 + 104.0) and state.latest.uncertainty_s == 0.01
    state, _ = apply(state, history(*kept), at(9.0))
    assert [taken.telemetry.generated_at for taken in state.taken] == [101.0, 102.0]  # as the board says
    assert [taken.generated_utc_s for taken in state.taken] == [pytest.approx(1e9 + 101), pytest.approx(1e9 + 102)]
    assert all(taken.late and taken.received == at(9.0) for taken in state.taken)
    first = state.taken[0]
    assert first.sample_utc_s(first.telemetry.samples[0]) == pytest.approx(1e9 + 101)
    unknown, _, _ = play(NodeState("n1"), BIRTH, ONLINE, telemetry(1, uptime_s=3.0))
    assert unknown.latest.generated_utc_s is None and unknown.latest.uncertainty_s is None
