"""Writes files, folders and links into an ext4 file system inside a disk image by debugfs, and reads them back by their sha256.

debugfs does not replace: what is there is removed first. Works on copies only: a failed batch leaves damage.
Leaves out: extended attributes, hard links, making or growing a file system.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hardware.ext4_files import Ext4, Ext4Error, debugfs, entries, quoted, resolve


@dataclass(frozen=True)
class Folder:
    path: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class File:
    """`source` is the file on this machine whose bytes are put at `path`."""

    path: str
    source: Path
    mode: int = 0o644
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class Link:
    path: str
    target: str


Item = Folder | File | Link


def needed_bytes(system: Ext4, items: Sequence[Item]) -> int:
    """Bytes of whole blocks that `items` take at most: their data, and folders with an entry for each of them."""
    block = system.block_bytes
    blocks = 0
    for item in items:
        size = item.source.stat().st_size if isinstance(item, File) else block if isinstance(item, Folder) else 1
        blocks += -(-size // block)
    # 8 bytes and its name for each entry of a folder, half-empty blocks after splits, one block of extents per 340 MB and file
    in_folders = sum(2 * (12 + len(PurePosixPath(item.path).name.encode())) for item in items)
    return (blocks + -(-in_folders // block) + 16) * block


def write(system: Ext4, items: Sequence[Item], mtime_utc_s: int) -> tuple[Item, ...]:
    """Writes `items`, replacing files and links that are there; the folders above them are made as 0755 root where they lack.

    Returns the items with their paths resolved, every made folder among them, for `verify`.
    Raises: Ext4Error when something that is no file is in the way or debugfs complains; ProgramError. The image is damaged then.
    """
    parents = {str(PurePosixPath(item.path).parent) for item in items} | {
        i.path for i in items if isinstance(i, Folder)
    }
    above = {str(up) for path in parents for up in [PurePosixPath(path), *PurePosixPath(path).parents]}
    real = resolve(system, sorted(above))
    placed: dict[str, Item] = {}
    for path in above:
        if real[path] != "/":
            placed[real[path]] = Folder(real[path])
    asked = set()
    for item in items:
        path = PurePosixPath(item.path)
        there = real[item.path] if isinstance(item, Folder) else str(PurePosixPath(real[str(path.parent)]) / path.name)
        placed[there] = _moved(item, there)
        asked.add(there)
    found = entries(system, sorted(placed))
    commands, written = [], []
    stamp = f"@{mtime_utc_s}"
    for path in sorted(placed, key=lambda path: (path.count("/"), path)):
        item, entry = placed[path], found[path]
        if isinstance(item, Folder):
            if entry is not None and entry.kind != "directory":
                raise Ext4Error(f"{path} in the image is no folder, but one is needed there")
            if entry is None:
                commands += [f"mkdir {quoted(path)}", *_fields(path, 0o040000, item, stamp)]
                written.append(item)
            continue
        if entry is not None:
            if entry.kind not in ("regular", "symlink"):
                raise Ext4Error(f"{path} in the image is no file: it is not replaced")
            commands.append(f"rm {quoted(path)}")
        if isinstance(item, Link):
            commands.append(f"symlink {quoted(path)} {quoted(item.target)}")
        else:
            folder, name = os.path.split(path)
            commands += [f"cd {quoted(folder)}", f"write {quoted(str(item.source.absolute()))} {quoted(name)}"]
            commands += _fields(path, 0o100000, item, stamp)
        written.append(item)
    _, err = debugfs(system, commands, write=True)
    if err:
        raise Ext4Error(f"debugfs could not write into the image: {err[0][:200]}")
    return tuple(written)


def verify(system: Ext4, items: Sequence[Item]) -> None:
    """Reads every item back: kind, mode, owner, target, and the sha256 of each file.  Raises: Ext4Error naming the first that differs."""
    found = entries(system, [item.path for item in items])
    for item in items:
        entry = found[item.path]
        kind = {Folder: "directory", File: "regular", Link: "symlink"}[type(item)]
        good = entry is not None and entry.kind == kind
        if good and isinstance(item, Link):
            # of a target of 60 bytes and more debugfs shows nothing: its length is compared
            good = entry.target == item.target if entry.target else entry.size_bytes == len(item.target.encode())
        elif good:
            good = (entry.mode, entry.uid, entry.gid) == (item.mode, item.uid, item.gid)
        if not good:
            raise Ext4Error(f"{item.path} in the image is not what was written: {entry}")
    files = [item for item in items if isinstance(item, File)]
    with tempfile.TemporaryDirectory(dir=system.image.parent) as folder:
        copies = [Path(folder).absolute() / str(index) for index in range(len(files))]
        _, err = debugfs(system, [f"dump {quoted(f.path)} {quoted(str(c))}" for f, c in zip(files, copies)])
        if err:
            raise Ext4Error(f"what was written cannot be read back: {err[0][:200]}")
        for item, copy in zip(files, copies):
            if not copy.is_file() or sha256_of(copy) != sha256_of(item.source):
                raise Ext4Error(f"{item.path} in the image reads back with another sha256 than it was written with")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _moved(item: Item, path: str) -> Item:
    if isinstance(item, Link):
        return Link(path, item.target)
    if isinstance(item, Folder):
        return Folder(path, item.mode, item.uid, item.gid)
    return File(path, item.source, item.mode, item.uid, item.gid)


def _fields(path: str, kind: int, item: Folder | File, stamp: str) -> list[str]:
    values = {"mode": f"0{kind | item.mode:o}", "uid": str(item.uid), "gid": str(item.gid)}
    values |= {"mtime": stamp, "ctime": stamp, "atime": stamp}
    return [f"set_inode_field {quoted(path)} {name} {value}" for name, value in values.items()]
