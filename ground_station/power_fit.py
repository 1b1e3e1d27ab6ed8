"""A board's power as idle_w + w_per_busy_core * (cores that are busy), fitted to its meter by least squares; and the table for a
board without a meter.

Pure, but for the date in the table. The busy cores are the kernel's own count in the board's telemetry (`cpu_busy_s`), the watts
its counter of joules. What the model leaves out is said in node_agent/power_model.py. Leaves out: who makes the loads
(calibrate_power.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

import numpy as np

from ground_station.power_step import CalibrateError, Reading

WINDOW_S = 0.9  # CPU time comes in ticks of 10 ms, a meter's reading is some milliseconds old: 1 % of a window
MIN_WINDOWS = 6
MIN_RANGE_CORES = 0.2
MIN_SLOPE_ERRORS = 5.0  # the slope over its standard error


@dataclass(frozen=True)
class Options:
    """Which board, how long at each duty, and which duties, one after the other; ends idle, so that a drift shows."""

    node: str
    fleet: str = "demo"
    level_s: float = 20.0
    duties: tuple[float, ...] = (0.0, 1.0, 0.5, 0.75, 0.25, 0.0)

    def __post_init__(self) -> None:
        if not 3.0 <= self.level_s <= 3600.0:
            raise ValueError(f"level_s is {self.level_s}: give a number from 3 to 3600")


@dataclass(frozen=True)
class Window:
    """Means over `seconds` at one duty, from two readings of the counters."""

    duty: float
    seconds: float
    busy_cores: float
    power_w: float


def window(duty: float, first: Reading, last: Reading) -> Window | None:
    """None where the counters do not tell: a meter's gap, no CPU time."""
    seconds = last.time_s - first.time_s
    if None in (first.energy_j, last.energy_j, first.cpu_busy_s, last.cpu_busy_s) or seconds <= 0.0:
        return None
    energy_j, busy_s = last.energy_j - first.energy_j, last.cpu_busy_s - first.cpu_busy_s
    if last.gap_s != first.gap_s or energy_j < 0.0 or busy_s < 0.0:
        return None
    return Window(duty, seconds, busy_s / seconds, energy_j / seconds)


@dataclass(frozen=True)
class PowerFit:
    """The model, standard errors of its two numbers, rms of what it leaves of the windows' watts, how many there were, and the
    busiest."""

    idle_w: float
    w_per_busy_core: float
    idle_error_w: float
    w_per_busy_core_error: float
    residual_w: float
    n: int
    busy_cores_max: float

    def power_w(self, busy_cores: float) -> float:
        return self.idle_w + self.w_per_busy_core * busy_cores


def fit(windows: Sequence[Window]) -> PowerFit:
    """Least squares; windows differ little in length and weigh the same.  Raises: CalibrateError with the next step."""
    if len(windows) < MIN_WINDOWS:
        raise CalibrateError(f"{len(windows)} windows of telemetry are too few: give a longer --level-s")
    busy = np.array([each.busy_cores for each in windows])
    watts = np.array([each.power_w for each in windows])
    if np.ptp(busy) < MIN_RANGE_CORES:
        raise CalibrateError(
            f"the load went from {busy.min():.2f} to {busy.max():.2f} busy cores only, {MIN_RANGE_CORES} are needed between: "
            "lift duty caps, and stop what else computes on the board"
        )
    design = np.stack([np.ones_like(busy), busy], axis=1)
    found = np.linalg.lstsq(design, watts, rcond=None)[0]
    left = watts - design @ found
    variance = float(left @ left) / (len(windows) - 2)
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * variance)
    idle_w, slope = map(float, found)
    if not slope > MIN_SLOPE_ERRORS * errors[1]:
        raise CalibrateError(
            f"the power rises by {slope:.3f} W for a busy core, give or take {errors[1]:.3f} W: check that the sensor is in the "
            "board's supply, or give a longer --level-s"
        )
    if idle_w < 0.0:
        raise CalibrateError(f"the fit gives {idle_w:.3f} W for an idle board: check the sensor's scale and shunt")
    rms_w = float(np.sqrt(np.mean(left**2)))
    return PowerFit(idle_w, slope, float(errors[0]), float(errors[1]), rms_w, len(windows), float(busy.max()))


def tree(
    options: Options, board: str, found: PowerFit, windows: Sequence[Window], provenance: str, cautions: list[str]
) -> dict:
    """The result as JSON has it. `levels`: means at each duty, in the order of the first time."""
    levels = []
    for duty in dict.fromkeys(each.duty for each in windows):
        mine = [each for each in windows if each.duty == duty]
        busy_cores = float(np.mean([each.busy_cores for each in mine]))
        power_w = float(np.mean([each.power_w for each in mine]))
        levels.append(
            {
                "duty": duty,
                "busy_cores": round(busy_cores, 4),
                "power_w": round(power_w, 4),
                "model_w": round(found.power_w(busy_cores), 4),
                "n": len(mine),
            }
        )
    return {
        "node": options.node,
        "board": board,
        "power_model": {name: value if name == "n" else round(value, 5) for name, value in asdict(found).items()},
        "levels": levels,
        "provenance": {"power_w": provenance},
        "cautions": cautions,
    }


def fragment(result: dict) -> str:
    """The table for the configuration of a like board without a meter."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    model = result["power_model"]
    board = "".join(character for character in result["board"] if character.isprintable())[:200]
    source = (
        f"{result['node']} ({board}), power {result['provenance']['power_w']}, {date}, n {model['n']}, "
        f"up to {model['busy_cores_max']:.2f} busy cores"
    )
    return (
        "[power_model]\n"
        f"idle_w = {model['idle_w']}\n"
        f"w_per_busy_core = {model['w_per_busy_core']}\n"
        f"residual_w = {model['residual_w']}\n"
        f"from = {json.dumps(source)}\n"
    )


def report(result: dict, table: str) -> str:
    """The result for people; `table` is the fragment."""
    model = result["power_model"]
    lines = [
        f"{result['node']} ({result['board']}): power {result['provenance']['power_w']}",
        f"idle {model['idle_w']:.3f} W (standard error {model['idle_error_w']:.3f}), "
        f"{model['w_per_busy_core']:.3f} W for each busy core ({model['w_per_busy_core_error']:.3f}),",
        f"residual {model['residual_w']:.3f} W rms, n {model['n']}, up to {model['busy_cores_max']:.2f} busy cores: beyond that "
        "it is a guess",
        f"{'duty':>6}{'busy cores':>12}{'W':>9}{'model W':>9}{'n':>5}",
        *(
            f"{each['duty']:>6.2f}{each['busy_cores']:>12.3f}{each['power_w']:>9.3f}{each['model_w']:>9.3f}{each['n']:>5}"
            for each in result["levels"]
        ),
        *(f"caution: {text}" for text in result["cautions"]),
        "for the configuration of a like board without a power sensor:",
        "",
        table,
    ]
    return "\n".join(lines)
