"""Prices over real time: looks at the fleet (telemetry, virtual satellites, data plane) fill queues, queues and barriers set prices. Pure.

A look holds what was read; `step` turns it into selection_prices' Observation, moves the queues, learns what a run costs and how the
node warms, and gives the World that the policy sees next. The same looks give the same worlds, bit by bit: that is what replay
rests on. Rules where something is not known, each said in the result (`Setting.told`, `State.model.why`, `Costs.source`):

- C and R of a node on the bench are what its own readings show (heat_fit.py). Until then its heat queue stands still and the barrier
  on its temperature acts alone, which begins BARRIER_K below the limit whatever is known.
- What fills queues is what was asked for: the watts that were drawn, those above baseline times `asked` where a duty cap held work back.
- With a scenario, temperature, charge, and the watts that heat allows are the virtual satellite's, all in mission seconds.
- Joules and ms of a run begin as `Costs` says and then follow the node's own counters, by one factor each per node: the first look in
  which the node ran at least LEAST_ROWS sets it, later ones move it by FOLLOW. A node that gets no work keeps its last figure.
  Without any node's joules nothing is priced, and `budgeted` does as `topk`.

Leaves out: who reads (price_loop.py), the first costs (live_costs.py), what a policy does with prices.

Shape letters: N nodes, P precisions, C columns of a look.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ground_station import heat_fit, selection_prices
from ground_station.selection_prices import KNEE, Limits, Observation, Queues
from ground_station.selection_world import PRECISIONS, World
from node_agent import frame

COLUMNS = (
    "temp_c",  # what the price follows: the board's, with a scenario its virtual satellite's
    "limit_c",  # the limit that the node itself keeps to; nan: it says none
    "uptime_s",  # of the telemetry that the following seven are from
    "energy_j",
    "compute_j",
    "compute_s",
    "rows",
    "requests",
    "bytes",
    "baseline_w",
    "wait_s",  # mean wait of an exchange since the last look where the node is at its duty cap, else 0
    "asked",  # how many times more work the node would have had without its cap, at most: 1 where it is not at its cap
    "up",
    "ambient_c",  # the following four: of the virtual satellite, nan on the bench
    "dod",
    "heat_w",
    "link_bytes_per_s",
    *(f"runs_{name}" for name in frame.PRECISIONS),  # pairs that a policy named for the node so far
)
UNBOUNDED = 1e12
QUEUE_S = 200.0  # seconds of a busy node's watts in a queue: then a token of `topk` is priced at one nat
HALF_WAY_NATS = 0.01  # what a run must save where a barrier is half-way from its knee to the limit
BARRIER_K = 20.0  # below the limit the barrier on temperature begins
WAIT_LIMIT_S = 0.25  # a quarter of the data plane's deadline
LEAST_ROWS = 50
LEAST_REQUESTS = 20
FOLLOW = 0.3  # how far a factor goes towards what one look says
FACTORS = (0.01, 100.0)


@dataclass(frozen=True, eq=False)
class Look:
    """What was read at one moment: UTC and monotonic seconds; time_s: seconds that queues go by (mission time with a scenario);
    values [C, N] by COLUMNS, nan where not known."""

    utc_s: float
    mono_s: float
    time_s: float
    values: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[COLUMNS.index(name)]


@dataclass(frozen=True, eq=False)
class Orbit:
    """What a scenario fixes: limit of the virtual payload, its R in K/W and C in J/K, depth of discharge, watts of harvest per node [N],
    and the watts between idle and busy; scale: mission seconds per second."""

    limit_c: float
    r_k_per_w: float
    c_j_per_k: float
    dod_limit: float
    harvest_w: np.ndarray
    span_w: float
    scale: float


@dataclass(frozen=True, eq=False)
class Costs:
    """What a run costs at first: joules (above idle) and ms of one row through one expert [N, P], 0 where the node holds no such copy;
    row_bytes [N] of a row there and back; source: how they were had, a text per node."""

    joules: np.ndarray
    ms: np.ndarray
    row_bytes: np.ndarray
    source: tuple[str, ...]

    @classmethod
    def none(cls, nodes: int) -> Costs:
        """Nothing was measured, because nobody asks for prices."""
        zeros = np.zeros((nodes, PRECISIONS))
        return cls(zeros, zeros, np.zeros(nodes), ("not measured: the policy sees no prices",) * nodes)


@dataclass(frozen=True, eq=False)
class Setting:
    """What does not change in a run. asked_limit_c: of --temp-limit; runs_per_token: of `topk`; primary: precision id of first copies."""

    nodes: tuple[str, ...]
    asked_limit_c: float
    runs_per_token: int
    primary: int
    costs: Costs
    orbit: Orbit | None = None

    @property
    def told(self) -> dict[str, str]:
        """Where each figure that prices rest on comes from."""
        if self.orbit is None:
            return {
                "temperature": "the board's own telemetry",
                "limit": f"the lower of --temp-limit ({self.asked_limit_c:g} °C) and the node's own",
                "battery": "none on the bench: no price",
                "link": "loopback: no bound, no price",
            }
        return {
            "temperature": "the virtual satellite's, from the board's watts",
            "limit": "the scenario's payload.limit_c less the satellite model's set point",
            "c_and_r": "the scenario's payload.r_k_per_w and tau_s, as one node",
            "heat_w": "the virtual satellite's duty cap, with the scenario's idle_w and busy_w",
            "battery": "the virtual satellite's charge; harvest: the array's mean over one orbit less the platform",
            "link": "the virtual satellite's rate to the hub where the scenario has links",
        }


@dataclass(frozen=True, eq=False)
class State:
    """Between two looks. Factors on the first costs [N], `learned` where a look has set them; joule_price, byte_price [N] as set by `last`,
    the last look; readings: each node's newest counters, from which the next differences are taken."""

    queues: Queues
    fit: heat_fit.HeatFit
    model: heat_fit.HeatModel
    joules_factor: np.ndarray
    ms_factor: np.ndarray
    learned: np.ndarray
    row_bytes: np.ndarray
    joule_price: np.ndarray
    byte_price: np.ndarray
    last: Look | None = None
    readings: dict[str, np.ndarray] | None = None


