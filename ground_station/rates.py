"""Importance-aware rates: how finely each row on the wire is quantised, from gates, norms and calibration.

The statement is ALGORITHMS.md's: minimise sum_i w_i^2 D_i at a given sum of rates, i over (token, node) inputs and (token, node)
partial sums. Its solution is one water level: w_i^2 D_i is the same for every row that gets any bits. With a uniform quantiser
(D = step^2 / 12) that is a step proportional to 1 / w_i, and the entropy code then spends the bits that the row's energy asks for.
Both directions and all layers are measured in one unit, noise relative to the residual stream that takes it in, so a single
`level` sets the whole. A partial sum carries its gates already: all its rows get the same step, which travels in the request; an
input's weight is sum g^2 s^2 over the node's experts, s the calibrated norm of an expert's output.
Leaves out: the payload (node_agent.entropy), and the sensitivity of the text's likelihood to each layer, which is not calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from node_agent import compress, npz_file, shard

CALIBRATION = "calibration.npz"
LEVEL = 0.07  # step of a partial sum over the residual's RMS: just under +1 % perplexity on the reference model's choosing text
# Relative noise of an expert's output per relative noise of its input; 1 to 1.4 are as good on the same text.
INPUT_GAIN = 1.2
LEVELS = (1e-4, 10.0)  # where steering ends
MAX_CORRECTION_BITS = 1.0


class RatesError(ValueError):
    """Importance cannot be known for this bundle; the text names the next step."""


def allocate(weight2: np.ndarray, variance: np.ndarray, budget_bits: float) -> np.ndarray:
    """Bits per value [I], >= 0, that minimise sum w^2 s^2 2^(-2 b) with sum b = budget_bits: reverse water-filling.

    weight2, variance: float [I], >= 0; rows of equal length. What has no weight or no energy gets no bits.
    Raises: ValueError for a negative budget or nothing to give it to.  Source: Cover and Thomas, section 10.3.3.
    """
    energy = np.asarray(weight2, np.float64) * np.asarray(variance, np.float64)
    logs = 0.5 * np.log2(energy[energy > 0])
    if not budget_bits >= 0 or (budget_bits and not len(logs)):
        raise ValueError(f"{budget_bits} bits cannot be given to {len(logs)} rows")
    ordered = np.sort(logs)[::-1]
    # with the first n rows above the water, the level is (sum of their logs - budget) / n; n is the largest that stays dry
    levels = (np.cumsum(ordered) - budget_bits) / np.arange(1, len(ordered) + 1)
    dry = np.flatnonzero(ordered > levels)
    bits = np.zeros(energy.shape)
    if budget_bits and len(dry):
        bits[energy > 0] = np.maximum(logs - levels[dry[-1]], 0)
    return bits


def steer(level: float, spent_bits: float, target_bits: float) -> float:
    """The level after `spent_bits` per value were spent where `target_bits` were meant: an octave of step is one bit."""
    correction = min(max(spent_bits - target_bits, -MAX_CORRECTION_BITS), MAX_CORRECTION_BITS)
    return min(max(level * 2.0**correction, LEVELS[0]), LEVELS[1])


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Of one bundle, from its calibration. `residual_rms` [M]: of the residual stream after each MoE layer's sum was added;
    `output_ms` [M, E]: mean square of one value of an expert's output; `position`: MoE layer -> its index in both."""

    residual_rms: np.ndarray
    output_ms: np.ndarray
    position: dict[int, int]

    @classmethod
    def read(cls, root: Path, manifest: shard.Manifest) -> Sensitivity:
        """From the bundle's calibration.npz, verified against the manifest.  Raises: RatesError, shard.BundleError."""
        entry = next((item for item in manifest.files if item.path == CALIBRATION), None)
        if entry is None:
            raise RatesError(
                f"bundle {manifest.name} has no {CALIBRATION}: write it again with a calibration text, or use --codec q4"
            )
        path = shard.verify_file(root, entry)
        m, e, d = len(manifest.moe_layers), manifest.dims.experts, manifest.dims.hidden
        shapes = {"moe_to_residual": (m,), "moe_out_rms": (m, d), "output_norm": (m, e)}
        try:
            found = npz_file.read(path, shapes)
        except npz_file.NpzError as error:
            raise RatesError(f"{path} cannot be used ({error}): write the bundle again") from None
        if idle := [name for name, value in found.items() if not (value > 0).any()]:
            raise RatesError(f"{path} cannot be used ({idle[0]} is 0 everywhere): write the bundle again")
        moe_rms = np.sqrt(np.square(found["moe_out_rms"]).mean(1))
        before = moe_rms / np.maximum(found["moe_to_residual"], 1e-9)
        position = {layer: index for index, layer in enumerate(manifest.moe_layers)}
        return cls(np.hypot(before, moe_rms), np.square(found["output_norm"]) / d, position)


