"""The one-node thermal model of each node, identified on line from its own power and temperature readings. Pure.

    T(t) = T_amb + R x(t) + (T_0 - T_amb) e^(-t/tau),   x' = (P - x) / tau,  x(0) = 0,   C = tau / R

is linear in T_amb, R and the start's part, so for each of TAUS_S the sums of least squares are kept and the best tau is taken: constant
memory, any number of nodes at once. A figure counts as known only when the readings say so: enough of them, a power that moved, a
standard error of R below MAX_ERROR of it. A die has more than one time constant: what is found is the one that the readings show.
Leaves out: networks of more branches (firmware_sim.foster, `spacemoe calibrate`), an ambient that moves.

Shape letters: N nodes, G time constants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

TAUS_S = np.geomspace(2.0, 600.0, 24)
MIN_READINGS = 20
MIN_POWER_RANGE_W = 0.5
MAX_ERROR = 0.25  # standard error of R as a share of R
MAX_AMBIENT_ERROR_K = 5.0
MAX_RESIDUAL_K = 1.0  # noise and steps of common sensors leave 0.1 to 0.4 K
LEAST_NOISE_K = 0.1  # a lucky fit of few readings is not believed to be better than a sensor
_RIDGE = 1e-9


@dataclass(frozen=True, eq=False)
class HeatFit:
    """Sums so far. gram [N, G, 4, 4] of the columns (1, x, e^(-t/tau), T - T_0); x [N, G]; first_s, first_c, last_s: times and
    temperature of readings [N], nan before the first; low_w, high_w: range of the power; readings [N]."""

    gram: np.ndarray
    x: np.ndarray
    first_s: np.ndarray
    first_c: np.ndarray
    last_s: np.ndarray
    low_w: np.ndarray
    high_w: np.ndarray
    readings: np.ndarray


@dataclass(frozen=True, eq=False)
class HeatModel:
    """What is known of each node [N]: R in K/W, C in J/K, ambient in degrees Celsius, rms of what is left over in K (nan where not
    known); `known` bool; `why`: what is lacking, or in words what the figures rest on."""

    r_k_per_w: np.ndarray
    c_j_per_k: np.ndarray
    ambient_c: np.ndarray
    residual_k: np.ndarray
    known: np.ndarray
    why: tuple[str, ...]


def start(nodes: int) -> HeatFit:
    """Before the first reading."""
    g, nothing = len(TAUS_S), np.full(nodes, np.nan)
    return HeatFit(
        np.zeros((nodes, g, 4, 4)),
        np.zeros((nodes, g)),
        nothing,
        nothing,
        nothing,
        np.full(nodes, np.inf),
        np.full(nodes, -np.inf),
        np.zeros(nodes, int),
    )


def update(fit: HeatFit, time_s: np.ndarray, power_w: np.ndarray, temp_c: np.ndarray) -> HeatFit:
    """With one more reading of each node [N]: its time, the mean power since its last reading, its temperature.

    Nothing is added for a node whose time has not moved or of which a figure is nan (its first reading needs no power).
    """
    first = np.isnan(fit.first_s) & np.isfinite(time_s) & np.isfinite(temp_c)
    first_s, first_c = np.where(first, time_s, fit.first_s), np.where(first, temp_c, fit.first_c)
    fit = replace(fit, first_s=first_s, first_c=first_c, last_s=np.where(first, time_s, fit.last_s))
    new = ~first & np.isfinite(power_w) & np.isfinite(temp_c) & (time_s > fit.last_s)
    if not new.any():
        return fit
    gram, x = fit.gram.copy(), fit.x.copy()
    at, p = time_s[new], power_w[new]
    decay = np.exp(-(at - fit.last_s[new])[:, None] / TAUS_S)
    x[new] = x[new] * decay + p[:, None] * (1 - decay)
    left = np.exp(-(at - first_s[new])[:, None] / TAUS_S)
    rise = np.broadcast_to((temp_c[new] - first_c[new])[:, None], left.shape)
    row = np.stack([np.ones_like(left), x[new], left, rise], -1)
    gram[new] += row[..., :, None] * row[..., None, :]
    low_w, high_w = fit.low_w.copy(), fit.high_w.copy()
    low_w[new], high_w[new] = np.minimum(low_w[new], p), np.maximum(high_w[new], p)
    return replace(
        fit,
        gram=gram,
        x=x,
        last_s=np.where(new, time_s, fit.last_s),
        low_w=low_w,
        high_w=high_w,
        readings=fit.readings + new,
    )


def estimate(fit: HeatFit) -> HeatModel:
    """The best model of each node for all readings so far."""
    n = len(fit.readings)
    found = [_node(fit, i) for i in range(n)]
    r, c, ambient, residual, known, why = zip(*found) if found else ((),) * 6
    arrays = (np.array(each, float) for each in (r, c, ambient, residual))
    return HeatModel(*arrays, np.array(known, bool), tuple(why))


def _node(fit: HeatFit, i: int) -> tuple[float, float, float, float, bool, str]:
    nothing = (np.nan,) * 4
    m, range_w = int(fit.readings[i]), fit.high_w[i] - fit.low_w[i]
    if m < MIN_READINGS:
        return *nothing, False, f"not identified: {m} readings of {MIN_READINGS}"
    if range_w < MIN_POWER_RANGE_W:
        return *nothing, False, f"not identified: power moved by {range_w:.2f} W of {MIN_POWER_RANGE_W} W"
    gram = fit.gram[i]
    normal, right, square = gram[:, :3, :3] + _RIDGE * np.eye(3), gram[:, :3, 3], gram[:, 3, 3]
    inverse = np.linalg.inv(normal)
    solution = np.einsum("gij,gj->gi", inverse, right)
    rest = square - 2 * (solution * right).sum(1) + np.einsum("gi,gij,gj->g", solution, gram[:, :3, :3], solution)
    best = int(np.argmin(rest))
    residual_k = float(np.sqrt(max(rest[best], 0.0) / m))
    noise_k = max(residual_k * np.sqrt(m / (m - 4)), LEAST_NOISE_K)
    ambient_error_k, r_error = noise_k * np.sqrt(np.abs(np.diag(inverse[best])[:2]))
    ambient_c, r, tau_s = float(solution[best, 0] + fit.first_c[i]), float(solution[best, 1]), float(TAUS_S[best])
    if residual_k > MAX_RESIDUAL_K:
        return *nothing, False, f"not identified: {residual_k:.1f} K rms are left over"
    if not 0 < r_error <= MAX_ERROR * r or ambient_error_k > MAX_AMBIENT_ERROR_K:
        return *nothing, False, f"not identified: R {r:.2f} +- {r_error:.2f} K/W is too rough after {m} readings"
    if best in (0, len(TAUS_S) - 1):
        return *nothing, False, f"not identified: tau {tau_s:.0f} s is at the end of what is looked for"
    return r, tau_s / r, ambient_c, residual_k, True, f"identified from {m} readings of its own power and temperature"
