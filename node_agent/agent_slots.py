"""The slots for updates of the agent, from inside a running one: a verified package goes into the free slot, and a trial proves itself.

Only an agent that the launcher started has slots. A package is a zip of a Python tree with `package.json` beside it; it is unpacked under
bounds, written to the disk for good, listed with the sha256 of every file, and only then does `state.json` name it as the next trial:
cut off anywhere before, the board starts what it started before. `Trial` calls the slot good once the agent has been healthy for a while
without a break, or ends the agent when that does not happen in time; the launcher does the rest.
Leaves out: who may sign a package (agent_update.py), which slot is started (launcher.py).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from node_agent import launcher
from node_agent.errors import AgentError
from node_agent.shard import atomic_file, sha256_of

log = logging.getLogger("node_agent.slots")

FORMAT = "spacemoe-agent-1"
PACKAGE = "package.json"
NEEDED = "node_agent/cli.py"
MAX_PACKAGE_BYTES = 512 * 1024 * 1024
MAX_TREE_BYTES = 1024 * 1024 * 1024
MAX_MEMBERS = 50_000
MAX_NOTE_BYTES = 64 * 1024
RESERVE_BYTES = 64 * 1024 * 1024
PIECE_BYTES = 1 << 20
MAX_POLL_S = 1.0
COMPILE_S = 900.0
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What zipfile raises for a damaged archive, a method or an encryption that it does not know.
ZIP_ERRORS = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)
_PART = re.compile(r"[A-Za-z0-9_.+@=,~-]{1,200}")


class PackageError(AgentError, ValueError):
    """A package is not one of ours or not for this board; nothing of it is started."""


class Slots:
    """The folder of slots as this process found it; its methods may be called from any thread."""

    def __init__(self, folder: Path, running: str):
        self.folder, self.running = folder, running
        self._lock = threading.Lock()

    @classmethod
    def found(cls, environment: Mapping[str, str] = os.environ) -> Slots | None:
        """None for an agent that the launcher did not start, or on a board without a folder for slots."""
        slot, folder = environment.get(launcher.SLOT_VARIABLE), environment.get(launcher.FOLDER_VARIABLE)
        if slot not in (*launcher.SLOTS, launcher.SHIPPED_WORD) or not folder:
            return None
        return cls(Path(folder), launcher.SHIPPED if slot == launcher.SHIPPED_WORD else slot)

    def state(self) -> launcher.State:
        return launcher.read_state(self.folder)

    @property
    def on_trial(self) -> bool:
        state = self.state()
        return bool(state.trial) and state.trial == self.running

    def is_good(self, package: str) -> bool:
        """Whether this process runs that package and it has proved good."""
        state = self.state()
        return self.running != launcher.SHIPPED and (state.current, state.package) == (self.running, package)

    # ------------------------------------------------------------ a new one

    def install(self, package: Path, sha256: str) -> str:
        """Unpacks a verified package into the free slot and makes it the next trial; the slot.

        Raises: PackageError, OSError; what was unpacked is not started then.
        """
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            state = self.state()
            slot = next(each for each in launcher.SLOTS if each not in (state.current, self.running))
            root = self.folder / slot
            if root.is_symlink() or root.is_file():
                root.unlink()
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            unpack(package, root)
            compile_tree(root)
            files = listed(root)
            with atomic_file(root / launcher.LIST) as out:
                out.write(json.dumps({"package": sha256, "files": files}).encode())
            os.sync()  # thousands of small files: one call instead of one for each; after it they are on the card
            wrong = launcher.damage(self.folder, slot, sha256)
            if wrong:
                raise OSError(f"what was unpacked cannot be read back ({wrong})")
            launcher.write_state(
                self.folder, replace(state, trial=slot, trial_package=sha256, tries_left=launcher.TRIES)
            )
        return slot

    # ------------------------------------------------------------ this one

    def mark_good(self) -> None:
        """From now on this slot is the one to start.  Raises: OSError."""
        with self._lock:
            state = self.state()
            if state.trial == self.running and state.trial:
                failed = tuple(each for each in state.failed if each != state.trial_package)
                launcher.write_state(
                    self.folder, launcher.State(current=state.trial, package=state.trial_package, failed=failed)
                )

    def mark_alive(self) -> None:
        """This process lives for longer than one that cannot: starts are counted from 0 again.  Raises: OSError."""
        with self._lock:
            state = self.state()
            if state.starts:
                launcher.write_state(self.folder, replace(state, starts=0))


def note_of(archive: zipfile.ZipFile) -> dict:
    """What package.json says, once it is for this board.  Raises: PackageError."""
    try:
        with archive.open(PACKAGE) as file:
            tree = json.loads(file.read(MAX_NOTE_BYTES))
        if tree["format"] != FORMAT:
            raise PackageError(f"the package is of format {str(tree['format'])[:40]!r}, not {FORMAT}")
        machine, python = str(tree["machine"])[:40], tuple(int(part) for part in tree["python"].split("."))
        abi = str(tree["abi"])[:40]
    except PackageError:
        raise
    except (KeyError, TypeError, AttributeError, *ZIP_ERRORS) as error:
        raise PackageError(f"the package has no readable {PACKAGE} ({str(error)[:100]})") from None
    here, mine = platform.machine(), f"{sys.implementation.name}{sys.version_info[0]}{sys.version_info[1]}"
    if machine not in ("any", here):
        raise PackageError(f"the package is for {machine}, this board is {here}")
    if abi not in ("any", mine):
        raise PackageError(f"the package is for {abi}, this board has {mine}")
    if python > sys.version_info[: len(python)]:
        raise PackageError(f"the package needs Python {tree['python']}, this board has {platform.python_version()}")
    return tree


def compile_tree(root: Path) -> None:
    """Python's compiled files, which nobody writes later; in a process of its own, so that requests are served meanwhile. A file that
    cannot be compiled is no reason to stop here: the trial will show it."""
    line = [sys.executable, "-I", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(root)]
    try:
        subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMPILE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("%s is not compiled (%s): it will start more slowly", root, error)


def listed(root: Path) -> list[tuple[str, int, str]]:
    """(path, bytes, sha256) of every file below a folder.  Raises: OSError."""
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return [(path.relative_to(root).as_posix(), path.stat().st_size, sha256_of(path)) for path in paths]


def unpack(package: Path, root: Path) -> None:
    """Writes a package's files below an empty folder, each as its checksum in the zip says.

    Raises: PackageError for what is no zip of plain files with plain names or too large, OSError.
    """
    try:
        with zipfile.ZipFile(package) as archive:
            _check_methods(archive)
            note_of(archive)
            members = [member for member in archive.infolist() if not member.is_dir()]
            _check(members, shutil.disk_usage(root).free)
            for member in members:
                _write(archive, member, root)
    except PackageError:
        raise
    except ZIP_ERRORS as error:
        raise PackageError(f"the package cannot be unpacked ({str(error)[:120]})") from None


def _check_methods(archive: zipfile.ZipFile) -> None:
    for member in archive.infolist():
        if member.compress_type not in METHODS or member.flag_bits & 1:
            raise PackageError(
                f"{member.filename[:80]!r} of the package is encrypted or packed in another way than deflate: make it by "
                "`spacemoe update --make`"
            )


def _check(members: list[zipfile.ZipInfo], free_bytes: int) -> None:
    names = [member.filename for member in members]
    total = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or total > MAX_TREE_BYTES:
        raise PackageError(f"the package has {len(members)} files of {total} bytes: too much")
    if total + RESERVE_BYTES > free_bytes:
        raise PackageError(f"{total} bytes are to be unpacked and {free_bytes} are free: free space on the disk")
    if NEEDED not in names or launcher.LIST in names or len({name.lower() for name in names}) != len(names):
        raise PackageError(f"the package lacks {NEEDED}, or has a file twice or one of the launcher's")
    for member in members:
        parts = member.filename.split("/")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if any(not _PART.fullmatch(part) or part in (".", "..") for part in parts) or len(member.filename) > 500:
            raise PackageError(f"the package has a file {member.filename[:80]!r}: names must be plain and inside")
        if kind not in (0, stat.S_IFREG) or member.flag_bits & 1:
            raise PackageError(f"{member.filename[:80]} of the package is no plain file")


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, root: Path) -> None:
    path = root / PurePosixPath(member.filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    left = member.file_size
    with archive.open(member) as source, open(path, "xb") as out:
        while piece := source.read(PIECE_BYTES):
            left -= len(piece)
            if left < 0:
                raise PackageError(f"{member.filename[:80]} of the package is larger than it says")
            out.write(piece)


# ------------------------------------------------------------ proving good


class Trial:
    """A thread that asks how this agent is. Use as a context manager around the time of service; without `slots` it does nothing.

    `healthy()`: whether it serves as it should now. `on_news(severity, text)`; `on_end(text)`: the agent is to end and be started again.
    """

    def __init__(
        self,
        slots: Slots | None,
        hold_s: float,
        deadline_s: float,
        healthy: Callable[[], bool],
        on_news: Callable[[str, str], None],
        on_end: Callable[[str], None],
    ):
        self._slots, self._hold_s, self._deadline_s = slots, hold_s, deadline_s
        self._healthy, self._on_news, self._on_end = healthy, on_news, on_end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)

    def __enter__(self) -> Trial:
        if self._slots is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        began_s = time.monotonic()
        since_s: float | None = None  # healthy without a break
        trial, alive = self._slots.on_trial, False
        if trial:
            self._on_news("info", f"a new agent is on trial in slot {self._slots.running}")
        elif self._slots.state().failed:
            log.info("the last update that did not become good: package %s", self._slots.state().failed[-1][:16])
        while trial or not alive:
            if self._stop.wait(min(MAX_POLL_S, self._hold_s / 4)):
                return
            now_s = time.monotonic()
            since_s = (now_s if since_s is None else since_s) if self._healthy() else None
            try:
                if not alive and now_s - began_s >= self._hold_s:
                    alive = True
                    self._slots.mark_alive()
                if trial and since_s is not None and now_s - since_s >= self._hold_s:
                    self._slots.mark_good()
                    trial = False
                    self._on_news("info", f"the new agent in slot {self._slots.running} is good: it stays")
            except OSError as error:
                log.warning("%s cannot be written (%s): trying again", self._slots.folder, error.strerror)
                alive = alive and not self._slots.state().starts
            if trial and now_s - began_s >= self._deadline_s:
                text = f"the new agent in slot {self._slots.running} was not healthy within {self._deadline_s:g} s: going back"
                self._on_news("critical", text)
                self._on_end(text)
                return
