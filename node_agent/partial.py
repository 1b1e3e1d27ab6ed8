"""Partial-sum contract: which expert runs on which rows, and in which order gate * expert(x) is added up.

The agent and the single-process reference of the ground station use the same function, so their results can be compared
bit by bit. Leaves out: how an expert is run (experts.py, or a session in the ground station).
"""

from __future__ import annotations

from typing import Callable

import numpy as np

from node_agent import frame

# Dynamic int8 scales its activations over the whole call: more than one row at a time and a row sees its neighbours.
ROW_BY_ROW = frozenset({frame.PRECISION_ID["int8dyn"]})
RunExpert = Callable[[int, int, np.ndarray], np.ndarray]
_TWICE = "expert {} (precision id {}) is asked for the same row twice: send one pair with the sum of the gates"


def partial_sum(x: np.ndarray, pairs: np.ndarray, run_expert: RunExpert) -> np.ndarray:
    """out float32 [T, D], out[t] = sum over the pairs of row t of gate * expert(x[t]); rows without a pair are 0.

    x float32 [T, D], C-contiguous; pairs frame.PAIR [P]. `run_expert(expert, precision id, rows [R, D]) -> [R, D]` is
    called once per (expert, precision), in ascending order, with the rows in ascending order; what it returns is read
    before the next call, so it may be the same buffer each time. Products and sums are float32.
    Raises: ValueError for a row that names the same expert and precision twice, and what `run_expert` raises.
    """
    if x.shape[0] == 1:
        return _one_row(x, pairs, run_expert)
    keys = pairs["expert"].astype(np.int64) << 8 | pairs["precision"]
    rows = pairs["row"].astype(np.int64)
    order = np.lexsort((rows, keys))
    keys, rows, gates = keys[order], rows[order], pairs["gate"][order][:, None]
    if ((keys[1:] == keys[:-1]) & (rows[1:] == rows[:-1])).any():
        twice = int(keys[1:][(keys[1:] == keys[:-1]) & (rows[1:] == rows[:-1])][0])
        raise ValueError(_TWICE.format(twice >> 8, twice & 255))
    starts = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist()]
    out = np.zeros_like(x)
    for start, end in zip(starts, [*starts[1:], len(keys)]):
        expert, precision = divmod(int(keys[start]), 256)
        if precision in ROW_BY_ROW:
            for row, gate in zip(rows[start:end].tolist(), gates[start:end]):
                out[row] += run_expert(expert, precision, x[row : row + 1])[0] * gate
        elif end - start == x.shape[0]:  # every row, in order: nothing to gather
            out += run_expert(expert, precision, x) * gates[start:end]
        else:
            chosen = rows[start:end]
            out[chosen] += run_expert(expert, precision, x[chosen]) * gates[start:end]
    return out


def _one_row(x: np.ndarray, pairs: np.ndarray, run_expert: RunExpert) -> np.ndarray:
    """The common case of decoding one token: nothing to gather, and numpy's overhead would be most of the cost."""
    calls = sorted([(expert, precision, gate) for _, expert, precision, gate in pairs.tolist()])
    out = product = None
    last = None
    for expert, precision, gate in calls:
        if (expert, precision) == last:
            raise ValueError(_TWICE.format(expert, precision))
        last = (expert, precision)
        y = run_expert(expert, precision, x)
        if out is None:
            out = np.multiply(y, gate, dtype=np.float32)
        else:
            product = np.multiply(y, gate, out=product, dtype=np.float32)
            out += product
    return np.zeros_like(x) if out is None else out
