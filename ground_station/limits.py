"""Levels of a value: bands with hysteresis and persistence, and which limit of which set a node's signal has. Pure.

A value is outside a band only beyond its limit: `red_high = 80` lets 80.0 pass. Severities are Yamcs', rising. Leaves out the
file (limits_file.py), and what is latched, acknowledged or late (alarms.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SEVERITIES = ("nominal", "watch", "warning", "distress", "critical", "severe")  # an index is a severity's rank
LETTERS = "gwydrs"  # of the same, one for each; what is not known is UNKNOWN
UNKNOWN = "?"
NOMINAL = "nominal"
BANDS = ("green", "yellow", "red")  # from the inside out
MAX_NAME_CHARS = 120
MAX_KNOWN = 600  # names of one node whose limit is remembered
MAX_BITS_VALUE = 2.0**53


class LimitsError(ValueError):
    """Limits cannot be; the text says which entry, and what to give."""


@dataclass(frozen=True)
class Bit:
    """A bit of a signal that counts what is wrong: `severity` is a rank above 0."""

    bit: int
    severity: int
    text: str = ""


@dataclass(frozen=True)
class Limit:
    """What is expected of the signals that match. `low` and `high` are limits from the inside out, with the `low_bands` and
    `high_bands` they belong to and the rank of severity beyond each; or `bits`, for a signal of flags.

    `up` and `down`: how many samples in a row it takes to a graver and to a lesser level. `hysteresis`, in the signal's unit: how
    far inside a limit the value must be to leave what is beyond it. `stale_after_s`: without a valid value; None: never stale.
    `off`: matches, and limits nothing.
    """

    name: str
    node: str = "*"
    board: str = "*"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    low_bands: tuple[str, ...] = ()
    high_bands: tuple[str, ...] = ()
    low_severity: tuple[int, ...] = ()
    high_severity: tuple[int, ...] = ()
    bits: tuple[Bit, ...] = ()
    up: int = 1
    down: int = 1
    hysteresis: float = 0.0
    text: str = ""
    stale_after_s: float | None = None
    stale_severity: int = 1
    off: bool = False

    def fits(self, node: str, board: str, name: str) -> bool:
        """Whether the patterns match all three."""
        return matches(self.name, name) and matches(self.node, node) and matches(self.board, board)

    def usable(self, value: float | None) -> bool:
        """Whether a level can be told of `value`: a number, and of bits a whole one."""
        if value is None or value != value or value in (float("inf"), float("-inf")):
            return False
        return not self.bits or (0 <= value < MAX_BITS_VALUE and value == int(value))

    def zone(self, value: float) -> int:
        """How many limits `value` is beyond: above 0 on the high side, below 0 on the low side. Of bits, the gravest rank."""
        if self.bits:
            return max((each.severity for each in self.bits if int(value) >> each.bit & 1), default=0)
        zone = 0
        for limit in self.high:
            if value <= limit:
                break
            zone += 1
        if zone:
            return zone
        for limit in self.low:
            if value >= limit:
                break
            zone -= 1
        return zone

    def zone_from(self, value: float, zone: int) -> int:
        """The zone of `value`, coming from `zone`: beyond a limit it stays until it is `hysteresis` inside."""
        now = self.zone(value)
        if not self.hysteresis:
            return now
        for k in range(zone, max(now, 0), -1):
            if value > self.high[k - 1] - self.hysteresis:
                return k
        for k in range(-zone, max(-now, 0), -1):
            if value < self.low[k - 1] + self.hysteresis:
                return -k
        return now

    def severity(self, zone: int) -> int:
        """The rank of severity there."""
        if zone == 0:
            return 0
        if self.bits:
            return zone
        return self.high_severity[zone - 1] if zone > 0 else self.low_severity[-zone - 1]

    def level(self, zone: int) -> str:
        """The name of a zone: 'nominal', 'red_high', or 'bits'."""
        if zone == 0:
            return NOMINAL
        if self.bits:
            return "bits"
        return f"{self.high_bands[zone - 1]}_high" if zone > 0 else f"{self.low_bands[-zone - 1]}_low"

    def crossed(self, zone: int) -> float | None:
        """The limit that was crossed; None of bits."""
        if zone == 0 or self.bits:
            return None
        return self.high[zone - 1] if zone > 0 else self.low[-zone - 1]

    def bands(self) -> dict[str, float]:
        """{'red_low': ..., 'yellow_high': ...}: for a plot."""
        low = {f"{band}_low": limit for band, limit in zip(self.low_bands, self.low)}
        return low | {f"{band}_high": limit for band, limit in zip(self.high_bands, self.high)}


@dataclass(frozen=True, slots=True)
class Standing:
    """The zone that a signal is taken to be in, and the zones of the last samples that say otherwise."""

    zone: int = 0
    pending: tuple[int, ...] = ()


NOTHING_YET = Standing()


def advance(limit: Limit, standing: Standing, value: float) -> Standing:
    """`standing` after one more `value` that is usable.

    A graver zone is taken once the last `up` samples were all graver (the least grave of them), a lesser one once the last
    `down` samples were all lesser (the gravest of them).
    """
    zone = standing.zone
    seen = limit.zone_from(value, zone)
    if seen == zone:
        return Standing(zone) if standing.pending else standing
    pending = (*standing.pending, seen)[-max(limit.up, limit.down) :]
    graver = [_graver(limit, zone, each) for each in pending]

    def weight(each: int) -> tuple[int, int]:
        return limit.severity(each), abs(each)

    if len(pending) >= limit.up and all(graver[-limit.up :]):
        taken = min(reversed(pending[-limit.up :]), key=weight)
    elif len(pending) >= limit.down and not any(graver[-limit.down :]):
        taken = max(reversed(pending[-limit.down :]), key=weight)
    else:
        return Standing(zone, pending)
    after = len(pending) - 1 - pending[::-1].index(taken)
    return Standing(taken, pending[after + 1 :])


def skip(limit: Limit, standing: Standing) -> Standing:
    """`standing` after a sample without a usable value: it speaks neither for nor against, but a return must be seen in a row."""
    pending = tuple(each for each in standing.pending if _graver(limit, standing.zone, each))
    return standing if pending == standing.pending else Standing(standing.zone, pending)


def _graver(limit: Limit, zone: int, other: int) -> bool:
    if other == 0:
        return False
    if zone * other > 0:
        return abs(other) > abs(zone)
    return limit.severity(other) >= limit.severity(zone)


# ---------------------------------------------------------------- sets, and the limit of a signal


@dataclass(frozen=True)
class NodeRule:
    """When a node that is silent is stale, and how grave that and its being offline is. Ranks of severity."""

    stale_after_s: float = 5.0
    stale_severity: int = 2
    offline_severity: int = 4


@dataclass(frozen=True)
class LimitSet:
    """`limits` in the order in which they are tried: its own, then those it inherits."""

    name: str
    text: str = ""
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class Limits:
    """All sets by name, the one in force, and what holds in all. `event_severity`: rank from which an event raises an alarm."""

    sets: Mapping[str, LimitSet] = field(default_factory=lambda: {"none": LimitSet("none")})
    active: str = "none"
    node: NodeRule = NodeRule()
    event_severity: int = 2

    def using(self, name: str) -> Limits:
        """The same with another set in force.  Raises: LimitsError."""
        if name not in self.sets:
            raise LimitsError(f"there is no limit set {name[:40]!r}: choose one of {', '.join(sorted(self.sets))}")
        return replace(self, active=name)

    def of_node(self, node: str, board: str) -> NodeLimits:
        """The limits of one node's signals by name, in the set in force."""
        return NodeLimits(self.sets[self.active].limits, node, board)


