"""Spot re-computation: a node that returns wrong sums is found and quarantined with an alarm; an honest fleet never is.

Agents are real processes. Wrong are a stock agent whose bundle has one expert scaled by 1.01 behind a manifest that was forged to
fit, and a DEALER written here that answers NaN, or sums that no model gives. The text that a run should have written is known from
the same bundle in one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zmq
from cluster import PROMPT, greedy

from ground_station import fleet_changes, rates, selection, spot_check, spot_fleet
from ground_station.allow_list import AllowList
from ground_station.broker import Broker
from ground_station.control import Control
from ground_station.decode import Decoder
from ground_station.dispatch import Table
from ground_station.fleet_records import FleetFolder, NodeRecord
from ground_station.link import Link
from ground_station.local import LocalExperts
from ground_station.local_fleet import LocalFleet
from ground_station.placement import round_robin
from ground_station.remote import RemoteExperts
from ground_station.spot_bundle import Bundle
from ground_station.spot_check import GROUND, Opinion, Rules, vote
from ground_station.spot_checker import SpotChecker
from ground_station.spot_sample import Sent
from ground_station.trunk import Trunk
from node_agent import compress, frame, shard, wire
from node_agent.partial import partial_sum
from quantize.synthetic import synthetic

REFERENCE = Path(__file__).parent.parent / "quantize" / "reference" / "bundle"
NODES = ("node-1", "node-2", "node-3", "node-4")
LIAR = "node-4"
ALWAYS = Rules(rate=1.0, first=0)


class Ground:
    """A broker, a link and real agents; `bundles`: nodes that have another bundle than the ground station on their disk."""

    def __init__(self, bundle: Path, run_dir: Path, nodes: tuple[str, ...], copies: int, bundles: dict[str, Path]):
        self.bundle, self.manifest = bundle, shard.read_manifest(bundle)
        self.holdings = round_robin(self.manifest, dict.fromkeys(nodes, 1 << 30), "int8", ("int8",) * (copies - 1))
        self.run_dir, self.bundles = run_dir, bundles
        dims = self.manifest.dims
        self.policy = selection.make("topk", self.manifest.routing, dims.top_k, dims.experts)
        self.trunk = Trunk(bundle, self.manifest)

    @contextlib.contextmanager
    def running(self):
        with Broker(self.run_dir) as self.broker, Link() as self.link:
            address = (self.broker.host, self.broker.port)
            fleet = LocalFleet(self.run_dir, self.bundle, self.holdings, self.link.endpoint, address)
            for node, other in self.bundles.items():
                path = self.run_dir / node / "spacemoe.toml"
                text = path.read_text()
                assert str(self.bundle.resolve()) in text
                path.write_text(text.replace(str(self.bundle.resolve()), str(other.resolve())))
            with fleet:
                fleet.wait_joined(self.link)
                yield self

    def table(self, renamed: dict[str, str] | None = None) -> Table:
        names = renamed or {}
        return Table(tuple(dataclasses.replace(h, node=names.get(h.node, h.node)) for h in self.holdings))

    def decoder(
        self, table: Table, rules: Rules | None, codec: str = "fp32", local: bool = True, **keys
    ) -> tuple[Decoder, SpotChecker | None]:
        spot = None
        if rules is not None:
            spot = SpotChecker(rules, Bundle(self.bundle, self.manifest) if local else None, seed=1, **keys)
        allocator = rates.for_codec(codec, self.bundle, self.manifest)
        remote = RemoteExperts(self.link, table, codec, allocator=allocator, spot=spot)
        return Decoder(self.trunk, self.policy, remote), spot

    def logits_here(self, table: Table) -> np.ndarray:
        return greedy(Decoder(self.trunk, self.policy, LocalExperts(self.bundle, self.manifest, table)), 12)[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bundle") / "tiny"
    synthetic(root, 64, 32, 2, 8, 2, heads=2, kv_heads=1, head_dim=32, vocab=256, precision=("int8",))
    return root


@pytest.fixture(scope="module")
def altered(tiny, tmp_path_factory):
    """Four agents that hold three copies of each expert; node-4 has the altered bundle."""
    run_dir = tmp_path_factory.mktemp("altered")
    ground = Ground(tiny, run_dir, NODES, 3, {})
    index = Table(ground.holdings).nodes.index(LIAR)
    at = next(key for key, copies in sorted(Table(ground.holdings).copies.items()) if copies[0][0] == index)
    ground.bundles = {LIAR: scaled(tiny, run_dir / "bundle-scaled", *at, 1.01)}
    ground.at = at
    with ground.running():
        yield ground


@pytest.fixture
def ground(altered):
    yield altered
    for node in [*altered.link.quarantined]:
        altered.link.release(node)
    assert not altered.link.wait_for({*NODES}, 5.0)


def scaled(bundle: Path, out: Path, layer: int, expert: int, factor: float) -> Path:
    """A copy whose expert's output is `factor` times what it was, with a manifest that lists the altered file as right."""
    import onnx

    shutil.copytree(bundle, out)
    manifest = shard.read_manifest(out)
    entry = manifest.shard(layer, expert, "int8")
    graph = onnx.load(str(out / entry.files[0].path), load_external_data=False).graph
    (scale,) = [item for item in graph.initializer if item.name == "down.scale"]
    where = {item.key: item.value for item in scale.external_data}
    start = int(where["offset"])
    end = start + int(where["length"])
    data = bytearray((out / entry.files[1].path).read_bytes())
    data[start:end] = (np.frombuffer(data[start:end], "<f4") * factor).astype("<f4").tobytes()
    weights = shard.write_file(out, entry.files[1].path, bytes(data))
    forged = dataclasses.replace(entry, files=(entry.files[0], weights, *entry.files[2:]))
    shards = tuple(forged if item is entry else item for item in manifest.shards)
    shard.write_manifest(out, dataclasses.replace(manifest, shards=shards))
    return out


