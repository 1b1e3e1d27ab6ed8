"""Joules since the start: fast samples of the board's total power, integrated on the node and divided by kind of work.

The rate matters: a bursty load read once a second errs by up to 80 % (arXiv 2206.10377), so the counter is published and
not left to the receiver. A sample is due whenever the sensor has new data, but sampling may cost no more than a bound
(percent of one core, CPU time of the sampler's own thread), and what it costs is published. Where the board has an energy
counter (RAPL) its differences are summed instead. The arithmetic, and the method of the division, is joules.py's.
CPU time of a sensor that is a program (vcgencmd) is not in that cost.
A board without a power sensor has no joules, unless a model is configured: then they are an estimate and labelled so
(power_model.py). Where there is a sensor, a configured model is only compared with it.
Leaves out: calibration of the meter. Joules of one request: a receiver takes the differences of these counters between two
telemetry messages (the command `sample`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from node_agent import sensors
from node_agent.config import PowerModelConfig
from node_agent.counters import Counters
from node_agent.joules import MAX_GAP_S, Busy, CounterSum, Division, Integral, Pace, Split, Step
from node_agent.power_model import CpuTime, Judge, Moment
from node_agent.wire import Provenance, Sample

__all__ = ["CounterSum", "EnergyMeter", "Integral", "Snapshot", "samples"]

MAX_COST_PERCENT = 1.2  # with telemetry the agent is to stay below 2 % of a core
MAX_SAMPLE_HZ = 1000.0
SAMPLE_WAIT_S = 0.25  # how long `sample` waits for a sensor that hangs


@dataclass(frozen=True)
class Snapshot:
    """State of the meter. `power_w` is the mean since the last snapshot, or up to the newest reading where there is none since;
    None where nothing was read, after a gap, and once it is stale.

    `stale`: the sensor has given nothing for MAX_GAP_S, the joules are those until then. `cost_percent` of one core, since
    the last snapshot; `baseline_w` as joules.Baseline has it, None until there was half a second of quiet. `cpu_busy_s`: of all
    cores, since the machine's start. `residual_w`: the sensor's mean power less the model's; `judged`: there are both.
    """

    energy_j: float | None
    power_w: float | None
    rate_hz: float
    gap_s: float
    provenance: Provenance
    scope: str
    split: Split | None = None
    baseline_w: float | None = None
    cost_percent: float | None = None
    stale: bool = False
    cpu_busy_s: float | None = None
    cpu_simulated: bool = False
    residual_w: float | None = None
    judged: bool = False


class _Direct(sensors.TimedCalls):
    """Reads in the thread that asks: handing each read to another thread would cost more than the read, and hide the cost
    from the sampler. A driver that hangs stops the sampler alone, which nobody waits for longer than SAMPLE_WAIT_S."""

    def call(self, key: Hashable, function: Callable[[], Any], limit_s: float | None = None) -> Any:
        return function()


_DIRECT = _Direct()


class EnergyMeter:
    """A thread that samples the total power. Use as a context manager; without a power sensor it does nothing and says so.

    Args:
        found: what sensors.find gave.
        sample_hz: samples per second, where the sensor does not say how often it has new data.
        counters: what the agent does, for the division; without them everything is idle.
        max_cost_percent: of one core; the sampler slows down rather than pass it.
        cpu: where CPU time is read from, with the snapshots.
        model: to be judged by the sensor.
    """

    def __init__(
        self,
        found: sensors.Found,
        sample_hz: float,
        counters: Counters | None = None,
        max_cost_percent: float = MAX_COST_PERCENT,
        cpu: CpuTime | None = None,
        model: PowerModelConfig | None = None,
    ):
        self._total = found.total
        self._cpu = cpu
        self._judge = None if model is None or found.estimate or not found.total else Judge(model)
        self._counters = counters
        rates_hz = [rate for sensor in self._total if (rate := sensor.rate_hz)]
        self.wanted_hz = min(max(rates_hz, default=sample_hz), MAX_SAMPLE_HZ)
        self._pace = Pace(1.0 / self.wanted_hz, max_cost_percent / 100)
        self._stop, self._wake = threading.Event(), threading.Event()
        self._asked = self._answered = 0  # samples that were asked for from outside
        self._changed = threading.Condition()  # holds everything below together
        self._integral = Integral()
        self._sums = [CounterSum(sensor.wraps_at or 0.0) for sensor in self._total]
        self._division = Division()
        self._samples = 0
        self._cpu_s = 0.0
        self._valid_s: float | None = None  # time of the last valid sample
        self._mark: tuple[float, float, float] | None = None  # that time, joules and gap at the last snapshot
        self._mean_w: float | None = None
        self._rate_mark = (time.monotonic(), 0, 0.0)  # time, samples, CPU seconds at the last snapshot
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True) if self._total else None

    def __enter__(self) -> EnergyMeter:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread:
            self._thread.join(2.0)

    def _run(self) -> None:
        due_s = time.monotonic()
        before_s = time.thread_time()
        while not self._stop.is_set():
            self._wake.clear()
            asked = self._asked
            self._sample_here()
            now_s = time.thread_time()
            with self._changed:
                self._cpu_s, self._answered = now_s, asked
                self._changed.notify_all()
            period_s = self._pace.after(now_s - before_s)
            before_s = now_s
            due_s = max(due_s + period_s, time.monotonic())
            self._wake.wait(due_s - time.monotonic())

    def sample(self) -> None:
        """Sees to it that the joules are those until now (any thread): waits a moment for a sample from after this call."""
        if self._thread is None or not self._thread.is_alive():
            self._sample_here()
            return
        with self._changed:
            self._asked += 1
            mine = self._asked
            self._wake.set()
            # a sample that is under way now was begun before this call and does not count
            self._changed.wait_for(lambda: self._answered >= mine, SAMPLE_WAIT_S)

    def _sample_here(self) -> None:
        readings = [sensors.read(sensor, _DIRECT) for sensor in self._total]
        if readings:
            # a value that is stale is none: what happened since cannot be told from it
            self.take(time.monotonic(), [each.value if each.validity == "ok" else None for each in readings])

    def take(self, now_s: float, readings: list[float | None]) -> None:
        """Adds one reading of each sensor of the total, made at monotonic time `now_s`; None for one that failed."""
        whole = all(value is not None for value in readings)
        with self._changed:
            self._samples += 1
            if self._total[0].unit == "W":
                step = self._integral.add(now_s, sum(readings) if whole else None)
            else:
                step = self._count(now_s, readings)
            if whole:
                self._valid_s = now_s
                self._division.add(step, self._busy())

    def _count(self, now_s: float, readings: list[float | None]) -> Step | None:
        before_j = sum(each.energy_j for each in self._sums)
        for each, value in zip(self._sums, readings):
            each.add(value)
        if self._valid_s is None:
            return None
        return Step(sum(each.energy_j for each in self._sums) - before_j, now_s - self._valid_s)

    def _busy(self) -> Busy:
        if self._counters is None:
            return Busy()
        serving, reporting = self._counters.serving, self._counters.reporting
        return Busy(serving.seconds("compute"), serving.seconds("radio"), reporting.seconds("telemetry") + self._cpu_s)

    def snapshot(self) -> Snapshot:
        """Joules so far, and the mean power since the last call."""
        busy_s = self._cpu.busy_s() if self._cpu is not None else None
        cpu_simulated = self._cpu is not None and self._cpu.simulated
        if not self._total:
            return Snapshot(None, None, 0.0, 0.0, "derived", "board", cpu_busy_s=busy_s, cpu_simulated=cpu_simulated)
        counted = self._total[0].unit == "J"
        with self._changed:
            now_s = time.monotonic()
            split, baseline_w, valid_s = self._division.split, self._division.baseline.power_w, self._valid_s
            gap_s = self._integral.gap_s
            stale = valid_s is not None and now_s - valid_s > MAX_GAP_S + 1 / self.wanted_hz
            if stale:
                gap_s += now_s - valid_s
            since_s, samples, cpu_s = self._rate_mark
            elapsed_s = max(now_s - since_s, 1e-9)
            rate_hz = (self._samples - samples) / elapsed_s
            cost_percent = 100 * (self._cpu_s - cpu_s) / elapsed_s
            self._rate_mark = (now_s, self._samples, self._cpu_s)
            last, energy_j = self._mark, split.total_j
            if valid_s is not None:
                if last is None or gap_s != last[2]:
                    self._mean_w = None
                elif valid_s > last[0]:
                    self._mean_w = (energy_j - last[1]) / (valid_s - last[0])
                self._mark = (valid_s, energy_j, gap_s)
            residual_w = None
            if self._judge is not None and valid_s is not None and busy_s is not None and not stale:
                residual_w = self._judge.add(Moment(valid_s, energy_j, gap_s, now_s, busy_s))
        kinds = {sensor.provenance for sensor in self._total}
        simulated, estimated = "simulated" in kinds, "estimated" in kinds
        provenance = "estimated" if estimated else "simulated" if simulated else "measured" if counted else "derived"
        scope = "board" if self._total[0].scope == "board" else "module"
        known = valid_s is not None
        return Snapshot(
            energy_j if known else None,
            self._mean_w,
            rate_hz,
            gap_s,
            provenance,
            scope,
            split if known else None,
            baseline_w,
            cost_percent,
            stale,
            busy_s,
            cpu_simulated,
            residual_w,
            self._judge is not None,
        )


def samples(state: Snapshot, generated_at: float) -> tuple[Sample, ...]:
    """Telemetry of the meter: energy_j, its four parts, power_w (mean since the last telemetry), the real rate, what it
    missed and what it costs, CPU time, and how far the model is off. The parts are derived (or simulated, or estimated), also
    where the total is a counter's."""

    def one(
        name: str, value: float | None, unit: str, provenance: Provenance, scope: str, stale: bool = False
    ) -> Sample:
        validity = "missing" if value is None else "stale" if stale else "ok"
        return Sample(name, value, unit, validity, provenance, scope, generated_at)

    split = state.split
    derived: Provenance = state.provenance if state.provenance in ("simulated", "estimated") else "derived"
    cpu: Provenance = "simulated" if state.cpu_simulated else "measured"
    parts = (
        ("energy_compute_j", split and split.compute_j),
        ("energy_radio_j", split and split.radio_j),
        ("energy_idle_j", split and split.idle_j),
        ("energy_telemetry_j", split and split.telemetry_j),
    )
    return (
        one("energy_j", state.energy_j, "J", state.provenance, state.scope, state.stale),
        *(one(name, value, "J", derived, state.scope, state.stale) for name, value in parts),
        one("power_w", state.power_w, "W", state.provenance, state.scope),
        one("power_baseline_w", state.baseline_w, "W", derived, state.scope),
        one("energy_rate_hz", state.rate_hz, "Hz", "measured", "agent"),
        one("energy_gap_s", state.gap_s, "s", "measured", "agent"),
        one("energy_cost_percent", state.cost_percent, "%", "measured", "agent"),
        one("cpu_busy_s", state.cpu_busy_s, "s", cpu, "board"),
        *([one("power_model_residual_w", state.residual_w, "W", derived, state.scope)] if state.judged else []),
    )
