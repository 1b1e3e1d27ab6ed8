"""Debian packages that the agent needs and a Debian base lacks (raspi.debian.net's images have no Python), as a tree to lay over its root.

apt decides with the base's own list of packages what is missing, checks signatures and fetches; dpkg-deb unpacks. No maintainer script
runs and the base's dpkg does not learn of the packages: `apt-get install python3` on the board does both at any later time.
Leaves out: bases of other distributions, and upgrading what the base has: a base that is too old for that is refused.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from hardware import image_bootstrap
from hardware.program import run

WANTED = ("python3", "libstdc++6")
"""The interpreter with its standard library, and what numpy's and onnxruntime's wheels are linked with."""
ARCHITECTURE = "arm64"
FETCH_TIMEOUT_S = 900.0
_UNUSED = ("usr/share/doc", "usr/share/man", "usr/share/lintian", "usr/share/bug")
_INSTALLED = re.compile(r"^Package: (\S+)\nStatus: install ok installed$", re.MULTILINE)


class BasePackagesError(ValueError):
    """The packages that a base lacks cannot be brought; the text says what to do."""


def add(tree: Path, status: bytes, codename: str, cache: Path, progress: Callable[[str], None]) -> tuple[str, ...]:
    """Unpacks into `tree` what a base with this dpkg `status` of Debian `codename` lacks; the names of the packages.

    Raises: BasePackagesError; image_bootstrap.MirrorError when no mirror is known; ProgramError; OSError.
    """
    if not re.fullmatch(r"[a-z]{3,20}", codename):
        raise BasePackagesError(f"{codename[:30]!r} is no Debian release: take another base")
    progress(f"asking the mirror which packages the base lacks for {' and '.join(WANTED)}")
    have = set(_INSTALLED.findall(status.decode("utf-8", "replace")))
    if not have:
        raise BasePackagesError("the base has no list of its packages (/var/lib/dpkg/status): take another image")
    here = cache.absolute() / "base" / codename
    for folder in ("lists/partial", "archives/partial", "none/partial"):
        (here / folder).mkdir(parents=True, exist_ok=True)
    apt = _apt(here, status, codename)
    run([*apt, "update"], cwd=cache, timeout_s=FETCH_TIMEOUT_S)
    # what is in the archives already is not printed, so it is asked with an empty folder
    aside = ["-o", f"Dir::Cache::Archives={here / 'none'}", "install", "--print-uris"]
    asked = run([*apt, *aside, *WANTED], cwd=cache, timeout_s=FETCH_TIMEOUT_S)[1].decode()
    files = re.findall(r"^'[^']+' (([a-z0-9][a-z0-9+.-]*)_[^ /]+\.deb) ", asked, re.MULTILINE)
    if newer := sorted(name for _, name in files if name in have):
        raise BasePackagesError(
            f"the base is too old: {', '.join(newer[:5])} would have to be newer; take a newer image"
        )
    if not files:
        raise BasePackagesError(
            f"the base lists {' and '.join(WANTED)} as installed but they are not there: it is damaged"
        )
    progress(f"fetching {len(files)} packages: {', '.join(name for _, name in files)}")
    run([*apt, "install", "--download-only", *WANTED], cwd=cache, timeout_s=FETCH_TIMEOUT_S)
    for file, _ in files:
        run(["dpkg-deb", "-x", str(here / "archives" / file), str(tree)], cwd=cache)
    for folder in _UNUSED:
        shutil.rmtree(tree / folder, ignore_errors=True)
    return tuple(name for _, name in files)


def _apt(folder: Path, status: bytes, codename: str) -> list[str]:
    """apt-get for another machine: its list of packages, its architecture, nothing of this one's but the mirror and its keys."""
    rows = []
    for each in image_bootstrap.sources(None):
        suite = each.suite.replace(image_bootstrap.SUITE, codename)
        rows.append(f"deb [signed-by={each.keyring}] {each.uri} {suite} main\n")
    (folder / "sources.list").write_text("".join(rows))
    (folder / "status").write_bytes(status)
    settings = {
        "Dir::Etc": "/dev/null",
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Parts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::State": folder,
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "Dir::Cache::Archives": folder / "archives",
        "APT::Architecture": ARCHITECTURE,
        "APT::Architectures": ARCHITECTURE,
        "APT::Install-Recommends": "false",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "true",
    }
    words = [part for name, value in settings.items() for part in ("-o", f"{name}={os.fspath(value)}")]
    return ["apt-get", "-q", "-y", *words]
