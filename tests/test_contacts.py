"""Contact plans and routes: hand-worked cases, every walk of small plans second by second, and scipy's Dijkstra."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

from ground_station import contacts
from ground_station.contacts import Contact, ContactError, read
from ground_station.delivery_route import first_part, window_of, windows_over, with_headers
from ground_station.routes import earliest_arrival

KB_S = 8000.0  # bit/s of 1000 bytes per second


def plan(*rows: tuple, buffers: dict[str, int] | None = None) -> contacts.ContactPlan:
    return contacts.plan((Contact(*row) for row in rows), buffers)


# ------------------------------------------------------------ by hand


def test_store_and_forward_by_hand():
    """2000 bytes: a to b takes 2 s and 1 s of flight; b waits from 3 s for its contact at 20 s; 1 s and 0.5 s more."""
    got = earliest_arrival(plan(("a", "b", 0, 10, 1, KB_S), ("b", "c", 20, 30, 0.5, 2 * KB_S)), "a", "c", 2000, 0)
    assert [(hop.contact, hop.depart_s, hop.sent_s, hop.arrive_s) for hop in got.hops] == [
        (0, 0, 2, 3),
        (1, 20, 21, 21.5),
    ]
    assert (got.arrive_s, got.valid_until_s) == (21.5, 10)


def test_a_message_that_does_not_fit_takes_the_next_contact():
    two = plan(("a", "b", 0, 10, 0, KB_S), ("a", "b", 40, 50, 0, KB_S))
    assert earliest_arrival(two, "a", "b", 3000, 7).arrive_s == 10  # just fits
    assert earliest_arrival(two, "a", "b", 3001, 7).arrive_s == 43.001
    assert earliest_arrival(two, "a", "b", 10_001, 0) is None
    assert earliest_arrival(two, "b", "a", 1, 0) is None  # one way
    assert earliest_arrival(two, "a", "b", 1, 50) is None  # over


def test_what_is_booked_goes_first_and_the_old_plan_stays():
    empty = plan(("a", "b", 0, 10, 1, KB_S))
    late = empty.book(earliest_arrival(empty, "a", "b", 3000, 4))
    assert late.busy == {0: ((4, 7),)} and empty.busy == {}
    got = earliest_arrival(late, "a", "b", 6000, 0)  # 4 s before the booking and 2 s after it
    assert got.hops[0].pieces == ((0, 4), (7, 9)) and got.arrive_s == 10
    full = late.book(got)
    assert (
        earliest_arrival(full, "a", "b", 1001, 0) is None and earliest_arrival(full, "a", "b", 1000, 0).arrive_s == 11
    )
    with pytest.raises(ContactError, match="booked at 0 s already"):
        full.book(got)


def test_a_full_buffer_makes_the_later_contact_the_better_one():
    """b holds another's 1000 bytes from 5 to 10 s and has room for 1500: ours of 1000, there at 2 s, could not stay."""
    rows = (
        ("a", "b", 0, 4, 1, KB_S),
        ("a", "b", 11, 15, 1, KB_S),
        ("b", "c", 20, 30, 1, KB_S),
    )
    bounded = replace(plan(*rows, buffers={"b": 1500}), stored={"b": ((5, 10, 1000),)})
    assert [hop.contact for hop in earliest_arrival(bounded, "a", "c", 1000, 0).hops] == [1, 2]
    assert [hop.contact for hop in earliest_arrival(bounded, "a", "c", 500, 0).hops] == [0, 2]
    assert [hop.contact for hop in earliest_arrival(plan(*rows), "a", "c", 1000, 0).hops] == [0, 2]
    assert earliest_arrival(replace(bounded, buffer_bytes={"b": 999}), "a", "c", 1000, 0) is None
    # two messages that were both planned on the empty plan: the second has no room in b and is told so
    empty = plan(*rows, buffers={"b": 1500})
    route = earliest_arrival(empty, "a", "c", 1000, 0)
    assert empty.book(route).stored == {"b": ((1, 21, 1000),)}
    assert earliest_arrival(empty.book(route), "a", "c", 1000, 0) is None
    other = replace(route, hops=earliest_arrival(empty, "a", "c", 1000, 1.5).hops)
    shifted = replace(empty, contacts=(*empty.contacts[:2], replace(empty.contacts[2], to_s=40)))
    other = replace(other, hops=(other.hops[0], replace(other.hops[1], pieces=((21, 22),))))
    with pytest.raises(ContactError, match="no room"):
        shifted.book(route).book(other)


