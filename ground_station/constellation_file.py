"""What `spacemoe sim run` plays, read from a TOML file and checked: a constellation, a synthetic MoE, placements and policies.

Shipped files are in constellations/. Tables [constellation], [bus], [power] and [payload] are those of a scenario (firmware_sim.scenario);
without the last three, heat and battery do not count. Leaves out: the run (constellation_run.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from firmware_sim.orbit import EARTH_RADIUS_KM, period_s
from firmware_sim.scenario import Bus, Constellation, Payload, Power
from firmware_sim.scenario_table import ScenarioError, table
from ground_station import selection
from ground_station.constellation_network import GATEWAYS, Links
from ground_station.constellation_placement import PLACEMENTS, Variant
from node_agent import frame, toml_file

SHIPPED = Path(__file__).with_name("constellations")
MAX_FILE_BYTES = 1 << 20
MAX_SATELLITES = 20_000
MAX_EXPERTS = 16_384  # of all layers
MAX_TOKENS = 4_000_000  # drawn in a run, by one contender
MAX_CONTENDERS = 64
MAX_KNOB = 1e12
ROUTINGS = ("lognormal", "zipf", "calibration")
ADMISSIONS = ("cap", "throttle")

_RANGES: dict[str, tuple[float, float]] = {
    "slots": (1, 20_000),
    "slot_s": (0.1, 600.0),
    "tokens_per_s": (1e-6, 1e9),
    "batch_tokens": (1, 4096),
    "looks": (1, 16),
    "coverage": (1e-6, 1.0),
    "ms_price": (0.0, 1e6),
    "survival": (0.01, 1.0),
    "slew_limit_rad_s": (1e-6, 100.0),
    "layers": (1, 256),
    "experts": (2, 1024),
    "top_k": (1, 32),
    "sigma": (0.0, 5.0),
    "exponent": (0.0, 5.0),
    "logit_spread": (0.01, 10.0),
    "attention_ms": (0.0, 1e6),
    "attention_joules": (0.0, 1e6),
    "megabytes": (1e-3, 1e6),
    "ms": (1e-6, 1e6),
    "joules": (0.0, 1e6),
    "error": (0.0, 10.0),
    "satellite_mb": (1e-3, 1e9),
    "copies": (1.0, 1000.0),
}
_CHOICES = {"routing": ROUTINGS, "admission": ADMISSIONS, "gateways": GATEWAYS}


class ConstellationFileError(ValueError):
    """A file of `sim run` cannot be used; the text names the entry and what to give."""


@dataclass(frozen=True)
class Play:
    """`slots` of `slot_s` seconds of mission time; without slot_s they divide one orbit. In each, `batch_tokens` tokens are drawn, in
    `looks` parts, with prices set anew before each. coverage: the least share of gates that `budgeted` keeps; ms_price: of a
    millisecond, in the currency of prices (a nat)."""

    slots: int
    tokens_per_s: float
    slot_s: float | None = None
    batch_tokens: int = 64
    looks: int = 4
    coverage: float = 0.5
    ms_price: float = 0.0


@dataclass(frozen=True)
class Model:
    """The synthetic MoE. `routing`: shares of use are log-normal (`sigma`), fall as rank^-`exponent` (zipf), or are those of the bundle's
    calibration with its pair counts, layer l as the bundle's l mod its own. `source`: where shape and numbers are from, in words."""

    layers: int
    experts: int
    top_k: int
    routing: str
    logit_spread: float
    source: str
    sigma: float | None = None
    exponent: float | None = None


@dataclass(frozen=True)
class Attention:
    """Of one token in one layer, on the layer's gateway."""

    attention_ms: float = 0.0
    attention_joules: float = 0.0


@dataclass(frozen=True)
class Memory:
    """`satellite_mb` for experts on each satellite but gateways, and at most `copies` copies of all experts in the best precision."""

    satellite_mb: float
    copies: float = 1.0


