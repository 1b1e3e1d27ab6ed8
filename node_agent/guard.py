"""What a board does to protect itself, without the ground station: one pure step from what is known to a duty cap.

The duty (share of time spent computing) is the least of five caps: heat (heat.py; the set point is SET_POINT_K under the
limit), an unknown temperature, flags of the firmware, the ground station's order, and the silence of a ground station. Short
memory refuses new work altogether. Each cause has a hysteresis and says once that it begins and ends.
Leaves out: reading sensors and the clock (guard_loop.py), holding requests back (pacing.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Iterable, Mapping, Protocol

from node_agent import heat, wire
from node_agent.config import GuardConfig
from node_agent.errors import CommandError
from node_agent.wire import Provenance, Sample

SET_POINT_K = 0.5  # under the limit
LOWEST_TRIP_C = 60.0  # a trip point below is not the processor's
# Under a trip point: the kernel slows the board down at 'passive' already. A Raspberry Pi has 'critical' alone, at 110 °C, and
# its firmware slows down from 80 °C on (raspberrypi.com, "Frequency management and thermal control").
TRIP_MARGINS_K = {"passive": 0.0, "hot": 5.0, "critical": 30.0}
STALE_S = 3.0  # a temperature that is unknown for longer
RELEASE_S = 10.0  # a cause must be gone for so long
FLAGS_DUTY = 0.5
HISTORY_SUFFIX = "_since_boot"  # flags of what has been
MEMORY_RELEASE = 1.25  # of the floor
LIMITS_VALID_S = (0.1, 86_400.0)
THERMAL, UNKNOWN_TEMP, FLAGS = wire.GUARD_HEAT, wire.GUARD_UNKNOWN_TEMP, wire.GUARD_FLAGS
GROUND, SILENT, MEMORY, NO_LIMIT = wire.GUARD_GROUND, wire.GUARD_SILENT, wire.GUARD_MEMORY, wire.GUARD_NO_LIMIT
NAMES = {
    THERMAL: "heat",
    UNKNOWN_TEMP: "unknown temperature",
    FLAGS: "firmware flags",
    GROUND: "ground station's cap",
    SILENT: "silent ground station",
    MEMORY: "memory",
    NO_LIMIT: "no temperature limit",
}

Event = tuple[str, str, str]  # severity, kind, text


class Trip(Protocol):
    """What is needed of sensors.TripPoint."""

    kind: str
    temp_c: float


@dataclass(frozen=True)
class Order:
    """The ground station's duty cap, 0-1, in force until `until_s` of time.monotonic()."""

    cap: float
    until_s: float


@dataclass(frozen=True)
class Seen:
    """What is known at `time_s` (monotonic). `duty`: share of time computed since the last step; `flags`: those that are set;
    `heard_s`: when the ground station was heard last, None before it ever was."""

    time_s: float
    temp_c: float | None
    duty: float
    flags: frozenset[str] = frozenset()
    memory_bytes: int | None = None
    heard_s: float | None = None
    order: Order | None = None


@dataclass(frozen=True)
class Decision:
    """`duty` 0-1 is the least of all caps; `refusal`: why no work is taken, or empty; `state`: bits THERMAL to NO_LIMIT."""

    duty: float
    refusal: str
    state: int
    temp_c: float | None
    events: tuple[Event, ...] = ()

    @property
    def text(self) -> str:
        """In a few words."""
        causes = [name for bit, name in NAMES.items() if self.state & bit]
        return f"duty {self.duty:.2f}" + (f" ({', '.join(causes)})" if causes else "")


@dataclass(frozen=True)
class GuardState:
    """What one step leaves to the next. `*_until_s`: until when a cause still holds that is gone."""

    heat: heat.HeatState
    thermal_cap: float = 1.0
    thermal_until_s: float = -math.inf
    temp_s: float = -math.inf
    flags: frozenset[str] = frozenset()
    flags_until_s: float = -math.inf
    state: int = 0
    over: bool = False


