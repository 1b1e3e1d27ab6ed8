"""What `python -m firmware_sim.run` simulates, read from a JSON file and checked; leaves out all simulation.

    {"boards": [{"node": "sat-1", "profile": "jetson-orin-nano", "sysroot": "DIR", "pid_file": "FILE"}], "rate_hz": 10}

Instead of "pid_file" a board may have "load_trace": [[0, 0.2], [1.5, 1.0]], the load (0-1) from each time in s on, and with it
"load_trace_repeat_s", after which the trace begins anew. Optional for each board: "ambient_c", "idle_w", "max_w"; "cores", how
many of this machine's cores, kept busy by the agent, are the board's full load; "foster", the branches [[K/W, seconds], ...]
that replace the profile's; "faults" (faults.py); "state_file", where the noiseless truth is written; "cap_file", from which a
clock limit (0-1) is read.
"""

from __future__ import annotations

import json
import math
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from firmware_sim.board import Branch, Profile
from firmware_sim.faults import Fault, FaultError, parse
from firmware_sim.profiles import PROFILES
from node_agent.wire import WireError, check_id

RATE_HZ, MIN_RATE_HZ, MAX_RATE_HZ = 10.0, 0.1, 250.0
MAX_BOARDS = 256
MAX_SPEC_BYTES = 4 * 1024 * 1024
MAX_TRACE = 100_000
MIN_PIECE_S = 1e-4  # of constant load: a step of the simulation goes through all of them
MAX_BRANCHES = 8
KEYS = {
    "node",
    "profile",
    "sysroot",
    "pid_file",
    "load_trace",
    "load_trace_repeat_s",
    "ambient_c",
    "idle_w",
    "max_w",
    "cores",
    "foster",
    "faults",
    "state_file",
    "cap_file",
}


class SpecError(ValueError):
    """The spec of a simulation is not usable; the text says what to write."""


@dataclass(frozen=True)
class Trace:
    """A load over time: `loads[i]` from `starts_s[i]` on, over again every `repeat_s`."""

    starts_s: tuple[float, ...]
    loads: tuple[float, ...]
    repeat_s: float = math.inf

    def pieces(self, start_s: float, end_s: float) -> Iterator[tuple[float, float]]:
        """(seconds, load) of the pieces of constant load between two times."""
        at_s = start_s
        while at_s < end_s:
            turn_s = 0.0 if math.isinf(self.repeat_s) else math.floor(at_s / self.repeat_s) * self.repeat_s
            # A time that rounding put just before a change counts as after it, or a piece would have no length.
            index = bisect_right(self.starts_s, at_s - turn_s + 1e-9) - 1
            after = self.starts_s[index + 1] if index + 1 < len(self.starts_s) else self.repeat_s
            next_s = min(end_s, turn_s + after)
            if next_s > at_s:
                yield next_s - at_s, self.loads[index]
            at_s = max(next_s, math.nextafter(at_s, math.inf))


@dataclass(frozen=True)
class BoardSpec:
    """One board of the simulation."""

    node: str
    profile: Profile
    sysroot: Path
    pid_file: Path | None
    trace: Trace | None = None
    faults: tuple[Fault, ...] = ()
    state_file: Path | None = None
    cap_file: Path | None = None


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
    rate_hz = _number(tree, "rate_hz", RATE_HZ, MIN_RATE_HZ, MAX_RATE_HZ, str(path))
    boards = tuple(_board(entry, f"{path}: board {index}") for index, entry in enumerate(tree["boards"]))
    if len({board.node for board in boards}) != len(boards):
        raise SpecError(f"{path} names a node twice; give each board its own")
    return Spec(boards, rate_hz)


def _number(tree: dict, key: str, default: float, low: float, high: float, where: str) -> float:
    value = tree.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise SpecError(f"{where}: {key} is {str(value)[:40]!r}; give {low:g} to {high:g}")
    return float(value)


