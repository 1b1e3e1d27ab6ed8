"""Puts file systems together to a disk image: partition table, FAT, ext4, by sfdisk, mkfs.vfat and mtools. No loop devices, no root.

The same inputs give the same bytes: disk id, volume id and UUIDs are derived from `seed`, times are `epoch_s`, files are written in
the order of their names. The image is sparse.
Leaves out: making the ext4 file systems (image_stage.py, which needs their owners), compression (image_output.py), GPT.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from hardware import program
from hardware.sparse_copy import data_pieces

ALIGN_BYTES = 4 * 1024**2
FAT_BYTES = 128 * 1024**2
SECTOR_BYTES = 512
MIN_FAT32_CLUSTERS = 65_525
MAX_IMAGE_BYTES = 64 * 1024**3


class DiskError(ValueError):
    """The parts do not make a disk; the text says which."""


@dataclass(frozen=True)
class Disk:
    """Partition 1 holds `fat` (path on it -> file here), the next ones the file systems in `systems`; the last one takes what is left."""

    label: str
    fat: dict[str, Path]
    systems: tuple[Path, ...]
    seed: str
    epoch_s: int
    size_bytes: int | None = None
    fat_bytes: int = FAT_BYTES


def ids(seed: str) -> tuple[int, int, list[str]]:
    """(disk id, FAT volume id, UUIDs of the ext4 file systems) of a seed."""
    digest = hashlib.sha256(seed.encode()).digest()
    disk, volume = (int.from_bytes(digest[at : at + 4], "big") or 1 for at in (0, 4))
    return disk, volume, [str(uuid.uuid5(uuid.NAMESPACE_URL, f"spacemoe:{seed}:{number}")) for number in range(2)]


def table(disk: Disk) -> tuple[str, list[int], int]:
    """(script for sfdisk, offsets of the partitions, bytes of the image).  Raises: DiskError."""
    number, _, _ = ids(disk.seed)
    lines = ["label: dos", f"label-id: 0x{number:08x}", "unit: sectors", ""]
    offsets, at = [ALIGN_BYTES], ALIGN_BYTES + disk.fat_bytes
    lines.append(f"start={ALIGN_BYTES // SECTOR_BYTES}, size={disk.fat_bytes // SECTOR_BYTES}, type=c, bootable")
    for index, system in enumerate(disk.systems):
        size = -(-system.stat().st_size // ALIGN_BYTES) * ALIGN_BYTES
        last = index == len(disk.systems) - 1
        if last and disk.size_bytes is not None:
            if at + size > disk.size_bytes:
                raise DiskError(
                    f"--size-mb {disk.size_bytes // 10**6} is too small: {-(-(at + size) // 10**6)} MB are needed"
                )
            size = (disk.size_bytes - at) // ALIGN_BYTES * ALIGN_BYTES
        lines.append(f"start={at // SECTOR_BYTES}, size={size // SECTOR_BYTES}, type=83")
        offsets.append(at)
        at += size
    total = disk.size_bytes if disk.size_bytes is not None else at
    if total > MAX_IMAGE_BYTES:
        raise DiskError(f"an image of {total} bytes is more than {MAX_IMAGE_BYTES}: give a smaller --size-mb")
    return "\n".join(lines) + "\n", offsets, total


def assemble(disk: Disk, target: Path) -> None:
    """Makes `target`.  Raises: DiskError, program.ProgramError, OSError."""
    script, offsets, total = table(disk)
    _, volume, _ = ids(disk.seed)
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder)
        with open(target, "xb") as image:
            os.fchmod(image.fileno(), 0o600)  # it may hold a claim token
            image.truncate(total)
        program.run(
            ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", str(target)], cwd=work, send=script.encode()
        )
        fat = work / "fat"
        _make_fat(disk, fat, volume, work)
        with open(target, "r+b") as image:
            for offset, part in zip(offsets, (fat, *disk.systems)):
                with open(part, "rb") as source:
                    for begin, data in data_pieces(source.fileno(), 0, part.stat().st_size):
                        image.seek(offset + begin)
                        image.write(data)
            image.flush()
            os.fsync(image.fileno())


def _make_fat(disk: Disk, fat: Path, volume: int, work: Path) -> None:
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in disk.fat.values())
    if needed > disk.fat_bytes * 9 // 10:
        raise DiskError(f"{needed} bytes do not fit on the FAT partition of {disk.fat_bytes}: leave files out")
    with open(fat, "xb") as file:
        file.truncate(disk.fat_bytes)
    # the largest clusters of 1 KiB or less that still make it a FAT32: by default 128 MiB would be a FAT16
    per_cluster = 2 if disk.fat_bytes // 1024 > MIN_FAT32_CLUSTERS + 1024 else 1
    words = ["mkfs.vfat", "-F", "32", "-s", str(per_cluster), "-S", str(SECTOR_BYTES), "-n", disk.label]
    # --invariant: no time of day in the label's entry
    program.run([*words, "-i", f"{volume:08x}", "--invariant", "./fat"], cwd=work)
    stage = work / "stage"
    stage.mkdir()
    folders: set[str] = set()
    for name in sorted(disk.fat):
        parents = [str(parent) for parent in Path(name).parents if str(parent) != "."]
        for folder in reversed(parents):
            if folder not in folders:
                folders.add(folder)
                program.run(["mmd", "-i", "./fat", f"::/{folder}"], cwd=work, environment=_when(disk.epoch_s))
        copy = stage / "file"
        shutil.copyfile(disk.fat[name], copy)
        os.utime(copy, (disk.epoch_s, disk.epoch_s))
        program.run(
            ["mcopy", "-m", "-i", "./fat", "./stage/file", f"::/{name}"], cwd=work, environment=_when(disk.epoch_s)
        )
        copy.unlink()


def _when(epoch_s: int) -> dict[str, str]:
    return {"SOURCE_DATE_EPOCH": str(epoch_s), "TZ": "UTC"}
