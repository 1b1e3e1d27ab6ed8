"""Which node runs which (token, expert) pair: pure, shared by the distributed run and its single-process reference.

Both sum in the same fixed order (nodes by index, inside a node as node_agent.partial does), so that their results can be
compared bit by bit. Leaves out: sockets (link.py) and sessions (local.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ground_station.placement import Holding
from node_agent import frame


class Work(NamedTuple):
    """What one node is asked for a layer: `rows` [R] of the batch (None: all), and frame.PAIR [P] with rows local to them."""

    node: int
    rows: np.ndarray | None
    pairs: np.ndarray


class Table:
    """For each (layer, expert) its copies as (node index, precision id), best first."""

    def __init__(self, holdings: tuple[Holding, ...]):
        self.nodes = sorted({holding.node for holding in holdings})
        index = {node: i for i, node in enumerate(self.nodes)}
        self.copies: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
        for holding in sorted(holdings, key=lambda h: h.rank):
            key = (holding.layer, holding.expert)
            copy = (index[holding.node], frame.PRECISION_ID[holding.precision])
            self.copies[key] = (*self.copies.get(key, ()), copy)


def split(layer: int, experts: np.ndarray, gates: np.ndarray, copy_of) -> list[Work]:
    """Work per node, in ascending node index.

    experts int [T, K], gates float32 [T, K] (a gate of 0 is not sent); `copy_of(layer, expert) -> (node index, precision id)`
    or None for an expert that nobody can serve (its pairs are left out: the caller counts them).
    """
    t = experts.shape[0]
    by_node: dict[int, list[tuple[int, int, int, float]]] = {}
    for row, (chosen, weights) in enumerate(zip(experts.tolist(), gates.tolist())):
        for expert, gate in zip(chosen, weights):
            if gate and (copy := copy_of(layer, expert)) is not None:
                node, precision = copy
                if node in by_node:
                    by_node[node].append((row, expert, precision, gate))
                else:
                    by_node[node] = [(row, expert, precision, gate)]
    if t == 1:
        return [Work(node, None, np.array(by_node[node], frame.PAIR)) for node in sorted(by_node)]
    work = []
    for node in sorted(by_node):
        pairs = np.array(by_node[node], frame.PAIR)
        rows, pairs["row"] = np.unique(pairs["row"], return_inverse=True)
        work.append(Work(node, rows, pairs))
    return work


def add_partial(total: np.ndarray, work: Work, partial: np.ndarray) -> None:
    """Adds a node's partial sum [R, D] to the layer's total [T, D]."""
    if work.rows is None:
        total += partial
    else:
        total[work.rows] += partial