def test_with_few_hops_allowed_the_later_arrival_of_fewer_hops_is_kept():
    rows = (("a", "c", 0, 9, 0, KB_S), ("c", "b", 0, 9, 0, KB_S), ("a", "b", 4, 9, 0, KB_S), ("b", "d", 0, 20, 0, KB_S))
    assert [hop.contact for hop in earliest_arrival(plan(*rows), "a", "d", 1000, 0).hops] == [0, 1, 3]
    assert [hop.contact for hop in earliest_arrival(plan(*rows), "a", "d", 1000, 0, max_hops=2).hops] == [2, 3]
    assert earliest_arrival(plan(*rows), "a", "d", 1000, 0, max_hops=1) is None


# ------------------------------------------------------------ every walk, second by second

PAIRS = ("ab", "ab", "ac", "bc", "cb", "bd", "bd", "cd", "ba")  # of nodes; from a to d there is no contact
SIZE = 600  # bytes: 1, 2 or 3 s at these rates
HORIZON_S = 24


@st.composite
def small_plans(draw):
    """(contacts, busy seconds of each, bytes stored at b and c in each second, buffers): all times are whole seconds."""
    rows, busy = [], []
    for _ in range(draw(st.integers(3, 7))):
        source, target = draw(st.sampled_from(PAIRS))
        from_s = draw(st.integers(0, 15))
        to_s = from_s + draw(st.integers(1, 6))
        rows.append((source, target, from_s, to_s, draw(st.integers(0, 2)), 8 * SIZE / draw(st.integers(1, 3))))
        busy.append(draw(st.sets(st.integers(from_s, to_s - 1), max_size=2)))
    held = {node: draw(st.sets(st.integers(0, HORIZON_S), max_size=6)) for node in "bc"}
    buffers = {
        node: draw(st.sampled_from((SIZE - 1, SIZE, SIZE, 2 * SIZE))) for node in draw(st.sampled_from(("", "b", "bc")))
    }
    return rows, busy, held, buffers


def brute_force(rows, busy, held, buffers, start_s: int, max_hops: int) -> float | None:
    """The best of all walks, by sets of seconds; `held` seconds hold SIZE bytes of others."""
    best = None

    def walk(node, at_s, room_from_s, hops):
        nonlocal best
        if node == "d":
            best = at_s if best is None else min(best, at_s)
            return
        if hops == max_hops:
            return
        for row, taken in zip(rows, busy):
            if row[0] != node:
                continue
            seconds = [s for s in range(row[2], row[3]) if s >= at_s and s not in taken][: round(8 * SIZE / row[5])]
            if len(seconds) < round(8 * SIZE / row[5]):
                continue
            stay = range(room_from_s, seconds[-1] + 1)
            if hops and node in buffers and any(SIZE * (1 + (s in held.get(node, ()))) > buffers[node] for s in stay):
                continue
            walk(row[1], seconds[-1] + 1 + row[4], seconds[0] + row[4], hops + 1)

    walk("a", start_s, start_s, 0)
    return best


@settings(max_examples=150, deadline=None)
@given(small_plans(), st.integers(0, 8), st.integers(1, 4))
def test_routes_are_the_best_of_all_walks(small, start_s, max_hops):
    rows, busy, held, buffers = small
    made = replace(
        plan(*rows, buffers=buffers),
        busy={index: tuple((s, s + 1) for s in sorted(taken)) for index, taken in enumerate(busy)},
        stored={node: tuple((s, s + 1, SIZE) for s in seconds) for node, seconds in held.items()},
    )
    got = earliest_arrival(made, "a", "d", SIZE, start_s, max_hops)
    want = brute_force(rows, busy, held, buffers, start_s, max_hops)
    assert (got and round(got.arrive_s, 6)) == want
    if got is not None:
        assert [made.contacts[hop.contact].source for hop in got.hops][0] == "a" and len(got.hops) <= max_hops
        made.book(got)  # what the search found free is free


