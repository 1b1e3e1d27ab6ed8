"""How long batteries last under selection policies that serve the same tokens: cycles to 80 % of the capacity, `budgeted` against `topk`.

Each policy plays held-out text of the reference model through some orbits of a scenario at a demand that all of them serve. The first
orbit is dropped; the watts of the last one are flown on for SETTLING more, until charge and temperature repeat. Then each node's depth
of discharge, charge, battery temperature and period age it by Xu et al. 2016 (firmware_sim.ageing), whose check values are worked out
in the same run beside the published ones. A policy can spare a battery in two ways: fewer joules per token, and the same joules on
nodes that are in the sun. Power traces made of both runs ("what if") say how much is whose. A row that served less, or whose orbit
does not close, is invalid and has no ratio.

Everything is simulated but the model and its text. Leaves out: serving later, lithium plating, spread between cells, and the drift
of the sun over a battery's life (all orbits count as the last ones). LMO cells; the chemistry is a parameter set of ageing.py.

The physics is in battery_life.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from firmware_sim import ageing, satellite
from firmware_sim.scenario import Scenario
from firmware_sim.wear import LEAST_DEPTH
from ground_station import experiment, selection
from ground_station.battery_life import Aged, BatteryStudyError, aged, checks, factors, fly, shares, sunny_only, what_if
from ground_station.experiment_orbit import Setting, Surroundings, Trace, play
from ground_station.experiment_text import Rehearsal, passages
from ground_station.text import Text
from ground_station.wear_price import SUNLIT

COSTS_OF = "hot-eclipse"
"""The experiment whose joules and ms per run, with their source, count here too."""
SLOT_S = 20.0  # about: an orbit is a whole number of slots
SETTLING, AGED = 8, 3  # orbits that the last one's watts are flown on; of them, the last ones that age
BATCH_TOKENS = 16
SMOOTHING = 0.5  # of loads over slots of 20 s: shadow begins and ends at once
TEXT_TOKENS = 4096  # after its end the text is read again, by every policy alike
WEAR_NATS = 0.1
MAX_ORBITS = 10
MAX_SEEDS = 10
MOST = ("same joules, none in the dark", "no work at all")
SAME_TOKENS, CLOSED_SOC, CLOSED_K, SAME_WATTS = 1e-3, 0.01, 0.1, 0.05


@dataclass(frozen=True)
class Variant:
    """A policy, its knobs, and the weight of wear_price.py (0: none)."""

    label: str
    policy: str
    wear_nats: float = 0.0
    knobs: tuple[tuple[str, float], ...] = ()


BASE = "topk"
OURS = "budgeted"
VARIANTS = (
    Variant(BASE, "topk"),
    Variant("coolest", "coolest"),
    Variant("des", "des"),
    Variant("budgeted, wear free", "budgeted"),
    Variant(OURS, "budgeted", WEAR_NATS),
    Variant("budgeted, all experts kept", "budgeted", WEAR_NATS, (("coverage", 1.0),)),
    Variant("budgeted, life dearer", "budgeted", 5 * WEAR_NATS),
)


def run(
    bundle: Path,
    scenario: Scenario,
    orbits: int = 2,
    seeds: tuple[int, ...] = (0, 1, 2),
    tokens_per_s: float = 150.0,
    variants: tuple[Variant, ...] = VARIANTS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict:
    """The whole study, for JSON. `variants`: the first one is what the others are compared with.

    Raises: BatteryStudyError; what experiment.Stage and experiment_text.passages raise.
    """
    if not 2 <= orbits <= MAX_ORBITS:
        raise BatteryStudyError(f"{orbits} orbits: give 2 to {MAX_ORBITS}; the first is dropped")
    if not 1 <= len(seeds) <= MAX_SEEDS or not all(0 <= seed < 2**32 for seed in seeds):
        raise BatteryStudyError(f"seeds are 1 to {MAX_SEEDS} whole numbers from 0 to {2**32 - 1}")
    if not 0 < tokens_per_s <= 1e6:
        raise BatteryStudyError(f"a demand of {tokens_per_s} tokens per second: give more than 0, at most 1e6")
    costs = experiment.find(COSTS_OF)
    payload = scenario.payload
    for joules, ms in costs.costs.values():
        watts = joules / ms * 1000
        if abs(watts / (payload.busy_w - payload.idle_w) - 1) > SAME_WATTS:
            raise BatteryStudyError(
                f"the joules per run are of boards that draw {watts:.2f} W over idle at work, those of {scenario.name} "
                f"draw {payload.busy_w - payload.idle_w:.2f}: correct its busy_w"
            )
    period_s = float(2 * np.pi / satellite.make(scenario).constellation.argument_rate_rad_s.mean())
    per_orbit = math.ceil(period_s / SLOT_S)
    slots = orbits * per_orbit
    played = replace(
        costs, slots=slots, slot_s=period_s / per_orbit, tokens_per_s=tokens_per_s, contacts=False, contenders=()
    )
    stage = experiment.Stage(played, scenario, bundle)
    manifest, dims, around = stage.manifest, stage.manifest.dims, stage.around
    base = replace(stage.setting, looks=1, smoothing=SMOOTHING)
    text, documents = Text(bundle, manifest), experiment.documents(bundle)
    traces: list[list[Trace]] = []
    for seed in seeds:
        tokens = min(slots * BATCH_TOKENS, TEXT_TOKENS)
        texts = passages(text, documents, stage.start, tokens, np.random.default_rng(seed))
        rehearsal = Rehearsal(bundle, manifest, stage.table, texts, BATCH_TOKENS)
        row = []
        for variant in variants:
            progress(f"{variant.label}, seed {seed}")
            knobs = {"coverage": base.coverage} | dict(variant.knobs)
            policy = selection.make(
                variant.policy, manifest.routing, dims.top_k, dims.experts, seed, calibration=stage.calibration, **knobs
            )
            row.append(play(replace(base, wear_nats=variant.wear_nats), around, rehearsal, policy, "cap"))
        traces.append(row)
    progress("ageing")
    return _summary(base, around, orbits, seeds, variants, traces)


def _outcome(
    setting: Setting, around: Surroundings, orbits: int, traces: list[Trace]
) -> tuple[list[dict], list[float]]:
    """One seed: for each variant its figures, with "why" it is invalid and "nodes"; ratios of MOST."""
    idle_w, v, per_orbit = setting.scenario.payload.idle_w, len(traces), setting.slots // orbits
    first_w = traces[0].power_w
    power = [trace.power_w for trace in traces]
    power += [half for trace in traces for half in what_if(first_w, trace.power_w, idle_w)]
    power += [sunny_only(first_w, around.lit, idle_w), np.full_like(first_w, idle_w)]
    watts = np.stack(power, 1)
    watts = np.concatenate([watts, *[watts[-per_orbit:]] * SETTLING])
    soc, battery_c, unmet_j = fly(setting.scenario, watts, setting.slot_s)
    kept = AGED * len(soc) // (orbits + SETTLING)
    soc, battery_c, period_s = soc[-kept:], battery_c[-kept:], per_orbit * setting.slot_s
    every = aged(soc, battery_c, period_s, AGED)
    each = [Aged(*(getattr(every, name)[i] for name in Aged.__dataclass_fields__)) for i in range(len(power))]
    mean = [float(one.cycles.mean()) for one in each]
    step_s = period_s * AGED / kept

    def counted(i: int) -> float:
        """Linear ageing of the mean node by counting cycles, whatever an orbit is."""
        pairs = zip(soc[:, i].T, battery_c[:, i].T)
        return float(np.mean([ageing.history_ageing(*pair, step_s, least_depth=LEAST_DEPTH) for pair in pairs]))

    found = []
    for i, trace in enumerate(traces):
        figures, why = _figures(setting, around, trace, each[i], per_orbit)
        by_node = each[i].cycles / each[0].cycles
        joules_only, shift_only = (mean[v + 2 * i + half] / mean[0] for half in (0, 1))
        figures |= {
            "ratio_mean_node": mean[i] / mean[0],
            "ratio_worst_node": float(each[i].cycles.min() / each[0].cycles.min()),
            "ratio_least_of_a_node": float(by_node.min()),
            "ratio_most_of_a_node": float(by_node.max()),
            "ratio_by_rainflow": counted(0) / counted(i),
            "ratio_joules_only": joules_only,
            "ratio_shift_only": shift_only,
            "share_from_joules": shares(mean[i] / mean[0], joules_only, shift_only),
        }
        figures |= {f"factor_{name}": value for name, value in factors(each[i], each[0], period_s).items()}
        if unmet_j[i].max() > 1.0:
            why.append("a battery runs empty: give more battery_wh")
        nodes = np.stack([each[i].cycles, each[i].depth.mean(0), each[i].temp_c.mean(0)], 1)
        found.append(figures | {"why": why, "nodes": nodes})
    return found, [mean[-2] / mean[0], mean[-1] / mean[0]]


def _summary(
    setting: Setting,
    around: Surroundings,
    orbits: int,
    seeds: tuple[int, ...],
    variants: tuple[Variant, ...],
    traces: list[list[Trace]],
) -> dict:
    outcomes, most = zip(*(_outcome(setting, around, orbits, row) for row in traces))
    rows: list[dict[str, Any]] = []
    comparable = True
    for index, variant in enumerate(variants):
        runs = [outcome[index] for outcome in outcomes]
        why = sorted({reason for each in runs for reason in each["why"]})
        comparable &= index > 0 or not why
        row = {"label": variant.label, "policy": variant.policy, "wear_nats": variant.wear_nats}
        row |= {"knobs": dict(variant.knobs), "valid": not why, "invalid_because": why}
        for key in [name for name in runs[0] if name not in ("why", "nodes")]:
            compares = key.startswith(("ratio_", "factor_", "share_from"))
            row[key] = None if compares and (why or not comparable) else _spread([each[key] for each in runs])
        nodes = np.mean([each["nodes"] for each in runs], 0)
        row["nodes"] = [
            {"node": board.node, "cycles": round(cycles, 1), "depth": round(depth, 5), "battery_c": round(temp_c, 3)}
            for board, (cycles, depth, temp_c) in zip(setting.scenario.boards, nodes.tolist())
        ]
        rows.append(row)
    ours = next((row for row in rows if row["label"] == OURS), None)
    checked = checks()
    return {
        "scenario": setting.scenario.name,
        "orbits": orbits,
        "period_s": round(setting.slots // orbits * setting.slot_s, 2),
        "shadow_share": round(1 - float(around.lit.mean()), 4),
        "demand_tokens_per_day": setting.tokens_per_s * 86400,
        "seeds": list(seeds),
        "costs": setting.costs.source,
        "ageing_checks": checked,
        "policies": rows,
        "most_that_could_be": {
            name: _spread([each[i] for each in most]) if comparable else None for i, name in enumerate(MOST)
        },
        "ratio": ours and ours["ratio_mean_node"],
        "ratio_worst_node": ours and ours["ratio_worst_node"],
        "valid": all(each["holds"] for each in checked) and comparable and (ours is None or ours["valid"]),
    }


def _figures(
    setting: Setting, around: Surroundings, trace: Trace, mine: Aged, first_slot: int
) -> tuple[dict[str, float], list[str]]:
    """One run's figures over what counts, and why it is not valid."""
    kept = slice(first_slot, None)
    seconds = (setting.slots - first_slot) * setting.slot_s
    played_gap = float(np.abs(trace.soc[-1] - trace.soc[-1 - first_slot]).max())
    spent_j = (trace.power_w[kept] - setting.scenario.payload.idle_w) * setting.slot_s
    tokens = trace.tokens[kept].sum()
    per_day, demand = tokens / seconds * 86400, setting.tokens_per_s * 86400
    why = []
    if abs(per_day / demand - 1) > SAME_TOKENS:
        why.append(f"it serves {per_day / demand:.1%} of the demand: lower --tokens-per-s")
    gap = max(float(mine.soc_gap), played_gap)
    if gap > CLOSED_SOC or mine.drift_k > CLOSED_K:
        why.append(
            f"orbits do not repeat ({gap:.1%} of charge, {mine.drift_k:.2f} K): give more array_w, or more orbits"
        )
    if trace.over_s.any():
        why.append("a payload passes its limit")
    figures = {
        "tokens_per_day": per_day,
        "joules_per_token": spent_j.sum() / tokens,
        "share_of_joules_in_shadow": spent_j[around.lit[kept] < SUNLIT].sum() / spent_j.sum(),
        "perplexity_ratio": math.exp(float(np.average(trace.nats[kept], weights=trace.tokens[kept]))),
        "useful_share": trace.useful[kept].sum() / tokens,
        "depth": mine.depth.mean(),
        "mean_charge": mine.charge.mean(),
        "battery_c": mine.temp_c.mean(),
        "cycles_mean_node": mine.cycles.mean(),
        "cycles_worst_node": mine.cycles.min(),
        "soc_gap": gap,
        "drift_k": mine.drift_k,
    }
    return {name: float(value) for name, value in figures.items()}, why