_NUMBERS = itertools.count(1)


class Dealer(threading.Thread):
    """A node that says HELLO as agents do and answers every request with what `answer(request)` gives."""

    def __init__(self, node: str, endpoint: str, answer: Callable[[frame.Frame], np.ndarray]):
        super().__init__(daemon=True)
        self.node, self.endpoint, self.answer, self.over = node, endpoint, answer, threading.Event()
        self.answers = 0

    def run(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, self.node.encode())
        socket.connect(self.endpoint)
        due_s = 0.0
        while not self.over.is_set():
            if time.monotonic() >= due_s:
                socket.send(frame.pack(frame.Frame(frame.HELLO, text=self.node)))
                due_s = time.monotonic() + 0.2
            if socket.poll(20):
                asked = frame.unpack(socket.recv())
                if asked.kind == frame.EXPERTS:
                    x = self.answer(asked)
                    reply = frame.Frame(frame.PARTIAL, asked.request_id, asked.layer, codec=asked.reply_codec, x=x)
                    # a payload of its own, since the codec would refuse what is not finite
                    socket.send(frame.pack(reply, x.tobytes() if asked.reply_codec == "fp32" else None))
                    self.answers += 1
        socket.close(0)
        context.term()


@contextlib.contextmanager
def liar(ground: Ground, value: float):
    """Computes nothing and says `value` everywhere."""
    with dealer(ground, lambda asked: np.full(asked.x.shape, value, np.float32)) as thread:
        yield thread


@contextlib.contextmanager
def dealer(ground: Ground, answer: Callable[[frame.Frame], np.ndarray]):
    thread = Dealer(f"dealer-{next(_NUMBERS)}", ground.link.endpoint, answer)
    thread.start()
    assert not ground.link.wait_for({thread.node}, 5.0)
    try:
        yield thread
    finally:
        thread.over.set()
        thread.join(5.0)


def tokens_until_quarantined(decoder: Decoder, node: str, most: int) -> int:
    for count, _ in enumerate(decoder.generate(PROMPT, most, ignore_eos=True), 1):
        if node in decoder.experts.link.quarantined:
            return count
    raise AssertionError(f"{node} not found within {most} tokens: {dict(decoder.experts.spot.counts)}")


