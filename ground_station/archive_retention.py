"""Removes what an archive need not keep any more, in steps so short that writing goes on between them.

Leaves out: when steps are taken (archive.py, on its one writing thread), and anything about a disk that is full for another reason.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from ground_station.archive_records import DAY_S, Retention
from ground_station.archive_schema import TIMES

STEP_ROWS = 400
STEP_PAGES = 400  # given back to the disk in one step
KEPT_PAGES = 100  # free ones that are left where they are, for what is written next
SPARE = 64  # one part in so many is freed beyond the limit, so that the log need not be cut back all the time
LOOK_ROWS = 4  # removed between two looks at the room
BUDGET_S = 0.05
# A set's last use is noted once in a minute (archive.py): it is kept for longer than any telemetry that needs it.
SET_MARGIN_S = 600.0


def used_bytes(db: sqlite3.Connection) -> int:
    """Bytes of the file that hold something; free pages are on their way back to the disk."""
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def disk_bytes(file: Path) -> int:
    """Bytes on disk of the file, its log and the log's index."""
    found = 0
    for part in (file, Path(f"{file}-wal"), Path(f"{file}-shm")):
        try:
            found += part.stat().st_size
        except FileNotFoundError:
            pass
    return found


def steps(db: sqlite3.Connection, file: Path, retention: Retention, now_utc_s: float) -> int:
    """Removes rows for at most some BUDGET_S; returns how many. Call it again later for the rest.  Raises: sqlite3.Error."""
    ends_s, removed, room = time.monotonic() + BUDGET_S, 0, None
    if disk_bytes(file) > retention.disk_bytes:
        # The log goes first: it is only cut back when no reader needs it. What it still has is no room for the file.
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        log = disk_bytes(file) - file.stat().st_size
        if used_bytes(db) + log > retention.disk_bytes:
            room = retention.disk_bytes - retention.disk_bytes // SPARE - log
    while True:
        count = _too_old(db, retention, now_utc_s)
        if not count and room is not None and used_bytes(db) > room:
            count = _too_much(db, room)
        given_back = _give_back(db, file.stat().st_size > retention.disk_bytes)
        removed += count
        if not (count or given_back) or time.monotonic() > ends_s:
            return removed


def _too_old(db: sqlite3.Connection, retention: Retention, now_utc_s: float) -> int:
    if retention.days is None:
        return 0
    before_utc_s = now_utc_s - retention.days * DAY_S
    for table, column in TIMES.items():
        rows = f"SELECT rowid FROM {table} WHERE {column} < ? ORDER BY {column} LIMIT {STEP_ROWS}"
        if count := db.execute(f"DELETE FROM {table} WHERE rowid IN ({rows})", (before_utc_s,)).rowcount:
            return count
    return _unused(db)


def _too_much(db: sqlite3.Connection, room: int) -> int:
    for table, column in TIMES.items():
        if count := _oldest(db, table, column, room):
            return count
    return _unused(db)


def _oldest(db: sqlite3.Connection, table: str, column: str, room: int) -> int:
    """Removes the oldest rows until what is left has room, at most STEP_ROWS; one may be as large as a hundred others."""
    rows = db.execute(f"SELECT rowid FROM {table} ORDER BY {column} LIMIT {STEP_ROWS}").fetchall()
    db.execute("BEGIN IMMEDIATE")
    count = 0
    for row in rows:
        db.execute(f"DELETE FROM {table} WHERE rowid = ?", row)
        count += 1
        if count % LOOK_ROWS == 0 and used_bytes(db) <= room:
            break
    db.execute("COMMIT")
    return count


def _unused(db: sqlite3.Connection) -> int:
    """Sets of signals that no telemetry in the archive needs: of hostile nodes there may be many."""
    oldest = db.execute("SELECT min(received_utc_s) FROM telemetry").fetchone()[0]
    if oldest is None:
        return 0
    rows = f"SELECT node, signals FROM node_sets WHERE last_utc_s < ? LIMIT {STEP_ROWS}"
    count = db.execute(f"DELETE FROM node_sets WHERE (node, signals) IN ({rows})", (oldest - SET_MARGIN_S,)).rowcount
    if count:
        db.execute("DELETE FROM signal_sets WHERE id NOT IN (SELECT signals FROM node_sets)")
    return count


def _give_back(db: sqlite3.Connection, all_of_them: bool) -> bool:
    """Some free pages back to the disk; False when there are none to speak of, or none where `all_of_them` are wanted back."""
    free = db.execute("PRAGMA freelist_count").fetchone()[0]
    if free == 0 or (free < KEPT_PAGES and not all_of_them):
        return False
    # executescript, because execute takes a single step of this statement, and that is a single page
    db.executescript(f"PRAGMA incremental_vacuum({STEP_PAGES})")
    return True
