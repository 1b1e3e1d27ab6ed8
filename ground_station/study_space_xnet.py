"""The Space-XNet setting (arXiv 2605.00515) without boards: token latency of four placements on 1056 satellites, then heat added.

From the paper and reports of it [S]: 33 planes of 32 at 550 km and 87 degrees, four links per satellite at most, a link holds in a slot
with 95 %, only below 0.12 rad/s; 200 slots; 32 layers of 8 experts, top-2, one expert per satellite; 7.28 GFLOPS per satellite;
random 5.29 s, random in a ring subnet 4.15 s, central gateway 3.35 s, rank match 1.05 s. Assumed here: see ASSUMED.
Leaves out: queues, link rates (at 100 Gb/s a hidden state takes no time), prefill.
"""

from __future__ import annotations

import textwrap
import time
from dataclasses import dataclass, replace

import numpy as np

from firmware_sim import eclipse, orbit, sun
from firmware_sim.scenario import Constellation
from ground_station import constellation_network as network
from ground_station import placement_baselines as baselines
from ground_station import placement_problem as pp
from ground_station.constellation_network import path_ms
from ground_station.constellation_placement import (
    MARGIN,
    NEAR,
    OPTIMISED_SLOTS,
    Model,
    Room,
    Variant,
    mean_path,
    packed,
    problem,
)
from ground_station.placement import PlacementError
from ground_station.placement_budgeted import budgeted
from ground_station.placement_routing import popularity, routing_sets
from ground_station.placement_serving import serve

PUBLISHED_S = {"random": 5.29, "intra": 4.15, "central": 3.35, "rank": 1.05}
LINKS = network.Links(survival=0.95, slew_limit_rad_s=0.12)
SEEN_IN_PLANE = 9  # 2 a sin(pi / 9) = 4739 km, under the 5017 km of the longest link at 550 km; with 8 it is 5303 km
GFLOPS = 7.28
# LLaMA-MoE-3.5B (LLaMA-2 7B with its feed-forward part cut into eighths): hidden 4096, intermediate 11008 / 8, three matrices
EXPERT_MS = 2 * 3 * 4096 * 1376 / GFLOPS / 1e6
ATTENTION_MS = 2 * 4 * 4096 * 4096 / GFLOPS / 1e6
TOP_K = 2
ACTIVE_W = 10.0
TOKENS_PER_S = 10.0
COOL_W, HOT_W = 0.5, 0.05
EXPERTS_PER_SATELLITE = 4
INT4_BYTES, INT8_ERROR, INT4_ERROR = 0.5585, 0.012, 0.086
GAINS = {"budgeted_gain": "budgeted", "budgeted_gain_at_equal_memory": "budgeted_one_copy"}
ASSUMED = (
    "planes spread over 180 degrees (star), no phasing, no links over the seam",
    "slots divide one orbit; a link that fails in a slot fails for the whole of it",
    "layer l on the satellites of place l in their planes (one per plane), its gateway in the middle plane (or random)",
    "a gateway sends to the chosen experts and they to the next layer's gateway, which sums; the last layer's next is the first's; "
    "`through_own_gateway` gives the figures if answers return to their own gateway first",
    "gateways hold no experts; attention (no cache traffic) runs on them",
    "popularity of experts log-normal, sigma 0.5 (the shipped model's layers have 0.12 to 0.67), pairs of greatest entropy",
    "an expert that cannot be reached in a slot is skipped, and its share reported",
    "second table: 10 W while an expert runs, 10 tokens/s in all, room for 4 8-bit experts per satellite, all copies at most 1.25 times "
    "one 8-bit copy, average watts allowed from 0.05 W (no eclipse) to 0.5 W (longest eclipse) by each plane's eclipse fraction; the "
    "sun's direction is drawn per seed; int4 is smaller but neither faster nor cheaper; budgeted knows 4 of the slots",
)


