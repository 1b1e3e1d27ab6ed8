"""Ten thousand bad frames each against a real agent process and a real ground station: nothing falls, grows or goes uncounted.

What every frame must come to is fuzz_cases' verdict, and the answers are compared with it one by one. The negative controls run the
same flood against an agent and a ground station with a defect put in.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq
from fuzz_cases import (
    EXPERTS,
    MEMORY_MB,
    collected,
    frame_verdict,
    mutations,
    random_frames,
    real_frames,
    request_verdict,
)
from fuzz_station import Station
from node_rig import EXPERTS as EXPERTS_HELD
from node_rig import HIDDEN, LAYERS, WAIT_S, AgentProcess, Ground, Observer, agent_tables, make_bundle

from ground_station.broker import Broker
from ground_station.link import TAKEN_AT_ONCE, Link
from node_agent import experts, frame
from node_agent.config import LinkConfig
from node_agent.counters import Counters
from node_agent.dataplane import DataPlane
from node_agent.zmtp import GREETING, message, ready

pytestmark = [pytest.mark.broker, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
FRAMES = 10_000  # that are bad
SERVED = 5  # answers of the good node for each window, at least
WINDOW = 250  # frames under way at a time: below every queue's limit, so that none is lost on the way
HELD = {(layer, e, precision) for layer in range(LAYERS) for e in range(EXPERTS_HELD) for precision in range(3)}
PAIRS = np.array([(0, 1, 0, 0.5), (1, 3, 2, 0.5), (2, 0, 1, 0.25)], frame.PAIR)
X = np.random.default_rng(7).standard_normal((3, HIDDEN)).astype(np.float32)
GOOD = frame.pack(frame.Frame(frame.EXPERTS, 5, 1, x=X, pairs=PAIRS))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def frames() -> list[bytes]:
    """Half from hypothesis (a millisecond each, so a part of them) and of random bytes, half real ones damaged, mixed."""
    half = FRAMES * 11 // 20  # some turn out to be right
    rng = random.Random(22)
    made = collected(random_frames, half // 4)
    made += [rng.randbytes(rng.choice((0, 3, 4, 5, 39, 40, 41, 300))) for _ in range(half - len(made))]
    mixed = [*made, *mutations(real_frames(HIDDEN), half, seed=21)]
    rng.shuffle(mixed)
    return mixed


# ---------------------------------------------------------------- an agent


class DefectiveAgent(AgentProcess):
    """A stock agent with one line of defect."""

    def __init__(self, folder, tables, defect: str):
        self._defect = defect
        super().__init__(folder, tables)

    def _start(self) -> subprocess.Popen:
        script = f"{self._defect}\nimport sys; from node_agent.cli import main; sys.exit(main(sys.argv[1:]))"
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", script, "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )


def expected_answer(data: bytes, answer: frame.Frame | None) -> str:
    """The kind of error that `data` counts as, '' for none, after a check that `answer` is the right one."""
    verdict, request_id = frame_verdict(data)
    assert answer is None or answer.request_id in (request_id, 0 if verdict == "version" else request_id), data.hex()
    if verdict in ("malformed", "version"):
        assert answer.kind == frame.ERROR, data.hex()
        return verdict
    kind = int(verdict)
    if kind == frame.PING:
        assert answer.kind == frame.PONG and answer.text == data[40:].decode("utf-8", "replace").encode()[:512].decode(
            "utf-8", "replace"
        )
        return ""
    if kind != EXPERTS:
        assert answer.kind == frame.ERROR and "not for a node" in answer.text
        return "kind"
    if answer.kind == frame.ERROR and "deadline passed" in answer.text:
        assert int.from_bytes(data[32:36], "little") > 0  # it had one
        return "deadline"
    wrong = request_verdict(data, HELD, HIDDEN)
    if wrong:
        assert answer.kind == frame.ERROR and answer.text.startswith("n1: "), data.hex()
        return wrong
    if answer.kind == frame.ERROR:  # only a sum that is not finite may not be sent
        assert "not finite" in answer.text, answer.text
        return "compute"
    assert answer.kind == frame.PARTIAL and answer.x.shape == (int.from_bytes(data[24:28], "little"), HIDDEN)
    return ""


def is_answered(data: bytes) -> bool:
    """WELCOME and ERROR are taken in without a word."""
    return frame_verdict(data)[0] not in (str(frame.WELCOME), str(frame.ERROR))


def published(observer: Observer, refused: int, served: int) -> tuple[dict[str, int], int]:
    """(errors by kind, requests served) of the first telemetry that counts so many, or more, of each."""
    prefix = "errors.link."

    def errors(tree: dict) -> dict[str, int]:
        return {s["name"].removeprefix(prefix): s["value"] for s in tree["samples"] if s["name"].startswith(prefix)}

    def requests(tree: dict) -> int:
        return next(s["value"] for s in tree["samples"] if s["name"] == "requests_served")

    tree = observer.next("telemetry", lambda t: sum(errors(t).values()) >= refused and requests(t) >= served)
    return errors(tree), requests(tree)


def flood_agent(
    agent: AgentProcess, ground: Ground, observer: Observer, frames: list[bytes], wait_s: float
) -> tuple[int, int]:
    """Sends all of `frames`; checks every answer, the memory and the counters. Returns (errors, requests served)."""
    process = psutil.Process(agent.process.pid)
    want = ground.ask(GOOD, wait_s)
    assert want.kind == frame.PARTIAL
    before, grown, served = process.memory_info().rss, 0, 2  # one request before the flood, one after it
    counted: Counter[str] = Counter()
    for start in range(0, len(frames), WINDOW):
        window = frames[start : start + WINDOW]
        for data in window:
            ground.send(data)
        for data in window:
            answer = ground.receive(wait_s) if is_answered(data) else None
            kind = expected_answer(data, answer) if answer else ("peer" if data[5] == frame.ERROR else "")
            served += answer is not None and answer.kind == frame.PARTIAL
            if kind:
                counted[kind] += 1
        grown = max(grown, process.memory_info().rss - before)
    assert grown <= MEMORY_MB * 1e6, f"grew by {grown / 1e6:.1f} MB"
    pong = ground.ask(frame.Frame(frame.PING, 2**64 - 3, text="still there"), wait_s)
    assert (pong.kind, pong.request_id) == (frame.PONG, 2**64 - 3)  # and not one answer too many before it
    after = ground.ask(GOOD, wait_s)
    assert after.kind == frame.PARTIAL and after.x.tobytes() == want.x.tobytes()
    assert published(observer, counted.total(), served) == (counted, served)
    assert agent.process.poll() is None and "Traceback" not in agent.text()
    print(f"{len(frames)} frames: {dict(counted)}, grew by {grown / 1e6:.2f} MB")
    return counted.total(), served


@pytest.fixture
def rig(tmp_path):
    with Broker(tmp_path) as broker, Ground() as ground, Observer(broker.host, broker.port) as observer:
        yield broker, ground, observer


def test_an_agent_survives_ten_thousand_frames_and_counts_every_bad_one(rig, bundle, frames, tmp_path):
    broker, ground, observer = rig
    with AgentProcess(tmp_path, agent_tables(tmp_path, ground.endpoint, bundle, broker)) as agent:
        ground.hello()
        refused, served = flood_agent(agent, ground, observer, frames, WAIT_S)
        assert FRAMES <= refused < 0.98 * len(frames)  # and good ones among them

        # frames at the limit of size: taken in, refused, and their memory given back
        process = psutil.Process(agent.process.pid)
        before = process.memory_info().rss
        for fill in (b"\xff", b"SMoE"):
            data = fill * (frame.MAX_FRAME_BYTES // len(fill))
            assert ground.ask(data).kind == frame.ERROR
        end = time.monotonic() + WAIT_S
        while process.memory_info().rss - before > MEMORY_MB * 1e6 and time.monotonic() < end:
            time.sleep(0.05)
        assert process.memory_info().rss - before <= MEMORY_MB * 1e6
        # and one beyond it in the midst of others: it costs the connection, and each of them is answered or counted
        for _ in range(40):
            ground.send(GOOD)
        ground.send(bytes(frame.MAX_FRAME_BYTES + 1))
        end = time.monotonic() + WAIT_S
        pong = None
        while pong is None:  # until the agent has dialled again
            assert time.monotonic() < end
            try:
                ground.send(frame.pack(frame.Frame(frame.PING, 77)))
                while (answer := ground.receive(timeout_s=0.3)).kind == frame.PARTIAL:
                    pass
                pong = answer
            except (TimeoutError, zmq.ZMQError):
                time.sleep(0.02)
        assert (pong.kind, pong.request_id) == (frame.PONG, 77)
        errors, requests = published(observer, refused + 3, 0)
        unanswered = errors.get("unanswered", 0)
        assert errors["oversized"] == 1 and requests - served + unanswered == 40
        assert sum(errors.values()) - unanswered - errors.get("unsent", 0) == refused + 3
        print(f"before the one that was too long: {40 - unanswered} answered, {unanswered} counted")


def test_what_a_failing_link_cut_off_is_counted(bundle):
    """A burst in one piece: 40 requests, then a length of 16 exabytes. What had no answer by then is counted."""
    counters = Counters()
    loaded = experts.load(bundle.root, bundle.stems, 10**11)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        link = LinkConfig(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        with DataPlane("n1", link, loaded, counters, lambda *_: None) as plane:
            peer, _ = listener.accept()
            with peer:
                burst = GREETING + ready(b"ROUTER") + message(GOOD) * 40 + b"\x02" + b"\xff" * 8
                peer.sendall(burst)
                listener.settimeout(WAIT_S)
                again, _ = listener.accept()  # the agent dials anew
                again.close()
            assert plane.alive and plane.failed is None
    errors = counters.link_errors
    assert errors["oversized"] == 1
    assert counters.requests + errors["unanswered"] == 40 and errors["unanswered"] > 0


# defect -> (what is put in, what the check says of it)
DEFECTS = {
    "raises": (
        """