# ---------------------------------------------------------------- a node that is a little wrong


@pytest.mark.broker
@pytest.mark.parametrize("codec, local", [("fp32", True), ("q8", False)])
def test_an_expert_scaled_by_1_01_behind_a_forged_manifest_is_found(ground, codec, local):
    table, kept = ground.table(), []
    # control: unchecked, nobody notices, and the text is computed with the wrong expert
    decoder, _ = ground.decoder(table, None)
    expected = ground.logits_here(table)
    assert np.abs(greedy(decoder, 12)[1] - expected).max() > 1e-4
    assert not ground.link.quarantined

    decoder, spot = ground.decoder(
        table, ALWAYS, codec, local, on_quarantine=lambda node, reason: kept.append((node, reason))
    )
    tokens_until_quarantined(decoder, LIAR, 100)
    costs = list(decoder.generate(PROMPT, 40, ignore_eos=True))
    assert decoder.experts.settle(10)
    assert set(ground.link.quarantined) == {LIAR}  # and nobody who was compared with it
    (event,) = spot.alarms
    layer, expert = ground.at
    assert (event.node, event.severity, event.kind) == (LIAR, "critical", "quarantine")
    assert f"layer {layer}, experts" in event.text and "int8" in event.text and f"release {LIAR}" in event.text
    assert str(expert) in event.text.partition("experts ")[2].partition(" ")[0].split(",")
    assert kept == [(LIAR, ground.link.quarantined[LIAR])]
    # the ladder has taken over: nothing goes to it, and what comes out is right
    assert {rung.reason for cost in costs for rung in cost.rungs} == {"node is quarantined"}
    before = decoder.experts.served[LIAR]
    decoder, _ = ground.decoder(table, None)
    logits = greedy(decoder, 12)[1]
    assert decoder.experts.served[LIAR] == 0 and before > 0
    assert np.abs(logits - expected).max() < 1e-5
    # its next HELLO does not bring it back, as it would a node that was only marked down
    heard_s = ground.link.peers[LIAR].last_seen_s
    while ground.link.peers[LIAR].last_seen_s == heard_s:
        ground.link.wait_for({LIAR}, 0.2)
    assert not ground.link.is_up(LIAR)


@pytest.mark.broker
def test_with_the_default_rules_it_is_found_within_some_hundred_tokens(ground):
    decoder, spot = ground.decoder(ground.table(), Rules())
    found = tokens_until_quarantined(decoder, LIAR, 600)
    asked = spot.counts["requests"] + spot.counts["computed here"]
    print(f"found after {found} tokens; {asked} opinions for {sum(decoder.experts.served.values())} expert runs")
    assert set(ground.link.quarantined) == {LIAR}


# ---------------------------------------------------------------- a node that is very wrong


@pytest.mark.broker
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, 1e5])
def test_a_node_that_answers_nan_or_what_no_model_gives_is_quarantined(ground, value):
    """It stands in node-4's place."""
    with liar(ground, value) as thread:
        table = ground.table({LIAR: thread.node})
        decoder, spot = ground.decoder(table, Rules(rate=0.0, first=1, new_rate=0.0))
        taken = tokens_until_quarantined(decoder, thread.node, 20)
        assert thread.answers and taken <= 20
        assert set(ground.link.quarantined) == {thread.node}
        assert [event.kind for event in spot.alarms] == ["quarantine"]
        logits = greedy(decoder, 12)[1]
        assert np.abs(logits - ground.logits_here(table)).max() < 1e-5


