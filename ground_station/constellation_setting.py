"""What stays the same in a constellation study whatever a policy does: the router, gateways, what an orbit gives, who holds what.

Slots are gone through one by one, so memory is O(satellites). Leaves out: the slots as policies live them (constellation_run.py).

Letters: L layers, E experts, K chosen, N satellites, P precisions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from firmware_sim import constellation, satellite, sun
from firmware_sim.battery import Battery
from firmware_sim.board import Branch
from firmware_sim.bus import AVIONICS, BUSES
from firmware_sim.orbit import EARTH_RADIUS_KM, period_s
from firmware_sim.thermal import KELVIN
from ground_station import constellation_network as network
from ground_station import constellation_placement as placement
from ground_station import plan_fleet
from ground_station.constellation_file import ConstellationFileError, Study
from ground_station.constellation_routing import Router, router, zipf
from ground_station.placement_problem import Copy
from ground_station.placement_routing import popularity, routing_sets
from ground_station.selection_world import PRECISIONS, Calibration, Offers, World
from node_agent import frame, shard
from node_agent.shard import Routing

PLACEMENT_SETS = 64  # of a layer, where all of them are more than that
STEP_S = constellation.MAX_STEP_S
Progress = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Hosts:
    """Those that hold a layer's experts: their satellite numbers [n], the world that a policy sees of them, and the nearest copy of each
    expert. A policy's cost is then that of a layer's hosts, however many satellites there are."""

    satellites: np.ndarray
    world: World
    fast: Offers

    @classmethod
    def of(cls, satellites: np.ndarray, world: World) -> Hosts:
        return cls(satellites, world, world.fastest[0])


@dataclass(frozen=True, eq=False)
class Orbit:
    """What an orbit with idle payloads gives each satellite [N]: harvest_w, what a payload may draw on average without emptying the
    battery (PHYSICS.md's balance, less the platform's own); spare_w: what it may draw above idle by heat and by battery."""

    harvest_w: np.ndarray
    spare_w: np.ndarray


@dataclass(frozen=True, eq=False)
class Setting:
    """hosts: per placement of the study, per layer. gateways: [L] by kind. orbit, satellites: None where heat does not count."""

    study: Study
    rule: Routing
    router: Router
    calibration: Calibration
    gateways: dict[str, np.ndarray]
    satellites: satellite.Satellites | None
    orbit: Orbit | None
    copies: tuple[tuple[Copy, ...], ...]
    hosts: tuple[tuple[Hosts, ...], ...]


def prepare(study: Study, bundle: Path, progress: Progress = lambda: None) -> Setting:
    """Places the experts; `progress` is called once per slot. `bundle`: of the calibration, where the routing is to be that of one.

    Raises: ConstellationFileError, PlacementError where the experts do not fit, shard.BundleError, ValueError of the physics.
    """
    model, rng = study.model, np.random.default_rng([study.seed, 2])
    rule, pairs = Routing("softmax_topk", True), None
    layers = tuple(range(model.layers))
    errors = np.zeros(PRECISIONS)
    for each in study.variants:
        errors[frame.PRECISION_ID[each.name]] = each.error
    if model.routing == "calibration":
        rule, use, mass, pairs, known = _calibrated(study, bundle, errors)
    else:
        if model.routing == "zipf":
            rows = [zipf(model.experts, model.top_k, model.exponent, rng) for _ in layers]
        else:
            rows = [popularity(model.experts, model.top_k, model.sigma, rng) for _ in layers]
        use = np.stack(rows)
        mass = use / model.top_k
        neutral = Calibration.neutral(layers, model.experts)
        # a token all of whose experts are left out loses about one nat
        known = replace(
            neutral,
            precision_error=np.tile(errors, (model.layers, 1)),
            sensitivity=np.full(model.layers, 1.0 / model.layers),
        )
    state, gateways = rng.bit_generator.state, {}
    for kind in {row.gateways for row in study.placements}:
        rng.bit_generator.state = state  # every kind on the same draw
        gateways[kind] = network.gateways(kind, model.layers, study.constellation, rng)
    satellites = None if study.satellite is None else satellites_of(study)
    orbit = None if satellites is None else idle_orbit(study, satellites)
    copies = _placed(study, use, mass, pairs, gateways, orbit, progress)
    return Setting(
        study,
        rule,
        router(use, model.top_k, model.logit_spread, pairs, study.seed),
        known,
        gateways,
        satellites,
        orbit,
        copies,
        tuple(tuple(hosts_of(study, each, layer) for layer in layers) for each in copies),
    )


def _calibrated(
    study: Study, bundle: Path, errors: np.ndarray
) -> tuple[Routing, np.ndarray, np.ndarray, np.ndarray, Calibration]:
    """Rule, use, mass [L, E], pairs [L, E, E] and calibration; layer l is the bundle's l mod its own number of MoE layers."""
    model, manifest = study.model, shard.read_manifest(bundle)
    if (manifest.dims.experts, manifest.dims.top_k) != (model.experts, model.top_k):
        raise ConstellationFileError(
            f"{study.name}: [model] has top {model.top_k} of {model.experts} experts, bundle {manifest.name} top "
            f"{manifest.dims.top_k} of {manifest.dims.experts}: give these, or another --bundle"
        )
    stats = plan_fleet.calibration(bundle, manifest)
    own = Calibration.load(bundle / "calibration.npz", manifest.moe_layers, model.experts)
    which = np.arange(model.layers) % len(manifest.moe_layers)
    tokens = float(stats["tokens"])
    mass = stats["counts"] * stats["gate_mean"]
    mass = mass / np.maximum(mass.sum(1, keepdims=True), 1e-30)
    known = Calibration(
        tuple(range(model.layers)),
        own.output_norm[which],
        own.gate_mean[which],
        own.distance[which],
        np.tile(errors, (model.layers, 1)),
        # the whole model loses what the bundle's would, however often its layers are repeated
        own.sensitivity[which] * len(manifest.moe_layers) / model.layers,
    )
    return (
        manifest.routing,
        (stats["counts"] / tokens)[which],
        mass[which],
        (stats["coactivation"] / tokens)[which],
        known,
    )


