"""Sends shards to nodes over the data plane's second socket: a ROUTER that nodes dial into, one transfer at a time.

Every transfer begins with an offer; the node says what it has, with the sha256 of just that, and only what it lacks is sent,
also after the node was killed, the connection cut, or a contact has ended in the middle. Chunks go out in a window of
unacknowledged bytes. Loopback may be plain; any other address needs CURVE keys and a list of who may speak, the same as the
first socket's.
Leaves out: what should be where (placement), when there is a contact (contacts.py), how one is imposed (delivery_pace.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from ground_station.delivery_pace import Direct, Paced, Slot, Windows
from ground_station.link import LinkError, check_protected, open_router, take
from node_agent import delivery_frame, shard, signature, wire
from node_agent.bundle_file import SHARD_SIGNATURES
from node_agent.delivery_frame import (
    ACK,
    CHUNK,
    DONE,
    DROP,
    DROPPED,
    OFFER,
    OFFER_AGENT,
    REFUSED,
    STAGED,
    STATE,
    AgentOffer,
    Have,
    Message,
    Offer,
    Shard,
)

if TYPE_CHECKING:
    from ground_station.allow_list import AllowList

PATIENCE_S = 30.0  # without any progress, while there is a contact
OFFER_AGAIN_S = 2.0
STALL_S = 2.0  # chunks under way and no acknowledgement: offered again
MAX_DOUBLINGS = 5
RETRY_S = 0.05
MAX_POLL_S = 0.1
TAKEN_AT_ONCE = 256
MAX_ANSWERS_KEPT = 1 << 15  # of a transfer, not due yet: twice the acknowledgements of the largest window
MAX_LOSSES = 3  # times that a node may have less than it had, as after a power cut, and be waited for as if it were new
FULL_S = 1.0
HASH_BYTES = 1 << 20

Progress = Callable[[int, int], None]
"""(bytes that the node has, bytes in all)."""


class DeliveryError(RuntimeError):
    """A shard did not get to a node, or did not go away; the text names both and the next step."""


class DeliveryRefused(DeliveryError):
    """The node does not want it. `kind` is one of delivery_frame.REFUSALS."""

    def __init__(self, node: str, kind: str, text: str):
        super().__init__(f"{node} refuses ({kind}): {text}")
        self.kind = kind


class NoContact(DeliveryError):
    """The contact plan has no more contact with the node."""


@dataclass(frozen=True)
class Delivered:
    """What a transfer took. Bytes are payload; `sent_bytes` counts what was sent twice twice; times of time.monotonic().

    `had_bytes`: what the node had at first; `offers`: 1 where nothing went wrong; `first_s`: the first bit of the first chunk leaves
    here (None: nothing was sent); `arrived_s`: the last chunk is written on the node's disk; `done_s`: it is verified and loaded.
    """

    node: str
    stem: str
    total_bytes: int
    had_bytes: int
    sent_bytes: int
    offers: int
    began_s: float
    first_s: float | None
    arrived_s: float | None
    done_s: float
    emulated: bool


class _Files:
    """The shard's files here, verified and open."""

    def __init__(self, root: Path, files: tuple[shard.FileEntry, ...], stack: ExitStack):
        """Raises: shard.BundleError for a file that is not what the manifest says."""
        self.entries = files
        self._open = [stack.enter_context(open(shard.verify_file(root, file), "rb", buffering=0)) for file in files]

    def read(self, index: int, offset: int, size: int) -> bytes:
        data = os.pread(self._open[index].fileno(), size, offset)
        if len(data) != size:
            raise DeliveryError(f"{self.entries[index].path} was cut short meanwhile: write the bundle again")
        return data

    def same(self, index: int, have: Have) -> bool:
        """Whether what the node has is the beginning of our file."""
        entry = self.entries[index]
        if not 0 < have.bytes <= entry.bytes:
            return False
        if have.bytes == entry.bytes:
            return have.sha256 == entry.sha256
        digest = hashlib.sha256()
        for offset in range(0, have.bytes, HASH_BYTES):
            digest.update(self.read(index, offset, min(HASH_BYTES, have.bytes - offset)))
        return digest.hexdigest() == have.sha256