@dataclass(frozen=True)
class Options:
    """Planes and satellites per plane (= layers), slots, seeds, experts per layer."""

    planes: int = 33
    per_plane: int = 32
    slots: int = 200
    seeds: int = 5
    experts: int = 8
    heat: bool = True

    def __post_init__(self) -> None:
        if self.planes < self.experts + 1 or self.per_plane < SEEN_IN_PLANE:
            raise PlacementError(
                f"{self.planes} planes of {self.per_plane} satellites: a layer needs {self.experts + 1} planes, and neighbours in a plane "
                f"see each other over the Earth's limb from {SEEN_IN_PLANE} places on"
            )
        if self.planes * self.per_plane > 5000 or not 1 <= self.slots <= 2000 or not 1 <= self.seeds <= 100:
            raise PlacementError("at most 5000 satellites, 2000 slots and 100 seeds, at least one of each")


def shape_of(options: Options, raan_deg: float = 0.0) -> Constellation:
    """The constellation of the paper, its first plane's node at `raan_deg`."""
    return Constellation("star", 550.0, 87.0, options.planes, options.per_plane, raan_deg=raan_deg)


def networks(options: Options, seed: int, raan_deg: float = 0.0):
    """Graphs of one-way delays in ms, one per slot, and the number of links left out for their slew."""
    slot_s = float(orbit.period_s(orbit.EARTH_RADIUS_KM + 550.0)) / options.slots
    found = list(network.networks(shape_of(options, raan_deg), LINKS, options.slots, slot_s, seed))
    return [graph for graph, _ in found], sum(fast for _, fast in found)


def there_ms(graphs, gateways: np.ndarray) -> np.ndarray:
    """One way from each layer's gateway to each satellite [C, L, N], float32 (infinite where no path is)."""
    return np.stack([network.there_ms(graph, gateways) for graph in graphs])


def _problem(
    options: Options, use: np.ndarray, path: np.ndarray, gateways: np.ndarray, heat: dict | None = None
) -> pp.Problem:
    """The placement problem of a constellation; path [C, L, N]. Sizes are in units of one 8-bit expert of 1 MB."""
    satellites = options.planes * options.per_plane
    sets = [routing_sets(row, TOP_K) for row in use]
    memory = np.full(satellites, 1_000_000 * (EXPERTS_PER_SATELLITE if heat else 1))
    memory[gateways] = 0
    joules = ACTIVE_W * EXPERT_MS / 1e3 if heat else 0.0
    variants = (
        Variant("int8", 1.0, EXPERT_MS, joules, INT8_ERROR),
        Variant("int4", INT4_BYTES, EXPERT_MS, joules, INT4_ERROR),
    )
    model = Model(
        use,
        np.stack([s for s, _ in sets]),
        np.stack([w for _, w in sets]),
        use / TOP_K,
        variants if heat else variants[:1],
    )
    limit_w = heat["limit_w"] if heat else np.full(satellites, np.inf)
    fleet_bytes = int((1.25e6 if heat else 1e6) * use.size)
    return problem(model, Room(memory, limit_w, fleet_bytes, TOKENS_PER_S, 5739.0), options.per_plane, path)


def one_each(options: Options, seed: int) -> dict[str, dict[str, float]]:
    """Mean token latency in s of the four placements with one expert per satellite, and the share of gate mass skipped."""
    rng = np.random.default_rng([seed, 2])
    graphs, _ = networks(options, seed)
    use = np.stack([popularity(options.experts, TOP_K, 0.5, rng) for _ in range(options.per_plane)])
    state, result, known = rng.bit_generator.state, {}, {}
    for name, policy, kind in (
        ("random", baselines.random, "anywhere"),
        ("intra", baselines.intra, "ring"),
        ("central", baselines.intra, "central"),
        ("rank", baselines.ring, "central"),
    ):
        rng.bit_generator.state = state  # every kind on the same draw
        gateways = network.gateways(kind, options.per_plane, shape_of(options), rng)
        if kind not in known:
            known = {kind: there_ms(graphs, gateways)}
        there = known[kind]
        path = path_ms(there, gateways)
        task = _problem(options, use, mean_path(path), gateways)
        copies = policy(task, seed)
        latency, skipped = _measure(task, copies, path)
        back, _ = _measure(task, copies, path_ms(there, gateways, own=True))
        result[name] = {"s": latency, "through_own_gateway_s": back, "skipped": skipped}
    return result


