"""Placements of the literature, by name: random, intra, roundrobin, ring, eplb, affinity, hotcore. Heat and battery they do not know.

Each takes a Problem (and a seed) and gives copies that keep within memory; placement_problem.serve then decides, by the same
rule for all, which copy serves. A baseline holds everything in the best precision of which one copy of each expert fits;
`roundrobin` adds copies in the smallest precision. Leaves out: the policy of this project (placement_budgeted), the exact optimum.
"""

from __future__ import annotations

import numpy as np

from ground_station.placement import PlacementError
from ground_station.placement_problem import Copy, Problem

AFFINITY_PAIRS = 6000  # (expert, successor, node) triples up to which the integer programme is solved whole
AFFINITY_S = 5.0


class Room:
    """What is free while copies are laid down one after the other."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.free = problem.memory.astype(np.int64).copy()
        self.fleet = int(problem.fleet_bytes)
        self.copies: list[Copy] = []

    def fits(self, node: int, variant: int) -> bool:
        size = int(self.problem.bytes[variant])
        return self.free[node] >= size and self.fleet >= size

    def add(self, copy: Copy) -> None:
        self.free[copy.node] -= int(self.problem.bytes[copy.variant])
        self.fleet -= int(self.problem.bytes[copy.variant])
        self.copies.append(copy)

    def first(self, layer: int, expert: int, variant: int, order) -> None:
        """The first node in `order` that has room.  Raises: PlacementError when none has."""
        for node in order:
            if self.fits(int(node), variant):
                return self.add(Copy(layer, expert, int(node), variant))
        raise PlacementError(
            f"memory binds: expert {expert} of layer {layer} ({self.problem.bytes[variant] / 1e6:.2f} MB as "
            f"{self.problem.variants[variant]}) fits no node; add nodes or memory"
        )


def fitting_variant(problem: Problem) -> int:
    """The best variant of which one copy of every expert fits.  Raises: PlacementError with what is lacking."""
    wanted = problem.layers * problem.experts
    for variant, size in enumerate(problem.bytes):
        slots = int((problem.memory // max(int(size), 1)).sum())
        if slots >= wanted and wanted * int(size) <= problem.fleet_bytes:
            return variant
    size = int(problem.bytes.min())
    have = int((problem.memory // size * size).sum())
    whose = f"{len(problem.nodes)} nodes"
    if have >= wanted * size:
        have, whose = problem.fleet_bytes, "the fleet's bound"
    raise PlacementError(
        f"memory binds: {wanted} experts need {wanted * size / 1e6:.2f} MB resident even as "
        f"{problem.variants[int(problem.bytes.argmin())]}, {whose} can hold {have / 1e6:.2f} MB of whole experts; add nodes or memory"
    )


def expected_path_ms(problem: Problem) -> np.ndarray:
    """[L, N]: mean over scenarios, a node out of contact counted as the price of gate mass out of reach."""
    known = np.where(np.isfinite(problem.path_ms), problem.path_ms, problem.prices.miss_ms)
    return np.tensordot(problem.chances, known, 1)


def subnets(problem: Problem) -> np.ndarray:
    """Ring subnet of each node [N]: the problem's, or contiguous arcs of the nodes, at most one per layer."""
    if problem.rings:
        return np.unique(np.asarray(problem.rings), return_inverse=True)[1]
    nodes = len(problem.nodes)
    return np.arange(nodes) * min(problem.layers, nodes) // nodes


def random(problem: Problem, seed: int) -> list[Copy]:
    """Every expert on a node drawn at random among those with room."""
    rng, room, variant = np.random.default_rng(seed), Room(problem), fitting_variant(problem)
    for layer in range(problem.layers):
        for expert in range(problem.experts):
            room.first(layer, expert, variant, rng.permutation(len(problem.nodes)))
    return room.copies


def intra(problem: Problem, seed: int) -> list[Copy]:
    """Layers on ring subnets as in `ring`, experts drawn at random inside (an ablation of Space-XNet)."""
    rng = np.random.default_rng(seed)
    return _on_rings(problem, lambda layer, inside: rng.permutation(inside))


def ring(problem: Problem, seed: int = 0) -> list[Copy]:
    """Space-XNet: layers on ring subnets, inside each the experts by falling use on the nodes by rising expected latency."""
    path = expected_path_ms(problem)
    return _on_rings(problem, lambda layer, inside: inside[np.argsort(path[layer, inside], kind="stable")])


