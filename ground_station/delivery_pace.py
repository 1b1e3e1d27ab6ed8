"""Imposes a contact's rate, delay and end on a real transfer, chunk by chunk. Pure: times in, times out.

Rule of firmware_sim.pacing: absolute deadlines. A chunk is handed to the real socket when its last bit would be at the node; an
answer counts when it would be back. What would still be under way when the contact ends is not sent, and an answer that would
come after the end is lost. Every figure made with this is emulated. Contacts run both ways, and answers take no rate.
Leaves out: clocks and sockets (delivery.py), which contact there is (contacts.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from firmware_sim.pacing import Pacer
from node_agent.delivery_frame import HEADER_BYTES, MAX_CHUNK_BYTES

CHUNK_S = 0.05  # of the link's rate, so that little is lost when a contact ends and the pace is smooth
MIN_CHUNK_BYTES = 4096
MIN_WINDOW_BYTES = 4 * 1024 * 1024  # may be under way without an acknowledgement
MAX_WINDOW_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Window:
    """While a node can be reached, in seconds of the transfer's clock (time.monotonic); `limit_bytes`: no more than these are
    there to be sent (None: no limit)."""

    opens_s: float
    closes_s: float
    rate_bps: float
    delay_s: float
    limit_bytes: int | None = None


Windows = Callable[[int, float], tuple[Window, ...]]
"""(bytes still to send, now) -> the windows that there are for them, in order; asked again whenever the last one has closed."""


class Slot(NamedTuple):
    """Bytes of payload that may go, when their first bit leaves here, and when the last one is at the node."""

    size: int
    start_s: float
    there_s: float


def chunk_bytes(rate_bps: float) -> int:
    return int(min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, rate_bps * CHUNK_S / 8)))


def wire_bytes(sizes: tuple[int, ...], rate_bps: float) -> int:
    """Payload and headers of files of these sizes, as chunks over a link of that rate."""
    chunk = chunk_bytes(rate_bps)
    return sum(sizes) + HEADER_BYTES * sum(math.ceil(size / chunk) for size in sizes)


class Direct:
    """The link as it is: nothing is imposed."""

    emulated = False
    chunk = MAX_CHUNK_BYTES
    window_bytes = MIN_WINDOW_BYTES
    opens_s, closes_s, delay_s = -math.inf, math.inf, 0.0
    spent = False

    def slot(self, available_s: float, size: int, is_chunk: bool = True) -> Slot:
        return Slot(min(size, self.chunk), available_s, available_s)

    def back_s(self, received_s: float) -> float | None:
        return received_s


class Paced:
    """One window: a link with a rate and a delay, which ends."""

    emulated = True

    def __init__(self, window: Window):
        self._window, self._pacer = window, Pacer(window.rate_bps, window.delay_s)
        self._left_bytes = window.limit_bytes
        self.chunk = chunk_bytes(window.rate_bps)
        self.opens_s, self.closes_s, self.delay_s = window.opens_s, window.closes_s, window.delay_s
        product = 2.0 * window.delay_s * window.rate_bps / 8
        self.window_bytes = int(min(MAX_WINDOW_BYTES, max(MIN_WINDOW_BYTES, product + 2 * self.chunk)))

    def slot(self, available_s: float, size: int, is_chunk: bool = True) -> Slot | None:
        """The next slot of at most `size` bytes for what is there since `available_s`; None when the contact ends before.

        The window's limit is one of chunks.
        """
        window = self._window
        available_s = max(available_s, window.opens_s)
        start_s = max(available_s, self._pacer.busy_until_s)
        room = math.floor((window.closes_s - start_s) * window.rate_bps / 8 + 1e-6) - HEADER_BYTES
        size = min(size, self.chunk, room)
        if is_chunk and self._left_bytes is not None:
            size = min(size, self._left_bytes - HEADER_BYTES)
        if size < 1:
            return None
        if is_chunk and self._left_bytes is not None:
            self._left_bytes -= size + HEADER_BYTES
        self._pacer, there_s = self._pacer.admit(available_s, size + HEADER_BYTES)
        return Slot(size, start_s, there_s)

    @property
    def spent(self) -> bool:
        """Whether all that is there to be sent has been."""
        return self._left_bytes is not None and self._left_bytes <= HEADER_BYTES

    def back_s(self, received_s: float) -> float | None:
        """When an answer that came over the real socket is back over the emulated link; None when it is lost."""
        back_s = received_s + self._window.delay_s
        return back_s if back_s <= self._window.closes_s else None
