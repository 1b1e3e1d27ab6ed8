"""Imposes emulated links on the real transfer of hidden states, both ways, on the ground station's side: boards stay as they are.

`PacedLink` stands where a link.Link does. A request is handed to the real socket when its last bit would be at the node; an answer
counts when its last bit would be back. Both times are absolute: an answer is taken to leave the node as long after the request's
scheduled arrival as the node really took, so that a late wake-up costs no rate (firmware_sim.pacing). All nodes' messages are under
way at once, in one thread that waits for the next event: for the socket, and in the last millisecond, which the kernel's poll cannot
count, by short sleeps. A node out of contact is not up; what a contact's end cuts is unreachable, and the ladder does the rest.
Everything that this imposes is emulated. Sizes are those of frames, without ZeroMQ's and the network's own headers.
Leaves out: which links there are (link_ways.py), heartbeats (not held up: they belong to the bench), lost or repeated bits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ground_station.link import OUT_OF_CONTACT, Failure, Link, Peer, late
from ground_station.link_ways import Passage, Ways
from node_agent import frame

POLL_S = 0.001  # what a poll of the socket may wait too long
NEAR_S = 0.0015  # from here on, short sleeps
NAP_S = 0.0002
HOLD_POLL_S = 0.05


@dataclass(frozen=True)
class NoContact(Failure):
    """The emulated link carries nothing to or from the node now: it is well, and not taken out of use on the bench."""

    @property
    def why(self) -> str:
        return OUT_OF_CONTACT


@dataclass
class Imposed:
    """What the emulated links did, since the start. `link_s`: of each exchange the longest time that one node's messages were to be
    under way, summed; `waited_s`: wall time of the exchanges; `late_s`: worst time that an answer was given later than planned;
    `held_s`: time that layers waited because no node at all was in contact; `misses`: node -> requests or answers that found no way
    or were cut."""

    exchanges: int = 0
    messages: int = 0
    bytes: int = 0
    link_s: float = 0.0
    waited_s: float = 0.0
    late_s: float = 0.0
    held_s: float = 0.0
    misses: Counter[str] = field(default_factory=Counter)


class Flown(NamedTuple):
    """One request and its answer over the links. `measured_s`: from the begin of the exchange until the request went to the socket,
    and from the answer's coming until it was given: the node's own time is not in it."""

    node: str
    sent_bytes: int
    received_bytes: int
    measured_s: float


@dataclass
class _Flight:
    """One request and its answer. `passage`: of the message that is under way, None while the node has the request; `answer` is what
    it brought. `next_s`: when something is to be done unless the socket has something first; `there_s`: when the request was to
    be at the node, `asked_s`: when it really went; `link_s`: how long both messages were to be under way; `measured_s`: how
    long they were (a begin is taken off it before its end is added)."""

    request_id: int
    data: bytes
    passage: Passage | None
    next_s: float
    there_s: float
    link_s: float
    measured_s: float
    asked_s: float = 0.0
    answer: frame.Frame | Failure | None = None


class PacedLink:
    """A link.Link whose nodes are reached over `ways`. From one thread; the Link inside stays its owner's to close."""

    def __init__(self, link: Link, ways: Ways, flown: Callable[[Flown], None] | None = None, hold_s: float = 0.0):
        """`flown` is told of each answer that arrived (for benchmarks). `hold_s`: for so long a layer waits for a contact when no node
        has one."""
        self.link, self.ways, self._flown, self._hold_s = link, ways, flown, hold_s
        self.imposed = Imposed()

    @property
    def endpoint(self) -> str:
        return self.link.endpoint

    @property
    def peers(self) -> dict[str, Peer]:
        return self.link.peers

    @property
    def dropped_connections(self) -> dict[str, int] | None:
        return self.link.dropped_connections

    def is_up(self, node: str) -> bool:
        return self.link.is_up(node) and self.ways.is_open(node, time.monotonic())

    def why_down(self, node: str) -> str:
        if not self.link.is_up(node):
            return self.link.why_down(node)
        return OUT_OF_CONTACT

    def hold(self, nodes: list[str]) -> bool:
        """Waits up to hold_s for a contact with one of `nodes`, if one of them is there on the bench."""
        began_s = time.monotonic()
        while (now_s := time.monotonic()) - began_s < self._hold_s and any(map(self.link.is_up, nodes)):
            if any(map(self.is_up, nodes)):
                break
            self.link.drain()
            time.sleep(HOLD_POLL_S)
        self.imposed.held_s += now_s - began_s
        return any(map(self.is_up, nodes))

    @property
    def quarantined(self) -> dict[str, str]:
        return self.link.quarantined

    @property
    def came_aside(self) -> dict[int, frame.Frame | Failure]:
        return self.link.came_aside

    def quarantine(self, node: str, why: str) -> None:
        self.link.quarantine(node, why)

    def release(self, node: str) -> None:
        self.link.release(node)

    def ask_aside(self, node: str, request_id: int, data: bytes) -> Failure | None:
        """As Link's: spot checks belong to the bench, as heartbeats do, and are not held up."""
        return self.link.ask_aside(node, request_id, data)

    def forget_aside(self, request_id: int) -> None:
        self.link.forget_aside(request_id)

    def mark_down(self, node: str, failure: Failure) -> None:
        """As Link's; a node that only has no contact is back when it has one."""
        if not isinstance(failure, NoContact):
            self.link.mark_down(node, failure)

    def drain(self) -> None:
        self.link.drain()

    def wait_for(self, nodes: set[str], timeout_s: float) -> set[str]:
        """As Link's: until all are there on the bench, in contact or not."""
        return self.link.wait_for(nodes, timeout_s)

    def close(self) -> None:
        self.link.close()

    def exchange(self, requests: dict[str, tuple[int, bytes]], timeout_s: float) -> dict[str, frame.Frame | Failure]:
        """As Link.exchange. `timeout_s` is the node's own time; that of the messages on the links comes on top."""
        began_s = time.monotonic()
        self.link.dismiss()
        results: dict[str, frame.Frame | Failure] = {}
        flights: dict[str, _Flight] = {}
        longest_s = 0.0
        for node, (request_id, data) in requests.items():
            passage = self._admit(node, len(data), began_s, True)
            if isinstance(passage, Failure):
                results[node] = passage
            else:
                there_s = passage.there_s
                flights[node] = _Flight(request_id, data, passage, there_s, there_s, there_s - began_s, -began_s)
        came: dict[str, frame.Frame | Failure] = {}
        while flights:
            for node, flight in list(flights.items()):
                result = self._step(node, flight, came, timeout_s, time.monotonic())
                if result is not None:
                    results[node] = result
                    longest_s = max(longest_s, flight.link_s)
                    del flights[node]
            if flights:
                asked = any(flight.passage is None for flight in flights.values())
                self._wait(min(flight.next_s for flight in flights.values()), came if asked else None)
        self.link.dismiss()
        imposed = self.imposed
        imposed.exchanges += 1
        imposed.waited_s += time.monotonic() - began_s
        imposed.link_s += longest_s
        return results

    def _admit(self, node: str, size_bytes: int, ready_s: float, to_node: bool) -> Passage | NoContact:
        passage = self.ways.send(node, size_bytes, ready_s, to_node)
        if passage is None:
            return self._miss(node, f"{OUT_OF_CONTACT}: no way for {size_bytes} bytes {'to' if to_node else 'from'} it")
        self.imposed.messages += 1
        self.imposed.bytes += size_bytes
        return passage

    def _miss(self, node: str, text: str) -> NoContact:
        self.imposed.misses[node] += 1
        return NoContact("unreachable", text)

    def _step(
        self, node: str, flight: _Flight, came: dict[str, frame.Frame | Failure], timeout_s: float, now_s: float
    ) -> frame.Frame | Failure | None:
        """What is to be done for one node now; the result when its exchange is over."""
        if flight.passage is None:  # the node has it
            if node in came:
                return self._answered(node, flight, came.pop(node), now_s)
            return late(timeout_s) if now_s >= flight.next_s else None
        if now_s < flight.next_s:
            return None
        if not self.ways.kept(node, flight.passage, now_s):
            return self._miss(node, f"{OUT_OF_CONTACT}: the contact ended with a message under way")
        if flight.answer is not None:
            self.imposed.late_s = max(self.imposed.late_s, now_s - flight.next_s)
            if self._flown is not None and isinstance(flight.answer, frame.Frame):
                self._flown(Flown(node, len(flight.data), flight.answer.size, flight.measured_s + now_s))
            return flight.answer
        if (failure := self.link.ask(node, flight.request_id, flight.data)) is not None:
            return failure
        flight.asked_s = time.monotonic()
        flight.measured_s += flight.asked_s
        flight.passage, flight.next_s = None, flight.asked_s + timeout_s
        return None

    def _answered(
        self, node: str, flight: _Flight, answer: frame.Frame | Failure, now_s: float
    ) -> frame.Frame | Failure | None:
        """The answer leaves the node as long after the request's planned arrival as it took on the bench."""
        flight.measured_s -= now_s
        leaves_s = flight.there_s + now_s - flight.asked_s
        size_bytes = answer.size if isinstance(answer, frame.Frame) else frame.HEADER_BYTES + len(answer.text.encode())
        passage = self._admit(node, size_bytes, leaves_s, False)
        if isinstance(passage, Failure):
            return passage
        flight.answer, flight.passage, flight.next_s = answer, passage, passage.there_s
        flight.link_s += passage.there_s - leaves_s
        return None

    def _wait(self, until_s: float, came: dict[str, frame.Frame | Failure] | None) -> None:
        """Until something came or it is time, without spinning. `came` None: no node has a request, so nothing can come."""
        left_s = until_s - time.monotonic()
        if came is None:
            time.sleep(max(0.0, left_s))
        elif left_s > NEAR_S:
            self.link.gather(left_s - POLL_S, came)
        elif left_s > 0:
            time.sleep(min(left_s, NAP_S))
            self.link.gather(0.0, came)