def _measure(problem: pp.Problem, copies, path: np.ndarray) -> tuple[float, float]:
    """Mean token latency in s over all slots (trunk included), and the mean share of gate mass out of reach; one copy each."""
    node = np.full((problem.layers, problem.experts), pp.NOWHERE)
    for copy in copies:
        node[copy.layer, copy.expert] = copy.node
    total, missed = np.zeros(len(path)), 0.0
    for layer in range(problem.layers):
        here = np.where(np.isfinite(path[:, layer, node[layer]]), node[layer], pp.NOWHERE)
        work = np.full(here.shape, EXPERT_MS)
        total += ATTENTION_MS + pp.layer_ms(problem, layer, path[:, layer], here, work)
        missed += float(np.where(here == pp.NOWHERE, problem.mass[layer], 0.0).sum(1).mean())
    return float(total.mean()) / 1e3, missed / problem.layers


def allowed_w(options: Options, raan_deg: float) -> np.ndarray:
    """Average watts for experts per satellite from its plane's eclipse fraction: the longer in shadow, the cooler."""
    orbits = network.orbits_of(shape_of(options, raan_deg))
    beta = sun.beta_rad(orbit.normals(orbits), sun.direction(0.0))
    shade = eclipse.eclipse_fraction(550.0, beta) / float(eclipse.eclipse_fraction(550.0, 0.0))
    return HOT_W + (COOL_W - HOT_W) * shade


def several_each(options: Options, seed: int) -> dict[str, dict[str, float]]:
    """Heat counts and satellites hold several experts: the rank match spread and packed, and `budgeted`; evaluated on all slots."""
    rng = np.random.default_rng([seed, 3])
    raan_deg = float(rng.uniform(0.0, 180.0))
    graphs, _ = networks(options, seed, raan_deg)
    use = np.stack([popularity(options.experts, TOP_K, 0.5, rng) for _ in range(options.per_plane)])
    gateways = options.planes // 2 * options.per_plane + np.arange(options.per_plane)
    path = path_ms(there_ms(graphs, gateways), gateways).astype(float)
    heat = {"limit_w": allowed_w(options, raan_deg)}
    margin = {"limit_w": MARGIN * heat["limit_w"]}  # the slots that budgeted knows are a sample
    whole = _problem(options, use, path, gateways, heat)
    mean = _problem(options, use, mean_path(path), gateways, heat)
    chosen = np.linspace(0, len(path) - 1, min(OPTIMISED_SLOTS, len(path))).astype(int)
    known = _problem(options, use, path[chosen], gateways, margin)
    placements = {
        "rank": baselines.ring(mean),
        "rank_packed": packed(mean),
        "budgeted": list(budgeted(known, seed, near=NEAR, starts=("ring",)).copies),
    }
    # the memory of the rank match: hardly a replica, only better homes
    one_copy = replace(known, fleet_bytes=int(1e6 * use.size))
    placements["budgeted_one_copy"] = list(budgeted(one_copy, seed, near=NEAR, starts=("ring",)).copies)
    result = {}
    for name, copies in placements.items():
        found = pp.evaluate(whole, serve(whole, name, copies, passes=2))
        held = {copy.node for copy in copies}
        result[name] = {
            "s": (found.latency_ms + ATTENTION_MS * whole.layers) / 1e3,
            "skipped": 1.0 - found.reach,
            "too_warm": int((found.stretch > 1.0).sum()),
            "satellites": len(held),
            "copies": len(copies),
            "int4": sum(copy.variant == 1 for copy in copies),
            "megabytes": found.store_bytes / 1e6,
        }
    return result


