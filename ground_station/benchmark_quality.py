"""`spacemoe benchmark quality`: perplexity against joules on held-out text, every selection policy over the range of its knob.

Joules are of the experts alone, as shares of what `topk` spends. Two settings: `runs`, where every expert run costs the same and there
is one copy of each expert; and `fleet`, four nodes of unlike thrift, where each expert has two copies in the best precision of the
bundle and one in its lowest, and a run costs the milliseconds measured here for its precision times the node's watts (assumed:
FLEET_W). Policies are compared at equal joules by interpolation between the points of their curves, domain by domain.
Leaves out: links, heat and time (experiments); prices do not change during a run.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from ground_station import dispatch, evaluate, selection
from ground_station.decode import Decoder
from ground_station.local import LocalExperts
from ground_station.placement import EMERGENCY, Holding
from ground_station.selection_baselines import gate_ratio_medians
from ground_station.selection_choice import Choice, Policy
from ground_station.selection_world import PRECISIONS, Calibration, World
from ground_station.text import Text
from ground_station.trunk import Trunk
from node_agent import frame, shard

SETTINGS = ("runs", "fleet")
FLEET_W = (3.0, 4.5, 6.0, 9.0)  # assumed watts over idle while an expert runs, of four unlike boards
SCORED_FROM, CALIBRATED_FROM = 0.7, 0.45
"""Where in each domain's text scoring begins, and the text on which baselines calibrate. `budgeted` was tuned on what comes before."""
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)  # of topk's joules, at which policies are compared
COVERAGE = 0.25  # of `budgeted`: low, so that its curve covers what the baselines' curves do
KNOBS: dict[str, tuple[str, tuple[float, ...]]] = {
    "topk": ("top_k", (1, 2, 3, 4)),
    "random": ("top_k", (2, 4)),
    "coolest": ("top_k", (2, 3, 4)),
    "topp": ("p", (0.25, 0.32, 0.4, 0.5, 0.6)),
    "naee": ("scale", (0.5, 0.7, 0.9, 1.1, 1.4)),
    "des": ("z", (0.45, 0.55, 0.62, 0.7, 0.8, 0.88)),
    "wlr": ("theta", (0.2, 0.3, 0.45, 0.6, 0.8)),
    "similarity": ("eps", (0.08, 0.15, 0.22, 0.3, 0.4)),
    "equinox": ("value", (3.2, 4.2, 5.5, 7.5, 10.0)),
    "budgeted": ("value", (6, 10, 16, 25, 40, 70, 140, 1000)),
}


class Meter:
    """A policy that is asked in a given world and whose joules are counted as dispatch would have them spent."""

    def __init__(self, policy: Policy, world: World, table: dispatch.Table):
        self.policy, self.world, self.table = policy, world, table
        self.joules = 0.0
        self.runs = self.rows = 0
        self.cost = np.broadcast_to(world.joules, world.hosted.shape)

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        choice = self.policy(layer, logits, self.world)
        run = choice.gates != 0
        experts = choice.experts[run]
        nodes = np.full(len(experts), -1) if choice.nodes is None else choice.nodes[run]
        precisions = nodes if choice.precisions is None else choice.precisions[run]
        if (nodes < 0).any():
            open_ = experts[nodes < 0]
            load = np.bincount(open_)
            copies = dispatch.assign(self.table, layer, {e: int(load[e]) for e in np.flatnonzero(load).tolist()})
            where = np.array([copies.get(e, (-1, -1)) for e in range(len(load))])
            nodes, precisions = nodes.copy(), precisions.copy()
            nodes[nodes < 0], precisions[precisions < 0] = where[open_].T
        self.joules += float(self.cost[self.world.position[layer], experts, nodes, precisions].sum())
        self.runs += len(experts)
        self.rows += len(logits)
        return choice


class _Logits:
    """`topk` that keeps the router's logits, for what baselines calibrate on them."""

    def __init__(self, policy: Policy):
        self.policy, self.logits = policy, {}

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        self.logits.setdefault(layer, []).append(logits)
        return self.policy(layer, logits)


def _best_and_lowest(manifest: shard.Manifest) -> tuple[str, str]:
    """Of the precisions that serve in ordinary times, where the bundle has any."""
    names = [name for name in manifest.precisions if name not in EMERGENCY] or manifest.precisions
    return names[0], names[-1]


