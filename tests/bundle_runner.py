"""Runs a bundle in one process, straight on onnxruntime, for tests that compare it with a reference implementation.

Written from the bundle's documentation (node_agent.shard), not from the ground station's code. Leaves out: speed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from node_agent.shard import Manifest, read_manifest


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class BundleRunner:
    """One sequence at a time. `calls` counts runs of expert shards; `scaled` (layer, expert) -> factor on its output."""

    def __init__(self, root: Path, precision: str, capacity: int = 64) -> None:
        self.root, self.precision, self.capacity = root, precision, capacity
        self.manifest: Manifest = read_manifest(root)
        self.segments = [self._session(segment.files[0].path) for segment in self.manifest.segments]
        self.experts: dict[tuple[int, int], onnxruntime.InferenceSession] = {}
        self.scaled: dict[tuple[int, int], float] = {}
        self.calls = 0
        self.reset()

    def _session(self, path: str) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(self.root / path), providers=["CPUExecutionProvider"])

    def reset(self) -> None:
        d = self.manifest.dims
        self.length = 0
        self.cache = {
            f"{kind}_{layer}": onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((1, d.kv_heads, self.capacity, d.head_dim), np.float32)
            )
            for layer in range(d.layers)
            for kind in ("key", "value")
        }

    def _segment(self, index: int, feed: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        session, segment = self.segments[index], self.manifest.segments[index]
        binding = session.io_binding()
        if segment.attention_layers:
            total = self.length + self.step
            feed = feed | {
                "seqlens_k": np.array([total - 1], np.int32),
                "total_sequence_length": np.array([total], np.int32),
            }
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for layer in segment.attention_layers:
            for kind in ("key", "value"):
                buffer = self.cache[f"{kind}_{layer}"]
                binding.bind_ortvalue_input(f"past_{kind}_{layer}", buffer)
                binding.bind_ortvalue_output(f"present_{kind}_{layer}", buffer)
        for name in outputs:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        values = dict(zip([output.name for output in session.get_outputs()], binding.get_outputs()))
        by_order = binding.get_outputs()
        offset = 2 * len(segment.attention_layers)
        assert len(values) == len(by_order) == offset + len(outputs)
        return [by_order[offset + n].numpy() for n in range(len(outputs))]

    def _experts(self, layer: int, hidden: np.ndarray, logits: np.ndarray) -> np.ndarray:
        routing, k = self.manifest.routing, self.manifest.dims.top_k
        total = np.zeros_like(hidden)
        chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
        picked = np.take_along_axis(logits, chosen, -1)
        if routing.kind == "topk_softmax":
            gates = _softmax(picked)
        else:
            assert routing.kind == "softmax_topk"
            gates = np.take_along_axis(_softmax(logits), chosen, -1)
            if routing.renormalise:
                gates = gates / gates.sum(-1, keepdims=True)
        for expert in np.unique(chosen):
            rows, slots = np.nonzero(chosen == expert)
            y = self.experts_output(layer, int(expert), hidden[rows])
            total[rows] += gates[rows, slots][:, None] * y
        return total

    def experts_output(self, layer: int, expert: int, x: np.ndarray) -> np.ndarray:
        """What one expert gives for x [T, D]."""
        key = (layer, expert)
        if key not in self.experts:
            self.experts[key] = self._session(self.manifest.shard(*key, self.precision).files[0].path)
        self.calls += 1
        return self.experts[key].run(["y"], {"x": x})[0] * np.float32(self.scaled.get(key, 1.0))

    def step_logits(self, ids: list[int]) -> np.ndarray:
        """Logits float32 [S, V] of the next S tokens of the sequence."""
        self.step = len(ids)
        feed: dict[str, np.ndarray] = {"input_ids": np.array([ids], np.int64)}
        for index, segment in enumerate(self.manifest.segments):
            if segment.moe_layer is None:
                logits = self._segment(index, feed, ["logits"])[0][0]
                self.length += self.step
                return logits
            residual, hidden, router = self._segment(index, feed, ["residual_out", "hidden", "router_logits"])
            moe = self._experts(segment.moe_layer, hidden[0], router[0])
            feed = {"residual": residual, "moe_out": moe[None]}
        raise AssertionError("the bundle has no last segment")

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
        """(tokens, logits [count, V] that each was chosen from): prefill in two parts, then one token at a time."""
        self.reset()
        half = len(prompt) // 2
        self.step_logits(prompt[:half])
        logits = [self.step_logits(prompt[half:])[-1]]
        tokens = [int(logits[0].argmax())]
        while len(tokens) < count:
            logits.append(self.step_logits(tokens[-1:])[0])
            tokens.append(int(logits[-1].argmax()))
        return tokens, np.stack(logits)
