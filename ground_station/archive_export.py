"""Writes an archive as files for other programs: Parquet, CSV or JSON lines, page by page, whole or not at all.

telemetry is in long form, a row per sample; generated_utc_s is by the ground station's clock where `corrected`, else by the
node's. Times are UTC seconds. Values are exact: CSV has the shortest digits that give the same float64; an empty field (CSV) or null
is no value.
Leaves out: which archive and where to (cli_archive.py).
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ground_station.archive_read import ROW, ArchiveReader
from ground_station.archive_records import SEVERITIES, ArchiveDamaged
from ground_station.archive_telemetry import VALIDITIES, codes_of, offsets_of, values_of
from node_agent.shard import atomic_file

FORMATS = ("parquet", "csv", "jsonl")
CHUNK_SAMPLES = 200_000
PAGE_ROWS = 500
TELEMETRY = {
    "node": str, "signal": str, "unit": str, "value": float, "validity": str, "provenance": str, "scope": str,
    "generated_utc_s": float, "received_utc_s": float, "corrected": bool, "late": bool, "run": int, "number": int,
}  # fmt: skip
TABLES = {
    "births": {"at_utc_s": float, "node": str, "birth": str},
    "events": {
        "at_utc_s": float, "source": str, "node": str, "generated_utc_s": float, "severity": str, "kind": str, "text": str,
    },
    "commands": {
        "id": str, "who": str, "at_utc_s": float, "node": str, "name": str, "arguments": str, "state": str, "text": str,
        "done_utc_s": float,
    },
    "requests": {
        "request": str, "kind": str, "at_utc_s": float, "prompt_tokens": int, "tokens": int, "state": str,
        "energy_j": float, "energy_scope": str, "text": str,
    },
    "tokens": {
        "request": str, "idx": int, "token_id": int, "piece": str, "at_utc_s": float, "total_ms": float, "trunk_ms": float,
        "select_ms": float, "codec_ms": float, "wire_ms": float, "expert_ms": float, "sent_bytes": int,
        "received_bytes": int, "rungs": int,
    },
    "alarms": {
        "id": str, "at_utc_s": float, "node": str, "signal": str, "level": str, "severity": str, "state": str, "value": float,
        "text": str, "who": str,
    },
}  # fmt: skip
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Selection:
    """What is written: made (telemetry) or come (the rest) in that time; of these nodes and signals, None: of all."""

    since_utc_s: float | None = None
    until_utc_s: float | None = None
    nodes: tuple[str, ...] | None = None
    signals: tuple[str, ...] | None = None

    @property
    def span(self) -> tuple[float, float]:
        since_s, until_s = self.since_utc_s, self.until_utc_s
        return -math.inf if since_s is None else since_s, math.inf if until_s is None else until_s


@dataclass(frozen=True)
class Words:
    """A column of texts of which few differ: (n,) indices into `words`."""

    indices: np.ndarray
    words: list[str]

    def tolist(self) -> list[str]:
        return [self.words[index] for index in self.indices.tolist()]


def folder(reader: ArchiveReader, output: Path, format: str, chosen: Selection, progress: Progress) -> dict[str, int]:
    """A file for each table in the new folder `output`; returns rows by table. `progress` gets (done, total) of telemetry.

    Raises: ValueError where something is there already; ArchiveError; OSError; ModuleNotFoundError without pyarrow.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: give -o a new folder")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        counts = {"telemetry": telemetry_file(reader, partial / f"telemetry.{format}", format, chosen, progress)}
        for table, columns in TABLES.items():
            with _sink(partial / f"{table}.{format}", format, columns) as sink:
                for chunk in _records(reader, table, columns, chosen):
                    sink.write(chunk)
            counts[table] = sink.rows
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


def telemetry_file(reader: ArchiveReader, output: Path, format: str, chosen: Selection, progress: Progress) -> int:
    """The telemetry alone, as one file; returns its rows.  Raises: as `folder`."""
    with _sink(output, format, TELEMETRY) as sink:
        for chunk in _telemetry(reader, chosen, progress):
            sink.write(chunk)
    return sink.rows


# ---------------------------------------------------------------- what is read


