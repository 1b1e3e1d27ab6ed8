"""Keeps what happens in a fleet in an SQLite file as it arrives: telemetry, births, events, commands, requests, tokens, alarms.

Whoever hands something over never waits: a bounded queue takes it, and one thread writes the queue in one transaction, on disk
within about half a second (write-ahead log, synchronous=FULL), so a power cut or kill -9 loses at most the last second. What cannot
be kept is counted by kind. A disk that refuses is said once and tried again until it takes what is queued.
Leaves out: tables (archive_schema.py), rows and their keys (archive_rows.py, archive_telemetry.py), what is removed when
(archive_retention.py), and reading (archive_read.py).
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ground_station import archive_retention, archive_schema
from ground_station.archive_records import (
    SEVERITIES,
    AlarmRecord,
    ArchiveDamaged,
    ArchiveError,
    CommandRecord,
    Counts,
    RequestRecord,
    Retention,
    TokenRecord,
)
from ground_station.archive_rows import Rows
from ground_station.archive_telemetry import CannotKeep, Packed, Signal, clean, pack
from ground_station.fleet import Taken
from node_agent import wire

log = logging.getLogger("spacemoe.archive")
PERIOD_S = 0.4  # between the starts of two commits
TRY_AGAIN_S = 1.0
QUEUE_BYTES = 64_000_000  # some minutes of 200 nodes while a disk refuses
KNOWN_SIGNALS = 100_000  # in sets that are remembered
TEND_EVERY_S, TEND_AGAIN_S = 2.0, 60.0  # looking for what can go; again after that failed


class Archive:
    """The one writer of the archive in `folder`; a context manager. Its methods may be called from any thread and never wait
    for the disk.

    `say` gets a line when the disk refuses and when it takes again; by default they are logged.
    """

    def __init__(
        self, folder: Path, retention: Retention = Retention(), say: Callable[[str], None] | None = None
    ) -> None:
        """Opens the archive or makes it.  Raises: ArchiveError (newer, damaged, of something else, written by another), OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / archive_schema.FILE
        self._retention, self._to_say = retention, say or log.warning
        self._hold = archive_schema.hold(folder)
        try:
            self._db = archive_schema.open_to_write(self.file, retention.disk_bytes // 8)
            try:
                self._next_id = 1 + self._last_id()
            except sqlite3.DatabaseError as error:
                self._db.close()
                raise archive_schema.refusal(self.file, error) from None
        except BaseException:
            os.close(self._hold)
            raise
        self._lock = threading.Lock()
        self._wake, self._settled = threading.Event(), threading.Condition(self._lock)
        self._queue: list[tuple[str, object, int]] = []
        self._queue_bytes = 0
        self._sets: dict[tuple[Signal, ...], tuple[Signal, ...]] = {}
        self._set_signals = 0
        self._offered = self._done = 0  # how many were queued, and how many of them need no more writing
        self._written, self._dropped, self._refused = Counter(), Counter(), Counter()
        self._repeated = self._removed = self._failures = 0
        self._trouble: str | None = None
        self._closing = self._closed = False
        self._tend_at_s = 0.0
        self._rows = Rows(self._db)
        self._thread = threading.Thread(target=self._run, name="archive", daemon=True)
        self._thread.start()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is queued, and lets go of the file. What the disk refuses then is counted as dropped and said."""
        with self._lock:
            if self._closed:
                return
            self._closed = self._closing = True
        self._wake.set()
        self._thread.join()
        self._db.close()
        os.close(self._hold)

    @property
    def counts(self) -> Counts:
        with self._lock:
            return Counts(
                *(dict(each) for each in (self._written, self._dropped, self._refused)),
                self._repeated,
                self._removed,
                self._offered - self._done,
                self._failures,
                self._trouble,
            )

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Waits until all that was handed over before is on disk; False when that takes longer."""
        with self._lock:
            goal = self._offered
            self._wake.set()
            return self._settled.wait_for(lambda: self._done >= goal, timeout_s)

    # ------------------------------------------------------------ what is handed over, from any thread

    def telemetry(self, node: str, taken: Taken) -> None:
        """A message that came for the first time; one that is there already (node, run, number) is kept once."""
        try:
            packed = pack(node, taken)
        except CannotKeep:
            self._refuse("telemetry")
            return
        self._offer("telemetry", packed, packed.weight)

    def birth(self, node: str, birth: wire.Birth, at_utc_s: float) -> None:
        text = wire.encode(birth).decode()  # ASCII
        self._offer("birth", (at_utc_s, clean(node), text), 500 + len(text))

    def event(self, event: wire.Event, at_utc_s: float, source: str = "node") -> None:
        """`source`: "node", or "ground" where the ground station found it."""
        if event.severity not in SEVERITIES:
            self._refuse("event")
            return
        severity = SEVERITIES.index(event.severity)
        self._record("event", at_utc_s, source, event.node, event.generated_at, severity, event.kind, event.text)

    def command(self, record: CommandRecord) -> None:
        """A command as it stands now, in place of what was kept of that id."""
        arguments = json.dumps(dict(record.arguments))
        self._record(
            *("command", record.id, record.who, record.at_utc_s, record.node, record.name, arguments),
            *(record.state, record.text, record.done_utc_s),
        )

    def request(self, record: RequestRecord) -> None:
        """A request as it stands now, in place of what was kept of it."""
        self._record(
            *("request", record.request, record.kind, record.at_utc_s, record.prompt_tokens, record.tokens),
            *(record.state, record.energy_j, record.energy_scope, record.text),
        )

    def token(self, record: TokenRecord) -> None:
        self._record(
            *("token", record.request, record.index, record.token_id, record.piece, record.at_utc_s, record.total_ms),
            *(record.trunk_ms, record.select_ms, record.codec_ms, record.wire_ms, record.expert_ms),
            *(record.sent_bytes, record.received_bytes, record.rungs),
        )

    def alarm(self, record: AlarmRecord) -> None:
        """A change of an alarm; all of them are kept."""
        self._record(
            *("alarm", record.id, record.at_utc_s, record.node, record.signal, record.level, record.severity),
            *(record.state, record.value, record.text, record.who),
        )

    def _record(self, kind: str, *row: object) -> None:
        row = tuple(clean(part) if isinstance(part, str) else part for part in row)
        self._offer(kind, row, 600 + sum(len(part) for part in row if isinstance(part, str)))

    def _refuse(self, kind: str) -> None:
        with self._lock:
            self._refused[kind] += 1

    def _offer(self, kind: str, item: object, weight: int) -> None:
        with self._lock:
            if isinstance(item, Packed) and item.signals not in self._sets:
                weight += 300 * len(item.signals)
            if self._closed or self._queue_bytes + weight > QUEUE_BYTES:
                self._dropped[kind] += 1
                return
            if isinstance(item, Packed):
                item = (self._next_id, item.node, self._shared(item.signals), item.row)
            elif kind in ("birth", "event"):
                item = (self._next_id, *item)
            self._next_id += 1
            self._offered += 1
            self._queue.append((kind, item, weight))
            self._queue_bytes += weight

    def _shared(self, signals: tuple[Signal, ...]) -> tuple[Signal, ...]:
        """The one copy of a set that all messages in the queue share."""
        if (known := self._sets.get(signals)) is not None:
            return known
        self._set_signals += len(signals)
        if self._set_signals > KNOWN_SIGNALS:
            self._sets, self._set_signals = {}, len(signals)
        self._sets[signals] = signals
        return signals

    # ------------------------------------------------------------ the writing thread

    def _last_id(self) -> int:
        tables = ("telemetry", "births", "events")
        return max(self._db.execute(f"SELECT coalesce(max(id), 0) FROM {table}").fetchone()[0] for table in tables)

    def _run(self) -> None:
        batch: list[tuple[str, object, int]] = []
        while True:
            self._wake.wait(PERIOD_S if self._trouble is None else TRY_AGAIN_S)
            with self._lock:
                self._wake.clear()
                closing = self._closing
                batch += self._queue
                self._queue = []
            if self._wrote(batch):
                batch = []
                self._tend()
            elif closing:
                self._give_up(batch)
            if closing:
                return

    def _wrote(self, batch: list[tuple[str, object, int]]) -> bool:
        """Whether all of `batch` is settled: on disk, or known to be unfit for it."""
        if not batch:
            return True
        try:
            written, repeated, refused = self._commit(batch)
        except Exception as error:  # the ground station goes on whatever befalls its archive
            self._undo()
            self._tell(error)
            return False
        with self._lock:
            self._written.update(written)
            self._refused.update(refused)
            self._repeated += repeated
            self._done += len(batch)
            self._queue_bytes -= sum(weight for *_, weight in batch)
            self._settled.notify_all()
            recovered, self._trouble = self._trouble is not None, None
        if recovered:
            self._say(f"{self.file} is written again")
        return True

    def _commit(self, batch: list[tuple[str, object, int]]) -> tuple[Counter, int, Counter]:
        """(written, repeated, refused) of one transaction.  Raises: sqlite3.Error and others, where it must be tried again."""
        self._db.execute("BEGIN IMMEDIATE")
        refused = Counter()
        try:
            written, repeated = self._rows.insert(batch)
        except Exception as error:
            if not _unfit(error):
                raise
            # One of them: each by itself, so that it takes no other with it.
            self._undo()
            self._db.execute("BEGIN IMMEDIATE")
            written, repeated = Counter(), 0
            for each in batch:
                self._db.execute("SAVEPOINT one")
                try:
                    one, again = self._rows.insert([each])
                    written, repeated = written + one, repeated + again
                except Exception as error:
                    if not _unfit(error):
                        raise
                    self._db.execute("ROLLBACK TO one")
                    self._rows.forget()
                    refused[each[0]] += 1
                    log.debug("%s refused: %s", each[0], error)
                self._db.execute("RELEASE one")
        self._db.execute("COMMIT")
        return written, repeated, refused

    def _tend(self) -> None:
        """Removes what is too old or too much, a little in each turn."""
        if time.monotonic() < self._tend_at_s:
            return
        try:
            removed = archive_retention.steps(self._db, self.file, self._retention, time.time())
        except Exception as error:
            self._undo()
            self._tell(error)
            self._tend_at_s = time.monotonic() + TEND_AGAIN_S
            return
        if not removed:
            self._tend_at_s = time.monotonic() + TEND_EVERY_S
        else:
            self._rows.forget()  # a set that nothing used may be gone
            with self._lock:
                self._removed += removed

    def _undo(self) -> None:
        self._rows.forget()
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except sqlite3.Error as error:
            log.debug("rollback: %s", error)

    def _tell(self, error: Exception) -> None:
        """Counts a failure; it is said when it is the first or another one."""
        if isinstance(error, sqlite3.Error):
            refusal = archive_schema.refusal(self.file, error)
            damaged = isinstance(refusal, ArchiveDamaged)
            text = str(refusal if damaged else f"{self.file} cannot be written ({error}): free space on its disk")
        else:
            text = f"{self.file} cannot be written ({type(error).__name__}: {error})"
        with self._lock:
            self._failures += 1
            said, self._trouble = self._trouble, text
        if said != text:
            self._say(f"{text}; what comes is queued and tried again")

    def _say(self, text: str) -> None:
        try:
            self._to_say(text)
        except Exception:
            log.exception("nobody could be told: %s", text)

    def _give_up(self, batch: list[tuple[str, object, int]]) -> None:
        with self._lock:
            lost = Counter(kind for kind, *_ in batch)
            self._dropped.update(lost)
            self._done += len(batch)
            self._settled.notify_all()
        self._say(str(ArchiveError(self.file, f"was closed without its last {len(batch)} records")))


def _unfit(error: Exception) -> bool:
    """Whether it is a record that cannot be written, and not the file that cannot be."""
    if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
        return False
    return isinstance(error, (sqlite3.Error, OverflowError, TypeError, ValueError))
