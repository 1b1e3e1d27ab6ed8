"""A power step as a board's telemetry shows it: readings, and the Foster network fitted to them as they come.

Power and temperature are the board's own; the fit is firmware_sim.foster's, in constant memory. Pure: no clock, no socket.
Leaves out: who makes the step and waits (calibrate.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firmware_sim.foster import FitError, FosterFit, OnlineFit
from node_agent import wire

MIN_STEP_W = 0.5
FULL_DUTY = 0.9
WARM_UP_S = 1.5  # the guard looks twice a second: what it said before the step may still be in telemetry
GUARD_CAUSES = {  # bits of guard_state (node_agent.guard)
    1: "heat",
    2: "unknown temperature",
    4: "firmware flags",
    8: "the ground station's duty cap",
    16: "a silent ground station",
    32: "memory",
}
HEAT = 1
MAX_RESIDUAL_K = 1.0  # noise and steps of common sensors leave 0.1 to 0.4 K


class CalibrateError(RuntimeError):
    """A board cannot be calibrated; the text says what is in the way and the next step."""


@dataclass(frozen=True)
class Options:
    """Which board and how long. Idle ends when a line through the last `window_s` of temperatures rises or falls by less than
    `drift_k_per_min`, or after `settle_s`."""

    node: str
    fleet: str = "demo"
    settle_s: float = 1800.0
    window_s: float = 120.0
    drift_k_per_min: float = 0.2
    step_s: float = 1200.0
    cool_s: float = 0.0
    branches: int = 2

    def __post_init__(self) -> None:
        for name, low, high in (
            ("settle_s", self.window_s, 86_400.0),
            ("window_s", 5.0, 3600.0),
            ("drift_k_per_min", 0.001, 100.0),
            ("step_s", 10.0, 86_400.0),
            ("cool_s", 0.0, 86_400.0),
            ("branches", 1, 4),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class Reading:
    """One telemetry message. `time_s`: of the temperature, on the agent's monotonic clock; `power_w`: mean since the message
    before; `guard`: bits of guard_state; `flags`: those that the firmware sets now; `cpu_busy_s`: of all cores, so far; `gap_s`:
    without power, so far. None: not there, or not valid."""

    run: int
    number: int
    time_s: float
    temp_c: float | None
    power_w: float | None
    energy_j: float | None
    duty: float
    cap: float
    guard: int
    limit_c: float | None
    flags: frozenset[str]
    provenance: tuple[str, str]  # of temperature and power
    cpu_busy_s: float | None = None
    gap_s: float = 0.0


def reading(telemetry: wire.Telemetry) -> Reading | None:
    """What is needed of a message; None where it does not say when it was made (`uptime_s`)."""
    samples = {sample.name: sample for sample in telemetry.samples if sample.validity == "ok"}

    def value(name: str, default: float | None = None) -> float | None:
        return samples[name].value if name in samples else default

    uptime_s = value("uptime_s")
    if uptime_s is None:
        return None
    temp = samples.get("temp_c")
    # The board's UTC may be set while it is measured; the time since its agent's start is not.
    age_s = telemetry.generated_at - temp.generated_at if temp is not None else 0.0
    provenance = tuple(samples[name].provenance if name in samples else "" for name in ("temp_c", "power_w"))
    return Reading(
        telemetry.run,
        telemetry.number,
        uptime_s - min(max(age_s, 0.0), 1.0),
        value("temp_c"),
        value("power_w"),
        value("energy_j"),
        value("duty", 0.0),
        value("duty_cap", 1.0),
        int(value("guard_state", 0.0)),
        value("guard_limit_c"),
        frozenset(
            name.removeprefix("flag.")
            for name in samples
            if name.startswith("flag.") and not name.endswith("_since_boot") and samples[name].value
        ),
        provenance,
        value("cpu_busy_s"),
        value("energy_gap_s", 0.0),
    )


def power_between(before: Reading, after: Reading) -> float | None:
    """Mean watts from one reading to the next, also where messages between them are lost; None where it is not known."""
    if after.number == before.number + 1 and after.power_w is not None:
        return after.power_w
    return mean_w(before, after)


def mean_w(before: Reading, after: Reading) -> float | None:
    """The same from the joules alone."""
    if before.energy_j is None or after.energy_j is None or after.time_s <= before.time_s:
        return None
    return (after.energy_j - before.energy_j) / (after.time_s - before.time_s)


def drift_k_per_min(readings: Sequence[Reading]) -> float:
    """Slope of a straight line through the temperatures."""
    times, temps = zip(*((each.time_s, each.temp_c) for each in readings))
    return float(np.polyfit(np.array(times) - times[0], temps, 1)[0] * 60.0)


class Measurement:
    """The fit and what is measured beside it, from the last readings of the idle phase on. Pure: no clock, no socket."""

    def __init__(self, idle: list[Reading], options: Options) -> None:
        """`idle`: readings with temperature, the board having long been at their mean power.  Raises: CalibrateError."""
        idle_w = mean_w(idle[0], idle[-1])
        if idle_w is None:
            raise CalibrateError(f"{options.node} publishes no joules: see `node-agent sensors` on the board")
        self.idle_w = idle_w
        self.hottest_c = -math.inf
        self.limit_c: float | None = None
        self.skipped = 0
        self.cautions: list[str] = []
        self._node = options.node
        self._full: list[tuple[float, float]] = []  # seconds and joules at full duty
        self._step: list[tuple[float, float]] = []  # seconds and joules of the whole step
        self._last = idle[0]
        self._measured_s = options.step_s + options.cool_s
        self._glimpsed_s, self._glimpse = -math.inf, ""
        period_s = (idle[-1].time_s - idle[0].time_s) / (len(idle) - 1)
        slowest_s = 3.0 * self._measured_s  # what is slower cannot be told from a drift
        self._fit = OnlineFit((max(0.05, period_s / 2.0), slowest_s), options.branches)
        for index, after in enumerate(idle[1:]):
            # the state of the network at the start is the mean's, and not that of one noisy message
            self._update(after, self.idle_w if index == 0 else None)

    def add(self, after: Reading, burning_s: float | None = None) -> None:
        """The next reading; `burning_s`: since the step's begin, None outside it."""
        power_w, dt_s = power_between(self._last, after), after.time_s - self._last.time_s
        if burning_s is not None and power_w is not None:
            self._step.append((dt_s, dt_s * power_w))
            if burning_s > WARM_UP_S:
                self._look(after)
                if after.duty >= FULL_DUTY and self._last.duty >= FULL_DUTY:
                    self._full.append((dt_s, dt_s * power_w))
        self.hottest_c = max(self.hottest_c, -math.inf if after.temp_c is None else after.temp_c)
        self._update(after)

    def _update(self, after: Reading, power_w: float | None = None) -> None:
        """`after` says what power flowed since the reading before: only now that one can be fitted."""
        power_w = power_between(self._last, after) if power_w is None else power_w
        if after.temp_c is None or power_w is None or after.time_s <= self._last.time_s:
            self.skipped += 1  # the reading before stays: joules bridge the gap
            return
        self._fit.update(self._last.time_s, power_w, self._last.temp_c)
        self._last = after

    def _look(self, after: Reading) -> None:
        self.limit_c = after.limit_c
        if after.guard & HEAT:
            self.warn("the board's guard limited the duty for heat: the fit goes by the power that flowed all the same")
        for bit, name in GUARD_CAUSES.items():
            if after.guard & bit and bit != HEAT:
                self.warn(f"the board's guard limited the duty ({name})")
        for flag in sorted(after.flags):
            self.warn(f"the firmware set the flag {flag}: better supply or cooling gives a larger step")

    def warn(self, text: str) -> None:
        """Adds a caution, once."""
        if text not in self.cautions:
            self.cautions.append(text)

    @property
    def busy_w(self) -> float | None:
        """Mean power while the board computed all the time; None where it never did."""
        return _over(self._full)

    def check_step(self) -> None:
        """Raises: CalibrateError where the power does not rise enough to say anything."""
        step_w = _over(self._step)
        if step_w is not None and step_w - self.idle_w < MIN_STEP_W:
            raise CalibrateError(
                f"the power of {self._node} rose by {step_w - self.idle_w:.2f} W only, {MIN_STEP_W} W are needed: "
                "check that the sensor is in the board's supply, and lift duty caps"
            )

    def estimate(self) -> FosterFit:
        """Fewer branches where as many as asked for cannot be told apart, with a caution.  Raises: FitError."""
        try:
            return self._fit.estimate()
        except FitError as error:
            if self._fit.branches == 1:
                raise
            asked, self._fit.branches = self._fit.branches, self._fit.branches - 1
            try:
                found = self.estimate()
            finally:
                self._fit.branches = asked
            self.warn(f"{len(found.branches)} of {asked} branches: {error}")
            return found

    def judge(self, found: FosterFit) -> None:
        """Cautions about the estimate itself."""
        slow = found.branches[-1]
        if slow.tau_s > self._measured_s / 2.0:
            self.warn(
                f"{slow.r_k_per_w:.2f} K/W have a time constant of {slow.tau_s:.0f} s, and {self._measured_s:.0f} s were measured: "
                "give a longer --step-s"
            )
        if found.residual_k > MAX_RESIDUAL_K:
            self.warn(
                f"the network leaves {found.residual_k:.1f} K rms: ambient or fan changed meanwhile, or more --branches are needed"
            )

    def glimpse_at(self, every_s: float) -> str:
        """The estimate so far in a few words, made anew after `every_s` of readings; empty while there is none."""
        if self._last.time_s - self._glimpsed_s >= every_s:
            self._glimpsed_s = self._last.time_s
            try:
                found = self._fit.estimate().branches
            except FitError:
                found = ()
            self._glimpse = ", ".join(f"{each.r_k_per_w:.2f} K/W {each.tau_s:.3g} s" for each in found)
        return self._glimpse


def _over(parts: list[tuple[float, float]]) -> float | None:
    """Watts from (seconds, joules)."""
    seconds = sum(each[0] for each in parts)
    return sum(each[1] for each in parts) / seconds if seconds > 0 else None