def _telemetry(reader: ArchiveReader, chosen: Selection, progress: Progress) -> Iterator[list]:
    """Columns of TELEMETRY, some CHUNK_SAMPLES rows at a time, in the order of arrival."""
    nodes = _node_keys(reader, chosen.nodes)
    first, last = _first_and_last(reader, chosen.span, nodes)
    # The plus keeps the order of arrival, which is that of the file: no page is read twice.
    of_nodes = "" if nodes is None else f"AND +t.node IN ({', '.join(map(str, nodes))})"
    sql = (
        f"SELECT t.id, n.node, r.run, t.signals, {ROW} FROM telemetry t CROSS JOIN nodes n ON n.id = t.node "
        "CROSS JOIN runs r ON r.id = t.run WHERE t.id > ? AND t.id <= ? AND +t.at_utc_s >= ? AND +t.at_utc_s <= ? "
        f"{of_nodes} ORDER BY t.id LIMIT {PAGE_ROWS}"
    )
    chunk, samples, done = [], 0, first - 1
    while rows := reader.page(sql, (done, last, *chosen.span)):
        for row in rows:
            chunk.append(row)
            samples += len(row[12])
            if samples >= 8 * CHUNK_SAMPLES:
                yield _columns(reader, chunk, chosen.signals)
                chunk, samples = [], 0
        done = rows[-1][0]
        progress(done - first + 1, last - first + 1)
    if chunk:
        yield _columns(reader, chunk, chosen.signals)


def _node_keys(reader: ArchiveReader, names: tuple[str, ...] | None) -> list[int] | None:
    """Keys of nodes.  Raises: ValueError for one that is not in the archive."""
    if names is None:
        return None
    keys = []
    for name in names:
        found = reader.page("SELECT id FROM nodes WHERE node = ?", (name,))
        if not found:
            raise ValueError(f"{name[:40]!r} sent nothing to {reader.file}: `spacemoe archive show` names its nodes")
        keys.append(found[0][0])
    return keys


def _first_and_last(reader: ArchiveReader, span: tuple[float, float], nodes: list[int] | None) -> tuple[int, int]:
    """The row ids between which all telemetry of that time and those nodes is, from indexes alone; (1, 0): there is none."""
    if nodes is None and span == (-math.inf, math.inf):
        found = reader.page("SELECT min(id), max(id) FROM telemetry")
    else:
        keys = [key for (key,) in reader.page("SELECT id FROM nodes")] if nodes is None else nodes
        sql = "SELECT min(id), max(id) FROM telemetry WHERE node = ? AND at_utc_s >= ? AND at_utc_s <= ?"
        found = [reader.page(sql, (key, *span))[0] for key in keys]
    there = [pair for pair in found if pair[0] is not None]
    return (min(pair[0] for pair in there), max(pair[1] for pair in there)) if there else (1, 0)


def _columns(reader: ArchiveReader, rows: list[tuple], wanted: tuple[str, ...] | None) -> list:
    """Columns of TELEMETRY from rows (id, node, run, set, then archive_read.ROW)."""
    sets = {of_set: reader.signals_of_set(of_set) for of_set in {row[3] for row in rows}}
    words: list[dict[str, int]] = [{}, {}, {}, {}]  # of names, units, scopes, provenances
    places = {
        of_set: np.array(
            [[of.setdefault(part, len(of)) for of, part in zip(words, signal)] for signal in signals], np.int32
        )
        for of_set, signals in sets.items()
    }
    counts = np.array([len(sets[row[3]]) for row in rows])
    try:
        values = np.concatenate([values_of(row[12], count) for row, count in zip(rows, counts)])
        codes = np.concatenate([codes_of(row[13], count) for row, count in zip(rows, counts)])
        after_s = np.concatenate([offsets_of(row[14], count) for row, count in zip(rows, counts)])
    except ValueError as error:
        raise ArchiveDamaged(reader.file, error) from None
    of_signal = np.concatenate([places[row[3]].reshape(-1, 4) for row in rows])
    node_words: dict[str, int] = {}
    of_node = np.array([node_words.setdefault(row[1], len(node_words)) for row in rows], np.int32)

    def each(column: list, kind) -> np.ndarray:
        return np.repeat(np.array(column, kind), counts)

    made_s = each([row[7] if row[8] is None else row[8] for row in rows], np.float64) + after_s
    columns = [
        Words(np.repeat(of_node, counts), list(node_words)),
        Words(of_signal[:, 0], list(words[0])),
        Words(of_signal[:, 1], list(words[1])),
        values,
        Words(codes.astype(np.int32), list(VALIDITIES)),
        Words(of_signal[:, 3], list(words[3])),
        Words(of_signal[:, 2], list(words[2])),
        made_s,
        each([row[10] for row in rows], np.float64),
        each([row[8] is not None for row in rows], bool),
        each([row[11] for row in rows], bool),
        each([row[2] for row in rows], np.int64),
        each([row[4] for row in rows], np.int64),
    ]
    if wanted is None:
        return columns
    kept = np.isin(of_signal[:, 0], [words[0][name] for name in wanted if name in words[0]])
    return [Words(each.indices[kept], each.words) if isinstance(each, Words) else each[kept] for each in columns]


