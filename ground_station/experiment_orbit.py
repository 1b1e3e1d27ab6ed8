"""One policy through one scenario in mission time: slot by slot, the fleet's state sets prices, prices set what tokens cost.

In each slot the policy reads a batch of real text at the prices of the moment; what that batch cost per token, on which node, says
how many tokens the slot can serve and how much power the boards draw; the virtual satellites of firmware_sim then move on. Joules and
milliseconds per expert run are given (measured or estimated beforehand, with their source). Deterministic: the same setting gives the
same run. Leaves out: queueing inside a slot, transfers (links only say who is in contact), and the boards themselves.

Shape letters: S slots, N nodes, P precisions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from firmware_sim import contact, satellite
from firmware_sim.bus import AVIONICS, BATTERY
from firmware_sim.scenario import Scenario
from firmware_sim.thermal import KELVIN
from ground_station import selection_prices, wear_price
from ground_station.experiment_text import Rehearsal, joined
from ground_station.selection_choice import Policy
from ground_station.selection_prices import Limits, Observation, Queues
from ground_station.selection_world import PRECISIONS, World

ADMISSIONS = ("cap", "throttle")
THROTTLE_HYSTERESIS_K = 2.0
SMOOTHING = 0.15
"""A batch of some tens of tokens stands for the thousands of a slot. How unevenly it loads the nodes is mostly its size's doing: loads are
smoothed over slots, or every policy would seem to serve a tenth less than it does."""
UNBOUNDED = 1e12  # of links and waiting, which are not simulated here
HORIZON_SLOTS = 3  # how far ahead the budget of heat looks
QUEUE_SLOTS = 20  # slots of the whole demand in a queue: then a token of `topk` is priced at one nat
Progress = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Costs:
    """joules (over idle) and ms of one row through one expert in each precision [P]; source: how they were had, for reports."""

    joules: np.ndarray
    ms: np.ndarray
    source: str


@dataclass(frozen=True, eq=False)
class Setting:
    """What is the same for every policy. tokens_per_s: demand; a token is useful when its coverage is at least `coverage` and its
    divergence from the unconstrained model at most `kl_nats`. `contacts`: nodes out of contact cannot be used. `looks`: how often in
    a slot prices are set anew. wear_nats: `weight` of wear_price.py, 0: batteries' ageing has no price. smoothing: see SMOOTHING."""

    scenario: Scenario
    costs: Costs
    slots: int
    slot_s: float
    tokens_per_s: float
    coverage: float
    kl_nats: float
    contacts: bool = False
    looks: int = 4
    wear_nats: float = 0.0
    smoothing: float = SMOOTHING


@dataclass(frozen=True, eq=False)
class Trace:
    """One run, per slot. tokens, useful, nats, coverage, kl [S]: served, of them useful, mean negative log-likelihood, least coverage
    and mean divergence of the slot's batch; temp_c, avionics_c, battery_c, soc, power_w, price [S, N] at the slot's end; runs [S, N, P]: of
    one token; visits [S, N]: rows of one token that went to the node; over_s [N]; capacity_share [N] at the end. token_* [S, T]: of
    each of the T tokens that a slot really read (experiment_text.Batch); decisions_sha256: of all choices, in order."""

    tokens: np.ndarray
    useful: np.ndarray
    nats: np.ndarray
    coverage: np.ndarray
    kl: np.ndarray
    temp_c: np.ndarray
    avionics_c: np.ndarray
    battery_c: np.ndarray
    soc: np.ndarray
    power_w: np.ndarray
    price: np.ndarray
    runs: np.ndarray
    visits: np.ndarray
    over_s: np.ndarray
    capacity_share: np.ndarray
    token_latency_ms: np.ndarray
    token_nats: np.ndarray
    token_kl: np.ndarray
    token_coverage: np.ndarray
    token_bytes: np.ndarray
    decisions_sha256: str


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What no policy changes, per slot [S, N]: avionics_c with idle payloads, lit share, whether the node is in contact; and
    harvest_w [N]: what a payload may draw on average without emptying the battery over the run, by PHYSICS.md's balance
    P (T_sun + T_eclipse / (eta_c eta_d)) = array T_sun, less the platform's own."""

    avionics_c: np.ndarray
    lit: np.ndarray
    up: np.ndarray
    harvest_w: np.ndarray


