"""Telemetry kept on the board: the last messages in memory, which of them nobody got, and the batches that bring them home.

Pure and bounded: by messages and by bytes, the oldest goes first, and one that nobody got is counted when it goes. Messages
are kept compressed (some 6 KB of JSON are 0.6 KB) and, once they were sent, until newer ones need the room, so that a
receiver may ask for what it missed. Leaves out: locks, MQTT and the decision to send (control.py); a file: a power cut loses
what is in memory, because writing every second would wear out an SD card.
"""

from __future__ import annotations

import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable

MAX_MESSAGES = 3600  # an hour at 1 Hz
MAX_BYTES = 8_000_000
MESSAGES_BOUNDS = (1, 100_000)  # 28 h at 1 Hz; all are looked at in each period
BYTES_BOUNDS = (100_000, 1_000_000_000)
BATCH_BYTES = 100_000  # of JSON: small enough for a slow link and every broker's limit on payloads
MAX_RANGES = 100
LEVEL = 1  # higher ones save 7 % of the bytes and double the time
RANGES_PATTERN = re.compile(r"\d{1,19}-\d{1,19}(?:,\d{1,19}-\d{1,19})*")


class RangesError(ValueError):
    """A list of ranges is not written as it must be; the text says how."""


def parse_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """(first, last) pairs of a text such as '3-9,12-12'.  Raises: RangesError."""
    if len(text) > 4096 or not RANGES_PATTERN.fullmatch(text) or text.count(",") >= MAX_RANGES:
        raise RangesError(f"ranges {text[:40]!r} are not of the form 3-9,12-12, at most {MAX_RANGES} of them")
    pairs = (pair.split("-") for pair in text.split(","))
    return tuple((int(first), int(last)) for first, last in pairs)


class _Kept:
    """One message: `owed` while nobody got it, `flying` while a batch with it waits for its acknowledgement."""

    __slots__ = ("packed", "owed", "flying")

    def __init__(self, packed: bytes, owed: bool):
        self.packed, self.owed, self.flying = packed, owed, False


class History:
    """Messages by number, which only grows. `dropped` counts those that went without anybody having got them."""

    def __init__(self, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_BYTES):
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self.kept_bytes = 0
        self.dropped = 0
        self._newest = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def oldest(self) -> int:
        """The lowest number that is held; one above the newest where nothing is."""
        return next(iter(self._kept), self._newest + 1)

    @property
    def owed(self) -> int:
        """How many messages nobody has got yet."""
        return sum(kept.owed for kept in self._kept.values())

    def keep(self, number: int, payload: bytes, owed: bool) -> None:
        """Keeps a message, whose number is above all before. `owed`: it was not sent."""
        self._newest = number
        self._kept[number] = _Kept(zlib.compress(payload, LEVEL), owed)
        self.kept_bytes += len(self._kept[number].packed)
        while len(self._kept) > self._max_messages or self.kept_bytes > self._max_bytes:
            _, gone = self._kept.popitem(last=False)
            self.kept_bytes -= len(gone.packed)
            self.dropped += gone.owed

    def owe(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Owes again those of `ranges` that are held and not on their way; returns how many of `ranges` are held."""
        held = 0
        for first, last in ranges:
            for number in self._kept if last - first >= len(self._kept) else range(first, last + 1):
                kept = self._kept.get(number)
                if kept is not None and first <= number <= last:
                    held += 1
                    kept.owed = kept.owed or not kept.flying
        return held

    def next_batch(self, max_bytes: int = BATCH_BYTES) -> tuple[tuple[int, ...], list[bytes]]:
        """(numbers, messages) of the oldest that are owed and not under way; they count as under way from now on."""
        numbers, payloads, size = [], [], 0
        for number, kept in self._kept.items():
            if not kept.owed or kept.flying:
                continue
            payload = zlib.decompress(kept.packed)
            size += len(payload) + 1
            if payloads and size > max_bytes:
                break
            kept.flying = True
            numbers.append(number)
            payloads.append(payload)
        return tuple(numbers), payloads

    def arrived(self, numbers: Iterable[int]) -> None:
        """A batch was acknowledged: its messages are owed no more, and stay as long as there is room."""
        for number in numbers:
            if (kept := self._kept.get(number)) is not None:
                kept.owed = kept.flying = False

    def came_back(self, numbers: Iterable[int]) -> None:
        """The connection of a batch ended before its acknowledgement: it will be sent again."""
        for number in numbers:
            if (kept := self._kept.get(number)) is not None:
                kept.flying = False
