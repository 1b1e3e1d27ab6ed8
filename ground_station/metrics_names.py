"""The metrics there are: names in base units, labels, help, and which sample of a node belongs to which.

For what renders them (metrics.py) and for the Grafana dashboard (grafana.py); no values here. Counters end in _total.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from node_agent.wire import Sample


@dataclass(frozen=True)
class Family:
    help: str
    labels: tuple[str, ...] = ()

    counter: bool = False


def _gauge(help: str, *labels: str) -> Family:
    return Family(help, labels)


def _counter(help: str, *labels: str) -> Family:
    return Family(help, labels, True)


_OF = ("node", "sensor", "scope", "provenance")
FAMILIES: dict[str, Family] = {
    "spacemoe_node_up": _gauge("1 where the node is online and was heard lately", "node"),
    "spacemoe_node_age_seconds": _gauge("Since the node was last heard", "node"),
    "spacemoe_node_info": _gauge("What a node said of itself at its birth", "node", "board", "agent_version", "bundle"),
    "spacemoe_node_shards": _gauge("Shards that are loaded", "node"),
    "spacemoe_node_samples": _gauge("Samples in the latest telemetry", "node", "validity"),
    "spacemoe_node_messages_total": _counter("Messages taken", "node", "kind"),
    "spacemoe_node_messages_not_taken_total": _counter("Messages lost, or not taken", "node", "reason"),
    "spacemoe_node_rebirths_asked_total": _counter("Birth certificates that were asked for again", "node"),
    "spacemoe_node_dropped_on_board_total": _counter("Telemetry that the node had no room to keep", "node"),
    "spacemoe_node_temperature_celsius": _gauge("Temperatures of a node", *_OF),
    "spacemoe_node_power_watts": _gauge("Powers of a node", *_OF),
    "spacemoe_node_voltage_volts": _gauge("Voltages of a node", *_OF),
    "spacemoe_node_energy_joules_total": _counter("Energy since the agent's start", *_OF),
    "spacemoe_node_seconds_total": _counter("Time spent since the agent's start", *_OF),
    "spacemoe_node_uptime_seconds": _gauge("Since the agent's start", *_OF),
    "spacemoe_node_memory_bytes": _gauge("Memory of the agent and of its machine", *_OF),
    "spacemoe_node_transferred_bytes_total": _counter("Bytes over the data plane", *_OF),
    "spacemoe_node_served_total": _counter("Rows and requests that a node has served", *_OF),
    "spacemoe_node_share_ratio": _gauge("Shares, 0 to 1", *_OF),
    "spacemoe_node_errors_total": _counter("Errors counted by an agent", "node", "plane", "kind"),
    "spacemoe_node_sample": _gauge("Every other sample, in its own unit", *_OF, "unit"),
    "spacemoe_broker_connected": _gauge("1 while the ground station is connected to its broker"),
    "spacemoe_start_time_seconds": _gauge("When the ground station started, in seconds since 1970"),
    "spacemoe_watchers": _gauge("Pages that are open"),
    "spacemoe_frames_lost_total": _counter("Frames that pages were too slow for"),
    "spacemoe_malformed_messages_total": _counter("Messages that were no messages of ours", "kind"),
    "spacemoe_alarms": _gauge("Alarms that stand", "state", "severity"),
    "spacemoe_tokens_total": _counter("Tokens made since the start"),
    "spacemoe_requests_total": _counter("Requests for tokens since the start"),
    "spacemoe_archive_written_total": _counter("Records written to the archive", "kind"),
    "spacemoe_archive_dropped_total": _counter("Records that found no room in the archive's queue", "kind"),
    "spacemoe_archive_refused_total": _counter("Records that the archive cannot keep", "kind"),
    "spacemoe_archive_repeated_total": _counter("Telemetry that was in the archive already"),
    "spacemoe_archive_removed_total": _counter("Records removed by the archive's retention"),
    "spacemoe_archive_failures_total": _counter("Commits that the archive's disk refused"),
    "spacemoe_archive_queued_records": _gauge("Records that are not on disk yet"),
}
# By kind, and the field of fleet.Counts.
NODE_MESSAGES = {
    "birth": "births",
    "telemetry": "telemetry",
    "history": "history",
    "death": "deaths",
    "event": "events",
}
NODE_NOT_TAKEN = {
    "lost": "telemetry_lost",
    "replayed": "telemetry_replayed",
    "unborn": "telemetry_unborn",
    "gone": "telemetry_gone",
    "history_repeated": "history_repeated",
    "history_refused": "history_refused",
    "death_of_the_past": "deaths_ignored",
}
_BY_NAME = {
    "agent_cpu_s": "spacemoe_node_seconds_total",
    "expert_compute_s": "spacemoe_node_seconds_total",
    "codec_s": "spacemoe_node_seconds_total",
    "cpu_busy_s": "spacemoe_node_seconds_total",
    "energy_gap_s": "spacemoe_node_seconds_total",
    "uptime_s": "spacemoe_node_uptime_seconds",
    "rss_bytes": "spacemoe_node_memory_bytes",
    "memory_available_bytes": "spacemoe_node_memory_bytes",
    "bytes_received": "spacemoe_node_transferred_bytes_total",
    "bytes_sent": "spacemoe_node_transferred_bytes_total",
    "shard_bytes_received": "spacemoe_node_transferred_bytes_total",
    "tokens_served": "spacemoe_node_served_total",
    "requests_served": "spacemoe_node_served_total",
    "expert_rows_served": "spacemoe_node_served_total",
}
_BY_UNIT = {
    "degC": ("spacemoe_node_temperature_celsius", 1.0),
    "W": ("spacemoe_node_power_watts", 1.0),
    "V": ("spacemoe_node_voltage_volts", 1.0),
    "J": ("spacemoe_node_energy_joules_total", 1.0),
    "1": ("spacemoe_node_share_ratio", 1.0),
    "%": ("spacemoe_node_share_ratio", 0.01),
}
_ERRORS = re.compile(r"errors\.([a-z_]{1,40})\.(.{1,120})", re.DOTALL)


def family_of(sample: Sample) -> tuple[str, tuple[str, ...], float]:
    """(family, its labels but `node`, what the value is multiplied by) of a node's sample. A counter never goes below 0."""
    labels = (sample.name, sample.scope, sample.provenance)
    below = sample.value is not None and sample.value < 0
    if (found := _ERRORS.fullmatch(sample.name)) and not below:
        return "spacemoe_node_errors_total", (found[1], found[2]), 1.0
    family, factor = _BY_UNIT.get(sample.unit, (_BY_NAME.get(sample.name), 1.0))
    if family is None or (below and FAMILIES[family].counter):
        return "spacemoe_node_sample", (*labels, sample.unit), 1.0
    return family, labels, factor
