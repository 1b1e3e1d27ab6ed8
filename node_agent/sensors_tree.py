"""The kernel's sensor folders below a sysroot: listing and reading them with bounds, and with words for what cannot be read.

A sysroot other than "/" is a simulation's folder: links that lead out of it are not followed, or it would show this machine's
sensors as the simulated board's. Leaves out: what the files mean (sensors_thermal.py, sensors_power.py).
Source: Documentation/hwmon/sysfs-interface.rst of the Linux kernel.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from node_agent.reading import CALLS, LeftOut, Sensor, why

MAX_ENTRIES = 4096  # of one folder that are looked at; sysfs folders have tens
MAX_DEVICES = 256
MAX_INTERVAL_MS = 1_000_000

Finding = tuple[list[Sensor], list[LeftOut]]


def is_simulated(sysroot: Path) -> bool:
    """True unless `sysroot` is this machine's own root."""
    return Path(sysroot).resolve() != Path("/")


def slug(text: str) -> str:
    """A name part: a-z, 0-9 and '_', at most 32."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:32].strip("_") or "unnamed"


@dataclass(frozen=True)
class Device:
    """A hwmon or iio device: its folder, what it calls itself, and the files it has."""

    folder: Path
    name: str
    files: frozenset[str]


class Tree:
    """Everything below one sysroot; what is asked twice is read once."""

    def __init__(self, sysroot: Path):
        self.root = Path(sysroot).resolve()
        self.simulated = is_simulated(sysroot)

    def names(self, folder: Path) -> list[str]:
        """Entries of a folder, sorted, at most MAX_ENTRIES; none where it cannot be listed."""
        try:
            got = CALLS.call(("list", folder), lambda: _listed(folder))
        except OSError:
            return []
        return got if isinstance(got, list) else got.value

    def numbered(self, folder: Path, prefix: str) -> list[Path]:
        """Entries of `folder` called prefix + number, in the order of the numbers, at most MAX_DEVICES."""
        pattern = re.compile(re.escape(prefix) + r"([0-9]{1,9})")
        numbers = [(int(match[1]), name) for name in self.names(folder) if (match := pattern.fullmatch(name))]
        return [folder / name for _, name in sorted(numbers)[:MAX_DEVICES]]

    def text(self, path: Path) -> tuple[str | None, str]:
        """(text, "") of a small file, or (None, why not)."""
        try:
            return CALLS.text(path), ""
        except (OSError, ValueError) as error:
            return None, why(error)

    def outside(self, folder: Path) -> bool:
        """True where a link leads out of a simulation's folder."""
        try:
            return self.simulated and not folder.resolve().is_relative_to(self.root)
        except (OSError, RuntimeError):  # a circle of links
            return True

    @cached_property
    def hwmons(self) -> tuple[list[Device], list[LeftOut]]:
        """All hwmon devices by their class, and INA3221 by their driver, where NVIDIA's guide has them: the kernel shows the same
        devices in both, under numbers of their own."""
        folders = {folder.name: folder for folder in self.numbered(self.root / "sys/class/hwmon", "hwmon")}
        driver = self.root / "sys/bus/i2c/drivers/ina3221"
        for bus in self.names(driver):
            if re.fullmatch(r"[0-9]+-[0-9a-f]{4}", bus):
                for folder in self.numbered(driver / bus / "hwmon", "hwmon"):
                    folders.setdefault(folder.name, folder)
        devices, left_out = [], []
        for folder in list(folders.values())[:MAX_DEVICES]:
            if self.outside(folder):
                left_out.append(LeftOut(folder, "a link that leads out of the sysroot"))
                continue
            name, reason = self.text(folder / "name")
            if name is None:
                left_out.append(LeftOut(folder, f"its name cannot be read: {reason}"))
            else:
                devices.append(Device(folder, name, frozenset(self.names(folder))))
        return devices, left_out

    def label(self, device: Device, *candidates: str) -> str:
        """The first label file of `candidates` that says something, or ''."""
        for candidate in candidates:
            if candidate in device.files and (text := self.text(device.folder / candidate)[0]):
                return text[:64]
        return ""

    def interval_ms(self, device: Device) -> int | None:
        """The device's update_interval in ms, None where it has none or says nothing of use."""
        text = self.text(device.folder / "update_interval")[0] if "update_interval" in device.files else None
        return int(text) if text and re.fullmatch(r"[0-9]{1,7}", text) and 1 <= int(text) <= MAX_INTERVAL_MS else None

    def unreadable(self, *paths: Path) -> str | None:
        """Why files that are there are no sensor, None where they are one. A driver that hangs or has no data now may have
        some later; a missing right is a matter of set-up and has to be told."""
        for path in paths:
            try:
                CALLS.read(path)
            except PermissionError:
                return "permission denied: run the agent as root, or give its group the right to read this"
            except (OSError, ValueError):
                pass
        return None


def _listed(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = []
        for entry in entries:
            names.append(entry.name)
            if len(names) >= MAX_ENTRIES:
                break
    return sorted(names)