def start(setting: Setting) -> State:
    """Before the first look: empty queues, no price."""
    n = len(setting.nodes)
    fit = heat_fit.start(n)
    return State(
        Queues.empty(n),
        fit,
        heat_fit.estimate(fit),
        np.ones(n),
        np.ones(n),
        np.zeros(n, bool),
        setting.costs.row_bytes,
        np.zeros(n),
        np.zeros(n),
    )


def step(setting: Setting, state: State, look: Look, world: World) -> tuple[State, World]:
    """The state after `look`, and `world` at the prices of now."""
    before = state.last
    dt_s = 0.0 if before is None else max(look.time_s - before.time_s, 0.0)
    state, power_w, bytes_per_s = _learn(setting, state, look)
    held_w = (look["asked"] - 1) * (power_w - look["baseline_w"])
    power_w = power_w + np.where(held_w > 0, held_w, 0.0)
    costs_j = setting.costs.joules * state.joules_factor[:, None]
    seen = _seen(setting, state, look, power_w * dt_s, bytes_per_s * dt_s)
    bounds = limits(setting, state, look, costs_j)
    queues = state.queues if before is None else selection_prices.update(state.queues, seen, dt_s, bounds)
    joule_price, byte_price = selection_prices.prices(queues, seen, bounds)
    state = replace(state, queues=queues, joule_price=joule_price, byte_price=byte_price, last=look)
    world = world.changed(
        joule_price=joule_price,
        byte_price=byte_price,
        row_bytes=state.row_bytes,
        temp_c=look["temp_c"],
        up=look["up"] > 0,
        joules=costs_j,
        ms=setting.costs.ms * state.ms_factor[:, None],
    )
    return state, world


def limits(setting: Setting, state: State, look: Look, costs_j: np.ndarray) -> Limits:
    """The bounds now. Prices are nats per joule: 1 / (joules of a token of `topk`) is the price at which such a token is worth a nat."""
    n, orbit = len(setting.nodes), setting.orbit
    run_j = costs_j[:, setting.primary]
    run_j = float(run_j[run_j > 0].mean()) if (run_j > 0).any() else 0.0
    ms = setting.costs.ms[:, setting.primary] * state.ms_factor
    ms = float(ms[ms > 0].mean()) if (ms > 0).any() else 0.0
    token_j = run_j * setting.runs_per_token
    span_w = orbit.span_w if orbit is not None else run_j / ms * 1e3 if ms else 0.0
    every = np.ones(n)
    if orbit is None:
        asked_c = np.full(n, setting.asked_limit_c)
        limit_c = np.fmin(asked_c, look["limit_c"])
        c, r = (np.where(state.model.known, figure, 1.0) for figure in (state.model.c_j_per_k, state.model.r_k_per_w))
        harvest_w, dod_limit = UNBOUNDED * every, every
    else:
        limit_c, c, r = orbit.limit_c * every, orbit.c_j_per_k * every, orbit.r_k_per_w * every
        harvest_w, dod_limit = orbit.harvest_w, orbit.dod_limit * every
    rate = look["link_bytes_per_s"]
    return Limits(
        temp_limit_c=limit_c,
        heat_c_j_per_k=c,
        heat_r_k_per_w=r,
        harvest_w=harvest_w,
        dod_limit=dod_limit,
        link_bytes_per_s=np.where(np.isnan(rate), UNBOUNDED, rate),
        wait_limit_s=WAIT_LIMIT_S * every,
        scale_j=max(span_w * QUEUE_S, 1.0),
        scale_bytes=max(float(state.row_bytes.mean()) * setting.runs_per_token * QUEUE_S, 1.0),
        heat_weight=1 / token_j if token_j else 0.0,
        battery_weight=1 / token_j if token_j else 0.0,
        link_weight=1 / max(float(state.row_bytes.mean()) * setting.runs_per_token, 1.0),
        barrier_weight=HALF_WAY_NATS / run_j if run_j else 0.0,
    )


