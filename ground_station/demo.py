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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np

from firmware_sim.scenario import Scenario
from ground_station import ledger, rates, selection
from ground_station.broker import Broker
from ground_station.control import Control
from ground_station.decode import Decoder, TokenCost
from ground_station.dispatch import Table
from ground_station.link import Link
from ground_station.local import LocalExperts
from ground_station.local_fleet import FleetError, LocalFleet, demo_boards
from ground_station.local_wire import Importance, WiredExperts
from ground_station.placement import round_robin
from ground_station.remote import RemoteExperts
from ground_station.run_folder import run_folder
from ground_station.sampling import Sampling
from ground_station.selection_world import PRECISIONS, Calibration, World
from ground_station.text import Text
from ground_station.trunk import ContextFull, Trunk
from node_agent import compress, shard

JOIN_TIMEOUT_S = 60.0
# of policies that see prices: a run is free up to 20 K below the limit; 10 K below it must save 0.01 nat (a quarter of them do not)
KNEE_BELOW_LIMIT_C = 20.0
PRICE_HALF_WAY = 0.01
BLIND = ("topk", "random")  # policies that look at no state of the fleet: their choices need no recording
BUSY_SHARE = 0.7  # load average per core before the start, above which speeds are said to be of a busy machine


@dataclass(frozen=True)
class Options:
    """What `spacemoe demo` was asked for."""

    bundle: Path
    prompt: str = "In the beginning"
    tokens: int = 64
    sampling: Sampling = Sampling()
    precision: str = "int8"
    replica: str | None = "int4"
    codec: str = "q8"
    bits_per_value: float | None = None
    policy: str = "topk"
    temp_limit_c: float = 85.0
    nodes: int = 4
    broker: str = "auto"
    keep: Path | None = None
    ledger: Path | None = None
    parity: bool = True
    scenario: Scenario | None = None


Show = Callable[[str], None]


def show(text: str) -> None:
    """Prints progress and the text itself as they come."""
    print(text, end="", flush=True)


class Wrapped:
    """Shows a stream of pieces in lines of at most 79 columns, broken at spaces."""

    def __init__(self, show: Show, width: int = 79):
        self._show, self._width, self._column, self._word = show, width, 0, ""

    def __call__(self, piece: str) -> None:
        for character in piece:
            if character in " \n":
                self._flush(character)
            else:
                self._word += character

    def _flush(self, after: str) -> None:
        if self._column and self._column + len(self._word) > self._width:
            self._show("\n")
            self._column = 0
        self._show(self._word + after)
        self._column = 0 if after == "\n" else self._column + len(self._word) + len(after)
        self._word = ""

    def end(self) -> None:
        self._flush("")