class NodeLimits(dict):
    """Limit or None by a signal's name: patterns are matched once for each name. Remembers MAX_KNOWN names."""

    def __init__(self, limits: tuple[Limit, ...], node: str, board: str) -> None:
        super().__init__()
        self.board = board
        self._limits = tuple(
            each for each in limits if matches(each.node, node) and matches(each.board, board[:MAX_NAME_CHARS])
        )

    def __missing__(self, name: str) -> Limit | None:
        found = None
        if len(name) <= MAX_NAME_CHARS:
            found = next((each for each in self._limits if matches(each.name, name)), None)
            if found is not None and found.off:
                found = None
            if len(self) < MAX_KNOWN:
                self[name] = found
        return found


_PATTERNS: dict[str, re.Pattern] = {}


def matches(pattern: str, text: str) -> bool:
    """Whether `text` is `pattern`, in which * is any run of characters and ? any one."""
    if pattern == "*" or pattern == text:
        return True
    if "*" not in pattern and "?" not in pattern:
        return False
    made = _PATTERNS.get(pattern)
    if made is None:
        words = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern)
        made = re.compile(words, re.DOTALL)
        if len(_PATTERNS) > 10_000:
            _PATTERNS.clear()
        _PATTERNS[pattern] = made
    return made.fullmatch(text) is not None
