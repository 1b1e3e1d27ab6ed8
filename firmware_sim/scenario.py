"""A scenario file (TOML): which satellites, what they are like, which boards stand in for them, when it starts, how fast time goes.

Pure: text in, checked dataclasses out; what a board's own entries mean is checked by run.py, which simulates boards, and what a
number may be by scenario_table.py. Leaves out: the physics (orbit, thermal, battery) and whoever steps it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from firmware_sim.scenario_table import MAX_SATELLITES, ScenarioError, number, table
from node_agent import toml_file
from node_agent.wire import WireError, check_id

MAX_SCENARIO_BYTES = 1024 * 1024
MAX_BOARDS = 256
GROUND = "ground"


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
    """Solar array (watts in full sun, pointed), battery and what the satellite itself needs.

    `start_capacity_share`: of a new battery's capacity, what is left at the start (1: new; 0.8: as aged as many are let become).
    """

    array_w: float = 40.0
    platform_w: float = 6.0
    battery_wh: float = 80.0
    charge_efficiency: float = 0.95
    discharge_efficiency: float = 0.95
    start_soc: float = 0.9
    floor_soc: float = 0.3
    start_capacity_share: float = 1.0


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
class Links:
    """Emulated links between the boards' satellites and the hub of the data plane.

    `gateway`: the hub, a satellite's number (in the file also a board's node), or None for a ground station ("ground") at
    latitude, longitude and height, which reaches satellites from `least_elevation_deg` up, or within `longest_gsl_km` where that
    is given. `topology` "grid": each satellite of the constellation links to the next in its plane and in the next plane, and all
    relay; "sight": only the boards' satellites and the gateway relay, each to whoever it sees. A link between satellites ends
    at `longest_isl_km` and where the line of sight comes within 80 km of the ground. Rates are the mission's, not worked out.
    """

    gateway: int | None = None
    topology: str = "grid"
    isl_rate_bps: float = 100e6
    gsl_rate_bps: float = 10e6
    longest_isl_km: float | None = None
    longest_gsl_km: float | None = None
    least_elevation_deg: float | None = None
    latitude_deg: float | None = None
    longitude_deg: float | None = None
    height_km: float = 0.0


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
    links: Links | None = None


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
    satellite = number(rest.pop("satellite", min(index, satellites - 1)), "satellite", True, at)
    if satellite >= satellites:
        raise ScenarioError(f"{at}: satellite {satellite} is not there; the constellation has 0 to {satellites - 1}")
    memory_mb = number(rest.pop("memory_mb", 512), "memory_mb", True, at)
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


def _links(tree: dict[str, Any], constellation: Constellation, boards: tuple[ScenarioBoard, ...], where: str) -> Links:
    at = f"{where}: [links]"
    links = table(Links, "links", tree, where, special=("gateway",))
    gateway = tree["links"].get("gateway")
    nodes = {board.node: board.satellite for board in boards}
    if gateway != GROUND and (isinstance(gateway, bool) or not isinstance(gateway, (int, str))):
        raise ScenarioError(
            f"{at} gateway is {str(gateway)[:40]}; give \"{GROUND}\", a satellite's number or a board's node"
        )
    if isinstance(gateway, str) and gateway != GROUND and gateway not in nodes:
        raise ScenarioError(
            f"{at} gateway {gateway[:40]!r} is no board's node; give \"{GROUND}\", a satellite's number or a node"
        )
    number_of = None if gateway == GROUND else nodes.get(gateway, gateway)
    of_ground = ("latitude_deg", "longitude_deg", "height_km", "gsl_rate_bps", "longest_gsl_km", "least_elevation_deg")
    if number_of is None:
        if links.latitude_deg is None or links.longitude_deg is None:
            raise ScenarioError(f"{at} gateway {GROUND} needs latitude_deg and longitude_deg")
        if (links.longest_gsl_km is None) == (links.least_elevation_deg is None):
            raise ScenarioError(f"{at} gateway {GROUND} needs one of least_elevation_deg and longest_gsl_km")
    elif given := [key for key in of_ground if key in tree["links"]]:
        raise ScenarioError(f'{at} {given[0]} is of a ground station; remove it or give gateway = "{GROUND}"')
    elif not 0 <= number_of < constellation.satellites:
        raise ScenarioError(
            f"{at} gateway {number_of} is not there; the constellation has 0 to {constellation.satellites - 1}"
        )
    return replace(links, gateway=number_of)


def parse(text: str, where: str = "scenario") -> Scenario:
    """A scenario from TOML.  Raises: ScenarioError."""
    try:
        tree = toml_file.loads(text)
    except toml_file.TomlError as error:
        raise ScenarioError(f"{where} is not TOML: {str(error)[:200]}; correct that line") from None
    try:
        return _scenario(tree, where)
    except (ValueError, OverflowError) as error:
        if isinstance(error, ScenarioError):
            raise
        raise ScenarioError(f"{where} holds a number that is too long; shorten it") from None


def _scenario(tree: dict[str, Any], where: str) -> Scenario:
    known = ("name", "time", "constellation", "bus", "power", "payload", "links", "run", "board")
    for key in tree:
        if key not in known:
            raise ScenarioError(f"{where}: {key[:40]} is unknown; use {', '.join(known)}")
    name = tree.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 100:
        raise ScenarioError(f"{where}: give name = a text of at most 100 characters")
    constellation = table(Constellation, "constellation", tree, where)
    if constellation.satellites > MAX_SATELLITES:
        raise ScenarioError(f"{where}: {constellation.satellites} satellites; at most {MAX_SATELLITES}")
    payload = table(Payload, "payload", tree, where)
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
        table(Time, "time", tree, where),
        constellation,
        table(Bus, "bus", tree, where),
        table(Power, "power", tree, where),
        payload,
        table(Run, "run", tree, where),
        boards,
        _links(tree, constellation, boards, where) if "links" in tree else None,
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
