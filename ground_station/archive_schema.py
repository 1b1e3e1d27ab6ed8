"""The tables of an archive (SQLite), how a file is opened to write or to read, and what is said of one that cannot be.

    archive.sqlite, user_version 1. Times are UTC seconds. Row ids of telemetry, births and events count up together, in the order
    of arrival. telemetry: one row per message; `signals` names its samples in the order of `vals`, float64 little-endian, NaN: none;
    `codes`: a byte per sample, index in archive_telemetry.VALIDITIES, NULL: all ok; `offsets`: seconds of each sample's stamp after
    the message's, float32 (float64 where float32 cannot), NULL: all 0; `session` = bd_seq - run; `ground_utc_s`: when it was made
    by the ground station's clock; `at_utc_s`: the best of its times.

Leaves out: rows (archive_telemetry.py, archive.py, archive_read.py) and removing them (archive_retention.py).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from ground_station.archive_records import ArchiveBusy, ArchiveDamaged, ArchiveError

VERSION = 1
APPLICATION_ID = 0x53504D4F  # "SPMO"
FILE = "archive.sqlite"
LOCK = "archive.lock"
BUSY_S = 1.0
PAGE_BYTES = 4096  # SQLite's default
# The log is copied into the file when it is so large: four times SQLite's default, so pages that change often are written less often.
LOG_BYTES = 16_000_000

TABLES = """
CREATE TABLE nodes (id INTEGER PRIMARY KEY, node TEXT NOT NULL UNIQUE);
CREATE TABLE runs (id INTEGER PRIMARY KEY, node INTEGER NOT NULL, run INTEGER NOT NULL, UNIQUE (node, run));
CREATE TABLE signal_sets (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, signals TEXT NOT NULL);
CREATE TABLE node_sets (
    node INTEGER NOT NULL, signals INTEGER NOT NULL, first_utc_s REAL NOT NULL, last_utc_s REAL NOT NULL,
    PRIMARY KEY (node, signals)
) WITHOUT ROWID;
CREATE TABLE telemetry (
    id INTEGER PRIMARY KEY, node INTEGER NOT NULL, run INTEGER NOT NULL, number INTEGER NOT NULL, session INTEGER NOT NULL,
    seq INTEGER NOT NULL, generated_utc_s REAL NOT NULL, ground_utc_s REAL, uncertainty_s REAL, received_utc_s REAL NOT NULL,
    late INTEGER NOT NULL, signals INTEGER NOT NULL, vals BLOB NOT NULL, codes BLOB, offsets BLOB,
    at_utc_s REAL AS (coalesce(ground_utc_s, CASE late WHEN 0 THEN received_utc_s ELSE generated_utc_s END)) VIRTUAL
);
CREATE UNIQUE INDEX telemetry_once ON telemetry (run, number) WHERE number <> 0;
CREATE INDEX telemetry_of_node ON telemetry (node, at_utc_s);
CREATE INDEX telemetry_came ON telemetry (received_utc_s);
CREATE TABLE births (id INTEGER PRIMARY KEY, at_utc_s REAL NOT NULL, node TEXT NOT NULL, birth TEXT NOT NULL);
CREATE INDEX births_came ON births (at_utc_s);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, at_utc_s REAL NOT NULL, source TEXT NOT NULL, node TEXT NOT NULL, generated_utc_s REAL NOT NULL,
    severity INTEGER NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL
);
CREATE INDEX events_came ON events (at_utc_s);
CREATE TABLE commands (
    id TEXT PRIMARY KEY, who TEXT NOT NULL, at_utc_s REAL NOT NULL, node TEXT NOT NULL, name TEXT NOT NULL, arguments TEXT NOT NULL,
    state TEXT NOT NULL, text TEXT NOT NULL, done_utc_s REAL
);
CREATE INDEX commands_came ON commands (at_utc_s);
CREATE TABLE requests (
    request TEXT PRIMARY KEY, kind TEXT NOT NULL, at_utc_s REAL NOT NULL, prompt_tokens INTEGER NOT NULL, tokens INTEGER NOT NULL,
    state TEXT NOT NULL, energy_j REAL, energy_scope TEXT NOT NULL, text TEXT NOT NULL
);
CREATE INDEX requests_came ON requests (at_utc_s);
CREATE TABLE tokens (
    request TEXT NOT NULL, idx INTEGER NOT NULL, token_id INTEGER NOT NULL, piece TEXT NOT NULL, at_utc_s REAL NOT NULL, total_ms REAL,
    trunk_ms REAL, select_ms REAL, codec_ms REAL, wire_ms REAL, expert_ms REAL, sent_bytes INTEGER NOT NULL,
    received_bytes INTEGER NOT NULL, rungs INTEGER NOT NULL, PRIMARY KEY (request, idx)
);
CREATE INDEX tokens_came ON tokens (at_utc_s);
CREATE TABLE alarms (
    change INTEGER PRIMARY KEY, id TEXT NOT NULL, at_utc_s REAL NOT NULL, node TEXT NOT NULL, signal TEXT NOT NULL, level TEXT NOT NULL,
    severity TEXT NOT NULL, state TEXT NOT NULL, value REAL, text TEXT NOT NULL, who TEXT NOT NULL
);
CREATE INDEX alarms_came ON alarms (at_utc_s);
"""
# With the column of their time, the first to go when room is wanted first.
TIMES = {
    "telemetry": "received_utc_s",
    "tokens": "at_utc_s",
    "births": "at_utc_s",
    "events": "at_utc_s",
    "requests": "at_utc_s",
    "alarms": "at_utc_s",
    "commands": "at_utc_s",
}


class ArchiveEmpty(ArchiveError):
    """A database without a table: an archive that was only begun."""


def file_of(path: Path) -> Path:
    """The archive's file, where `path` is it or its folder."""
    return path / FILE if path.is_dir() or path.suffix != Path(FILE).suffix else path


