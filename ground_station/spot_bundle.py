"""The ground station's own opinion of a sum: experts of its bundle, each verified before it is loaded, computed in a thread.

Leaves out: when it is asked (spot_checker.py).
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ground_station.trunk import session_options
from node_agent import frame, npz_file, shard
from node_agent.partial import partial_sum

SESSIONS_KEPT = 16
CALIBRATION = "calibration.npz"


class Bundle:
    """The ground station's own opinion: experts of its bundle, each verified before it is loaded, computed in a thread."""

    def __init__(self, root: Path, manifest: shard.Manifest):
        self.root, self.manifest = root, manifest
        self._sessions: OrderedDict[tuple[int, int, int], ort.InferenceSession] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="spot-check")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def ask(self, layer: int, x: np.ndarray, pairs: np.ndarray) -> Future:
        """Of float32 [R, D]; its exception is a BundleError where the bundle lacks a shard or one is altered."""
        return self._pool.submit(self._sum, layer, x, pairs)

    def norms(self) -> np.ndarray | None:
        """Mean ||E(x)|| float64 [M, E] of each expert's output; None for a bundle without calibration.  Raises: shard.BundleError."""
        entry = next((item for item in self.manifest.files if item.path == CALIBRATION), None)
        if entry is None:
            return None
        shape = (len(self.manifest.moe_layers), self.manifest.dims.experts)
        try:
            return npz_file.read(shard.verify_file(self.root, entry), {"output_norm": shape})["output_norm"]
        except npz_file.NpzError as error:
            raise shard.BundleError(f"{self.root / CALIBRATION} cannot be used ({error}): make it again") from None

    def _sum(self, layer: int, x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        def run_expert(expert: int, precision: int, rows: np.ndarray) -> np.ndarray:
            return self._session(layer, expert, precision).run(["y"], {"x": rows})[0]

        return partial_sum(np.ascontiguousarray(x), pairs, run_expert)

    def _session(self, layer: int, expert: int, precision: int) -> ort.InferenceSession:
        key = (layer, expert, precision)
        if key in self._sessions:
            self._sessions.move_to_end(key)
            return self._sessions[key]
        entry = self.manifest.shard(layer, expert, frame.PRECISIONS[precision])
        path = [shard.verify_file(self.root, item) for item in entry.files][0]
        session = ort.InferenceSession(str(path), session_options(1, False), ["CPUExecutionProvider"])
        self._sessions[key] = session
        while len(self._sessions) > SESSIONS_KEPT:
            self._sessions.popitem(last=False)
        return session
