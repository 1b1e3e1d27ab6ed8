"""Delivery's frames and the node's state machine in one process: round trips, fuzzing, refusals, disks, a shard that is busy."""

from __future__ import annotations

import dataclasses
import random
import struct
import threading

import numpy as np
import psutil
import pytest
from node_rig import HIDDEN, make_bundle

from ground_station.delivery_pace import Paced, Window, wire_bytes
from node_agent import delivery_frame, experts, frame, shard
from node_agent.counters import Counters
from node_agent.delivery import Receiver
from node_agent.delivery_frame import Have, Message, Offer, Shard, pack, unpack
from node_agent.delivery_store import RESERVE_BYTES, Store

FILE = shard.FileEntry("experts/L01E002.int8.onnx", 1130, "ab" * 32)
OFFER = Offer(Shard(1, 2, "int8"), HIDDEN, "rig", (FILE, shard.FileEntry("experts/L01E002.int8.bin", 9, "cd" * 32)))
MESSAGES = (
    Message(delivery_frame.OFFER, 2**64 - 1, offer=OFFER),
    Message(delivery_frame.OFFER, 3, offer=dataclasses.replace(OFFER, signature=bytes(range(64)))),
    Message(delivery_frame.STATE, 5, have=(Have(1130, "ab" * 32), Have(0, "ef" * 32))),
    Message(delivery_frame.CHUNK, 5, 1, 4096, b"weights"),
    Message(delivery_frame.ACK, 5, 1, 4103),
    Message(delivery_frame.DONE, 5),
    Message(delivery_frame.REFUSED, 5, refusal="hash", text="not what was offered"),
    Message(delivery_frame.DROP, 5, shard=Shard(65_535, 0, "fp32")),
    Message(delivery_frame.DROPPED, 5),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


class Node:
    """A receiver with its own store; `say` packs, answers and unpacks."""

    def __init__(self, root, bundle=None, limit_bytes=10**12, **store):
        self.counters, self.changes, self.reported = Counters(), [], []
        self.experts = experts.Experts(hidden=1)
        self.store = Store(root, bundle, **store)
        self.receiver = Receiver(
            self.store,
            self.experts,
            self.counters,
            limit_bytes,
            self.changes.append,
            lambda *error: self.reported.append(error),
        )

    def raw(self, data: bytes) -> list[Message]:
        return [unpack(reply) for reply in self.receiver.answer(data)]

    def say(self, message: Message) -> list[Message]:
        return self.raw(pack(message))


def offer_of(bundle, layer=1, expert=2, precision="int8") -> Offer:
    manifest = shard.read_manifest(bundle.root)
    return Offer(Shard(layer, expert, precision), HIDDEN, "rig", manifest.shard(layer, expert, precision).files)


def chunks(bundle, offer: Offer, transfer=1, size=5000):
    for index, file in enumerate(offer.files):
        data = (bundle.root / file.path).read_bytes()
        for at in range(0, len(data), size):
            yield Message(delivery_frame.CHUNK, transfer, index, at, data[at : at + size])


def deliver(node: Node, bundle, offer: Offer, transfer=1) -> list[Message]:
    said = node.say(Message(delivery_frame.OFFER, transfer, offer=offer))
    for chunk in chunks(bundle, offer, transfer):
        said += node.say(chunk)
    return said


# ------------------------------------------------------------ the contract


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: str(message.kind))
def test_messages_come_back_as_they_were(message):
    assert unpack(pack(message)) == message
    data = pack(message)
    for cut in range(len(data)):
        with pytest.raises(delivery_frame.DeliveryFrameError):
            unpack(data[:cut])
    with pytest.raises(delivery_frame.DeliveryFrameError):
        unpack(data + b"x")


def test_the_layout_is_what_the_header_documents():
    """magic, version, kind, index (2), transfer (8), offset (8), size (4), little-endian, then the body."""
    want = b"SMoD" + struct.pack("<BBHQQI", 1, 3, 1, 5, 4096, 7) + b"weights"
    assert pack(MESSAGES[3]) == want


