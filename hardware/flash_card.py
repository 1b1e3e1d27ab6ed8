"""One card (or a file that stands for one) open for writing alone: blank its head, write, flush, read back past the cache.

A card boots by what is in its first 4 MiB (HEAD_BYTES). They are zeroed before anything else is written and filled last, their own
first 4 KiB (the partition table) at the very end, so that a card that was written by halves boots nothing, even after a power cut.
Leaves out: what is written (flash.py), and whether this disk may be written at all (block_devices.py).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 4 * 1024 * 1024
TABLE_BYTES = 4096
TAIL_BYTES = 1024 * 1024
"""Where a GPT keeps its second copy, which would outlive the card's former content."""
SYNC_BYTES = 32 * 1024 * 1024
READ_BYTES = 4 * 1024 * 1024
ALIGN = 4096
BLKRRPART, BLKFLSBUF = 0x125F, 0x1261
REREAD_TRIES, REREAD_WAIT_S = 5, 0.4
DIRECT, DROPPED = "O_DIRECT", "page cache dropped"
AGAIN = "it does not boot (its first 4 MiB are zero); start again, a half-written card cannot be resumed"
UNCERTAIN = "its first 4 MiB could not be zeroed, so it may boot half-written; erase it or throw it away"


class FlashError(RuntimeError):
    """A card could not be written; the text says what to do."""


class VerifyError(FlashError):
    """What is read back is not what was written."""


@dataclass(frozen=True)
class Target:
    """What is written: a block device of `number` (major:minor), or a plain file where that is None."""

    path: Path
    bytes: int
    number: str | None = None