def _on_rings(problem: Problem, order_of) -> list[Copy]:
    room, variant, path, ring_of = Room(problem), fitting_variant(problem), expected_path_ms(problem), subnets(problem)
    count = int(ring_of.max()) + 1
    for layer in range(problem.layers):
        mine = ring_of == layer * count // problem.layers
        order = list(order_of(layer, np.flatnonzero(mine)))
        others = [n for n in np.argsort(path[layer], kind="stable") if not mine[n]]
        at = 0
        for expert in np.argsort(-problem.use[layer], kind="stable"):
            # one expert per node, and round again when there are more experts than nodes with room
            room.first(layer, int(expert), variant, order[at:] + order[:at] + others)
            if room.copies[-1].node in order:
                at = (order.index(room.copies[-1].node) + 1) % len(order)
    return room.copies


def roundrobin(problem: Problem, seed: int = 0) -> list[Copy]:
    """Expert e of layer l on node (e + l) mod N or the next with room; then a second copy in the smallest variant likewise."""
    room, nodes = Room(problem), len(problem.nodes)
    smallest = int(problem.bytes.argmin())
    for rank, variant in enumerate((fitting_variant(problem), smallest)):
        for layer in range(problem.layers):
            for expert in range(problem.experts):
                order = [(expert + layer + rank + step) % nodes for step in range(nodes)]
                if rank == 0:
                    room.first(layer, expert, variant, order)
                    continue
                taken = {copy.node for copy in room.copies if (copy.layer, copy.expert) == (layer, expert)}
                home = next((n for n in order if n not in taken and room.fits(n, variant)), None)
                if home is not None:
                    room.add(Copy(layer, expert, home, variant))
    return room.copies


def replicate(weight: np.ndarray, slots: int) -> np.ndarray:
    """EPLB: copies of each expert [E]; slots - E times one more to the argmax of weight / copies."""
    copies = np.ones(len(weight), int)
    for _ in range(slots - len(weight)):
        copies[int(np.argmax(weight / copies))] += 1
    return copies


