"""`budgeted`: which experts a token is worth, on which node and in which precision, at the prices of the moment.

Per token and layer it minimises value * loss + price. The loss is that of the layer's output when gates are off by d: d' gram d, with
the Gram matrix of the experts' outputs and the layer's weight from calibration (selection_world.Calibration). Experts are left
out one by one, the least loss per price first, and what a left-out expert would have added is given to those that stay as far as
they are alike (least squares: one step of "optimal brain surgeon" on the gates); of the sets on that path the cheapest in sum
is taken. The path does not depend on the scale of prices, so when all prices rise together, no more is spent. Coverage guards every
step. What is kept does not carry the gates of what is lost in full: renormalising to the old sum loses more (LOG.md).

An expert that no node has up is replaced by the next one that the router would have taken, with that one's own gate; or, by choice, by
the most similar one in calibration, which may then also stand in for an expert that costs more than it is worth. On the
reference model the router's next is the better stand-in, and the similar one no better than nothing (LOG.md).
Leaves out: latency as a maximum over nodes (it is priced as a sum), and what other tokens choose.

Shape letters: T tokens, E experts, K experts per token, S slots (the K chosen, then their substitutes), N nodes, P precisions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ground_station.selection_choice import Choice
from ground_station.selection_world import BEST_FIRST, PRECISIONS, RIDGE, Calibration, World
from node_agent import routing
from node_agent.shard import Routing

SUBSTITUTES = ("router", "similar", "none")
_ROUNDING = 1e-9


class _Prices(NamedTuple):
    """One layer at the prices of one world, as arrays for many tokens and as lists for one.

    offer [E, P]: run and visit of the cheapest copy, infinite without one; run, node [E, P]; blur [E, P]: loss per squared gate by
    the precision; visit [N]; nearest [E] (-1: none), nearest_offer, nearest_loss [E]: the substitute, its price, loss per squared gate.
    options[e]: (offer, run, node, precision, blur) of each precision that there is.
    """

    offer: np.ndarray
    run: np.ndarray
    node: np.ndarray
    blur: np.ndarray
    visit: np.ndarray
    nearest: np.ndarray
    nearest_offer: np.ndarray
    nearest_loss: np.ndarray
    options: list[list[tuple[float, float, int, int, float]]]
    substitutes: list[tuple[float, float]]
    visits: list[float]


@dataclass(eq=False)
class Budgeted:
    """`topk`, less what is not worth its price; see the module.

    value: price units that a nat of loss per token is worth; coverage: least share of the gates' sum that is kept; variants: choose among
    precisions (else the best that is up); substitute: one of SUBSTITUTES. `calibration` None: all experts alike.
    Raises: ValueError for a coverage outside (0, 1], a value that is not positive, or an unknown substitute.
    """

    routing: Routing
    top_k: int
    experts: int
    coverage: float = 0.5
    calibration: Calibration | None = None
    value: float = 1.0
    variants: bool = True
    substitute: str = "router"

    def __post_init__(self) -> None:
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage {self.coverage} is not in (0, 1]")
        if not 0 < self.value < float("inf"):
            raise ValueError(f"value {self.value} is not a positive number")
        if self.substitute not in SUBSTITUTES:
            raise ValueError(f"substitute {self.substitute!r} is unknown: use one of {', '.join(SUBSTITUTES)}")
        self._world: World | None = None
        self._prices: dict[int, _Prices] = {}
        self._known: tuple[Calibration, np.ndarray] | None = None

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        experts = routing.largest(logits, self.top_k)
        gates = routing.gates_of(logits, experts, self.routing)
        if world is None or (world.free and world.complete):
            return Choice(experts, gates)
        calibration, gram = self._calibrated(world.layers)
        prices = self._priced(layer, world, calibration)
        matrix = gram[calibration.position[layer]]
        if len(gates) == 1 and (choice := self._one(experts, gates, matrix, prices)) is not None:
            return choice
        return self._many(logits, experts, gates, matrix, prices)

    def _calibrated(self, layers: tuple[int, ...]) -> tuple[Calibration, np.ndarray]:
        """The calibration and value * gram [M, E, E]."""
        if self._known is None or (self.calibration is None and not set(layers) <= set(self._known[0].layers)):
            calibration = self.calibration or Calibration.neutral(layers, self.experts)
            self._known = calibration, self.value * calibration.gram
        return self._known

    def _priced(self, layer: int, world: World, calibration: Calibration) -> _Prices:
        """The layer's prices; kept until another world comes."""
        if world is not self._world:
            self._world, self._prices = world, {}
        if layer not in self._prices:
            self._prices[layer] = self._look_up(layer, world, calibration)
        return self._prices[layer]

    def _look_up(self, layer: int, world: World, calibration: Calibration) -> _Prices:
        m, c = world.position[layer], calibration.position[layer]
        nodes, runs = world.cheapest
        node, run = nodes[m], runs[m]
        if not self.variants:
            rank = np.array([BEST_FIRST.index(p) for p in range(PRECISIONS)])
            best = np.where(np.isfinite(run), rank, PRECISIONS).argmin(1)
            run = np.where(np.arange(PRECISIONS) == best[:, None], run, np.inf)
        offer = run + world.visit_price[node]
        worth = self.value * calibration.sensitivity[c]
        square = calibration.output_norm[c] ** 2
        blur = worth * square[:, None] * calibration.precision_error[c] ** 2
        cheapest = offer.min(1)
        e = len(square)
        nearest, nearest_offer, nearest_loss = np.full(e, -1), np.full(e, np.inf), np.full(e, np.inf)
        if self.substitute == "similar":
            apart = worth * calibration.distance[c] ** 2
            score = cheapest + apart * calibration.gate_mean[c][:, None] ** 2
            score[(apart >= worth * square[:, None]) | (cheapest[None, :] >= cheapest[:, None])] = np.inf
            found = score.argmin(1)
            has = np.isfinite(score[np.arange(e), found])
            nearest = np.where(has, found, -1)
            nearest_offer = np.where(has, cheapest[found], np.inf)
            nearest_loss = np.where(has, apart[np.arange(e), found], np.inf)
        options: list[list[tuple[float, float, int, int, float]]] = [[] for _ in range(e)]
        there = np.isfinite(offer)
        i, p = there.nonzero()
        for expert, *option in zip(
            i.tolist(), *(a[there].tolist() for a in (offer, run, node)), p.tolist(), blur[there].tolist()
        ):
            options[expert].append(tuple(option))
        return _Prices(
            offer,
            run,
            node,
            blur,
            world.visit_price,
            nearest,
            nearest_offer,
            nearest_loss,
            options,
            list(zip(nearest_offer.tolist(), nearest_loss.tolist())),
            world.visit_price.tolist(),
        )

    def _one(self, experts: np.ndarray, gates: np.ndarray, gram: np.ndarray, prices: _Prices) -> Choice | None:
        """One token in plain Python, at half the cost of numpy; None where a substitute is called for."""
        row = experts[0]
        matrix = gram[row[:, None], row]
        g = gates[0].tolist()
        slots = range(len(g))
        run, node, precision = [], [], []
        for i, expert in enumerate(row.tolist()):
            square = g[i] * g[i]
            least = float("inf")
            for offer, cost, where, variant, blur in prices.options[expert]:
                if (total := offer + blur * square) < least:
                    least, best = total, (cost, where, variant)
            nearest_offer, nearest_loss = prices.substitutes[expert]
            loss = matrix.item(i, i) / (1 + RIDGE) * square
            if least == float("inf") or nearest_offer + nearest_loss * square < min(least, loss):
                return None
            run.append(best[0])
            node.append(best[1])
            precision.append(best[2])
        inverse = np.linalg.inv(matrix).tolist()
        visits = prices.visits
        alive = list(slots)
        at_node = [0] * len(visits)
        for i in slots:
            at_node[node[i]] += 1
        x = list(g)
        whole = sum(g)
        kept, floor = whole, self.coverage * whole - _ROUNDING
        total = least = 0.0
        result, staying = x, slots
        while len(alive) > 1:
            least_ratio = float("inf")
            for i in alive:
                if kept - g[i] < floor:
                    continue
                saving = run[i] + visits[node[i]] if at_node[node[i]] == 1 else run[i]
                if saving > 0:
                    loss = x[i] * x[i] / inverse[i][i]
                    if (ratio := loss / saving) < least_ratio:
                        least_ratio, out, change = ratio, i, loss - saving
            if least_ratio == float("inf"):
                break
            total += change
            alive.remove(out)
            at_node[node[out]] -= 1
            kept -= g[out]
            column = inverse[out]
            pivot = column[out]
            step = x[out] / pivot
            x = [x[j] - column[j] * step for j in slots]
            for j in alive:
                left = inverse[j]
                factor = column[j]
                inverse[j] = [left[k] - factor * column[k] / pivot for k in slots]
            if total < least - _ROUNDING:
                least, result, staying = total, x, tuple(alive)
        final, nodes, precisions = [0.0] * len(g), [-1] * len(g), [-1] * len(g)
        for j in staying:
            final[j], nodes[j], precisions[j] = max(result[j], 0.0), node[j], precision[j]
        return Choice(experts, np.array([final], np.float32), np.array([nodes]), np.array([precisions]))

    def _many(
        self, logits: np.ndarray, experts: np.ndarray, gates: np.ndarray, gram: np.ndarray, prices: _Prices
    ) -> Choice:
        """Any number of tokens at once; the same decisions as `_one`."""
        t, k = gates.shape
        rows = np.arange(t)
        g = gates.astype(np.float64)
        square = g * g
        score = prices.offer[experts] + prices.blur[experts] * square[..., None]
        precision = score.argmin(2)
        least = score.min(2)
        loss = gram[experts, experts] / (1 + RIDGE) * square
        instead = prices.nearest_offer[experts] + prices.nearest_loss[experts] * square
        forced = np.isinf(least) | (instead < np.minimum(least, loss))
        slots, x, cover, alive = experts, g.copy(), g, np.ones((t, k), bool)
        if forced.any():
            if self.substitute == "router":
                other, own = _next_best(logits, experts, g, forced, np.isfinite(prices.offer).any(1))
                use, covers = other >= 0, own
            else:
                other, own = prices.nearest[experts], np.zeros((t, k))
                use = forced & (other >= 0) & ~(other[:, :, None] == experts[:, None, :]).any(2)
                for column in range(1, k):
                    use[:, column] &= ~((other[:, :column] == other[:, column, None]) & use[:, :column]).any(1)
                share = np.where(use, prices.nearest_loss[experts], 0) / (gram[experts, experts] / (1 + RIDGE))
                covers = np.where(use, g * np.maximum(0, 1 - np.sqrt(share)), 0)
            slots = np.concatenate([experts, np.where(use, other, 0)], 1)
            score = prices.offer[slots[:, k:]] + prices.blur[slots[:, k:]] * square[..., None]
            precision = np.concatenate([precision, score.argmin(2)], 1)
            x = np.concatenate([x, own], 1)
            cover = np.concatenate([g, covers], 1)
            alive = np.concatenate([alive, use], 1)
        node, run = prices.node[slots, precision], prices.run[slots, precision]
        s = slots.shape[1]
        matrix = np.where(
            (alive[:, :, None] & alive[:, None, :]) | np.eye(s, dtype=bool),
            gram[slots[:, :, None], slots[:, None, :]],
            0,
        )
        inverse = np.linalg.inv(matrix)
        for column in range(k if forced.any() else 0):
            hit = np.flatnonzero(forced[:, column])
            _leave_out(x, inverse, alive, hit, np.full(len(hit), column))
        kept = np.where(alive, cover, 0).sum(1)
        floor = np.minimum(self.coverage * g.sum(1), kept) - _ROUNDING
        total, least_total = np.zeros(t), np.zeros(t)
        result, result_alive = np.where(alive, np.maximum(x, 0), 0), alive.copy()
        at_node = np.zeros((t, len(prices.visit)), np.int64)
        np.add.at(at_node, (np.broadcast_to(rows[:, None], alive.shape)[alive], node[alive]), 1)
        for _ in range(s - 1):
            sole = at_node[rows[:, None], node] == 1
            saving = np.where(alive, run + np.where(sole, prices.visit[node], 0), 0)
            may = alive & (kept[:, None] - cover >= floor[:, None]) & (saving > 0) & (alive.sum(1) > 1)[:, None]
            loss = np.divide(x * x, np.einsum("tss->ts", inverse), out=np.zeros_like(x), where=alive)
            ratio = np.divide(loss, saving, out=np.full_like(x, np.inf), where=may)
            out = ratio.argmin(1)
            hit = np.flatnonzero(np.isfinite(ratio[rows, out]))
            if not len(hit):
                break
            out = out[hit]
            total[hit] += loss[hit, out] - saving[hit, out]
            at_node[hit, node[hit, out]] -= 1
            kept[hit] -= cover[hit, out]
            _leave_out(x, inverse, alive, hit, out)
            better = hit[total[hit] < least_total[hit] - _ROUNDING]
            least_total[better] = total[better]
            result[better] = np.where(alive[better], np.maximum(x[better], 0), 0)
            result_alive[better] = alive[better]
        lost = ~result_alive.any(1)
        if s > k:  # at most K are left: each substitute stands for one that was left out
            order = np.argsort(~result_alive, axis=1, kind="stable")[:, :k]
            slots, result, node, precision, result_alive = (
                np.take_along_axis(a, order, 1) for a in (slots, result, node, precision, result_alive)
            )
            # nobody can be reached: the model's own choice stands, and the fallback ladder deals with it
            slots, result = np.where(lost[:, None], experts, slots), np.where(lost[:, None], g, result)
        node, precision = np.where(result_alive, node, -1), np.where(result_alive, precision, -1)
        return Choice(slots, result.astype(np.float32), node, precision)