class Allocator:
    """Steps for every message of a decoding run. State: the level, and what the current pass over the layers has spent."""

    def __init__(
        self,
        sensitivity: Sensitivity,
        level: float = LEVEL,
        bits_per_value: float | None = None,
        input_gain: float = INPUT_GAIN,
    ):
        """`bits_per_value`: of payload, both directions together, that the level is steered to pass by pass; None: it stays."""
        if not LEVELS[0] <= level <= LEVELS[1]:
            raise ValueError(f"level {level} is not between {LEVELS[0]} and {LEVELS[1]}")
        if bits_per_value is not None and not 0.05 <= bits_per_value <= 8:
            raise ValueError(f"{bits_per_value} bits per value is not between 0.05 and 8")
        self.sensitivity, self.level = sensitivity, level
        self.bits_per_value, self.input_gain = bits_per_value, input_gain
        self._bits = self._values = 0
        self._first = min(sensitivity.position)

    def begin(self, layer: int) -> None:
        """Before the messages of a layer: a new pass takes account of what the last one has spent."""
        if layer == self._first and self._values:
            if self.bits_per_value is not None:
                self.level = steer(self.level, self._bits / self._values, self.bits_per_value)
            self._bits = self._values = 0

    def input_steps(self, layer: int, x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Quantiser steps float64 [T] of the inputs float32 [T, D] of a node that runs pairs frame.PAIR [P] on them."""
        index = self.sensitivity.position[layer]
        gates = pairs["gate"].astype(np.float64)
        gain2 = self.sensitivity.output_ms[index][pairs["expert"]]
        weight = np.sqrt(np.bincount(pairs["row"], gates * gates * gain2, len(x)))
        rms = np.sqrt(np.square(x, dtype=np.float64).mean(1))
        step = self.level * self.sensitivity.residual_rms[index] * rms / (self.input_gain * np.maximum(weight, 1e-12))
        return np.clip(step, 1e-15, 1e15)

    def reply_step(self, layer: int) -> float:
        """Quantiser step of all partial sums of a layer."""
        return float(self.level * self.sensitivity.residual_rms[self.sensitivity.position[layer]])

    def spent(self, payload_bytes: int, values: int) -> None:
        self._bits += 8 * payload_bytes
        self._values += values


def for_codec(
    codec: str, root: Path, manifest: shard.Manifest, level: float = LEVEL, bits_per_value: float | None = None
) -> Allocator | None:
    """What a codec needs beside its name: an Allocator for one that takes steps, None for the rest.

    Raises: RatesError, shard.BundleError, ValueError for a bit rate with a codec that has its own.
    """
    if codec not in compress.CODECS:
        raise ValueError(f"codec {codec!r} is unknown: use one of {', '.join(compress.CODECS)}")
    if compress.CODECS[codec].size is None:
        return Allocator(Sensitivity.read(root, manifest), level, bits_per_value)
    if bits_per_value is not None:
        raise ValueError(f"codec {codec} has a fixed rate: --bits-per-value goes with --codec importance")
    return None
