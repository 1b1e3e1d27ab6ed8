"""From a checkpoint to a bundle: trunk, one shard per expert and precision, calibration statistics, manifest.

One layer at a time and one expert at a time, so that a checkpoint larger than memory works; every finished piece is noted in
a journal, and the same call goes on where it was cut off. The manifest is written last: a folder without it is no bundle.
Leaves out: reading checkpoints, the numerics and the graphs (their own modules), signing, and measuring ms or joules.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import numpy as np
import onnxruntime
from tqdm import tqdm

from node_agent import routing
from node_agent.shard import (
    MANIFEST,
    Manifest,
    Segment,
    ShardEntry,
    atomic_file,
    read_manifest,
    shard_stem,
    write_file,
    write_manifest,
)
from quantize import calibrate, optimum_int8, recalibrate, trunk_graph
from quantize.checkpoint import Checkpoint
from quantize.describe import CALIBRATION, COPIED, describe, extra_files, special_tokens
from quantize.expert_graph import Matrix, expert_model
from quantize.families import DEFAULT_MAX_CONTEXT, architecture
from quantize.journal import JOURNAL, WORK, Journal, ResumeError
from quantize.nbits import gptq, round_to_nearest
from quantize.recipe import BLOCKS, DEFAULT_MAX_TOKENS, DYNAMIC, GPTQ, Recipe, choose_recipe
from quantize.weights import Weights

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not grow that large",
}


class DiskFullError(OSError):
    """No room for the bundle; the text says how to go on. Everything finished so far stays, nothing is half-written."""


@contextmanager
def disk_room(out: Path) -> Iterator[None]:
    """Turns a full disk into one line that names the next step."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK or isinstance(error, DiskFullError):
            raise
        raise DiskFullError(
            error.errno,
            f"{_DISK[error.errno]} while writing {out}: make room and give the same command again, it goes on from there",
        ) from None


