"""What `spacemoe plan` reads: the nodes of a fleet (TOML, or N alike) and a bundle's calibration, and the placement problem they make.

    tokens_per_s = 5.0        # average, for heat and battery
    horizon_s = 5739          # over which a battery's energy is to last
    dark_share = 0.1          # share of time with half of the nodes out of contact
    fleet_mb = 9.0            # bound on all copies together (default: what the nodes hold)
    [variants.int8]           # of one expert and token on a node of speed 1 (default: the bundle's figures, else an estimate)
    ms = 0.4
    joules = 0.002
    [[nodes]]
    id = "n1"
    memory_mb = 2.5           # for experts, resident
    speed = 1.0
    limit_w = 1.5             # for experts, on average, above idle: what heat allows (default: no limit)
    battery_wh = 3.0          # that experts may draw over the horizon (default: no limit)
    path_ms = 4.0             # to the node and back (default 1)

Leaves out: live fleets (the coordinator knows those) and contact plans (here any half of the nodes may be out of contact).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ground_station.placement import RESIDENT_FACTOR, PlacementError
from ground_station.placement_problem import Problem
from ground_station.placement_routing import routing_sets
from node_agent import npz_file, toml_file
from node_agent.shard import BundleError, Manifest

MAX_FLEET_BYTES = 1 << 20
MAX_NODES = 256
# MODELS.md: one thread of an x86 core, one token: 0.85 ms for 4.46 MB at 8 bit, 0.61 ms for 2.70 MB at 4 bit, 1.95 for 17.3 MB fp32;
# 2 bit took 1.05 times as long as 4 bit on the same core, at 1.66 against 2.77 MB
MS_PER_MB = {"fp32": 0.113, "int8": 0.191, "int8dyn": 0.147, "int4": 0.226, "int2": 0.394}
CALL_MS = 0.02
ACTIVE_W = 5.0  # of a board's core while an expert runs, where joules were not measured; an assumption
SETS = 64
COPIES = 1.25  # times one 8-bit copy of all experts: what equal nodes have together where nobody says
SLACK = 1.05  # of the even share: whole copies do not divide evenly


@dataclass(frozen=True)
class Node:
    """One node, as in the file."""

    id: str
    memory_mb: float
    speed: float = 1.0
    limit_w: float = math.inf
    battery_wh: float = math.inf
    path_ms: float = 1.0


@dataclass(frozen=True)
class Fleet:
    """Nodes, and what is asked of them."""

    nodes: tuple[Node, ...]
    tokens_per_s: float = 5.0
    horizon_s: float = 5739.0
    dark_share: float = 0.1
    fleet_mb: float = math.inf
    variants: tuple[tuple[str, float, float], ...] = ()  # precision, ms, joules

    def __post_init__(self) -> None:
        if not 1 <= len(self.nodes) <= MAX_NODES:
            raise PlacementError(f"{len(self.nodes)} nodes: give 1 to {MAX_NODES}")
        if len({node.id for node in self.nodes}) < len(self.nodes):
            raise PlacementError("two nodes have the same id: rename one")
        if not 0 <= self.dark_share < 1:
            raise PlacementError(f"dark_share {self.dark_share:g} is not in [0, 1): give the share of time as 0.1")


def alike(count: int, memory_mb: float) -> Fleet:
    """Equal nodes n1 to nN without limits of heat or battery."""
    _check_count(count)
    if not (memory_mb > 0 and math.isfinite(memory_mb)):
        raise PlacementError(f"--memory {memory_mb:g} is not above 0: give MB per node for experts")
    return Fleet(tuple(Node(f"n{i + 1}", memory_mb) for i in range(count)))


def sharing(count: int, manifest: Manifest) -> tuple[Fleet, str]:
    """Equal nodes that hold COPIES times one 8-bit copy of the experts together, and that in words.  Raises: PlacementError."""
    _check_count(count)
    name = next((name for name in ("int8", "int8dyn") if name in manifest.precisions), manifest.precisions[0])
    one = int(max(entry.bytes for entry in manifest.shards if entry.precision == name) * RESIDENT_FACTOR)
    fleet_bytes = COPIES * one * len(manifest.moe_layers) * manifest.dims.experts
    each_mb = max(math.ceil(fleet_bytes * SLACK / count), one) / 1e6
    nodes = tuple(Node(f"n{i + 1}", each_mb) for i in range(count))
    return Fleet(nodes, fleet_mb=math.ceil(fleet_bytes) / 1e6), (
        f"without --memory: {each_mb:.2f} MB per node, and {fleet_bytes / 1e6:.2f} MB in all nodes together, "
        f"{COPIES:g} times one {name} copy of the experts"
    )


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_NODES:
        raise PlacementError(f"{count} nodes: give 1 to {MAX_NODES}, or a file by --nodes FILE.toml")


def read(path: Path) -> Fleet:
    """Raises: PlacementError naming the file, the key and what is wrong."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_FLEET_BYTES + 1)
    except OSError as error:
        raise PlacementError(f"{path} cannot be read ({error.strerror}): give --nodes FILE.toml or a number") from None
    if len(raw) > MAX_FLEET_BYTES:
        raise PlacementError(f"{path} is over {MAX_FLEET_BYTES} bytes: not a list of nodes")
    try:
        tree = toml_file.loads(raw)
    except toml_file.TomlError as error:
        raise PlacementError(f"{path} is not TOML ({' '.join(str(error).split())[:80]})") from None
    top = {"tokens_per_s": 1, "horizon_s": 1, "dark_share": 0, "fleet_mb": 1}
    _known(path, "", tree, {*top, "nodes", "variants"})
    values = {key: _number(path, key, tree[key], bool(above)) for key, above in top.items() if key in tree}
    rows = tree.get("nodes")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise PlacementError(
            f'{path} has no nodes: write a table [[nodes]] with id = "n1" and memory_mb = 2.5 for each'
        )
    nodes = []
    for number, row in enumerate(rows):
        where = f"nodes[{number}]"
        _known(path, where, row, {"id", "memory_mb", "speed", "limit_w", "battery_wh", "path_ms"})
        name = row.get("id")
        if not isinstance(name, str) or not name or len(name) > 64 or not name.isprintable():
            raise PlacementError(f'{path}: {where}.id is no name: write id = "n{number + 1}"')
        if "memory_mb" not in row:
            raise PlacementError(f"{path}: {where} ({name}) has no memory_mb: write memory_mb = 2.5")
        above = {"memory_mb", "speed"}
        nodes.append(
            Node(name, **{k: _number(path, f"{where}.{k}", v, k in above) for k, v in row.items() if k != "id"})
        )
    variants = tree.get("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(row, dict) for row in variants.values()):
        raise PlacementError(f"{path}: variants are tables: write [variants.int8] with ms and joules")
    figures = []
    for name, row in variants.items():
        _known(path, f"variants.{name}", row, {"ms", "joules"})
        if set(row) != {"ms", "joules"}:
            raise PlacementError(f"{path}: variants.{name} needs both ms and joules")
        figures.append((name, *(_number(path, f"variants.{name}.{k}", row[k], True) for k in ("ms", "joules"))))
    return Fleet(tuple(nodes), variants=tuple(figures), **values)


def _known(path: Path, where: str, row: dict, keys: set[str]) -> None:
    for key in row:
        if key not in keys:
            raise PlacementError(
                f"{path}: {where + '.' if where else ''}{key[:40]} is unknown: use {', '.join(sorted(keys))}"
            )


def _number(path: Path, key: str, value: object, above: bool) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value < 1e12
        or (above and value == 0)
    ):
        raise PlacementError(f"{path}: {key} = {str(value)[:40]} is no number {'above' if above else 'of at least'} 0")
    return float(value)


