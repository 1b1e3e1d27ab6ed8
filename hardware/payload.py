"""What is laid over a board's root file system: the agent, its wheels, its systemd units. The same tree serves every base image.

    opt/spacemoe/agent/        the kit's node_agent and the wheels for the board's Python: the agent of last resort
    usr/bin/node-agent         the launcher
    etc/systemd/system/        the units, enabled; etc/systemd/timesyncd.conf.d: no public time server
    usr/lib/{sysusers,tmpfiles}.d, usr/lib/spacemoe

Same inputs, same bytes: all times are one constant, names are sorted, owners are root. The tree is kept in the cache as a tar file
under the hash of its inputs.
Leaves out: the operating system, the network and what else only our own image has (image_root.py), and the board's identity, which
the provision pack brings.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Callable

from hardware import image_wheels
from hardware.image_wheels import Wheel
from node_agent.shard import atomic_file

RECIPE = 1
"""Raise it when this module makes another tree of the same inputs."""
MTIME_S = 1_577_836_800
"""Of every file (2020-01-01): the payload's bytes do not depend on when it was made."""
AGENT = "opt/spacemoe/agent"
UNITS = Path(__file__).resolve().parent / "units"
ENABLED = ("spacemoe-compile.service", "spacemoe-first-boot.service", "spacemoe-time.service", "spacemoe-agent.service")
FILES = {
    "node-agent": ("usr/bin/node-agent", 0o755),
    "time-server": ("usr/lib/spacemoe/time-server", 0o755),
    "timesyncd.conf": ("etc/systemd/timesyncd.conf.d/spacemoe.conf", 0o644),
    "sysusers.conf": ("usr/lib/sysusers.d/spacemoe.conf", 0o644),
    "tmpfiles.conf": ("usr/lib/tmpfiles.d/spacemoe.conf", 0o644),
} | {name: (f"etc/systemd/system/{name}", 0o644) for name in ENABLED}
# Parts of the wheels that a board never loads: 40 MB and thousands of files less.
_UNUSED_FOLDERS = ("tests", "include", "pyi_splash")
_UNUSED_ONNXRUNTIME = ("transformers", "tools", "quantization", "datasets", "backend")


class PayloadError(ValueError):
    """The payload cannot be made of what was given."""


@dataclass(frozen=True)
class Entry:
    """A file or symbolic link of the tree; owned by root."""

    path: str
    mode: int
    data: bytes = b""
    target: str = ""
    """Of a symbolic link; empty for a file."""


@dataclass(frozen=True)
class Payload:
    root: Path
    python: str
    key: str
    """SHA-256 of everything that the tree was made of."""
    tar: Path
    """The same tree as a tar file, in the cache."""
    wheels: tuple[Wheel, ...]
    kit_version: str
    files: int
    bytes: int


