"""The agent's wheels for a board's Python: which ones (every version pinned), fetched by pip, unpacked without the board.

pip reads environment markers for the Python that it runs under, not for the one it fetches for, so the requirements are followed
here: from the agent's own ones through each wheel's metadata, with the markers of a 64-bit Arm Linux. Wheels are kept in the cache
with a list of their SHA-256, and a second build needs no network.
Leaves out: packages that exist as source only (none of the agent's), Python itself, accelerators' builds of onnxruntime.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Callable

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from node_agent.shard import atomic_file

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
"""JetPack 6, Debian bookworm, Ubuntu 24.04, Debian trixie and Raspberry Pi OS trixie."""
PLATFORMS = tuple(f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 24, 17)) + ("manylinux2014_aarch64",)
"""Of glibc 2.28 (2018) and older, newest first: every base has a newer one."""
BASE = ("cryptography", "numpy", "onnxruntime", "paho-mqtt", "psutil", "pyzmq", "tomli; python_version < '3.11'")
"""What the agent imports; a test compares it with pyproject.toml."""
MAX_WHEEL_BYTES = 400 * 1024**2
MAX_UNPACKED_BYTES = 1024**3
MAX_FILES = 50_000
TIMEOUT_S = 900


class WheelError(ValueError):
    """A wheel or a pinned version cannot be used."""


@dataclass(frozen=True)
class Wheel:
    name: str
    version: str
    file: str
    sha256: str
    licence: str
    """As its metadata says; empty where it says nothing."""


def constraints_file() -> Path:
    """The checkout's pinned versions.  Raises: WheelError where the kit was installed without them."""
    path = Path(__file__).resolve().parent.parent / "constraints.txt"
    if not path.is_file():
        raise WheelError(
            f"there is no {path}: build images from a clone of the kit, whose constraints.txt pins versions"
        )
    return path


def environment(python: str) -> dict[str, str]:
    """The markers of PEP 508 on a 64-bit Arm board.  Raises: WheelError."""
    if python not in PYTHONS:
        raise WheelError(f"Python {python!r} is none of {', '.join(PYTHONS)}: name the one of the base image")
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": "aarch64",
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
        "extra": "",
    }


def pins(text: str, python: str) -> dict[str, str]:
    """name -> version of a constraints file, for one Python.  Raises: WheelError."""
    markers, found = environment(python), {}
    for line in text.splitlines():
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise WheelError(f"constraints: {line[:80]!r} is no requirement ({error})") from None
        if requirement.marker is not None and not requirement.marker.evaluate(markers):
            continue
        exact = [each for each in requirement.specifier if each.operator == "=="]
        if len(exact) != 1:
            raise WheelError(f"constraints: {line[:80]!r} is no exact version: write NAME==VERSION")
        found[canonicalize_name(requirement.name)] = exact[0].version
    return found


def fetch(python: str, cache: Path, progress: Callable[[str], None], constraints: Path | None = None) -> list[Path]:
    """The wheels that the agent needs, sorted by name; from the cache, or by pip.

    Raises: WheelError for a requirement without a pinned version, RuntimeError when pip cannot bring a wheel, OSError.
    """
    pinned = pins((constraints or constraints_file()).read_text(), python)
    folder = cache / "wheels" / python
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "sha256.json"
    known: dict[str, str] = json.loads(record.read_text()) if record.is_file() else {}
    markers = environment(python)
    wanted, have = [Requirement(each) for each in BASE], {}
    while wanted:
        names = []
        for requirement in wanted:
            name = canonicalize_name(requirement.name)
            if (requirement.marker is None or requirement.marker.evaluate(markers)) and name not in have:
                if name not in pinned:
                    raise WheelError(
                        f"constraints.txt pins no version of {name} for Python {python}: add {name}==VERSION"
                    )
                if name not in names:
                    names.append(name)
        missing = [f"{name}=={pinned[name]}" for name in names if _kept(folder, name, pinned[name], known) is None]
        if missing:
            progress(f"fetching {len(missing)} wheels for Python {python}: {' '.join(missing)}")
            _download(missing, python, folder)
        wanted = []
        for name in names:
            path = _kept(folder, name, pinned[name], None)
            if path is None:
                raise RuntimeError(f"pip brought no wheel of {name} {pinned[name]}: try again, or pin another version")
            known[path.name] = _sha256(path)
            have[name] = path
            wanted += [Requirement(each) for each in _metadata(path).get_all("Requires-Dist") or []]
    with atomic_file(record) as file:
        file.write(json.dumps(known, indent=1, sort_keys=True).encode())
    return [have[name] for name in sorted(have)]


