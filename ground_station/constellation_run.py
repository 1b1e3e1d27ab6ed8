"""Selection policies on a whole constellation without boards, slot by slot in mission time; memory is O(satellites).

In each slot the links turn, tokens are drawn (constellation_routing.py), and every contender (a placement with a policy) decides on the
same tokens at its own prices. What its tokens cost on which satellite says how many the slot can serve and how much power is drawn; the
virtual satellites of firmware_sim then move on. Everything is simulated; joules and milliseconds per run are the file's. Deterministic but
for the time that decisions take. Leaves out: text (quality is the share of gate mass that ran), queues, link rates, the radio's joules.

Letters: S slots, T tokens, L layers, E experts, K chosen, N satellites, n hosts of a layer, P precisions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from firmware_sim import satellite
from firmware_sim.bus import AVIONICS
from firmware_sim.thermal import KELVIN
from ground_station import constellation_network as network
from ground_station import selection, selection_prices
from ground_station.constellation_file import PlacementRow, PolicyRow
from ground_station.constellation_setting import STEP_S, Hosts, Setting, costs_of
from ground_station.experiment_orbit import SMOOTHING, THROTTLE_HYSTERESIS_K
from ground_station.selection_choice import Choice, Policy
from ground_station.selection_prices import Limits, Observation, Queues
from node_agent import routing

HORIZON_S, QUEUE_S = 30.0, 200.0  # as experiment_orbit's 3 and 20 slots of 10 s
UNBOUNDED = 1e12  # of links and waiting, which are not simulated here
MIN_GATE = 1e-9
Progress = Callable[[], None]


class KnobError(ValueError):
    """A policy does not take a knob of the file, or not that value; the text names it."""


class Tokens(NamedTuple):
    """Some tokens in one layer: router logits [T, E], and the model's own choice, experts and gates [T, K]."""

    logits: np.ndarray
    experts: np.ndarray
    gates: np.ndarray


class Outcome(NamedTuple):
    """A layer's tokens under a choice. ran bool, node (of the world) and precision id int [T, K]: pairs that ran; ms [T]: from the
    layer's gateway to the next one's; kept [T]: share of the model's own gates that ran."""

    ran: np.ndarray
    node: np.ndarray
    precision: np.ndarray
    ms: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True, eq=False)
class Trace:
    """One contender. Per slot [S]: tokens served, gate_mass (mean share of the model's own gates that ran) and least_mass (mean over
    tokens of the layer with the least), covered (share of tokens whose every layer keeps the file's coverage), out_of_reach (share of
    experts without a copy in reach), joules (above idle), over (satellites above their limit), hottest_c, lowest_soc; latency_ms [S, T] of
    the tokens drawn, not a number where no token could pass. over_s, least_soc [N]; decide_us: per token and layer."""

    placement: PlacementRow
    policy: PolicyRow
    tokens: np.ndarray
    gate_mass: np.ndarray
    least_mass: np.ndarray
    covered: np.ndarray
    out_of_reach: np.ndarray
    joules: np.ndarray
    over: np.ndarray
    hottest_c: np.ndarray
    lowest_soc: np.ndarray
    latency_ms: np.ndarray
    over_s: np.ndarray
    least_soc: np.ndarray
    decide_us: float


def outcome(hosts: Hosts, tokens: Tokens, choice: Choice, direct_ms: float) -> Outcome:
    """What a choice comes to in the hosts' world. A pair without a node goes to the nearest copy of the best precision that is up (as a
    dispatcher would send it); one without a copy in reach does not run. direct_ms: between the gateways, for a token without any."""
    world, fast = hosts.world, hosts.fast
    node, precision = fast.node[choice.experts], fast.precision[choice.experts]
    if choice.nodes is not None:
        named = choice.nodes >= 0
        node, precision = np.where(named, choice.nodes, node), np.where(named, choice.precisions, precision)
    ran = (choice.gates > MIN_GATE) & (node >= 0)
    each = np.where(ran, np.asarray(world.ms)[np.maximum(precision, 0)], 0.0)
    same = (node[:, :, None] == node[:, None, :]) & ran[:, None, :]
    total = world.delay_ms[np.maximum(node, 0)] + np.where(same, each[:, None, :], 0.0).sum(2)
    ms = np.where(ran.any(1), np.where(ran, total, 0.0).max(1), direct_ms)
    did = np.zeros(tokens.logits.shape, bool)
    np.put_along_axis(did, choice.experts, ran, 1)
    kept = np.where(np.take_along_axis(did, tokens.experts, 1), tokens.gates, 0.0).sum(1) / tokens.gates.sum(1)
    return Outcome(ran, node, precision, ms, kept)


