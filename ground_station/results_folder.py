"""Reads the folder that `spacemoe experiment run FILE -o DIR` writes, as a stranger's: sizes, columns and types before any value.

Of the long tables only what a report shows is kept: of nodes.parquet some runs, of tokens.parquet two columns. A run that was stopped
has no summary.json yet, and may have no table: what is missing is None. Leaves out: writing (experiment_store.py), and pictures.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ground_station.results_head import AGAIN, MAX_NUMBER, Head, ResultsError, Summary, built, check, clean, read_json
from node_agent import frame

FORMAT = 1
HEAD, SUMMARY, PARTS = "experiment.json", "summary.json", "parts"
MAX_COLUMNS = 100
MAX_ROWS = {"runs": 6400, "nodes": 16_000_000, "tokens": 32_000_000}
MAX_TABLE_BYTES = 1 << 31  # of a table, unpacked
PARQUET_LIMITS = {"thrift_string_size_limit": 1 << 24, "thrift_container_size_limit": 1 << 20}
"""Of a file's own description: a text or a list in it that claims to be longer is refused unread."""
BATCH_ROWS = 1 << 16

FIGURES = (
    "tokens",
    "useful_tokens",
    "perplexity_ratio",
    "kl_nats",
    "joules_per_token",
    "joules",
    "over_limit_s",
    "hottest_c",
    "lowest_soc",
    "final_soc",
    "least_coverage",
    "latency_ms_p50",
    "latency_ms_p99",
    "bytes_per_token",
)
TRACES = ("mission_s", "temp_c", "soc", "price", "lit", "up")


@dataclass(frozen=True, eq=False)
class RunRow:
    """One run: its figures by name (FIGURES; NaN where unknown)."""

    label: str
    seed: int
    figures: dict[str, float]


@dataclass(frozen=True, eq=False)
class NodeTrace:
    """One node in one run, per slot [S], in the order of time: TRACES, and runs by precision of one token."""

    values: dict[str, np.ndarray]
    runs: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Results:
    """A folder. runs: None without runs.parquet; parts: how many finished runs a stopped one has left to go on from."""

    folder: Path
    head: Head
    summary: Summary | None
    runs: tuple[RunRow, ...] | None
    parts: int = 0

    @property
    def expected(self) -> int:
        return len(self.head.experiment.contenders) * len(self.head.experiment.seeds)

    @property
    def finished(self) -> bool:
        return self.summary is not None and self.runs is not None and len(self.runs) == self.expected

    def of(self, label: str) -> tuple[RunRow, ...]:
        return tuple(row for row in self.runs or () if row.label == label)


def read(folder: Path) -> Results:
    """Raises: ResultsError."""
    if not folder.is_dir():
        raise ResultsError(f"{folder} is no folder: give the one that `spacemoe experiment run FILE -o DIR` wrote")
    if not (folder / HEAD).exists():
        raise ResultsError(f"{folder} has no {HEAD}: give the folder that `spacemoe experiment run FILE -o DIR` wrote")
    tree = read_json(folder / HEAD, AGAIN)
    if tree.get("format") != FORMAT:
        raise ResultsError(f"{folder / HEAD} is not of format {FORMAT}: this build reads no other; {AGAIN}")
    head = built(Head, tree, folder / HEAD)
    summary = None
    if (folder / SUMMARY).exists():
        summary = built(Summary, read_json(folder / SUMMARY, AGAIN), folder / SUMMARY)
    check(head, summary, folder)
    runs = _runs(folder, head) if (folder / "runs.parquet").exists() else None
    parts = folder / PARTS
    names = [each.name for each in os.scandir(parts)] if parts.is_dir() else []
    return Results(folder, head, summary, runs, sum(name.endswith(".npz") for name in names))


