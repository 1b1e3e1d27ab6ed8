"""What `spacemoe demo --scenario FILE` adds to the demo: boards of a scenario, load for a while, and boards left alone.

The simulator's noiseless truth says how hot a die really was; telemetry says what the board and its virtual satellite did about it.
Leaves out: the scenario's meaning (firmware_sim), the coupling (twin.py), the text itself (demo.py).
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firmware_sim import contact, satellite
from firmware_sim import scenario as scenarios
from firmware_sim.orbit import period_s
from firmware_sim.scenario import Scenario
from ground_station.control import Control
from ground_station.decode import TokenCost
from ground_station.fleet import Taken
from ground_station.live_prices import Orbit
from ground_station.local_fleet import Board, LocalFleet
from ground_station.twin import Twin, View
from ground_station.twin_summary import AGEING_METHOD, summary
from node_agent import wire

SHIPPED = Path(scenarios.__file__).with_name("scenarios")
WATCH_S = 0.1
PROGRESS_S = 10.0
HISTORY_WAIT_S = 4.0
LOOK_STEP_S = 30.0


def find(name: str) -> Scenario:
    """A scenario by its file, or one that ships with the kit by its name.  Raises: scenarios.ScenarioError."""
    shipped = SHIPPED / f"{name}.toml"
    if "/" not in name and not name.endswith(".toml") and shipped.is_file():
        return scenarios.read(shipped)
    if not Path(name).exists():
        names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.toml")))
        raise scenarios.ScenarioError(f"{name} is no file and no scenario of the kit; there are {names}")
    return scenarios.read(Path(name))


def source(name: str) -> str:
    """The text of what `find` reads, for a recording.  Raises: scenarios.ScenarioError."""
    shipped = SHIPPED / f"{name}.toml"
    path = shipped if "/" not in name and not name.endswith(".toml") and shipped.is_file() else Path(name)
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise scenarios.ScenarioError(
            f"{path} cannot be read again for the recording ({error}): leave it in place"
        ) from None


def orbit(scenario: Scenario, nodes: tuple[str, ...]) -> Orbit:
    """What prices need of a scenario, for `nodes` in their order. Harvest: what a payload may draw on average without emptying the battery,
    by PHYSICS.md's balance over one orbit from the start, P (T_sun + T_eclipse / (eta_c eta_d)) = array T_sun, less the platform's own.

    Raises: ValueError of firmware_sim where the physics cannot be, ScenarioError for nodes that are not the scenario's boards.
    """
    power, payload = scenario.power, scenario.payload
    satellites = satellite.make(scenario)
    if set(satellites.nodes) != set(nodes):
        raise scenarios.ScenarioError(
            "the nodes are not the scenario's boards: give each board some memory for experts"
        )
    state = satellite.start(satellites, scenario.bus.start_c, power.start_soc, power.start_capacity_share)
    steps = math.ceil(float(period_s(satellites.constellation.orbits.radius_km)[0]) / LOOK_STEP_S)
    idle, unknown, lit = np.full(len(nodes), payload.idle_w), np.full(len(nodes), np.nan), np.zeros(len(nodes))
    for _ in range(steps):
        state = satellite.step(satellites, state, idle, unknown, LOOK_STEP_S)
        lit += satellite.lit_share(state) / steps
    loss = power.charge_efficiency * power.discharge_efficiency
    harvest_w = np.maximum(power.array_w * lit / (lit + (1 - lit) / loss) - power.platform_w, 0.0)
    r = float(sum(payload.r_k_per_w))
    tau_s = float(np.dot(payload.r_k_per_w, payload.tau_s)) / r
    return Orbit(
        payload.limit_c - satellite.SET_POINT_K,
        r,
        tau_s / r,
        1.0 - power.floor_soc,
        harvest_w[[satellites.nodes.index(node) for node in nodes]],
        payload.busy_w - payload.idle_w,
        scenario.time.scale,
    )


def boards(scenario: Scenario) -> tuple[Board, ...]:
    """The scenario's boards as a local fleet takes them."""
    return tuple(
        Board(board.node, board.profile, board.memory_mb * 1_000_000, board.simulated, board.guard)
        for board in scenario.boards
    )


@dataclass
class Truth:
    """A simulated die without noise: first and hottest temperature, and seconds above its guard's limit (None: not known)."""

    first_c: float = math.nan
    hottest_c: float = -math.inf
    limit_c: float | None = None
    over_s: float = 0.0
    missed: int = 0


