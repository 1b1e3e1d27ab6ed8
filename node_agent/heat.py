"""How warm the die will get: a Foster network learned on line, and the largest duty that keeps the die below a set point.

    T(t) = T_0 + sum_i g_i phi_i(t),   phi_i' = (duty - phi_i) / tau_i,   tau_i fixed, g_i in K at full duty

is linear in T_0 and g, so a Kalman filter with slowly walking parameters learns them from the readings, on any board. What
the model cannot explain is followed by a short filter, so that the set point is met without an offset. A constant duty u
gives H seconds from now

    T(t + H) = T(t) + sum_i max(g_i, 0) (u - phi_i) (1 - e^(-H/tau_i)) + drift H

which is solved for u at each of HORIZONS_S. Until the gains are known, their prior stands: warmer than common boards.
Leaves out: what to do about it (guard.py). Pure: every step gives a new state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

TAUS_S = np.array([4.0, 16.0, 64.0, 256.0])  # of a die on its package, heat spreader, board, housing
HORIZONS_S = np.array([8.0, 16.0, 32.0])
PRIOR_GAINS_K = np.array([5.0, 4.0, 6.0, 6.0])
PRIOR_VARIANCE = np.array([25.0, 25.0, 25.0, 64.0, 64.0])  # K^2, of T_0 and of the gains
WALK_VARIANCE_PER_S = np.array([4e-4, 1e-4, 1e-4, 1e-4, 1e-4])  # ambient and other loads; paste, fan and dust
READING_VARIANCE = 0.16  # K^2: noise and steps of a common sensor
REST_S = 3.0  # time constant of the filter over what the model does not explain
DRIFT_S = 12.0  # and of its trend
JUMP_K, JUMP_READINGS = 8.0, 3  # a reading so far off is believed when it comes so often in a row
LONGEST_S = 60.0  # of one step: after a longer silence the model starts from there


@dataclass(frozen=True)
class HeatState:
    """`parameters` float64 [5] = (T_0, g) with their covariance [5, 5]; `phi` float64 [4]; `temp_c` None: no reading yet.

    `temp_c`: filtered, degrees Celsius; `drift_k_per_s`: trend of what the model does not explain; `odd`: doubtful readings
    in a row; `time_s` of the last step, monotonic.
    """

    parameters: np.ndarray
    covariance: np.ndarray
    phi: np.ndarray
    time_s: float
    temp_c: float | None = None
    rest_k: float = 0.0
    drift_k_per_s: float = 0.0
    odd: int = 0


def start(time_s: float) -> HeatState:
    """Before the first reading."""
    return HeatState(np.append(0.0, PRIOR_GAINS_K), np.diag(PRIOR_VARIANCE), np.zeros(len(TAUS_S)), time_s)


def step(state: HeatState, temp_c: float | None, duty: float, time_s: float) -> tuple[HeatState, bool]:
    """(state at `time_s`, whether the reading was believed). `duty`: mean share of time computed since the last step, 0-1;
    `temp_c`: the reading in degrees Celsius, None where there is none."""
    dt_s = min(max(time_s - state.time_s, 0.0), LONGEST_S)
    phi = duty + (state.phi - duty) * np.exp(-dt_s / TAUS_S)
    if temp_c is None:
        return replace(state, phi=phi, time_s=time_s), False
    if state.temp_c is None:
        parameters = state.parameters.copy()
        parameters[0] = temp_c - parameters[1:] @ phi
        return replace(state, parameters=parameters, phi=phi, time_s=time_s, temp_c=temp_c), True
    row = np.append(1.0, phi)
    error_k = temp_c - float(row @ state.parameters)
    jumped = abs(error_k - state.rest_k - state.drift_k_per_s * dt_s) > JUMP_K
    if jumped and state.odd + 1 < JUMP_READINGS:
        return replace(state, phi=phi, time_s=time_s, odd=state.odd + 1), False
    if jumped:  # believed at last: from here on
        return replace(state, phi=phi, time_s=time_s, odd=0, rest_k=error_k, drift_k_per_s=0.0, temp_c=temp_c), True
    rest_k, drift = _follow(state, error_k, dt_s)
    parameters, covariance = _learn(state, row, error_k, dt_s)
    explained_k = float(row @ (parameters - state.parameters))  # what the model says more now is no rest any longer
    after = HeatState(
        parameters,
        covariance,
        phi,
        time_s,
        temp_c=float(row @ state.parameters) + rest_k,
        rest_k=rest_k - explained_k,
        drift_k_per_s=drift,
    )
    return after, True


def _follow(state: HeatState, error_k: float, dt_s: float) -> tuple[float, float]:
    """(rest in K, its trend in K/s) by an alpha-beta filter whose time constants do not depend on the rate of the readings."""
    ahead_k = state.rest_k + state.drift_k_per_s * dt_s
    surprise_k = error_k - ahead_k
    alpha, beta = 1.0 - math.exp(-dt_s / REST_S), 1.0 - math.exp(-dt_s / DRIFT_S)
    drift = state.drift_k_per_s * math.exp(-dt_s / (4 * DRIFT_S)) + beta * surprise_k / DRIFT_S
    return ahead_k + alpha * surprise_k, drift


def _learn(state: HeatState, row: np.ndarray, error_k: float, dt_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Kalman step of the parameters. A gain that nothing has excited for long is never less known than at the start."""
    covariance = state.covariance + np.diag(WALK_VARIANCE_PER_S * dt_s)
    shrink = np.sqrt(np.minimum(1.0, PRIOR_VARIANCE / np.diag(covariance)))
    covariance = covariance * np.outer(shrink, shrink)
    seen = covariance @ row
    weight = seen / (float(row @ seen) + READING_VARIANCE)
    covariance = covariance - np.outer(weight, seen)
    return state.parameters + weight * error_k, (covariance + covariance.T) / 2


def largest_duty(state: HeatState, set_point_c: float) -> float:
    """The largest constant duty (unbounded: may be below 0 or above 1) that ends below the set point at every horizon.

    Raises: ValueError before the first reading.
    """
    if state.temp_c is None:
        raise ValueError("there is no temperature yet: step with a reading first")
    gains = np.maximum(state.parameters[1:], 0.0)
    reach = gains * (1.0 - np.exp(-HORIZONS_S[:, None] / TAUS_S))  # [horizon, branch], K
    room_k = set_point_c - state.temp_c - max(state.drift_k_per_s, 0.0) * HORIZONS_S
    return float(np.min((room_k + reach @ state.phi) / np.maximum(reach.sum(1), 0.5)))
