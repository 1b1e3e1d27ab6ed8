"""The fluid upper bound: what an orbit's heat, energy and links allow at best, with the physics known; no policy can do better.

Tokens are a fluid: in each time slot any real number of them is written in each mix of `Mix` (how many expert runs in which
precision, and what such a token is worth), and every run may be done on any node. That only widens what a policy can do (it
must run whole tokens, where the experts are, and cannot see ahead), so the optimum of the linear program is an upper bound for all
policies whose tokens cost and are worth what the mixes, or means of them, do. Solved by HiGHS (scipy.optimize.linprog) in two
formulations, which have to agree: temperatures and charges as variables with one equation per step, and eliminated, as running sums
of what was spent. Leaves out: limits inside a slot (states are bounded at its ends), heat exchanged between nodes, memory.

Shape letters: S slots, N nodes, P precisions, X mixes, B thermal branches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

AGREE = 1e-6
MOST_CHECKED = 96  # slots; the second formulation is dense: longer orbits are compared on so many longer slots


class BoundError(ValueError):
    """The program has no solution, or its two formulations do not agree; the text says which."""


@dataclass(frozen=True, eq=False)
class Node:
    """One node over the orbit. ambient_c [S]: its temperature at each slot's end without power; array_w [S]: what the solar array
    gives it; link_bytes [S]: what the link carries in each slot (infinite where nothing binds).

    Temperature: T = ambient + sum_b x_b, x_b' = (R_b P - x_b) / tau_b from start_k_b, exact over a slot; branch_r_k_per_w,
    branch_tau_s, start_k [B]. P is idle_w, drawn always, and what the runs add. Battery: E' = eta_charge P+ - P- / eta_discharge;
    what the array gives beyond load and charge is lost. final_j: least charge at the end.
    run_j [P], run_s [P]: joules over idle and seconds of one row through one expert; run_bytes: on the link, there and back.
    """

    ambient_c: np.ndarray
    array_w: np.ndarray
    link_bytes: np.ndarray
    branch_r_k_per_w: np.ndarray
    branch_tau_s: np.ndarray
    start_k: np.ndarray
    limit_c: float
    idle_w: float
    capacity_j: float
    start_j: float
    least_j: float
    final_j: float
    eta_charge: float
    eta_discharge: float
    run_j: np.ndarray
    run_s: np.ndarray
    run_bytes: float


@dataclass(frozen=True, eq=False)
class Mix:
    """runs [P]: expert runs of one token (all layers together) in each precision; worth: of one token, 1 for "useful", 0..1 by quality."""

    runs: np.ndarray
    worth: float


@dataclass(frozen=True, eq=False)
class Bound:
    """worth: the bound; tokens [S, X]; runs [S, N, P]; temp_c, charge_j [S, N] at the end of each slot; disagreement: relative
    difference of the two formulations, on `checked_slots` slots.
    """

    worth: float
    tokens: np.ndarray
    runs: np.ndarray
    temp_c: np.ndarray
    charge_j: np.ndarray
    disagreement: float
    checked_slots: int


def bound(
    nodes: tuple[Node, ...],
    mixes: tuple[Mix, ...],
    slot_s: float,
    demand: float = np.inf,
    most_checked: int = MOST_CHECKED,
) -> Bound:
    """Most worth per orbit of S slots of `slot_s` seconds, with at most `demand` tokens in each slot.

    The formulations are compared on the same orbit in at most `most_checked` equal slots; where S is not more, on the very program.
    Raises: BoundError.
    """
    _check(nodes, mixes, slot_s, demand)
    shape = _Shape(nodes, mixes)
    solution = _solve(*_with_states(nodes, mixes, slot_s, demand), "with states", "highs-ipm")
    fine = shape.s <= most_checked
    checked = shape.s if fine else most_checked
    longer_s = slot_s * shape.s / checked
    coarse = (tuple(resampled(node, checked) for node in nodes), mixes, longer_s, demand * longer_s / slot_s)
    worth = -solution.fun
    one = worth if fine else -_solve(*_with_states(*coarse), "with states, longer slots", "highs-ipm").fun
    other = -_solve(*_without_states(*coarse), "without states").fun
    disagreement = abs(one - other) / max(abs(one), 1.0)
    if disagreement > AGREE:
        raise BoundError(f"the two formulations give {one:.9g} and {other:.9g}: take slots of another length")
    x = solution.x
    rises = shape.rises_of(x)
    return Bound(
        worth,
        x[shape.tokens].reshape(shape.s, shape.x),
        x[shape.runs].reshape(shape.n, shape.s, shape.p).transpose(1, 0, 2),
        np.array([node.ambient_c + rise for node, rise in zip(nodes, rises)]).T,
        x[shape.charge].reshape(shape.n, shape.s).T,
        disagreement,
        checked,
    )


def resampled(node: Node, slots: int) -> Node:
    """The same orbit in `slots` equal slots: temperatures and watts by means over each, links by sums."""
    old = len(node.ambient_c)
    if slots == old:
        return node
    open_link = np.isinf(node.link_bytes)
    link = means(np.where(open_link, 0.0, node.link_bytes), slots) * old / slots
    link[means(open_link.astype(float), slots) > 0] = np.inf
    return replace(node, ambient_c=means(node.ambient_c, slots), array_w=means(node.array_w, slots), link_bytes=link)


def means(values: np.ndarray, slots: int) -> np.ndarray:
    """Values [S, ...] of equal slots as means over `slots` equal ones, however their edges fall."""
    old = len(values)
    edges = np.linspace(0, old, slots + 1)
    total = np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, 0)])
    whole = np.minimum(edges.astype(int), old - 1)
    part = (edges - whole).reshape(-1, *[1] * (values.ndim - 1))
    return np.diff(total[whole] + part * values[whole], axis=0) * slots / old


class _Shape:
    """Where each variable lies: tokens [S, X], runs [N, S, P], watts of the runs [N, S]; then either the states, charge [N, S] and the
    rises of each node's branches [B, S], or (`flows`) charging and discharging watts [N, S]."""

    def __init__(self, nodes: tuple[Node, ...], mixes: tuple[Mix, ...]):
        self.n, self.s, self.x = len(nodes), len(nodes[0].ambient_c), len(mixes)
        self.p, self.b = len(mixes[0].runs), [len(node.branch_tau_s) for node in nodes]
        ends = np.cumsum([0, self.s * self.x, self.n * self.s * self.p, *([self.n * self.s] * 3)]).tolist()
        self.tokens, self.runs, self.watts, *after = (slice(a, b) for a, b in zip(ends, ends[1:]))
        self.charge = self.plus = after[0]
        self.minus = after[1]
        self.decided, self.flows = self.watts.stop, self.minus.stop
        self.rises = (self.charge.stop + self.s * np.cumsum([0, *self.b])).tolist()  # first of each node, then the end
        self.all = self.rises[-1]

    def of(self, part: slice, node: int, width: int = 1) -> int:
        """First variable of a node in a part [N, S, width]."""
        return part.start + node * self.s * width

    def rises_of(self, x: np.ndarray) -> list[np.ndarray]:
        """Sum over the branches, [S] of each node."""
        return [x[a:b].reshape(-1, self.s).sum(0) for a, b in zip(self.rises, self.rises[1:])]