@dataclass(frozen=True)
class PlacementRow:
    """A placement policy, and where its gateways are."""

    policy: str
    label: str
    gateways: str = "central"


@dataclass(frozen=True)
class PolicyRow:
    """A selection policy with its knobs, and what bounds its load (see constellation_run)."""

    policy: str
    label: str
    admission: str
    knobs: dict[str, float]


@dataclass(frozen=True)
class Satellite:
    """What every satellite is like, where heat and battery count."""

    bus: Bus
    power: Power
    payload: Payload


@dataclass(frozen=True)
class Study:
    """The whole file; slot_s is worked out. cost_source: where joules and ms are from, in words."""

    name: str
    start: datetime
    seed: int
    play: Play
    slot_s: float
    constellation: Constellation
    links: Links
    model: Model
    attention: Attention
    variants: tuple[Variant, ...]
    cost_source: str
    memory: Memory
    placements: tuple[PlacementRow, ...]
    policies: tuple[PolicyRow, ...]
    satellite: Satellite | None

    def narrowed(
        self, slots: int | None, seed: int | None, placements: list[str] | None, policies: list[str] | None
    ) -> Study:
        """With another number of slots, another seed, only some rows (by label); None: as it is.  Raises: ConstellationFileError."""
        study = self
        if slots is not None:
            _bounded(slots, "slots", int, "--slots")
            play = replace(self.play, slots=slots)
            study = replace(study, play=play, slot_s=_slot_s(play, self.constellation))
        if seed is not None:
            study = replace(study, seed=_seed(seed, "--seed"))
        for option, labels in (("placements", placements), ("policies", policies)):
            if labels is not None:
                rows = getattr(study, option)
                kept = tuple(row for row in rows if row.label in labels)
                if len(kept) != len(set(labels)):
                    known = ", ".join(repr(row.label) for row in rows)
                    raise ConstellationFileError(f"--{option}: not every one of them is there; there are {known}")
                study = replace(study, **{option: kept})
        _check(study, study.name)
        return study


def find(name: str) -> Study:
    """A study by its file, or one that ships with the kit by its name.  Raises: ConstellationFileError."""
    path = Path(name)
    if "/" not in name and not name.endswith(".toml"):
        path = SHIPPED / f"{name}.toml"
        if not path.is_file():
            names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.toml")))
            raise ConstellationFileError(f"{name[:100]} is no file and no constellation of the kit; there are {names}")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no path"
        raise ConstellationFileError(f"{str(path)[:200]} cannot be read ({why}); give a file (TOML)") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConstellationFileError(f"{path} is over the limit of {MAX_FILE_BYTES} bytes")
    try:
        tree = toml_file.loads(content)
    except toml_file.TomlError as error:
        raise ConstellationFileError(f"{path} is not TOML: {str(error)[:200]}; correct that line") from None
    return parse(tree, str(path))


