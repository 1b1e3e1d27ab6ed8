"""The ageing of batteries while their history comes in: rainflow counting of a stream, for many satellites, in bounded memory.

The same as ageing.history_ageing of the whole history: cycles (three-point method of ASTM E1049-85) age by depth, mean and mean
temperature, time ages by the history's means; what is still open counts as half cycles, as at a history's end. The `rainflow`
package pulls its series and cannot be stopped in between, hence this; a test holds both to the same cycles. Pure.
Leaves out what ageing.py leaves out. Where more than DEPTH turning points stay open, the oldest range counts as half a cycle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from firmware_sim import ageing
from firmware_sim.ageing import AgeingError, Chemistry

DEPTH = 64  # open turning points per satellite; ranges in a stack only shrink, so real series hold a handful
# Xu's cells were cycled at 10 % and more. Towards 0 the model's stress falls only with the root of the depth, so that each
# flicker of a load would count: ten thousand cycles of 1e-6 as 23 of 10 %. Such depths age by the calendar alone. [U]
LEAST_DEPTH = 0.01
YEAR_S = 365.25 * 86400.0
# rows of `points`: charge; sums of seconds and of kelvin-seconds before this sample and with it
_CHARGE, _S_BEFORE, _S_WITH, _CS_BEFORE, _CS_WITH = range(5)


@dataclass(frozen=True)
class Wear:
    """n batteries under way. `points` (5, n, DEPTH): open turning points, the first `used` (n,) of each; `last` (5, n): the latest
    sample; `rising` (n,): direction of the last change, -1, 0, 1. Sums since the start (n,): `closed` linear ageing of closed
    cycles, `charge_s` charge times seconds, `cycles` closed ones of LEAST_DEPTH and more, `forced` ranges that DEPTH closed."""

    chemistry: Chemistry
    begun: np.ndarray  # linear ageing at the start
    points: np.ndarray
    used: np.ndarray
    last: np.ndarray
    rising: np.ndarray
    closed: np.ndarray
    charge_s: np.ndarray
    cycles: np.ndarray
    forced: np.ndarray
    time_s: float = 0.0


def start(
    charge: np.ndarray, temp_c: np.ndarray, capacity_share: float = 1.0, chemistry: Chemistry = Chemistry()
) -> Wear:
    """Batteries that begin at states of charge (n,) and temperatures (n,), with that share of a new one's capacity.

    Raises: AgeingError.
    """
    charge, temp_c = _checked(charge, temp_c)
    count = charge.size
    zero = np.zeros(count)
    begun = 0.0 if capacity_share == 1.0 else ageing.linear_until(1.0 - capacity_share, chemistry)
    last = np.stack(
        [charge, zero, zero, zero, temp_c]
    )  # how long the first sample counts, the first step says: see there
    return Wear(
        chemistry,
        np.full(count, begun),
        np.zeros((5, count, DEPTH)),
        np.zeros(count, int),
        last,
        np.zeros(count, int),
        zero,
        zero,
        zero,
        zero,
    )


def step(wear: Wear, charge: np.ndarray, temp_c: np.ndarray, dt_s: float) -> Wear:
    """After the next sample: states of charge (n,) and battery temperatures (n,) `dt_s` later.  Raises: AgeingError."""
    charge, temp_c = _checked(charge, temp_c)
    if charge.shape != wear.used.shape or not 0.0 < dt_s < np.inf:
        raise AgeingError(f"{charge.size} batteries, {dt_s} s; give {wear.used.size} and a step above 0 s")
    last = wear.last
    points, used, closed = wear.points, wear.used.copy(), wear.closed.copy()
    cycles, forced, charge_s = wear.cycles.copy(), wear.forced.copy(), wear.charge_s
    if wear.time_s == 0.0:  # the first sample weighs as much as the second
        last = np.stack([last[_CHARGE], 0 * charge, 0 * charge + dt_s, 0 * charge, last[_CS_WITH] * dt_s])
        charge_s = last[_CHARGE] * dt_s
        points = points.copy()
        points[:, :, 0], used = last, np.ones_like(used)
    seconds, kelvin_s = last[_S_WITH], last[_CS_WITH]
    latest = np.stack([charge, seconds, seconds + dt_s, kelvin_s, kelvin_s + temp_c * dt_s])
    turn = np.sign(charge - last[_CHARGE]).astype(int)
    turned = np.flatnonzero(turn * wear.rising < 0)
    if turned.size:
        points = points.copy() if points is wear.points else points
        full = turned[used[turned] == DEPTH]
        for i in full:  # as if the history began at the second point
            share, deep = _ageing(wear.chemistry, points[:, i, 0], points[:, i, 1])
            closed[i] += 0.5 * share
            cycles[i] += 0.5 * deep
            points[:, i, :-1] = points[:, i, 1:].copy()
        used[full] -= 1
        forced[full] += 1
        points[:, turned, used[turned]] = last[:, turned]
        used[turned] += 1
    top, below = _tops(points, used)
    for i in np.flatnonzero((used >= 2) & (np.abs(charge - top) >= np.abs(top - below))):
        points = points.copy() if points is wear.points else points
        while used[i] >= 2 and abs(charge[i] - points[_CHARGE, i, used[i] - 1]) >= abs(
            points[_CHARGE, i, used[i] - 1] - points[_CHARGE, i, used[i] - 2]
        ):
            share, deep = _ageing(wear.chemistry, points[:, i, used[i] - 2], points[:, i, used[i] - 1])
            if used[i] == 2:  # the range holds the history's first point: half a cycle
                closed[i] += 0.5 * share
                cycles[i] += 0.5 * deep
                points[:, i, 0] = points[:, i, 1].copy()
                used[i] = 1
            else:
                closed[i] += share
                cycles[i] += deep
                used[i] -= 2
    return replace(
        wear,
        points=points,
        used=used,
        last=latest,
        rising=np.where(turn == 0, wear.rising, turn),
        closed=closed,
        charge_s=charge_s + charge * dt_s,
        cycles=cycles,
        forced=forced,
        time_s=wear.time_s + dt_s,
    )


def linear(wear: Wear) -> np.ndarray:
    """Linear ageing f (n,) up to now, with that of the start: closed cycles, what is open as half cycles, and the calendar."""
    if wear.time_s == 0.0:
        return wear.begun
    widest = int(wear.used.max(initial=1))
    series = np.concatenate([wear.points[:, :, :widest], wear.last[:, :, None]], axis=2)
    # the latest sample follows the topmost point
    series[:, np.arange(wear.used.size), wear.used] = wear.last
    there = np.arange(widest) < wear.used[:, None]
    share, _ = _ageing(wear.chemistry, series[:, :, :-1], series[:, :, 1:])
    open_half = 0.5 * np.where(there, share, 0.0).sum(1)
    # of all samples, the first one included
    whole_s = wear.last[_S_WITH]
    mean = ageing.charge_stress(wear.charge_s / whole_s, wear.chemistry)
    warm = ageing.temperature_stress(wear.last[_CS_WITH] / whole_s, wear.chemistry)
    return wear.begun + wear.closed + open_half + wear.chemistry.calendar_per_s * wear.time_s * mean * warm


def capacity_share(wear: Wear) -> np.ndarray:
    """What is left of a new battery's capacity, (n,), 1 when new."""
    return 1.0 - ageing.capacity_lost(linear(wear), wear.chemistry)