class TruthWatch:
    """Reads every board's truth file ten times a second; a context manager."""

    def __init__(self, fleet: LocalFleet, nodes: tuple[str, ...], limits_c: dict[str, float | None]):
        self.truths = {node: Truth(limit_c=limits_c.get(node)) for node in nodes}
        self._fleet = fleet
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="truth", daemon=True)

    def __enter__(self) -> TruthWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        last_s: dict[str, float] = {}
        while not self._stop.wait(WATCH_S):
            for node, truth in self.truths.items():
                try:
                    state = json.loads(self._fleet.truth_file(node).read_bytes())
                    die_c, time_s = float(state["die_c"]), float(state["time_s"])
                except (OSError, ValueError, KeyError):
                    truth.missed += 1
                    continue
                if math.isnan(truth.first_c):
                    truth.first_c = die_c
                truth.hottest_c = max(truth.hottest_c, die_c)
                if truth.limit_c is not None and die_c > truth.limit_c:
                    truth.over_s += time_s - last_s.get(node, time_s)
                last_s[node] = time_s


def keep_busy(generate: Callable[[], list[TokenCost]], load_s: float, show: Callable[[str], None]) -> dict:
    """Generates again and again for `load_s`; what was generated, and how often the ladder was used."""
    started_s = time.monotonic()
    tokens = rungs = texts = 0
    next_s = PROGRESS_S
    while (past_s := time.monotonic() - started_s) < load_s:
        costs = generate()
        texts += 1
        tokens += len(costs)
        rungs += sum(len(cost.rungs) for cost in costs)
        if past_s >= next_s:
            show(f"  {past_s:.0f} of {load_s:.0f} s: {tokens} tokens\n")
            next_s += PROGRESS_S
    seconds = time.monotonic() - started_s
    return {
        "seconds": round(seconds, 1),
        "texts": texts,
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 2) if seconds else None,
        "ladder_uses": rungs,
    }


def leave_alone(fleet_id: str, address: tuple[str, int], nodes: tuple[str, ...], alone_s: float) -> dict[str, dict]:
    """Waits `alone_s` without a ground station, then comes back and reads from the boards' own history what they did.

    For each node: how many telemetry messages of that time came, how many are missing, for how many of them the guard said that
    the ground station is silent, and the least duty cap in them.
    """
    time.sleep(alone_s)
    came: dict[str, list[Taken]] = {node: [] for node in nodes}
    lock = threading.Lock()

    def take(node: str, taken: Taken) -> None:
        with lock:
            if node in came:
                came[node].append(taken)

    with Control(fleet_id, *address, on_telemetry=take) as control:
        control.wait_for(nodes, 10.0)
        time.sleep(HISTORY_WAIT_S)
        states = control.snapshot()
    return {node: _alone(came[node], states.get(node)) for node in nodes}


def _alone(came: list[Taken], state) -> dict:
    late = [taken.telemetry for taken in came if taken.late]
    values = [{sample.name: sample.value for sample in telemetry.samples} for telemetry in late]
    silent = [v for v in values if v.get("guard_state") is not None and int(v["guard_state"]) & wire.GUARD_SILENT]
    caps = [v["duty_cap"] for v in silent if v.get("duty_cap") is not None]
    return {
        "messages": len(late),
        "missing": None
        if state is None
        else state.counts.telemetry_gone + sum(b - a + 1 for a, b in state.received.missing()),
        "guard_silent_messages": len(silent),
        "lowest_duty_cap": round(min(caps), 3) if caps else None,
    }


class Course:
    """A scenario under way: the virtual satellites and the truth of the benches. Use as a context manager, then `run`."""

    def __init__(self, scenario: Scenario, control: Control, fleet: LocalFleet):
        nodes = tuple(board.node for board in scenario.boards)
        states = control.snapshot()
        limits_c = {node: states[node].value("guard_limit_c") if node in states else None for node in nodes}
        self._scenario, self._control, self._nodes = scenario, control, nodes
        self._twin = Twin(scenario, control)
        self._watch = TruthWatch(fleet, nodes, limits_c)
        self._guarded: set[str] = set()

    def reach(self) -> contact.Reach | None:
        """The ways to the boards' satellites now, in the scenario's order; None where it has no links."""
        return self._twin.reach

    def satellites(self) -> dict[str, View]:
        """Every board's virtual satellite now."""
        return {view.node: view for view in self._twin.views()}

    def __enter__(self) -> Course:
        self._watch.__enter__()
        self._twin.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._twin.__exit__()
        self._watch.__exit__()

    def run(
        self,
        generate: Callable[[], list[TokenCost]],
        stop_ground: Callable[[], object],
        address: tuple[str, int],
        show: Callable[[str], None],
    ) -> dict:
        """Load, then silence; the ledger's part (see `report`). `stop_ground` ends link and control plane for good."""

        def watched() -> list[TokenCost]:
            if self._twin.failed is not None:
                raise RuntimeError(f"the virtual satellites stopped: {self._twin.failed}")
            costs = generate()
            for node, state in self._control.snapshot().items():
                if int(state.value("guard_state") or 0) & wire.GUARD_HEAT:
                    self._guarded.add(node)
            return costs

        run = self._scenario.run
        show(f"\nkeeping the boards of {self._scenario.name} at work for {run.load_s:g} s ...\n")
        busy = keep_busy(watched, run.load_s, show)
        self._twin.__exit__()
        alone: dict[str, dict] = {}
        if run.alone_s:
            show(f"stopping the ground station for {run.alone_s:g} s ...\n")
            stop_ground()
            alone = leave_alone("demo", address, self._nodes, run.alone_s)
        self._watch.__exit__()
        return report(self._scenario, self._twin, self._watch, busy, alone, self._guarded)


