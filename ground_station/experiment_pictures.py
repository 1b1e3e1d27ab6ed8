"""The pictures of an experiment's report: points, bars, traces over time, shares, distributions; each says itself in words as well.

Every function is pure: numbers in, an `<svg>` element out. Leaves out: which runs are shown and the tables (experiment_page.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ground_station.picture_svg import RIGHT, STAND_IN, TEXT, WIDTH, Style, picture

MOST_POINTS = 300
"""Of a line: more slots are drawn in stretches, of which the page says what is shown (highest, lowest, mean)."""
OFF_SCALE = 1.5
"""Perplexity ratios above it would press all others into a line: they are drawn at the edge, with their value."""

NEAR, SAME = 5.0, 3.0  # units from a point to its number; between points that are drawn on each other


@dataclass(frozen=True)
class Point:
    """A policy in a plane, with its number in the page's tables; sd: standard deviations, 0 where there is none."""

    number: int
    x: float
    y: float
    x_sd: float
    y_sd: float
    style: Style | None


def _ticks(most: int) -> MaxNLocator:
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])


def thinned(values: np.ndarray, how: Callable[[np.ndarray], float]) -> np.ndarray:
    """Of [S] values at most MOST_POINTS: `how` of each stretch of stretch(S)."""
    step = stretch(len(values))
    return np.array([how(values[at : at + step]) for at in range(0, len(values), step)])


def stretch(slots: int) -> int:
    return max(1, math.ceil(slots / MOST_POINTS))


def plane(ident: str, alt: str, points: Sequence[Point], across: str, up: str, edge: float | None = OFF_SCALE) -> str:
    """Numbered points. Those with y over `edge` are at the upper edge with an arrow, unless all are."""
    inside = [point for point in points if edge is None or point.y <= edge]
    if not inside:
        inside, edge = list(points), None

    def draw(axes: Axes) -> None:
        low, high = min(p.y - p.y_sd for p in inside), max(p.y + p.y_sd for p in inside)
        room = max(high - low, 1e-3)
        outside = [point for point in points if point not in inside]
        axes.set_ylim(low - 0.1 * room, high + (0.32 if outside else 0.12) * room)
        lows, highs = min(p.x - p.x_sd for p in points), max(p.x + p.x_sd for p in points)
        room_x = max(highs - lows, 1e-3 * abs(highs), 1e-12)
        axes.set_xlim(lows - 0.1 * room_x, highs + 0.12 * room_x)
        axes.xaxis.set_major_locator(_ticks(5))
        axes.yaxis.set_major_locator(_ticks(6))
        top = axes.get_ylim()[1]
        for point in inside:
            style = point.style or Style("other", marker="o")
            _, _, spread_bars = axes.errorbar(
                point.x,
                point.y,
                yerr=point.y_sd,
                xerr=point.x_sd,
                color=STAND_IN[style.colour],
                marker=style.marker,
                markersize=7 if point.style else 5.5,
                elinewidth=1,
            )
            for each in spread_bars:
                each.set_alpha(0.5)  # numbers may have to stand on them
        for point in outside:
            axes.annotate(
                "",
                (point.x, top),
                (0, -15),
                textcoords="offset points",
                arrowprops={"arrowstyle": "->", "color": STAND_IN["other"], "shrinkA": 0, "shrinkB": 0},
            )
        at = [axes.transData.transform((p.x, p.y)) for p in inside]
        at += [axes.transData.transform((p.x, top)) - (0, 8) for p in outside]
        texts = [str(p.number) for p in inside] + [f"{p.number}: {p.y:.3g}" for p in outside]
        _number(axes, *merged(np.array(at), texts))

    return picture(ident, alt, 270, draw, up, across)


def _number(axes: Axes, at: np.ndarray, texts: Sequence[str]) -> None:
    """Writes each text beside its point [M, 2] (in display units), with a line to it where it is not next to it."""
    box = axes.get_window_extent()
    wide = np.array([6.4 * len(text) + 2 for text in texts])
    for (x, y), centre, text in zip(at, beside(at, wide, TEXT, (box.x0, box.x1, box.y0, box.y1)), texts):
        far = math.dist(centre, (x, y)) > TEXT / 2 + NEAR + 6.4 * len(text) / 2 + 2
        line = {"arrowstyle": "-", "color": STAND_IN["other"], "linewidth": 0.7, "shrinkA": 2, "shrinkB": 3}
        axes.annotate(
            text,
            (x, y),
            (centre[0] - x, centre[1] - y),
            xycoords="figure points",
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            arrowprops=line if far else None,
            annotation_clip=False,
        )


