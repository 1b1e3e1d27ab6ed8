"""Routing contract: from router logits to experts and gates, exactly as the model defines it. Pure numpy.

Shape letters as in ALGORITHMS: T tokens, E experts of a layer, K experts per token.
"""

from __future__ import annotations

import numpy as np

from node_agent.shard import Routing


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, float32."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    shifted /= shifted.sum(-1, keepdims=True)
    return shifted


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices [T, K] of the k largest scores per row, largest first; ties go to the lower index."""
    return (-scores).argsort(axis=-1, kind="stable")[:, :k]


def gates_of(logits: np.ndarray, experts: np.ndarray, routing: Routing) -> np.ndarray:
    """Gates [T, K] of chosen experts [T, K] from router logits [T, E], by the model's own rule."""
    if len(logits) == 1:  # one token: plain indexing costs a fifth of take_along_axis
        row, chosen = logits, experts[0]
        if routing.renormalise or routing.kind == "topk_softmax":
            return softmax(row[:, chosen])
        return softmax(row)[:, chosen]
    if routing.renormalise or routing.kind == "topk_softmax":  # the same: what all share cancels out
        return softmax(np.take_along_axis(logits, experts, -1))
    return np.take_along_axis(softmax(logits), experts, -1)
