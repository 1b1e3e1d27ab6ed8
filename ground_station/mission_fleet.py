"""A fleet as the page and the API read it: signals described once, then rows of values. Pure; leaves out who sends and who asks.

A row is [node, set, received_utc_s, state, values, levels, validities]: `set` names the list of [signal, unit, scope, provenance]
that the values belong to, in its order; levels and validities are one letter per value. So 200 nodes of 30 signals at 1 Hz
are some 60 kB/s.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from ground_station.fleet import Instant, NodeState, Taken
from ground_station.mission_feed import compact
from node_agent.wire import Birth, Event, Sample

MAX_SIGNALS = 400  # of one node on the page: the archive has all
MAX_CHARS = 120  # of a name or unit
VALIDITY_LETTERS = {"ok": "o", "stale": "s", "missing": "m", "invalid": "i"}
NO_LEVEL = "."

Signal = tuple[str, str, str, str]


@dataclass(frozen=True)
class Row:
    """One node's latest telemetry. `signals[i]` describes `values[i]`; `set_id` is the same where the signals are the same."""

    node: str
    set_id: str
    signals: tuple[Signal, ...]
    received_utc_s: float
    values: tuple[float | None, ...]
    validities: str
    levels: str
    left_out: int = 0

    def wire(self, state: str) -> list[Any]:
        return [
            self.node,
            self.set_id,
            round(self.received_utc_s, 3),
            state,
            self.values,
            self.levels,
            self.validities,
        ]


def row_of(taken: Taken, levels: dict[str, str], before: Row | None) -> Row:
    """The row of a telemetry message. `levels`: letter by signal, of those that have limits; `before`: this node's last row."""
    telemetry = taken.telemetry
    shown: dict[str, Sample] = {}
    for sample in telemetry.samples:
        if len(shown) < MAX_SIGNALS or sample.name in shown:
            shown[sample.name] = sample
    samples = shown.values()
    signals = tuple((s.name[:MAX_CHARS], s.unit[:MAX_CHARS], s.scope[:MAX_CHARS], s.provenance) for s in samples)
    same = before is not None and before.signals == signals
    return Row(
        telemetry.node,
        before.set_id if same else hashlib.sha256(compact(signals)).hexdigest()[:12],
        before.signals if same else signals,
        taken.received.utc_s,
        tuple(number(sample.value) for sample in samples),
        "".join(VALIDITY_LETTERS[sample.validity] for sample in samples),
        "".join(levels.get(sample.name, NO_LEVEL) for sample in samples),
        len({sample.name for sample in telemetry.samples}) - len(shown),
    )


def number(value: float | None) -> float | int | None:
    """A value as short as nine digits make it."""
    if value is None:
        return None
    return int(value) if abs(value) < 1e15 and value == int(value) else float(f"{value:.9g}")


def state_of(state: NodeState, now: Instant) -> str:
    """'online', 'stale' (its session is open, and nothing is heard of it) or 'offline'."""
    if not state.online:
        return "offline"
    return "stale" if not state.proven or state.is_stale(now) else "online"


def birth_of(birth: Birth | None) -> dict[str, Any]:
    """What a birth says in one line of a table."""
    if birth is None:
        return {"board": "", "agent_version": "", "bundle": "", "shards": 0, "memory_bytes": None, "bd_seq": None}
    return {
        "board": birth.board[:MAX_CHARS],
        "agent_version": birth.agent_version[:MAX_CHARS],
        "bundle": birth.bundle[:MAX_CHARS],
        "shards": len(birth.shards),
        "memory_bytes": birth.memory_bytes,
        "bd_seq": birth.bd_seq,
    }


def readable(node: str, state: str, birth: Birth | None, row: Row | None, now_utc_s: float) -> dict[str, Any]:
    """A node for a person or a script: every signal by its name."""
    signals = {}
    if row is not None:
        words = {letter: word for word, letter in VALIDITY_LETTERS.items()}
        for i, (name, unit, scope, provenance) in enumerate(row.signals):
            signals[name] = {
                "value": row.values[i],
                "unit": unit,
                "scope": scope,
                "provenance": provenance,
                "validity": words[row.validities[i]],
                "level": row.levels[i],
            }
    received = None if row is None else row.received_utc_s
    return {
        "node": node,
        "state": state,
        **birth_of(birth),
        "received_utc_s": received,
        "age_s": None if received is None else round(max(0.0, now_utc_s - received), 3),
        "signals_left_out": 0 if row is None else row.left_out,
        "signals": signals,
    }


def event_row(event: Event, at_utc_s: float, source: str) -> dict[str, Any]:
    return {
        "node": event.node,
        "at_utc_s": at_utc_s,
        "generated_utc_s": event.generated_at,
        "severity": event.severity,
        "kind": event.kind[:100],
        "text": event.text[:1000],
        "source": source,
    }
