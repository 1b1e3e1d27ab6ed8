"""Reads the partition table (MBR or GPT) of a disk image; every size is bounded and every claim checked before it is believed.

Source: UEFI specification 2.10, chapter 5 (GPT disk layout); the MBR as in its section 5.2.1.
Leaves out: writing tables (sfdisk does that), file systems inside the partitions, and the backup GPT, which only a repair needs.
"""

from __future__ import annotations

import os
import stat
import struct
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

SECTOR_BYTES = 512
MAX_LOGICAL = 60
"""The kernel reads no more partitions of an MBR disk."""
MAX_ENTRIES_BYTES = 1024 * 1024
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE


class PartitionError(ValueError):
    """A file has no partition table that can be believed; the text names the file and what is wrong."""


@dataclass(frozen=True)
class Partition:
    """`type` is two hex digits on MBR ("0c", "83"), a UUID in lower case on GPT; `name` is GPT's label, else empty."""

    number: int
    start_bytes: int
    size_bytes: int
    type: str
    name: str = ""
    bootable: bool = False

    @property
    def end_bytes(self) -> int:
        return self.start_bytes + self.size_bytes


@dataclass(frozen=True)
class Table:
    """In the order of their numbers; `id` is the disk's (8 hex digits on MBR, a UUID on GPT)."""

    label: Literal["dos", "gpt"]
    id: str
    sector_bytes: int
    partitions: tuple[Partition, ...]


def open_image(path: Path) -> tuple[BinaryIO, int]:
    """The image open for reading, and its size.  Raises: PartitionError when `path` is no plain file; OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise PartitionError(f"{path} is no plain file: give the file of an image")
    return os.fdopen(descriptor, "rb"), facts.st_size


def read_table(path: Path) -> Table:
    """The partition table of the image `path`.

    Raises: PartitionError when there is none, its checksums do not hold, a partition is outside the file or in another one; OSError.
    """
    file, size = open_image(path)
    with file:
        first = _read(file, path, 0, SECTOR_BYTES)
        if first[510:512] != b"\x55\xaa":
            raise PartitionError(f"{path} has no partition table (no 55 AA at byte 510): it is no disk image")
        entries = [struct.unpack_from("<B3xB3xII", first, 446 + 16 * index) for index in range(4)]
        if any(status not in (0x00, 0x80) for status, *_ in entries):
            raise PartitionError(f"{path} has no partition table: it may be the image of one file system")
        if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
            table = _gpt(file, path)
        else:
            disk_id = f"{struct.unpack_from('<I', first, 440)[0]:08x}"
            table = Table("dos", disk_id, SECTOR_BYTES, tuple(_mbr(file, path, entries)))
    _check(table, path, size)
    return table


def _read(file: BinaryIO, path: Path, offset: int, count: int) -> bytes:
    file.seek(offset)
    found = file.read(count)
    if len(found) != count:
        raise PartitionError(f"{path} ends before byte {offset + count}: it is cut short or no disk image")
    return found


def _mbr(file: BinaryIO, path: Path, entries: list[tuple[int, int, int, int]]):
    """Primary partitions 1-4, and the chain of logical ones from 5."""
    extended = None
    for number, (status, kind, start, count) in enumerate(entries, 1):
        if kind == 0:
            continue
        yield Partition(number, start * SECTOR_BYTES, count * SECTOR_BYTES, f"{kind:02x}", "", status == 0x80)
        if kind in _EXTENDED and extended is None:
            extended = start
    number, here = 5, extended
    while here is not None:
        if number >= 5 + MAX_LOGICAL:
            raise PartitionError(
                f"{path} has more than {MAX_LOGICAL} logical partitions, or a chain of them without end"
            )
        sector = _read(file, path, here * SECTOR_BYTES, SECTOR_BYTES)
        if sector[510:512] != b"\x55\xaa":
            raise PartitionError(f"{path}: the table of logical partition {number} is damaged (no 55 AA)")
        (status, kind, start, count), (_, next_kind, next_start, _) = (
            struct.unpack_from("<B3xB3xII", sector, 446 + 16 * index) for index in range(2)
        )
        if kind:
            begin = (here + start) * SECTOR_BYTES
            yield Partition(number, begin, count * SECTOR_BYTES, f"{kind:02x}", "", status == 0x80)
            number += 1
        if not next_kind:
            return
        if next_start == 0 or extended + next_start <= here:
            raise PartitionError(f"{path}: the chain of logical partitions turns back at number {number}")
        here = extended + next_start


def _gpt(file: BinaryIO, path: Path) -> Table:
    for sector in (512, 4096):
        header = _read(file, path, sector, 512)
        if header[:8] == b"EFI PART":
            break
    else:
        raise PartitionError(f"{path} has a protective MBR but no GPT behind it: the image is damaged")
    size, crc = struct.unpack_from("<II", header, 12)
    if not 92 <= size <= 512:
        raise PartitionError(f"{path}: the GPT header says it has {size} bytes: the image is damaged")
    if zlib.crc32(header[:16] + bytes(4) + header[20:size]) != crc:
        raise PartitionError(f"{path}: the checksum of the GPT header is wrong: the image is damaged, take it anew")
    own, entries_at, count, width, entries_crc = struct.unpack_from("<Q40xQIII", header, 24)[0:5]
    if own != 1:
        raise PartitionError(f"{path}: the GPT header says it is at sector {own}, not 1: the image is damaged")
    if width < 128 or width % 128 or count * width > MAX_ENTRIES_BYTES or entries_at < 2:
        raise PartitionError(f"{path}: {count} GPT entries of {width} bytes at sector {entries_at} cannot be")
    if entries_at * sector > os.fstat(file.fileno()).st_size:
        raise PartitionError(f"{path}: the GPT entries at sector {entries_at} are outside the file")
    raw = _read(file, path, entries_at * sector, count * width)
    if zlib.crc32(raw) != entries_crc:
        raise PartitionError(f"{path}: the checksum of the GPT entries is wrong: the image is damaged, take it anew")
    partitions = []
    for index in range(count):
        kind, _, first, last, attributes, name = struct.unpack_from("<16s16sQQQ72s", raw, index * width)
        if kind == bytes(16):
            continue
        if last < first:
            raise PartitionError(f"{path}: partition {index + 1} ends at sector {last}, before it begins at {first}")
        label = name.decode("utf-16-le", "replace").split("\0")[0]
        label = "".join(each if each.isprintable() else "?" for each in label)
        start, length = first * sector, (last - first + 1) * sector
        kind = str(uuid.UUID(bytes_le=kind))
        partitions.append(Partition(index + 1, start, length, kind, label, bool(attributes & 4)))
    return Table("gpt", str(uuid.UUID(bytes_le=header[56:72])), sector, tuple(partitions))


def _check(table: Table, path: Path, size: int) -> None:
    inner = [part for part in table.partitions if table.label == "gpt" or int(part.type, 16) not in _EXTENDED]
    if not inner:
        raise PartitionError(f"{path} has an empty partition table")
    for part in inner:
        if part.start_bytes == 0 or part.size_bytes == 0:
            raise PartitionError(f"{path}: partition {part.number} is empty or begins at the table itself")
        if part.end_bytes > size:
            raise PartitionError(
                f"{path}: partition {part.number} ends at byte {part.end_bytes}, outside the file of {size} bytes: "
                "the image is cut short"
            )
    ordered = sorted(inner, key=lambda part: part.start_bytes)
    for before, after in zip(ordered, ordered[1:]):
        if before.end_bytes > after.start_bytes:
            raise PartitionError(f"{path}: partitions {before.number} and {after.number} overlap: the image is damaged")