def _placed(width: int, *blocks: tuple[int, sparse.spmatrix | np.ndarray]) -> sparse.csr_matrix:
    """Rows of `width` columns that hold each block from its first column on."""
    parts = [(first, sparse.coo_matrix(block)) for first, block in blocks]
    values = np.concatenate([part.data for _, part in parts])
    rows = np.concatenate([part.row for _, part in parts])
    columns = np.concatenate([part.col + first for first, part in parts])
    return sparse.csr_matrix((values, (rows, columns)), shape=(parts[0][1].shape[0], width))


def _wide(matrix: sparse.spmatrix, width: int) -> sparse.csr_matrix:
    return sparse.hstack([matrix, sparse.csr_matrix((matrix.shape[0], width - matrix.shape[1]))]).tocsr()


def _shared(nodes: tuple[Node, ...], mixes: tuple[Mix, ...], slot_s: float, demand: float) -> tuple:
    """What both formulations have: objective, equations and inequalities over the decided variables."""
    shape = _Shape(nodes, mixes)
    s, p, width = shape.s, shape.p, shape.decided
    eye = sparse.identity(s, format="csr")
    cost = np.zeros(width)
    cost[shape.tokens] = np.tile([-mix.worth for mix in mixes], s)
    # runs that the tokens of a slot ask for [S * P, S * X] are those that the nodes do
    asked = sparse.kron(eye, np.array([mix.runs for mix in mixes], float).T)
    done = [(shape.of(shape.runs, index, p), -sparse.identity(s * p)) for index in range(shape.n)]
    equal, equal_to = [_placed(width, (0, asked), *done)], [np.zeros(s * p)]
    upper, upper_to = [_placed(width, (0, sparse.kron(eye, np.ones((1, shape.x)))))], [np.full(s, demand)]
    for index, node in enumerate(nodes):
        runs = shape.of(shape.runs, index, p)
        watts = shape.of(shape.watts, index)
        equal.append(_placed(width, (runs, sparse.kron(eye, node.run_j[None] / slot_s)), (watts, -eye)))
        equal_to.append(np.zeros(s))
        upper += [
            _placed(width, (runs, sparse.kron(eye, node.run_s[None]))),  # a node works one slot in a slot
            _placed(width, (runs, sparse.kron(eye, np.full((1, p), node.run_bytes)))),
        ]
        upper_to += [np.full(s, slot_s), node.link_bytes]
    limit = np.concatenate(upper_to)
    binding = np.isfinite(limit)
    return (
        shape,
        cost,
        sparse.vstack(equal),
        np.concatenate(equal_to),
        sparse.vstack(upper).tocsr()[binding],
        limit[binding],
    )


