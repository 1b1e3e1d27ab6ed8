"""Takes in shards, and newer versions of them, while the node serves: verified, loaded, kept on disk, told by a new birth; drops them.

`Receiver` is the state machine, frames in and frames out, which never raises for what a frame holds: what it refuses it counts
by kind. `Delivery` is the loop around it, one thread with a DEALER of its own, so that hidden states never queue behind a shard.
A transfer may end at any byte: what is on the disk by then is what the next one begins with.
Leaves out: the layout of frames (delivery_frame.py), the disk (delivery_store.py), the joules of receiving (they count as idle).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import psutil
import zmq

from node_agent import delivery_frame, experts
from node_agent.agent_update import AgentUpdates
from node_agent.config import LinkConfig
from node_agent.counters import Counters
from node_agent.curve_key import own_key
from node_agent.dataplane import LibzmqDealer, open_dealer
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
    Have,
    Message,
    Offer,
)
from node_agent.delivery_store import Store, StoreError
from node_agent.errors import ExpertError, ShardBusyError
from node_agent.shard import FileEntry, ShardEntry
from node_agent.signature import SignatureError, Trust

log = logging.getLogger("node_agent.delivery")

WAIT_MS = 500  # longest sleep in recv: how soon a stop is seen
PAUSE_S = 1.0

OnChange = Callable[[str], None]  # (what happened, in words)
OnError = Callable[[str, str], None]  # (kind, text), for the first of each kind


@dataclass
class _Transfer:
    """An offer that is being carried out. `written`: bytes of each file; `fresh`: files of which no chunk has come since STATE,
    so that the ground station may still begin them anew."""

    id: int
    files: tuple[FileEntry, ...]
    store: Store
    whole: Callable[[], bytes]  # takes over what has come; the reply
    written: list[int] = field(default_factory=list)
    file: BinaryIO | None = None  # the partial file that is open, of `index`
    index: int = -1
    fresh: set[int] = field(default_factory=set)
    gap_told: bool = False

    def state(self, have: tuple[Have, ...]) -> bytes:
        """Goes on from what is there, and says so."""
        self.written = [there.bytes for there in have]
        self.fresh = set(range(len(have)))
        return delivery_frame.pack(Message(STATE, self.id, have=have))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file, self.index = None, -1


class Receiver:
    """Answers frames, for one thread. `on_change(text)` is called whenever a shard was added or removed."""

    def __init__(
        self,
        store: Store,
        loaded: experts.Experts,
        counters: Counters,
        memory_limit_bytes: int,
        on_change: OnChange,
        on_first_error: OnError,
        trust: Trust = Trust(),
        updates: AgentUpdates | None = None,
    ):
        """`trust`: whose shards are taken; `updates`: takes in new agents, None: there are none."""
        self._updates = updates
        self._trust = trust
        self._store, self._experts, self._counters = store, loaded, counters
        self._limit_bytes = memory_limit_bytes
        self._on_change, self._on_first_error = on_change, on_first_error
        self._process = psutil.Process()
        self._transfer: _Transfer | None = None

    def close(self) -> None:
        """The link has ended: what is half there stays, for the next offer."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    def restore(self) -> None:
        """Loads what was delivered before the agent was started; a shard that cannot be loaded is reported and left out."""
        for path, offer in self._store.kept():
            try:
                if offer is None:
                    raise StoreError(
                        "load", f"{path} is damaged or no plain file: remove it and deliver that shard again"
                    )
                if self._hosted(offer) != _entry(offer).sha256:  # none, or the older one of the node's own bundle
                    self._check(offer)
                    self._experts.put(self._open(offer, self._store.kept_graph(offer)))
            except StoreError as error:
                self.count(error.kind, str(error))
            except OSError as error:
                self.count("disk", f"{path} cannot be used ({error.strerror}): mend state_dir's disk")

    def answer(self, data: bytes) -> Iterator[bytes]:
        """The replies to a frame, to be sent as they come."""
        self._counters.shard_bytes_in += len(data)
        try:
            message = delivery_frame.unpack(data)
        except delivery_frame.DeliveryFrameError as error:
            yield self._refuse(error.transfer, "malformed", str(error))
            return
        try:
            if message.kind == OFFER:
                yield from self._take_offer(message)
            elif message.kind == OFFER_AGENT:
                yield from self._take_update(message)
            elif message.kind == CHUNK:
                yield from self._take_chunk(message)
            elif message.kind == DROP:
                yield self._drop(message)
            elif message.kind == REFUSED:  # never answered: two sides must not refuse to and fro
                self.count("malformed", message.text)
            else:
                yield self._refuse(message.transfer, "malformed", f"kind {message.kind} is not for a node")
        except StoreError as error:
            self.close()
            yield self._refuse(message.transfer, error.kind, str(error))
        except OSError as error:
            yield from self._disk_failed(message.transfer, error)

    # ------------------------------------------------------------ one shard

    def _hosted(self, offer: Offer) -> str | None:
        """sha256 of the version that is loaded of this shard."""
        which = offer.shard
        for hosted in self._experts.hosted:
            if (hosted.layer, hosted.expert, hosted.precision) == (which.layer, which.expert, which.precision):
                return hosted.sha256
        return None

    def _take_offer(self, message: Message) -> Iterator[bytes]:
        self.close()
        offer = message.offer
        self._check(offer)
        if self._hosted(offer) == _entry(offer).sha256:
            yield delivery_frame.pack(Message(DONE, message.transfer))
            return
        yield from self._begin(
            _Transfer(message.transfer, offer.files, self._store, lambda: self._take_over(message.transfer, offer))
        )

    def _take_update(self, message: Message) -> Iterator[bytes]:
        self.close()
        if self._updates is None:
            raise StoreError(
                "other",
                "this agent was not started by its launcher: stop it, `pip install -U` the new kit there, start it again",
            )
        if self._updates.is_good(message.update):
            yield delivery_frame.pack(Message(DONE, message.transfer))
            return
        self._updates.check(message.update)

        def staged() -> bytes:
            self._updates.stage(message.update)
            return delivery_frame.pack(Message(STAGED, message.transfer))

        yield from self._begin(_Transfer(message.transfer, message.update.files, self._updates.store, staged))

    def _begin(self, transfer: _Transfer) -> Iterator[bytes]:
        have = transfer.store.have(transfer.files)
        missing = sum(file.bytes - there.bytes for file, there in zip(transfer.files, have))
        transfer.store.make_room(transfer.files, missing)
        self._transfer = transfer
        yield transfer.state(have)
        yield from self._end_if_whole()

    def _check(self, offer: Offer) -> None:
        """Raises: StoreError for a shard that none of our signers has signed, that does not belong here or would not fit into memory."""
        try:
            self._trust.check_shard(offer.shard.stem, offer)
        except SignatureError as error:
            raise StoreError("signature", str(error)) from None
        loaded = self._experts
        if loaded.hosted and (offer.hidden, offer.bundle) != (loaded.hidden, loaded.bundle):
            mine = f"{loaded.bundle} (D={loaded.hidden})"
            raise StoreError("other", f"this node serves {mine}, not {offer.bundle} (D={offer.hidden}): drop all first")
        need = int(_entry(offer).bytes * experts.RESIDENT_FACTOR)
        used = self._process.memory_info().rss
        if used + need > self._limit_bytes:
            raise StoreError(
                "memory",
                f"{offer.shard.stem} needs about {need / 1e6:.1f} MB, {used / 1e6:.0f} of {self._limit_bytes / 1e6:.0f} MB are "
                f"used: drop a shard first or use a lower precision",
            )

    def _take_chunk(self, message: Message) -> Iterator[bytes]:
        transfer = self._transfer
        if transfer is None or transfer.id != message.transfer:
            yield self._refuse(message.transfer, "unknown", "no such transfer here: offer the shard again")
            return
        if message.index >= len(transfer.files):
            raise StoreError("malformed", f"file {message.index} of an offer of {len(transfer.files)}")
        file = transfer.files[message.index]
        if message.offset + len(message.body) > file.bytes:
            raise StoreError("malformed", f"a chunk beyond the {file.bytes} bytes of {file.path}")
        if (
            message.offset == 0 and message.index in transfer.fresh
        ):  # what is half here is not what the ground station has
            transfer.written[message.index] = 0
        if message.offset != transfer.written[message.index]:  # a chunk before it was lost with a connection
            if not transfer.gap_told:
                transfer.gap_told = True
                transfer.close()
                yield transfer.state(transfer.store.have(transfer.files))
            return
        transfer.gap_told = False
        transfer.fresh.discard(message.index)
        self._write(transfer, message)
        yield delivery_frame.pack(Message(ACK, transfer.id, message.index, transfer.written[message.index]))
        if transfer.written[message.index] == file.bytes:
            transfer.close()
            transfer.store.finish(file)
            yield from self._end_if_whole()

    def _write(self, transfer: _Transfer, message: Message) -> None:
        if transfer.index != message.index:
            transfer.close()
            transfer.file = transfer.store.open_partial(transfer.files[message.index], message.offset)
            transfer.index = message.index
        left = message.body
        while left:
            left = left[transfer.file.write(left) :]
        transfer.written[message.index] += len(message.body)

    def _end_if_whole(self) -> Iterator[bytes]:
        transfer = self._transfer
        files = transfer.files
        if any(count < file.bytes for count, file in zip(transfer.written, files)):
            return
        for file in files:  # a partial file may have become whole right before the agent was killed
            if transfer.store.half_there(file):
                transfer.store.finish(file)
        reply = transfer.whole()
        transfer.close()
        self._transfer = None
        yield reply

    def _take_over(self, transfer_id: int, offer: Offer) -> bytes:
        """Raises: StoreError, OSError."""
        self._check(offer)
        opened = self._open(offer, self._store.gather(offer.files))
        self._store.keep(offer)  # from here on it is this version, also after a power cut
        again = self._hosted(offer) is not None
        self._experts.put(opened)
        self._on_change(f"{offer.shard.stem} is {'replaced by another version' if again else 'loaded'}")
        return delivery_frame.pack(Message(DONE, transfer_id))

    def _open(self, offer: Offer, graph: Path | None) -> experts.Opened:
        """Raises: StoreError; a file that cannot be used is deleted then."""
        if graph is None:
            raise StoreError("load", f"a file of {offer.shard.stem} is missing or altered: deliver it again")
        try:
            self._experts.adopt(offer.hidden, offer.bundle)
            opened = self._experts.open(_entry(offer), graph)
        except ExpertError as error:
            self._store.spoilt(offer.shard, graph)
            raise StoreError("load", str(error)) from None
        if self._process.memory_info().rss > self._limit_bytes:
            raise StoreError("memory", f"{offer.shard.stem} took more memory than the limit allows: drop a shard first")
        return opened

    def _drop(self, message: Message) -> bytes:
        which = message.shard
        self.close()
        try:
            found = self._experts.remove(which.layer, which.expert, which.precision)
        except ShardBusyError as error:
            return self._refuse(message.transfer, "busy", str(error))
        if found:  # else there is nothing to remember either
            self._store.drop(which)
            self._on_change(f"{which.stem} is dropped")
        return delivery_frame.pack(Message(DROPPED, message.transfer))

    # ------------------------------------------------------------ what goes wrong

    def _disk_failed(self, transfer_id: int, error: OSError) -> Iterator[bytes]:
        """What is half there of a shard that the disk would not take is deleted: a full disk is a danger to the board."""
        transfer = self._transfer
        if transfer is not None:
            self.close()
            for file in transfer.files:
                with suppress(
                    OSError
                ):  # the disk itself may be what is broken, and the ground station waits for an answer
                    transfer.store.forget(file)
        yield self._refuse(transfer_id, "disk", f"the disk does not take it ({error.strerror}): free space on the disk")

    def count(self, kind: str, text: str) -> None:
        if Counters.count(self._counters.delivery_errors, kind):
            self._on_first_error(kind, text[:200])

    def _refuse(self, transfer: int, kind: str, text: str) -> bytes:
        self.count(kind, text)
        return delivery_frame.pack(Message(REFUSED, transfer, refusal=kind, text=text))


