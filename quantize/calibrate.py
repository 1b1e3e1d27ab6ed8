"""Calibration: runs the fp32 model over a text, one MoE layer at a time, and gathers what quantizing and placing experts needs.

Hidden states between layers lie in memory-mapped files, one generation per layer, so that memory stays bounded by one layer
and a run can be resumed at a layer's start. Every eighth sequence is held back: it measures errors and never enters a Hessian.
Leaves out: choosing codes (nbits), writing shards (pipeline), and layer sensitivities (sensitivity.py).

Shape letters: N tokens, D hidden, I intermediate, E experts, K experts per token, M MoE layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

from node_agent.shard import Dims, Segment

SEQUENCE_TOKENS = 512
HOLD_EVERY = 8  # sequences; the last of each group is held back
MIN_TOKENS = 256
MAX_TEXT_BYTES = 64 * 1024 * 1024
CHUNK_ROWS = 2048
BLEND_TOKENS = 64  # an expert with this many tokens trusts its own Hessian as much as the layer's
SAMPLE_ROWS = 64  # on which every expert of a layer is run, for distances and for experts with few tokens


class CalibrationError(ValueError):
    """The calibration text cannot be used; the text names the next step."""


def token_sequences(
    tokenizer_file: Path, text_file: Path, max_tokens: int, max_context: int, start: int | None = None
) -> list[np.ndarray]:
    """The text's first `max_tokens` tokens as int64 sequences of SEQUENCE_TOKENS (of max_context if that is less).

    Each begins with the token `start`, unless that is None.  Raises: CalibrationError.
    """
    from tokenizers import Tokenizer

    if text_file.exists() and not text_file.is_file():  # a device has no end, a pipe may never begin
        raise CalibrationError(f"{text_file} is no plain file: give a text file")
    try:
        with open(text_file, "rb") as file:
            text = file.read(min(MAX_TEXT_BYTES, max_tokens * 64)).decode("utf-8", errors="ignore")
    except OSError as error:
        raise CalibrationError(
            f"{text_file} cannot be read ({error.strerror}): give a text file (quantize --calibration, bundle calibrate --text)"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises bare Exception
        raise CalibrationError(
            f"{tokenizer_file} is damaged ({str(error)[:80]}): copy the model folder again"
        ) from None
    prefix = [] if start is None else [start]
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:max_tokens]
    if len(ids) < MIN_TOKENS:
        raise CalibrationError(
            f"{text_file} gives {len(ids)} tokens, at least {MIN_TOKENS} are needed: give a longer text"
        )
    length = min(SEQUENCE_TOKENS, max_context) - len(prefix)
    if len(ids) < HOLD_EVERY * length:  # a short text still gives sequences to hold back
        length = max(1, len(ids) // HOLD_EVERY)
    return [np.array(prefix + ids[i : i + length], np.int64) for i in range(0, len(ids), length)]


def swiglu(x: np.ndarray, gate_up: np.ndarray) -> np.ndarray:
    """[N, I] = silu(x gate.T) * (x up.T), of gate_up [2I, D]."""
    h = x @ gate_up.T
    gate, up = np.split(h, 2, axis=-1)
    with np.errstate(over="ignore"):  # exp of a large number is infinite and the quotient 0, as it should be
        return gate / (1 + np.exp(-gate)) * up


# ---------------------------------------------------------------- hidden states on disk


def _mapped(path: Path, shape: tuple[int, ...], create: bool) -> np.memmap:
    """A float32 array in a file whose blocks are reserved first: a full disk is an OSError, not a bus error."""
    if create:
        try:
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, 4 * int(np.prod(shape)))
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return np.memmap(path, np.float32, "r+", shape=shape)


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Residual stream, experts' input and their weighted sum, float32 [N, D] each, after the trunk segment of one MoE layer."""

    residual: np.ndarray
    hidden: np.ndarray
    moe_out: np.ndarray

    @staticmethod
    def files(folder: Path, position: int) -> list[Path]:
        return [folder / f"states{position}.{name}" for name in ("residual", "hidden", "moe_out")]

    @classmethod
    def open(cls, folder: Path, position: int, tokens: int, dims: Dims, create: bool) -> HiddenStates:
        folder.mkdir(parents=True, exist_ok=True)
        shape = (tokens, dims.hidden)
        return cls(*(_mapped(path, shape, create) for path in cls.files(folder, position)))

    def flush(self) -> None:
        for array in (self.residual, self.hidden, self.moe_out):
            array.flush()


