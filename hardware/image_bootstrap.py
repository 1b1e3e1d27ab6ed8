"""The first layer of an image: Debian's packages as a tar file, made by mmdebstrap and kept in the cache.

The layer's key is the list of packages with their versions that the mirror would give now: the mirror is asked (half a minute), and
only a new version of a package that the image holds makes the layer again (ten minutes and more, since maintainer scripts run
emulated). What a board never needs is not unpacked: manuals, translations, drivers of graphics, sound, cameras, Wi-Fi.
Leaves out: everything that is ours (payload.py, image_root.py), and the boot loader of any board.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import time
import urllib.request
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Callable

from hardware import image_namespace
from node_agent.shard import atomic_file

RECIPE = 1
SUITE = "trixie"
PYTHON = "3.13"
"""Of that suite."""
COMPONENTS = "main,non-free-firmware"
PACKAGES = (
    "busybox-static",  # for the initial RAM disk
    "dosfstools",
    "e2fsprogs",
    "fdisk",
    "iproute2",
    "kmod",
    "linux-image-arm64",
    "python3",
    "raspi-firmware",
    "systemd",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
)
SSH_PACKAGES = ("openssh-server",)
_MODULES = "/usr/lib/modules/*/kernel"
EXCLUDED = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    # names of hardware; to compile them takes minutes emulated
    "/usr/lib/udev/hwdb.d/*",
    # the initial RAM disk and the FAT partition are made by us; emulated, Debian's own way takes ten minutes
    "/etc/kernel/postinst.d/*",
    "/etc/kernel/postrm.d/*",
    f"{_MODULES}/sound/*",
    *(
        f"{_MODULES}/drivers/{name}/*"
        for name in ("gpu", "infiniband", "media", "scsi", "staging", "net/wireless", "iio")
    ),
    *(f"{_MODULES}/drivers/net/ethernet/{name}/*" for name in ("chelsio", "intel", "mellanox", "qlogic")),
)
# raspi-firmware's own hook is called by name; without a RAM disk it does nothing
INCLUDED = ("/usr/share/doc/*/copyright", "/etc/kernel/postinst.d/z50-raspi-firmware")
RESOLVED_FOR_S = 3600
"""How long the mirror is not asked again."""
MAX_RELEASE_BYTES = 4 * 1024**2
# The SHA-256 of every package that the mirror offers, for the bill of materials; apt forgets them afterwards.
_HASHES = (
    'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-cache dumpavail | grep -E "^(Package|Version|SHA256):" >{target}.available'
)
_INST = re.compile(r"^Inst ([a-z0-9][a-z0-9+.-]+) \(([^ )]+) ", re.MULTILINE)


class MirrorError(ValueError):
    """No mirror is known, or it cannot be used; the text says what to give."""


@dataclass(frozen=True)
class Source:
    uri: str
    suite: str
    keyring: str


@dataclass(frozen=True)
class Bootstrap:
    tar: Path
    key: str
    packages: tuple[tuple[str, str], ...]
    """(name, version), sorted."""
    sha256: dict[str, str]
    """Of the .deb files, by name."""
    epoch_s: int
    """Date of the suite's release file: what every time stamp of the image is clamped to."""


def sources(mirror: str | None, apt: Path = Path("/etc/apt")) -> tuple[Source, ...]:
    """Where packages come from: `mirror`, or the Debian archives that this machine's apt is set to, security updates included.

    Raises: MirrorError.
    """
    if mirror is not None:
        if not re.fullmatch(r"(https?|file|copy)://[^\s,;]+", mirror):
            raise MirrorError(f"--mirror {mirror[:80]!r} is no address: give http://HOST/debian or file:///FOLDER")
        return (Source(mirror.rstrip("/"), SUITE, _keyring("", apt)),)
    found: dict[str, Source] = {}
    for uri, suite, keyring in _apt_entries(apt):
        if uri.endswith("/debian-security") and suite.endswith("-security"):
            found.setdefault("security", Source(uri, f"{SUITE}-security", _keyring(keyring, apt)))
        elif uri.endswith("/debian") and "-" not in suite:
            found.setdefault("main", Source(uri, SUITE, _keyring(keyring, apt)))
    if "main" not in found:
        raise MirrorError("apt on this machine names no Debian mirror: give --mirror URL")
    return tuple(found[name] for name in ("main", "security") if name in found)


