"""What a constellation study came to: a row per placement and policy, as JSON, as text, and slot by slot as Parquet.

Leaves out: the run (constellation_run.py) and pictures.
"""

from __future__ import annotations

import json
import resource
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

from ground_station import constellation_run, constellation_setting
from ground_station.constellation_file import Study
from ground_station.constellation_run import Trace
from ground_station.constellation_setting import Setting
from node_agent import shard

COLUMNS_WIDE = 100
NO_TEXT = (
    "there is no text and no model here, so no perplexity: quality is the share of the model's own gate mass that ran"
)
ASSUMED = (
    "joules and ms per run are the file's; joules are those above idle, of experts and attention, the radio's are left out",
    "a token's latency: attention, flight from the layer's gateway to its satellites and on to the next layer's gateway, the runs of one "
    "satellite one after another, the slowest satellite of each layer; no queues, no link rates",
    "a slot serves what its busiest satellite can: tokens wait for an expert, they do not do without",
    "each slot's tokens are a batch that stands for all of them; loads are smoothed over slots",
)


def run(study: Study, bundle: Path, folder: Path | None = None) -> dict:
    """Plays the study, with a progress bar on a terminal. `folder`: result.json and slots.parquet go there.

    Raises: what constellation_setting.prepare and constellation_run.play raise; ModuleNotFoundError without pyarrow; OSError.
    """
    from tqdm import tqdm

    if folder is not None:
        import pyarrow.parquet  # noqa: F401  told now if it is not installed, not after the run

        folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    silent = None if sys.stderr is not None else True
    with tqdm(total=2 * study.play.slots, unit="slot", disable=silent, leave=False) as bar:
        bar.set_description("paths and placement")
        setting = constellation_setting.prepare(study, bundle, bar.update)
        prepared = time.perf_counter()
        bar.set_description("policies")
        traces = constellation_run.play(setting, bar.update)
    took = {"prepare": round(prepared - began, 2), "play": round(time.perf_counter() - prepared, 2)}
    # what this process has taken at most so far, in units of 1024 bytes on Linux
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    result = summary(setting, traces) | {"information": {"seconds": took, "peak_memory_mb": round(peak_mb, 1)}}
    if folder is not None:
        _write(folder, setting, traces, result)
    return result


def summary(setting: Setting, traces: tuple[Trace, ...]) -> dict:
    """For JSON; the same study gives the same, but for `decide_us_per_token_and_layer` of each row."""
    study = setting.study
    shape, heat = study.constellation, study.satellite
    return {
        "study": study.name,
        "provenance": "simulated",
        "quality": NO_TEXT,
        "satellites": shape.satellites,
        "constellation": f"{shape.kind} {shape.inclination_deg:g} deg, {shape.planes} planes of {shape.per_plane}, "
        f"{shape.altitude_km:g} km",
        "slots": study.play.slots,
        "slot_s": round(study.slot_s, 4),
        "mission_s": round(study.play.slots * study.slot_s, 2),
        "seed": study.seed,
        "n": 1,
        "model": {
            "layers": study.model.layers,
            "experts": study.model.experts,
            "top_k": study.model.top_k,
            "routing": study.model.routing,
            "source": study.model.source,
        },
        "costs": {
            "source": study.cost_source,
            "attention_ms": study.attention.attention_ms,
            "attention_joules": study.attention.attention_joules,
            **{each.name: {"ms": each.ms, "joules": each.joules} for each in study.variants},
        },
        "demand_tokens": round(study.play.slots * study.slot_s * study.play.tokens_per_s, 3),
        "limit_c": None if heat is None else heat.payload.limit_c,
        "rows": [_row(setting, trace) for trace in traces],
        "assumed": list(ASSUMED),
    }


def _row(setting: Setting, trace: Trace) -> dict[str, Any]:
    study = setting.study
    copies = setting.copies[study.placements.index(trace.placement)]
    tokens = float(trace.tokens.sum())
    weight = trace.tokens / max(tokens, 1e-12)
    latency = percentiles(trace.latency_ms, trace.tokens, (0.5, 0.99))
    mean_ms = float(weight @ np.nan_to_num(np.nanmean(_some(trace.latency_ms), axis=1)))
    heat = study.satellite is not None
    over = int((trace.over_s > 0).sum())
    at_work = sorted({copy.node for copy in copies} | set(setting.gateways[trace.placement.gateways].tolist()))

    def of_heat(value: float, digits: int) -> float | None:
        return round(float(value), digits) if heat else None

    return {
        "placement": trace.placement.label,
        "policy": trace.policy.label,
        "admission": trace.policy.admission,
        "tokens": round(tokens, 1),
        "served_share": round(tokens / (study.play.slots * study.slot_s * study.play.tokens_per_s), 4),
        "gate_mass_kept": round(float(weight @ trace.gate_mass), 5),
        "least_layers_gate_mass": round(float(weight @ trace.least_mass), 5),
        "covered_tokens": round(float(trace.tokens @ trace.covered), 1),
        # None where not one token was served
        "latency_ms": {
            name: round(value, 3) if tokens else None
            for name, value in (("mean", mean_ms), ("p50", latency[0]), ("p99", latency[1]))
        },
        "joules_per_token": round(float(trace.joules.sum()) / max(tokens, 1e-12), 6),
        "experts_out_of_reach": round(float(trace.out_of_reach.mean()), 6),
        "slots_cut_off": int(np.isnan(trace.latency_ms).all(1).sum()),
        "over_limit": {
            "satellites": over if heat else None,
            "share": of_heat(over / len(trace.over_s), 6),
            "worst_s": of_heat(trace.over_s.max(), 1),
            "satellite_s": of_heat(trace.over_s.sum(), 1),
        },
        "hottest_c": of_heat(trace.hottest_c.max(), 2),
        "lowest_soc": of_heat(trace.least_soc[at_work].min(), 4),
        "lowest_soc_of_idle_too": of_heat(trace.least_soc.min(), 4),
        "copies": len(copies),
        "hosting_satellites": len({copy.node for copy in copies}),
        "megabytes": round(sum(study.variants[copy.variant].megabytes for copy in copies), 3),
        "decide_us_per_token_and_layer": round(trace.decide_us, 2),
    }


