"""How much the text's likelihood suffers from noise in each MoE layer's output: `sensitivity` of a bundle's calibration.npz.

White noise, equal for all rows as a quantiser's is, is added to one layer's sum of experts; the rest of the model runs on, and the
mean Kullback-Leibler divergence of the next token's distribution from the undisturbed one is taken, in nats. For weak noise it
is s_l r^2, r^2 the noise's energy over that of the layer's output: s_l is the sensitivity. Beside it, the divergence when the pair
of the first, second, ... largest gate is left out in one layer (without renormalising the others).
One layer at a time over all disturbed copies of the text, whose states lie in a file that appears whole: memory is bounded by one
layer, and a run that was cut off goes on at a layer's start. Runs on the bundle's own trunk and its best experts.
Leaves out: noise in the experts' inputs (it reaches the output through the expert), noise in several layers at once, noise that
follows the signal.

Shape letters: N tokens, D hidden, E experts, K experts per token, M MoE layers, R noise levels, Q sequences.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from tqdm import tqdm

from node_agent import routing
from node_agent.shard import PARTIAL_SUFFIX, Manifest, Segment
from quantize.calibrate import CalibrationError

LEVELS = (0.05, 0.1, 0.2)  # r: root of noise energy over output energy
DRAWS = 2
MAX_TOKENS = 4096
MIN_TOKENS = 256
WORK_SHARE = 4.0  # at most so many layer passes per token as calibration itself makes over its default text
DEFAULT_TEXT_TOKENS = 32_768
SEED = 20_261_124


@dataclass(frozen=True)
class Plan:
    """What is run: noise levels r, draws of each, tokens of the text."""

    levels: tuple[float, ...] = LEVELS
    draws: int = DRAWS
    tokens: int = MAX_TOKENS

    def variants(self, top_k: int) -> int:
        """Disturbed copies of the text per layer."""
        return len(self.levels) * self.draws + top_k


def plan_for(manifest: Manifest) -> Plan:
    """Fewer tokens for deep models: every layer's disturbed copies pass through all layers after it."""
    m = len(manifest.moe_layers)
    passes = Plan().variants(manifest.dims.top_k) * (m + 1) / 2
    tokens = int(WORK_SHARE * DEFAULT_TEXT_TOKENS / passes)
    return Plan(tokens=min(MAX_TOKENS, max(MIN_TOKENS, tokens)))