from node_agent import frame
whole = frame.unpack
def unpack(data):
    try:
        return whole(data)
    except frame.FrameError:
        raise KeyError("header") from None
frame.unpack = unpack""",
        "no answer within|Host unreachable",
    ),
    "drops in silence": (
        """
from node_agent.dataplane import Service
Service._refuse = lambda *_: None""",
        "no answer within|request_id",
    ),
    "answers without a count": (
        """
from node_agent.dataplane import Service
Service.count = lambda *_: None""",
        "no such telemetry",
    ),
    "keeps everything": (
        """
from node_agent.dataplane import Service
kept, refuse = [], Service._refuse
Service._refuse = lambda *a: kept.append(b"x" * 300_000) or refuse(*a)""",
        "grew by",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_control_an_agent_with_a_defect_fails_the_same_check(rig, bundle, frames, tmp_path, monkeypatch, defect):
    broker, ground, observer = rig
    patient = observer.next
    monkeypatch.setattr(observer, "next", lambda leaf, condition: patient(leaf, condition, timeout_s=2.0))
    tables = agent_tables(tmp_path, ground.endpoint, bundle, broker)
    put_in, said = DEFECTS[defect]
    with DefectiveAgent(tmp_path, tables, put_in) as agent:
        ground.hello()
        with pytest.raises((AssertionError, TimeoutError, zmq.ZMQError), match=said):
            flood_agent(agent, ground, observer, frames[:500], 2.0 if "no answer" in said else WAIT_S)
        if defect == "raises":
            assert agent.process.wait(WAIT_S) != 0


# ---------------------------------------------------------------- a ground station

ROGUES = (
    "rogue-1",
    "rogue-2",
    "rogue-3",
    "Not_An_Id",
    "",
)  # the last one has no name and gets one that no node can have
GREETED = ROGUES[:2]  # those that have said HELLO before


def ground_verdict(name: str, data: bytes, known: set[str]) -> str:
    """'bad', 'unasked' or '' for what a rogue sends; its first HELLO makes it known."""
    verdict = frame_verdict(data)[0]
    if name not in ROGUES[:3] or verdict in ("malformed", "version"):
        return "bad"
    if verdict == str(frame.HELLO):
        known.add(name)
        return ""
    if name not in known or verdict not in (str(frame.PARTIAL), str(frame.ERROR), str(frame.PONG)):
        return "bad"
    return "unasked"


class Rogue:
    """A libzmq DEALER under any name."""

    def __init__(self, context: zmq.Context, endpoint: str, name: str):
        self.name = name
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, int(WAIT_S * 1000))
        if name:
            self.socket.setsockopt(zmq.ROUTING_ID, name.encode())
        self.socket.connect(endpoint)


def flood_station(station: Station, frames: list[bytes], timeout_s: float) -> None:
    """Rogue peers send all of `frames` while the station is served by n1; checks its answers, memory and counters."""
    process = psutil.Process(station.process.pid)
    known: set[str] = set()
    expected: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    order = {"node": "n1", "request": GOOD.hex(), "timeout_s": timeout_s}
    first = station.ask("serve", frames=0, least=20, **order)
    assert first["outcomes"] == {"partial": 20}
    counted = station.ask("counts")
    before, grown = process.memory_info().rss, 0
    hello = frame.pack(frame.Frame(frame.HELLO, text="rogue"))
    with zmq.Context() as context:
        rogues = [Rogue(context, station.endpoint, name) for name in ROGUES]
        sent = [(rogue, hello) for rogue in rogues if rogue.name in GREETED]
        sent += [(rogues[index % len(rogues)], data) for index, data in enumerate(frames)]
        for start in range(0, len(sent), WINDOW):
            window = sent[start : start + WINDOW]
            for rogue, data in window:
                expected[ground_verdict(rogue.name, data, known)] += 1
            due = expected["bad"] + expected["unasked"] + counted["bad_frames"] + counted["unasked_frames"]
            station.begin("serve", frames=due, least=SERVED, **order)
            for rogue, data in window:
                rogue.socket.send(data)
            served = station.end()
            assert served["refused"] == due, "not every bad frame was counted"
            outcomes.update(served["outcomes"])
            assert served["answers"] == first["answers"] and len(first["answers"]) == 1  # bit for bit
            grown = max(grown, process.memory_info().rss - before)
        after = station.ask("counts")
        for rogue in rogues:
            rogue.socket.close()
    assert grown <= MEMORY_MB * 1e6, f"grew by {grown / 1e6:.1f} MB"
    bad, unasked = (after[name] - counted[name] for name in ("bad_frames", "unasked_frames"))
    assert (bad, unasked) == (expected["bad"], expected["unasked"]), "not every bad frame was counted"
    assert set(outcomes) == {"partial"} and outcomes.total() >= SERVED * len(sent) / WINDOW  # n1 lost nothing by it
    assert set(after["peers"]) == {"n1", *known}
    assert station.process.poll() is None and "Traceback" not in station.log.read_text()
    print(f"{len(frames)} frames: {dict(expected)}, n1 served {dict(outcomes)}, grew by {grown / 1e6:.2f} MB")


@pytest.fixture
def served_station(bundle, tmp_path):
    """make(defect) -> a ground station with n1, a stock agent, at its Link."""
    running = []

    def make(defect: str = "") -> Station:
        station = Station(tmp_path, defect=defect)
        running.append(station)
        running.append(AgentProcess(tmp_path, agent_tables(tmp_path, station.endpoint, bundle)))
        end = time.monotonic() + WAIT_S
        while "n1" not in station.ask("counts")["peers"]:
            assert time.monotonic() < end, "n1 did not come"
        return station

    yield make
    for each in reversed(running):
        each.__exit__()


def test_a_ground_station_survives_ten_thousand_frames_and_a_good_node_is_served_all_the_while(served_station, frames):
    station = served_station()
    flood_station(station, frames, timeout_s=WAIT_S)
    # what breaks the protocol below the frames costs the connection, and is counted too
    host, _, port = station.endpoint.removeprefix("tcp://").rpartition(":")
    opened = GREETING + ready(b"DEALER", b"n9")
    for data in (b"GET / HTTP/1.1\r\n\r\n", GREETING + message(b"no READY"), opened + b"\x02" + b"\xff" * 8):
        with socket.create_connection((host, int(port)), WAIT_S) as peer:
            peer.sendall(data)
            while peer.recv(4096):
                pass
    assert station.ask("counts")["dropped_connections"] == {"protocol": 3}
    assert station.ask("serve", node="n1", request=GOOD.hex(), timeout_s=WAIT_S, frames=0, least=5)["outcomes"] == {
        "partial": 5
    }


def test_peers_that_send_without_end_do_not_keep_the_caller(tmp_path):
    """By libzmq's ROUTER, as for encrypted links: three peers were enough for `drain` never to come back."""
    with Link(f"ipc://{tmp_path}/link") as link, zmq.Context() as context:
        rogues = [Rogue(context, link.endpoint, name) for name in ROGUES[:3]]
        for rogue in rogues:
            for _ in range(1_500):
                rogue.socket.send(b"x")
        end = time.monotonic() + WAIT_S
        last = 0
        while link.bad_frames < 4_500 and time.monotonic() < end:
            link.drain()
            assert link.bad_frames - last <= TAKEN_AT_ONCE
            last = link.bad_frames
        assert link.bad_frames == 4_500 and link.dropped_connections is None
        for rogue in rogues:
            rogue.socket.close()


STATION_DEFECTS = {
    "raises": (
        """
from node_agent import frame
whole = frame.unpack
def unpack(data):
    try:
        return whole(data)
    except frame.FrameError:
        raise KeyError("header") from None
frame.unpack = unpack""",
        "the ground station ended: .*KeyError",
    ),
    "drops in silence": (
        """
from ground_station.link import Link
take = Link._take
def silent(self, *arguments):
    before = self.bad_frames
    take(self, *arguments)
    self.bad_frames = before
Link._take = silent""",
        "not every bad frame was counted",
    ),
    "keeps everything": (
        """
from ground_station.link import Link
kept, take = [], Link._take
Link._take = lambda self, *arguments: kept.append(b"x" * 300_000) or take(self, *arguments)""",
        "grew by",
    ),
}


@pytest.mark.parametrize("defect", STATION_DEFECTS)
def test_the_control_a_ground_station_with_a_defect_fails_the_same_check(served_station, frames, defect):
    put_in, said = STATION_DEFECTS[defect]
    station = served_station(put_in)
    with pytest.raises((AssertionError, zmq.ZMQError), match=f"(?s){said}"):
        flood_station(station, frames[:500], timeout_s=1.5)
