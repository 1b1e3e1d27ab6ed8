"""A process that simulates boards in real time: `python -m firmware_sim.run --spec FILE` (spec.py says what a spec holds).

Each board's load is the CPU time of the agent process that its pid file names, so power and temperature answer to the work
that is really done (without an agent a board idles), or a recorded trace, which makes it deterministic. Leaves out everything
but the bench, and the slowing of the agent by a throttled clock.

Ends with exit code 0 on SIGTERM or SIGINT, 2 for a bad spec, 1 when a file cannot be written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from firmware_sim import videocore
from firmware_sim.board import BoardState, die_c, step, zone_c
from firmware_sim.faults import Injection
from firmware_sim.monitor import PowerHistory, noisy, register_w, rounds_done
from firmware_sim.spec import BoardSpec, Spec, SpecError, read_spec
from firmware_sim.sysfs import Files, SensorTree, swap

SLOW_S = (
    0.1  # between new temperatures and answers of a Raspberry Pi's firmware, and at least between looks at the load
)


class Load:
    """CPU use of the process that a pid file names. The process may be absent, end, or be another one next time."""

    def __init__(self, pid_file: Path) -> None:
        self._pid_file = pid_file
        self._process: psutil.Process | None = None
        self._cpu_s = 0.0

    def busy_cores(self, dt_s: float) -> float:
        """Cores kept busy on average since the last call, `dt_s` ago; 0 when there is no such process."""
        try:
            pid = int(self._pid_file.read_bytes()[:32])
            if self._process is None or self._process.pid != pid:
                self._process, self._cpu_s = psutil.Process(pid), 0.0
                self._cpu_s = self._used_s()
                return 0.0
            used_s = self._used_s()
        except (OSError, ValueError, psutil.Error):
            self._process = None
            return 0.0
        busy, self._cpu_s = (used_s - self._cpu_s) / dt_s, used_s
        return max(0.0, busy)

    def _used_s(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system


class Cap:
    """The clock limit that a file holds: a number from 0 to 1; 1 while there is no such file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._last, self._told = 1.0, False

    def read(self) -> float:
        """What the file says. Told once where it is no such number: the last good one stays."""
        if self._path is None:
            return 1.0
        try:
            text = self._path.read_bytes()[:32]
            value = float(text)
            if not 0.0 <= value <= 1.0:
                raise ValueError
            self._last = value
        except FileNotFoundError:
            self._last = 1.0
        except (OSError, ValueError):
            if not self._told:
                print(f"warning: {self._path} holds no number from 0 to 1: {self._last} stays", file=sys.stderr)
            self._told = True
        return self._last