def _table(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict]:
    result = {}
    for name in rows[0]:
        seconds = np.array([row[name]["s"] for row in rows])
        result[name] = {
            "mean_s": round(float(seconds.mean()), 4),
            "min_s": round(float(seconds.min()), 4),
            "max_s": round(float(seconds.max()), 4),
            "n": len(rows),
        }
        for key in rows[0][name]:
            if key != "s":
                result[name][key] = round(float(np.mean([row[name][key] for row in rows])), 6)
    return result


def run(options: Options = Options()) -> dict:
    """Both tables, means over seeds with least and largest.  Raises: PlacementError."""
    began = time.monotonic()
    first = [one_each(options, seed) for seed in range(options.seeds)]
    table = _table(first)
    order = ("random", "intra", "central", "rank")
    means = [table[name]["mean_s"] for name in order]
    for name in order:
        table[name]["published_s"] = PUBLISHED_S[name]
    result = {
        "setting": {**vars(options), "satellites": options.planes * options.per_plane, "layers": options.per_plane},
        "simulated": True,
        "compute_ms": {"expert": round(EXPERT_MS, 3), "attention": round(ATTENTION_MS, 3)},
        "one_expert_per_satellite": table,
        "order_as_published": all(a > b for a, b in zip(means, means[1:])),
        "order_in_seeds": sum(all(row[a]["s"] > row[b]["s"] for a, b in zip(order, order[1:])) for row in first),
        "ratio_random_to_rank": round(means[0] / means[-1], 3),
        "ratio_published": round(PUBLISHED_S["random"] / PUBLISHED_S["rank"], 3),
    }
    if options.heat:
        second = [several_each(options, seed) for seed in range(options.seeds)]
        result["several_experts_and_heat"] = _table(second)
        best = [min(row["rank"]["s"], row["rank_packed"]["s"]) for row in second]
        for key, name in GAINS.items():
            ratios = [rank / row[name]["s"] for rank, row in zip(best, second)]
            spread = {"mean": float(np.mean(ratios)), "min": min(ratios), "max": max(ratios)}
            result[key] = {what: round(value, 4) for what, value in spread.items()} | {"n": len(ratios)}
    result["assumed"] = list(ASSUMED)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def report(result: dict) -> str:
    """The two tables as text."""
    setting = result["setting"]
    lines = [
        f"{setting['satellites']} satellites, {setting['slots']} slots, {setting['layers']} layers of {setting['experts']} experts;",
        f"mean token latency over {setting['seeds']} seeds (simulated)",
        f"{'one expert per satellite':25}{'mean s':>9}{'min':>9}{'max':>9}{'published':>11}",
    ]
    for name, row in result["one_expert_per_satellite"].items():
        lines.append(f"  {name:23}{row['mean_s']:9.3f}{row['min_s']:9.3f}{row['max_s']:9.3f}{row['published_s']:11.2f}")
    lines.append(f"  random / rank {result['ratio_random_to_rank']:.2f} (published {result['ratio_published']:.2f})")
    if "several_experts_and_heat" in result:
        lines.append(f"{'several experts, heat':25}{'mean s':>9}{'min':>9}{'max':>9}{'too warm':>11}{'MB':>8}")
        for name, row in result["several_experts_and_heat"].items():
            lines.append(
                f"  {name:23}{row['mean_s']:9.3f}{row['min_s']:9.3f}{row['max_s']:9.3f}{row['too_warm']:11.1f}{row['megabytes']:8.0f}"
            )
        for key, name in GAINS.items():
            gain = result[key]
            spread = f"(min {gain['min']:.3f}, max {gain['max']:.3f})"
            lines.append(f"  better rank match / {name} {gain['mean']:.3f} {spread}")
    lines += [
        "assumed:",
        *(textwrap.fill(line, 80, initial_indent="  ", subsequent_indent="    ") for line in result["assumed"]),
    ]
    return "\n".join(lines)
