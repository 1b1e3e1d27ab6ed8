"""Couples boards to their virtual satellites: measured watts in, duty caps out, and what each satellite is like now.

A thread asks the fleet's state each period, steps firmware_sim.satellite with it, publishes every satellite's state over MQTT
(provenance "virtual") and sends each board the duty that its satellite allows. Where the scenario has links, whether and how the
satellite reaches the hub of the data plane is published too: emulated, and imposed on nothing here. The bench's temperature and the
satellite's are never mixed. A run in which a board throttles although its satellite allows all is marked invalid.
Leaves out: the physics (firmware_sim: satellite, contact), what the board does about a cap (its own guard), and the summary of a
run (twin_summary.py).
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from firmware_sim import contact, satellite
from firmware_sim.bus import AVIONICS
from firmware_sim.scenario import Scenario
from firmware_sim.thermal import KELVIN
from ground_station.control import Control
from ground_station.fleet import Instant, NodeState
from node_agent import wire

PERIOD_S = 1.0
ORDER_VALID_PERIODS = 5  # a board whose orders stop goes to its own safe duty after so many
# What a board says when its firmware or its own guard slows it down (node_agent.guard: heat, flags)
THROTTLE_FLAGS = ("flag.throttled", "flag.arm_frequency_capped", "flag.soft_temperature_limit", "flag.under_voltage")
GUARD_HEAT_OR_FLAGS = wire.GUARD_HEAT | wire.GUARD_FLAGS
CAP_STEP = 0.005  # a smaller change is no new order before the old one runs out


@dataclass(frozen=True)
class Board:
    """What is known of a board now: mean power since the last telemetry, die temperature, and why it is slow, if it is."""

    power_w: float = math.nan
    temp_c: float = math.nan
    slow: str = ""


@dataclass
class Record:
    """One satellite over the run: extremes of its virtual temperature, charge and cap; mission seconds above the limit and in
    the umbra; mission seconds for which the board's power was not known; extremes of its way to the hub, at the steps' ends; why
    the run is invalid, or empty."""

    hottest_c: float = -math.inf
    lowest_soc: float = 1.0
    lowest_cap: float = 1.0
    over_limit_s: float = 0.0
    umbra_s: float = 0.0
    unknown_s: float = 0.0
    least_delay_s: float = math.inf
    most_delay_s: float = -math.inf
    most_hops: int = 0
    invalid: str = ""


def seen(state: NodeState | None, now: Instant) -> Board:
    """A board as its telemetry shows it; everything unknown when it is stale."""
    if state is None or state.is_stale(now):
        return Board()

    def value(name: str) -> float:
        known = state.value(name)
        return math.nan if known is None else known

    slow = ", ".join(name.removeprefix("flag.") for name in THROTTLE_FLAGS if value(name) == 1.0)
    guard = value("guard_state")
    if not slow and not math.isnan(guard) and int(guard) & GUARD_HEAT_OR_FLAGS:
        slow = "its own guard"
    power_w = value("power_w")
    # a meter that is wired the wrong way round says nothing of the heat
    return Board(math.nan if power_w < 0 else power_w, value("temp_c"), slow)


@dataclass(frozen=True)
class View:
    """One satellite now, beside its board. Temperatures in degrees Celsius: `temp_c` virtual, `board_c` measured. Links are
    emulated: `link_up` None where the scenario has none; delay, rate and hops NaN where there is no way (rate also where the
    satellite is the gateway). `avionics_c`: of the node that carries the payload, what it would settle at without power."""

    node: str
    mission_s: float
    temp_c: float
    board_c: float
    payload_w: float
    soc: float
    lit_share: float
    cap: float
    capacity_share: float
    link_up: bool | None = None
    link_delay_s: float = math.nan
    link_rate_bps: float = math.nan
    link_hops: float = math.nan
    avionics_c: float = math.nan


class Twin:
    """Use as a context manager, inside the life of `control`. `views` and `records` may be read at any time."""

    def __init__(self, scenario: Scenario, control: Control, period_s: float = PERIOD_S):
        """Raises: ValueError of firmware_sim where the scenario's physics cannot be."""
        self.scenario, self._control, self._period_s = scenario, control, period_s
        self.satellites = satellite.make(scenario)
        power = scenario.power
        self._state = satellite.start(
            self.satellites, scenario.bus.start_c, power.start_soc, power.start_capacity_share
        )
        self._network = None if scenario.links is None else contact.make(scenario)
        self._reach = None if self._network is None else contact.at(self._network, 0.0)
        self.records = {node: Record() for node in self.satellites.nodes}
        self.failed: Exception | None = None
        self._ordered: dict[str, tuple[float, float]] = {}  # node -> (cap, until)
        self._boards: dict[str, Board] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="twin", daemon=True)

    def __enter__(self) -> Twin:
        for view in self.views():  # before anybody has work to do
            self._order(view.node, view.cap)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        last_s = time.monotonic()
        try:
            while not self._stop.wait(max(0.0, last_s + self._period_s - time.monotonic())):
                now_s = time.monotonic()
                self.advance(now_s - last_s)
                last_s = now_s
        except Exception as error:  # told by whoever reads `failed`; boards fall back by themselves
            self.failed = error

    def advance(self, elapsed_s: float) -> None:
        """One step of `elapsed_s` of real time: reads the fleet, moves the satellites, tells everybody."""
        now = self._control.now()
        states = self._control.snapshot()
        nodes = self.satellites.nodes
        boards = {node: seen(states.get(node), now) for node in nodes}
        before = self._state.cap
        dt_s = elapsed_s * self.scenario.time.scale
        self._state = satellite.step(
            self.satellites,
            self._state,
            np.array([boards[node].power_w for node in nodes]),
            np.array([boards[node].temp_c for node in nodes]),
            dt_s,
        )
        if self._network is not None and self._reach is not None:
            self._reach = contact.step(self._network, self._reach, dt_s)
        self._boards = boards
        for index, view in enumerate(self.views()):
            self._record(view, boards[view.node], float(before[index]), dt_s)
            self._control.publish(self._control.topics.satellite(view.node), self._message(view, now))
            self._order(view.node, view.cap)

    def views(self) -> tuple[View, ...]:
        """Every satellite now, in the scenario's order."""
        state, reach = self._state, self._reach
        soc, lit = satellite.soc(self.satellites, state), satellite.lit_share(state)
        return tuple(
            View(
                node,
                state.bus.time_s,
                float(state.temp_c[i]),
                self._boards.get(node, Board()).temp_c,
                float(state.payload_w[i]),
                float(soc[i]),
                float(lit[i]),
                float(state.cap[i]),
                float(state.capacity_share[i]),
                *(() if reach is None else _link(reach, i)),
                avionics_c=float(state.bus.temp_k[AVIONICS][i] - KELVIN),
            )
            for i, node in enumerate(self.satellites.nodes)
        )

    def _record(self, view: View, board: Board, cap_before: float, dt_s: float) -> None:
        record = self.records[view.node]
        record.hottest_c = max(record.hottest_c, view.temp_c)
        record.lowest_soc = min(record.lowest_soc, view.soc)
        record.lowest_cap = min(record.lowest_cap, view.cap)
        record.over_limit_s += dt_s * (view.temp_c > self.scenario.payload.limit_c)
        record.umbra_s += dt_s * (view.lit_share <= 0.0)
        record.unknown_s += dt_s * math.isnan(board.power_w)
        if view.link_up:
            record.least_delay_s = min(record.least_delay_s, view.link_delay_s)
            record.most_delay_s = max(record.most_delay_s, view.link_delay_s)
            record.most_hops = max(record.most_hops, int(view.link_hops))
        if board.slow and min(cap_before, view.cap) >= 1.0 and not record.invalid:
            record.invalid = (
                f"{view.node} was slowed down by {board.slow}, and its satellite allowed all: cool the board"
            )

    def _message(self, view: View, now: Instant) -> wire.Satellite:
        mission = self.scenario.time.start + timedelta(seconds=view.mission_s)
        values = [
            ("temp_c", view.temp_c, "degC"),
            ("soc", view.soc, "1"),
            ("lit_share", view.lit_share, "1"),
            ("payload_w", view.payload_w, "W"),
            ("duty_cap", view.cap, "1"),
            ("battery_capacity_share", view.capacity_share, "1"),
        ]
        if view.link_up is not None:
            values += [
                ("link_up", float(view.link_up), "1"),
                ("link_delay_s", view.link_delay_s, "s"),
                ("link_rate_bps", view.link_rate_bps, "bit/s"),
                ("link_hops", view.link_hops, "1"),
            ]
        return wire.Satellite(
            view.node,
            mission.timestamp(),
            self.scenario.time.scale,
            now.utc_s,
            tuple(_sample(name, value, unit, now.utc_s) for name, value, unit in values),
            self.records[view.node].invalid,
        )

    def _order(self, node: str, cap: float) -> None:
        """Sends a cap that is new, or again before the old one runs out."""
        now_s = time.monotonic()
        last, until_s = self._ordered.get(node, (1.0, -math.inf))
        if cap >= 1.0 and last >= 1.0:
            return  # nothing was ever limited: nothing to keep up
        if abs(cap - last) < CAP_STEP and now_s < until_s - 2 * self._period_s:
            return
        valid_s = ORDER_VALID_PERIODS * self._period_s
        if self._control.tell(node, "duty", {"cap": f"{cap:.4f}", "valid_s": f"{valid_s:g}"}, valid_s):
            self._ordered[node] = (cap, now_s + valid_s)

    @property
    def state(self) -> satellite.State:
        return self._state

    @property
    def reach(self) -> contact.Reach | None:
        """None where the scenario has no links."""
        return self._reach


def _link(reach: contact.Reach, i: int) -> tuple[bool, float, float, float]:
    hops = float(reach.hops[i]) if reach.up[i] else math.nan
    return bool(reach.up[i]), float(reach.delay_s[i]), float(reach.rate_bps[i]), hops


def _sample(name: str, value: float, unit: str, at_s: float) -> wire.Sample:
    missing = math.isnan(value)
    validity = "missing" if missing else "ok"
    return wire.Sample(name, None if missing else value, unit, validity, "virtual", "satellite", at_s)
