"""Reads an archive while it is being written, by this process or another: nodes, signals, trends, events, commands, requests, alarms,
and all messages in the order of arrival.

Every question has a limit, and its connection cannot write. Leaves out: writing (archive.py), reducing (archive_trend.py), files for other
programs (archive_export.py).
"""

from __future__ import annotations

import heapq
import json
import math
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from ground_station import archive_schema, archive_trend
from ground_station.archive_records import (
    SEVERITIES,
    AlarmRecord,
    ArchiveDamaged,
    CommandRecord,
    EventRecord,
    Kept,
    NodeInfo,
    RequestRecord,
    SignalInfo,
    TokenRecord,
)
from ground_station.archive_telemetry import VALIDITIES, Signal, signals_of, unpack
from node_agent import wire

LINES, MAX_LINES = 1000, 100_000
MAX_NODES = 10_000
MAX_SETS = 500  # sets of signals of one node that a question looks at, the latest first
MAX_TREND_ROWS = 1_000_000  # 11 days at 1 Hz
MAX_POINTS = 20_000
PAGE_ROWS = 500
IDLE_CONNECTIONS = 4
OK_CODE = VALIDITIES.index("ok")
ALWAYS_S = (-math.inf, math.inf)
ROW = "t.number, t.session, t.seq, t.generated_utc_s, t.ground_utc_s, t.uncertainty_s, t.received_utc_s, t.late, t.vals, t.codes, t.offsets"