def parse(tree: dict[str, Any], where: str = "constellation") -> Study:
    """A study from a TOML tree.  Raises: ConstellationFileError."""
    scenario_tables = ("constellation", "bus", "power", "payload")
    known = (
        "name",
        "start",
        "seed",
        "play",
        *scenario_tables,
        "links",
        "model",
        "costs",
        "memory",
        "placement",
        "policy",
    )
    for key in tree:
        if key not in known:
            raise ConstellationFileError(f"{where}: {_short(key)} is unknown; use {', '.join(known)}")
    costs = _sub(tree, "costs", where)
    source = _text(costs.pop("source", None), f"{where}: [costs] source")
    variants = tuple(
        _variant(name, costs.pop(name), f"{where}: [costs.{_short(name)}]")
        for name in [key for key, value in costs.items() if isinstance(value, dict)]
    )
    try:
        shape = table(Constellation, "constellation", tree, where)
        given = [name for name in ("bus", "power", "payload") if name in tree]
        if given and len(given) < 3:
            raise ConstellationFileError(
                f"{where}: {given[0]} goes with [bus], [power] and [payload]: give all or none"
            )
        satellite = None
        if given:
            satellite = Satellite(
                table(Bus, "bus", tree, where),
                table(Power, "power", tree, where),
                table(Payload, "payload", tree, where),
            )
    except ScenarioError as error:
        raise ConstellationFileError(str(error)) from None
    play = _dataclass(Play, _sub(tree, "play", where), f"{where}: [play]")
    study = Study(
        name=_text(tree.get("name"), f"{where}: name"),
        start=_start(tree.get("start"), where),
        seed=_seed(tree.get("seed", 0), f"{where}: seed"),
        play=play,
        slot_s=_slot_s(play, shape),
        constellation=shape,
        links=_dataclass(Links, _sub(tree, "links", where), f"{where}: [links]"),
        model=_dataclass(Model, _sub(tree, "model", where), f"{where}: [model]"),
        attention=_dataclass(Attention, costs, f"{where}: [costs]"),
        variants=variants,
        cost_source=source,
        memory=_dataclass(Memory, _sub(tree, "memory", where), f"{where}: [memory]"),
        placements=tuple(_placement(row, at) for row, at in _rows(tree, "placement", where)),
        policies=tuple(_policy(row, at) for row, at in _rows(tree, "policy", where)),
        satellite=satellite,
    )
    _check(study, where)
    return study


def _check(study: Study, where: str) -> None:
    """What no entry shows alone.  Raises: ConstellationFileError."""

    def refuse(text: str) -> None:
        raise ConstellationFileError(f"{where}: {text}")

    model, shape, play = study.model, study.constellation, study.play
    if shape.satellites > MAX_SATELLITES:
        refuse(f"{shape.satellites} satellites; at most {MAX_SATELLITES}")
    if model.top_k > model.experts:
        refuse(f"top_k {model.top_k} of {model.experts} experts; give at most {model.experts}")
    if model.layers * model.experts > MAX_EXPERTS:
        refuse(f"{model.layers} layers of {model.experts} experts; at most {MAX_EXPERTS} experts in all")
    if 2 * model.layers > shape.satellites:
        refuse(f"{model.layers} layers need a gateway each: give at least {2 * model.layers} satellites")
    if play.slots * play.batch_tokens > MAX_TOKENS:
        refuse(f"slots times batch_tokens is {play.slots * play.batch_tokens}; at most {MAX_TOKENS}")
    if play.batch_tokens % play.looks:
        refuse(f"batch_tokens {play.batch_tokens} is no multiple of looks {play.looks}; give one")
    if not study.variants:
        refuse(f"give a table such as [costs.{frame.PRECISIONS[0]}] with megabytes, ms, joules and error")
    for needed, routing in (("sigma", "lognormal"), ("exponent", "zipf")):
        if (getattr(model, needed) is None) == (model.routing == routing):
            refuse(f'[model] {needed} goes with routing = "{routing}": give both or neither')
    for name, rows in (("placement", study.placements), ("policy", study.policies)):
        if len({row.label for row in rows}) != len(rows):
            refuse(f"two tables [[{name}]] have the same label; give each its own")
    if len(study.placements) * len(study.policies) > MAX_CONTENDERS:
        refuse(f"placements times policies is over {MAX_CONTENDERS}; give fewer")
    if study.satellite is not None:
        payload = study.satellite.payload
        if len(payload.r_k_per_w) != len(payload.tau_s) or payload.busy_w <= payload.idle_w:
            refuse("[payload] needs as many r_k_per_w as tau_s, and busy_w above idle_w")


def _slot_s(play: Play, shape: Constellation) -> float:
    if play.slot_s is not None:
        return play.slot_s
    return float(period_s(EARTH_RADIUS_KM + shape.altitude_km)) / play.slots


def _short(value: object) -> str:
    try:
        return str(value)[:40]
    except ValueError:  # Python writes no whole number of thousands of digits
        return "a number of thousands of digits"