def run_segment(
    root: Path,
    segment: Segment,
    dims: Dims,
    sequences: list[np.ndarray],
    before: HiddenStates | None,
    after: HiddenStates,
) -> np.ndarray:
    """Runs one trunk segment over all sequences, from the states `before` (None: from the tokens) to `after`.

    Returns the router logits float32 [N, E].
    """
    session = onnxruntime.InferenceSession(str(root / segment.files[0].path), providers=["CPUExecutionProvider"])
    caches = [f"past_{kind}_{layer}" for layer in segment.attention_layers for kind in ("key", "value")]
    logits = np.empty((len(after.residual), dims.experts), np.float32)
    start = 0
    for ids in sequences:
        rows = slice(start, start + len(ids))
        start += len(ids)
        feed = {name: np.zeros((1, dims.kv_heads, len(ids), dims.head_dim), np.float32) for name in caches}
        feed["seqlens_k"] = np.array([len(ids) - 1], np.int32)
        feed["total_sequence_length"] = np.array([len(ids)], np.int32)
        if before is None:
            feed["input_ids"] = ids[None]
        else:
            feed |= {"residual": before.residual[rows][None], "moe_out": before.moe_out[rows][None]}
        residual, hidden, router = session.run(["residual_out", "hidden", "router_logits"], feed)
        after.residual[rows], after.hidden[rows], logits[rows] = residual[0], hidden[0], router[0]
    return logits


# ---------------------------------------------------------------- statistics of one layer


