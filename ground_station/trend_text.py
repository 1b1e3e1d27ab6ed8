"""A trend as text: a picture of plain characters for a terminal of any width, or a table. Pure; leaves out where it comes from."""

from __future__ import annotations

import math
import time
from typing import Any

from ground_station.cli_shared import plain

MARGIN = 11  # columns of the axis
HEIGHT = 12
MAX_POINTS = 20_000


def room(width: int) -> int:
    """How many points a picture of `width` columns holds."""
    return max(10, width - MARGIN - 1)


def _points(trend: dict[str, Any]) -> list[tuple[float, float | None, float | None, float | None, int]]:
    """(UTC s, min, max, mean, count) of a station's answer; what is no number becomes None."""

    def value(each: Any) -> float | None:
        fits = isinstance(each, (int, float)) and not isinstance(each, bool) and math.isfinite(each)
        return float(each) if fits else None

    columns = [trend.get(name) for name in ("at_utc_s", "min", "max", "mean", "count")]
    if not all(isinstance(column, list) for column in columns):
        return []
    made = []
    for at, low, high, mean, count in list(zip(*columns))[:MAX_POINTS]:
        if (at := value(at)) is not None:
            made.append((at, value(low), value(high), value(mean), count if isinstance(count, int) else 0))
    return made


def head(trend: dict[str, Any]) -> str:
    unit, how = plain(trend.get("unit"), 40), plain(trend.get("provenance"), 20)
    return f"{plain(trend.get('node'), 40)} {plain(trend.get('signal'), 100)} in {unit or 'no unit'}, {how}"


def picture(trend: dict[str, Any], width: int) -> list[str]:
    """Lines of at most `width` columns: '|' from a column's min to max, '*' at its mean; a column without a value is empty."""
    points = [each for each in _points(trend) if each[1] is not None and each[2] is not None]
    if not points:
        return [head(trend), "no valid value in this time"]
    since, until = (
        float(trend[name]) if isinstance(trend.get(name), (int, float)) else edge
        for name, edge in (("since_utc_s", points[0][0]), ("until_utc_s", points[-1][0]))
    )
    low, high = min(each[1] for each in points), max(each[2] for each in points)
    columns = room(width)
    span = max(high / 2 - low / 2, 0.0) * 2 if abs(high) < 1e300 and abs(low) < 1e300 else math.inf
    cells = [[" "] * columns for _ in range(HEIGHT)]

    def line(value: float) -> int:
        if not math.isfinite(span) or span <= 0:
            return HEIGHT // 2
        return min(HEIGHT - 1, max(0, round((high - value) / span * (HEIGHT - 1))))

    for at, least, most, mean, _ in points:
        column = min(columns - 1, max(0, int((at - since) / max(until - since, 1e-9) * columns)))
        for i in range(line(most), line(least) + 1):
            if cells[i][column] == " ":
                cells[i][column] = "|"
        if mean is not None:
            cells[line(mean)][column] = "*"
    marks = {0: high, HEIGHT - 1: low}
    rows = [
        f"{_mark(marks[i]) if i in marks else '':>{MARGIN - 2}} |{''.join(row)}".rstrip() for i, row in enumerate(cells)
    ]
    left, right = _time(since), _time(until)
    foot = " " * MARGIN + left + right.rjust(columns - len(left))
    last = points[-1][3]
    summary = f"min {_mark(low)}  max {_mark(high)}  last {_mark(last)}  {sum(each[4] for each in points)} values"
    return [head(trend)[:width], *rows, foot, summary[:width]]


def table(trend: dict[str, Any]) -> list[str]:
    rows = [head(trend), f"{'UTC':20} {'min':>11} {'mean':>11} {'max':>11} {'values':>7}"]
    for at, low, high, mean, count in _points(trend):
        rows.append(f"{_time(at, True):20} {_mark(low):>11} {_mark(mean):>11} {_mark(high):>11} {count:>7}")
    return rows


def _mark(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _time(utc_s: float, day: bool = False) -> str:
    if not 0 <= utc_s < 4e9:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S" if day else "%H:%M:%SZ", time.gmtime(utc_s))
