"""A Grafana dashboard of the fleet, made of the metrics that /metrics has. Pure: the JSON model that Grafana imports.

Source: grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model. Leaves out alert rules: the ground station
has alarms of its own, which the dashboard counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCHEMA = 39
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDE, HIGH = 12, 8
BY_NODE = 'node=~"$node"'


@dataclass(frozen=True)
class Panel:
    """`unit`: a name of Grafana's. `queries`: (PromQL, legend)."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"


PANELS = (
    Panel(
        "Nodes that are up", "short", (("sum(spacemoe_node_up)", "up"), ("count(spacemoe_node_up)", "known")), "stat"
    ),
    Panel(
        "Alarms not acknowledged",
        "short",
        (('sum by (severity) (spacemoe_alarms{state=~"unacknowledged|returned"})', "{{severity}}"),),
        "stat",
    ),
    Panel(
        "Temperature",
        "celsius",
        ((f'spacemoe_node_temperature_celsius{{{BY_NODE}, sensor="temp_c"}}', "{{node}} ({{provenance}})"),),
    ),
    Panel(
        "Power", "watt", ((f'spacemoe_node_power_watts{{{BY_NODE}, sensor="power_w"}}', "{{node}} ({{provenance}})"),)
    ),
    Panel(
        "Mean power by energy",
        "watt",
        ((f'rate(spacemoe_node_energy_joules_total{{{BY_NODE}, sensor="energy_j"}}[$__rate_interval])', "{{node}}"),),
    ),
    Panel(
        "Duty and its cap",
        "percentunit",
        ((f'spacemoe_node_share_ratio{{{BY_NODE}, sensor=~"duty|duty_cap"}}', "{{node}} {{sensor}}"),),
    ),
    Panel("Since last heard", "s", ((f"spacemoe_node_age_seconds{{{BY_NODE}}}", "{{node}}"),)),
    Panel("Memory", "bytes", ((f"spacemoe_node_memory_bytes{{{BY_NODE}}}", "{{node}} {{sensor}}"),)),
    Panel(
        "Data plane",
        "Bps",
        ((f"rate(spacemoe_node_transferred_bytes_total{{{BY_NODE}}}[$__rate_interval])", "{{node}} {{sensor}}"),),
    ),
    Panel(
        "Rows served",
        "cps",
        (
            (
                f'rate(spacemoe_node_served_total{{{BY_NODE}, sensor="expert_rows_served"}}[$__rate_interval])',
                "{{node}}",
            ),
        ),
    ),
    Panel("Tokens", "cps", (("rate(spacemoe_tokens_total[$__rate_interval])", "tokens/s"),)),
    Panel(
        "Messages lost or not taken",
        "cps",
        (
            (
                f"sum by (node, reason) (rate(spacemoe_node_messages_not_taken_total{{{BY_NODE}}}[$__rate_interval])) > 0",
                "{{node}} {{reason}}",
            ),
            ("sum by (kind) (rate(spacemoe_malformed_messages_total[$__rate_interval]))", "malformed {{kind}}"),
        ),
    ),
    Panel(
        "Errors of agents",
        "cps",
        ((f"rate(spacemoe_node_errors_total{{{BY_NODE}}}[$__rate_interval]) > 0", "{{node}} {{plane}} {{kind}}"),),
    ),
    Panel(
        "Archive",
        "cps",
        (
            ("sum(rate(spacemoe_archive_written_total[$__rate_interval]))", "written"),
            ("sum(rate(spacemoe_archive_dropped_total[$__rate_interval]))", "dropped"),
            ("spacemoe_archive_queued_records", "queued"),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The JSON model."""
    panels = []
    for i, panel in enumerate(PANELS):
        place = {"x": i % 2 * WIDE, "y": i // 2 * HIGH, "w": WIDE, "h": HIGH}
        targets = [
            {"refId": chr(65 + k), "expr": query, "legendFormat": legend, "datasource": DATASOURCE}
            for k, (query, legend) in enumerate(panel.queries)
        ]
        panels.append(
            {
                "id": i + 1,
                "type": panel.kind,
                "title": panel.title,
                "gridPos": place,
                "datasource": DATASOURCE,
                "targets": targets,
                "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
                "options": {},
            }
        )
    choices = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "node",
            "label": "Node",
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": "label_values(spacemoe_node_up, node)", "refId": "node"},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]
    return {
        "uid": "spacemoe",
        "title": "SpaceMoE fleet",
        "tags": ["spacemoe"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "timezone": "utc",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": choices},
        "annotations": {"list": []},
        "panels": panels,
    }
