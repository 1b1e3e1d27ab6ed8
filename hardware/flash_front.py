"""What an image's first bytes say before the card is touched: its FAT partitions, and which of their bytes are in use.

A block map may leave out blocks that hold nothing but zeros. Where those belong to a file or to the table of clusters, a card that
was used before would give back its old bytes there; so what a FAT has in use is written whatever the map says.
Leaves out: ext4, where mke2fs makes holes of blocks of zeros, which the file system itself knows as such.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hardware.fat_files import Fat, FatError, open_fat
from hardware.flash_card import HEAD_BYTES
from hardware.image_source import ImageSource, ImageStream
from hardware.partitions import SECTOR_BYTES, Partition, PartitionError, read_table

MAX_FRONT_BYTES = 256 * 1024 * 1024
"""A FAT whose tables end behind this is left alone: no board's boot partition is."""
FAT_TYPES = (
    *("01", "04", "06", "0b", "0c", "0e", "ef"),  # MBR
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",  # GPT: EFI system
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7",  # GPT: basic data, as Ubuntu's and Jetson's images have it
)
FAT16_CLUSTERS = 4085
"""With fewer it is FAT12."""


@dataclass(frozen=True)
class Front:
    """`fat` is the first FAT file system, where a pack goes; without one `lacks` says why. `used`: (start, end) in the image, in order."""

    fat: Fat | None
    used: tuple[tuple[int, int], ...]
    lacks: str = ""


def look_at_front(source: ImageSource) -> Front:
    """Raises: ImageError (damaged stream), OSError."""
    with tempfile.TemporaryDirectory(prefix="spacemoe-flash-") as folder, source.stream() as stream:
        path = Path(folder) / "front"
        with open(path, "w+b") as file:
            file.truncate(source.bytes)  # what was not read yet is a hole
            copy = _Copy(stream, file, source.bytes)
            copy.upto(HEAD_BYTES)
            fats, used = [], []
            try:
                parts = sorted(read_table(path).partitions, key=lambda part: part.start_bytes)
                for part in parts:
                    if part.type not in FAT_TYPES or part.start_bytes > MAX_FRONT_BYTES:
                        continue
                    copy.upto(part.start_bytes + 512)
                    fat = open_fat(path, part.start_bytes, part.size_bytes)
                    if fat is not None:
                        fats.append(fat)
                        used += _used(copy, part)
            except (PartitionError, FatError) as error:
                return Front(None, (), str(error).replace(str(path), str(source.path)))
    lacks = "" if fats else f"{source.path} has no FAT partition"
    return Front(fats[0] if fats else None, _merged(used), lacks)


def has_table(source: ImageSource) -> bool:
    """Whether the first sector can be a partition table (MBR, or the one that protects a GPT) that has a partition.

    Raises: ImageError (damaged stream), OSError.
    """
    with source.stream() as stream:
        first = stream.read(SECTOR_BYTES)
    entries = [first[446 + 16 * index : 462 + 16 * index] for index in range(4)]
    return (
        first[510:] == b"\x55\xaa"
        and all(each[0] in (0, 0x80) for each in entries)
        and any(each[4] for each in entries)
    )


class _Copy:
    """The image's first bytes in a file, as far as they were asked for."""

    def __init__(self, stream: ImageStream, file: BinaryIO, size: int) -> None:
        self._stream, self.file, self._size, self._at = stream, file, size, 0

    def upto(self, end: int) -> None:
        end = min(end, self._size)
        while self._at < end:
            data = self._stream.read(min(HEAD_BYTES, end - self._at))
            self.file.seek(self._at)
            self.file.write(data)
            self._at += len(data)
        self.file.flush()

    def read(self, start: int, count: int) -> bytes:
        self.upto(start + count)
        self.file.seek(start)
        return self.file.read(count)


def _used(copy: _Copy, part: Partition) -> list[tuple[int, int]]:
    """Boot sector, tables, root folder, and every cluster that is not free; all of the partition where it cannot be told."""
    whole = [(part.start_bytes, part.end_bytes)]
    boot = copy.read(part.start_bytes, 512)

    def word(at: int, count: int = 2) -> int:
        return int.from_bytes(boot[at : at + count], "little")

    width, cluster, reserved, tables = word(11), boot[13] * word(11), word(14), boot[16]
    table_bytes = (word(22) or word(36, 4)) * width
    root_bytes = -(-word(17) * 32 // width) * width
    first = (reserved * width) + tables * table_bytes + root_bytes
    count = ((word(19) or word(32, 4)) * width - first) // cluster
    entry = 2 if word(22) else 4  # as Linux tells FAT16 from FAT32
    fat12 = entry == 2 and count < FAT16_CLUSTERS
    if fat12 or (count + 2) * entry > table_bytes or part.start_bytes + first > MAX_FRONT_BYTES:
        return whole
    raw = copy.read(part.start_bytes + reserved * width, (count + 2) * entry)
    values = np.frombuffer(raw, "<u4" if entry == 4 else "<u2")[2:]
    taken = (values & 0x0FFFFFFF) != 0 if entry == 4 else values != 0
    edges = np.flatnonzero(np.diff(np.concatenate(([0], taken.astype(np.int8), [0]))))
    data = part.start_bytes + first
    runs = [(data + int(a) * cluster, data + int(b) * cluster) for a, b in zip(edges[::2], edges[1::2])]
    return [(part.start_bytes, data), *runs]


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return tuple(found)
