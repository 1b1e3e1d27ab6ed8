"""Emulated links on hidden states: absolute deadlines both ways, contacts that open and end, and rates that follow the link."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import zmq

from firmware_sim import contact, scenario
from firmware_sim.contact import NO_PATH, Reach
from ground_station import contacts, demo_links, rates
from ground_station.benchmark_links_text import Curve
from ground_station.contacts import Contact
from ground_station.dispatch import Table
from ground_station.link import Failure, Link
from ground_station.link_ways import Live, Planned
from ground_station.paced_link import OUT_OF_CONTACT, Flown, NoContact, PacedLink
from ground_station.placement import Holding
from ground_station.remote import RemoteExperts
from ground_station.scenario_demo import SHIPPED
from node_agent import frame

HUB = "ground"
LONG_S = 1e6


def both_ways(node: str, rate_bps: float, delay_s: float, back_until_s: float = LONG_S) -> list[Contact]:
    return [
        Contact(HUB, node, 0.0, LONG_S, delay_s, rate_bps),
        Contact(node, HUB, 0.0, back_until_s, delay_s, rate_bps),
    ]


class Nodes:
    """Hand-made nodes on real sockets that answer with twice what they got; `heard`: (name, when) of each request."""

    def __init__(self, link: Link, names: tuple[str, ...], works_s: float = 0.0, mute: tuple[str, ...] = ()):
        self._link, self._names, self._works_s, self._mute = link, names, works_s, mute
        self.heard: list[tuple[str, float]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(name,)) for name in names]

    def __enter__(self) -> Nodes:
        for thread in self._threads:
            thread.start()
        assert not self._link.wait_for(set(self._names), 5)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(5)

    def _serve(self, name: str) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.ROUTING_ID, name.encode())
            socket.connect(self._link.endpoint)
            hello = frame.pack(frame.Frame(frame.HELLO, text=name))
            socket.send(hello)
            next_s = time.monotonic() + 1.0
            while not self._stop.is_set():
                if time.monotonic() > next_s:
                    socket.send(hello)
                    next_s += 1.0
                if not socket.poll(10):
                    continue
                request = frame.unpack(socket.recv())
                if request.kind == frame.EXPERTS:
                    self.heard.append((name, time.monotonic()))
                    time.sleep(self._works_s)
                    if name not in self._mute:
                        socket.send(frame.pack(frame.Frame(frame.PARTIAL, request.request_id, x=2 * request.x)))


def request(request_id: int, rows: int = 4) -> tuple[int, bytes]:
    pairs = np.array([(row, 0, 0, 1.0) for row in range(rows)], frame.PAIR)
    x = np.ones((rows, 32), np.float32)
    return request_id, frame.pack(frame.Frame(frame.EXPERTS, request_id, codec="fp32", x=x, pairs=pairs))


# ---------------------------------------------------------------- schedules, by hand


def test_messages_follow_each_other_and_idle_time_earns_nothing():
    ways = Planned(contacts.plan(both_ways("n", 1e6, 0.1)), HUB, 50.0)
    assert ways.send("n", 1000, 60.0, True).there_s == pytest.approx(60.0 + 0.008 + 0.1)
    # handed over while the first is still going out: after it; the other direction is free
    assert ways.send("n", 1000, 60.001, True).there_s == pytest.approx(60.016 + 0.1)
    assert ways.send("n", 500, 60.001, False).there_s == pytest.approx(60.005 + 0.1)
    # a second of idling does not make the next one faster
    assert ways.send("n", 1000, 61.5, True).there_s == pytest.approx(61.508 + 0.1)
    assert ways.is_open("n", 70.0) and not ways.is_open("nobody", 70.0)
    # what would be under way for longer than anybody waits has no way
    assert ways.send("n", 1_000_000, 80.0, True) is None


def test_what_is_booked_is_forgotten_and_a_long_plan_is_looked_at_in_parts():
    rows = [
        Contact(a, b, 100.0 * i, 100.0 * i + 90, 0.01, 1e6) for i in range(300) for a, b in ((HUB, "n"), ("n", HUB))
    ]
    ways = Planned(contacts.plan(rows), HUB, 0.0)
    for i in range(300):
        at_s = 100.0 * i + 45
        for k in range(3):
            assert ways.send("n", 1000, at_s + 0.1 * k, True).there_s == pytest.approx(at_s + 0.1 * k + 0.018)
        assert ways.is_open("n", at_s) and not ways.is_open("n", at_s + 50)
        assert ways.send("n", 1000, at_s + 50, True) is None
    assert len(ways._near.contacts) < 10 and sum(map(len, ways._near.busy.values())) < 10
    # a contact that opens within the patience is waited for
    assert ways.send("n", 1000, 29_999.0, True) is None
    ways = Planned(contacts.plan(rows), HUB, 0.0)
    assert ways.send("n", 1000, 99.0, True).there_s == pytest.approx(100.018)


def test_a_relay_stores_and_forwards_and_two_nodes_share_what_their_routes_share():
    rows = [
        Contact(HUB, "relay", 0, LONG_S, 0.01, 1e6),
        *(Contact("relay", node, 0, LONG_S, 0.02, 1e5) for node in ("a", "b")),
        *(Contact(node, HUB, 0, LONG_S, 0.03, 1e6) for node in ("a", "b")),
    ]
    ways = Planned(contacts.plan(rows), HUB, 0.0)
    assert ways.send("a", 1000, 1.0, True).there_s == pytest.approx(1.0 + 0.008 + 0.01 + 0.08 + 0.02)
    assert ways.send("b", 1000, 1.0, True).there_s == pytest.approx(1.0 + 2 * 0.008 + 0.01 + 0.08 + 0.02)


def reach(time_s: float, up: list[bool], contact_s: list[float], rate_bps: float = 1e6) -> Reach:
    there = np.array(up)
    return Reach(
        time_s,
        np.where(there, 2, NO_PATH),
        np.where(there, 0.05, np.nan),
        np.where(there, rate_bps, np.nan),
        np.array(contact_s),
    )


def test_ways_that_somebody_else_steps():
    now = [reach(0.0, [True, False], [0.0, 0.0])]
    ways = Live(("a", "b"), lambda: now[0])
    assert ways.is_open("a", 1.0) and not ways.is_open("b", 1.0) and not ways.is_open("c", 1.0)
    first = ways.send("a", 1000, 1.0, True)
    assert first.there_s == pytest.approx(1.058)
    assert ways.send("a", 1000, 1.0, True).there_s == pytest.approx(1.066)
    assert ways.send("b", 1000, 1.0, True) is None
    now[0] = reach(10.0, [True, True], [10.0, 3.0])
    assert ways.kept("a", first, 1.1)
    # `a` was out of contact for 4 s of the last 10 and is back: what was under way is lost
    now[0] = reach(20.0, [True, True], [16.0, 13.0])
    assert ways.is_open("a", 1.2) and not ways.kept("a", first, 1.2)
    again = ways.send("a", 1000, 2.0, True)
    now[0] = reach(30.0, [False, True], [26.0, 23.0])
    assert not ways.kept("a", again, 2.1) and not ways.is_open("a", 2.1)
    # at the gateway itself there is no link
    now[0] = reach(40.0, [True, True], [26.0, 33.0], math.nan)
    assert ways.send("b", 10**9, 3.0, True).there_s == pytest.approx(3.05)


# ---------------------------------------------------------------- real sockets


def test_requests_and_answers_wait_for_their_links_and_nobody_waits_for_another():
    """Hand calculation: 2 delay + 8 (request + answer) / rate; the fast node is through while the slow one's request is under way."""
    flown: list[Flown] = []
    plan = contacts.plan(both_ways("far", 1e5, 0.15) + both_ways("near", 1e7, 0.01))
    with Link() as link, Nodes(link, ("far", "near")) as nodes:
        paced = PacedLink(link, Planned(plan, HUB, time.monotonic()), flown.append)
        requests = {"far": request(1), "near": request(2)}
        began_s = time.monotonic()
        # the node's own time is limited, not that on the link
        answers = paced.exchange(requests, 0.25)
        took_s = time.monotonic() - began_s
        assert {node: float(answer.x[0, 0]) for node, answer in answers.items()} == {"far": 2.0, "near": 2.0}
        sizes = {node: len(requests[node][1]) + answers[node].size for node in requests}
        planned_s = {"far": 0.3 + 8 * sizes["far"] / 1e5, "near": 0.02 + 8 * sizes["near"] / 1e7}
        assert [name for name, _ in nodes.heard] == ["near", "far"]
        assert nodes.heard[1][1] - began_s >= 0.15 + 8 * len(requests["far"][1]) / 1e5
        assert [flight.node for flight in flown] == ["near", "far"]
        for flight in flown:
            assert flight.sent_bytes + flight.received_bytes == sizes[flight.node]
            assert flight.measured_s >= planned_s[flight.node] - 1e-3
        assert took_s >= planned_s["far"]
        assert paced.imposed.link_s == pytest.approx(planned_s["far"])
        assert (paced.imposed.exchanges, paced.imposed.messages, paced.imposed.bytes) == (1, 4, sum(sizes.values()))
        assert not paced.imposed.misses
        # control: where the node is at the gateway itself, nothing is imposed
        here = Reach(0.0, np.zeros(2, int), np.zeros(2), np.full(2, np.nan), np.zeros(2))
        free = PacedLink(link, Live(("far", "near"), lambda: here))
        assert isinstance(free.exchange({"far": request(3)}, 5.0)["far"], frame.Frame)
        assert free.imposed.link_s == 0.0


