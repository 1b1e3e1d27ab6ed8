"""What an experiment came to: a row per policy with means and spreads, as JSON and as text.

Leaves out: pictures and traces over time.
"""

from __future__ import annotations

import math
import sys
import textwrap
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from firmware_sim.scenario import Scenario
from ground_station import experiment as experiments
from ground_station import experiment_bound, experiment_identity, experiment_sweep
from ground_station.experiment import Experiment, Run
from ground_station.experiment_orbit import Trace, surroundings
from ground_station.experiment_store import Store
from ground_station.experiment_sweep import Where
from ground_station.experiment_text import CODEC

POINT_SLOTS = 20
"""Slots of which a point of the bound is the mean: some hundred tokens. Of a slot's few, the luckiest would be a bound of luck."""
NOTES = (
    "latency_ms: of a token alone, summed over the layers the node that takes longest with its share, by the costs' ms; without the trunk, "
    "queueing behind other tokens, the codec and the flight of frames",
    f"bytes: both ways, of frames that carry one token: per layer and node that it visits a request (header, pairs, one input) and a reply "
    f"(header, one partial sum), {CODEC} blocks of 8.5 bits per value; without frames sent again, ZeroMQ, TCP and the control plane",
)
"""What the figures of latency and bytes are, and leave out; the module's text of experiment_text.py says it in full."""


def run(
    experiment: Experiment,
    scenario: Scenario,
    bundle: Path,
    with_bound: bool = True,
    where: Where = Where(),
    out: Path | None = None,
    resume: bool = True,
) -> dict:
    """Plays the experiment, with a progress bar on a terminal; into the folder `out` (experiment_store.py) if there is one.

    Raises: what Experiment.priced, experiment_sweep.play and experiment_store.Store raise.
    """
    experiment = experiment.priced(bundle)
    if out is None:
        runs = _played(experiment, scenario, bundle, where, None)
        return _result(experiment, scenario, runs, with_bound, None)
    with Store(out, experiment, scenario, bundle, resume) as store:
        runs = _played(experiment, scenario, bundle, where, store)
        result = _result(experiment, scenario, runs, with_bound, out)
        rows = [row(experiment, scenario, each) for each in runs]
        store.finish(runs, rows, surroundings(experiments.setting_of(experiment, scenario)), result)
        return result


def _result(
    experiment: Experiment, scenario: Scenario, runs: tuple[Run, ...], with_bound: bool, out: Path | None
) -> dict:
    result = summary(experiment, scenario, runs)
    result["bound"] = bound(experiment, scenario, runs, result["policies"]) if with_bound else None
    return result | {"out": None if out is None else str(out)}


def _played(
    experiment: Experiment, scenario: Scenario, bundle: Path, where: Where, store: Store | None
) -> tuple[Run, ...]:
    """Every contender with every seed, in the order of experiment_sweep.tasks_of."""
    from tqdm import tqdm

    def tell(text: str) -> None:
        print(f"spacemoe: {text}", file=sys.stderr)

    number = {each.label: index for index, each in enumerate(experiment.contenders)}
    found = {(number[each.contender.label], each.seed): each for each in (store.saved(tell) if store else ())}
    if found:
        tell(f"{len(found)} of {len(number) * len(experiment.seeds)} runs are in {store.folder} already")
    tasks = experiment_sweep.tasks_of(experiment)
    left = [task for task in tasks if task not in found]
    sweep = experiment_sweep.Sweep(
        experiment, scenario, bundle.absolute(), experiment_identity.parts(experiment, scenario, bundle)
    )
    disable = None if sys.stderr is not None else True
    with (
        tqdm(total=len(tasks), initial=len(found), unit="run", disable=disable, leave=False) as bar,
        closing(experiment_sweep.play(sweep, left, where, bar.set_description)) as runs,
    ):
        for each in runs:
            found[number[each.contender.label], each.seed] = each
            if store is not None:
                store.save(each)
            bar.update()
    return tuple(found[task] for task in tasks)


def bound(experiment: Experiment, scenario: Scenario, runs: tuple[Run, ...], rows: list[dict]) -> dict:
    """The most useful tokens that the mixes of these very runs allow (experiment_bound.py), and each row's share of it, which goes into the
    row. Mixes: what each run spent and got in stretches of POINT_SLOTS slots. A row that passes the limit is not bounded: None.

    Raises: fluid_bound.BoundError.
    """
    setting = experiments.setting_of(experiment, scenario)
    kept = [each.trace for each in runs if not each.trace.over_s.any()]
    if not kept:
        return {"useful_tokens": None, "why": "every run passes the limit"}
    points = [experiment_bound.points_of(trace, min(POINT_SLOTS, experiment.slots)) for trace in kept]
    mixes = experiment_bound.mixes_of(np.concatenate([p[0] for p in points]), np.concatenate([p[1] for p in points]))
    final_soc = min(float(trace.soc[-1].min()) for trace in kept)
    found = experiment_bound.ceiling(setting, surroundings(setting), mixes, final_soc)
    flown = experiment_bound.flown(setting, found)
    for row in rows:
        bounded = row["over_limit_s"]["mean"] == 0
        row["share_of_bound"] = round(row["useful_tokens"]["mean"] / found.bound.worth, 4) if bounded else None
    return {
        "useful_tokens": round(found.bound.worth, 1),
        "share_of_demand": round(found.useful_share, 4),
        "mixes": len(mixes),
        "slot_s": round(found.slot_s, 3),
        "disagreement_of_two_formulations": found.bound.disagreement,
        "too_kind_k": round(flown.over_k, 3),
        "final_soc": round(final_soc, 4),
    }