def _kept(folder: Path, name: str, version: str, known: dict[str, str] | None) -> Path | None:
    """The wheel in the cache; with `known` only one whose bytes are those that were noted down."""
    for path in sorted(folder.glob("*.whl")):
        parts = path.name.split("-")
        if canonicalize_name(parts[0]) == name and parts[1] == version:
            if known is None or known.get(path.name) == _sha256(path):
                return path
            path.unlink()
    return None


def _download(missing: list[str], python: str, folder: Path) -> None:
    digits = python.replace(".", "")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    for abi in (f"cp{digits}", "abi3", "none"):
        command += ["--abi", abi]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    done = subprocess.run([*command, *missing], capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise RuntimeError(f"pip could not fetch wheels for Python {python} on 64-bit Arm: {' '.join(lines)[:400]}")


def _sha256(path: Path) -> str:
    if path.stat().st_size > MAX_WHEEL_BYTES:
        raise WheelError(f"{path.name} is {path.stat().st_size} bytes, more than {MAX_WHEEL_BYTES}")
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _metadata(path: Path):
    with zipfile.ZipFile(path) as wheel:
        for info in wheel.infolist():
            if info.filename.count("/") == 1 and info.filename.endswith(".dist-info/METADATA"):
                if info.file_size > 4 * 1024**2:
                    break
                return HeaderParser().parsestr(wheel.read(info).decode("utf-8", "replace"))
    raise WheelError(f"{path.name} holds no METADATA: delete it from the cache and build again")


def described(path: Path) -> Wheel:
    """What the bill of materials says of a wheel."""
    metadata = _metadata(path)
    licence = metadata.get("License-Expression") or ""
    if not licence:
        classifiers = [each for each in metadata.get_all("Classifier") or [] if each.startswith("License ::")]
        licence = "; ".join(each.rpartition("::")[2].strip() for each in classifiers)
    if not licence:
        licence = (metadata.get("License") or "").strip().splitlines()[0][:80] if metadata.get("License") else ""
    return Wheel(canonicalize_name(metadata["Name"]), metadata["Version"], path.name, _sha256(path), licence)


def unpack(path: Path, wanted: Callable[[str], bool]) -> dict[str, tuple[bytes, int]]:
    """name -> (bytes, mode) of a wheel's files, its `.data/purelib` and `.data/platlib` moved to their place, scripts left out.

    Raises: WheelError for a wheel that names a file outside of itself, or is too large.
    """
    files: dict[str, tuple[bytes, int]] = {}
    with zipfile.ZipFile(path) as wheel:
        infos = [each for each in wheel.infolist() if not each.is_dir()]
        if len(infos) > MAX_FILES or sum(each.file_size for each in infos) > MAX_UNPACKED_BYTES:
            raise WheelError(f"{path.name} unpacks to more than {MAX_FILES} files or {MAX_UNPACKED_BYTES} bytes")
        for info in infos:
            parts = info.filename.split("/")
            if ".." in parts or "" in parts or "\\" in info.filename:
                raise WheelError(f"{path.name} names {info.filename[:80]!r}, outside of itself")
            if parts[0].endswith(".data"):
                if parts[1] not in ("purelib", "platlib"):
                    continue
                parts = parts[2:]
            name = "/".join(parts)
            if wanted(name):
                mode = 0o755 if (info.external_attr >> 16) & 0o111 else 0o644
                files[name] = (wheel.read(info), mode)
    return files
