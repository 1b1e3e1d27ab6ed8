"""`spacemoe plan`: a placement before it is carried out: who would hold what, expected latency, and what binds, in words.

What binds is found by asking what a little more of it would be worth: each bound is relaxed by a quarter (memory at least by one
more copy; four times where work is left undone and a quarter does not help), first kind by kind, then node by node, and the
placement improved from where it stands. Leaves out: moving anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ground_station import placement_exact
from ground_station import placement_problem as pp
from ground_station.placement import EMERGENCY
from ground_station.placement_budgeted import improved
from ground_station.placement_policies import place, without_emergency
from ground_station.plan_fleet import Fleet, problem
from node_agent.shard import read_manifest

RELAXED = 1.25
LARGE = 4.0
MAX_TRIED = 8  # nodes of one kind, the tightest first
LEAST_GAIN = 0.002  # of the objective: less is not called binding
COVERAGE_DRAWS = 200
EXACT_S = 60.0  # that the exact programme may take
EXACT_GAP = 1e-3  # of the objective: nearer to the bound counts as proved
KINDS = ("memory", "heat", "battery")


@dataclass(frozen=True)
class Binding:
    """A bound, and by how many ms of the objective (and of latency) a placement improves when it is relaxed."""

    kind: str
    node: str | None
    gain_ms: float
    latency_gain_ms: float
    reach_gain: float
    dark_reach_gain: float
    text: str


def tightness(task: pp.Problem, found: pp.Assessment) -> dict[str, np.ndarray]:
    """How near each node's bounds are, [N] per kind: 1 and more where not even the smallest further copy (or use) fits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        spare = np.maximum(task.memory - found.node_bytes, 0)
        memory = np.minimum(task.bytes.min() / np.maximum(spare, 1), 10.0)
        least = float((task.watts_per_use.min(2)[task.use > 0]).min()) if (task.use > 0).any() else 0.0
        heat_w, battery_w = task.limit_w, task.energy_j / task.horizon_s
        result = {"memory": memory}
        for kind, bound, other in (("heat", heat_w, battery_w), ("battery", battery_w, heat_w)):
            near = np.minimum(max(least, 1e-12) / np.maximum(bound - found.watts, 1e-12), 10.0)
            result[kind] = np.where(np.isfinite(bound) & (bound <= other), near, 0.0)
    return result


def relaxed(task: pp.Problem, kind: str, nodes: np.ndarray, factor: float = RELAXED) -> pp.Problem:
    """The problem with more of one kind on some nodes (bool [N]); memory by at least one best copy, and the fleet's too."""
    if kind == "memory":
        more = np.where(nodes, np.maximum(task.memory * (factor - 1), task.bytes.max()), 0).astype(np.int64)
        # a bound on the fleet is asked for apart, unless it is no more than what the nodes hold
        fleet = task.fleet_bytes + (int(more.sum()) if task.fleet_bytes >= task.memory.sum() else 0)
        return replace(task, memory=task.memory + more, fleet_bytes=fleet)
    if kind == "fleet":
        more = max(int(task.fleet_bytes * (factor - 1)), int(task.bytes.max()))
        return replace(task, fleet_bytes=task.fleet_bytes + more)
    name = "limit_w" if kind == "heat" else "energy_j"
    value = getattr(task, name)
    return replace(task, **{name: np.where(nodes, value * factor, value)})


def binding(task: pp.Problem, placement: pp.Placement) -> Binding | None:
    """The bound whose relaxing is worth most, or None when none is worth LEAST_GAIN of the objective."""
    start = placement
    if not any(task.variants[copy.variant] in EMERGENCY for copy in placement.copies):
        task = without_emergency(task)  # what the policy had to choose from
    for _ in range(3):  # what improves without any relaxing must not count as a relaxing's worth
        better = improved(task, start)
        if pp.evaluate(task, better).objective_ms > pp.evaluate(task, start).objective_ms - 1e-6:
            break
        start = better
    base = pp.evaluate(task, start)
    near = tightness(task, base)
    every = np.ones(len(task.nodes), bool)
    least = LEAST_GAIN * base.objective_ms
    offers: list[Binding] = []

    def ask(kind: str, nodes: np.ndarray, node: str | None) -> None:
        wider = relaxed(task, kind, nodes, factor)
        found = pp.evaluate(wider, improved(wider, start))
        gain = base.objective_ms - found.objective_ms
        if gain > least:
            reach = found.reach - base.reach
            text = _words(task, base, kind, node, wider, found, factor)
            dark = found.dark_reach - base.dark_reach
            offers.append(Binding(kind, node, gain, base.latency_ms - found.latency_ms, reach, dark, text))

    for factor in (RELAXED, LARGE):  # noqa: B007 (ask reads it)
        if task.fleet_bytes < task.memory.sum() and task.fleet_bytes - base.store_bytes < task.bytes.max():
            ask("fleet", every, None)
        for kind in KINDS:
            if (near[kind] > 0.5).any():
                ask(kind, near[kind] > 0.5, None)
        if offers or base.reach > 0.9995:
            break  # only where work is left undone and a quarter helps nothing, four times as much is asked for
    if not offers:
        return None
    widest = max(offers, key=lambda offer: offer.gain_ms)
    if widest.kind == "fleet":
        return widest
    offers.clear()
    order = np.argsort(-near[widest.kind], kind="stable")[:MAX_TRIED]
    for number in order:
        if near[widest.kind][number] > 0.5:
            ask(widest.kind, np.arange(len(every)) == number, task.nodes[number])
    # where one node alone brings next to nothing, it is all of them together that bind
    best = max(offers, key=lambda offer: offer.gain_ms, default=widest)
    return best if best.gain_ms >= 0.3 * widest.gain_ms else widest


