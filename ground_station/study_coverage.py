"""How perplexity rises as nodes go out of contact, with a fleet memory of 1.25 times one 8-bit copy of the experts.

Nodes fly in a ring, so those out of contact at one moment are often neighbours: an arc. `budgeted` is told so (the arcs as its
scenarios) and keeps the two copies of an expert on nodes that are never out together. `coverage` expects any half and lets int2
copies stand in; round robin knows nothing. Each plays all arcs, random subsets of the nodes, and every half that there is.
Selection is `budgeted` without prices: what is out of reach is replaced by the router's next choice.

The ladder's rungs are counted over the experts that the model's router chooses (K per token and layer): the copy that is first in the
table; another of the same precision; one of a lower precision; a similar expert in its place; nothing.
Leaves out: how long contacts last, and moving shards before they end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ground_station import dispatch, evaluate, selection
from ground_station import placement_problem as pp
from ground_station.experiment_text import Rehearsal, joined, passages
from ground_station.placement_coverage import MOST_HALVES, all_halves
from ground_station.placement_policies import place
from ground_station.placement_serving import holdings
from ground_station.plan_fleet import Fleet, Node, problem
from ground_station.selection_world import PRECISIONS, Calibration, World
from ground_station.text import Text
from node_agent import routing, shard

MEMORY_RATIO = 1.25
BATCH_TOKENS = 64
PLACEMENTS = ("coverage", "budgeted", "roundrobin")
DARK_SHARE = 0.5  # of the time, as `coverage` is told; the arcs are no part of its problem
RUNGS = ("primary", "replica", "lower_precision", "similar_expert", "skipped")


def arcs(nodes: int, out: int) -> np.ndarray:
    """bool [nodes, nodes]: each row an arc of `out` neighbours of the ring that are out of contact."""
    return (np.arange(nodes)[None, :] - np.arange(nodes)[:, None]) % nodes < out


def subsets(nodes: int, out: int, count: int, seed: int) -> np.ndarray:
    """bool [count, nodes]: random nodes out of contact."""
    rng = np.random.default_rng([seed, out])
    return np.array([rng.permutation(nodes) < out for _ in range(count)])


class Laddered:
    """A policy whose choices are counted by rung. `counts` [RUNGS]: experts of the model's own choice, over tokens and layers."""

    def __init__(self, policy: selection.Policy, table: dispatch.Table, top_k: int):
        self.policy, self.table, self.top_k = policy, table, top_k
        self.counts = np.zeros(len(RUNGS), np.int64)
        self._rungs: dict[int, np.ndarray] = {}

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> selection.Choice:
        choice = self.policy(layer, logits, world)
        own = np.zeros(logits.shape, bool)
        np.put_along_axis(own, routing.largest(logits, self.top_k), True, 1)
        up = world.up.tolist()
        named = None if choice.nodes is None else dispatch.Named(choice.nodes, choice.precisions).among(up)
        assign = partial(dispatch.assign, self.table, usable=up)
        rungs, before = self._of(layer, logits.shape[1]), int(self.counts[:4].sum())
        for item in dispatch.split(layer, choice.experts, choice.gates, assign, named):  # as the rehearsal divides it
            expert = item.pairs["expert"]
            rows = item.pairs["row"] if item.rows is None else item.rows[item.pairs["row"]]
            rung = np.where(own[rows, expert], rungs[expert, item.node, item.pairs["precision"]], 3)
            self.counts[:4] += np.bincount(rung, minlength=4)
        self.counts[4] += own.sum() - (int(self.counts[:4].sum()) - before)
        return choice

    def _of(self, layer: int, experts: int) -> np.ndarray:
        """Rung int [E, N, P] of each copy."""
        if layer not in self._rungs:
            rungs = np.full((experts, len(self.table.nodes), PRECISIONS), 2)
            for expert in range(experts):
                copies = self.table.copies[layer, expert]
                for node, precision in copies:
                    if precision == copies[0][1]:
                        rungs[expert, node, precision] = 1
                rungs[expert][copies[0]] = 0
            self._rungs[layer] = rungs
        return self._rungs[layer]