def _entry(offer: Offer) -> ShardEntry:
    return ShardEntry(offer.shard.layer, offer.shard.expert, offer.shard.precision, offer.files)


class Delivery:
    """The loop; nothing without `delivery_endpoint` in the configuration. Use as a context manager."""

    def __init__(self, node: str, link: LinkConfig, receiver: Receiver):
        """Raises: ConfigError for a key that cannot be used."""
        self._node, self._link, self._receiver = node, link, receiver
        self._keys = own_key(link.secret_key_file) if link.server_public_key else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    def __enter__(self) -> Delivery:
        if self._link.delivery_endpoint:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        """A node that can take no shard still serves those that it has: what ends the link is counted, and it is made anew."""
        context = zmq.Context(io_threads=1)
        try:
            while not self._stop.is_set():
                try:
                    with LibzmqDealer(self._dial(context)) as link:
                        self._serve(link)
                except Exception as error:
                    log.exception("delivery of shards: dialling again")
                    self._receiver.count("internal", f"{error!r}: report this")
                    self._stop.wait(PAUSE_S)
                self._receiver.close()
        finally:
            context.destroy(linger=0)

    def _dial(self, context: zmq.Context) -> zmq.Socket:
        link = self._link
        socket = open_dealer(
            context,
            self._node,
            link.delivery_endpoint,
            delivery_frame.MAX_FRAME_BYTES,
            link.server_public_key,
            self._keys,
        )
        socket.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        return socket

    def _serve(self, link: LibzmqDealer) -> None:
        while not self._stop.is_set():
            if (data := link.receive(WAIT_MS / 1000)) is None:
                if not link.alive(time.monotonic()):
                    return
                continue
            for reply in self._receiver.answer(data):
                if not link.send(reply):
                    self._receiver.count("unsent", "the ground station went away before its answer")
