"""`spacemoe benchmark selection`: microseconds that each policy takes to decide for one token of one layer.

The fleet and the logits are random, with fixed seeds: what counts is their size. Prices differ from node to node, every expert has two
copies, in two precisions. The policies take turns, so that a busy moment hits all of them alike. Leaves out: quality
(benchmark_quality.py) and what dispatch makes of a choice.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from ground_station import selection
from ground_station.selection_world import PRECISIONS, Calibration, World
from node_agent import frame
from node_agent.shard import Routing

SIZES = {"16 experts, 4 nodes": (16, 4, 4, 50.0), "128 experts, 16 nodes": (128, 16, 8, 500.0)}
"""Experts, nodes, experts per token, and the microseconds that a decision may take (issue 4)."""
LAYERS = 4


def fleet(experts: int, nodes: int, seed: int = 0) -> World:
    """Every expert on one node as int8 and on the next as int4; prices, joules and latencies differ from node to node."""
    rng = np.random.default_rng(seed)
    hosted = np.zeros((LAYERS, experts, nodes, PRECISIONS), bool)
    for layer in range(LAYERS):
        for expert in range(experts):
            hosted[layer, expert, (expert + layer) % nodes, frame.PRECISION_ID["int8"]] = True
            hosted[layer, expert, (expert + layer + 1) % nodes, frame.PRECISION_ID["int4"]] = True
    joules = rng.uniform(0.5, 2.0, (nodes, 1)) * np.array([4.0, 1.0, 0.6, 0.9, 0.6])  # as frame.PRECISIONS
    return World(
        tuple(range(LAYERS)),
        hosted,
        up=np.ones(nodes, bool),
        joules=joules,
        ms=joules / 2,
        joule_price=rng.uniform(0.002, 0.02, nodes),
        byte_price=rng.uniform(0, 1e-6, nodes),
        row_bytes=np.full(nodes, 1000.0),
        delay_ms=rng.uniform(1, 20, nodes),
        temp_c=rng.uniform(20, 80, nodes),
    )


def calibration(experts: int, seed: int = 0) -> Calibration:
    """Random outputs that have something in common, so that substitutes exist."""
    rng = np.random.default_rng(seed)
    outputs = rng.standard_normal((LAYERS, experts, 16)) + 0.7 * rng.standard_normal((LAYERS, 1, 16))
    norm = np.linalg.norm(outputs, axis=2)
    distance = np.linalg.norm(outputs[:, :, None] - outputs[:, None], axis=3)
    error = np.tile([0.0, 0.01, 0.06, 0.02, 0.3], (LAYERS, 1))
    return Calibration(
        tuple(range(LAYERS)), norm, np.full(norm.shape, 1 / experts), distance, error, 1 / (norm**2).mean(1)
    )


def selection_times(decisions: int = 400, warm: int = 40) -> dict:
    """The figures of `spacemoe benchmark selection --json`: per size and policy median, p95 and n, microseconds."""
    from tqdm import tqdm

    rule = Routing("softmax_topk", True)
    result: dict = {"unit": "us per token and layer", "sizes": {}}
    for label, (experts, nodes, top_k, limit_us) in SIZES.items():
        world, known = fleet(experts, nodes), calibration(experts)
        policies = {name: selection.make(name, rule, top_k, experts, calibration=known) for name in selection.POLICIES}
        rng = np.random.default_rng(1)
        logits = [2 * rng.standard_normal((1, experts)).astype(np.float32) for _ in range(decisions + warm)]
        times: dict[str, list[float]] = {name: [] for name in policies}
        for policy in policies.values():  # what follows from a world, once, belongs to telemetry and not to a token
            for layer in world.layers:
                policy(layer, logits[0], world)
        updates: list[float] = []
        for step in range(8):
            new = world.changed(joule_price=world.joule_price * (1.5 + step))
            started = time.perf_counter_ns()
            for layer in new.layers:
                policies["budgeted"](layer, logits[0], new)
            updates.append((time.perf_counter_ns() - started) / 1e3 / LAYERS)
        for index, row in enumerate(tqdm(logits, desc=label, disable=None, leave=False)):
            for name, policy in policies.items():
                started = time.perf_counter_ns()
                policy(index % LAYERS, row, world)
                if index >= warm:
                    times[name].append((time.perf_counter_ns() - started) / 1e3)
        result["sizes"][label] = {
            "limit_us": limit_us,
            "top_k": top_k,
            "policies": {
                name: {
                    "median": round(statistics.median(values), 1),
                    "p95": round(float(np.percentile(values, 95)), 1),
                    "n": len(values),
                }
                for name, values in times.items()
            },
            "new_prices_per_layer": {"median": round(statistics.median(updates), 1), "n": len(updates)},
        }
    return result


def table(result: dict) -> str:
    """For people."""
    lines = [f"{result['unit']}: median (95th percentile)"]
    for label, size in result["sizes"].items():
        lines.append(f"{label}, {size['top_k']} experts per token, limit {size['limit_us']:g}:")
        for name, row in size["policies"].items():
            over = "  over the limit" if row["median"] > size["limit_us"] else ""
            lines.append(f"  {name:11} {row['median']:8.1f} ({row['p95']:.1f}){over}")
        lines.append(
            f"  prices of a layer after telemetry, once for all tokens: {size['new_prices_per_layer']['median']:.0f}"
        )
    return "\n".join(lines)
