"""What a run was like for each virtual satellite, as plain numbers for reports. Leaves out the coupling itself (twin.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from firmware_sim import orbit, wear
from ground_station.twin import Record, Twin

AGEING_METHOD = (
    "Xu et al. 2016 (LMO cell): rainflow cycles of the satellite's own charge, from "
    f"{wear.LEAST_DEPTH:.0%} deep, at its battery's temperature, and calendar; next year: linear ageing f goes on as in the run's mean"
)


@dataclass(frozen=True)
class Summary:
    """What a run was like, for reports."""

    valid: bool
    reasons: tuple[str, ...]
    satellites: dict[str, dict] = field(default_factory=dict)


def summary(twin: Twin) -> Summary:
    """The records as plain numbers; the run is valid when no board was slowed down on its own and the twin did not fail."""
    reasons = [record.invalid for record in twin.records.values() if record.invalid]
    if twin.failed is not None:
        reasons.append(f"the virtual satellites stopped: {twin.failed}")
    rows = {
        node: {
            "hottest_c": round(record.hottest_c, 2),
            "limit_c": twin.scenario.payload.limit_c,
            "over_limit_s": round(record.over_limit_s, 1),
            "umbra_s": round(record.umbra_s, 1),
            "lowest_soc": round(record.lowest_soc, 4),
            "lowest_duty_cap": round(record.lowest_cap, 4),
            "unknown_power_s": round(record.unknown_s, 1),
            "battery": _battery(twin, index),
            "link": _link(twin, index, record),
            "provenance": "virtual",
        }
        for index, (node, record) in enumerate(twin.records.items())
    }
    return Summary(not reasons, tuple(reasons), rows)


def _battery(twin: Twin, index: int) -> dict:
    """What the run did to a satellite's battery, in shares of a new one's capacity. `cycles` that closed, half ones as 0.5."""
    aged = twin.state.wear
    period_s = float(orbit.period_s(twin.satellites.constellation.orbits.radius_km[index]))
    share = float(twin.state.capacity_share[index])
    year = float(wear.lost_in_a_year(aged)[index])
    return {
        "capacity_share": round(share, 9),
        "lost_in_run": round(twin.scenario.power.start_capacity_share - share, 9),
        "lost_in_next_year": None if math.isnan(year) else round(year, 6),
        "run_orbits": round(aged.time_s / period_s, 3),
        "cycles": float(aged.cycles[index]),
    }


def _link(twin: Twin, index: int, record: Record) -> dict | None:
    """How a satellite reached the hub over the run, mission seconds; None where the scenario has no links."""
    if twin.reach is None:
        return None
    seen = math.isfinite(record.least_delay_s)
    return {
        "contact_s": round(float(twin.reach.contact_s[index]), 2),
        "watched_s": round(twin.reach.time_s, 2),
        "delay_ms": [round(1e3 * value, 3) for value in (record.least_delay_s, record.most_delay_s)] if seen else None,
        "most_hops": record.most_hops if seen else None,
        "provenance": "emulated",
    }
