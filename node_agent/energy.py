"""Joules since the start: fast samples of the board's total power, integrated on the node.

The rate matters: a bursty load read once a second errs by up to 80 % (arXiv 2206.10377), so the counter is published and
not left to the receiver. Where the board has an energy counter (RAPL) its differences are summed instead.
Leaves out: attribution of joules to requests; calibration of the meter.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from node_agent import sensors
from node_agent.wire import Provenance, Sample

MAX_GAP_S = 2.0  # without a valid reading for longer, nothing is assumed in between: the gap is published


@dataclass
class Integral:
    """Trapezoid over the real times of the samples. `gap_s`: time for which there was no reading to integrate."""

    energy_j: float = 0.0
    gap_s: float = 0.0
    last_s: float | None = None  # time of the last valid sample, or of the first try
    _last_w: float | None = None

    def add(self, time_s: float, power_w: float | None) -> None:
        """One sample at a monotonic time; None for a reading that failed."""
        if power_w is None:
            self.last_s = time_s if self.last_s is None else self.last_s
            return
        if self.last_s is not None:
            elapsed_s = time_s - self.last_s
            if self._last_w is None or elapsed_s > MAX_GAP_S:
                self.gap_s += elapsed_s
            else:
                self.energy_j += elapsed_s * (power_w + self._last_w) / 2
        self.last_s, self._last_w = time_s, power_w


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


@dataclass(frozen=True)
class Snapshot:
    """State of the meter. `power_w` is the mean since the last snapshot; None where nothing was read."""

    energy_j: float | None
    power_w: float | None
    rate_hz: float
    gap_s: float
    provenance: Provenance
    scope: str


class EnergyMeter:
    """A thread that samples the total power. Use as a context manager; without a power sensor it does nothing and says so."""

    def __init__(self, found: sensors.Found, sample_hz: float):
        self._total = found.total
        self._period_s = 1.0 / sample_hz
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._integral = Integral()
        self._counters = [CounterSum(sensor.wraps_at or 0.0) for sensor in self._total]
        self._samples = 0
        self._valid_s: float | None = None  # time of the last valid sample
        self._mark: tuple[float, float, float] | None = None  # that time, joules and gap at the last snapshot
        self._rate_mark = (time.monotonic(), 0)
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True) if self._total else None

    def __enter__(self) -> EnergyMeter:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(2.0)

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stop.is_set():
            self.sample()
            due_s = max(due_s + self._period_s, time.monotonic())
            self._stop.wait(due_s - time.monotonic())

    def sample(self) -> None:
        """Reads the total once and adds it up (any thread)."""
        readings = [sensors.read(sensor).value for sensor in self._total]
        whole = all(value is not None for value in readings)
        with self._lock:
            now_s = time.monotonic()
            self._samples += 1
            if whole:
                self._valid_s = now_s
            if self._total[0].unit == "W":
                self._integral.add(now_s, sum(readings) if whole else None)
            else:
                for counter, value in zip(self._counters, readings):
                    counter.add(value)

    def snapshot(self) -> Snapshot:
        """Joules so far, and the mean power since the last call."""
        if not self._total:
            return Snapshot(None, None, 0.0, 0.0, "derived", "board")
        counted = self._total[0].unit == "J"
        with self._lock:
            now_s = time.monotonic()
            gap_s = self._integral.gap_s
            energy_j = sum(c.energy_j for c in self._counters) if counted else self._integral.energy_j
            rate_hz = (self._samples - self._rate_mark[1]) / max(now_s - self._rate_mark[0], 1e-9)
            self._rate_mark = (now_s, self._samples)
            mean_w, last, valid_s = None, self._mark, self._valid_s
            if valid_s is not None:
                if last is not None and valid_s > last[0] and gap_s == last[2]:
                    mean_w = (energy_j - last[1]) / (valid_s - last[0])
                self._mark = (valid_s, energy_j, gap_s)
        simulated = any(sensor.provenance == "simulated" for sensor in self._total)
        provenance = "simulated" if simulated else "measured" if counted else "derived"
        scope = "board" if self._total[0].scope == "board" else "module"
        return Snapshot(energy_j if valid_s is not None else None, mean_w, rate_hz, gap_s, provenance, scope)


def samples(state: Snapshot, generated_at: float) -> tuple[Sample, ...]:
    """Telemetry of the meter: energy_j, power_w (mean since the last telemetry), the real rate and what it missed."""
    missing = "ok" if state.energy_j is not None else "missing"
    power = "ok" if state.power_w is not None else "missing"
    return (
        Sample("energy_j", state.energy_j, "J", missing, state.provenance, state.scope, generated_at),
        Sample("power_w", state.power_w, "W", power, state.provenance, state.scope, generated_at),
        Sample("energy_rate_hz", state.rate_hz, "Hz", "ok", "measured", "agent", generated_at),
        Sample("energy_gap_s", state.gap_s, "s", "ok", "measured", "agent", generated_at),
    )
