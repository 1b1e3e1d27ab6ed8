"""Updates of the agent itself: makes a package from a tree, signs it, sends it to nodes, and waits until it proves good or falls back.

A package is one zip of a Python tree with `package.json` (node_agent.agent_slots says what a board takes of it); the signature of its
name, size and sha256 lies beside it as FILE.sig. The same tree gives the same bytes. Without `site` it holds node_agent alone: what it
imports comes from the folder that came with the board's image.
Leaves out: which agent a board starts (node_agent.launcher), the socket (delivery.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ground_station.delivery import Deliverer, DeliveryError, DeliveryRefused
from node_agent.bundle_file import SIGNATURE_BYTES
from node_agent.delivery_frame import DONE, NAME, REFUSED, STATE, AgentOffer
from node_agent.shard import atomic_file, sha256_of
from node_agent.signature import update_statement

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT = "spacemoe-agent-1"
NOTE = "package.json"
SUFFIX = ".sig"
MIN_PYTHON = "3.10"
MAX_PACKAGE_BYTES = 512 * 1024 * 1024
MAX_NOTE_BYTES = 64 * 1024
ASK_S = 1.0
_EPOCH = (1980, 1, 1, 0, 0, 0)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what a board takes
# What zipfile raises for a damaged archive, a method or an encryption that it does not know, and json for what is no JSON.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, KeyError, TypeError)
_LEFT_OUT = ("__pycache__",)
_NATIVE = re.compile(r"\.cpython-(\d+)-([a-z0-9_]+)-linux")

Say = Callable[[str, str], None]
"""(node, what happened to it)."""


class PackageFileError(ValueError):
    """A package cannot be made or used; the text names it and the next step."""


@dataclass(frozen=True)
class Package:
    """A signed package on this disk."""

    path: Path
    offer: AgentOffer


def _tree(site: Path | None) -> list[tuple[str, Path]]:
    """(name in the package, file) of everything that belongs in it."""
    root = site or Path(__file__).resolve().parent.parent
    tops = [root] if site else [root / "node_agent"]
    found = []
    for top in tops:
        for path in sorted(top.rglob("*")):
            name = path.relative_to(root)
            if path.is_symlink():
                raise PackageFileError(f"{path} is a link: give a folder of plain files")
            if path.is_file() and not any(part in _LEFT_OUT for part in name.parts):
                found.append((name.as_posix(), path))
    if "node_agent/cli.py" not in dict(found):
        raise PackageFileError(f"{root} holds no node_agent: give the folder that it is in")
    return found


def make(out: Path, key: Ed25519PrivateKey, site: Path | None = None, version: str | None = None) -> Package:
    """Writes a package and its signature.  Raises: PackageFileError, OSError."""
    tree = _tree(site)
    native = {match.groups() for name, _ in tree if (match := _NATIVE.search(name))}
    if len({each[0] for each in native}) > 1 or len({each[1] for each in native}) > 1:
        raise PackageFileError(
            f"{site} holds native modules of several kinds ({sorted(native)}): give a folder for one board"
        )
    abi, machine = ("any", "any")
    if native:
        ((python, machine),) = native
        abi = f"cpython{python}"
    digest, buffer = hashlib.sha256(), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in tree:
            data = path.read_bytes()
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
            _put(archive, name, data)
        name = f"agent-{version or _version()}-{digest.hexdigest()[:12]}"
        if not NAME.fullmatch(name):
            raise PackageFileError(
                f"{name[:80]!r} is no name for a package: give --version in letters, digits, '.', '-'"
            )
        note = {"format": FORMAT, "name": name, "python": MIN_PYTHON, "abi": abi, "machine": machine}
        _put(archive, NOTE, json.dumps(note, indent=1).encode())
    data = buffer.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    signature = key.sign(update_statement(name, len(data), sha256))
    with atomic_file(out) as file:
        file.write(data)
    with atomic_file(out.with_name(out.name + SUFFIX)) as file:
        file.write(signature)
    return Package(out, AgentOffer(name, len(data), sha256, signature))


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    member = zipfile.ZipInfo(name, _EPOCH)
    member.external_attr = 0o100644 << 16
    member.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(member, data)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("spacemoe-kit")
    except metadata.PackageNotFoundError:
        return "source"


def read(path: Path) -> Package:
    """A package and the signature beside it; boards check it, not we.  Raises: PackageFileError."""
    beside = path.with_name(path.name + SUFFIX)
    try:
        for file, limit in ((path, MAX_PACKAGE_BYTES), (beside, SIGNATURE_BYTES)):
            if not file.is_file() or file.stat().st_size > limit:
                raise PackageFileError(
                    f"{file} is no file of at most {limit} bytes: make a package by `spacemoe update --make`"
                )
        signature = beside.read_bytes()
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type not in _METHODS or member.flag_bits & 1:
                    raise ValueError(f"{member.filename[:80]!r} is encrypted or packed in another way than deflate")
            with archive.open(NOTE) as file:
                name = json.loads(file.read(MAX_NOTE_BYTES))["name"]
    except (OSError, *_DAMAGE) as error:
        if isinstance(error, PackageFileError):
            raise
        raise PackageFileError(
            f"{path} is no package ({str(error)[:100]}): make one by `spacemoe update --make`"
        ) from None
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(signature) != SIGNATURE_BYTES:
        raise PackageFileError(f"{path} or its signature is damaged: make it again by `spacemoe update --make`")
    return Package(path, AgentOffer(name, os.stat(path).st_size, sha256_of(path), signature))


def carry_out(
    deliverer: Deliverer,
    nodes: Sequence[str],
    package: Package,
    say: Say,
    patience_s: float,
    trial_s: float,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Sends the package to each node and waits for what becomes of it: node -> "good", or in words why not.

    `patience_s`: without progress of a transfer; `trial_s`: for all trials together; `tick` is called between looks, so that the data
    plane answers the nodes: without it none can become good.
    """
    found: dict[str, str] = {}
    for node in nodes:
        shown = -1

        def progress(done: int, total: int, node: str = node) -> None:
            nonlocal shown
            tick()
            if (tenth := 10 * done // max(total, 1)) != shown:
                shown = tenth
                say(node, f"{done / 1e6:.2f} of {total / 1e6:.2f} MB")

        try:
            good = deliverer.update(node, package.path, package.offer, progress, patience_s)
            found[node] = "good" if good else ""
            say(node, "runs it already" if good else "is staged: the board starts it")
        except DeliveryRefused as error:
            found[node] = "" if error.kind == "busy" else str(error)
        except DeliveryError as error:
            found[node] = str(error)
    waiting, end_s = [node for node in nodes if not found[node]], time.monotonic() + trial_s
    while waiting and time.monotonic() < end_s:
        for node in list(waiting):
            tick()
            answer = deliverer.ask_update(node, package.offer, ASK_S)
            if answer is not None and answer.kind == DONE:
                found[node] = "good"
            elif answer is not None and answer.kind == REFUSED and answer.refusal != "busy":
                found[node] = f"{node} refuses ({answer.refusal}): {answer.text}"
            elif answer is not None and answer.kind == STATE:
                found[node] = f"{node} has lost the update: send it again"
            else:
                continue
            waiting.remove(node)
            say(node, found[node])
        pause_s = time.monotonic() + ASK_S / 2
        while waiting and time.monotonic() < pause_s:
            tick()
            time.sleep(0.05)
    for node in waiting:
        found[node] = f"{node} has not said within {trial_s:g} s that the update is good: see its log, ask again later"
    return found
