"""The duty cap at the data plane: the time line by hand, real frames over a real ROUTER, and what is refused.

Time in the first half is given by the test; in the second it is real, and only shares and orders are asserted.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from node_rig import HIDDEN, WAIT_S, Ground, make_bundle
from test_node_dataplane import Node, request, rows

from node_agent import frame, pacing
from node_agent.config import LinkConfig
from node_agent.pacing import Pacer

MS = 1_000_000  # ns


def work(request_id: int = 1, budget_ms: int = 0) -> bytes:
    return frame.pack(request(rows(1), [(0, 1, 0, 1.0)], request_id=request_id, budget_us=budget_ms * 1000))


PING = frame.pack(frame.Frame(frame.PING, request_id=99))


# ---------------------------------------------------------------- the time line


def starts(duty: float, busy_ms: float, count: int, late_ms: float = 0.0, arrive_ms=lambda i: 0.0) -> list[float]:
    """When `count` requests start, in ms, if each is computed for `busy_ms` and every wake-up comes `late_ms` late."""
    pacer, now, got = Pacer(), 10**12, []
    pacer.set(duty)
    for i in range(count):
        arrived = 10**12 + int(arrive_ms(i) * MS)
        now = max(now, arrived)
        plan = pacer.plan([(arrived, work())], now)
        assert not plan.refused
        if plan.wait_s:
            now += round(plan.wait_s * 1e9) + int(late_ms * MS)
        got.append((now - 10**12) / MS)
        pacer.computed(now, now + int(busy_ms * MS))
        now += int(busy_ms * MS)
    return got


def test_starts_by_hand():
    """At duty 0.25 10 ms of computing make 40 ms, and the credit of 50 ms 200 ms: the n-th starts at max(10 n, 40 n - 200)."""
    assert starts(0.25, 10, 10) == pytest.approx([0, 10, 20, 30, 40, 50, 60, 80, 120, 160], abs=0.01)


def test_late_wake_ups_cost_no_rate():
    punctual, late = (starts(0.5, 4, 500, late_ms) for late_ms in (0.0, 3.0))
    assert late[-1] == pytest.approx(punctual[-1], abs=3.1)


def test_idle_time_is_forgotten():
    """After an hour of nothing no more than the credit is free."""
    got = starts(0.5, 10, 100, arrive_ms=lambda i: 0.0 if i < 50 else 3.6e6)
    after = [at - 3.6e6 for at in got[50:]]
    assert after[-1] >= 49 * 20 - 2 * pacing.CREDIT_S * 1000 - 0.01


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.05, 0.95),
    st.lists(st.tuples(st.floats(0.0, 0.3), st.floats(0.001, 0.08)), min_size=20, max_size=120),
)
def test_share_of_any_second_is_bounded(duty, jobs):
    """Random arrivals and lengths: no window of 1 s holds more than duty + credit + the longest computation."""
    pacer, now, spans, arrived = Pacer(), 10**12, [], 10**12
    pacer.set(duty)
    for gap_s, busy_s in jobs:
        arrived += int(gap_s * 1e9)
        now = max(now, arrived)
        now += round(pacer.plan([(now, work())], now).wait_s * 1e9)
        end = now + int(busy_s * 1e9)
        pacer.computed(now, end)
        spans.append((now, end))
        now = end
    longest_s = max(busy_s for _, busy_s in jobs)
    for _, end in spans:
        begin = end - 10**9
        busy = sum(max(0, min(b, end) - max(a, begin)) for a, b in spans)
        assert busy / 1e9 <= duty + pacing.CREDIT_S + longest_s + 1e-6


def test_plan_puts_no_work_first_and_refuses_what_cannot_be_in_time():
    pacer, now = Pacer(), 10**12
    pacer.set(0.1)
    pacer.computed(now - 100 * MS, now)  # 100 ms at 0.1: the next may start 500 ms after (credit: 500 ms of wall time)
    waiting = [(now, work(1, 10_000)), (now, work(2, 200)), (now, PING), (now, work(3, 0)), (now, b"junk")]
    plan = pacer.plan(waiting, now)
    assert [data for _, data in plan.order] == [PING, b"junk", work(1, 10_000), work(3, 0)]
    assert plan.wait_s == 0.0  # for the PING
    assert [(r.request_id, kind) for r, kind, _ in plan.refused] == [(2, "throttled")]
    assert "duty cap 0.10" in plan.refused[0][2]
    alone = pacer.plan(waiting[:1], now)
    assert alone.wait_s == pytest.approx(0.4, abs=0.001) and not alone.refused


def test_duty_nothing_and_refusals():
    pacer = Pacer()
    pacer.set(0.0)
    assert [why[:2] for why in pacer.plan([(0, work(5))], 0).refused][0][1] == "throttled"
    pacer.set(1.0, "memory", "9 MB are available")
    assert pacer.limited and pacer.plan([(0, work())], 0).refused[0][1:] == ("memory", "9 MB are available")
    pacer.set(1.0)
    assert not pacer.limited and not pacer.plan([(0, work())], 0).refused


def test_the_queue_is_bounded():
    pacer = Pacer()
    pacer.set(0.5)
    plan = pacer.plan([(0, work(i)) for i in range(100)], 0)
    assert len(plan.order) == pacing.MAX_WAITING and len(plan.refused) == 100 - pacing.MAX_WAITING
    big = frame.pack(request(np.zeros((4096, 1500), np.float32), [(0, 1, 0, 1.0)]))
    plan = pacer.plan([(0, big)] * 4, 0)
    assert sum(len(data) for _, data in plan.order) <= pacing.MAX_WAITING_BYTES and len(plan.refused) == 2


def test_peek_reads_what_frame_packs():
    data = frame.pack(request(rows(2), [(0, 1, 0, 1.0)], request_id=2**64 - 1, layer=7, source=9, budget_us=1_500_000))
    assert pacing.peek(data) == pacing.Request(2**64 - 1, 9, 7, 1.5, len(data))
    for other in (PING, data[: frame.HEADER_BYTES - 1], b"", b"x" * 100, data[:4] + b"\x02" + data[5:]):
        assert pacing.peek(other) is None


# ---------------------------------------------------------------- real frames


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


HEAVY_X = np.random.default_rng(1).standard_normal((1500, HIDDEN)).astype(np.float32)
HEAVY_PAIRS = [(row, expert, precision, 0.1) for row in range(1500) for expert in range(4) for precision in range(3)]


def heavy(request_id: int, budget_us: int = 0) -> bytes:
    return frame.pack(request(HEAVY_X, HEAVY_PAIRS, request_id=request_id, budget_us=budget_us))


def keep_busy(ground: Ground, node: Node, seconds: float) -> tuple[float, list[frame.Frame]]:
    """(share of time that the node computed, answers) while three requests are always waiting at the node."""
    data, answers = heavy(1), []
    for _ in range(3):
        ground.send(data)
    ground.receive()  # the first computation warms caches up
    ground.send(data)
    busy_s, began_s = node.counters.compute_s, time.monotonic()
    while time.monotonic() - began_s < seconds:
        answers.append(ground.receive())
        ground.send(data)
    share = (node.counters.compute_s - busy_s) / (time.monotonic() - began_s)
    for _ in range(3):
        answers.append(ground.receive())
    return share, answers


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "curve"])
def test_busy_share_follows_the_duty(bundle, tmp_path, encrypted):
    keys = zmq.curve_keypair() if encrypted else None
    with Ground(keys=keys) as ground:
        link = LinkConfig(ground.endpoint, keys[0].decode(), tmp_path / "key") if keys else LinkConfig(ground.endpoint)
        node = Node(bundle, link)
        with node.plane:
            ground.hello()
            free, _ = keep_busy(ground, node, 1.0)
            node.plane.pacer.set(0.5)
            share, answers = keep_busy(ground, node, 3.0)
    assert free > 0.65, "the control: without a cap it is busier"
    assert 0.35 < share <= 0.55
    assert {answer.kind for answer in answers} == {frame.PARTIAL}  # no budget: everything is served
    assert not node.counters.link_errors


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "curve"])
def test_while_work_waits_pings_are_answered_and_hello_goes_on(bundle, tmp_path, encrypted):
    keys = zmq.curve_keypair() if encrypted else None
    with Ground(keys=keys) as ground:
        link = LinkConfig(ground.endpoint, keys[0].decode(), tmp_path / "key") if keys else LinkConfig(ground.endpoint)
        node = Node(bundle, link)
        with node.plane:
            ground.hello()
            node.plane.pacer.set(0.01)
            for request_id in (1, 2):  # the second waits for a second or so: 10 ms at 0.01, less the credit at most
                node.plane.pacer.computed(time.perf_counter_ns(), time.perf_counter_ns() + 35 * MS)
                ground.send(work(request_id, 60_000))
            ground.send(PING)
            seen = []
            while {"PONG", "HELLO"} - set(seen) or seen.count("work") < 2:
                assert ground.socket.poll(WAIT_S * 1000)
                got = frame.unpack(ground.socket.recv_multipart()[1])
                seen.append({frame.PONG: "PONG", frame.HELLO: "HELLO", frame.PARTIAL: "work"}[got.kind])
    assert seen.index("PONG") < seen.index("work") and seen.index("HELLO") < len(seen) - 1


def test_what_cannot_be_in_time_is_refused_at_once_and_the_rest_served(bundle):
    with Ground() as ground:
        node = Node(bundle, LinkConfig(ground.endpoint))
        with node.plane:
            ground.hello()
            node.plane.pacer.set(0.1)
            node.plane.pacer.computed(time.perf_counter_ns() - 200 * MS, time.perf_counter_ns())
            ground.send(work(1, 50))
            answer = ground.receive()
            assert (answer.kind, answer.request_id, answer.layer) == (frame.ERROR, 1, 1)
            assert answer.text.startswith("n1: throttled: duty cap 0.10")
            node.plane.pacer.set(0.0)
            assert "throttled: the duty cap is 0" in ground.ask(work(2, 60_000)).text
            node.plane.pacer.set(1.0, "memory", "9 MB are available")
            assert ground.ask(work(3)).text == "n1: memory: 9 MB are available"
            assert ground.ask(PING).kind == frame.PONG
            node.plane.pacer.set(1.0)
            assert ground.ask(work(4, 60_000)).kind == frame.PARTIAL
        assert node.counters.link_errors == {"throttled": 2, "memory": 1}
        assert node.counters.requests == 1
        assert node.counters.bytes_in == sum(map(len, (work(1, 50), work(2, 60_000), work(3), PING, work(4, 60_000))))


def test_an_uncapped_node_never_looks_at_the_queue(bundle, monkeypatch):
    """The hot path is one flag: planning is not entered at duty 1."""
    monkeypatch.setattr(Pacer, "plan", lambda *a: 1 / 0)
    monkeypatch.setattr(Pacer, "computed", lambda *a: 1 / 0)
    with Ground() as ground:
        node = Node(bundle, LinkConfig(ground.endpoint))
        with node.plane:
            ground.hello()
            assert ground.ask(work()).kind == frame.PARTIAL
            node.plane.pacer.set(0.5)
            ground.send(work())
            node.plane._thread.join(WAIT_S)  # the control: with a cap it is
        assert isinstance(node.plane.failed, ZeroDivisionError)