def test_the_brute_force_can_disagree():
    rows = [("a", "d", 0, 5, 0, 8.0 * SIZE)]
    assert brute_force(rows, [set()], {}, {}, 0, 1) == 1 and brute_force(rows, [{0}], {}, {}, 0, 1) == 2


def test_always_open_contacts_give_dijkstra_s_paths():
    random = np.random.default_rng(3)
    n, size = 40, 1500
    weights = np.zeros((n, n))
    rows = []
    for source, target in {tuple(pair) for pair in random.integers(0, n, (240, 2)).tolist() if pair[0] != pair[1]}:
        delay_s, rate_bps = random.uniform(0.001, 0.2), random.uniform(1e4, 1e6)
        weights[source, target] = delay_s + 8 * size / rate_bps
        rows.append((f"n{source}", f"n{target}", 0, 1e6, delay_s, rate_bps))
    want = dijkstra(csr_matrix(weights), indices=0)
    made = plan(*rows)
    for node in range(1, n):
        got = earliest_arrival(made, "n0", f"n{node}", size, 0.0, max_hops=n)
        assert got.arrive_s == pytest.approx(want[node], rel=1e-9) if np.isfinite(want[node]) else got is None
    assert np.isfinite(want).sum() > 30


# ------------------------------------------------------------ what is imposed on a transfer


def test_a_message_too_long_for_a_contact_is_cut_and_planned_again():
    """10 s of contact carry 10,000 bytes: they go at once, although a later contact has room for all of it."""
    two = plan(("a", "b", 0, 10, 0.5, KB_S), ("a", "b", 100, 130, 0.5, KB_S))
    part, until_s = first_part(two, "a", "b", 16_000, 0)
    assert (part.size_bytes, part.hops[0].contact, until_s) == (10_000, 0, 100)
    part, until_s = first_part(two, "a", "b", 80_000, 0)  # fits nowhere: a quarter of it would
    assert (part.hops[0].contact, until_s) == (0, 100)
    window = window_of(two, part, 1000.0, until_s)
    assert (window.opens_s, window.closes_s, window.limit_bytes) == (1000, 1010, None)
    part, until_s = first_part(two, "a", "b", 6000, 20)
    assert (part.size_bytes, part.hops[0].depart_s, part.arrive_s) == (6000, 100, 106.5)
    ask = windows_over(two, "a", "b", 1000.0)
    assert ask(20_000, 1010.0)[0].opens_s == 1100 and ask(20_000, 1130.0) == ()
    assert with_headers(4097) > 4097


def test_a_slow_contact_is_left_when_a_fast_one_comes():
    """At 1000 bytes/s until 1000 s, or at 100,000 from 10 s on."""
    both = plan(("a", "b", 0, 1000, 0, KB_S), ("a", "b", 10, 1000, 0, 100 * KB_S))
    part, until_s = first_part(both, "a", "b", 500_000, 0)
    assert part.hops[0].contact == 0 and until_s == 10 and window_of(both, part, 0.0, until_s).closes_s == 10
    part, until_s = first_part(both, "a", "b", 490_000, 10)
    assert part.hops[0].contact == 1 and part.arrive_s == pytest.approx(14.9)


def test_a_booking_of_others_ends_the_window():
    one = plan(("a", "b", 0, 10, 0, KB_S))
    booked = one.book(earliest_arrival(one, "a", "b", 2000, 4))
    window = windows_over(booked, "a", "b", 0.0)(8000, 0.0)[0]
    assert (window.opens_s, window.closes_s) == (0, 4)
    assert windows_over(booked, "a", "b", 0.0)(4000, 4.0)[0].opens_s == 6


