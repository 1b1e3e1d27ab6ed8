"""Reads tables of a scenario's TOML into dataclasses of checked numbers, times and choices. Pure.

Leaves out which tables there are (scenario.py): here is what a value may be and how a wrong one is named.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime, timezone
from typing import Any

MAX_SATELLITES = 100_000


class ScenarioError(ValueError):
    """A scenario cannot be used; the text names the file, the field and what to write."""


_RANGES: dict[str, tuple[float, float]] = {
    "scale": (0.01, 10_000.0),
    "altitude_km": (160.0, 2_000.0),
    "inclination_deg": (0.0, 180.0),
    "planes": (1, 1_000),
    "per_plane": (1, 1_000),
    "phasing": (0, 999),
    "raan_deg": (-360.0, 360.0),
    "argument_deg": (-360.0, 360.0),
    "start_c": (-100.0, 150.0),
    "array_w": (0.0, 1e6),
    "platform_w": (0.0, 1e6),
    "battery_wh": (0.001, 1e6),
    "charge_efficiency": (0.01, 1.0),
    "discharge_efficiency": (0.01, 1.0),
    "start_soc": (0.0, 1.0),
    "floor_soc": (0.0, 1.0),
    "start_capacity_share": (0.2, 1.0),
    "kappa": (0.0, 100.0),
    "idle_w": (0.0, 1_000.0),
    "busy_w": (0.0, 1_000.0),
    "fan_w": (0.0, 1_000.0),
    "leak_w_per_k": (0.0, 100.0),
    "r_k_per_w": (0.0, 1_000.0),
    "tau_s": (0.001, 1e6),
    "limit_c": (-50.0, 200.0),
    "load_s": (0.0, 1e6),
    "alone_s": (0.0, 1e5),
    "isl_rate_bps": (1.0, 1e13),
    "gsl_rate_bps": (1.0, 1e13),
    "longest_isl_km": (1.0, 20_000.0),
    "longest_gsl_km": (100.0, 20_000.0),
    "least_elevation_deg": (0.0, 90.0),
    "latitude_deg": (-90.0, 90.0),
    "longitude_deg": (-360.0, 360.0),
    "height_km": (-1.0, 99.0),
    "satellite": (0, MAX_SATELLITES - 1),
    "memory_mb": (1, 1_000_000),
}
_CHOICES = {
    "kind": {"constellation": ("delta", "star"), "bus": ("3U", "6U", "12U")},
    "topology": {"links": ("grid", "sight")},
}


def number(value: Any, name: str, whole: bool, where: str) -> Any:
    """`value` if it may be the entry `name`.  Raises: ScenarioError."""
    low, high = _RANGES[name]
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # false for nan
        kind = "a whole number" if whole else "a number"
        raise ScenarioError(f"{where}: {name} is {str(value)[:40]}; give {kind} from {low:g} to {high:g}")
    return value if whole else float(value)


def table(kind: type, name: str, tree: dict[str, Any], where: str, special: tuple[str, ...] = ()) -> Any:
    """A dataclass of plain numbers and choices from a TOML table; entries `special` are taken as they are, for the caller to
    check.  Raises: ScenarioError."""
    entries = tree.get(name, {})
    if not isinstance(entries, dict):
        raise ScenarioError(f"{where}: {name} is no table; write [{name}]")
    known = {field.name: field.type for field in fields(kind)}
    for key in entries:
        if key not in known:
            raise ScenarioError(f"{where}: [{name}] {key[:40]} is unknown; use {', '.join(known)}")
    values: dict[str, Any] = {}
    for key, value in entries.items():
        at = f"{where}: [{name}]"
        if key in special:
            values[key] = value
        elif known[key] == "datetime":
            values[key] = _instant(value, at)
        elif known[key] == "str":
            choices = _CHOICES[key][name]
            if value not in choices:
                raise ScenarioError(f"{at} {key} is {str(value)[:40]!r}; use {', '.join(choices)}")
            values[key] = value
        elif known[key].startswith("tuple"):
            if not isinstance(value, list) or not 1 <= len(value) <= 8:
                raise ScenarioError(f"{at} {key}: give a list of 1 to 8 numbers")
            values[key] = tuple(number(item, key, False, at) for item in value)
        else:
            values[key] = number(value, key, known[key] == "int", at)
    try:
        return kind(**values)
    except TypeError:
        raise ScenarioError(f"{where}: [{name}] needs {', '.join(set(known) - set(values))}") from None


def _instant(value: Any, where: str) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ScenarioError(f"{where} start is {str(value)[:40]!r}; give a time with its zone, as 2026-06-21T12:00:00Z")
    if not 1957 <= value.year <= 2056:  # the two-digit years of TLEs
        raise ScenarioError(f"{where} start is in {value.year}; give a year from 1957 to 2056")
    return value.astimezone(timezone.utc)