def limit_c(config: GuardConfig, trips: Iterable[Trip]) -> float | None:
    """The die's limit in degrees Celsius: the configured one, else from the lowest trip point of the gentlest kind there is.

    None: neither is known.
    """
    if config.temp_limit_c is not None:
        return config.temp_limit_c
    trips = tuple(trips)
    for kind, margin_k in TRIP_MARGINS_K.items():
        limits = [trip.temp_c - margin_k for trip in trips if trip.kind == kind and trip.temp_c >= LOWEST_TRIP_C]
        if limits:
            return min(limits)
    return None


def start(time_s: float) -> GuardState:
    """Before the first step."""
    return GuardState(heat.start(time_s))


def parse_order(arguments: Mapping[str, str], now_s: float) -> Order:
    """The command `duty` with {"cap": "0.5", "valid_s": "10"}.  Raises: CommandError."""
    unknown = set(arguments) - {"cap", "valid_s"}
    if unknown:
        raise CommandError(f"duty has the argument {min(unknown)[:40]!r}, which is unknown: give cap and valid_s")
    values = {}
    for name, (low, high) in {"cap": (0.0, 1.0), "valid_s": LIMITS_VALID_S}.items():
        text = arguments.get(name, "")
        try:
            values[name] = float(text) if len(text) <= 32 else math.nan
        except ValueError:
            values[name] = math.nan
        if not low <= values[name] <= high:
            raise CommandError(f"duty's {name} is {text[:40]!r}: give a number of {low:g} to {high:g}")
    return Order(values["cap"], now_s + values["valid_s"])


def step(config: GuardConfig, limit: float | None, state: GuardState, seen: Seen) -> tuple[GuardState, Decision]:
    """The state after `seen`, and what is to be done now. `limit`: of limit_c."""
    causes: dict[int, tuple[float, str]] = {}  # bit -> (cap, what is said when it begins)
    state, over = _heat(config, limit, state, seen, causes)
    state = _flags(state, seen, causes)
    _ground(config, seen, causes)
    refusal = _memory(config, state, seen)
    if refusal:
        causes[MEMORY] = (1.0, refusal)
    bits = sum(causes)
    events = [*_changes(state, bits, causes)]
    if over and not state.over:
        text = (
            f"{state.heat.temp_c:.1f} °C, and the limit is {limit:.1f} °C: less duty does not suffice or comes too late"
        )
        events.append(("distress", "over_limit", text))
    decision = Decision(
        min((cap for cap, _ in causes.values()), default=1.0), refusal, bits, state.heat.temp_c, tuple(events)
    )
    return replace(state, state=bits, over=over), decision


def _heat(
    config: GuardConfig, limit: float | None, state: GuardState, seen: Seen, causes: dict[int, tuple[float, str]]
) -> tuple[GuardState, bool]:
    """Adds THERMAL, UNKNOWN_TEMP or NO_LIMIT; also says whether the die is over its limit."""
    after, believed = heat.step(state.heat, seen.temp_c, seen.duty, seen.time_s)
    state = replace(state, heat=after, temp_s=seen.time_s if believed else state.temp_s)
    if limit is None:
        causes[NO_LIMIT] = (1.0, "")  # no event: it is so from the start, and the loop says it
        return state, False
    if seen.time_s - state.temp_s > STALE_S:
        duty = config.unknown_duty
        text = f"no valid temperature for over {STALE_S:.0f} s: duty at most {duty:.2f} until there is one again"
        causes[UNKNOWN_TEMP] = (min(duty, state.thermal_cap), text)
        return state, False
    cap = state.thermal_cap
    set_point_c = limit - SET_POINT_K
    if believed:
        cap = min(1.0, max(config.floor_duty, heat.largest_duty(after, set_point_c)))
    still_hot = bool(state.state & THERMAL) and after.temp_c > set_point_c - config.hysteresis_k
    until_s = seen.time_s + RELEASE_S if cap < 1.0 or still_hot else state.thermal_until_s
    if seen.time_s < until_s:
        text = f"{after.temp_c:.1f} °C, the set point is {set_point_c:.1f} °C: duty at most {cap:.2f} for now"
        causes[THERMAL] = (cap, text)
    over = after.temp_c > (set_point_c if state.over else limit)
    return replace(state, thermal_cap=cap, thermal_until_s=until_s), over