@pytest.mark.broker
@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_what_is_not_finite_never_reaches_the_hidden_state_when_nobody_checks(ground, value, monkeypatch):
    with liar(ground, value) as thread:
        table = ground.table({LIAR: thread.node})
        decoder, _ = ground.decoder(table, None)
        logits = greedy(decoder, 12)[1]
        assert thread.answers > 0 and np.isfinite(logits).all()
        expected = ground.logits_here(table)
        assert np.abs(logits - expected).max() < 1e-5
    if math.isfinite(value):  # control: without the limit it would (NaN is refused by the codec before that)
        with liar(ground, value) as thread, np.errstate(all="ignore"):
            monkeypatch.setattr(spot_check, "too_large", lambda energy: False)
            decoder, _ = ground.decoder(ground.table({LIAR: thread.node}), None)
            try:
                logits = greedy(decoder, 12)[1]
            except compress.CodecError as error:
                assert "not finite" in str(error)
            else:
                assert not np.isfinite(logits).all() or np.abs(logits - expected).max() > 0.1


@pytest.mark.broker
def test_nobody_can_say_what_a_sum_should_be_but_three_times_nan_is_enough(ground):
    with liar(ground, math.nan) as thread:
        holdings = [dataclasses.replace(h, node=thread.node) for h in ground.holdings if h.node == LIAR]
        keys = [(h.layer, h.expert) for h in holdings]
        others = [h for h in ground.holdings if h.node == "node-1" and (h.layer, h.expert) not in keys]
        alone = Table((*holdings, *others))
        decoder, spot = ground.decoder(alone, Rules(rate=0.0, first=0, new_rate=0.0), local=False)
        layer, expert = keys[0]
        hidden = np.ones((1, 64), np.float32)
        for _ in range(200):
            out = decoder.experts.run(layer, hidden, np.array([[expert]]), np.ones((1, 1), np.float32))
            assert np.isfinite(out).all()
            if thread.node in ground.link.quarantined:
                break
            ground.link.wait_for({thread.node}, 2.0)
        assert spot.counts["nobody to ask"] == 3 and "nobody else" in spot.alarms[0].text


# ---------------------------------------------------------------- an honest fleet


@pytest.mark.broker
def test_an_honest_fleet_raises_no_alarm_whatever_the_codec_and_the_number_of_rows(ground):
    """Three of the agents; every answer may be computed again, by another agent, and where there is none by the bundle."""
    honest = tuple(h for h in ground.holdings if h.node != LIAR)
    first = {(h.layer, h.expert): h for h in sorted(honest, key=lambda h: -h.rank)}
    single = Table(tuple(first.values()))
    dims, layers = ground.manifest.dims, ground.manifest.moe_layers
    # the synthetic bundle has no calibration: what is measured there are its sizes
    sensitivity = rates.Sensitivity(
        np.full(len(layers), 0.2), np.full((len(layers), dims.experts), 1e-6), {n: i for i, n in enumerate(layers)}
    )
    for codec, table in [*((codec, Table(honest)) for codec in ("fp32", "q8", "importance", "q4")), ("q8", single)]:
        spot = SpotChecker(ALWAYS, Bundle(ground.bundle, ground.manifest), seed=1)
        allocator = rates.Allocator(sensitivity) if codec == "importance" else None
        remote = RemoteExperts(ground.link, table, codec, allocator=allocator, spot=spot)
        list(Decoder(ground.trunk, ground.policy, remote).generate([*range(5, 45)], 50, ignore_eos=True))
        assert remote.settle(10)
        assert not spot.alarms and not ground.link.quarantined
        assert spot.counts["agree"] >= 30 and not spot.counts["undecided"], dict(spot.counts)
        assert (spot.counts["computed here"] > 0) == (table is single)
        assert not remote.traffic.rungs


