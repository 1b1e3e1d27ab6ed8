"""GET /metrics: what mission control knows, as Prometheus reads it. Pure; leaves out HTTP (mission_up.py),
and history, which Prometheus keeps.

Base units, as Prometheus' own rules ask. Values of a node that is not up are left out, so that nothing old passes for the present:
`spacemoe_node_up` and `spacemoe_node_age_seconds` say so. Labels come from nodes: they are cut, and shown as text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ground_station.cli_shared import plain
from ground_station.fleet import Instant, NodeState
from ground_station.metrics_names import FAMILIES, NODE_MESSAGES, NODE_NOT_TAKEN, family_of

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
MAX_SIGNALS = 400  # of one node
MAX_LABEL_CHARS = 120


@dataclass(frozen=True)
class Station:
    """What a ground station says of itself. `archive`: archive_records.Counts or None; `totals`: counts since its start by name;
    `alarms`: objects with "state" and "severity"."""

    connected: bool = False
    started_utc_s: float | None = None
    malformed: Mapping[str, int] = field(default_factory=dict)
    archive: Any = None
    alarms: Iterable[Mapping[str, Any]] = ()
    watchers: int = 0
    frames_lost: int = 0
    totals: Mapping[str, int] = field(default_factory=dict)


class _Families:
    """Families by name, each label set once."""

    def __init__(self) -> None:
        self._made: dict[str, Metric] = {}
        self._seen: set[tuple] = set()

    def add(self, name: str, labels: tuple[Any, ...], value: float) -> None:
        known = FAMILIES[name]
        if name not in self._made:
            kind = CounterMetricFamily if known.counter else GaugeMetricFamily
            self._made[name] = kind(name, known.help, labels=known.labels)
        shown = tuple(plain(label, MAX_LABEL_CHARS) for label in labels)
        if (name, shown) not in self._seen:  # names may be the same once they are cut
            self._seen.add((name, shown))
            self._made[name].add_metric(shown, float(value))

    def collect(self) -> Iterator[Metric]:
        yield from (self._made[name] for name in sorted(self._made))


def render(states: Mapping[str, NodeState], now: Instant, station: Station = Station()) -> bytes:
    """The exposition, text format 0.0.4."""
    families = _Families()
    for name in sorted(states):
        _node(families, name, states[name], now)
    _station(families, station, now)
    registry = CollectorRegistry()
    registry.register(families)
    return generate_latest(registry)


def _node(families: _Families, name: str, state: NodeState, now: Instant) -> None:
    up = state.ready(now)
    families.add("spacemoe_node_up", (name,), up)
    if (age_s := state.age_s(now)) is not None:
        families.add("spacemoe_node_age_seconds", (name,), age_s)
    if state.birth is not None:
        families.add("spacemoe_node_info", (name, state.birth.board, state.birth.agent_version, state.birth.bundle), 1)
        families.add("spacemoe_node_shards", (name,), len(state.birth.shards))
    counts = vars(state.counts)
    for kind, key in NODE_MESSAGES.items():
        families.add("spacemoe_node_messages_total", (name, kind), counts[key])
    for reason, key in NODE_NOT_TAKEN.items():
        families.add("spacemoe_node_messages_not_taken_total", (name, reason), counts[key])
    families.add("spacemoe_node_rebirths_asked_total", (name,), state.counts.rebirths_asked)
    families.add("spacemoe_node_dropped_on_board_total", (name,), state.dropped_on_board)
    if not up:
        return
    validities: Counter[str] = Counter()
    for _, sample in zip(range(MAX_SIGNALS), state.samples.values()):
        validities[sample.validity] += 1
        if sample.validity != "ok" or sample.value is None:
            continue
        family, labels, factor = family_of(sample)
        families.add(family, (name, *labels), sample.value * factor)
    for validity in ("ok", "stale", "missing", "invalid"):
        families.add("spacemoe_node_samples", (name, validity), validities[validity])


def _station(families: _Families, station: Station, now: Instant) -> None:
    families.add("spacemoe_broker_connected", (), station.connected)
    if station.started_utc_s is not None:
        families.add("spacemoe_start_time_seconds", (), station.started_utc_s)
    families.add("spacemoe_watchers", (), station.watchers)
    families.add("spacemoe_frames_lost_total", (), station.frames_lost)
    for kind, count in sorted(station.malformed.items()):
        families.add("spacemoe_malformed_messages_total", (kind,), count)
    standing = Counter((str(alarm.get("state")), str(alarm.get("severity"))) for alarm in station.alarms)
    for state in ("unacknowledged", "acknowledged", "returned", "shelved"):
        for severity in ("watch", "warning", "distress", "critical", "severe"):
            families.add("spacemoe_alarms", (state, severity), standing[state, severity])
    for name in ("tokens", "requests"):
        if name in station.totals:
            families.add(f"spacemoe_{name}_total", (), station.totals[name])
    if station.archive is not None:
        for what in ("written", "dropped", "refused"):
            for kind, count in sorted(getattr(station.archive, what).items()):
                families.add(f"spacemoe_archive_{what}_total", (kind,), count)
        for what in ("repeated", "removed", "failures"):
            families.add(f"spacemoe_archive_{what}_total", (), getattr(station.archive, what))
        families.add("spacemoe_archive_queued_records", (), station.archive.queued)


def of_mission(mission: Any) -> bytes:
    """The exposition of a mission.Mission as it is now."""
    station = Station(
        mission.control.connected,
        mission.started_utc_s,
        mission.control.malformed,
        None if mission.archive is None else mission.archive.counts,
        mission.alarm_list(),
        mission.feed.watchers,
        mission.feed.lost,
        mission.tokens.totals,
    )
    return render(mission.control.snapshot(), mission.control.now(), station)
