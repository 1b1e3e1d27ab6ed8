"""The data plane over a real ROUTER: partial sums against numpy, bad frames of every kind, deadlines, reconnection, CURVE."""

from __future__ import annotations

import os
import random
import struct
import time

import numpy as np
import pytest
import zmq
from node_rig import HIDDEN, Ground, make_bundle

from ground_station.broker import free_port
from node_agent import compress, dataplane, experts, frame
from node_agent.config import LinkConfig
from node_agent.counters import Counters
from node_agent.curve_key import own_key
from node_agent.dataplane import DataPlane, Service
from node_agent.errors import ConfigError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


class Node:
    """A data plane in this process, with what it counted and reported."""

    def __init__(self, bundle, link: LinkConfig):
        self.counters = Counters()
        self.reported: list[tuple[str, str]] = []
        loaded = experts.load(bundle.root, bundle.stems, 10**11)
        self.plane = DataPlane("n1", link, loaded, self.counters, lambda *a: self.reported.append(a))


@pytest.fixture
def rig(bundle):
    with Ground() as ground:
        node = Node(bundle, LinkConfig(ground.endpoint))
        with node.plane:
            ground.hello()
            yield ground, node
        assert node.plane.failed is None and not node.plane.alive


def request(x: np.ndarray, pairs: list[tuple[int, int, int, float]], **fields) -> frame.Frame:
    return frame.Frame(frame.EXPERTS, x=x, pairs=np.array(pairs, frame.PAIR), **{"request_id": 7, "layer": 1} | fields)


def rows(count: int, hidden: int = HIDDEN) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, hidden)).astype(np.float32)


# Largest error of what comes back, relative to the largest value: the codec's step, once each way, and float32.
CODEC_TOLERANCE = {"fp32": 1e-5, "fp16": 3e-3, "q8": 3e-2, "q4": 0.4, "importance": 0.3}


@pytest.mark.parametrize("codec", list(compress.CODECS))
@pytest.mark.parametrize("count", [1, 6])
def test_partial_sums_come_back_in_the_codec_asked_for(bundle, rig, codec, count):
    ground, node = rig
    ground.send(frame.pack(frame.Frame(frame.WELCOME, destination=31)))
    x = rows(count)
    pairs = [(row, expert, 0, 0.3 + row) for expert in (3, 1) for row in range(count)]
    got = ground.ask(request(x, pairs, codec=codec, reply_codec=codec, request_id=2**63))
    assert (got.kind, got.request_id, got.layer, got.codec) == (frame.PARTIAL, 2**63, 1, codec)
    assert (got.source, got.destination) == (31, frame.GROUND)
    want = bundle.partial(1, x, pairs)
    assert np.abs(got.x - want).max() <= CODEC_TOLERANCE[codec] * np.abs(want).max()
    assert np.abs(got.x - bundle.partial(0, x, pairs)).max() > 0.5 * np.abs(want).max()  # not the other layer's experts
    assert 0 < got.compute_us < 10e6 and got.codec_us < 10e6
    counted = node.counters
    assert (counted.requests, counted.tokens, counted.pairs) == (1, count, 2 * count)
    assert counted.compute_s > 0 and not counted.link_errors


def test_reply_codec_may_differ_from_the_requests(rig):
    got = rig[0].ask(request(rows(1), [(0, 0, 0, 1.0)], codec="q8", reply_codec="fp16"))
    assert (got.kind, got.codec) == (frame.PARTIAL, "fp16")


def test_ping_is_answered_and_hello_goes_on(rig):
    ground, _ = rig
    got = ground.ask(frame.Frame(frame.PING, request_id=12, text="are you there"))
    assert (got.kind, got.request_id, got.text) == (frame.PONG, 12, "are you there")
    assert ground.hello().text == "n1"
    assert ground.hello().text == "n1"


def good_bytes(**fields) -> bytes:
    return frame.pack(request(rows(2), [(0, 0, 0, 0.5), (1, 1, 0, 0.5)], **fields))


