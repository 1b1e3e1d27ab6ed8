"""What the compression benchmark compares on the wire: uniform blocks, the codec `importance` and its controls, fewer experts.

Leaves out: the codecs themselves (node_agent.compress), and measuring (benchmark_compression).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ground_station import selection
from ground_station.local_wire import Coded, Importance
from ground_station.rates import Allocator
from node_agent import compress


class Blocks:
    """Blocks of `size` values with one fp16 scale and `bits` each, the form of the codec q4: its value of largest magnitude is the
    lowest code. At 4 bits and 32 values, what comes out is q4's to the bit; counted as if codes were packed without a gap."""

    def __init__(self, bits: int, size: int):
        self.bits, self.size = bits, size

    def begin(self, layer: int) -> None:
        pass

    def request(self, layer: int, x: np.ndarray, pairs: np.ndarray) -> Coded:
        return self._coded(x)

    def reply(self, layer: int, y: np.ndarray) -> Coded:
        return self._coded(y)

    def _coded(self, x: np.ndarray) -> Coded:
        t, d = x.shape
        blocks = np.pad(x, ((0, 0), (0, -d % self.size))).reshape(-1, self.size)
        high, low = blocks.max(1), blocks.min(1)
        half = 1 << (self.bits - 1)
        scale = (np.where(high > -low, high, low) * np.float32(-1 / half)).astype(np.float16).astype(np.float32)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        codes = np.clip(np.rint(blocks * inverse[:, None]), -half, half - 1)
        back = np.ascontiguousarray((codes * scale[:, None]).reshape(t, -1)[:, :d])
        return back, len(blocks) * (2 + -(-self.size * self.bits // 8))


class Half(Blocks):
    """The codec fp16."""

    def __init__(self) -> None:
        super().__init__(16, 1)

    def _coded(self, x: np.ndarray) -> Coded:
        payload = compress.encode("fp16", x)
        return compress.decode(compress.CODECS["fp16"].id, payload, *x.shape), len(payload)


class Stepped(Importance):
    """The same entropy coder with other steps. `relative` [T] are steps over each row's RMS, which a control may put in disorder."""

    def __init__(self, allocator: Allocator, order: Callable[[np.ndarray], np.ndarray]):
        super().__init__(allocator)
        self.order = order

    def request(self, layer: int, x: np.ndarray, pairs: np.ndarray) -> Coded:
        return self._reordered(x, self.allocator.input_steps(layer, x, pairs))

    def reply(self, layer: int, y: np.ndarray) -> Coded:
        return self._reordered(y, np.full(len(y), self.allocator.reply_step(layer)))

    def _reordered(self, x: np.ndarray, steps: np.ndarray) -> Coded:
        rms = np.maximum(np.sqrt(np.square(x, dtype=np.float64).mean(1)), 1e-9)
        return self._coded(x, self.order(steps / rms) * rms)


class OneRow(Importance):
    """Counts what the same rows cost as messages of one row, which is what decoding a single token sends."""

    def _coded(self, x: np.ndarray, step: np.ndarray | float) -> Coded:
        steps = np.broadcast_to(step, len(x))
        size = sum(len(compress.encode("importance", x[i : i + 1], steps[i : i + 1])) for i in range(len(x)))
        return super()._coded(x, step)[0], size


def reversed_order(values: np.ndarray) -> np.ndarray:
    """The largest value where the smallest was, and so on."""
    out = np.empty_like(values)
    order = np.argsort(values)
    out[order] = values[order[::-1]]
    return out


@dataclass(frozen=True)
class FewerExperts:
    """topk reduced to `kept` experts of each token, gates renormalised: a policy around a policy."""

    policy: selection.Policy
    kept: int

    def __call__(self, layer: int, logits: np.ndarray) -> selection.Choice:
        choice = self.policy(layer, logits)
        order = np.argsort(-choice.gates, axis=1, kind="stable")[:, : self.kept]
        gates = np.take_along_axis(choice.gates, order, 1)
        whole = choice.gates.sum(1, keepdims=True)
        gates = gates * (whole / gates.sum(1, keepdims=True))
        return selection.Choice(np.take_along_axis(choice.experts, order, 1), gates.astype(np.float32))
