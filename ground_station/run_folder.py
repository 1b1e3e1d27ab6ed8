"""Temporary folders of this program: each says whose it is, and goes with its process or, after kill -9, when the next one starts.

An abandoned folder is removed only where everything fits: its name is one of ours, it is a real folder of our own user below the
temporary folder, and the process that its owner file names (by number and start, since numbers come again) is gone on this machine.
What another machine or container made is not judged. Links are never followed. Leaves out: folders that a user named (--keep).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OWNER = "owner.json"
MAX_OWNER_BYTES = 1024
NAME_PATTERN = re.compile(r"spacemoe-(demo|calibrate|benchmark|synthetic)-[a-z0-9_]{8}")  # mkdtemp's eight characters


@contextmanager
def run_folder(what: str) -> Iterator[Path]:
    """A temporary folder spacemoe-`what`-..., removed at the end. Removes abandoned ones before, and says so on stderr.

    `what`: one of NAME_PATTERN's.  Raises: OSError.
    """
    if gone := sweep():
        print(
            f"spacemoe: removed what {len(gone)} killed run(s) had left: {', '.join(map(str, gone[:4]))}",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory(prefix=f"spacemoe-{what}-") as folder:
        (Path(folder) / OWNER).write_text(json.dumps(_owner(os.getpid())))
        yield Path(folder)


def sweep() -> list[Path]:
    """Removes abandoned folders; which ones. One that cannot be removed now stays for the next time."""
    try:
        with os.scandir(tempfile.gettempdir()) as entries:
            ours = [Path(entry.path) for entry in entries if NAME_PATTERN.fullmatch(entry.name) and _is_ours(entry)]
    except OSError:  # a folder that may be written to and not be listed
        return []
    return [folder for folder in sorted(ours) if _abandoned(folder) and _removed(folder)]


def _is_ours(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    except OSError:  # it went meanwhile
        return False


def _owner(pid: int) -> dict[str, object]:
    """What tells a process from every other one."""
    return {
        "pid": pid,
        "start_ticks": _start_ticks(pid),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid_namespace": os.stat("/proc/self/ns/pid").st_ino,
        "machine": os.uname().nodename,
    }


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None where there is none.  Source: proc_pid_stat(5), field 22."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _abandoned(folder: Path) -> bool:
    """Whether the owner file says whose it was, and that one is gone."""
    try:
        descriptor = os.open(folder / OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            there = os.fstat(descriptor)
            if not stat.S_ISREG(there.st_mode) or there.st_uid != os.geteuid():
                return False
            owner = json.loads(os.read(descriptor, MAX_OWNER_BYTES))
        finally:
            os.close(descriptor)
    except (OSError, ValueError, RecursionError):  # none: being made just now, or not made by us
        return False
    if not isinstance(owner, dict) or type(owner.get("pid")) is not int or type(owner.get("start_ticks")) is not int:
        return False
    now = _owner(owner["pid"])
    if owner.get("machine") != now["machine"]:
        return False
    if owner.get("boot") != now["boot"]:
        return isinstance(owner.get("boot"), str)
    return owner.get("pid_namespace") == now["pid_namespace"] and owner["start_ticks"] != now["start_ticks"]


def _removed(folder: Path) -> bool:
    """The owner file goes last: what is cut short is still known as abandoned."""
    try:
        for entry in os.scandir(folder):
            if entry.name == OWNER:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        os.unlink(folder / OWNER)
        os.rmdir(folder)
    except OSError:
        return False
    return True
