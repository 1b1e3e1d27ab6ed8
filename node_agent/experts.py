"""The expert shards of this node: verified against the manifest, loaded into onnxruntime, run for one layer at a time.

Shards may be added and removed while requests are served: what is loaded is a dict that is never changed, only replaced.
Leaves out: the order of the sum (partial.py), frames and sockets (dataplane.py), where shards come from at run time (delivery.py).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import psutil

from node_agent import frame, graph_ops, shard, signature, wire
from node_agent.config import STEM_PATTERN
from node_agent.errors import ExpertError, MemoryLimitError, ShardBusyError, UnknownExpertError
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


def _graph_bytes(path: Path) -> bytes:
    """The file, or as much of it as graph_ops.check needs to refuse it."""
    with open(path, "rb") as file:
        return file.read(graph_ops.MAX_GRAPH_BYTES + 1)


def open_session(graph: Path | bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """A CPU session for an expert graph x float32 [T, D] -> y float32 [T, D].  Raises: ExpertError."""
    what = graph if isinstance(graph, Path) else "built-in graph"
    try:
        graph_ops.check(_graph_bytes(graph) if isinstance(graph, Path) else graph)
    except (graph_ops.GraphError, OSError) as error:
        raise ExpertError(f"cannot load {what} ({error}): write the bundle again with `spacemoe quantize`") from None
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


_Key = tuple[int, int, int]  # layer, expert, id of the precision
_NOTHING: dict[_Key, _Loaded] = {}


@dataclass(frozen=True)
class Opened:
    """A shard that can run and is not served yet."""

    key: _Key
    hosted: wire.HostedShard
    loaded: _Loaded


def _key(hosted: wire.HostedShard) -> _Key:
    return hosted.layer, hosted.expert, frame.PRECISION_ID[hosted.precision]


class Experts:
    """Loaded shards. `run` is for one thread, the data plane's, since the one-row buffers are shared; `add` and `remove` for another."""

    def __init__(self, hidden: int, threads: int = 1, bundle: str = ""):
        """`hidden`: D of every expert; `threads`: of the pool that all sessions share; `bundle`: its name."""
        self.bundle = bundle
        self.hosted: tuple[wire.HostedShard, ...] = ()
        self.layers: frozenset[int] = frozenset()
        self._threads = threads
        self._loaded: dict[_Key, _Loaded] = {}
        self._serving = _NOTHING  # what is loaded, for the request under way
        self._busy: frozenset[_Key] = frozenset()  # what it computes
        self._changing = threading.Lock()  # held for a few assignments, never while something is loaded or computed
        self._layer = 0
        self._size_rows(hidden)

    def _size_rows(self, hidden: int) -> None:
        self.hidden = hidden
        self._row_in = np.zeros((1, hidden), np.float32)
        self._row_out = np.zeros((1, hidden), np.float32)

    def adopt(self, hidden: int, bundle: str) -> None:
        """Takes on another bundle, as long as nothing is loaded.  Raises: ExpertError."""
        with self._changing:
            if (hidden, bundle) == (self.hidden, self.bundle):
                return
            if self._loaded:
                raise ExpertError(
                    f"this node holds experts of {self.bundle} (D={self.hidden}), not of {bundle} (D={hidden}): drop them first"
                )
            self.bundle = bundle
            self._size_rows(hidden)

    def add(self, entry: shard.ShardEntry, graph: Path) -> None:
        """Loads a verified shard, runs it once and serves it from now on.  Raises: ExpertError."""
        self.put(self.open(entry, graph))

    def open(self, entry: shard.ShardEntry, graph: Path) -> Opened:
        """Loads a verified shard and runs it once, while what was loaded before goes on being served.  Raises: ExpertError."""
        session = open_session(graph, self._threads)
        try:  # not on the shared buffers: a request may be using them
            session.run(["y"], {"x": np.zeros((1, self.hidden), np.float32)})
        except Exception as error:
            raise ExpertError(
                f"{graph} does not run with D={self.hidden} ({str(error)[:160]}): write the bundle again"
            ) from None
        binding = session.io_binding()
        shape = (1, self.hidden)
        binding.bind_input("x", "cpu", 0, np.float32, shape, self._row_in.ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, shape, self._row_out.ctypes.data)
        key = (entry.layer, entry.expert, frame.PRECISION_ID[entry.precision])
        hosted = wire.HostedShard(entry.layer, entry.expert, entry.precision, entry.sha256)
        return Opened(key, hosted, _Loaded(session, binding))

    def put(self, opened: Opened) -> None:
        """Serves it from the next request on, in place of another version of it."""
        with self._changing:
            others = tuple(item for item in self.hosted if _key(item) != opened.key)
            self._replace({**self._loaded, opened.key: opened.loaded}, (*others, opened.hosted))

    def remove(self, layer: int, expert: int, precision: str) -> bool:
        """Takes a shard away; False when it is not there.  Raises: ShardBusyError while it computes."""
        key = (layer, expert, frame.PRECISION_ID[precision])
        with self._changing:
            if key in self._busy:
                raise ShardBusyError(f"{precision} expert {expert} of layer {layer} is computing just now: try again")
            left = {other: loaded for other, loaded in self._loaded.items() if other != key}
            found = len(left) < len(self._loaded)
            self._replace(left, tuple(item for item in self.hosted if _key(item) != key))
        return found

    def _replace(self, loaded: dict[_Key, _Loaded], hosted: tuple[wire.HostedShard, ...]) -> None:
        self._loaded, self.hosted = loaded, hosted
        self.layers = frozenset(layer for layer, _, _ in loaded)

    def run(self, layer: int, x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Gate-weighted partial sum float32 [T, D] of x float32 [T, D] over pairs frame.PAIR [P] (see partial_sum).

        Raises: UnknownExpertError before anything is computed, ValueError for another D or a pair given twice.
        """
        asked = frozenset([(layer, expert, precision) for _, expert, precision, _ in pairs.tolist()])
        with self._changing:
            self._busy, self._serving = asked, self._loaded
        try:
            if x.shape[1] != self.hidden:
                raise ValueError(f"hidden size {x.shape[1]} in a request, the experts here have {self.hidden}")
            for key in asked:
                if key not in self._serving:
                    _, expert, precision = key
                    name = frame.PRECISIONS[precision]
                    raise UnknownExpertError(
                        f"{name} expert {expert} of layer {layer} is not on this node: ask for its birth again"
                    )
            self._layer = layer
            return partial_sum(x, pairs, self._run_expert)
        finally:
            self._busy, self._serving = frozenset(), _NOTHING  # so that a shard that goes away is freed

    def _run_expert(self, expert: int, precision: int, rows: np.ndarray) -> np.ndarray:
        loaded = self._serving[self._layer, expert, precision]
        if rows.shape[0] == 1:
            self._row_in[:] = rows
            loaded.session.run_with_iobinding(loaded.one_row)
            return self._row_out
        return loaded.session.run(["y"], {"x": rows})[0]


def load(
    root: Path | None,
    stems: tuple[str, ...],
    memory_limit_bytes: int,
    threads: int = 1,
    trust: signature.Trust = signature.Trust(),
) -> Experts:
    """Verifies (signature, size and sha256 of every file) and loads the shards named by `stems` (such as 'L00E003.int8').

    Raises: shard.BundleError, ExpertError, MemoryLimitError before the agent's memory passes `memory_limit_bytes`.
    """
    if root is None or not stems:
        return Experts(hidden=1, threads=threads)
    try:
        trust.check_bundle(root)
    except signature.SignatureError as error:
        raise ExpertError(f"{', '.join(stems[:3])}{' ...' if len(stems) > 3 else ''} not loaded: {error}") from None
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