def with_byte(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


# Offsets by the layout that frame.py documents: magic 0-3, version 4, kind 5, codec 6, T at 24, D at 28, P at 30.
T_AT, D_AT, P_AT = 24, 28, 30
PAIR_AT = frame.HEADER_BYTES


def bad_frames() -> dict[str, tuple[bytes, str, str]]:
    """name -> (frame, kind that it is counted as, a word of the answer)."""
    good = good_bytes()
    nan_gate = good[: PAIR_AT + 5] + struct.pack("<f", float("nan")) + good[PAIR_AT + 9 :]
    inf_x = good[:-4] + struct.pack("<f", float("inf"))
    return {
        "empty": (b"", "malformed", "shorter"),
        "text": (b"GET / HTTP/1.1\r\n\r\n" * 9, "malformed", "not a spacemoe frame"),
        "newer version": (with_byte(good, 4, 2), "version", "version 2"),
        "unknown kind": (with_byte(good, 5, 99), "malformed", "kind 99"),
        "unknown codec": (with_byte(good, 6, 77), "malformed", "codec id 77"),
        "cut short": (good[:-1], "malformed", "needs"),
        "one byte more": (good + b"x", "malformed", "needs"),
        "huge T": (good[:T_AT] + struct.pack("<I", 2**32 - 1) + good[T_AT + 4 :], "malformed", "shape"),
        "largest T and D": (
            good[:T_AT] + struct.pack("<IH", frame.MAX_TOKENS, frame.MAX_HIDDEN) + good[D_AT + 2 :],
            "malformed",
            "needs",
        ),
        "huge P": (good[:P_AT] + struct.pack("<H", 65_535) + good[P_AT + 2 :], "malformed", "needs"),
        "NaN gate": (nan_gate, "malformed", "gate"),
        "infinite hidden state": (inf_x, "malformed", "finite"),
        "wrong layer": (good_bytes(layer=9), "layer", "layer 9"),
        "unknown expert": (frame.pack(request(rows(1), [(0, 200, 0, 1.0)])), "expert", "expert 200 of layer 1"),
        "precision not here": (frame.pack(request(rows(1), [(0, 1, 3, 1.0)])), "expert", "int8dyn"),
        "another D": (frame.pack(request(rows(1, 32), [(0, 1, 0, 1.0)])), "shape", "hidden size 32"),
        "pair twice": (frame.pack(request(rows(1), [(0, 1, 0, 1.0)] * 2)), "shape", "twice"),
        "overflow": (frame.pack(request(rows(1) * 1e30, [(0, 1, 0, 3e38)])), "compute", "finite"),
        "frame for the ground": (frame.pack(frame.Frame(frame.HELLO, text="n1")), "kind", "not for a node"),
    }


@pytest.mark.parametrize("name", list(bad_frames()))
def test_a_bad_frame_is_counted_answered_and_survived(rig, name):
    ground, node = rig
    data, kind, word = bad_frames()[name]
    for _ in range(3):
        answer = ground.ask(data)
        assert answer.kind == frame.ERROR and word in answer.text and answer.text.startswith("n1: ")
    assert node.counters.link_errors == {kind: 3}
    assert [first for first, _ in node.reported] == [kind]  # reported once
    assert ground.ask(good_bytes()).kind == frame.PARTIAL


def test_an_error_frame_is_not_answered(rig):
    ground, node = rig
    ground.send(frame.pack(frame.Frame(frame.ERROR, text="from the ground")))
    assert ground.ask(good_bytes()).kind == frame.PARTIAL
    assert node.counters.link_errors == {"peer": 1}


def test_a_message_of_several_parts_is_survived(rig):
    ground, node = rig
    ground.socket.send_multipart((b"n1", b"", good_bytes(), b"x"))
    assert [ground.receive().kind for _ in range(3)] == [frame.ERROR, frame.PARTIAL, frame.ERROR]


def test_fuzz_random_bytes_and_mutations(rig):
    """Everything sent is answered or (WELCOME, ERROR) rightly not; after it all the node serves, with the same bits."""
    ground, node = rig
    want = ground.ask(good_bytes()).x
    rng = random.Random(5)
    good = good_bytes(codec="q8", reply_codec="q4")
    for i in range(600):
        kind = i % 3
        if kind == 0:
            data = rng.randbytes(rng.randrange(0, 300))
        elif kind == 1:
            data = good[: rng.randrange(len(good))]
        else:
            data = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            data = bytes(data)
        ground.send(data)
    ground.send(frame.pack(frame.Frame(frame.PING, request_id=2**64 - 1)))
    answers = []
    while not answers or answers[-1].kind != frame.PONG or answers[-1].request_id != 2**64 - 1:
        answers.append(ground.receive())
    assert sum(node.counters.link_errors.values()) >= 400  # all random and cut ones
    assert {a.kind for a in answers} <= {frame.ERROR, frame.PARTIAL, frame.PONG}
    assert np.array_equal(ground.ask(good_bytes()).x, want)


def test_a_frame_over_the_size_limit_does_not_stop_the_node(rig):
    """ZeroMQ drops the connection of whoever sends it and would never dial again; the node does, and serves."""
    ground, node = rig
    ground.send(bytes(frame.MAX_FRAME_BYTES + 1))
    answer, lost = ground.ask_until_answered(good_bytes())
    assert lost and answer.kind == frame.PARTIAL
    assert node.plane.alive


def test_many_requests_at_once_are_all_answered(rig):
    ground, node = rig
    for i in range(200):
        ground.send(good_bytes(request_id=i))
    assert [ground.receive().request_id for _ in range(200)] == list(range(200))
    assert node.counters.requests == 200


def test_deadline_counts_from_the_arrival(bundle):
    """The pure service with times given by the test: nothing is computed once the budget has passed in the queue."""
    counters = Counters()
    loaded = experts.load(bundle.root, bundle.stems, 10**11)
    service = Service("n1", loaded, counters, lambda *a: None)
    data = good_bytes(budget_us=50_000)
    now = time.perf_counter_ns()
    assert frame.unpack(service.answer(data, now)).kind == frame.PARTIAL
    late = frame.unpack(service.answer(data, now - 10**9))
    assert late.kind == frame.ERROR and "deadline" in late.text and late.request_id == 7
    assert counters.link_errors == {"deadline": 1} and counters.requests == 1
    assert frame.unpack(service.answer(good_bytes(budget_us=0), now - 10**12)).kind == frame.PARTIAL  # 0: no deadline


def test_requests_behind_a_slow_one_miss_their_deadline(bundle, monkeypatch):
    with Ground() as ground:
        node = Node(bundle, LinkConfig(ground.endpoint))
        run = node.plane.service._experts.run

        def slow(layer, x, pairs):
            if x.shape[0] == 1:
                time.sleep(0.3)
            return run(layer, x, pairs)

        node.plane.service._experts.run = slow
        with node.plane:
            ground.hello()
            # the first keeps the node busy until the others are all there: their budgets count from when they are taken in
            ground.send(frame.pack(request(rows(1), [(0, 1, 0, 1.0)], request_id=9)))
            time.sleep(0.05)
            ground.send(frame.pack(request(rows(1), [(0, 1, 0, 1.0)], request_id=1)))
            ground.send(good_bytes(request_id=2, budget_us=100_000))
            ground.send(good_bytes(request_id=3, budget_us=60_000_000))
            got = {answer.request_id: answer for answer in (ground.receive() for _ in range(4))}
    assert [got[i].kind for i in (1, 2, 3)] == [frame.PARTIAL, frame.ERROR, frame.PARTIAL]
    assert "deadline" in got[2].text


def test_an_unexpected_exception_is_an_answer(rig):
    ground, node = rig
    service = node.plane.service
    run, service._experts.run = service._experts.run, lambda *a: 1 / 0
    answer = ground.ask(good_bytes())
    service._experts.run = run
    assert answer.kind == frame.ERROR and "ZeroDivisionError" in answer.text
    assert node.counters.link_errors == {"compute": 1}
    assert ground.ask(good_bytes()).kind == frame.PARTIAL


def test_node_serves_again_when_the_ground_station_restarts(bundle):
    with Ground() as ground:
        endpoint = ground.endpoint
        node = Node(bundle, LinkConfig(endpoint))
        node.plane.__enter__()
        ground.hello()
    try:
        time.sleep(0.5)
        with Ground(endpoint=endpoint) as again:
            again.hello()
            assert again.ask(good_bytes()).kind == frame.PARTIAL
    finally:
        node.plane.__exit__()


def test_a_ground_station_that_comes_late_hears_one_hello(bundle):
    port = free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    node = Node(bundle, LinkConfig(endpoint))
    with node.plane:
        time.sleep(2.6)  # long enough for two HELLOs that nobody hears
        assert node.plane.alive
        with Ground(endpoint=endpoint) as ground:
            ground.hello()
            # what was said while nobody listened is not repeated: the next one comes a second later
            assert not ground.socket.poll(300)
            assert ground.ask(good_bytes()).kind == frame.PARTIAL
    assert not node.plane.alive and node.plane.failed is None


def test_curve_protects_the_link(bundle, tmp_path):
    """With the right server key frames pass; with another one nothing does. The node's key is made once, for it alone."""
    public, secret = zmq.curve_keypair()
    with Ground(keys=(public, secret)) as ground:
        link = LinkConfig(ground.endpoint, public.decode(), tmp_path / "key")
        node = Node(bundle, link)
        with node.plane:
            ground.hello()
            assert ground.ask(good_bytes()).kind == frame.PARTIAL
        made = (tmp_path / "key").read_text().strip()
        assert os.stat(tmp_path / "key").st_mode & 0o777 == 0o600
        assert node.plane.public_key == zmq.curve_public(made.encode()).decode()
        assert own_key(tmp_path / "key")[1].decode() == made  # kept
        wrong, _ = zmq.curve_keypair()
        other = Node(bundle, LinkConfig(ground.endpoint, wrong.decode(), tmp_path / "key"))
        ground.socket.setsockopt(zmq.RCVTIMEO, 700)
        with other.plane, pytest.raises(zmq.Again):
            ground.hello()


def test_a_key_that_others_can_read_or_that_is_none_is_refused(tmp_path):
    path = tmp_path / "key"
    own_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        own_key(path)
    path.write_text("short")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="no key of 40"):
        own_key(path)


def test_nothing_is_waited_for_longer_than_a_stop_may_take():
    assert dataplane.WAIT_MS <= 500
