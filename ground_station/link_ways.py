"""Where the emulated link of each node comes from: a contact plan, or the satellites' ways as the twin sees them now. No sockets.

Times are those of time.monotonic(), given by the caller; rates and delays are a link's, imposed as they are. A message starts when it
is there and the one before it is through, however late anybody woke (firmware_sim.pacing); idle time earns no credit. Messages of
one node and direction follow each other; nodes do not share a link, except where a plan's routes share a contact.
Leaves out: holding messages until then (paced_link.py), losses, and what a route costs a relay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from firmware_sim.pacing import Pacer
from ground_station.contacts import ContactPlan
from ground_station.routes import earliest_arrival

if TYPE_CHECKING:
    from firmware_sim.contact import Reach

PATIENCE_S = 2.0  # a message that would be under way for longer, contacts to come included, counts as having no way
AHEAD_S = 60.0  # of a plan: contacts that begin later are not looked at
EDGE_S = 0.05  # a gap of a way's contact time that is no rounding (firmware_sim.contact finds edges to 0.01 s)


class Passage(NamedTuple):
    """A message under way: when it is whole at the other end, and the number of the contact that carries it (Live alone)."""

    there_s: float
    contact: int = 0


class Ways(Protocol):
    """The state of the links. `to_node` False: from the node to the ground station."""

    def is_open(self, node: str, now_s: float) -> bool: ...

    def send(self, node: str, size_bytes: int, ready_s: float, to_node: bool) -> Passage | None:
        """A message that is there to be sent since `ready_s`; takes the link's time. None: it cannot be carried."""

    def kept(self, node: str, passage: Passage, now_s: float) -> bool:
        """Whether the contact lasted until the message was through."""


class Planned:
    """Ways over a contact plan: each message takes the route of earliest arrival, and its time on the contacts is booked.

    So a message waits for a contact that opens soon, goes over relays by store and forward, and finds no way where it would not be
    through before the contacts end: what a plan says is known beforehand.
    """

    def __init__(self, plan: ContactPlan, hub: str, epoch_s: float, patience_s: float = PATIENCE_S):
        """`hub`: the ground station's name in the plan; `epoch_s`: its time 0 on the caller's clock."""
        self._whole, self._hub, self._epoch_s, self._patience_s = plan, hub, epoch_s, patience_s
        self._near = replace(plan, contacts=(), busy={}, leaving={})
        self._until_s = -math.inf
        self._open_until_s: dict[str, float] = {}

    def _look(self, at_s: float) -> None:
        """Keeps the contacts of the next minute, and what is booked on them."""
        if at_s + self._patience_s < self._until_s:
            return
        self._until_s = at_s + AHEAD_S + self._patience_s
        busy = {self._near.contacts[index]: pieces for index, pieces in self._near.busy.items()}
        whole = self._whole
        kept = [
            (index, contact)
            for index, contact in enumerate(whole.contacts)
            if contact.to_s > at_s and contact.from_s < self._until_s
        ]
        leaving: dict[str, list[int]] = {}
        for place in sorted(range(len(kept)), key=lambda place: kept[place][1].to_s):
            leaving.setdefault(kept[place][1].source, []).append(place)
        self._near = replace(
            whole,
            contacts=tuple(contact for _, contact in kept),
            busy={
                place: busy.get(contact, whole.busy.get(index, ()))
                for place, (index, contact) in enumerate(kept)
                if contact in busy or index in whole.busy
            },
            leaving={node: tuple(places) for node, places in leaving.items()},
        )

    def is_open(self, node: str, now_s: float) -> bool:
        at_s = now_s - self._epoch_s
        if at_s < self._open_until_s.get(node, -math.inf):
            return True
        self._look(at_s)
        valid_s = []
        for source, target in ((self._hub, node), (node, self._hub)):
            route = earliest_arrival(self._near, source, target, 1, at_s)
            if route is None or route.arrive_s - at_s > self._patience_s:
                return False
            valid_s.append(route.valid_until_s)
        self._open_until_s[node] = min(valid_s)
        return True

    def send(self, node: str, size_bytes: int, ready_s: float, to_node: bool) -> Passage | None:
        at_s = ready_s - self._epoch_s
        self._look(at_s)
        source, target = (self._hub, node) if to_node else (node, self._hub)
        route = earliest_arrival(self._near, source, target, size_bytes, at_s)
        if route is None or route.arrive_s - at_s > self._patience_s:
            self._open_until_s.pop(node, None)
            return None
        booked = self._near.book(route)
        # what is over long ago is in nobody's way; a message may still be told of that was there before
        old_s = at_s - self._patience_s
        used = {hop.contact for hop in route.hops}
        busy = {
            index: tuple(piece for piece in pieces if piece[1] > old_s) if index in used else pieces
            for index, pieces in booked.busy.items()
        }
        stored = {name: tuple(item for item in items if item[1] > old_s) for name, items in booked.stored.items()}
        self._near = replace(booked, busy=busy, stored=stored)
        return Passage(self._epoch_s + route.arrive_s)

    def kept(self, node: str, passage: Passage, now_s: float) -> bool:
        return True


