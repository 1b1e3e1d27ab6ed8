"""The second layer: packages, payload, our settings and baked-in shards become ext4 file systems, and what the FAT partition needs.

The work is a shell script (units/stage.sh) run as root of a namespace, since files must keep their owners. Its results are kept in
the cache under the hash of what went in.
Leaves out: the packages (image_bootstrap.py) and the disk (image_disk.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

from hardware import ext4_times, image_disk, image_initrd, image_namespace, image_root, payload
from hardware.image_bootstrap import Bootstrap
from node_agent.shard import atomic_file

RECIPE = 1
ROOT_FREE_MIB = 64
DATA_FREE_MIB = 64
SCRIPT = payload.UNITS / "stage.sh"
COMPILE_SCRIPT = payload.UNITS / "compile.sh"
RESULTS = ("root.ext4", "boot.tar", "status", "copyright.json")


@dataclass(frozen=True)
class Stage:
    key: str
    root: Path
    data: Path | None
    """The small writable partition of a read-only root."""
    boot: Path
    """Tar file: vmlinuz, initrd.img, dtbs/, firmware/."""
    status: Path
    """dpkg's, for the bill of materials."""
    licences: dict[str, str]
    """Package -> what its copyright file names."""


@dataclass(frozen=True)
class Layers:
    bootstrap: Bootstrap
    payload_tar: Path
    payload_key: str
    options: image_root.Options
    shards: Path | None = None
    shards_key: str = ""


def key_of(layers: Layers) -> str:
    """SHA-256 of all that goes in."""
    overlay = [
        [each.path, each.mode, hashlib.sha256(each.data).hexdigest(), each.target]
        for each in image_root.entries(layers.options)
    ]
    script = [hashlib.sha256(each.read_bytes()).hexdigest() for each in (SCRIPT, COMPILE_SCRIPT)]
    initrd = [image_initrd.INIT, image_initrd.WANTED]
    what = [
        RECIPE,
        image_root.RECIPE,
        layers.bootstrap.key,
        layers.payload_key,
        asdict(layers.options),
        overlay,
        script,
        initrd,
    ]
    return hashlib.sha256(json.dumps([*what, layers.shards_key, ROOT_FREE_MIB, DATA_FREE_MIB]).encode()).hexdigest()


def make(layers: Layers, cache: Path, progress: Callable[[str], None]) -> Stage:
    """The file systems, from the cache or new.  Raises: image_namespace.NamespaceError, OSError."""
    key = key_of(layers)
    folder = cache / "stage" / key
    if not folder.is_dir():
        progress("making the root file system: packages, agent, settings, ext4")
        started = time.monotonic()
        _run(layers, key, folder, progress)
        progress(f"root file system made in {time.monotonic() - started:.0f} s")
    data = folder / "data.ext4"
    licences = json.loads((folder / "copyright.json").read_text())
    return Stage(
        key, folder / "root.ext4", data if data.is_file() else None, folder / "boot.tar", folder / "status", licences
    )


def _compiled(layers: Layers, cache: Path, progress: Callable[[str], None]) -> Path:
    """The agent's compiled Python files as a tar file, from the cache or new."""
    python = [each for each in layers.bootstrap.packages if each[0].startswith(("python3", "libpython3"))]
    script = hashlib.sha256(COMPILE_SCRIPT.read_bytes()).hexdigest()
    key = hashlib.sha256(
        json.dumps([layers.payload_key, python, script, layers.bootstrap.epoch_s]).encode()
    ).hexdigest()
    tar = cache / "compiled" / f"{key}.tar"
    if not tar.is_file():
        progress("compiling the agent's Python files for the board (emulated: some minutes)")
        tar.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{key[:16]}.", dir=tar.parent) as name:
            work = Path(name)
            work.chmod(0o755)
            (work / "bootstrap.tar").symlink_to(layers.bootstrap.tar.absolute())
            (work / "payload.tar").symlink_to(layers.payload_tar.absolute())
            settings = {"SOURCE_DATE_EPOCH": str(layers.bootstrap.epoch_s)}
            image_namespace.run(["sh", str(COMPILE_SCRIPT), str(work)], tar.parent / "compile.log", settings)
            os.replace(work / "compiled.tar", tar)
    return tar


def _sources_key(tar: Path) -> str:
    """Hash of the payload's Python files: another unit or library does not compile them again."""
    digest = hashlib.sha256()
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".py"):
                digest.update(
                    member.name.encode() + b"\0" + hashlib.sha256(archive.extractfile(member).read()).digest()
                )
    return digest.hexdigest()


