"""What a run of an expert costs on each node, measured over the data plane before the first token: ms, and joules above idle.

Each node in turn runs what it holds, a precision at a time, one row through each expert as decoding does, for ROUND_S in all. ms are
its own compute time per pair, joules its own counter of compute joules (node_agent.joules: energy above its baseline power, by the
seconds spent) per compute second. Meters lag and a young baseline is high, so that joules of so short a round are low, on
simulated boards by a third; live_prices.py goes by the counters from then on. Leaves out: a node without a meter, whose joules are
taken as the others' mean (and said so).
"""

from __future__ import annotations

import itertools
import time

import numpy as np

from ground_station import ledger
from ground_station.control import Control
from ground_station.dispatch import Table
from ground_station.link import Link
from ground_station.live_prices import Costs
from ground_station.selection_world import PRECISIONS
from node_agent import compress, frame, shard

ROUND_S = 0.6  # per node
TIMEOUT_S = 1.0
FIRST_ID = 1 << 40  # apart from the requests of the decode loop: a late answer must not be taken for one of theirs


def measure(link: Link, control: Control, table: Table, manifest: shard.Manifest, codec: str) -> Costs:
    """Costs of every node of `table`; `codec`: of the later rows, for their bytes. The nodes know their baseline power by now."""
    n = len(table.nodes)
    ms, per_s = np.full((n, PRECISIONS), np.nan), np.full(n, np.nan)
    x = np.random.default_rng(0).standard_normal((1, manifest.dims.hidden)).astype(np.float32)
    ids = itertools.count(FIRST_ID)
    meters = []
    for index, node in enumerate(table.nodes):
        held = _held(table, index)
        before = ledger.take(control, [node])[node]
        total_us = 0
        for precision, layers in held.items():
            taken_us, pairs = _round(link, node, precision, layers, x, ids, ROUND_S / len(held))
            total_us += taken_us
            ms[index, precision] = taken_us / 1e3 / pairs if pairs else np.nan
        spent = ledger.between(before, ledger.take(control, [node])[node])
        if isinstance(spent, ledger.Spent) and spent.joules.parts is not None and total_us:
            compute_j = spent.joules.parts[ledger.KINDS.index("compute")]
            per_s[index] = compute_j * 1e6 / total_us if compute_j > 0 else np.nan
        meters.append(spent.provenance if isinstance(spent, ledger.Spent) else spent.reason)
    return of(table, ms, per_s, meters, _row_bytes(codec, manifest.dims.hidden))


def of(table: Table, ms: np.ndarray, per_s: np.ndarray, meters: list[str], row_bytes: float) -> Costs:
    """Costs from what was measured: ms [N, P], joules per compute second [N], nan where not known; meters: provenance or why not."""
    hosted = np.zeros(ms.shape, bool)
    for copies in table.copies.values():
        for node, precision in copies:
            hosted[node, precision] = True
    filled_ms = np.where(np.isnan(ms), _mean(ms, 0)[None, :], ms)
    filled_ms = np.where(np.isnan(filled_ms), _mean(ms, None), filled_ms)
    watts = np.where(np.isnan(per_s), _mean(per_s, None), per_s)
    ms_known = np.where(hosted, np.nan_to_num(filled_ms), 0.0)
    joules = ms_known / 1e3 * np.nan_to_num(watts)[:, None]
    source = []
    for index in range(len(table.nodes)):
        timed = (
            "measured over the data plane"
            if not np.isnan(ms[index][hosted[index]]).any()
            else "in part the other nodes' mean"
        )
        if np.isnan(watts[index]):
            energy = "unknown on every node: nothing is priced"
        elif np.isnan(per_s[index]):
            energy = f"the other nodes' mean ({meters[index]})"
        else:
            energy = f"its own meter ({meters[index]})"
        source.append(f"ms: {timed}; joules: {energy}")
    return Costs(joules, ms_known, np.full(len(table.nodes), row_bytes), tuple(source))


def _mean(values: np.ndarray, axis: int | None) -> np.ndarray | float:
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _held(table: Table, node: int) -> dict[int, dict[int, list[int]]]:
    """precision id -> layer -> experts of which the node holds a copy."""
    held: dict[int, dict[int, list[int]]] = {}
    for (layer, expert), copies in sorted(table.copies.items()):
        for where, precision in copies:
            if where == node:
                held.setdefault(precision, {}).setdefault(layer, []).append(expert)
    return held


def _round(
    link: Link, node: str, precision: int, layers: dict[int, list[int]], x: np.ndarray, ids, seconds: float
) -> tuple[int, int]:
    """(microseconds computed, pairs) in `seconds` of asking; a failure ends the round."""
    taken_us = pairs = 0
    end_s = time.monotonic() + seconds
    for layer in itertools.cycle(layers):
        if time.monotonic() >= end_s:
            break
        wanted = np.array([(0, expert, precision, 1 / len(layers[layer])) for expert in layers[layer]], frame.PAIR)
        number = next(ids)
        request = frame.Frame(
            frame.EXPERTS,
            number,
            layer,
            destination=link.peers[node].number,
            x=x,
            pairs=wanted,
            budget_us=int(TIMEOUT_S * 1e6),
        )
        answer = link.exchange({node: (number, frame.pack(request))}, TIMEOUT_S)[node]
        if not isinstance(answer, frame.Frame):
            break
        taken_us += answer.compute_us
        pairs += len(wanted)
    return taken_us, pairs


def _row_bytes(codec: str, hidden: int) -> float:
    """Of one row there and back; a codec without a fixed size counts as q8 until the nodes' counters say better."""
    size = compress.CODECS[codec].size or compress.CODECS["q8"].size
    return 2.0 * (frame.HEADER_BYTES + size(1, hidden)) + frame.PAIR.itemsize
