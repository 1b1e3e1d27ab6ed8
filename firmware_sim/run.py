"""A process that simulates boards in real time: `python -m firmware_sim.run --spec FILE`. Leaves out everything but the bench.

Each board's load is the CPU time of the agent process that its pid file names, so power and temperature answer to the work
that is really done; without an agent a board idles. The spec is JSON:

    {"boards": [{"node": "sat-1", "profile": "jetson-orin-nano", "sysroot": "DIR", "pid_file": "FILE"}], "rate_hz": 10}

Ends with exit code 0 on SIGTERM or SIGINT, 2 for a bad spec, 1 when a file cannot be written.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from firmware_sim.board import PROFILES, BoardState, Profile, step
from firmware_sim.sysfs import SensorTree
from node_agent.wire import WireError, check_id

RATE_HZ = 10.0
MAX_BOARDS = 256
MAX_SPEC_BYTES = 1024 * 1024


class SpecError(ValueError):
    """The spec of a simulation is not usable; the text says what to write."""


@dataclass(frozen=True)
class BoardSpec:
    """One board of the simulation."""

    node: str
    profile: Profile
    sysroot: Path
    pid_file: Path


@dataclass(frozen=True)
class Spec:
    """The whole simulation."""

    boards: tuple[BoardSpec, ...]
    rate_hz: float = RATE_HZ


def read_spec(path: Path) -> Spec:
    """Reads and checks a spec.  Raises: SpecError."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SPEC_BYTES + 1)
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}; give --spec a JSON file") from error
    if len(content) > MAX_SPEC_BYTES:
        raise SpecError(f"{path} is over the limit of {MAX_SPEC_BYTES} bytes")
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not JSON: {str(error)[:100]}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("boards"), list):
        raise SpecError(f'{path} needs {{"boards": [...]}}')
    if not 1 <= len(tree["boards"]) <= MAX_BOARDS:
        raise SpecError(f"{path} has {len(tree['boards'])} boards; give 1 to {MAX_BOARDS}")
    rate_hz = tree.get("rate_hz", RATE_HZ)
    if isinstance(rate_hz, bool) or not isinstance(rate_hz, (int, float)) or not 0.1 <= rate_hz <= 100:
        raise SpecError(f"{path}: rate_hz is {str(rate_hz)[:40]!r}; give 0.1 to 100")
    boards = tuple(_board(entry, f"{path}: board {index}") for index, entry in enumerate(tree["boards"]))
    if len({board.node for board in boards}) != len(boards):
        raise SpecError(f"{path} names a node twice; give each board its own")
    return Spec(boards, float(rate_hz))


def _board(entry: object, where: str) -> BoardSpec:
    wanted = ("node", "profile", "sysroot", "pid_file")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) and entry[key] for key in wanted):
        raise SpecError(f"{where} needs the texts {', '.join(wanted)}")
    try:
        check_id(entry["node"])
    except WireError as error:
        raise SpecError(f"{where}: {error}") from None
    if entry["profile"] not in PROFILES:
        raise SpecError(f"{where}: no profile {entry['profile'][:60]!r}; there are {', '.join(sorted(PROFILES))}")
    sysroot = Path(entry["sysroot"])
    if sysroot.resolve() == Path("/"):
        raise SpecError(f"{where}: sysroot is this machine's own root; give a run folder")
    return BoardSpec(entry["node"], PROFILES[entry["profile"]], sysroot, Path(entry["pid_file"]))


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


class SimulatedBoard:
    """One board's state, its load and its files."""

    def __init__(self, spec: BoardSpec) -> None:
        self._profile = spec.profile
        self._load = Load(spec.pid_file)
        self._files = SensorTree(spec.sysroot, spec.profile)
        # A board that has been on for long before anything starts.
        self.state: BoardState = spec.profile.equilibrium(spec.profile.idle_w)
        self._files.write(self.state)

    def advance(self, dt_s: float) -> None:
        """One step of `dt_s` that has just passed, with the load it had.  Raises: OSError."""
        utilisation = self._load.busy_cores(dt_s) / self._profile.cores
        self.state = step(self._profile, self.state, utilisation, dt_s)
        self._files.write(self.state)


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
        simulate(read_spec(options.spec), stop)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; free space or choose another folder", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