def test_the_nodes_own_time_comes_on_top_and_a_mute_node_is_late():
    plan = contacts.plan(both_ways("slow", 1e7, 0.02) + both_ways("mute", 1e7, 0.02))
    with Link() as link, Nodes(link, ("slow", "mute"), works_s=0.1, mute=("mute",)):
        paced = PacedLink(link, Planned(plan, HUB, time.monotonic()))
        began_s = time.monotonic()
        answers = paced.exchange({"slow": request(1), "mute": request(2)}, 0.8)
        assert time.monotonic() - began_s >= 0.8 + 0.02
        assert isinstance(answers["slow"], frame.Frame) and answers["mute"].kind == "late"
        assert paced.imposed.link_s == pytest.approx(0.04, abs=2e-3)  # without the 0.1 s of work


def test_a_contact_that_ends_before_the_answer_is_back_makes_the_node_unreachable_and_not_down():
    plan = contacts.plan(both_ways("a", 1e6, 0.1, back_until_s=0.1))
    with Link() as link, Nodes(link, ("a",)) as nodes:
        paced = PacedLink(link, Planned(plan, HUB, time.monotonic()))
        failure = paced.exchange({"a": request(1)}, 5.0)["a"]
        assert [name for name, _ in nodes.heard] == ["a"]  # the request was through
        assert isinstance(failure, NoContact) and failure.kind == "unreachable" and OUT_OF_CONTACT in failure.text
        paced.mark_down("a", failure)
        assert link.is_up("a") and not paced.is_up("a") and paced.why_down("a") == OUT_OF_CONTACT
        assert paced.imposed.misses == {"a": 1}
        assert paced.exchange({"a": request(2)}, 5.0)["a"].kind == "unreachable"
        assert len(nodes.heard) == 2  # the way there is open; nobody could answer
        # control: a failure on the bench does take it out of use
        paced.mark_down("a", Failure("late", "no answer"))
        assert not link.is_up("a")


