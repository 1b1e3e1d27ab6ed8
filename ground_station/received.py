"""Which telemetry of one run of an agent has come: numbers as spans, so that what is lost is counted exactly.

Pure. Leaves out: messages (fleet.py), and what came before the first number that was ever heard of a run.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

MAX_SPANS = 1000


@dataclass(frozen=True)
class Received:
    """`spans`: (first, last) of numbers that came or were given up, ascending, apart from each other. `gone`: how many were
    given up."""

    spans: tuple[tuple[int, int], ...] = ()
    gone: int = 0

    def has(self, number: int) -> bool:
        index = bisect_right(self.spans, (number, number)) - 1
        candidates = self.spans[max(index, 0) : index + 2]
        return any(first <= number <= last for first, last in candidates)

    def add(self, number: int) -> Received:
        """With `number` among them. With more than MAX_SPANS spans, the lowest gap is given up: memory stays bounded."""
        if self.has(number):
            return self
        index = bisect_right(self.spans, (number, number))
        before, after = self.spans[:index], self.spans[index:]
        first = last = number
        if before and before[-1][1] == number - 1:
            first, before = before[-1][0], before[:-1]
        if after and after[0][0] == number + 1:
            last, after = after[0][1], after[1:]
        added = replace(self, spans=(*before, (first, last), *after))
        return added.give_up(added.spans[1][0]) if len(added.spans) > MAX_SPANS else added

    def missing(self) -> tuple[tuple[int, int], ...]:
        """(first, last) of each gap between what came."""
        return tuple((low[1] + 1, high[0] - 1) for low, high in zip(self.spans, self.spans[1:]))

    def give_up(self, below: int) -> Received:
        """Everything that is missing below `below`, and above the first that came, is gone for good."""
        kept = [span for span in self.spans if span[0] > below]
        low = self.spans[: len(self.spans) - len(kept)]
        if not low or (len(low) == 1 and (low[0][1] >= below - 1 or not kept)):
            return self
        # a gap that reaches over `below` is given up in its lower part alone
        last = max(low[-1][1], min(below, kept[0][0]) - 1) if kept else low[-1][1]
        gone = last - low[0][0] + 1 - sum(high - first + 1 for first, high in low)
        joined = ((low[0][0], last), *kept)
        if kept and last + 1 == kept[0][0]:
            joined = ((low[0][0], kept[0][1]), *kept[1:])
        return Received(joined, self.gone + gone)
