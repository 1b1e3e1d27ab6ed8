"""An image file as a stream of raw bytes: .img, .img.xz, .img.zst or .img.gz, known by content, with its raw size before the first byte.

xz and zstd say it themselves (xz_zst_size.py); gzip knows it only modulo 2^32, and a zstd stream may keep silent, so these are read
through once. Nothing is believed twice: a stream that gives less or more than its announced size is an error.
Leaves out: where the bytes go (flash.py), archives (zip), pipes.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hardware.image_errors import ImageError, ImageTooLarge
from hardware.program import ProgramError
from hardware.xz_zst_size import xz_bytes, zstd_bytes

RAW, XZ, ZSTD, GZIP = "raw", "xz", "zstd", "gzip"
MAGIC = {b"\xfd7zXZ\x00": XZ, b"\x28\xb5\x2f\xfd": ZSTD, b"\x1f\x8b\x08": GZIP}
OTHER_MAGIC = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"BZh": "compressed with bzip2: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
}
ENDINGS = (".xz", ".zst", ".gz")
READ_BYTES = 4 * 1024 * 1024
MAX_SIDECAR_BYTES = 1024 * 1024
LZMA_MEMORY_BYTES = 512 * 1024 * 1024
SECTOR = 512
_DIGEST = re.compile(r"\\?([0-9a-fA-F]{64})(?:[ \t]+\*?(.*))?")
Progress = Callable[[int, int], None]
"""Bytes of the file read so far, and of all."""


@dataclass(frozen=True)
class ImageSource:
    """An image that was looked at. `bytes`: raw; `file_bytes`, `changed_ns`: of the file as it lies there."""

    path: Path
    kind: str
    bytes: int
    file_bytes: int
    changed_ns: int

    @property
    def raw_name(self) -> str:
        """The file's name without the ending of its compression."""
        name = self.path.name
        return name[: -len(self.path.suffix)] if self.kind != RAW and self.path.suffix in ENDINGS else name

    @contextmanager
    def stream(self) -> Iterator[ImageStream]:
        """Raises: ImageError, ProgramError, OSError."""
        with _plain(self.path) as file:
            now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (self.file_bytes, self.changed_ns):
                raise ImageError(f"{self.path} was changed meanwhile: start again")
            yield ImageStream(self, file)


class _Counted:
    """A file that tells how far it was read, while an image is unpacked for its size alone."""

    def __init__(self, file: BinaryIO, progress: Progress | None, total: int) -> None:
        self._file, self._progress, self._count, self._total = file, progress, 0, total

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(READ_BYTES if count is None or count < 0 else count)
        self._count += len(data)
        if self._progress is not None:
            self._progress(self._count, self._total)
        return data


class _Hashed:
    """A file that hashes what is read of it, in order; a raw image is hashed by who reads it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(READ_BYTES if count is None or count < 0 else count)
        self.sha256.update(data)
        return data


class ImageStream:
    """The raw bytes from the first to the last. After the last, `finish` says what the file's own sha256 is."""

    def __init__(self, source: ImageSource, file: BinaryIO) -> None:
        self._source, self._given = source, 0
        self._file = _Hashed(file) if source.kind != RAW else None
        self._raw = _unpacked(source.kind, self._file) if self._file is not None else file

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes.  Raises: ImageError where the stream is damaged or ends before."""
        parts, missing = [], count
        while missing:
            part = _read(self._raw, missing, self._source.path, self._given)
            if not part:
                raise ImageError(
                    f"{self._source.path} ends after {self._given} of {self._source.bytes} bytes: it is truncated, get it again"
                )
            parts.append(part)
            missing -= len(part)
            self._given += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> str:
        """The sha256 of the packed file, '' of a raw one.  Raises: ImageError if the stream goes on after its announced size."""
        if _read(self._raw, 1, self._source.path, self._given):
            raise ImageError(
                f"{self._source.path} holds more than the {self._source.bytes} bytes it announces: get it again"
            )
        if self._file is None:
            return ""
        while self._file.read(READ_BYTES):
            pass
        return self._file.sha256.hexdigest()


@contextmanager
def _plain(path: Path) -> Iterator[BinaryIO]:
    """The file open for reading.  Raises: ImageError for what is no plain file, before it could hang."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}): name a file that is there") from None
    with open(number, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ImageError(f"{path} is no plain file: copy the image into one")
        yield file


def read_small(path: Path, most_bytes: int) -> bytes:
    """All of a small plain file.  Raises: ImageError."""
    with _plain(path) as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise ImageError(f"{path} has more than {most_bytes} bytes: it is not what it should be")
        parts = []
        while part := file.read(most_bytes + 1 - sum(map(len, parts))):
            parts.append(part)
    return b"".join(parts)[:most_bytes]


def _unpacked(kind: str, file):
    """A file of the raw bytes of a compressed one."""
    if kind == XZ:
        return _Xz(file)
    if kind == GZIP:
        return gzip.GzipFile(fileobj=file, mode="rb")  # reads member after member and checks each one's checksum
    if kind == ZSTD:
        return _zstandard().ZstdDecompressor().stream_reader(file, read_size=READ_BYTES, read_across_frames=True)
    raise AssertionError(kind)


def _zstandard():
    """Raises: ProgramError where the package is not installed."""
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ProgramError(
            "zstandard, which unpacks .zst, is not installed: pip install 'spacemoe-kit[hardware]', or unpack by `zstd -d`"
        ) from None
    return zstandard


class _Xz:
    """All streams of an .xz, with a bound for memory that lzma.open has not."""

    def __init__(self, file) -> None:
        self._file, self._stream, self._rest = file, None, b""

    def read(self, count: int) -> bytes:
        while True:
            if self._stream is None or self._stream.eof:
                rest = self._stream.unused_data if self._stream is not None else b""
                while not (rest := rest.lstrip(b"\0")):  # padding between streams
                    rest = self._file.read(READ_BYTES)
                    if not rest:
                        return b""
                self._stream, self._rest = lzma.LZMADecompressor(lzma.FORMAT_XZ, LZMA_MEMORY_BYTES), rest
            elif self._stream.needs_input:
                self._rest = self._file.read(READ_BYTES)
                if not self._rest:
                    raise EOFError("the stream ends early")
            data, self._rest = self._stream.decompress(self._rest, count), b""
            if data:
                return data


def _read(raw, count: int, path: Path, given: int) -> bytes:
    try:
        return raw.read(count)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, given, error) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("zstandard", "zstd"):
            raise
        raise _damaged(path, given, error) from None


