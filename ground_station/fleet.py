"""What the ground station knows of each node: a pure function from (state, message, time) to (state, actions).

Sparkplug 3.0's rules: a birth opens a session, a death belongs to the session (`bd_seq`) it names, telemetry is counted
from the birth, and whatever does not fit makes us ask for a new birth. Leaves out sockets, clock and locks (`control.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from node_agent.wire import Birth, Event, Sample, Status, Telemetry

STALE_AFTER_S = 5.0
ASK_AGAIN_AFTER_S = 5.0
EVENTS_KEPT = 32


@dataclass(frozen=True)
class Instant:
    """A moment on two clocks: UTC seconds for stamps, monotonic seconds for ages."""

    utc_s: float
    mono_s: float


@dataclass(frozen=True)
class AskRebirth:
    """Send `node` the command 'rebirth', because of `reason`."""

    node: str
    reason: str


@dataclass(frozen=True)
class Counts:
    """How many messages of a node were taken, and how many were not and why."""

    births: int = 0
    telemetry: int = 0
    telemetry_lost: int = 0  # by gaps in seq
    telemetry_replayed: int = 0  # seq not above the last one, or of an earlier session
    deaths: int = 0
    deaths_ignored: int = 0  # of a session that is over
    events: int = 0
    rebirths_asked: int = 0


@dataclass(frozen=True)
class NodeState:
    """One node as last heard. `samples` by name are of the latest telemetry, which came at `telemetry_at`."""

    node: str
    birth: Birth | None = None
    status: Status | None = None
    last_seq: int | None = None
    samples: Mapping[str, Sample] = field(default_factory=dict)
    telemetry_at: Instant | None = None
    heard_at: Instant | None = None
    events: tuple[Event, ...] = ()
    counts: Counts = Counts()
    # A retained birth and status may be left over from a node that is long gone; any other message proves life.
    proven: bool = False
    asked_at_s: float | None = None

    @property
    def bd_seq(self) -> int | None:
        return None if self.birth is None else self.birth.bd_seq

    @property
    def online(self) -> bool:
        """The current session was born and its status says online. Says nothing of silence: see `is_stale`."""
        return (
            self.birth is not None
            and self.status is not None
            and self.status.status == "online"
            and self.status.bd_seq == self.birth.bd_seq
        )

    def age_s(self, now: Instant) -> float | None:
        """Seconds since the node was last heard, or None if it never was."""
        return None if self.heard_at is None else now.mono_s - self.heard_at.mono_s

    def is_stale(self, now: Instant, after_s: float = STALE_AFTER_S) -> bool:
        """Nothing was heard for `after_s`: what is known of the node may no longer be true."""
        age_s = self.age_s(now)
        return age_s is None or age_s > after_s

    def ready(self, now: Instant, after_s: float = STALE_AFTER_S) -> bool:
        """Online, proven to live, and heard recently: fit to be given work."""
        return self.online and self.proven and not self.is_stale(now, after_s)


Message = Birth | Status | Telemetry | Event


def apply(
    state: NodeState, message: Message, at: Instant, retained: bool = False
) -> tuple[NodeState, tuple[AskRebirth, ...]]:
    """`state` after `message` of that same node, which came at `at`, and what is to be done about it.

    `retained`: the broker kept the message for us, so it proves nothing about now.
    """
    if not retained:
        state = replace(state, heard_at=at, proven=True)
    if isinstance(message, Birth):
        return _apply_birth(state, message, retained), ()
    if isinstance(message, Status):
        return _apply_status(state, message), ()
    if isinstance(message, Telemetry):
        return _apply_telemetry(state, message, at)
    events = (*state.events, message)[-EVENTS_KEPT:]
    return replace(state, events=events, counts=_add(state.counts, events=1)), ()


def _add(counts: Counts, **more: int) -> Counts:
    return replace(counts, **{name: getattr(counts, name) + value for name, value in more.items()})


def _apply_birth(state: NodeState, birth: Birth, retained: bool) -> NodeState:
    if retained and state.birth == birth:
        # The broker's copy of what we know, after we reconnected: the count of telemetry goes on.
        return state
    # The last samples stay, with their times, until new ones come: after a rebirth they are at most one period old.
    return replace(state, birth=birth, last_seq=None, counts=_add(state.counts, births=1))


def _apply_status(state: NodeState, status: Status) -> NodeState:
    if status.status == "online":
        return replace(state, status=status)
    if status == state.status:
        # The broker's copy, after we reconnected.
        return state
    known = [part.bd_seq for part in (state.birth, state.status) if part is not None]
    if known and status.bd_seq < max(known):
        return replace(state, counts=_add(state.counts, deaths_ignored=1))
    return replace(state, status=status, counts=_add(state.counts, deaths=1))


def _apply_telemetry(state: NodeState, telemetry: Telemetry, at: Instant) -> tuple[NodeState, tuple[AskRebirth, ...]]:
    if state.birth is None:
        return _ask(state, at, "telemetry before a birth")
    if telemetry.bd_seq > state.birth.bd_seq:
        return _ask(state, at, f"telemetry of session {telemetry.bd_seq}, born is {state.birth.bd_seq}")
    replayed = state.last_seq is not None and telemetry.seq <= state.last_seq
    if telemetry.bd_seq < state.birth.bd_seq or replayed:
        return replace(state, counts=_add(state.counts, telemetry_replayed=1)), ()
    # The first telemetry seen of a session may be any: we may have come late.
    lost = 0 if state.last_seq is None else telemetry.seq - state.last_seq - 1
    state = replace(
        state,
        last_seq=telemetry.seq,
        samples={sample.name: sample for sample in telemetry.samples},
        telemetry_at=at,
        counts=_add(state.counts, telemetry=1, telemetry_lost=lost),
    )
    if lost:
        return _ask(state, at, f"{lost} telemetry messages lost before seq {telemetry.seq}")
    if not state.online:
        return _ask(state, at, "telemetry of a session whose status is not online")
    return state, ()


def _ask(state: NodeState, at: Instant, reason: str) -> tuple[NodeState, tuple[AskRebirth, ...]]:
    """A rebirth request, unless one is under way: a node that is restarting must not be flooded."""
    if state.asked_at_s is not None and at.mono_s - state.asked_at_s < ASK_AGAIN_AFTER_S:
        return state, ()
    state = replace(state, asked_at_s=at.mono_s, counts=_add(state.counts, rebirths_asked=1))
    return state, (AskRebirth(state.node, reason),)