def _run(layers: Layers, key: str, folder: Path, progress: Callable[[str], None]) -> None:
    compiled = _compiled(layers, folder.parent.parent, progress)
    folder.parent.mkdir(parents=True, exist_ok=True)
    epoch_s = layers.bootstrap.epoch_s
    work = Path(tempfile.mkdtemp(prefix=f"{key[:16]}.", dir=folder.parent))
    work.chmod(0o755)
    try:
        (work / "bootstrap.tar").symlink_to(layers.bootstrap.tar.absolute())
        (work / "payload.tar").symlink_to(layers.payload_tar.absolute())
        (work / "compiled.tar").symlink_to(compiled.absolute())
        with open(work / "overlay.tar", "wb") as file:
            payload.write_tar(file, image_root.entries(layers.options))
        if layers.shards is not None:
            _pack_shards(layers.shards, work / "shards.tar")
        _, _, (root_uuid, data_uuid) = image_disk.ids(key)
        settings = {
            "SOURCE_DATE_EPOCH": epoch_s,
            "READ_ONLY": int(layers.options.read_only),
            "ROOT_LABEL": image_root.ROOT_LABEL,
            "DATA_LABEL": image_root.DATA_LABEL,
            "ROOT_UUID": root_uuid,
            "DATA_UUID": data_uuid,
            "ROOT_FREE_MIB": ROOT_FREE_MIB,
            "DATA_FREE_MIB": DATA_FREE_MIB,
        }
        (work / "settings").write_text(
            "".join(f"{name}={value}\n" for name, value in settings.items()) + "export SOURCE_DATE_EPOCH\n"
        )
        image_namespace.run(["sh", str(SCRIPT), str(work)], folder.parent / "stage.log", {})
        for path in sorted(work.glob("*.ext4")):
            ext4_times.settle(path, epoch_s)
        progress("making the initial RAM disk")
        _add_initrd(work, epoch_s)
        (work / "copyright.json").write_text(json.dumps(_licences(work / "copyright"), sort_keys=True))
        for path in work.iterdir():
            if path.name not in (*RESULTS, "data.ext4"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in work.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _pack_shards(shards: Path, target: Path) -> None:
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as archive:
        for path in sorted(shards.rglob("*")):
            member = tarfile.TarInfo(path.relative_to(shards).as_posix())
            member.mtime = payload.MTIME_S
            if path.is_dir():
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(member)
            elif path.is_file() and not path.is_symlink():
                member.size, member.mode = path.stat().st_size, 0o644
                with open(path, "rb") as file:
                    archive.addfile(member, file)


def _add_initrd(work: Path, epoch_s: int) -> None:
    """boot.tar as the script left it holds busybox and all modules; as a result it holds the initial RAM disk instead."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        boot = Path(name)
        with tarfile.open(work / "boot.tar") as archive:
            for member in archive:
                path = boot / member.name
                if member.isdir():
                    path.mkdir(parents=True, exist_ok=True)
                elif member.isfile():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with archive.extractfile(member) as source, open(path, "wb") as target:
                        shutil.copyfileobj(source, target)
        initrd = image_initrd.make(boot, epoch_s)
        entries = [payload.Entry("initrd.img", 0o644, initrd)]
        for path in sorted(boot.rglob("*")):
            relative = path.relative_to(boot)
            if path.is_file() and relative.parts[0] in ("vmlinuz", "dtbs", "firmware"):
                entries.append(payload.Entry(relative.as_posix(), 0o644, path.read_bytes()))
        with atomic_file(work / "boot.tar") as file:
            payload.write_tar(file, entries)


def _licences(folder: Path) -> dict[str, str]:
    """What Debian's machine-readable copyright files name; nothing for the others."""
    found = {}
    for path in sorted(folder.iterdir()):
        text = path.read_text(errors="replace") if path.stat().st_size < 2 * 1024**2 else ""
        if text.startswith("Format:"):
            names = {
                line[8:].strip()[:80] for line in text.splitlines() if line.startswith("License:") and line[8:].strip()
            }
            found[path.name] = " AND ".join(sorted(names))
    return found


def boot_files(stage: Stage, device_trees: tuple[str, ...], firmware: bool, out: Path) -> dict[str, Path]:
    """Unpacks what one board needs into `out`: path on the FAT partition -> file.  Raises: ValueError, OSError."""
    wanted: dict[str, Path] = {}
    with tarfile.open(stage.boot) as archive:
        for member in archive:
            kind, _, name = member.name.partition("/")
            if not member.isfile():
                continue
            if not name:
                target = kind
            elif kind == "dtbs" and name in device_trees or kind == "firmware" and firmware and "/" not in name:
                target = name
            else:
                continue
            path = out / f"{len(wanted)}"
            data = archive.extractfile(member) or io.BytesIO()
            path.write_bytes(data.read())
            wanted[target] = path
    missing = [name for name in device_trees if name not in wanted]
    if missing:
        raise ValueError(f"the kernel package has no device tree {', '.join(missing)}: take another board")
    return wanted
