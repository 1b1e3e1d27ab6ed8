"""What the ground station knows of each node: a pure function from (state, message, time) to (state, actions).

Sparkplug 3.0's rules: a birth opens a session, a death belongs to the session (`bd_seq`) it names, telemetry is counted
from the birth, and whatever does not fit makes us ask for a new birth. What a node kept while it could not be heard comes
later as history: each message counts once, by its run and number, and what is missing is asked for until it comes or is known
to be gone. Times of a node are kept as it says them and as the ground station's clock would.
Leaves out sockets, clock and locks (`control.py`), and storage of more than the latest telemetry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ground_station.received import Received
from node_agent.wire import Birth, Event, History, Sample, Status, Telemetry

STALE_AFTER_S = 5.0
ASK_AGAIN_AFTER_S = 5.0
# A node that was away sends its history by itself: what is still missing after it has been silent for so long is asked for.
ASK_HISTORY_AFTER_S = 10.0
MAX_RANGES_ASKED = 100
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
class AskHistory:
    """Send `node` the command 'history' for (first, last) `ranges` of the numbers of `run`."""

    node: str
    run: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Taken:
    """Telemetry that came for the first time, live or (`late`) as history.

    `generated_utc_s`: when it was made by the ground station's clock, wrong by `uncertainty_s` at most; None where the node
    has not measured its offset. The node's own stamps stay in `telemetry`.
    """

    telemetry: Telemetry
    received: Instant
    late: bool
    generated_utc_s: float | None = None
    uncertainty_s: float | None = None

    def sample_utc_s(self, sample: Sample) -> float | None:
        """When `sample` of this telemetry was made, by the ground station's clock."""
        if self.generated_utc_s is None:
            return None
        return sample.generated_at + self.generated_utc_s - self.telemetry.generated_at


@dataclass(frozen=True)
class Counts:
    """How many messages of a node were taken, and how many were not and why."""

    births: int = 0
    telemetry: int = 0
    telemetry_lost: int = 0  # by gaps in seq
    telemetry_replayed: int = 0  # seq not above the last one, or of an earlier session
    telemetry_unborn: int = 0  # of a session whose birth has not come
    telemetry_gone: int = 0  # neither came nor will come: the node has no room for it any more
    history: int = 0
    history_repeated: int = 0  # came before, live or as history
    history_refused: int = 0  # of another node or run than the message that holds it
    deaths: int = 0
    deaths_ignored: int = 0  # of a session that is over
    events: int = 0
    rebirths_asked: int = 0


@dataclass(frozen=True)
class NodeState:
    """One node as last heard. `samples` by name are of the latest telemetry, which came at `telemetry_at`.

    `received`: numbers of the agent's `run` that have come. `taken`: what the last message brought that was new.
    `started_utc_s`: when the agent started by the ground station's clock, for messages it made before it knew its offset.
    `dropped_on_board`: how many messages of this run the node says it lost for want of room.
    """

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
    run: int | None = None
    received: Received = Received()
    latest: Taken | None = None
    taken: tuple[Taken, ...] = ()
    started_utc_s: float | None = None
    start_uncertainty_s: float | None = None
    dropped_on_board: int = 0
    # Monotonic seconds of the moment from which we wait for what is missing; None: nothing is missing.
    missing_since_s: float | None = None

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

    def value(self, name: str) -> float | None:
        """The latest sample of that name; None where there is none, or none that is valid."""
        sample = self.samples.get(name)
        return sample.value if sample is not None and sample.validity == "ok" else None

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


Message = Birth | Status | Telemetry | History | Event
Action = AskRebirth | AskHistory


def apply(
    state: NodeState, message: Message, at: Instant, retained: bool = False
) -> tuple[NodeState, tuple[Action, ...]]:
    """`state` after `message` of that same node, which came at `at`, and what is to be done about it.

    `retained`: the broker kept the message for us, so it proves nothing about now.
    """
    if not retained:
        state = replace(state, heard_at=at, proven=True)
    if state.taken:
        state = replace(state, taken=())
    if isinstance(message, Birth):
        return _apply_birth(state, message, retained), ()
    if isinstance(message, Status):
        return _apply_status(state, message), ()
    if isinstance(message, Telemetry):
        return _apply_telemetry(state, message, at)
    if isinstance(message, History):
        return _apply_history(state, message, at), ()
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


def reconnected(state: NodeState) -> NodeState:
    """After the ground station itself was away: a gap in seq is no fault of the node, and its history fills it."""
    return replace(state, last_seq=None)


