"""Readings that a driver gives and that cannot be: the same for too long, or a jump that no board makes.

Stuck: each sensor is its own measure. From how often its readings repeated while it was alive follows how likely a run of equal
readings is (Laplace's rule of succession); what would come once in 1e9 is no chance. Moves by a single step of the sensor count as
repeats: where the noise is less than a step, a reading may rest in the middle of one for long. Not so with a board's whole power:
the agent works on that board, and what it does shows. A sensor that seldom moves (an idle
rail, coarse steps) is thus doubted late or never. An energy counter that stands still cannot be in any case. Jumps: a small board's
die and its supply's voltage have inertia; a new level is believed as soon as it has lasted, for a guard may not wait long. A PC's
processor may jump by 30 K in 50 ms and is not judged, nor is power, which may.
Leaves out: what no number shows (a wrong shunt, an offset); comparing sensors with each other.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

# [U] engineering values, on the side of believing.
CHANCE_LOG = math.log(1e-9)
MIN_RUN_S, WHOLE_RUN_S = 12.0, 30.0  # the second for a board's whole power
STEP_K, STEP_RATIO = 25.0, 2.0  # a die and a supply's voltage, between two readings
FRESH_S = 5.0  # a reading older than that says nothing of how far the next may be
LASTED_S, LASTED_READINGS = 1.5, 3  # a new level that stays so long is a level


@dataclass
class _Habits:
    """One sensor's past. Times are monotonic seconds."""

    last: tuple[float, ...]
    since_s: float
    run: int = 1
    repeats: int = 0  # in runs that are over, and moves by one step
    changes: int = 0  # by more than a step
    steps: tuple[float, ...] = ()  # the smallest move seen of each number
    stuck: bool = False
    believed: float | None = None
    looked_s: float = -math.inf  # the last time, believed or not
    level: float | None = None  # where it jumped to, since when, in how many readings
    level_s: float = 0.0
    level_readings: int = 0


def run_log_chance(changes: int, repeats: int, run: int) -> float:
    """Logarithm of the chance that `run` readings in a row repeat, after so many that changed and repeated, where nothing else
    is known of the sensor. Habits change with the load, so nothing is thought livelier than every other reading."""
    repeats = max(repeats, changes)
    # product over i < run of (repeats + 1 + i) / (repeats + changes + 2 + i)
    gone, both = repeats + 1, repeats + changes + 2
    return math.lgamma(gone + run) - math.lgamma(gone) - math.lgamma(both + run) + math.lgamma(both)


class Watch:
    """Remembers what sensors said. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._habits: dict[object, _Habits] = {}

    def stuck(
        self, key: object, raw: tuple[float, ...], now_s: float, limit_s: float | None, whole: bool = False
    ) -> str | None:
        """Takes note of a reading; why it cannot be alive, or None. `limit_s`: standing still for so long is enough by itself.
        `whole`: it is the board's whole power."""
        with self._lock:
            habits = self._habits.get(key)
            if habits is None:
                self._habits[key] = _Habits(raw, now_s)
                return None
            if raw != habits.last:
                if not habits.stuck:
                    habits.repeats += habits.run - 1
                moves = [abs(now - before) for now, before in zip(raw, habits.last)]
                known = habits.steps or (math.inf,) * len(raw)
                habits.steps = tuple(min(move or math.inf, step) for move, step in zip(moves, known))
                if whole or any(move >= 2 * step for move, step in zip(moves, habits.steps)):
                    habits.changes += 1
                else:
                    habits.repeats += 1
                habits.last, habits.since_s, habits.run, habits.stuck = raw, now_s, 1, False
                return None
            habits.run += 1
            lasted_s = now_s - habits.since_s
            if limit_s is not None:
                habits.stuck = lasted_s >= limit_s and habits.run > 2
            elif not habits.stuck and lasted_s >= (WHOLE_RUN_S if whole else MIN_RUN_S):
                habits.stuck = run_log_chance(habits.changes, habits.repeats, habits.run - 1) < CHANCE_LOG
            return f"has said the same for {lasted_s:.0f} s" if habits.stuck else None

    def jumped(self, key: object, value: float, now_s: float, ratio: bool) -> str | None:
        """Why a reading is too far from the last one, or None. After `stuck` with the same key. `ratio`: times, not plus."""
        with self._lock:
            habits = self._habits[key]
            before = habits.believed
            fresh, habits.looked_s = now_s - habits.looked_s <= FRESH_S, now_s
            if fresh and before is not None and not _near(before, value, ratio):
                if habits.level is None or not _near(habits.level, value, ratio):
                    habits.level_s, habits.level_readings = now_s, 0
                habits.level = value
                habits.level_readings += 1
                if habits.level_readings < LASTED_READINGS or now_s - habits.level_s < LASTED_S:
                    return f"jumped from {before:g} to {value:g}"
            habits.believed, habits.level = value, None
            return None


def _near(before: float, value: float, ratio: bool) -> bool:
    if ratio:
        return before == 0 or 1 / STEP_RATIO <= value / before <= STEP_RATIO
    return abs(value - before) <= STEP_K