def merged(at: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Points [M, 2] that lie on each other as one, with their texts joined."""
    kept: list[int] = []
    joined: list[str] = []
    for index, text in enumerate(texts):
        near = next((each for each, first in enumerate(kept) if math.dist(at[first], at[index]) < SAME), None)
        if near is None:
            kept.append(index)
            joined.append(text)
        else:
            joined[near] += f", {text}"
    return at[kept], joined


def beside(at: np.ndarray, wide: np.ndarray, high: float, box: tuple[float, float, float, float]) -> np.ndarray:
    """Centres [M, 2] of texts of `wide` [M] by `high` beside points [M, 2], in the same units: the nearest of some places around the point
    that lies in `box` (left, right, low, top) and hides no point and no earlier text; right of the point where there is none."""
    taken: list[tuple[float, float, float, float]] = []
    centres = np.zeros((len(at), 2))
    for index, ((x, y), width) in enumerate(zip(at, wide)):
        around = [
            (x + math.cos(turn) * (radius + width / 2), y + math.sin(turn) * (radius + high / 2))
            for radius in (NEAR, 12, 20, 30, 42)
            for turn in np.array((0, 2, 4, 6, 1, 3, 5, 7)) * math.pi / 4
        ]
        boxes = [(cx - width / 2, cx + width / 2, cy - high / 2, cy + high / 2) for cx, cy in around]
        free = (each for each, place in enumerate(boxes) if _is_free(place, box, at, taken))
        chosen = next(free, 0)
        centres[index] = around[chosen]
        taken.append(boxes[chosen])
    return centres


def _is_free(place: tuple, box: tuple, at: np.ndarray, taken: list[tuple]) -> bool:
    left, right, low, top = place
    if left < box[0] or right > box[1] or low < box[2] or top > box[3]:
        return False
    if any(left - 4 < x < right + 4 and low - 4 < y < top + 4 for x, y in at):
        return False
    return not any(left < r and right > a and low < t and top > b for a, r, b, t in taken)


@dataclass(frozen=True)
class Bar:
    """text and value: what stands above the bar, left and right. hollow: not valid."""

    text: str
    value: str
    length: float
    sd: float
    style: Style | None
    hollow: bool


BAR_UNITS = 30.0


def bars(ident: str, alt: str, rows: Sequence[Bar], bound: float | None, across: str) -> str:
    def draw(axes: Axes) -> None:
        longest = max([row.length + row.sd for row in rows] + ([bound] if bound else []))
        axes.set_xlim(0, 1.02 * longest or 1)
        axes.set_ylim(len(rows) - 0.1, -0.65)
        axes.set_yticks([])
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(_ticks(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        left, _, wide, _ = axes.get_position().bounds
        axes.set_position((12 / 360, axes.get_position().y0, left + wide - 12 / 360, axes.get_position().height))
        for index, row in enumerate(rows):
            colour = STAND_IN[(row.style or Style("other")).colour]
            axes.barh(
                index + 0.22,
                row.length,
                0.36,
                color="none" if row.hollow else colour,
                edgecolor=colour,
                xerr=row.sd or None,
                error_kw={"ecolor": STAND_IN["ink"], "elinewidth": 1.4, "capsize": 2.5},
            )
            axes.text(0, index - 0.05, row.text, ha="left", va="bottom", size=TEXT)
            axes.text(
                1, index - 0.05, row.value, ha="right", va="bottom", size=TEXT, transform=axes.get_yaxis_transform()
            )
            if bound:
                axes.plot([bound] * 2, [index + 0.04, index + 0.40], color=STAND_IN["ink"], linewidth=2)

    return picture(ident, alt, 56 + BAR_UNITS * len(rows), draw, "", across)


@dataclass(frozen=True, eq=False)
class Line:
    """A trace: minutes and values, of the same length."""

    minutes: np.ndarray
    values: np.ndarray
    style: Style


HEIGHT = 190.0
Span = tuple[float, float]  # from, to, in minutes


def spans(minutes: np.ndarray, held: np.ndarray, slot_min: float) -> list[Span]:
    """Where `held` [S] is true; minutes [S]: the ends of the slots."""
    change = np.flatnonzero(np.diff(np.concatenate([[False], held, [False]]).astype(int)))
    return [(float(minutes[a]) - slot_min, float(minutes[b - 1])) for a, b in zip(change[::2], change[1::2])]


def over_time(
    ident: str,
    alt: str,
    lines: Sequence[Line],
    up: str,
    values: Span,
    limit: tuple[float, str] | None = None,
    dark: Sequence[Span] = (),
    away: Sequence[Span] = (),
) -> str:
    """Lines between values[0] and values[1]; `limit`: a height and its name; `dark`: shaded; `away`: a bar at the foot."""

    def draw(axes: Axes) -> None:
        axes.set_ylim(*values)
        axes.set_xlim(0, max(float(line.minutes[-1]) for line in lines))
        axes.xaxis.set_major_locator(_ticks(6))
        axes.yaxis.set_major_locator(_ticks(5))
        for start, end in dark:
            axes.axvspan(start, end, color=STAND_IN["shade"], linewidth=0, zorder=0)
        for start, end in away:
            axes.axvspan(start, end, 0, 0.04, color=STAND_IN["ink"], linewidth=0)
        for line in lines:
            axes.plot(line.minutes, line.values, **line.style.line())
        if limit is not None:
            axes.axhline(limit[0], color=STAND_IN["ink"], linewidth=1.3)
            axes.figure.text(1 - RIGHT / WIDTH, 1 - 3 / HEIGHT, f"━ {limit[1]}", ha="right", va="top", size=TEXT)

    return picture(ident, alt, HEIGHT, draw, up, "mission time, minutes")


def shares(ident: str, alt: str, minutes: np.ndarray, parts: Sequence[np.ndarray], styles: Sequence[Style]) -> str:
    """`parts`: of 100 %, one above the other, each [S]."""

    def draw(axes: Axes) -> None:
        axes.set_ylim(0, 100)
        axes.set_xlim(0, float(minutes[-1]))
        axes.xaxis.set_major_locator(_ticks(6))
        colours = [STAND_IN[style.colour] for style in styles]
        axes.stackplot([0, *minutes], *(np.insert(part, 0, part[0]) for part in parts), colors=colours, linewidth=0)

    return picture(ident, alt, HEIGHT, draw, "share of expert runs, %", "mission time, minutes")


def distributions(ident: str, alt: str, lines: Sequence[tuple[np.ndarray, Style]], across: str) -> str:
    """Cumulative distributions of sorted values [T], as steps."""

    def draw(axes: Axes) -> None:
        axes.set_ylim(0, 101)
        for values, style in lines:
            found, counts = np.unique(values, return_counts=True)
            share = 100 * np.cumsum(counts) / len(values)
            if len(found) > MOST_POINTS:
                kept = np.unique(
                    np.searchsorted(share, np.linspace(share[0], 100, MOST_POINTS)).clip(0, len(found) - 1)
                )
                found, share = found[kept], share[kept]
            axes.step([found[0], *found], [0, *share], where="post", **style.line())
        axes.set_xlim(0, 1.03 * max(float(values[-1]) for values, _ in lines))
        axes.xaxis.set_major_locator(_ticks(6))

    return picture(ident, alt, 250, draw, "tokens that take at most so long, %", across)


def curves(
    ident: str,
    alt: str,
    lines: Sequence[tuple[Sequence[tuple[float, float]], Style]],
    across: str,
    up: str,
    least: float,
    levels: Sequence[float],
) -> str:
    """Points (x, y) joined in the order of x, y on a log scale from `least`: what is below it is drawn there; `levels`: marked heights."""

    def draw(axes: Axes) -> None:
        axes.set_yscale("log")
        for points, style in lines:
            x, y = np.array(sorted(points)).T
            axes.plot(x, np.maximum(y, least), marker=style.marker, markersize=4.5, **style.line())
        axes.set_ylim(least * 0.9, max(axes.get_ylim()[1], 2 * least))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(_ticks(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        for level in levels:
            axes.axhline(level, color=STAND_IN["ink"], linewidth=1)
            axes.annotate(
                f"+{level:g} %",
                (1, level),
                (0, 2),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                va="bottom",
            )

    return picture(ident, alt, 290, draw, up, across)