def _with_states(nodes: tuple[Node, ...], mixes: tuple[Mix, ...], slot_s: float, demand: float) -> tuple:
    shape, cost, equal, equal_to, upper, upper_to = _shared(nodes, mixes, slot_s, demand)
    s, states = shape.s, shape.all - shape.decided
    eye, before = sparse.identity(s), sparse.eye(s, k=-1)
    rows, to, upper_rows, limits = [], [], [], []
    least, most = np.zeros(shape.all), np.full(shape.all, np.inf)
    for index, node in enumerate(nodes):
        # charging and discharging in one: what is stored is concave in what is over, so it is at most either line
        first, watts = shape.of(shape.charge, index), shape.of(shape.watts, index)
        for share in (node.eta_charge, 1 / node.eta_discharge):
            upper_rows.append(_placed(shape.all, (first, (eye - before) / slot_s), (watts, share * eye)))
            over = share * (node.array_w - node.idle_w)
            over[0] += node.start_j / slot_s
            limits.append(over)
        least[first : first + s], most[first : first + s] = node.least_j, node.capacity_j
        least[first + s - 1] = max(node.least_j, node.final_j)
        at = shape.rises[index]
        least[at : shape.rises[index + 1]] = -np.inf
        for branch, (r, tau, start) in enumerate(zip(node.branch_r_k_per_w, node.branch_tau_s, node.start_k)):
            keep = np.exp(-slot_s / tau)
            rows.append(_placed(shape.all, (at + branch * s, eye - keep * before), (watts, -(1 - keep) * r * eye)))
            to.append(np.full(s, (1 - keep) * r * node.idle_w))
            to[-1][0] += keep * start
        upper_rows.append(_placed(shape.all, (at, sparse.hstack([eye] * shape.b[index]))))
        limits.append(node.limit_c - node.ambient_c)

    return (
        np.concatenate([cost, np.zeros(states)]),
        sparse.vstack([_wide(equal, shape.all), *rows]).tocsr(),
        np.concatenate([equal_to, *to]),
        sparse.vstack([_wide(upper, shape.all), *upper_rows]).tocsr(),
        np.concatenate([upper_to, *limits]),
        np.stack([least, most], 1),
    )