def summary(experiment: Experiment, scenario: Scenario, runs: tuple[Run, ...]) -> dict:
    """For JSON: a row per contender, each figure as its mean and standard deviation over the seeds."""
    rows = []
    for contender in experiment.contenders:
        found = [figures(experiment, scenario, each.trace) for each in runs if each.contender.label == contender.label]
        means: dict[str, Any] = {"label": contender.label, "policy": contender.policy, "admission": contender.admission}
        for key in found[0]:
            values = [each[key] for each in found]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            means[key] = {
                "mean": round(float(np.mean(values)), 6),
                "sd": spread if spread is None else round(spread, 6),
            }
        rows.append(means)
    return {
        "experiment": experiment.name,
        "scenario": scenario.name,
        "provenance": "simulated",
        "costs": {"source": experiment.source}
        | {name: {"joules": joules, "ms": ms} for name, (joules, ms) in experiment.costs.items()},
        "mission_s": experiment.slots * experiment.slot_s,
        "demand_tokens": experiment.slots * experiment.slot_s * experiment.tokens_per_s,
        "useful": f"coverage at least {experiment.coverage:g} in every layer and divergence at most {experiment.kl_nats:g} nats",
        "limit_c": scenario.payload.limit_c,
        "notes": list(NOTES),
        "n": len(experiment.seeds),
        "policies": rows,
        "runs": [
            {"label": each.contender.label, "seed": each.seed, "decisions_sha256": each.trace.decisions_sha256}
            for each in runs
        ],
    }


def row(experiment: Experiment, scenario: Scenario, run: Run) -> dict[str, Any]:
    """One run as a row of runs.parquet."""
    contender = run.contender
    return (
        {"label": contender.label, "policy": contender.policy, "admission": contender.admission, "seed": run.seed}
        | figures(experiment, scenario, run.trace)
        | {"decisions_sha256": run.trace.decisions_sha256, "wall_s": run.wall_s}
    )


def figures(experiment: Experiment, scenario: Scenario, trace: Trace) -> dict[str, float]:
    """Sums and extremes of one run. perplexity_ratio: to the unconstrained model on the same tokens, weighted by what was served;
    latency and bytes: of the tokens that were really read, each alike (NOTES).
    """
    tokens = trace.tokens.sum()
    joules = (trace.power_w - scenario.payload.idle_w).sum() * experiment.slot_s
    weight = trace.tokens / max(tokens, 1e-12)
    return {
        "tokens": float(tokens),
        "useful_tokens": float(trace.useful.sum()),
        "perplexity_ratio": math.exp(float(weight @ trace.nats)),
        "kl_nats": float(weight @ trace.kl),
        "joules_per_token": float(joules / max(tokens, 1e-12)),
        "joules": float(joules),
        "over_limit_s": float(trace.over_s.max()),
        "hottest_c": float(trace.temp_c.max()),
        "lowest_soc": float(trace.soc.min()),
        "final_soc": float(trace.soc[-1].min()),
        "least_coverage": float(trace.coverage.min()),
        "lost_capacity_ppm": float(1e6 * (scenario.power.start_capacity_share - trace.capacity_share.min())),
        "latency_ms_p50": float(np.percentile(trace.token_latency_ms, 50)),
        "latency_ms_p99": float(np.percentile(trace.token_latency_ms, 99)),
        "bytes_per_token": float(trace.token_bytes.mean()),
    }


COLUMNS_WIDE = 100
COLUMNS = (
    ("useful_tokens", "useful", "{:9.0f}"),
    ("perplexity_ratio", "ppl ratio", "{:9.4f}"),
    ("joules_per_token", "J/token", "{:9.5f}"),
    ("over_limit_s", "over s", "{:7.0f}"),
    ("hottest_c", "hottest", "{:7.1f}"),
    ("lowest_soc", "soc", "{:6.3f}"),
)


def text(result: dict) -> str:
    """A table of the means, at most 100 columns wide, and what the figures are."""
    width = max(len(row["label"]) for row in result["policies"])
    widths = [len(form.format(0)) for _, _, form in COLUMNS]
    head = " " * width + "".join(f" {name:>{size}}" for (_, name, _), size in zip(COLUMNS, widths))
    lines = [head + ("  of bound" if result["bound"] else "")]
    for row in result["policies"]:
        cells = "".join(" " + form.format(row[key]["mean"]) for key, _, form in COLUMNS)
        lines.append(f"{row['label']:{width}}{cells}{_share(row)}")
    notes = [
        f"{result['experiment']}: {result['mission_s']:g} s of mission time, demand {result['demand_tokens']:g} tokens, "
        f"limit {result['limit_c']:g} degC, means of n = {result['n']}; all simulated but the model and its text",
        f"useful: {result['useful']}; ppl ratio: to the unconstrained model on the same tokens; J over idle; "
        "hottest: degC; soc: lowest charge of a battery, 0 to 1",
        f"costs: {result['costs']['source']}",
    ]
    if found := result["bound"]:
        notes.append(f"bound: {found.get('why') or _bound_text(found)}")
    return "\n".join([*lines, *(textwrap.fill(note, COLUMNS_WIDE) for note in notes)])


def _share(row: dict) -> str:
    if "share_of_bound" not in row:
        return ""
    return f" {row['share_of_bound']:9.1%}" if row["share_of_bound"] is not None else f" {'-':>9}"


def _bound_text(found: dict) -> str:
    return (
        f"{found['useful_tokens']:.0f} useful tokens, {found['share_of_demand']:.1%} of the demand, by a plan that knows the orbit "
        f"ahead and mixes what these runs did; its true heat is {found['too_kind_k']:+.2f} K from the limit"
    )