def calibration(root: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """counts, gate_mean [L, E], coactivation [L, E, E], successive [L - 1, E, E], tokens of a bundle; where it was measured
    sensitivity [L], drop_kl [L, K], layer_error_PRECISION [L].  Raises: BundleError."""
    path, layers, experts = root / "calibration.npz", len(manifest.moe_layers), manifest.dims.experts
    shapes = {
        "counts": (layers, experts),
        "gate_mean": (layers, experts),
        "coactivation": (layers, experts, experts),
        "successive": (max(layers - 1, 0), experts, experts),
        "tokens": (),
    }
    optional = {"sensitivity": (layers,), "drop_kl": (layers, manifest.dims.top_k)}
    optional |= {f"layer_error_{name}": (layers,) for name in manifest.precisions}
    if not path.exists():
        raise BundleError(f"{path} is missing: quantize again with --calibration FILE")
    try:
        found = npz_file.read(path, shapes | optional, optional=optional)
    except npz_file.NpzError as error:
        raise BundleError(
            f"{path} cannot be used ({error}): copy the bundle again, or quantize again with --calibration FILE"
        ) from None
    for name, value in found.items():
        if (value < 0).any():
            raise BundleError(f"{path}: {name} is not at least 0: quantize again")
    if found["tokens"] < 1 or not np.allclose(found["counts"].sum(1), found["tokens"] * manifest.dims.top_k):
        raise BundleError(f"{path}: counts do not add up to {manifest.dims.top_k} experts per token: quantize again")
    return found


def work(manifest: Manifest, fleet: Fleet) -> tuple[dict[str, tuple[float, float]], str]:
    """(ms, joules) of an expert per precision on a node of speed 1, and where the figures are from, in words."""
    given = {name: (ms, joules) for name, ms, joules in fleet.variants}
    sources, result = set(), {}
    for precision in manifest.precisions:
        shards = [entry for entry in manifest.shards if entry.precision == precision]
        measured = [(entry.ms, entry.joules) for entry in shards if entry.ms is not None and entry.joules is not None]
        if precision in given:
            result[precision], source = given[precision], "given in the file of nodes"
        elif len(measured) == len(shards):
            result[precision], source = tuple(np.mean(measured, axis=0)), "measured (bundle)"
        else:
            size = max(entry.bytes for entry in shards) / 1e6
            ms = CALL_MS + MS_PER_MB.get(precision, max(MS_PER_MB.values())) * size
            result[precision], source = (
                (ms, ms / 1e3 * ACTIVE_W),
                f"estimated from bytes, {ACTIVE_W:g} W while an expert runs",
            )
        sources.add(source)
    unknown = sorted(set(given) - set(manifest.precisions))
    if unknown:
        raise PlacementError(f"variants.{unknown[0]}: the bundle has {', '.join(manifest.precisions)}")
    return result, "; ".join(sorted(sources))


def damage(stats: dict[str, np.ndarray], names: tuple[str, ...], errors: list[float]) -> np.ndarray:
    """Problem.nats [L, V + 1] of calibration statistics; empty for a bundle in which it was not measured.

    A precision costs the layer's sensitivity times its squared relative error; an expert out of reach what leaving out its pairs
    costs, summed over the K pairs of a token.
    """
    if "sensitivity" not in stats or "drop_kl" not in stats:
        return np.zeros((0, 0))
    each = [
        stats["sensitivity"] * stats.get(f"layer_error_{name}", np.float64(error)) ** 2
        for name, error in zip(names, errors)
    ]
    return np.stack([*each, stats["drop_kl"].sum(1)], 1)


def problem(root: Path, manifest: Manifest, fleet: Fleet, seed: int = 0) -> tuple[Problem, str]:
    """The placement problem of a bundle on a fleet, and the source of ms and joules.  Raises: PlacementError, BundleError."""
    stats = calibration(root, manifest)
    figures, source = work(manifest, fleet)
    names = manifest.precisions
    layers, tokens = len(manifest.moe_layers), float(stats["tokens"])
    use = stats["counts"] / tokens
    mass = stats["counts"] * stats["gate_mean"]
    mass = mass / np.maximum(mass.sum(1, keepdims=True), 1e-30)
    sets = [
        routing_sets(use[i], manifest.dims.top_k, stats["coactivation"][i] / tokens, SETS, seed) for i in range(layers)
    ]
    shards = {name: [entry for entry in manifest.shards if entry.precision == name] for name in names}
    resident = np.array([int(max(entry.bytes for entry in shards[name]) * RESIDENT_FACTOR) for name in names])
    errors = [np.mean([entry.rel_error or 0.0 for entry in shards[name]]) for name in names]
    path = np.array([node.path_ms for node in fleet.nodes])
    memory = np.array([int(node.memory_mb * 1e6) for node in fleet.nodes])
    bound = int(memory.sum()) if math.isinf(fleet.fleet_mb) else int(fleet.fleet_mb * 1e6)
    return Problem(
        use=use,
        mass=mass,
        sets=np.stack([s for s, _ in sets]),
        weights=np.stack([w for _, w in sets]),
        variants=names,
        bytes=resident,
        ms=np.array([figures[name][0] for name in names]),
        joules=np.array([figures[name][1] for name in names]),
        error=np.array(errors),
        nodes=tuple(node.id for node in fleet.nodes),
        memory=memory,
        speed=np.array([node.speed for node in fleet.nodes]),
        limit_w=np.array([node.limit_w for node in fleet.nodes]),
        energy_j=np.array([node.battery_wh * 3600.0 for node in fleet.nodes]),
        path_ms=np.broadcast_to(path, (1, layers, len(path))),
        chances=np.ones(1),
        tokens_per_s=fleet.tokens_per_s,
        horizon_s=fleet.horizon_s,
        fleet_bytes=bound,
        successive=stats["successive"],
        dark_share=fleet.dark_share,
        nats=damage(stats, names, errors),
    ), source