def _records(reader: ArchiveReader, table: str, columns: dict, chosen: Selection) -> Iterator[list]:
    """Columns of one of TABLES, a page at a time."""
    nodes = chosen.nodes if "node" in columns else None
    of_nodes = "" if nodes is None else f"AND node IN ({', '.join('?' * len(nodes))})"
    sql = (
        f"SELECT rowid, {', '.join(columns)} FROM {table} WHERE rowid > ? AND +at_utc_s >= ? AND +at_utc_s <= ? {of_nodes} "
        f"ORDER BY rowid LIMIT {PAGE_ROWS}"
    )
    done = -1
    while rows := reader.page(sql, (done, *chosen.span, *(nodes or ()))):
        found = [list(column) for column in zip(*(row[1:] for row in rows))]
        if table == "events":
            place = list(columns).index("severity")
            found[place] = [SEVERITIES[code] for code in found[place]]
        yield found
        done = rows[-1][0]


# ---------------------------------------------------------------- what is written


def _sink(path: Path, format: str, columns: dict[str, type]):
    return {"parquet": _Parquet, "csv": _Csv, "jsonl": _Lines}[format](path, columns)


class _Sink:
    """A file that takes chunks of columns and appears whole or not at all."""

    def __init__(self, path: Path, columns: dict[str, type]) -> None:
        self._path, self._columns, self.rows = path, columns, 0
        self._stack = ExitStack()

    def __enter__(self):
        with ExitStack() as stack:
            self._open(stack, stack.enter_context(atomic_file(self._path)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> bool | None:
        return self._stack.__exit__(*error)

    def write(self, chunk: list) -> None:
        self.rows += len(chunk[0].indices if isinstance(chunk[0], Words) else chunk[0])
        self._write(chunk)


class _Parquet(_Sink):
    def _open(self, stack: ExitStack, file) -> None:
        import pyarrow
        from pyarrow import parquet

        kinds = {float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_(), str: pyarrow.string()}
        dictionary = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
        telemetry = self._columns is TELEMETRY
        self._schema = pyarrow.schema(
            [(name, dictionary if telemetry and kind is str else kinds[kind]) for name, kind in self._columns.items()]
        )
        self._writer = stack.enter_context(parquet.ParquetWriter(file, self._schema, compression="zstd"))

    def _write(self, chunk: list) -> None:
        import pyarrow

        arrays = []
        for name, column, field in zip(self._columns, chunk, self._schema):
            if isinstance(column, Words):
                words = pyarrow.array(column.words, pyarrow.string())
                arrays.append(pyarrow.DictionaryArray.from_arrays(pyarrow.array(column.indices), words))
            else:
                empty = np.isnan(column) if name == "value" and isinstance(column, np.ndarray) else None
                arrays.append(pyarrow.array(column, field.type, mask=empty))
        self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))


class _Csv(_Sink):
    def _open(self, stack: ExitStack, file) -> None:
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        stack.callback(text.detach)
        self._writer = csv.writer(text)
        self._writer.writerow(self._columns)

    def _write(self, chunk: list) -> None:
        self._writer.writerows(zip(*map(_plain, chunk)))


class _Lines(_Sink):
    def _open(self, stack: ExitStack, file) -> None:
        self._file = file

    def _write(self, chunk: list) -> None:
        names = tuple(self._columns)
        lines = (json.dumps(dict(zip(names, row)), allow_nan=False) for row in zip(*map(_plain, chunk)))
        self._file.write("".join(f"{line}\n" for line in lines).encode())


def _plain(column) -> list:
    """A column as Python values, None where a number is none that JSON has."""
    if isinstance(column, Words) or (isinstance(column, np.ndarray) and column.dtype.kind != "f"):
        return column.tolist()
    values = column.tolist() if isinstance(column, np.ndarray) else column
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]
