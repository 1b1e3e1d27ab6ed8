"""A provision pack on its way to a card: read and checked, put into the folder spacemoe/ of the FAT partition, read back, marked as used.

A claim works once, so a pack that has gone to a card is refused until someone says that it is to be used again.
Leaves out: making packs (`spacemoe fleet add`) and what the board does with one (first boot).
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import stat
import tempfile
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hardware.fat_files import Fat
from node_agent import enrolment, toml_file
from node_agent.shard import atomic_file

MARK = enrolment.FLASHED
MAX_FILES = 16
MAX_MARK_BYTES = 64 * 1024
_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,63}")


class PackError(ValueError):
    """A folder is no provision pack, or one that was used; the text names it and the next step."""


@dataclass(frozen=True)
class Pack:
    """A node's identity before its first boot. `files` hold a secret (the claim), so they are never shown."""

    folder: Path
    node: str
    fleet: str
    board: str
    files: tuple[tuple[str, bytes], ...] = field(repr=False)


def read_pack(folder: Path) -> Pack:
    """Raises: PackError."""
    hint = "`spacemoe fleet add NODE` makes one"
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name != MARK)
    except OSError as error:
        raise PackError(f"{folder} is no provision pack ({error.strerror}): {hint}") from None
    missing = {enrolment.CONFIG, enrolment.CA, enrolment.CLAIM} - {*names}
    if missing:
        raise PackError(f"{folder} is no provision pack: it has no {', '.join(sorted(missing))}; {hint}")
    if len(names) > MAX_FILES or not all(map(_NAME.fullmatch, names)):
        raise PackError(f"{folder} holds files that are of no provision pack: {hint}")
    files = tuple((name, _bytes(folder / name, enrolment.MAX_PACK_FILE_BYTES)) for name in names)
    held = dict(files)
    if not enrolment.TOKEN.fullmatch(held[enrolment.CLAIM].decode("ascii", "replace").strip()):
        raise PackError(f"{folder / enrolment.CLAIM} holds no claim token: {hint}")
    try:
        node = toml_file.loads(held[enrolment.CONFIG]).get("node")
    except toml_file.TomlError as error:
        raise PackError(f"{folder / enrolment.CONFIG} cannot be read ({error}): {hint}") from None
    words = [node.get(key) if isinstance(node, dict) else None for key in ("id", "fleet", "board")]
    if not all(isinstance(word, str) and 0 < len(word) <= 64 and word.isprintable() for word in words):
        raise PackError(f"{folder / enrolment.CONFIG} does not say id, fleet and board of a [node]: {hint}")
    return Pack(folder, *words, files)


def _bytes(path: Path, most: int) -> bytes:
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PackError(f"{path} cannot be read ({error.strerror}): give another pack") from None
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise PackError(f"{path} is no plain file: give another pack")
        data = file.read(most + 1)
    if len(data) > most:
        raise PackError(f"{path} has more than {most} bytes: give another pack")
    return data


def packs_in(folder: Path, again: bool = False, without: Container[str] = ()) -> tuple[Pack, ...]:
    """The packs below `folder` in the order of their names that no card has yet; `again`: also others; never those `without`.

    Raises: PackError.
    """
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise PackError(f"{folder} cannot be read ({error.strerror}): give the folder that holds the packs") from None
    return tuple(
        read_pack(folder / name)
        for name in found
        if name not in without and (again or not (folder / name / MARK).exists())
    )


def check_unused(pack: Pack) -> None:
    """Raises: PackError where the mark says that a card has it."""
    path = pack.folder / MARK
    if not path.exists():
        return
    try:
        told = json.loads(_bytes(path, MAX_MARK_BYTES))
        where = f"{told['card']} at {told['time_utc']}"[:120]
    except (ValueError, KeyError, TypeError):
        where = "a card"
    raise PackError(
        f"{pack.folder} was put on {where} and its claim works once: make another pack (`spacemoe fleet add`), or give --again "
        "if that board has never started"
    )


@contextmanager
def taken(packs: Iterable[Pack], again: bool) -> Iterator[None]:
    """Keeps the packs from every other run until theirs is marked: two cards with one claim would be one dead board.

    Raises: PackError for one that another run has, or has put on a card meanwhile.
    """
    with ExitStack() as stack:
        for pack in packs:
            handle = os.open(pack.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PackError(
                    f"{pack.folder} is being put on a card by another run: wait for it, or give another pack"
                ) from None
            if not again:
                check_unused(pack)
        yield


def mark_used(pack: Pack, card: str, image: str, time_utc: str) -> None:
    """Raises: OSError."""
    with atomic_file(pack.folder / MARK) as file:
        file.write(json.dumps({"card": card, "image": image, "time_utc": time_utc}).encode() + b"\n")


def put_pack(card: Path, fat: Fat, pack: Pack) -> None:
    """Writes the pack's files into the FAT partition of the card.  Raises: FatError, ProgramError."""
    with _on_card(card, fat) as there:
        there.put({f"/{enrolment.PACK_FOLDER}/{name}": data for name, data in pack.files})


def pack_held(card: Path, fat: Fat, pack: Pack) -> bool:
    """Whether the card gives back every file of the pack.  Raises: FatError, ProgramError."""
    with _on_card(card, fat) as there:
        return all(there.read(f"/{enrolment.PACK_FOLDER}/{name}", len(data) + 1) == data for name, data in pack.files)


@contextmanager
def _on_card(card: Path, fat: Fat) -> Iterator[Fat]:
    # by a link: mtools take some characters of a path for their own, and what they need beside it must not lie in /dev
    with tempfile.TemporaryDirectory(prefix="spacemoe-flash-") as folder:
        link = Path(folder) / "card"
        link.symlink_to(card.resolve())
        yield dataclasses.replace(fat, image=link)
