"""Moments as people write them, to UTC seconds: ISO 8601, so long ago, or seconds since 1970. Leaves out time zones by name, and clocks:
the caller says what time it is."""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta, timezone

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
AGO = re.compile(r"-?(\d{1,9}(?:\.\d{1,6})?)([smhdw])", re.ASCII)
SECONDS = re.compile(r"\d{1,11}(?:\.\d{1,9})?", re.ASCII)
# Written out, because Python before 3.11 reads fewer forms than later ones, and later ones read some that nobody means.
ISO = re.compile(
    r"(\d{4})-(\d{2})-(\d{2})(?:[Tt ](\d{2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?\s?([Zz]|[+-]\d{2}(?::?\d{2})?)?)?",
    re.ASCII,
)
# 2001-09-09, the first moment of ten digits: a smaller number is a slip, such as a span without its unit.
EARLIEST_SECONDS = 1e9
HINT = "give 2026-11-30T12:00Z, a time ago such as 10m, 2h or 1d, now, or seconds since 1970"


class TimeError(ValueError):
    """A text says no moment; the text of the error says what to write. `text`: what was given."""

    def __init__(self, text: str, why: str):
        super().__init__(f"{text[:60]!r} {why}: {HINT}")
        self.text = text


def utc_s(text: str, now_utc_s: float) -> float:
    """UTC seconds of the moment that `text` says; without a zone it is UTC. '-10m' and '10m' are both ten minutes before now.

    Raises: TimeError.
    """
    word = text.strip()
    if word == "now":
        return now_utc_s
    if found := AGO.fullmatch(word):
        return now_utc_s - float(found[1]) * UNITS_S[found[2]]
    if SECONDS.fullmatch(word):
        number = float(word)
        if number < EARLIEST_SECONDS:
            raise TimeError(text, "is no moment since 1970 that can be meant, and has no unit")
        return number
    if found := ISO.fullmatch(word):
        return _iso_s(text, found)
    raise TimeError(text, "is no time")


def _iso_s(text: str, found: re.Match) -> float:
    year, month, day, hour, minute, second = (int(part or 0) for part in found.groups()[:6])
    fraction_s = float(f"0.{found[7]}") if found[7] else 0.0
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc)
        return (moment - _offset(found[8])).timestamp() + fraction_s
    except (ValueError, OverflowError) as error:
        raise TimeError(text, f"is no time ({error})") from None


def _offset(zone: str | None) -> timedelta:
    """How far a zone's clock is ahead of UTC.  Raises: ValueError."""
    if zone is None or zone in "Zz":
        return timedelta()
    hours, minutes = int(zone[1:3]), int(zone[3:].lstrip(":") or 0)
    if hours > 23 or minutes > 59:
        raise ValueError(f"zone {zone}")
    span = timedelta(hours=hours, minutes=minutes)
    return -span if zone[0] == "-" else span


def iso(at_utc_s: float | None) -> str:
    """'2026-11-30T12:00:00.000Z', to the millisecond; '-' for None, and the number itself where it is no year of ours."""
    if at_utc_s is None:
        return "-"
    if not math.isfinite(at_utc_s) or not -62e9 < at_utc_s < 253e9:
        return f"{at_utc_s:g} s"
    moment = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=at_utc_s)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