def _words(
    task: pp.Problem,
    base: pp.Assessment,
    kind: str,
    node: str | None,
    wider: pp.Problem,
    found: pp.Assessment,
    factor: float,
) -> str:
    number = None if node is None else task.nodes.index(node)
    if kind == "memory":
        where = "of the nodes" if number is None else f"of {node}"
        used = base.node_bytes.sum() if number is None else base.node_bytes[number]
        have = task.memory.sum() if number is None else task.memory[number]
        more = (wider.memory - task.memory).sum()
        what = f"memory {where} binds: {used / 1e6:.2f} of {have / 1e6:.2f} MB used; {more / 1e6:.2f} MB more"
    elif kind == "fleet":
        more = wider.fleet_bytes - task.fleet_bytes
        what = (
            f"memory of the fleet binds: {base.store_bytes / 1e6:.2f} of {task.fleet_bytes / 1e6:.2f} MB used; "
            f"{more / 1e6:.2f} MB more"
        )
    else:
        where = "of the nodes near their limit" if number is None else f"of {node}"
        bound = task.limit_w if kind == "heat" else task.energy_j / task.horizon_s
        which = np.isfinite(bound) if number is None else np.arange(len(bound)) == number
        what = (
            f"{kind} {where} binds: {base.watts[which].sum():.3g} of {bound[which].sum():.3g} W drawn at "
            f"{task.tokens_per_s:g} tokens/s; {factor - 1:.0%} more"
        )
    gains = []
    if base.latency_ms - found.latency_ms > LEAST_GAIN * base.latency_ms:
        gains.append(f"a token {base.latency_ms - found.latency_ms:.3f} ms faster")
    if found.reach - base.reach > 5e-4:
        gains.append(f"{found.reach - base.reach:.1%} more of the gate mass served")
    if task.dark_share and found.dark_reach - base.dark_reach > 5e-4:
        gains.append(f"{found.dark_reach - base.dark_reach:.1%} more reachable with half of the nodes out of contact")
    if not gains:
        gains.append(f"better precision, worth {base.objective_ms - found.objective_ms:.3f} ms")
    return f"{what}: {', '.join(gains)}"


def coverage(task: pp.Problem, placement: pp.Placement, draws: int = COVERAGE_DRAWS, seed: int = 1) -> dict[str, float]:
    """Share of gate mass reachable while a random half of the nodes is out of contact: mean over draws and layers, least layer."""
    if len(task.nodes) < 2:
        return {"mean": 0.0, "least_layer": 0.0, "draws": 0}
    shares = np.array(
        [pp.reachable_mass(task, placement.copies, out) for out in pp.halves(len(task.nodes), draws, seed)]
    )
    return {"mean": float(shares.mean()), "least_layer": float(shares.min()), "draws": draws}


