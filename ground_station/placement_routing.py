"""Routing sets for placement: which K of E experts a token chooses together, from calibration counts or from popularity.

The distribution is the one of greatest entropy with the calibrated pair counts (a log-linear model fitted by iterative
scaling over all sets). Where there are too many sets to list, sets are drawn with the single counts alone (systematic
sampling in random order, so that each expert comes up exactly as often as it should). Leaves out: dependence on the token.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from ground_station.placement import PlacementError

MAX_LISTED = 6000


def routing_sets(
    use: np.ndarray, top_k: int, pairs: np.ndarray | None = None, samples: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sets int [R, K] and weights [R] of one layer; use [E] sums to K; pairs [E, E]: share of tokens that choose both.

    All sets, or `samples` of them drawn by low-variance resampling (weights equal).  Raises: PlacementError.
    """
    experts = len(use)
    if not 1 <= top_k <= experts or abs(use.sum() - top_k) > 1e-6 * top_k or use.max() > 1 + 1e-9 or use.min() < 0:
        raise PlacementError(
            f"shares of use that sum to {use.sum():.4g} are not those of top-{top_k} of {experts} experts"
        )
    rng = np.random.default_rng(seed)
    if math.comb(experts, top_k) > MAX_LISTED:
        drawn = _systematic(use, top_k, samples or 256, rng)
        return drawn, np.full(len(drawn), 1.0 / len(drawn))
    sets = np.array(list(itertools.combinations(range(experts), top_k)))
    weights = _fit(sets, use, pairs)
    if samples is None or samples >= len(sets):
        return sets, weights
    points = (np.arange(samples) + rng.random()) / samples
    chosen = np.minimum(np.searchsorted(np.cumsum(weights), points), len(sets) - 1)
    unique, counts = np.unique(chosen, return_counts=True)
    return _padded(sets[unique], counts / samples, samples)


def popularity(experts: int, top_k: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Shares of use [E] that sum to K: log-normal popularity with that spread, none above 1."""
    weight = np.exp(sigma * rng.standard_normal(experts))
    low, high = 0.0, top_k / weight.min()
    for _ in range(100):  # min(1, c w) sums to K at one c
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1.0, middle * weight).sum() < top_k else (low, middle)
    return np.minimum(1.0, high * weight) * (top_k / np.minimum(1.0, high * weight).sum())


def _fit(sets: np.ndarray, use: np.ndarray, pairs: np.ndarray | None, steps: int = 400) -> np.ndarray:
    """Weights of all sets by iterative scaling towards the singles, then pairs and singles in turn."""
    count, top_k = sets.shape
    chosen = np.zeros((count, len(use)))
    np.put_along_axis(chosen, sets, 1.0, axis=1)
    features, target = chosen, use
    if pairs is not None and top_k > 1:
        upper = np.array(list(itertools.combinations(range(len(use)), 2)))
        features = chosen[:, upper[:, 0]] * chosen[:, upper[:, 1]]
        target = pairs[upper[:, 0], upper[:, 1]]
        top_k = top_k * (top_k - 1) // 2  # each set holds that many pairs: the step that keeps scaling monotone
    logs = np.zeros(count)
    goal = np.log(np.maximum(target, 1e-12))
    for _ in range(steps):
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        step = features @ (goal - np.log(np.maximum(weights @ features, 1e-12))) / top_k
        logs += step
        if np.abs(step).max() < 1e-9:
            break
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def _systematic(use: np.ndarray, top_k: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    result = np.empty((samples, top_k), int)
    for row in range(samples):
        order = rng.permutation(len(use))
        ends = np.cumsum(use[order])
        ends[-1] = top_k
        result[row] = np.sort(order[np.searchsorted(ends, rng.random() + np.arange(top_k), side="right")])
    return result


def _padded(sets: np.ndarray, weights: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The same number of rows for every layer: what is missing repeats the first set with weight 0."""
    lack = rows - len(sets)
    return np.concatenate([sets, np.repeat(sets[:1], lack, 0)]), np.concatenate([weights, np.zeros(lack)])
