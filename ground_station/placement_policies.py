"""Every placement policy by its name, behind one call: problem in, placement out. Leaves out: carrying it out (placement_moves)."""

from __future__ import annotations

from ground_station import placement_baselines as baselines
from ground_station import placement_exact
from ground_station.placement import PlacementError
from ground_station.placement_budgeted import budgeted
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
POLICIES = (*BASELINES, "budgeted", "exact")


def place(name: str, problem: Problem, seed: int = 0) -> Placement:
    """A policy's placement; the same problem and seed give the same answer.

    Raises: PlacementError when the name is unknown (it lists them) or the experts do not fit (it names what binds).
    """
    if name == "budgeted":
        return budgeted(problem, seed)
    if name == "exact":
        return placement_exact.solve(problem).placement
    if name not in BASELINES:
        raise PlacementError(f"placement policy {name!r} is unknown: use one of {', '.join(POLICIES)}")
    return serve(problem, name, BASELINES[name](problem, seed))
