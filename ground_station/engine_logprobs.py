"""Natural logarithms of the probabilities of tokens, from logits. Pure numpy; leaves out sampling, which they do not depend on."""

from __future__ import annotations

import numpy as np

from ground_station.engine_request import Token

ROWS = 16  # at a time: float64 of a whole chunk of a large vocabulary would be hundreds of megabytes


def tokens_of(logits: np.ndarray, token_ids: np.ndarray | list[int], top: int) -> list[Token]:
    """The tokens [S] with their log probabilities by logits [S, V], and the `top` likeliest of each row, likeliest first."""
    found: list[Token] = []
    for start in range(0, len(token_ids), ROWS):
        rows = logits[start : start + ROWS].astype(np.float64)
        rows -= rows.max(1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(1, keepdims=True))
        for row, token_id in zip(rows, token_ids[start : start + ROWS]):
            likely: tuple[tuple[int, float], ...] = ()
            if top:
                best = np.argpartition(-row, min(top, len(row) - 1))[:top]
                best = best[np.lexsort((best, -row[best]))]
                likely = tuple(zip(best.tolist(), row[best].tolist()))
            found.append(Token(int(token_id), float(row[token_id]), likely))
    return found