def _batches(folder: Path, table: str, texts: tuple[str, ...], numbers: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A table in pieces: `texts` as (codes [R], different texts), `numbers` as float64 [R] with NaN for null.

    Raises: ResultsError, before a value is read where the file's own description already says that it cannot be used.
    """
    path = folder / f"{table}.parquet"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ResultsError(f"{path} is no plain file: {AGAIN}")
        # read_dictionary: a text that comes in every row is kept once, however long it is
        with pq.ParquetFile(path, **PARQUET_LIMITS, read_dictionary=list(texts)) as file:
            _check(path, table, file, texts, numbers)
            for batch in file.iter_batches(BATCH_ROWS, columns=[*texts, *numbers]):
                found: dict[str, Any] = {}
                for name in texts:
                    column = batch.column(name)
                    if not pa.types.is_dictionary(column.type):
                        column = column.dictionary_encode()
                    if column.null_count:
                        raise ResultsError(f"{path}: column {name} has rows without a text: {AGAIN}")
                    found[name] = np.asarray(column.indices), column.dictionary.to_pylist()
                for name in numbers:
                    values = batch.column(name).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
                    if (np.abs(values) > MAX_NUMBER).any():  # false for NaN, which is an unknown value
                        raise ResultsError(f"{path}: column {name} holds a number over {MAX_NUMBER:g}: {AGAIN}")
                    found[name] = values
                yield found
    except KeyError as error:  # of read_dictionary
        raise ResultsError(f"{path} has no column {clean(str(error))[:40]}: {AGAIN}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is damaged ({clean(str(error))[:120]}): {AGAIN}") from None


def _check(path: Path, table: str, file: pq.ParquetFile, texts: tuple[str, ...], numbers: tuple[str, ...]) -> None:
    described = file.metadata
    if described.num_rows > MAX_ROWS[table] or described.num_columns > MAX_COLUMNS:
        raise ResultsError(
            f"{path} has {described.num_rows} rows of {described.num_columns} columns, over the limits of {MAX_ROWS[table]} and "
            f"{MAX_COLUMNS}: run fewer slots, seeds or policies"
        )
    unpacked = sum(described.row_group(index).total_byte_size for index in range(described.num_row_groups))
    if unpacked > MAX_TABLE_BYTES:
        raise ResultsError(f"{path} unpacks to {unpacked} bytes, over the limit of {MAX_TABLE_BYTES}: run fewer slots")
    schema = file.schema_arrow
    for name in (*texts, *numbers):
        if len(schema.get_all_field_indices(name)) != 1:
            raise ResultsError(f"{path} has no column {name}, or two: {AGAIN}")
        kind = schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        number = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if not (text if name in texts else number):
            raise ResultsError(
                f"{path}: column {name} holds {kind}, not {'texts' if name in texts else 'numbers'}: {AGAIN}"
            )


def _runs(folder: Path, head: Head) -> tuple[RunRow, ...]:
    rows = []
    for batch in _batches(folder, "runs", ("label",), ("seed", *FIGURES)):
        codes, labels = batch["label"]
        for index, code in enumerate(codes):
            figures = {name: float(batch[name][index]) for name in FIGURES}
            seed = batch["seed"][index]
            rows.append(RunRow(clean(labels[code]), int(seed) if np.isfinite(seed) else -1, figures))
    expected = {(each.label, seed) for each in head.experiment.contenders for seed in head.experiment.seeds}
    keys = [(row.label, row.seed) for row in rows]
    if not set(keys) <= expected or len(set(keys)) != len(keys):
        raise ResultsError(
            f"{folder / 'runs.parquet'} has a run twice, or one that {HEAD} does not name: two experiments in one folder? {AGAIN}"
        )
    return tuple(rows)


def traces(results: Results, runs: set[tuple[str, int]]) -> dict[tuple[str, int], dict[str, NodeTrace]]:
    """(label, seed) -> node -> its trace, of `runs`; nothing where there is no nodes.parquet.  Raises: ResultsError."""
    path = results.folder / "nodes.parquet"
    if not path.exists():
        return {}
    precisions = [name for name in results.head.experiment.precisions if name in frame.PRECISIONS]
    columns = ("seed", "slot", *TRACES, *(f"runs_{name}" for name in precisions))
    pieces: dict[tuple[str, int, str], list[np.ndarray]] = {}
    for batch in _batches(results.folder, "nodes", ("label", "node"), columns):
        (codes, labels), (node_codes, nodes) = batch["label"], batch["node"]
        for label, seed in runs:
            chosen = np.isin(codes, [index for index, text in enumerate(labels) if clean(text) == label])
            chosen &= batch["seed"] == seed
            for index in np.unique(node_codes[chosen]):
                rows = chosen & (node_codes == index)
                found = np.stack([batch[name][rows] for name in columns])
                pieces.setdefault((label, seed, clean(nodes[index])), []).append(found)
    known: dict[tuple[str, int], dict[str, NodeTrace]] = {}
    for (label, seed, node), found in pieces.items():
        if node not in results.head.scenario.nodes:
            raise ResultsError(f"{path} names node {node[:40]!r}, which {HEAD} does not: {AGAIN}")
        table = np.concatenate(found, 1)
        slot = table[columns.index("slot")]
        if not np.array_equal(np.sort(slot), np.arange(len(slot))) or len(slot) > results.head.experiment.slots:
            raise ResultsError(
                f"{path}: the slots of {label[:40]}, seed {seed}, node {node[:40]} are not 0, 1, 2, ...: {AGAIN}"
            )
        table = dict(zip(columns, table[:, np.argsort(slot)]))
        if not np.isfinite(list(table.values())).all() or not (np.diff(table["mission_s"], prepend=0) > 0).all():
            raise ResultsError(
                f"{path}: {label[:40]}, seed {seed}, node {node[:40]} has gaps, or its time stands still: {AGAIN}"
            )
        trace = NodeTrace({name: table[name] for name in TRACES}, {name: table[f"runs_{name}"] for name in precisions})
        known.setdefault((label, seed), {})[node] = trace
    return known


def token_latencies(results: Results) -> dict[str, np.ndarray]:
    """label -> ms of every token that was really read, sorted, all seeds together [T].  Raises: ResultsError."""
    if not (results.folder / "tokens.parquet").exists():
        return {}
    pieces: dict[str, list[np.ndarray]] = {each.label: [] for each in results.head.experiment.contenders}
    for batch in _batches(results.folder, "tokens", ("label",), ("latency_ms",)):
        codes, labels = batch["label"]
        for index, text in enumerate(labels):
            values = batch["latency_ms"][codes == index]
            values = values[np.isfinite(values)].astype(np.float32)
            if len(values) and clean(text) not in pieces:
                raise ResultsError(
                    f"{results.folder / 'tokens.parquet'} has a policy that {HEAD} does not name: {AGAIN}"
                )
            if len(values):
                pieces[clean(text)].append(values)
    return {label: np.sort(np.concatenate(found)) for label, found in pieces.items() if found}