def test_a_contact_that_is_seen_to_end_cuts_what_is_under_way_and_one_that_opens_brings_the_node_back():
    now = [reach(0.0, [True], [0.0], 1e4)]  # 4 rows of 32 floats there take half a second
    with Link() as link, Nodes(link, ("a",)) as nodes:
        paced = PacedLink(link, Live(("a",), lambda: now[0]))
        assert paced.is_up("a")
        timer = threading.Timer(0.1, lambda: now.__setitem__(0, reach(1.0, [False], [0.1])))
        timer.start()
        failure = paced.exchange({"a": request(1)}, 5.0)["a"]
        timer.join()
        assert isinstance(failure, NoContact) and "ended" in failure.text
        assert not nodes.heard and not paced.is_up("a")  # half a message is none
        now[0] = reach(2.0, [True], [0.1], 1e7)
        assert paced.is_up("a")
        assert isinstance(paced.exchange({"a": request(2)}, 5.0)["a"], frame.Frame)


def test_the_ladder_takes_the_replica_while_the_primary_is_out_of_contact():
    table = Table((Holding("a", 0, 0, "int8", 0), Holding("b", 0, 0, "int4", 1)))
    opens_s = 1.0
    rows = [Contact(x, y, opens_s, LONG_S, 0.01, 1e7) for x, y in ((HUB, "a"), ("a", HUB))]
    plan = contacts.plan(rows + both_ways("b", 1e7, 0.01))
    one, gate = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
    x = np.ones((1, 32), np.float32)
    with Link() as link, Nodes(link, ("a", "b")) as nodes:
        epoch_s = time.monotonic()
        paced = PacedLink(link, Planned(plan, HUB, epoch_s, patience_s=0.1))
        remote = RemoteExperts(paced, table, "fp32")
        assert remote.run(0, x, one, gate)[0, 0] == 2.0
        assert [(rung.rung, rung.reason) for rung in remote.traffic.rungs] == [("lower_precision", OUT_OF_CONTACT)]
        assert [name for name, _ in nodes.heard] == ["b"] and link.is_up("a")
        time.sleep(max(0.0, epoch_s + opens_s - time.monotonic()))
        remote.traffic.rungs.clear()
        assert remote.run(0, x, one, gate)[0, 0] == 2.0
        assert [name for name, _ in nodes.heard] == ["b", "a"] and not remote.traffic.rungs