def test_a_relay_sends_no_more_than_it_got():
    made = plan(("a", "b", 0, 10, 0, KB_S), ("b", "c", 5, 100, 0, 10 * KB_S))
    part, _ = first_part(made, "a", "c", 8000, 0)
    assert part.size_bytes == 8000 and part.hops[1].depart_s == 8
    assert window_of(made, part, 0.0).limit_bytes == 8000
    part, until_s = first_part(plan(("a", "b", 0, 20, 0, KB_S), ("b", "c", 0, 20, 0, 10 * KB_S)), "a", "c", 13_000, 0)
    assert (part.size_bytes, part.hops[1].depart_s, until_s) == (13_000, 13, float("inf"))
    part, until_s = first_part(made, "a", "c", 80_000, 0)
    assert part.size_bytes == 10_000 and part.hops[1].depart_s == 10 and until_s == float("inf")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20), st.sampled_from((1, 2, 10))), min_size=1, max_size=6),
    st.integers(1, 60_000),
)
def test_a_cut_message_is_through_no_later_than_a_whole_one(rows, size):
    """Follows the windows as a transfer would: it ends, and is never later than the route of the whole message."""
    made = plan(*(("a", "b", from_s, from_s + length_s, 0, rate * KB_S) for from_s, length_s, rate in rows))
    ask, left, now_s = windows_over(made, "a", "b", 0.0), float(size), 0.0
    for _ in range(100):
        coming = ask(max(1, round(left)), now_s)
        if not coming:
            break
        (window,) = coming
        assert window.closes_s > now_s
        begin_s = max(now_s, window.opens_s)
        goes = min(left, (window.closes_s - begin_s) * window.rate_bps / 8)
        left, now_s = left - goes, window.closes_s if goes < left else begin_s + 8 * goes / window.rate_bps
        if left < 0.5:
            break
    else:
        pytest.fail("it never ends")
    whole = earliest_arrival(made, "a", "b", with_headers(size), 0.0)
    if whole is not None:
        assert left < 0.5 and now_s <= whole.arrive_s + 0.05


# ------------------------------------------------------------ files

GOOD = {"source": "a", "target": "b", "from_s": 0, "to_s": 10.5, "delay_s": 0.01, "rate_bps": 1e6}


def toml_of(row: dict) -> str:
    return "[[contact]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in row.items())


def test_plans_are_read_from_toml_and_json(tmp_path):
    for name, text in (
        ("p.toml", toml_of(GOOD) + "[buffer_bytes]\nb = 7\n"),
        ("p.json", json.dumps({"contact": [GOOD], "buffer_bytes": {"b": 7}})),
    ):
        (tmp_path / name).write_text(text)
        got = read(tmp_path / name)
        assert got.contacts == (Contact("a", "b", 0, 10.5, 0.01, 1e6),) and got.buffer_bytes == {"b": 7}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"to_s": 0}, "from_s < to_s"),
        ({"rate_bps": 0}, "rate_bps above 0"),
        ({"delay_s": -1}, "delay_s of 0 or more"),
        ({"source": "b"}, "two node ids"),
        ({"source": "../x"}, "two node ids"),
        ({"source": 5}, "two node ids"),
        ({"from_s": "0"}, "finite numbers"),
        ({"from_s": True}, "finite numbers"),
        ({"rate_bps": 1e999}, "finite numbers"),
        ({"to_s": 10**400}, "too large"),
        ({"more": 1}, "must have just"),
    ],
)
def test_bad_contacts_are_one_line(tmp_path, change, word):
    (tmp_path / "p.json").write_text(json.dumps({"contact": [GOOD | change]}))
    with pytest.raises(ContactError, match=word) as caught:
        read(tmp_path / "p.json")
    assert "\n" not in str(caught.value) and "p.json: contact 1" in str(caught.value)


def test_bad_files_are_one_line(tmp_path):
    for name, text in (
        ("x.toml", "[[contact\n"),
        ("x.json", "["),
        ("x.json", "[" * 100_000),
        ("x.json", json.dumps({"contact": []})),
        ("x.json", json.dumps({"contact": [GOOD], "buffers": {}})),
        ("x.json", json.dumps({"contact": [GOOD], "buffer_bytes": {"a": -1}})),
        ("x.toml", "\xff"),
    ):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(ContactError) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(ContactError, match="give a contact plan"):
        read(tmp_path / "none.toml")


def test_another_package_s_contacts_are_taken_by_their_fields():
    class Row:
        source, target, from_s, to_s, delay_s, rate_bps = "a", "b", 0.0, 1.0, 0.1, 1e6

    assert contacts.plan([Row()]).contacts == (Contact("a", "b", 0.0, 1.0, 0.1, 1e6),)
