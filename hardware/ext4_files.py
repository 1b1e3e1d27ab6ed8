"""Files in an ext4 file system inside a disk image, by debugfs: what is there, read, check. No mounting, no root.

debugfs ends with status 0 whatever its commands did, and after a `cd` that failed it goes on in the folder before: so every path is
resolved first (symbolic links too), and anything that it says on standard error fails the whole batch.
Leaves out: writing (ext4_write.py).
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from hardware.partitions import open_image
from hardware.program import ProgramError, address, run

MAX_READ_BYTES = 64 * 1024 * 1024
MAX_LINKS = 40
"""As the kernel: a path with more symbolic links is a loop."""
_NEEDS_RECOVERY = 0x4
_64BIT = 0x80


class Ext4Error(ValueError):
    """A file system cannot be used or is damaged, or a path in it is not what it must be; the text names it."""


@dataclass(frozen=True)
class Ext4:
    """The ext4 file system that begins at `offset_bytes` of `image`, as its superblock describes it."""

    image: Path
    offset_bytes: int
    size_bytes: int
    block_bytes: int
    free_blocks: int
    free_inodes: int
    label: str
    needs_recovery: bool


@dataclass(frozen=True)
class Entry:
    """What is at a path: `mode` is the permission bits, `target` where a symbolic link points."""

    kind: Literal["regular", "directory", "symlink", "other"]
    mode: int
    uid: int
    gid: int
    size_bytes: int
    target: str = ""


def open_ext4(image: Path, offset_bytes: int, size_bytes: int) -> Ext4 | None:
    """The ext2, 3 or 4 file system in these bytes of `image`, None when there is none.  Raises: Ext4Error, OSError."""
    with open_image(image)[0] as file:
        block = os.pread(file.fileno(), 1024, offset_bytes + 1024)
    if len(block) < 1024 or block[56:58] != b"\x53\xef":
        return None
    inodes, blocks, _, free_blocks, free_inodes, _, log_block = struct.unpack_from("<7I", block)
    incompatible = struct.unpack_from("<I", block, 96)[0]
    if incompatible & _64BIT:
        blocks |= struct.unpack_from("<I", block, 0x150)[0] << 32
        free_blocks |= struct.unpack_from("<I", block, 0x158)[0] << 32
    if log_block > 6 or free_blocks > blocks or free_inodes > inodes:
        raise Ext4Error(f"{image}: the superblock at byte {offset_bytes + 1024} is damaged: take the image anew")
    block_bytes = 1024 << log_block
    if blocks * block_bytes > size_bytes:
        raise Ext4Error(
            f"{image}: the ext4 file system at byte {offset_bytes} says it has {blocks * block_bytes} bytes, its partition has {size_bytes}"
        )
    label = block[120:136].split(b"\0")[0].decode("utf-8", "replace")
    recovery = bool(incompatible & _NEEDS_RECOVERY)
    return Ext4(image, offset_bytes, size_bytes, block_bytes, free_blocks, free_inodes, label, recovery)


def check(system: Ext4) -> None:
    """Raises: Ext4Error with what `e2fsck -fn` found wrong; ProgramError."""
    if system.needs_recovery:
        raise Ext4Error(
            f"the ext4 of {system.image.name} was not unmounted cleanly: run e2fsck -fy on a copy, then try again"
        )
    where = address(system.image, system.offset_bytes, "?offset=")
    status, out, err = run(["e2fsck", "-fn", where], cwd=system.image.parent, ok=range(256))
    if status:
        lines = [line.strip() for line in (out.decode("utf-8", "replace") + err).splitlines() if line.strip()]
        found = [line for line in lines if not re.match(r"e2fsck |Pass \d|.*WARNING|.*\d+/\d+ files", line)]
        raise Ext4Error(f"e2fsck finds the ext4 of the image damaged (status {status}): {' '.join(found[:3])[:300]}")


def entries(system: Ext4, paths: Iterable[str]) -> dict[str, Entry | None]:
    """What is at each absolute path, None for nothing. A link at the end of a path is not followed, one within it is."""
    wanted = list(dict.fromkeys(paths))
    out, err = debugfs(system, [f"stat {quoted(path)}" for path in wanted])
    strange = [line for line in err if "File not found" not in line and "is not a directory" not in line]
    if strange:
        raise Ext4Error(f"debugfs cannot read the image: {strange[0][:200]}")
    found: dict[str, Entry | None] = dict.fromkeys(wanted)
    # each command is echoed, and what it prints follows
    pieces = re.split(r"^debugfs: stat .*$", out.decode("utf-8", "replace"), flags=re.MULTILINE)[1:]
    if len(pieces) != len(wanted):
        raise Ext4Error("debugfs answers other than it was asked: the image is damaged")
    for path, text in zip(wanted, pieces):
        facts = re.search(r"Inode: \d+ +Type: (\S+) +Mode: +(\d+)", text)
        if facts is None:
            continue
        user, group, size = re.search(r"User: +(\d+) +Group: +(\d+).*Size: (\d+)", text).groups()
        target = re.search(r'^Fast link dest: "(.*)"$', text, re.MULTILINE)
        kind = facts[1] if facts[1] in ("regular", "directory", "symlink") else "other"
        found[path] = Entry(kind, int(facts[2], 8), int(user), int(group), int(size), target[1] if target else "")
    return found


def resolve(system: Ext4, paths: Iterable[str]) -> dict[str, str]:
    """Each absolute path with the symbolic links in it followed, also at its end; what is not there yet stays as it is."""
    return {path: real for path, (real, _) in _followed(system, paths).items()}


def _followed(system: Ext4, paths: Iterable[str]) -> dict[str, tuple[str, Entry | None]]:
    """As resolve(), with what is there."""
    known: dict[str, Entry | None] = {"/": Entry("directory", 0o755, 0, 0, 0)}
    goals = {path: (PurePosixPath("/"), list(PurePosixPath(path).parts[1:]), 0) for path in paths}
    done: dict[str, tuple[str, Entry | None]] = {}
    while goals:
        # the whole of each path at once: but for links, one run of debugfs is enough
        asked = {str(here.joinpath(*rest[: end + 1])) for here, rest, _ in goals.values() for end in range(len(rest))}
        asked = {path for path in asked if "/../" not in f"{path}/"} - set(known)
        if asked:
            known |= entries(system, sorted(asked))
        following = {}
        for path, (here, rest, links) in goals.items():
            while rest:
                step, left = rest[0], rest[1:]
                if step == "..":
                    here, rest = here.parent, left
                    continue
                there = here / step
                if str(there) not in known:
                    break
                entry = known[str(there)]
                if entry is None:  # nothing there, so nothing below
                    here, rest = there.joinpath(*left), []
                elif entry.kind == "symlink":
                    links += 1
                    if links > MAX_LINKS or not entry.target:
                        raise Ext4Error(f"{path} in the image is a symbolic link that leads nowhere")
                    target = PurePosixPath(entry.target)
                    here = PurePosixPath("/") if target.is_absolute() else here
                    rest = [part for part in target.parts if part != "/"] + left
                else:
                    here, rest = there, left
            if rest:
                following[path] = (here, rest, links)
            else:
                done[path] = (str(here), known.get(str(here)))
        goals = following
    return done


def read(system: Ext4, path: str, max_bytes: int = MAX_READ_BYTES) -> bytes | None:
    """A regular file's bytes, links followed; None when there is none.  Raises: Ext4Error when it is too long or cannot be read."""
    real, entry = _followed(system, [path])[path]
    if entry is None or entry.kind != "regular":
        return None
    if entry.size_bytes > max_bytes:
        raise Ext4Error(f"{path} in the image has {entry.size_bytes} bytes, more than {max_bytes}: refused")
    with tempfile.TemporaryDirectory(dir=system.image.parent) as folder:
        copy = Path(folder).absolute() / "file"
        _, err = debugfs(system, [f"dump {quoted(real)} {quoted(str(copy))}"])
        if err or not copy.is_file():
            raise Ext4Error(f"{path} in the image cannot be read: {(err or ['nothing came'])[0][:200]}")
        return copy.read_bytes()


