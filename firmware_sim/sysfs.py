"""Sensor files as the kernel writes them, below a run folder; leaves out everything that can be written to, and of proc/stat
all but CPU time.

Formats are the drivers', so that an agent meets what it meets on a board: Documentation/ABI/testing/sysfs-class-thermal (`temp`
in m°C, trip points; `hyst` in m°C as the kernel prints it, though that page says Celsius), Documentation/hwmon/
sysfs-interface.rst (temp: m°C), drivers/hwmon/raspberrypi-hwmon.c (`rpi_volt`), monitor.py for the power monitors,
Documentation/filesystems/proc.rst (`/proc/stat`).
Files are replaced by renaming, so that a reader never sees half a number.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from firmware_sim import videocore
from firmware_sim.board import UNDER_VOLTAGE, BoardState, Monitor, Profile, Zone, rail_w, zone_c
from firmware_sim.monitor import fixed_files, ina226_files, ina3221_files, ina3221x_files

LATE_S = 2.0  # how long a reading takes that comes late
USER_HZ = 100
_RENAMEAT2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux with glibc 2.28
_AT_FDCWD, _EXCHANGE = -100, 2
_PI_BUS, _JETSON_BUS = "devices/platform/soc/fe804000.i2c/i2c-1", "devices/platform/bus@0/c240000.i2c/i2c-1"
_NANO_BUS = "devices/50000000.host1x/546c0000.i2c/i2c-6"
_DRIVERS = {"ina226": "ina2xx", "ina3221": "ina3221", "ina3221x": "ina3221x"}


class Condition(Enum):
    """What a file can be instead of having a content."""

    ABSENT = "absent"
    LATE = "late"  # an answer takes LATE_S
    DENIED = "denied"  # nobody has the right to read it; root may all the same


@dataclass(frozen=True)
class Attribute:
    """A file's text, and the names under which a fault may be aimed at it."""

    text: str
    targets: tuple[str, ...] = ()


def temp_text(temp_c: float, step_mc: int) -> str:
    """m°C in the sensor's own steps."""
    return str(round(temp_c * 1000 / step_mc) * step_mc)


def stat_text(core_count: int, busy_s: float, time_s: float) -> str:
    """The lines of CPU time of /proc/stat: user, nice, system, idle and six more in USER_HZ, of all cores and of each. What is
    busy is busy in user mode, and each core as much as the others."""
    busy, idle = busy_s * USER_HZ, (time_s * core_count - busy_s) * USER_HZ
    # the sum first, its name followed by two spaces; it is not rounded core by core
    counts = [("cpu ", 1), *((f"cpu{number}", core_count) for number in range(core_count))]
    # a sum of many small steps may be a little less than a whole tick
    rows = [(name, int(busy / part + 1e-6), int(idle / part + 1e-6)) for name, part in counts]
    return "\n".join(f"{name} {user} 0 0 {rest} 0 0 0 0 0 0" for name, user, rest in rows)


def trip_files(zone: Zone) -> dict[str, str]:
    """trip_point_N_{temp,type,hyst} of a zone."""
    files = {}
    for number, trip in enumerate(zone.trips):
        files |= {
            f"trip_point_{number}_temp": str(round(trip.temp_c * 1000)),
            f"trip_point_{number}_type": trip.kind,
            f"trip_point_{number}_hyst": str(round(trip.hysteresis_k * 1000)),
        }
    return files


Files = dict[Path, Attribute]


