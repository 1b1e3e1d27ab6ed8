"""The fleet folder on the ground station: who belongs to the fleet, in which state, and where its keys lie.

One JSON file per node, changed under a lock that other processes respect (`fleet revoke` beside a running ground station), and a
version that costs two system calls, so that whoever serves the fleet can look for changes several times a second. A file that
cannot be used is named together with what to do. Leaves out: certificates and keys themselves (fleet_authority.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import threading
import time
import typing
from collections.abc import Hashable, Iterator
from pathlib import Path

from ground_station.fleet_files import MAX_FILE_BYTES, FleetFolderError, decoded, encoded, read_plain, unreadable
from ground_station.node_record import (
    CERTIFICATE_DAYS,
    MAX_CERTIFICATE_DAYS,
    FleetInfo,
    NodeRecord,
    Ports,
    State,
    check_host,
    check_node,
    checked,
    usable,
)
from node_agent.shard import atomic_file

CA_CERT, CA_KEY = "ca.pem", "ca.key"
GROUND_CERT, GROUND_KEY = "ground.pem", "ground.key"
NEXT_GROUND_KEY = "ground.key.next"
"""Waits there until its certificate is in place: that one's rename is the moment of change."""
CRL = "crl.pem"
CURVE_KEY = "curve.key"
"""The ground station's secret data-plane key (Z85)."""
SIGNING_KEY, SIGNING_PUBLIC = "signing.key", "signing.pub"
"""Signs bundles: Ed25519 PEM, and its public key as 64 hex digits."""
FLEET_FILE, NODES, CERTIFICATES = "fleet.json", "nodes", "certificates"
LOCK, VERSION = ".lock", ".version"
SECRETS = (CA_KEY, GROUND_KEY, CURVE_KEY, SIGNING_KEY)
FILES = (CA_CERT, CA_KEY, GROUND_CERT, GROUND_KEY, CRL, CURVE_KEY, SIGNING_KEY, SIGNING_PUBLIC)

MAX_CRL_BYTES = 16 * 1024 * 1024
MAX_NODES = 10_000
LOCK_PATIENCE_S = 20.0
SETTLED_NS = 100_000_000
"""A record that was written less long ago is read again each time: its next version could look alike from outside."""
__all__ = [
    "CERTIFICATE_DAYS",
    "MAX_CERTIFICATE_DAYS",
    "FleetBusyError",
    "FleetFolder",
    "FleetFolderError",
    "FleetInfo",
    "NodeRecord",
    "Ports",
    "State",
    "check_host",
    "check_node",
]


class FleetBusyError(RuntimeError):
    """Another process holds the fleet folder's lock for too long."""


