"""Which disks may be overwritten with an image, and why each other one may not: decided from what lsblk says, before anything is opened.

Only whole disks that can be taken out (removable, hotplug, USB, a card slot) may be written, and only those on which nothing is mounted,
nothing swaps, nothing is a member of LVM, RAID, LUKS or ZFS and nothing is held by another device. Loop devices may not, but in tests.
Leaves out: opening and writing (flash.py; the kernel refuses there once more, by O_EXCL).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_CARD_BYTES = 1_100_000_000_000
"""A card of 1 TB and a little more; what is larger is more likely somebody's backup disk."""
MAX_LISTING_BYTES = 64 * 1024 * 1024
SYSTEM_MOUNTS = ("/", "/boot", "/boot/efi", "/boot/firmware", "/efi", "/home", "/nix", "/usr", "/var")
# A hot-plug SATA port calls its disk removable, and so may a controller of a server: nobody's card is behind these.
BUILT_IN = ("ata", "fc", "iscsi", "nvme", "pcie", "sas", "sata", "spi", "virtio")
MEMBERS = {
    "LVM2_member": "is a member of LVM",
    "LVM1_member": "is a member of LVM",
    "crypto_LUKS": "is encrypted with LUKS",
    "zfs_member": "is a member of ZFS",
    "bcache": "is a member of bcache",
    "ceph_bluestore": "is a member of Ceph",
    "drbd": "is a member of DRBD",
    "VMFS_volume_member": "is a member of VMFS",
}
_NOT_STORAGE = re.compile(r"mmcblk\d+(boot\d+|rpmb|gp\d+)")


class DiskError(ValueError):
    """No such disk, or one that must not be written; the text says why and what to do."""


class ListingError(RuntimeError):
    """lsblk cannot be asked."""


@dataclass(frozen=True)
class Node:
    """A disk or what is below it: a partition, a logical volume, an opened LUKS container."""

    path: str
    type: str
    filesystem: str
    mounts: tuple[str, ...]
    number: str
    """Major and minor number, as "8:1"."""


@dataclass(frozen=True)
class Disk:
    """A whole disk; `nodes` are itself and everything below it."""

    path: str
    type: str
    bytes: int
    vendor: str
    model: str
    serial: str
    transport: str
    subsystems: tuple[str, ...]
    removable: bool
    hotplug: bool
    read_only: bool
    number: str
    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """Maker and model as one reads them on the card or its reader."""
        return " ".join(filter(None, (self.vendor, self.model))) or "unnamed"


@dataclass(frozen=True)
class Rules:
    """What counts as a card. `loops`: loop devices do too (tests)."""

    most_bytes: int = MAX_CARD_BYTES
    loops: bool = False


def size_text(count: int) -> str:
    """Bytes as the makers of cards count them."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _text(value: object) -> str:
    """A text of lsblk, fit for a terminal: a stranger's card reader names itself."""
    text = " ".join(str(value).split()) if value is not None else ""
    return "".join(each if each.isprintable() else "?" for each in text)[:120]


def _flag(value: object) -> bool:
    return value in (True, 1, "1")  # text before util-linux 2.33


def _number(value: object) -> int:
    try:
        return int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return 0


def _nodes(entry: dict, found: list[Node]) -> None:
    mounts = entry.get("mountpoints", [entry.get("mountpoint")])  # one before util-linux 2.37
    found.append(
        Node(
            _text(entry.get("path") or entry.get("name")),
            _text(entry.get("type")),
            _text(entry.get("fstype")),
            tuple(_text(each) for each in mounts or () if each),
            _text(entry.get("maj:min")),
        )
    )
    for child in entry.get("children", ()):
        _nodes(child, found)