def run(options: Options, show: Show) -> dict:
    """Runs the demo and returns its ledger (see `report`). Stops everything it started, however it ends.

    Raises: shard.BundleError, FleetError, broker.BrokerError, placement.PlacementError, ValueError for bad options.
    """
    if options.codec not in compress.CODECS:
        raise ValueError(f"codec {options.codec!r} is unknown: use one of {', '.join(compress.CODECS)}")
    if not 0 < options.temp_limit_c < 1000:
        raise ValueError(f"temperature limit {options.temp_limit_c} °C is not between 0 and 1000")
    manifest = shard.read_manifest(options.bundle)
    load_average = os.getloadavg()[0]  # before anything of ours runs
    text = Text(options.bundle, manifest)
    prompt_ids = ([manifest.bos_id] if manifest.bos_id is not None else []) + text.encode(options.prompt)
    needed = len(prompt_ids) + options.tokens
    if needed > manifest.dims.max_context:
        raise ContextFull(
            f"prompt and answer need {needed} tokens, {manifest.name} has a context of {manifest.dims.max_context}: "
            f"ask for at most {max(0, manifest.dims.max_context - len(prompt_ids))}"
        )
    policy = _policy(options, manifest)
    _allocator(options, manifest)  # a bundle without calibration is told now
    if options.ledger is not None:
        _write_ledger(options.ledger, [])  # a path that cannot be written is told now, not after the last token
    scenario = options.scenario
    if scenario is None:
        boards = demo_boards(options.nodes)
    else:
        from ground_station import scenario_demo  # needs scipy, which the plain demo does without

        boards = scenario_demo.boards(scenario)
    holdings = round_robin(
        manifest,
        {board.node: board.memory_bytes for board in boards},
        options.precision,
        (options.replica,) if options.replica and len(boards) > 1 else (),
    )
    table = Table(holdings)
    names = set(table.nodes)
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
        control = stack.enter_context(Control("demo", broker.host, broker.port))
        fleet = stack.enter_context(
            LocalFleet(run_dir, options.bundle, holdings, link.endpoint, (broker.host, broker.port), "demo", boards)
        )
        trunk = Trunk(options.bundle, manifest)
        show(f"{len(names)} simulated boards, each a stock node-agent process, load {len(holdings)} shards ...")
        _wait_for_nodes(names, link, control, fleet)
        show(" ready\n\n")
        remote = RemoteExperts(link, table, options.codec, allocator=_allocator(options, manifest))
        recorder = selection.Recorder(policy)
        decoder = Decoder(trunk, recorder, remote, manifest.eos_ids)
        ledger.wait_for_baselines(control, names)  # without it nothing could be told from idling
        before = ledger.take(control, names)
        course = None if scenario is None else stack.enter_context(scenario_demo.Course(scenario, control, fleet))
        costs, logits = _stream(
            decoder, options, prompt_ids, text, show, _price_updates(decoder, options, manifest, table, control)
        )
        after = ledger.take(control, names)
        show("\n\n")
        if options.ledger is not None:
            _write_ledger(options.ledger, costs)
        parity = None
        if options.parity:
            show("checking against one process with the same partition, codec and grouping ...\n")
            # prices moved with the temperatures of that moment: the reference repeats the choices
            again = _policy(options, manifest) if options.policy in BLIND else selection.Replay(recorder.choices)
            parity = _parity(options, manifest, table, trunk, again, prompt_ids, costs, logits)
        states = control.snapshot()
        if not fleet.simulating:  # the sensor files stand still: what agents read there is not true any more
            states, before = {}, dict.fromkeys(names, ledger.Unknown("the board simulator has ended"))
            show("the board simulator has ended: temperatures, power and joules are unknown\n")
        energy = ledger.of(table.nodes, before, after)
        result = _ledger(options, text, costs, energy, remote, table, states, parity, broker.kind)
        result["load_average"] = round(load_average, 2)
        result["cores"] = len(os.sched_getaffinity(0))
        if course is not None:
            again = Decoder(trunk, _policy(options, manifest), remote, manifest.eos_ids)
            result["scenario"] = course.run(
                lambda: list(again.generate(prompt_ids, options.tokens, options.sampling, ignore_eos=True)),
                lambda: (control.stop(), link.close()),
                (broker.host, broker.port),
                show,
            )
        return result


def _policy(options: Options, manifest: shard.Manifest) -> selection.Policy:
    dims, path = manifest.dims, options.bundle / "calibration.npz"
    known = Calibration.load(path, manifest.moe_layers, dims.experts) if path.exists() else None
    return selection.make(
        options.policy, manifest.routing, dims.top_k, dims.experts, options.sampling.seed, calibration=known
    )


def _allocator(options: Options, manifest: shard.Manifest) -> rates.Allocator | None:
    return rates.for_codec(options.codec, options.bundle, manifest, bits_per_value=options.bits_per_value)


def _wait_for_nodes(names: set[str], link: Link, control: Control, fleet: LocalFleet) -> None:
    fleet.wait_joined(link, JOIN_TIMEOUT_S)
    if missing := control.wait_for(names, 10.0):
        raise FleetError(f"no birth certificate from {', '.join(sorted(missing))}: is the broker reachable?")


def _sample(states, node: str, name: str):
    state = states.get(node)
    return None if state is None else state.samples.get(name)


def _value(states, node: str, name: str) -> float | None:
    state = states.get(node)
    return None if state is None else state.value(name)


