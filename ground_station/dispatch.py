"""Which node runs which (token, expert) pair: pure, shared by the distributed run and its single-process reference.

Both sum in the same fixed order (nodes by index, inside a node as node_agent.partial does), so that their results can be
compared bit by bit. Leaves out: sockets (link.py) and sessions (local.py).
"""

from __future__ import annotations

import math
from copy import copy as same_but
from typing import Callable, NamedTuple

import numpy as np

from ground_station.placement import Holding
from node_agent import frame


class Work(NamedTuple):
    """What one node is asked for a layer: `rows` [R] of the batch (None: all), and frame.PAIR [P] with rows local to them."""

    node: int
    rows: np.ndarray | None
    pairs: np.ndarray


class Table:
    """For each (layer, expert) its copies as (node index, precision id), best first; for each node its processor."""

    def __init__(
        self, holdings: tuple[Holding, ...], processors: dict[str, int] | None = None, empty: tuple[str, ...] = ()
    ):
        """`processors`: node -> what computes there, for nodes that share one (agents on one machine). None: each its own.
        `empty`: further nodes, that hold nothing yet."""
        self.nodes = sorted({holding.node for holding in holdings} | {*empty})
        index = {node: i for i, node in enumerate(self.nodes)}
        shared = processors or index
        numbers = {processor: i for i, processor in enumerate(dict.fromkeys(shared[node] for node in self.nodes))}
        self.processor = [numbers[shared[node]] for node in self.nodes]
        self.processors = len(numbers)
        self.copies: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
        for holding in sorted(holdings, key=lambda h: h.rank):
            key = (holding.layer, holding.expert)
            copy = (index[holding.node], frame.PRECISION_ID[holding.precision])
            self.copies[key] = (*self.copies.get(key, ()), copy)

    def changed(self, copies: dict[tuple[int, int], tuple[tuple[int, int], ...]]) -> Table:
        """The same nodes with other copies of some experts, best first."""
        other = same_but(self)
        other.copies = self.copies | copies
        return other


Copy = tuple[int, int]
"""(node index, precision id)."""
Pair = tuple[int, int, int, float]
"""(row, expert, precision id, gate), as frame.PAIR."""


