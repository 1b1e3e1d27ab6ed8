"""Recognises the base image that is to be customised by what is in it, never by its file name.

    raspios-trixie     Raspberry Pi OS of Debian 13: /etc/rpi-issue, cloud-init with its files on the FAT partition
    raspios-bookworm   Raspberry Pi OS of Debian 12: /etc/rpi-issue, cmdline.txt on the FAT partition
    ubuntu             Ubuntu preinstalled for the Raspberry Pi: cloud-init's files on a FAT partition labelled system-boot
    debian-raspi       raspi.debian.net: Debian on partitions labelled RASPIFIRM and RASPIROOT
    jetson             Jetson Linux (L4T): GPT, partition APP with /etc/nv_tegra_release
    spacemoe           our own image: the agent and its first-boot unit are in it

Leaves out: 32-bit systems (the agent's wheels are for 64-bit Arm), and every other image: refused with what was found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hardware import ext4_files, partitions
from hardware.ext4_files import Ext4
from hardware.fat_files import Fat, open_fat
from hardware.partitions import Table

KINDS = ("raspios-trixie", "raspios-bookworm", "ubuntu", "debian-raspi", "jetson", "spacemoe")
TAKEN = (
    "Raspberry Pi OS (64 bit, Debian 12 or 13), Ubuntu for the Raspberry Pi, raspi.debian.net's, Jetson Linux, "
    "or an image of `spacemoe image build`"
)
CLOUD_INIT = ("raspios-trixie", "ubuntu")
FIRST_BOOT_UNIT = "/etc/systemd/system/spacemoe-first-boot.service"
AGENT = "/opt/spacemoe/agent"
OLDEST_PYTHON = (3, 10)
MAX_TEXT_BYTES = 256 * 1024
MAX_STATUS_BYTES = 32 * 1024**2
DPKG_STATUS = "/var/lib/dpkg/status"
LIBRARY = "/usr/lib/aarch64-linux-gnu/libstdc++.so.6"
"""What the wheels are linked with beyond glibc."""
_AARCH64 = 183
"""ELF's e_machine."""


class BaseError(ValueError):
    """The image is none that can be customised; the text says what was found in it."""


@dataclass(frozen=True)
class Base:
    """`fat_mount`: where the running system mounts the FAT partition; both are None on a Jetson image that mounts none.

    `python` is empty where it has to be brought.
    """

    kind: str
    name: str
    codename: str
    table: Table
    root: Ext4
    fat: Fat | None
    fat_mount: str | None
    python: str


def recognise(image: Path) -> Base:
    """The base that the uncompressed `image` is.

    Raises: BaseError; PartitionError; Ext4Error (also for a root file system that e2fsck finds damaged); FatError; ProgramError.
    """
    table = partitions.read_table(image)
    systems = [ext4_files.open_ext4(image, part.start_bytes, part.size_bytes) for part in table.partitions]
    fats = [open_fat(image, part.start_bytes, part.size_bytes) for part in table.partitions]
    roots: list[tuple[str, Ext4, dict[str, str]]] = []
    for part, system in zip(table.partitions, systems):
        if system is None:
            continue
        ext4_files.check(system)
        if facts := _os_release(system):
            roots.append((part.name, system, facts))
    found = _described(table, systems, fats, roots)
    tegra = [root for root in roots if root[0] == "APP" and ext4_files.read(root[1], "/etc/nv_tegra_release")]
    if len(roots) != 1 and not tegra:
        raise BaseError(
            f"{image} is no base image that is known: {len(roots)} partitions hold a system; take one of: {TAKEN}; found: {found}"
        )
    _, root, facts = (tegra or roots)[0]
    fat, mount = _boot_partition(root, fats)
    kind = _kind(table, root, facts, fat, bool(tegra))
    if kind is None:
        raise BaseError(f"{image} is no base image that is known; take one of: {TAKEN}; found: {found}")
    if kind != "jetson" and (fat is None or mount is None):
        raise BaseError(
            f"{image} looks like {kind}, but no FAT partition of it is mounted by its /etc/fstab; found: {found}"
        )
    name = facts.get("PRETTY_NAME") or facts.get("NAME", kind)
    return Base(kind, name, facts.get("VERSION_CODENAME", ""), table, root, fat, mount, _python(root, kind, image))


