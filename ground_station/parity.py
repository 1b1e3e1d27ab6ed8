"""Whether a fleet wrote what one process writes with the same partition, codec and grouping: the same generation again, in here.

Leaves out: the fleet's own run (demo.py, generate.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ground_station.decode import Decoder, TokenCost
from ground_station.dispatch import Table
from ground_station.local import LocalExperts
from ground_station.local_wire import Importance, WiredExperts
from ground_station.rates import Allocator
from ground_station.sampling import Sampling
from ground_station.selection_choice import Policy
from ground_station.trunk import Trunk
from node_agent.shard import Manifest


def with_one_process(
    bundle: Path,
    manifest: Manifest,
    table: Table,
    trunk: Trunk,
    policy: Policy,
    codec: str,
    allocator: Allocator | None,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    costs: Sequence[TokenCost],
    logits: Sequence[np.ndarray],
) -> dict:
    """`equal` is None when the ladder was used: then there is nothing to compare. `policy` and `allocator`: new ones, that repeat
    what the fleet's did. `max_logit_diff`: up to the first token that differs, since after it two texts are compared."""
    rungs = sum(len(cost.rungs) for cost in costs)
    reference: list[np.ndarray] = []
    if allocator is None:
        experts = LocalExperts(bundle, manifest, table, codec)
    else:
        experts = WiredExperts(bundle, manifest, table, Importance(allocator))
    decoder = Decoder(trunk, policy, experts, manifest.eos_ids)
    tokens = [
        cost.token_id
        for cost in decoder.generate(prompt_ids, len(costs), sampling, keep_logits=reference, ignore_eos=True)
    ]
    same = [a == b.token_id for a, b in zip(tokens, costs)]
    alike = same.index(False) + 1 if False in same else len(same)
    worst = max(float(np.abs(a - b).max()) for a, b in zip(logits[:alike], reference))
    return {
        "equal": None if rungs else all(same) and len(tokens) == len(costs),
        "tokens_equal": sum(same),
        "tokens": len(tokens),
        "max_logit_diff": worst,
        "note": f"the ladder was used {rungs} times: texts may differ" if rungs else "",
    }
