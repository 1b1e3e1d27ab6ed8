"""A node that keeps answering and never gets on, and what another program has put under the names of the node's own files."""

from __future__ import annotations

import os
import threading
import time

import pytest
import zmq
from node_rig import HIDDEN, make_bundle
from test_delivery_frames import Node

from ground_station import delivery
from ground_station.delivery import Deliverer, DeliveryError
from node_agent import delivery_frame, shard
from node_agent.delivery_frame import ACK, CHUNK, DONE, OFFER, REFUSED, STATE, Have, Message, Offer, Shard

NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of no bytes
STEM = "L00E001.fp32"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def manifest(bundle):
    return shard.read_manifest(bundle.root)


# ------------------------------------------------------------ a node that answers for ever


class Liar(threading.Thread):
    """A DEALER by the name n1 that says the same after whatever it gets, `times` times, and again every 20 ms."""

    def __init__(self, endpoint, reply, times=1):
        super().__init__(daemon=True)
        self.endpoint, self.reply, self.times, self.stopped = endpoint, reply, times, threading.Event()
        self.offers = 0

    def run(self):
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.IDENTITY, b"n1")
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self.endpoint)
            last = None
            while not self.stopped.is_set():
                if socket.poll(20):
                    last = delivery_frame.unpack(socket.recv())
                    self.offers += last.kind == OFFER
                if last is not None:
                    for message in self.reply(last) * self.times:
                        try:
                            socket.send(delivery_frame.pack(message), zmq.NOBLOCK)
                        except zmq.Again:
                            break


def state(asked, files, count):
    return [Message(STATE, asked.transfer, have=tuple(count(file) for file in files))]


def whole(asked, files):
    return state(asked, files, lambda file: Have(file.bytes, file.sha256))


def empty(asked, files):
    return state(asked, files, lambda file: Have(0, NOTHING))


def huge(asked, files):
    return state(asked, files, lambda file: Have(2**63, "ab" * 32))


def same_ack(asked, files):
    return empty(asked, files) if asked.kind == OFFER else [Message(ACK, asked.transfer, 0, 0)]


def begins_anew(asked, files):
    """Takes everything, and then has nothing again: as if it were making progress."""
    if asked.kind == OFFER:
        return empty(asked, files)
    if asked.kind == CHUNK and asked.index == 0:
        return [Message(ACK, asked.transfer, 0, asked.offset + len(asked.body))]
    return [Message(REFUSED, asked.transfer, refusal="unknown", text="what transfer?")]


@pytest.mark.parametrize(
    ("reply", "times"), [(whole, 1), (empty, 1), (huge, 1), (same_ack, 1), (empty, 500), (begins_anew, 1)]
)
def test_a_node_that_answers_and_never_gets_on_is_given_up(bundle, manifest, monkeypatch, reply, times):
    monkeypatch.setattr(delivery, "OFFER_AGAIN_S", 0.1)  # so that many offers fall into the patience
    monkeypatch.setattr(delivery, "STALL_S", 0.1)
    entry = manifest.shard(0, 1, "fp32")
    failed = []

    def deliver():
        with Deliverer() as deliverer:
            made.append(Liar(deliverer.endpoint, lambda asked: reply(asked, entry.files), times))
            made[0].start()
            try:
                deliverer.deliver("n1", bundle.root, manifest, entry, patience_s=0.5)
            except DeliveryError as error:
                failed.append(str(error))

    made = []
    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    thread.join(20.0)  # for ever, before: no bound on the time is claimed, only an end
    made[0].stopped.set()
    made[0].join(5.0)
    assert made[0].offers >= 1
    assert failed and "of L00E001.fp32 and then nothing for 0.5 s" in failed[0]


@pytest.mark.parametrize("doublings", [5, 0], ids=["as it is", "without more time, the control"])
def test_a_slow_board_is_given_more_time_with_each_offer(bundle, manifest, monkeypatch, doublings):
    """It answers each offer later than the first wait lasts: given no more time, every answer is to an offer that was given up."""
    monkeypatch.setattr(delivery, "OFFER_AGAIN_S", 0.1)
    monkeypatch.setattr(delivery, "STALL_S", 0.1)
    monkeypatch.setattr(delivery, "MAX_DOUBLINGS", doublings)
    entry = manifest.shard(0, 1, "fp32")
    got, stopped = {}, threading.Event()

    def board(endpoint):
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.IDENTITY, b"n1")
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            while not stopped.is_set():
                if not socket.poll(20):
                    continue
                asked = delivery_frame.unpack(socket.recv())
                if asked.kind == OFFER:
                    time.sleep(0.5)
                    (reply,) = empty(asked, entry.files)
                else:
                    got[asked.index] = asked.offset + len(asked.body)
                    reply = Message(ACK, asked.transfer, asked.index, got[asked.index])
                    if [got.get(index) for index in range(len(entry.files))] == [file.bytes for file in entry.files]:
                        socket.send(delivery_frame.pack(reply))
                        reply = Message(DONE, asked.transfer)
                socket.send(delivery_frame.pack(reply))

    with Deliverer() as deliverer:
        thread = threading.Thread(target=board, args=(deliverer.endpoint,), daemon=True)
        thread.start()
        try:
            if doublings:
                assert deliverer.deliver("n1", bundle.root, manifest, entry, patience_s=5.0).total_bytes == entry.bytes
            else:
                with pytest.raises(DeliveryError):
                    deliverer.deliver("n1", bundle.root, manifest, entry, patience_s=2.0)
        finally:
            stopped.set()
            thread.join(5.0)


