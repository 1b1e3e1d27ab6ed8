"""What power traces do to batteries: satellites flown by them, ageing of the orbits, what-if traces, the model's check values. Pure.

Ageing is Xu et al. 2016 (firmware_sim.ageing), one cycle per orbit. Leaves out where traces come from (study_battery.py).

Shape letters: S slots, N nodes, R runs, M samples, O orbits that count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from firmware_sim import ageing, satellite
from firmware_sim.bus import BATTERY
from firmware_sim.orbit import Orbits
from firmware_sim.scenario import Scenario
from firmware_sim.thermal import KELVIN
from firmware_sim.wear import LEAST_DEPTH
from ground_station.wear_price import SUNLIT

LOST = 0.2
SAMPLE_S = 10.0
PUBLISHED = {
    "cycles to 80 %, depth 0.1": 18686,
    "cycles to 80 %, depth 0.2": 14184,
    "cycles to 80 %, depth 0.4": 9582,
    "cycles to 80 %, depth 0.8": 4592,
    "the same without the calendar, depth 0.1": 32927,
    "the same without the calendar, depth 0.2": 20606,
    "the same without the calendar, depth 0.4": 11826,
    "the same without the calendar, depth 0.8": 4958,
    "linear ageing at 20 % lost": 0.163924,
    "temperature stress at 0 C": 0.151,
    "temperature stress at 40 C": 2.690,
}
"""Of PHYSICS.md, from Xu et al. 2016: at 25 C, mean charge 1 - depth/2, an orbit of 5739 s."""


class BatteryStudyError(ValueError):
    """The study cannot be run as asked; the text says what to give."""


@dataclass(frozen=True, eq=False)
class Aged:
    """Of orbits that count: depth, charge (middle of the cycle), temp_c [..., O, N]; linear: f of one mean orbit, cycles: to LOST [..., N].
    soc_gap: of charge at the ends of the last two orbits, drift_k: of their mean temperatures; the worst node's [...]."""

    depth: np.ndarray
    charge: np.ndarray
    temp_c: np.ndarray
    linear: np.ndarray
    cycles: np.ndarray
    soc_gap: np.ndarray
    drift_k: np.ndarray


def checks() -> list[dict]:
    """The ageing model's values, computed now, beside the published ones. `holds`: equal to the last published digit."""
    limit = ageing.linear_until(LOST)
    found = [
        limit / float(ageing.cycle_ageing(d, 1 - d / 2, 25.0, t)) for t in (5739.0, 0.0) for d in (0.1, 0.2, 0.4, 0.8)
    ]
    found += [limit, float(ageing.temperature_stress(0.0)), float(ageing.temperature_stress(40.0))]
    digits = [0] * 8 + [6, 3, 3]
    return [
        {
            "name": name,
            "published": published,
            "computed": round(value, 6),
            "deviation": round(value / published - 1, 8),
            "holds": abs(value - published) <= 0.5 * 10**-places * (1 + 1e-9),
        }
        for (name, published), value, places in zip(PUBLISHED.items(), found, digits)
    ]