def fleet(bundle: Path, manifest: shard.Manifest, nodes: int, with_arcs: bool) -> pp.Problem:
    """Equal nodes that together hold MEMORY_RATIO copies in int8; with the arcs of half of them as equally likely scenarios, or
    any half of them out of contact for DARK_SHARE of the time.

    Raises: ValueError for a bundle without int8.
    """
    if "int8" not in manifest.precisions:
        raise ValueError(f"bundle {manifest.name} has no int8 shards, by which memory is measured: quantize it again")
    whole = problem(bundle, manifest, Fleet((Node("n1", 1e6),)))[0]
    fleet_mb = MEMORY_RATIO * whole.layers * whole.experts * int(whole.bytes[whole.variants.index("int8")]) / 1e6
    # each node can take a little more than its even share: whole copies do not divide evenly
    each_mb = math.ceil(fleet_mb * 1.05 / nodes * 1e6) / 1e6
    alike = tuple(Node(f"n{i + 1}", each_mb) for i in range(nodes))
    task = problem(bundle, manifest, Fleet(alike, fleet_mb=fleet_mb))[0]
    if not with_arcs:
        return replace(task, dark_share=DARK_SHARE)
    path = np.repeat(task.path_ms[:1], nodes, axis=0)
    for scenario, out in enumerate(arcs(nodes, nodes // 2)):
        path[scenario][:, out] = np.inf
    return replace(task, path_ms=path, chances=np.full(nodes, 1.0 / nodes))


def check(nodes: int) -> None:
    """Raises: ValueError for an odd, small or large number of nodes."""
    if nodes < 4 or nodes % 2 or nodes > 64:
        raise ValueError(f"{nodes} nodes: give an even number from 4 to 64")


def run(
    bundle: Path,
    nodes: int = 8,
    tokens: int = 2048,
    draws: int = 12,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict:
    """Perplexity ratios to the unconstrained model, per placement and number of nodes out.

    Raises: ValueError for an odd or small number of nodes; PlacementError, shard.BundleError, experiment_text.TextTooShort.
    """
    check(nodes)
    manifest = shard.read_manifest(bundle)
    start = manifest.bos_id if manifest.bos_id is not None else next(iter(manifest.eos_ids), None)
    if start is None:
        raise ValueError(f"{bundle} names no begin- or end-of-text token: cannot start a text")
    documents = [text for texts in evaluate.domains(bundle.parent / "heldout").values() for text in texts]
    texts = passages(Text(bundle, manifest), documents, start, tokens, np.random.default_rng(seed))
    calibration = Calibration.load(bundle / "calibration.npz", manifest.moe_layers, manifest.dims.experts)
    names = {}
    for name in PLACEMENTS:
        task = fleet(bundle, manifest, nodes, with_arcs=name != "coverage")
        placement = place(name, task, seed)
        found = pp.evaluate(task, placement)
        table = dispatch.Table(holdings(task, placement, manifest.moe_layers))
        rehearsal = Rehearsal(bundle, manifest, table, texts, BATCH_TOKENS)
        order = np.array(
            [int(node[1:]) - 1 for node in table.nodes]
        )  # the table's nodes are in the order of their names
        world = World.of(table, manifest.dims.experts, np.full(PRECISIONS, 1e-3), np.ones(PRECISIONS))
        rows = []
        for out in range(nodes // 2 + 2):
            row: dict = {"out": out}
            for kind, masks in _masks(nodes, out, draws, seed).items():
                row[kind] = _played(rehearsal, world, masks[:, order], manifest, calibration, progress)
            rows.append(row)
        names[name] = {
            "memory_ratio": round(
                found.store_bytes / (task.layers * task.experts * int(task.bytes[task.variants.index("int8")])), 4
            ),
            "copies": {
                precision: sum(copy.variant == v for copy in placement.copies)
                for v, precision in enumerate(task.variants)
            },
            "rows": rows,
        }
    return {"nodes": nodes, "tokens": rehearsal.batches * BATCH_TOKENS, "seed": seed, "limit": 1.5, "placements": names}


def _masks(nodes: int, out: int, draws: int, seed: int) -> dict[str, np.ndarray]:
    """By kind, bool [n, nodes]: what is out of contact."""
    kinds = {"arc": arcs(nodes, out), "random": subsets(nodes, out, draws, seed)}
    if out == nodes // 2 and math.comb(nodes, out) <= MOST_HALVES:
        kinds["every"] = all_halves(nodes)
    return kinds if out else {kind: masks[:1] for kind, masks in kinds.items()}


def plays(nodes: int, draws: int) -> int:
    """How often `run` reads the text: its progress goes so far."""
    outs = range(nodes // 2 + 2)
    return len(PLACEMENTS) * sum(len(masks) for out in outs for masks in _masks(nodes, out, draws, 0).values())


def _played(
    rehearsal: Rehearsal,
    world: World,
    masks: np.ndarray,
    manifest: shard.Manifest,
    calibration: Calibration,
    progress: Callable[[], None],
) -> dict:
    """Over all masks: perplexity ratios, and what became of the model's own choice."""
    ratios, coverage, rungs = [], [], np.zeros(len(RUNGS))
    dims = manifest.dims
    for out in masks:
        policy = selection.make("budgeted", manifest.routing, dims.top_k, dims.experts, calibration=calibration)
        policy = Laddered(policy, rehearsal.table, dims.top_k)
        playing = rehearsal.play(policy)
        here = world.changed(up=~out)
        batch = joined([playing.next(here) for _ in range(rehearsal.batches)])
        ratios.append(math.exp(float(np.nanmean(batch.nats))))
        coverage.append(float(batch.coverage.mean()))
        rungs += policy.counts
        progress()
    return {
        "n": len(ratios),
        "perplexity_ratio": {
            "mean": round(float(np.mean(ratios)), 4),
            "min": round(min(ratios), 4),
            "max": round(max(ratios), 4),
        },
        "own_gate_mass": round(float(np.mean(coverage)), 4),
        "rungs": dict(zip(RUNGS, np.round(rungs / rungs.sum(), 4).tolist())),
    }


def report(result: dict) -> str:
    """A table per placement."""
    lines = [
        f"{result['nodes']} nodes in a ring, {result['tokens']} tokens of held-out text; "
        "perplexity over the unconstrained model's, mean (max)"
    ]
    half = result["nodes"] // 2
    for name, found in result["placements"].items():
        copies = ", ".join(f"{count} {precision}" for precision, count in found["copies"].items() if count)
        lines.append(f"{name}: copies: {copies}; {found['memory_ratio']:g} times one 8-bit copy")
        lines.append(f"  {'out':>3} {'arc of neighbours':>20} {'own gates':>9} {'random nodes':>20} {'own gates':>9}")
        for row in found["rows"]:
            cells = [_ratio(row[kind]) for kind in ("arc", "random")]
            masses = [f"{row[kind]['own_gate_mass']:.1%}" for kind in ("arc", "random")]
            lines.append(f"  {row['out']:>3} {cells[0]:>20} {masses[0]:>9} {cells[1]:>20} {masses[1]:>9}")
        if "every" in found["rows"][half]:
            every = found["rows"][half]["every"]
            lines.append(f"  {half:>3} out, every half ({every['n']}): {_ratio(every).strip()}")
        lines.append(f"  {'rungs':>7} {'primary':>8} {'replica':>8} {'lower':>8} {'similar':>8} {'skipped':>8}")
        for row in found["rows"]:
            shares = " ".join(f"{row['random']['rungs'][rung]:8.1%}" for rung in RUNGS)
            lines.append(f"  {row['out']:>3} out {shares}")
    lines.append("own gates: least share over the layers of the model's own gates that was run, mean over tokens")
    lines.append("rungs (random nodes): what became of the experts that the router chose")
    return "\n".join(lines)


def _ratio(cell: dict) -> str:
    return f"{cell['perplexity_ratio']['mean']:10.3f} ({cell['perplexity_ratio']['max']:.3f})"
