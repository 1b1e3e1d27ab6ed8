"""Temperature and power sensors in sysfs: which ones there are below a `sysroot`, and what they read now.

Sensors are found by the contents of `name`, `type` and `*_label`, never by the number of a hwmon or zone. A sysroot other
than "/" is a simulation's folder, and every sample from it says so. A read that hangs costs a time limit and not the agent.
A finder is a function sysroot -> (sensors, what was left out and why); a new kind of board is one more in FINDERS.
Leaves out: energy (energy.py), power sensors without a file (vcgencmd) and boards whose sensors are on IIO.
Source: Documentation/ABI/testing/sysfs-class-thermal, Documentation/hwmon/sysfs-interface.rst, ina2xx.rst, ina3221.rst and
Documentation/power/powercap/powercap.rst of the Linux kernel.
"""

from __future__ import annotations

import math
import os
import queue
import re
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal

from node_agent.wire import Provenance, Sample, SensorInfo

READ_LIMIT_S = 0.25
MAX_READ_BYTES = 4096
MAX_SENSORS = 256
TEMP_LIMITS_C = (-100.0, 200.0)  # outside: an unpowered zone (-256 °C on a Jetson) or a broken driver
POWER_LIMITS_W = (-10_000.0, 10_000.0)
DENIED_ZONES = {"PMIC": "a Jetson's PMIC zone says 100 °C whatever it is"}
TOTAL_LABELS = ("VDD_IN", "POM_5V_IN")  # rails that hold all others of their device
EXTERNAL_METERS = (
    "ina219",
    "ina220",
    "ina226",
    "ina230",
    "ina231",
    "ina232",
    "ina233",
    "ina234",
    "ina237",
    "ina238",
    "ina260",
)


@dataclass(frozen=True)
class Sensor:
    """One quantity: the product of the integers in `paths`, times `scale`, in `unit`.

    `limits`: what is outside is no reading. `wraps_at`: an energy counter's range in `unit`. `in_total`: one of the sensors
    whose sum is the board's power (or energy).
    """

    name: str
    unit: Literal["degC", "W", "J"]
    scope: str
    provenance: Provenance
    paths: tuple[Path, ...]
    scale: float
    limits: tuple[float, float]
    wraps_at: float | None = None
    in_total: bool = False


