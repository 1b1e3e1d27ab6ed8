"""What a live run and its replay build alike: the policy by its name, and what prices go by that does not change in a run.

Leaves out: the state of the fleet (live_prices.py). Needs no scipy, as the demo does not.
"""

from __future__ import annotations

from pathlib import Path

from ground_station import selection
from ground_station.dispatch import Table
from ground_station.live_prices import Costs, Orbit, Setting
from ground_station.selection_choice import Policy
from ground_station.selection_world import Calibration
from node_agent import shard

BLIND = ("topk", "random")
"""Policies that look at no state of the fleet: for them nothing is priced."""


def setting_of(table: Table, manifest: shard.Manifest, costs: Costs, limit_c: float, orbit: Orbit | None) -> Setting:
    """What prices go by that does not change in a run; `orbit` as scenario_demo.orbit gives it, or None."""
    return Setting(
        tuple(table.nodes),
        limit_c,
        len(manifest.moe_layers) * manifest.dims.top_k,
        table.copies[min(table.copies)][0][1],
        costs,
        orbit,
    )


def policy_of(name: str, seed: int, bundle: Path, manifest: shard.Manifest) -> Policy:
    """A policy by its name, with the bundle's calibration where it has one."""
    dims, path = manifest.dims, bundle / "calibration.npz"
    known = Calibration.load(path, manifest.moe_layers, dims.experts) if path.exists() else None
    return selection.make(name, manifest.routing, dims.top_k, dims.experts, seed, calibration=known)