def _price_updates(
    decoder: Decoder, options: Options, manifest: shard.Manifest, table: Table, control: Control
) -> Callable[[], None]:
    """What is done between two tokens: for policies that see the fleet, its state follows the latest telemetry."""
    if options.policy in BLIND:
        return lambda: None
    # no self-test was asked for joules: a run counts 1 on every node, in every precision
    ones = np.ones((len(table.nodes), PRECISIONS))
    world = World.of(table, manifest.dims.experts, ones, ones)
    limit_c, knee_c = options.temp_limit_c, options.temp_limit_c - KNEE_BELOW_LIMIT_C

    def update() -> None:
        states = control.snapshot()
        temps = [_value(states, node, "temp_c") for node in table.nodes]
        prices = [selection.price_from_headroom(temp, limit_c, knee_c, PRICE_HALF_WAY) for temp in temps]
        decoder.world = world.changed(
            joule_price=np.array(prices), temp_c=np.array([np.nan if temp is None else temp for temp in temps])
        )

    return update


def _stream(
    decoder: Decoder,
    options: Options,
    prompt_ids: list[int],
    text: Text,
    show: Show,
    between_tokens: Callable[[], None],
) -> tuple[list[TokenCost], list[np.ndarray]]:
    wrapped = Wrapped(show)
    wrapped(options.prompt)
    stream = text.stream()
    costs: list[TokenCost] = []
    logits: list[np.ndarray] = []
    between_tokens()
    for cost in decoder.generate(prompt_ids, options.tokens, options.sampling, keep_logits=logits, ignore_eos=True):
        between_tokens()
        costs.append(cost)
        wrapped(stream.push(cost.token_id))
    wrapped.end()
    return costs, logits


def _parity(
    options: Options,
    manifest: shard.Manifest,
    table: Table,
    trunk: Trunk,
    policy: selection.Policy,
    prompt_ids: list[int],
    costs: list[TokenCost],
    logits: list[np.ndarray],
) -> dict:
    """The same generation in this process. `equal` is None when the ladder was used: then there is nothing to compare."""
    rungs = sum(len(cost.rungs) for cost in costs)
    reference: list[np.ndarray] = []
    allocator = _allocator(options, manifest)
    if allocator is None:
        experts = LocalExperts(options.bundle, manifest, table, options.codec)
    else:
        experts = WiredExperts(options.bundle, manifest, table, Importance(allocator))
    decoder = Decoder(trunk, policy, experts, manifest.eos_ids)
    tokens = [
        cost.token_id
        for cost in decoder.generate(
            prompt_ids, options.tokens, options.sampling, keep_logits=reference, ignore_eos=True
        )
    ]
    same = [a == b.token_id for a, b in zip(tokens, costs)]
    worst = max(float(np.abs(a - b).max()) for a, b in zip(logits, reference))
    return {
        "equal": None if rungs else all(same) and len(tokens) == len(costs),
        "tokens_equal": sum(same),
        "tokens": len(tokens),
        "max_logit_diff": worst,
        "note": f"the ladder was used {rungs} times: texts may differ" if rungs else "",
    }


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


