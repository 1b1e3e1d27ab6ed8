"""A signal's values over time, brought down to a number of points that a screen can show: buckets with min, max, mean and last.

Pure arithmetic on arrays. Leaves out where the values come from (archive_read.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A silence of so many usual distances between values is a gap, and no line is drawn across it.
GAP_PERIODS = 3.0


@dataclass(frozen=True)
class Trend:
    """`signal` of `node` from `since_utc_s` to `until_utc_s`; the lists are as long as each other.

    `at_utc_s`: the middle of a bucket, or a value's own time where `bucket_s` is 0 (there were no more than the points asked for). A
    bucket without a value has count 0 and None in `min`, `max`, `mean`, `last`: a gap. `bad`: samples that were not 'ok', in
    each bucket. `unit`, `scope` and `provenance` are of the latest; `provenances`: all there are. `cut`: older values were left out,
    there were too many. Values of another unit are left out, `other_units` names them.
    """

    node: str
    signal: str
    since_utc_s: float
    until_utc_s: float
    unit: str
    scope: str
    provenance: str
    provenances: tuple[str, ...]
    other_units: tuple[str, ...]
    bucket_s: float
    cut: bool
    at_utc_s: list[float]
    min: list[float | None]
    max: list[float | None]
    mean: list[float | None]
    last: list[float | None]
    count: list[int]
    bad: list[int]


@dataclass(frozen=True)
class Points:
    """What `down` gives: see Trend."""

    bucket_s: float
    at_utc_s: list[float]
    min: list[float | None]
    max: list[float | None]
    mean: list[float | None]
    last: list[float | None]
    count: list[int]
    bad: list[int]


def down(at_s: np.ndarray, values: np.ndarray, ok: np.ndarray, since_s: float, until_s: float, points: int) -> Points:
    """(n,) rising times in s, values and whether each is valid, as at most `points` buckets between `since_s` and `until_s`.

    A bucket is at least as wide as the gap that counts as one, so that values that come a little unevenly leave none empty.
    """
    gap_s = GAP_PERIODS * float(np.median(np.diff(at_s))) if len(at_s) > 1 else 0.0
    breaks = np.flatnonzero(np.diff(at_s) > gap_s) if gap_s > 0 else np.array([], int)
    if len(at_s) + len(breaks) <= points:
        return _each(at_s, values, ok, breaks)
    width_s = max((until_s - since_s) / points, gap_s)
    count = max(1, min(points, int(np.ceil((until_s - since_s) / width_s))))
    index = np.clip(((at_s - since_s) / width_s).astype(np.int64), 0, count - 1)
    bad = np.bincount(index[~ok], minlength=count)
    index, good = index[ok], values[ok]
    counts = np.bincount(index, minlength=count)
    filled = np.flatnonzero(counts)
    starts = np.searchsorted(index, filled)
    low, high, mean, last = (np.full(count, np.nan) for _ in range(4))
    if len(filled):
        low[filled], high[filled] = np.minimum.reduceat(good, starts), np.maximum.reduceat(good, starts)
        # scaled, so that the sum of numbers near 1e308 does not overflow
        mean[filled] = np.add.reduceat(good / counts[index], starts)
        last[filled] = good[starts + counts[filled] - 1]
    middles = since_s + (np.arange(count) + 0.5) * width_s
    return Points(width_s, middles.tolist(), *map(_listed, (low, high, mean, last)), counts.tolist(), bad.tolist())


def _each(at_s: np.ndarray, values: np.ndarray, ok: np.ndarray, breaks: np.ndarray) -> Points:
    """Every value by itself, and an empty one in the middle of each gap."""
    shown = np.where(ok, values, np.nan)
    middles = (at_s[breaks] + at_s[breaks + 1]) / 2 if len(breaks) else np.array([])
    times, shown = np.insert(at_s, breaks + 1, middles), _listed(np.insert(shown, breaks + 1, np.nan))
    count = np.insert(ok.astype(int), breaks + 1, 0).tolist()
    bad = np.insert((~ok).astype(int), breaks + 1, 0).tolist()
    return Points(0.0, times.tolist(), shown, list(shown), list(shown), list(shown), count, bad)


def _listed(values: np.ndarray) -> list[float | None]:
    """As JSON can have them: None for NaN."""
    return [None if value != value else value for value in values.tolist()]
