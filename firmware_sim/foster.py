"""Fits a Foster network to a board's power and temperature: all at once, or sample by sample.

    T(t) = ambient + sum_i x_i(t),   x_i' = (R_i P - x_i) / tau_i      (P constant between samples, the step is exact)

For given time constants this is linear in ambient and R, so only the time constants are searched (variable projection). Leaves
out temperature-dependent power and changing ambient: hold both still while a board is measured.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.signal import lfilter

from firmware_sim.board import Branch

MIN_SAMPLES_PER_BRANCH = 10
MAX_SAMPLES = 100_000
MAX_BRANCHES = 4
# A power that hardly moves says nothing about resistance.
MIN_POWER_STEP_W = 0.1


class FitError(ValueError):
    """A Foster network cannot be fitted; the text says what the measurement lacks and how to take a better one."""


@dataclass(frozen=True)
class FosterFit:
    """Branches by growing time constant, ambient temperature, and the rms of what is left over."""

    branches: tuple[Branch, ...]
    ambient_c: float
    residual_k: float
    samples: int

    @property
    def r_k_per_w(self) -> float:
        """Kelvin per watt after a long time."""
        return sum(branch.r_k_per_w for branch in self.branches)


def filter_step(
    branches: tuple[Branch, ...], rises_k: np.ndarray, power_w: np.ndarray | float, dt_s: float
) -> np.ndarray:
    """Temperature rises (branches, ...) `dt_s` later, exact while `power_w` is constant."""
    shape = (-1,) + (1,) * (np.ndim(rises_k) - 1)
    r_k_per_w = np.array([branch.r_k_per_w for branch in branches]).reshape(shape)
    decay = np.exp(-dt_s / np.array([branch.tau_s for branch in branches])).reshape(shape)
    return rises_k * decay + power_w * r_k_per_w * (1.0 - decay)


def fit(
    time_s: np.ndarray, power_w: np.ndarray, temp_c: np.ndarray, branches: int = 2, settled: bool = True
) -> FosterFit:
    """A Foster network from a measurement, each argument (m,); power_w[i] holds from time_s[i] to time_s[i + 1].

    `settled`: at the first sample the board had long been at the first power; otherwise each branch's state then is fitted too.
    Raises: FitError.
    """
    time_s, power_w, temp_c = (np.asarray(values, float) for values in (time_s, power_w, temp_c))
    _check(time_s, power_w, temp_c, branches)
    steps_s = np.diff(time_s)
    low_s, high_s = _tau_range(float(np.median(steps_s)), float(time_s[-1] - time_s[0]))

    def solve(log_tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns = _columns(np.exp(log_tau), steps_s, power_w, settled)
        solution = np.linalg.lstsq(columns, temp_c, rcond=None)[0]
        return solution, columns @ solution - temp_c

    # Sums of exponentials have local minima: the search starts from the best of a coarse grid.
    grid = np.log(np.geomspace(low_s * 1.5, high_s / 1.5, 6 * branches))
    start = min(itertools.combinations(grid, branches), key=lambda logs: float(np.sum(solve(np.array(logs))[1] ** 2)))
    bounds = (math.log(low_s), math.log(high_s))
    best = least_squares(lambda log_tau: solve(log_tau)[1], start, bounds=bounds, xtol=1e-10, ftol=1e-10)
    solution, residual = solve(best.x)
    return _result(
        np.exp(best.x), solution[1 : 1 + branches], solution[0], residual @ residual, temp_c.size, (low_s, high_s)
    )


class OnlineFit:
    """The same fit sample by sample, in constant memory: no sample is kept.

    A fixed grid of time constants filters the power; the sums of products of these columns and the temperature (their Gram
    matrix) are all that least squares needs. Between grid points, 14 % apart, a column is interpolated (cubic in log tau), so
    the search over time constants runs on the matrix alone.
    """

    def __init__(self, tau_range_s: tuple[float, float] = (1.0, 3000.0), branches: int = 2) -> None:
        if not 0.0 < tau_range_s[0] < tau_range_s[1] < 1e7 or not 1 <= branches <= MAX_BRANCHES:
            raise FitError(
                f"time constants {tau_range_s}, {branches} branches: give a rising range and 1 to {MAX_BRANCHES}"
            )
        self.branches = branches
        points = max(8, int(math.ceil(math.log(tau_range_s[1] / tau_range_s[0]) / 0.14)) + 1)
        self._tau_s = np.geomspace(*tau_range_s, points)
        self._filtered = np.zeros(points)
        self._gram = np.zeros((points + 2, points + 2))
        self._last: tuple[float, float] | None = None
        self._origin_c = 0.0
        self._power_range_w = (math.inf, -math.inf)
        self.samples = 0

    def update(self, time_s: float, power_w: float, temp_c: float) -> None:
        """One sample; the board had long been at the first sample's power.  Raises: FitError."""
        if not all(math.isfinite(value) for value in (time_s, power_w, temp_c)):
            raise FitError(f"a sample is no number ({time_s}, {power_w}, {temp_c}); leave it out")
        if self._last is None:
            self._filtered[:] = power_w
            # sums of squares around 0 instead of around 50 C keep four more digits
            self._origin_c = temp_c
        else:
            elapsed_s = time_s - self._last[0]
            if elapsed_s <= 0.0:
                raise FitError(f"a sample at {time_s} s comes after one at {self._last[0]} s; give rising times")
            decay = np.exp(-elapsed_s / self._tau_s)
            self._filtered = self._filtered * decay + self._last[1] * (1.0 - decay)
        self._last = (time_s, power_w)
        low_w, high_w = self._power_range_w
        self._power_range_w = (min(low_w, power_w), max(high_w, power_w))
        row = np.concatenate([[1.0], self._filtered, [temp_c - self._origin_c]])
        self._gram += np.outer(row, row)
        self.samples += 1

    def estimate(self) -> FosterFit:
        """The best network for all samples so far.  Raises: FitError while there is too little to say."""
        if self.samples < MIN_SAMPLES_PER_BRANCH * self.branches:
            raise FitError(f"{self.samples} samples are too few; take {MIN_SAMPLES_PER_BRANCH * self.branches} or more")
        if self._power_range_w[1] - self._power_range_w[0] < MIN_POWER_STEP_W:
            raise FitError(f"power moved by less than {MIN_POWER_STEP_W} W; load the board while it is measured")
        bounds = (math.log(self._tau_s[0]), math.log(self._tau_s[-1]))
        pairs = itertools.combinations(np.log(self._tau_s[:: max(1, len(self._tau_s) // 20)]), self.branches)
        start = min(pairs, key=lambda logs: self._solve(np.array(logs))[1])
        found = minimize(
            lambda logs: self._solve(logs)[1],
            start,
            method="Nelder-Mead",
            bounds=[bounds] * self.branches,
            options={"xatol": 1e-5, "fatol": 0.0, "maxiter": 400 * self.branches},
        )
        solution, squared = self._solve(found.x)
        return _result(
            np.exp(found.x),
            solution[1:],
            solution[0] + self._origin_c,
            squared,
            self.samples,
            (float(self._tau_s[0]), float(self._tau_s[-1])),
        )

    def _solve(self, log_tau: np.ndarray) -> tuple[np.ndarray, float]:
        """Least squares at these time constants: coefficients (ambient above the origin, then R), and the sum of squares."""
        columns = np.zeros((self._gram.shape[0], 1 + len(log_tau)))
        columns[0, 0] = 1.0
        grid = np.log(self._tau_s)
        for index, log in enumerate(log_tau):
            first = int(np.clip(np.searchsorted(grid, log) - 2, 0, len(grid) - 4))
            nodes = grid[first : first + 4]
            for place in range(4):
                others = np.delete(nodes, place)
                columns[1 + first + place, 1 + index] = np.prod((log - others) / (nodes[place] - others))
        normal = columns.T @ self._gram @ columns
        right = columns.T @ self._gram[:, -1]
        solution = np.linalg.lstsq(normal, right, rcond=1e-13)[0]
        squared = max(0.0, float(self._gram[-1, -1] - 2.0 * solution @ right + solution @ normal @ solution))
        return solution, squared


def _tau_range(step_s: float, length_s: float) -> tuple[float, float]:
    # faster than half a sample or slower than three times the measurement cannot be told from it
    return step_s / 2.0, 3.0 * length_s


def _check(time_s: np.ndarray, power_w: np.ndarray, temp_c: np.ndarray, branches: int) -> None:
    if not 1 <= branches <= MAX_BRANCHES:
        raise FitError(f"{branches} branches; give 1 to {MAX_BRANCHES}")
    if time_s.ndim != 1 or time_s.shape != power_w.shape or time_s.shape != temp_c.shape:
        raise FitError(f"shapes {time_s.shape}, {power_w.shape} and {temp_c.shape}; give three rows of the same length")
    if not MIN_SAMPLES_PER_BRANCH * branches <= time_s.size <= MAX_SAMPLES:
        raise FitError(f"{time_s.size} samples; give {MIN_SAMPLES_PER_BRANCH * branches} to {MAX_SAMPLES}")
    if not (np.isfinite(time_s).all() and np.isfinite(power_w).all() and np.isfinite(temp_c).all()):
        raise FitError("a sample is no number; leave samples out that are missing or invalid")
    if not (np.diff(time_s) > 0.0).all():
        raise FitError("times do not rise; sort the samples and leave repeated ones out")
    if np.ptp(power_w) < MIN_POWER_STEP_W:
        raise FitError(f"power moved by less than {MIN_POWER_STEP_W} W; load the board while it is measured")


def _columns(tau_s: np.ndarray, steps_s: np.ndarray, power_w: np.ndarray, settled: bool) -> np.ndarray:
    """The least squares' columns (m, ...): one, each branch's filtered power, and where not settled its decaying start."""
    filtered = np.empty((power_w.size, tau_s.size))
    filtered[0] = power_w[0]
    if np.ptp(steps_s) < 1e-9 * steps_s[0]:
        for branch, decay in enumerate(np.exp(-steps_s[0] / tau_s)):
            before = [decay * power_w[0]]
            filtered[1:, branch] = lfilter([1.0 - decay], [1.0, -decay], power_w[:-1], zi=before)[0]
    else:
        decays = np.exp(-steps_s[:, None] / tau_s)
        for index, decay in enumerate(decays):
            filtered[index + 1] = filtered[index] * decay + power_w[index] * (1.0 - decay)
    parts = [np.ones((power_w.size, 1)), filtered]
    if not settled:
        elapsed_s = np.concatenate([[0.0], np.cumsum(steps_s)])
        parts.append(np.exp(-elapsed_s[:, None] / tau_s))
    return np.hstack(parts)


def _result(
    tau_s: np.ndarray,
    r_k_per_w: np.ndarray,
    ambient_c: float,
    squared: float,
    samples: int,
    range_s: tuple[float, float],
) -> FosterFit:
    found = tuple(Branch(float(r_k_per_w[i]), float(tau_s[i])) for i in np.argsort(tau_s))
    for branch in found:
        what = f"{branch.r_k_per_w:.3g} K/W at {branch.tau_s:.3g} s"
        if branch.tau_s >= range_s[1] / 1.001:
            why = f"too short: a time constant ({what}) is not below the longest that can be told from a drift"
        elif branch.tau_s <= range_s[0] * 1.001:
            why = f"a time constant ({what}) is not above the shortest that these samples can show"
        elif branch.r_k_per_w > 0.0:
            continue
        elif len(found) == 1:
            why = f"the temperature fell as the power rose ({what}): something else moved it (a fan, the ambient)"
        else:
            why = f"too short to tell {len(found)} branches apart: one came out as {what}"
        raise FitError(f"{why}; measure longer with a larger step of power, or ask for fewer branches")
    return FosterFit(found, float(ambient_c), math.sqrt(squared / samples), samples)
