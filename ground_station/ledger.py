"""Joules of one request, per node and in total, divided into compute, radio, idle and telemetry: differences of the nodes' counters.

A node counts joules since its start (node_agent.energy), divided there by joules.py's method; here two readings of the counters
are subtracted. What cannot be told is unknown, with the reason, and never a number: then the total is unknown too. Before a node
knows its baseline power it counts everything as idle: then the sum is known, and the division is not.
Leaves out: tokens and time (demo.py); joules of the ground station itself, which runs the trunk; a power monitor's lag, which moves
joules of the last moments of a request into what comes after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ground_station.control import Control
from ground_station.fleet import NodeState

KINDS = ("compute", "radio", "idle", "telemetry")
METHOD = (
    "each node's cumulative counters just after the request less those just before it; on the node, in each window between two "
    "samples of its meter, energy up to baseline power (the power of quiet half seconds) is idle, and what is above is divided "
    "between compute, radio and telemetry in proportion to the seconds spent on each, or is idle where none was spent"
)
ANSWER_WAIT_S = 2.0
BASELINE_WAIT_S = 5.0
TELEMETRY_WAIT_S = 1.0  # the answer may come before the telemetry that was asked for: they are two topics
LOOK_S = 0.01


@dataclass(frozen=True)
class Unknown:
    """Why a node's joules cannot be told."""

    reason: str


@dataclass(frozen=True)
class Counters:
    """A node's counters at one moment, joules in the order of KINDS. `run`, `bd_seq`: of the agent process and its session;
    `gap_s`: for how long its meter has given nothing so far; `divides`: it knows its baseline power."""

    run: int
    bd_seq: int | None
    parts_j: tuple[float, float, float, float]
    gap_s: float
    provenance: str
    scope: str
    divides: bool = True


@dataclass(frozen=True)
class Joules:
    """Energy in J, and its `parts` in the order of KINDS; None where the division is not known."""

    total: float
    parts: tuple[float, ...] | None

    def tree(self) -> dict[str, float | None]:
        """As JSON has it, to 0.1 mJ."""
        parts = (None,) * len(KINDS) if self.parts is None else (round(part, 4) for part in self.parts)
        return {**dict(zip(KINDS, parts)), "total": round(self.total, 4)}


@dataclass(frozen=True)
class Spent:
    """One node's part of a request. `provenance` and `scope` are the meter's: measured, simulated, estimated; board, module.
    `undivided`: why there are no parts, where there are none."""

    joules: Joules
    provenance: str
    scope: str
    undivided: str = ""


@dataclass(frozen=True)
class Ledger:
    """The request over all nodes, in the order they were given."""

    nodes: Mapping[str, Spent | Unknown]

    @property
    def unknown(self) -> dict[str, str]:
        """Reasons by node why its joules, or their division, cannot be told."""
        reasons = {
            name: each.reason if isinstance(each, Unknown) else each.undivided for name, each in self.nodes.items()
        }
        return {name: reason for name, reason in reasons.items() if reason}

    @property
    def total(self) -> Joules | None:
        """The sum; None where a node's joules are unknown, or there is no node."""
        spent = [each.joules for each in self.nodes.values() if isinstance(each, Spent)]
        if not spent or len(spent) < len(self.nodes):
            return None
        parts = None if any(each.parts is None for each in spent) else tuple(map(sum, zip(*(e.parts for e in spent))))
        return Joules(sum(each.total for each in spent), parts)

    @property
    def provenance(self) -> str | None:
        """Of the known parts; 'mixed' where they differ, None where there is none."""
        kinds = {each.provenance for each in self.nodes.values() if isinstance(each, Spent)}
        return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else None


NO_METER = Unknown("it has no power sensor")


def counters(state: NodeState | None) -> Counters | Unknown:
    """What a node's latest telemetry says."""
    if state is None or not state.samples:
        return Unknown("it sent no telemetry")
    energy = state.samples.get("energy_j")
    values = [state.value(f"energy_{kind}_j") for kind in KINDS]
    if energy is None or energy.validity == "missing":
        return NO_METER
    if energy.validity != "ok" or None in values:
        return Unknown(f"its meter's reading is {'not whole' if energy.validity == 'ok' else energy.validity}")
    gap_s = state.value("energy_gap_s") or 0.0
    divides = state.value("power_baseline_w") is not None
    return Counters(state.run or 0, state.bd_seq, tuple(values), gap_s, energy.provenance, energy.scope, divides)


def between(before: Counters | Unknown, after: Counters | Unknown) -> Spent | Unknown:
    """What a node took from one reading to another."""
    for reading, when in ((before, "before"), (after, "after")):
        if isinstance(reading, Unknown):
            return Unknown(f"{when} the request: {reading.reason}")
    # A session may be renewed by the same process, which then counts on; a process that does not say which it is (run 0) is
    # taken for another.
    same = before.run == after.run if before.run and after.run else before.bd_seq == after.bd_seq
    if not same:
        return Unknown("its agent started again during the request")
    parts = tuple(late - early for early, late in zip(before.parts_j, after.parts_j))
    if min(parts) < 0:
        return Unknown("its counter went back during the request")
    if after.gap_s > before.gap_s:
        return Unknown(f"its meter gave nothing for {after.gap_s - before.gap_s:.1f} s of the request")
    if not before.divides:
        undivided = "not divided: it did not know its baseline power when the request began"
        return Spent(Joules(sum(parts), None), after.provenance, after.scope, undivided)
    return Spent(Joules(sum(parts), parts), after.provenance, after.scope)


def of(
    nodes: Iterable[str], before: Mapping[str, Counters | Unknown], after: Mapping[str, Counters | Unknown]
) -> Ledger:
    """The ledger of a request from the readings before and after it (`take`)."""
    absent = Unknown("it was not asked")
    return Ledger({name: between(before.get(name, absent), after.get(name, absent)) for name in nodes})


def wait_for_baselines(control: Control, names: Iterable[str]) -> None:
    """Waits until each node that has a meter knows its baseline power, for half a second of quiet; not for ever."""
    end_s = time.monotonic() + BASELINE_WAIT_S
    while time.monotonic() < end_s:
        known = [counters(control.snapshot().get(name)) for name in names]
        if all(isinstance(each, Counters) and each.divides or each == NO_METER for each in known):
            return
        time.sleep(LOOK_S)


def take(control: Control, names: Iterable[str]) -> dict[str, Counters | Unknown]:
    """The counters of each node until now: each is asked for a sample, one after the other."""
    return {name: _take(control, name) for name in sorted(names)}


def _take(control: Control, name: str) -> Counters | Unknown:
    asked_s = control.now().mono_s
    answer = control.command(name, "sample", ANSWER_WAIT_S)
    if not answer.ok:
        return Unknown(answer.text[:100] or "it refused to take a sample")
    end_s = time.monotonic() + TELEMETRY_WAIT_S
    while True:
        state = control.snapshot().get(name)
        # what a node said earlier is not its energy now
        if state is not None and state.telemetry_at is not None and state.telemetry_at.mono_s >= asked_s:
            return counters(state)
        if time.monotonic() > end_s:
            return Unknown("its telemetry did not come")
        time.sleep(LOOK_S)
