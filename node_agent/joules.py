"""Arithmetic of the energy meter: integrals of power, counters that wrap, and joules divided by what the node was doing.

Pure: times and readings are arguments. Method of the division, in each window between two samples: baseline power times
its length is idle; what is above is divided between compute, radio and telemetry in proportion to the seconds that were
spent on each; where none was spent it is idle too (another process, the kernel). The four add up to the total.
Leaves out: reading sensors and clocks (energy.py); joules of what runs at the same time in other processes; the lag of a
power monitor that averages, which moves joules of the last moments of a request into the window after it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

MAX_GAP_S = 2.0  # without a valid reading for longer, nothing is assumed in between: the gap is published
QUIET_BLOCK_S = 0.5
QUIET_BLOCKS = 120
QUIET_QUANTILE = 0.1
COST_SMOOTHING = 0.1


@dataclass(frozen=True)
class Step:
    """Joules between two valid samples, and the seconds between them."""

    energy_j: float
    elapsed_s: float


@dataclass
class Integral:
    """Trapezoid over the real times of the samples. `gap_s`: time for which there was no reading to integrate."""

    energy_j: float = 0.0
    gap_s: float = 0.0
    last_s: float | None = None  # time of the last valid sample, or of the first try
    _last_w: float | None = None

    def add(self, time_s: float, power_w: float | None) -> Step | None:
        """One sample at a monotonic time; None for a reading that failed. Returns what it adds, if anything."""
        if power_w is None:
            self.last_s = time_s if self.last_s is None else self.last_s
            return None
        step = None
        if self.last_s is not None:
            elapsed_s = time_s - self.last_s
            if self._last_w is None or elapsed_s > MAX_GAP_S:
                self.gap_s += elapsed_s
            else:
                step = Step(elapsed_s * (power_w + self._last_w) / 2, elapsed_s)
                self.energy_j += step.energy_j
        self.last_s, self._last_w = time_s, power_w
        return step


@dataclass
class CounterSum:
    """Joules from a cumulative counter that wraps at `wraps_at_j`."""

    wraps_at_j: float
    energy_j: float = 0.0
    _last_j: float | None = None

    def add(self, value_j: float | None) -> None:
        """One reading. A wrap is assumed to happen at most once between readings (a package at 200 W: every 20 minutes)."""
        if value_j is None:
            return
        if self._last_j is not None:
            step_j = value_j - self._last_j
            self.energy_j += step_j if step_j >= 0 else step_j + self.wraps_at_j
        self._last_j = value_j


class Baseline:
    """Power of the board while the agent serves nothing: a low quantile of the means over half seconds that were quiet from
    end to end. A mean is used and not a sample, because a power monitor's noise would pull a lowest sample down."""

    def __init__(self) -> None:
        self._blocks_w: deque[float] = deque(maxlen=QUIET_BLOCKS)
        self._energy_j = self._elapsed_s = 0.0
        self.power_w: float | None = None

    def add(self, step: Step, quiet: bool) -> None:
        if not quiet:
            self._energy_j = self._elapsed_s = 0.0
            return
        self._energy_j += step.energy_j
        self._elapsed_s += step.elapsed_s
        if self._elapsed_s >= QUIET_BLOCK_S:
            self._blocks_w.append(self._energy_j / self._elapsed_s)
            self._energy_j = self._elapsed_s = 0.0
            self.power_w = sorted(self._blocks_w)[int(QUIET_QUANTILE * len(self._blocks_w))]


@dataclass(frozen=True)
class Busy:
    """Cumulative seconds that were spent on each kind of work until a moment."""

    compute_s: float = 0.0
    radio_s: float = 0.0
    telemetry_s: float = 0.0


@dataclass(frozen=True)
class Split:
    """Cumulative joules by kind of work."""

    compute_j: float = 0.0
    radio_j: float = 0.0
    idle_j: float = 0.0
    telemetry_j: float = 0.0

    @property
    def total_j(self) -> float:
        """The sum, in the order of the fields: adding the published four in that order gives it to the last bit."""
        return self.compute_j + self.radio_j + self.idle_j + self.telemetry_j


@dataclass
class Division:
    """Divides the steps of a meter as the module's first lines say."""

    split: Split = Split()
    baseline: Baseline = field(default_factory=Baseline)
    _busy: Busy | None = None

    def add(self, step: Step | None, busy: Busy) -> None:
        """`step` ended now, `busy` is until now; None: the window has no joules (a gap), its work is passed over."""
        before, self._busy = self._busy or busy, busy
        if step is None:
            return
        spent_s = (
            max(0.0, busy.compute_s - before.compute_s),
            max(0.0, busy.radio_s - before.radio_s),
            max(0.0, busy.telemetry_s - before.telemetry_s),
        )
        all_s = sum(spent_s)
        above_j = 0.0
        if self.baseline.power_w is not None and all_s > 0:
            above_j = max(0.0, step.energy_j - self.baseline.power_w * step.elapsed_s)
        compute_j, radio_j, telemetry_j = (above_j * part / all_s if all_s else 0.0 for part in spent_s)
        split = self.split
        self.split = Split(
            split.compute_j + compute_j,
            split.radio_j + radio_j,
            split.idle_j + step.energy_j - above_j,
            split.telemetry_j + telemetry_j,
        )
        self.baseline.add(step, quiet=spent_s[0] == 0 and spent_s[1] == 0)


@dataclass
class Pace:
    """How long to wait between samples: as long as the sensor needs for new data, or longer where reading it would cost more
    than `bound` (a part of one core)."""

    wanted_s: float
    bound: float
    cost_s: float = 0.0  # CPU time of one sample, smoothed

    def after(self, cost_s: float) -> float:
        """The period from now on, the last sample having cost `cost_s` of CPU time."""
        self.cost_s += COST_SMOOTHING * (cost_s - self.cost_s)
        return max(self.wanted_s, self.cost_s / self.bound)