def lost_in_a_year(wear: Wear) -> np.ndarray:
    """Share of a new battery's capacity (n,) that goes in the year from now, if linear ageing goes on as in this history's mean.

    Not a straight line of the loss: L(f) is steep at first (the film on the electrode), so f is what is prolonged. NaN before
    the first step. A history shorter than an orbit, or one that does not begin and end alike, gives a rough figure.
    """
    if wear.time_s == 0.0:
        return np.full(wear.used.shape, np.nan)
    now = linear(wear)
    later = now + (now - wear.begun) * YEAR_S / wear.time_s
    return ageing.capacity_lost(later, wear.chemistry) - ageing.capacity_lost(now, wear.chemistry)


def _checked(charge: np.ndarray, temp_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    charge, temp_c = np.asarray(charge, float), np.asarray(temp_c, float)
    if charge.ndim != 1 or temp_c.shape != charge.shape or not np.isfinite(temp_c).all():
        raise AgeingError(f"charges {charge.shape}, temperatures {temp_c.shape}; give one finite number per battery")
    if not ((charge >= 0.0) & (charge <= 1.0)).all():
        raise AgeingError("a state of charge is not from 0 to 1")
    return charge, temp_c


def _tops(points: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Charges of the topmost open point and of the one below it."""
    each = np.arange(used.size)
    return points[_CHARGE, each, used - 1], points[_CHARGE, each, np.maximum(used - 2, 0)]


def _ageing(chemistry: Chemistry, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a cycle between two points (5, ...): its linear ageing without the calendar's, and whether it is deep enough to count."""
    depth = np.abs(second[_CHARGE] - first[_CHARGE])
    deep = depth >= LEAST_DEPTH
    span_s = np.maximum(second[_S_WITH] - first[_S_BEFORE], 1e-12)
    mean_c = np.where(deep, (second[_CS_WITH] - first[_CS_BEFORE]) / span_s, 0.0)
    mean = 0.5 * (first[_CHARGE] + second[_CHARGE])
    return np.where(deep, ageing.cycle_ageing(np.where(deep, depth, 1.0), mean, mean_c, 0.0, chemistry), 0.0), deep
