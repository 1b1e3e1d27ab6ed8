"""First boot: the provision pack goes from the card's FAT partition to the board's own disk, and the claim token from the FAT for good.

Runs at every boot and does what is left to do; a power cut at any point is made up for at the next. The pack is copied into
`<to>.partial`, flushed, and renamed to `<to>.new`; that is renamed to `<to>`; only then is the token on the FAT overwritten and
removed. `pack.sha256` in the folder says which token it came with, so that the token of a pack that has been taken is told from
that of a new pack: a card that is provisioned anew gets a new identity, and the old one's folder is removed.
What lies in a folder of the agent's user is written as that user: root follows no link that it has put there.
Leaves out: keys and the certificate (enrol.py).
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import socket
import ssl
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

from node_agent import config, enrol, enrolment, secret_file
from node_agent.errors import ConfigError

TAKEN = "pack.sha256"
FOLDER_MODE = 0o750
_MODES = {enrolment.CONFIG: secret_file.SHARED, enrolment.CA: secret_file.SHARED, enrolment.CLAIM: secret_file.SECRET}

Step = Callable[[str], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Pack:
    """The files of a pack, checked. `config` is what its configuration says once it lies in its place."""

    files: dict[str, bytes]
    config: config.Config

    @property
    def mark(self) -> str:
        return _mark(self.files[enrolment.CLAIM])


@dataclass(frozen=True)
class Owner:
    """The user that the agent runs as."""

    name: str
    uid: int
    gid: int


def owner(name: str | None, to: Path) -> Owner | None:
    """The user of that name; without one, whoever owns the folder that `to` lies in. None: whoever runs this.

    Raises: ConfigError.
    """
    try:
        if name is None:
            uid = to.parent.stat().st_uid if to.parent.is_dir() else os.geteuid()
            if os.geteuid() != 0 or uid == 0:
                return None
            entry = pwd.getpwuid(uid)
            return Owner(entry.pw_name, uid, entry.pw_gid)
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):
        raise ConfigError(
            f"--owner: {(name or str(uid))[:40]!r} is no user of this machine: name the agent's"
        ) from None
    if os.geteuid() not in (0, entry.pw_uid):
        raise ConfigError(f"--owner {name}: only root can give files to another user; run this as root")
    return Owner(name, entry.pw_uid, entry.pw_gid)


def _mark(claim: bytes) -> str:
    return hashlib.sha256(claim.strip()).hexdigest()


# ---------------------------------------------------------------- the pack


def read_pack(folder: Path, to: Path) -> Pack:
    """The pack in `folder`, meant for `to`.  Raises: ConfigError naming the file that is missing, too large or damaged."""
    files = {}
    for name in _MODES:
        path = folder / name
        try:
            files[name] = secret_file.read(path, enrolment.MAX_PACK_FILE_BYTES)
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing: put the node's whole pack on the card again") from None
        except OSError as error:
            raise ConfigError(f"pack: {error}: put the node's pack on the card again") from None
    if not enrolment.TOKEN.fullmatch(_text(files[enrolment.CLAIM]).strip()):
        raise ConfigError(f"{folder / enrolment.CLAIM} holds no claim token: put the node's pack on the card again")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=_text(files[enrolment.CA]))
    except (OSError, ValueError):
        raise ConfigError(
            f"{folder / enrolment.CA} holds no certificate: put the node's pack on the card again"
        ) from None
    path = folder / enrolment.CONFIG
    try:
        parsed = config.parse(files[enrolment.CONFIG].decode(), to, enrolled=False)
        if parsed.enrol is None:
            raise ConfigError("[enrol] is missing: a pack says where the certificate is to be got")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text: put the node's pack on the card again") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Pack(files, parsed)


def _text(raw: bytes) -> str:
    return raw.decode("ascii", errors="backslashreplace")


# ---------------------------------------------------------------- taking it


def take(pack_folder: Path, to: Path, user: Owner | None, say: Say, step: Step = lambda name: None) -> bool:
    """Takes the pack, if there is one that has not been taken; True where it was new.

    `step` is called before each thing that a power cut may come before. Raises: ConfigError, OSError.
    """
    claim = pack_folder / enrolment.CLAIM
    new = False
    left = _left_claim(claim)
    if left is None or not left.strip(b"\0 \r\n"):  # none, or one that was being overwritten
        with _as(user):
            _install(to, step)
            if not (to / enrolment.CONFIG).is_file():
                raise ConfigError(f"{to} holds no identity and {pack_folder} no claim: put the node's pack on the card")
    else:
        _make_parent(to.parent, user)
        with _as(user):
            _install(to, step)  # an earlier boot's, cut short; then its token is known below
            known = _taken(to)
        if known != _mark(left):
            pack = read_pack(pack_folder, to)
            with _as(user):
                _stage(pack, to, step)
                _install(to, step)
            new = True
    if left is not None:
        step("wipe")
        try:
            secret_file.wipe(claim)
        except OSError as error:
            say(f"{claim} could not be removed ({error.strerror or error}): remove it; it is worthless once it is used")
    return new


def _left_claim(claim: Path) -> bytes | None:
    try:
        return secret_file.read(claim, enrolment.MAX_PACK_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"pack: {error}: put the node's pack on the card again") from None


def _taken(to: Path) -> str:
    try:
        return _text(secret_file.read(to / TAKEN, 100)).strip()
    except OSError:
        return ""


def _beside(to: Path, what: str) -> Path:
    return to.with_name(f"{to.name}.{what}")


def _stage(pack: Pack, to: Path, step: Step) -> None:
    """A whole folder under `<to>.new`, on the disk."""
    partial = _beside(to, "partial")
    step("stage")
    if partial.is_symlink() or partial.is_file():
        partial.unlink()
    elif partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(mode=0o700)
    for name, mode in _MODES.items():
        step(f"write {name}")
        secret_file.write(partial / name, pack.files[name], mode)
    secret_file.write(partial / TAKEN, pack.mark.encode() + b"\n", secret_file.SHARED)
    partial.chmod(FOLDER_MODE)
    secret_file.sync_folder(partial)
    step("staged")
    partial.rename(_beside(to, "new"))
    secret_file.sync_folder(to.parent)


def _install(to: Path, step: Step) -> None:
    """Puts `<to>.new` in its place, if there is one, and removes what it replaces."""
    new, old = _beside(to, "new"), _beside(to, "old")
    if new.is_dir():
        if to.exists():
            step("move the old one")
            _remove(old)
            to.rename(old)
        step("move the new one")
        new.rename(to)
        secret_file.sync_folder(to.parent)
    step("remove the old one")
    _remove(old)


def _remove(folder: Path) -> None:
    """An old identity: its secrets are overwritten first, as far as that goes."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            secret_file.wipe(path)
    shutil.rmtree(folder)
    secret_file.sync_folder(folder.parent)