def _next_best(
    logits: np.ndarray, experts: np.ndarray, gates: np.ndarray, lost: np.ndarray, reachable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(expert int64, gate) [T, K]: for each lost slot the best expert that is reachable (bool [E]) and not chosen yet; -1 and 0 elsewhere.

    Gates are proportional to exp(logit) in every family's rule, so the gate of an expert that was not chosen follows from one that was.
    """
    score = np.where(reachable, logits, -np.inf).astype(np.float64)
    np.put_along_axis(score, experts, -np.inf, 1)
    order = routing.largest(score, experts.shape[1])
    turn = np.maximum(lost.cumsum(1) - 1, 0)
    expert = np.take_along_axis(order, turn, 1)
    logit = np.take_along_axis(score, expert, 1)
    use = lost & np.isfinite(logit)
    largest = np.take_along_axis(logits, experts[:, :1], 1)
    return np.where(use, expert, -1), np.where(use, gates[:, :1] * np.exp(np.where(use, logit - largest, 0)), 0)


def _leave_out(x: np.ndarray, inverse: np.ndarray, alive: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """Takes slot `out` of each of `rows` from the solution x [T, S] and the inverse Gram matrix [T, S, S], in place."""
    column = inverse[rows, out]
    at = np.arange(len(rows))
    pivot = column[at, out][:, None]
    x[rows] -= column * (x[rows, out][:, None] / pivot)
    inverse[rows] -= column[:, :, None] * column[:, None, :] / pivot[..., None]
    alive[rows, out] = False
    x[rows] = np.where(alive[rows], x[rows], 0)
