"""The shape of a file of limits: its tables, keys and ranges, for the reader and as a JSON Schema for editors.

Leaves out what no schema can say (the order of bands, who inherits from whom), which limits_file.py checks.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from ground_station.limits import BANDS, SEVERITIES

MAX_FILE_BYTES = 256 * 1024
MAX_SETS = 32
MAX_SIGNALS = 500  # of one set
MAX_NUMBER = 1e15
MAX_STARS = 3  # of one pattern
SEVERITY_WORDS = SEVERITIES[1:]
LIMIT_KEYS = ("red_low", "yellow_low", "green_low", "green_high", "yellow_high", "red_high")  # never falling


@dataclass(frozen=True)
class Number:
    low: float = -MAX_NUMBER
    high: float = MAX_NUMBER
    whole: bool = False
    above: bool = False  # `low` itself is not allowed

    def fault(self, value: Any) -> str | None:
        what = "a whole number" if self.whole else "a number"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"give {what}"
        inside = self.low < value <= self.high if self.above else self.low <= value <= self.high
        if not inside or (self.whole and value != int(value)):
            least = f"above {self.low:g} and at most" if self.above else f"of {self.low:g} to"
            return f"give {what} {least} {self.high:g}"
        return None

    def schema(self) -> dict[str, Any]:
        least = "exclusiveMinimum" if self.above else "minimum"
        return {"type": "integer" if self.whole else "number", least: self.low, "maximum": self.high}


@dataclass(frozen=True)
class Text:
    most: int
    least: int = 0
    chars: str = " -~"  # inside a character class
    pattern: bool = False  # * and ? mean more than themselves, and each * costs time to match

    def fault(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return "give a text in quotes"
        if not self.least <= len(value) <= self.most or not _only(self.chars, value):
            kind = "printable ASCII" if self.chars == " -~" else f"the characters {self.chars}"
            return f"give {self.least} to {self.most} characters, all of {kind}"
        if self.pattern and value.count("*") > MAX_STARS:
            return f"give {MAX_STARS} * at most"
        return None

    def schema(self) -> dict[str, Any]:
        return {
            "type": "string",
            "minLength": self.least,
            "maxLength": self.most,
            "not": {"pattern": f"[^{self.chars}]" + ("|" + r"\*.*" * MAX_STARS + r"\*" if self.pattern else "")},
        }


@dataclass(frozen=True)
class Word:
    words: tuple[str, ...] = SEVERITY_WORDS

    def fault(self, value: Any) -> str | None:
        return None if isinstance(value, str) and value in self.words else f"give one of {', '.join(self.words)}"

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.words)}


@dataclass(frozen=True)
class Flag:
    def fault(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else "give true or false"

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Table:
    """`keys` by name, of which `needed` must be there. `note`: for who edits the file."""

    keys: dict[str, Any]
    needed: tuple[str, ...] = ()

    def schema(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "type": "object",
            "properties": {name: shape.schema() for name, shape in self.keys.items()},
            "additionalProperties": False,
        }
        return made | ({"required": list(self.needed)} if self.needed else {})


@dataclass(frozen=True)
class Many:
    """An array of tables."""

    each: Table
    most: int

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.each.schema(), "maxItems": self.most}


@dataclass(frozen=True)
class Named:
    """A table of tables whose names are chosen by who writes it."""

    each: Table
    most: int
    name: Text

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "additionalProperties": self.each.schema(),
            "propertyNames": self.name.schema(),
            "minProperties": 1,
            "maxProperties": self.most,
        }


SET_NAME = Text(32, 1, "a-z0-9_-")
SIGNAL = Table(
    {
        "name": Text(120, 1, "A-Za-z0-9_.:*?-", True),
        "node": Text(32, 1, "a-z0-9*?-", True),
        "board": Text(120, 1, pattern=True),
        **{key: Number() for key in LIMIT_KEYS},
        "bits": Many(
            Table({"bit": Number(0, 52, True), "severity": Word(), "text": Text(200)}, ("bit", "severity")), 53
        ),
        "persistence_up": Number(1, 100, True),
        "persistence_down": Number(1, 100, True),
        "hysteresis": Number(0.0),
        "severity": Table({band: Word() for band in (*BANDS, "stale")}),
        "text": Text(300),
        "stale_after_s": Number(0.0, 1e7, above=True),
        "off": Flag(),
    },
    ("name",),
)
FILE = Table(
    {
        "active": SET_NAME,
        "events": Table({"severity": Word()}),
        "node": Table(
            {"stale_after_s": Number(0.0, 1e7, above=True), "stale_severity": Word(), "offline_severity": Word()}
        ),
        "sets": Named(
            Table({"extends": SET_NAME, "text": Text(300), "signals": Many(SIGNAL, MAX_SIGNALS)}), MAX_SETS, SET_NAME
        ),
    },
    ("active", "sets"),
)


def schema() -> dict[str, Any]:
    """JSON Schema of the file, as shipped in limit_sets/limits.schema.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Limits of spacemoe, a TOML file",
        "description": "Beyond this schema: no limit falls from red_low to red_high, bits stand alone, sets inherit from sets there are.",
        **FILE.schema(),
    }


def schema_text() -> str:
    return json.dumps(schema(), indent=2) + "\n"


def _only(chars: str, text: str) -> bool:
    return re.search(f"[^{chars}]", text) is None