def limits(setting: Setting, token_j: float, hosts: int) -> Limits:
    """Bounds of every satellite. Prices are nats per joule; their unit is one nat for the `token_j` joules of a token of `topk`, reached
    when a queue holds QUEUE_S seconds of the whole demand, as spread over the `hosts`."""
    payload, power = setting.satellites.payload, setting.study.satellite.power
    every = np.ones(setting.study.constellation.satellites)
    r = float(sum(payload.r_k_per_w))
    tau_s = float(np.dot(payload.r_k_per_w, payload.tau_s)) / r
    return Limits(
        temp_limit_c=(payload.limit_c - satellite.SET_POINT_K) * every,
        heat_c_j_per_k=tau_s / r * every,
        heat_r_k_per_w=r * every,
        harvest_w=setting.orbit.harvest_w,
        dod_limit=(1.0 - power.floor_soc) * every,
        link_bytes_per_s=UNBOUNDED * every,
        wait_limit_s=UNBOUNDED * every,
        horizon_s=max(HORIZON_S, setting.study.slot_s),
        scale_j=token_j * setting.study.play.tokens_per_s * QUEUE_S / hosts,
        heat_weight=1.0 / token_j,
        battery_weight=1.0 / token_j,
        link_weight=0.0,
        barrier_weight=0.0,
    )


