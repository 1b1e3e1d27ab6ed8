"""How perplexity rises as nodes go out of contact, with a fleet memory of 1.25 times one 8-bit copy of the experts.

Nodes fly in a ring, so those out of contact at one moment are neighbours: an arc. A placement that is told so (the arcs as its scenarios)
keeps the two copies of an expert on nodes that are never out together. Random subsets of the nodes are played beside the arcs, and
round robin beside the placement. Selection is `budgeted` without prices: what is out of reach is replaced by the router's next choice.
Leaves out: how long contacts last, and moving shards before they end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ground_station import dispatch, evaluate, selection
from ground_station import placement_problem as pp
from ground_station.experiment_text import Rehearsal, joined, passages
from ground_station.placement_policies import place
from ground_station.placement_serving import holdings
from ground_station.plan_fleet import Fleet, Node, problem
from ground_station.selection_world import PRECISIONS, Calibration, World
from ground_station.text import Text
from node_agent import frame, shard

MEMORY_RATIO = 1.25
BATCH_TOKENS = 64
PLACEMENTS = ("budgeted", "roundrobin")


def arcs(nodes: int, out: int) -> np.ndarray:
    """bool [nodes, nodes]: each row an arc of `out` neighbours of the ring that are out of contact."""
    return (np.arange(nodes)[None, :] - np.arange(nodes)[:, None]) % nodes < out


def subsets(nodes: int, out: int, count: int, seed: int) -> np.ndarray:
    """bool [count, nodes]: random nodes out of contact."""
    rng = np.random.default_rng([seed, out])
    return np.array([rng.permutation(nodes) < out for _ in range(count)])


def fleet(bundle: Path, manifest: shard.Manifest, nodes: int) -> pp.Problem:
    """Equal nodes that together hold MEMORY_RATIO copies in int8, with the arcs of half of them as equally likely scenarios."""
    whole = problem(bundle, manifest, Fleet((Node("n1", 1e6),)))[0]
    fleet_mb = MEMORY_RATIO * whole.layers * whole.experts * int(whole.bytes[0]) / 1e6
    # each node can take a little more than its even share: whole copies do not divide evenly
    each_mb = math.ceil(fleet_mb * 1.05 / nodes * 1e6) / 1e6
    task = problem(bundle, manifest, Fleet(tuple(Node(f"n{i + 1}", each_mb) for i in range(nodes)), fleet_mb=fleet_mb))[
        0
    ]
    path = np.repeat(task.path_ms[:1], nodes, axis=0)
    for scenario, out in enumerate(arcs(nodes, nodes // 2)):
        path[scenario][:, out] = np.inf
    return replace(task, path_ms=path, chances=np.full(nodes, 1.0 / nodes))


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
    if nodes < 4 or nodes % 2 or nodes > 64:
        raise ValueError(f"{nodes} nodes: give an even number from 4 to 64")
    manifest = shard.read_manifest(bundle)
    start = manifest.bos_id if manifest.bos_id is not None else next(iter(manifest.eos_ids), None)
    if start is None:
        raise ValueError(f"{bundle} names no begin- or end-of-text token: cannot start a text")
    documents = [text for texts in evaluate.domains(bundle.parent / "heldout").values() for text in texts]
    texts = passages(Text(bundle, manifest), documents, start, tokens, np.random.default_rng(seed))
    calibration = Calibration.load(bundle / "calibration.npz", manifest.moe_layers, manifest.dims.experts)
    task = fleet(bundle, manifest, nodes)
    names = {}
    for name in PLACEMENTS:
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
            for kind, masks in (("arc", arcs(nodes, out)), ("random", subsets(nodes, out, draws, seed))):
                if out == 0:
                    masks = masks[:1]
                row[kind] = _played(rehearsal, world, masks[:, order], manifest, calibration)
                progress()
            rows.append(row)
        names[name] = {
            "memory_ratio": round(found.store_bytes / (task.layers * task.experts * int(task.bytes[0])), 4),
            "copies": len(placement.copies),
            "int4": sum(task.variants[copy.variant] == "int4" for copy in placement.copies),
            "rows": rows,
        }
    return {"nodes": nodes, "tokens": rehearsal.batches * BATCH_TOKENS, "seed": seed, "limit": 1.5, "placements": names}


def _played(
    rehearsal: Rehearsal, world: World, masks: np.ndarray, manifest: shard.Manifest, calibration: Calibration
) -> dict:
    """Over all masks: perplexity ratios, and what became of the gate mass of the model's own choice."""
    ratios, coverage, lower, n = [], [], [], 0
    dims = manifest.dims
    for out in masks:
        policy = selection.make("budgeted", manifest.routing, dims.top_k, dims.experts, calibration=calibration)
        playing = rehearsal.play(policy)
        here = world.changed(up=~out)
        batch = joined([playing.next(here) for _ in range(rehearsal.batches)])
        ratios.append(math.exp(float(np.nanmean(batch.nats))))
        coverage.append(float(batch.coverage.mean()))
        runs = batch.runs.sum(0)
        lower.append(float(runs[frame.PRECISION_ID["int4"]] / max(runs.sum(), 1)))
        n += 1
    return {
        "n": n,
        "perplexity_ratio": {
            "mean": round(float(np.mean(ratios)), 4),
            "min": round(min(ratios), 4),
            "max": round(max(ratios), 4),
        },
        "own_gate_mass": round(float(np.mean(coverage)), 4),
        "runs_in_int4": round(float(np.mean(lower)), 4),
    }


def report(result: dict) -> str:
    """A table per placement."""
    lines = [
        f"{result['nodes']} nodes in a ring, {result['tokens']} tokens of held-out text; "
        "perplexity over the unconstrained model's, mean (max)"
    ]
    for name, found in result["placements"].items():
        lines.append(
            f"{name}: {found['copies']} copies, {found['int4']} of them int4, {found['memory_ratio']:g} times one 8-bit copy"
        )
        lines.append(f"  {'out':>3} {'arc of neighbours':>20} {'own gates':>9} {'random nodes':>20} {'own gates':>9}")
        for row in found["rows"]:
            cells = [
                f"{row[kind]['perplexity_ratio']['mean']:10.3f} ({row[kind]['perplexity_ratio']['max']:.3f})"
                for kind in ("arc", "random")
            ]
            masses = [f"{row[kind]['own_gate_mass']:.1%}" for kind in ("arc", "random")]
            lines.append(f"  {row['out']:>3} {cells[0]:>20} {masses[0]:>9} {cells[1]:>20} {masses[1]:>9}")
    lines.append("own gates: least share over the layers of the model's own gates that was run, mean over tokens")
    return "\n".join(lines)
