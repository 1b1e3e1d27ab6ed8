"""The upper bound of an experiment: what the best plan that knows the whole run ahead could write in useful tokens.

Builds the nodes of fluid_bound.py from an experiment's setting: each virtual satellite's heat and battery as firmware_sim.satellite has
them. Temperature: the avionics node's with idle payloads is given; what the payload's own watts add to it is the answer of the bus, which
radiates (T^4). A linear program needs a linear answer, and for an upper bound one that never warms more than the bus does: the same
network with every radiator's conductance at its largest, the secant between the idle bus and one whose payload never rests.
`flown` puts a plan through the satellites and says by how much that was too kind. Leaves out: ageing in the run, charging throttled
by cold, tokens that are whole, where experts are (all of that only lowers what a policy can do); policies that break a limit.

Shape letters: S slots, N nodes, P precisions, M measured points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog

from firmware_sim import constellation, satellite
from firmware_sim.battery import J_PER_WH
from firmware_sim.bus import AVIONICS, BATTERY
from firmware_sim.thermal import SIGMA_W_M2_K4, Network
from ground_station.experiment_orbit import Setting, Surroundings, Trace
from ground_station.fluid_bound import Bound, BoundError, Mix, Node, bound, means, resampled

MOST_SLOTS = 192  # of the program: 8 nodes take 10 s; a longer run is put into as many longer slots (see `ceiling`)
NEGLIGIBLE_K_PER_W = 1e-4  # a branch that warms less may be left out: that can only raise the bound


@dataclass(frozen=True, eq=False)
class Ceiling:
    """bound: tokens [S, X] and runs [S, N, P] of the best plan, in slots of `slot_s`; power_w [S, N]: what boards draw in it, in the
    setting's slots; useful_share: of the demand."""

    bound: Bound
    slot_s: float
    power_w: np.ndarray
    useful_share: float


@dataclass(frozen=True)
class Flown:
    """What a plan comes to on the virtual satellites. over_k: the most by which a temperature exceeds the limit at a slot's end
    (below 0: never); lowest_soc, final_soc: of any node."""

    over_k: float
    lowest_soc: float
    final_soc: float


def ceiling(
    setting: Setting,
    around: Surroundings,
    mixes: tuple[Mix, ...],
    final_soc: float,
    least_soc: float | None = None,
    most_slots: int = MOST_SLOTS,
) -> Ceiling:
    """The most useful tokens of the run, at most the demand in each slot, with every node's charge at `final_soc` or more at the end and
    never under `least_soc` (default: the scenario's floor).

    It bounds every policy that keeps limit_c at slots' ends and these charges, and whose tokens are `mixes` or means of them. A run
    of more than `most_slots` slots is put into so many longer ones, over which a plan's power is constant. That takes away a little
    of what it bounds: against all 574 slots, 192 gave 0.0016 % less where heat hardly binds (8 nodes) and 0.06 % where it binds
    always (2 nodes), 96 gave 0.005 % and 0.2 %. Give setting.slots for a bound to the last digit.
    Raises: BoundError.
    """
    nodes, used = nodes_of(setting, around, mixes, final_soc, least_soc)
    slots = min(setting.slots, most_slots)
    slot_s = setting.slot_s * setting.slots / slots
    nodes = tuple(resampled(node, slots) for node in nodes)
    demand = setting.tokens_per_s * slot_s
    found = bound(nodes, tuple(Mix(mix.runs[used], mix.worth) for mix in mixes), slot_s, demand)
    runs = np.zeros((*found.runs.shape[:2], len(setting.costs.joules)))
    runs[:, :, used] = found.runs
    power_w = setting.scenario.payload.idle_w + runs @ setting.costs.joules / slot_s
    share = found.worth / (demand * slots) if demand else 0.0
    return Ceiling(replace(found, runs=runs), slot_s, means(power_w, setting.slots), share)


