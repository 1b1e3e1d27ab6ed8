"""From routes to what is imposed on a transfer: the last hop of the route that the bytes still to come would take now.

A relay sends a message on when it has all of it, so the node sees the message come over the last hop alone. A shard may be cut: what
fits into the contacts of the earliest route goes first, and the rest is planned again when that contact has ended.
Leaves out: the search (routes.py), clocks other than an offset: mission time passes at the pace of time.monotonic().
"""

from __future__ import annotations

import math

from ground_station.contacts import ContactPlan, Route, holding
from ground_station.delivery_pace import MIN_CHUNK_BYTES, Window, Windows
from ground_station.routes import earliest_arrival
from node_agent.delivery_frame import HEADER_BYTES

LEAST_S = 0.01  # a part that goes no earlier than this before the whole is not worth a cut


def with_headers(size_bytes: int) -> int:
    """At most so many bytes are on the link for that much payload in one file."""
    return size_bytes + HEADER_BYTES * math.ceil(size_bytes / MIN_CHUNK_BYTES)


def over_contacts(
    plan: ContactPlan, contacts: tuple[int, ...], size_bytes: int, start_s: float, target: str
) -> Route | None:
    """The message over just these contacts, one after the other, or None."""
    hops, at_s = [], start_s
    for index in contacts:
        hop = plan.send(index, size_bytes, at_s)
        if hop is None or (
            hops and not plan.room(plan.contacts[index].source, size_bytes, *holding(plan, hops[-1], hop))
        ):
            return None
        hops.append(hop)
        at_s = hop.arrive_s
    valid_until_s = min(plan.contacts[index].to_s for index in contacts)
    source = plan.contacts[contacts[0]].source
    return Route(source, target, size_bytes, start_s, tuple(hops), at_s, valid_until_s)


def first_part(
    plan: ContactPlan, source: str, target: str, size_bytes: int, start_s: float
) -> tuple[Route, float] | None:
    """The route of what goes first of a message that may be cut, and until when it is best; None without any route.

    A first chunk takes the earliest route, and as much as fits goes with it, until the route of the whole message (or of the
    largest half, quarter, ... that has one) would begin its last hop, or a faster contact with the target begins.
    """
    whole = None
    while whole is None and size_bytes >= 1:
        whole = earliest_arrival(plan, source, target, size_bytes, start_s)
        size_bytes = size_bytes if whole is not None else size_bytes // 2
    if whole is None:
        return None
    chunk = earliest_arrival(plan, source, target, min(size_bytes, MIN_CHUNK_BYTES), start_s)
    part, until_s = whole, math.inf
    if chunk.hops[-1].depart_s + LEAST_S < whole.hops[-1].depart_s:
        contacts = tuple(hop.contact for hop in chunk.hops)
        low, high = chunk.size_bytes, size_bytes + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (low, middle) if over_contacts(plan, contacts, middle, start_s, target) is None else (middle, high)
            )
        early = over_contacts(plan, contacts, low, start_s, target)
        if early.hops[-1].depart_s + LEAST_S < whole.hops[-1].depart_s:
            part, until_s = early, whole.hops[-1].depart_s
    last = part.hops[-1]
    rate_bps = plan.contacts[last.contact].rate_bps
    faster = (
        c.from_s
        for c in plan.contacts
        if c.target == target and c.rate_bps > rate_bps and c.from_s > last.depart_s + LEAST_S
    )
    return part, min(until_s, min(faster, default=math.inf))


def window_of(plan: ContactPlan, route: Route, epoch_s: float, until_s: float = math.inf) -> Window:
    """The time of the route's last hop as the transfer's clock has it, `epoch_s` being mission time 0.

    A relay has no more than what the route brought it; from the source itself the contact may be used to its end.
    """
    last = route.hops[-1]
    contact = plan.contacts[last.contact]
    closes_s = contact.to_s
    for begin_s, end_s in plan.free(last.contact, last.depart_s):
        if begin_s <= last.depart_s <= end_s:
            closes_s = end_s  # others' bookings end it too
    closes_s = min(closes_s, until_s)
    limit_bytes = None if len(route.hops) == 1 else route.size_bytes
    return Window(epoch_s + last.depart_s, epoch_s + closes_s, contact.rate_bps, contact.delay_s, limit_bytes)


def windows_over(plan: ContactPlan, source: str, target: str, epoch_s: float) -> Windows:
    """For Deliverer.deliver: the route is computed whenever a contact has ended."""

    def windows(left_bytes: int, now_s: float) -> tuple[Window, ...]:
        part = first_part(plan, source, target, with_headers(left_bytes), now_s - epoch_s)
        return () if part is None else (window_of(plan, part[0], epoch_s, part[1]),)

    return windows