def _signature(root: Path, stem: str) -> bytes:
    """Of a shard, from the bundle's shards.sig; empty where the bundle is not signed."""
    if not (root / SHARD_SIGNATURES).exists():
        return b""
    return signature.read_shard_signatures(root).signatures.get(stem, b"")


class _Sending:
    """How far a transfer is: `written` as the node says, `next` what goes out next, for each file."""

    def __init__(self, files: _Files):
        self.files = files
        self.written = [0] * len(files.entries)
        self.next = [0] * len(files.entries)
        self.total = sum(entry.bytes for entry in files.entries)
        self.had_bytes: int | None = None
        self.ended = DONE  # or STAGED
        self.sent_bytes = self.offers = 0
        self.stalls = 0  # how often nothing was heard for so long that the shard was offered again
        self.first_s: float | None = None
        self.arrived_s: float | None = None
        self._made_room: deque[tuple[int, float]] = deque()  # (bytes written in all, when we knew)

    def state(self, have: tuple[Have, ...], at_s: float) -> None:
        """Goes on from what the node has.  Raises: DeliveryError for an answer about another number of files."""
        if len(have) != len(self.written):
            raise DeliveryError(f"the node speaks of {len(have)} files of {len(self.written)}: update the older side")
        self.written = [there.bytes if self.files.same(index, there) else 0 for index, there in enumerate(have)]
        self.next = list(self.written)
        if self.had_bytes is None:
            self.had_bytes = sum(self.written)
        self._made_room = deque([(sum(self.written), at_s)])

    def acknowledged(self, index: int, offset: int, received_s: float, at_s: float) -> bool:
        """False for what says nothing new."""
        if index >= len(self.written) or not self.written[index] < offset <= self.next[index]:
            return False
        self.written[index] = offset
        self._made_room.append((sum(self.written), at_s))
        self.arrived_s = received_s
        return True

    def upcoming(self) -> tuple[int, int, int] | None:
        """(file, offset, bytes left of the file) of what goes out next."""
        for index, entry in enumerate(self.files.entries):
            if self.next[index] < entry.bytes:
                return index, self.next[index], entry.bytes - self.next[index]
        return None

    @property
    def under_way(self) -> int:
        return sum(self.next) - sum(self.written)

    def available_s(self, window_bytes: int, size: int) -> float | None:
        """Since when `size` more bytes may be under way; None when they may not yet."""
        need = sum(self.next) + size - window_bytes
        while self._made_room and self._made_room[0][0] < need:
            self._made_room.popleft()
        return self._made_room[0][1] if self._made_room else None


class _Patience:
    """Until when a contact goes on without progress: more bytes sent or written than ever before, never an answer as such."""

    def __init__(self, patience_s: float, from_s: float):
        self._patience_s, self._from_s, self._slack_s = patience_s, from_s, 0.0
        self._sent = self._written = -1
        self._losses = 0

    @property
    def end_s(self) -> float:
        return self._from_s + self._patience_s + 2.0 * self._slack_s

    def paced(self, slot: Slot) -> None:
        """A slow link gets the time of a frame, its delay included, on top: there and back."""
        self._slack_s = max(self._slack_s, slot.there_s - slot.start_s)

    def look(self, sending: _Sending, now_s: float) -> None:
        sent, written = sum(sending.next), sum(sending.written)
        if sent > self._sent or written > self._written:
            self._from_s = max(self._from_s, now_s)
        self._sent, self._written = max(sent, self._sent), max(written, self._written)

    def began(self, sending: _Sending, now_s: float) -> None:
        """The first STATE of an offer: where the node has lost something, what it takes again is progress again."""
        written = sum(sending.written)
        if written < self._written and self._losses < MAX_LOSSES:
            self._losses += 1
            self._sent = self._written = written - 1
        self.look(sending, now_s)


