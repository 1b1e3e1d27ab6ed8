"""Placement judged without boards: gap of `budgeted` to the exact optimum on random small fleets, all policies beside it, and how much
of a bundle's gate mass stays reachable with half of the nodes out of contact. Memory is at most 1.25 times one 8-bit copy.

Leaves out: real fleets (spacemoe plan), moving shards.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from ground_station import placement_exact
from ground_station import placement_problem as pp
from ground_station.placement import PlacementError
from ground_station.placement_budgeted import budgeted
from ground_station.placement_policies import BASELINES, place
from ground_station.placement_routing import popularity, routing_sets
from ground_station.plan import coverage
from ground_station.plan_fleet import Fleet, Node, problem
from node_agent.shard import read_manifest

MEMORY_RATIO = 1.25
TOP_K = 2


def instance(seed: int) -> pp.Problem:
    """A random small fleet: 3 or 4 nodes of different memory, speed, path, heat and battery, 6 to 10 experts, two precisions.

    With or without a second scenario in which given nodes are out of contact, with or without time in which any half is; every
    third with something held already. So small that the optimum can be proved.
    """
    rng = np.random.default_rng([seed, 4])
    nodes, layers, scenarios = (int(rng.integers(*span)) for span in ((3, 5), (1, 3), (1, 3)))
    experts = int(rng.integers(6, 9) if layers == 1 else rng.integers(4, 6))
    use = np.stack([popularity(experts, TOP_K, 0.6, rng) for _ in range(layers)])
    sets = [routing_sets(row, TOP_K) for row in use]
    sizes = np.array([172_000, 96_000])
    joules = np.array([4.0e-3, 3.6e-3])
    fleet = int(MEMORY_RATIO * layers * experts * sizes[0])
    tokens_per_s = 10.0
    need_w = tokens_per_s * layers * TOP_K * joules[0]
    path = np.broadcast_to(rng.uniform(1.0, 8.0, nodes), (scenarios, layers, nodes)).copy()
    if scenarios == 2:
        path[1][:, pp.halves(nodes, 1, seed)[0]] = np.inf
    horizon_s = 5739.0
    task = pp.Problem(
        use=use,
        mass=use / TOP_K,
        sets=np.stack([s for s, _ in sets]),
        weights=np.stack([w for _, w in sets]),
        variants=("int8", "int4"),
        bytes=sizes,
        ms=np.array([1.0, 0.9]),
        joules=joules,
        error=np.array([0.012, 0.086]),
        nodes=tuple(f"n{i + 1}" for i in range(nodes)),
        memory=(rng.dirichlet(np.full(nodes, 8.0)) * fleet * 1.2).astype(np.int64),
        speed=rng.choice([0.5, 1.0, 2.0], nodes),
        limit_w=rng.dirichlet(np.full(nodes, 5.0)) * need_w * 1.8,
        energy_j=rng.dirichlet(np.full(nodes, 5.0)) * need_w * 2.5 * horizon_s,
        path_ms=path,
        chances=np.array([0.8, 0.2] if scenarios == 2 else [1.0]),
        tokens_per_s=tokens_per_s,
        horizon_s=horizon_s,
        fleet_bytes=fleet,
        successive=rng.integers(0, 100, (layers - 1, experts, experts)),
        dark_share=float(rng.choice([0.0, 0.02])),
    )
    if seed % 3 == 0:
        try:
            task = replace(task, held=frozenset(place("roundrobin", task).copies))
        except PlacementError:
            pass  # no room in that order: nothing is held
    return task


def gaps(count: int, seed: int, time_limit_s: float) -> dict:
    """budgeted against the exact programme on `count` instances.

    `gap`: to the best placement that the programme found (and proved, in `solved` cases); `gap_to_bound`: to its lower bound, which
    nothing can be under, also where it ran out of time.
    """
    rows = []
    broken = dict.fromkeys(BASELINES, 0)
    for number in range(seed, seed + count):
        task = instance(number)
        began = time.process_time()
        ours = pp.evaluate(task, budgeted(task, seed))
        took = time.process_time() - began
        exact = placement_exact.solve(task, time_limit_s)
        best = pp.evaluate(task, exact.placement)
        policies = {}
        for name in BASELINES:
            try:
                found = pp.evaluate(task, place(name, task, number))
                policies[name] = found.objective_ms / ours.objective_ms
                broken[name] += bool(found.violations)
            except PlacementError:
                policies[name] = None  # does not fit
        rows.append(
            {
                "seed": number,
                "nodes": len(task.nodes),
                "experts": task.layers * task.experts,
                "scenarios": len(task.chances),
                "objective_ms": round(ours.objective_ms, 4),
                "exact_ms": round(best.objective_ms, 4),
                "bound_ms": round(exact.bound_ms, 4),
                "gap": round(ours.objective_ms / best.objective_ms - 1.0, 5),
                "gap_to_bound": round(ours.objective_ms / exact.bound_ms - 1.0, 5),
                "solved": exact.solved,
                "within_bounds": not ours.violations,
                "memory_ratio": round(ours.store_bytes / (task.layers * task.experts * int(task.bytes[0])), 4),
                "cpu_s": round(took, 2),
                "others": {k: None if v is None else round(v, 3) for k, v in policies.items()},
            }
        )
    gap = [row["gap"] for row in rows]
    solved = [row["gap"] for row in rows if row["solved"]]
    others = {name: [row["others"][name] for row in rows if row["others"][name] is not None] for name in BASELINES}
    return {
        "n": count,
        "solved": len(solved),
        "gap_mean": round(float(np.mean(gap)), 5),
        "gap_max": round(max(gap), 5),
        "gap_to_bound_mean": round(float(np.mean([row["gap_to_bound"] for row in rows])), 5),
        "gap_to_bound_max": round(max(row["gap_to_bound"] for row in rows), 5),
        "within_bounds": sum(row["within_bounds"] for row in rows),
        "memory_ratio_max": max(row["memory_ratio"] for row in rows),
        "others_over_budgeted": {
            name: {
                "median": round(float(np.median(found)), 3),
                "min": min(found),
                "n": len(found),
                "broke_bounds": broken[name],
            }
            if found
            else None
            for name, found in others.items()
        },
        "instances": rows,
    }


def half_dark(bundle: Path, nodes: int, ratio: float = MEMORY_RATIO) -> dict:
    """Gate mass of a bundle reachable while a random half of `nodes` equal nodes is out of contact, per policy, at equal memory."""
    manifest = read_manifest(bundle)
    whole = problem(bundle, manifest, Fleet((Node("n1", 1e6),)))[0]
    fleet_mb = ratio * whole.layers * whole.experts * int(whole.bytes[0]) / 1e6
    # each node can take a little more than its even share: whole copies do not divide evenly
    each = math.ceil(fleet_mb * 1.05 / nodes * 1e6) / 1e6
    fleet = Fleet(tuple(Node(f"n{i + 1}", each) for i in range(nodes)), fleet_mb=fleet_mb, dark_share=0.5)
    task = problem(bundle, manifest, fleet)[0]
    result = {}
    for name in ("roundrobin", "eplb", "hotcore", "ring", "budgeted"):
        placement = place(name, task)
        found = pp.evaluate(task, placement)
        result[name] = {
            **{key: round(value, 4) for key, value in coverage(task, placement, 400, seed=99).items()},
            "experts_with_two_copies": sum(
                sum(c[:2] == key for c in placement.copies) > 1 for key in {c[:2] for c in placement.copies}
            ),
            "int4": sum(task.variants[c.variant] == "int4" for c in placement.copies),
            "copies": len(placement.copies),
            "memory_ratio": round(found.store_bytes / (task.layers * task.experts * int(task.bytes[0])), 4),
        }
    pair = 1.0 - (nodes // 2) * (nodes // 2 - 1) / (nodes * (nodes - 1))
    return {"nodes": nodes, "memory_ratio": ratio, "two_copies_each_mean": round(pair, 4), "policies": result}


def run(bundle: Path, count: int = 20, seed: int = 0, time_limit_s: float = 30.0, nodes: int = 8) -> dict:
    """Both parts.  Raises: PlacementError, shard.BundleError."""
    return {"gap": gaps(count, seed, time_limit_s), "half_dark": half_dark(bundle, nodes)}


def report(result: dict) -> str:
    """Sentences and two tables."""
    gap, dark = result["gap"], result["half_dark"]
    lines = [
        f"budgeted against the exact optimum on {gap['n']} random small fleets ({gap['solved']} proved optimal):",
        f"  gap mean {gap['gap_mean']:.2%}, largest {gap['gap_max']:.2%}; to the proved bound {gap['gap_to_bound_max']:.2%} at most",
        f"  memory at most {gap['memory_ratio_max']:.2f} times one 8-bit copy; objective of others / budgeted (median, n):",
    ]
    for name, row in gap["others_over_budgeted"].items():
        text = f"{row['median']:8.2f}{row['n']:5}   broke bounds in {row['broke_bounds']}" if row else "   fits none"
        lines.append(f"    {name:12}{text}")
    lines.append(
        f"half of {dark['nodes']} nodes out of contact, {dark['memory_ratio']:g} times one 8-bit copy, gate mass reachable:"
    )
    lines.append(f"    {'':12}{'mean':>8}{'least layer':>13}{'copies':>8}{'int4':>6}{'memory':>8}")
    for name, row in dark["policies"].items():
        lines.append(
            f"    {name:12}{row['mean']:8.1%}{row['least_layer']:13.1%}{row['copies']:8}{row['int4']:6}{row['memory_ratio']:8.2f}"
        )
    lines.append(
        f"    two copies of everything on different nodes would give {dark['two_copies_each_mean']:.1%} on average"
    )
    return "\n".join(lines)