# ---------------------------------------------------------------- rates that follow


def test_the_level_of_a_price_is_the_minimum_of_loss_plus_price():
    hidden, nats_per_byte = 256, np.array([1e-6, 4e-6])
    level = np.exp(np.linspace(math.log(1e-4), math.log(10), 400_001))
    for price, found in zip(nats_per_byte, rates.price_level(nats_per_byte, hidden)):
        # a row: level^2 / 12 nats, and each octave of the level is a bit less on each of its values
        cost = level**2 / 12 - price / 8 * hidden * np.log2(level)
        assert found == pytest.approx(level[cost.argmin()], rel=1e-3)
    assert np.divide(*rates.price_level(nats_per_byte, hidden)) == pytest.approx(0.5)  # the root of the prices' ratio


def test_bits_that_fit_by_hand():
    links = rates.Links.of([1e6, 1e5, 1e3], [0.005, 0.005, 0.005], 0.03)
    # 20 ms are left of 30: 20,000, 2,000 and 20 bits, less 100 bytes of headers
    assert rates.fitting_bits(links, 100, 512).tolist() == pytest.approx([19_200 / 512, 1_200 / 512, 0])
    assert np.isinf(rates.fitting_bits(rates.Links.of([1.0], [0.0]), 100, 512)).all()
    for bad in ({"rate_bps": [0.0], "delay_s": [0.0]}, {"rate_bps": [1.0], "delay_s": [-1.0]}):
        with pytest.raises(ValueError):
            rates.Links.of(**bad)
    with pytest.raises(ValueError, match="layer_s"):
        rates.Links.of([1.0], [0.0], 0.0)


def allocator() -> rates.Allocator:
    return rates.Allocator(rates.Sensitivity(np.array([2.0]), np.ones((1, 2)), {0: 0}), 0.1, input_gain=1.0)


def test_a_slow_links_node_gets_the_coarser_step_until_its_messages_fit_and_the_others_keep_theirs():
    x, pairs = np.ones((1, 64), np.float32), np.array([(0, 0, 0, 1.0)], frame.PAIR)
    values, overhead = 128, 2 * frame.HEADER_BYTES + frame.PAIR.itemsize
    given = allocator()
    plain = given.input_steps(0, x, pairs)[0], given.reply_step(0)
    # node 1 has room for 2 bits per value; what is spent is log2(1 / level) bits, as an entropy coder does at high rate
    links = rates.Links.of([1e9, (8 * overhead + 2 * values) / 0.01], [0.0, 0.0], 0.01)
    given.follow(links, 64)
    for _ in range(40):
        given.begin(0)
        for node in (0, 1):
            step = given.input_steps(0, x, pairs, node)[0]
            assert given.reply_step(0, node) == pytest.approx(step)  # one level both ways: x and weight are 1 here
            bits = math.log2(2.0 / step)
            given.spent(round(values * bits / 8), values, node)
    steps = [given.input_steps(0, x, pairs, node)[0] for node in (0, 1)]
    assert steps[0] == plain[0] == pytest.approx(0.2)
    assert steps[1] == pytest.approx(2.0 / 4, rel=0.05)
    # the link is fast again: the level comes back, and no finer than quality asks for
    told = [rates.Links.of([1e9, 1e9], [0.0, 0.0], 0.01)]
    followed = list(given.used)
    given.follow(lambda: told[0], 64)
    for _ in range(40):
        given.begin(0)
        given.spent(10, values, 1)
        given.input_steps(0, x, pairs, 1)
    assert given.input_steps(0, x, pairs, 1)[0] == plain[0]
    # for nobody in particular, and without links, nothing changes
    assert (given.input_steps(0, x, pairs)[0], given.reply_step(0)) == plain
    assert (allocator().input_steps(0, x, pairs, 1)[0], allocator().reply_step(0, 1)) == plain
    # a reference repeats what was used, pass by pass
    again = allocator()
    again.repeat(followed)
    for levels in followed:
        again.begin(0)
        assert [again.reply_step(0, node) for node in (0, 1)] == [2.0 * level for level in levels]
    assert len(followed) == 40 and followed[0][1] < followed[-1][1]
    with pytest.raises(rates.RatesError, match="repeat"):
        again.begin(0)