def _ledger(options, text, costs, energy: ledger.Ledger, remote, table, states, parity, broker_kind) -> dict:
    decode = costs[1:] or costs
    seconds = sum(cost.total_ms for cost in decode) / 1e3
    total = energy.total
    nodes = []
    for name, spent in energy.nodes.items():
        known = isinstance(spent, ledger.Spent)
        temp, power = _sample(states, name, "temp_c"), _sample(states, name, "power_w")
        nodes.append(
            {
                "id": name,
                "served": remote.served[name],
                "temp_c": _value(states, name, "temp_c"),
                "power_w": _value(states, name, "power_w"),
                "energy_j": round(spent.joules.total, 3) if known else None,
                "joules": spent.joules.tree() if known else None,
                "joules_provenance": spent.provenance if known else None,
                "joules_scope": spent.scope if known else None,
                "joules_unknown": energy.unknown.get(name),
                "provenance": power.provenance if power is not None else temp.provenance if temp is not None else None,
            }
        )
    return {
        "text": text.decode([cost.token_id for cost in costs]),
        "tokens": len(costs),
        "tokens_per_s": round(len(decode) / seconds, 2),
        "ttft_s": round(costs[0].total_ms / 1e3, 4),
        "bytes_per_token": {
            "sent": round(sum(cost.sent_bytes for cost in decode) / len(decode), 1),
            "received": round(sum(cost.received_bytes for cost in decode) / len(decode), 1),
        },
        "joules_per_token": None if total is None else round(total.total / len(costs), 4),
        "joules": None if total is None else total.tree(),
        "joules_method": ledger.METHOD,
        "joules_unknown": energy.unknown,
        "joules_scope": "what each board's meter meters (a Jetson's module, a Raspberry Pi's supply), summed over all nodes from just "
        "before the prompt to just after the last token, idle power included; per generated token",
        "joules_provenance": energy.provenance,
        "breakdown_ms": {
            part: round(sum(getattr(cost, f"{part}_ms") for cost in decode) / len(decode), 4)
            for part in ("total", "trunk", "select", "codec", "wire", "expert")
        },
        "nodes": nodes,
        "ladder": dict(Counter(rung.rung for cost in costs for rung in cost.rungs)),
        "parity": parity,
        "broker": broker_kind,
        "precision": options.precision,
        "codec": options.codec,
        "policy": options.policy,
        "seed": options.sampling.seed,
        "temperature": options.sampling.temperature,
        "top_p": options.sampling.top_p,
    }


def report(result: dict) -> str:
    """The ledger as text of at most 80 columns."""
    sent, received = result["bytes_per_token"]["sent"], result["bytes_per_token"]["received"]
    joules = result["joules_per_token"]
    parts = result["joules"]
    energy = [
        f"{'joules unknown' if parts is None else 'joules'}: {name}: {reason}"
        for name, reason in result["joules_unknown"].items()
    ]
    if parts is not None:
        energy.append(f"{joules:.3f} J/token ({result['joules_provenance']}; boards, idle power included)")
        if parts["compute"] is not None:
            energy.append(f"{parts['total']:.2f} J: " + ", ".join(f"{kind} {parts[kind]:.2f}" for kind in ledger.KINDS))
    lines = [
        f"{result['tokens']} tokens, {result['tokens_per_s']:.1f} tokens/s, first after {result['ttft_s'] * 1e3:.0f} ms",
        f"{sent:.0f} bytes/token to the experts, {received:.0f} back ({result['codec']})",
        *energy,
        "ms/token: " + ", ".join(f"{name} {value:.2f}" for name, value in result["breakdown_ms"].items()),
        "",
        f"{'node':16}{'served':>8}{'temp °C':>9}{'power W':>9}{'J':>8}  provenance",
    ]
    for node in result["nodes"]:
        cells = ["-" if node[key] is None else f"{node[key]:.1f}" for key in ("temp_c", "power_w", "energy_j")]
        lines.append(f"{node['id']:16}{node['served']:>8}{cells[0]:>9}{cells[1]:>9}{cells[2]:>8}  {node['provenance']}")
    ladder = result["ladder"]
    lines.append(
        "ladder: "
        + (", ".join(f"{rung} {count}" for rung, count in ladder.items()) if ladder else "no fallback was needed")
    )
    parity = result["parity"]
    if parity is not None:
        verdict = {True: "equal", False: "DIFFERENT", None: "not comparable"}[parity["equal"]]
        lines.append(
            f"parity with one process: {verdict}, {parity['tokens_equal']} of {parity['tokens']} tokens, "
            f"largest logit difference {parity['max_logit_diff']:g}"
        )
    if result["load_average"] > BUSY_SHARE * result["cores"]:
        lines.append(
            f"the machine was busy before this began (load {result['load_average']:.1f} on {result['cores']} cores):\n"
            "speed, and with it joules per token, say little"
        )
    if "scenario" in result:
        from ground_station import scenario_demo

        lines += ["", scenario_demo.table(result["scenario"])]
    return "\n".join(lines)