@pytest.mark.broker
@pytest.mark.parametrize("known", [True, False])
def test_a_board_of_another_kind_is_not_taken_for_a_wrong_one(ground, known):
    """It computes every expert with the difference that was measured from x86 to a Cortex-A72. Control: held to be of the same
    kind, it would be quarantined."""
    bundle = Bundle(ground.bundle, ground.manifest)

    def answer(asked: frame.Frame) -> np.ndarray:
        def run_expert(expert: int, precision: int, rows: np.ndarray) -> np.ndarray:
            y = bundle._session(asked.layer, expert, precision).run(["y"], {"x": rows})[0]
            noise = [np.random.default_rng([expert, zlib.crc32(row)]).standard_normal(y.shape[1]) for row in rows]
            size = 0.014 * np.linalg.norm(y, axis=1, keepdims=True) / np.sqrt(y.shape[1])
            return (y + size * np.array(noise)).astype(np.float32)

        return partial_sum(np.ascontiguousarray(asked.x), asked.pairs, run_expert)

    with dealer(ground, answer) as thread:
        table = ground.table({LIAR: thread.node})
        kinds = {**dict.fromkeys(NODES, "x86"), thread.node: "arm", GROUND: "x86"} if known else None
        decoder, spot = ground.decoder(table, ALWAYS, "q8", kinds=kinds)
        list(decoder.generate(PROMPT, 40, ignore_eos=True))
        assert decoder.experts.settle(10)
        assert thread.answers > 0 and (not known or spot.counts["agree"] > 10)
        assert [*ground.link.quarantined] == ([] if known else [thread.node])
        assert bool(spot.alarms) != known
    bundle.close()


def test_what_calibration_finds_implausible_is_doubted_and_what_is_absurd_is_not_used():
    manifest = shard.read_manifest(REFERENCE)
    bundle = Bundle(REFERENCE, manifest)
    norms, hidden = bundle.norms(), manifest.dims.hidden
    assert norms.shape == (len(manifest.moe_layers), manifest.dims.experts) and norms.min() > 1
    layer = manifest.moe_layers[1]
    pairs = np.array([(0, 3, 1, 0.5), (0, 5, 1, 0.25)], frame.PAIR)
    x = np.ones((1, hidden), np.float32)
    sent = Sent(x, compress.encode("fp32", x), "fp32", "fp32", 0.0, pairs)
    expected = 0.5 * norms[1, 3] + 0.25 * norms[1, 5]
    for times, doubted, used in ((1, False, True), (8.3, False, True), (20, True, True), (2000, True, False)):
        spot = SpotChecker(Rules(rate=0, first=0, new_rate=0), bundle, seed=1)
        answer = np.zeros((1, hidden), np.float32)
        answer[0, 7] = times * expected
        failure = spot.answered(layer, 0, sent, frame.Frame(frame.PARTIAL, x=answer), spot_check.energy_of(answer))
        assert (spot.busy, failure is None) == (doubted, used)
    bundle.close()


# ---------------------------------------------------------------- the alarm


