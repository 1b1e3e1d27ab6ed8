"""Files on a FAT partition inside a disk image, by mtools: list, read, put, remove, free space, check. No mounting, no root.

Leaves out: making a FAT file system, and FAT12 (no board's boot partition has it).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hardware.partitions import open_image
from hardware.program import ProgramError, address, run
from hardware.sparse_copy import data_pieces

MAX_READ_BYTES = 16 * 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9._+-]{1,255}")


class FatError(ValueError):
    """A FAT file system or a path on it cannot be used; the text names it."""


@dataclass(frozen=True)
class Fat:
    """The FAT file system that begins at `offset_bytes` of `image`, as its boot sector describes it."""

    image: Path
    offset_bytes: int
    size_bytes: int
    label: str
    cluster_bytes: int

    def entries(self, folder: str = "/") -> tuple[str, ...]:
        """Absolute paths in a folder; those of folders end in "/".  Raises: FatError, ProgramError."""
        _, out, _ = self._mtool("mdir", "-b", "-a", self._name(folder))
        return tuple(line.removeprefix("::") for line in out.decode("utf-8", "replace").splitlines() if line)

    def has(self, path: str) -> bool:
        """Whether there is such a file or folder; FAT's names have no case."""
        folder, _, name = path.rpartition("/")
        parent = folder or "/"
        if parent != "/" and not self.has(parent):
            return False
        return name.lower() in {entry.rstrip("/").rpartition("/")[2].lower() for entry in self.entries(parent)}

    def read(self, path: str, max_bytes: int = MAX_READ_BYTES) -> bytes | None:
        """The file's bytes, None when it is not there.  Raises: FatError when it is longer than `max_bytes`."""
        if not self.has(path):
            return None
        try:
            return self._mtool("mcopy", self._name(path), "-", max_bytes=max_bytes)[1]
        except ProgramError as error:
            raise FatError(f"{path} on the FAT partition cannot be read: {error}") from None

    def free_bytes(self) -> int:
        """Bytes in free clusters.  Raises: FatError, ProgramError."""
        _, out, _ = self._mtool("mdir", "-a", "::/")
        found = re.search(r"([\d ]+) bytes free", out.decode("utf-8", "replace"))
        if found is None:
            raise FatError(f"mtools does not say how much of the FAT partition of {self.image.name} is free")
        return int(found[1].replace(" ", ""))

    def needed_bytes(self, files: Mapping[str, bytes]) -> int:
        """What `files` take at most: whole clusters, with one for each folder and for the directory entries."""
        whole = sum(-(-max(len(data), 1) // self.cluster_bytes) for data in files.values())
        folders = {folder for path in files for folder in _folders(path)}
        return (whole + 2 * len(folders) + 2) * self.cluster_bytes

    def put(self, files: Mapping[str, bytes]) -> None:
        """Writes files, replacing those that are there and making their folders.  Raises: FatError, ProgramError."""
        for path in files:
            if not path.startswith("/") or not all(_NAME.fullmatch(part) for part in path[1:].split("/")):
                raise FatError(f"{path!r} is no plain absolute path for a FAT partition")
        for folder in sorted({folder for path in files for folder in _folders(path)}):
            if not self.has(folder):
                self._mtool("mmd", self._name(folder))
        for path, data in files.items():
            try:
                self._mtool("mcopy", "-o", "-", self._name(path), send=data)
            except ProgramError as error:
                raise FatError(f"{path} ({len(data)} bytes) cannot be put on the FAT partition: {error}") from None

    def remove(self, path: str) -> None:
        """Removes one file.  Raises: ProgramError when it is not there."""
        self._mtool("mdel", self._name(path))

    def findings(self) -> tuple[str, ...]:
        """What `fsck.vfat -n` finds wrong, line by line; it cannot read inside an image, so a sparse copy is looked at."""
        with tempfile.TemporaryDirectory(dir=self.image.parent) as folder:
            copy = Path(folder) / "fat"
            with open_image(self.image)[0] as source, open(copy, "wb") as target:
                target.truncate(self.size_bytes)
                for begin, data in data_pieces(source.fileno(), self.offset_bytes, self.size_bytes):
                    target.seek(begin)
                    target.write(data)
            status, out, err = run(["fsck.vfat", "-n", "./fat"], cwd=Path(folder), ok=(0, 1, 2))
            if status == 0:
                return ()
            lines = [*out.decode("utf-8", "replace").splitlines(), *err.splitlines()]
            # its greeting and its last line (counts of files and clusters) are no findings
            return tuple(
                line.strip()
                for line in lines
                if line.strip() and not re.match(r"fsck\.fat |.*\d+ files, \d+/\d+ clusters|Leaving ", line)
            )

    def _name(self, path: str) -> str:
        return "::" + path

    def _mtool(self, name: str, *args: str, send: bytes = b"", max_bytes: int = MAX_READ_BYTES):
        where = address(self.image, self.offset_bytes, "@@")
        return run([name, "-i", where, *args], cwd=self.image.parent, send=send, max_bytes=max_bytes)


def open_fat(image: Path, offset_bytes: int, size_bytes: int) -> Fat | None:
    """The FAT16 or FAT32 file system in these bytes of `image`, None when there is none.  Raises: FatError, OSError."""
    with open_image(image)[0] as file:
        sector = os.pread(file.fileno(), 512, offset_bytes)
    if len(sector) < 512 or sector[510:] != b"\x55\xaa":
        return None
    if sector[82:90] == b"FAT32   ":
        label = sector[71:82]
    elif sector[54:62] == b"FAT16   ":
        label = sector[43:54]
    else:
        return None
    width, per_cluster = int.from_bytes(sector[11:13], "little"), sector[13]
    count = int.from_bytes(sector[19:21], "little") or int.from_bytes(sector[32:36], "little")
    if width not in (512, 1024, 2048, 4096) or per_cluster not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise FatError(f"{image}: the FAT partition at byte {offset_bytes} is damaged: sectors of {width} bytes")
    if count * width > size_bytes:
        raise FatError(
            f"{image}: the FAT file system at byte {offset_bytes} says it has {count * width} bytes, its partition has {size_bytes}"
        )
    text = label.decode("ascii", "replace").strip()
    return Fat(image, offset_bytes, size_bytes, text, width * per_cluster)


def _folders(path: str) -> list[str]:
    parts = path.strip("/").split("/")[:-1]
    return ["/" + "/".join(parts[: index + 1]) for index in range(len(parts))]
