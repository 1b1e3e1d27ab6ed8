"""Power and energy: hwmon meters (INA3221 of a Jetson, INA219/226 in a supply), a Jetson's iio form, RAPL; and what is the total.

A total is only what is known to be one: a rail that holds all others, a module's own rails together, a meter that is alone in
the board's supply. Nothing is counted twice. Leaves out: a meter's clipping (0.1 Ω clips at 0.82 A on an INA226).
Source: Documentation/hwmon/{sysfs-interface,ina2xx,ina3221}.rst, Documentation/power/powercap/powercap.rst of the Linux kernel;
NVIDIA Jetson Linux developer guide, power monitors (names of rails; ina3221x of JetPack 4: in_power in mW).
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from node_agent.reading import READ_LIMIT_S, LeftOut, Sensor
from node_agent.sensors_tree import MAX_DEVICES, Device, Finding, Tree, slug

POWER_LIMITS_W = (-10_000.0, 10_000.0)
TOTAL_LABELS = ("VDD_IN", "POM_5V_IN")  # rails that hold all others of their module
PART_LABELS = ("VDD_CPU_GPU_CV", "VDD_SOC", "POM_5V_GPU", "POM_5V_CPU")  # what those hold
# Rails of a Jetson module without such a rail, AGX Orin and AGX Xavier: together, and only all together, they are the module.
MODULES = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
PMIC_SUM = "power_w.pmic_sum"  # all metered rails of a Raspberry Pi 5's power chip
EXTERNAL_METERS = (
    *("ina209", "ina219", "ina220", "ina226", "ina230", "ina231", "ina232", "ina233", "ina234"),
    *("ina237", "ina238", "ina228", "ina260", "ina3221"),
)
COUNTER_STUCK_S = 5.0  # a running processor's energy always grows; RAPL counts about once a millisecond


def _power(name: str, paths: tuple[Path, ...], scale: float, provenance: str) -> Sensor:
    doubt = "volts" if len(paths) == 2 else "stuck"
    return Sensor(f"power_w.{name}", "W", "rail", provenance, paths, scale, POWER_LIMITS_W, doubt=doubt)


def hwmon_power(tree: Tree) -> Finding:
    """power<n>_input in µW, or in<n>_input in mV times curr<n>_input in mA."""
    devices, left_out = tree.hwmons
    sensors, left_out = [], list(left_out)
    for device in devices:
        interval_ms = tree.interval_ms(device)
        if device.name == "ina3221" and interval_ms is not None and interval_ms > 1000 * READ_LIMIT_S:
            reason = (
                f"a reading waits {interval_ms} ms for its averages, {READ_LIMIT_S:g} s is allowed: lower `samples`"
            )
            left_out.append(LeftOut(device.folder, reason))
            continue
        found, whole = _rails(tree, device, left_out)
        if interval_ms is not None:
            found = [replace(sensor, rate_hz=1000.0 / interval_ms) for sensor in found]
        found = with_total(device, found, whole, left_out)
        sensors += found
    return sensors, left_out


def _rails(tree: Tree, device: Device, left_out: list[LeftOut]) -> tuple[list[Sensor], bool]:
    """(sensors, True unless one that is connected cannot be read)."""
    whole = True
    numbers = {int(m[2]) for file in device.files if (m := re.fullmatch(r"(power|curr)([0-9]{1,3})_input", file))}
    if device.name == "ina3221":
        # Channels 4-6 are shunt voltages in µV and their files no power; 7 is their sum.
        if extra := sorted(
            int(m[1]) for file in device.files if (m := re.fullmatch(r"in([0-9]{1,3})_input", file)) and int(m[1]) > 3
        ):
            which = f"in{extra[0]}-in{extra[-1]}" if len(extra) > 1 else f"in{extra[0]}"
            reason = f"{which}: an ina3221 has three channels; beyond them are shunt voltages and their sum"
            left_out.append(LeftOut(device.folder / f"in{extra[-1]}_input", reason))
        numbers = {n for n in numbers if n <= 3}
    found = []
    for n in sorted(numbers)[:MAX_DEVICES]:
        power, volt, current = (f"{kind}{n}_input" for kind in ("power", "in", "curr"))
        if power in device.files:
            files, provenance = (power,), "measured"
        elif volt in device.files:
            files, provenance = (volt, current), "derived"
        else:
            continue
        paths = tuple(device.folder / file for file in files)
        label = tree.label(device, f"power{n}_label", f"in{n}_label", f"curr{n}_label", *(["label"] if n == 1 else []))
        if label.upper() == "NC":
            left_out.append(LeftOut(paths[0], "labelled NC: not connected"))
        elif f"in{n}_enable" in device.files and tree.text(device.folder / f"in{n}_enable")[0] == "0":
            left_out.append(LeftOut(paths[0], f"switched off: in{n}_enable is 0"))
        elif reason := tree.unreadable(*paths):
            left_out.append(LeftOut(paths[0], reason))
            whole = False
        else:
            name = slug(label or (device.name if n == 1 else f"{device.name}_{n}"))
            found.append(_power(name, paths, 1e-6, provenance))
    return found, whole


def iio_power(tree: Tree) -> Finding:
    """JetPack 4: bus/i2c/drivers/ina3221x/*/iio:device*: rail_name_<n>, in_power<n>_input in mW, or mV times mA."""
    sensors, left_out = [], []
    driver = tree.root / "sys/bus/i2c/drivers/ina3221x"
    seen: set[Path] = set()
    for bus in [name for name in tree.names(driver) if re.fullmatch(r"[0-9]+-[0-9a-f]{4}", name)][:MAX_DEVICES]:
        for entry in tree.names(driver / bus):
            folder = driver / bus / entry
            if not re.fullmatch(r"iio:device[0-9]{1,9}|iio_device", entry) or folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if tree.outside(folder):
                left_out.append(LeftOut(folder, "a link that leads out of the sysroot"))
                continue
            device = Device(folder, "ina3221x", frozenset(tree.names(folder)))
            sensors += with_total(device, *_iio_rails(tree, device, left_out), left_out)
    return sensors, left_out


def _iio_rails(tree: Tree, device: Device, left_out: list[LeftOut]) -> tuple[list[Sensor], bool]:
    found, whole = [], True
    for n in range(3):
        power, volt, current = (f"in_{kind}{n}_input" for kind in ("power", "voltage", "current"))
        if power in device.files:
            files, scale = (power,), 1e-3
        elif {volt, current} <= device.files:
            files, scale = (volt, current), 1e-6
        else:
            continue
        paths = tuple(device.folder / file for file in files)
        label = tree.label(device, f"rail_name_{n}")
        if label.upper() == "NC":
            left_out.append(LeftOut(paths[0], "labelled NC: not connected"))
        elif reason := tree.unreadable(*paths):
            left_out.append(LeftOut(paths[0], reason))
            whole = False
        else:
            # The driver multiplies volts by amperes, as we do where it does not.
            found.append(_power(slug(label or f"ina3221_{n}"), paths, scale, "derived"))
    return found, whole


def _names(labels: tuple[str, ...]) -> set[str]:
    return {f"power_w.{slug(label)}" for label in labels}


def with_total(device: Device, found: list[Sensor], whole: bool, left_out: list[LeftOut]) -> list[Sensor]:
    """Marks what may meter the whole board: a rail that holds the others, else the rails of a module, else a meter alone in the
    board's supply. Other devices (a GPU, a battery) meter a part and are no total. `whole`: no connected rail is unreadable."""
    jetson = device.name.startswith("ina3221")
    if not jetson and device.name not in EXTERNAL_METERS:
        return found
    totals, rails = _names(TOTAL_LABELS), _names(sum(MODULES, ()))
    if any(sensor.name in totals for sensor in found):
        scope = "module" if jetson else "board"
        return [replace(s, scope=scope, in_total=True) if s.name in totals else s for s in found]
    if jetson and any(sensor.name in rails for sensor in found):
        return [replace(s, in_total=s.name in rails) for s in found]
    if len(found) == 1 and whole and found[0].name not in _names(PART_LABELS):
        return [replace(found[0], scope="board", in_total=True)]
    if found and not any(sensor.name in _names(PART_LABELS) for sensor in found):
        reason = "not taken for the board's total: no label says which channel is the supply's; label that one VDD_IN"
        left_out.append(LeftOut(device.folder, reason))
    return found


def one_total(sensors: list[Sensor], left_out: list[LeftOut]) -> list[Sensor]:
    """A meter of the whole board goes before those of its module, a rail that holds all others before a sum of rails: only
    sensors of one scope are added. Several meters in supplies, or a module's rails with one missing, are no total at all."""
    for scope in ("board", "module", "rail"):
        chosen = [s for s in sensors if s.in_total and s.unit == "W" and s.scope == scope]
        if not chosen:
            continue
        names = {sensor.name for sensor in chosen}
        if scope == "rail":
            complete = names == {PMIC_SUM} or any(names == _names(module) for module in MODULES)
            reason = "no total: one of the module's rails is missing, and the others together are less than the module"
        else:
            complete = len(chosen) == 1
            reason = (
                f"no total: {len(chosen)} meters, and which one has all of the {scope} is not known; label it VDD_IN"
            )
        if not complete:
            left_out.append(LeftOut(chosen[0].paths[0].parent, reason))
            sensors = [replace(s, in_total=s.in_total and s not in chosen) for s in sensors]
            continue
        return [replace(s, in_total=s.in_total and (s.unit != "W" or s.scope == scope)) for s in sensors]
    return sensors


def rapl(tree: Tree) -> Finding:
    """/sys/class/powercap/intel-rapl:<n>: energy_uj, a cumulative counter that wraps at max_energy_range_uj."""
    sensors, left_out = [], []
    folder = tree.root / "sys/class/powercap"
    for zone in tree.numbered(folder, "intel-rapl:"):
        counter = zone / "energy_uj"
        if tree.outside(zone):
            left_out.append(LeftOut(zone, "a link that leads out of the sysroot"))
            continue
        name, reason = tree.text(zone / "name")
        if name is None:
            left_out.append(LeftOut(zone, f"its name cannot be read: {reason}"))
            continue
        if not name.startswith("package"):
            left_out.append(LeftOut(zone, f"{slug(name)}: another view of what the packages take"))
            continue
        denied = tree.unreadable(counter)
        value, reason = tree.text(counter)
        wrap = tree.text(zone / "max_energy_range_uj")[0]
        if denied:
            left_out.append(LeftOut(counter, "permission denied: since kernel 5.10 only root may read it"))
        elif value is None:
            left_out.append(LeftOut(counter, f"cannot be read: {reason}"))
        elif wrap is None or not re.fullmatch(r"[1-9][0-9]{0,18}", wrap):
            left_out.append(LeftOut(counter, "its max_energy_range_uj cannot be read, so a wrap would go unseen"))
        else:
            sensors.append(
                Sensor(
                    f"counter_j.{slug(name)}",
                    "J",
                    "module",
                    "measured",
                    (counter,),
                    1e-6,
                    (0.0, math.inf),
                    wraps_at=int(wrap) * 1e-6,
                    in_total=True,
                    doubt="stuck",
                    stuck_after_s=COUNTER_STUCK_S,
                )
            )
    return sensors, left_out
