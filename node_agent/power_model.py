"""Joules of a board without a power sensor, estimated from its CPU time: P = idle_w + w_per_busy_core * (cores that are busy).

The two numbers are the configuration's ([power_model]), fitted on a like board with a meter by `spacemoe calibrate NODE
--power-model`. CPU time is the kernel's own count, so the joules are a counter's: nothing is lost between two readings. They
are labelled 'estimated', below a simulation's folder too. A board with a meter keeps its meter; the model is only judged by it.
Leaves out, and so errs by: clock frequency (a core that is throttled takes less and is as busy), GPUs, radios and USB devices,
leakage that grows with heat; work that always sleeps when the kernel's tick looks (kernels that count CPU time by ticks).
Source: Documentation/filesystems/proc.rst, "/proc/stat" of the Linux kernel.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from node_agent.config import PowerModelConfig
from node_agent.reading import LeftOut, Sensor, why
from node_agent.sensors import Found
from node_agent.sensors_tree import Tree

NAME = "counter_j.power_model"
LINE_BYTES = 512  # the first line has at most ten numbers of twenty digits; all the file may have 100 KB
# user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice; guests are in user and nice already, and what a
# hypervisor stole was spent by others. Kernels before 2.6.33 have fewer.
CPU_LINE = re.compile(r"cpu {1,4}([0-9]{1,20}(?: [0-9]{1,20}){6,15})")
BUSY_FIELDS = (0, 1, 2, 5, 6)
JUDGED_OVER_S = 1.0  # CPU time comes in ticks of 10 ms: 1 % of a core
STILL_S = 5.0  # idle time moves a hundred times a second: a file that stands still so long is nobody's


def busy_ticks(line: str) -> int:
    """Time in which cores did something, summed over all cores, in the kernel's USER_HZ.  Raises: ValueError."""
    match = CPU_LINE.fullmatch(line)
    if not match:
        raise ValueError(f"says {ascii(line)[:40]}, which is no line of CPU time")
    fields = [int(text) for text in match[1].split(" ")]
    return sum(fields[index] for index in BUSY_FIELDS)


class CpuTime:
    """Reads proc/stat below a sysroot. `simulated`: that is not this machine's own."""

    def __init__(self, sysroot: Path) -> None:
        tree = Tree(sysroot)
        self.path = tree.root / "proc/stat"
        self.simulated = tree.simulated
        self._outside = tree.outside(self.path.parent)
        self._ticks_hz = os.sysconf("SC_CLK_TCK")

    def line(self) -> str:
        """The first line, of all cores together.  Raises: OSError."""
        if self._outside:
            raise OSError("a link that leads out of the sysroot")
        # a FIFO in its place must not be waited for
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(descriptor, LINE_BYTES).partition(b"\n")[0].decode("ascii", "replace")
        finally:
            os.close(descriptor)

    def seconds(self, line: str) -> float:
        """Busy seconds of such a line, summed over all cores.  Raises: ValueError."""
        return busy_ticks(line) / self._ticks_hz

    def busy_s(self) -> float | None:
        """The same now; None where it cannot be read."""
        try:
            return self.seconds(self.line())
        except (OSError, ValueError):
            return None


class Estimate:
    """The model's joules as a counter, since the machine's start. Any thread."""

    def __init__(self, model: PowerModelConfig, cpu: CpuTime, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds that pass for the board."""
        self._model, self._cpu, self._clock = model, cpu, clock
        self._lock = threading.Lock()
        self._last: tuple[float, float] | None = None  # seconds and busy seconds of the last reading
        self._energy_j = 0.0
        self._line, self._moved_s = "", 0.0

    def ask(self) -> tuple[float, float]:
        """(joules, UTC time in s).  Raises: OSError, ValueError where CPU time cannot be read or is none."""
        with self._lock:
            line, now_s = self._cpu.line(), self._clock()
            busy_s = self._cpu.seconds(line)
            if line != self._line:
                self._line, self._moved_s = line, now_s
            elif now_s - self._moved_s > STILL_S:
                raise ValueError(f"CPU time has stood still for {now_s - self._moved_s:.0f} s")
            before_s, before_busy_s = self._last or (0.0, 0.0)
            self._last = now_s, busy_s
            if busy_s < before_busy_s:
                raise ValueError("CPU time went back: what was used meanwhile is not known")
            model = self._model
            self._energy_j += model.idle_w * (now_s - before_s) + model.w_per_busy_core * (busy_s - before_busy_s)
            return self._energy_j, time.time()


@dataclass(frozen=True)
class Moment:
    """A meter's joules at `valid_s`, its gaps so far, and CPU time at `now_s`, a little later."""

    valid_s: float
    energy_j: float
    gap_s: float
    now_s: float
    busy_s: float


class Judge:
    """Compares the model with a board's meter."""

    def __init__(self, model: PowerModelConfig) -> None:
        self._model = model
        self._since: Moment | None = None
        self._residual_w: float | None = None

    def residual_w(self, since: Moment, now: Moment) -> float | None:
        """Mean watts of the meter less the model's; None over a gap."""
        if now.gap_s != since.gap_s or now.valid_s <= since.valid_s or now.busy_s < since.busy_s:
            return None
        busy_cores = (now.busy_s - since.busy_s) / (now.now_s - since.now_s)
        measured_w = (now.energy_j - since.energy_j) / (now.valid_s - since.valid_s)
        return measured_w - self._model.idle_w - self._model.w_per_busy_core * busy_cores

    def add(self, now: Moment) -> float | None:
        """The same over the last JUDGED_OVER_S or more, until now; sooner, what was found last stays."""
        if self._since is None:
            self._since = now
        elif now.now_s - self._since.now_s >= JUDGED_OVER_S:
            self._residual_w, self._since = self.residual_w(self._since, now), now
        return self._residual_w


def words(model: PowerModelConfig) -> str:
    """The model for people."""
    known = "" if model.residual_w is None else f", {model.residual_w:g} W rms off where it was fitted"
    source = f"; from {model.fitted_on}" if model.fitted_on else "; from where is not said"
    return f"{model.idle_w:g} W and {model.w_per_busy_core:g} W for each busy core{known}{source}"


def with_model(found: Found, cpu: CpuTime, model: PowerModelConfig | None) -> Found:
    """`found` with the model's counter as the total, where the board has no other and the model is configured."""
    if model is None:
        return found
    if found.total:
        reason = f"[power_model] makes no joules here: {', '.join(s.name for s in found.total)} goes before an estimate"
        return replace(found, left_out=(*found.left_out, LeftOut(cpu.path, reason)))
    try:
        cpu.seconds(cpu.line())
    except (OSError, ValueError) as error:
        reason = f"[power_model] has no CPU time to go by: {why(error)}"
        return replace(found, left_out=(*found.left_out, LeftOut(cpu.path, reason)))
    sensor = Sensor(
        NAME,
        "J",
        "board",
        "estimated",
        (cpu.path,),
        1.0,
        (0.0, math.inf),
        in_total=True,
        ask=Estimate(model, cpu).ask,
    )
    return replace(found, sensors=(*found.sensors, sensor), estimate=words(model))
