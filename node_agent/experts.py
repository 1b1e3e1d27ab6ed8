"""The expert shards of this node: verified against the manifest, loaded into onnxruntime, run for one layer at a time.

Leaves out: the order of the sum (partial.py), frames and sockets (dataplane.py).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import psutil

from node_agent import frame, shard, wire
from node_agent.config import STEM_PATTERN
from node_agent.errors import ExpertError, MemoryLimitError, UnknownExpertError
from node_agent.partial import partial_sum

RESIDENT_FACTOR = 1.5  # resident bytes per byte of a loaded shard: weights are packed anew beside the mapped file
_pool_lock = threading.Lock()
_pool_threads: int | None = None


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options under which any number of sessions share one pool of `threads`, which does not spin while it waits.

    With one thread (the default) there is no pool at all: every session computes in the caller's own thread.
    """
    global _pool_threads
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads > 1 and hasattr(onnxruntime, "set_global_thread_pool_sizes"):
        with _pool_lock:
            if _pool_threads is None:  # onnxruntime takes the sizes once per process
                onnxruntime.set_global_thread_pool_sizes(threads, 1)
                _pool_threads = threads
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def open_session(graph: Path | bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """A CPU session for an expert graph x float32 [T, D] -> y float32 [T, D].  Raises: ExpertError."""
    what = graph if isinstance(graph, Path) else "built-in graph"
    try:
        source = str(graph) if isinstance(graph, Path) else graph
        session = onnxruntime.InferenceSession(source, _session_options(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        first_line = (str(error).splitlines() or ["no text"])[0][:200]
        raise ExpertError(
            f"onnxruntime cannot load {what} ({first_line}): update onnxruntime or write the bundle again"
        ) from None
    shapes = [
        (item.name, item.type, len(item.shape), item.shape[-1] if item.shape else None)
        for item in (*session.get_inputs(), *session.get_outputs())
    ]
    hidden = shapes[0][3] if shapes else None
    if shapes != [("x", "tensor(float)", 2, hidden), ("y", "tensor(float)", 2, hidden)] or not isinstance(hidden, int):
        raise ExpertError(f"{what} is no expert (x float32 [T, D] -> y float32 [T, D]): write the bundle again")
    return session


@dataclass(frozen=True)
class _Loaded:
    session: onnxruntime.InferenceSession
    one_row: onnxruntime.IOBinding  # bound to the shared buffers of one row: the cheapest call


class Experts:
    """Loaded shards. Not thread-safe: the one-row buffers are shared, and the data plane is a single thread."""

    def __init__(self, hidden: int, threads: int = 1, bundle: str = ""):
        """`hidden`: D of every expert; `threads`: of the pool that all sessions share; `bundle`: its name."""
        self.hidden = hidden
        self.bundle = bundle
        self.hosted: tuple[wire.HostedShard, ...] = ()
        self.layers: frozenset[int] = frozenset()
        self._threads = threads
        self._loaded: dict[tuple[int, int, int], _Loaded] = {}
        self._row_in = np.zeros((1, hidden), np.float32)
        self._row_out = np.zeros((1, hidden), np.float32)
        self._layer = 0

    def add(self, entry: shard.ShardEntry, graph: Path) -> None:
        """Loads a verified shard and runs it once.  Raises: ExpertError."""
        session = open_session(graph, self._threads)
        binding = session.io_binding()
        shape = (1, self.hidden)
        binding.bind_input("x", "cpu", 0, np.float32, shape, self._row_in.ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, shape, self._row_out.ctypes.data)
        self._row_in.fill(0.0)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise ExpertError(
                f"{graph} does not run with D={self.hidden} ({str(error)[:160]}): write the bundle again"
            ) from None
        self._loaded[entry.layer, entry.expert, frame.PRECISION_ID[entry.precision]] = _Loaded(session, binding)
        self.hosted += (wire.HostedShard(entry.layer, entry.expert, entry.precision, entry.sha256),)
        self.layers |= {entry.layer}

    def run(self, layer: int, x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Gate-weighted partial sum float32 [T, D] of x float32 [T, D] over pairs frame.PAIR [P] (see partial_sum).

        Raises: UnknownExpertError before anything is computed, ValueError for another D or a pair given twice.
        """
        if x.shape[1] != self.hidden:
            raise ValueError(f"hidden size {x.shape[1]} in a request, the experts here have {self.hidden}")
        for _, expert, precision, _ in pairs.tolist():
            if (layer, expert, precision) not in self._loaded:
                name = frame.PRECISIONS[precision]
                raise UnknownExpertError(
                    f"{name} expert {expert} of layer {layer} is not on this node: ask for its birth again"
                )
        self._layer = layer
        return partial_sum(x, pairs, self._run_expert)

    def _run_expert(self, expert: int, precision: int, rows: np.ndarray) -> np.ndarray:
        loaded = self._loaded[self._layer, expert, precision]
        if rows.shape[0] == 1:
            self._row_in[:] = rows
            loaded.session.run_with_iobinding(loaded.one_row)
            return self._row_out
        return loaded.session.run(["y"], {"x": rows})[0]


def load(root: Path | None, stems: tuple[str, ...], memory_limit_bytes: int, threads: int = 1) -> Experts:
    """Verifies (size and sha256 of every file) and loads the shards named by `stems` (such as 'L00E003.int8').

    Raises: shard.BundleError, ExpertError, MemoryLimitError before the agent's memory passes `memory_limit_bytes`.
    """
    if root is None or not stems:
        return Experts(hidden=1, threads=threads)
    manifest = shard.read_manifest(root)
    entries = []
    for stem in stems:
        layer, expert, precision = STEM_PATTERN.fullmatch(stem).groups()
        if precision not in frame.PRECISION_ID:
            raise ExpertError(f"precision {precision!r} of {stem} is unknown: use one of {', '.join(frame.PRECISIONS)}")
        entries.append(manifest.shard(int(layer), int(expert), precision))
    process = psutil.Process()
    need = int(sum(entry.bytes for entry in entries) * RESIDENT_FACTOR)
    if process.memory_info().rss + need > memory_limit_bytes:
        raise MemoryLimitError(
            f"{len(entries)} shards need about {need / 1e6:.0f} MB and the limit is {memory_limit_bytes / 1e6:.0f} MB: "
            f"list fewer shards, use a lower precision or raise memory_limit_mb"
        )
    experts = Experts(manifest.dims.hidden, threads, manifest.name)
    for entry in entries:
        paths = [shard.verify_file(root, item) for item in entry.files]
        experts.add(entry, paths[0])
        if process.memory_info().rss > memory_limit_bytes:
            raise MemoryLimitError(
                f"{len(experts.hosted)} of {len(entries)} shards already take the limit of {memory_limit_bytes / 1e6:.0f} MB: "
                f"list fewer shards, use a lower precision or raise memory_limit_mb"
            )
    return experts
