"""Who may use page and API: a file of hashed tokens with roles, and sessions of browsers. Leaves out HTTP (web_access.py).

A token is 256 random bits, so one SHA-256 of it is kept, and nothing that could be guessed: a slow hash is for what people make up.
The file is of mode 600, replaced as a whole, and read again when it has changed: a token that is removed is refused within a second.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import threading
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from node_agent import shard, wire

Role = Literal["viewer", "operator"]
ROLES: tuple[str, ...] = get_args(Role)
MAX_FILE_BYTES = 1_000_000
MAX_TOKENS = 1000
MAX_TOKEN_CHARS = 200
SESSION_S = 12 * 3600.0
MAX_SESSIONS = 1000
LOOK_S = 1.0
PREFIX = "smo_"  # so that a token that lies somewhere is known for what it is


class TokenError(ValueError):
    """The file of tokens cannot be used, or no token is meant; the text says what to do."""


@dataclass(frozen=True)
class Person:
    """Who asks, and as what."""

    name: str
    role: Role

    @property
    def may_command(self) -> bool:
        return self.role == "operator"


@dataclass(frozen=True)
class Entry:
    """A line of the file."""

    name: str
    role: Role
    sha256: str


def digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read(path: Path) -> tuple[Entry, ...]:
    """The entries; none where there is no file.  Raises: TokenError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise TokenError(f"{path} cannot be read ({error.strerror}): run as its owner") from None
    with os.fdopen(descriptor, "rb") as file:
        there = os.fstat(file.fileno())
        if not stat.S_ISREG(there.st_mode):
            raise TokenError(f"{path} is no file: name another")
        if stat.S_IMODE(there.st_mode) & 0o077:
            raise TokenError(f"{path} can be read by others: chmod 600 {path}")
        raw = file.read(MAX_FILE_BYTES + 1)
    try:
        tree = json.loads(raw) if len(raw) <= MAX_FILE_BYTES else None
        entries = wire.build(_File, tree).tokens
    except (ValueError, RecursionError):
        raise TokenError(f"{path} is no file of tokens: move it away and make new ones") from None
    if len(entries) > MAX_TOKENS or any(len(entry.sha256) != 64 for entry in entries):
        raise TokenError(f"{path} is no file of tokens: move it away and make new ones")
    return entries


@dataclass(frozen=True)
class _File:
    tokens: tuple[Entry, ...]


def _write(path: Path, entries: tuple[Entry, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with shard.atomic_file(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(json.dumps({"tokens": [asdict(entry) for entry in entries]}, indent=1).encode() + b"\n")


def add(path: Path, name: str, role: str) -> str:
    """A new token of `name`, to be shown once: only its hash is kept.  Raises: TokenError, OSError."""
    entries = read(path)
    try:
        wire.check_id(name, "name")
    except wire.WireError as error:
        raise TokenError(str(error)) from None
    if role not in ROLES:
        raise TokenError(f"role {role[:40]!r} is unknown: use {' or '.join(ROLES)}")
    if any(entry.name == name for entry in entries):
        raise TokenError(f"{name} has a token: remove it first")
    if len(entries) >= MAX_TOKENS:
        raise TokenError(f"there are {MAX_TOKENS} tokens: remove one first")
    token = PREFIX + secrets.token_urlsafe(32)
    _write(path, (*entries, Entry(name, role, digest(token))))
    return token


def remove(path: Path, name: str) -> None:
    """Raises: TokenError, OSError."""
    entries = read(path)
    kept = tuple(entry for entry in entries if entry.name != name)
    if len(kept) == len(entries):
        raise TokenError(f"{name[:40]!r} has no token: there are {', '.join(e.name for e in entries) or 'none'}")
    _write(path, kept)


class Tokens:
    """The file as it is now, and the sessions that its tokens have opened. Thread safe."""

    def __init__(self, path: Path):
        """Raises: TokenError."""
        self._path = path
        self._lock = threading.Lock()
        self._looked_s = time.monotonic()
        self._stamp = self._stamp_now()
        self._entries = read(path)
        self._sessions: OrderedDict[str, tuple[str, float]] = OrderedDict()  # digest of the id -> (token's digest, end)

    def __bool__(self) -> bool:
        return bool(self._current())

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            there = os.stat(self._path)
        except OSError:
            return None
        return there.st_ino, there.st_mtime_ns, there.st_size

    def _current(self) -> tuple[Entry, ...]:
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._looked_s >= LOOK_S:
                self._looked_s = now_s
                stamp = self._stamp_now()
                if stamp != self._stamp:
                    self._stamp = stamp
                    try:
                        self._entries = read(self._path)
                    except (
                        TokenError
                    ):  # whoever spoilt the file shall not thereby get in, nor keep a removed token alive
                        self._entries = ()
            return self._entries

    def person(self, token: str) -> Person | None:
        """Whose token this is; takes the same time for every wrong one."""
        return None if len(token) > MAX_TOKEN_CHARS else self._of(digest(token))

    def _of(self, wanted: str) -> Person | None:
        found = None
        for entry in self._current():
            if hmac.compare_digest(entry.sha256.encode(), wanted.encode()):
                found = Person(entry.name, entry.role)
        return found

    def open(self, token: str) -> str | None:
        """A session's id for a good token; None for another."""
        if self.person(token) is None:
            return None
        session = secrets.token_urlsafe(32)
        with self._lock:
            self._sessions[digest(session)] = (digest(token), time.monotonic() + SESSION_S)
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return session

    def of_session(self, session: str) -> Person | None:
        """Who opened it, while it lasts and its token is in the file."""
        if len(session) > MAX_TOKEN_CHARS:
            return None
        with self._lock:
            found = self._sessions.get(digest(session))
        if found is None or time.monotonic() > found[1]:
            return None
        return self._of(found[0])

    def close(self, session: str) -> None:
        with self._lock:
            self._sessions.pop(digest(session), None)