class Deliverer:
    """Owns the ROUTER socket; use it as a context manager and from one thread only."""

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:*",
        curve_keys: tuple[bytes, bytes] | None = None,
        allowed: AllowList | None = None,
        any_key: bool = False,
    ):
        """Arguments as of link.Link.  Raises: LinkError when the endpoint is not to be had or not protected."""
        check_protected(endpoint, curve_keys, allowed, any_key)
        self.bad_frames = 0
        self.unasked_frames = 0
        options = {
            zmq.MAXMSGSIZE: delivery_frame.MAX_ANSWER_BYTES,
            zmq.SNDHWM: 64,
            zmq.HEARTBEAT_IVL: 2000,
            zmq.HEARTBEAT_TIMEOUT: 6000,
        }
        try:
            self._context, self._socket, self._gate = open_router(endpoint, curve_keys, options, allowed)
        except (OSError, zmq.ZMQError) as error:
            raise LinkError(
                f"cannot listen on {endpoint}: {error}; one of generate, place and update runs at a time; else choose another port"
            ) from None
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._answers: deque[tuple[float, float, Message]] = (
            deque()
        )  # (due, received, answer) of the transfer under way

    def close(self) -> None:
        self._socket.close()
        if self._gate is not None:
            self._gate.close()
        self._context.term()

    @property
    def dropped_connections(self) -> dict[str, int] | None:
        """As of link.Link."""
        return None if self._gate is None else dict(self._gate.dropped)

    def __enter__(self) -> Deliverer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ------------------------------------------------------------ what others call

    def deliver(
        self,
        node: str,
        root: Path,
        manifest: shard.Manifest,
        entry: shard.ShardEntry,
        windows: Windows | None = None,
        progress: Progress = lambda done, total: None,
        patience_s: float = PATIENCE_S,
    ) -> Delivered:
        """Sends a shard of the bundle at `root` until the node has loaded it; what it has already is not sent. With the bundle's
        signature of it, if there is one: nodes that know signers take no other.

        `windows`: contacts to impose on the transfer; without them it runs as fast as the link allows.
        Raises: shard.BundleError, signature.SignatureError for a damaged shards.sig, DeliveryRefused, NoContact, DeliveryError after
        `patience_s` without progress.
        """
        which = Shard(entry.layer, entry.expert, entry.precision)
        offer = Offer(which, manifest.dims.hidden, manifest.name, entry.files, _signature(root, which.stem))
        with ExitStack() as stack:
            sending = _Sending(_Files(root, entry.files, stack))
            asked = Message(OFFER, 0, offer=offer)
            return self._whole(node, asked, which.stem, sending, windows, progress, patience_s)

    def update(
        self,
        node: str,
        package: Path,
        offer: AgentOffer,
        progress: Progress = lambda done, total: None,
        patience_s: float = PATIENCE_S,
    ) -> bool:
        """Sends an update of the agent itself; True: it runs there already and is good, False: it is staged, to be tried next.

        Raises: as `deliver`.
        """
        with ExitStack() as stack:
            file = shard.FileEntry(package.name, offer.bytes, offer.sha256)
            sending = _Sending(_Files(package.parent, (file,), stack))
            asked = Message(OFFER_AGENT, 0, update=offer)
            self._whole(node, asked, offer.name, sending, None, progress, patience_s)
        return sending.ended == DONE

    def ask_update(self, node: str, offer: AgentOffer, wait_s: float) -> Message | None:
        """What the node says of an update that was sent to it: DONE (good), REFUSED (kind "busy": on trial), STATE (it is not there);
        None: nothing, for `wait_s`."""
        transfer, end_s, air = secrets.randbits(64), time.monotonic() + wait_s, Direct()
        self._answers.clear()
        if self._send(node, delivery_frame.pack(Message(OFFER_AGENT, transfer, update=offer))):
            self._until(node, transfer, air, end_s, any_answer=True)
            for _, _, answer in self._due(node, transfer, air):
                return answer
        time.sleep(RETRY_S)
        return None

    def _whole(
        self,
        node: str,
        asked: Message,
        name: str,
        sending: _Sending,
        windows: Windows | None,
        progress: Progress,
        patience_s: float,
    ) -> Delivered:
        wire.check_id(node)
        began_s = time.monotonic()
        for air in self._contacts(node, sending, windows):
            done_s = self._in_contact(node, asked, name, sending, air, progress, patience_s)
            if done_s is not None:
                break
        progress(sending.total, sending.total)
        had = sending.total if sending.had_bytes is None else sending.had_bytes
        return Delivered(
            node,
            name,
            sending.total,
            had,
            sending.sent_bytes,
            sending.offers,
            began_s,
            sending.first_s,
            sending.arrived_s,
            done_s,
            air.emulated,
        )

    def drop(self, node: str, which: Shard, patience_s: float = PATIENCE_S) -> None:
        """Takes a shard away from a node, which may wait until it is idle; done also where there is none.

        Raises: DeliveryRefused, DeliveryError when it does not answer.
        """
        transfer, end_s = secrets.randbits(64), time.monotonic() + patience_s
        request = delivery_frame.pack(Message(DROP, transfer, shard=which))
        air, last = Direct(), None
        while (now_s := time.monotonic()) < end_s:
            self._answers.clear()
            if self._send(node, request):
                self._until(node, transfer, air, now_s + OFFER_AGAIN_S, any_answer=True)
                for _, _, answer in self._due(node, transfer, air):
                    if answer.kind == DROPPED:
                        return
                    if answer.kind == REFUSED:
                        last = DeliveryRefused(node, answer.refusal, answer.text)
                        if answer.refusal != "busy":
                            raise last
            time.sleep(RETRY_S)
        raise last or DeliveryError(
            f"{node} did not drop {which.stem} within {patience_s:g} s: see that its agent runs"
        )

    # ------------------------------------------------------------ one contact

    def _contacts(self, node: str, sending: _Sending, windows: Windows | None) -> Iterator[Direct | Paced]:
        """The links over which the transfer goes, one after the other.  Raises: NoContact after the last."""
        while windows is None:
            yield Direct()
        while True:
            now_s = time.monotonic()
            left = sending.total - sum(sending.written)
            coming = [window for window in windows(max(left, 1), now_s) if window.closes_s > now_s]
            if not coming:
                text = f"no more contact with {node}, {left} of {sending.total} bytes are not acknowledged"
                raise NoContact(f"{text}: go on with a later contact plan, nothing is lost")
            for window in coming:
                if window.closes_s > time.monotonic():
                    yield Paced(window)

    def _in_contact(
        self,
        node: str,
        asked: Message,
        name: str,
        sending: _Sending,
        air: Direct | Paced,
        progress: Progress,
        patience_s: float,
    ) -> float | None:
        """Offers and sends until the shard is loaded (returns when) or the contact is over (None)."""
        patience = _Patience(patience_s, max(time.monotonic(), air.opens_s))
        while time.monotonic() < air.closes_s and not air.spent:
            done_s = self._once(node, asked, sending, air, progress, patience)
            if done_s is not None:
                return done_s
            if time.monotonic() > patience.end_s:
                break
        else:
            return None
        raise DeliveryError(
            f"{node} took {sum(sending.written)} of {sending.total} bytes of {name} and then nothing for "
            f"{patience_s:g} s: see that its agent runs and that delivery_endpoint in its configuration is {self.endpoint}"
        )

    def _once(
        self,
        node: str,
        asked: Message,
        sending: _Sending,
        air: Direct | Paced,
        progress: Progress,
        patience: _Patience,
    ) -> float | None:
        """From one offer to its end: when the shard was loaded, or None when it must be offered again, the contact is over or
        patience is."""
        transfer = secrets.randbits(64)
        self._answers.clear()
        request = delivery_frame.pack(dataclasses.replace(asked, transfer=transfer))
        now_s = time.monotonic()
        slot = air.slot(now_s, len(request), is_chunk=False)
        if slot is None or slot.size < len(request):
            self._until(node, transfer, air, air.closes_s)
            return None
        patience.paced(slot)
        self._until(node, transfer, air, slot.there_s)
        if not self._send(node, request):
            time.sleep(RETRY_S)
            return None
        sending.offers += 1
        heard_s, stall_s, begun = time.monotonic(), OFFER_AGAIN_S + 2 * air.delay_s, False
        patience.look(sending, heard_s)
        while True:
            for received_s, at_s, answer in self._due(node, transfer, air):
                if answer.kind in (DONE, STAGED):
                    sending.ended = answer.kind
                    return received_s
                if time.monotonic() > patience.end_s:
                    return None
                if answer.kind == STATE and not begun:
                    sending.state(answer.have, at_s)
                    begun, stall_s, heard_s = True, STALL_S + 2 * air.delay_s, max(heard_s, at_s)
                    patience.began(sending, time.monotonic())
                elif (
                    answer.kind == STATE and sending.under_way
                ):  # a chunk was lost; with none under way it says nothing
                    sending.state(answer.have, at_s)
                elif (
                    answer.kind == ACK and begun and sending.acknowledged(answer.index, answer.offset, received_s, at_s)
                ):
                    heard_s = max(heard_s, at_s)
                elif answer.kind == REFUSED:
                    if answer.refusal == "unknown":
                        return None
                    raise DeliveryRefused(node, answer.refusal, answer.text)
                if begun:
                    patience.look(sending, time.monotonic())
                    progress(sum(sending.written), sending.total)
            now_s = time.monotonic()
            if now_s > patience.end_s:
                return None
            upcoming = sending.upcoming() if begun else None
            available_s = upcoming and sending.available_s(air.window_bytes, min(air.chunk, upcoming[2]))
            slot = air.slot(available_s, upcoming[2]) if available_s is not None else None
            if slot is None:  # for an answer, or for the contact's end; what has left by then may be there after it
                if now_s >= air.closes_s or (air.spent and upcoming and not sending.under_way):
                    return None
                allowed_s = stall_s + (OFFER_AGAIN_S if not sending.under_way else 0.0)
                # a slow board answers an offer that has been given up, and would do so for ever: each time it has longer
                if now_s - heard_s > allowed_s * 2 ** min(sending.stalls, MAX_DOUBLINGS):
                    sending.stalls += 1
                    return None
                wait_s = min(now_s + MAX_POLL_S, air.closes_s, patience.end_s)
                self._until(node, transfer, air, wait_s, any_answer=True)
                continue
            patience.paced(slot)
            self._until(node, transfer, air, slot.there_s)
            index, offset, _ = upcoming
            body = sending.files.read(index, offset, slot.size)
            if not self._send(node, delivery_frame.pack(Message(CHUNK, transfer, index, offset, body))):
                return None
            heard_s = max(heard_s, time.monotonic())
            sending.first_s = slot.start_s if sending.first_s is None else sending.first_s
            sending.next[index] += slot.size
            sending.sent_bytes += slot.size
            patience.look(sending, time.monotonic())

    # ------------------------------------------------------------ the socket

    def _send(self, node: str, data: bytes) -> bool:
        """Hands a frame to libzmq; False when the node is not connected, or takes nothing in for FULL_S."""
        if self._gate is not None and not self._gate.allows(node.encode()):
            return False
        end_s = time.monotonic() + FULL_S
        while True:
            try:
                self._socket.send_multipart((node.encode(), data))
                return True
            except zmq.Again:
                if time.monotonic() > end_s:
                    return False
                time.sleep(FULL_S / 100)
            except zmq.ZMQError:
                return False

    def _take(self, node: str, transfer: int, air: Direct | Paced) -> None:
        """Takes in what has arrived, without waiting."""
        for _ in range(TAKEN_AT_ONCE):
            try:
                parts = take(self._socket, self._gate)
            except zmq.Again:
                return
            if parts is None:
                continue
            try:
                answer = delivery_frame.unpack(parts[1]) if len(parts) == 2 else None
            except delivery_frame.DeliveryFrameError:
                answer = None
            if answer is None:
                self.bad_frames += 1
            elif parts[0] != node.encode() or answer.transfer != transfer or len(self._answers) >= MAX_ANSWERS_KEPT:
                self.unasked_frames += 1
            else:
                received_s = time.monotonic()
                back_s = air.back_s(received_s)
                if back_s is not None:
                    self._answers.append((back_s, received_s, answer))

    def _due(self, node: str, transfer: int, air: Direct | Paced) -> Iterator[tuple[float, float, Message]]:
        """(received, due, answer) of what is back by now."""
        self._take(node, transfer, air)
        while self._answers and self._answers[0][0] <= time.monotonic():
            at_s, received_s, answer = self._answers.popleft()
            yield received_s, at_s, answer

    def _until(self, node: str, transfer: int, air: Direct | Paced, until_s: float, any_answer: bool = False) -> None:
        """Takes in answers until that time, or until the first one is due."""
        while True:
            end_s = min(until_s, self._answers[0][0]) if any_answer and self._answers else until_s
            left_s = end_s - time.monotonic()
            if left_s <= 0.0:
                return
            if left_s < 0.001:
                time.sleep(left_s)
            elif self._socket.poll(int(left_s * 1000)):
                self._take(node, transfer, air)
