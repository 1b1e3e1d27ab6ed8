"""Sets the times of every inode of an ext4 image to one moment, so that the same files make the same bytes.

mke2fs -d takes access and change times from the files that it copies, and the kernel lets nobody choose a change time. Here they are
overwritten and the inodes' checksums computed anew. Modification times, which are the packages' own, stay.
Leaves out: file systems that are in use, and inodes of less than 160 bytes, which have no creation time.

Source: Linux, Documentation/filesystems/ext4 (super block, group descriptors, index nodes, checksums).
"""

from __future__ import annotations

import struct
from pathlib import Path

SUPER_BYTES = 1024
_MAGIC = 0xEF53
_INCOMPAT_64BIT, _INCOMPAT_CSUM_SEED, _RO_COMPAT_CSUM = 0x80, 0x2000, 0x400
_INODE_UNINIT = 0x1
_MAX_INODES = 1 << 24


class Ext4TimesError(ValueError):
    """The file holds no ext4 file system that can be patched."""


def _table() -> tuple[int, ...]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return tuple(found)


_CRC32C = _table()


def crc32c(seed: int, data: bytes) -> int:
    """Castagnoli's CRC-32 without the last inversion, as ext4 chains it."""
    table = _CRC32C
    for byte in data:
        seed = (seed >> 8) ^ table[(seed ^ byte) & 0xFF]
    return seed


def settle(image: Path, epoch_s: int) -> int:
    """Sets access, change and creation time of every inode in use; how many there were.  Raises: Ext4TimesError, OSError."""
    with open(image, "r+b") as file:
        file.seek(SUPER_BYTES)
        head = file.read(SUPER_BYTES)
        if len(head) < SUPER_BYTES or struct.unpack_from("<H", head, 0x38)[0] != _MAGIC:
            raise Ext4TimesError(f"{image} holds no ext4 file system")
        inodes, blocks = struct.unpack_from("<II", head, 0)
        first_block, block_log = struct.unpack_from("<II", head, 0x14)
        per_group_blocks, _, per_group = struct.unpack_from("<III", head, 0x20)
        width = struct.unpack_from("<H", head, 0x58)[0]
        incompat, ro_compat = struct.unpack_from("<II", head, 0x60)
        size = 1024 << block_log
        wide = bool(incompat & _INCOMPAT_64BIT)
        descriptor_bytes = struct.unpack_from("<H", head, 0xFE)[0] if wide else 32
        if inodes > _MAX_INODES or width < 160 or size > 65536 or not per_group or not per_group_blocks:
            raise Ext4TimesError(
                f"{image}: {inodes} inodes of {width} bytes in blocks of {size}: make it by image build"
            )
        if incompat & _INCOMPAT_CSUM_SEED:
            seed = struct.unpack_from("<I", head, 0x270)[0]
        else:
            seed = crc32c(0xFFFFFFFF, head[0x68:0x78])
        summed, count = bool(ro_compat & _RO_COMPAT_CSUM), 0
        groups = -(-(blocks - first_block) // per_group_blocks)
        file.seek((first_block + 1) * size)
        descriptors = file.read(groups * descriptor_bytes)
        for group in range(groups):
            at = group * descriptor_bytes
            table = struct.unpack_from("<I", descriptors, at + 0x8)[0]
            flags, unused = (
                struct.unpack_from("<H", descriptors, at + 0x12)[0],
                struct.unpack_from("<H", descriptors, at + 0x1C)[0],
            )
            if descriptor_bytes >= 64:
                table |= struct.unpack_from("<I", descriptors, at + 0x28)[0] << 32
                unused |= struct.unpack_from("<H", descriptors, at + 0x32)[0] << 16
            if flags & _INODE_UNINIT:
                continue
            used = per_group - unused if summed else per_group
            file.seek(table * size)
            raw = bytearray(file.read(used * width))
            for index in range(used):
                inode = raw[index * width : (index + 1) * width]
                if struct.unpack_from("<H", inode, 0)[0] or struct.unpack_from("<H", inode, 0x1A)[0]:
                    number = group * per_group + index + 1
                    raw[index * width : (index + 1) * width] = _settled(inode, number, epoch_s, seed, summed)
                    count += 1
            file.seek(table * size)
            file.write(raw)
    return count


def _settled(inode: bytearray, number: int, epoch_s: int, seed: int, summed: bool) -> bytearray:
    struct.pack_into("<II", inode, 0x8, epoch_s, epoch_s)  # access, change
    extra = struct.unpack_from("<H", inode, 0x80)[0]
    if extra >= 0x1C:  # nanoseconds of change and access; creation
        struct.pack_into("<I", inode, 0x84, 0)
        struct.pack_into("<III", inode, 0x8C, 0, epoch_s, 0)
    if summed:
        struct.pack_into("<H", inode, 0x7C, 0)
        if extra >= 4:
            struct.pack_into("<H", inode, 0x82, 0)
        generation = bytes(inode[0x64:0x68])
        value = crc32c(crc32c(crc32c(seed, number.to_bytes(4, "little")), generation), bytes(inode))
        struct.pack_into("<H", inode, 0x7C, value & 0xFFFF)
        if extra >= 4:
            struct.pack_into("<H", inode, 0x82, value >> 16)
    return inode
