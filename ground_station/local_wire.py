"""Experts in this process behind the wire's codecs: what a distributed run computes, and the bytes that it would send.

For the reference of a run with --codec importance, and for the compression benchmark. A message counts as frame.pack would write it:
header, pairs, payload. Leaves out: retries, and the ladder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from ground_station import dispatch
from ground_station.local import LocalExperts
from ground_station.rates import Allocator
from node_agent import compress, frame, shard
from node_agent.partial import partial_sum

Coded = tuple[np.ndarray, int]
"""What the other side decodes, float32 [T, D], and the bytes of its payload."""


class Coder(Protocol):
    """Both directions of the wire, for one layer and node at a time."""

    def begin(self, layer: int) -> None: ...

    def request(self, layer: int, x: np.ndarray, pairs: np.ndarray) -> Coded: ...

    def reply(self, layer: int, y: np.ndarray) -> Coded: ...


class Importance:
    """The codec `importance` with an allocator's steps, exactly as RemoteExperts and a node use it. `node`: whose messages are next."""

    def __init__(self, allocator: Allocator):
        self.allocator = allocator
        self.node: int | None = None

    def begin(self, layer: int) -> None:
        self.allocator.begin(layer)

    def request(self, layer: int, x: np.ndarray, pairs: np.ndarray) -> Coded:
        return self._coded(x, self.allocator.input_steps(layer, x, pairs, self.node))

    def reply(self, layer: int, y: np.ndarray) -> Coded:
        return self._coded(y, frame.sent_step(self.allocator.reply_step(layer, self.node)))

    def _coded(self, x: np.ndarray, step: np.ndarray | float) -> Coded:
        payload = compress.encode("importance", x, step)
        self.allocator.spent(len(payload), x.size, self.node)
        return compress.decode(compress.CODECS["importance"].id, payload, *x.shape), len(payload)


class WiredExperts(LocalExperts):
    """LocalExperts whose hidden states go through a coder. The counts are since the start;
    a message is a request or its reply."""

    def __init__(self, root: Path, manifest: shard.Manifest, table: dispatch.Table, coder: Coder | None, **keys):
        super().__init__(root, manifest, table, None, **keys)
        self.coder = coder
        self.sent_bytes = self.received_bytes = self.values = self.messages = 0

    def run_work(self, layer: int, hidden: np.ndarray, work: list[dispatch.Work]) -> np.ndarray:
        """As LocalExperts.run_work; with a coder of None nothing is coded or counted."""
        if self.coder is None:
            return super().run_work(layer, hidden, work)
        self.coder.begin(layer)
        total = np.zeros_like(hidden)

        def run_expert(expert: int, precision: int, rows: np.ndarray) -> np.ndarray:
            return self.session(layer, expert, precision).run(["y"], {"x": rows})[0]

        for item in work:
            if isinstance(self.coder, Importance):
                self.coder.node = item.node
            x, sent = self.coder.request(layer, hidden if item.rows is None else hidden[item.rows], item.pairs)
            y, received = self.coder.reply(layer, partial_sum(x, item.pairs, run_expert))
            dispatch.add_partial(total, item, y)
            self.sent_bytes += frame.HEADER_BYTES + item.pairs.nbytes + sent
            self.received_bytes += frame.HEADER_BYTES + received
            self.values += 2 * x.size
            self.messages += 2
        return total