def surroundings(setting: Setting) -> Surroundings:
    """Raises: ValueError of firmware_sim for a scenario whose physics cannot be, or without [links] where contacts count."""
    scenario = setting.scenario
    satellites, state = _begin(scenario)
    n = len(satellites.nodes)
    avionics_c, lit, up = (np.zeros((setting.slots, n)) for _ in range(3))
    network = contact.make(scenario) if setting.contacts else None
    idle = np.full(n, scenario.payload.idle_w)
    for slot in range(setting.slots):
        up[slot] = 1 if network is None else contact.at(network, slot * setting.slot_s).up
        state = satellite.step(satellites, state, idle, np.full(n, np.nan), setting.slot_s)
        avionics_c[slot] = state.bus.temp_k[AVIONICS] - KELVIN
        lit[slot] = satellite.lit_share(state)
    share = lit.mean(0)
    loss = scenario.power.charge_efficiency * scenario.power.discharge_efficiency
    harvest = scenario.power.array_w * share / (share + (1 - share) / loss) - scenario.power.platform_w
    return Surroundings(avionics_c, lit, up > 0, np.maximum(harvest, 0.0))


def _begin(scenario: Scenario) -> tuple[satellite.Satellites, satellite.State]:
    satellites, power = satellite.make(scenario), scenario.power
    return satellites, satellite.start(satellites, scenario.bus.start_c, power.start_soc, power.start_capacity_share)


def cell_of(scenario: Scenario, around: Surroundings) -> wear_price.Cell:
    """What the price of wear needs to know of a scenario's batteries, as old as they are at its start."""
    fleet = satellite.make(scenario).constellation
    capacity_j = scenario.power.start_capacity_share * fleet.battery.capacity_j
    return wear_price.Cell(
        np.full(around.lit.shape[1], capacity_j),
        fleet.battery.discharge_efficiency,
        fleet.array_w,
        2 * np.pi / fleet.argument_rate_rad_s,
        wear_price.battery_k_per_w(fleet.network, around.avionics_c.mean() + KELVIN),
    )


def limits(setting: Setting, around: Surroundings, token_j: float) -> Limits:
    """The bounds of every node. Prices are nats per joule; their unit is one nat for the `token_j` joules of a token of `topk`, reached
    when a queue holds QUEUE_SLOTS slots of the whole demand."""
    payload, n = setting.scenario.payload, around.lit.shape[1]
    r = float(sum(payload.r_k_per_w))
    tau_s = float(np.dot(payload.r_k_per_w, payload.tau_s)) / r
    every = np.ones(n)
    return Limits(
        temp_limit_c=(payload.limit_c - satellite.SET_POINT_K) * every,
        heat_c_j_per_k=tau_s / r * every,
        heat_r_k_per_w=r * every,
        harvest_w=around.harvest_w,
        dod_limit=(1.0 - setting.scenario.power.floor_soc) * every,
        link_bytes_per_s=UNBOUNDED * every,
        wait_limit_s=UNBOUNDED * every,
        horizon_s=setting.slot_s * HORIZON_SLOTS,
        scale_j=token_j * setting.tokens_per_s * setting.slot_s / n * QUEUE_SLOTS,
        heat_weight=1.0 / token_j,
        battery_weight=1.0 / token_j,
        link_weight=0.0,
        barrier_weight=0.0,
    )


