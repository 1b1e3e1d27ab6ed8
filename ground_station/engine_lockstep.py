"""Many sequences through the trunk layer by layer, so that each MoE layer asks its experts once for the rows of all of them.

Attention stays each sequence's own. Leaves out which sequences take part (engine.py) and what runs experts (decode.Decoder.moe).
"""

from __future__ import annotations

import numpy as np

from ground_station.trunk import MoeFunction, Walk


def lockstep(walks: list[Walk], moe: MoeFunction) -> list[np.ndarray | Exception]:
    """Logits [S, V] of each walk, or why the trunk could not take it to its end: the others go on without it.

    Rows are in the order of the walks. Raises: whatever `moe` raises; then no walk has come to its end.
    """
    results: list[np.ndarray | Exception | None] = [None] * len(walks)
    asked: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}

    def go_on(index: int, rows: np.ndarray | None) -> None:
        try:
            asked[index] = walks[index].send(rows)
        except StopIteration as end:
            results[index] = end.value
        except Exception as error:
            results[index] = error

    try:
        for index in range(len(walks)):
            go_on(index, None)
        while asked:
            waiting, asked = asked, {}
            (layer,) = {each[0] for each in waiting.values()}
            hidden = [each[1] for each in waiting.values()]
            logits = [each[2] for each in waiting.values()]
            one = len(waiting) == 1
            out = moe(layer, hidden[0] if one else np.concatenate(hidden), logits[0] if one else np.concatenate(logits))
            start = 0
            for index, rows in zip(waiting, map(len, hidden)):
                go_on(index, out[start : start + rows])
                start += rows
    finally:
        for walk in walks:
            walk.close()
    return results
