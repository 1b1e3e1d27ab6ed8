"""What a policy sees besides the router's logits: the fleet's state and prices (`World`), and the bundle's calibration.

Arrays only, no I/O but reading calibration.npz. Leaves out: how prices follow from telemetry (selection_prices.py) and what is done
with them (selection_baselines.py, selection_budgeted.py).

Shape letters: M MoE layers, E experts of a layer, N nodes, P precisions (the ids of frame.PRECISIONS), T tokens, K experts per token.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ground_station.dispatch import Table
from node_agent import frame, npz_file

PRECISIONS = len(frame.PRECISIONS)
BEST_FIRST = tuple(frame.PRECISION_ID[name] for name in ("fp32", "int8", "int8dyn", "int4", "int2"))
RIDGE = 1.0
"""What the likeness of two experts' outputs says too much: a calibrated mean over tokens is no promise for the next one. Added to the
diagonal of `Calibration.gram`, as a share. Chosen on the first two thirds of the reference model's held-out text (0.25, 0.5 and 1 tried);
`spacemoe benchmark quality` reports on the rest."""


class CalibrationUnusable(ValueError):
    """A calibration.npz does not fit the model; the text names the next step."""


class Offers(NamedTuple):
    """The best copy of each expert of a layer: its node and precision id (-1: none is usable), joules, ms and price of one run."""

    node: np.ndarray  # int64 [E]
    precision: np.ndarray  # int64 [E]
    joules: np.ndarray  # float64 [E], infinite without a copy
    ms: np.ndarray
    price: np.ndarray


@dataclass(frozen=True, eq=False)
class World:
    """The fleet at one moment. All prices are in one currency, that of `Budgeted.value`.

    layers [M]: ids of the MoE layers; hosted bool [M, E, N, P]: who holds what; up bool [N].
    joules, ms: of one row through one expert, measured by the node's self-test; anything that broadcasts to [M, E, N, P].
    joule_price [N] (mu_n) per joule; byte_price [N] per byte; row_bytes [N]: bytes of one row there and back; delay_ms [N]: expected
    latency of the path there and back; ms_price: of a millisecond; temp_c [N], not a number where unknown.
    What a row costs by going to a node at all (bytes, path) is paid once per node and row: partial sums are formed on the node.
    """

    layers: tuple[int, ...]
    hosted: np.ndarray
    up: np.ndarray
    joules: np.ndarray
    ms: np.ndarray
    joule_price: np.ndarray
    byte_price: np.ndarray
    row_bytes: np.ndarray
    delay_ms: np.ndarray
    temp_c: np.ndarray
    ms_price: float = 0.0

    def __post_init__(self) -> None:
        n = len(self.up)
        if (
            self.hosted.ndim != 4
            or self.hosted.shape[0] != len(self.layers)
            or self.hosted.shape[2:] != (n, PRECISIONS)
        ):
            raise ValueError(
                f"hosted has shape {list(self.hosted.shape)}, not [layers, experts, {n} nodes, {PRECISIONS}]"
            )
        for name in ("joule_price", "byte_price", "row_bytes", "delay_ms", "temp_c"):
            if getattr(self, name).shape != (n,):
                raise ValueError(
                    f"{name} has shape {list(getattr(self, name).shape)}, not one value for each of {n} nodes"
                )
        for name in ("joule_price", "byte_price", "row_bytes", "delay_ms", "joules", "ms"):
            if not (np.asarray(getattr(self, name)) >= 0).all():
                raise ValueError(f"{name} must be 0 or more everywhere")
        price = self.ms_price
        if isinstance(price, bool) or not isinstance(price, Real) or not 0 <= price < math.inf:
            raise ValueError("ms_price must be a number of 0 or more")

    @classmethod
    def of(cls, table: Table, experts: int, joules: np.ndarray, ms: np.ndarray, **state: np.ndarray | float) -> World:
        """From dispatch's table of copies and the self-test's joules and ms [N, P]; `state` as the fields, missing ones are 0
        (`up`: all; `temp_c`: unknown).
        """
        layers = tuple(sorted({layer for layer, _ in table.copies}))
        n = len(table.nodes)
        hosted = np.zeros((len(layers), experts, n, PRECISIONS), bool)
        for (layer, expert), copies in table.copies.items():
            for node, precision in copies:
                hosted[layers.index(layer), expert, node, precision] = True
        nothing = {name: np.zeros(n) for name in ("joule_price", "byte_price", "row_bytes", "delay_ms")}
        return cls(
            layers,
            hosted,
            joules=joules,
            ms=ms,
            **{"up": np.ones(n, bool), "temp_c": np.full(n, np.nan), **nothing, **state},
        )

    def changed(self, **state: np.ndarray | float) -> World:
        """The same fleet in another state: what telemetry brings."""
        return dataclasses.replace(self, **state)

    @cached_property
    def position(self) -> dict[int, int]:
        return {layer: m for m, layer in enumerate(self.layers)}

    @cached_property
    def free(self) -> bool:
        """Nothing costs anything."""
        return not (self.joule_price.any() or (self.byte_price * self.row_bytes).any() or self.ms_price)

    @cached_property
    def complete(self) -> bool:
        """Every expert has a copy on a node that is up."""
        return bool(self.usable.any((2, 3)).all())

    @cached_property
    def usable(self) -> np.ndarray:
        """bool [M, E, N, P]: copies on nodes that are up."""
        return self.hosted & self.up[None, None, :, None]

    @cached_property
    def visit_price(self) -> np.ndarray:
        """[N]: what a row costs by going to a node."""
        return self.byte_price * self.row_bytes + self.ms_price * self.delay_ms

    @cached_property
    def run_price(self) -> np.ndarray:
        """[M, E, N, P]: one row through one expert, once its row is there; infinite without a copy."""
        price = self.joule_price[:, None] * self.joules + self.ms_price * np.asarray(self.ms)
        return np.where(self.usable, price, np.inf)

    @cached_property
    def cheapest(self) -> tuple[np.ndarray, np.ndarray]:
        """(node int64, run price) [M, E, P]: per precision the copy with the least price, the visit included in the comparison."""
        node = self._argmin(self.run_price + self.visit_price[:, None])
        return node, np.take_along_axis(self.run_price, node[:, :, None, :], 2)[:, :, 0, :]

    def _argmin(self, cost: np.ndarray) -> np.ndarray:
        """Node int64 [M, E, P] of the least cost [M, E, N, P]. Equal ones take turns from expert to expert, so that the work spreads."""
        m, e, n, p = cost.shape
        turn = (np.arange(m)[:, None, None] + np.arange(e)[:, None] + np.arange(n)) % n  # [M, E, N]
        rolled = np.take_along_axis(cost, turn[..., None], 2)
        return np.take_along_axis(turn, rolled.argmin(2).reshape(m, e, p), 2)

    def offers(self, cost: np.ndarray) -> tuple[Offers, ...]:
        """Per layer the copy of least `cost` [M, E, N, P] among the usable ones of the best precision that an expert has up."""
        found = self.usable
        rank = np.array([BEST_FIRST.index(p) for p in range(PRECISIONS)])
        best = np.where(found.any(2), rank, PRECISIONS).argmin(2)  # [M, E]
        m, e = best.shape
        node = self._argmin(np.where(found, cost, np.inf))
        node = np.take_along_axis(node, best[..., None], 2)[..., 0]
        where = (np.arange(m)[:, None], np.arange(e), node, best)
        has = found[where]
        shape = self.hosted.shape

        def pick(values: np.ndarray) -> np.ndarray:
            return np.where(has, np.broadcast_to(values, shape)[where], np.inf)

        joules, ms, price = pick(self.joules), pick(self.ms), pick(self.run_price)
        ms = ms + self.delay_ms[node]
        price = price + self.visit_price[node]
        node, best = np.where(has, node, -1), np.where(has, best, -1)
        return tuple(Offers(*row) for row in zip(node, best, joules, ms, price))

    @cached_property
    def coolest(self) -> tuple[Offers, ...]:
        """Copies on the coolest node; one of unknown temperature counts as the hottest."""
        temp = np.where(np.isnan(self.temp_c), np.inf, self.temp_c)
        finite = temp[np.isfinite(temp)]
        temp = np.minimum(temp, finite.max() + 1 if len(finite) else 0)
        return self.offers(np.broadcast_to(temp[:, None], self.hosted.shape))

    @cached_property
    def thriftiest(self) -> tuple[Offers, ...]:
        """Copies that take the fewest joules."""
        return self.offers(np.broadcast_to(self.joules, self.hosted.shape))

    @cached_property
    def fastest(self) -> tuple[Offers, ...]:
        return self.offers(np.broadcast_to(self.ms + self.delay_ms[:, None], self.hosted.shape))

    @cached_property
    def marginal(self) -> tuple[Offers, ...]:
        """Copies of the least price, the visit included."""
        return self.offers(self.run_price + self.visit_price[:, None])


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the bundle's calibration.npz says of its experts (quantize.calibrate `combine`).

    output_norm (mean ||E(x)||), gate_mean [M, E]; distance (mean ||E_i(x) - E_j(x)||) [M, E, E]; precision_error [M, P]: relative
    error of a layer's sum in a precision (0 where it was not measured); sensitivity [M]: nats per token for a squared error of 1 in
    the layer's output. Where the file names no `layer_sensitivity` it is 1 / (||residual||^2 + ||experts' sum||^2): a relative error. What
    quantize measures (`sensitivity`) is near that and selected no better on the reference model, so it is not used here.
    """

    layers: tuple[int, ...]
    output_norm: np.ndarray
    gate_mean: np.ndarray
    distance: np.ndarray
    precision_error: np.ndarray
    sensitivity: np.ndarray

    @classmethod
    def neutral(cls, layers: tuple[int, ...], experts: int) -> Calibration:
        """Nothing is known: experts of norm 1 that have nothing in common, in layers of equal weight."""
        ones = np.ones((len(layers), experts))
        distance = np.sqrt(2) * (1 - np.eye(experts))
        return cls(
            layers,
            ones,
            ones / experts,
            np.broadcast_to(distance, (len(layers), experts, experts)),
            np.zeros((len(layers), PRECISIONS)),
            np.ones(len(layers)),
        )

    @classmethod
    def load(cls, path: Path, layers: tuple[int, ...], experts: int) -> Calibration:
        """Raises: CalibrationUnusable."""
        m = len(layers)
        shapes = {
            "output_norm": (m, experts),
            "gate_mean": (m, experts),
            "distance": (m, experts, experts),
            "moe_out_rms": (m, None),
            "moe_to_residual": (m,),
            "moe_layers": (m,),
        }
        measured = {f"layer_error_{name}": (m,) for name in frame.PRECISION_ID} | {"layer_sensitivity": (m,)}
        try:
            found = npz_file.read(path, shapes | measured, optional=measured)
        except npz_file.NpzError as error:
            raise CalibrationUnusable(f"{path} cannot be used ({error}): make the bundle again") from None
        errors = np.zeros((m, PRECISIONS))
        for name, index in frame.PRECISION_ID.items():
            errors[:, index] = found.get(f"layer_error_{name}", 0.0)
        if tuple(found["moe_layers"].astype(int).tolist()) != tuple(layers):
            raise CalibrationUnusable(f"{path} is of other layers than the bundle's: make the bundle again")
        square = (found["moe_out_rms"] ** 2).sum(1)
        residual = square / np.maximum(found["moe_to_residual"] ** 2, 1e-12)
        return cls(
            tuple(layers),
            found["output_norm"],
            found["gate_mean"],
            found["distance"],
            errors,
            found.get("layer_sensitivity", 1 / np.maximum(square + residual, 1e-30)),
        )

    @cached_property
    def position(self) -> dict[int, int]:
        return {layer: m for m, layer in enumerate(self.layers)}

    @cached_property
    def gram(self) -> np.ndarray:
        """float64 [M, E, E]: d' gram d is the expected loss in nats when the gates of a layer are off by d; RIDGE is in it.

        Off the diagonal <E_i, E_j> = (||E_i||^2 + ||E_j||^2 - ||E_i - E_j||^2) / 2, from means, within what Cauchy-Schwarz allows.
        """
        norm = self.output_norm
        product = norm[:, :, None] * norm[:, None, :]
        inner = (norm[:, :, None] ** 2 + norm[:, None, :] ** 2 - self.distance**2) / 2
        inner = np.clip((inner + inner.transpose(0, 2, 1)) / 2, -product, product)
        index = np.arange(norm.shape[1])
        inner[:, index, index] = np.maximum(norm**2, 1e-12) * (1 + RIDGE)
        return self.sensitivity[:, None, None] * inner

    def substitutes(self, layer: int, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(expert int64 [E], loss [E]): for each expert the usable one (bool [E]) whose output is nearest to its own, and the error
        in shares of its output; -1 and 1 where leaving it out is as good. The rung "similar expert" of the ladder needs just this.
        """
        m = self.position[layer]
        distance = np.where(usable[None, :], self.distance[m], np.inf)
        np.fill_diagonal(distance, np.inf)
        nearest = distance.argmin(1)
        loss = distance[np.arange(len(nearest)), nearest] / np.maximum(self.output_norm[m], 1e-12)
        return np.where(loss < 1, nearest, -1), np.minimum(loss, 1.0)
