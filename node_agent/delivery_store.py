"""Shards that came over the link, on this node's disk: what is there, what is half there, and what was taken away for good.

Below `<state_dir>/shards`: `experts/` as in a bundle, `partial/` what is half there, `next/experts/` files that are whole and whose
shard is not yet, `<stem>.offer` for each shard that is whole (the OFFER frame it came by), `<stem>.dropped` for a shard of the node's
own bundle that is not to be loaded any more. A file gets its name only when its sha256 is right. A shard, or a newer version of
one, is taken over in one moment: when its `.offer` is renamed into place. Cut off before, the old one is whole in `experts/`; cut off
after, `settle` moves the rest of the new one there from `next/`. Resuming after a power cut needs no fsync of what is half there: its
sha256 is told to the ground station, which compares it with its own. What another program has put there under one of these
names and is no plain file (a link, pipe, folder) is never followed, waited for or written: it is refused by name.
Leaves out: frames and memory (delivery.py).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from node_agent import delivery_frame, shard
from node_agent.delivery_frame import Have, Offer, Shard
from node_agent.errors import AgentError

RESERVE_BYTES = 64 * 1024 * 1024  # of the disk stay free: the board needs them to live
MAX_PARTIALS = 16
HASH_BYTES = 1 << 20


class StoreError(AgentError, OSError):
    """A shard cannot be kept; `kind` is one of delivery_frame.REFUSALS."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def open_plain(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """An unbuffered plain file, opened without following a link or waiting for a pipe; `flags` as of os.open.

    Raises: StoreError for what is no plain file or, where it is to be written, has a second name; OSError.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError:
        _check_plain(path)
        raise
    try:
        found = os.fstat(handle)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if not stat.S_ISREG(found.st_mode) or (writing and found.st_nlink != 1):
            raise _not_plain(path)
        return os.fdopen(handle, "r+b" if writing else "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def _not_plain(path: Path) -> StoreError:
    return StoreError("disk", f"{path} is no plain file of this agent (a link, pipe or folder?): remove it")


def _check_plain(path: Path) -> None:
    """Raises: StoreError where something else than a plain file has the name; nothing at all is as well."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise _not_plain(path)
    except FileNotFoundError:
        pass


def _remove(path: Path) -> None:
    """A link or a pipe goes, what it leads to stays.  Raises: StoreError for a folder, OSError."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # unlink(2): EISDIR on Linux, EPERM by POSIX
        _check_plain(path)
        raise


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class Store:
    """One folder, for one thread. `bundle`: the node's own bundle, whose files need no transfer; it is never written."""

    def __init__(
        self,
        root: Path,
        bundle: Path | None = None,
        free: Callable[[Path], int] = free_bytes,
        folder: str = delivery_frame.FOLDER,
    ):
        """`folder`: where the paths of all files begin."""
        self.root, self._bundle, self._free, self._folder = root, bundle, free, folder
        self._partials, self._next = root / "partial", root / "next"

    def _make(self) -> None:
        try:
            for folder in (
                self.root / self._folder,
                self._partials,
                self._next,
                self._next / self._folder,
            ):
                if os.path.lexists(folder) and not stat.S_ISDIR(os.lstat(folder).st_mode):
                    raise StoreError("disk", f"{folder} is no folder of this agent (a link, file or pipe?): remove it")
                folder.mkdir(parents=True, exist_ok=True)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                "disk", f"{self.root} cannot be written ({error.strerror}): mend state_dir's disk"
            ) from None

    # ------------------------------------------------------------ what is there

    def graph(self, files: tuple[shard.FileEntry, ...]) -> Path | None:
        """Path of `files[0]` in the folder that has verified copies of all of them: a graph finds its weights beside itself."""
        for root in (self.root, self._next, self._bundle):
            if root is not None and all(self._whole(root, file) for file in files):
                return root / files[0].path
        return None

    def _whole(self, root: Path, file: shard.FileEntry) -> bool:
        """In the node's own bundle a link may stand for a file; here none of ours is one."""
        try:
            if root != self._bundle:
                _check_plain(root / file.path)
            return bool(shard.verify_file(root, file))
        except (shard.BundleError, OSError):
            return False

    def partial(self, file: shard.FileEntry) -> Path:
        return self._partials / f"{Path(file.path).name}.{file.sha256[:16]}"

    def have(self, files: tuple[shard.FileEntry, ...]) -> tuple[Have, ...]:
        """What is here of each file, with the sha256 of just that."""
        if self.graph(files) is not None:
            return tuple(Have(file.bytes, file.sha256) for file in files)
        self._make()
        return tuple(self._have(file) for file in files)

    def _have(self, file: shard.FileEntry) -> Have:
        for root in (self.root, self._next):
            if self._whole(root, file):
                return Have(file.bytes, file.sha256)
            _check_plain(root / file.path)
        path = self.partial(file)
        try:
            with open_plain(path) as half:
                size = os.fstat(half.fileno()).st_size
                if 0 < size <= file.bytes:
                    return Have(size, _sha256(half, size))
            path.unlink()
        except StoreError:
            raise
        except OSError:
            pass
        return Have(0, hashlib.sha256().hexdigest())

    def make_room(self, files: tuple[shard.FileEntry, ...], missing_bytes: int) -> None:
        """Drops partial files of other versions and the oldest beyond MAX_PARTIALS, and the oldest whole ones of shards that never
        became whole.  Raises: StoreError on a full disk."""
        self._make()
        wanted = {self.partial(file).name for file in files}
        names = {Path(file.path).name for file in files}
        others = [path for path in _oldest_first(self._partials) if path.name not in wanted]
        kept = [path for path in others if path.name.rpartition(".")[0] not in names]
        waiting = [path for path in _oldest_first(self._next / self._folder) if path.name not in names]
        for path in {*others, *waiting[:-MAX_PARTIALS]} - {*kept[-MAX_PARTIALS:]}:
            _remove(path)
        free = self._free(self.root)
        if missing_bytes + RESERVE_BYTES > free:
            raise StoreError(
                "disk",
                f"{missing_bytes} bytes are to come, {free} are free and {RESERVE_BYTES} of them stay so: free space on the disk",
            )

    # ------------------------------------------------------------ what comes and goes

    def half_there(self, file: shard.FileEntry) -> bool:
        return os.path.lexists(self.partial(file))

    def open_partial(self, file: shard.FileEntry, offset: int) -> BinaryIO:
        """The partial file, to be written from `offset` on; new at 0.  Raises: StoreError, OSError."""
        half = open_plain(self.partial(file), os.O_RDWR | (0 if offset else os.O_CREAT))
        try:
            if not offset:
                half.truncate(0)
            half.seek(offset)
        except BaseException:
            half.close()
            raise
        return half

    def forget(self, file: shard.FileEntry) -> None:
        """Deletes what is half there of a file.  Raises: StoreError, OSError."""
        _remove(self.partial(file))

    def finish(self, file: shard.FileEntry) -> None:
        """Gives a partial file its name, once its sha256 is right.  Raises: StoreError, and the partial file is gone then."""
        path = self.partial(file)
        with open_plain(path) as half:
            os.fsync(half.fileno())
            right = os.fstat(half.fileno()).st_size == file.bytes and _sha256(half, file.bytes) == file.sha256
        if not right:
            path.unlink()
            raise StoreError("hash", f"{file.path} is not what was offered (sha256 differs): send it again")
        _check_plain(self._next / file.path)
        os.replace(path, self._next / file.path)
        _sync(self._next / self._folder)

    def gather(self, files: tuple[shard.FileEntry, ...]) -> Path | None:
        """As `graph`, for files that have all come: what the new version has in common with the old one is copied beside the rest.

        Raises: StoreError, OSError.
        """
        found = self.graph(files)
        if found is not None or not all(self._whole(self.root, f) or self._whole(self._next, f) for f in files):
            return found
        for file in files:
            if not self._whole(self._next, file):
                with (
                    shard.atomic_file(self._to_write(self._next / file.path)) as out,
                    open_plain(self.root / file.path) as old,
                ):
                    shutil.copyfileobj(old, out, HASH_BYTES)
        return self.graph(files)

    def kept_graph(self, offer: Offer) -> Path | None:
        """As `graph`, at the agent's start, of a kept shard: what a power cut left to do is done."""
        found = self.graph(offer.files)
        if found is not None and found.is_relative_to(self.root / self._folder):
            return found
        self.settle(offer)
        return self.graph(offer.files)

    def keep(self, offer: Offer) -> None:
        """From now on the shard is loaded at every start, in this version."""
        self._make()
        frame = delivery_frame.pack(delivery_frame.Message(delivery_frame.OFFER, 0, offer=offer))
        with shard.atomic_file(self._to_write(self.root / f"{offer.shard.stem}.offer")) as out:
            out.write(frame)
        _remove(self.root / f"{offer.shard.stem}.dropped")
        self.settle(offer)

    def settle(self, offer: Offer) -> None:
        """Moves what of a kept shard is still in `next/` to its place, and deletes what was there of another version.

        May be cut off anywhere and done again.  Raises: StoreError, OSError.
        """
        for file in offer.files:
            if self._whole(self._next, file):
                _check_plain(self.root / file.path)
                os.replace(self._next / file.path, self.root / file.path)
        names = {Path(file.path).name for file in offer.files}
        for path in (self.root / self._folder).glob(f"{offer.shard.stem}.*"):
            if path.name not in names:
                _remove(path)
        self.forget_next(offer.shard)
        _sync(self.root / self._folder)

    def drop(self, which: Shard) -> None:
        """From now on the shard is not loaded any more; what was delivered of it is deleted."""
        self._make()
        with shard.atomic_file(self._to_write(self.root / f"{which.stem}.dropped")):
            pass
        _remove(self.root / f"{which.stem}.offer")
        self.discard(which)
        self.forget_next(which)

    def _to_write(self, path: Path) -> Path:
        """For shard.atomic_file, which would follow a link under its temporary name.  Raises: StoreError, OSError."""
        _check_plain(path)
        _remove(path.with_name(path.name + shard.PARTIAL_SUFFIX))
        return path

    def spoilt(self, which: Shard, graph: Path) -> None:
        """Deletes the files of a version that cannot be loaded; another version that is kept stays."""
        if graph.is_relative_to(self._next):
            self.forget_next(which)
        elif graph.is_relative_to(self.root):
            self.discard(which)

    def discard(self, which: Shard) -> None:
        """Deletes the shard's files, as far as they are this store's."""
        for path in (self.root / self._folder).glob(f"{which.stem}.*"):
            _remove(path)

    def forget_next(self, which: Shard) -> None:
        """Deletes what is whole of a shard, or of a version of it, that is not kept."""
        for path in (self._next / self._folder).glob(f"{which.stem}.*"):
            _remove(path)

    def dropped(self, stem: str) -> bool:
        return os.path.lexists(self.root / f"{stem}.dropped")

    def kept(self) -> Iterator[tuple[Path, Offer | None]]:
        """(file, offer) of all shards that were delivered; None for a file that is damaged or no plain one."""
        for path in sorted(self.root.glob("*.offer")):
            try:
                with open_plain(path) as file:
                    data = file.read(delivery_frame.MAX_FRAME_BYTES + 1)
                offer = delivery_frame.unpack(data).offer
            except (OSError, delivery_frame.DeliveryFrameError):
                offer = None
            yield path, offer


def _oldest_first(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: path.lstat().st_mtime)


def _sha256(file: BinaryIO, size: int) -> str:
    """Of at most the next `size` bytes."""
    digest = hashlib.sha256()
    while size and (piece := file.read(min(size, HASH_BYTES))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
