"""The duty cap at the data plane: when the next request may be computed, and which one cannot be in time any more.

A computation of c seconds pushes the moment from which the next may start c / duty further, on an absolute time line (the
generic cell rate algorithm, ITU-T I.371 annex A, with seconds of computing for cells). So a late wake-up costs no rate, and
idle time is forgotten but for CREDIT_S of computing: over any window of W seconds the share computed is at most
duty + (CREDIT_S + one request) / W.
Leaves out: what the cap is (guard.py), sockets and sleeping (dataplane.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from node_agent import frame

CREDIT_S = 0.05
PATIENCE_S = 5.0  # how long a request without a budget is kept waiting
SMOOTHING = 0.2  # of the mean length of a computation
MAX_WAITING = 63  # requests held back, so that there is room for a PING
MAX_WAITING_BYTES = frame.MAX_PAYLOAD_BYTES

Arrived = tuple[int, bytes]  # time.perf_counter_ns() and frame


class Request(NamedTuple):
    """What must be known of an EXPERTS frame without reading its tensors. `budget_s` 0: no deadline; `size` in bytes."""

    request_id: int
    source: int
    layer: int
    budget_s: float
    size: int


class Plan(NamedTuple):
    """What is to be done now: `order` are the frames that stay, `refused` those to be answered by an error (with its kind and
    text); the first of `order` is not to be answered before `wait_s` have passed."""

    order: tuple[Arrived, ...]
    refused: tuple[tuple[Request, str, str], ...]
    wait_s: float


def peek(data: bytes) -> Request | None:
    """The request in a frame, None for a frame of another kind or none of ours."""
    if len(data) < frame.HEADER_BYTES or data[:4] != frame.MAGIC or data[4:6] != bytes((frame.VERSION, frame.EXPERTS)):
        return None
    fields = frame._HEADER.unpack_from(data)  # of our own package: the layout has one home
    layer, source, request_id, budget_us = fields[6], fields[7], fields[9], fields[13]
    return Request(request_id, source, layer, budget_us / 1e6, len(data))


class Pacer:
    """Written by the guard's thread (`set`) and by the data plane's (the rest). `limited` is all that an unlimited node reads.

    Times are of time.perf_counter(), given by the caller.
    """

    def __init__(self) -> None:
        self.limited = False
        self.duty = 1.0
        self.refusal = ("", "")
        self._next_s = 0.0
        self._usual_s = 0.0

    def set(self, duty: float, refusal_kind: str = "", refusal: str = "") -> None:
        """The cap from now on, 0-1; with `refusal` no work is taken."""
        self.duty, self.refusal = duty, (refusal_kind, refusal)
        self.limited = bool(refusal_kind) or duty < 1.0

    def computed(self, start_ns: int, end_ns: int) -> None:
        """A computation took place."""
        busy_s = max(0, end_ns - start_ns) / 1e9
        self._usual_s += SMOOTHING * (busy_s - self._usual_s) if self._usual_s else busy_s
        duty = max(self.duty, 1e-3)
        self._next_s = max(self._next_s, start_ns / 1e9 - CREDIT_S / duty) + busy_s / duty

    def plan(self, waiting: Iterable[Arrived], now_ns: int) -> Plan:
        """Frames that are no work come first, with nothing to wait for; then work in the order of arrival."""
        at_once, work, refused, held = [], [], [], 0
        for item in waiting:
            request = peek(item[1])
            if request is None:
                at_once.append(item)
                continue
            why = self._refusal(request, item[0] / 1e9, now_ns / 1e9, len(work))
            if not why[0] and (len(work) >= MAX_WAITING or (work and held + request.size > MAX_WAITING_BYTES)):
                why = (frame.THROTTLED, f"duty cap {self.duty:.2f}: {len(work)} requests wait already")
            if why[0]:
                refused.append((request, *why))
            else:
                work.append(item)
                held += request.size
        paced = bool(work) and not at_once and self.duty < 1.0
        wait_s = max(0.0, self._next_s - now_ns / 1e9) if paced else 0.0
        return Plan((*at_once, *work), tuple(refused), wait_s)

    def _refusal(self, request: Request, received_s: float, now_s: float, ahead: int) -> tuple[str, str]:
        """(kind, text) of why a request with `ahead` others before it is refused now; empty where it may wait."""
        duty, refusal = self.duty, self.refusal
        if refusal[0] or duty >= 1.0:
            return refusal
        if duty <= 0.0:
            return frame.THROTTLED, "the duty cap is 0: nothing is computed now"
        start_s = max(now_s, self._next_s) + ahead * self._usual_s / duty
        latest_s = received_s + (request.budget_s or PATIENCE_S) - self._usual_s
        if start_s <= latest_s:
            return "", ""
        return (
            frame.THROTTLED,
            f"duty cap {duty:.2f}: its turn would come in {start_s - now_s:.3f} s, too late for its budget",
        )