def assign(table: Table, layer: int, load: dict[int, int], usable: list[bool] | None = None) -> dict[int, Copy | None]:
    """The copy that serves each expert of a layer; None where no copy is on a usable node.

    load: expert -> rows it is to run; `usable[node]` (None: all). The precision is that of an expert's best usable copy; among
    its copies of that precision the work is spread so that the busiest processor has least, over few nodes: every node that is
    asked costs a message each way (greedy, then chains of moves while one helps).
    """
    chosen: dict[int, Copy | None] = {}
    processor = table.processor
    busy = [0] * table.processors
    flexible: dict[int, list[Copy]] = {}
    for expert, rows in load.items():
        copies = table.copies[layer, expert]
        if usable is not None:
            copies = tuple(copy for copy in copies if usable[copy[0]])
        same = [copy for copy in copies if copy[1] == copies[0][1]]
        if len(same) > 1:
            flexible[expert] = same
        elif same:
            chosen[expert] = same[0]
            busy[processor[same[0][0]]] += rows
        else:
            chosen[expert] = None
    if not flexible:
        return chosen
    share = -(-sum(load.values()) // table.processors)
    left = dict(sorted(flexible.items(), key=lambda item: -load[item[0]]))
    while left:
        offers: dict[int, list[tuple[int, Copy]]] = {}
        for expert, same in left.items():
            for copy in same:
                offers.setdefault(copy[0], []).append((expert, copy))
        best_rows, best = 0, []
        for node, offer in offers.items():
            room = share - busy[processor[node]]
            fits, rows = [], 0
            for expert, copy in offer:
                if rows + load[expert] <= room:
                    rows += load[expert]
                    fits.append((expert, copy))
            if rows > best_rows:
                best_rows, best = rows, fits
        if not best:  # no share has room for a whole expert
            break
        for expert, copy in best:
            chosen[expert] = copy
            busy[processor[copy[0]]] += load[expert]
            del left[expert]
    for expert, same in left.items():
        chosen[expert] = min(same, key=lambda copy: busy[processor[copy[0]]])
        busy[processor[chosen[expert][0]]] += load[expert]
    if left:  # otherwise nobody has more than its share
        while _relieve(table, load, flexible, chosen, busy):
            pass
    return chosen


def _relieve(
    table: Table, load: dict[int, int], flexible: dict[int, list[Copy]], chosen: dict[int, Copy | None], busy: list[int]
) -> bool:
    """Takes work off the busiest processor by a chain of moves, found breadth first; False when none helps.

    With equal experts that is the augmenting path of bipartite matching, so decoding one token ends at the least possible load
    of the busiest. Every chain lowers the sum of squares of the loads: repeated calls end.
    """
    start = busy.index(max(busy))
    on: list[list[int]] = [[] for _ in busy]
    for expert in flexible:
        on[table.processor[chosen[expert][0]]].append(expert)
    came: dict[int, tuple[int, int, Copy]] = {start: (-1, -1, (-1, -1))}
    queue = [start]
    for here in queue:
        for expert in on[here]:
            for copy in flexible[expert]:
                there = table.processor[copy[0]]
                if there in came:
                    continue
                came[there] = (here, expert, copy)
                queue.append(there)
                after = list(busy)
                chain, end = [], there
                while end != start:
                    end, moving, to = came[end]
                    chain.append((moving, to))
                    after[end] -= load[moving]
                    after[table.processor[to[0]]] += load[moving]
                if sum(rows * rows for rows in after) < sum(rows * rows for rows in busy):
                    chosen.update(chain)
                    busy[:] = after
                    return True
    return False


Assign = Callable[[int, dict[int, int]], dict[int, Copy | None]]


class Named(NamedTuple):
    """The copy that a policy has chosen for each pair: node indices and precision ids, int [T, K]; node -1: `assign` decides."""

    nodes: np.ndarray
    precisions: np.ndarray

    def among(self, usable: list[bool]) -> Named:
        """Without the names of nodes that are not usable."""
        keep = np.array([*usable, False])[self.nodes]  # -1 is the last
        return Named(np.where(keep, self.nodes, -1), self.precisions)


class StandIn(NamedTuple):
    """In `row`, `expert` runs with `gate` in place of `lost`, of which no copy can be reached; `lost_gate` was the gate of that one."""

    row: int
    lost: int
    lost_gate: float
    expert: int
    gate: float


GATE_RULES = ("router", "lost")


def taken(experts: np.ndarray, gates: np.ndarray, count: int) -> np.ndarray:
    """bool [T, count]: the experts that each row runs, from experts int [T, K] and gates [T, K]."""
    found = np.zeros((len(experts), count), bool)
    rows, columns = np.nonzero(gates)
    found[rows, experts[rows, columns]] = True
    return found


def stand_ins(
    experts: np.ndarray,
    gates: np.ndarray,
    logits: np.ndarray,
    reachable: np.ndarray,
    busy: np.ndarray | None = None,
    rule: str = "router",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[StandIn]]:
    """The ladder's rung "similar expert": for each pair out of reach the row's next expert by the router's logits.

    experts int [T, K], gates float32 [T, K], logits [T, E], reachable bool [E]; busy bool [T, E]: what the row runs already
    (None: `taken` of these). A stand-in is reachable, not busy in that row, and stands in once; the pair of the largest gate is
    served first. `rule`: "router" gives it the lost gate times exp(difference of their logits), its own by the model's softmax once
    the caller restores the row's sum of gates; "lost" the whole gate of the one it stands in for (a control: worse than to skip).
    Returns experts, gates with the stand-ins in their places, the gate mass [T] that nobody took over, and the stand-ins.
    """
    busy = taken(experts, gates, logits.shape[1]) if busy is None else busy
    experts, gates = experts.copy(), gates.copy()
    lost = np.zeros(len(experts), np.float64)
    found: list[StandIn] = []
    out = (gates != 0) & ~reachable[experts]
    for row in np.flatnonzero(out.any(1)).tolist():
        open_to = reachable.copy()
        open_to[busy[row]] = False
        candidates = iter(sorted(np.flatnonzero(open_to).tolist(), key=lambda e: -logits[row, e]))
        for column in sorted(np.flatnonzero(out[row]).tolist(), key=lambda c: -gates[row, c]):
            expert, gate = int(experts[row, column]), float(gates[row, column])
            stand_in = next(candidates, None)
            if stand_in is None:
                lost[row] += gate
                continue
            apart = min(0.0, float(logits[row, stand_in] - logits[row, expert])) if rule == "router" else 0.0
            own = gate * math.exp(apart)
            lost[row] += gate - own
            experts[row, column], gates[row, column] = stand_in, own
            found.append(StandIn(row, expert, gate, stand_in, own))
    return experts, gates, lost, found


def split(
    layer: int, experts: np.ndarray, gates: np.ndarray, assignment: Assign, named: Named | None = None
) -> list[Work]:
    """Work per node, in ascending node index.

    experts int [T, K], gates float32 [T, K] (a gate of 0 is not sent); `assignment(layer, rows per expert)` as `assign`, for the pairs
    without a copy that is `named`; the pairs of an expert that nobody can serve are left out: the caller counts them.
    """
    t = experts.shape[0]
    if named is not None:
        return _by_node(_split_named(layer, experts, gates, assignment, named), t)
    wanted = [
        (row, expert, gate)
        for row, (chosen, weights) in enumerate(zip(experts.tolist(), gates.tolist()))
        for expert, gate in zip(chosen, weights)
        if gate
    ]
    load: dict[int, int] = {}
    for _, expert, _ in wanted:
        load[expert] = load.get(expert, 0) + 1
    copies = assignment(layer, load)
    by_node: dict[int, list[Pair]] = {}
    for row, expert, gate in wanted:
        if (copy := copies[expert]) is not None:
            node, precision = copy
            if node in by_node:
                by_node[node].append((row, expert, precision, gate))
            else:
                by_node[node] = [(row, expert, precision, gate)]
    return _by_node(by_node, t)


def _split_named(
    layer: int, experts: np.ndarray, gates: np.ndarray, assignment: Assign, named: Named
) -> dict[int, list[Pair]]:
    wanted = [
        (row, *pair)
        for row, columns in enumerate(
            zip(experts.tolist(), gates.tolist(), named.nodes.tolist(), named.precisions.tolist())
        )
        for pair in zip(*columns)
        if pair[1]
    ]
    load: dict[int, int] = {}
    for _, expert, _, node, _ in wanted:
        if node < 0:
            load[expert] = load.get(expert, 0) + 1
    copies = assignment(layer, load) if load else {}
    by_node: dict[int, list[Pair]] = {}
    for row, expert, gate, node, precision in wanted:
        if node < 0:
            if (copy := copies[expert]) is None:
                continue
            node, precision = copy
        by_node.setdefault(node, []).append((row, expert, precision, gate))
    return by_node


def _by_node(by_node: dict[int, list[Pair]], t: int) -> list[Work]:
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
