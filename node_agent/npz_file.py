"""Arrays of numbers from an .npz file of strangers: sizes, shapes and types are checked before anything is allocated.

Reads what numpy.savez and numpy.savez_compressed write. Leaves out: other arrays of the file, and what the values mean.
"""

from __future__ import annotations

import lzma
import math
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

MAX_FILE_BYTES = 1 << 28
MAX_ARRAY_BYTES = 1 << 28  # as float64
MAX_MAGNITUDE = 1e30  # squares and their sums stay finite
HEADER_BYTES = 4096
# What zipfile, zlib and numpy.lib.format raise for damaged files; RuntimeError: encrypted or an unknown method.
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)

Shape = tuple[int | None, ...]  # None: any length


class NpzError(ValueError):
    """A file holds not the arrays that were asked for; the text, without the file's name, says why in one line."""


def read(path: Path, shapes: Mapping[str, Shape], optional: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Arrays by name, float64, of their `shapes`, finite and of at most MAX_MAGNITUDE; `optional` ones only where they are there.

    Raises: NpzError.  Source: the .npy format, version 1.0 (numpy.lib.format).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for a writer
            raise NpzError("it is no plain file")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise NpzError(f"{size} bytes are over the limit of {MAX_FILE_BYTES}")
        with zipfile.ZipFile(path) as archive:
            members = {item.filename: item for item in archive.infolist()}
            found = {}
            for name, shape in shapes.items():
                item = members.get(f"{name}.npy")
                if item is not None:
                    found[name] = _array(archive, item, name, shape)
                elif name not in optional:
                    raise NpzError(f"it holds no {name}")
            return found
    except NpzError:
        raise
    except DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise NpzError(f"it cannot be read: {' '.join(reason.split())[:80]}") from None


def _array(archive: zipfile.ZipFile, item: zipfile.ZipInfo, name: str, shape: Shape) -> np.ndarray:
    # other methods unpack without a bound on what comes out of a block
    if item.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or item.flag_bits & 1:
        raise NpzError(f"{name} is packed in another way than numpy does")
    if item.file_size > MAX_ARRAY_BYTES + HEADER_BYTES:
        raise NpzError(f"{name} is over the limit of {MAX_ARRAY_BYTES} bytes")
    with archive.open(item) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise NpzError(f"{name} is of another version than numpy writes for numbers")
        got, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=HEADER_BYTES)
        if len(got) != len(shape) or any(
            length < 0 if want is None else length != want for want, length in zip(shape, got)
        ):
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise NpzError(f"{name} is not of shape [{wanted}]: it is of another model")
        if dtype.kind not in "iuf":
            raise NpzError(f"{name} holds what is no number")
        count = math.prod(got)
        if 8 * count > MAX_ARRAY_BYTES or count * dtype.itemsize > item.file_size:
            raise NpzError(f"{name} is not of the size that it claims")
        content = file.read(count * dtype.itemsize)
        if len(content) != count * dtype.itemsize or file.read(1):
            raise NpzError(f"{name} is not of the size that it claims")
    value = np.frombuffer(content, dtype).reshape(got, order="F" if fortran else "C")
    if not (np.abs(value.astype(np.float64)) <= MAX_MAGNITUDE).all():
        raise NpzError(f"{name} holds what is no number of at most {MAX_MAGNITUDE:g}")
    return value.astype(np.float64)
