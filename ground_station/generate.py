"""`spacemoe generate`: text from the fleet's own boards: shards they lack are sent first, then tokens stream, with a ledger at the end.

Runs beside `spacemoe up`, whose broker tells which boards are there and what they hold; binds the data plane (encrypted, for the
fleet's own nodes alone) while it runs, so one of these runs at a time. Which board holds what is placement v1 (placement.py),
the same for the same boards: nothing moves from one text to the next. Other placements are `spacemoe place`'s.
Leaves out: virtual satellites, several texts at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ground_station import ledger, serving, spot_fleet, text_stream, up
from ground_station.allow_list import AllowList
from ground_station.control import Control, ControlError
from ground_station.delivery import Deliverer
from ground_station.demo_report import ledger_of
from ground_station.dispatch import Table
from ground_station.fleet_records import FleetFolder
from ground_station.link import Link
from ground_station.placement import Holding, round_robin
from ground_station.text_stream import Show
from node_agent import shard
from node_agent.delivery_frame import Shard
from node_agent.wire import Birth

POLL_S = 0.1
SHOWN = 8
STATES = {"new": "has not enrolled yet", "revoked": "is revoked", "quarantined": "is in quarantine"}

Progress = Callable[[int, int, str], None]
"""(bytes there, bytes in all, what) of the shards that are sent."""


class BoardsError(RuntimeError):
    """Boards are not there or do not hold what they should; the text names them and the next step."""


@dataclass(frozen=True, kw_only=True)
class Options(serving.Options):
    """What `spacemoe generate` was asked for. `nodes` empty: every enrolled node that comes online within `patience_s`."""

    folder: Path
    nodes: tuple[str, ...] = ()
    patience_s: float = 30.0
    bind: str = up.LOOPBACK
    broker: str = up.LOOPBACK
    timeout_s: float = 2.0
    parity: bool = False


def lacking(
    holdings: tuple[Holding, ...], births: Mapping[str, Birth], manifest: shard.Manifest
) -> list[tuple[str, shard.ShardEntry]]:
    """(node, shard) of every holding that is not on its node, by the births, in the version of this bundle."""
    entries = {(each.layer, each.expert, each.precision): each for each in manifest.shards}
    there = {
        (node, each.layer, each.expert, each.precision): each.sha256
        for node, birth in births.items()
        for each in birth.shards
        if birth.bundle == manifest.name
    }
    wanted = ((each.node, entries[each.layer, each.expert, each.precision]) for each in holdings)
    return [
        (node, entry)
        for node, entry in wanted
        if there.get((node, entry.layer, entry.expert, entry.precision)) != entry.sha256
    ]


def online(control: Control, folder: FleetFolder, options: Options) -> dict[str, Birth]:
    """Births of the boards that take part.  Raises: BoardsError."""
    records = folder.nodes()
    unknown = [node for node in options.nodes if node not in records]
    if unknown:
        raise BoardsError(f"{', '.join(unknown[:SHOWN])}: not of this fleet; `spacemoe fleet list` says who is")
    for node in options.nodes:
        if (state := records[node].state) != "enrolled":
            raise BoardsError(f"{node} {STATES[state]}; `spacemoe fleet list` says how each stands")
    wanted = options.nodes or tuple(name for name, record in records.items() if record.state == "enrolled")
    if not wanted:
        raise BoardsError("no node has enrolled yet: flash a card with a pack of `spacemoe fleet add`, and start it")
    missing = control.wait_for(wanted, options.patience_s)
    if missing and (options.nodes or len(missing) == len(wanted)):
        names = ", ".join(sorted(missing)[:SHOWN])
        raise BoardsError(f"not online within {options.patience_s:g} s: {names}; does `spacemoe up` run, do they?")
    known = control.snapshot()
    return {node: known[node].birth for node in sorted(set(wanted) - missing)}


def send(
    deliverer: Deliverer,
    what: list[tuple[str, shard.ShardEntry]],
    root: Path,
    manifest: shard.Manifest,
    progress: Progress,
    patience_s: float,
) -> int:
    """Sends shards one after the other; bytes that were sent.  Raises: shard.BundleError, DeliveryError."""
    total, before, sent = sum(entry.bytes for _, entry in what), 0, 0
    for node, entry in what:
        name = f"{Shard(entry.layer, entry.expert, entry.precision).stem} to {node}"

        def told(done: int, of: int, before: int = before, name: str = name) -> None:
            progress(before + done, total, name)

        sent += deliverer.deliver(node, root, manifest, entry, progress=told, patience_s=patience_s).sent_bytes
        before += entry.bytes
    return sent


def run(options: Options, show: Show, progress: Progress) -> dict:
    """Generates and returns the ledger (demo_report.ledger_of), `boards` and `delivered` beside it.

    Raises: FleetFolderError, shard.BundleError, BoardsError, DeliveryError, LinkError, ControlError, PlacementError, ValueError.
    """
    folder, load_average = FleetFolder.open(options.folder), os.getloadavg()[0]
    model = serving.model_of(options)
    manifest = model.manifest
    ports, keys, allowed = folder.info.ports, folder.curve_keys(), AllowList(folder)
    with ExitStack() as stack:
        try:
            control = stack.enter_context(up.control_of(folder, options.broker, ports.broker))
        except ControlError as error:
            raise BoardsError(f"{error}; `spacemoe up --dir {options.folder}` starts it") from None
        link = stack.enter_context(Link(f"tcp://{options.bind}:{ports.data}", keys, allowed))
        deliverer = stack.enter_context(Deliverer(f"tcp://{options.bind}:{ports.delivery}", keys, allowed))
        births = online(control, folder, options)
        table, delivered = equip(births, manifest, options, deliverer, show, progress)
        if missing := link.wait_for(set(table.nodes), options.patience_s):
            where = f"port {ports.data} of {options.bind}"
            raise BoardsError(f"not on the data plane: {', '.join(sorted(missing))}; do they reach {where} (--bind)?")
        spot = stack.enter_context(spot_fleet.checking(folder, control, options.bundle, manifest, births, show))
        made = serving.Serving(model, table, link, control, show, options.timeout_s, spot)
        made.price()
        show("\n")
        before = ledger.take(control, table.nodes)
        costs, logits = text_stream.stream(made.generate, options.prompt, model.text, show)
        made.remote.settle(spot.rules.answer_s)
        energy = ledger.of(table.nodes, before, ledger.take(control, table.nodes))
        show("\n\n")
        parity = None
        if options.parity:
            show("checking against one process with the same partition, codec and grouping ...\n")
            parity = made.parity(costs, logits)
        result = ledger_of(
            options, model.text, costs, energy, made.remote, table, control.snapshot(), parity, "mosquitto"
        )
        return result | {
            "spot_checks": dict(spot.counts) | {"alarms": [event.text for event in spot.alarms]},
            "boards": {node: birth.board for node, birth in births.items()},
            "delivered": delivered,
            "load_average": round(load_average, 2),
            "cores": len(os.sched_getaffinity(0)),
            "expert_runs_per_token": {
                "policy": made.runs_per_token(made.chosen.ran, made.chosen.rows),
                "policy_under_load": None,
                "topk": len(manifest.moe_layers) * manifest.dims.top_k,
            },
            "prices": None if made.prices is None else made.prices.summary(),
            "links": None,
        }


def equip(
    births: Mapping[str, Birth],
    manifest: shard.Manifest,
    options: Options,
    deliverer: Deliverer,
    show: Show,
    progress: Progress,
) -> tuple[Table, dict]:
    """Sends the boards what they lack of placement v1; who holds what, and what was sent.  Raises: PlacementError, DeliveryError."""
    memory = {node: birth.memory_bytes for node, birth in births.items()}
    replicas = (options.replica,) if options.replica and len(births) > 1 else ()
    holdings = round_robin(manifest, memory, options.precision, replicas)
    wanted = lacking(holdings, births, manifest)
    show(f"{len(births)} boards: {', '.join(births)[:200]}; {len(wanted)} of {len(holdings)} shards are to be sent\n")
    began_s = time.monotonic()
    sent = send(deliverer, wanted, options.bundle, manifest, progress, options.patience_s)
    took_s = time.monotonic() - began_s
    if wanted:
        show(f"{len(wanted)} shards sent: {sent / 1e6:.1f} MB in {took_s:.1f} s\n")
    return Table(holdings), {"shards": len(wanted), "bytes": sent, "s": round(took_s, 3)}