def test_a_node_that_lost_what_it_had_is_waited_for_a_few_times():
    """By hand: 100 bytes sent and written, then 0 again; progress counts from there, but not without an end."""

    class At:
        def __init__(self, sent, written):
            self.next, self.written = [sent], [written]

    patience = delivery._Patience(10.0, 0.0)
    patience.began(At(0, 0), 1.0)
    patience.look(At(100, 100), 2.0)
    patience.look(At(100, 100), 9.0)  # nothing new
    assert patience.end_s == 12.0
    for loss in range(delivery.MAX_LOSSES):
        at_s = 20.0 + loss
        patience.began(At(0, 0), at_s)
        assert patience.end_s == at_s + 10.0
        patience.look(At(100, 100), at_s + 0.5)
    patience.began(At(0, 0), 90.0)
    patience.look(At(100, 100), 91.0)
    assert patience.end_s == 32.5


# ------------------------------------------------------------ what lies under the names


def offered(manifest):
    entry = manifest.shard(0, 1, "fp32")
    return Offer(Shard(0, 1, "fp32"), HIDDEN, manifest.name, entry.files)


def send_all(node, bundle, offer) -> list[Message]:
    """OFFER and, if it is taken, every file in one chunk: the answers."""
    answers = node.say(Message(OFFER, 7, offer=offer))
    for index, file in enumerate(offer.files):
        if answers[-1].kind != REFUSED:
            answers += node.say(Message(CHUNK, 7, index, 0, (bundle.root / file.path).read_bytes()))
    return answers


def link(path, victim):
    path.symlink_to(victim)


def hard_link(path, victim):
    path.hardlink_to(victim)


def folder(path, victim):
    path.mkdir()


def pipe(path, victim):
    os.mkfifo(path)


@pytest.mark.parametrize("plant", [link, folder, pipe])
@pytest.mark.parametrize("late", [False, True])
def test_a_partial_file_that_is_no_plain_one_is_refused_by_name(bundle, manifest, tmp_path, plant, late):
    offer, node = offered(manifest), Node(tmp_path / "shards")
    victim = tmp_path / "victim"
    victim.write_bytes(b"a secret")
    path = node.store.partial(offer.files[1])
    if late:  # between the offer and the chunk
        node.say(Message(OFFER, 7, offer=offer))
        node.say(Message(CHUNK, 7, 0, 0, (bundle.root / offer.files[0].path).read_bytes()))
        plant(path, victim)
        answer = node.say(Message(CHUNK, 7, 1, 0, b"weights"))[-1]
    else:
        path.parent.mkdir(parents=True)
        plant(path, victim)
        answer = send_all(node, bundle, offer)[-1]
    assert (answer.kind, answer.refusal) == (REFUSED, "disk")
    assert f"{path.name} is no plain file" in answer.text and "remove it" in answer.text
    assert victim.read_bytes() == b"a secret"
    path.rmdir() if plant is folder else path.unlink(missing_ok=True)
    assert send_all(node, bundle, offer)[-1].kind == delivery_frame.DONE  # negative control, and it goes on


def test_a_second_name_of_another_file_is_not_written(bundle, manifest, tmp_path):
    offer, node = offered(manifest), Node(tmp_path / "shards")
    (tmp_path / "victim").write_bytes(b"a secret")
    path = node.store.partial(offer.files[0])
    path.parent.mkdir(parents=True)
    hard_link(path, tmp_path / "victim")
    assert send_all(node, bundle, offer)[-1].refusal == "disk"
    assert (tmp_path / "victim").read_bytes() == b"a secret"


NAMES = (f"experts/{STEM}.bin", f"{STEM}.offer", f"{STEM}.offer.partial")
PLANTED = [("partial", link), ("partial", pipe), *((name, plant) for name in NAMES for plant in (link, folder, pipe))]


@pytest.mark.parametrize(("name", "plant"), PLANTED)
def test_nothing_else_of_the_store_is_followed_or_waited_for(bundle, manifest, tmp_path, name, plant):
    offer, node = offered(manifest), Node(tmp_path / "shards")
    victim = tmp_path / "victim"
    victim.mkdir() if name == "partial" else victim.write_bytes(b"a secret")
    path = tmp_path / "shards" / name
    path.parent.mkdir(parents=True)
    plant(path, victim)
    node.receiver.restore()  # at the agent's start: comes back
    answer = send_all(node, bundle, offer)[-1]
    if name == f"{STEM}.offer.partial" and plant is not folder:  # a temporary name: what lies there goes
        assert answer.kind == delivery_frame.DONE
    else:
        assert (answer.kind, answer.refusal) == (REFUSED, "disk") and "remove it" in answer.text
    assert list(victim.iterdir()) == [] if name == "partial" else victim.read_bytes() == b"a secret"
    if name == f"{STEM}.offer":
        assert [(kind, "no plain file" in text) for kind, text in node.reported][0] == ("load", True)


def test_a_pipe_among_the_offers_does_not_keep_the_others_from_being_loaded(bundle, manifest, tmp_path):
    offer, node = offered(manifest), Node(tmp_path / "shards")
    assert send_all(node, bundle, offer)[-1].kind == delivery_frame.DONE
    os.mkfifo(tmp_path / "shards/L00E000.fp32.offer")
    again = Node(tmp_path / "shards")
    began_s = time.monotonic()
    again.receiver.restore()
    assert began_s <= time.monotonic() and [item.expert for item in again.experts.hosted] == [1]
