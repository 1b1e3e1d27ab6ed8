"""The thin loop of live prices: between two tokens it looks at the fleet, and when there is news the policy's world changes.

A look is due when every node that sends has sent new telemetry, when some has and the last look is LATEST_S old, or when a node came or
went: once a second with the agents' own rate, never once per token. Decisions are live_prices.py's. Leaves out: imposing anything on
links; with a scenario, what the virtual satellites say of their links only bounds bytes where there is contact.

Shape letters: N nodes, P precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np

from firmware_sim.scenario import Payload
from ground_station import live_prices
from ground_station.decode import Decoder, TokenCost
from ground_station.fleet import Instant, NodeState
from ground_station.live_prices import COLUMNS, Look, Setting
from ground_station.sampling import Sampling
from ground_station.selection_choice import Choice, Policy
from ground_station.selection_world import PRECISIONS, World
from node_agent import frame

LATEST_S = 1.5
AT_CAP = 0.8  # a node whose duty is this share of its cap makes others wait
MOST_ASKED = 10.0
TELEMETRY = {  # column -> sample
    "limit_c": "guard_limit_c",
    "uptime_s": "uptime_s",
    "energy_j": "energy_j",
    "compute_j": "energy_compute_j",
    "compute_s": "expert_compute_s",
    "rows": "expert_rows_served",
    "requests": "requests_served",
    "baseline_w": "power_baseline_w",
}


class View(Protocol):
    """What is needed of twin.View, a virtual satellite now."""

    mission_s: float
    temp_c: float
    avionics_c: float
    soc: float
    cap: float
    link_up: bool | None
    link_rate_bps: float


class Tape(Protocol):
    """What is needed of recording.Tape."""

    def look(self, call: int, look: Look, joule_price: np.ndarray, byte_price: np.ndarray) -> None: ...

    def token(self, cost: TokenCost, call: int, whole: bool) -> None: ...

    def begin_text(self) -> bool: ...

    def end_text(self, calls: int) -> None: ...


def look_at(
    nodes: tuple[str, ...],
    states: Mapping[str, NodeState],
    now: Instant,
    up: list[bool],
    runs: np.ndarray,
    wait_s: float,
    waiting: float,
    satellites: Mapping[str, View] | None = None,
    payload: Payload | None = None,
) -> Look:
    """One look. runs [N, P]: pairs named so far; wait_s: mean of an exchange since the last look, waiting: share of the
    time since then; satellites, payload: of a scenario."""
    values = np.full((len(COLUMNS), len(nodes)), np.nan)

    def put(name: str, i: int, value: float | None) -> None:
        values[COLUMNS.index(name), i] = np.nan if value is None else value

    for i, node in enumerate(nodes):
        state = states.get(node, NodeState(node))
        for column, sample in TELEMETRY.items():
            put(column, i, state.value(sample))
        sides = [state.value("bytes_received"), state.value("bytes_sent")]
        put("bytes", i, None if None in sides else sum(sides))
        duty, cap = state.value("duty"), state.value("duty_cap")
        held = duty is not None and cap is not None and cap < 1.0 and duty >= AT_CAP * cap
        put("wait_s", i, wait_s if held else 0.0)
        # without the cap all of the waiting might have been work
        put("asked", i, min(1.0 / max(1.0 - waiting, 1e-3), MOST_ASKED) if held else 1.0)
        put("up", i, float(up[i]))
        if satellites is None or payload is None:
            put("temp_c", i, state.value("temp_c"))
            continue
        view = satellites[node]
        put("temp_c", i, view.temp_c)
        put("ambient_c", i, view.avionics_c)
        put("dod", i, 1.0 - view.soc)
        put("heat_w", i, payload.idle_w + view.cap * (payload.busy_w - payload.idle_w))
        put("link_bytes_per_s", i, view.link_rate_bps / 8 if view.link_up else None)
    values[-PRECISIONS:] = runs.T
    time_s = now.mono_s if satellites is None else satellites[nodes[0]].mission_s
    return Look(now.utc_s, now.mono_s, time_s, values)


class Chosen:
    """A policy that remembers what the policy inside it chose, and tallies it: runs [N, P] of pairs named for a node, `rows` seen by all
    layers together, and `ran` expert runs. `choices`: those that were not forgotten; `calls`: how many there were; `heard` is told each."""

    def __init__(self, policy: Policy, nodes: int):
        self.policy = policy
        self.heard: Callable[[int, Choice], None] | None = None
        self.choices: list[Choice] = []
        self.runs = np.zeros((nodes, PRECISIONS))
        self.rows = self.ran = 0
        self._counted = self._forgotten = 0

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        choice = self.policy(layer, logits) if world is None else self.policy(layer, logits, world)
        self.choices.append(choice)
        if self.heard is not None:
            self.heard(layer, choice)
        return choice

    @property
    def calls(self) -> int:
        return len(self.choices) + self._forgotten

    def tally(self) -> None:
        """Counts what was chosen since the last tally."""
        for choice in self.choices[self._counted :]:
            self.rows += len(choice.gates)
            self.ran += int(np.count_nonzero(choice.gates))
            if choice.nodes is not None:
                named = (choice.nodes >= 0) & (choice.gates != 0)
                np.add.at(self.runs, (choice.nodes[named], choice.precisions[named]), 1)
        self._counted = len(self.choices)

    def forget(self, kept: int) -> None:
        """Leaves the first `kept` choices: a load without end must not fill the memory."""
        self.tally()
        self._forgotten += len(self.choices) - kept
        del self.choices[kept:]
        self._counted = kept


class PriceLoop:
    """Sets the decoder's world. `update` between two tokens; `spent` with what a token cost."""

    def __init__(
        self,
        decoder: Decoder,
        chosen: Chosen,
        setting: Setting,
        world: World,
        fleet: Callable[[], Mapping[str, NodeState]],
        now: Callable[[], Instant],
        is_up: Callable[[str], bool],
        satellites: Callable[[], Mapping[str, View]] | None = None,
        payload: Payload | None = None,
        tape: Tape | None = None,
    ):
        """`fleet`, `now`: of control; `is_up`: of the link; `satellites` and `payload`: with a scenario."""
        self._decoder, self._chosen, self.setting, self._world = decoder, chosen, setting, world
        self._fleet, self._now, self._is_up = fleet, now, is_up
        self._satellites, self._payload, self._tape = satellites, payload, tape
        self.state = live_prices.start(setting)
        self.updates = 0
        n = len(setting.nodes)
        self._waited_s, self._exchanges = 0.0, 0
        self._heard: tuple[float | None, ...] = (None,) * n
        self.up: tuple[bool, ...] = ()  # as the policy's world has it
        self._first: np.ndarray | None = None
        self._most = {name: np.zeros(n) for name in ("price", "heat_j", "battery_j")}

    def spent(self, cost: TokenCost, exchanges: int) -> None:
        """What a token's exchanges waited for on the wire, a duty cap's pacing included."""
        self._waited_s += cost.wire_ms / 1e3
        self._exchanges += exchanges

    def update(self) -> None:
        """Looks where a look is due."""
        states, now = self._fleet(), self._now()
        heard = tuple(
            None if (state := states.get(node)) is None or state.telemetry_at is None else state.telemetry_at.mono_s
            for node in self.setting.nodes
        )
        up = tuple(self._is_up(node) for node in self.setting.nodes)
        news = [new != old for new, old in zip(heard, self._heard)]
        last = self.state.last
        late = last is not None and now.mono_s - last.mono_s >= LATEST_S
        if last is not None and up == self.up and not all(news) and not (late and any(news)):
            return
        self._chosen.tally()
        self._heard, self.up = heard, up
        wait_s = self._waited_s / self._exchanges if self._exchanges else 0.0
        passed_s = 0.0 if last is None else now.mono_s - last.mono_s
        waiting = min(self._waited_s / passed_s, 1.0) if passed_s > 0 else 0.0
        self._waited_s, self._exchanges = 0.0, 0
        satellites = None if self._satellites is None else self._satellites()
        look = look_at(
            self.setting.nodes,
            states,
            now,
            list(up),
            self._chosen.runs.copy(),
            wait_s,
            waiting,
            satellites,
            self._payload,
        )
        self.state, self._world = live_prices.step(self.setting, self.state, look, self._world)
        self._decoder.world = self._world
        self.updates += 1
        state = self.state
        self._first = state.joule_price if self._first is None else self._first
        for name, now_is in (
            ("price", state.joule_price),
            ("heat_j", state.queues.heat_j),
            ("battery_j", state.queues.battery_j),
        ):
            self._most[name] = np.maximum(self._most[name], now_is)
        if self._tape is not None:
            self._tape.look(self._chosen.calls, look, state.joule_price, state.byte_price)

    def summary(self) -> dict:
        """What the prices did, and where each figure came from, for the ledger (JSON)."""
        state, setting = self.state, self.setting
        nodes = {}
        for i, node in enumerate(setting.nodes):
            model, costs = state.model, setting.costs
            held = [p for p in range(PRECISIONS) if costs.ms[i, p] > 0]
            nodes[node] = {
                "price": {
                    "first": _round(0.0 if self._first is None else self._first[i]),
                    "last": _round(state.joule_price[i]),
                    "max": _round(self._most["price"][i]),
                },
                "byte_price": _round(state.byte_price[i]),
                "heat_queue_j": {"last": _round(state.queues.heat_j[i]), "max": _round(self._most["heat_j"][i])},
                "battery_queue_j": {
                    "last": _round(state.queues.battery_j[i]),
                    "max": _round(self._most["battery_j"][i]),
                },
                "temp_c": None if state.last is None else _round(state.last["temp_c"][i]),
                "joules_per_run": {
                    frame.PRECISIONS[p]: _round(costs.joules[i, p] * state.joules_factor[i]) for p in held
                },
                "ms_per_run": {frame.PRECISIONS[p]: _round(costs.ms[i, p] * state.ms_factor[i]) for p in held},
                "costs_source": costs.source[i]
                + f"; since then the node's own counters (factors {state.joules_factor[i]:.2f} and {state.ms_factor[i]:.2f})",
                "heat_model": {
                    "r_k_per_w": _round(model.r_k_per_w[i]),
                    "c_j_per_k": _round(model.c_j_per_k[i]),
                    "ambient_c": _round(model.ambient_c[i]),
                    "source": model.why[i],
                }
                if setting.orbit is None
                else {
                    "r_k_per_w": _round(setting.orbit.r_k_per_w),
                    "c_j_per_k": _round(setting.orbit.c_j_per_k),
                    "ambient_c": None if state.last is None else _round(state.last["ambient_c"][i]),
                    "source": setting.told["c_and_r"],
                },
            }
        return {"currency": "nats per joule", "updates": self.updates, "sources": setting.told, "nodes": nodes}