def nodes_of(
    setting: Setting,
    around: Surroundings,
    mixes: tuple[Mix, ...],
    final_soc: float,
    least_soc: float | None = None,
) -> tuple[tuple[Node, ...], np.ndarray]:
    """The nodes, in watts of the virtual payload, and which precisions (ids) the mixes use: theirs alone are in run_j and run_s.

    Raises: BoundError.
    """
    payload, power, costs = setting.scenario.payload, setting.scenario.power, setting.costs
    least_soc = power.floor_soc if least_soc is None else least_soc
    if not mixes or any(len(mix.runs) != len(costs.joules) for mix in mixes):
        raise BoundError(f"give mixes of {len(costs.joules)} numbers of runs each, as mixes_of makes them")
    if not 0 <= least_soc <= 1 or not 0 <= final_soc <= 1:
        raise BoundError(f"charges of {least_soc:g} and {final_soc:g}: give shares from 0 to 1")
    if not 0 < payload.kappa or payload.idle_w < payload.fan_w:
        raise BoundError(
            "a payload with kappa 0, or whose fan draws more than idle_w, has no heat to bound: mend [payload]"
        )
    used = np.flatnonzero(np.sum([mix.runs for mix in mixes], 0))
    run_j, run_s = payload.kappa * costs.joules[used], costs.ms[used] / 1000
    if not len(used) or not (run_j > 0).all() or not (run_s > 0).all():
        raise BoundError("a precision that a mix uses has no joules or ms: give its [costs.*]")
    idle_w = payload.kappa * (payload.idle_w - payload.fan_w)
    r, tau = np.array(payload.r_k_per_w), np.array(payload.tau_s)
    satellites = satellite.make(setting.scenario)
    # all that a payload can draw in a slot: at work in all of it, or as much as the limit lets the coldest one draw at once
    at_once_w = (payload.limit_c - around.avionics_c.min()) / float(r @ (1 - np.exp(-setting.slot_s / tau)))
    most_w = max(min(idle_w + float((run_j / run_s).max()), at_once_w), idle_w)
    idle_k, array_w = _bus(setting, satellites, idle_w)
    busy_k, _ = _bus(setting, satellites, most_w)
    capacity_j = power.battery_wh * J_PER_WH * power.start_capacity_share
    nodes = []
    for index in range(len(satellites.nodes)):
        bus_r, bus_tau = bus_branches(
            satellites.constellation.network,
            _secants_w_per_k(satellites.constellation.network, idle_k[:, :, index], busy_k[:, :, index]),
            1 - power.charge_efficiency,
        )
        nodes.append(
            Node(
                # the bus's own branches begin as settled at idle power, and what that is worth is in the idle avionics node already
                ambient_c=around.avionics_c[:, index] - bus_r.sum() * idle_w,
                array_w=array_w[:, index] - power.platform_w,
                link_bytes=np.where(around.up[:, index], np.inf, 0.0),
                branch_r_k_per_w=np.concatenate([r, bus_r]),
                branch_tau_s=np.concatenate([tau, bus_tau]),
                start_k=np.concatenate([r, bus_r]) * idle_w,
                limit_c=payload.limit_c,
                idle_w=idle_w,
                capacity_j=capacity_j,
                start_j=power.start_soc * capacity_j,
                least_j=least_soc * capacity_j,
                final_j=final_soc * capacity_j,
                eta_charge=power.charge_efficiency,
                eta_discharge=power.discharge_efficiency,
                run_j=run_j,
                run_s=run_s,
                run_bytes=1.0,
            )
        )
    return tuple(nodes), used


def bus_branches(network: Network, radiating_w_per_k: np.ndarray, charge_loss: float) -> tuple[np.ndarray, np.ndarray]:
    """(R [B] in K/W, tau [B] in s): how an avionics node answers a watt of load, with fixed conductances to space [4].

    A watt that goes to the load does not charge the battery, which then is up to `charge_loss` watts cooler: that is taken off.
    """
    capacity = np.array(network.capacity_j_per_k)
    conductance = np.diag(np.array(radiating_w_per_k, float))
    for a, b, w_per_k in network.links:
        conductance[[a, b], [a, b]] += w_per_k
        conductance[[a, b], [b, a]] -= w_per_k
    root = np.sqrt(capacity)
    rates, modes = np.linalg.eigh(conductance / np.outer(root, root))
    modes = modes / root[:, None]
    r = modes[AVIONICS] * (modes[AVIONICS] - charge_loss * modes[BATTERY]) / rates
    kept = (r > NEGLIGIBLE_K_PER_W) | (r < 0)
    return r[kept], 1 / rates[kept]


def _secants_w_per_k(network: Network, cold_k: np.ndarray, hot_k: np.ndarray) -> np.ndarray:
    """[4]: sigma eps A (hot^4 - cold^4) / (hot - cold) of each node, the largest of the run; cold_k, hot_k [S, 4]."""
    factor = SIGMA_W_M2_K4 * np.array(network.radiating_m2)
    return (factor * (hot_k**2 + cold_k**2) * (hot_k + cold_k)).max(0)