def _spread(values: list[float | None]) -> dict | None:
    if any(value is None for value in values):
        return None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {
        "mean": float(f"{np.mean(values):.7g}"),
        "sd": deviation if deviation is None else float(f"{deviation:.3g}"),
        "n": len(values),
    }


def report(result: dict) -> str:
    """Check values, a table of policies, and what the gain is made of."""
    lines = [
        f"{result['scenario']}: orbits of {result['period_s']:g} s, {result['orbits']} played, the first not counted, "
        f"{result['shadow_share']:.1%} in shadow;",
        f"{result['demand_tokens_per_day']:,.0f} tokens a day, n = {len(result['seeds'])}; all simulated but the model and its text",
        "ageing model (Xu et al. 2016), computed / published:",
    ]
    for each in result["ageing_checks"]:
        sign = "" if each["holds"] else "  DOES NOT HOLD"
        lines.append(f"  {each['name']:<42} {each['computed']:>12.6g} {each['published']:>9g}{sign}")
    lines.append(
        "cycles to 80 % of the capacity, mean and worst node; C: of the battery; dark: share of joules spent in shadow"
    )
    lines.append(
        f"{'policy':<27}{'cycles':>8}{'worst':>8}{'x topk':>13}{'depth':>7}{'C':>6}{'mJ/token':>9}{'dark':>6}{'perpl.':>8}{'useful':>8}"
    )

    def mean(row: dict, key: str) -> float:
        return row[key]["mean"]

    for row in result["policies"]:
        life = row["ratio_mean_node"]
        shown = (
            "invalid" if life is None else f"{life['mean']:.3f}" + ("" if life["sd"] is None else f"+-{life['sd']:.3f}")
        )
        lines.append(
            f"{row['label']:<27}{mean(row, 'cycles_mean_node'):>8,.0f}{mean(row, 'cycles_worst_node'):>8,.0f}{shown:>13}"
            f"{mean(row, 'depth'):>7.3f}{mean(row, 'battery_c'):>6.1f}{mean(row, 'joules_per_token') * 1e3:>9.1f}"
            f"{mean(row, 'share_of_joules_in_shadow'):>6.0%}{mean(row, 'perplexity_ratio'):>8.4f}{mean(row, 'useful_share'):>8.1%}"
        )
        lines += [f"    invalid: {why}" for why in row["invalid_because"]]
    for row in result["policies"]:
        if row["ratio_mean_node"] is not None and row["share_from_joules"] is not None:
            lines += [
                f"{row['label']}: depth x{mean(row, 'factor_depth'):.3f}, charge x{mean(row, 'factor_charge'):.3f}, "
                f"temperature x{mean(row, 'factor_temperature'):.3f}",
                f"    fewer joules alone x{mean(row, 'ratio_joules_only'):.3f}, out of the dark alone "
                f"x{mean(row, 'ratio_shift_only'):.3f}: {mean(row, 'share_from_joules'):.0%} of the gain is joules",
            ]
    for name, value in result["most_that_could_be"].items():
        lines.append(f"limit, {name}: " + ("unknown" if value is None else f"x{value['mean']:.3f}"))
    return "\n".join(lines)
