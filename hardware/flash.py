"""Writes an image to several cards at once and proves by reading back that it is there: open all, zero heads, write, verify, packs, heads.

The image is read, unpacked and hashed once; a thread for each card takes the pieces. What the card gives back past the cache must have
the image's sha256, or the checksum of each range of its block map; the head goes on last, when everything else has held.
Stopping (Ctrl-C, a damaged image, a failing card) at any moment leaves zeros in the head. There is no resuming: start again.
Leaves out: choosing disks (block_devices.py), a card's identity (flash_pack.py), talking to people (the command line).
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from hardware.bmap import Bmap, Mapped, with_used
from hardware.fat_files import Fat, FatError
from hardware.flash_card import AGAIN, HEAD_BYTES, READ_BYTES, UNCERTAIN, Card, FlashError, Target, VerifyError
from hardware.flash_front import look_at_front
from hardware.flash_pack import Pack, pack_held, put_pack
from hardware.image_errors import ImageError, ImageTooLarge
from hardware.image_source import RAW, Announced, ImageSource
from hardware.program import ProgramError, find

PIECE_BYTES = READ_BYTES
ZEROS = bytes(PIECE_BYTES)
QUEUED = 8
"""Pieces that a card may lag behind the reader; the slowest card sets the pace."""
POLL_S = 0.1
WRITE, VERIFY, PACK, HEAD, DONE, LEFT = "write", "verify", "pack", "head", "done", "left"


class DigestError(ImageError):
    """The image is not the one whose sha256 or block map was given."""


@dataclass(frozen=True)
class Job:
    """What goes on one card."""

    target: Target
    pack: Pack | None = None


@dataclass(frozen=True)
class Step:
    """How far a card is: `job` counts from 0; bytes are of the stage. LEFT: given up, and its head could not be zeroed."""

    job: int
    stage: str
    done_bytes: int
    total_bytes: int


Show = Callable[[Step], None]
"""Called from the cards' threads."""


@dataclass(frozen=True)
class Outcome:
    """How it ended for one card; without `error` it was verified. `read_back`: how the cache was gone past."""

    job: Job
    error: Exception | None = None
    written_bytes: int = 0
    write_s: float = 0.0
    verify_s: float = 0.0
    read_back: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Flashed:
    """The sha256 of the image's file as it lies there, '' where the block map's checksum stands for it; the jobs' outcomes in order."""

    sha256: str
    outcomes: tuple[Outcome, ...]


@dataclass
class _Range:
    """Bytes that are hashed together: the whole image, or a range of its block map. Pieces: (offset, bytes, CRC-32, to say where)."""

    hashed: hashlib._Hash
    pieces: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class _Image:
    """What the reader has found out: complete before the cards' queues end."""

    head: bytearray
    ranges: list[_Range] = field(default_factory=list)
    sha256: str = ""


def check_fits(source: ImageSource, jobs: tuple[Job, ...], block_map: Bmap | None = None) -> None:
    """Raises: ImageTooLarge, ImageError for a block map of another image and for a card that is named twice."""
    if block_map is not None and block_map.image_bytes != source.bytes:
        raise ImageError(
            f"the block map is of an image of {block_map.image_bytes} bytes, {source.path} has {source.bytes}: give --no-bmap"
        )
    for job in jobs:
        if source.bytes > job.target.bytes:
            raise ImageTooLarge(source.path, source.bytes, job.target.bytes)
    paths = [job.target.path.resolve() for job in jobs]
    files = [_file(path) for path in paths]  # a hard link is another name of the same file
    if len({*files}) != len(files) or _file(source.path.resolve()) in files:
        raise ImageError("a card or file is named twice, or is the image itself: name each once")


def _file(path: Path) -> object:
    """What is the same for every name of a file; of a file that is not there yet, its path."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class Plan:
    """What is written of an image, in order, and where packs go. Made by `planned`, before a card is touched."""

    source: ImageSource
    jobs: tuple[Job, ...]
    ranges: tuple[Mapped, ...]
    algorithm: str
    fat: Fat | None
    map_checksum: str = ""
    """Of a block map that has a checksum for each of its ranges, and so stands for the image's content."""

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.ranges)


def planned(source: ImageSource, jobs: tuple[Job, ...], block_map: Bmap | None = None) -> Plan:
    """Raises: ImageTooLarge, ImageError (also for an image that takes no pack), ProgramError, OSError."""
    check_fits(source, jobs, block_map)
    packs = any(job.pack is not None for job in jobs)
    if block_map is None and not packs:
        return Plan(source, jobs, (Mapped(0, source.bytes, ""),), "sha256", None)
    front = look_at_front(source)
    if packs:
        find("mcopy")
        if front.fat is None:
            raise ImageError(
                f"a pack needs a FAT partition, and {front.lacks}: flash without packs, or take another image"
            )
    if block_map is None:
        return Plan(source, jobs, (Mapped(0, source.bytes, ""),), "sha256", front.fat)
    stands_for_it = block_map.checksum if all(each.checksum for each in block_map.ranges) else ""
    return Plan(source, jobs, with_used(block_map.ranges, front.used), block_map.algorithm, front.fat, stands_for_it)