class SensorTree:
    """The files of one simulated board. Like the kernel's, devices hold them and classes and drivers point to them."""

    def __init__(self, sysroot: Path, profile: Profile) -> None:
        """Makes folders, links and what never changes.  Raises: OSError."""
        self._profile = profile
        self._root = Path(sysroot)
        self._written: dict[Path, str | Condition] = {}
        self._waited: dict[Path, tuple[int, float]] = {}  # open for writing, and until when
        sys = self._root / "sys"
        pi = profile.maker == "raspberry-pi"
        answers, proc = self._root / videocore.ANSWERS, self._root / "proc"
        proc.mkdir(parents=True, exist_ok=True)
        for left in [*sys.rglob("*"), *answers.glob("*"), *proc.glob("*")]:  # of an earlier simulator
            if left.is_fifo():
                self._let_go(left, "")  # or who waits there would wait for ever
                left.unlink()
            elif left.name.startswith(".") and left.name.endswith(".partial"):
                left.unlink()
        self._hwmons = 0
        self._zones = [sys / f"devices/virtual/thermal/thermal_zone{n}" for n in range(len(profile.zones))]
        for folder, zone in zip(self._zones, profile.zones):
            _link(sys / "class/thermal" / folder.name, folder)
            fixed = {"type": zone.kind, "mode": "enabled", "policy": "step_wise"} | trip_files(zone)
            self.write({folder / name: Attribute(text) for name, text in fixed.items()})
        self._cpu_hwmon = self._rpi_volt = None
        if pi:
            # The kernel shows a device tree's thermal zone as a hwmon too, its type with '_' for '-'.
            self._cpu_hwmon = self._hwmon(self._zones[0])
            self._rpi_volt = self._hwmon(sys / "devices/platform/soc/soc:firmware/raspberrypi-hwmon")
            names = {self._cpu_hwmon: profile.zones[0].kind.replace("-", "_"), self._rpi_volt: "rpi_volt"}
            self.write({folder / "name": Attribute(name) for folder, name in names.items()})
            program = self._root / "usr/bin/vcgencmd"
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text(videocore.VCGENCMD)
            program.chmod(0o755)
            (self._root / videocore.ANSWERS).mkdir(parents=True, exist_ok=True)
        self._monitors = []
        for monitor in profile.monitors:
            iio = monitor.chip == "ina3221x"  # JetPack 4
            device = sys / (_NANO_BUS if iio else _PI_BUS if pi else _JETSON_BUS) / monitor.address
            folder = self._iio(device) if iio else self._hwmon(device)
            _link(sys / "bus/i2c/drivers" / _DRIVERS[monitor.chip] / monitor.address, device)
            self._monitors.append(folder)
            self.write({folder / name: Attribute(text) for name, text in fixed_files(monitor).items()})

    def _hwmon(self, device: Path) -> Path:
        folder = device / f"hwmon/hwmon{self._hwmons}"
        _link(self._root / "sys/class/hwmon" / folder.name, folder)
        self._hwmons += 1
        return folder

    def _iio(self, device: Path) -> Path:
        folder = device / f"iio:device{len(self._monitors)}"
        _link(self._root / "sys/bus/iio/devices" / folder.name, folder)
        return folder

    def temperatures(self, zones_c: Sequence[float]) -> Files:
        """The files of the thermal zones. "temp" aims at the zones that follow the die, a zone's type at that zone."""
        files = {}
        for folder, zone, temp_c in zip(self._zones, self._profile.zones, zones_c):
            follows = zone.says_c is None and zone.powered_from == 0.0
            attribute = Attribute(
                temp_text(temp_c, self._profile.zone_step_mc), (zone.kind, *(["temp"] if follows else []))
            )
            files[folder / "temp"] = attribute
            if self._cpu_hwmon is not None and folder == self._zones[0]:
                files[self._cpu_hwmon / "temp1_input"] = attribute
        return files

    def power(self, index: int, rails_w: Sequence[float]) -> Files:
        """The files of one power monitor. "power" aims at all of it, a rail's label at that rail."""
        files = _power_files(self._profile.monitors[index], rails_w)
        return {self._monitors[index] / name: attribute for name, attribute in files.items()}

    def cpu_time(self, state: BoardState) -> Files:
        """The kernel's count of what the cores have done."""
        text = stat_text(self._profile.core_count, state.busy_s, state.time_s)
        return {self._root / "proc/stat": Attribute(text)}

    def firmware(self, flags: int, pmic: str) -> Files:
        """A Raspberry Pi's flags and, on a Pi 5, its power chip's answer."""
        if self._rpi_volt is None:
            return {}
        answers = self._root / videocore.ANSWERS
        files = {
            self._rpi_volt / "in0_lcrit_alarm": Attribute(str(int(bool(flags & UNDER_VOLTAGE)))),
            answers / "get_throttled": Attribute(videocore.throttled_text(flags), ("get_throttled",)),
        }
        if self._profile.pmic:
            files[answers / "pmic_read_adc"] = Attribute(pmic, ("power", "pmic"))
        return files

    def truth(self, state: BoardState) -> Files:
        """All files without noise, the power monitors having seen this state for long."""
        # The temperatures last: where they are, all the rest is.
        profile = self._profile
        files = self.firmware(state.flags, videocore.pmic_text(state.power_w, profile.idle_w, lambda: 0.0))
        for index, monitor in enumerate(profile.monitors):
            files |= self.power(index, [rail_w(profile, rail, state.power_w) for rail in monitor.rails])
        files |= self.cpu_time(state)
        return files | self.temperatures([zone_c(profile, zone, state) for zone in profile.zones])

    def write(self, files: Mapping[Path, Attribute | Condition]) -> None:
        """Writes what changed.  Raises: OSError."""
        for path, wanted in files.items():
            content = wanted if isinstance(wanted, Condition) else wanted.text
            if self._written.get(path) == content:
                continue
            if self._written.get(path) is Condition.LATE:
                self._let_go(path, "")
            if content is Condition.ABSENT:
                path.unlink(missing_ok=True)
            else:
                self._replace(path, content)
            self._written[path] = content

    def answer_late(self, files: Mapping[Path, Attribute | Condition], true: Mapping[Path, Attribute]) -> None:
        """Lets those who wait for a late file have its value, LATE_S after they came.  Raises: OSError."""
        now_s = time.monotonic()
        for path, wanted in files.items():
            if wanted is not Condition.LATE:
                continue
            if path not in self._waited:
                writer = _writer(path)
                if writer is not None:
                    self._waited[path] = writer, now_s + LATE_S
            elif now_s >= self._waited[path][1]:
                self._let_go(path, true[path].text + "\n")

    def _let_go(self, path: Path, text: str) -> None:
        """Gives a text to who waits for a late file; without one: that it ends."""
        writer = self._waited.pop(path, (None, 0.0))[0]
        writer = _writer(path) if writer is None else writer
        if writer is None:
            return
        try:
            os.write(writer, text.encode())
        except OSError:
            pass  # EPIPE: it gave up meanwhile
        finally:
            os.close(writer)

    def _replace(self, path: Path, content: str | Condition) -> None:
        # A name that no reader's pattern matches; never kept over a crash, so no fsync. Plain calls: a monitor's files change
        # hundreds of times a second.
        partial = f"{path.parent}/.{path.name}.partial"
        if content is Condition.LATE:
            os.mkfifo(partial)
        else:
            # A file of its own each time: the mode of the last one is not kept.
            mode = 0 if content is Condition.DENIED else 0o644
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            try:
                os.write(descriptor, b"" if content is Condition.DENIED else f"{content}\n".encode())
            finally:
                os.close(descriptor)
        swap(partial, path)