class Card:
    """A target open for writing, alone. A context manager; leaving it before `complete` leaves zeros in the head.

    Raises: FlashError when it cannot be had alone, is another disk or another size than was looked at.
    """

    def __init__(self, target: Target, image_bytes: int) -> None:
        self.target, self._image_bytes = target, image_bytes
        self._complete = self._touched = False
        self._unsynced = 0
        self._direct: int | None = None
        self.read_back = ""
        device = target.number is not None
        # without O_EXCL the kernel lets one write a disk that is mounted
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if device else os.O_CREAT | os.O_NONBLOCK)
        try:
            self._fd = os.open(target.path, flags, 0o600)  # what a pack holds is for nobody else
        except OSError as error:
            raise FlashError(f"{target.path} {_why_not_open(error)}") from None
        try:
            self._prove(device)
        except BaseException:
            os.close(self._fd)
            raise

    def _prove(self, device: bool) -> None:
        path, status = self.target.path, os.fstat(self._fd)
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        if device and not (stat.S_ISBLK(status.st_mode) and number == self.target.number):
            raise FlashError(f"{path} is not the disk any more that was chosen: list the disks again")
        if not device and not stat.S_ISREG(status.st_mode):
            raise FlashError(f"{path} is no plain file: --to-file takes files, disks are named without it")
        if not device:
            os.fchmod(self._fd, 0o600)  # it may hold a claim token
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # udev keeps its hands off a disk that is locked
        except BlockingIOError:
            raise FlashError(f"{path} is being written by another program: wait for it") from None
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if not device and size < self._image_bytes:
            if size:
                raise FlashError(f"{path} holds {size} bytes, the image {self._image_bytes}: name another file")
            os.ftruncate(self._fd, self.target.bytes)
        elif size != self.target.bytes:
            raise FlashError(f"{path} holds {size} bytes now, not {self.target.bytes}: list the disks again")

    def __enter__(self) -> Card:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.give_up()
        finally:
            os.close(self._fd)
            if self._direct is not None:
                os.close(self._direct)

    def give_up(self) -> bool:
        """Zeros in the head unless the card is complete or was never touched; False where they did not get there."""
        try:
            if self._touched and not self._complete:
                self.blank()
                self._touched = False
        except OSError:
            return False
        return True

    def blank(self) -> None:
        """Zeros in the head, and where an old partition table has its copy; on the card when this returns.  Raises: OSError."""
        self._touched = True
        self._pwrite(0, bytes(min(HEAD_BYTES, self.target.bytes)))
        tail = max(self.target.bytes - TAIL_BYTES, self._image_bytes, HEAD_BYTES)
        self._pwrite(tail, bytes(max(0, self.target.bytes - tail)))
        os.fsync(self._fd)

    def write(self, offset: int, data: bytes) -> None:
        """Bytes that are not of the head. Every now and then it waits for the card, so that progress is the card's.  Raises: OSError."""
        self._pwrite(offset, data)
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES:
            os.fdatasync(self._fd)
            self._unsynced = 0

    def flush(self) -> None:
        """All that was written is on the card.  Raises: OSError (EIO where the card failed)."""
        os.fsync(self._fd)
        self._unsynced = 0

    def write_head(self, offset: int, data: bytes) -> None:
        """A part of the head; the partition table after the rest of it has reached the card.  Raises: OSError."""
        late = max(0, min(len(data), TABLE_BYTES - offset))
        self._pwrite(offset + late, data[late:])
        os.fsync(self._fd)
        if late:
            self._pwrite(offset, data[:late])
            os.fsync(self._fd)

    def complete(self) -> str:
        """The card is whole. Tells the kernel to read its partition table; returns a remark where it would not."""
        self._complete = True
        if self.target.number is None:
            return ""
        for attempt in range(REREAD_TRIES):
            try:
                fcntl.ioctl(self._fd, BLKRRPART)
                return ""
            except OSError as error:
                if error.errno != errno.EBUSY or attempt == REREAD_TRIES - 1:
                    return f"the kernel did not read the new partition table ({error.strerror}): take the card out"
            time.sleep(REREAD_WAIT_S)
        raise AssertionError("the loop returns")

    def _pwrite(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count

    def read(self, offset: int, count: int) -> memoryview:
        """At most READ_BYTES as they are on the card, not in the cache; valid until the next call.  Raises: OSError, VerifyError."""
        if not self.read_back:
            self._open_past_cache()
        begin = offset // ALIGN * ALIGN
        end = min(-(-(offset + count) // ALIGN) * ALIGN, self.target.bytes)
        got = 0
        if self._direct is None:
            self.forget(begin, end - begin)
        while got < offset + count - begin:
            number = self._fd if self._direct is None else self._direct
            length = -(-(end - begin - got) // ALIGN) * ALIGN if self.target.number is None else end - begin - got
            try:
                part = os.preadv(number, [self._view[got : got + length]], begin + got)
            except OSError as error:
                if error.errno != errno.EINVAL or self._direct is None:
                    raise
                os.close(self._direct)  # this file system opens it so, but does not read so
                self._direct, self.read_back = None, DROPPED
                self.forget(begin, end - begin)
                continue
            if not part:
                raise VerifyError(f"{self.target.path} ends at byte {begin + got} when read back: the card is broken")
            got += part
        return self._view[offset - begin : offset - begin + count]

    def _open_past_cache(self) -> None:
        self._view = memoryview(mmap.mmap(-1, READ_BYTES + 2 * ALIGN))  # O_DIRECT wants aligned memory
        try:
            self._direct = os.open(self.target.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            self.read_back = DIRECT
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.read_back = DROPPED

    def forget(self, offset: int = 0, count: int = 0) -> None:
        """Drops what the cache has of the range (all of it: 0, 0), after it has been flushed.  Raises: OSError."""
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)
        if self.target.number is not None:
            fcntl.ioctl(self._fd, BLKFLSBUF)


def _why_not_open(error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "is in use (mounted, or held by another program): unmount it and list the disks again"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "may not be written by this user: run the command with sudo"
    if error.errno == errno.EROFS:
        return "is read-only: is the card's lock switch on?"
    if error.errno == errno.ENOMEDIUM:
        return "has no card in it: put it in and list the disks again"
    return f"cannot be opened ({error.strerror}): list the disks again"
