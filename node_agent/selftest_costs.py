"""Measures what a run of a bundle's experts costs here: ms of one row and of a batch, and joules over idle where there is a meter.

As served: one thread, warm, the single row through buffers that stay bound. Joules by the meter's own integration (energy.py): the board
rests, then runs experts of one precision in turn for some seconds, and again, ROUNDS times; the ends of both phases are left out, since
meters lag. What is above the rest's watts, over the runs meanwhile, is a run's joules: the call and its processor time are in it, the
link is not. Leaves out: other threads, heat (a few seconds), a board that is busy otherwise: its idle watts would be wrong.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import numpy as np

from node_agent.config import PowerModelConfig
from node_agent.costs import BATCH_ROWS, BoardCosts, Cost, Energy, Spread
from node_agent.energy import EnergyMeter
from node_agent.experts import open_session
from node_agent.power_model import CpuTime, with_model
from node_agent.sensors import find, is_simulated
from node_agent.shard import Manifest, ShardEntry

TIMED_RUNS, WARM_RUNS = 30, 5
TIMED_SHARDS = 64  # of a precision, evenly over all; the others are run once
BURST_SHARDS = 16  # of a precision, in turn: as in service, a run finds the last ones' weights in the caches
ROUNDS = 3
SETTLE_S = 0.5  # after a change of load, before the meter counts: samplers and power monitors average
SAMPLE_HZ = 50.0  # where a sensor does not say how often it has new data


class Runner:
    """One expert, ready as it is served."""

    def __init__(self, graph: Path, hidden: int) -> None:
        """Raises: errors.ExpertError."""
        self.session = open_session(graph)
        rng = np.random.default_rng(0)
        self.row = rng.standard_normal((1, hidden)).astype(np.float32)
        self.batch = rng.standard_normal((BATCH_ROWS, hidden)).astype(np.float32)
        self.out = np.zeros((1, hidden), np.float32)
        self.binding = self.session.io_binding()
        self.binding.bind_input("x", "cpu", 0, np.float32, self.row.shape, self.row.ctypes.data)
        self.binding.bind_output("y", "cpu", 0, np.float32, self.out.shape, self.out.ctypes.data)

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def run_batch(self) -> np.ndarray:
        return self.session.run(["y"], {"x": self.batch})[0]

    @property
    def sound(self) -> bool:
        """Runs both ways once: results are finite and of the right shape."""
        self.run()
        y = self.run_batch()
        return y.shape == self.batch.shape and bool(np.isfinite(y).all() and np.isfinite(self.out).all())


def spread(ms: list[float]) -> Spread:
    ms = sorted(ms)
    return Spread(len(ms), statistics.median(ms), ms[len(ms) // 10], ms[len(ms) * 9 // 10])


def timed(call: Callable[[], object], runs: int = TIMED_RUNS) -> list[float]:
    """Milliseconds of `runs` calls after WARM_RUNS."""
    result = []
    for index in range(WARM_RUNS + runs):
        start = time.perf_counter_ns()
        call()
        if index >= WARM_RUNS:
            result.append((time.perf_counter_ns() - start) / 1e6)
    return result


def evenly(items: list, count: int) -> list:
    """At most `count` of the items, evenly over them."""
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]


def times(root: Path, manifest: Manifest, shards: list[ShardEntry]) -> tuple[Spread, Spread] | str:
    """Of one precision: one row, a batch; or which shard is not sound.  Raises: errors.ExpertError."""
    row: list[float] = []
    batch: list[float] = []
    chosen = {id(entry) for entry in evenly(shards, TIMED_SHARDS)}
    for entry in shards:
        runner = Runner(root / entry.files[0].path, manifest.dims.hidden)
        if not runner.sound:
            return f"{entry.files[0].path} gives a result that is not finite: write the bundle again"
        if id(entry) in chosen:
            row += timed(runner.run)
            batch += timed(runner.run_batch)
    return spread(row), spread(batch)


# ---------------------------------------------------------------- joules


@dataclass(frozen=True)
class Phase:
    """Between two readings of the meter: joules, seconds, runs, seconds of processor time of this process."""

    energy_j: float
    elapsed_s: float
    runs: int
    cpu_s: float


@dataclass(frozen=True)
class Round:
    """A rest and the burst after it."""

    rest: Phase
    burst: Phase

    @property
    def joules(self) -> float:
        """Of one run over idle."""
        idle_w = self.rest.energy_j / self.rest.elapsed_s
        return (self.burst.energy_j - idle_w * self.burst.elapsed_s) / self.burst.runs


def energy_of(rounds: list[Round], provenance: str, scope: str) -> Energy | str:
    """Joules of a run from its rounds; in words why they are none, where the bursts do not stand out from the rests."""
    each = [one.joules for one in rounds]
    joules = statistics.fmean(each)
    rest_w = [one.rest.energy_j / one.rest.elapsed_s for one in rounds]
    burst_w = [one.burst.energy_j / one.burst.elapsed_s for one in rounds]
    idle_w, load_w = statistics.fmean(rest_w), statistics.fmean(burst_w)
    if joules <= 0 or min(burst_w) <= max(rest_w):
        return (
            f"the meter cannot tell the work ({load_w:.3f} W) from rest ({idle_w:.3f} W): is the board busy otherwise?"
        )
    runs = sum(one.burst.runs for one in rounds)
    cpu_s = sum(one.burst.cpu_s - one.rest.cpu_s / one.rest.elapsed_s * one.burst.elapsed_s for one in rounds)
    cpu_ms = 1e3 * cpu_s / runs  # without the sampler's, which works in rests too
    return Energy(joules, min(each), max(each), len(rounds), runs, idle_w, load_w, cpu_ms, provenance, scope)


class Bench:
    """The board's meter, and bursts under it. Use as a context manager."""

    def __init__(self, sysroot: Path, model: PowerModelConfig | None, burst_s: float) -> None:
        """`burst_s`: seconds of each rest and each burst that count."""
        cpu = CpuTime(sysroot)
        found = with_model(find(sysroot), cpu, model)
        self.scope, self.burst_s = found.total_scope, burst_s
        self._meter = EnergyMeter(found, SAMPLE_HZ)
        self.why_not = "" if found.total else "the board has no power sensor, and no [power_model] is configured"

    def __enter__(self) -> Bench:
        self._meter.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._meter.__exit__(*exc)

    def energy(self, runners: list[Runner]) -> Energy | str:
        """Joules of a run of these experts in turn, or in words why there are none."""
        if self.why_not:
            return self.why_not
        if self.burst_s <= 0:
            return "not asked for"
        rounds = []
        for _ in range(ROUNDS):
            rest, burst = self._phase([]), self._phase(runners)
            if rest is None or burst is None:
                return "the power sensor gave nothing meanwhile: see node-agent sensors"
            rounds.append(Round(rest, burst))
        state = self._meter.snapshot()
        return energy_of(rounds, state.provenance, self.scope)

    def _phase(self, runners: list[Runner]) -> Phase | None:
        self._work(runners, SETTLE_S)
        before = self._reading()
        start_s, cpu_s = time.monotonic(), time.process_time()
        runs = self._work(runners, self.burst_s)
        after = self._reading()
        elapsed_s, cpu_s = time.monotonic() - start_s, time.process_time() - cpu_s
        if before is None or after is None or before[1] != after[1]:
            return None
        return Phase(after[0] - before[0], elapsed_s, runs, cpu_s)

    def _reading(self) -> tuple[float, float] | None:
        """(joules, gaps in seconds) until now."""
        self._meter.sample()
        state = self._meter.snapshot()
        return None if state.energy_j is None or state.stale else (state.energy_j, state.gap_s)

    def _work(self, runners: list[Runner], seconds: float) -> int:
        """Runs the experts in turn, or rests without any; returns how many runs there were."""
        end_s, runs = time.monotonic() + seconds, 0
        if not runners:
            time.sleep(seconds)
        while runners and time.monotonic() < end_s:
            for runner in runners:
                runner.run()
            runs += len(runners)
        return runs