def _make_parent(folder: Path, user: Owner | None) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, mode=FOLDER_MODE)
        if user and os.geteuid() == 0:
            os.chown(folder, user.uid, user.gid)


@contextmanager
def _as(user: Owner | None) -> Iterator[None]:
    """With the rights of `user`, where we are root and may lend ourselves them."""
    if user is None or os.geteuid() != 0:
        yield
        return
    groups, gid = os.getgroups(), os.getegid()
    os.setgroups([user.gid])
    os.setegid(user.gid)
    os.seteuid(user.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def become(user: Owner | None) -> None:
    """The rights of `user` from here on, for good: what speaks to the network is not root."""
    if user is None or os.geteuid() != 0:
        return
    os.setgroups([user.gid])
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


# ---------------------------------------------------------------- the machine


def set_clock(not_before_utc_s: float | None, say: Say, now_s: Callable[[], float] = time.time) -> bool:
    """Sets the machine's clock forward, never back: a board without an RTC wakes up in the past.  True where it was set."""
    if not_before_utc_s is None or now_s() >= not_before_utc_s:
        return False
    text = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(not_before_utc_s))
    try:
        time.clock_settime(time.CLOCK_REALTIME, not_before_utc_s)
    except OSError as error:
        say(
            f"this machine's clock is behind {text} and cannot be set ({error.strerror}): TLS may fail until it is right"
        )
        return False
    say(f"this machine's clock was behind and is set to {text}")
    return True


def set_hostname(
    name: str, say: Say, file: Path = Path("/etc/hostname"), apply: Callable[[str], None] = socket.sethostname
) -> None:
    """Names the machine after its node, now and for later boots, where it may; else says so."""
    if not re.fullmatch(r"[a-z0-9-]{1,63}", name):
        return
    try:
        if socket.gethostname() != name:
            apply(name)
        if not file.exists() or file.read_text(errors="replace")[:256].strip() != name:
            secret_file.write(file, name.encode() + b"\n", secret_file.PUBLIC)
    except OSError as error:
        say(f"the machine's name could not be set to {name} ({error.strerror or error})")


def run(
    pack: Path, to: Path, user: Owner | None, hostname: bool, once: bool, say: Say
) -> tuple[enrol.Certificate, bool]:
    """Everything, in order: (certificate, whether it is new).

    Raises: ConfigError, OSError; with `once` also what enrol.obtain raises.
    """
    if take(pack, to, user, say):
        say(f"the pack of {pack} is in {to}")
    settings = config.load(to / enrolment.CONFIG, enrolled=False)
    who = enrol.identity(settings)
    set_clock(settings.enrol.provisioned_utc_s, say)
    if hostname:
        set_hostname(settings.node.id, say)
    become(user)
    return enrol.until_enrolled(who, once, say)