def _apt_entries(apt: Path) -> list[tuple[str, str, str]]:
    """(uri, suite, keyring) of every entry of kind deb."""
    entries = []
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text(errors="replace")):
            fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", stanza, re.MULTILINE))
            if "deb" in fields.get("Types", "").split() and fields.get("Enabled", "yes") != "no":
                for uri in fields.get("URIs", "").split():
                    for suite in fields.get("Suites", "").split():
                        entries.append((uri.rstrip("/"), suite, fields.get("Signed-By", "").strip()))
    for path in (apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))):
        if path.is_file():
            for options, uri, suite in re.findall(
                r"^deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)", path.read_text(errors="replace"), re.MULTILINE
            ):
                keyring = re.search(r"signed-by=(\S+)", options)
                entries.append((uri.rstrip("/"), suite, keyring.group(1) if keyring else ""))
    return entries


def _keyring(named: str, apt: Path) -> str:
    for path in (
        named,
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        str(apt / "trusted.gpg.d" / "debian-archive-trixie-stable.asc"),
    ):
        if path and Path(path).is_file():
            return path
    raise MirrorError("the keys of Debian's archive are not here: apt-get install debian-archive-keyring")


def command(wanted: tuple[Source, ...], packages: tuple[str, ...], target: str, simulate: bool) -> list[str]:
    """The call of mmdebstrap."""
    words = ["mmdebstrap", "--mode=root", "--arch=arm64", "--variant=minbase", f"--components={COMPONENTS}"]
    words += ["--skip=check/qemu", f"--include={','.join(packages)}"]
    words += [f"--dpkgopt=path-exclude={each}" for each in EXCLUDED]
    words += [f"--dpkgopt=path-include={each}" for each in INCLUDED]
    if simulate:
        words += ["--verbose", "--simulate"]
    else:
        words += ["--format=tar", f"--customize-hook={_HASHES.format(target=shlex.quote(target))}"]
    lines = [
        f"deb [signed-by={each.keyring}] {each.uri} {each.suite} {COMPONENTS.replace(',', ' ')}" for each in wanted
    ]
    return [*words, SUITE, target, *lines]


def make(
    wanted: tuple[Source, ...], packages: tuple[str, ...], cache: Path, offline: bool, progress: Callable[[str], None]
) -> Bootstrap:
    """The layer, from the cache or new.  Raises: MirrorError, image_namespace.NamespaceError, OSError."""
    folder = cache / "bootstrap"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = _recipe_key(wanted, packages)
    record = folder / f"resolved-{recipe[:16]}.json"
    known = json.loads(record.read_text()) if record.is_file() else None
    if offline and known is None:
        raise MirrorError(f"--offline, but the cache {cache} holds no packages for this recipe: build once without it")
    if not offline and (known is None or time.time() - record.stat().st_mtime > RESOLVED_FOR_S):
        known = _resolve(wanted, packages, folder, progress)
        with atomic_file(record) as file:
            file.write(json.dumps(known).encode())
    installed, epoch_s = tuple((name, version) for name, version in known["packages"]), known["epoch_s"]
    key = hashlib.sha256(json.dumps([recipe, installed, epoch_s]).encode()).hexdigest()
    tar = folder / f"{key}.tar"
    if not tar.is_file():
        if offline:
            raise MirrorError(f"--offline, but {tar} is gone: build once without it")
        progress(f"installing {len(installed)} packages of Debian {SUITE} for arm64 (emulated: ten minutes and more)")
        partial = folder / f"{key}.tar.partial"
        partial.unlink(missing_ok=True)
        started = time.monotonic()
        words = command(wanted, packages, str(partial), simulate=False)
        watch = _Watch(len(installed), progress)
        image_namespace.run(words, folder / "mmdebstrap.log", _environment(epoch_s), watch)
        hashes = _hashes(Path(f"{partial}.available"), installed)
        with atomic_file(tar.with_suffix(".json")) as file:
            file.write(json.dumps(hashes, indent=1, sort_keys=True).encode())
        os.replace(partial, tar)
        progress(f"packages installed in {time.monotonic() - started:.0f} s ({tar.stat().st_size / 1e6:.0f} MB)")
    return Bootstrap(tar, key, installed, json.loads(tar.with_suffix(".json").read_text()), epoch_s)


