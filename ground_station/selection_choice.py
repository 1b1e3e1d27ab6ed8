"""The interface of every selection policy: what it is given, and the `Choice` it makes.

A policy maps router logits [T, E] of a layer, and the state of the fleet where there is one, to chosen experts and gates [T, K]; a gate
of 0 means "not run". It may also name the node and the precision of each pair; where it does not, dispatch decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ground_station.selection_world import World


@dataclass(frozen=True)
class Choice:
    """Experts int64 [T, K] and gates float32 [T, K] of one layer; nodes (index in dispatch.Table.nodes) and precision ids int64
    [T, K], -1 where dispatch is to decide. Both None: it decides everywhere.
    """

    experts: np.ndarray
    gates: np.ndarray
    nodes: np.ndarray | None = None
    precisions: np.ndarray | None = None


class Policy(Protocol):
    """Callable with (layer, router logits float32 [T, E], world or None) -> Choice."""

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice: ...