def _version() -> str:
    try:
        return metadata.version("spacemoe-kit")
    except metadata.PackageNotFoundError:
        return "source"


def measure(
    root: Path, manifest: Manifest, board: str, sysroot: Path, model: PowerModelConfig | None, burst_s: float
) -> BoardCosts | str:
    """Costs of all precisions of a verified bundle, or which shard is not sound.  Raises: errors.ExpertError."""
    costs = []
    with Bench(sysroot, model, burst_s) as bench:
        for precision in manifest.precisions:
            shards = [entry for entry in manifest.shards if entry.precision == precision]
            found = times(root, manifest, shards)
            if isinstance(found, str):
                return found
            runners = []
            if not bench.why_not and burst_s > 0:
                graphs = [root / entry.files[0].path for entry in evenly(shards, BURST_SHARDS)]
                runners = [Runner(graph, manifest.dims.hidden) for graph in graphs]
                for runner in runners:
                    runner.run()
            energy = bench.energy(runners)
            has = isinstance(energy, Energy)
            costs.append(Cost(precision, *found, energy if has else None, "" if has else energy))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    dims = manifest.dims
    return BoardCosts(
        board,
        _version(),
        now,
        manifest.name,
        dims.hidden,
        dims.intermediate,
        1,
        f"{platform.machine()}, {os.cpu_count()} cores",
        is_simulated(sysroot),
        tuple(costs),
    )