@dataclass(frozen=True)
class LeftOut:
    """Something that looks like a sensor and is not used."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Found:
    """What `find` found. `total`: sensors that add up to the board's power in W, or its energy counters in J; may be empty."""

    sensors: tuple[Sensor, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def total(self) -> tuple[Sensor, ...]:
        chosen = tuple(sensor for sensor in self.sensors if sensor.in_total)
        power = tuple(sensor for sensor in chosen if sensor.unit == "W")
        return power or chosen


# ---------------------------------------------------------------- reading


class TimedReader:
    """Reads small files in a thread of its own, which is given up when a driver hangs. One file hangs at most one thread."""

    def __init__(self, limit_s: float = READ_LIMIT_S):
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._requests: queue.SimpleQueue | None = None
        self._hung: dict[Path, Future] = {}

    def read(self, path: Path) -> str:
        """The file's text, stripped.  Raises: OSError, TimeoutError where it hangs or still hangs from an earlier call."""
        with self._lock:
            hung = self._hung.get(path)
            if hung is not None:
                if not hung.done():
                    raise TimeoutError(f"{path} still hangs")
                del self._hung[path]
            if self._requests is None:
                self._requests = queue.SimpleQueue()
                threading.Thread(target=_read_loop, args=(self._requests,), name="sensors", daemon=True).start()
            future: Future = Future()
            self._requests.put((path, future))
            try:
                return future.result(self._limit_s)
            except FutureTimeout:
                self._hung[path] = future
                self._requests.put(None)  # ends that thread, should the driver ever return
                self._requests = None
                raise TimeoutError(f"{path} took longer than {self._limit_s} s") from None


def _read_loop(requests: queue.SimpleQueue) -> None:
    while (request := requests.get()) is not None:
        path, future = request
        try:
            with open(path, "rb", buffering=0) as file:
                future.set_result(file.read(MAX_READ_BYTES).decode("ascii", "replace").strip())
        except BaseException as error:
            future.set_exception(error)


_READER = TimedReader()


def read(sensor: Sensor, reader: TimedReader = _READER) -> Sample:
    """The sensor's value now. Unreadable or hung: validity 'missing'; not a possible value: 'invalid'; both with value None."""
    value, validity = 1.0, "ok"
    try:
        for path in sensor.paths:
            value *= int(reader.read(path))
        value *= sensor.scale
        low, high = sensor.limits
        if not low <= value <= high:
            validity = "invalid"
    except ValueError:
        validity = "invalid"
    except OSError:  # TimeoutError is one
        validity = "missing"
    return Sample(
        sensor.name,
        value if validity == "ok" else None,
        sensor.unit,
        validity,
        sensor.provenance,
        sensor.scope,
        time.time(),
    )


# ---------------------------------------------------------------- finding

Finding = tuple[list[Sensor], list[LeftOut]]


def _text(path: Path) -> str | None:
    try:
        return _READER.read(path)
    except OSError:
        return None


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """Entries of `folder` called prefix + number, in the order of the numbers."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    try:
        names = [(int(match[1]), name) for name in os.listdir(folder) if (match := pattern.fullmatch(name))]
    except OSError:
        return []
    return [folder / name for _, name in sorted(names)]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "unnamed"


def thermal_zones(sysroot: Path) -> Finding:
    """/sys/class/thermal/thermal_zone*: `type` and `temp` in m°C."""
    sensors, left_out = [], []
    for zone in _numbered(sysroot / "sys/class/thermal", "thermal_zone"):
        kind = _text(zone / "type")
        if kind is None:
            left_out.append(LeftOut(zone, "its type cannot be read"))
            continue
        denied = next((reason for prefix, reason in DENIED_ZONES.items() if kind.upper().startswith(prefix)), None)
        if denied:
            left_out.append(LeftOut(zone, denied))
            continue
        name = f"temp_c.{_slug(kind)}"
        sensors.append(Sensor(name, "degC", "module", "measured", (zone / "temp",), 1e-3, TEMP_LIMITS_C))
    return sensors, left_out


def hwmon_power(sysroot: Path) -> Finding:
    """/sys/class/hwmon/hwmon*: power<n>_input in µW, or in<n>_input in mV times curr<n>_input in mA."""
    sensors, left_out = [], []
    for device in _numbered(sysroot / "sys/class/hwmon", "hwmon"):
        name = _text(device / "name")
        if name is None:
            left_out.append(LeftOut(device, "its name cannot be read"))
            continue
        found = _powers(device, name, left_out)
        sensors += _with_total(name, found)
    return sensors, left_out


def _powers(device: Path, name: str, left_out: list[LeftOut]) -> list[Sensor]:
    found = []
    for n in range(1, 65):
        label = _text(device / f"power{n}_label") or _text(device / f"in{n}_label") or ""
        volt, current, power = (device / f"{kind}{n}_input" for kind in ("in", "curr", "power"))
        if power.exists():
            paths, scale, provenance = (power,), 1e-6, "measured"
        elif volt.exists() and current.exists():
            paths, scale, provenance = (volt, current), 1e-6, "derived"
        else:
            continue
        if label.upper() == "NC":
            left_out.append(LeftOut(paths[0], "labelled NC: not connected"))
        elif name == "ina3221" and n > 3:
            left_out.append(
                LeftOut(paths[0], "an ina3221 has three channels; beyond them are shunt voltages and their sum")
            )
        else:
            rail = _slug(label or (name if n == 1 else f"{name}_{n}"))
            found.append(Sensor(f"power_w.{rail}", "W", "rail", provenance, paths, scale, POWER_LIMITS_W))
    return found


def _with_total(name: str, found: list[Sensor]) -> list[Sensor]:
    """Marks what meters the whole board: a rail that holds the others, else every rail of a module's meter, else a meter
    in the board's supply. Other devices (a GPU, a battery) meter a part and are no total."""
    total_names = {f"power_w.{_slug(label)}" for label in TOTAL_LABELS}
    if any(sensor.name in total_names for sensor in found):
        return [replace(s, scope="module", in_total=True) if s.name in total_names else s for s in found]
    if name == "ina3221":
        return [replace(sensor, in_total=True) for sensor in found]
    if name in EXTERNAL_METERS and len(found) == 1:
        return [replace(found[0], scope="board", in_total=True)]
    return found


def rapl(sysroot: Path) -> Finding:
    """/sys/class/powercap/intel-rapl:<n>: energy_uj, a cumulative counter that wraps at max_energy_range_uj."""
    sensors, left_out = [], []
    for zone in _numbered(sysroot / "sys/class/powercap", "intel-rapl:"):
        name, counter = _text(zone / "name"), zone / "energy_uj"
        if name is None or not name.startswith("package"):
            continue
        value, wrap = _text(counter), _text(zone / "max_energy_range_uj")
        if value is None:
            left_out.append(LeftOut(counter, "cannot be read: since kernel 5.10 only root may"))
        elif wrap is None or not wrap.isdigit():
            left_out.append(LeftOut(counter, "its max_energy_range_uj cannot be read, so a wrap would go unseen"))
        else:
            wraps_at = int(wrap) * 1e-6
            sensors.append(
                Sensor(
                    f"counter_j.{_slug(name)}",
                    "J",
                    "module",
                    "measured",
                    (counter,),
                    1e-6,
                    (0.0, math.inf),
                    wraps_at,
                    True,
                )
            )
    return sensors, left_out


FINDERS: tuple[Callable[[Path], Finding], ...] = (thermal_zones, hwmon_power, rapl)


def is_simulated(sysroot: Path) -> bool:
    """True unless `sysroot` is this machine's own root."""
    return Path(sysroot).resolve() != Path("/")


def find(sysroot: Path = Path("/")) -> Found:
    """Every sensor below `sysroot`, each with a name of its own. Never raises: what cannot be read is left out with a reason."""
    sensors: list[Sensor] = []
    left_out: list[LeftOut] = []
    for finder in FINDERS:
        found, dropped = finder(sysroot)
        sensors += found
        left_out += dropped
    left_out += [
        LeftOut(sensor.paths[0], f"over the limit of {MAX_SENSORS} sensors") for sensor in sensors[MAX_SENSORS:]
    ]
    simulated = is_simulated(sysroot)
    seen: dict[str, int] = {}
    named = []
    for sensor in sensors[:MAX_SENSORS]:
        seen[sensor.name] = count = seen.get(sensor.name, 0) + 1
        named.append(
            replace(
                sensor,
                name=sensor.name if count == 1 else f"{sensor.name}_{count}",
                provenance="simulated" if simulated else sensor.provenance,
            )
        )
    return Found(_one_total(named), tuple(left_out))


def _one_total(sensors: list[Sensor]) -> tuple[Sensor, ...]:
    """A meter of the whole board goes before those of its module, and a rail that holds all others before a sum of rails:
    only sensors of one scope are added, so that nothing is counted twice."""
    for scope in ("board", "module", "rail"):
        if any(s.in_total and s.unit == "W" and s.scope == scope for s in sensors):
            return tuple(replace(s, in_total=s.in_total and (s.unit != "W" or s.scope == scope)) for s in sensors)
    return tuple(sensors)


def info(sensor: Sensor, rate_hz: float) -> SensorInfo:
    """What the birth certificate says of a sensor."""
    return SensorInfo(sensor.name, sensor.unit, sensor.scope, sensor.provenance, rate_hz)