def _bus(setting: Setting, satellites: satellite.Satellites, payload_w: float) -> tuple[np.ndarray, np.ndarray]:
    """(temperatures [S, 4, N] at slots' ends, what the array gives [S, N] as means over slots), of a bus whose load never changes."""
    scenario, shape = setting.scenario, satellites.constellation
    endless = replace(shape, battery=replace(shape.battery, capacity_wh=1e9))  # so that no load is cut off
    bus = constellation.start(endless, scenario.bus.start_c, 0.5)
    # a full battery at no load: all that its array gives is spilled
    sunny = constellation.start(shape, scenario.bus.start_c, 1.0)
    steps = max(1, int(np.ceil(setting.slot_s / constellation.MAX_STEP_S)))
    temp_k, spilled_j = [], [sunny.spilled_j]
    for _ in range(setting.slots):
        for _ in range(steps):
            bus = constellation.step(endless, bus, setting.slot_s / steps, payload_w + scenario.power.platform_w)
            sunny = constellation.step(shape, sunny, setting.slot_s / steps, 0.0)
        temp_k.append(bus.temp_k)
        spilled_j.append(sunny.spilled_j)
    return np.array(temp_k), np.diff(spilled_j, axis=0) / setting.slot_s


def flown(setting: Setting, plan: Ceiling) -> Flown:
    """The plan's power through firmware_sim.satellite, slot by slot, as experiment_orbit.play steps it."""
    scenario = setting.scenario
    satellites, power = satellite.make(scenario), scenario.power
    state = satellite.start(satellites, scenario.bus.start_c, power.start_soc, power.start_capacity_share)
    unknown = np.full(len(satellites.nodes), np.nan)
    temp_c, soc = [], []
    for power_w in plan.power_w:
        state = satellite.step(satellites, state, power_w, unknown, setting.slot_s)
        temp_c.append(state.temp_c)
        soc.append(satellite.soc(satellites, state))
    return Flown(
        float(np.max(temp_c) - scenario.payload.limit_c),
        float(np.min(soc)),
        float(soc[-1].min()),
    )


def points_of(trace: Trace, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """(runs [M, P], worth [M]): what a token cost and was worth, over each `slots` slots of a run, weighted by what was served.

    With 1 slot the bound holds for this run without more ado, but a slot's few tokens may have been lucky ones; means over more
    slots are less noisy, and then the bound is one of policies that are like this run on average.
    """
    runs, worth = [], []
    for at in range(0, len(trace.tokens), slots):
        part = slice(at, at + slots)
        tokens = trace.tokens[part]
        if tokens.sum() > 0:
            runs.append(np.einsum("s,snp->p", tokens, trace.runs[part]) / tokens.sum())
            worth.append(trace.useful[part].sum() / tokens.sum())
    return np.array(runs).reshape(len(runs), trace.runs.shape[2]), np.array(worth)


def mixes_of(runs: np.ndarray, worth: np.ndarray) -> tuple[Mix, ...]:
    """Mixes of measured points (runs [M, P], worth [M]), less those that a mean of others, or of others and no token, beats.

    A point that costs no run stays out of the question: tokens that no expert saw are not what a bound is for. Raises: BoundError.
    """
    runs, worth = np.asarray(runs, float), np.asarray(worth, float)
    if runs.ndim != 2 or worth.shape != runs.shape[:1] or not len(runs):
        raise BoundError(f"runs of shape {runs.shape} and worths of shape {worth.shape}: give [M, P] and [M]")
    if not (np.isfinite(runs).all() and (runs >= 0).all() and (worth >= 0).all() and (worth <= 1).all()):
        raise BoundError("a point has runs below 0, or a worth outside 0 to 1: leave it out")
    if not (runs.sum(1) > 0).all():
        raise BoundError("a point has no runs at all: leave it out")
    kept = list(range(len(runs)))
    for index in np.argsort(worth, kind="stable").tolist():
        others = [other for other in kept if other != index]
        if worth[index] > 0 and (not others or not _beaten(runs[index], worth[index], runs[others], worth[others])):
            continue
        if others:
            kept = others
    return tuple(Mix(runs[index], float(worth[index])) for index in kept)


def _beaten(runs: np.ndarray, worth: float, by_runs: np.ndarray, by_worth: np.ndarray) -> bool:
    """Whether shares of other points (at most 1 in all) cost no more of anything and are worth no less."""
    scale = np.maximum(runs, 1e-12)
    upper = np.vstack([(by_runs / scale).T, np.ones(len(by_worth))])
    best = linprog(-by_worth, upper, np.append(runs / scale, 1.0), bounds=(0, None), method="highs")
    return best.status == 0 and -best.fun >= worth - 1e-12
