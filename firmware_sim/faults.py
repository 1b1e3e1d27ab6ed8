"""Faults of a simulated board's sensors: which files they change, when, and to what. Pure, but for what a stuck file said.

    stuck      keeps what it said when the fault began            missing    the file is gone
    late       a read takes seconds                               jumping    30 K up and down; a fifth and five times the power
    minus_256  a zone without power: -256 C                       hundred    a zone that always says 100 C
    nc         an INA3221 channel that nothing is connected to    denied     the file may not be read

Leaves out faults of the board itself (supply, memory, network) and of the agent.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from firmware_sim.board import UNPOWERED_C, Profile
from firmware_sim.sysfs import Attribute, Condition

KINDS = ("stuck", "missing", "late", "jumping", "minus_256", "hundred", "nc", "denied")
MAX_FAULTS = 64
MAX_TIME_S = 1e9
JUMP_MC, JUMP_FACTORS = 30_000, (0.2, 5.0)
_CONDITIONS = {"missing": Condition.ABSENT, "late": Condition.LATE, "denied": Condition.DENIED}


class FaultError(ValueError):
    """A fault of a spec is not usable; the text says what to write."""


@dataclass(frozen=True)
class Fault:
    """One fault, between two times of the simulation, of the files whose targets have its `target`."""

    at_s: float
    until_s: float
    kind: str
    target: str

    def active(self, time_s: float) -> bool:
        return self.at_s <= time_s < self.until_s


def targets(profile: Profile) -> dict[str, tuple[str, ...]]:
    """What may be aimed at on a board, by the kinds that fit: 'zone', 'rail' (a channel of an INA3221) and 'other'."""
    rails = tuple(rail.label for m in profile.monitors for rail in m.rails if m.chip != "ina226" and rail.label != "NC")
    other = (["power"] if profile.monitors or profile.pmic else []) + (["pmic"] if profile.pmic else [])
    other += [monitor.chip for monitor in profile.monitors if monitor.chip == "ina226"]
    if profile.maker == "raspberry-pi":
        other.append("get_throttled")
    return {"zone": ("temp", *(zone.kind for zone in profile.zones)), "rail": rails, "other": tuple(other)}


def parse(tree: object, profile: Profile) -> tuple[Fault, ...]:
    """Faults from a spec's list of {"at_s", "until_s", "kind", "target"}.  Raises: FaultError."""
    if not isinstance(tree, list) or len(tree) > MAX_FAULTS:
        raise FaultError(f"faults is no list of at most {MAX_FAULTS}")
    return tuple(_fault(entry, profile) for entry in tree)


def _fault(entry: object, profile: Profile) -> Fault:
    if not isinstance(entry, dict) or set(entry) - {"at_s", "until_s", "kind", "target"}:
        raise FaultError('a fault is {"at_s": 5, "until_s": 20, "kind": "stuck", "target": "temp"}')
    times = [entry.get("at_s", 0.0), entry.get("until_s", MAX_TIME_S)]
    if any(isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 <= t <= MAX_TIME_S for t in times):
        raise FaultError(f"a fault's at_s and until_s are seconds from 0 to {MAX_TIME_S:.0f}")
    if times[0] >= times[1]:
        raise FaultError(f"a fault's until_s is {times[1]}; give more than its at_s, {times[0]}")
    kind, target = entry.get("kind"), entry.get("target")
    if kind not in KINDS:
        raise FaultError(f"no fault {str(kind)[:40]!r}; there are {', '.join(KINDS)}")
    known = targets(profile)
    fits = {"nc": known["rail"], "minus_256": known["zone"], "hundred": known["zone"]}.get(
        kind, (*known["zone"], *known["rail"], *known["other"])
    )
    if target not in fits:
        raise FaultError(
            f"a fault {kind!r} of {profile.name} cannot have the target {str(target)[:40]!r}; "
            f"there are {', '.join(fits) or 'none'}"
        )
    return Fault(float(times[0]), float(times[1]), kind, target)


class Injection:
    """The faults of one board. `seed` makes what jumps the same in each run."""

    def __init__(self, faults: Iterable[Fault], seed: str = "") -> None:
        self._faults = tuple(faults)
        self._random = random.Random(seed)
        self._stuck: dict[tuple[Fault, Path], str] = {}

    def apply(self, time_s: float, files: Mapping[Path, Attribute]) -> dict[Path, Attribute | Condition]:
        """The files with the faults of that time; where two meet, the later in the list counts."""
        changed: dict[Path, Attribute | Condition] = dict(files)
        for fault in self._faults:
            if fault.active(time_s):
                for path, attribute in files.items():
                    if fault.target in attribute.targets:
                        changed[path] = self._changed(fault, path, attribute)
        return changed

    def _changed(self, fault: Fault, path: Path, attribute: Attribute) -> Attribute | Condition:
        label = path.name.endswith("_label") or path.name.startswith("rail_name_")
        if fault.kind == "nc":
            return Attribute("NC" if label else "0")
        if label:
            return attribute  # it is the reading that fails, not the name of the rail
        if fault.kind in _CONDITIONS:
            return _CONDITIONS[fault.kind]
        if fault.kind == "stuck":
            return Attribute(self._stuck.setdefault((fault, path), attribute.text))
        if fault.kind in ("minus_256", "hundred"):
            return Attribute(str(round((UNPOWERED_C if fault.kind == "minus_256" else 100.0) * 1000)))
        return Attribute(self._jumped(path, attribute.text))

    def _jumped(self, path: Path, text: str) -> str:
        if path.name in ("temp", "temp1_input"):
            return str(int(text) + self._random.choice((-JUMP_MC, JUMP_MC)))
        factor = self._random.choice(JUMP_FACTORS)
        if path.name == "pmic_read_adc":
            return re.sub(r"(current\(\d+\)=)([\d.]+)", lambda m: f"{m[1]}{float(m[2]) * factor:.8f}", text)
        if path.name == "get_throttled":
            return text
        return " ".join(str(round(int(number) * factor)) for number in text.split())
