"""Every placement policy by its name, behind one call: problem in, placement out. Leaves out: carrying it out (placement_moves)."""

from __future__ import annotations

from dataclasses import replace

from ground_station import placement_baselines as baselines
from ground_station import placement_exact
from ground_station.placement import EMERGENCY, PlacementError
from ground_station.placement_budgeted import budgeted
from ground_station.placement_coverage import coverage
from ground_station.placement_problem import Placement, Problem
from ground_station.placement_serving import serve

BASELINES = {
    "random": baselines.random,
    "intra": baselines.intra,
    "roundrobin": baselines.roundrobin,
    "ring": baselines.ring,
    "eplb": baselines.eplb,
    "affinity": baselines.affinity,
    "hotcore": baselines.hotcore,
}
POLICIES = (*BASELINES, "budgeted", "coverage", "exact")


def place(name: str, problem: Problem, seed: int = 0) -> Placement:
    """A policy's placement; the same problem and seed give the same answer. Emergency precisions are for `coverage`, and for
    the others where the experts fit in no better one.

    Raises: PlacementError when the name is unknown (it lists them) or the experts do not fit (it names what binds).
    """
    if name == "coverage":
        return coverage(problem, seed)
    problem = without_emergency(problem)
    if name == "budgeted":
        return budgeted(problem, seed)
    if name == "exact":
        return placement_exact.solve(problem).placement
    if name not in BASELINES:
        raise PlacementError(f"placement policy {name!r} is unknown: use one of {', '.join(POLICIES)}")
    return serve(problem, name, BASELINES[name](problem, seed))


def without_emergency(problem: Problem) -> Problem:
    """The same problem with the variants before the first emergency one (variants are best first, so indices stay), if one copy of
    each expert fits so; copies that are held in the others count as not there."""
    keep = next((i for i, name in enumerate(problem.variants) if name in EMERGENCY), len(problem.variants))
    if keep in (0, len(problem.variants)):
        return problem
    arrays = {name: getattr(problem, name)[:keep] for name in ("variants", "bytes", "ms", "joules", "error")}
    if problem.nats.size:
        arrays["nats"] = problem.nats[:, [*range(keep), -1]]
    less = replace(problem, **arrays, held=frozenset(copy for copy in problem.held if copy.variant < keep))
    try:
        baselines.fitting_variant(less)
    except PlacementError:
        return problem
    return less