class ArchiveReader:
    """An archive, or the folder it is in, to read; usable from any thread. Times are UTC seconds, None: without that bound.

    Every method raises ArchiveError (newer, of something else, cannot be read now) or ArchiveDamaged.
    """

    def __init__(self, path: Path) -> None:
        self.file = archive_schema.file_of(path)
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        self._signals = lru_cache(maxsize=64)(self._read_signals)
        with self._connection():
            pass

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for db in idle:
            db.close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for this thread alone; what the database or a row says that cannot be is an ArchiveError."""
        with self._lock:
            db = self._idle.pop() if self._idle else None
        if db is None:
            db = archive_schema.open_to_read(self.file)
        try:
            yield db
        except sqlite3.DatabaseError as error:
            db.close()
            raise archive_schema.refusal(self.file, error) from None
        except (_Impossible, UnicodeDecodeError) as error:
            db.close()
            raise ArchiveDamaged(self.file, error) from None
        except BaseException:
            db.close()
            raise
        with self._lock:
            if not self._closed and len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(db)
                return
        db.close()

    def _rows(self, sql: str, values: Sequence = ()) -> list[tuple]:
        with self._connection() as db:
            return db.execute(sql, values).fetchall()

    # ------------------------------------------------------------ telemetry

    def nodes(self) -> list[NodeInfo]:
        """All nodes that sent telemetry, by name."""
        rows = self._rows(
            "SELECT node, (SELECT min(at_utc_s) FROM telemetry t WHERE t.node = n.id), "
            "(SELECT max(at_utc_s) FROM telemetry t WHERE t.node = n.id) FROM nodes n ORDER BY node LIMIT ?",
            (MAX_NODES,),
        )
        return [NodeInfo(*row) for row in rows]

    def signals(self, node: str) -> list[SignalInfo]:
        """What the node sent, by name: unit, scope and provenance as in the latest message that had it."""
        found: dict[str, SignalInfo] = {}
        for of_set, first_s, last_s in self._sets(node):
            for name, unit, scope, provenance in self._signals(of_set):
                if (known := found.get(name)) is None:
                    found[name] = SignalInfo(name, unit, scope, provenance, first_s, last_s)
                elif first_s < known.first_utc_s:
                    found[name] = SignalInfo(name, known.unit, known.scope, known.provenance, first_s, known.last_utc_s)
        return [found[name] for name in sorted(found)]

    def trend(
        self, node: str, signal: str, since_utc_s: float, until_utc_s: float, points: int = 600
    ) -> archive_trend.Trend | None:
        """At most `points` buckets of a signal, by when its messages were made; None where the node never sent it.

        Raises: ValueError for times or points that cannot be.
        """
        if not (math.isfinite(since_utc_s) and math.isfinite(until_utc_s) and since_utc_s < until_utc_s):
            raise ValueError(f"from {since_utc_s} to {until_utc_s} is no span of time: give since before until")
        if not 1 <= points <= MAX_POINTS:
            raise ValueError(f"{points} points: give 1 to {MAX_POINTS}")
        places = []  # (set, place in it, signal), the latest first
        for of_set, *_ in self._sets(node):
            for place, each in enumerate(self._signals(of_set)):
                if each[0] == signal:
                    places.append((of_set, place, each))
                    break
        if not places:
            return None
        _, unit, scope, provenance = places[0][2]
        same = [(of_set, place, each[3]) for of_set, place, each in places if each[1] == unit]
        at_s, values, ok, used = self._values(node, same, since_utc_s, until_utc_s)
        cut = len(at_s) > MAX_TREND_ROWS
        if cut:
            at_s, values, ok = at_s[-MAX_TREND_ROWS:], values[-MAX_TREND_ROWS:], ok[-MAX_TREND_ROWS:]
        found = archive_trend.down(at_s, values, ok, since_utc_s, until_utc_s, points)
        provenances = tuple(sorted({kind for of_set, _, kind in same if of_set in used}))
        others = tuple(sorted({each[1] for *_, each in places} - {unit}))
        return archive_trend.Trend(
            node, signal, since_utc_s, until_utc_s, unit, scope, provenance, provenances, others, found.bucket_s, cut,
            *(found.at_utc_s, found.min, found.max, found.mean, found.last, found.count, found.bad),
        )  # fmt: skip

    def _values(
        self, node: str, places: list[tuple[int, int, str]], since_s: float, until_s: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, set[int]]:
        """Rising times, values, whether they are ok, and the sets they came in. Only the signal's 8 bytes of a row are taken."""
        place_of = {of_set: place for of_set, place, _ in places}
        marks = ", ".join(f"({of_set}, {place})" for of_set, place in place_of.items())
        sql = (
            f"WITH places (signals, place) AS (VALUES {marks}) "
            "SELECT t.at_utc_s, t.signals, substr(t.vals, 1 + 8 * p.place, 8), substr(t.codes, 1 + p.place, 1) "
            "FROM telemetry t CROSS JOIN places p ON p.signals = t.signals "
            "WHERE t.node = (SELECT id FROM nodes WHERE node = ?) AND t.at_utc_s >= ? AND t.at_utc_s <= ? "
            "ORDER BY t.at_utc_s DESC LIMIT ?"
        )
        times, blobs, codes, used = [], [], [], set()
        with self._connection() as db:
            for at_s, of_set, value, code in db.execute(sql, (node, since_s, until_s, MAX_TREND_ROWS + 1)):
                if not isinstance(value, bytes) or len(value) != 8:
                    raise _Impossible("a row is shorter than its signals")
                times.append(at_s)
                blobs.append(value)
                codes.append(OK_CODE if not code else code[0])
                used.add(of_set)
        values = np.frombuffer(b"".join(blobs), "<f8")[::-1]
        ok = (np.array(codes, np.uint8)[::-1] == OK_CODE) & ~np.isnan(values)
        return np.array(times, np.float64)[::-1], values, ok, used

    def _sets(self, node: str) -> list[tuple[int, float, float]]:
        """(set, first, last) of a node, the latest first."""
        return self._rows(
            "SELECT signals, first_utc_s, last_utc_s FROM node_sets WHERE node = (SELECT id FROM nodes WHERE node = ?) "
            "ORDER BY last_utc_s DESC, signals DESC LIMIT ?",
            (node, MAX_SETS),
        )

    def _read_signals(self, of_set: int) -> tuple[Signal, ...]:
        rows = self._rows("SELECT signals FROM signal_sets WHERE id = ?", (of_set,))
        try:
            return signals_of(rows[0][0])
        except (ValueError, IndexError, TypeError, RecursionError) as error:
            raise ArchiveDamaged(self.file, f"set of signals {of_set}: {error}") from None

    def page(self, sql: str, values: Sequence = ()) -> list[tuple]:
        """All rows of a question that has its own LIMIT, for archive_export.py."""
        return self._rows(sql, values)

    def signals_of_set(self, of_set: int) -> tuple[Signal, ...]:
        """(name, unit, scope, provenance) of the samples of messages of this set."""
        return self._signals(of_set)

    def summary(self) -> dict[str, dict]:
        """Rows of each table, and between when they came: {"rows", "first_utc_s", "last_utc_s"}; reads whole indexes."""
        found = {}
        for table, at in archive_schema.TIMES.items():
            rows, first_s, last_s = self._rows(f"SELECT count(*), min({at}), max({at}) FROM {table}")[0]
            found[table] = {"rows": rows, "first_utc_s": first_s, "last_utc_s": last_s}
        return found

    # ------------------------------------------------------------ records

    def events(
        self,
        since_utc_s: float | None = None,
        until_utc_s: float | None = None,
        lines: int = LINES,
        node: str | None = None,
        severity: str | None = None,
        text: str | None = None,
    ) -> list[EventRecord]:
        """The latest `lines` events, oldest first; of at least `severity`; `text` is in their kind or text, in any case."""
        where, values = [], []
        if node is not None:
            where, values = [*where, "node = ?"], [*values, node]
        if severity is not None:
            if severity not in SEVERITIES:
                raise ValueError(f"{severity[:40]!r} is no severity: give one of {', '.join(SEVERITIES)}")
            where, values = [*where, "severity >= ?"], [*values, SEVERITIES.index(severity)]
        if text is not None:
            where = [*where, "instr(lower(kind || ' ' || text), lower(?)) > 0"]
            values = [*values, text.encode("utf-8", "backslashreplace").decode()]
        columns = "at_utc_s, source, node, generated_utc_s, severity, kind, text"
        rows = self._latest("events", columns, "at_utc_s", since_utc_s, until_utc_s, lines, where, values)
        return [self._event(row) for row in rows]

    def commands(
        self,
        since_utc_s: float | None = None,
        until_utc_s: float | None = None,
        lines: int = LINES,
        node: str | None = None,
    ) -> list[CommandRecord]:
        """The latest `lines` commands as they stand, oldest first."""
        where, values = (["node = ?"], [node]) if node is not None else ([], [])
        rows = self._latest("commands", "*", "at_utc_s", since_utc_s, until_utc_s, lines, where, values)
        return [CommandRecord(*row[:5], self._arguments(row[5]), *row[6:]) for row in rows]

    def _event(self, row: tuple) -> EventRecord:
        at_s, source, node, generated_s, severity, kind, text = row
        if severity not in range(len(SEVERITIES)):
            raise ArchiveDamaged(self.file, f"an event of severity {severity!r}")
        return EventRecord(at_s, source, wire.Event(node, generated_s, SEVERITIES[severity], kind, text))

    def _arguments(self, text: str) -> dict[str, str]:
        try:
            return {str(name): str(value) for name, value in json.loads(text).items()}
        except (ValueError, AttributeError, RecursionError, TypeError):
            raise ArchiveDamaged(self.file, "a command's arguments are no JSON object") from None

    def alarms(
        self,
        since_utc_s: float | None = None,
        until_utc_s: float | None = None,
        lines: int = LINES,
        node: str | None = None,
    ) -> list[AlarmRecord]:
        """The latest `lines` changes of alarms, oldest first."""
        where, values = (["node = ?"], [node]) if node is not None else ([], [])
        columns = "id, at_utc_s, node, signal, level, severity, state, value, text, who"
        rows = self._latest("alarms", columns, "at_utc_s", since_utc_s, until_utc_s, lines, where, values)
        return [AlarmRecord(*row) for row in rows]

    def requests(
        self, since_utc_s: float | None = None, until_utc_s: float | None = None, lines: int = LINES
    ) -> list[RequestRecord]:
        """The latest `lines` requests as they stand, oldest first."""
        return [
            RequestRecord(*row)
            for row in self._latest("requests", "*", "at_utc_s", since_utc_s, until_utc_s, lines, [], [])
        ]

    def tokens(self, request: str, lines: int = MAX_LINES) -> list[TokenRecord]:
        """The first `lines` tokens of a request, in their order."""
        rows = self._rows("SELECT * FROM tokens WHERE request = ? ORDER BY idx LIMIT ?", (request, _lines(lines)))
        return [TokenRecord(*row) for row in rows]

    def _latest(
        self,
        table: str,
        columns: str,
        at: str,
        since_s: float | None,
        until_s: float | None,
        lines: int,
        where: list,
        values: list,
    ) -> list[tuple]:
        span = (ALWAYS_S[0] if since_s is None else since_s, ALWAYS_S[1] if until_s is None else until_s)
        filters = " AND ".join([f"{at} >= ?", f"{at} <= ?", *where])
        rows = self._rows(
            f"SELECT {columns} FROM {table} WHERE {filters} ORDER BY {at} DESC, rowid DESC LIMIT ?",
            (*span, *values, _lines(lines)),
        )
        return rows[::-1]

    # ------------------------------------------------------------ all messages

    def messages(self, since_utc_s: float | None = None, until_utc_s: float | None = None) -> Iterator[Kept]:
        """Telemetry, births and events that came in that time, in the order of arrival; read page by page as they are taken."""
        span = (
            ALWAYS_S[0] if since_utc_s is None else since_utc_s,
            ALWAYS_S[1] if until_utc_s is None else until_utc_s,
        )
        telemetry = self._pages(
            f"SELECT t.received_utc_s, t.id, n.node, r.run, t.signals, {ROW} FROM telemetry t CROSS JOIN nodes n ON n.id = t.node "
            "CROSS JOIN runs r ON r.id = t.run WHERE t.received_utc_s >= ?1 AND t.received_utc_s <= ?2 "
            "AND (t.received_utc_s > ?1 OR t.id > ?3) ORDER BY t.received_utc_s, t.id LIMIT ?4",
            span,
        )
        births = self._pages(
            "SELECT at_utc_s, id, node, birth FROM births WHERE at_utc_s >= ?1 AND at_utc_s <= ?2 "
            "AND (at_utc_s > ?1 OR id > ?3) ORDER BY at_utc_s, id LIMIT ?4",
            span,
        )
        events = self._pages(
            "SELECT at_utc_s, id, source, node, generated_utc_s, severity, kind, text FROM events "
            "WHERE at_utc_s >= ?1 AND at_utc_s <= ?2 AND (at_utc_s > ?1 OR id > ?3) ORDER BY at_utc_s, id LIMIT ?4",
            span,
        )
        parts = (
            ((row[:2], self._telemetry, row) for row in telemetry),
            ((row[:2], self._birth, row) for row in births),
            ((row[:2], self._kept_event, row) for row in events),
        )
        for _, made, row in heapq.merge(*parts, key=lambda part: part[0]):
            yield made(row)

    def _pages(self, sql: str, span: tuple[float, float]) -> Iterator[tuple]:
        """Rows that begin with (time, id), in that order; no connection is held between pages."""
        since_s, last = span[0], -1
        while True:
            rows = self._rows(sql, (since_s, span[1], last, PAGE_ROWS))
            yield from rows
            if len(rows) < PAGE_ROWS:
                return
            since_s, last = rows[-1][:2]

    def _telemetry(self, row: tuple) -> Kept:
        at_s, _, node, run, of_set, *rest = row
        try:
            return Kept(at_s, node, unpack(node, run, self._signals(of_set), rest))
        except (ValueError, TypeError) as error:
            raise error if isinstance(error, ArchiveDamaged) else ArchiveDamaged(self.file, error) from None

    def _birth(self, row: tuple) -> Kept:
        at_s, _, node, text = row
        try:
            return Kept(at_s, node, wire.build(wire.Birth, json.loads(text)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ArchiveDamaged(self.file, f"a birth of {node}: {error}") from None

    def _kept_event(self, row: tuple) -> Kept:
        record = self._event((row[0], *row[2:]))
        return Kept(record.at_utc_s, record.event.node, record.event, record.source)


class _Impossible(Exception):
    """A row says what no writer wrote."""


def _lines(lines: int) -> int:
    if not 1 <= lines <= MAX_LINES:
        raise ValueError(f"{lines} lines: give 1 to {MAX_LINES}")
    return lines
