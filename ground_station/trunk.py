"""Runs the ONNX trunk: embedding, attention with KV cache, norms, routers, head; everything but the experts.

The trunk is cut at the MoE layers into segments (node_agent.shard.Segment). One decode step walks the segments; between two
of them the caller supplies the sum of the experts' outputs: through a function, or stepwise (`Sequence.walk`), so that one
thread can take many sequences along layer by layer. Buffers of a decode step are bound once and reused: a step allocates
nothing. Imports only contract modules and onnxruntime, so that a board may run it as the gateway.
Leaves out: which experts run and where (the caller's `moe` function).
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Generator

import numpy as np
import onnxruntime as ort

from node_agent import shard

PREFILL_CHUNK = 256
MoeFunction = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""moe(layer, hidden [T, D], router_logits [T, E]) -> sum of gate * expert(hidden), float32 [T, D]."""

Walk = Generator[tuple[int, np.ndarray, np.ndarray], np.ndarray, np.ndarray]
"""Yields (layer, hidden [S, D], router_logits [S, E]) at each MoE layer, is sent the experts' sum [S, D], returns logits [S, V]."""


class ContextFull(ValueError):
    """A sequence would grow past the capacity of its KV cache."""


def session_options(threads: int, spin: bool) -> ort.SessionOptions:
    """Options of every session of the kit. Spinning threads steal the core from agents on the same machine."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class Trunk:
    """Sessions of all segments of one bundle. Raises: shard.BundleError when a file is missing or altered."""

    def __init__(self, root: Path, manifest: shard.Manifest, threads: int = 1, spin: bool = False, verify: bool = True):
        if tuple(segment.moe_layer for segment in manifest.segments) != (*manifest.moe_layers, None):
            raise shard.BundleError(
                f"{root}: the trunk's segments are not one per MoE layer and a last one: write or copy the bundle again"
            )
        self.dims = manifest.dims
        self.segments = manifest.segments
        self.sessions = []
        for segment in manifest.segments:
            for entry in segment.files:
                if verify:
                    shard.verify_file(root, entry)
            path = root / segment.files[0].path
            self.sessions.append(
                ort.InferenceSession(str(path), session_options(threads, spin), ["CPUExecutionProvider"])
            )

    def sequence(self, capacity: int) -> Sequence:
        """A new, empty sequence whose KV cache holds `capacity` tokens."""
        return Sequence(self, capacity)


class Sequence:
    """One text under way: its KV cache and its length. Batch size 1."""

    def __init__(self, trunk: Trunk, capacity: int):
        dims = trunk.dims
        self.trunk, self.capacity, self.length = trunk, capacity, 0
        attention_layers = [layer for segment in trunk.segments for layer in segment.attention_layers]
        shape = (1, dims.kv_heads, capacity, dims.head_dim)
        self.cache = {
            f"{part}_{layer}": np.zeros(shape, np.float32) for layer in attention_layers for part in ("key", "value")
        }
        self._step = _Bound(self, 1)

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens; the cache is simply overwritten from there."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind a sequence of {self.length} tokens to {length}")
        self.length = length

    def prefill(self, token_ids: list[int] | np.ndarray, moe: MoeFunction, every_position: bool = False) -> np.ndarray:
        """Reads a prompt in chunks.

        Returns: logits float32 [V] after the last token, or [S, V] of every position.  Raises: ContextFull.
        """
        ids = np.asarray(token_ids, np.int64)
        if not ids.size:
            raise ValueError("a prompt needs at least one token")
        kept = []
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            logits = drive(self.walk(chunk), moe)
            kept.append(logits.copy() if every_position else logits[-1:].copy())
        return np.concatenate(kept) if every_position else kept[-1][0]

    def step(self, token_id: int, moe: MoeFunction) -> np.ndarray:
        """Logits float32 [V] after one more token; valid until the next step.  Raises: ContextFull."""
        return drive(self._step.walk(token_id), moe)[0]

    def walk(self, token_ids: list[int] | np.ndarray) -> Walk:
        """The next S tokens stepwise. What it yields and returns are buffers that the next walk uses again. A walk that is left before its
        end leaves the sequence as it was.  Raises: ContextFull (at its first step)."""
        ids = np.asarray(token_ids, np.int64)
        bound = self._step if len(ids) == 1 else _Bound(self, len(ids))
        return bound.walk(ids)


def drive(walk: Walk, moe: MoeFunction) -> np.ndarray:
    """A walk from its beginning to its end; its logits [S, V]."""
    try:
        asked = next(walk)
        while True:
            asked = walk.send(moe(*asked))
    except StopIteration as end:
        return end.value


class _Bound:
    """Buffers and bindings of all segments for one step of S tokens."""

    def __init__(self, sequence: Sequence, s: int):
        trunk, dims = sequence.trunk, sequence.trunk.dims
        self.sequence, self.s = sequence, s
        self.ids = np.zeros((1, s), np.int64)
        self.seqlens_k = np.zeros(1, np.int32)
        self.total = np.zeros(1, np.int32)
        self.moe_out = np.zeros((1, s, dims.hidden), np.float32)
        # two residual buffers in turn: a segment must not overwrite the one that it still reads
        residual = [np.zeros((1, s, dims.hidden), np.float32) for _ in range(2)]
        self.hidden = np.zeros((1, s, dims.hidden), np.float32)
        self.router_logits = np.zeros((1, s, dims.experts), np.float32)
        self.logits = np.zeros((1, s, dims.vocab), np.float32)
        buffers = {
            "input_ids": self.ids,
            "moe_out": self.moe_out,
            "hidden": self.hidden,
            "router_logits": self.router_logits,
            "logits": self.logits,
            "seqlens_k": self.seqlens_k,
            "total_sequence_length": self.total,
        }
        self.steps = []
        for index, (segment, session) in enumerate(zip(trunk.segments, trunk.sessions)):
            binding = session.io_binding()
            here = buffers | {"residual": residual[(index + 1) % 2], "residual_out": residual[index % 2]}
            for part, buffer in sequence.cache.items():
                here[f"past_{part}"] = here[f"present_{part}"] = buffer
            for item in session.get_inputs():
                binding.bind_cpu_input(item.name, here[item.name])
            for item in session.get_outputs():
                buffer = here[item.name]
                binding.bind_output(item.name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
            self.steps.append((session, binding, segment.moe_layer))
        self.buffers, self.residual = buffers, residual  # bindings hold addresses only: keep what they point to

    def walk(self, ids: int | np.ndarray) -> Walk:
        sequence, s = self.sequence, self.s
        if sequence.length + s > sequence.capacity:
            raise ContextFull(
                f"{sequence.length} + {s} tokens do not fit a context of {sequence.capacity}: ask for fewer tokens"
            )
        self.ids[0] = ids
        self.total[0] = sequence.length + s
        self.seqlens_k[0] = sequence.length + s - 1
        for session, binding, moe_layer in self.steps:
            session.run_with_iobinding(binding)
            if moe_layer is not None:
                self.moe_out[0] = yield moe_layer, self.hidden[0], self.router_logits[0]
        sequence.length += s
        return self.logits[0]