def satellites_of(study: Study) -> satellite.Satellites:
    """Every satellite of the constellation with its payload.  Raises: ValueError of the physics' own kinds."""
    orbits, kind = network.orbits_of(study.constellation), study.satellite
    power, payload = kind.power, kind.payload
    battery = Battery(power.battery_wh, power.charge_efficiency, power.discharge_efficiency)
    return satellite.Satellites(
        tuple(f"n{number}" for number in range(len(orbits))),
        constellation.Constellation(orbits, sun.j2000_days(study.start), BUSES[kind.bus.kind], battery, power.array_w),
        payload,
        power.platform_w,
        power.floor_soc,
        tuple(Branch(r, tau) for r, tau in zip(payload.r_k_per_w, payload.tau_s)),
    )


def idle_orbit(study: Study, satellites: satellite.Satellites) -> Orbit:
    """One orbit with idle payloads, in steps of at most STEP_S."""
    kind, payload, fleet = study.satellite, satellites.payload, satellites.constellation
    idle_w = payload.kappa * max(payload.idle_w - payload.fan_w, 0.0)
    whole_s = float(period_s(EARTH_RADIUS_KM + study.constellation.altitude_km))
    steps = int(np.ceil(whole_s / STEP_S))
    begin = constellation.start(fleet, kind.bus.start_c, kind.power.start_soc)
    lit, avionics_c = np.zeros(len(fleet)), np.zeros(len(fleet))
    for state in constellation.run(fleet, begin, whole_s / steps, steps, kind.power.platform_w + idle_w):
        lit += state.lit_share / steps
        avionics_c += (state.temp_k[AVIONICS] - KELVIN) / steps
    loss = kind.power.charge_efficiency * kind.power.discharge_efficiency
    harvest_w = kind.power.array_w * lit / (lit + (1.0 - lit) / loss) - kind.power.platform_w
    # T = avionics + R P, and the avionics node itself warms by 1 / G per watt more than idle
    r_k_per_w, g_w_per_k = float(sum(payload.r_k_per_w)), fleet.bus.avionics_body_w_per_k
    room_k = payload.limit_c - satellite.SET_POINT_K - avionics_c
    heat_w = (room_k + idle_w / g_w_per_k) / (r_k_per_w + 1.0 / g_w_per_k)
    spare_w = (np.minimum(heat_w, harvest_w) - idle_w) / max(payload.kappa, 1e-9)
    return Orbit(np.maximum(harvest_w, 0.0), np.clip(spare_w, 0.0, payload.busy_w - payload.idle_w))


