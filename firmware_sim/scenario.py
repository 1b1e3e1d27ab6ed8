"""A scenario file (TOML): which satellites, what they are like, which boards stand in for them, when it starts, how fast time goes.

Pure: text in, checked dataclasses out; what a board's own entries mean is checked by run.py, which simulates boards.
Leaves out: the physics (orbit, thermal, battery) and whoever steps it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tomllib

from node_agent.wire import WireError, check_id

MAX_SCENARIO_BYTES = 1024 * 1024
MAX_BOARDS = 256
MAX_SATELLITES = 100_000


class ScenarioError(ValueError):
    """A scenario cannot be used; the text names the file, the field and what to write."""


@dataclass(frozen=True)
class Time:
    """`start`: mission time of the first step, UTC; `scale`: mission seconds per second (energy claims hold only at 1)."""

    start: datetime
    scale: float = 1.0


@dataclass(frozen=True)
class Constellation:
    """Walker pattern `kind` i:t/p/f with `planes` of `per_plane` satellites; angles of the first satellite at the start."""

    kind: str = "delta"
    altitude_km: float = 550.0
    inclination_deg: float = 53.0
    planes: int = 1
    per_plane: int = 1
    phasing: int = 0
    raan_deg: float = 0.0
    argument_deg: float = 0.0

    @property
    def satellites(self) -> int:
        return self.planes * self.per_plane


@dataclass(frozen=True)
class Bus:
    """The satellite's structure by its size class, its radiator, and how warm it is at the start."""

    kind: str = "12U"
    start_c: float = 20.0


@dataclass(frozen=True)
class Power:
    """Solar array (watts in full sun, pointed), battery and what the satellite itself needs."""

    array_w: float = 40.0
    platform_w: float = 6.0
    battery_wh: float = 80.0
    charge_efficiency: float = 0.95
    discharge_efficiency: float = 0.95
    start_soc: float = 0.9
    floor_soc: float = 0.3


@dataclass(frozen=True)
class Payload:
    """Coupling of a board to its satellite: P_v = kappa (P_board - fan_w) + leak_w_per_k (T_v - T_board).

    T_v is the avionics node's temperature and the rises of branches `r_k_per_w`, `tau_s` (default: in all those of BUPT-1's
    Raspberry Pi 4B in orbit). `idle_w` and `busy_w`: the board's power at duty 0 and 1 (`spacemoe calibrate` measures them).
    """

    kappa: float = 1.0
    idle_w: float = 3.0
    busy_w: float = 8.0
    fan_w: float = 0.0
    leak_w_per_k: float = 0.0
    r_k_per_w: tuple[float, ...] = (16.6,)
    tau_s: tuple[float, ...] = (396.0,)
    limit_c: float = 80.0


@dataclass(frozen=True)
class ScenarioBoard:
    """A board that stands in for satellite number `satellite`. `guard`: of its agent's configuration, table [guard], which the
    agent checks; `simulated`: its further keys, which spec.py checks."""

    node: str
    profile: str
    satellite: int
    memory_mb: int
    guard: dict[str, Any]
    simulated: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """How long boards are kept at work, and how long they are then left without a ground station, in real seconds."""

    load_s: float = 60.0
    alone_s: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """The whole file."""

    name: str
    time: Time
    constellation: Constellation
    bus: Bus
    power: Power
    payload: Payload
    run: Run
    boards: tuple[ScenarioBoard, ...]


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
    "satellite": (0, MAX_SATELLITES - 1),
    "memory_mb": (1, 1_000_000),
}
_CHOICES = {"kind": {"constellation": ("delta", "star"), "bus": ("3U", "6U", "12U")}}


def _number(value: Any, name: str, whole: bool, where: str) -> Any:
    low, high = _RANGES[name]
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # false for nan
        kind = "a whole number" if whole else "a number"
        raise ScenarioError(f"{where}: {name} is {str(value)[:40]}; give {kind} from {low:g} to {high:g}")
    return value if whole else float(value)


def _table(kind: type, name: str, tree: dict[str, Any], where: str) -> Any:
    """A dataclass of plain numbers and choices from a TOML table.  Raises: ScenarioError."""
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
        if known[key] == "datetime":
            values[key] = _instant(value, at)
        elif known[key] == "str":
            choices = _CHOICES[key][name]
            if value not in choices:
                raise ScenarioError(f"{at} {key} is {str(value)[:40]!r}; use {', '.join(choices)}")
            values[key] = value
        elif known[key].startswith("tuple"):
            if not isinstance(value, list) or not 1 <= len(value) <= 8:
                raise ScenarioError(f"{at} {key}: give a list of 1 to 8 numbers")
            values[key] = tuple(_number(item, key, False, at) for item in value)
        else:
            values[key] = _number(value, key, known[key] == "int", at)
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


