"""Contact plans: when which node can send to which, how fast and how far, what is booked of it, and how a plan is read from a file.

Times are mission time in seconds. Everything is immutable: booking gives a new plan. A contact carries one message at a time at its
full rate; what is booked is busy time, so what is left of it is its residual rate. Contacts of one node do not exclude each
other. Leaves out: the search for a route (routes.py), where a plan comes from (an orbit, a file), errors of transmission.
"""

from __future__ import annotations

import json
import math
from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from node_agent import toml_file, wire

MAX_PLAN_BYTES = 32 * 1024 * 1024
MAX_CONTACTS = 100_000
FIELDS = ("source", "target", "from_s", "to_s", "delay_s", "rate_bps")
SLACK_S = 1e-9  # of rounding, at a contact's end

Interval = tuple[float, float]


class ContactError(ValueError):
    """A contact or a plan cannot be; the text says which and what to give."""


@dataclass(frozen=True)
class Contact:
    """`source` may send to `target` from `from_s` to `to_s` (the last bit leaves by then), one way."""

    source: str
    target: str
    from_s: float
    to_s: float
    delay_s: float
    rate_bps: float

    def __post_init__(self) -> None:
        wire_safe = all(
            isinstance(name, str) and wire.ID_PATTERN.fullmatch(name) for name in (self.source, self.target)
        )
        if not wire_safe or self.source == self.target:
            raise ContactError(f"a contact of {self.source!r:.40} with {self.target!r:.40}: give two node ids")
        numbers = (self.from_s, self.to_s, self.delay_s, self.rate_bps)
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
            raise ContactError(f"contact {self.source} to {self.target}: {numbers!r:.120} are not all finite numbers")
        if not (self.from_s < self.to_s and self.delay_s >= 0 and self.rate_bps > 0):
            raise ContactError(
                f"contact {self.source} to {self.target}: from {self.from_s:g} to {self.to_s:g} s, delay {self.delay_s:g} s, "
                f"{self.rate_bps:g} bit/s; give from_s < to_s, delay_s of 0 or more, rate_bps above 0"
            )


@dataclass(frozen=True)
class Hop:
    """A message on a contact (its index in the plan): sent in `pieces` of time, since others' bookings go before."""

    contact: int
    pieces: tuple[Interval, ...]
    arrive_s: float

    @property
    def depart_s(self) -> float:
        return self.pieces[0][0]

    @property
    def sent_s(self) -> float:
        return self.pieces[-1][1]


@dataclass(frozen=True)
class Route:
    """How a message gets there. `valid_until_s`: the first of its contacts ends then, and what has not been sent is planned anew."""

    source: str
    target: str
    size_bytes: int
    start_s: float
    hops: tuple[Hop, ...]
    arrive_s: float
    valid_until_s: float


@dataclass(frozen=True)
class ContactPlan:
    """Contacts and what is booked. Made by `plan`; `buffer_bytes` of a node that is not named there is unlimited.

    `busy[i]`: sorted, disjoint intervals of contact i; `stored[node]`: (from, until, bytes) of messages that wait at a node.
    """

    contacts: tuple[Contact, ...]
    buffer_bytes: Mapping[str, int] = field(default_factory=dict)
    busy: Mapping[int, tuple[Interval, ...]] = field(default_factory=dict)
    stored: Mapping[str, tuple[tuple[float, float, int], ...]] = field(default_factory=dict)
    leaving: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)  # by to_s

    def free(self, index: int, from_s: float) -> list[Interval]:
        """Time from `from_s` in which contact `index` is open and not booked."""
        contact = self.contacts[index]
        at_s, gaps = max(from_s, contact.from_s), []
        for begin_s, end_s in self.busy.get(index, ()):
            if begin_s > at_s:
                gaps.append((at_s, min(begin_s, contact.to_s)))
            at_s = max(at_s, end_s)
        if at_s < contact.to_s:
            gaps.append((at_s, contact.to_s))
        return gaps

    def send(self, index: int, size_bytes: int, ready_s: float) -> Hop | None:
        """The message on that contact as early as possible from `ready_s`; None when it does not fit in any more."""
        contact = self.contacts[index]
        left_s, pieces = 8.0 * size_bytes / contact.rate_bps, []
        for begin_s, end_s in self.free(index, ready_s):
            if left_s <= end_s - begin_s + SLACK_S:
                pieces.append((begin_s, min(begin_s + left_s, end_s)))
                return Hop(index, tuple(pieces), pieces[-1][1] + contact.delay_s)
            pieces.append((begin_s, end_s))
            left_s -= end_s - begin_s
        return None

    def room(self, node: str, size_bytes: int, from_s: float, until_s: float) -> bool:
        """Whether the node can hold the message all that time besides what is booked."""
        if node not in self.buffer_bytes:
            return True
        held = [item for item in self.stored.get(node, ()) if item[0] < until_s and item[1] > from_s]
        # the most is held at the begin, or when one of them comes
        moments = [from_s, *(begin_s for begin_s, _, _ in held if begin_s > from_s)]
        most = max(sum(size for begin_s, end_s, size in held if begin_s <= at_s < end_s) for at_s in moments)
        return most + size_bytes <= self.buffer_bytes[node]

    def book(self, route: Route) -> ContactPlan:
        """The plan in which this message's time and room are taken.  Raises: ContactError where they are taken already."""
        busy, stored = dict(self.busy), dict(self.stored)
        for place, hop in enumerate(route.hops):
            taken = list(busy.get(hop.contact, ()))
            for piece in hop.pieces:
                if any(piece[0] < end_s - SLACK_S and piece[1] > begin_s + SLACK_S for begin_s, end_s in taken):
                    raise ContactError(
                        f"contact {hop.contact} is booked at {piece[0]:g} s already: plan the route again"
                    )
                insort(taken, piece)
            busy[hop.contact] = tuple(taken)
            if place + 1 < len(route.hops):
                node, hold = self.contacts[hop.contact].target, holding(self, hop, route.hops[place + 1])
                if not replace(self, stored=stored).room(node, route.size_bytes, *hold):
                    raise ContactError(f"{node} has no room at {hold[0]:g} s any more: plan the route again")
                stored[node] = (*stored.get(node, ()), (*hold, route.size_bytes))
        return replace(self, busy=busy, stored=stored)