def plan(bundle: Path, fleet: Fleet, policy: str = "budgeted", seed: int = 0) -> dict:
    """The preview as one JSON-ready object. `exact` (None for other policies): whether the optimum is proved, and the objective's
    `gap` to the bound that no placement can be under (None: nothing is proved).

    Raises: PlacementError, shard.BundleError.
    """
    manifest = read_manifest(bundle)
    task, source = problem(bundle, manifest, fleet, seed)
    solved = placement_exact.solve(without_emergency(task), EXACT_S, EXACT_GAP) if policy == "exact" else None
    placement = place(policy, task, seed) if solved is None else solved.placement
    found = pp.evaluate(task, placement)
    node, variant = pp.served_by(task, placement)
    first = int(np.argmax(task.chances))
    calls = np.zeros(len(task.nodes))
    on = node[first] != pp.NOWHERE
    np.add.at(calls, node[first][on], task.use[on])
    rows = []
    for number, name in enumerate(task.nodes):
        mine = [copy for copy in placement.copies if copy.node == number]
        cap = float(task.cap_w[number])
        rows.append(
            {
                "node": name,
                "copies": {v: sum(c.variant == i for c in mine) for i, v in enumerate(task.variants)},
                "experts": len(mine),
                "mb": round(float(found.node_bytes[number]) / 1e6, 3),
                "memory_mb": round(float(task.memory[number]) / 1e6, 3),
                "calls_per_token": round(float(calls[number]), 3),
                "watts": round(float(found.watts[number]), 5),
                "limit_w": round(cap, 5) if np.isfinite(cap) else None,
                "path_ms": float(task.path_ms[first, 0, number]),
            }
        )
    bound = binding(task, placement)
    best = int(task.bytes[0]) * task.layers * task.experts
    return {
        "policy": policy,
        "nodes": rows,
        "latency_ms": round(float(found.scenario_ms[first]), 4),
        "served": round(float(np.where(node[first] != pp.NOWHERE, task.mass, 0.0).sum() / task.layers), 5),
        "objective_ms": round(found.objective_ms, 4),
        "mb": round(found.store_bytes / 1e6, 3),
        "share_of_one_copy": round(found.store_bytes / best, 4),
        "one_copy": task.variants[0],
        "half_dark": {k: round(v, 4) for k, v in coverage(task, placement).items()},
        "violations": list(found.violations),
        "binding": None if bound is None else {**vars(bound)},
        "exact": None if solved is None else _proof(solved, found.objective_ms),
        "tokens_per_s": task.tokens_per_s,
        "work_from": source,
    }


def _proof(solved: placement_exact.Exact, objective_ms: float) -> dict:
    bounded = np.isfinite(solved.bound_ms) and solved.bound_ms > 0
    return {
        "solved": solved.solved,
        "gap": round(max(objective_ms / solved.bound_ms - 1.0, 0.0), 5) if bounded else None,
        "bound_ms": round(solved.bound_ms, 4) if bounded else None,
    }


def _table(rows: list[list[str]]) -> list[str]:
    """Right-aligned columns as wide as they need to be, the first left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    gap = "  " if sum(widths) + 2 * len(widths) <= 80 else " "
    return [
        gap.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def _short(value: float) -> str:
    """At most 8 characters."""
    return f"{value:.2f}" if value < 99_999 else f"{value:.2e}"


def report(result: dict) -> str:
    """The preview as a table and sentences."""
    names = list(result["nodes"][0]["copies"])
    rows = [["node", "experts", "MB", "of MB", "calls/token", "watts", "of W", "path ms"]]
    for row in result["nodes"]:
        copies = " + ".join(f"{row['copies'][name]} {name}" for name in names if row["copies"][name]) or "none"
        limit = "-" if row["limit_w"] is None else f"{row['limit_w']:.3g}"
        sizes = [_short(row["mb"]), _short(row["memory_mb"]), _short(row["calls_per_token"])]
        watts = f"{row['watts']:.4f}" if row["watts"] < 100 else _short(row["watts"])
        rows.append([row["node"][:12], copies[:27], *sizes, watts, limit, _short(row["path_ms"])])
    lines = _table(rows)
    lines.append(
        f"{result['policy']}: expected latency {result['latency_ms']:.3f} ms per token (experts and paths), "
        f"{result['mb']:.2f} MB in all, {result['share_of_one_copy']:.2f} times one {result['one_copy']} copy"
    )
    if result["exact"]:
        exact = result["exact"]
        if exact["solved"]:
            lines.append(f"proved optimal (to {EXACT_GAP:.1%})")
        elif exact["gap"] is None:
            lines.append(f"not proved optimal: no bound after {EXACT_S:g} s")
        else:
            lines.append(f"not proved optimal: within {exact['gap']:.2%} of the proved bound after {EXACT_S:g} s")
    half = result["half_dark"]
    if half["draws"]:
        lines.append(
            f"with a random half of the nodes out of contact {half['mean']:.1%} of the gate mass is reachable "
            f"(least layer {half['least_layer']:.1%}, {half['draws']} draws)"
        )
    if result["served"] < 0.9995:
        lines.append(f"only {result['served']:.1%} of the gate mass is served at {result['tokens_per_s']:g} tokens/s")
    lines += [f"out of bounds: {text}" for text in result["violations"]]
    lines.append(
        result["binding"]["text"] if result["binding"] else "nothing binds: more memory, heat or battery would not help"
    )
    lines.append(f"ms and joules per expert: {result['work_from']}")
    return "\n".join(lines)