@pytest.mark.parametrize(
    "name",
    [
        "../L01E002.int8.onnx",
        "/etc/passwd",
        "L01E002.int8.onnx/../x",
        "",
        "..",
        "L01E002.int8.on\0x",
        "L01E003.int8.onnx",
    ],
)
def test_a_name_cannot_leave_its_folder(name):
    """The graph's name is written into the bytes by hand: the packing side would not make them."""
    data = pack(MESSAGES[0]).replace(b"\x11L01E002.int8.onnx", bytes([len(name)]) + name.encode())
    size = len(data) - delivery_frame.HEADER_BYTES
    data = data[: delivery_frame.HEADER_BYTES - 4] + struct.pack("<I", size) + data[delivery_frame.HEADER_BYTES :]
    with pytest.raises(delivery_frame.DeliveryFrameError, match="name|files|no file of"):
        unpack(data)


def test_flipped_bits_stop_nothing(bundle, tmp_path):
    """Frames of every kind with 1 to 8 flipped bits, at a receiver in the middle of a transfer."""
    seed = random.Random(7)
    node = Node(tmp_path)
    offer = offer_of(bundle)
    real = [pack(message) for message in (*MESSAGES, *chunks(bundle, offer))]
    real.append(pack(Message(delivery_frame.OFFER, 1, offer=offer)))
    node.raw(real[-1])
    before_bytes = psutil.Process().memory_info().rss
    unreadable = 0
    for _ in range(6000):
        data = bytearray(seed.choice(real))
        for _ in range(seed.randint(1, 8)):
            bit = seed.randrange(8 * min(len(data), 200))
            data[bit // 8] ^= 1 << bit % 8
        try:
            unpack(bytes(data))
        except delivery_frame.DeliveryFrameError:
            unreadable += 1
        for reply in node.receiver.answer(bytes(data)):
            assert len(reply) <= delivery_frame.MAX_ANSWER_BYTES
            unpack(reply)
    counted = node.counters.delivery_errors
    assert unreadable > 3000 and counted["malformed"] >= unreadable
    assert {path.parent.name for path in tmp_path.rglob("*") if path.is_file()} <= {"partial", "experts", tmp_path.name}
    assert psutil.Process().memory_info().rss - before_bytes < 20e6
    assert deliver(node, bundle, offer)[-1].kind == delivery_frame.DONE  # and it still takes a shard


# ------------------------------------------------------------ one shard


def test_a_shard_comes_in_and_equals_the_local_one(bundle, tmp_path):
    node, offer = Node(tmp_path), offer_of(bundle)
    said = deliver(node, bundle, offer)
    kinds = [message.kind for message in said]
    assert kinds[0] == delivery_frame.STATE and kinds[-1] == delivery_frame.DONE
    assert set(kinds[1:-1]) == {delivery_frame.ACK}
    local = experts.load(bundle.root, ("L01E002.int8",), 10**12)
    for rows in (1, 5):
        x = np.random.default_rng(rows).standard_normal((rows, HIDDEN)).astype(np.float32)
        pairs = np.array([(row, 2, 1, 0.7) for row in range(rows)], frame.PAIR)
        assert np.array_equal(node.experts.run(1, x, pairs), local.run(1, x, pairs))
    assert node.changes == ["L01E002.int8 is loaded"] and node.experts.hosted == local.hosted
    again = node.say(Message(delivery_frame.OFFER, 2, offer=offer))
    assert [message.kind for message in again] == [delivery_frame.DONE]


def test_an_altered_shard_is_refused_by_name_and_leaves_nothing(bundle, tmp_path):
    node, offer = Node(tmp_path), offer_of(bundle)
    node.say(Message(delivery_frame.OFFER, 1, offer=offer))
    said = []
    for chunk in chunks(bundle, offer):
        body = bytearray(chunk.body)
        if chunk.index == 1 and chunk.offset == 5000:
            body[77] ^= 1
        said += node.say(Message(chunk.kind, 1, chunk.index, chunk.offset, bytes(body)))
    refused = [message for message in said if message.kind == delivery_frame.REFUSED]
    assert [(message.refusal, "L01E002.int8.bin" in message.text) for message in refused] == [("hash", True)]
    assert node.experts.hosted == () and node.counters.delivery_errors == {"hash": 1}
    assert [path.name for path in tmp_path.rglob("*.*") if path.is_file()] == ["L01E002.int8.onnx"]
    have = node.say(Message(delivery_frame.OFFER, 2, offer=offer))[0].have
    assert [there.bytes for there in have] == [offer.files[0].bytes, 0]


def test_a_chunk_that_was_lost_is_noticed(bundle, tmp_path):
    node, offer = Node(tmp_path), offer_of(bundle, precision="fp32")
    node.say(Message(delivery_frame.OFFER, 1, offer=offer))
    sent = list(chunks(bundle, offer))
    for chunk in sent[:3]:
        node.say(chunk)
    said = [message for chunk in sent[4:6] for message in node.say(chunk)]
    assert [message.kind for message in said] == [delivery_frame.STATE]  # once, although two came after the gap
    assert said[0].have[1].bytes == 10_000
    for chunk in sent[3:]:
        said += node.say(chunk)
    assert said[-1].kind == delivery_frame.DONE


@pytest.mark.parametrize(
    ("what", "kind", "word"),
    [
        (dict(free=lambda folder: RESERVE_BYTES + 100), "disk", "67108964 are free"),
        (dict(limit_bytes=10**6), "memory", "lower precision"),
    ],
)
def test_what_would_not_fit_is_refused_before_a_byte_is_written(bundle, tmp_path, what, kind, word):
    node = Node(tmp_path, **what)
    (said,) = node.say(Message(delivery_frame.OFFER, 1, offer=offer_of(bundle)))
    assert (said.kind, said.refusal) == (delivery_frame.REFUSED, kind) and word in said.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert node.counters.delivery_errors == {kind: 1}


def test_chunks_beyond_the_offer_are_refused(bundle, tmp_path):
    node, offer = Node(tmp_path), offer_of(bundle)
    node.say(Message(delivery_frame.OFFER, 1, offer=offer))
    for bad in (
        Message(delivery_frame.CHUNK, 1, 0, 0, bytes(offer.files[0].bytes + 1)),
        Message(delivery_frame.CHUNK, 1, 5, 0, b"x"),
    ):
        node.say(Message(delivery_frame.OFFER, 1, offer=offer))
        (said,) = node.say(bad)
        assert (said.kind, said.refusal) == (delivery_frame.REFUSED, "malformed")
    (said,) = node.say(Message(delivery_frame.CHUNK, 9, 0, 0, b"x"))
    assert said.refusal == "unknown"


def test_another_bundle_is_refused(bundle, tmp_path):
    node, offer = Node(tmp_path), offer_of(bundle)
    deliver(node, bundle, offer)
    other = Offer(Shard(0, 0, "int8"), HIDDEN, "else", offer_of(bundle, 0, 0).files)
    assert node.say(Message(delivery_frame.OFFER, 2, offer=other))[0].refusal == "other"


def test_what_is_no_expert_is_refused(tmp_path, bundle):
    data = b"not a graph of onnx"
    entry = shard.write_file(tmp_path / "src", "experts/L01E002.int8.onnx", data)
    node = Node(tmp_path / "node")
    node.say(Message(delivery_frame.OFFER, 1, offer=Offer(Shard(1, 2, "int8"), HIDDEN, "rig", (entry,))))
    said = node.say(Message(delivery_frame.CHUNK, 1, 0, 0, data))
    assert (said[-1].refusal, node.experts.hosted) == ("load", ())
    assert deliver(node, bundle, offer_of(bundle))[-1].kind == delivery_frame.DONE


def test_a_shard_that_computes_is_not_dropped_and_the_request_is_right(bundle, tmp_path, monkeypatch):
    node, offer = Node(tmp_path), offer_of(bundle)
    deliver(node, bundle, offer)
    began, go_on = threading.Event(), threading.Event()
    real = experts.partial_sum

    def slow(*arguments):
        began.set()
        assert go_on.wait(10)
        return real(*arguments)

    monkeypatch.setattr(experts, "partial_sum", slow)
    x = np.random.default_rng(0).standard_normal((1, HIDDEN)).astype(np.float32)
    pairs = np.array([(0, 2, 1, 0.5)], frame.PAIR)
    got = []
    thread = threading.Thread(target=lambda: got.append(node.experts.run(1, x, pairs)))
    thread.start()
    assert began.wait(10)
    assert node.say(Message(delivery_frame.DROP, 1, shard=offer.shard))[0].refusal == "busy"
    deliver(node, bundle, offer_of(bundle, 0, 1))  # another may come meanwhile
    assert node.say(Message(delivery_frame.DROP, 1, shard=Shard(0, 1, "int8")))[0].kind == delivery_frame.DROPPED
    go_on.set()
    thread.join(10)
    assert np.array_equal(got[0], experts.load(bundle.root, ("L01E002.int8",), 10**12).run(1, x, pairs))
    assert node.say(Message(delivery_frame.DROP, 1, shard=offer.shard))[0].kind == delivery_frame.DROPPED
    assert node.experts.hosted == () and node.experts.layers == frozenset()
    assert not list(tmp_path.glob("experts/*"))


def test_delivered_shards_are_there_after_a_restart_and_damaged_ones_are_reported(bundle, tmp_path):
    node = Node(tmp_path)
    for expert in (0, 1, 2):
        deliver(node, bundle, offer_of(bundle, expert=expert))
    node.say(Message(delivery_frame.DROP, 1, shard=Shard(1, 0, "int8")))
    blob = tmp_path / "experts" / "L01E001.int8.bin"
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    (tmp_path / "L00E000.int4.offer").write_bytes(b"nonsense")
    again = Node(tmp_path)
    again.receiver.restore()
    assert [(hosted.layer, hosted.expert) for hosted in again.experts.hosted] == [(1, 2)]
    assert again.counters.delivery_errors == {"load": 2} and "L00E000.int4.offer" in again.reported[0][1]
    assert again.store.dropped("L01E000.int8") and not again.store.dropped("L01E002.int8")


def test_a_file_that_is_in_the_node_s_own_bundle_is_not_sent(bundle, tmp_path):
    node = Node(tmp_path, bundle.root)
    said = node.say(Message(delivery_frame.OFFER, 1, offer=offer_of(bundle)))
    assert [message.kind for message in said] == [delivery_frame.STATE, delivery_frame.DONE]
    node.say(Message(delivery_frame.DROP, 1, shard=Shard(1, 2, "int8")))
    assert (bundle.root / "experts" / "L01E002.int8.bin").exists()


# ------------------------------------------------------------ pace, by hand


def test_slots_follow_absolute_deadlines_and_stop_at_the_contact_s_end():
    """8000 bit/s is 1000 bytes a second; a chunk is 4096 bytes and 28 of header: 4.124 s; 0.5 s of flight."""
    paced = Paced(Window(10.0, 20.0, 8000.0, 0.5))
    assert paced.slot(0.0, 10**6) == (4096, 10.0, pytest.approx(14.624))
    assert paced.slot(11.0, 10**6) == (4096, pytest.approx(14.124), pytest.approx(18.748))
    size, start_s, there_s = paced.slot(19.0, 10**6)  # 1 s is left: 1000 bytes less a header
    assert (size, start_s, there_s) == (972, 19.0, pytest.approx(20.5))
    assert paced.slot(19.0, 1) is None
    assert paced.back_s(19.4) == 19.9 and paced.back_s(19.6) is None


def test_bytes_on_the_wire():
    assert wire_bytes((4096, 4097, 1), 8000.0) == 8194 + 4 * delivery_frame.HEADER_BYTES


def test_a_relay_s_window_ends_with_its_bytes():
    paced = Paced(Window(0.0, 100.0, 8000.0, 0.0, limit_bytes=5000))
    paced.slot(0.0, 300, is_chunk=False)
    assert [paced.slot(0.0, 10**6).size, paced.slot(0.0, 10**6).size] == [4096, 5000 - 4096 - 2 * 28]
    assert paced.slot(0.0, 1) is None