def _apply_telemetry(state: NodeState, telemetry: Telemetry, at: Instant) -> tuple[NodeState, tuple[Action, ...]]:
    if state.birth is None:
        return _ask(_unborn(state), at, "telemetry before a birth")
    if telemetry.bd_seq > state.birth.bd_seq:
        return _ask(_unborn(state), at, f"telemetry of session {telemetry.bd_seq}, born is {state.birth.bd_seq}")
    replayed = state.last_seq is not None and telemetry.seq <= state.last_seq
    came_before = telemetry.number and telemetry.run == state.run and state.received.has(telemetry.number)
    if telemetry.bd_seq < state.birth.bd_seq or replayed or came_before:
        return replace(state, counts=_add(state.counts, telemetry_replayed=1)), ()
    # The first telemetry seen of a session may be any: we may have come late.
    lost = 0 if state.last_seq is None else telemetry.seq - state.last_seq - 1
    state = _take(_of_run(state, telemetry.run), telemetry, at, late=False)
    state = replace(
        state,
        last_seq=telemetry.seq,
        samples={sample.name: sample for sample in telemetry.samples},
        telemetry_at=at,
        latest=state.taken[-1],
        counts=_add(state.counts, telemetry=1, telemetry_lost=lost),
    )
    state, asked = _ask_history(state, at)
    if lost:
        state, rebirth = _ask(state, at, f"{lost} telemetry messages lost before seq {telemetry.seq}")
        return state, asked + rebirth
    if not state.online:
        state, rebirth = _ask(state, at, "telemetry of a session whose status is not online")
        return state, asked + rebirth
    return state, asked


def _unborn(state: NodeState) -> NodeState:
    return replace(state, counts=_add(state.counts, telemetry_unborn=1))


def _apply_history(state: NodeState, history: History, at: Instant) -> NodeState:
    if state.run is not None and history.run < state.run:
        return replace(state, counts=_add(state.counts, history_repeated=len(history.messages)))
    state = _of_run(state, history.run)
    merged = repeated = refused = 0
    # the youngest first: it knows the offset of the clock, when the oldest may not
    for telemetry in sorted(history.messages, key=lambda telemetry: telemetry.number, reverse=True):
        if (telemetry.node, telemetry.run) != (state.node, history.run) or telemetry.number < 1:
            refused += 1
        elif state.received.has(telemetry.number):
            repeated += 1
        else:
            merged += 1
            state = _take(state, telemetry, at, late=True)
    received = state.received.give_up(history.oldest)
    gone = received.gone - state.received.gone
    more = {"history": merged, "history_repeated": repeated, "history_refused": refused, "telemetry_gone": gone}
    return replace(
        state,
        taken=state.taken[::-1],
        received=received,
        dropped_on_board=history.dropped,
        missing_since_s=at.mono_s if received.missing() else None,
        counts=_add(state.counts, **more),
    )


def _of_run(state: NodeState, run: int) -> NodeState:
    """`state`, which begins to count anew where the agent has started again."""
    if state.run == run:
        return state
    # Of a run that begins while we follow the node all numbers are expected; of one that we come upon, those from now on.
    received = Received() if state.run is None else Received(((0, 0),))
    return replace(
        state,
        run=run,
        received=received,
        started_utc_s=None,
        start_uncertainty_s=None,
        dropped_on_board=0,
        missing_since_s=None,
    )


def _take(state: NodeState, telemetry: Telemetry, at: Instant, late: bool) -> NodeState:
    """`state` with telemetry that has not come before, its time corrected as far as the node's clock is known."""
    values = {
        sample.name: sample.value
        for sample in telemetry.samples
        if sample.name in ("clock_offset_s", "clock_uncertainty_s", "uptime_s") and sample.value is not None
    }
    offset_s, uncertainty_s, uptime_s = (
        values.get(name) for name in ("clock_offset_s", "clock_uncertainty_s", "uptime_s")
    )
    utc_s = None
    if offset_s is not None and uncertainty_s is not None:
        utc_s = telemetry.generated_at + offset_s
        if uptime_s is not None and (state.started_utc_s is None or uncertainty_s <= state.start_uncertainty_s):
            state = replace(state, started_utc_s=utc_s - uptime_s, start_uncertainty_s=uncertainty_s)
    elif uptime_s is not None and state.started_utc_s is not None:
        # It did not know its offset then, and its UTC may have been set since: the time since its start is monotonic.
        utc_s, uncertainty_s = state.started_utc_s + uptime_s, state.start_uncertainty_s
    taken = Taken(telemetry, at, late, utc_s, uncertainty_s if utc_s is not None else None)
    received = state.received.add(telemetry.number) if telemetry.number else state.received
    gone = received.gone - state.received.gone
    state = replace(state, received=received, taken=(*state.taken, taken))
    return replace(state, counts=_add(state.counts, telemetry_gone=gone)) if gone else state


def _ask_history(state: NodeState, at: Instant) -> tuple[NodeState, tuple[AskHistory, ...]]:
    """What is still missing is asked for, once in ASK_HISTORY_AFTER_S, unless history keeps coming."""
    missing = state.received.missing()
    if not missing:
        return (state if state.missing_since_s is None else replace(state, missing_since_s=None)), ()
    if state.missing_since_s is None:
        return replace(state, missing_since_s=at.mono_s), ()
    if at.mono_s - state.missing_since_s < ASK_HISTORY_AFTER_S:
        return state, ()
    return replace(state, missing_since_s=at.mono_s), (AskHistory(state.node, state.run, missing[:MAX_RANGES_ASKED]),)


def _ask(state: NodeState, at: Instant, reason: str) -> tuple[NodeState, tuple[AskRebirth, ...]]:
    """A rebirth request, unless one is under way: a node that is restarting must not be flooded."""
    if state.asked_at_s is not None and at.mono_s - state.asked_at_s < ASK_AGAIN_AFTER_S:
        return state, ()
    state = replace(state, asked_at_s=at.mono_s, counts=_add(state.counts, rebirths_asked=1))
    return state, (AskRebirth(state.node, reason),)
