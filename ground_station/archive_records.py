"""What mission control keeps beside telemetry, as records; how long it keeps it; and what can be wrong with an archive.

Leaves out: telemetry, births and events of nodes, whose types are the wire's, and how anything is stored (archive_schema.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ground_station.fleet import Taken
from node_agent.wire import Birth, Event

DAY_S = 86_400.0
MIN_DISK_BYTES = 16_000_000  # below this the write-ahead log alone would fill it
SEVERITIES = ("info", "watch", "warning", "distress", "critical", "severe")  # as in node_agent.wire.Event, rising


class ArchiveError(ValueError):
    """An archive cannot be used; the text says why and what to do. `path`: its file."""

    def __init__(self, path, why: str):
        super().__init__(f"{path} {why}")
        self.path = path


class ArchiveDamaged(ArchiveError):
    """What is on disk is no longer what was written."""

    def __init__(self, path, why: object):
        super().__init__(
            path,
            f"is damaged ({why}): it was left as it is; move it away to start a new one, and get back what can be read by "
            "`sqlite3 DAMAGED .recover | sqlite3 NEW`",
        )


class ArchiveBusy(ArchiveError, RuntimeError):
    """Another process writes this archive."""


@dataclass(frozen=True)
class Retention:
    """What is removed: older than `days` (None: nothing), and the oldest, telemetry first, beyond `disk_bytes` (log included)."""

    days: float | None = 30.0
    disk_bytes: int = 4_000_000_000

    def __post_init__(self) -> None:
        if self.days is not None and not 0 < self.days < 1e5:
            raise ValueError(f"retention of {self.days} days: give a number above 0, or None to keep all")
        if self.disk_bytes < MIN_DISK_BYTES:
            raise ValueError(f"a disk limit of {self.disk_bytes} bytes: give at least {MIN_DISK_BYTES}")


@dataclass(frozen=True)
class CommandRecord:
    """A command as it stands now; a later record of the same `id` takes its place. `text`: what the node answered."""

    id: str
    who: str
    at_utc_s: float
    node: str
    name: str
    arguments: dict[str, str]
    state: Literal["sent", "ok", "refused", "no answer", "not sent"]
    text: str = ""
    done_utc_s: float | None = None


@dataclass(frozen=True)
class TokenRecord:
    """One token of a request: where its milliseconds went, bytes on the links, and how many rungs of the ladder it took."""

    request: str
    index: int
    token_id: int
    piece: str
    at_utc_s: float
    total_ms: float | None
    trunk_ms: float | None = None
    select_ms: float | None = None
    codec_ms: float | None = None
    wire_ms: float | None = None
    expert_ms: float | None = None
    sent_bytes: int = 0
    received_bytes: int = 0
    rungs: int = 0


@dataclass(frozen=True)
class RequestRecord:
    """A request for tokens as it stands now; a later record of the same `request` takes its place.

    `energy_j` is of what `energy_scope` says, None where it is not known.
    """

    request: str
    kind: Literal["completion", "chat", "generate", "demo"]
    at_utc_s: float
    prompt_tokens: int = 0
    tokens: int = 0
    state: Literal["running", "done", "stopped", "failed"] = "running"
    energy_j: float | None = None
    energy_scope: str = ""
    text: str = ""


@dataclass(frozen=True)
class AlarmRecord:
    """One change of an alarm: `id` names the alarm, each change is kept. `who`: an operator, or empty where nobody did it."""

    id: str
    at_utc_s: float
    node: str
    signal: str
    level: str
    severity: str
    state: str
    value: float | None = None
    text: str = ""
    who: str = ""


@dataclass(frozen=True)
class EventRecord:
    """An event as it came at `at_utc_s`, from a node or found on the ground."""

    at_utc_s: float
    source: str
    event: Event


@dataclass(frozen=True)
class Kept:
    """One message in the order of arrival; `at_utc_s` is when it came. Of telemetry, `message` is what fleet.Taken holds:
    its `received.mono_s` is the same UTC, since no monotonic clock outlives its process."""

    at_utc_s: float
    node: str
    message: Taken | Birth | Event
    source: str = "node"


@dataclass(frozen=True)
class SignalInfo:
    """A signal of a node as last sent; times are of arrival, to within a minute."""

    name: str
    unit: str
    scope: str
    provenance: str
    first_utc_s: float
    last_utc_s: float


@dataclass(frozen=True)
class NodeInfo:
    """A node in the archive, and between when its telemetry was made (None: it sent none)."""

    node: str
    first_utc_s: float | None
    last_utc_s: float | None


@dataclass(frozen=True)
class Counts:
    """Of one writer since it was opened, by kind where a mapping. `queued`: not yet on disk.

    `dropped`: found no room in the queue; `refused`: cannot be kept (a number of more than 64 bits); `repeated`: telemetry that was
    there already; `failures`: commits that the disk refused, each tried again; `trouble`: the last reason, until one succeeds.
    """

    written: dict[str, int]
    dropped: dict[str, int]
    refused: dict[str, int]
    repeated: int
    removed: int
    queued: int
    failures: int
    trouble: str | None
