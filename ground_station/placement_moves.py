"""From one placement to another: an ordered list of copies and drops, pure; each expert stays on some node at every moment.

Copies come before the drops that they replace, and no node ever holds more than its memory. Where full nodes block each other, a
shard is parked on a node with room meanwhile. Leaves out: sending anything (the data plane does that), speed of the links.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ground_station.placement import PlacementError
from ground_station.placement_problem import Copy, Placement, Problem, evaluate
from ground_station.placement_serving import serve

GROUND = -1
"""Source of a copy that no node holds: the bundle at the ground station."""


@dataclass(frozen=True)
class Move:
    """kind "copy": send `bytes` from node `source` (or GROUND) to copy.node; kind "drop": free it there (bytes 0)."""

    kind: str
    copy: Copy
    source: int
    bytes: int


def moves(
    old: Iterable[Copy],
    new: Iterable[Copy],
    resident: np.ndarray,
    memory: np.ndarray,
    transfer: np.ndarray | None = None,
) -> tuple[Move, ...]:
    """The moves from `old` to `new` in order. resident [V] bytes in memory, transfer [V] on the link (None: the same), memory [N].

    Raises: PlacementError when one of the two does not fit, or no order was found that keeps every expert somewhere.
    """
    return _Mover(set(old), set(new), resident, memory, resident if transfer is None else transfer).run()


def worth_moving(problem: Problem, placement: Placement) -> bool:
    """Whether a placement beats what is held now by more than the price of moving to it (true when not all experts are held)."""
    if len({copy[:2] for copy in problem.held}) < problem.layers * problem.experts:
        return True
    now = evaluate(problem, serve(problem, "held", problem.held))
    return bool(now.violations) or evaluate(problem, placement).objective_ms < now.objective_ms


class _Mover:
    def __init__(self, old: set[Copy], new: set[Copy], resident: np.ndarray, memory: np.ndarray, transfer: np.ndarray):
        self.old, self.new, self.resident, self.transfer = old, new, resident, transfer
        self.present = set(old)
        self.free = np.asarray(memory, np.int64).copy()
        for name, copies in (("old", old), ("new", new)):
            used = np.bincount([c.node for c in copies], [resident[c.variant] for c in copies], len(memory))
            if (used > memory).any():
                number = int(np.argmax(used - memory))
                raise PlacementError(
                    f"the {name} placement puts {used[number] / 1e6:.2f} MB on node number {number}, "
                    f"which has {memory[number] / 1e6:.2f} MB: plan again"
                )
            if name == "old":
                self.free -= used.astype(np.int64)
        if {copy[:2] for copy in old} - {copy[:2] for copy in new}:
            raise PlacementError("the new placement leaves out experts that the old one has: plan again")
        self.parked: set[Copy] = set()
        self.withdrawn: set[Copy] = set()
        self.done: list[Move] = []

    def run(self) -> tuple[Move, ...]:
        while self.present != self.new:
            if not (
                self._copy() or self._drop(2) or self._drop(1) or self._drop(0) or self._park() or self._withdraw()
            ):
                raise PlacementError(
                    "no order of moves keeps every expert on some node: the nodes are too full to pass shards on; "
                    f"free {self.resident.max() / 1e6:.2f} MB on one of them"
                )
        return tuple(self.done)

    def _send(self, copy: Copy) -> None:
        holders = sorted(
            c.node for c in self.present if (c.layer, c.expert, c.variant) == (copy.layer, copy.expert, copy.variant)
        )
        self.done.append(Move("copy", copy, holders[0] if holders else GROUND, int(self.transfer[copy.variant])))
        self.present.add(copy)
        self.free[copy.node] -= int(self.resident[copy.variant])

    def _free(self, copy: Copy) -> None:
        self.done.append(Move("drop", copy, copy.node, 0))
        self.present.remove(copy)
        self.free[copy.node] += int(self.resident[copy.variant])

    def _copy(self) -> bool:
        """Sends one wanted copy that fits; those first by which a copy can be dropped: they give their room back."""
        leaving = {copy[:2] for copy in self.present - self.new}
        for copy in sorted(self.new - self.present, key=lambda c: (c[:2] not in leaving, c)):
            if self.free[copy.node] >= self.resident[copy.variant]:
                self._send(copy)
                return True
        return False

    def _drop(self, care: int) -> bool:
        """Drops one copy that is not wanted. care 2: all new copies of its expert are there; 1: one is; 0: any other copy is."""
        missing = {copy[:2] for copy in self.new - self.present}
        for copy in sorted(self.present - self.new):
            others = [c for c in self.present if c[:2] == copy[:2] and c != copy]
            if care == 2:
                good = copy[:2] not in missing
            else:
                good = any(c in self.new for c in others) if care else bool(others)
            if good and others:
                self._free(copy)
                return True
        return False

    def _park(self) -> bool:
        """Passes a copy that blocks a node on to one with room, to be dropped there later."""
        wanted = {copy.node for copy in self.new - self.present}
        blocking = [c for c in self.present - self.new - self.parked if c.node in wanted]
        for copy in sorted(blocking, key=lambda c: (int(self.resident[c.variant]), c)):
            size = int(self.resident[copy.variant])
            for node in np.argsort(-self.free, kind="stable"):
                there = copy._replace(node=int(node))
                if node != copy.node and self.free[node] >= size and there not in self.present:
                    self._send(there)
                    self.parked.add(there)
                    self._free(copy)
                    return True
        return False

    def _withdraw(self) -> bool:
        """Takes back a wanted copy that came too early and fills a node, so that another gets in; it is sent again later, once."""
        for copy in sorted(self.new - self.present):
            for early in sorted(c for c in self.present & self.new - self.withdrawn if c.node == copy.node):
                room = self.free[copy.node] + self.resident[early.variant]
                if room >= self.resident[copy.variant] and any(c[:2] == early[:2] and c != early for c in self.present):
                    self.withdrawn.add(early)
                    self._free(early)
                    self._send(copy)
                    return True
        return False