def _power_files(monitor: Monitor, rails_w: Sequence[float]) -> dict[str, Attribute]:
    if monitor.chip == "ina226":
        rail = monitor.rails[0]
        files = ina226_files(rails_w[0], rail.volts, rail.shunt_uohm)
        return {name: Attribute(text, ("power", monitor.chip)) for name, text in files.items()}
    rails = [(watts, rail.volts, rail.shunt_uohm) for watts, rail in zip(rails_w, monitor.rails)]
    files = {}
    if monitor.chip == "ina3221x":
        for channel, rail in enumerate(monitor.rails):
            files[f"rail_name_{channel}"] = Attribute(rail.label, (rail.label,))
        for name, text in ina3221x_files(rails).items():
            channel = int("".join(filter(str.isdigit, name)))  # the only number in it
            files[name] = Attribute(text, ("power", monitor.rails[channel].label))
        return files
    for name, text in ina3221_files(rails).items():
        # in1 and curr1 are channel 1, in4 is its shunt; in7 and curr4 belong to no channel
        number = int(name.split("_")[0].removeprefix("in").removeprefix("curr"))
        channel = number - 3 if name.startswith("in") and 3 < number < 7 else number
        targets = ("power", monitor.rails[channel - 1].label) if channel <= 3 else ("power",)
        files[name] = Attribute(text, targets)
    for channel, rail in enumerate(monitor.rails, start=1):
        files[f"in{channel}_label"] = Attribute(rail.label, (rail.label,))
    return files


def swap(new: str, path: Path) -> None:
    """Puts `new` in the place of `path`, as os.replace does, in one step for readers.  Raises: OSError.

    ext4 starts writing a file to the disk when it is renamed over another (0.6 ms against 0.03), unless the two are exchanged.
    """
    if _RENAMEAT2 is not None and _RENAMEAT2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path), _EXCHANGE) == 0:
        os.unlink(new)
    else:
        os.replace(new, path)  # there is none yet, or this system cannot exchange


def _writer(path: Path) -> int | None:
    """A FIFO open for writing, None where nobody waits to read it."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def _link(link: Path, target: Path) -> None:
    """A relative link, as in the kernel's tree, so that the folder can be moved."""
    target.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(target, link.parent))