def _some(latency_ms: np.ndarray) -> np.ndarray:
    """Without rows of no numbers alone, of which numpy would warn."""
    return np.where(np.isnan(latency_ms).all(1, keepdims=True), 0.0, latency_ms)


def percentiles(latency_ms: np.ndarray, tokens: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    """Of latency_ms [S, T], each slot counted as the tokens [S] that it served: the least value that a share is not above."""
    known = ~np.isnan(latency_ms)
    values = latency_ms[known]
    weight = np.broadcast_to((tokens / latency_ms.shape[1])[:, None], latency_ms.shape)[known]
    if not weight.sum() > 0:
        return [float("nan")] * len(shares)
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weight[order])
    at = np.searchsorted(sums, np.array(shares) * sums[-1] * (1 - 1e-12))
    return values[order[np.minimum(at, len(order) - 1)]].astype(float).tolist()


_SLOTS = ("tokens", "gate_mass", "least_mass", "covered", "out_of_reach", "joules", "over", "hottest_c", "lowest_soc")


def _write(folder: Path, setting: Setting, traces: tuple[Trace, ...], result: dict) -> None:
    """result.json, what --json prints; slots.parquet, a row per placement, policy and slot. Each appears whole or not at all."""
    import pyarrow
    from pyarrow import parquet

    study, slots = setting.study, setting.study.play.slots
    parts = []
    for trace in traces:
        columns: dict[str, Any] = {
            "placement": [trace.placement.label] * slots,
            "policy": [trace.policy.label] * slots,
            "seed": np.full(slots, study.seed, np.int64),
            "slot": np.arange(slots),
            "mission_s": (np.arange(slots) + 1) * study.slot_s,
            "latency_mean_ms": np.where(np.isnan(trace.latency_ms).all(1), np.nan, _some(trace.latency_ms).mean(1)),
        } | {name: getattr(trace, name) for name in _SLOTS}
        parts.append(pyarrow.table({name: pyarrow.array(v, from_pandas=True) for name, v in columns.items()}))
    with shard.atomic_file(folder / "slots.parquet") as file:
        parquet.write_table(pyarrow.concat_tables(parts), file)
    with shard.atomic_file(folder / "result.json") as file:
        file.write(json.dumps(result).encode())


COLUMNS = (
    ("served", 7, lambda row: f"{row['served_share']:.1%}"),
    ("gates", 7, lambda row: f"{row['gate_mass_kept']:.4f}"),
    ("p50 ms", 8, lambda row: _dash(row["latency_ms"]["p50"], "{:.1f}")),
    ("p99 ms", 8, lambda row: _dash(row["latency_ms"]["p99"], "{:.1f}")),
    ("J/token", 8, lambda row: _dash(row["joules_per_token"] or None, "{:.4f}")),
    ("over", 5, lambda row: _dash(row["over_limit"]["satellites"], "{:d}")),
    ("worst s", 8, lambda row: _dash(row["over_limit"]["worst_s"], "{:.0f}")),
    ("soc", 6, lambda row: _dash(row["lowest_soc"], "{:.3f}")),
    ("out", 7, lambda row: f"{row['experts_out_of_reach']:.2%}"),
    ("us", 6, lambda row: f"{row['decide_us_per_token_and_layer']:.1f}"),
)


def _dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def text(result: dict) -> str:
    """A table, and what the figures are."""
    several = len({row["placement"] for row in result["rows"]}) > 1
    lines, placement = [], None
    width = max(len(row["policy"]) + 2 * several for row in result["rows"])
    if several:
        width = max(width, max(len(row["placement"]) for row in result["rows"]))
    head = " " * width + "".join(f"{name:>{size + 1}}" for name, size, _ in COLUMNS)
    lines.append(head)
    for row in result["rows"]:
        if several and row["placement"] != placement:
            placement = row["placement"]
            lines.append(placement)
        name = "  " * several + row["policy"]
        lines.append(f"{name:{width}}" + "".join(f"{cell(row):>{size + 1}}" for _, size, cell in COLUMNS))
    limit = "heat and battery do not count" if result["limit_c"] is None else f"limit {result['limit_c']:g} degC"
    took = result["information"]
    notes = [
        f"{result['study']}: {result['satellites']} satellites ({result['constellation']}), {result['slots']} slots of "
        f"{result['slot_s']:g} s, demand {result['demand_tokens']:.0f} tokens, {limit}; n = {result['n']}, all simulated",
        "gates: share of the model's own gate mass that ran; over: satellites above the limit; out: experts without a copy in reach; "
        f"us: to decide, per token and layer, on this machine; {NO_TEXT}",
        f"model: {result['model']['layers']} layers of {result['model']['experts']} experts, top {result['model']['top_k']}; "
        f"{result['model']['source']}",
        f"costs: {result['costs']['source']}",
        f"took {took['seconds']['prepare']:g} s to prepare and {took['seconds']['play']:g} s to play, at most "
        f"{took['peak_memory_mb']:.0f} MB",
    ]
    return "\n".join([*lines, *(textwrap.fill(note, COLUMNS_WIDE) for note in notes)])
