"""Importance-aware rates: how finely each row on the wire is quantised, from gates, norms and calibration.

The statement is ALGORITHMS.md's: minimise sum_i w_i^2 D_i at a given sum of rates, i over (token, node) inputs and (token, node)
partial sums. Its solution is one water level: w_i^2 D_i is the same for every row that gets any bits. With a uniform quantiser
(D = step^2 / 12) that is a step proportional to 1 / w_i, and the entropy code then spends the bits that the row's energy asks for.
Both directions and all layers are measured in one unit, noise relative to the residual stream that takes it in, so a single
`level` sets the whole. A partial sum carries its gates already: all its rows get the same step, which travels in the request; an
input's weight is sum g^2 s^2 over the node's experts, s the calibrated norm of an expert's output.

Where nodes differ in what a bit costs (link, heat), there is a price lambda_n of a bit of node n: minimise
sum_i w_i^2 step_i^2 / 12 + sum_n lambda_n bits_n. A bit halves a step, d bits = -d step / (step ln 2), so w^2 step / 6 =
lambda / (step ln 2) and step_i^2 = 6 lambda_n / (w_i^2 ln 2): one water level per node, whose square is proportional to its price.
Prices add, so squares of levels add: `level` is the price that quality alone sets, `price_level` that of bytes and of radio joules.
The slowest node sets the time of a layer, so only it pays for time: the price of `Links.layer_s` is found node by node, as
the coarser level with which its messages just fit (`fitting_bits`).
Leaves out: the payload (node_agent.entropy), and the calibrated sensitivity of the text's likelihood to each layer: on the reference
model it is this unit's (1 within a fifth) and saved no bytes that could be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from node_agent import compress, frame, npz_file, shard

CALIBRATION = "calibration.npz"
LEVEL = 0.07  # step of a partial sum over the residual's RMS: just under +1 % perplexity on the reference model's choosing text
# Relative noise of an expert's output per relative noise of its input; 1 to 1.4 are as good on the same text.
INPUT_GAIN = 1.2
LEVELS = (1e-4, 10.0)  # where steering ends
FIT_GAIN = 0.5  # of steering a node's level from token to token: what tokens ask for differs by some tenths of a bit
COARSEST = 0.8  # level past which a node's messages are not made to fit: they would say nothing, and the time is passed instead
MAX_CORRECTION_BITS = 1.0
MAX_USED = 100_000


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
class Links:
    """How each node is reached and what its bits cost, arrays [N] by the index in dispatch.Table.nodes.

    rate_bps; delay_s: one way; layer_s: seconds that the messages of one token and layer may be under way, there and back
    (infinite: no limit; 1 / layers of what a token's time leaves for links); byte_price, joule_price: of selection_prices, in nats
    of loss (price units over Budgeted.value); radio_j_per_byte: of the node's radio, so that a hot node's bytes cost more.
    """

    rate_bps: np.ndarray
    delay_s: np.ndarray
    byte_price: np.ndarray
    joule_price: np.ndarray
    radio_j_per_byte: np.ndarray
    layer_s: float = math.inf

    def __post_init__(self) -> None:
        n = len(self.rate_bps)
        for name in ("delay_s", "byte_price", "joule_price", "radio_j_per_byte"):
            value = getattr(self, name)
            if value.shape != (n,) or not ((value >= 0) & np.isfinite(value)).all():
                raise ValueError(f"{name} must be {n} numbers of 0 or more")
        if not (self.rate_bps > 0).all() or not self.layer_s > 0:
            raise ValueError("rate_bps and layer_s must be above 0")

    @classmethod
    def of(cls, rate_bps: Iterable[float], delay_s: Iterable[float], layer_s: float = math.inf) -> Links:
        """Links whose bytes and joules cost nothing."""
        rates, delays = np.array([*rate_bps], np.float64), np.array([*delay_s], np.float64)
        nothing = np.zeros(len(rates))
        return cls(rates, delays, nothing, nothing, nothing, layer_s)

    @cached_property
    def nats_per_byte(self) -> np.ndarray:
        return self.byte_price + self.joule_price * self.radio_j_per_byte


def price_level(nats_per_byte: np.ndarray, hidden: int) -> np.ndarray:
    """The level at which one bit more is worth just its price, for rows of `hidden` values.

    A row's loss is level^2 / 12 nats (noise relative to the residual stream, sensitivity 1: selection_world.Calibration), and a bit
    more on each of its values takes 2 ln 2 of that away: level^2 ln 2 / (6 hidden) = price of a bit.
    """
    return np.sqrt(6 * hidden * np.asarray(nats_per_byte, np.float64) / 8 / math.log(2))


def fitting_bits(links: Links, overhead_bytes: float, values: int) -> np.ndarray:
    """Bits per value [N] that a row of `values` (both ways) may have on each node; infinite without a limit, 0 or more.

    What is left of layer_s after the flight times, at the link's rate, less headers and pairs.
    """
    if math.isinf(links.layer_s):
        return np.full(len(links.rate_bps), np.inf)
    room = np.maximum(links.layer_s - 2 * links.delay_s, 0) * links.rate_bps
    return np.maximum(room - 8 * overhead_bytes, 0) / values


@dataclass
class _Pass:
    """What one node's messages of a pass came to, and how much would have fitted (bits of payload)."""

    bits: float = 0.0
    room: float = 0.0
    values: int = 0


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
    """Steps for every message of a decoding run. State: the level, each node's where links are followed, and what the current pass over
    the layers has spent."""

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
        self._source: Links | Callable[[], Links] | None = None
        self._links: Links | None = None  # of this pass
        self._hidden = 0
        self._levels: tuple[float, ...] = ()  # of each node, where rates follow links
        self._passes: list[_Pass] = []
        self._repeated: Iterator[tuple[float, ...]] | None = None
        self.used: list[tuple[float, ...]] = []  # of each pass so far, MAX_USED at most

    def follow(self, links: Links | Callable[[], Links], hidden: int) -> None:
        """From the next pass on, rates follow these links, or what a call of it says at the begin of each pass (always as many nodes).

        `hidden`: values of a row. What each pass used is kept in `used`, so that a reference can `repeat` it.
        """
        self._source, self._hidden, self.used = links, hidden, []

    def repeat(self, used: list[tuple[float, ...]]) -> None:
        """From now on each pass takes the nodes' levels of the same pass of another allocator that followed links.

        Raises, in a pass that the other one did not have: RatesError.
        """
        self._repeated = iter(used)

    def begin(self, layer: int) -> None:
        """Before the messages of a layer: a new pass takes account of what the last one has spent."""
        if layer != self._first:
            return
        if self._values and self.bits_per_value is not None:
            self.level = steer(self.level, self._bits / self._values, self.bits_per_value)
        self._bits = self._values = 0
        if self._repeated is not None:
            if (levels := next(self._repeated, None)) is None:
                raise RatesError("there are no levels to repeat for this pass: follow the links for as many passes")
            self._levels = levels
        elif self._source is not None:
            self._fit(self._source if isinstance(self._source, Links) else self._source())

    def _fit(self, links: Links) -> None:
        """Each node's level for a pass: no finer than quality and price ask for, and so coarse that its messages fit."""
        if len(self._passes) != len(links.rate_bps):
            self._passes = [_Pass() for _ in links.rate_bps]
            self._levels = (self.level,) * len(self._passes)
        free = np.hypot(self.level, price_level(links.nats_per_byte, self._hidden))
        levels = []
        for level, least, spent in zip(self._levels, free.tolist(), self._passes):
            if math.isinf(links.layer_s):
                level = least
            elif spent.values:
                level = min(steer(level, FIT_GAIN * (spent.bits - spent.room) / spent.values, 0.0), COARSEST)
            levels.append(min(max(level, least), LEVELS[1]))
        self._levels = tuple(levels)
        self._passes = [_Pass() for _ in levels]
        self._links = links
        if len(self.used) < MAX_USED:
            self.used.append(self._levels)

    def _level(self, node: int | None) -> float:
        return self.level if node is None or not self._levels else self._levels[node]

    def input_steps(self, layer: int, x: np.ndarray, pairs: np.ndarray, node: int | None = None) -> np.ndarray:
        """Quantiser steps float64 [T] of the inputs float32 [T, D] of a node that runs pairs frame.PAIR [P] on them.

        `node`: its index, where there are links to follow.
        """
        index = self.sensitivity.position[layer]
        gates = pairs["gate"].astype(np.float64)
        gain2 = self.sensitivity.output_ms[index][pairs["expert"]]
        weight = np.sqrt(np.bincount(pairs["row"], gates * gates * gain2, len(x)))
        rms = np.sqrt(np.square(x, dtype=np.float64).mean(1))
        level = self._level(node)
        if self._links is not None and node is not None:
            each = 2 * frame.HEADER_BYTES + pairs.nbytes / len(x)  # a token's messages are of one row each
            room = fitting_bits(self._links, each, 2 * x.shape[1])[node]
            self._passes[node].room += float(room) * 2 * x.size
        step = level * self.sensitivity.residual_rms[index] * rms / (self.input_gain * np.maximum(weight, 1e-12))
        return np.clip(step, 1e-15, 1e15)

    def reply_step(self, layer: int, node: int | None = None) -> float:
        """Quantiser step of all partial sums of a layer; `node` as in input_steps."""
        return float(self._level(node) * self.sensitivity.residual_rms[self.sensitivity.position[layer]])

    def spent(self, payload_bytes: int, values: int, node: int | None = None) -> None:
        self._bits += 8 * payload_bytes
        self._values += values
        if self._links is not None and node is not None:
            self._passes[node].bits += 8 * payload_bytes
            self._passes[node].values += values


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