class SimulatedBoard:
    """One board's state, its load and its files. Time is what `advance` is told, so it may run in real time or not."""

    def __init__(self, spec: BoardSpec) -> None:
        """Writes the files of a board that has idled for long.  Raises: OSError."""
        self.spec, self._profile = spec, spec.profile
        self._load = Load(spec.pid_file) if spec.pid_file else None
        self._cap = Cap(spec.cap_file)
        self.state: BoardState = spec.profile.equilibrium(spec.profile.idle_w)
        self._history = PowerHistory(self.state.power_w)
        self._rounds = [0] * len(spec.profile.monitors)
        self._slow_s, self._load_s, self._last_load = 0.0, 0.0, 0.0
        self._random = random.Random(spec.node)
        self._injection = Injection(spec.faults, spec.node)
        self._tree = SensorTree(spec.sysroot, spec.profile)
        self._files = self._tree.truth(self.state)
        self._write(self._files)

    def advance(self, dt_s: float) -> None:
        """One step of `dt_s` that has just passed, with the load it had.  Raises: OSError."""
        start_s, cap = self.state.time_s, self._cap.read()
        if self.spec.trace is not None:
            pieces = self.spec.trace.pieces(start_s, start_s + dt_s)
        else:
            pieces = [(dt_s, self._utilisation(dt_s))]
        for piece_s, load in pieces:
            before_j = self.state.energy_j
            self.state = step(self._profile, self.state, load, piece_s, cap)
            self._history.add(piece_s, (self.state.energy_j - before_j) / piece_s)
        new = self._measure()
        self._files |= new
        self._write(new)

    def _utilisation(self, dt_s: float) -> float:
        # A process's CPU time grows in ticks of 10 ms: over less than SLOW_S it would be all or nothing.
        self._load_s += dt_s
        if self._load_s >= SLOW_S - 1e-3:
            self._last_load = self._load.busy_cores(self._load_s) / self._profile.cores
            self._load_s = 0.0
        return self._last_load

    def _measure(self) -> Files:
        """New readings of the sensors that have any by now."""
        new: Files = {}
        profile, state, oldest_s = self._profile, self.state, self._history.until_s
        for index, monitor in enumerate(profile.monitors):
            rounds = rounds_done(monitor, self._history.until_s)
            if rounds > self._rounds[index]:
                self._rounds[index] = rounds
                rails_w = noisy(monitor, register_w(monitor, profile, self._history), self._gauss)
                new |= self._tree.power(index, rails_w)
            oldest_s = min(oldest_s, (rounds - 1) * monitor.period_s)
        self._history.forget(oldest_s)
        if state.time_s < self._slow_s:
            return new
        self._slow_s = state.time_s + SLOW_S - 1e-3
        zones_c = []
        for zone in profile.zones:
            still = zone.says_c is not None or state.utilisation < zone.powered_from
            zones_c.append(zone_c(profile, zone, state) + (0.0 if still else profile.zone_noise_k * self._gauss()))
        pmic = videocore.pmic_text(state.power_w, profile.idle_w, self._gauss) if profile.pmic else ""
        new |= self._tree.temperatures(zones_c) | self._tree.firmware(state.flags, pmic)
        return new | self._tree.cpu_time(state)

    def _gauss(self) -> float:
        return self._random.gauss(0.0, 1.0)

    def _write(self, new: Files) -> None:
        if not self.spec.faults:
            self._tree.write(new)
        else:
            # A fault may begin or end without a new reading.
            changed = self._injection.apply(self.state.time_s, self._files)
            self._tree.write(changed)
            self._tree.answer_late(changed, self._files)
        if self.spec.state_file is not None:
            write_truth(self.spec.state_file, self.spec, self.state)


def write_truth(path: Path, spec: BoardSpec, state: BoardState) -> None:
    """The board's state without noise, steps and faults, as JSON; `monotonic_s` is this machine's clock.  Raises: OSError."""
    tree = {
        "node": spec.node,
        "profile": spec.profile.name,
        "time_s": state.time_s,
        "monotonic_s": time.monotonic(),
        "power_w": state.power_w,
        "die_c": die_c(spec.profile, state),
        "ambient_c": spec.profile.ambient_c,
        "energy_j": state.energy_j,
        "utilisation": state.utilisation,
        "clock": state.clock,
        "throttled": state.throttled,
        "flags": state.flags,
    }
    partial = f"{path.parent}/.{path.name}.partial"
    with open(partial, "w", encoding="ascii") as file:
        file.write(json.dumps(tree) + "\n")
    swap(partial, path)


def simulate(spec: Spec, stop: threading.Event) -> None:
    """Runs until `stop`. A late step is longer, not followed by a burst: the equations hold for any step.  Raises: OSError."""
    boards = [SimulatedBoard(board) for board in spec.boards]
    period_s = 1.0 / spec.rate_hz
    last = time.monotonic()
    while not stop.wait(max(0.0, last + period_s - time.monotonic())):
        now = time.monotonic()
        for board in boards:
            board.advance(now - last)
        last = now


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m firmware_sim.run", description="Simulates boards in real time.")
    parser.add_argument("--spec", type=Path, required=True, metavar="FILE", help="JSON: which boards, which folders")
    options = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        spec = read_spec(options.spec)
        if os.geteuid() == 0 and any(fault.kind == "denied" for board in spec.boards for fault in board.faults):
            print("warning: root reads denied files all the same, unless without CAP_DAC_OVERRIDE", file=sys.stderr)
        simulate(spec, stop)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; free space or choose another folder", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
