"""Copies image files without writing their holes: by reflink where the file system has it, else piece of data by piece of data.

Leaves out: the last flush and the final name, which are the caller's.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hardware.image_source import RAW, ImageSource
from hardware.partitions import open_image

PIECE_BYTES = 4 * 1024 * 1024
GRAIN_BYTES = 64 * 1024
"""Zeros are left out in units of this."""
_FICLONE = 0x40049409
Progress = Callable[[int, int], None]
"""Raw bytes done, of all."""


def unpack(source: ImageSource, target: Path, progress: Progress) -> None:
    """Makes `target`, readable by its owner only, of the raw bytes of `source`; the source is opened for reading only.

    Raises: ImageError for a source that is damaged or gives another number of bytes than it announced; OSError (a full disk).
    """
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+b", buffering=0) as file:
        file.truncate(source.bytes)
        if source.kind == RAW:
            with open_image(source.path)[0] as origin:
                _copy(origin.fileno(), file, source.bytes, progress)
            return
        with source.stream() as stream:
            done = 0
            while done < source.bytes:
                data = stream.read(min(PIECE_BYTES, source.bytes - done))
                _write_data(file, done, data)
                done += len(data)
                progress(done, source.bytes)
            stream.finish()


def data_pieces(descriptor: int, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The pieces of a range of a file that hold data, each with its place in the range."""
    here, end = offset, offset + size
    while here < end:
        try:
            here = os.lseek(descriptor, here, os.SEEK_DATA)
        except OSError:  # no data any more
            return
        stop = min(os.lseek(descriptor, here, os.SEEK_HOLE), end)
        while here < stop:
            data = os.pread(descriptor, min(PIECE_BYTES, stop - here), here)
            if not data:
                return
            yield here - offset, data
            here += len(data)


def _copy(origin: int, file: BinaryIO, size: int, progress: Progress) -> None:
    try:
        fcntl.ioctl(file.fileno(), _FICLONE, origin)
    except OSError:  # no reflinks here, or another file system
        for begin, data in data_pieces(origin, 0, size):
            _write_data(file, begin, data)
            progress(begin + len(data), size)
    progress(size, size)


def _write_data(file: BinaryIO, begin: int, data: bytes) -> None:
    """Writes what is not zero."""
    view = memoryview(data)
    start = None
    for at in range(0, len(data), GRAIN_BYTES):
        grain = view[at : at + GRAIN_BYTES]
        if any(grain[:64]) or bytes(grain).count(0) != len(grain):
            start = at if start is None else start
        elif start is not None:
            _all(file, begin + start, view[start:at])
            start = None
    if start is not None:
        _all(file, begin + start, view[start:])


def _all(file: BinaryIO, at: int, data: memoryview) -> None:
    while data:
        done = os.pwrite(file.fileno(), data, at)
        at, data = at + done, data[done:]