def build(out: Path, python: str, cache: Path, progress: Callable[[str], None]) -> Payload:
    """Makes the tree in `out`, a folder that is new or empty.

    Raises: PayloadError, image_wheels.WheelError, RuntimeError when pip fails, OSError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PayloadError(f"{out} is there already: name a new folder")
    tar, key, wheels = packed(python, cache, progress)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = size = 0
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                _extract(archive, member, partial)
                files, size = files + (not member.isdir()), size + member.size
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Payload(out, python, key, tar, wheels, kit_version(), files, size)


def packed(python: str, cache: Path, progress: Callable[[str], None]) -> tuple[Path, str, tuple[Wheel, ...]]:
    """The tree as a tar file in the cache, its key, and its wheels.  Raises: as build()."""
    paths = image_wheels.fetch(python, cache, progress)
    wheels = tuple(image_wheels.described(path) for path in paths)
    own = _own_files()
    key = _key(python, wheels, own)
    tar = cache / "payload" / f"{key}.tar"
    if not tar.is_file():
        progress(f"packing the agent and {len(wheels)} wheels for Python {python}")
        entries = _entries(paths, own)
        with atomic_file(tar) as file:
            write_tar(file, entries)
    return tar, key, wheels


def kit_version() -> str:
    """Of the kit that runs.  Raises: PayloadError."""
    try:
        return metadata.version("spacemoe-kit")
    except metadata.PackageNotFoundError:
        pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
        if pyproject.is_file():
            for line in pyproject.read_text().splitlines():
                if line.startswith("version = "):
                    return line.split('"')[1]
        raise PayloadError("the kit's version is not known here: pip install -e . in the clone") from None


def _own_files() -> dict[str, tuple[bytes, int]]:
    """node_agent as it runs here, with the least metadata that importlib.metadata wants."""
    import node_agent

    source = Path(node_agent.__file__).resolve().parent
    files = {}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if (
            path.is_file()
            and "__pycache__" not in relative.parts
            and path.suffix in (".py", ".json", ".toml", ".typed")
        ):
            files[f"node_agent/{relative.as_posix()}"] = (path.read_bytes(), 0o644)
    version = kit_version()
    text = "Metadata-Version: 2.1\nName: spacemoe-kit\n" + f"Version: {version}\nLicense: Apache-2.0\n"
    text += "".join(f"Requires-Dist: {each}\n" for each in image_wheels.BASE)
    info = f"spacemoe_kit-{version}.dist-info"
    files[f"{info}/METADATA"] = (text.encode(), 0o644)
    files[f"{info}/entry_points.txt"] = (b"[console_scripts]\nnode-agent = node_agent.cli:main\n", 0o644)
    return files


def _key(python: str, wheels: tuple[Wheel, ...], own: dict[str, tuple[bytes, int]]) -> str:
    digest = hashlib.sha256()
    parts = {name: hashlib.sha256(data).hexdigest() for name, (data, _) in own.items()}
    units = {name: hashlib.sha256((UNITS / name).read_bytes()).hexdigest() for name in FILES}
    what = [
        RECIPE,
        python,
        MTIME_S,
        [asdict(each) for each in wheels],
        parts,
        units,
        FILES,
        _UNUSED_FOLDERS,
        _UNUSED_ONNXRUNTIME,
    ]
    digest.update(json.dumps(what, sort_keys=True).encode())
    return digest.hexdigest()


def _wanted(name: str) -> bool:
    parts = name.split("/")
    if parts[0] == "onnxruntime" and len(parts) > 2 and parts[1] in _UNUSED_ONNXRUNTIME:
        return False
    if any(part in _UNUSED_FOLDERS for part in parts[:-1]) and not parts[0].endswith(".dist-info"):
        return False
    # the C interface's library is a second copy of the runtime: the Python module has it inside
    return not name.endswith((".pyi", ".a", ".pyx", ".pxd")) and not name.startswith(
        "onnxruntime/capi/libonnxruntime.so"
    )


def _entries(paths: list[Path], own: dict[str, tuple[bytes, int]]) -> list[Entry]:
    found: dict[str, Entry] = {}
    for path in paths:
        for name, (data, mode) in image_wheels.unpack(path, _wanted).items():
            where = f"{AGENT}/{name}"
            if where in found and found[where].data != data:
                raise PayloadError(f"two wheels bring {name}, the second is {path.name}: pin other versions")
            found[where] = Entry(where, mode, data)
    for name, (data, mode) in own.items():
        found[f"{AGENT}/{name}"] = Entry(f"{AGENT}/{name}", mode, data)
    for name, (where, mode) in FILES.items():
        found[where] = Entry(where, mode, (UNITS / name).read_bytes())
    for name in ENABLED:
        where = f"etc/systemd/system/multi-user.target.wants/{name}"
        found[where] = Entry(where, 0o777, target=f"/etc/systemd/system/{name}")
    return [found[name] for name in sorted(found)]


def write_tar(file, entries: list[Entry]) -> None:
    """The entries, sorted by path, with the folders above them."""
    folders: set[str] = set()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for entry in entries:
            parts = entry.path.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                folder = "/".join(parts[:depth])
                if folder not in folders:
                    folders.add(folder)
                    archive.addfile(_member(folder, tarfile.DIRTYPE, 0o755))
            member = _member(entry.path, tarfile.SYMTYPE if entry.target else tarfile.REGTYPE, entry.mode)
            member.linkname, member.size = entry.target, len(entry.data)
            archive.addfile(member, io.BytesIO(entry.data))


def _member(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.mtime = kind, mode, MTIME_S
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    """One of the members that write_tar writes; the cache is ours, so names are only checked against accidents."""
    path = root / member.name
    if ".." in path.parts or not path.is_relative_to(root):
        raise PayloadError(f"the cached payload names {member.name[:80]!r}: delete the cache and build again")
    if member.isdir():
        path.mkdir(mode=member.mode, exist_ok=True)
    elif member.issym():
        path.symlink_to(member.linkname)
    else:
        source = archive.extractfile(member)
        with open(path, "xb") as target:
            shutil.copyfileobj(source, target)
        path.chmod(stat.S_IMODE(member.mode))
        os.utime(path, (MTIME_S, MTIME_S))