def _plain(key: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return re.fullmatch(r"[a-z_]{1,40}", key) is not None and number and -1e9 < value < 1e9


def _board(entry: Any, index: int, satellites: int, where: str) -> ScenarioBoard:
    at = f"{where}: [[board]] {index + 1}"
    if not isinstance(entry, dict):
        raise ScenarioError(f"{at} is no table; write [[board]]")
    rest = dict(entry)
    node, profile = rest.pop("node", None), rest.pop("profile", None)
    if not isinstance(node, str) or not isinstance(profile, str):
        raise ScenarioError(f"{at} needs the texts node and profile")
    try:
        check_id(node)
    except WireError as error:
        raise ScenarioError(f"{at}: {error}") from None
    satellite = _number(rest.pop("satellite", min(index, satellites - 1)), "satellite", True, at)
    if satellite >= satellites:
        raise ScenarioError(f"{at}: satellite {satellite} is not there; the constellation has 0 to {satellites - 1}")
    memory_mb = _number(rest.pop("memory_mb", 512), "memory_mb", True, at)
    for key in ("sysroot", "pid_file", "state_file", "load_trace"):
        if key in rest:
            raise ScenarioError(f"{at}: {key} is set by whoever starts the boards; remove it")
    guard = rest.pop("guard", {})
    if not isinstance(guard, dict) or not all(_plain(key, value) for key, value in guard.items()):
        raise ScenarioError(f"{at}: guard is {str(guard)[:40]!r}; give a table such as {{ temp_limit_c = 85 }}")
    try:
        json.dumps(rest, allow_nan=False)
    except (TypeError, ValueError):
        raise ScenarioError(f"{at} holds a date, or a number that is none; give numbers, texts and lists") from None
    return ScenarioBoard(node, profile, satellite, memory_mb, guard, rest)


def parse(text: str, where: str = "scenario") -> Scenario:
    """A scenario from TOML.  Raises: ScenarioError."""
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits
        raise ScenarioError(f"{where} is not TOML: {str(error)[:200]}; correct that line") from None
    try:
        return _scenario(tree, where)
    except (ValueError, OverflowError) as error:
        if isinstance(error, ScenarioError):
            raise
        raise ScenarioError(f"{where} holds a number that is too long; shorten it") from None


def _scenario(tree: dict[str, Any], where: str) -> Scenario:
    known = ("name", "time", "constellation", "bus", "power", "payload", "run", "board")
    for key in tree:
        if key not in known:
            raise ScenarioError(f"{where}: {key[:40]} is unknown; use {', '.join(known)}")
    name = tree.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 100:
        raise ScenarioError(f"{where}: give name = a text of at most 100 characters")
    constellation = _table(Constellation, "constellation", tree, where)
    if constellation.satellites > MAX_SATELLITES:
        raise ScenarioError(f"{where}: {constellation.satellites} satellites; at most {MAX_SATELLITES}")
    payload = _table(Payload, "payload", tree, where)
    if len(payload.r_k_per_w) != len(payload.tau_s):
        raise ScenarioError(f"{where}: [payload] r_k_per_w and tau_s go together: give as many of each")
    if payload.busy_w <= payload.idle_w:
        raise ScenarioError(f"{where}: [payload] busy_w is not above idle_w; give the board's power at full load")
    entries = tree.get("board", [])
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_BOARDS:
        raise ScenarioError(f"{where}: give 1 to {MAX_BOARDS} tables [[board]]")
    boards = tuple(_board(entry, index, constellation.satellites, where) for index, entry in enumerate(entries))
    for what in ("node", "satellite"):
        if len({getattr(board, what) for board in boards}) != len(boards):
            raise ScenarioError(f"{where}: two boards have the same {what}; give each its own")
    return Scenario(
        name,
        _table(Time, "time", tree, where),
        constellation,
        _table(Bus, "bus", tree, where),
        _table(Power, "power", tree, where),
        payload,
        _table(Run, "run", tree, where),
        boards,
    )


def read(path: Path) -> Scenario:
    """A scenario file.  Raises: ScenarioError."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SCENARIO_BYTES + 1)
    except OSError as error:
        raise ScenarioError(f"{path} cannot be read ({error.strerror}); give a scenario file (TOML)") from None
    if len(content) > MAX_SCENARIO_BYTES:
        raise ScenarioError(f"{path} is over the limit of {MAX_SCENARIO_BYTES} bytes")
    try:
        return parse(content.decode(), str(path))
    except UnicodeDecodeError:
        raise ScenarioError(f"{path} is not UTF-8 text; save it again as UTF-8") from None