def _seen(setting: Setting, state: State, look: Look, energy_j: np.ndarray, link_bytes: np.ndarray) -> Observation:
    """With the barrier's rest as ambient_c, and the watts that heat allows as heat_w."""
    orbit, temp_c = setting.orbit, look["temp_c"]
    if orbit is not None:
        rest_c = np.full(len(temp_c), orbit.limit_c - BARRIER_K / (1 - KNEE))
        heat_w = np.where(np.isnan(look["heat_w"]), 0.0, look["heat_w"])
        return Observation(temp_c, rest_c, energy_j, look["dod"], link_bytes, look["wait_s"], heat_w=heat_w)
    limit_c = np.fmin(setting.asked_limit_c, look["limit_c"])
    model, one = state.model, np.ones(len(temp_c))
    known = model.known & ~np.isnan(temp_c)
    c, r, ambient_c = (
        np.where(known, figure, other)
        for figure, other in ((model.c_j_per_k, 1.0), (model.r_k_per_w, 1.0), (model.ambient_c, temp_c))
    )
    seen = Observation(
        temp_c,
        ambient_c,
        np.where(known, energy_j, np.nan),  # not identified: the heat queue stands still
        np.zeros(len(temp_c)),
        link_bytes,
        look["wait_s"],
    )
    heat_w = selection_prices.allowed_w(Limits(limit_c, c, r, one, one, one, one), seen)
    return replace(seen, ambient_c=limit_c - BARRIER_K / (1 - KNEE), heat_w=heat_w)


def _learn(setting: Setting, state: State, look: Look) -> tuple[State, np.ndarray, np.ndarray]:
    """The state with what new readings say of costs and warmth; mean watts and bytes/s [N] since each node's reading before (nan: no
    newer one)."""
    n = len(setting.nodes)
    names = ("uptime_s", "energy_j", "compute_j", "compute_s", "rows", "requests", "bytes")
    runs = look.values[-PRECISIONS:].T
    if state.readings is None:
        readings = {name: look[name] for name in names} | {"runs": runs}
        fit = heat_fit.update(state.fit, look["uptime_s"], np.full(n, np.nan), look["temp_c"])
        return replace(state, readings=readings, fit=fit), np.full(n, np.nan), np.full(n, np.nan)
    last = state.readings
    change = {name: look[name] - last[name] for name in names}
    passed_s = change["uptime_s"]
    restarted = passed_s < 0  # its counters begin anew
    new = passed_s > 0
    per_s = np.where(new, 1 / np.where(new, passed_s, 1.0), np.nan)
    power_w, bytes_per_s = change["energy_j"] * per_s, change["bytes"] * per_s
    power_w = np.where(power_w >= 0, power_w, np.nan)
    bytes_per_s = np.where(bytes_per_s >= 0, bytes_per_s, np.nan)
    named = runs - last["runs"]
    taken = new | restarted | np.isnan(last["uptime_s"])
    readings = {name: np.where(taken, look[name], last[name]) for name in names}
    readings["runs"] = np.where(taken[:, None], runs, last["runs"])
    other = np.maximum(change["rows"] - named.sum(1), 0.0)  # dispatch took them to first copies
    expected_ms = (named * setting.costs.ms).sum(1) + other * setting.costs.ms[:, setting.primary]
    expected_j = (named * setting.costs.joules).sum(1) + other * setting.costs.joules[:, setting.primary]
    enough = new & (change["rows"] >= LEAST_ROWS)
    follow = np.where(state.learned, FOLLOW, 1.0)
    row_bytes = np.where(
        new & (change["requests"] >= LEAST_REQUESTS) & (change["bytes"] > 0),
        change["bytes"] / np.where(change["requests"] > 0, change["requests"], 1.0),
        state.row_bytes,
    )
    bench = setting.orbit is None
    fit = heat_fit.update(state.fit, look["uptime_s"], power_w, look["temp_c"]) if bench else state.fit
    return (
        replace(
            state,
            readings=readings,
            fit=fit,
            model=heat_fit.estimate(fit) if bench else state.model,
            ms_factor=_followed(state.ms_factor, change["compute_s"] * 1e3, expected_ms, enough, follow),
            joules_factor=_followed(state.joules_factor, change["compute_j"], expected_j, enough, follow),
            learned=state.learned | enough,
            row_bytes=row_bytes,
        ),
        power_w,
        bytes_per_s,
    )


def _followed(
    factor: np.ndarray, measured: np.ndarray, expected: np.ndarray, enough: np.ndarray, follow: np.ndarray
) -> np.ndarray:
    """Factors moved towards measured / expected, by `follow`, where there is enough of both."""
    use = enough & (measured > 0) & (expected > 0)
    ratio = np.clip(np.where(use, measured, 1.0) / np.where(use, expected, 1.0), *FACTORS)
    return np.where(use, factor + follow * (ratio - factor), factor)
