"""Limits from a TOML file, strictly: unknown keys, values out of range and bands out of order are errors that name the entry.

The shape is in limits_shape.py; a file with the reasons of every value is limit_sets/default.toml. `LimitsWatch` sees when a file
has changed. Leaves out who looks, and what is done with alarms that stand when limits change (alarms_fleet.py).
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

from ground_station.limits import BANDS, SEVERITIES, Bit, Limit, Limits, LimitsError, LimitSet, NodeRule
from ground_station.limits_shape import FILE, LIMIT_KEYS, MAX_FILE_BYTES, Many, Named, Table
from node_agent import toml_file

SHIPPED = Path(__file__).with_name("limit_sets") / "default.toml"
SCHEMA = SHIPPED.with_name("limits.schema.json")
MAX_INHERITED = 8
_RANK = {word: rank for rank, word in enumerate(SEVERITIES)}
_DEFAULT_SEVERITY = {"green": "watch", "yellow": "warning", "red": "critical", "stale": "watch"}


def load(path: Path = SHIPPED) -> Limits:
    """The limits in the file at `path`.  Raises: LimitsError, which names it."""
    return _load(Path(path))[0]


def loads(raw: bytes) -> Limits:
    """The limits in a TOML text.  Raises: LimitsError."""
    if len(raw) > MAX_FILE_BYTES:
        raise LimitsError(
            f"is over {MAX_FILE_BYTES} bytes: limits are few; split the fleet over several ground stations"
        )
    try:
        tree = toml_file.loads(raw)
    except toml_file.TomlError as error:
        raise LimitsError(f"is no TOML: {error}") from None
    _check(FILE, tree, "")
    sets = {name: _chain(tree["sets"], name) for name in tree["sets"]}
    node, default = tree.get("node", {}), NodeRule()
    return Limits(
        sets,
        "",
        NodeRule(
            float(node.get("stale_after_s", default.stale_after_s)),
            _RANK.get(node.get("stale_severity"), default.stale_severity),
            _RANK.get(node.get("offline_severity"), default.offline_severity),
        ),
        _RANK[tree.get("events", {}).get("severity", "warning")],
    ).using(tree["active"])


def _load(path: Path) -> tuple[Limits, tuple[int, int, int]]:
    try:
        # A pipe in the file's place would hold a reader for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise LimitsError(f"{path} is no file: give the TOML file of limits")
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise LimitsError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        return loads(raw), _mark(about)
    except LimitsError as error:
        raise LimitsError(f"{path}: {error}") from None


def _mark(about: os.stat_result) -> tuple[int, int, int]:
    return about.st_mtime_ns, about.st_ino, about.st_size


class LimitsWatch:
    """The limits of a file as it is now. A bad new file leaves the old limits in force and yields its error once.

    Raises: LimitsError where the first file is bad.
    """

    def __init__(self, path: Path = SHIPPED) -> None:
        self.path = Path(path)
        self.limits, self._seen = _load(self.path)
        self._switched: str | None = None
        self._gone = False

    def look(self) -> tuple[Limits | None, str | None]:
        """New limits if the file has changed, or what is wrong with it. The set chosen by `switch` stays in force."""
        try:
            mark = _mark(os.stat(self.path))
        except OSError as error:
            told, self._gone = self._gone, True
            return None, None if told else f"{self.path} cannot be read: {error.strerror or error}; the old limits hold"
        if mark == self._seen and not self._gone:
            return None, None
        self._gone = False
        self._seen = mark
        try:
            limits, self._seen = _load(self.path)
            if self._switched is not None:
                limits = limits.using(self._switched)
        except LimitsError as error:
            return None, f"{error}; the old limits hold"
        self.limits = limits
        return limits, None

    def switch(self, name: str) -> Limits:
        """Puts another set in force, also for files that come later.  Raises: LimitsError."""
        self.limits = self.limits.using(name)
        self._switched = name
        return self.limits


# ---------------------------------------------------------------- shape


def _check(shape: Any, value: Any, where: str) -> None:
    if isinstance(shape, Table):
        if not isinstance(value, dict):
            raise LimitsError(f"{where or 'the file'} is no table: write it as [{where}] or {{ key = value }}")
        for key in value:
            if key not in shape.keys:
                known = ", ".join(shape.keys)
                raise LimitsError(f"{_at(where)}{key[:40]!a} is unknown: {_table(where)} takes {known}")
        for key in shape.needed:
            if key not in value:
                raise LimitsError(f"{_at(where)}{key} is missing: give it")
        for key, each in value.items():
            _check(shape.keys[key], each, f"{where}.{key}" if where else key)
    elif isinstance(shape, Many):
        if not isinstance(value, list):
            raise LimitsError(f"{where} is no list of tables: write each as [[{where}]]")
        if len(value) > shape.most:
            raise LimitsError(f"{where} has {len(value)} entries: give {shape.most} at most")
        for i, each in enumerate(value):
            name = each.get("name") if isinstance(each, dict) else None
            called = f" ({name[:40]})" if isinstance(name, str) and name.isascii() and name.isprintable() else ""
            _check(shape.each, each, f"{where}[{i + 1}]{called}")
    elif isinstance(shape, Named):
        if not isinstance(value, dict) or not 1 <= len(value) <= shape.most:
            raise LimitsError(f"{where} must hold 1 to {shape.most} tables: write each as [{where}.NAME]")
        for name, each in value.items():
            if fault := shape.name.fault(name):
                raise LimitsError(f"{where} has the name {name[:40]!a}: {fault}")
            _check(shape.each, each, f"{where}.{name}")
    elif fault := shape.fault(value):
        raise LimitsError(f"{where} is {_shown(value)}: {fault}")


def _shown(value: Any) -> str:
    try:
        return ascii(value)[:60]
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _table(where: str) -> str:
    return f"[{where}]" if where else "the file"


# ---------------------------------------------------------------- sense


def _chain(sets: dict[str, Any], name: str) -> LimitSet:
    """The set with all it inherits."""
    limits: list[Limit] = []
    chain = [name]
    while True:
        own = _own(sets[chain[-1]].get("signals", []), f"sets.{chain[-1]}.signals")
        limits += own
        parent = sets[chain[-1]].get("extends")
        if parent is None:
            return LimitSet(name, sets[name].get("text", ""), tuple(limits))
        if parent not in sets:
            raise LimitsError(f"sets.{chain[-1]}.extends is {parent!r}: choose one of {', '.join(sorted(sets))}")
        if parent in chain or len(chain) >= MAX_INHERITED:
            told = " -> ".join([*chain, parent])
            raise LimitsError(
                f"sets.{chain[-1]}.extends: {told} never ends or is over {MAX_INHERITED} sets: shorten it"
            )
        chain.append(parent)


def _own(entries: list[dict[str, Any]], where: str) -> list[Limit]:
    made: list[Limit] = []
    seen: dict[tuple[str, str, str], int] = {}
    for i, entry in enumerate(entries, 1):
        at = f"{where}[{i}] ({entry['name'][:40]})"
        limit = _limit(entry, at)
        key = (limit.name, limit.node, limit.board)
        if key in seen:
            raise LimitsError(f"{at}: is number {seen[key]} once more, which is found first: remove one of them")
        seen[key] = i
        made.append(limit)
    return made


def _limit(entry: dict[str, Any], at: str) -> Limit:
    severity = _DEFAULT_SEVERITY | entry.get("severity", {})
    ranks = [_RANK[severity[band]] for band in BANDS]
    if ranks != sorted(ranks):
        raise LimitsError(
            f"{at}: severity falls from green to red: let it rise, in the order {', '.join(SEVERITIES[1:])}"
        )
    given = [(key, float(entry[key])) for key in LIMIT_KEYS if key in entry]
    for (inner, low), (outer, high) in zip(given, given[1:]):
        if low > high:
            raise LimitsError(
                f"{at}: {inner} {low:g} is above {outer} {high:g}: the order is {' <= '.join(LIMIT_KEYS)}"
            )
    lows = [key for key in ("green", "yellow", "red") if f"{key}_low" in entry]
    highs = [key for key in ("green", "yellow", "red") if f"{key}_high" in entry]
    limit = Limit(
        entry["name"],
        entry.get("node", "*"),
        entry.get("board", "*"),
        tuple(float(entry[f"{key}_low"]) for key in lows),
        tuple(float(entry[f"{key}_high"]) for key in highs),
        tuple(lows),
        tuple(highs),
        tuple(_RANK[severity[key]] for key in lows),
        tuple(_RANK[severity[key]] for key in highs),
        up=int(entry.get("persistence_up", 1)),
        down=int(entry.get("persistence_down", 1)),
        hysteresis=float(entry.get("hysteresis", 0.0)),
        text=entry.get("text", ""),
        stale_after_s=None if "stale_after_s" not in entry else float(entry["stale_after_s"]),
        stale_severity=_RANK[severity["stale"]],
        off=entry.get("off", False),
    )
    if "bits" in entry:
        limit = replace(limit, bits=_bits(entry, at))
    limits_something = limit.low or limit.high or limit.bits or limit.stale_after_s is not None
    if limit.off and len(entry.keys() - {"name", "node", "board", "text", "off"}):
        raise LimitsError(f"{at}: is off and has limits: remove one or the other")
    if not limit.off and not limits_something:
        raise LimitsError(
            f"{at}: limits nothing: give one of {', '.join(LIMIT_KEYS)}, bits, stale_after_s, or off = true"
        )
    if limit.low and limit.high and limit.hysteresis and limit.high[0] - limit.low[0] <= limit.hysteresis:
        width = limit.high[0] - limit.low[0]
        raise LimitsError(
            f"{at}: hysteresis {limit.hysteresis:g} leaves no way back into a band {width:g} wide: give less"
        )
    return limit


def _bits(entry: dict[str, Any], at: str) -> tuple[Bit, ...]:
    mixed = [key for key in (*LIMIT_KEYS, "hysteresis") if key in entry]
    if mixed:
        raise LimitsError(f"{at}: {mixed[0]} does not go with bits: give one or the other")
    bits = tuple(Bit(int(each["bit"]), _RANK[each["severity"]], each.get("text", "")) for each in entry["bits"])
    if not bits:
        raise LimitsError(f"{at}: bits is empty: give {{ bit = 0, severity = 'warning' }}")
    numbers = [each.bit for each in bits]
    if len(set(numbers)) != len(numbers):
        raise LimitsError(f"{at}: bits names a bit twice: give each once")
    return bits
