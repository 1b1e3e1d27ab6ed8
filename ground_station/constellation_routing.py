"""A router without a model: logits of tokens whose chosen experts follow a stated distribution, for studies of whole constellations.

Which K experts a token takes is drawn from the routing sets of placement_routing (greatest entropy with the stated shares of use, and with
the pair counts where a calibration gives them). How far apart the logits lie is one number, `logit_spread`. Layers are independent of one
another, and so are tokens. Leaves out text: there is no model here, and so no perplexity.

Letters: T tokens, L layers, E experts, K chosen, R routing sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ground_station.placement_routing import routing_sets

DRAWN_SETS = 4096
"""Where there are too many sets to list; a sample of them is the same for all tokens of a run."""


@dataclass(frozen=True, eq=False)
class Router:
    """use [L, E] (a layer sums to K), sets int [L, R, K], weights [L, R], logit_spread."""

    use: np.ndarray
    sets: np.ndarray
    weights: np.ndarray
    logit_spread: float

    def logits(self, layer: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
        """float32 [T, E], whose K largest are a drawn set's.

        Sets are drawn by low variance, in random order, since a batch of some tens stands for the thousands of a slot. The values are
        normal around the logarithm of the experts' use; the K largest go to the set.
        """
        points = rng.permutation((np.arange(tokens) + rng.random()) / tokens)
        ends = np.cumsum(self.weights[layer])
        chosen = self.sets[layer][np.minimum(np.searchsorted(ends, points * ends[-1]), len(ends) - 1)]
        values = np.log(np.maximum(self.use[layer], 1e-6)) + self.logit_spread * rng.standard_normal(
            (tokens, self.use.shape[1])
        )
        member = np.zeros(values.shape, bool)
        np.put_along_axis(member, chosen, True, 1)
        order = np.lexsort((-values, ~member), axis=1)  # the set's by falling value, then the others'
        result = np.empty(values.shape, np.float32)
        np.put_along_axis(result, order, -np.sort(-values, axis=1).astype(np.float32), 1)
        return result


def router(use: np.ndarray, top_k: int, logit_spread: float, pairs: np.ndarray | None = None, seed: int = 0) -> Router:
    """use [L, E]; pairs [L, E, E]: share of tokens that choose both.  Raises: PlacementError for shares that cannot be."""
    found = [
        routing_sets(row, top_k, None if pairs is None else pairs[layer], DRAWN_SETS, seed)
        for layer, row in enumerate(use)
    ]
    return Router(use, np.stack([sets for sets, _ in found]), np.stack([weights for _, weights in found]), logit_spread)


def shares(weight: np.ndarray, top_k: int) -> np.ndarray:
    """Shares of use [E] that sum to K, in proportion to `weight` [E] (above 0) as far as none is above 1."""
    result = np.ones(len(weight))
    order = np.argsort(-weight, kind="stable")
    left = np.cumsum(weight[order][::-1])[::-1]  # of each and all lighter ones
    for full in range(len(weight)):  # that many take every token
        scale = (top_k - full) / left[full]
        if scale * weight[order[full]] <= 1.0:
            result[order[full:]] = scale * weight[order[full:]]
            break
    return result


def zipf(experts: int, top_k: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Shares of use [E]: the r-th most used in proportion to r^-exponent, who is which drawn at random."""
    weight = np.empty(experts)
    weight[rng.permutation(experts)] = np.arange(1, experts + 1, dtype=float) ** -exponent
    return shares(weight, top_k)