def disks_of(listing: dict) -> tuple[Disk, ...]:
    """The disks of what `lsblk --json --bytes --paths --output-all` printed.  Raises: ListingError."""
    try:
        disks = []
        for entry in listing["blockdevices"]:
            nodes: list[Node] = []
            _nodes(entry, nodes)
            disks.append(
                Disk(
                    nodes[0].path,
                    nodes[0].type,
                    _number(entry.get("size")),
                    _text(entry.get("vendor")),
                    _text(entry.get("model")),
                    _text(entry.get("serial")),
                    _text(entry.get("tran")).lower(),
                    tuple(_text(entry.get("subsystems")).split(":")),
                    _flag(entry.get("rm")),
                    _flag(entry.get("hotplug")),
                    _flag(entry.get("ro")),
                    nodes[0].number,
                    tuple(nodes),
                )
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise ListingError(
            f"lsblk's listing is not as expected ({error!r}): util-linux 2.33 or newer is needed"
        ) from None
    return tuple(disks)


def listed(ask: Callable[[], dict] | None = None, sys_root: Path = Path("/sys")) -> tuple[Disk, ...]:
    """The disks of this machine; `ask` brings another listing.  Raises: ListingError."""
    disks = disks_of((ask or _lsblk)())
    return tuple(_with_slot_name(disk, sys_root) for disk in disks)


def _lsblk() -> dict:
    command = ("lsblk", "--json", "--bytes", "--paths", "--output-all")
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        raise ListingError("lsblk is not installed: apt-get install util-linux") from None
    except subprocess.TimeoutExpired:
        raise ListingError("lsblk did not answer within 60 s: take out the card or reader that hangs") from None
    if done.returncode not in (0, 64) or len(done.stdout) > MAX_LISTING_BYTES:  # 64: a disk went away meanwhile
        said = done.stderr.decode(errors="replace").strip()[-200:]
        raise ListingError(f"{' '.join(command)} failed with {done.returncode} ({said}): try it by hand")
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise ListingError("lsblk printed no JSON: util-linux 2.33 or newer is needed") from None


def _with_slot_name(disk: Disk, sys_root: Path) -> Disk:
    """A card in a slot of the machine's own has its name and serial in sysfs, where older lsblk does not look."""
    if disk.model and disk.serial or "mmc" not in disk.subsystems:
        return disk
    from dataclasses import replace

    found = {}
    for field in ("name", "serial"):
        try:
            with open(sys_root / "block" / Path(disk.path).name / "device" / field, "rb") as file:
                found[field] = _text(file.read(100).decode(errors="replace"))
        except OSError:
            found[field] = ""
    return replace(disk, model=disk.model or found["name"], serial=disk.serial or found["serial"])


def system_numbers() -> frozenset[str]:
    """Device numbers under the folders of the running system; a file system without a device of its own has one that matches nothing."""
    found = set()
    for path in SYSTEM_MOUNTS:
        try:
            device = os.stat(path).st_dev
        except OSError:
            continue
        found.add(f"{os.major(device)}:{os.minor(device)}")
    return frozenset(found)


def refusals(disk: Disk, rules: Rules = Rules(), system: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Every reason why `disk` must not be written; none: it may be. `system`: numbers of devices that hold the running system."""
    loop = disk.type == "loop" and rules.loops
    found = []
    if disk.type == "loop" and not loop:
        found.append("is a loop device: it stands for a file, which --to-file names")
    elif disk.type != "disk" and not loop:
        found.append(f"is no disk but of type {disk.type or 'unknown'}")
    elif _NOT_STORAGE.fullmatch(Path(disk.path).name):
        found.append("is an eMMC's boot area, no card")
    elif not loop and disk.transport in BUILT_IN:
        found.append(f"is a built-in disk ({disk.transport})")
    elif not loop and not (
        disk.removable or disk.hotplug or disk.transport in ("usb", "mmc") or {"usb", "mmc"} & {*disk.subsystems}
    ):
        found.append("is a built-in disk: neither removable nor hot-plugged, no USB, no card slot")
    if disk.bytes <= 0:
        found.append("has no card in it")
    if disk.bytes > rules.most_bytes:
        found.append(
            f"is too large for a card: {size_text(disk.bytes)}, above {size_text(rules.most_bytes)} (--max-card-gb)"
        )
    if disk.read_only:
        found.append("is read-only: is the card's lock switch on?")
    found += _uses(disk, system)
    return tuple(found)


def _uses(disk: Disk, system: frozenset[str]) -> list[str]:
    found = []
    of_system = [
        (node.path, next((mount for mount in node.mounts if mount in SYSTEM_MOUNTS), "of the running system"))
        for node in disk.nodes
        if node.number in system or {*node.mounts} & {*SYSTEM_MOUNTS}
    ]
    if of_system:
        found.append("is the system disk: it holds " + ", ".join(f"{mount} ({path})" for path, mount in of_system))
    for node in disk.nodes:
        who = "" if node.path == disk.path else f"holds {node.path}, which "
        swapping = "[SWAP]" in node.mounts
        mounts = [mount for mount in node.mounts if mount != "[SWAP]" and mount not in SYSTEM_MOUNTS]
        if mounts:
            found.append(f"{who}is mounted at {mounts[0]}: umount {node.path}")
        if swapping or node.filesystem in ("swap", "swsuspend"):
            found.append(f"{who}is swap" + (f" in use: swapoff {node.path}" if swapping else ""))
        if node.filesystem in MEMBERS:
            found.append(f"{who}{MEMBERS[node.filesystem]}")
        elif node.filesystem.lower().endswith("_raid_member"):
            found.append(f"{who}is a member of a RAID ({node.filesystem})")
        if node.type not in ("disk", "loop", "part", "rom"):
            found.append(f"is held by {node.path} ({node.type})")
    return list(dict.fromkeys(found))  # a volume over two partitions is listed below both


def find(disks: tuple[Disk, ...], path: str) -> Disk:
    """The whole disk at `path`, which may be a link as in /dev/disk/by-id.  Raises: DiskError."""
    real = os.path.realpath(path)
    for disk in disks:
        if disk.path == real:
            return disk
        if any(node.path == real for node in disk.nodes):
            raise DiskError(f"{path} is a part of {disk.path}: name the whole disk")
    if os.path.isfile(real):
        raise DiskError(f"{path} is a plain file, no disk: give it as --to-file {path}")
    raise DiskError(f"there is no disk {path}: `spacemoe flash --list` shows them")


def check(disk: Disk, rules: Rules = Rules(), system: frozenset[str] = frozenset()) -> None:
    """Raises: DiskError with every reason why `disk` must not be written."""
    reasons = refusals(disk, rules, system)
    if reasons:
        raise DiskError(f"{disk.path} ({disk.name}, {size_text(disk.bytes)}) is refused: it {'; it '.join(reasons)}")