def fly(scenario: Scenario, power_w: np.ndarray, slot_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What boards that draw power_w [S, R, N] do to their satellites: state of charge and battery_c [M, R, N] every SAMPLE_S or less,
    and load that was not met, in J [R, N]. The same physics as in experiment_orbit.play, all runs at once."""
    slots, runs, n = power_w.shape
    one = satellite.make(scenario)
    fleet = one.constellation
    orbits = Orbits(
        *(
            np.tile(getattr(fleet.orbits, name), runs)
            for name in ("radius_km", "inclination_rad", "raan_rad", "argument_rad")
        )
    )
    fleet = type(fleet)(orbits, fleet.epoch_days, fleet.bus, fleet.battery, fleet.array_w)
    many = replace(one, nodes=one.nodes * runs, constellation=fleet)
    state = satellite.start(many, scenario.bus.start_c, scenario.power.start_soc, scenario.power.start_capacity_share)
    parts = math.ceil(slot_s / SAMPLE_S)
    soc, battery_c = (np.zeros((slots * parts, runs, n)) for _ in range(2))
    unknown = np.full(runs * n, np.nan)
    for sample in range(slots * parts):
        state = satellite.step(many, state, power_w[sample // parts].ravel(), unknown, slot_s / parts)
        soc[sample] = satellite.soc(many, state).reshape(runs, n)
        battery_c[sample] = (state.bus.temp_k[BATTERY] - KELVIN).reshape(runs, n)
    return soc, battery_c, state.bus.unmet_j.reshape(runs, n)


def aged(soc: np.ndarray, battery_c: np.ndarray, period_s: float, orbits: int) -> Aged:
    """Ageing by samples [M, ..., N] that are so many whole orbits: one cycle each, from its highest charge to its lowest.

    Raises: BatteryStudyError with fewer than two orbits, or samples that are not whole orbits.
    """
    if orbits < 2 or len(soc) % orbits:
        raise BatteryStudyError(
            f"{len(soc)} samples of {orbits} orbits: give 2 orbits or more, of equally many samples"
        )
    charge, warm = (each.reshape(orbits, -1, *each.shape[1:]) for each in (soc, battery_c))
    low, high, temp_c = (np.moveaxis(each, 0, -2) for each in (charge.min(1), charge.max(1), warm.mean(1)))
    depth, middle = high - low, (high + low) / 2
    stress = _stress(depth, period_s) * ageing.charge_stress(middle) * ageing.temperature_stress(temp_c)
    linear = stress.mean(-2)
    return Aged(
        depth,
        middle,
        temp_c,
        linear,
        ageing.linear_until(LOST) / linear,
        np.abs(charge[-1, -1] - charge[-2, -1]).max(-1),
        np.abs(temp_c[..., -1, :] - temp_c[..., -2, :]).max(-1),
    )


def _stress(depth: np.ndarray, period_s: float) -> np.ndarray:
    """S_d + k_t t of a cycle; below LEAST_DEPTH, as in wear.py, the calendar alone."""
    deep = np.where(depth >= LEAST_DEPTH, ageing.depth_stress(np.maximum(depth, LEAST_DEPTH)), 0.0)
    return deep + ageing.Chemistry().calendar_per_s * period_s


def what_if(base_w: np.ndarray, ours_w: np.ndarray, idle_w: float) -> tuple[np.ndarray, np.ndarray]:
    """Power traces [S, N] of two halves of a policy: (its joules, spent when and where `base` spends them; base's joules, spent when and
    where the policy spends them). The second may be more than a board can draw at once: it is for attribution only."""
    base, ours = base_w - idle_w, ours_w - idle_w
    ratio = ours.sum() / base.sum()
    return idle_w + base * ratio, idle_w + ours / ratio


def sunny_only(base_w: np.ndarray, lit: np.ndarray, idle_w: float) -> np.ndarray:
    """`base`'s joules of each slot [S, N] spread evenly over the nodes in the sun then; where none is, as they were."""
    sun = lit >= SUNLIT
    spread = (base_w - idle_w).sum(1, keepdims=True) / np.maximum(sun.sum(1, keepdims=True), 1)
    return np.where(sun.any(1, keepdims=True), idle_w + np.where(sun, spread, 0.0), base_w)


def shares(total: float, joules_only: float, shift_only: float) -> float | None:
    """Share of ln `total` due to fewer joules: the mean over both orders in which the two can be had; None where nothing is gained."""
    if abs(math.log(total)) < 1e-6:
        return None
    return 0.5 * (math.log(joules_only) + math.log(total) - math.log(shift_only)) / math.log(total)


def factors(mine: Aged, other: Aged, period_s: float) -> dict[str, float]:
    """Of other's ageing over mine, geometric mean over nodes and orbits: what depth (with the calendar), charge and temperature give."""

    def stresses(of: Aged) -> list[np.ndarray]:
        return [_stress(of.depth, period_s), ageing.charge_stress(of.charge), ageing.temperature_stress(of.temp_c)]

    return {
        name: float(np.exp(np.log(b / a).mean()))
        for name, a, b in zip(("depth", "charge", "temperature"), stresses(mine), stresses(other))
    }
