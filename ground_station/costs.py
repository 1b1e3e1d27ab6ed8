"""Costs of a run of an expert by kind of board, as its self-test measured them: stored in a bundle's costs.json, and read from there.

Leaves out: measuring (node_agent.selftest), the file's form and checks (node_agent.costs), costs measured over the data plane
(live_costs.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from node_agent import bundle_file, costs, shard
from node_agent.costs import BoardCosts, CostsError


@dataclass(frozen=True, eq=False)
class RunCosts:
    """Of one row through one expert by precision id: `joules` over idle and `ms`, float64 [P], not a number where unknown;
    `source`: in words where they are from."""

    joules: np.ndarray
    ms: np.ndarray
    source: str


def boards(root: Path, manifest: shard.Manifest) -> dict[str, BoardCosts]:
    """Every board of which the bundle has costs; empty without a costs.json.  Raises: CostsError, shard.BundleError."""
    entry = bundle_file.entry_of(manifest, costs.FILE)
    if entry is None:
        return {}
    if entry.bytes > costs.MAX_BYTES:
        raise CostsError(f"{costs.FILE} of {manifest.name} is over the limit of {costs.MAX_BYTES} bytes")
    return costs.read(shard.verify_file(root, entry))


def read(root: Path, manifest: shard.Manifest, board: str) -> RunCosts:
    """The costs of one kind of board.  Raises: CostsError where the bundle has none of it, shard.BundleError."""
    known = boards(root, manifest)
    if board not in known:
        there = ", ".join(known) or "none"
        raise CostsError(
            f"bundle {manifest.name} has no costs of board {board[:60]!r}, there are {there}: run node-agent selftest "
            f"--bundle DIR --json there, then spacemoe bundle costs"
        )
    found = known[board]
    if (found.hidden, found.intermediate) != (manifest.dims.hidden, manifest.dims.intermediate):
        raise CostsError(
            f"costs of board {board[:60]!r} are of experts of {found.hidden} x {found.intermediate}: measure them again"
        )
    joules, ms = costs.per_run(found)
    kinds = sorted({each.energy.provenance for each in found.costs if each.energy is not None})
    energy = f"joules {' and '.join(kinds)}" if kinds else "no joules"
    source = f"self-test of {board}{', simulated sensors' if found.simulated else ''}: ms on {found.machine}, {energy}; {found.at}"
    return RunCosts(np.array(joules), np.array(ms), source)


def store(root: Path, files: list[Path], board: str | None = None) -> dict[str, BoardCosts]:
    """Puts the self-tests' costs into the bundle, in place of those of the same boards, and returns all that it has.

    `board`: what the one board is called, where the self-test was not told.  Raises: CostsError, shard.BundleError, OSError.
    """
    if board is not None and len(files) != 1:
        raise CostsError(f"--board names one board and there are {len(files)} self-tests: store them one by one")
    found = [costs.from_selftest(path) for path in files]
    if board is not None:
        found = [costs.check(replace(found[0], board=board))]
    for path, each in zip(files, found):
        if each.board == "unknown":
            raise CostsError(f"{path} does not say of which board it is: add --board NAME")
    if len({each.board for each in found}) < len(found):
        raise CostsError("two of the self-tests are of the same board: give one of each")
    with bundle_file.alone(root):
        manifest = shard.read_manifest(root)
        for path, each in zip(files, found):
            sizes = (manifest.name, manifest.dims.hidden, manifest.dims.intermediate)
            if (each.bundle, each.hidden, each.intermediate) != sizes:
                raise CostsError(f"{path} is of bundle {each.bundle!r}, not {manifest.name!r}: give that bundle")
        if (entry := bundle_file.entry_of(manifest, costs.FILE)) is not None:
            bundle_file.finish(root, entry)
        known = boards(root, manifest) | {each.board: each for each in found}
        content = costs.content(known)
        if len(content) > costs.MAX_BYTES:
            raise CostsError(f"{costs.FILE} would be over the limit of {costs.MAX_BYTES} bytes: store fewer boards")
        bundle_file.put(root, costs.FILE, content)
    return known
