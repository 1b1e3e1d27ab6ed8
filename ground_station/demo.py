"""`spacemoe demo`: the main job on one machine: broker, simulated boards, ground station, streamed text, and a ledger.

Everything is real but the sensors: stock agents in processes of their own, a real MQTT broker, ZeroMQ sockets, quantized
experts. Temperatures and watts come from firmware_sim and say so ("simulated"). Afterwards the same text is generated in
one process with the same partition, codec and grouping, and compared token by token and logit by logit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from firmware_sim.scenario import Scenario
from ground_station import demo_links, ledger, recording, recording_tape, serving, text_stream
from ground_station.broker import Broker
from ground_station.control import Control
from ground_station.decode import TokenCost
from ground_station.demo_report import ledger_of, report
from ground_station.dispatch import Table
from ground_station.link import Link
from ground_station.live_prices import Costs
from ground_station.live_setting import BLIND
from ground_station.local_fleet import FleetError, LocalFleet, demo_boards
from ground_station.placement import round_robin
from ground_station.run_folder import run_folder
from ground_station.text_stream import Show
from node_agent import shard

if TYPE_CHECKING:
    from ground_station import mission_up

__all__ = ["Options", "report", "run"]

JOIN_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Options(serving.Options):
    """What `spacemoe demo` was asked for."""

    nodes: int = 4
    broker: str = "auto"
    keep: Path | None = None
    ledger: Path | None = None
    scenario: Scenario | None = None
    scenario_source: str = ""  # its TOML, for a recording
    links: bool = False  # the scenario's links are imposed on hidden states
    link_ms: float | None = None  # of a token on links, with codec importance
    record: Path | None = None
    watch: mission_up.Options | None = None  # its archive goes into the run's folder


def run(
    options: Options, show: Show, then: Callable[[dict, mission_up.Running, serving.Serving], None] | None = None
) -> dict:
    """Runs the demo and returns its ledger (see `report`). Stops everything it started, however it ends.

    then: with `options.watch`, called with the ledger while boards and mission control still run; they end when it returns.
    Raises: shard.BundleError, FleetError, broker.BrokerError, placement.PlacementError, ValueError for bad options.
    """
    load_average = os.getloadavg()[0]  # before anything of ours runs
    model = serving.model_of(options)
    manifest = model.manifest
    if options.ledger is not None:
        _write_ledger(options.ledger, [])  # a path that cannot be written is told now, not after the last token
    if options.record is not None:
        recording.check_writable(options.record)
    scenario = options.scenario
    if scenario is None:
        boards = demo_boards(options.nodes)
    else:
        from ground_station import scenario_demo  # needs scipy, which the plain demo does without

        boards = scenario_demo.boards(scenario)
    if options.links:
        demo_links.check(scenario)
    demo_links.check_rates(options.links, options.link_ms, options.codec, options.record)
    holdings = round_robin(
        manifest,
        {board.node: board.memory_bytes for board in boards},
        options.precision,
        (options.replica,) if options.replica and len(boards) > 1 else (),
    )
    table = Table(holdings)
    names = set(table.nodes)
    tape = None if options.record is None else recording_tape.Tape(tuple(table.nodes))
    with contextlib.ExitStack() as stack:
        run_dir = options.keep or stack.enter_context(run_folder("demo"))
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FleetError(f"{run_dir} cannot be a folder ({error.strerror}): give another --keep DIR") from None
        external = options.broker if ":" in options.broker else ""
        broker = stack.enter_context(Broker(run_dir, "external" if external else options.broker, external=external))
        show(f"broker {broker.kind} on {broker.host}:{broker.port}\n")
        link = stack.enter_context(Link())
        control = stack.enter_context(
            Control("demo", broker.host, broker.port, on_telemetry=None if tape is None else tape.hear)
        )
        watch = None
        if options.watch is not None:
            from ground_station import mission_up  # a web server is loaded only where one is wanted

            where = dataclasses.replace(options.watch, archive=run_dir / "archive")
            watch = stack.enter_context(mission_up.running(control, where, lambda line: show(f"{line}\n")))
            show(f"mission control: {watch.served.url}\n")
        fleet = stack.enter_context(
            LocalFleet(run_dir, options.bundle, holdings, link.endpoint, (broker.host, broker.port), "demo", boards)
        )
        show(f"{len(names)} simulated boards, each a stock node-agent process, load {len(holdings)} shards ...")
        _wait_for_nodes(names, link, control, fleet)
        show(" ready\n\n")
        made = serving.Serving(model, table, link, control, show)
        remote, chosen = made.remote, made.chosen
        before = ledger.take(control, names)
        course = None if scenario is None else stack.enter_context(scenario_demo.Course(scenario, control, fleet))
        if options.links:
            remote.link = demo_links.impose(link, scenario, course.reach)
        if scenario is None or options.policy in BLIND:
            made.price(tape=tape)
        else:
            orbit = scenario_demo.orbit(scenario, tuple(table.nodes))
            made.price(orbit, course.satellites, scenario.payload, tape)
        prices = made.prices
        if options.links and remote.allocator is not None:
            demo_links.follow(
                remote.allocator,
                remote.link.ways,
                table.nodes,
                manifest.dims,
                options.link_ms,
                lambda: None if prices is None else (prices.state.joule_price, prices.state.byte_price),
            )
        if watch is not None:
            from ground_station.serving_engine import tell_heat

            tell_heat(made, watch.mission)
        told = None if watch is None else mission_up.TextTold(watch.mission, "demo", model.text, len(model.prompt_ids))

        def generate(logits: list[np.ndarray]) -> Iterator[TokenCost]:
            for cost in made.generate(logits, tape):
                if told is not None:
                    told.token(cost)
                yield cost

        costs, logits = text_stream.stream(generate, options.prompt, model.text, show)
        in_text = (chosen.ran, chosen.rows)
        after = ledger.take(control, names)
        show("\n\n")
        if options.ledger is not None:
            _write_ledger(options.ledger, costs)
        parity = None
        if options.parity:
            show("checking against one process with the same partition, codec and grouping ...\n")
            parity = made.parity(costs, logits, options.links)
        states = control.snapshot()
        if not fleet.simulating:  # the sensor files stand still: what agents read there is not true any more
            states, before = {}, dict.fromkeys(names, ledger.Unknown("the board simulator has ended"))
            show("the board simulator has ended: temperatures, power and joules are unknown\n")
        energy = ledger.of(table.nodes, before, after)
        result = ledger_of(options, model.text, costs, energy, remote, table, states, parity, broker.kind)
        if told is not None:
            told.end("done", None if energy.total is None else energy.total.total, result["joules_scope"])
        result["load_average"] = round(load_average, 2)
        result["cores"] = len(os.sched_getaffinity(0))
        if course is not None and watch is None:  # its end is boards that are left alone: nobody could watch them
            result["scenario"] = course.run(
                lambda: list(made.generate(tape=tape)),
                lambda: (control.stop(), link.close()),
                (broker.host, broker.port),
                show,
            )
        result["links"] = None
        if options.links:
            result["links"] = demo_links.part(
                remote.link, remote.link.ways, remote.out_of_contact, table.nodes, remote.allocator
            )
        result["expert_runs_per_token"] = {
            "policy": made.runs_per_token(*in_text),
            "policy_under_load": None
            if course is None
            else made.runs_per_token(chosen.ran - in_text[0], chosen.rows - in_text[1]),
            "topk": len(manifest.moe_layers) * manifest.dims.top_k,
        }
        result["prices"] = None if prices is None else prices.summary()
        if tape is not None:
            _record(options, manifest, boards, tape, chosen.choices, made.costs)
            result["recording"] = str(options.record)
        if watch is not None and then is not None:
            then(result, watch, made)
        return result


def _record(
    options: Options, manifest: shard.Manifest, boards, tape: recording_tape.Tape, choices, costs: Costs
) -> None:
    by_node = {board.node: board for board in boards}
    head = {
        "made_utc_s": time.time(),
        "bundle": manifest.name,
        "manifest_sha256": shard.sha256_of(options.bundle / shard.MANIFEST),
        "prompt": options.prompt,
        "temperature": options.sampling.temperature,
        "top_p": options.sampling.top_p,
        "seed": options.sampling.seed,
        "policy": options.policy,
        "temp_limit_c": options.temp_limit_c,
        "precision": options.precision,
        "replica": options.replica if len(boards) > 1 else None,
        "codec": options.codec,
        "bits_per_value": options.bits_per_value,
        "boards": tuple(
            recording.Board(board.node, board.memory_bytes, board.profile, json.dumps(dict(board.simulated)))
            for board in (by_node[node] for node in tape.nodes)
        ),
        "scenario": options.scenario_source,
    }
    recording.write(options.record, tape, choices, costs, head)


def _wait_for_nodes(names: set[str], link: Link, control: Control, fleet: LocalFleet) -> None:
    fleet.wait_joined(link, JOIN_TIMEOUT_S)
    if missing := control.wait_for(names, 10.0):
        raise FleetError(f"no birth certificate from {', '.join(sorted(missing))}: is the broker reachable?")


def _write_ledger(path: Path, costs: list[TokenCost]) -> None:
    try:
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with shard.atomic_file(path) as file:
            for cost in costs:
                file.write(json.dumps(dataclasses.asdict(cost)).encode() + b"\n")
    except OSError as error:
        raise OSError(
            error.errno, f"the ledger cannot be written to {path} ({error.strerror}): give another --ledger FILE"
        ) from None