def holdings(manifest: shard.Manifest, setting: str) -> tuple[Holding, ...]:
    """Who holds what; see the module."""
    best, lowest = _best_and_lowest(manifest)
    if setting == "runs":
        return tuple(Holding("all", m, e, best, 0) for m in manifest.moe_layers for e in range(manifest.dims.experts))
    n = len(FLEET_W)
    return tuple(
        Holding(f"node-{(e + i + rank) % n + 1}", m, e, precision, rank)
        for i, m in enumerate(manifest.moe_layers)
        for e in range(manifest.dims.experts)
        for rank, precision in enumerate((best, best, lowest))
    )


def measured_ms(experts: LocalExperts, manifest: shard.Manifest, rounds: int = 30) -> dict[str, float]:
    """Median milliseconds of one row through one expert, per precision, on this machine: in turn, over all experts of a layer."""
    layer, x = manifest.moe_layers[0], np.ones((1, manifest.dims.hidden), np.float32)
    names = _best_and_lowest(manifest)
    sessions = {
        p: [experts.session(layer, e, frame.PRECISION_ID[p]) for e in range(manifest.dims.experts)] for p in names
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names:
            for session in sessions[name]:
                started = time.perf_counter_ns()
                session.run(["y"], {"x": x})
                if index:
                    times[name].append((time.perf_counter_ns() - started) / 1e6)
    return {name: float(np.median(values)) for name, values in times.items()}


def quality(
    bundle: Path, texts: dict[str, list[str]], setting: str = "runs", limit_bytes: int = 1500, threads: int = 1
) -> dict:
    """The figures of `spacemoe benchmark quality --json`; `limit_bytes` of each domain are scored, from SCORED_FROM on.

    Raises: ValueError for an unknown setting, shard.BundleError, selection_world.CalibrationUnusable, evaluate.EvaluationError.
    """
    from tqdm import tqdm

    if setting not in SETTINGS:
        raise ValueError(f"setting {setting!r} is unknown: use one of {', '.join(SETTINGS)}")
    manifest = shard.read_manifest(bundle)
    dims = manifest.dims
    calibration = Calibration.load(bundle / "calibration.npz", manifest.moe_layers, dims.experts)
    table = dispatch.Table(holdings(manifest, setting))
    experts = LocalExperts(bundle, manifest, table, None, threads)
    decoder = Decoder(
        Trunk(bundle, manifest, threads), selection.make("topk", manifest.routing, dims.top_k, 0), experts
    )
    joules, ms = np.ones((len(table.nodes), PRECISIONS)), None
    if setting == "fleet":
        ms = measured_ms(experts, manifest)
        for precision, value in ms.items():
            joules[:, frame.PRECISION_ID[precision]] = value * np.array(FLEET_W) / 1e3
    world = World.of(table, dims.experts, joules, np.ones_like(joules))
    text = Text(bundle, manifest)
    start = manifest.bos_id if manifest.bos_id is not None else next(iter(manifest.eos_ids), None)
    if start is None:
        raise evaluate.EvaluationError(f"{bundle} names no begin- or end-of-text token: cannot start a text")

    def cut(begin: float) -> dict[str, list[int]]:
        tokens = {}
        for domain, documents in texts.items():
            data = "\n".join(documents).encode()
            part = data[int(begin * len(data)) :][:limit_bytes]
            tokens[domain] = [start, *text.encode(part.decode(errors="ignore"))]
        return tokens

    ids = cut(SCORED_FROM)
    if min(map(len, ids.values())) < 32:
        raise evaluate.EvaluationError("a domain has fewer than 32 tokens: give more text or a larger --limit-bytes")

    def curve_point(policy: Policy) -> tuple[Meter, dict[str, evaluate.Score]]:
        meter = Meter(policy, priced, table)
        decoder.policy = meter
        return meter, {domain: evaluate.score(decoder, tokens, 1) for domain, tokens in ids.items()}

    priced = world
    reference, exact = curve_point(selection.make("topk", manifest.routing, dims.top_k, dims.experts))
    # a run of topk costs 1 on average: knobs that are prices mean the same in every setting
    priced = world.changed(joule_price=np.full(len(table.nodes), reference.runs / reference.joules))
    # NAEE's medians come from text that is not scored
    collect = _Logits(selection.make("topk", manifest.routing, dims.top_k, dims.experts))
    decoder.policy = collect
    for tokens in cut(CALIBRATED_FROM).values():
        evaluate.score(decoder, tokens, 1)
    betas = gate_ratio_medians({m: np.concatenate(rows) for m, rows in collect.logits.items()}, manifest.routing)
    variants = (
        {"budgeted": {}} if setting == "runs" else {"budgeted": {}, "budgeted, one precision": {"variants": False}}
    )
    plan = [
        (label, name, knob, value, extra)
        for name, (knob, values) in KNOBS.items()
        for label, extra in (variants.items() if name == "budgeted" else [(name, {})])
        for value in values
    ]
    points: dict[str, list[dict]] = {}
    for label, name, knob, value, extra in tqdm(plan, desc=f"quality {setting}", disable=None, leave=False):
        top_k = int(min(value, dims.top_k)) if knob == "top_k" else dims.top_k
        options: dict = dict(extra)
        if knob != "top_k":
            options[knob] = value
        if name == "naee":
            options["betas"] = betas
        policy = selection.make(
            name, manifest.routing, top_k, dims.experts, coverage=COVERAGE, calibration=calibration, **options
        )
        meter, scores = curve_point(policy)
        points.setdefault(label, []).append(
            {
                "knob": value,
                "runs_per_layer": round(meter.runs / meter.rows, 4),
                "joules": round(meter.joules / reference.joules, 4),
                "perplexity": round(_perplexity(scores), 4),
                "nats": {domain: score.nats / score.tokens for domain, score in scores.items()},
            }
        )
    result = {
        "bundle": manifest.name,
        "setting": setting,
        "tokens": sum(score.tokens for score in exact.values()),
        "domains": len(ids),
        "unconstrained_perplexity": round(_perplexity(exact), 4),
        "ms": ms and {name: round(value, 5) for name, value in ms.items()},
        "watts": FLEET_W if setting == "fleet" else None,
        "coverage": COVERAGE,
        "equal_joules": {str(share): _at(points, share) for share in SHARES},
    }
    for rows in points.values():
        for row in rows:
            del row["nats"]
    return result | {"curves": points}


def _perplexity(scores: dict[str, evaluate.Score]) -> float:
    return math.exp(sum(s.nats for s in scores.values()) / sum(s.tokens for s in scores.values()))


def _at(points: dict[str, list[dict]], share: float) -> dict[str, dict]:
    """Per policy at a share of the joules: perplexity (mean over domains in nats) and how much more it is than `budgeted`'s, with the
    standard error over domains. A policy that cannot do with so little is left out; one that never spends so much is taken at its most.
    """
    nats: dict[str, np.ndarray] = {}
    for label, rows in points.items():
        rows = sorted(rows, key=lambda row: row["joules"])
        x = [row["joules"] for row in rows]
        if x[0] <= share:
            nats[label] = np.array(
                [np.interp(share, x, [r["nats"][domain] for r in rows]) for domain in rows[0]["nats"]]
            )
    if "budgeted" not in nats:
        return {}
    return {
        label: {
            "perplexity": round(float(np.exp(values.mean())), 3),
            "more_than_budgeted": round(float(np.expm1((values - nats["budgeted"]).mean())), 4),
            "standard_error": round(float((values - nats["budgeted"]).std(ddof=1) / math.sqrt(len(values))), 4),
            "n": len(values),
        }
        for label, values in sorted(nats.items(), key=lambda item: item[1].mean())
    }


def table_of(result: dict) -> str:
    """For people."""
    lines = [
        f"{result['bundle']}, setting {result['setting']}: {result['tokens']} tokens of {result['domains']} domains, "
        f"perplexity {result['unconstrained_perplexity']} with all experts"
    ]
    if result["ms"]:
        lines.append("ms per expert measured here: " + ", ".join(f"{k} {v:.4f}" for k, v in result["ms"].items()))
    for label, rows in result["curves"].items():
        text = "  ".join(
            f"{row['joules']:.2f}:{row['perplexity']:.2f}" for row in sorted(rows, key=lambda r: r["joules"])
        )
        lines.append(f"  {label:24} {text}")
    for share, rows in result["equal_joules"].items():
        lines.append(
            f"at {float(share):.0%} of the joules (more than budgeted, standard error over {result['domains']} domains):"
        )
        lines += [
            f"  {label:24} {row['perplexity']:8.2f}  {row['more_than_budgeted']:+.1%} +- {row['standard_error']:.1%}"
            for label, row in rows.items()
        ]
    return "\n".join(lines)
