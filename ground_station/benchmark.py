"""`spacemoe benchmark decode`: one process beside four agents, interleaved, with a breakdown of the distributed token.

Three contenders decode the same tokens of the same bundle in turn, round after round: `bare` (a plain onnxruntime loop
written out here, the control), `single` (the kit in one process, both cores, no network) and `distributed` (trunk here,
experts on agents over ZeroMQ). Figures are ratios per round: median, minimum and maximum. Agents publish their telemetry
to a broker as always: its cost is part of the figure. Agents share the machine's cores, and the dispatcher is told which ones.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np

from ground_station import rates, selection
from ground_station.broker import Broker
from ground_station.decode import Decoder, TokenCost
from ground_station.dispatch import Table
from ground_station.link import Link
from ground_station.local import LocalExperts
from ground_station.local_fleet import LocalFleet, cores_of
from ground_station.placement import round_robin
from ground_station.remote import RemoteExperts
from ground_station.run_folder import run_folder
from ground_station.trunk import Trunk
from node_agent import compress, routing, shard

PROMPT_TOKENS = 16


class BareLoop:
    """The control: nothing but onnxruntime calls and numpy, for models with softmax or top-k routing."""

    def __init__(self, decoder: Decoder, sessions: dict[tuple[int, int, int], object], rule: shard.Routing, top_k: int):
        self.decoder, self.sessions, self.rule, self.top_k = decoder, sessions, rule, top_k
        self.by_layer = {(layer, expert): session for (layer, expert, _), session in sessions.items()}

    def moe(self, layer: int, hidden: np.ndarray, logits: np.ndarray) -> np.ndarray:
        experts = routing.largest(logits, self.top_k)
        gates = routing.gates_of(logits, experts, self.rule)
        out = np.zeros_like(hidden)
        if len(hidden) == 1:
            for expert, gate in zip(experts[0].tolist(), gates[0]):
                out += gate * self.by_layer[layer, expert].run(["y"], {"x": hidden})[0]
            return out
        for expert in np.unique(experts).tolist():
            rows, column = np.nonzero(experts == expert)
            y = self.by_layer[layer, expert].run(["y"], {"x": hidden[rows]})[0]
            out[rows] += gates[rows, column][:, None] * y
        return out

    def run(self, prompt: list[int], tokens: int) -> float:
        """Seconds per decoded token, prefill not counted."""
        sequence = self.decoder.trunk.sequence(len(prompt) + tokens)
        token = int(sequence.prefill(prompt, self.moe).argmax())
        started = time.perf_counter()
        for _ in range(tokens - 1):
            token = int(sequence.step(token, self.moe).argmax())
        return (time.perf_counter() - started) / (tokens - 1)


def _decode(decoder: Decoder, prompt: list[int], tokens: int) -> tuple[float, list[TokenCost]]:
    costs = list(decoder.generate(prompt, tokens, ignore_eos=True))[1:]
    return sum(cost.total_ms for cost in costs) / len(costs) / 1e3, costs


def _spread(values: list[float]) -> dict:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "n": len(values),
    }


def decode(
    bundle: Path,
    precision: str,
    codec: str = "fp32",
    nodes: int = 4,
    copies: int = 2,
    tokens: int = 32,
    rounds: int = 15,
    threads: int = 2,
    distributed_threads: int = 2,
    policy: str = "topk",
) -> dict:
    """The figures of `spacemoe benchmark decode --json`.

    copies: nodes that hold each expert; the dispatcher spreads a layer's work over them.
    threads: of the single process and the control; distributed_threads: of the trunk while agents share the machine.
    Raises: shard.BundleError, local_fleet.FleetError, placement.PlacementError.
    """
    from tqdm import tqdm

    if codec not in compress.CODECS:
        raise ValueError(f"codec {codec!r} is unknown: use one of {', '.join(compress.CODECS)}")
    if tokens < 2:
        raise ValueError("a round needs at least 2 tokens: the first one belongs to the prefill")
    manifest = shard.read_manifest(bundle)
    allocator = rates.for_codec(codec, bundle, manifest)
    dims = manifest.dims
    rule = selection.make(policy, manifest.routing, dims.top_k, dims.experts)
    prompt = np.random.default_rng(0).integers(2, dims.vocab, PROMPT_TOKENS).tolist()
    alone = Table(round_robin(manifest, {"local": 2**62}, precision))
    experts = LocalExperts(bundle, manifest, alone, None, threads, spin=True)
    single = Decoder(Trunk(bundle, manifest, threads, spin=True), rule, experts)
    bare = BareLoop(single, experts.sessions, manifest.routing, dims.top_k)
    names = [f"node-{index + 1}" for index in range(nodes)]
    holdings = round_robin(manifest, dict.fromkeys(names, 2**62), precision, (precision,) * (copies - 1))
    times: dict[str, list[float]] = {"bare": [], "single": [], "distributed": []}
    costs: dict[str, list[TokenCost]] = {"single": [], "distributed": []}
    with run_folder("benchmark") as run_dir, Link() as link:
        with (
            Broker(run_dir) as broker,
            LocalFleet(run_dir, bundle, holdings, link.endpoint, (broker.host, broker.port)) as fleet,
        ):
            fleet.wait_joined(link)
            remote = RemoteExperts(link, Table(holdings, cores_of(names)), codec, None, 5.0, allocator)
            distributed = Decoder(
                Trunk(bundle, manifest, distributed_threads, spin=distributed_threads > 1), rule, remote
            )
            contenders = {
                "bare": lambda: bare.run(prompt, tokens),
                "single": lambda: _decode(single, prompt, tokens),
                "distributed": lambda: _decode(distributed, prompt, tokens),
            }
            for index in tqdm(range(rounds + 1), desc="benchmark", disable=None, leave=False):
                order = list(contenders)[index % 3 :] + list(contenders)[: index % 3]
                for name in order:
                    result = contenders[name]()
                    if index == 0:
                        continue  # warm-up
                    if name != "bare":
                        costs[name] += result[1]
                        result = result[0]
                    times[name].append(result)
    parts = {
        name: {
            part: round(statistics.median(getattr(cost, f"{part}_ms") for cost in rows), 4)
            for part in ("total", "trunk", "select", "codec", "wire", "expert")
        }
        for name, rows in costs.items()
    }
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bundle": manifest.name,
        "shape": [dims.hidden, dims.intermediate, len(manifest.moe_layers), dims.experts, dims.top_k],
        "precision": precision,
        "trunk_precision": manifest.trunk_precision,
        "codec": codec,
        "nodes": nodes,
        "cores_of_agents": len(set(cores_of(names).values())),
        "copies_per_expert": copies,
        "tokens_per_round": tokens - 1,
        "n": rounds,
        "tokens_per_s": {name: round(1 / seconds, 2) for name, seconds in median.items()},
        "ratio": round(statistics.median(s / d for s, d in zip(times["single"], times["distributed"])), 4),
        "spread": _spread([s / d for s, d in zip(times["single"], times["distributed"])]),
        "control": round(statistics.median(b / s for b, s in zip(times["bare"], times["single"])), 4),
        "control_spread": _spread([b / s for b, s in zip(times["bare"], times["single"])]),
        "overhead_ms_per_layer": round((median["distributed"] - median["single"]) * 1e3 / len(manifest.moe_layers), 4),
        "breakdown_ms": parts["distributed"],
        "breakdown_single_ms": {part: parts["single"][part] for part in ("total", "trunk", "select", "expert")},
        "bytes_per_token": {
            "sent": round(statistics.mean(cost.sent_bytes for cost in costs["distributed"]), 1),
            "received": round(statistics.mean(cost.received_bytes for cost in costs["distributed"]), 1),
        },
        "ladder": sum(len(cost.rungs) for cost in costs["distributed"]),
    }