def pack(weight: np.ndarray, owner: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """EPLB: pack of each item, by falling weight to the least loaded pack with a free slot.

    weight [R], owner [R] (the expert an item is a copy of; a pack that has one already comes last), slots [packs]. Returns
    int [R].  Raises: PlacementError when there are more items than slots.
    """
    if slots.sum() < len(weight):
        raise PlacementError(f"{len(weight)} items do not go into {slots.sum()} slots")
    load, left = np.zeros(len(slots)), slots.astype(int).copy()
    has: list[set[int]] = [set() for _ in slots]
    result = np.empty(len(weight), int)
    for item in np.argsort(-weight, kind="stable"):
        free = [p for p in range(len(slots)) if left[p]]
        best = min(free, key=lambda p: (int(owner[item]) in has[p], load[p], p))
        load[best] += weight[item]
        left[best] -= 1
        has[best].add(int(owner[item]))
        result[item] = best
    return result


def eplb(problem: Problem, seed: int = 0) -> list[Copy]:
    """EPLB per layer: as many copies as slots allow, packed onto the nodes by their load."""
    room, variant = Room(problem), fitting_variant(problem)
    size = int(problem.bytes[variant])
    total = min(int((problem.memory // size).sum()), problem.fleet_bytes // size)
    for layer in range(problem.layers):
        quota = total // problem.layers + (layer < total % problem.layers)
        quota = min(quota, problem.experts * len(problem.nodes))
        free = room.free // size
        share = np.minimum(np.ceil(quota * free / max(free.sum(), 1)).astype(int), free)
        counts = replicate(problem.use[layer], quota)
        owner = np.repeat(np.arange(problem.experts), counts)
        where = pack(problem.use[layer][owner] / counts[owner], owner, share)
        for copy in sorted({Copy(layer, int(e), int(n), variant) for e, n in zip(owner, where)}):
            room.add(copy)
    return room.copies


def hotcore(problem: Problem, seed: int = 0) -> list[Copy]:
    """The most used experts on every node, as many as fit, the rest once, on the node with most room."""
    room, variant = Room(problem), fitting_variant(problem)
    size, nodes = int(problem.bytes[variant]), len(problem.nodes)
    wanted = problem.layers * problem.experts
    slots = problem.memory // size
    by_use = np.argsort(-problem.use.ravel(), kind="stable")
    hot = 0
    for count in range(1, wanted + 1):
        rest = wanted - count
        if (slots < count).any() or (slots - count).sum() < rest or (count * nodes + rest) * size > problem.fleet_bytes:
            break
        hot = count
    for rank, flat in enumerate(by_use):
        layer, expert = divmod(int(flat), problem.experts)
        if rank < hot:
            for node in range(nodes):
                room.add(Copy(layer, expert, node, variant))
        else:
            room.first(layer, expert, variant, np.argsort(-room.free, kind="stable"))
    return room.copies


def affinity(problem: Problem, seed: int = 0) -> list[Copy]:
    """ExFlow: one copy each, evenly in each layer, so that successive experts of a token are on one node as often as can be.

    An integer programme in HiGHS: whole where it is small, otherwise layer by layer (each then exact, given the one before).
    """
    variant = fitting_variant(problem)
    layers, experts, nodes = problem.layers, problem.experts, len(problem.nodes)
    if problem.successive.shape != (layers - 1, experts, experts):
        raise PlacementError("affinity needs the counts of successive experts: calibrate the bundle")
    slots = (problem.memory // int(problem.bytes[variant])).astype(int)
    even = -(-experts // nodes)
    if layers * np.minimum(slots // layers, even).sum() < layers * experts:
        even = experts  # nodes of different size: evenness gives way to room
    whole = (layers - 1) * experts * experts * nodes <= AFFINITY_PAIRS
    if whole:
        home = _affinity_programme(problem.successive, slots, even, None)
    else:
        home = np.empty((layers, experts), int)
        left = slots.copy()
        for layer in range(layers):
            # an equal share of what is left for each layer to come, but never too little for this one
            share = np.minimum(left, np.maximum(-(-left // (layers - layer)), 0))
            share = share if share.sum() >= experts else left
            before = home[layer - 1] if layer else None
            counts = problem.successive[layer - 1 : layer] if layer else np.zeros((0, experts, experts))
            home[layer] = _affinity_programme(counts, share, even, before, experts)[-1]
            left -= np.bincount(home[layer], minlength=nodes)
    return [Copy(layer, e, int(home[layer, e]), variant) for layer in range(layers) for e in range(experts)]


def _affinity_programme(
    counts: np.ndarray, slots: np.ndarray, even: int, before: np.ndarray | None, experts: int = 0
) -> np.ndarray:
    """Homes int [M, E] of the layers of counts [M - 1, E, E]; with `before` [E] the first layer's homes are given."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    experts, nodes = counts.shape[1] or experts, len(slots)
    layers = len(counts) + 1
    x = np.arange(layers * experts * nodes).reshape(layers, experts, nodes)
    pairs = np.argwhere(counts > 0)  # (step, expert, successor)
    z = x.size + np.arange(len(pairs) * nodes).reshape(len(pairs), nodes)
    gain = np.zeros(x.size + z.size)
    gain[z] = counts[tuple(pairs.T)][:, None] / max(float(counts.sum()), 1.0)
    rows, columns, values, low, high = [], [], [], [], []

    def rule(indices, factors, least: float, most: float) -> None:
        rows.extend([len(low)] * len(indices))
        columns.extend(indices)
        values.extend(factors)
        low.append(least)
        high.append(most)

    for layer in range(layers):
        for expert in range(experts):
            rule(x[layer, expert], np.ones(nodes), 1, 1)
        for node in range(nodes):
            rule(x[layer, :, node], np.ones(experts), 0, even)
    first = 0 if before is None else 1  # a layer whose homes are given has taken its room already
    for node in range(nodes):
        rule(x[first:, :, node].ravel(), np.ones((layers - first) * experts), 0, int(slots[node]))
    for number, (step, expert, then) in enumerate(pairs):
        for node in range(nodes):
            rule([z[number, node], x[step, expert, node]], [1, -1], -np.inf, 0)
            rule([z[number, node], x[step + 1, then, node]], [1, -1], -np.inf, 0)
    lower, upper = np.zeros(gain.size), np.ones(gain.size)
    if before is not None:
        upper[x[0]] = 0
        upper[x[0][np.arange(experts), before]] = lower[x[0][np.arange(experts), before]] = 1
    matrix = coo_matrix((values, (rows, columns)), shape=(len(low), gain.size)).tocsr()
    whole = np.concatenate([np.ones(x.size), np.zeros(z.size)])
    result = milp(
        -gain,
        integrality=whole,
        bounds=Bounds(lower, upper),
        constraints=LinearConstraint(matrix, low, high),
        options={"time_limit": AFFINITY_S, "mip_rel_gap": 1e-4},
    )
    if result.x is None:
        raise PlacementError(f"affinity: no even placement was found ({result.message.strip()[:80]}); add memory")
    return result.x[x].argmax(2)