def _kind(table: Table, root: Ext4, facts: dict[str, str], fat: Fat | None, tegra: bool) -> str | None:
    if tegra:
        return "jetson" if table.label == "gpt" else None
    if fat is None:
        return None
    codename = facts.get("VERSION_CODENAME", "")
    cloud_init = fat.has("/user-data") and fat.has("/meta-data") and "cloud.cfg" in ext4_files.names(root, "/etc/cloud")
    if "rpi-issue" in ext4_files.names(root, "/etc"):
        if codename == "trixie" and cloud_init:
            return "raspios-trixie"
        return "raspios-bookworm" if codename == "bookworm" and fat.has("/cmdline.txt") else None
    if facts.get("ID") == "ubuntu":
        return "ubuntu" if fat.label.lower() == "system-boot" and cloud_init else None
    if facts.get("ID") == "debian" and (fat.label, root.label) == ("RASPIFIRM", "RASPIROOT"):
        return "debian-raspi"
    at_first_boot = ext4_files.entries(root, [FIRST_BOOT_UNIT, AGENT])
    return "spacemoe" if all(at_first_boot.values()) else None


def _os_release(root: Ext4) -> dict[str, str]:
    for path in ("/usr/lib/os-release", "/etc/os-release"):
        text = ext4_files.read(root, path, MAX_TEXT_BYTES)
        if text is not None:
            rows = re.findall(r"^([A-Z_]+)=(.*)$", text.decode("utf-8", "replace"), re.MULTILINE)
            return {name: value.strip().strip("\"'") for name, value in rows}
    return {}


def _boot_partition(root: Ext4, fats: list[Fat | None]) -> tuple[Fat | None, str | None]:
    """The FAT partition that the system mounts, and where. /etc/fstab says the second; with several FATs a label says the first."""
    text = (ext4_files.read(root, "/etc/fstab", MAX_TEXT_BYTES) or b"").decode("utf-8", "replace")
    mounts = []
    for line in text.splitlines():
        fields = line.split("#")[0].split()
        if len(fields) >= 3 and fields[2] == "vfat" and re.fullmatch(r"/boot(/[a-z]+)?", fields[1]):
            mounts.append((fields[0], fields[1]))
    there = [fat for fat in fats if fat is not None]
    if len(mounts) != 1 or not there:
        return (there[0] if len(there) == 1 else None), None
    device, mount = mounts[0]
    if len(there) > 1:
        there = [fat for fat in there if fat.label and device.upper() == f"LABEL={fat.label}".upper()]
    return (there[0], mount) if len(there) == 1 else (None, None)


def _python(root: Ext4, kind: str, image: Path) -> str:
    """The version ("3.11") of the base's python3; empty for a Debian base that lacks a part of it.

    Raises: BaseError where another base lacks it, where it is too old, or where the system is not for 64-bit Arm.
    """
    real = ext4_files.resolve(root, ["/usr/bin/python3", "/bin/sh"])
    program = ext4_files.read(root, real["/usr/bin/python3"]) or ext4_files.read(root, real["/bin/sh"])
    if not program or program[:5] != b"\x7fELF\x02" or int.from_bytes(program[18:20], "little") != _AARCH64:
        raise BaseError(
            f"{image} is no 64-bit Arm system (its programs are for another processor): take the arm64 image"
        )
    found = re.fullmatch(r"/usr/bin/python3\.(\d{1,2})", real["/usr/bin/python3"])
    parts = [LIBRARY, *([f"/usr/lib/python3.{found[1]}/ssl.py"] if found else [])]
    there = ext4_files.entries(root, parts)
    if not found or not all(there.values()):
        if kind == "debian-raspi":
            return ""
        raise BaseError(f"{image} lacks Python 3 with its standard library, or {LIBRARY}: take an image that has them")
    if (3, int(found[1])) < OLDEST_PYTHON:
        raise BaseError(
            f"{image} has Python 3.{found[1]}, the agent needs 3.{OLDEST_PYTHON[1]} or newer: take a newer image"
        )
    return f"3.{found[1]}"


def _described(table: Table, systems: list, fats: list, roots: list) -> str:
    parts = []
    for part, system, fat in zip(table.partitions, systems, fats):
        what = f"ext4 {system.label!r}" if system else f"FAT {fat.label!r}" if fat else f"type {part.type}"
        parts.append(f"{part.number}: {what}")
    names = [facts.get("PRETTY_NAME", "?")[:60] for _, _, facts in roots]
    return f"{table.label} table, {', '.join(parts)[:300]}; system: {', '.join(names) or 'none'}"