def _flags(state: GuardState, seen: Seen, causes: dict[int, tuple[float, str]]) -> GuardState:
    """Adds FLAGS."""
    now = frozenset(name for name in seen.flags if not name.endswith(HISTORY_SUFFIX))
    if now:
        state = replace(state, flags=now, flags_until_s=seen.time_s + RELEASE_S)
    if seen.time_s < state.flags_until_s:
        names = ", ".join(sorted(state.flags))
        causes[FLAGS] = (FLAGS_DUTY, f"the firmware says {names}: duty at most {FLAGS_DUTY:.2f}")
    return state


def _ground(config: GuardConfig, seen: Seen, causes: dict[int, tuple[float, str]]) -> None:
    """Adds GROUND and SILENT. Who has set a cap and lets it run out is silent about the duty, whatever else it says."""
    order = seen.order
    if order is not None and order.cap < 1.0:
        if seen.time_s < order.until_s:
            causes[GROUND] = (order.cap, f"the ground station set the duty to at most {order.cap:.2f}")
        else:
            text = (
                f"the ground station's duty cap ran out: duty at most {config.silent_duty:.2f} until it sends another"
            )
            causes[SILENT] = (config.silent_duty, text)
    if seen.heard_s is not None and seen.time_s - seen.heard_s > config.silent_s:
        text = f"the ground station is silent for over {config.silent_s:g} s: duty at most {config.silent_duty:.2f}"
        causes[SILENT] = (config.silent_duty, text)


def _memory(config: GuardConfig, state: GuardState, seen: Seen) -> str:
    """Why no work is taken, or an empty text."""
    floor = config.memory_floor_mb * 1e6
    if seen.memory_bytes is None or floor == 0:
        return ""
    if seen.memory_bytes < floor * (MEMORY_RELEASE if state.state & MEMORY else 1.0):
        return f"{seen.memory_bytes / 1e6:.0f} MB are available, the floor is {config.memory_floor_mb} MB: no new work"
    return ""


SEVERITY = {THERMAL: "watch", GROUND: "info"}
KIND = {
    THERMAL: "thermal",
    UNKNOWN_TEMP: "temperature",
    FLAGS: "power_flags",
    GROUND: "duty",
    SILENT: "ground_silent",
    MEMORY: "memory",
}


def _changes(state: GuardState, bits: int, causes: dict[int, tuple[float, str]]) -> Iterable[Event]:
    """An event for each cause that begins or ends."""
    for bit in KIND:
        if bits & bit and not state.state & bit:
            yield SEVERITY.get(bit, "warning"), KIND[bit], causes[bit][1]
        elif state.state & bit and not bits & bit:
            yield "info", KIND[bit], f"over: {NAMES[bit]} limits this board no longer"


def samples(
    decision: Decision, limit: float | None, duty: float, provenance: Provenance, at: float
) -> tuple[Sample, ...]:
    """What telemetry says of the guard. `duty`: measured share of time computed; `provenance`: of the temperatures."""
    known = "missing" if limit is None else "ok"
    return (
        Sample("duty_cap", decision.duty, "1", "ok", "derived", "agent", at),
        Sample("duty", duty, "1", "ok", "measured", "agent", at),
        Sample("guard_state", float(decision.state), "bits", "ok", "derived", "agent", at),
        Sample("guard_limit_c", limit, "degC", known, provenance, "module", at),
    )