def _board(entry: object, where: str) -> BoardSpec:
    wanted = (
        "node",
        "profile",
        "sysroot",
        *(() if isinstance(entry, dict) and "load_trace" in entry else ("pid_file",)),
    )
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) and entry[key] for key in wanted):
        raise SpecError(f"{where} needs the texts {', '.join(wanted)}")
    if unknown := set(entry) - KEYS:
        raise SpecError(
            f"{where} has {sorted(map(str, unknown))[0][:40]!r}, which is unknown; use {', '.join(sorted(KEYS))}"
        )
    try:
        check_id(entry["node"])
    except WireError as error:
        raise SpecError(f"{where}: {error}") from None
    if entry["profile"] not in PROFILES:
        raise SpecError(f"{where}: no profile {entry['profile'][:60]!r}; there are {', '.join(sorted(PROFILES))}")
    sysroot = Path(entry["sysroot"])
    if sysroot.resolve() == Path("/"):
        raise SpecError(f"{where}: sysroot is this machine's own root; give a run folder")
    profile = PROFILES[entry["profile"]]
    idle_w = _number(entry, "idle_w", profile.idle_w, 0.0, 1000.0, where)
    profile = replace(
        profile,
        ambient_c=_number(entry, "ambient_c", profile.ambient_c, -100.0, 150.0, where),
        idle_w=idle_w,
        max_w=_number(entry, "max_w", max(idle_w, profile.max_w), idle_w, 1000.0, where),
        cores=_number(entry, "cores", profile.cores, 0.01, 1024.0, where),
        foster=_foster(entry["foster"], where) if "foster" in entry else profile.foster,
    )
    try:
        faults = parse(entry.get("faults", []), profile)
    except FaultError as error:
        raise SpecError(f"{where}: {error}") from None
    trace = _trace(entry, where) if "load_trace" in entry else None
    if trace is not None and "pid_file" in entry:
        raise SpecError(f"{where} has both load_trace and pid_file; give one")
    files = [_path(entry, key, where) for key in ("pid_file", "state_file", "cap_file")]
    return BoardSpec(entry["node"], profile, sysroot, files[0], trace, faults, files[1], files[2])


def _foster(branches: object, where: str) -> tuple[Branch, ...]:
    if not isinstance(branches, list) or not 1 <= len(branches) <= MAX_BRANCHES:
        raise SpecError(f"{where}: foster is no list of 1 to {MAX_BRANCHES} [K/W, seconds]")
    for branch in branches:
        plain = isinstance(branch, list) and len(branch) == 2
        if not plain or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in branch):
            raise SpecError(f"{where}: foster has {str(branch)[:40]!r}; give [K/W, seconds]")
        if not (1e-3 <= branch[0] <= 1e3 and 0.01 <= branch[1] <= 1e6):
            raise SpecError(f"{where}: foster has {str(branch)[:40]!r}; give 0.001 to 1000 K/W and 0.01 to 1e6 s")
    return tuple(Branch(float(r_k_per_w), float(tau_s)) for r_k_per_w, tau_s in branches)


def _path(entry: dict, key: str, where: str) -> Path | None:
    value = entry.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise SpecError(f"{where}: {key} is {str(value)[:40]!r}; give a file's path")
    path = Path(value)
    try:
        usable = stat.S_ISREG(os.stat(path).st_mode)  # a folder would be replaced, a FIFO would be waited for
    except FileNotFoundError:
        usable = True
    except (OSError, ValueError):
        usable = False
    if not usable:
        raise SpecError(f"{where}: {key} {value[:200]!r} is no plain file; give another path")
    return path


def _trace(entry: dict, where: str) -> Trace:
    points = entry["load_trace"]
    if not isinstance(points, list) or not 1 <= len(points) <= MAX_TRACE:
        raise SpecError(f"{where}: load_trace is no list of 1 to {MAX_TRACE} [seconds, load]")
    for point in points:
        plain = isinstance(point, list) and len(point) == 2
        if not plain or not all(
            isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) < 1e9 for n in point
        ):
            raise SpecError(f"{where}: load_trace has {str(point)[:40]!r}; give [seconds, load]")
    starts_s, loads = [float(t) for t, _ in points], [float(load) for _, load in points]
    if starts_s[0] != 0 or not all(a < b for a, b in zip(starts_s, starts_s[1:])):
        raise SpecError(f"{where}: load_trace needs times that begin with 0 and rise")
    if not all(0 <= load <= 1 for load in loads):
        raise SpecError(f"{where}: load_trace needs loads from 0 to 1")
    if any(b - a < MIN_PIECE_S for a, b in zip(starts_s, starts_s[1:])):
        raise SpecError(f"{where}: load_trace changes within {MIN_PIECE_S:g} s; give points that are farther apart")
    repeat_s = math.inf
    if "load_trace_repeat_s" in entry:
        repeat_s = _number(entry, "load_trace_repeat_s", math.inf, 1e-4, 1e9, where)
        if repeat_s < starts_s[-1] + MIN_PIECE_S:
            raise SpecError(
                f"{where}: load_trace_repeat_s is {repeat_s:g}; give more than the last time, {starts_s[-1]:g}"
            )
    return Trace(tuple(starts_s), tuple(loads), repeat_s)