@pytest.mark.broker
def test_the_alarm_goes_out_on_the_ground_stations_own_topic(mosquitto, tmp_path):
    sub = shutil.which("mosquitto_sub")
    if sub is None:
        from conftest import lacking

        lacking("mosquitto_sub", "apt-get install mosquitto-clients")
    with Broker(tmp_path, "mosquitto") as broker, Control("demo", broker.host, broker.port) as control:
        hearing = subprocess.Popen(
            [
                "stdbuf",
                "-oL",
                sub,
                "-h",
                broker.host,
                "-p",
                str(broker.port),
                "-t",
                "spacemoe/v1/demo/ground/event",
                "-q",
                "1",
            ]
            + ["-C", "1", "-W", "10", "-d"],
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = iter(hearing.stdout.readline, "")
        assert any("SUBACK" in line for line in lines)
        control.alarm(wire.Event("node-4", 1.0, "critical", "quarantine", "node-4 returns wrong sums"))
        (message,) = [json.loads(line) for line in lines if line.startswith("{")]
        assert hearing.wait(10) == 0
    assert message == {
        "node": "node-4",
        "generated_at": 1.0,
        "severity": "critical",
        "kind": "quarantine",
        "text": "node-4 returns wrong sums",
    }


def test_a_quarantine_lasts_in_the_fleets_records_until_it_is_released(tmp_path):
    folder = FleetFolder.create(tmp_path / "fleet", "lab", ("10.0.0.1",))
    keys = {}
    for node, state in (("a", "enrolled"), ("b", "enrolled"), ("c", "revoked")):
        keys[node] = zmq.curve_keypair()[0].decode()
        with folder.locked():
            folder.write(NodeRecord(node, "pi5", state, curve_public=keys[node]))
    before = AllowList(folder)
    assert before.allows("a") and before.allows("b")
    spot_fleet.quarantine(folder, "a", "a returns wrong sums:\n" + "x" * 1000)
    spot_fleet.quarantine(folder, "c", "it is out already")
    record = FleetFolder.open(tmp_path / "fleet").node("a")
    assert (record.state, record.reason[:22], len(record.reason)) == ("quarantined", "a returns wrong sums: ", 400)
    assert folder.node("c").state == "revoked"
    before.refresh()
    assert not before.allows("a") and before.allows("b")  # the data plane does not let it in any more
    fleet_changes.release(folder, "a")
    before.refresh()
    assert before.allows("a")


# ---------------------------------------------------------------- decisions


def opinion(who: str, *values: float) -> Opinion:
    return Opinion(who, np.array([values], np.float32))


INT8 = np.array([(0, 1, frame.PRECISION_ID["int8"], 1.0)], frame.PAIR)


def of_one_kind(one: str, other: str) -> bool:
    return True


def test_two_against_one_and_the_ground_station_alone():
    right, wrong = (1.0, 2.0), (1.01, 2.02)

    def wrongs(*opinions: Opinion) -> tuple[str, ...] | None:
        verdict = vote(*opinions, *[None] * (3 - len(opinions)), INT8, of_one_kind)
        assert not (verdict.undecided and verdict.wrong)
        return None if verdict.undecided else verdict.wrong

    assert wrongs(opinion("a", *right), opinion("b", *right)) == ()
    assert wrongs(opinion("a", *wrong), opinion("b", *right), opinion("c", *right)) == ("a",)
    assert wrongs(opinion("a", *right), opinion("b", *wrong), opinion("c", *right)) == ("b",)
    assert wrongs(opinion("a", *wrong), opinion(GROUND, *right)) == ("a",)
    assert wrongs(opinion("a", *wrong), opinion("b", *wrong[:1], 7.0), opinion(GROUND, *right)) == ("a", "b")
    assert wrongs(opinion("a", *wrong), opinion("b", *right)) is None
    assert wrongs(opinion("a", 1.0, 2.0), opinion("b", 3.0, 4.0), opinion("c", 9.0, 1.0)) is None
    assert wrongs(opinion("a", math.nan, 2.0), opinion("b", *right), opinion("c", *right)) == ("a",)
    # within the tolerance nobody is wrong, and just outside somebody is: 2e-4 of 2 in a norm of sqrt(5)
    assert wrongs(opinion("a", 1.0, 2.0002), opinion("b", *right), opinion("c", *right)) == ()
    assert wrongs(opinion("a", 1.0, 2.0003), opinion("b", *right), opinion("c", *right)) == ("a",)


def test_another_kind_of_machine_is_not_wrong_and_can_tell_who_is():
    """Noise as it was measured from x86 to a Cortex-A72: 1.4 % of a row, in directions of its own."""
    random = np.random.default_rng(5)
    right = random.standard_normal((32, 256)).astype(np.float32)
    other = right + 0.014 * random.standard_normal(right.shape).astype(np.float32)
    arm = {"a", "b"}

    def alike(one: str, two: str) -> bool:
        return {one, two} <= arm

    assert not vote(Opinion("a", right), Opinion(GROUND, other), None, INT8, alike).wrong
    assert vote(Opinion("a", right), Opinion(GROUND, other), None, INT8, of_one_kind).wrong == ("a",)  # control
    for factor in (1.01, 0.99, 1.2):
        wrong = right * np.float32(factor)
        assert vote(Opinion("a", wrong), Opinion("b", right), Opinion(GROUND, other), INT8, alike).wrong == ("a",)
        assert vote(Opinion("a", right), Opinion("b", wrong), Opinion(GROUND, other), INT8, alike).wrong == ("b",)
    # half-way between the two it cannot tell, and says so
    half = vote(
        Opinion("a", right * np.float32(1.01)),
        Opinion("b", right * np.float32(0.99)),
        Opinion(GROUND, other),
        INT8,
        alike,
    )
    assert half.undecided and not half.wrong
    assert spot_check.tolerance(INT8, True) < 0.0144 < spot_check.tolerance(INT8, False)
    fp32 = np.array([(0, 1, 0, 1.0)], frame.PAIR)
    assert spot_check.tolerance(fp32, False) == spot_check.tolerance(INT8, True)


def test_deviation_by_hand():
    one = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    other = np.array([[3.0, 3.0], [0.0, 0.0]], np.float32)
    assert spot_check.deviation(one, other) == pytest.approx(1 / 5)
    assert spot_check.deviation(one, one) == 0
    assert spot_check.deviation(one, np.full((2, 2), np.inf, np.float32)) == math.inf
    pairs = np.array([(0, 1, 1, 0.5), (0, 2, 1, -0.25)], frame.PAIR)
    # ||(3, 4)|| = 5 over 0.5 * 8 + 0.25 * 4
    norms = [1.0, 8.0, 4.0]
    assert spot_check.norm_over_expected(one[:1], 25.0, pairs, norms) == pytest.approx(1.0)
    two = np.array([(0, 1, 1, 0.5), (1, 2, 1, -0.5)], frame.PAIR)  # 5 / 4 and 10 / 2
    rows = np.array([[3.0, 4.0], [6.0, 8.0]], np.float32)
    assert spot_check.norm_over_expected(rows, 125.0, two, norms) == pytest.approx(5.0)


def test_when_an_answer_is_computed_again():
    rules = Rules(rate=0.01, first=2, new_rate=0.1)
    assert [spot_check.why_check(rules, seen, False, 0.5) for seen in (0, 1, 2)] == ["first", "first", ""]
    assert spot_check.why_check(rules, 9, True, 0.05) == "new" and spot_check.why_check(rules, 9, True, 0.2) == ""
    assert (
        spot_check.why_check(rules, 9, False, 0.009) == "random" and spot_check.why_check(rules, 9, False, 0.05) == ""
    )
    for bad in ({"rate": 1.5}, {"rate": -1}, {"first": -1}, {"max_rows": 0}, {"answer_s": 0}, {"rate": math.nan}):
        with pytest.raises(ValueError):
            Rules(**bad)


def test_who_could_compute_it_again():
    pairs = np.array([(0, 0, 1, 0.5), (0, 1, 1, 0.5), (0, 2, 1, 0.5)], frame.PAIR)
    copies = {(0, 0): ((0, 1), (1, 1)), (0, 1): ((0, 1), (2, 1), (1, 1)), (0, 2): ((0, 1), (2, 1), (1, 2))}
    found, whole = spot_check.parts(pairs, 0, copies, [False, True, True])
    assert whole and [(part.node, part.pairs.tolist()) for part in found] == [
        (1, [True, True, False]),
        (2, [False, False, True]),
    ]
    found, whole = spot_check.parts(pairs, 0, copies, [False, True, False])
    assert not whole and [part.node for part in found] == [1]  # of expert 2 it has another precision
    assert spot_check.parts(pairs, 0, copies, [False, False, False]) == ([], False)
    # the one that is checked is never its own second opinion: it is not usable


def test_at_most_half_of_a_fleet_is_quarantined_by_itself():
    assert [spot_check.may_quarantine(n, 4) for n in (0, 1, 2)] == [True, True, False]
    assert spot_check.may_quarantine(0, 1) and not spot_check.may_quarantine(1, 2)


def test_sums_that_are_too_large():
    def refused(*values: float) -> bool:
        return spot_check.too_large(spot_check.energy_of(np.array([values], np.float32)))

    assert refused(np.nan, 1) and refused(np.inf, 1) and refused(-np.inf, np.inf) and refused(-3e38, 3e38)
    assert not refused(*[1e4] * 32) and not refused(0.0)