def _placed(
    study: Study,
    use: np.ndarray,
    mass: np.ndarray,
    pairs: np.ndarray | None,
    gateways: dict[str, np.ndarray],
    orbit: Orbit | None,
    progress: Progress,
) -> tuple[tuple[Copy, ...], ...]:
    """Copies of each placement, from the paths of all slots (their mean) and of some."""
    play, n = study.play, study.constellation.satellites
    chosen = set(np.linspace(0, play.slots - 1, min(placement.OPTIMISED_SLOTS, play.slots)).astype(int).tolist())
    total = {kind: np.zeros((study.model.layers, n)) for kind in gateways}
    known = {kind: np.zeros((study.model.layers, n), np.int32) for kind in gateways}
    samples: dict[str, list[np.ndarray]] = {kind: [] for kind in gateways}
    for slot, (graph, _) in enumerate(
        network.networks(study.constellation, study.links, play.slots, study.slot_s, study.seed)
    ):
        for kind, at in gateways.items():
            path = network.path_ms(network.there_ms(graph, at), at)
            finite = np.isfinite(path)
            total[kind] += np.where(finite, path, 0.0)
            known[kind] += finite
            if slot in chosen:
                samples[kind].append(path.astype(float))
        progress()
    found = [
        routing_sets(row, study.model.top_k, None if pairs is None else pairs[layer], PLACEMENT_SETS, study.seed)
        for layer, row in enumerate(use)
    ]
    model = placement.Model(use, np.stack([s for s, _ in found]), np.stack([w for _, w in found]), mass, study.variants)
    result = []
    for row in study.placements:
        memory = np.full(n, round(1e6 * study.memory.satellite_mb), np.int64)
        memory[gateways[row.gateways]] = 0
        room = placement.Room(
            memory,
            np.full(n, np.inf) if orbit is None else orbit.spare_w,
            int(1e6 * study.variants[0].megabytes * use.size * study.memory.copies),
            play.tokens_per_s,
            play.slots * study.slot_s,
        )
        reached = known[row.gateways]
        mean = np.where(reached > 0, total[row.gateways] / np.maximum(reached, 1), np.inf)[None]
        per_plane = study.constellation.per_plane
        tasks = [placement.problem(model, room, per_plane, path) for path in (mean, np.stack(samples[row.gateways]))]
        result.append(tuple(placement.place(row.policy, *tasks, study.seed)))
    return tuple(result)


def hosts_of(study: Study, copies: tuple[Copy, ...], layer: int) -> Hosts:
    """The world of one layer: only satellites that hold one of its experts are in it."""
    mine = [copy for copy in copies if copy.layer == layer]
    at = np.unique([copy.node for copy in mine])
    hosted = np.zeros((1, study.model.experts, len(at), PRECISIONS), bool)
    joules, ms = costs_of(study)
    for copy in mine:
        precision = frame.PRECISION_ID[study.variants[copy.variant].name]
        hosted[0, copy.expert, np.searchsorted(at, copy.node), precision] = True
    nothing = np.zeros(len(at))
    world = World(
        (layer,),
        hosted,
        np.ones(len(at), bool),
        joules,
        ms,
        joule_price=nothing,
        byte_price=nothing,
        row_bytes=nothing,
        delay_ms=nothing,
        temp_c=np.full(len(at), np.nan),
        ms_price=study.play.ms_price,
    )
    return Hosts.of(at, world)


def costs_of(study: Study) -> tuple[np.ndarray, np.ndarray]:
    """joules and ms of one run [P]; 0 for precisions that there are none of."""
    joules, ms = np.zeros(PRECISIONS), np.zeros(PRECISIONS)
    for each in study.variants:
        joules[frame.PRECISION_ID[each.name]], ms[frame.PRECISION_ID[each.name]] = each.joules, each.ms
    return joules, ms