def pieces_of(start: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the pieces of a range, none over a multiple of PIECE_BYTES, so that none is half in the head."""
    while start < end:
        stop = min(end, (start // PIECE_BYTES + 1) * PIECE_BYTES)
        yield start, stop - start
        start = stop


def flash(plan: Plan, announced: Announced | None = None, show: Show = lambda step: None) -> Flashed:
    """Writes and verifies all. A card that fails does not stop the others; its outcome holds the error.

    Raises: FlashError before a byte is written, where a card cannot be had alone; ImageError and DigestError (a bad image) after
    which, as after KeyboardInterrupt, no card boots.
    """
    image = _Image(bytearray(min(HEAD_BYTES, plan.source.bytes)))
    stop = threading.Event()
    with ExitStack() as stack:
        cards = [stack.enter_context(Card(job.target, plan.source.bytes)) for job in plan.jobs]
        lanes = [_Lane(number, plan, card, image, stop, show) for number, card in enumerate(cards)]
        try:
            for lane in lanes:
                lane.start()
            _read(plan, announced, image, lanes)
            for lane in lanes:
                while lane.is_alive():
                    lane.join(POLL_S)  # a plain join would not hear a signal
        finally:
            stop.set()
            _gathered(lanes)
    for lane in lanes:
        if lane.outcome.error is not None and not isinstance(lane.outcome.error, FlashError):
            raise lane.outcome.error  # a bug
    return Flashed(image.sha256, tuple(lane.outcome for lane in lanes))


def _gathered(lanes: list[_Lane]) -> None:
    """Waits for every thread, whatever signals still come: the heads must be zero before the cards are let go."""
    while any(lane.is_alive() for lane in lanes):
        try:
            for lane in lanes:
                lane.join(POLL_S)
        except BaseException:  # noqa: B036 - the first interruption is on its way up already
            continue


def _read(plan: Plan, announced: Announced | None, image: _Image, lanes: list[_Lane]) -> None:
    """Hands the image to the lanes, piece by piece, and compares its checksums.  Raises: ImageError, DigestError, OSError."""
    source, at = plan.source, 0
    all_of_it = len(plan.ranges) == 1 and plan.ranges[0].bytes == source.bytes and plan.algorithm == "sha256"
    # where a block map vouches for the content, the holes need not be hashed, unless a sha256 that covers them was announced
    raw = not plan.map_checksum or all_of_it
    if announced is not None:
        raw = raw or source.kind == RAW or announced.of_raw is not False
    whole = hashlib.sha256() if raw else None
    with source.stream() as stream:
        for mapped in (*plan.ranges, Mapped(source.bytes, 0, "")):
            start, end = mapped.start, mapped.start + mapped.bytes
            while at < start:  # between ranges, and after the last: of the image's sha256, but not written
                data = stream.read(min(PIECE_BYTES, start - at))
                if data != (ZEROS if len(data) == PIECE_BYTES else bytes(len(data))):
                    raise DigestError(
                        f"{source.path} has data between byte {at} and {at + len(data)} that its block map leaves out: it is of another "
                        "image, give --no-bmap; no card boots"
                    )
                if whole is not None:
                    whole.update(data)
                at += len(data)
            if start == end:
                break
            part = _Range(whole if all_of_it and whole is not None else hashlib.new(plan.algorithm))
            image.ranges.append(part)
            for offset, count in pieces_of(start, end):
                data = stream.read(count)
                at += count
                part.hashed.update(data)
                if whole is not None and whole is not part.hashed:
                    whole.update(data)
                part.pieces.append((offset, count, zlib.crc32(data)))
                if offset < HEAD_BYTES:
                    image.head[offset : offset + count] = data
                elif not any([lane.put((offset, data)) for lane in lanes]):
                    return  # every card has failed
            if mapped.checksum and part.hashed.hexdigest() != mapped.checksum:
                raise DigestError(
                    f"{source.path} differs from its block map between byte {start} and {end}: get both again; no card boots"
                )
        packed, unpacked = stream.finish(), whole.hexdigest() if whole is not None else ""
    image.sha256 = packed or unpacked
    if announced is not None:
        digests = {None: (packed, unpacked), False: (packed or unpacked,), True: (unpacked,)}[announced.of_raw]
        if announced.sha256 not in digests:
            raise DigestError(
                f"{source.path} has the sha256 {image.sha256[:16]}..., not {announced.sha256[:16]}... as announced: get it again; "
                "no card boots"
            )
    for lane in lanes:
        lane.put(None)


class _Lane(threading.Thread):
    """One card's thread."""

    def __init__(self, number: int, plan: Plan, card: Card, image: _Image, stop, show: Show) -> None:
        super().__init__(name=f"card-{number}")
        self._number, self._job, self._fat, self._total = number, plan.jobs[number], plan.fat, plan.bytes
        self._card, self._image, self._halt, self._show = card, image, stop, show
        self._queue: queue.Queue = queue.Queue(QUEUED)
        self._facts: dict = {}
        self.outcome = Outcome(self._job, FlashError(f"{card.target.path} was not finished"))

    def put(self, item) -> bool:
        """False where this card has failed and takes nothing more."""
        while self.is_alive():
            try:
                self._queue.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                pass
        return False

    def run(self) -> None:
        error: Exception | None = None
        try:
            self._work()
        except _Stopped:
            error = self.outcome.error
        except FlashError as problem:
            error = problem
        except OSError as problem:
            error = FlashError(f"{self._job.target.path} failed ({problem.strerror or problem})")
        except Exception as problem:  # a bug: the main thread raises it
            error = problem
        if error is not None:
            left = AGAIN if self._card.give_up() else UNCERTAIN
            if left is UNCERTAIN:
                self._show(Step(self._number, LEFT, 0, self._total))  # also where an interruption swallows the outcome
            if isinstance(error, FlashError):
                error = type(error)(f"{error}: {left}")
        self.outcome = Outcome(self._job, error, **self._facts)

    def _say(self, stage: str, done: int) -> None:
        if self._halt.is_set():
            raise _Stopped
        self._show(Step(self._number, stage, done, self._total))

    def _next(self):
        while True:
            if self._halt.is_set():
                raise _Stopped
            try:
                return self._queue.get(timeout=POLL_S)
            except queue.Empty:
                pass

    def _work(self) -> None:
        card, began = self._card, time.monotonic()
        self._say(WRITE, 0)
        card.blank()
        done = 0
        while (item := self._next()) is not None:
            offset, data = item
            card.write(offset, data)
            done += len(data)
            self._say(WRITE, done)
        card.flush()
        self._facts |= {"written_bytes": self._total, "write_s": time.monotonic() - began}
        self._say(VERIFY, 0)
        began, done = time.monotonic(), 0
        for part in self._image.ranges:
            hashed = hashlib.new(part.hashed.name)
            for offset, count, crc in part.pieces:
                if offset < HEAD_BYTES:
                    data = memoryview(self._image.head)[offset : offset + count]  # compared when it is on the card
                else:
                    data = card.read(offset, count)
                    self._check(zlib.crc32(data) == crc, offset, count)
                hashed.update(data)
                done += count
                self._say(VERIFY, done)
            start = part.pieces[0][0]
            self._check(hashed.digest() == part.hashed.digest(), start, sum(count for _, count, _ in part.pieces))
        head, boundary = bytes(self._image.head), len(self._image.head)
        if self._job.pack is not None and self._fat is not None:
            # a card with a partition table and no identity would start as nobody: what lies before the FAT comes after the pack
            boundary = min(self._fat.offset_bytes, len(head))
            self._say(PACK, done)
            self._put_head(boundary, head[boundary:])
            self._put_pack(self._job.pack, self._fat)
        self._say(HEAD, done)
        self._put_head(0, head[:boundary])
        self._facts |= {"verify_s": time.monotonic() - began, "read_back": card.read_back}
        self._facts["remark"] = card.complete()
        self._show(Step(self._number, DONE, self._total, self._total))

    def _put_pack(self, pack: Pack, fat: Fat) -> None:
        path = self._card.target.path
        try:
            put_pack(path, fat, pack)
            self._card.flush()
            self._card.forget()
            held = pack_held(path, fat, pack)
        except (FatError, ProgramError) as error:
            raise FlashError(f"{path} does not take the pack {pack.node} ({error})") from None
        if not held:
            raise VerifyError(f"{path} does not give back the pack {pack.node}, try another card or reader")

    def _put_head(self, offset: int, data: bytes) -> None:
        if data:
            self._card.write_head(offset, data)
            self._check(self._card.read(offset, len(data)) == data, offset, len(data))

    def _check(self, same: bool, offset: int, count: int) -> None:
        if not same:
            raise VerifyError(
                f"{self._job.target.path} gives back other bytes than were written, between byte {offset} and {offset + count}, "
                "try another card or reader"
            )


class _Stopped(Exception):
    """The work ends before its end."""