def report(
    scenario: Scenario, twin: Twin, watch: TruthWatch, busy: dict, alone: dict[str, dict], guarded: set[str]
) -> dict:
    """The ledger's part about a scenario: virtual satellites and benches, always apart."""
    virtual = summary(twin)
    benches = {
        node: {
            "first_c": round(truth.first_c, 2),
            "hottest_c": round(truth.hottest_c, 2),
            "limit_c": truth.limit_c,
            "over_limit_s": None if truth.limit_c is None else round(truth.over_s, 1),
            "own_guard_acted": node in guarded,
            "provenance": "simulated",
        }
        for node, truth in watch.truths.items()
    }
    return {
        "name": scenario.name,
        "time_scale": scenario.time.scale,
        "energy_claims": "hold" if scenario.time.scale == 1 else "none: the time scale is not 1",
        "valid": virtual.valid,
        "invalid_because": list(virtual.reasons),
        "load": busy,
        "satellites": virtual.satellites,
        "battery_ageing": AGEING_METHOD,
        "benches": benches,
        "alone": alone,
    }


def _batteries_and_links(part: dict) -> list[str]:
    satellites = part["satellites"]
    linked = any(row["link"] for row in satellites.values())
    head = f"{'battery (model)':18}{'capacity %':>11}{'lost ppm':>10}{'next year %':>12}"
    lines = ["", head + (f"{'contact s':>11}{'delay ms':>12}{'hops':>5}" if linked else "")]
    for node, row in satellites.items():
        battery, link = row["battery"], row["link"]
        year = "-" if battery["lost_in_next_year"] is None else f"{100 * battery['lost_in_next_year']:.1f}"
        line = f"{node:18}{100 * battery['capacity_share']:>11.3f}{1e6 * battery['lost_in_run']:>10.1f}{year:>12}"
        if link:
            delay = "-" if link["delay_ms"] is None else f"{link['delay_ms'][0]:.1f}-{link['delay_ms'][1]:.1f}"
            hops = "-" if link["most_hops"] is None else str(link["most_hops"])
            line += f"{link['contact_s']:>11.0f}{delay:>12}{hops:>5}"
        lines.append(line)
    orbits = max(row["battery"]["run_orbits"] for row in satellites.values())
    lines.append(
        f"a year from {orbits:.1f} orbits of this run" + (": rough, less than one whole orbit" if orbits < 1 else "")
    )
    if linked:
        lines.append("contact, delay and hops are emulated; --links imposes them on hidden states")
    return lines


def table(part: dict) -> str:
    """The same as text of at most 80 columns."""
    lines = [
        f"scenario {part['name']}, {part['time_scale']:g} mission seconds per second; "
        f"{part['load']['tokens']} tokens in {part['load']['seconds']:g} s",
        "",
        f"{'virtual satellite':18}{'hottest °C':>11}{'limit':>7}{'over s':>8}{'umbra s':>9}{'SoC min':>9}{'duty min':>10}",
    ]
    for node, row in part["satellites"].items():
        lines.append(
            f"{node:18}{row['hottest_c']:>11.1f}{row['limit_c']:>7.1f}{row['over_limit_s']:>8.0f}{row['umbra_s']:>9.0f}"
            f"{row['lowest_soc']:>9.2f}{row['lowest_duty_cap']:>10.2f}"
        )
    lines += _batteries_and_links(part)
    lines += ["", f"{'bench (simulated)':18}{'first °C':>11}{'hottest':>9}{'limit':>7}{'over s':>8}  own guard, alone"]
    for node, row in part["benches"].items():
        limit = "-" if row["limit_c"] is None else f"{row['limit_c']:.1f}"
        over = "-" if row["over_limit_s"] is None else f"{row['over_limit_s']:.1f}"
        alone = part["alone"].get(node)
        did = "heat" if row["own_guard_acted"] else "idle"
        if alone is not None:
            did += ", silent" if alone["guard_silent_messages"] else ", not silent"
        lines.append(f"{node:18}{row['first_c']:>11.1f}{row['hottest_c']:>9.1f}{limit:>7}{over:>8}  {did}")
    lines.append("")
    if part["time_scale"] != 1:
        lines.append("no claim about a satellite's energy: the time scale is not 1")
    lines.append("run: valid" if part["valid"] else "run: INVALID: " + "; ".join(part["invalid_because"]))
    return "\n".join(lines)