def _sub(tree: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    found = tree.get(name, {})
    if not isinstance(found, dict):
        raise ConstellationFileError(f"{where}: {name} is no table; write [{name}]")
    return dict(found)


def _rows(tree: dict[str, Any], name: str, where: str) -> list[tuple[dict[str, Any], str]]:
    rows = tree.get(name)
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_CONTENDERS or not all(isinstance(r, dict) for r in rows):
        raise ConstellationFileError(f"{where}: give 1 to {MAX_CONTENDERS} tables [[{name}]]")
    return [(dict(row), f"{where}: [[{name}]] {number}") for number, row in enumerate(rows, 1)]


def _text(value: object, at: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 400 or not value.isprintable():
        raise ConstellationFileError(f"{at} is {_short(value)}; give a text of 1 to 400 printable characters")
    return value


def _seed(value: object, at: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise ConstellationFileError(f"{at} is {_short(value)}; give a whole number from 0 to 4294967295")
    return value


def _start(value: object, where: str) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None or not 1957 <= value.year <= 2056:
        raise ConstellationFileError(
            f"{where}: start is {_short(value)}; give a time with its zone, 1957 to 2056, as 2026-06-21T12:00:00Z"
        )
    return value.astimezone(timezone.utc)


def _bounded(value: object, name: str, kind: type, at: str) -> Any:
    low, high = _RANGES[name]
    good = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # false for nan
        what = "a whole number" if kind is int else "a number"
        raise ConstellationFileError(f"{at} {name} is {_short(value)}; give {what} from {low:g} to {high:g}")
    return value if kind is int else float(value)


def _dataclass(kind: type, entries: dict[str, Any], at: str) -> Any:
    """A dataclass of numbers, texts and choices from a table.  Raises: ConstellationFileError."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in entries:
        if key not in fields:
            raise ConstellationFileError(f"{at} {_short(key)} is unknown; use {', '.join(fields)}")
    values = {}
    for name, value in entries.items():
        if name in _CHOICES:
            if value not in _CHOICES[name]:
                raise ConstellationFileError(f"{at} {name} is {_short(value)}; use {', '.join(_CHOICES[name])}")
            values[name] = value
        elif fields[name].type == "str":
            values[name] = _text(value, f"{at} {name}")
        else:
            values[name] = _bounded(value, name, int if fields[name].type == "int" else float, at)
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ConstellationFileError(f"{at}: give {name}")
    return kind(**values)


def _variant(name: str, entry: dict[str, Any], at: str) -> Variant:
    if name not in frame.PRECISIONS:
        raise ConstellationFileError(f"{at} is no precision; use {', '.join(frame.PRECISIONS)}")
    return _dataclass(Variant, {"name": name} | entry, at)


def _placement(row: dict[str, Any], at: str) -> PlacementRow:
    row.setdefault("label", row.get("policy"))
    found = _dataclass(PlacementRow, row, at)
    if found.policy not in PLACEMENTS:
        raise ConstellationFileError(f"{at}: {found.policy[:40]} is unknown; use {', '.join(PLACEMENTS)}")
    return found


def _policy(row: dict[str, Any], at: str) -> PolicyRow:
    name = _text(row.pop("policy", None), f"{at} policy")
    label = _text(row.pop("label", name), f"{at} label")
    admission = row.pop("admission", "cap")
    if name not in selection.POLICIES:
        raise ConstellationFileError(f"{at}: {name[:40]} is unknown; use {', '.join(selection.POLICIES)}")
    if admission not in ADMISSIONS:
        raise ConstellationFileError(f"{at}: admission {_short(admission)} is unknown; use {', '.join(ADMISSIONS)}")
    for knob, value in row.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_KNOB:
            raise ConstellationFileError(
                f"{at}: {_short(knob)} = {_short(value)} is no number; give one up to {MAX_KNOB:g}"
            )
    return PolicyRow(name, label, admission, row)