def _damaged(path: Path, given: int, error: Exception) -> ImageError:
    said = " ".join(str(error).split())[:120]
    return ImageError(f"{path} is truncated or damaged after {given} bytes ({said}): get it again")


def look(path: Path, most_bytes: int | None = None, progress: Progress | None = None) -> ImageSource:
    """What kind of image `path` is and how many raw bytes it has. `most_bytes`: what the largest card holds.

    Raises: ImageError; ImageTooLarge, where reading through can stop as soon as it is more than that; ProgramError for a .zst that
    nothing here unpacks.
    """
    with _plain(path) as file:
        size, changed_ns = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_mtime_ns
        first = file.read(16)
        for magic, what in OTHER_MAGIC.items():
            if first.startswith(magic):
                raise ImageError(f"{path} is {what} first")
        kind = next((kind for magic, kind in MAGIC.items() if first.startswith(magic)), RAW)
        if kind == RAW and path.suffix in ENDINGS:
            raise ImageError(f"{path} is named {path.suffix} but is not compressed so: get it again")
        count: int | None = size
        if kind == XZ:
            count = xz_bytes(file, size, path)
        elif kind == ZSTD:
            _zstandard()  # where it is missing, that is said before a card is touched
            count = zstd_bytes(file, size, path)
        if count is None or kind == GZIP:
            file.seek(0)
            count = _counted(path, _unpacked(kind, _Counted(file, progress, size)), most_bytes)
    if count == 0:
        raise ImageError(f"{path} is empty: get it again")
    if most_bytes is not None and count > most_bytes:
        raise ImageTooLarge(path, count, most_bytes)
    if count % SECTOR:
        raise ImageError(
            f"{path} has {count} raw bytes, no whole number of sectors of {SECTOR}: it is truncated or no disk image"
        )
    return ImageSource(path, kind, count, size, changed_ns)


def _counted(path: Path, raw, most_bytes: int | None) -> int:
    count = 0
    while data := _read(raw, READ_BYTES, path, count):
        count += len(data)
        if most_bytes is not None and count > most_bytes:
            raise ImageTooLarge(path, count, most_bytes, more=True)
    return count


@dataclass(frozen=True)
class Announced:
    """A sha256 that an image must have: of the file as it lies there, of its raw bytes, or (of_raw None) of either."""

    sha256: str
    of_raw: bool | None


def announced(source: ImageSource, given: str | None = None) -> Announced | None:
    """What `given` says, or IMAGE.sha256 if that is there.

    Raises: ImageError for a text that is none, or a file that speaks of other files only.
    """
    if given is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", given):
            raise ImageError(f"{given[:80]!r} is no sha256: give 64 hex digits")
        return Announced(given.lower(), None)
    sidecar = source.path.with_name(source.path.name + ".sha256")
    if not sidecar.exists():
        return None
    of_raw = {"": None, source.raw_name: True, source.path.name: False}
    found = set()
    for line in read_small(sidecar, MAX_SIDECAR_BYTES).decode(errors="replace").splitlines():
        match = _DIGEST.fullmatch(line.strip())
        name = Path((match[2] or "").strip()).name if match else None
        if name in of_raw:
            found.add(Announced(match[1].lower(), of_raw[name]))
    own = {each for each in found if each.of_raw is not True} or found
    if len(own) != 1:
        raise ImageError(f"{sidecar} has {len(own)} checksums for {source.path.name}: one is needed (or --sha256)")
    return own.pop()
