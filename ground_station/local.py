"""Experts of a bundle in this process: the single-process reference, and the model for evaluation.

`LocalExperts` does what agents do (same grouping by node, same codec both ways, same order of sums), so that its greedy
tokens must equal the distributed ones bit by bit; with a table of one node and the fp32 codec it is simply the model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ground_station import dispatch
from ground_station.trunk import session_options
from node_agent import compress, frame, shard
from node_agent.partial import partial_sum


class LocalExperts:
    """Runs the pairs of a layer in this process. `codec=None` leaves hidden states as they are."""

    def __init__(
        self,
        root: Path,
        manifest: shard.Manifest,
        table: dispatch.Table,
        codec: str | None = None,
        threads: int = 1,
        spin: bool = False,
        verify: bool = True,
    ):
        self.table, self.codec, self.root, self.manifest, self.verify = table, codec, root, manifest, verify
        self.options = session_options(threads, spin)
        self.sessions: dict[tuple[int, int, int], ort.InferenceSession] = {}
        for (layer, expert), copies in table.copies.items():
            self.session(layer, expert, copies[0][1])

    def session(self, layer: int, expert: int, precision: int) -> ort.InferenceSession:
        key = (layer, expert, precision)
        if key not in self.sessions:
            entry = self.manifest.shard(layer, expert, frame.PRECISIONS[precision])
            for item in entry.files:
                if self.verify:
                    shard.verify_file(self.root, item)
            path = str(self.root / entry.files[0].path)
            self.sessions[key] = ort.InferenceSession(path, self.options, ["CPUExecutionProvider"])
        return self.sessions[key]

    def run(
        self,
        layer: int,
        hidden: np.ndarray,
        experts: np.ndarray,
        gates: np.ndarray,
        named: dispatch.Named | None = None,
    ) -> np.ndarray:
        """sum of gate * expert(hidden), float32 [T, D], for chosen experts [T, K] and their gates."""
        work = dispatch.split(layer, experts, gates, partial(dispatch.assign, self.table), named)
        return self.run_work(layer, hidden, work)

    def run_work(self, layer: int, hidden: np.ndarray, work: list[dispatch.Work]) -> np.ndarray:
        """float32 [T, D]: the sum of what each node adds, of work that is already divided among them."""
        total = np.zeros_like(hidden)

        def run_expert(expert: int, precision: int, rows: np.ndarray) -> np.ndarray:
            return self.session(layer, expert, precision).run(_OUTPUTS, {"x": rows})[0]

        for item in work:
            x = hidden if item.rows is None else hidden[item.rows]
            summed = partial_sum(self._through_codec(x), item.pairs, run_expert)
            dispatch.add_partial(total, item, self._through_codec(summed))
        return total

    def _through_codec(self, x: np.ndarray) -> np.ndarray:
        if self.codec is None or self.codec == "fp32":
            return x
        return compress.decode(compress.CODECS[self.codec].id, compress.encode(self.codec, x), *x.shape)


_OUTPUTS = ["y"]
