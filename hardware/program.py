"""Runs the programs that images are made with (mtools, e2fsprogs, dosfstools, xz, zstd): found or named, bounded, one-line errors.

Leaves out: what they are asked to do.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

PACKAGES = {
    "mcopy": "mtools",
    "mdel": "mtools",
    "mkfs.vfat": "dosfstools",
    "sfdisk": "fdisk",
    "mdir": "mtools",
    "mmd": "mtools",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "fsck.vfat": "dosfstools",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
    "xz": "xz-utils",
    "zstd": "zstd",
    "gzip": "gzip",
}
"""Debian's package of each program."""
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
TIMEOUT_S = 1800.0
LOOK_MS = 500
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
"""Not on every user's PATH, though what is used from there needs no root."""


class ProgramError(RuntimeError):
    """A program is missing or failed; the text names it and the next step."""


def find(name: str) -> str:
    """The program's path.  Raises: ProgramError, with the Debian package that brings it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
    if found is None:
        raise ProgramError(f"{name} is not installed: apt-get install {PACKAGES.get(name, name)}")
    return found


def run(
    argv: Sequence[str],
    *,
    cwd: Path,
    send: bytes = b"",
    ok: Sequence[int] = (0,),
    max_bytes: int = MAX_OUTPUT_BYTES,
    timeout_s: float = TIMEOUT_S,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int, bytes, str]:
    """Runs `argv` to its end: exit status, standard output, standard error.

    Raises: ProgramError when it is missing, ends with another status than `ok`, writes more than `max_bytes` or takes too long.
    """
    program = find(argv[0])
    # Names of files come from images: the C locale must not turn them into question marks. No settings of the user's own.
    settled = {"LC_ALL": "C.UTF-8", "MTOOLSRC": os.devnull, "E2FSPROGS_SKIP_PROGRESS": "1"}
    full = {**os.environ, **settled, **environment}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryFile(dir=cwd))
        err = stack.enter_context(tempfile.TemporaryFile(dir=cwd))
        source = stack.enter_context(tempfile.TemporaryFile(dir=cwd))
        source.write(send)
        source.seek(0)
        child = subprocess.Popen([program, *argv[1:]], cwd=cwd, stdin=source, stdout=out, stderr=err, env=full)
        stack.callback(child.wait)
        stack.callback(child.kill)
        ended = stack.enter_context(_ended(child.pid))
        until = time.monotonic() + timeout_s
        while not ended.poll(LOOK_MS):  # dozens of programs of a few ms each: no sleeping in between
            if time.monotonic() >= until or os.fstat(out.fileno()).st_size > max_bytes:
                raise ProgramError(f"{argv[0]} did not end, or wrote without end: stopped")
        status = child.wait()
        if os.fstat(out.fileno()).st_size > max_bytes:
            raise ProgramError(f"{argv[0]} wrote more than {max_bytes} bytes")
        out.seek(0)
        err.seek(0)
        text = err.read(MAX_OUTPUT_BYTES).decode("utf-8", "replace")
        if status not in ok:
            lines = (text.strip() or out.read(4096).decode("utf-8", "replace").strip()).splitlines()
            raise ProgramError(f"{argv[0]} failed (status {status}): {' '.join(lines[-2:])[:300]}")
        return status, out.read(max_bytes), text


@contextlib.contextmanager
def _ended(pid: int) -> Iterator[select.poll]:
    """What becomes ready when the child has ended."""
    number = os.pidfd_open(pid)
    try:
        watched = select.poll()
        watched.register(number, select.POLLIN)
        yield watched
    finally:
        os.close(number)


def address(image: Path, offset_bytes: int, mark: str) -> str:
    """How mtools ("@@") and e2fsprogs ("?offset=") are told of a file system inside a file, from the file's folder.

    Raises: ValueError for a name that they would take apart.
    """
    if "?" in image.name or "@@" in image.name:
        raise ValueError(f"{image.name!r} has a ? or @@ in its name: rename the image")
    return f"./{image.name}{mark}{offset_bytes}"