def holding(plan: ContactPlan, before: Hop, after: Hop) -> Interval:
    """While a message takes room at the node between two hops: from its first bit's arrival until its last bit has left."""
    return before.depart_s + plan.contacts[before.contact].delay_s, after.sent_s


def plan(contacts: Iterable[Any], buffer_bytes: Mapping[str, int] | None = None) -> ContactPlan:
    """A plan of contacts, or of anything with their fields (firmware_sim's).  Raises: ContactError."""
    made = tuple(
        item if isinstance(item, Contact) else Contact(*(getattr(item, name) for name in FIELDS)) for item in contacts
    )
    if len(made) > MAX_CONTACTS:
        raise ContactError(f"{len(made)} contacts are over the limit of {MAX_CONTACTS}: plan a shorter time")
    leaving: dict[str, list[int]] = {}
    for index in sorted(range(len(made)), key=lambda index: made[index].to_s):
        leaving.setdefault(made[index].source, []).append(index)
    return ContactPlan(
        made, dict(buffer_bytes or {}), leaving={node: tuple(indices) for node, indices in leaving.items()}
    )


def read(path: Path) -> ContactPlan:
    """A plan from a JSON (by its suffix) or TOML file: `contact`, a list of tables with the fields of Contact, and optionally
    `buffer_bytes`, a table of node = bytes.  Raises: ContactError naming the file and what to mend.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_PLAN_BYTES + 1)
    except OSError as error:
        raise ContactError(f"{path} cannot be read ({error.strerror}): give a contact plan") from None
    if len(raw) > MAX_PLAN_BYTES:
        raise ContactError(f"{path} is over {MAX_PLAN_BYTES} bytes: plan a shorter time")
    try:
        tree = json.loads(raw) if path.suffix == ".json" else toml_file.loads(raw)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ContactError(f"{path} is not {kind} ({' '.join(str(error).split())[:120]}): correct that line") from None
    try:
        return _from_tree(tree)
    except ContactError as error:
        raise ContactError(f"{path}: {error}") from None


def _from_tree(tree: Any) -> ContactPlan:
    rows = tree.get("contact") if isinstance(tree, dict) else None
    if not isinstance(rows, list) or not rows or len(rows) > MAX_CONTACTS:
        raise ContactError(f"no list `contact` of 1 to {MAX_CONTACTS} contacts: write [[contact]] tables")
    if unknown := set(tree) - {"contact", "buffer_bytes"}:
        raise ContactError(f"{min(unknown)!r:.40} is unknown: use contact and buffer_bytes")
    made = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or set(row) != set(FIELDS):
            raise ContactError(f"contact {number} must have just {', '.join(FIELDS)}")
        try:
            made.append(Contact(**row))
        except (ContactError, OverflowError) as error:
            raise ContactError(f"contact {number}: {error}") from None
    buffers = tree.get("buffer_bytes", {})
    if not isinstance(buffers, dict) or not all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in buffers.values()
    ):
        raise ContactError("buffer_bytes is no table of node = bytes, each a whole number of 0 or more")
    return plan(made, buffers)
