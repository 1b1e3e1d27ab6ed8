"""What an agent has done since it started: counts and seconds, written by the data plane, read by telemetry.

Each number has one writing thread, so no lock is needed. Leaves out: how they are published (telemetry.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field


class Activity:
    """Seconds that one thread has spent on kinds of work, also of the piece that is under way.

    One thread writes, any thread reads: the state is one tuple, which changes as a whole.
    """

    def __init__(self) -> None:
        self._state: tuple[str, int, dict[str, int]] = ("", 0, {})

    def enter(self, kind: str) -> None:
        """From now on it is `kind`; what was before ends."""
        now_ns = time.perf_counter_ns()
        before, since_ns, spent_ns = self._state
        if before:
            spent_ns = {**spent_ns, before: spent_ns.get(before, 0) + now_ns - since_ns}
        self._state = (kind, now_ns, spent_ns)

    def leave(self) -> None:
        """From now on the thread waits."""
        self.enter("")

    def seconds(self, kind: str) -> float:
        """Time spent on `kind` until now."""
        current, since_ns, spent_ns = self._state
        under_way_ns = time.perf_counter_ns() - since_ns if current == kind else 0
        return (spent_ns.get(kind, 0) + under_way_ns) / 1e9


@dataclass
class Counters:
    """`tokens`: rows of hidden states served; `requests`: EXPERTS frames answered by a PARTIAL; errors by kind.

    `serving` is what the data plane's thread does now ('compute', 'radio' or nothing), `reporting` what the agent's main
    thread does ('telemetry' or nothing): energy.py divides joules by them.
    """

    requests: int = 0
    tokens: int = 0
    pairs: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    compute_s: float = 0.0
    codec_s: float = 0.0
    link_errors: dict[str, int] = field(default_factory=dict)  # written by the data plane
    control_errors: dict[str, int] = field(default_factory=dict)  # written by the control plane
    shard_bytes_in: int = 0  # of shards, over the second socket
    delivery_errors: dict[str, int] = field(default_factory=dict)  # written by the delivery of shards
    serving: Activity = field(default_factory=Activity)
    reporting: Activity = field(default_factory=Activity)

    @staticmethod
    def count(errors: dict[str, int], kind: str) -> bool:
        """Adds one to errors[kind]; True for the first of its kind."""
        errors[kind] = errors.get(kind, 0) + 1
        return errors[kind] == 1
