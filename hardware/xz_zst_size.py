"""How large an .xz or .zst is unpacked, from its own tables, without unpacking it.

xz: the index at the end of each stream (xz file format 1.2); zstd: the header of each frame, walked block by block (RFC 8878), which
also finds a file that was cut short. What they say is checked against what comes out (image_source.py).
Leaves out: unpacking.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from hardware.image_errors import ImageError

MAX_INDEX_BYTES = 64 * 1024 * 1024
MAX_STREAMS = 100_000
MAX_FRAMES, MAX_BLOCKS = 1_000_000, 4_000_000
"""Of a zstd file; a block holds up to 128 kB, so this is 500 GB of a usual one."""
MAX_RAW_BYTES = 1 << 50
_XZ_HEADER, _XZ_FOOTER = b"\xfd7zXZ\x00", b"YZ"
_ZSTD_FRAME, _ZSTD_SKIPPABLE = 0xFD2FB528, 0x184D2A50
_RLE, _RESERVED = 1, 3


class _Damaged(Exception):
    pass


def _at(file: BinaryIO, offset: int, count: int) -> bytes:
    if offset < 0:
        raise _Damaged
    file.seek(offset)
    data = b""
    while len(data) < count and (part := file.read(count - len(data))):
        data += part
    if len(data) != count:
        raise _Damaged
    return data


def xz_bytes(file: BinaryIO, size: int, path: Path) -> int:
    """Raw bytes of all streams.  Raises: ImageError where the tables do not agree."""
    try:
        total, end, streams = 0, size, 0
        while end:
            if end % 4 or (streams := streams + 1) > MAX_STREAMS:
                raise _Damaged
            if _at(file, end - 4, 4) == b"\0\0\0\0":
                end -= 4  # padding between streams
                continue
            raw, end = _xz_stream(file, end)
            total += raw
            if total > MAX_RAW_BYTES:
                raise _Damaged
        return total
    except (_Damaged, IndexError):
        raise ImageError(f"{path} is truncated or damaged: its xz index does not hold, get it again") from None


def _xz_stream(file: BinaryIO, end: int) -> tuple[int, int]:
    """(raw bytes, where it begins) of the stream that ends at `end`."""
    footer = _at(file, end - 12, 12)
    check, backward, flags = struct.unpack("<II2s", footer[:10])
    index_bytes = (backward + 1) * 4
    if footer[10:] != _XZ_FOOTER or zlib.crc32(footer[4:10]) != check or index_bytes > MAX_INDEX_BYTES:
        raise _Damaged
    index = _at(file, end - 12 - index_bytes, index_bytes)
    if index[0] != 0 or zlib.crc32(index[:-4]) != int.from_bytes(index[-4:], "little"):
        raise _Damaged
    count, at = _multibyte(index, 1)
    if count > index_bytes:
        raise _Damaged
    raw = blocks = 0
    for _ in range(count):
        unpadded, at = _multibyte(index, at)
        part, at = _multibyte(index, at)
        blocks += -(-unpadded // 4) * 4
        raw += part
    begin = end - 12 - index_bytes - blocks - 12
    header = _at(file, begin, 12)
    if header[:6] != _XZ_HEADER or header[6:8] != flags:
        raise _Damaged
    return raw, begin


def _multibyte(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 63, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
    raise _Damaged


def zstd_bytes(file: BinaryIO, size: int, path: Path) -> int | None:
    """Raw bytes of all frames; None where one does not say.  Raises: ImageError where a frame is cut short."""
    try:
        total, silent, at, frames, blocks = 0, False, 0, 0, 0
        while at < size:
            raw, at, more = _zstd_frame(file, at, size)
            frames, blocks = frames + 1, blocks + more
            if frames > MAX_FRAMES or blocks > MAX_BLOCKS:
                raise _Damaged
            silent = silent or raw is None
            total += raw or 0
            if total > MAX_RAW_BYTES:
                raise _Damaged
        if at != size:
            raise _Damaged
        return None if silent else total
    except _Damaged:
        raise ImageError(
            f"{path} is truncated or damaged: its zstd frames do not end with the file, get it again"
        ) from None


def _zstd_frame(file: BinaryIO, at: int, size: int) -> tuple[int | None, int, int]:
    """(raw bytes or None, where it ends, how many blocks it has) of the frame at `at`."""
    magic = int.from_bytes(_at(file, at, 4), "little")
    if magic & 0xFFFFFFF0 == _ZSTD_SKIPPABLE:
        return 0, at + 8 + int.from_bytes(_at(file, at + 4, 4), "little"), 0
    if magic != _ZSTD_FRAME:
        raise _Damaged
    descriptor = _at(file, at + 4, 1)[0]
    single, flag = descriptor >> 5 & 1, descriptor >> 6
    at += 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    field = (1 if single else 0, 2, 4, 8)[flag]
    raw = int.from_bytes(_at(file, at, field), "little") + (256 if field == 2 else 0) if field else None
    at += field
    last, blocks = False, 0
    while not last and blocks <= MAX_BLOCKS:
        blocks += 1
        header = int.from_bytes(_at(file, at, 3), "little")
        last, kind = bool(header & 1), header >> 1 & 3
        if kind == _RESERVED:
            raise _Damaged
        at += 3 + (1 if kind == _RLE else header >> 3)
        if at > size:
            raise _Damaged
    return raw, at + (4 if descriptor & 4 else 0), blocks
