"""Who holds which expert: placement v1, round robin over the nodes in proportion to nothing but free memory.

Pure: node memories in, holdings out. Each expert gets one primary; replicas (a second copy, possibly in a lower precision)
go to the following nodes, while memory lasts. Leaves out: heat, battery and co-activation (issue of the policies).
"""

from __future__ import annotations

from dataclasses import dataclass

from node_agent.shard import Manifest

EMERGENCY = frozenset({"int2"})
"""Precisions that only stand in for a better copy that is out of contact. `coverage` alone gives such copies beside better ones."""
RESIDENT_FACTOR = 1.5  # resident bytes per byte of shard file once onnxruntime has loaded it (MODELS: measured)


class PlacementError(ValueError):
    """The experts do not fit; the text names what binds."""


@dataclass(frozen=True)
class Holding:
    """A shard on a node. Rank 0 is the primary of its expert, higher ranks are used when lower ones fail."""

    node: str
    layer: int
    expert: int
    precision: str
    rank: int


def round_robin(
    manifest: Manifest, memory_bytes: dict[str, int], precision: str, replica_precisions: tuple[str, ...] = ()
) -> tuple[Holding, ...]:
    """Expert e of the l-th MoE layer goes to node (e + l) mod N, or the next one that has room.

    Raises: PlacementError when a primary fits nowhere; a replica that fits nowhere is left out.
    """
    nodes = sorted(memory_bytes)
    if not nodes:
        raise PlacementError("no node to place experts on: start a node agent first")
    free = dict(memory_bytes)
    size = {(s.layer, s.expert, s.precision): int(s.bytes * RESIDENT_FACTOR) for s in manifest.shards}
    held: dict[tuple[int, int], list[Holding]] = {}
    for rank, wanted in enumerate((precision, *replica_precisions)):
        for position, layer in enumerate(manifest.moe_layers):
            for expert in range(manifest.dims.experts):
                need = size.get((layer, expert, wanted))
                if need is None:
                    raise PlacementError(
                        f"bundle {manifest.name} has no {wanted} shards: it holds {', '.join(manifest.precisions)}"
                    )
                copies = held.setdefault((layer, expert), [])
                taken = {copy.node for copy in copies}
                start = expert + position + rank
                order = [nodes[(start + step) % len(nodes)] for step in range(len(nodes))]
                home = next((node for node in order if node not in taken and free[node] >= need), None)
                if home is None:
                    if rank == 0:
                        raise PlacementError(
                            f"memory binds: expert {expert} of layer {layer} ({need / 1e6:.1f} MB resident as {wanted}) fits "
                            f"no node; add nodes or use a lower precision"
                        )
                    continue
                free[home] -= need
                copies.append(Holding(home, layer, expert, wanted, rank))
    return tuple(copy for copies in held.values() for copy in copies)
