"""The earliest arrival of a message over a contact plan: store and forward, with what is booked and with bounded buffers. Pure.

A label is a message at a node after some hops; labels are taken in the order of their arrival (Dijkstra's), each contact at its
earliest. With unlimited buffers the first label of a node is the best. With bounded ones a later arrival can be better, since the
node may have no room to hold the message from the earlier one on: a label is dropped only for one that came no later, with no more
hops, and for which the node has room in between, so the result is exact over all walks of at most `max_hops` hops.
Source: time-dependent shortest paths as in contact graph routing (CCSDS 734.3-B-1), whose volume bookings are intervals here.
Leaves out: voluntary waiting within a contact, one message over several contacts of a pair (delivery_route.py cuts it).
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from itertools import count
from typing import NamedTuple

from ground_station.contacts import ContactError, ContactPlan, Hop, Route, holding

MAX_HOPS = 16


class _Label(NamedTuple):
    """A message at `node`: whole there at `arrive_s`, taking room from `room_s` on."""

    node: str
    arrive_s: float
    room_s: float
    hops: tuple[Hop, ...]


def earliest_arrival(
    plan: ContactPlan, source: str, target: str, size_bytes: int, start_s: float, max_hops: int = MAX_HOPS
) -> Route | None:
    """The route by which `size_bytes` that are at `source` from `start_s` on are whole at `target` first; None without any.

    Where two arrive together, the one of fewer hops. Raises: ContactError for a message that is none.
    """
    if size_bytes < 1 or source == target:
        raise ContactError(
            f"a message of {size_bytes} bytes from {source} to {target}: give 1 byte or more, and two nodes"
        )
    order = count()
    first = _Label(source, start_s, start_s, ())
    waiting = [(start_s, 0, next(order), first)]
    settled: dict[str, list[_Label]] = {}
    ends = {node: [plan.contacts[index].to_s for index in leaving] for node, leaving in plan.leaving.items()}
    while waiting:
        label = heapq.heappop(waiting)[3]
        if label.node == target:
            valid_until_s = min(plan.contacts[hop.contact].to_s for hop in label.hops)
            return Route(source, target, size_bytes, start_s, label.hops, label.arrive_s, valid_until_s)
        others = settled.setdefault(label.node, [])
        if any(_as_good(plan, other, label, size_bytes, source) for other in others):
            continue
        others.append(label)
        if len(label.hops) == max_hops:
            continue
        leaving = plan.leaving.get(label.node, ())
        for index in leaving[bisect_right(ends.get(label.node, ()), label.arrive_s) :]:
            reached = _over(plan, label, index, size_bytes)
            if reached is not None and not any(
                other.arrive_s <= reached.arrive_s and _as_good(plan, other, reached, size_bytes, source)
                for other in settled.get(reached.node, ())
            ):
                heapq.heappush(waiting, (reached.arrive_s, len(reached.hops), next(order), reached))
    return None


def _over(plan: ContactPlan, label: _Label, index: int, size_bytes: int) -> _Label | None:
    """The label at the far end of a contact; None when the contact is too short or the node cannot hold the message so long."""
    hop = plan.send(index, size_bytes, label.arrive_s)
    if hop is None:
        return None
    if label.hops and not plan.room(label.node, size_bytes, *holding(plan, label.hops[-1], hop)):
        return None
    contact = plan.contacts[index]
    return _Label(contact.target, hop.arrive_s, hop.depart_s + contact.delay_s, (*label.hops, hop))


def _as_good(plan: ContactPlan, other: _Label, label: _Label, size_bytes: int, source: str) -> bool:
    """Whether whatever can be done with `label` can be done with `other`, which came no later."""
    if len(other.hops) > len(label.hops):
        return False
    if not other.hops or other.room_s >= label.room_s:  # the source has room
        return True
    return plan.room(label.node, size_bytes, other.room_s, label.room_s)
