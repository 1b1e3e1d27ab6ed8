"""What cycles and years do to a battery: the semi-empirical model of Xu et al. 2016, with rainflow cycle counting.

The default parameters are their lithium manganese oxide cell; space cells last longer, so the chemistry is a parameter set.
Leaves out lithium plating (charging in the cold; battery.py throttles it), current rates, and the spread between cells.
Counting is the `rainflow` package: pure Python, MIT, the three-point method of ASTM E1049-85, and it takes a stream.
Source: B. Xu et al., "Modeling of lithium-ion battery degradation for cell life assessment", IEEE Trans. Smart Grid 9 (2016).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import rainflow
from scipy.optimize import brentq


class AgeingError(ValueError):
    """A history or a depth cannot be used; the text says why."""


@dataclass(frozen=True)
class Chemistry:
    """Parameters of the model; the defaults are Xu's LMO cell."""

    sei_share: float = 0.0575
    sei_rate: float = 121.0
    depth_1: float = 1.4e5
    depth_2: float = -0.501
    depth_3: float = -1.23e5
    charge: float = 1.04
    charge_ref: float = 0.5
    temperature: float = 0.0693
    temperature_ref_c: float = 25.0
    calendar_per_s: float = 4.14e-10


@dataclass(frozen=True)
class Cycle:
    """One cycle (count 1) or half cycle (0.5) of the state of charge; where in the series it starts and ends."""

    depth: float
    mean: float
    count: float
    start: int
    end: int


def depth_stress(depth: np.ndarray | float, chemistry: Chemistry = Chemistry()) -> np.ndarray:
    """S_d of a cycle of `depth`, above 0 to 1."""
    depth = np.asarray(depth, float)
    if np.any(depth <= 0.0) or np.any(depth > 1.0):
        raise AgeingError("a depth of discharge is not above 0 and at most 1")
    return 1.0 / (chemistry.depth_1 * depth**chemistry.depth_2 + chemistry.depth_3)


def charge_stress(mean: np.ndarray | float, chemistry: Chemistry = Chemistry()) -> np.ndarray:
    """S_s of a mean state of charge."""
    return np.exp(chemistry.charge * (np.asarray(mean, float) - chemistry.charge_ref))


def temperature_stress(temp_c: np.ndarray | float, chemistry: Chemistry = Chemistry()) -> np.ndarray:
    """S_T of a temperature in degrees Celsius (from -273 up)."""
    temp_c = np.asarray(temp_c, float)
    # the model's own rounding of 273.15
    ratio = (chemistry.temperature_ref_c + 273.0) / (temp_c + 273.0)
    return np.exp(chemistry.temperature * (temp_c - chemistry.temperature_ref_c) * ratio)


def cycle_ageing(
    depth: np.ndarray | float,
    mean: np.ndarray | float,
    temp_c: np.ndarray | float,
    duration_s: np.ndarray | float = 0.0,
    chemistry: Chemistry = Chemistry(),
) -> np.ndarray:
    """Linear ageing f of one cycle, with the calendar ageing of the time it took."""
    stress = depth_stress(depth, chemistry) + chemistry.calendar_per_s * np.asarray(duration_s, float)
    return stress * charge_stress(mean, chemistry) * temperature_stress(temp_c, chemistry)


def capacity_lost(linear: np.ndarray | float, chemistry: Chemistry = Chemistry()) -> np.ndarray:
    """Share of the capacity that is gone after a sum `linear` of f, L = 1 - a e^(-b f) - (1 - a) e^(-f)."""
    linear = np.asarray(linear, float)
    share = chemistry.sei_share
    return 1.0 - share * np.exp(-chemistry.sei_rate * linear) - (1.0 - share) * np.exp(-linear)


def linear_until(lost: float, chemistry: Chemistry = Chemistry()) -> float:
    """The sum of f at which the share `lost` of the capacity is gone (0.163924 for 20 %).  Raises: AgeingError."""
    if not 0.0 < lost < 1.0:
        raise AgeingError(f"a loss of {lost:g}; give a share above 0 and below 1")
    return float(brentq(lambda linear: float(capacity_lost(linear, chemistry)) - lost, 0.0, 1e3, xtol=1e-15))


def cycles(charge: Iterable[float]) -> Iterator[Cycle]:
    """Cycles of a series of states of charge, in the order in which they close (a stream is read only once)."""
    for depth, mean, count, start, end in rainflow.extract_cycles(charge):
        yield Cycle(depth, mean, count, start, end)


def history_ageing(
    charge: np.ndarray,
    temp_c: np.ndarray | float,
    step_s: float,
    chemistry: Chemistry = Chemistry(),
    least_depth: float = 0.0,
) -> float:
    """Linear ageing f of a whole history: states of charge at equal steps, (m,), and the battery's temperatures.

    Cycles age by their depth, mean and mean temperature, those below `least_depth` not at all; time ages by the whole history's
    means, once. wear.py counts the same while the history comes in.  Raises: AgeingError.
    """
    charge = np.asarray(charge, float)
    temp_c = np.broadcast_to(np.asarray(temp_c, float), charge.shape)
    if charge.ndim != 1 or charge.size < 3 or not np.isfinite(charge).all() or charge.min() < 0.0 or charge.max() > 1.0:
        raise AgeingError("a history needs at least 3 states of charge from 0 to 1")
    # mean temperatures of every cycle in one pass
    summed = np.concatenate([[0.0], np.cumsum(temp_c)])
    total = 0.0
    for cycle in cycles(charge):
        if cycle.depth <= 0.0 or cycle.depth < least_depth:
            continue
        low, high = sorted((cycle.start, cycle.end))
        mean_c = (summed[high + 1] - summed[low]) / (high + 1 - low)
        total += cycle.count * float(cycle_ageing(cycle.depth, cycle.mean, mean_c, 0.0, chemistry))
    calendar = chemistry.calendar_per_s * (charge.size - 1) * step_s
    stress = float(charge_stress(charge.mean(), chemistry) * temperature_stress(temp_c.mean(), chemistry))
    return total + calendar * stress
