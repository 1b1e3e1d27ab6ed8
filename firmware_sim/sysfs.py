"""Sensor files as the kernel writes them, below a run folder; leaves out alarms, limits and anything that can be written to.

Formats and resolutions are the drivers', so that an agent meets what it meets on a board:
Documentation/ABI/testing/sysfs-class-thermal (`temp` in m°C), Documentation/hwmon/sysfs-interface.rst (in: mV, curr: mA,
power: µW), ina2xx.rst and ina3221.rst; register steps from the INA226 and INA3221 data sheets (SBOS547, SBOS576).
Files are replaced by renaming, so that a reader never sees half a number.
"""

from __future__ import annotations

import os
from pathlib import Path

from firmware_sim.board import BoardState, Profile, die_c, rail_w

Files = dict[str, str]


def ina226_files(power_w: float, supply_v: float, shunt_uohm: int) -> Files:
    """hwmon attributes of the ina2xx driver for an INA226 in a board's supply.

    Steps: shunt 2.5 µV, bus 1.25 mV; current 2.5 µV / shunt; power 25 current steps.
    """
    current_step_ua = round(2.5e6 / shunt_uohm)
    shunt_register = min(0x7FFF, round(power_w / supply_v * shunt_uohm / 2.5))
    bus_register = round(supply_v / 1.25e-3)
    # The chip multiplies its registers and drops the rest.
    power_register = shunt_register * bus_register // 20_000
    return {
        "name": "ina226",
        "shunt_resistor": str(shunt_uohm),
        "in0_input": str(round(shunt_register * 2.5e-3)),
        "in1_input": str(round(bus_register * 1.25)),
        "curr1_input": str(round(shunt_register * current_step_ua / 1000)),
        "power1_input": str(power_register * 25 * current_step_ua),
    }


def ina3221_files(rails: list[tuple[str, float, int]], supply_v: float) -> Files:
    """hwmon attributes of the ina3221 driver for up to three (label, watts, shunt in µOhm).

    Steps: bus 8 mV, shunt 40 µV. There is no power attribute: it is mV times mA. in4..in6 are the shunts, in7 their sum.
    """
    files = {"name": "ina3221"}
    bus_mv = round(supply_v / 8e-3) * 8
    total_uv = 0
    for channel, (label, watts, shunt_uohm) in enumerate(rails, start=1):
        # 13 bits with sign
        shunt_uv = min(0xFFF, round(watts / supply_v * shunt_uohm / 40)) * 40
        total_uv += shunt_uv
        files |= {
            f"in{channel}_label": label,
            f"in{channel}_enable": "1",
            f"in{channel}_input": str(bus_mv),
            f"curr{channel}_input": str(round(shunt_uv * 1000 / shunt_uohm)),
            f"shunt{channel}_resistor": str(shunt_uohm),
            f"in{channel + 3}_input": str(shunt_uv),
        }
    return files | {"in7_label": "sum of shunt voltages", "in7_input": str(total_uv)}


def meter_files(profile: Profile, state: BoardState) -> Files:
    """The power monitor's attributes in that state."""
    if profile.meter == "ina226":
        return ina226_files(state.power_w, profile.supply_v, profile.rails[0].shunt_uohm)
    rails = [(rail.label, rail_w(profile, rail, state), rail.shunt_uohm) for rail in profile.rails]
    return ina3221_files(rails, profile.supply_v)


def zone_files(kind: str, temp_c: float, step_mc: int) -> Files:
    """A thermal zone's attributes, the temperature in the sensor's own steps."""
    return {"type": kind, "temp": str(round(temp_c * 1000 / step_mc) * step_mc)}


class SensorTree:
    """The /sys of one simulated board. Like the kernel's, devices hold the files and classes and drivers point to them."""

    def __init__(self, sysroot: Path, profile: Profile) -> None:
        self._profile = profile
        self._written: dict[Path, str] = {}
        sys = Path(sysroot) / "sys"
        driver = "ina3221" if profile.meter == "ina3221" else "ina2xx"
        self._meter = sys / "devices/platform/i2c-1/1-0040/hwmon/hwmon1"
        _link(sys / "class/hwmon/hwmon1", self._meter)
        _link(sys / "bus/i2c/drivers" / driver / "1-0040", self._meter.parents[1])
        self._zones = [sys / f"devices/virtual/thermal/thermal_zone{n}" for n in range(len(profile.zones))]
        for zone in self._zones:
            _link(sys / "class/thermal" / zone.name, zone)

    def write(self, state: BoardState) -> None:
        """Writes what changed.  Raises: OSError."""
        self._replace(self._meter, meter_files(self._profile, state))
        for folder, kind in zip(self._zones, self._profile.zones):
            self._replace(folder, zone_files(kind, die_c(self._profile, state), self._profile.zone_step_mc))

    def _replace(self, folder: Path, files: Files) -> None:
        for name, text in files.items():
            path = folder / name
            if self._written.get(path) != text:
                # A name that no reader's pattern matches; never kept over a crash, so no fsync.
                partial = folder / f".{name}.partial"
                partial.write_text(text + "\n")
                os.replace(partial, path)
                self._written[path] = text


def _link(link: Path, target: Path) -> None:
    """A relative link, as in the kernel's tree, so that the folder can be moved."""
    target.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(target, link.parent))