def spread(sequences: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Whole sequences, evenly over the text, of at most about `tokens` tokens; at least two where there are two."""
    mean = sum(map(len, sequences)) / len(sequences)
    count = min(len(sequences), max(2, int(tokens / mean)))
    return [sequences[i] for i in np.linspace(0, len(sequences) - 1, count).round().astype(int)]


def measure(
    root: Path, manifest: Manifest, sequences: list[np.ndarray], work: Path, plan: Plan, progress: bool = True
) -> dict[str, np.ndarray]:
    """Sensitivities of the bundle under `root` on token sequences int64 [Q][S]; `work` holds unfinished states.

    Returns: arrays of calibration.npz, float32: `sensitivity` and its standard error `sensitivity_error` [M] in nats (see `fit`),
    `sensitivity_levels` [R], `sensitivity_kl` [M, R] in nats, `drop_kl` [M, K] in nats, `sensitivity_tokens`.
    Raises: CalibrationError for a trunk that is not cut at the MoE layers, OSError where there is no room for the states.
    """
    if tuple(segment.moe_layer for segment in manifest.segments) != (*manifest.moe_layers, None):
        raise CalibrationError(
            f"{root}: the trunk's segments are not one per MoE layer and a last one: write the bundle again"
        )
    folder = work / f"sensitivity-{_key(manifest, sequences, plan)}"
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(root, manifest, sequences, folder, plan)
    layers = len(manifest.moe_layers)
    first = next((p + 1 for p in reversed(range(layers)) if run.file(p).exists()), 0)
    with tqdm(total=run.passes(0), desc="sensitivity", unit="pass", disable=None if progress else True) as bar:
        bar.update(run.passes(0) - run.passes(first))
        for position in range(first, layers):
            run.layer(position, bar)
            if position:
                run.file(position - 1).unlink(missing_ok=True)
        kl = run.divergences(bar)
    shutil.rmtree(folder)
    weights = np.array([len(ids) for ids in sequences], np.float64)
    return collect(kl, weights, layers, plan) | {"sensitivity_tokens": np.array(weights.sum(), np.int64)}


def collect(kl: np.ndarray, weights: np.ndarray, layers: int, plan: Plan) -> dict[str, np.ndarray]:
    """The arrays of `measure` but the tokens, from mean divergences float64 [M * W, Q] in nats: per layer noise by level and draw, then
    drops; weights [Q]: tokens of each sequence."""
    weights = weights / weights.sum()
    kl = kl.reshape(layers, -1, len(weights))
    noisy = kl[:, : len(plan.levels) * plan.draws].reshape(layers, len(plan.levels), plan.draws, len(weights)).mean(2)
    found = [fit(each, np.array(plan.levels), weights) for each in noisy]
    return {
        "sensitivity": np.array([value for value, _ in found], np.float32),
        "sensitivity_error": np.array([error for _, error in found], np.float32),
        "sensitivity_levels": np.array(plan.levels, np.float32),
        "sensitivity_kl": (noisy @ weights).astype(np.float32),
        "drop_kl": (kl[:, len(plan.levels) * plan.draws :] @ weights).astype(np.float32),
    }


def fit(kl: np.ndarray, levels: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """(s, its standard error) of KL = s r^2 from kl [R, Q] in nats at levels r [R], on sequences of weights [Q] (sum 1).

    s is the mean of KL / r^2 over the levels: the same relative error is allowed each. The error holds the spread over sequences
    (of texts and draws) and that of the levels about s: what the law itself is off.
    """
    ratio = kl / np.square(levels)[:, None]
    by_level, by_sequence = ratio @ weights, ratio.mean(0)
    s, q, r = float(by_level.mean()), len(weights), len(levels)
    text = float(weights @ np.square(by_sequence - s)) / max(1, q - 1)
    law = float(np.square(by_level - s).sum()) / max(1, r - 1) / r
    return s, (text + law) ** 0.5


def _key(manifest: Manifest, sequences: list[np.ndarray], plan: Plan) -> str:
    """Stands for everything that the states depend on."""
    digest = hashlib.sha256(repr((plan, SEED)).encode())
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    for entry in (*(item for segment in manifest.segments for item in segment.files), *manifest.shards):
        digest.update(entry.sha256.encode())
    return digest.hexdigest()[:16]


class _Run:
    """One measurement. States: float32 [V, N, D], the residual stream after a MoE layer; V = 0 is the undisturbed text."""

    def __init__(self, root: Path, manifest: Manifest, sequences: list[np.ndarray], folder: Path, plan: Plan) -> None:
        self.root, self.manifest, self.sequences = root, manifest, sequences
        self.folder, self.plan = folder, plan
        self.precision = manifest.precisions[0]
        self.tokens = sum(map(len, sequences))
        self.width = plan.variants(manifest.dims.top_k)

    def file(self, position: int) -> Path:
        return self.folder / f"after{position}.npy"

    def passes(self, first: int) -> int:
        """Passes of the text through one piece of the model from MoE layer `first` on; the head counts as one."""
        layers = len(self.manifest.moe_layers)
        return sum(1 + p * self.width for p in range(first, layers + 1))

    def _states(self, position: int) -> np.ndarray:
        return np.load(self.file(position), mmap_mode="r") if position >= 0 else np.empty((1, 0, 0))

    def layer(self, position: int, bar: tqdm) -> None:
        """From the states before MoE layer number `position` to those after it, this layer's own variants added."""
        layer = self.manifest.moe_layers[position]
        segment = _session(self.root / self.manifest.segments[position].files[0].path)
        entries = [self.manifest.shard(layer, e, self.precision) for e in range(self.manifest.dims.experts)]
        experts = [_session(self.root / entry.files[0].path) for entry in entries]
        before = self._states(position - 1)
        count = len(before)
        final = self.file(position)
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        shape = (count + self.width, self.tokens, self.manifest.dims.hidden)
        after = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        with open(partial, "r+b") as file:  # a full disk is an OSError here, not a bus error later
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        for variant in range(count):
            residual, parts = self._moe(position, segment, experts, before[variant])
            whole = parts.sum(0)
            after[variant] = residual + whole
            if variant == 0:
                after[count:] = list(self._disturbed(position, residual, whole, parts))
            bar.update()
        after.flush()
        del after
        partial.replace(final)

    def _disturbed(self, position: int, residual: np.ndarray, whole: np.ndarray, parts: np.ndarray):
        """This layer's variants, in the order of `collect`; parts [K, N, D] by falling gate."""
        rms = float(np.sqrt(np.square(whole, dtype=np.float64).mean()))
        noises = [
            np.random.default_rng((SEED, position, draw)).standard_normal(whole.shape, np.float32)
            for draw in range(self.plan.draws)
        ]
        for level in self.plan.levels:
            for noise in noises:
                yield residual + whole + np.float32(level * rms) * noise
        for part in parts:
            yield residual + whole - part

    def _moe(
        self, position: int, segment: onnxruntime.InferenceSession, experts: list, state: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(residual stream [N, D], what the pair of each rank adds [K, N, D]) of one variant."""
        dims = self.manifest.dims
        entry, names = self.manifest.segments[position], ["residual_out", "hidden", "router_logits"]
        outputs = [self._segment(entry, segment, state, q, names) for q in range(len(self.sequences))]
        residual, hidden, logits = (np.concatenate(each) for each in zip(*outputs))
        chosen = routing.largest(logits, dims.top_k)
        gates = routing.gates_of(logits, chosen, self.manifest.routing)
        parts = np.zeros((dims.top_k, self.tokens, dims.hidden), np.float32)
        for expert, session in enumerate(experts):
            rows, ranks = np.nonzero(chosen == expert)
            if len(rows):
                x = np.ascontiguousarray(hidden[rows])
                # dynamic int8 scales a whole batch by its largest value, and is to be run row by row
                batches = np.split(x, len(x)) if self.precision == "int8dyn" else [x]
                y = np.concatenate([session.run(["y"], {"x": batch})[0] for batch in batches])
                parts[ranks, rows] = gates[rows, ranks, None] * y
        return residual, parts

    def _segment(
        self, entry: Segment, session: onnxruntime.InferenceSession, state: np.ndarray, q: int, wanted: list[str]
    ) -> list[np.ndarray]:
        """Outputs `wanted` [S, .] of one trunk segment for sequence q, from a variant's state (of no rows: from the tokens)."""
        dims, ids = self.manifest.dims, self.sequences[q]
        s, start = len(ids), sum(map(len, self.sequences[:q]))
        cache = np.zeros((1, dims.kv_heads, s, dims.head_dim), np.float32)
        feed = {f"past_{kind}_{layer}": cache for layer in entry.attention_layers for kind in ("key", "value")}
        if entry.attention_layers:
            feed["seqlens_k"], feed["total_sequence_length"] = np.array([s - 1], np.int32), np.array([s], np.int32)
        if not state.size:
            feed["input_ids"] = ids[None]
        else:  # the sum is in the state already
            residual = np.ascontiguousarray(state[start : start + s])[None]
            feed |= {"residual": residual, "moe_out": np.zeros_like(residual)}
        return [each[0] for each in session.run(wanted, feed)]

    def divergences(self, bar: tqdm) -> np.ndarray:
        """Mean KL(undisturbed || variant) in nats of every sequence, float64 [M * W, Q]."""
        last = self.manifest.segments[-1]
        session = _session(self.root / last.files[0].path)
        states = self._states(len(self.manifest.moe_layers) - 1)
        result = np.zeros((len(states) - 1, len(self.sequences)))
        for q in range(len(self.sequences)):  # one at a time: probabilities of all tokens would be large
            exact: tuple[np.ndarray, np.ndarray] | None = None
            for variant, state in enumerate(states):
                (logits,) = self._segment(last, session, state, q, ["logits"])
                if exact is None:
                    exact = _distribution(logits)
                else:
                    result[variant - 1, q] = divergence(*exact, logits).mean()
                bar.update(1 / len(self.sequences))
        return result


def _distribution(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities float64 [S, V], sum of p log p [S]) of logits float32 [S, V]."""
    logs = logits - _log_sum(logits)[:, None]
    p = np.exp(logs)
    return p, (p * logs).sum(1)


def _log_sum(logits: np.ndarray) -> np.ndarray:
    """log of the sum of exp, float64 [S]. The terms are float32: their errors, 1e-7 of each and of either sign, cancel."""
    top = logits.max(1)
    return top + np.log(np.exp(logits - top[:, None]).sum(1, dtype=np.float64))


def divergence(p: np.ndarray, p_log_p: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(p || softmax(logits)) in nats, float64 [S]; p float64 [S, V], its sum of p log p [S], logits float32 [S, V]."""
    return p_log_p - np.einsum("sv,sv->s", p, logits) + _log_sum(logits)


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # many sessions, called in turn
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
