"""The folder of an experiment (`spacemoe experiment run FILE -o DIR`): what is written, and how a stopped one goes on where it was.

    experiment.json   at the start: {"format": 1, "digest", "parts", "experiment": all its fields, "scenario": {"name", "limit_c",
                      "floor_soc", "idle_w", "busy_w", "nodes"}, "bundle": {"name", "manifest_sha256"}, "provenance": "simulated",
                      "versions", "written_utc"}. digest: sha256 over `parts` (experiment_identity.py)
    parts/C-S.npz     a finished run (contender number C of the file, from 0; seed S), written at once; only they are read back
    runs.parquet      a row per label and seed: label, policy, admission, seed, the figures of experiment_report.figures,
                      decisions_sha256, wall_s
    slots.parquet     label, seed, slot, mission_s, tokens, useful, nats, kl, coverage
    nodes.parquet     label, seed, slot, mission_s, node, temp_c, avionics_c, soc, power_w, price, visits, lit, up, runs_<precision>
    tokens.parquet    label, seed, slot, latency_ms, nats, kl, coverage, bytes: a row per token that was really read; nats is null for
                      the last one of a passage, whose next token is not known
    summary.json      last: what `--json` prints

mission_s is the end of the slot, when temperatures, charge and prices are those; visits and runs_* are of one token. A file appears
whole or not at all. Leaves out: playing (experiment_sweep.py), figures (experiment_report.py), pictures.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from firmware_sim.scenario import Scenario
from ground_station import experiment_identity
from ground_station.experiment import Experiment, ExperimentError, Run
from ground_station.experiment_orbit import Surroundings, Trace, per_slot
from node_agent import frame, npz_file, shard

FORMAT = 1
MAX_JSON_BYTES = 1 << 22
HEAD, SUMMARY, PARTS = "experiment.json", "summary.json", "parts"
TABLES = ("runs", "slots", "nodes", "tokens")
PART = re.compile(r"\d{1,2}-\d{1,10}\.npz(\.partial)?")
ELSE = "give another -o, or --no-resume to replace what is there"


class StoreError(ExperimentError):
    """A folder cannot be used for this experiment; the text says why and what to give."""


class Store:
    """The folder of one experiment, held by this process alone until it is closed."""

    def __init__(self, folder: Path, experiment: Experiment, scenario: Scenario, bundle: Path, resume: bool = True):
        """Makes the folder, or takes it up again; `resume` False: what an earlier experiment left there is removed.

        Raises: StoreError for a folder of something else, of another experiment, or that another process holds; OSError.
        """
        import pyarrow.parquet  # noqa: F401  told now if it is not installed, not after the last run

        self.folder, self.experiment, self.scenario = folder, experiment, scenario
        self.nodes = tuple(board.node for board in scenario.boards)
        parts = experiment_identity.parts(experiment, scenario, bundle)
        self.digest = experiment_identity.digest(parts)
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is no folder: give -o a new one")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder} cannot be a folder ({error.strerror}): give -o another") from None
        self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"{folder} is in use by another run: wait for it, or give another -o") from None
            there = sorted(os.listdir(folder))
            if HEAD in there:
                if resume:
                    self._check(parts)
                    return
                self._clear()
            elif there:
                raise StoreError(f"{folder} holds {there[0]!r} and no {HEAD}: give -o a new or empty folder")
            self._write_json(HEAD, self._head(parts, bundle))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the folder."""
        os.close(self._lock)

    def _check(self, parts: dict[str, str]) -> None:
        try:
            with open(self.folder / HEAD, "rb") as file:
                head = json.loads(file.read(MAX_JSON_BYTES))
            found, theirs = head["digest"], head["parts"]
        except (ValueError, TypeError, KeyError, RecursionError, IsADirectoryError):
            raise StoreError(f"{self.folder / HEAD} is damaged: {ELSE}") from None
        if found != self.digest:
            other = experiment_identity.difference(parts, theirs) or "its digest"
            raise StoreError(f"{self.folder} is of another experiment ({other} differ): {ELSE}")

    def _clear(self) -> None:
        """Removes what an experiment writes, and nothing else. The head goes last: cut short, it is still known as one."""
        parts = self.folder / PARTS
        for name in sorted(os.listdir(parts)) if parts.is_dir() and not parts.is_symlink() else ():
            if PART.fullmatch(name):
                (parts / name).unlink()
        for name in (SUMMARY, *(f"{table}.parquet" for table in TABLES), HEAD):
            (self.folder / name).unlink(missing_ok=True)

    def _head(self, parts: dict[str, str], bundle: Path) -> dict[str, Any]:
        payload = self.scenario.payload
        return {
            "format": FORMAT,
            "digest": self.digest,
            "parts": parts,
            "experiment": dataclasses.asdict(self.experiment),
            "scenario": {
                "name": self.scenario.name,
                "limit_c": payload.limit_c,
                "floor_soc": self.scenario.power.floor_soc,
                "idle_w": payload.idle_w,
                "busy_w": payload.busy_w,
                "nodes": list(self.nodes),
            },
            "bundle": {"name": shard.read_manifest(bundle).name, "manifest_sha256": parts["bundle"]},
            "provenance": "simulated",
            "versions": experiment_identity.versions(),
            "written_utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def _write_json(self, name: str, tree: dict) -> None:
        with shard.atomic_file(self.folder / name) as file:
            file.write(json.dumps(tree, indent=1, allow_nan=False).encode() + b"\n")

    def _part(self, contender: int, seed: int) -> Path:
        return self.folder / PARTS / f"{contender}-{seed}.npz"

    def save(self, run: Run) -> None:
        """Writes a finished run.  Raises: OSError."""
        arrays = dataclasses.asdict(run.trace)
        arrays["decisions_sha256"] = np.frombuffer(bytes.fromhex(run.trace.decisions_sha256), np.uint8)
        arrays["digest"] = np.frombuffer(bytes.fromhex(self.digest), np.uint8)
        arrays["wall_s"] = np.array([run.wall_s])
        arrays["of"] = np.array([self.experiment.contenders.index(run.contender), run.seed], float)
        known = np.isfinite(run.trace.token_nats)  # a reader of strangers' numbers takes no nan
        arrays |= {"token_known": known.astype(np.uint8), "token_nats": np.where(known, run.trace.token_nats, 0.0)}
        with shard.atomic_file(self._part(self.experiment.contenders.index(run.contender), run.seed)) as file:
            np.savez(file, **arrays)

    def saved(self, tell: Callable[[str], None]) -> Iterator[Run]:
        """The runs that are there. One that cannot be used is told in a line, and has to be played again."""
        s, n = self.experiment.slots, len(self.nodes)
        shapes = per_slot(s, n, None) | {"token_known": (s, None), "over_s": (n,), "capacity_share": (n,)}
        shapes |= {"wall_s": (1,), "of": (2,), "decisions_sha256": (32,), "digest": (32,)}
        for index, contender in enumerate(self.experiment.contenders):
            for seed in self.experiment.seeds:
                path = self._part(index, seed)
                if not path.exists():
                    continue
                try:
                    found = npz_file.read(path, shapes)
                    if _hex(found.pop("digest")) != self.digest:
                        raise npz_file.NpzError("it is of another experiment")
                    if found.pop("of").tolist() != [index, seed]:
                        raise npz_file.NpzError("it is of another run")
                    if len({value.shape for name, value in found.items() if name.startswith("token_")}) != 1:
                        raise npz_file.NpzError("its tokens are not of one shape")
                    found["decisions_sha256"] = _hex(found["decisions_sha256"])
                    found["token_nats"] = np.where(found.pop("token_known") > 0, found["token_nats"], np.nan)
                    wall_s = float(found.pop("wall_s")[0])
                except (npz_file.NpzError, ValueError) as error:
                    tell(f"{path} cannot be used ({error}): that run is played again")
                    continue
                yield Run(contender, seed, Trace(**found), wall_s)

    def finish(self, runs: tuple[Run, ...], rows: list[dict], around: Surroundings, summary: dict) -> None:
        """Writes tables and summary. rows: of runs.parquet, in the order of `runs`.  Raises: OSError."""
        with ExitStack() as stack:
            writers = {name: _Table(self.folder / f"{name}.parquet", stack) for name in TABLES}
            writers["runs"].add({name: [row[name] for row in rows] for name in rows[0]})
            for run in runs:
                for name, columns in self._columns(run, around).items():
                    writers[name].add(columns)
        self._write_json(SUMMARY, summary)

    def _columns(self, run: Run, around: Surroundings) -> dict[str, dict[str, Any]]:
        trace, (s, n) = run.trace, run.trace.temp_c.shape
        t = trace.token_kl.shape[1]
        slots = {name: getattr(trace, name) for name in ("tokens", "useful", "nats", "kl", "coverage")}
        nodes = {"node": np.tile(self.nodes, s)}
        names = ("temp_c", "avionics_c", "soc", "power_w", "price", "visits")
        nodes |= {name: getattr(trace, name).ravel() for name in names}
        nodes |= {"lit": around.lit.ravel(), "up": around.up.ravel()}
        for precision in self.experiment.precisions:
            nodes[f"runs_{precision}"] = trace.runs[:, :, frame.PRECISION_ID[precision]].ravel()
        tokens = {name: getattr(trace, f"token_{name}").ravel() for name in ("latency_ms", "nats", "kl", "coverage")}
        tokens["bytes"] = np.rint(trace.token_bytes.ravel()).astype(np.int64)
        return {
            "slots": self._keys(run, s, 1) | slots,
            "nodes": self._keys(run, s, n) | nodes,
            "tokens": {name: value for name, value in self._keys(run, s, t).items() if name != "mission_s"} | tokens,
        }

    def _keys(self, run: Run, slots: int, each: int) -> dict[str, Any]:
        slot = np.repeat(np.arange(slots), each)
        return {
            "label": [run.contender.label] * len(slot),
            "seed": np.full(len(slot), run.seed, np.int64),
            "slot": slot,
            "mission_s": (slot + 1) * self.experiment.slot_s,
        }


class _Table:
    """A Parquet file that grows by a group of rows at a time; the first one says which columns there are."""

    def __init__(self, path: Path, stack: ExitStack):
        self._file, self._stack, self._writer = stack.enter_context(shard.atomic_file(path)), stack, None

    def add(self, columns: dict[str, Any]) -> None:
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table({name: pyarrow.array(value, from_pandas=True) for name, value in columns.items()})
        if self._writer is None:
            self._writer = self._stack.enter_context(parquet.ParquetWriter(self._file, table.schema))
        self._writer.write_table(table)


def _hex(values: np.ndarray) -> str:
    return bytes(values.astype(int).tolist()).hex()
