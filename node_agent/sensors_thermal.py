"""Temperatures: thermal zones, their trip points, and the processor's own sensors in hwmon.

Zones are told apart by their `type`, never by their number. Leaves out: temperatures of other parts (a disk, a network card):
they would be taken for the board's own.
Source: Documentation/ABI/testing/sysfs-class-thermal, Documentation/hwmon/{sysfs-interface,coretemp,k10temp}.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from node_agent.reading import LeftOut, Sensor, number
from node_agent.sensors_tree import Device, Finding, Tree, slug

TEMP_LIMITS_C = (-100.0, 200.0)  # outside: an unpowered zone (-256 °C on a Jetson) or a broken driver
# Zones that lie, by the beginning of their type in capitals.
DENIED_ZONES = {
    "PMIC": "a Jetson's PMIC zone says 100 °C whatever it is",
    "THERMAL-FAN-EST": "no sensor: a weighted sum that a Jetson's fan follows",
}
# Zones whose trip points are another part's: at 70 °C of a Jetson Nano's PLL-therm its memory is refreshed more often.
OTHER_TRIPS = ("PLL-",)
PC_ZONES = ("x86", "acpitz", "INT3400", "TCPU", "B0D4", "iwlwifi")  # a PC's die may jump; acpitz often stands still
PROCESSOR_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal")
TRIP_KINDS = ("active", "passive", "hot", "critical")


@dataclass(frozen=True)
class TripPoint:
    """From `temp_c` on the kernel acts in this zone: 'active' cools, 'passive' slows down, 'hot' warns, 'critical' powers off."""

    zone: str
    kind: str
    temp_c: float


def _temp(name: str, path: Path, doubt: str) -> Sensor:
    return Sensor(f"temp_c.{name}", "degC", "module", "measured", (path,), 1e-3, TEMP_LIMITS_C, doubt=doubt)


def _zones(tree: Tree) -> tuple[list[tuple[Path, str]], list[LeftOut]]:
    """(folder, type) of each zone that is to be believed."""
    zones, left_out = [], []
    for folder in tree.numbered(tree.root / "sys/class/thermal", "thermal_zone"):
        if tree.outside(folder):
            left_out.append(LeftOut(folder, "a link that leads out of the sysroot"))
            continue
        kind, reason = tree.text(folder / "type")
        if kind is None:
            left_out.append(LeftOut(folder, f"its type cannot be read: {reason}"))
            continue
        denied = next((why for prefix, why in DENIED_ZONES.items() if kind.upper().startswith(prefix)), None)
        if denied:
            left_out.append(LeftOut(folder, denied))
        else:
            zones.append((folder, kind))
    return zones, left_out


def thermal_zones(tree: Tree) -> Finding:
    """/sys/class/thermal/thermal_zone*: `type` and `temp` in m°C."""
    sensors = []
    zones, left_out = _zones(tree)
    for folder, kind in zones:
        path = folder / "temp"
        if reason := tree.unreadable(path):
            left_out.append(LeftOut(path, reason))
        else:
            doubt = "stuck" if kind.startswith(PC_ZONES) else "step"
            sensors.append(_temp(slug(kind), path, doubt))
    return sensors, left_out


def processor_temps(tree: Tree) -> Finding:
    """/sys/class/hwmon/hwmon*: temp<n>_input in m°C of a processor's driver."""
    sensors, left_out = [], []
    kinds = {kind.replace("-", "_") for _, kind in _zones(tree)[0]}
    for device in tree.hwmons[0]:
        inputs = [name for name in sorted(device.files, key=lambda name: (len(name), name)) if _is_input(name)]
        if not inputs:
            continue
        if device.name in kinds:
            left_out.append(LeftOut(device.folder, f"the thermal zone {slug(device.name)} once more"))
        elif device.name not in PROCESSOR_CHIPS:
            left_out.append(LeftOut(device.folder, f"temperature of another part ({slug(device.name)})"))
        else:
            _chip(tree, device, inputs, sensors, left_out)
    return sensors, left_out


def _is_input(name: str) -> bool:
    return name.startswith("temp") and name.endswith("_input") and name[4:-6].isdigit()


def _chip(tree: Tree, device: Device, inputs: list[str], sensors: list[Sensor], left_out: list[LeftOut]) -> None:
    labels = {name: tree.label(device, name.replace("_input", "_label")) or device.name for name in inputs}
    packages = [name for name in inputs if labels[name].startswith("Package id")]
    cores = [name for name in inputs if labels[name].startswith("Core ")]
    if packages and cores:
        inputs = [name for name in inputs if name not in cores]
        left_out.append(LeftOut(device.folder, f"{len(cores)} single cores: the package is the hottest of them"))
    for name in inputs:
        path = device.folder / name
        if labels[name] == "Tctl" and "Tdie" in labels.values():
            left_out.append(LeftOut(path, "Tctl is for the fan and has an offset: Tdie is the temperature"))
        elif reason := tree.unreadable(path):
            left_out.append(LeftOut(path, reason))
        else:
            sensors.append(_temp(slug(labels[name]), path, "stuck"))


def trip_points(tree: Tree) -> tuple[TripPoint, ...]:
    """trip_point_<n>_{temp,type} of all zones that are to be believed and are the processor's, coolest first. 0 °C and less
    mean 'not set'."""
    found = []
    for folder, kind in _zones(tree)[0]:
        if kind.startswith(OTHER_TRIPS):
            continue
        for name in tree.names(folder):
            if not (name.startswith("trip_point_") and name.endswith("_temp")):
                continue
            temp, trip = tree.text(folder / name)[0], tree.text(folder / name.replace("_temp", "_type"))[0]
            try:
                temp_c = number(temp or "") * 1e-3
            except ValueError:
                continue
            if trip in TRIP_KINDS and 0 < temp_c <= TEMP_LIMITS_C[1]:
                found.append(TripPoint(kind, trip, temp_c))
    return tuple(sorted(found, key=lambda point: point.temp_c))