class Contender:
    """A placement with a policy on its way through the slots: satellites, queues and sums of its own."""

    def __init__(self, setting: Setting, placement: int, policy: PolicyRow):
        """Raises: KnobError."""
        study = setting.study
        self.setting, self.row, self.policy_row = setting, study.placements[placement], policy
        self.policy = _policy(setting, policy)
        self.hosts = list(setting.hosts[placement])
        self.gateways = setting.gateways[self.row.gateways]
        self.joules, self.ms = costs_of(study)
        n, play = study.constellation.satellites, study.play
        self.each_j, self.each_s = np.zeros(n), np.zeros(n)  # of one token, smoothed
        self.first = True
        self.over_s, self.least_soc = np.zeros(n), np.ones(n)
        self.state: satellite.State | None = None
        if setting.satellites is not None:
            kind = study.satellite
            self.state = satellite.start(
                setting.satellites, kind.bus.start_c, kind.power.start_soc, kind.power.start_capacity_share
            )
            loaded = len(np.unique(np.concatenate([each.satellites for each in self.hosts])))
            best = study.variants[0]
            token_j = max(best.joules, 1e-12) * study.model.layers * study.model.top_k
            self.limits, self.queues = limits(setting, token_j, loaded), Queues.empty(n)
            self.throttled, self.nothing = np.zeros(n, bool), np.zeros(n)
            self.seen = self._look(np.full(n, np.nan))
        self.rows: dict[str, list] = {name: [] for name in Trace.__dataclass_fields__ if name in _PER_SLOT}
        self.latency_ms = np.full((play.slots, play.batch_tokens), np.nan, np.float32)
        self.decide_s = 0.0

    def slot(self, number: int, looks: list[list[Tokens]], there: np.ndarray) -> None:
        """One slot. looks: tokens by look and layer; there [L, N]: ms from the layers' gateways."""
        setting, study, play = self.setting, self.setting.study, self.setting.study.play
        path = network.path_ms(there, self.gateways)
        direct = there[np.arange(len(there)), np.roll(self.gateways, -1)]
        self._network(path)
        dt_s, demand = study.slot_s, play.tokens_per_s * study.slot_s
        n = study.constellation.satellites
        batch_j, batch_s = np.zeros(n), np.zeros(n)
        kept, latency = [], []
        heat_w = None
        if self.state is not None:
            payload = setting.satellites.payload
            heat_w = payload.idle_w + self.state.cap * (payload.busy_w - payload.idle_w)
        for tokens in looks:
            self._price()
            look_j, look_s, masses, ms = self._decide(tokens, direct)
            batch_j += look_j
            batch_s += look_s
            kept.append(masses)
            latency.append(ms)
            if self.state is not None:
                # what was asked for and not only what was granted fills the queues: a cap alone would hide that there is too little
                asked_j = (payload.idle_w * dt_s + demand * look_j / len(ms)) / len(looks)
                seen = replace(
                    self.seen, energy_j=asked_j, heat_w=heat_w if self.policy_row.admission == "cap" else None
                )
                self.queues = selection_prices.update(self.queues, seen, dt_s / len(looks), self.limits)
                self.seen = seen
        mass = np.concatenate(kept)  # [T, L]
        self._smooth(batch_j / len(mass), batch_s / len(mass))
        passes = bool(np.isfinite(direct).all())  # a gateway that is cut off stops every token
        served = min(demand, self._room(heat_w)) if passes else 0.0
        joules = served * self.each_j
        over, hottest_c, lowest_soc = self._move(joules)
        if passes:
            self.latency_ms[number] = np.concatenate(latency)
        values = {
            "tokens": served,
            "gate_mass": mass.mean(),
            "least_mass": mass.min(1).mean(),
            "covered": (mass.min(1) >= play.coverage - MIN_GATE).mean(),
            "out_of_reach": 1.0 - np.mean([each.world.usable[0].any((1, 2)).mean() for each in self.hosts]),
            "joules": joules.sum(),
            "over": over,
            "hottest_c": hottest_c,
            "lowest_soc": lowest_soc,
        }
        for name, value in values.items():
            self.rows[name].append(value)

    def trace(self) -> Trace:
        model, play = self.setting.study.model, self.setting.study.play
        decisions = max(len(self.rows["tokens"]), 1) * play.batch_tokens * model.layers
        return Trace(
            self.row,
            self.policy_row,
            **{name: np.array(values, float) for name, values in self.rows.items()},
            latency_ms=self.latency_ms,
            over_s=self.over_s,
            least_soc=self.least_soc,
            decide_us=1e6 * self.decide_s / decisions,
        )

    def _network(self, path: np.ndarray) -> None:
        """Who is in reach in this slot, and how far."""
        for layer, hosts in enumerate(self.hosts):
            delay = path[layer, hosts.satellites].astype(float)
            up = np.isfinite(delay)
            world = hosts.world.changed(up=up, delay_ms=np.where(up, delay, 0.0))
            self.hosts[layer] = Hosts.of(hosts.satellites, world)

    def _price(self) -> None:
        """Prices and temperatures of the moment; without heat all is free."""
        if self.state is None:
            return
        price, _ = selection_prices.prices(self.queues, self.seen, self.limits)
        for layer, hosts in enumerate(self.hosts):
            at = hosts.satellites
            world = hosts.world.changed(joule_price=price[at], temp_c=self.state.temp_c[at])
            self.hosts[layer] = Hosts(at, world, hosts.fast)  # distances have not changed

    def _decide(
        self, tokens: list[Tokens], direct: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """joules and seconds [N] of all these tokens, share of gate mass that ran [T, L], latency [T]."""
        attention, n = self.setting.study.attention, self.setting.study.constellation.satellites
        count = len(tokens[0].logits)
        joules, seconds = np.zeros(n), np.zeros(n)
        np.add.at(joules, self.gateways, count * attention.attention_joules)
        np.add.at(seconds, self.gateways, count * attention.attention_ms / 1e3)
        masses, latency = [], np.full(count, attention.attention_ms * len(tokens))
        for layer, (mine, hosts) in enumerate(zip(tokens, self.hosts)):
            began = time.perf_counter()
            choice = self.policy(layer, mine.logits, hosts.world)
            self.decide_s += time.perf_counter() - began
            found = outcome(hosts, mine, choice, float(direct[layer]))
            at, precision = hosts.satellites[found.node[found.ran]], found.precision[found.ran]
            np.add.at(joules, at, self.joules[precision])
            np.add.at(seconds, at, self.ms[precision] / 1e3)
            masses.append(found.kept)
            latency += found.ms
        return joules, seconds, np.stack(masses, axis=1), latency

    def _smooth(self, each_j: np.ndarray, each_s: np.ndarray) -> None:
        """A batch stands for the thousands of a slot: loads are smoothed over slots (see experiment_orbit.SMOOTHING)."""
        share = 1.0 if self.first else SMOOTHING
        self.each_j += share * (each_j - self.each_j)
        self.each_s += share * (each_s - self.each_s)
        self.first = False

    def _room(self, heat_w: np.ndarray | None) -> float:
        """Tokens that the slot can serve: what the busiest satellite can."""
        dt_s = self.setting.study.slot_s
        allowed_j, allowed_s = np.full(len(self.each_j), np.inf), np.full(len(self.each_j), dt_s)
        if self.state is not None:
            payload = self.setting.satellites.payload
            if self.policy_row.admission == "cap":
                allowed_j = (heat_w - payload.idle_w) * dt_s
            else:
                off_k = np.where(self.throttled, THROTTLE_HYSTERESIS_K, 0.0)
                self.throttled = self.state.temp_c >= payload.limit_c - off_k
                allowed_s = np.where(self.throttled, satellite.FLOOR_CAP, 1.0) * dt_s
        busy_j, busy_s = self.each_j > 0, self.each_s > 0
        rooms = [allowed_j[busy_j] / self.each_j[busy_j], allowed_s[busy_s] / self.each_s[busy_s]]
        return float(np.concatenate(rooms).min(initial=np.inf))

    def _move(self, joules: np.ndarray) -> tuple[int, float, float]:
        """The satellites after the slot: how many are over their limit, the hottest and the lowest charge (not a number without heat)."""
        if self.state is None:
            return 0, np.nan, np.nan
        satellites, dt_s = self.setting.satellites, self.setting.study.slot_s
        payload, steps = satellites.payload, max(1, int(np.ceil(dt_s / STEP_S)))
        power_w, unknown = payload.idle_w + joules / dt_s, np.full(len(joules), np.nan)
        for _ in range(steps):
            self.state = satellite.step(satellites, self.state, power_w, unknown, dt_s / steps)
            self.over_s += (self.state.temp_c > payload.limit_c) * (dt_s / steps)
            np.minimum(self.least_soc, satellite.soc(satellites, self.state), out=self.least_soc)
        self.seen = self._look(self.seen.energy_j)
        temp_c = self.state.temp_c
        return int((temp_c > payload.limit_c).sum()), float(temp_c.max()), float(1.0 - self.seen.dod.min())

    def _look(self, energy_j: np.ndarray) -> Observation:
        state = self.state
        dod = 1.0 - satellite.soc(self.setting.satellites, state)
        return Observation(state.temp_c, state.bus.temp_k[AVIONICS] - KELVIN, energy_j, dod, self.nothing, self.nothing)


_PER_SLOT = (
    "tokens",
    "gate_mass",
    "least_mass",
    "covered",
    "out_of_reach",
    "joules",
    "over",
    "hottest_c",
    "lowest_soc",
)


def _policy(setting: Setting, row: PolicyRow) -> Policy:
    """Raises: KnobError."""
    study = setting.study
    try:
        return selection.make(
            row.policy,
            setting.rule,
            study.model.top_k,
            study.model.experts,
            study.seed,
            calibration=setting.calibration,
            **({"coverage": study.play.coverage} | row.knobs),
        )
    except (TypeError, ValueError) as error:
        raise KnobError(f"{study.name}: policy {row.label}: {error}; correct its knobs") from None


def play(setting: Setting, progress: Progress = lambda: None) -> tuple[Trace, ...]:
    """Every placement with every policy through all slots, side by side; `progress` is called once per slot.

    Raises: KnobError, ValueError of the satellites' physics.
    """
    study = setting.study
    contenders = [
        Contender(setting, placement, policy) for placement in range(len(study.placements)) for policy in study.policies
    ]
    rng = np.random.default_rng([study.seed, 4])
    top_k, looks = study.model.top_k, study.play.looks
    graphs = network.networks(study.constellation, study.links, study.play.slots, study.slot_s, study.seed)
    for slot, (graph, _) in enumerate(graphs):
        there = {kind: network.there_ms(graph, at) for kind, at in setting.gateways.items()}
        batches: list[list[Tokens]] = [[] for _ in range(looks)]
        for layer in range(study.model.layers):
            # one draw per slot and not per look: what it evens out is the whole batch
            rows = setting.router.logits(layer, study.play.batch_tokens, rng)
            for batch, logits in zip(batches, np.split(rows, looks)):
                experts = routing.largest(logits, top_k)
                batch.append(Tokens(logits, experts, routing.gates_of(logits, experts, setting.rule)))
        for contender in contenders:
            contender.slot(slot, batches, there[contender.row.gateways])
        progress()
    return tuple(contender.trace() for contender in contenders)
