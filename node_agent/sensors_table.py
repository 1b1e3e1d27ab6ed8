"""What `node-agent sensors` shows: every sensor with its value and how far to believe it, and what was left out and why.

Fits 100 columns. Leaves out: finding and reading (sensors.py).
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from node_agent import sensors
from node_agent.wire import Sample

WIDTH = 100
NAME_WIDTH = 41


@dataclass(frozen=True)
class Row:
    """One sensor's reading. `reason`: why it is not 'ok'. `rate_source`: 'driver', 'burst' (seen in one) or None (not known)."""

    sample: Sample
    reason: str | None
    rate_hz: float | None
    rate_source: str | None


def rows(found: sensors.Found, burst: bool = False) -> list[Row]:
    """Reads every sensor once; with `burst`, rates that no driver tells are measured, at half a second each."""
    made = []
    for sensor in found.sensors:
        sample, reason = sensors.take(sensor)
        rate_hz, source = sensor.rate_hz, "driver" if sensor.rate_hz is not None else None
        if burst and rate_hz is None and sample.validity == "ok":
            rate_hz = sensors.measured_rate_hz(sensor)
            source = "burst" if rate_hz is not None else None
        made.append(Row(sample, reason, rate_hz, source))
    return made


def as_tree(found: sensors.Found, read: list[Row]) -> dict:
    """The JSON object."""
    return {
        "sensors": [
            asdict(row.sample) | {"reason": row.reason, "rate_hz": row.rate_hz, "rate_source": row.rate_source}
            for row in read
        ],
        "total": [sensor.name for sensor in found.total],
        "total_scope": found.total_scope,
        "left_out": [{"path": str(item.path), "reason": item.reason} for item in found.left_out],
    }


def as_table(found: sensors.Found, read: list[Row], sysroot: Path) -> str:
    """The same as text."""
    lines = []
    if read:
        lines.append(_line("name", "value", "unit", "scope", "provenance", "validity", "rate Hz"))
        for row in read:
            sample = row.sample
            value = "-" if sample.value is None else _number(sample.value)
            name = sample.name if len(sample.name) <= NAME_WIDTH else sample.name[: NAME_WIDTH - 1] + "~"
            rate = "-" if row.rate_hz is None else f"{row.rate_hz:.4g}"
            lines.append(_line(name, value, sample.unit, sample.scope, sample.provenance, sample.validity, rate))
        lines += _wrapped("not ok", [f"{row.sample.name}: {row.reason}" for row in read if row.reason])
        total = " + ".join(sensor.name for sensor in found.total)
        lines += _wrapped("", [f"total: {total}: {found.total_scope}" if total else "total: no sensor for it"])
    else:
        lines += _wrapped("", [f"no sensors below {sysroot}: neither temperature nor power can be told"])
    lines += _wrapped("left out", [f"{item.path}: {item.reason}" for item in found.left_out])
    return "\n".join(lines)


def _number(value: float) -> str:
    text = f"{value:.3f}"
    return text if len(text) <= 11 else f"{value:.4g}"


def _line(name: str, value: str, unit: str, scope: str, provenance: str, validity: str, rate: str) -> str:
    return f"{name:{NAME_WIDTH}} {value:>11} {unit:4} {scope:6} {provenance:10} {validity:8} {rate:>8}".rstrip()


def _wrapped(title: str, items: list[str]) -> list[str]:
    indent = "  " if title else ""
    lines = [f"{title}:"] if title and items else []
    for item in items:
        # What a folder or label is called comes from outside: nothing of it may steer the terminal.
        plain = "".join(c if c.isprintable() else "?" for c in item)
        lines += textwrap.wrap(plain, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
    return lines