class FleetFolder:
    """A fleet's folder. Reading needs no lock, since files are replaced whole; every change is made under it."""

    def __init__(self, root: Path, info: FleetInfo):
        self.root, self._info = Path(root), info
        self._mine = threading.local()
        self._nodes = str(self.root / NODES)
        self._cache: dict[str, tuple[tuple[int, int, int], NodeRecord]] = {}

    @classmethod
    def create(
        cls,
        path: Path,
        fleet: str,
        hosts: typing.Sequence[str],
        ports: Ports = Ports(),
        certificate_days: int = CERTIFICATE_DAYS,
    ) -> FleetFolder:
        """Makes the folder with all keys, the authority and the ground station's certificate; appears whole or not at all.

        Raises: FleetFolderError for a name or an existing folder, OSError.
        """
        from ground_station import fleet_authority

        info = checked(FleetInfo(fleet, tuple(hosts), ports, certificate_days), f"fleet {str(fleet)[:40]}")
        path = Path(path)
        if os.path.lexists(path):
            raise FleetFolderError(f"{path} exists: a fleet's keys are made once; name another folder, or move it away")
        if not path.absolute().parent.is_dir():
            raise FleetFolderError(f"{path.absolute().parent} is no folder: give --dir below one that is there")
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir(mode=0o700)
        try:
            for name in (NODES, CERTIFICATES):
                (partial / name).mkdir(mode=0o700)
            folder = cls(partial, info)
            (partial / LOCK).touch(mode=0o600)
            with folder.locked():
                folder.store_info(info)
                fleet_authority.found(folder)
            os.rename(partial, path)  # fails where somebody else was quicker, since theirs is not empty
        except BaseException:
            _remove(partial)
            raise
        _sync(path.absolute().parent)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> FleetFolder:
        """Raises: FleetFolderError for what is no fleet folder of this format, or lacks a file."""
        path = Path(path)
        if not (path / FLEET_FILE).is_file():
            raise FleetFolderError(f"{path} is no fleet folder: make one by `spacemoe fleet init NAME --host HOST`")
        for name in FILES:
            if not (path / name).is_file():
                raise FleetFolderError(f"{path / name} is missing: restore it from a backup of the fleet folder")
        folder = cls(path, _info(path / FLEET_FILE))
        if folder.path(NEXT_GROUND_KEY).exists():  # a renewal was cut short, or is being made
            from ground_station import fleet_authority

            fleet_authority.settle_ground(folder)
        return folder

    @property
    def info(self) -> FleetInfo:
        return self._info

    def path(self, name: str) -> Path:
        """Path of one of the files named at this module's top."""
        return self.root / name

    # ------------------------------------------------------------ reading

    def read(self, name: str) -> bytes:
        """A file of the folder; a secret one only where nobody else may read it.  Raises: FleetFolderError."""
        path = self.path(name)
        data, mode = read_plain(path, MAX_CRL_BYTES if name == CRL else MAX_FILE_BYTES)
        if name in SECRETS and mode & 0o077:
            raise FleetFolderError(f"{path} can be read by others: chmod 600 {path}")
        return data

    def nodes(self) -> dict[str, NodeRecord]:
        """Every record, by id.  Raises: FleetFolderError naming a file that is damaged."""
        found, damaged = self.scan()
        if damaged:
            raise damaged[0]
        return found

    def scan(self) -> tuple[dict[str, NodeRecord], list[FleetFolderError]]:
        """The sound records, by id, and what is wrong with each of the others.  Raises: FleetFolderError for the folder itself."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.root / NODES) if entry.name.endswith(".json"))
        except OSError as error:
            raise FleetFolderError(f"{self.root / NODES} cannot be read ({error.strerror}): restore it") from None
        if len(names) > MAX_NODES:
            raise FleetFolderError(f"{self.root / NODES} holds over {MAX_NODES} records: split the fleet")
        found, damaged = {}, []
        for name in names:
            node = name.removesuffix(".json")
            try:
                found[node] = self._record(node)
            except FileNotFoundError:
                pass  # removed since the folder was listed
            except FleetFolderError as error:
                damaged.append(error)
        return found, damaged

    def node(self, node: str) -> NodeRecord:
        """Raises: FleetFolderError for a name that is none, that is unknown, or whose record is damaged."""
        try:
            return self._record(check_node(node))
        except FileNotFoundError:
            raise FleetFolderError(
                f"{self._info.fleet} has no node {node!r}: see `spacemoe fleet list`, or add it by `spacemoe fleet add`"
            ) from None

    def record_path(self, node: str) -> Path:
        """Where the record of `node` lies.  Raises: FleetFolderError."""
        return self.root / NODES / f"{check_node(node)}.json"

    def version(self) -> Hashable:
        """Differs from an earlier value whenever a record, the revocation list or the ground certificate was written since."""
        try:
            text = (self.root / VERSION).read_bytes()[:64]
        except FileNotFoundError:
            text = b""
        return text, os.stat(self.root / NODES).st_mtime_ns

    def curve_keys(self) -> tuple[bytes, bytes]:
        """(public, secret) of the ground station's data plane, Z85.  Raises: FleetFolderError."""
        import zmq

        secret = self.read(CURVE_KEY).strip()
        try:
            return zmq.curve_public(secret), secret
        except (ValueError, zmq.ZMQError):
            raise FleetFolderError(
                f"{self.path(CURVE_KEY)} holds no secret CURVE key: restore it from a backup of the fleet folder"
            ) from None

    def signer(self) -> str:
        """The public key (64 hex digits) that boards accept signatures of bundles from.  Raises: FleetFolderError."""
        text = self.read(SIGNING_PUBLIC).decode(errors="replace").strip()
        if not re.fullmatch(r"[0-9a-f]{64}", text):
            raise FleetFolderError(
                f"{self.path(SIGNING_PUBLIC)} holds no key of 64 hex digits: restore it from a backup"
            )
        return text

    def _record(self, node: str) -> NodeRecord:
        path = f"{self._nodes}/{node}.json"
        try:
            status = os.stat(path)
        except FileNotFoundError:
            raise
        except OSError as error:  # links in a circle
            raise unreadable(path, error) from None
        seen = status.st_ino, status.st_mtime_ns, status.st_size
        known = self._cache.get(node)
        if known is not None and known[0] == seen:
            return known[1]
        settled = time.time_ns() - status.st_mtime_ns > SETTLED_NS
        remedy = f"restore it from a backup, or remove it and `spacemoe fleet add {node}`, then flash the board again"
        record = decoded(Path(path), NodeRecord, remedy)
        if record.id != node or not usable(record):
            raise FleetFolderError(f"{path} is damaged (a value is not what a record holds): {remedy}")
        if settled:
            self._cache[node] = seen, record
        return record

    # ------------------------------------------------------------ changing

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder against every other thread and process; the same thread may nest it.  Raises: FleetBusyError."""
        depth = getattr(self._mine, "depth", 0)
        if depth:
            self._mine.depth = depth + 1
            try:
                yield
            finally:
                self._mine.depth = depth
            return
        lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + LOCK_PATIENCE_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise FleetBusyError(
                            f"{self.root / LOCK} was held by another process for {LOCK_PATIENCE_S:g} s: end that and try again"
                        ) from None
                    time.sleep(0.005)
            self._mine.depth = 1
            try:
                yield
            finally:
                self._mine.depth = 0
        finally:
            os.close(lock)  # which also lets go of the lock

    @contextlib.contextmanager
    def change(self, node: str) -> Iterator[NodeRecord]:
        """The record of `node`, with the lock held; store another by `write` inside.  Raises: as node() and locked()."""
        with self.locked():
            yield self.node(node)

    def write(self, record: NodeRecord) -> None:
        """Stores a record whole or not at all. Only inside `change` or `locked`.  Raises: FleetFolderError, OSError."""
        check_node(record.id)
        if not usable(record):
            raise FleetFolderError(f"the record of {record.id} holds a value that no record may: it was not stored")
        self.store(f"{NODES}/{record.id}.json", encoded(record))

    def store_info(self, info: FleetInfo) -> None:
        """Replaces what holds for the whole fleet. Only inside `locked`.  Raises: FleetFolderError, OSError."""
        self._info = checked(info, self.root)
        self.store(FLEET_FILE, encoded(info))

    def store(self, name: str, data: bytes) -> None:
        """Replaces a file of the folder and moves the version on. Only inside `locked`.  Raises: OSError."""
        if not getattr(self._mine, "depth", 0):
            raise RuntimeError(f"{name} may only be written with the fleet folder's lock held")
        path = self.root / name
        with atomic_file(path) as file:
            os.fchmod(file.fileno(), 0o644 if name in (CA_CERT, CRL, SIGNING_PUBLIC) else 0o600)
            file.write(data)
        # not flushed to the disk: after a power cut everybody reads everything anew anyway
        moved = self.root / f"{VERSION}.{secrets.token_hex(8)}"
        moved.write_text(secrets.token_hex(16))
        os.replace(moved, self.root / VERSION)


def _info(path: Path) -> FleetInfo:
    return checked(decoded(path, FleetInfo, "restore it from a backup of the fleet folder"), path)


def _remove(root: Path) -> None:
    """Removes a folder that was begun; its keys have not been used."""
    for parent, folders, files in os.walk(root, topdown=False):
        for name in files:
            os.unlink(os.path.join(parent, name))
        for name in folders:
            os.rmdir(os.path.join(parent, name))
    os.rmdir(root)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
