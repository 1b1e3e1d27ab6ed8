"""Home Assistant's MQTT discovery: a retained message per signal of a node, which points at the telemetry that the node sends anyway.

Pure. Home Assistant has to be on the same broker. Source: home-assistant.io/integrations/mqtt (discovery, sensor, availability).
Leaves out commands: operating a fleet from there would go past roles and confirmations.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from node_agent import wire

PREFIX = "homeassistant"
EXPIRE_S = 15
MAX_SIGNALS = 64
# By our unit: device class, Home Assistant's unit.
CLASSES = {
    "degC": ("temperature", "°C"),
    "W": ("power", "W"),
    "J": ("energy", "J"),
    "V": ("voltage", "V"),
    "s": ("duration", "s"),
}
PLAIN_UNITS = {"bytes": ("data_size", "B"), "%": (None, "%"), "1": (None, None)}
SIGNAL = re.compile(r"[A-Za-z0-9_.:-]{1,120}")


@dataclass(frozen=True)
class Signal:
    """A signal of a node. `rising`: it counts, and only an agent's start sets it back."""

    name: str
    unit: str

    @property
    def rising(self) -> bool:
        return self.unit == "J"


BASE = (
    Signal("temp_c", "degC"),
    Signal("power_w", "W"),
    Signal("energy_j", "J"),
    Signal("duty", "1"),
    Signal("uptime_s", "s"),
)


def messages(fleet: str, nodes: Iterable[tuple[str, str, Iterable[Signal]]]) -> dict[str, dict[str, Any]]:
    """Topic -> content for (node, board, signals). Signals whose names cannot stand in a template are left out.  Raises: WireError."""
    topics = wire.Topics(fleet)
    made = {}
    for node, board, signals in nodes:
        wire.check_id(node)
        for signal in list(signals)[:MAX_SIGNALS]:
            if SIGNAL.fullmatch(signal.name):
                key = f"{re.sub('[^A-Za-z0-9_-]', '_', signal.name)[:40]}_{hashlib.sha256(signal.name.encode()).hexdigest()[:6]}"
                made[f"{PREFIX}/sensor/spacemoe_{fleet}_{node}/{key}/config"] = _content(
                    topics, fleet, node, board, signal, key
                )
    return made


def _content(topics: wire.Topics, fleet: str, node: str, board: str, signal: Signal, key: str) -> dict[str, Any]:
    picked = (
        f"value_json.samples | selectattr('name', 'eq', '{signal.name}') | selectattr('validity', 'eq', 'ok') "
        "| map(attribute='value') | first | default(none)"
    )
    content: dict[str, Any] = {
        "name": signal.name,
        "unique_id": f"spacemoe_{fleet}_{node}_{key}",
        "state_topic": topics.telemetry(node),
        "value_template": "{{ " + picked + " }}",
        "state_class": "total_increasing" if signal.rising else "measurement",
        "expire_after": EXPIRE_S,
        "availability": [
            {
                "topic": topics.status(node),
                "value_template": "{{ value_json.status }}",
                "payload_available": "online",
                "payload_not_available": "offline",
            }
        ],
        "device": {
            "identifiers": [f"spacemoe_{fleet}_{node}"],
            "name": f"{fleet} {node}",
            "model": board[:200],
            "manufacturer": "spacemoe-kit",
        },
        "origin": {"name": "spacemoe-kit"},
    }
    kind, unit = CLASSES.get(signal.unit) or PLAIN_UNITS.get(signal.unit, (None, signal.unit[:40]))
    if kind:
        content["device_class"] = kind
    if unit:
        content["unit_of_measurement"] = unit
    return content
