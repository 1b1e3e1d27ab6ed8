"""A board's sensors: which ones there are below a `sysroot`, what they read now, and what was left out and why.

Sensors are found by what `name`, `type` and `*_label` say, never by the number of a hwmon or zone. A sysroot other than "/" is
a simulation's folder, and every sample from it says so. A read that hangs costs a time limit and not the agent.
A finder is a function Tree -> (sensors, what was left out and why); a new kind of board is one more in FINDERS.
Leaves out: energy (energy.py), how a reading is made (reading.py), what a file means (sensors_thermal.py, sensors_power.py,
sensors_firmware.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from node_agent import sensors_thermal
from node_agent.reading import MAX_READ_BYTES, LeftOut, Sensor, TimedCalls, measured_rate_hz, read, take
from node_agent.sensors_firmware import firmware, under_voltage_alarm
from node_agent.sensors_power import PMIC_SUM, hwmon_power, iio_power, one_total, rapl
from node_agent.sensors_thermal import TripPoint, processor_temps, thermal_zones
from node_agent.sensors_tree import Finding, Tree, is_simulated
from node_agent.wire import SensorInfo

__all__ = [
    "FINDERS",
    "MAX_READ_BYTES",
    "Found",
    "LeftOut",
    "Sensor",
    "TimedCalls",
    "TripPoint",
    "find",
    "flags",
    "info",
    "is_simulated",
    "measured_rate_hz",
    "read",
    "take",
    "trip_points",
]

MAX_SENSORS = 256
FINDERS: tuple[Callable[[Tree], Finding], ...] = (
    thermal_zones,
    processor_temps,
    hwmon_power,
    iio_power,
    rapl,
    under_voltage_alarm,
    firmware,
)


@dataclass(frozen=True)
class Found:
    """What `find` found. `total`: sensors that add up to the board's power in W, or its energy counters in J; may be empty.

    `estimate`: by which model the total is estimated (power_model.py), in words; empty where it is read from a sensor.
    """

    sensors: tuple[Sensor, ...]
    left_out: tuple[LeftOut, ...]
    estimate: str = ""

    @property
    def total(self) -> tuple[Sensor, ...]:
        chosen = tuple(sensor for sensor in self.sensors if sensor.in_total)
        power = tuple(sensor for sensor in chosen if sensor.unit == "W")
        return power or chosen

    @property
    def total_scope(self) -> str:
        """What the total meters, in words; '' where there is none."""
        if not self.total:
            return ""
        first, count = self.total[0], len(self.total)
        if self.estimate:
            return f"the board, estimated from its CPU time: {self.estimate}"
        if first.unit == "J":
            return "the processor packages"
        if first.name == PMIC_SUM:
            return "the power chip's rails, without USB ports and 5 V loads"
        return {
            "board": "the board's supply",
            "module": "the module, without its carrier board",
            "rail": f"the module as the sum of its {count} rails, without its carrier board",
        }[first.scope]


def find(sysroot: Path = Path("/")) -> Found:
    """Every sensor below `sysroot`, each with a name of its own. Never raises: what cannot be read is left out with a reason."""
    tree = Tree(sysroot)
    sensors: list[Sensor] = []
    left_out: list[LeftOut] = []
    for finder in FINDERS:
        found, dropped = finder(tree)
        sensors += found
        left_out += dropped
    if len(sensors) > MAX_SENSORS:
        reason = f"this and {len(sensors) - MAX_SENSORS - 1} more are over the limit of {MAX_SENSORS} sensors"
        left_out.append(LeftOut(sensors[MAX_SENSORS].paths[0], reason))
    sensors = one_total(sensors[:MAX_SENSORS], left_out)
    seen: dict[str, int] = {}
    named = []
    for sensor in sensors:
        seen[sensor.name] = count = seen.get(sensor.name, 0) + 1
        name = sensor.name if count == 1 else f"{sensor.name}_{count}"
        named.append(replace(sensor, name=name, provenance="simulated" if tree.simulated else sensor.provenance))
    return Found(tuple(named), tuple(left_out))


def trip_points(sysroot: Path = Path("/")) -> tuple[TripPoint, ...]:
    """The temperatures at which the kernel itself acts, coolest first; empty where it has none. Never raises."""
    return sensors_thermal.trip_points(Tree(sysroot))


def flags(found: Found) -> dict[str, bool]:
    """What the board says is so now: 'under_voltage', 'arm_frequency_capped', 'throttled', 'soft_temperature_limit'.

    Only what can be read now is in it: a flag that is not there is not known, which is not the same as False. Flags since the
    boot are sensors (`flag.*_since_boot`) and not here. Takes up to a read's time limit.
    """
    states: dict[str, bool] = {}
    for sensor in found.sensors:
        if sensor.state is not None and (sample := read(sensor)).validity == "ok":
            states[sensor.state] = states.get(sensor.state, False) or sample.value == 1.0
    return states


def info(sensor: Sensor, rate_hz: float) -> SensorInfo:
    """What the birth certificate says of a sensor."""
    return SensorInfo(sensor.name, sensor.unit, sensor.scope, sensor.provenance, rate_hz)
