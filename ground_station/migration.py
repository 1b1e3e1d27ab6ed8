"""Shards move while tokens are made: requests follow, and no token ever asks for a shard that has gone or has not come.

A list of moves (carry_out.py) runs in a thread of its own. A copy counts for requests once its node has said that it serves it; a drop
is sent only after the requests have stopped counting on it. The table of copies changes between two tokens, never inside one, so a
token has one placement from its first layer to its last.
Leaves out: which moves (placement_moves.py), sending them (delivery.py), and the joules that moving costs the boards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from ground_station.carry_out import Step
from ground_station.dispatch import Copy, Table
from node_agent import frame

PATIENCE_S = 60.0  # the longest token that a drop waits for
T = TypeVar("T")


class MigrationError(RuntimeError):
    """Requests cannot follow a move; the text names the shard and the next step."""


def after(table: Table, step: Step) -> Table:
    """The table once `step` counts: better precisions first, as frame.PRECISIONS has them, then the longest there.

    Raises: MigrationError for a node that the table does not know, or a drop of an expert's last copy.
    """
    if step.node not in table.nodes:
        raise MigrationError(f"{step.node} is no node of this run: plan the moves for {', '.join(table.nodes)[:200]}")
    copy = (table.nodes.index(step.node), frame.PRECISION_ID[step.shard.precision])
    key = (step.shard.layer, step.shard.expert)
    there = [each for each in table.copies.get(key, ()) if each != copy]
    if step.kind == "copy":
        there.append(copy)
    if not there:
        raise MigrationError(f"{step.shard.stem} on {step.node} is the last copy of its expert: plan the moves again")
    return table.changed({key: tuple(sorted(there, key=_worst_last))})


def _worst_last(copy: Copy) -> int:
    return copy[1]


class Follows(Protocol):
    """Whoever sends requests by a table, such as remote.RemoteExperts."""

    table: Table


class Serving:
    """Requests under way and the table they go by. `tokens` wraps a generation; `on_step` is carry_out's."""

    def __init__(
        self,
        experts: Follows,
        on_change: Callable[[Table], None] = lambda table: None,
        patience_s: float = PATIENCE_S,
    ):
        """`on_change(table)`: called where the table changes, for policies whose world names nodes."""
        self.experts, self._on_change, self._patience_s = experts, on_change, patience_s
        self._changed = threading.Condition()
        self._next: Table | None = None
        self._generations = 0
        self.changes = 0

    def tokens(self, generation: Iterable[T]) -> Iterator[T]:
        """The same items; the table may change before each of them."""
        with self._changed:
            self._generations += 1
        try:
            each = iter(generation)
            while True:
                with self._changed:
                    self._adopt()
                try:
                    item = next(each)
                except StopIteration:
                    return
                yield item
        finally:
            with self._changed:
                self._generations -= 1
                self._adopt()

    def _adopt(self) -> None:
        if self._next is not None:
            self.experts.table, self._next = self._next, None
            self.changes += 1
            self._on_change(self.experts.table)
            self._changed.notify_all()

    def on_step(self, step: Step) -> None:
        """After a copy or before a drop: returns when requests go by the new table, at once where nobody generates.

        Raises: MigrationError, also when no token ends within the patience.
        """
        with self._changed:
            self._next = after(self._next or self.experts.table, step)
            if not self._generations:
                self._adopt()
            elif step.kind == "drop" and not self._changed.wait_for(lambda: self._next is None, self._patience_s):
                self._next = None
                raise MigrationError(
                    f"no token came to its end within {self._patience_s:g} s, so {step.shard.stem} stays on {step.node}: "
                    "the same list goes on later"
                )