def test_a_flight_that_is_too_long_for_any_rate_is_not_made_worthless():
    x, pairs = np.ones((1, 64), np.float32), np.array([(0, 0, 0, 1.0)], frame.PAIR)
    given = allocator()
    given.follow(rates.Links.of([1e6], [0.02], 0.01), 64)
    for _ in range(20):
        given.begin(0)
        given.input_steps(0, x, pairs, 0)
        given.spent(20, 128, 0)
    assert given.used[-1] == (rates.COARSEST,)


def test_a_hot_nodes_radio_makes_its_bytes_dear():
    x, pairs = np.ones((1, 64), np.float32), np.array([(0, 0, 0, 1.0)], frame.PAIR)
    given = allocator()
    fast, zero = np.full(2, 1e9), np.zeros(2)
    given.follow(rates.Links(fast, zero, zero, np.array([0.0, 50.0]), np.full(2, 1e-6)), 64)
    given.begin(0)
    cool, hot = (given.input_steps(0, x, pairs, node)[0] for node in (0, 1))
    # prices add, so squares of levels add: 0.1^2 and 6 * 64 * (50e-6 / 8) / ln 2
    level = math.sqrt(0.1**2 + 6 * 64 * 50e-6 / 8 / math.log(2))
    assert cool == pytest.approx(0.2) and hot == pytest.approx(2 * level)


def test_what_cannot_be_imposed_is_said_at_once(tmp_path):
    hot = scenario.read(SHIPPED / "hot-eclipse.toml")
    demo_links.check(hot)
    for bad in (None, replace(hot, links=None)):
        with pytest.raises(demo_links.NoLinks, match="links"):
            demo_links.check(bad)
    demo_links.check_rates(True, 150.0, "importance", None)
    for links, link_ms, codec, record in (
        (False, 5.0, "importance", None),
        (True, 5.0, "q8", None),
        (True, math.nan, "importance", None),
        (True, None, "importance", tmp_path),
    ):
        with pytest.raises(demo_links.NoLinks):
            demo_links.check_rates(links, link_ms, codec, record)


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.alone
def test_the_demo_over_a_scenarios_links_still_equals_one_process(tmp_path):
    """hot-eclipse at scale 1 and a hundredth of its ground link's rate: in contact all the time, rates that follow the links."""
    text = (SHIPPED / "hot-eclipse.toml").read_text()
    for old, new in (("scale = 60", "scale = 1"), ("load_s = 60", "load_s = 1"), ("alone_s = 15", "alone_s = 0")):
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "links.toml"
    path.write_text(text.replace("gsl_rate_bps = 10e6", "gsl_rate_bps = 1e5"))
    command = [sys.executable, "-m", "ground_station.cli", "demo", "--json", "--tokens", "4", "--scenario", str(path)]
    done = subprocess.run(
        [*command, "--links", "--codec", "importance", "--link-ms", "520"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    links = result["links"]
    assert result["parity"]["equal"] is True and result["parity"]["max_logit_diff"] == 0.0
    assert links["emulated"] and not links["misses"] and not links["rungs_out_of_contact"]
    # reference: the ways at the start, by the physics alone; each exchange there and back is at least twice the nearest one's delay
    first = contact.at(contact.make(scenario.read(path)), 0.0)
    assert {node: pytest.approx(pair[0], abs=1.0) for node, pair in links["delay_ms"].items()} == dict(
        zip(("sat-1", "sat-2", "sat-3", "sat-4"), (1e3 * first.delay_s).tolist())
    )
    assert links["exchange_s"] >= links["link_s"] >= links["exchanges"] * 2 * float(first.delay_s.min())
    assert any(most > 1.1 * least for least, most in links["levels"].values())  # the rates did follow


def test_reading_a_curve():
    curve = Curve(((100.0, 1.0), (80.0, 4.0), (60.0, 16.0)))
    assert curve.ms_at(2.0) == pytest.approx(90.0) and curve.loss_at(90.0) == pytest.approx(2.0)
    assert curve.ms_at(0.5) is None and curve.ms_at(20.0) is None
    assert curve.loss_at(59.0) is None and curve.loss_at(101.0) is None