@dataclass(eq=False)
class LayerRun:
    """One MoE layer under calibration: routing of all N tokens, and what the experts add to it one after the other."""

    states: HiddenStates
    experts: np.ndarray  # int64 [N, K]
    gates: np.ndarray  # float32 [N, K]
    held: np.ndarray  # bool [N]
    count: int  # E
    hessian: np.ndarray = field(init=False)  # [D, D], mean over the tokens not held back
    sample: np.ndarray = field(init=False)  # rows [R] on which every expert is run
    sample_out: np.ndarray = field(init=False)  # float32 [E, R, D]
    gate_norm: np.ndarray = field(init=False)
    output_norm: np.ndarray = field(init=False)
    output_absmax: np.ndarray = field(init=False)
    output_square: np.ndarray = field(init=False)
    errors: dict[str, np.ndarray] = field(default_factory=dict)  # of held rows, by precision

    def __post_init__(self) -> None:
        tokens, d = self.states.hidden.shape
        self.hessian = np.zeros((d, d), np.float32)
        for start in range(0, tokens, CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            x = self.states.hidden[rows][~self.held[rows]]
            self.hessian += x.T @ x
        self.hessian /= max(1, int((~self.held).sum()))
        train = np.flatnonzero(~self.held)
        self.sample = train[np.linspace(0, len(train) - 1, min(SAMPLE_ROWS, len(train))).astype(int)]
        self.sample_out = np.zeros((self.count, len(self.sample), d), np.float32)
        self.gate_norm, self.output_norm = np.zeros(self.count), np.zeros(self.count)
        self.output_absmax, self.output_square = np.zeros(d, np.float32), np.zeros(d)
        self.states.moe_out[:] = 0

    def rows_of(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, gates) of the tokens that chose the expert."""
        rows, slots = np.nonzero(self.experts == expert)
        return rows, self.gates[rows, slots]

    def add_expert(self, expert: int, gate_up: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs one expert in fp32 over its tokens, adds its output, and returns its Hessians [D, D] and [I, I].

        A Hessian is the mean of g^2 x.T x over the expert's tokens (g the gate: an error counts as much as it reaches the
        residual), blended with the layer's, which weighs as much as BLEND_TOKENS tokens.
        """
        rows, gates = self.rows_of(expert)
        d, i = down.shape
        own_up, own_down, weight = np.zeros((d, d), np.float32), np.zeros((i, i), np.float32), 0.0
        for start in range(0, len(rows), CHUNK_ROWS):
            part, g = rows[start : start + CHUNK_ROWS], gates[start : start + CHUNK_ROWS]
            x = self.states.hidden[part]
            a = swiglu(x, gate_up)
            y = a @ down.T
            self.states.moe_out[part] += g[:, None] * y
            norms = np.linalg.norm(y, axis=1)
            self.output_norm[expert] += norms.sum()
            self.gate_norm[expert] += (g * norms).sum()
            self.output_absmax = np.maximum(self.output_absmax, np.abs(y).max(0))
            self.output_square += np.square(y, dtype=np.float64).sum(0)
            train = ~self.held[part]
            g, x, a = g[train, None], x[train], a[train]
            own_up += (g * x).T @ (g * x)
            own_down += (g * a).T @ (g * a)
            weight += float(np.square(g).sum())
        x = self.states.hidden[self.sample]
        a = swiglu(x, gate_up)
        self.sample_out[expert] = a @ down.T
        trained = int((~self.held[rows]).sum())
        share = trained / (trained + BLEND_TOKENS)
        weight = weight or 1.0
        general = a.T @ a / max(1, len(a))
        return share * own_up / weight + (1 - share) * self.hessian, share * own_down / weight + (1 - share) * general

    def held_rows(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, gates) held back for the expert; with none of its own, any held rows with gate 0."""
        rows, gates = self.rows_of(expert)
        keep = self.held[rows]
        if keep.any():
            return rows[keep], gates[keep]
        rows = np.flatnonzero(self.held)[:SAMPLE_ROWS]
        return rows, np.zeros(len(rows), np.float32)

    def measure(self, precision: str, rows: np.ndarray, gates: np.ndarray, y: np.ndarray, exact: np.ndarray) -> float:
        """Notes what a quantized expert gave on its held rows; returns ||y - exact|| / ||exact||."""
        if precision not in self.errors:
            self.errors[precision] = np.zeros((int(self.held.sum()), self.states.hidden.shape[1]), np.float32)
        place = np.cumsum(self.held) - 1
        self.errors[precision][place[rows]] += gates[:, None] * (y - exact)
        return float(np.linalg.norm(y - exact) / max(np.linalg.norm(exact), 1e-30))

    def statistics(self) -> dict[str, np.ndarray]:
        """What calibration.npz holds of this layer (see `save`)."""
        e = self.count
        chosen = np.zeros((len(self.experts), e), np.float32)
        np.put_along_axis(chosen, self.experts, 1, axis=1)
        counts = chosen.sum(0)
        gate_sum = np.bincount(self.experts.ravel(), self.gates.ravel(), e)
        ones = np.maximum(counts, 1)
        distance = np.zeros((e, e), np.float32)
        for i in range(e):
            distance[i] = np.linalg.norm(self.sample_out - self.sample_out[i], axis=2).mean(1)
        held_out = self.states.moe_out[self.held]
        result = {
            "counts": counts.astype(np.int64),
            "coactivation": (chosen.T @ chosen).astype(np.int64),
            "gate_mean": gate_sum / ones,
            "gate_norm": self.gate_norm / ones,
            "output_norm": self.output_norm / ones,
            "distance": distance,
            "input_absmax": np.abs(self.states.hidden).max(0),
            "input_rms": _rms(self.states.hidden),
            "output_absmax": self.output_absmax,
            "output_rms": np.sqrt(self.output_square / max(1.0, counts.sum())),
            "moe_out_absmax": np.abs(self.states.moe_out).max(0),
            "moe_out_rms": _rms(self.states.moe_out),
            "moe_to_residual": np.array(np.linalg.norm(self.states.moe_out) / np.linalg.norm(self.states.residual)),
        }
        scale = max(float(np.linalg.norm(held_out)), 1e-30)
        for precision, error in self.errors.items():
            result[f"layer_error_{precision}"] = np.array(np.linalg.norm(error) / scale)
        return {key: value if value.dtype == np.int64 else value.astype(np.float32) for key, value in result.items()}


def _rms(x: np.ndarray) -> np.ndarray:
    """Root mean square of each channel of [N, D]."""
    total = np.zeros(x.shape[1])
    for start in range(0, len(x), CHUNK_ROWS):
        total += np.square(x[start : start + CHUNK_ROWS], dtype=np.float64).sum(0)
    return np.sqrt(total / len(x))


def held_tokens(sequences: list[np.ndarray]) -> np.ndarray:
    """bool [N]: tokens of the sequences that are held back."""
    return np.concatenate([np.full(len(ids), n % HOLD_EVERY == HOLD_EVERY - 1) for n, ids in enumerate(sequences)])


def successive(first: np.ndarray, then: np.ndarray, count: int) -> np.ndarray:
    """int64 [E, E]: how often a token chose expert i in one MoE layer and j in the next; arguments int64 [N, K]."""
    pairs = (first[:, :, None] * count + then[:, None, :]).ravel()
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


def combine(layers: list[dict[str, np.ndarray]], moe_layers: tuple[int, ...], tokens: int) -> dict[str, np.ndarray]:
    """The contents of calibration.npz: statistics of all MoE layers, stacked along a first axis M.

    `moe_layers` [M], `tokens`; `counts`, `gate_mean`, `gate_norm` (mean ||g E(x)||), `output_norm` (mean ||E(x)||) [M, E];
    `coactivation`, `distance` (mean ||E_i(x) - E_j(x)||) [M, E, E]; `successive` [M - 1, E, E]; `input_absmax`, `input_rms`,
    `output_absmax`, `output_rms` (of one expert's output), `moe_out_absmax`, `moe_out_rms` (of the weighted sum) [M, D];
    `moe_to_residual` (ratio of norms) and `layer_error_PRECISION` (of the weighted sum, on held rows) [M]. The pipeline adds what
    sensitivity.measure returns.
    """
    names = [name for name in layers[0] if name not in ("experts", "successive")]
    result = {name: np.stack([layer[name] for layer in layers]) for name in names}
    count = result["counts"].shape[1]
    between = [layer["successive"] for layer in layers[1:]]
    result["successive"] = np.stack(between) if between else np.zeros((0, count, count), np.int64)
    return result | {"moe_layers": np.array(moe_layers, np.int64), "tokens": np.array(tokens, np.int64)}
