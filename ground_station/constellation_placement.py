"""Placements on a whole constellation: the problem of a synthetic MoE on its satellites, and who holds what by each policy's name.

What `study space-xnet` and `sim run` share. Leaves out the policies themselves (placement_baselines.py, placement_budgeted.py) and
which satellites can be reached when (constellation_network.py).

Letters: L layers, E experts, N satellites, C slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ground_station import placement_baselines as baselines
from ground_station import placement_problem as pp
from ground_station.placement_budgeted import budgeted
from ground_station.placement_policies import BASELINES

MARGIN = 0.9
"""Share of a satellite's watts that `budgeted` plans with: the slots that it knows are a sample."""
OPTIMISED_SLOTS, NEAR = 4, 20
PLACEMENTS = (*(name for name in BASELINES if name != "affinity"), "packed", "budgeted")
"""`affinity` needs counts of successive experts and an integer programme: it is for fleets of boards."""
PRICES = pp.Prices(miss_ms=1000.0, error_ms=5.0, store_ms_per_mb=1e-4, move_ms_per_mb=0.0)


@dataclass(frozen=True)
class Variant:
    """An expert in one precision: resident size, work and joules of one run on any satellite, relative error of its output."""

    name: str
    megabytes: float
    ms: float
    joules: float
    error: float


@dataclass(frozen=True, eq=False)
class Model:
    """The synthetic MoE as placement sees it: use [L, E] (a layer sums to K), sets [L, R, K] and weights [L, R] (placement_routing),
    mass [L, E], and its variants, best first."""

    use: np.ndarray
    sets: np.ndarray
    weights: np.ndarray
    mass: np.ndarray
    variants: tuple[Variant, ...]


@dataclass(frozen=True, eq=False)
class Room:
    """memory_bytes [N] for experts, limit_w [N]: average watts for experts, fleet_bytes: bound on all copies together; demand."""

    memory_bytes: np.ndarray
    limit_w: np.ndarray
    fleet_bytes: int
    tokens_per_s: float
    horizon_s: float


def problem(model: Model, room: Room, per_plane: int, path_ms: np.ndarray) -> pp.Problem:
    """The placement problem; path_ms [C, L, N].  Raises: PlacementError."""
    count = len(room.memory_bytes)
    return pp.Problem(
        use=model.use,
        mass=model.mass,
        sets=model.sets,
        weights=model.weights,
        variants=tuple(each.name for each in model.variants),
        bytes=np.array([round(1e6 * each.megabytes) for each in model.variants], np.int64),
        ms=np.array([each.ms for each in model.variants]),
        joules=np.array([each.joules for each in model.variants]),
        error=np.array([each.error for each in model.variants]),
        nodes=tuple(f"p{n // per_plane}s{n % per_plane}" for n in range(count)),
        memory=room.memory_bytes,
        speed=np.ones(count),
        limit_w=room.limit_w,
        energy_j=np.full(count, np.inf),
        path_ms=path_ms,
        chances=np.full(len(path_ms), 1.0 / len(path_ms)),
        tokens_per_s=room.tokens_per_s,
        horizon_s=room.horizon_s,
        fleet_bytes=room.fleet_bytes,
        rings=tuple(n % per_plane for n in range(count)),
        prices=PRICES,
        gateway="the layer's gateway",
    )


def mean_path(path: np.ndarray) -> np.ndarray:
    """[1, L, N]: over the slots [C, L, N] in which a satellite is reached."""
    known = np.isfinite(path)
    total = np.where(known, path, 0.0).sum(0, dtype=float)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.inf)[None]


def packed(problem: pp.Problem) -> list[pp.Copy]:
    """The rank match with as many experts on the nearest satellite of the ring as it holds, then the next; then the nearest of others."""
    room, path, rings = baselines.Room(problem), baselines.expected_path_ms(problem), baselines.subnets(problem)
    count = int(rings.max()) + 1
    for layer in range(problem.layers):
        outside = rings != layer * count // problem.layers
        order = np.lexsort((path[layer], outside))
        for expert in np.argsort(-problem.use[layer], kind="stable"):
            room.first(layer, int(expert), 0, order)
    return room.copies


def place(name: str, mean: pp.Problem, sample: pp.Problem, seed: int) -> list[pp.Copy]:
    """Copies by one of PLACEMENTS. Baselines know the mean path, `budgeted` knows the slots of `sample` and plans with MARGIN of the
    watts.  Raises: PlacementError where the experts do not fit."""
    if name == "packed":
        return packed(mean)
    if name == "budgeted":
        at = nearest(mean)
        few = narrowed(replace(sample, limit_w=MARGIN * sample.limit_w), at)
        return [
            copy._replace(node=int(at[copy.node]))
            for copy in budgeted(few, seed, near=NEAR, kicks=0, starts=("ring",)).copies
        ]
    return BASELINES[name](mean, seed)


def nearest(problem: pp.Problem) -> np.ndarray:
    """Satellites [n] that `budgeted` looks at: of each layer the NEAR nearest of all that have room, and of its ring."""
    path, rings = baselines.expected_path_ms(problem), baselines.subnets(problem)
    count, found = int(rings.max()) + 1, []
    some = problem.memory >= problem.bytes.min()
    for layer in range(problem.layers):
        for mine in (some, some & (rings == layer * count // problem.layers)):
            inside = np.flatnonzero(mine)
            found.append(inside[np.argsort(path[layer, inside], kind="stable")[:NEAR]])
    return np.unique(np.concatenate(found))


def narrowed(problem: pp.Problem, at: np.ndarray) -> pp.Problem:
    """The problem on some of its satellites: a search's cost is then theirs and not the whole constellation's."""
    return replace(
        problem,
        nodes=tuple(problem.nodes[n] for n in at),
        path_ms=np.ascontiguousarray(problem.path_ms[:, :, at]),
        rings=tuple(problem.rings[n] for n in at),
        **{name: getattr(problem, name)[at] for name in ("memory", "speed", "limit_w", "energy_j")},
    )
