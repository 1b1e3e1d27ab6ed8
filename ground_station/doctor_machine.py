"""The doctor's look at the machine: Python, packages, mosquitto, disk, memory, open files. Each function yields its checks.

Leaves out temperature and throttling: they are telemetry, with limits of their own.
"""

from __future__ import annotations

import os
import re
import resource
import secrets
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil

from ground_station.doctor import Check

DISTRIBUTION = "spacemoe-kit"
EXTRAS = ("ground",)  # what a ground station needs beside the base
MIN_PYTHON = (3, 10)
MIN_MOSQUITTO = (2, 0)  # the first with MQTT 5 as the fleet's configuration uses it
MIN_FREE_BYTES = 1_000_000_000  # an archive of 8 nodes takes some 100 MB a day, and a run folder as much
MIN_FREE_FILES = 1000
MIN_MEMORY_BYTES = 500_000_000
MIN_OPEN_FILES = 1024  # 200 nodes, 64 pages and 512 connections of a web server
PROBE_BYTES = 4096
_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")


def root() -> Path:
    """The folder that holds the rooms: a clone's, or site-packages."""
    return Path(__file__).resolve().parents[1]


def is_clone() -> bool:
    return (root() / "pyproject.toml").is_file()


def install_command() -> str:
    if is_clone():
        return f"cd {root()} && {sys.executable} -m pip install -c constraints.txt -e '.[all]'"
    return f"{sys.executable} -m pip install 'spacemoe-kit[all]'"


def python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= MIN_PYTHON
    need = ".".join(map(str, MIN_PYTHON))
    yield Check(
        "python",
        ok,
        f"Python {version}" + ("" if ok else f", {need} is needed"),
        "" if ok else "apt-get install python3",
    )


def packages() -> Iterator[Check]:
    """What the distribution asks for is installed, in a version of its ranges; others than those tested together are told."""
    try:
        asked = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        text = f"{DISTRIBUTION} is not installed here: its packages are not known"
        yield Check("packages", False, text, install_command())
        return
    tested = constraints(root() / "constraints.txt")
    wrong, other, count = [], [], 0
    for line in asked:
        if (name := wanted(line)) is None:
            continue
        count += 1
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if not satisfies(line, have):
            wrong.append(f"{name} is {have}, not {line.partition(';')[0].strip().removeprefix(name)}")
        elif name.lower() in tested and have not in tested[name.lower()]:
            other.append(f"{name} {have}")
    text = "; ".join(wrong) if wrong else f"{count} packages are there"
    if other:
        text += f"; other versions than those tested together: {', '.join(other)}"
    yield Check("packages", not wrong, text, install_command() if wrong else "")


def wanted(line: str) -> str | None:
    """The package that a line of the distribution's requirements asks for here; None: it is of another extra or Python."""
    found = _NAME.match(line)
    if found is None:
        return None
    name, marker = found[1], line.partition(";")[2]
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # it comes with an extra
        extra = re.search(r'extra\s*==\s*["\']([a-z-]+)["\']', marker)
        other = marker.strip() and extra is None  # a Python or a platform: tomli alone, which Python 3.11 has itself
        return None if other or (extra and extra[1] not in EXTRAS) else name
    requirement = Requirement(line)
    if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS)):
        return None if requirement.name == DISTRIBUTION else requirement.name
    return None