def _without_states(nodes: tuple[Node, ...], mixes: tuple[Mix, ...], slot_s: float, demand: float) -> tuple:
    """Temperatures as sums of what was spent before, weighted by what is left of it; charges as plain sums."""
    shape, cost, equal, equal_to, upper, upper_to = _shared(nodes, mixes, slot_s, demand)
    s, width, eye = shape.s, shape.flows, sparse.identity(shape.s)
    age = np.arange(s)[:, None] - np.arange(s)
    ever = np.tril(np.ones((s, s)))
    rows, to = [_wide(upper, width)], [upper_to]
    for index, node in enumerate(nodes):
        warms, room = np.zeros((s, s)), node.limit_c - node.ambient_c
        for r, tau, start in zip(node.branch_r_k_per_w, node.branch_tau_s, node.start_k):
            keep = np.exp(-slot_s / tau)
            left = np.where(age >= 0, keep ** np.maximum(age, 0), 0) * (1 - keep) * r
            warms += left
            room = room - keep ** np.arange(1, s + 1) * start - left.sum(1) * node.idle_w
        watts, plus, minus = (shape.of(part, index) for part in (shape.watts, shape.plus, shape.minus))
        # load + charging - discharging is at most what the array gives
        rows += [_placed(width, (watts, warms)), _placed(width, (watts, eye), (plus, eye), (minus, -eye))]
        to += [room, node.array_w - node.idle_w]
        charge = _placed(
            width,
            (plus, node.eta_charge * slot_s * ever),
            (minus, -slot_s / node.eta_discharge * ever),
        )
        least = np.full(s, node.least_j)
        least[-1] = max(node.least_j, node.final_j)
        rows += [charge, -charge]
        to += [np.full(s, node.capacity_j - node.start_j), node.start_j - least]
    cost = np.concatenate([cost, np.zeros(width - shape.decided)])
    return cost, _wide(equal, width), equal_to, sparse.vstack(rows).tocsr(), np.concatenate(to), (0, None)


# measured, 8 nodes in 96 slots: states take 0.9 s by the interior point and 32 s by the dual simplex, the dense form 0.3 s by the latter
def _solve(cost, equal, equal_to, upper, upper_to, limits, name: str, method: str = "highs-ds"):
    # The interior point may give up where nothing is feasible: the simplex tells. Presolve may make a program that neither solves
    # out of one that both do (HiGHS 1.12, "Not Set", on some processors: it depends on the last bits of the coefficients).
    for way, presolve in ((method, True), (method, False), ("highs-ds", True), ("highs-ds", False)):
        options = {"presolve": presolve}
        result = linprog(cost, upper, upper_to, equal, equal_to, limits, method=way, options=options)
        if result.status != 4:
            break
    if result.status == 2:
        raise BoundError(f"no plan meets the limits ({name}): idle power alone is too much for the heat or the battery")
    if result.status != 0:
        raise BoundError(f"HiGHS gave up ({name}): {result.message}")
    return result


def _check(nodes: tuple[Node, ...], mixes: tuple[Mix, ...], slot_s: float, demand: float) -> None:
    if not nodes or not mixes or not slot_s > 0 or not demand >= 0:
        raise BoundError("a bound needs at least one node, one mix, slots of more than 0 s and a demand of at least 0")
    s, p = len(nodes[0].ambient_c), len(mixes[0].runs)
    for index, node in enumerate(nodes):
        b = len(node.branch_tau_s)
        lengths = {"ambient_c": s, "array_w": s, "link_bytes": s, "run_j": p, "run_s": p}
        for name, length in (lengths | {"branch_r_k_per_w": b, "start_k": b}).items():
            if getattr(node, name).shape != (length,):
                raise BoundError(f"node {index}: {name} has shape {list(getattr(node, name).shape)}, not [{length}]")
        if not (b and (node.branch_tau_s > 0).all() and 0 < node.eta_charge <= 1 >= node.eta_discharge > 0):
            raise BoundError(f"node {index}: every tau and both efficiencies must be above 0, efficiencies at most 1")
    if any(len(mix.runs) != p or not (mix.runs >= 0).all() for mix in mixes):
        raise BoundError(f"every mix needs {p} numbers of runs, none below 0")