@dataclass(frozen=True)
class _Side:
    """One node's way now: `contact` counts up whenever it was seen to have ended."""

    up: bool
    contact: int
    delay_s: float = 0.0
    rate_bps: float = math.inf


class Live:
    """Ways as somebody else steps them: `reach` gives the newest state, and may be another thread's (it is read at once).

    A contact's end is not known beforehand: what is under way then is lost. At the gateway itself there is no link: no delay.
    """

    def __init__(self, nodes: tuple[str, ...], reach: Callable[[], Reach]):
        """`nodes`: in the order of the Reach's arrays; any other node has no way."""
        self._nodes, self._reach = nodes, reach
        self._last: Reach | None = None
        self._sides: dict[str, _Side] = {}
        self._pacers: dict[tuple[str, bool], Pacer] = {}
        self.delays_s: dict[str, tuple[float, float]] = {}  # node -> least and most of the ways that messages took

    def _look(self) -> None:
        reach, last = self._reach(), self._last
        if reach is last:
            return
        self._last = reach
        for i, node in enumerate(self._nodes):
            side = self._sides.get(node, _Side(False, 0))
            up = bool(reach.up[i])
            unseen_s = 0.0
            if last is not None:
                unseen_s = (reach.time_s - last.time_s) - float(reach.contact_s[i] - last.contact_s[i])
            ended = side.up and (not up or unseen_s > EDGE_S)
            contact = side.contact + ended
            if not up:
                self._sides[node] = _Side(False, contact)
                continue
            rate_bps = float(reach.rate_bps[i])
            delay_s = float(reach.delay_s[i])
            self._sides[node] = _Side(True, contact, delay_s, math.inf if math.isnan(rate_bps) else rate_bps)

    def is_open(self, node: str, now_s: float) -> bool:
        self._look()
        return node in self._sides and self._sides[node].up

    def send(self, node: str, size_bytes: int, ready_s: float, to_node: bool) -> Passage | None:
        if not self.is_open(node, ready_s):
            return None
        side = self._sides[node]
        least_s, most_s = self.delays_s.get(node, (math.inf, -math.inf))
        self.delays_s[node] = min(least_s, side.delay_s), max(most_s, side.delay_s)
        if math.isinf(side.rate_bps):
            return Passage(ready_s + side.delay_s, side.contact)
        busy_s = self._pacers[node, to_node].busy_until_s if (node, to_node) in self._pacers else -math.inf
        pacer, there_s = Pacer(side.rate_bps, side.delay_s, busy_s).admit(ready_s, size_bytes)
        if there_s - ready_s > PATIENCE_S:
            return None
        self._pacers[node, to_node] = pacer
        return Passage(there_s, side.contact)

    def kept(self, node: str, passage: Passage, now_s: float) -> bool:
        return self.is_open(node, now_s) and self._sides[node].contact == passage.contact

    def rates(self) -> dict[str, tuple[float, float]]:
        """node -> (bit/s, seconds one way) of the ways that are open."""
        self._look()
        return {node: (side.rate_bps, side.delay_s) for node, side in self._sides.items() if side.up}