def play(
    setting: Setting,
    around: Surroundings,
    rehearsal: Rehearsal,
    policy: Policy,
    admission: str,
    progress: Progress | None = None,
) -> Trace:
    """Runs a policy over all slots.

    `admission`: "cap": the ground station's duty caps (firmware_sim.satellite) bound what a node may draw; "throttle": nothing does
    but the board's own firmware, which at the limit falls to its floor until it has cooled by THROTTLE_HYSTERESIS_K.
    Raises: ValueError for another admission.
    """
    if admission not in ADMISSIONS:
        raise ValueError(f"admission {admission!r} is unknown: use {' or '.join(ADMISSIONS)}")
    scenario, costs, payload = setting.scenario, setting.costs, setting.scenario.payload
    satellites, state = _begin(scenario)
    n, s, dt_s = len(satellites.nodes), setting.slots, setting.slot_s
    world = World.of(rehearsal.table, rehearsal.manifest.dims.experts, costs.joules, costs.ms)
    token_j = float(costs.joules[rehearsal.precision]) * len(world.layers) * rehearsal.manifest.dims.top_k
    bounds, queues, playing = limits(setting, around, token_j), Queues.empty(n), rehearsal.play(policy)
    tokens_read = setting.looks * rehearsal.batch_tokens
    trace = {name: np.zeros(shape) for name, shape in per_slot(s, n, tokens_read).items()}
    cell, ahead_s = cell_of(scenario, around), wear_price.shadow_ahead_s(around.lit, dt_s)
    throttled = np.zeros(n, bool)
    runs: np.ndarray | None = None
    nowhere, unknown = np.zeros(n), np.full(n, np.nan)
    seen = Observation(
        state.temp_c, around.avionics_c[0], unknown, 1 - satellite.soc(satellites, state), nowhere, nowhere
    )
    for slot in range(s):
        heat_w = payload.idle_w + state.cap * (payload.busy_w - payload.idle_w)
        demand = setting.tokens_per_s * dt_s
        parts = []
        for _ in range(setting.looks):
            price, _ = selection_prices.prices(queues, seen, bounds)
            if setting.wear_nats:
                price = price + wear_price.joule_price(
                    cell,
                    seen.dod,
                    state.bus.temp_k[BATTERY] - KELVIN,
                    state.payload_w + scenario.power.platform_w,
                    around.lit[slot],
                    ahead_s[slot],
                    setting.tokens_per_s * cell.period_s / n,
                    setting.wear_nats,
                )
            world = world.changed(joule_price=price, temp_c=state.temp_c, up=around.up[slot])
            parts.append(playing.next(world))
            each_j = (parts[-1].runs @ costs.joules) / len(parts[-1].kl)  # [N], of one token
            # what was asked for and not only what was granted fills the queues: a cap alone would hide that there is too little
            asked_j = (payload.idle_w * dt_s + demand * each_j) / setting.looks
            seen = replace(seen, energy_j=asked_j, heat_w=heat_w if admission == "cap" else None)
            queues = selection_prices.update(queues, seen, dt_s / setting.looks, bounds)
        batch = joined(parts)
        tokens = len(batch.kl)
        runs = batch.runs / tokens if runs is None else runs + setting.smoothing * (batch.runs / tokens - runs)
        each_j, each_s = runs @ costs.joules, runs @ costs.ms / 1000
        if admission == "cap":
            allowed_j, allowed_s = (heat_w - payload.idle_w) * dt_s, np.full(n, dt_s)
        else:
            throttled = state.temp_c >= payload.limit_c - np.where(throttled, THROTTLE_HYSTERESIS_K, 0.0)
            allowed_j, allowed_s = np.full(n, np.inf), np.where(throttled, satellite.FLOOR_CAP, 1.0) * dt_s
        with np.errstate(divide="ignore"):
            room = np.minimum(allowed_j / np.maximum(each_j, 1e-300), allowed_s / np.maximum(each_s, 1e-300))
        served = float(min(demand, room.min()))
        power_w = payload.idle_w + served * each_j / dt_s
        state = satellite.step(satellites, state, power_w, unknown, dt_s)
        avionics_c = state.bus.temp_k[AVIONICS] - KELVIN
        soc = satellite.soc(satellites, state)
        seen = replace(seen, temp_c=state.temp_c, ambient_c=avionics_c, dod=1 - soc)
        useful = (batch.coverage >= setting.coverage) & (batch.kl <= setting.kl_nats)
        row = {
            "tokens": served,
            "useful": served * useful.mean(),
            "nats": np.nanmean(batch.nats),
            "coverage": batch.coverage.min(),
            "kl": batch.kl.mean(),
            "temp_c": state.temp_c,
            "avionics_c": avionics_c,
            "battery_c": state.bus.temp_k[BATTERY] - KELVIN,
            "soc": soc,
            "power_w": power_w,
            "price": price,
            "runs": runs,
            "visits": batch.visits / tokens,
            "token_latency_ms": batch.latency_ms,
            "token_nats": batch.nats,
            "token_kl": batch.kl,
            "token_coverage": batch.coverage,
            "token_bytes": batch.wire_bytes,
        }
        for name, value in row.items():
            trace[name][slot] = value
        if progress is not None:
            progress()
    over_s = (trace["temp_c"] > payload.limit_c).sum(0) * dt_s
    digest = playing.decisions.sha256()
    return Trace(**trace, over_s=over_s, capacity_share=state.capacity_share, decisions_sha256=digest)


def per_slot(s: int, n: int, t: int | None) -> dict[str, tuple[int | None, ...]]:
    """Shapes of what a Trace holds per slot; `t` None: tokens of a slot, not known."""
    shapes: dict[str, tuple[int | None, ...]] = {name: (s,) for name in ("tokens", "useful", "nats", "coverage", "kl")}
    shapes |= {f"token_{name}": (s, t) for name in ("latency_ms", "nats", "kl", "coverage", "bytes")}
    shapes |= {name: (s, n) for name in ("temp_c", "avionics_c", "battery_c", "soc", "power_w", "price", "visits")}
    return shapes | {"runs": (s, n, PRECISIONS)}