def hold(folder: Path) -> int:
    """A lock on the archive in `folder`, as an open file that holds it until it is closed.  Raises: ArchiveBusy, OSError."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ArchiveBusy(
            folder / FILE, "is written by another ground station: stop it, or name another folder"
        ) from None
    return lock


def open_to_write(file: Path, log_bytes: int = LOG_BYTES) -> sqlite3.Connection:
    """A connection for the one writer, which may move between threads; the tables are made where the file is new.

    `log_bytes`: the log is to be no larger, as far as readers let it.

    Raises: ArchiveError, and ArchiveDamaged for what is no database or lacks tables: nothing of it is changed then.
    """
    new = not file.exists() or file.stat().st_size == 0
    try:
        db = sqlite3.connect(file, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    except sqlite3.OperationalError as error:
        raise ArchiveError(file, f"cannot be opened ({error}): name a folder that may be written") from None
    try:
        if not new:
            try:
                check(db, file)
            except ArchiveEmpty:
                new = True  # whoever began it was cut short
        db.execute("PRAGMA busy_timeout = %d" % (BUSY_S * 1000))
        if new:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table
            if db.execute("PRAGMA auto_vacuum").fetchone()[0] != 2:
                db.execute("VACUUM")  # it was begun by somebody without
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise ArchiveError(file, f"is on a disk without write-ahead logs ({mode}): name a folder on a local disk")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {min(log_bytes, LOG_BYTES) // PAGE_BYTES}")
        db.execute(f"PRAGMA journal_size_limit = {min(log_bytes, LOG_BYTES)}")
        if new:
            db.executescript(
                f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; PRAGMA application_id = {APPLICATION_ID}; COMMIT;"
            )
        return db
    except sqlite3.OperationalError as error:
        db.close()
        raise ArchiveError(
            file, f"cannot be written ({error}): free space on the disk, or name another folder"
        ) from None
    except sqlite3.DatabaseError as error:
        db.close()
        raise ArchiveDamaged(file, error) from None
    except BaseException:
        db.close()
        raise


def open_to_read(file: Path) -> sqlite3.Connection:
    """A connection that cannot write, also while another process writes; it may move between threads.  Raises: ArchiveError."""
    if not file.is_file():
        raise ArchiveError(file, "is not there: name the folder that `spacemoe up` or `spacemoe demo` wrote")
    log = Path(f"{file}-wal")
    # Where nothing may be written there can be no index of the log; without a log none is needed.
    fixed = not os.access(file.parent, os.W_OK) and not (log.exists() and log.stat().st_size)
    uri = f"{file.absolute().as_uri()}?mode=ro{'&immutable=1' if fixed else ''}"
    try:
        db = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    except sqlite3.OperationalError as error:
        raise ArchiveError(file, f"cannot be opened ({error}): check who may read it") from None
    try:
        check(db, file)
        db.execute("PRAGMA query_only = ON")
        return db
    except BaseException:
        db.close()
        raise


def check(db: sqlite3.Connection, file: Path) -> None:
    """That the file is an archive this version knows.  Raises: ArchiveError, ArchiveDamaged."""
    try:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    except sqlite3.DatabaseError as error:
        raise refusal(file, error) from None
    if application == 0 and not tables:
        raise ArchiveEmpty(file, "holds nothing yet: start the ground station that writes it, and try again")
    if application != APPLICATION_ID:
        raise ArchiveError(file, "is a database of something else: name an archive, or another folder")
    if version > VERSION:
        raise ArchiveError(
            file, f"has schema {version}, written by a newer spacemoe (this one knows {VERSION}): update spacemoe-kit"
        )
    if lost := {*TIMES, "nodes", "runs", "signal_sets", "node_sets"} - tables:
        raise ArchiveDamaged(file, f"no table {min(lost)}")


def refusal(file: Path, error: sqlite3.Error) -> ArchiveError:
    """What to say of an error of the database: damage, or a file that cannot be reached now."""
    if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
        return ArchiveError(file, f"cannot be read now ({error}): try again, and check the disk and who may read it")
    return ArchiveDamaged(file, error)


def damage(file: Path, lines: int = 20) -> list[str]:
    """What PRAGMA integrity_check finds, empty when all is well; reads the whole file.  Raises: ArchiveError."""
    db = open_to_read(file)
    try:
        found = [str(text) for (text,) in db.execute(f"PRAGMA integrity_check({lines})")]
    except sqlite3.DatabaseError as error:
        return [str(error)]
    finally:
        db.close()
    return [] if found == ["ok"] else found