def quantize(
    model_dir: Path,
    out: Path,
    *,
    precisions: tuple[str, ...] = ("int8", "int4"),
    fp32: bool = False,
    trunk_precision: str = "fp32",
    calibration_text: Path | None = None,
    rtn: bool = False,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    max_context: int = DEFAULT_MAX_CONTEXT,
    progress: bool = True,
    name: str | None = None,
    force: bool = False,
) -> Manifest:
    """Writes the bundle of a Hugging Face folder and returns its manifest; goes on with a bundle that was cut off.

    `fp32` adds float32 shards; `rtn` allows rounding to nearest without a calibration text. With neither `calibration_text`
    nor `rtn` the model folder's calibration.txt is used. `force` replaces an existing bundle in `out`.

    Raises: CheckpointError, FamilyError, RecipeError, CalibrationError, ResumeError (ValueErrors), DiskFullError (OSError).
    """
    checkpoint = Checkpoint(model_dir)
    arch = architecture(checkpoint.config, max_context)
    weights = Weights(checkpoint, arch)
    wanted = tuple(dict.fromkeys((*precisions, *(("fp32",) if fp32 else ()))))
    recipe, text = choose_recipe(model_dir, wanted, trunk_precision, calibration_text, rtn, max_tokens, max_context)
    fingerprint = checkpoint.fingerprint()
    recipe_hash = recipe.hash(fingerprint)
    with disk_room(out), _alone(out):
        finished = _existing(out, recipe_hash, force)
        if finished is not None:
            return finished
        journal = Journal(out, recipe_hash)
        run = _Run(out, weights, recipe, journal)
        total = len(arch.moe_layers) * arch.dims.experts * len(recipe.precisions)
        with tqdm(total=total, unit="shard", desc="quantize", disable=None if progress else True) as bar:
            segments, shards = run.all_layers(model_dir, text, bar)
        files = extra_files(model_dir, out, recipe)
        manifest = describe(model_dir, arch, recipe, recipe_hash, fingerprint, segments, shards, files, name)
        write_manifest(out, manifest)
    shutil.rmtree(out / WORK, ignore_errors=True)
    (out / JOURNAL).unlink(missing_ok=True)
    return manifest


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The folder `out`, made if need be, for this run only: two at once would write the same temporary files.

    The lock is on the folder itself, so that nothing is left behind.  Raises: ResumeError.
    """
    if out.exists() and not out.is_dir():
        raise ResumeError(f"{out} is a file: give a folder by -o")
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        if error.errno in _DISK:
            raise
        raise ResumeError(f"{out} cannot be a folder ({error.strerror}): give another -o") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ResumeError(f"another run is writing {out}: wait for it, or give another -o") from None
    finally:
        os.close(folder)
        if made and not any(out.iterdir()):
            out.rmdir()


def _existing(out: Path, recipe_hash: str, force: bool) -> Manifest | None:
    """The finished bundle in `out` if it is the one asked for; None if there is room for it.  Raises: ResumeError."""
    has_manifest = (out / MANIFEST).exists()
    if force and (has_manifest or (out / JOURNAL).exists()):
        for item in (MANIFEST, JOURNAL, CALIBRATION, *COPIED):
            (out / item).unlink(missing_ok=True)
        for folder in (trunk_graph.FOLDER, "experts", WORK):
            shutil.rmtree(out / folder, ignore_errors=True)
        return None
    if has_manifest:
        manifest = read_manifest(out)
        if manifest.recipe.get("hash") != recipe_hash:
            raise ResumeError(
                f"{out} holds a bundle of another model or recipe: give another -o, or --force to replace it"
            )
        return manifest
    if out.is_dir() and not (out / JOURNAL).exists() and any(out.iterdir()):
        raise ResumeError(f"{out} is not empty and no bundle of ours: give another -o")
    return None


class _Run:
    """The state of one run: what every step writes to."""

    def __init__(self, out: Path, weights: Weights, recipe: Recipe, journal: Journal) -> None:
        self.out, self.weights, self.recipe, self.journal = out, weights, recipe, journal
        self.arch = weights.arch
        self.shared = journal.good_shared()
        self.work = out / WORK

    def all_layers(self, model_dir: Path, text: Path | None, bar: tqdm) -> tuple[list[Segment], list[ShardEntry]]:
        moe_layers = self.arch.moe_layers
        segments: list[Segment] = []
        shards: list[ShardEntry] = []
        sequences: list[np.ndarray] = []
        if text is not None:
            start, _ = special_tokens(model_dir)
            limits = (self.recipe.max_tokens, self.arch.dims.max_context)
            sequences = calibrate.token_sequences(model_dir / "tokenizer.json", text, *limits, start)
        first = self._start(bool(sequences))
        for position, layer in enumerate(moe_layers):
            segments.append(self.segment(position))
            if position < first:
                shards += self._known(layer).values()
                bar.update(len(self._known(layer)))
            else:
                shards += self.layer(position, layer, sequences, segments[-1], bar)
        segments.append(self.segment(len(moe_layers)))
        if sequences:
            layers = [dict(np.load(self.statistics_file(n), allow_pickle=False)) for n in range(len(moe_layers))]
            tokens = sum(len(ids) for ids in sequences)
            with atomic_file(self.out / CALIBRATION) as file:
                np.savez_compressed(file, **calibrate.combine(layers, moe_layers, tokens))
            draft = describe(model_dir, self.arch, self.recipe, "", "", segments, shards, (), None)
            self.sensitivities(draft, sequences, progress=not bar.disable)
        return segments, shards

    def sensitivities(self, draft: Manifest, sequences: list[np.ndarray], progress: bool) -> None:
        """Adds them to calibration.npz; a run that was cut off after they were measured takes them from its work."""
        known = self.work / "sensitivity.npz"
        if not known.exists():
            found = recalibrate.measured(self.out, draft, sequences, self.work, progress)
            with atomic_file(known) as file:
                np.savez(file, **found)
        content = recalibrate.merged(self.out / CALIBRATION, dict(np.load(known, allow_pickle=False)))
        write_file(self.out, CALIBRATION, content)

    def segment(self, index: int) -> Segment:
        known = self.journal.segment(index)
        if known is None:
            known = trunk_graph.write_segment(self.out, self.weights, index, self.recipe.trunk_precision, self.shared)
            self.journal.add_segment(index, known)
        return known

    def statistics_file(self, position: int) -> Path:
        return self.work / f"layer{position}.npz"

    def _known(self, layer: int) -> dict[tuple[int, str], ShardEntry | None]:
        """Shards of a layer that an earlier run finished."""
        experts = range(self.arch.dims.experts)
        return {(e, p): self.journal.shard(layer, e, p) for e in experts for p in self.recipe.precisions}

    def _start(self, calibrated: bool) -> int:
        """The position to go on from: the first layer that is not finished.

        With calibration the states that it starts from must be there too, else all layers are run again (finished shards are kept).
        """
        for position, layer in enumerate(self.arch.moe_layers):
            done = position in self.journal.layers and all(self._known(layer).values())
            if not done or (calibrated and not self.statistics_file(position).exists()):
                break
        else:
            return len(self.arch.moe_layers)
        states = calibrate.HiddenStates.files(self.work, position - 1)
        return position if not calibrated or all(path.exists() for path in states) else 0

    def layer(
        self, position: int, layer: int, sequences: list[np.ndarray], segment: Segment, bar: tqdm
    ) -> list[ShardEntry]:
        """Writes the shards of one MoE layer, and with a calibration text its statistics and hidden states."""
        known = self._known(layer)
        run = self._run_trunk(position, sequences, segment) if sequences else None
        entries = []
        for expert in range(self.arch.dims.experts):
            gate_up, down = self.weights.expert(layer, expert)
            hessians = run.add_expert(expert, gate_up, down) if run else None
            held = run.held_rows(expert) if run else None
            for precision in self.recipe.precisions:
                entry = known[expert, precision]
                # after a cut, quantized outputs are needed again for the layer's error, but not the quantizing
                if entry is None:
                    entry = self._shard(layer, expert, precision, gate_up, down, hessians)
                    error = self._measure(run, entry, held, gate_up, down)
                    entry = ShardEntry(layer, expert, precision, entry.files, error)
                    self.journal.add_shard(entry)
                else:
                    self._measure(run, entry, held, gate_up, down)
                entries.append(entry)
                bar.update()
        if run:
            self._finish(position, run)
        self.journal.add_layer(position)
        for path in calibrate.HiddenStates.files(
            self.work, position - 1
        ):  # only now: until here a rerun would need them
            path.unlink(missing_ok=True)
        return entries

    def _run_trunk(self, position: int, sequences: list[np.ndarray], segment: Segment) -> calibrate.LayerRun:
        tokens, dims = sum(len(ids) for ids in sequences), self.arch.dims
        before = calibrate.HiddenStates.open(self.work, position - 1, tokens, dims, create=False) if position else None
        after = calibrate.HiddenStates.open(self.work, position, tokens, dims, create=True)
        root = self.out
        if self.recipe.trunk_precision != "fp32":  # calibration sees the exact model
            root = self.work
            segment = trunk_graph.write_segment(root, self.weights, position, "fp32", {})
        logits = calibrate.run_segment(root, segment, dims, sequences, before, after)
        if root is self.work:
            shutil.rmtree(root / trunk_graph.FOLDER, ignore_errors=True)
        experts = routing.largest(logits, dims.top_k)
        gates = routing.gates_of(logits, experts, self.arch.routing)
        return calibrate.LayerRun(after, experts, gates, calibrate.held_tokens(sequences), dims.experts)

    def _finish(self, position: int, run: calibrate.LayerRun) -> None:
        statistics = run.statistics() | {"experts": run.experts.astype(np.int32)}
        if position:
            before = np.load(self.statistics_file(position - 1), allow_pickle=False)["experts"]
            statistics["successive"] = calibrate.successive(before, run.experts, run.count)
        with atomic_file(self.statistics_file(position)) as file:
            np.savez(file, **statistics)
        run.states.flush()

    def _shard(
        self,
        layer: int,
        expert: int,
        precision: str,
        gate_up: np.ndarray,
        down: np.ndarray,
        hessians: tuple[np.ndarray, np.ndarray] | None,
    ) -> ShardEntry:
        if precision in ("fp32", DYNAMIC):
            matrices: tuple[Matrix, Matrix] = (gate_up, down)
        elif hessians is None:
            matrices = tuple(round_to_nearest(w, *BLOCKS[precision]) for w in (gate_up, down))
        else:
            how = GPTQ.get(precision, {})
            matrices = tuple(gptq(w, h, *BLOCKS[precision], **how) for w, h in zip((gate_up, down), hessians))
        return write_shard(self.out, layer, expert, precision, *matrices)

    def _measure(
        self,
        run: calibrate.LayerRun | None,
        entry: ShardEntry,
        held: tuple[np.ndarray, np.ndarray] | None,
        gate_up: np.ndarray,
        down: np.ndarray,
    ) -> float | None:
        """Runs the shard as a board will, on rows held back; None without calibration."""
        session = onnxruntime.InferenceSession(str(self.out / entry.files[0].path), providers=["CPUExecutionProvider"])
        if run is None or held is None or not len(held[0]):
            return None
        x = np.ascontiguousarray(run.states.hidden[held[0]])
        exact = calibrate.swiglu(x, gate_up) @ down.T
        batches = np.split(x, len(x)) if entry.precision == DYNAMIC else [x]
        y = np.concatenate([session.run(["y"], {"x": batch})[0] for batch in batches])
        return run.measure(entry.precision, *held, y, exact)


def write_shard(
    root: Path, layer: int, expert: int, precision: str, gate_up: Matrix, down: Matrix, rel_error: float | None = None
) -> ShardEntry:
    """Writes one expert's graph and weights below a bundle's root."""
    stem = shard_stem(layer, expert, precision)
    build = optimum_int8.expert_model_int8dyn if precision == DYNAMIC else expert_model
    graph, blob = build(gate_up, down, Path(stem).name + ".bin")
    files = (write_file(root, f"{stem}.onnx", graph), write_file(root, f"{stem}.bin", blob))
    return ShardEntry(layer, expert, precision, files, rel_error)
