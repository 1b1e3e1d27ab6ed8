"""Shortest paths through a constellation, from chosen sources only (scipy's csgraph). Leaves out queues and capacity.

Links are given as pairs, never found by testing all pairs of satellites; nothing here is computed for all pairs.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

from firmware_sim.links import LinkError


def plus_grid(planes: int, per_plane: int, shift: int = 0, seam: bool = True, seam_shift: int = 0) -> np.ndarray:
    """Links (m, 2) of each satellite to the next in its plane and to its neighbour in the next plane.

    `shift`: places by which the neighbour in the next plane is ahead. `seam`: whether the last plane links to the first (in a
    star pattern they move against each other, so no), `seam_shift` by how many more places (in a Walker delta the phasing adds
    up to that many around the Earth).  Raises: LinkError.
    """
    if planes < 1 or per_plane < 1:
        raise LinkError(f"{planes} planes of {per_plane} satellites; give at least 1 of each")
    number = np.arange(planes * per_plane).reshape(planes, per_plane)
    pairs = []
    if per_plane > 1:
        inside = np.stack([number, np.roll(number, -1, axis=1)], axis=-1).reshape(-1, 2)
        pairs.append(inside if per_plane > 2 else inside[::2])
    ahead = np.full((planes, 1), shift)
    ahead[-1] += seam_shift
    next_plane = np.roll(number, -1, axis=0)
    across = np.stack([number, np.take_along_axis(next_plane, (number[:1] + ahead) % per_plane, axis=1)], axis=-1)
    if planes > 1:
        pairs.append(across[: planes if seam and planes > 2 else planes - 1].reshape(-1, 2))
    return np.concatenate(pairs) if pairs else np.empty((0, 2), int)


def lengths_km(positions_km: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Length of each link (m,)."""
    return np.linalg.norm(positions_km[pairs[:, 0]] - positions_km[pairs[:, 1]], axis=-1)


def graph(nodes: int, pairs: np.ndarray, weights: np.ndarray, longest: float = np.inf) -> csr_matrix:
    """Links in both directions with a weight above 0 (km or s); those over `longest` are left out.  Raises: LinkError."""
    pairs, weights = np.asarray(pairs), np.asarray(weights, float)
    if pairs.shape != (weights.size, 2) or (pairs.size and not 0 <= pairs.min() <= pairs.max() < nodes):
        raise LinkError(f"links {pairs.shape} with {weights.size} weights; give pairs of the nodes 0 to {nodes - 1}")
    if not (weights > 0.0).all():
        raise LinkError("a link's weight is not above 0; give its length or delay")
    kept = weights <= longest
    first, second = pairs[kept].T
    both = (np.concatenate([first, second]), np.concatenate([second, first]))
    return csr_matrix((np.tile(weights[kept], 2), both), shape=(nodes, nodes))


def shortest(network: csr_matrix, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (s, n) of the shortest paths from each source (infinite where there is none), and predecessors (s, n)."""
    return dijkstra(network, indices=np.asarray(sources, int), return_predecessors=True)


def shortest_from_ground(network: csr_matrix, reached: np.ndarray, uplink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From a ground station that reaches satellites `reached` with weights `uplink`: weights (n,), predecessors (n,).

    The station is not a node of the network, so no path goes down and up again on its way. A satellite that is reached first
    has predecessor -1.
    """
    nodes = network.shape[0]
    if not reached.size:
        return np.full(nodes, np.inf), np.full(nodes, -9999)
    pairs = np.stack([np.full(reached.size, nodes), reached], axis=1)
    widened = csr_matrix(
        (network.data, network.indices, np.append(network.indptr, network.indptr[-1])), (nodes + 1,) * 2
    )
    weights, before = dijkstra(widened + _one_way(nodes + 1, pairs, uplink), indices=nodes, return_predecessors=True)
    before = np.where(before == nodes, -1, before)
    return weights[:nodes], before[:nodes]


def to_ground(weights: np.ndarray, reached: np.ndarray, downlink: np.ndarray) -> tuple[float, int]:
    """The best way down to a station: total weight and the last satellite (infinite and -1 where there is none)."""
    if not reached.size:
        return float("inf"), -1
    totals = weights[reached] + downlink
    best = int(np.argmin(totals))
    return (float(totals[best]), int(reached[best])) if np.isfinite(totals[best]) else (float("inf"), -1)


def walk(predecessors: np.ndarray, target: int) -> list[int]:
    """Nodes of the shortest path up to `target`, from a row of predecessors."""
    path = [int(target)]
    while predecessors[path[-1]] >= 0:
        path.append(int(predecessors[path[-1]]))
    return path[::-1]


def _one_way(nodes: int, pairs: np.ndarray, weights: np.ndarray) -> csr_matrix:
    return csr_matrix((weights, (pairs[:, 0], pairs[:, 1])), shape=(nodes, nodes))
