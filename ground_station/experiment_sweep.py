"""The runs of an experiment one after the other, on several processes of this machine, or on a Dask cluster: by joblib.

Every contender with every seed is one task; it gives the same run wherever it is played. Whoever calls gets each run as soon as it is
there, in any order. A cluster's scheduler and workers need this kit (the same code and versions), its workers the bundle with its
held-out text under the same path; each worker looks for itself whether all is the same, and refuses if not. A process plays one run at
a time, whatever threads it has: start workers with one thread each. Dask's protocol carries Python objects without checks: only
clusters that are trusted. Leaves out: what is kept (experiment_store.py).
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from firmware_sim.scenario import Scenario
from ground_station import experiment_identity
from ground_station.experiment import Experiment, ExperimentError, Run, Stage

MAX_JOBS = 1024
DASK_WAIT_S = 10
ADDRESS = re.compile(r"(?:(?:tcp|tls)://)?(?:[\w.-]{1,253}|\[[0-9a-fA-F:.]{2,45}\]):\d{1,5}", re.ASCII)
Task = tuple[int, int]
"""Number of the contender, from 0; seed."""


class SweepError(ExperimentError):
    """Runs cannot be played where they were to be; the text says why and what to do."""


class SweepFailed(RuntimeError):
    """Workers cannot be had, or ended under way; the text says what to do."""


@dataclass(frozen=True)
class Where:
    """On which processes: `jobs` of this machine (1: this one), or the Dask cluster at `dask`, HOST:PORT of its scheduler.

    Raises: SweepError.
    """

    jobs: int = 1
    dask: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.jobs <= MAX_JOBS:
            raise SweepError(f"--jobs {self.jobs} is not from 1 to {MAX_JOBS}")
        if self.dask is not None and self.jobs > 1:
            raise SweepError("give --jobs or --dask: how many workers a cluster has is its own business")
        if self.dask is not None and (not ADDRESS.fullmatch(self.dask) or int(self.dask.rpartition(":")[2]) > 65535):
            raise SweepError(f"--dask {self.dask[:80]!r} is no address of a scheduler: give HOST:PORT")


@dataclass(frozen=True)
class Sweep:
    """What a worker needs. `parts`: experiment_identity.parts where the experiment was started."""

    experiment: Experiment
    scenario: Scenario
    bundle: Path
    parts: dict[str, str]


def tasks_of(experiment: Experiment) -> list[Task]:
    """All tasks, seed by seed: a worker reads a seed's text once and then plays it with one contender after the other."""
    return [(index, seed) for seed in experiment.seeds for index in range(len(experiment.contenders))]


def play(sweep: Sweep, tasks: list[Task], where: Where, begins: Callable[[str], None]) -> Iterator[Run]:
    """Runs as they are finished. begins: told what begins, where one is played after the other.

    Raises: as experiment.Stage and its play; SweepError; SweepFailed.
    """
    if not tasks:
        return
    if where.jobs == 1 and where.dask is None:
        stage = Stage(sweep.experiment, sweep.scenario, sweep.bundle)
        for index, seed in tasks:
            contender = sweep.experiment.contenders[index]
            begins(f"{contender.label}, seed {seed}")
            yield stage.play(contender, seed)
        return
    from joblib import Parallel, delayed

    with _dask(where.dask) if where.dask is not None else _processes(where.jobs):
        jobs = -1 if where.dask is not None else where.jobs
        # one task at a time per worker, each given back when it is done: what is stopped loses little
        parallel = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="1.5*n_jobs")
        parent = None if where.dask is not None else os.getpid()
        yield from parallel(delayed(_played)(sweep, task, parent) for task in tasks)


@contextmanager
def _processes(jobs: int) -> Iterator[None]:
    """joblib's processes; none is left at the end."""
    from joblib import parallel_config
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import BrokenProcessPool

    try:
        with parallel_config(backend="loky", inner_max_num_threads=1):
            yield
    except BrokenProcessPool:
        raise SweepFailed(
            f"a worker process was ended from outside (out of memory?): give fewer than --jobs {jobs}; with -o, finished runs are kept"
        ) from None
    finally:
        get_reusable_executor(max_workers=jobs).shutdown(wait=True, kill_workers=True)


@contextmanager
def _dask(address: str) -> Iterator[None]:
    """A client of the cluster at `address`."""
    try:
        from distributed import Client, KilledWorker
        from distributed.comm import CommClosedError
    except ModuleNotFoundError as error:
        raise SweepFailed(
            f"--dask needs {error.name}, which is not installed: pip install 'spacemoe-kit[cluster]'"
        ) from None
    from joblib import parallel_config

    url = address if "://" in address else f"tcp://{address}"
    try:
        client = Client(url, timeout=DASK_WAIT_S, set_as_default=False)
    except (OSError, TimeoutError):
        raise SweepError(
            f"no Dask scheduler answers at {address}: start one by `dask scheduler`, and workers by `dask worker {address} --nthreads 1`"
        ) from None
    with client:
        if (threads := sum(client.nthreads().values())) < 2:  # joblib would play all of it in this process
            raise SweepError(
                f"the Dask cluster at {address} has {threads} of the 2 threads that are needed: "
                f"start workers by `dask worker {address} --nthreads 1 --nworkers 2`"
            )
        try:  # a scheduler that cannot read a task drops it without a word to whoever waits
            client.run_on_scheduler(import_module, __name__)
            client.run(import_module, __name__)
        except ModuleNotFoundError as error:
            raise SweepError(
                f"scheduler or workers of the Dask cluster at {address} have no {error.name}: install this kit where they run"
            ) from None
        try:
            with parallel_config(backend="dask", client=client, wait_for_workers_timeout=DASK_WAIT_S):
                yield
        except (KilledWorker, asyncio.CancelledError, futures.CancelledError, CommClosedError):
            raise SweepFailed(
                f"the Dask cluster at {address} lost its scheduler or a worker too often: start it again and run this again; "
                "with -o, finished runs are kept"
            ) from None


@lru_cache(maxsize=1)
def _end_with(parent: int) -> None:
    """Ends this worker when its parent is gone: after kill -9 joblib's would play on, and then wait for minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_stage: tuple[str, Stage] | None = None
_one_at_a_time = threading.Lock()  # threads of one worker share model and text, which take hundreds of megabytes


def _played(sweep: Sweep, task: Task, parent: int | None) -> Run:
    """A task in a worker; `parent`: the process without which there is nobody to play for."""
    global _stage
    with _one_at_a_time:
        if parent is not None:
            _end_with(parent)
        digest = experiment_identity.digest(sweep.parts)
        if _stage is None or _stage[0] != digest:
            _stage = None
            mine = experiment_identity.parts(sweep.experiment, sweep.scenario, sweep.bundle)
            if other := experiment_identity.difference(mine, sweep.parts):
                raise SweepError(
                    f"a worker would play another experiment ({other} differ): give it the same kit and bundle"
                )
            _stage = digest, Stage(sweep.experiment, sweep.scenario, sweep.bundle)
        index, seed = task
        return _stage[1].play(sweep.experiment.contenders[index], seed)
