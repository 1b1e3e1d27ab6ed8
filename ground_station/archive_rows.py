"""Rows of an archive as they are written: the statements, and the keys of nodes, runs and sets of signals, which are kept once.

Leaves out: transactions and what befalls them (archive.py), and how telemetry becomes a row (archive_telemetry.py).
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable

from ground_station.archive_telemetry import Signal, signals_text

SET_NOTED_S = 60.0
KNOWN_RUNS, KNOWN_SETS = 10_000, 1000

INSERTS = {
    "telemetry": "INSERT INTO telemetry (id, node, run, number, session, seq, generated_utc_s, ground_utc_s, uncertainty_s, "
    "received_utc_s, late, vals, codes, offsets, signals) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (run, number) WHERE number <> 0 DO NOTHING",
    "birth": "INSERT INTO births VALUES (?, ?, ?, ?)",
    "event": "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    "alarm": "INSERT INTO alarms (id, at_utc_s, node, signal, level, severity, state, value, text, who) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
}
# (table, key, other columns) of what a later record takes the place of; the row keeps its place, so that one who reads on misses none.
LATEST = {
    "command": ("commands", "id", "who at_utc_s node name arguments state text done_utc_s"),
    "request": ("requests", "request", "kind at_utc_s prompt_tokens tokens state energy_j energy_scope text"),
    "token": (
        *("tokens", "request idx", "token_id piece at_utc_s total_ms trunk_ms select_ms codec_ms wire_ms expert_ms"),
        "sent_bytes received_bytes rungs",
    ),
}
for _kind, (_table, _key, *_rest) in LATEST.items():
    _keys, _columns = _key.split(), " ".join(_rest).split()
    INSERTS[_kind] = (
        f"INSERT INTO {_table} ({', '.join(_keys + _columns)}) VALUES ({', '.join('?' * len(_keys + _columns))}) "
        f"ON CONFLICT ({', '.join(_keys)}) DO UPDATE SET {', '.join(f'{each} = excluded.{each}' for each in _columns)}"
    )
NOTE_SET = (
    "INSERT INTO node_sets VALUES (?, ?, ?, ?) ON CONFLICT (node, signals) DO UPDATE SET "
    "first_utc_s = min(first_utc_s, excluded.first_utc_s), last_utc_s = max(last_utc_s, excluded.last_utc_s)"
)


class Rows:
    """Writes into the transaction that is open on `db`, and remembers keys: `forget` them when it is rolled back."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.forget()

    def forget(self) -> None:
        """Keys of a transaction that failed are not there; those of rows that were removed are not either."""
        self._node_ids: dict[str, int] = {}
        self._run_ids: dict[tuple[int, int], int] = {}
        self._set_ids: dict[tuple[Signal, ...], int] = {}
        self._noted_s: dict[tuple[int, int], float] = {}

    def insert(self, batch: list[tuple[str, object, int]]) -> tuple[Counter, int]:
        """(written, repeated) of `batch`."""
        of_kind: dict[str, list] = {}
        for kind, item, _ in batch:
            of_kind.setdefault(kind, []).append(item)
        written, repeated = Counter(), 0
        for kind, items in of_kind.items():
            rows = self._telemetry_rows(items) if kind == "telemetry" else items
            count = self._db.executemany(INSERTS[kind], rows).rowcount
            if kind == "telemetry":
                repeated = len(items) - count
            written[kind] = count if kind == "telemetry" else len(items)
        return written, repeated

    def _telemetry_rows(self, items: list[tuple]) -> Iterable[tuple]:
        rows, notes = [], []
        for key, name, signals, row in items:
            node = self._node_id(name)
            of_set, received_s = self._set_id(signals), row[7]
            rows.append((key, node, self._run_id(node, row[0]), *row[1:], of_set))
            noted_s = self._noted_s.get((node, of_set))
            if noted_s is None or abs(received_s - noted_s) >= SET_NOTED_S:
                self._noted_s[node, of_set] = received_s
                notes.append((node, of_set, received_s, received_s))
        if notes:
            self._db.executemany(NOTE_SET, notes)
        return rows

    def _node_id(self, name: str) -> int:
        if (known := self._node_ids.get(name)) is None:
            self._db.execute("INSERT OR IGNORE INTO nodes (node) VALUES (?)", (name,))
            known = self._db.execute("SELECT id FROM nodes WHERE node = ?", (name,)).fetchone()[0]
            self._node_ids[name] = known
        return known

    def _run_id(self, node: int, run: int) -> int:
        if (known := self._run_ids.get((node, run))) is None:
            self._db.execute("INSERT OR IGNORE INTO runs (node, run) VALUES (?, ?)", (node, run))
            known = self._db.execute("SELECT id FROM runs WHERE node = ? AND run = ?", (node, run)).fetchone()[0]
            if len(self._run_ids) > KNOWN_RUNS:
                self._run_ids.clear()
            self._run_ids[node, run] = known
        return known

    def _set_id(self, signals: tuple[Signal, ...]) -> int:
        if (known := self._set_ids.get(signals)) is None:
            digest, text = signals_text(signals)
            self._db.execute("INSERT OR IGNORE INTO signal_sets (digest, signals) VALUES (?, ?)", (digest, text))
            known = self._db.execute("SELECT id FROM signal_sets WHERE digest = ?", (digest,)).fetchone()[0]
            if len(self._set_ids) > KNOWN_SETS:
                self._set_ids.clear()
                self._noted_s.clear()
            self._set_ids[signals] = known
        return known
