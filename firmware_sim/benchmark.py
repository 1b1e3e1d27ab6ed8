"""How fast the physics is: a constellation for one orbit, with and without the accelerator, and how much memory it takes.

Leaves out boards, links and everything that is not pure physics. Compiling (once per machine) is not in the seconds.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
import tracemalloc
from dataclasses import asdict, dataclass

from firmware_sim import constellation as fleet
from firmware_sim import orbit
from firmware_sim.battery import Battery
from firmware_sim.bus import BUSES
from firmware_sim.constellation import Constellation, ConstellationError

MAX_SATELLITES = 1_000_000
_SHORTEST_S = 0.1
_ALTITUDE_KM = 550.0
_LOAD_W = 18.0
_ARRAY_W = 40.0
# 2026-01-01 12:00 UTC; any day would do.
_EPOCH_DAYS = 9497.0


@dataclass(frozen=True)
class Result:
    """What `spacemoe benchmark sim --json` prints. Seconds are of one orbit, the median of `n` rounds.

    `cpu_s` is the processor time of all threads: on a busy machine it says more than `seconds`. `peak_mb` is the most memory
    the process ever held, `step_peak_mb` what one orbit added at its peak.
    """

    satellites: int
    step_s: float
    steps: int
    accelerator: str
    seconds: float
    cpu_s: float
    spread: dict[str, float]
    n: int
    prepare_s: float
    peak_mb: float
    step_peak_mb: float
    lit_share: float
    coldest_c: float
    hottest_c: float
    lowest_charge: float


def build(satellites: int) -> Constellation:
    """A Walker delta of `satellites` at 550 km and 53 degrees, in as square a pattern as the number allows."""
    if not 1 <= satellites <= MAX_SATELLITES:
        raise ConstellationError(f"{satellites} satellites; give 1 to {MAX_SATELLITES}")
    planes = next(count for count in range(int(satellites**0.5), 0, -1) if satellites % count == 0)
    orbits = orbit.walker("delta", _ALTITUDE_KM, 53.0, planes, satellites // planes, phasing=1)
    return Constellation(orbits, _EPOCH_DAYS, BUSES["12U"], Battery(), _ARRAY_W)


def sim(satellites: int = 10_000, step_s: float = 10.0, accelerator: str = "auto", rounds: int = 5) -> Result:
    """One orbit of `satellites` (J2, conical eclipse, four thermal nodes, battery), `rounds` times.

    `accelerator`: "auto" takes numba where it is installed; "numba" insists on it; "none" is plain numpy.
    Raises: ConstellationError.
    """
    if accelerator == "auto":
        accelerator = fleet.accelerators()[-1]
    if rounds < 1:
        raise ConstellationError(f"{rounds} rounds; give at least 1")
    if not _SHORTEST_S <= step_s <= fleet.MAX_STEP_S:
        raise ConstellationError(f"a step of {step_s:g} s; give {_SHORTEST_S:g} to {fleet.MAX_STEP_S:g} s")
    constellation = build(satellites)
    steps = math.ceil(float(orbit.period_s(orbit.EARTH_RADIUS_KM + _ALTITUDE_KM)) / step_s)
    began = time.perf_counter()
    for _ in fleet.run(constellation, fleet.start(constellation), step_s, 2, _LOAD_W, accelerator):
        pass
    prepare_s = time.perf_counter() - began
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        summary = _orbit(constellation, step_s, steps, accelerator)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Result(
        satellites=satellites,
        step_s=step_s,
        steps=steps,
        accelerator=accelerator,
        seconds=round(statistics.median(walls), 4),
        cpu_s=round(statistics.median(cpus), 4),
        spread={"min": round(min(walls), 4), "max": round(max(walls), 4)},
        n=rounds,
        prepare_s=round(prepare_s, 3),
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0, 1),
        step_peak_mb=round(traced_peak_mb(constellation, step_s, 20, accelerator), 2),
        **summary,
    )


def as_dict(result: Result) -> dict:
    """For JSON."""
    return asdict(result)


def traced_peak_mb(constellation: Constellation, step_s: float, steps: int, accelerator: str) -> float:
    """The most memory that arrays held at once while `steps` steps went by, MB: O(satellites), whatever `steps` is."""
    tracemalloc.start()
    try:
        _orbit(constellation, step_s, steps, accelerator)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def _orbit(constellation: Constellation, step_s: float, steps: int, accelerator: str) -> dict[str, float]:
    """Every step once, nothing kept but what a summary needs."""
    lit, coldest_k, hottest_k, lowest_j = 0.0, float("inf"), 0.0, float("inf")
    for state in fleet.run(constellation, fleet.start(constellation), step_s, steps, _LOAD_W, accelerator):
        lit += float((state.limb_rad > 0.0).mean())
        coldest_k = min(coldest_k, float(state.temp_k.min()))
        hottest_k = max(hottest_k, float(state.temp_k.max()))
        lowest_j = min(lowest_j, float(state.energy_j.min()))
    return {
        "lit_share": round(lit / steps, 5),
        "coldest_c": round(coldest_k - 273.15, 2),
        "hottest_c": round(hottest_k - 273.15, 2),
        "lowest_charge": round(lowest_j / constellation.battery.capacity_j, 4),
    }
