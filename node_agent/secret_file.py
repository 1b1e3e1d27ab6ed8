"""Small files that hold secrets: read with bounds, written whole with their mode from the first byte on, overwritten before they go.

Overwriting reaches the same blocks on FAT and ext4; a card's controller may still keep an old copy, which no file system can
reach: what is wiped here is also worthless by then (a used token). Leaves out: what is in them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from node_agent.shard import PARTIAL_SUFFIX

SECRET, SHARED, PUBLIC = 0o600, 0o640, 0o644


def read(path: Path, max_bytes: int) -> bytes:
    """The bytes of a plain file of `max_bytes` at most.  Raises: FileNotFoundError, OSError whose text names the file."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is no plain file: put the file itself there")
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise OSError(f"{path} is over {max_bytes} bytes: not a file of ours")
    return raw


def sync_folder(folder: Path) -> None:
    """What was made, renamed or removed in `folder` lasts through a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, data: bytes, mode: int = SECRET) -> None:
    """Puts a file under `path`, whole or not at all, also after a power cut; nobody beyond `mode` reads it meanwhile."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode & 0o600)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(handle, mode)  # whatever the umask is
            os.fsync(handle)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def wipe(path: Path) -> None:
    """Overwrites a file with zeros, then removes it; each step is on the disk before the next. Nothing to do where there is none."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with open(handle, "wb", buffering=0) as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no plain file: remove it by hand")
        left = status.st_size
        while left > 0:
            left -= file.write(bytes(min(left, 65_536)))
        os.fsync(handle)
    path.unlink()
    sync_folder(path.parent)
