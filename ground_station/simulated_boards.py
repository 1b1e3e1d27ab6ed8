"""Simulated boards that run until they are stopped, for a ground station of one's own: `spacemoe sim up`.

Stock agents (local_fleet.py), their sensors simulated and said to be so; they dial the broker and the data plane that they are given.
Leaves out: broker, ground station, and virtual satellites (`spacemoe demo` has all of them).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ground_station.broker import Broker
from ground_station.local_fleet import FleetError, LocalFleet, demo_boards
from ground_station.placement import round_robin
from ground_station.run_folder import run_folder
from node_agent import shard

CHECK_S = 0.5
MAX_BOARDS = 64


class BoardsError(ValueError):
    """So many boards cannot be started; the text says how many can."""


@dataclass(frozen=True)
class Options:
    """broker: HOST:PORT; data, delivery: endpoints that the boards dial (delivery: none where empty). `empty`: they hold no shard yet, and
    wait for `spacemoe place`; else every expert is on one board, and a replica on the next."""

    boards: int
    bundle: Path
    broker: str
    data: str
    delivery: str
    fleet: str
    precision: str
    replica: str
    empty: bool


def run(options: Options, started: Callable[[dict], None], until: threading.Event) -> None:
    """Starts the boards, calls `started` with what runs, and returns when `until` is set; stops them however it ends.

    Raises: BoardsError; BrokerError where none answers; FleetError as soon as a board has ended by itself; BundleError, PlacementError.
    """
    if not 1 <= options.boards <= MAX_BOARDS:
        raise BoardsError(f"--boards {options.boards} is not from 1 to {MAX_BOARDS}: each is a process of its own")
    manifest = shard.read_manifest(options.bundle)
    boards = demo_boards(options.boards)
    memory = {board.node: board.memory_bytes for board in boards}
    names = tuple(memory)
    replicas = (options.replica,) if options.boards > 1 else ()
    holdings = () if options.empty else round_robin(manifest, memory, options.precision, replicas)
    broker = Broker(Path(), "external", external=options.broker)
    broker.start()  # starts nothing: it asks whether one answers
    with run_folder("demo") as folder:
        fleet = LocalFleet(
            folder,
            options.bundle,
            holdings,
            options.data,
            (broker.host, broker.port),
            options.fleet,
            boards,
            options.delivery,
            names if options.empty else (),
        )
        with fleet:
            fleet.check()
            rows = [
                {
                    "node": board.node,
                    "profile": board.profile,
                    "pid": fleet.agents[board.node].pid,
                    "shards": sum(holding.node == board.node for holding in holdings),
                    "provenance": "simulated",
                }
                for board in boards
            ]
            started({"boards": rows, "broker": options.broker, "data": options.data, "fleet": options.fleet})
            while not until.wait(CHECK_S):
                fleet.check()
                if not fleet.simulating:
                    raise FleetError(f"the simulator of the boards has ended: see {folder / 'simulation.log'}")