class _Watch:
    """Says how many packages dpkg has set up, by mmdebstrap's log."""

    def __init__(self, count: int, progress: Callable[[str], None]) -> None:
        self._count, self._progress, self._said = count, progress, 0

    def __call__(self, log: str) -> None:
        done = len(set(re.findall(r"^Setting up (\S+)", log, re.MULTILINE)))
        if done > self._said:
            self._progress(f"  {done} of {self._count} packages set up")
            self._said = done


def _hashes(available: Path, installed: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """name -> SHA-256 of the packages that were installed, out of all that the mirror offers."""
    versions, found, package, version = dict(installed), {}, "", ""
    with open(available, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            field, _, value = line.rstrip().partition(": ")
            if field == "Package":
                package = value
            elif field == "Version":
                version = value
            elif versions.get(package) == version and re.fullmatch(r"[0-9a-f]{64}", value):
                found[package] = value
    available.unlink()
    return found


def _recipe_key(wanted: tuple[Source, ...], packages: tuple[str, ...]) -> str:
    # of the archives, only what they are: which mirror serves a package does not change it
    suites = [each.suite for each in wanted]
    return hashlib.sha256(
        json.dumps([RECIPE, SUITE, COMPONENTS, suites, packages, EXCLUDED, INCLUDED]).encode()
    ).hexdigest()


def _environment(epoch_s: int) -> dict[str, str]:
    kept = {
        name: os.environ[name] for name in ("http_proxy", "https_proxy", "no_proxy", "TMPDIR") if name in os.environ
    }
    # INITRD: kernel packages make no initial RAM disk
    return kept | {
        "SOURCE_DATE_EPOCH": str(epoch_s),
        "INITRD": "No",
        "HOME": "/root",
        "DEBIAN_FRONTEND": "noninteractive",
    }


def _resolve(
    wanted: tuple[Source, ...], packages: tuple[str, ...], folder: Path, progress: Callable[[str], None]
) -> dict:
    progress(f"asking the mirror for the newest versions of {len(packages)} packages and what they need")
    log = folder / "resolve.log"
    image_namespace.run(command(wanted, packages, "/dev/null", simulate=True), log, _environment(0))
    found = sorted(set(_INST.findall(log.read_text(errors="replace"))))
    if len(found) < len(packages):
        raise MirrorError(f"the mirror's answer names {len(found)} packages only: see {log}")
    return {"packages": found, "epoch_s": release_date_s(wanted[0])}


def release_date_s(source: Source) -> int:
    """The Date of a suite's release file.  Raises: MirrorError, OSError."""
    address = f"{source.uri.replace('copy://', 'file://')}/dists/{source.suite}/InRelease"
    with urllib.request.urlopen(address, timeout=60) as answer:
        text = answer.read(MAX_RELEASE_BYTES).decode("utf-8", "replace")
    date = re.search(r"^Date: (.+)$", text, re.MULTILINE)
    if date is None:
        raise MirrorError(f"{address} has no date: give another --mirror")
    return int(parsedate_to_datetime(date.group(1).replace("UTC", "+0000")).timestamp())
