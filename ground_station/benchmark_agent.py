"""`spacemoe benchmark agent`: what an idle agent costs its board in processor time: sampling, guard and telemetry.

Stock agents on simulated boards with a power meter, a broker and a ground station that asks for nothing; the system's own
accounting of each process's CPU time over a while. A board's core may be slower than this machine's: the figure is this machine's.
Leaves out: the simulator and the broker, which a board does not run, and the cost of serving.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from ground_station.broker import Broker
from ground_station.control import Control
from ground_station.link import Link
from ground_station.local_fleet import LocalFleet, demo_boards
from ground_station.placement import round_robin
from ground_station.run_folder import run_folder
from node_agent import shard

LIMIT_PERCENT = 2.0
SETTLE_S = 3.0
JOIN_TIMEOUT_S = 30.0
AGENTS = 4


def measure(bundle: Path, seconds: float, rounds: int) -> dict:
    """CPU percent of one core per agent, in `rounds` windows of `seconds`.  Raises: BrokerError, FleetError, BundleError."""
    manifest = shard.read_manifest(bundle)
    with ExitStack() as stack:
        run_dir = stack.enter_context(run_folder("agent"))
        broker = stack.enter_context(Broker(run_dir))
        link = stack.enter_context(Link())
        control = stack.enter_context(
            Control("bench", broker.host, broker.port)
        )  # agents without a ground station keep history instead
        boards = demo_boards(AGENTS)
        memory = {board.node: board.memory_bytes for board in boards}
        holdings = round_robin(manifest, memory, manifest.precisions[0])
        fleet = stack.enter_context(
            LocalFleet(run_dir, bundle, holdings, link.endpoint, (broker.host, broker.port), "bench", boards)
        )
        fleet.wait_joined(link, JOIN_TIMEOUT_S)
        control.wait_for(set(fleet.agents), JOIN_TIMEOUT_S)
        _listen(link, SETTLE_S)
        agents = {node: psutil.Process(process.pid) for node, process in fleet.agents.items()}
        percents: dict[str, list[float]] = {node: [] for node in agents}
        for _ in range(rounds):
            before = {node: _cpu_s(process) for node, process in agents.items()}
            began_s = time.monotonic()
            _listen(link, seconds)
            elapsed_s = time.monotonic() - began_s
            for node, process in agents.items():
                percents[node].append(100 * (_cpu_s(process) - before[node]) / elapsed_s)
        resident = {node: process.memory_info().rss / 1e6 for node, process in agents.items()}
    every = [value for values in percents.values() for value in values]
    return {
        "cpu_percent": round(statistics.median(every), 3),
        "spread": {"min": round(min(every), 3), "max": round(max(every), 3)},
        "n": len(every),
        "seconds": seconds,
        "limit_percent": LIMIT_PERCENT,
        "holds": statistics.median(every) <= LIMIT_PERCENT,
        "provenance": "measured",
        "agents": {
            node: {
                "cpu_percent": round(statistics.median(values), 3),
                "resident_mb": round(resident[node], 1),
            }
            for node, values in percents.items()
        },
    }


def _listen(link: Link, seconds: float) -> None:
    """As a ground station without requests does: it keeps the links alive."""
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        link.drain()
        time.sleep(min(0.1, left_s))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def report(result: dict) -> str:
    """A line per agent and one for all."""
    lines = [
        f"{node:14} {row['cpu_percent']:6.2f} % of a core, {row['resident_mb']:.0f} MB resident"
        for node, row in result["agents"].items()
    ]
    lines.append(
        f"median {result['cpu_percent']:.2f} % ({result['spread']['min']:.2f} to {result['spread']['max']:.2f}, n = {result['n']} "
        f"windows of {result['seconds']:g} s), limit {result['limit_percent']:g} %: idle agents on this machine"
    )
    return "\n".join(lines)