def satisfies(line: str, have: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return True  # that it is there is all that can be said
    return Requirement(line).specifier.contains(have, prereleases=True)


def constraints(path: Path) -> dict[str, set[str]]:
    """Versions by package; more than one where they differ by Python. Empty where there is no such file."""
    try:
        lines = path.read_text(errors="replace")[:200_000].splitlines()
    except OSError:
        return {}
    found: dict[str, set[str]] = {}
    for line in lines:
        name, equal, version = line.partition(";")[0].partition("==")
        if equal and not line.startswith("#"):
            found.setdefault(name.strip().lower(), set()).add(version.strip())
    return found


def mosquitto(fleet: bool) -> Iterator[Check]:
    """`fleet`: one is meant, for which the embedded broker will not do."""
    from ground_station.broker import find_mosquitto

    fix = "sudo apt-get install mosquitto"
    program = find_mosquitto()
    if program is None:
        other = "" if fleet else "; without it `spacemoe demo` takes the embedded broker, and a fleet has none"
        yield Check("mosquitto", False, f"mosquitto is not installed{other}", fix)
        return
    try:
        said = subprocess.run([program, "-h"], capture_output=True, text=True, errors="replace", timeout=10).stdout[
            :4000
        ]
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Check(
            "mosquitto", False, f"{program} does not run ({error})", "sudo apt-get install --reinstall mosquitto"
        )
        return
    found = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", said)
    if found is None or (int(found[1]), int(found[2])) < MIN_MOSQUITTO:
        version = found[0] if found else "no version"
        need = ".".join(map(str, MIN_MOSQUITTO))
        yield Check("mosquitto", False, f"{program} says {version}; {need} or newer is needed", fix)
        return
    yield Check("mosquitto", True, f"{program}, {found[0]}")


def disk(state: Path) -> Iterator[Check]:
    """Room where a run writes, and that it can be written: a file of 4 KB is made, flushed and removed."""
    folder = state.absolute()
    while not folder.is_dir() and folder != folder.parent:  # it is made when it is needed
        folder = folder.parent
    room = os.statvfs(folder)
    free_bytes, free_files = room.f_bavail * room.f_frsize, room.f_favail
    clear = f"du -xh --max-depth=2 {mount_of(folder)} | sort -h | tail -20"
    probe = folder / f".spacemoe-doctor-{secrets.token_hex(4)}"
    try:
        handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, bytes(PROBE_BYTES))
            os.fsync(handle)
        finally:
            os.close(handle)
            os.unlink(probe)
    except PermissionError:
        yield Check("disk", False, f"{folder} may not be written by this user", f"sudo chown -R $USER {folder}")
        return
    except OSError as error:
        yield Check(
            "disk",
            False,
            f"{folder} cannot be written: {error.strerror}",
            f"{clear}   # then remove what is not needed",
        )
        return
    few = 0 < room.f_files and free_files < MIN_FREE_FILES
    ok = free_bytes >= MIN_FREE_BYTES and not few
    text = f"{folder} has {free_bytes / 1e9:.1f} GB free"
    if few:
        text += f" and room for {free_files} more files"
    if not ok:
        text += f"; {MIN_FREE_BYTES / 1e9:.0f} GB are needed"
    yield Check("disk", ok, text, "" if ok else f"{clear}   # then remove what is not needed")


def mount_of(folder: Path) -> Path:
    place = folder.resolve()
    while not os.path.ismount(place) and place != place.parent:
        place = place.parent
    return place


def memory() -> Iterator[Check]:
    free = psutil.virtual_memory().available
    ok = free >= MIN_MEMORY_BYTES
    text = f"{free / 1e9:.1f} GB of memory are free" + ("" if ok else f"; {MIN_MEMORY_BYTES / 1e9:.1f} GB are needed")
    yield Check(
        "memory", ok, text, "" if ok else "ps -eo rss,pid,args --sort=-rss | head   # then end what is not needed"
    )


def open_files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    text = f"{'any number of' if soft == resource.RLIM_INFINITY else soft} files may be open"
    fix = ""
    if not ok:
        text += f"; {MIN_OPEN_FILES} are needed"
        high = hard == resource.RLIM_INFINITY or hard >= MIN_OPEN_FILES
        fix = f"ulimit -n {MIN_OPEN_FILES}" if high else f"sudo prlimit --nofile={MIN_OPEN_FILES} --pid $$"
    yield Check("open_files", ok, text, fix)