def _round(value: float) -> float | None:
    """To six figures; None for what is not known."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def as_chosen(choices: list[Choice], up: tuple[bool, ...], world_up: tuple[bool, ...] | None) -> bool:
    """Whether what ran is what was chosen, so that it can be had again: every node is up, or the policy knew which are not and named
    every copy itself."""
    if all(up):
        return True
    return up == world_up and all(
        choice.nodes is not None and bool((choice.nodes[choice.gates != 0] >= 0).all()) for choice in choices
    )


def play(
    decoder: Decoder,
    chosen: Chosen,
    prompt_ids: list[int],
    tokens: int,
    sampling: Sampling,
    prices: PriceLoop | None,
    tape: Tape | None,
    up: Callable[[], tuple[bool, ...]],
    keep_logits: list[np.ndarray] | None = None,
) -> Iterator[TokenCost]:
    """Decoder.generate past ends of text, with prices updated before the first token and between tokens, and everything on `tape` while
    there is room. up: which nodes are, in the table's order. Choices that nobody will ask for (neither on tape nor with `keep_logits`) are
    forgotten at the end."""
    recording = tape is not None and tape.begin_text()
    before = len(chosen.choices)
    if prices is not None:
        prices.update()
    call = chosen.calls
    for cost in decoder.generate(prompt_ids, tokens, sampling, keep_logits=keep_logits, ignore_eos=True):
        if recording:
            world_up = None if prices is None else prices.up
            tape.token(cost, call, not cost.rungs and as_chosen(chosen.choices[call - chosen.calls :], up(), world_up))
        if prices is not None:
            prices.spent(cost, chosen.calls - call)
            prices.update()
        call = chosen.calls
        yield cost
    if recording:
        tape.end_text(chosen.calls)
    elif keep_logits is None:
        chosen.forget(before)
    chosen.tally()
