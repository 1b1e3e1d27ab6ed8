"""Stock node agents as processes on this machine, with simulated sensors where asked: for the demo, benchmarks and tests.

Agents are the same program that runs on a board (`python -m node_agent.cli run`); the simulator writes kernel-format files
below each board's sysroot (`python -m firmware_sim.run`). Both are children that end with this process, also when it is
killed. Leaves out: anything on another machine (`spacemoe up`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping

from firmware_sim.profiles import PROFILES
from ground_station.link import Link
from ground_station.placement import Holding
from node_agent import shard

STOP_TIMEOUT_S = 3.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class FleetError(RuntimeError):
    """An agent or the simulator did not start; the text shows its last line and where its log is."""


class ProfileError(FleetError, ValueError):
    """There is no such kind of simulated board; the text names those that there are."""


def check_profile(profile: str) -> None:
    """Raises: ProfileError."""
    if profile not in PROFILES:
        raise ProfileError(f"there is no simulated board {profile[:60]!r}: use {', '.join(sorted(PROFILES))}")


@dataclass(frozen=True)
class Board:
    """A simulated board: node id, profile of firmware_sim, memory that placement may fill.

    `simulated`: further keys of firmware_sim.spec (ambient, faults); `guard`: the agent's table [guard].
    """

    node: str
    profile: str
    memory_bytes: int
    simulated: Mapping[str, object] = field(default_factory=dict)
    guard: Mapping[str, float] = field(default_factory=dict)


def demo_boards(count: int = 4) -> tuple[Board, ...]:
    """`count` boards that alternate between a Raspberry Pi 5 with an INA226 and a Jetson Orin Nano, 512 MB each for shards."""
    kinds = (("rpi5", "raspberry-pi-5-ina226"), ("orin", "jetson-orin-nano"))
    return tuple(Board(f"sat-{i + 1}-{kinds[i % 2][0]}", kinds[i % 2][1], 512 * 1024 * 1024) for i in range(count))


def cores_of(nodes: Iterable[str]) -> dict[str, int]:
    """The core of each agent, in turn over the cores that this process may use; also for dispatch.Table.

    A board has a core of its own as far as there are cores. Left to itself, the kernel often runs two agents that wake together
    one after the other on one core, because each is still "hot" there.
    """
    cores = sorted(os.sched_getaffinity(0))
    return {node: cores[index % len(cores)] for index, node in enumerate(sorted(nodes))}


def _die_with_parent(parent: int, death: int) -> None:
    """In the child before exec: signal `death` when the parent goes, so that not even kill -9 leaves agents behind."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, death)
    if os.getppid() != parent:  # it went before this took effect
        os._exit(1)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that end us act when the block is over.

    Blocking them in this thread would not do: another thread (paho's) takes the signal, and Python runs its handler here all
    the same.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread alone
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _spawn(
    arguments: list[str],
    log: Path,
    keep: Callable[[subprocess.Popen], None],
    core: int | None = None,
    death: int = signal.SIGTERM,
) -> None:
    """Starts a Python module as a child and hands it to `keep` before any signal can interrupt.

    A signal handler's exception inside a fork is swallowed, and one right after it would lose the child: so the signals that
    stop us are held meanwhile.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    parent = os.getpid()

    def in_child() -> None:
        _die_with_parent(parent, death)
        if core is not None:
            os.sched_setaffinity(0, {core})
            # A batch process that wakes up does not push aside who woke it: the ground station hands out a layer's work to all
            # boards before the first one that shares its core begins.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

    with _signals_held(), open(log, "ab") as file:
        keep(
            subprocess.Popen(  # own session: Ctrl-C reaches this process alone, which then stops them in order
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=in_child,
                env=environment,
            )
        )


def _toml(value: object) -> str:
    return json.dumps(value)  # strings, numbers, booleans and lists of strings are the same in TOML


class LocalFleet:
    """Starts one agent per board that holds a shard; a context manager that stops everything it started."""

    def __init__(
        self,
        run_dir: Path,
        bundle: Path,
        holdings: tuple[Holding, ...],
        data_endpoint: str,
        broker: tuple[str, int],
        fleet: str = "demo",
        boards: tuple[Board, ...] = (),
        delivery_endpoint: str = "",
        empty: tuple[str, ...] = (),
    ):
        """`broker` = (host, port). `boards`: those with simulated sensors; a node without a board reads this machine's.

        `delivery_endpoint`: of delivery.Deliverer, where nodes are to take shards. `empty`: further nodes that know no bundle, so
        that all they hold is delivered; the others have the whole bundle on their disk and need no transfer.

        Raises: ProfileError.
        """
        for board in boards:
            check_profile(board.profile)
        self.run_dir = run_dir
        self.agents: dict[str, subprocess.Popen] = {}
        self.simulator: subprocess.Popen | None = None
        self._configs: dict[str, Path] = {}
        self._boards = {board.node: board for board in boards}
        for node in sorted({holding.node for holding in holdings} | {*empty}):
            home = run_dir / node
            home.mkdir(parents=True, exist_ok=True)
            sysroot = home / "sysroot" if node in self._boards else Path("/")
            stems = [
                shard.shard_stem(h.layer, h.expert, h.precision).removeprefix("experts/")
                for h in holdings
                if h.node == node
            ]
            tables = {
                "node": {
                    "id": node,
                    "fleet": fleet,
                    "board": self._boards[node].profile if node in self._boards else "this machine",
                    "state_dir": str(home / "state"),
                    "sysroot": str(sysroot),
                },
                "bundle": {"path": str(bundle.resolve()), "shards": stems},
                "broker": {"host": broker[0], "port": broker[1]},
                "data": {"endpoint": data_endpoint},
            }
            if delivery_endpoint:
                tables["data"]["delivery_endpoint"] = delivery_endpoint
            if node in empty:
                del tables["bundle"]
            if node in self._boards and self._boards[node].guard:
                tables["guard"] = dict(self._boards[node].guard)
            text = ""
            for table, values in tables.items():
                text += f"[{table}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in values.items()) + "\n"
            self._configs[node] = home / "spacemoe.toml"
            self._configs[node].write_text(text)

    def __enter__(self) -> LocalFleet:
        try:
            if self._boards:
                self._start_simulator()
            for node in self._configs:
                self.start(node)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start_simulator(self) -> None:
        boards = []
        for node, board in self._boards.items():
            home = self.run_dir / node
            boards.append(
                {
                    **board.simulated,
                    "node": node,
                    "profile": board.profile,
                    "sysroot": str(home / "sysroot"),
                    "pid_file": str(home / "agent.pid"),
                    "state_file": str(self.truth_file(node)),
                }
            )
        spec = self.run_dir / "simulation.json"
        spec.write_text(json.dumps({"boards": boards}))
        log = self.run_dir / "simulation.log"
        # it has nothing to put in order, so nothing that it waits for may keep it
        death = signal.SIGKILL
        _spawn(
            ["firmware_sim.run", "--spec", str(spec)], log, lambda child: setattr(self, "simulator", child), death=death
        )
        end = time.monotonic() + 10
        while not all(any((self.run_dir / n / "sysroot").rglob("temp")) for n in self._boards):
            if self.simulator.poll() is not None or time.monotonic() > end:
                raise FleetError(self._why("the board simulator", self.run_dir / "simulation.log"))
            time.sleep(0.02)

    def truth_file(self, node: str) -> Path:
        """Where the simulator writes a board's noiseless state (JSON)."""
        return self.run_dir / node / "truth.json"

    def start(self, node: str) -> None:
        """Starts (or starts again) a node's agent."""
        home = self.run_dir / node
        core = cores_of(self._configs)[node]
        arguments = ["node_agent.cli", "run", "--config", str(self._configs[node])]
        _spawn(arguments, home / "agent.log", lambda child: self.agents.__setitem__(node, child), core)
        with shard.atomic_file(home / "agent.pid") as file:
            file.write(str(self.agents[node].pid).encode())

    def kill(self, node: str) -> None:
        """kill -9, as a power cut would."""
        self.agents[node].kill()
        self.agents[node].wait()

    def wait_joined(self, link: Link, timeout_s: float = 60.0) -> None:
        """Waits until every agent has said HELLO on the data plane.  Raises: FleetError as soon as one has ended."""
        end = time.monotonic() + timeout_s
        while missing := link.wait_for(set(self._configs), 0.2):
            self.check()
            if time.monotonic() > end:
                raise FleetError(
                    f"{', '.join(sorted(missing))} did not join within {timeout_s:.0f} s: see {self.run_dir}"
                )

    @property
    def simulating(self) -> bool:
        """Whether the simulator of the boards is running."""
        return self.simulator is not None and self.simulator.poll() is None

    def check(self) -> None:
        """Raises: FleetError when an agent has ended by itself."""
        for node, process in self.agents.items():
            if process.poll() is not None:
                raise FleetError(
                    self._why(f"agent {node} (exit {process.returncode})", self.run_dir / node / "agent.log")
                )

    def _why(self, what: str, log: Path) -> str:
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return f"{what} did not run: {lines[-1] if lines else 'it wrote nothing'} (log: {log})"

    def stop(self) -> None:
        children = [*self.agents.values(), *([self.simulator] if self.simulator else [])]
        for process in children:
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + STOP_TIMEOUT_S
        for process in children:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