def names(system: Ext4, folder: str) -> tuple[str, ...]:
    """What is in a folder of the image, without . and ..; empty when there is no such folder."""
    real, entry = _followed(system, [folder])[folder]
    if entry is None or entry.kind != "directory":
        return ()
    out, _ = debugfs(system, [f"ls -p {quoted(real)}"])
    rows = (line.split("/") for line in out.decode("utf-8", "replace").splitlines() if line.startswith("/"))
    return tuple(row[5] for row in rows if len(row) > 6 and row[5] not in (".", "..", ""))


def quoted(text: str) -> str:
    """A word of a debugfs command.  Raises: Ext4Error for what its reader would take apart."""
    if '"' in text or not text.isprintable() or len(text) > 2000:
        raise Ext4Error(f"{text[:100]!r} cannot be named in the image: it has a quote or a control character")
    return f'"{text}"'


def debugfs(system: Ext4, commands: Sequence[str], write: bool = False) -> tuple[bytes, list[str]]:
    """Runs commands; what they print, and the lines on standard error without debugfs's greeting."""
    if not commands:
        return b"", []
    where = address(system.image, system.offset_bytes, "?offset=")
    argv = ["debugfs", *(["-w"] if write else []), "-f", "-", where]
    status, out, err = run(argv, cwd=system.image.parent, send=("\n".join(commands) + "\n").encode(), ok=range(256))
    lines = [line.strip() for line in err.splitlines() if line.strip() and not re.match(r"debugfs \d", line)]
    if status:
        raise ProgramError(f"debugfs failed (status {status}): {' '.join(lines[:2])[:300]}")
    return out, lines
