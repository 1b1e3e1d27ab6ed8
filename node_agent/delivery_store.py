"""Shards that came over the link, on this node's disk: what is there, what is half there, and what was taken away for good.

Below `<state_dir>/shards`: `experts/` as in a bundle, `partial/` what is half there, `<stem>.offer` for each shard that is whole
(the OFFER frame it came by, written last), `<stem>.dropped` for a shard of the node's own bundle that is not to be loaded any
more. A file gets its name only when its sha256 is right. Resuming after a power cut needs no fsync of what is half there: its
sha256 is told to the ground station, which compares it with its own.
Leaves out: frames and memory (delivery.py).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from node_agent import delivery_frame, shard
from node_agent.delivery_frame import Have, Offer, Shard
from node_agent.errors import AgentError

RESERVE_BYTES = 64 * 1024 * 1024  # of the disk stay free: the board needs them to live
MAX_PARTIALS = 16


class StoreError(AgentError, OSError):
    """A shard cannot be kept; `kind` is one of delivery_frame.REFUSALS."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class Store:
    """One folder, for one thread. `bundle`: the node's own bundle, whose files need no transfer; it is never written."""

    def __init__(self, root: Path, bundle: Path | None = None, free: Callable[[Path], int] = free_bytes):
        self.root, self._bundle, self._free = root, bundle, free
        self._partials = root / "partial"

    def _make(self) -> None:
        try:
            for folder in (self.root / delivery_frame.FOLDER, self._partials):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                "disk", f"{self.root} cannot be written ({error.strerror}): mend state_dir's disk"
            ) from None

    # ------------------------------------------------------------ what is there

    def graph(self, files: tuple[shard.FileEntry, ...]) -> Path | None:
        """Path of `files[0]` in the folder that has verified copies of all of them: a graph finds its weights beside itself."""
        for root in (self.root, self._bundle):
            if root is not None and all(_whole(root, file) for file in files):
                return root / files[0].path
        return None

    def partial(self, file: shard.FileEntry) -> Path:
        return self._partials / f"{Path(file.path).name}.{file.sha256[:16]}"

    def have(self, files: tuple[shard.FileEntry, ...]) -> tuple[Have, ...]:
        """What is here of each file, with the sha256 of just that."""
        if self.graph(files) is not None:
            return tuple(Have(file.bytes, file.sha256) for file in files)
        return tuple(self._have(file) for file in files)

    def _have(self, file: shard.FileEntry) -> Have:
        if _whole(self.root, file):
            return Have(file.bytes, file.sha256)
        path = self.partial(file)
        try:
            size = path.stat().st_size
            if 0 < size <= file.bytes:
                return Have(size, shard.sha256_of(path))
            path.unlink()
        except OSError:
            pass
        return Have(0, hashlib.sha256().hexdigest())

    def make_room(self, files: tuple[shard.FileEntry, ...], missing_bytes: int) -> None:
        """Drops partial files of other versions and the oldest beyond MAX_PARTIALS.  Raises: StoreError on a full disk."""
        self._make()
        wanted = {self.partial(file).name for file in files}
        names = {Path(file.path).name for file in files}
        others = sorted(
            (path for path in self._partials.iterdir() if path.name not in wanted), key=lambda p: p.stat().st_mtime
        )
        kept = [path for path in others if path.name.rpartition(".")[0] not in names]
        for path in {*others} - {*kept[-MAX_PARTIALS:]}:
            path.unlink(missing_ok=True)
        free = self._free(self.root)
        if missing_bytes + RESERVE_BYTES > free:
            raise StoreError(
                "disk",
                f"{missing_bytes} bytes are to come, {free} are free and {RESERVE_BYTES} of them stay so: free space on the disk",
            )

    # ------------------------------------------------------------ what comes and goes

    def finish(self, file: shard.FileEntry) -> None:
        """Gives a partial file its name, once its sha256 is right.  Raises: StoreError, and the partial file is gone then."""
        path = self.partial(file)
        with open(path, "rb") as half:
            os.fsync(half.fileno())
        if shard.sha256_of(path) != file.sha256:
            path.unlink()
            raise StoreError("hash", f"{file.path} is not what was offered (sha256 differs): send it again")
        os.replace(path, self.root / file.path)
        _sync(self.root / delivery_frame.FOLDER)

    def keep(self, offer: Offer) -> None:
        """From now on the shard is loaded at every start."""
        self._make()
        frame = delivery_frame.pack(delivery_frame.Message(delivery_frame.OFFER, 0, offer=offer))
        with shard.atomic_file(self.root / f"{offer.shard.stem}.offer") as out:
            out.write(frame)
        (self.root / f"{offer.shard.stem}.dropped").unlink(missing_ok=True)

    def drop(self, which: Shard) -> None:
        """From now on the shard is not loaded any more; what was delivered of it is deleted."""
        self._make()
        with shard.atomic_file(self.root / f"{which.stem}.dropped"):
            pass
        (self.root / f"{which.stem}.offer").unlink(missing_ok=True)
        self.discard(which)

    def discard(self, which: Shard) -> None:
        """Deletes the shard's files, as far as they are this store's."""
        for path in (self.root / delivery_frame.FOLDER).glob(f"{which.stem}.*"):
            path.unlink(missing_ok=True)

    def dropped(self, stem: str) -> bool:
        return (self.root / f"{stem}.dropped").exists()

    def kept(self) -> Iterator[tuple[Path, Offer | None]]:
        """(file, offer) of all shards that were delivered; None for a file that is damaged."""
        for path in sorted(self.root.glob("*.offer")):
            try:
                with open(path, "rb") as file:
                    data = file.read(delivery_frame.MAX_FRAME_BYTES + 1)
                offer = delivery_frame.unpack(data).offer
            except (OSError, delivery_frame.DeliveryFrameError):
                offer = None
            yield path, offer


def _whole(root: Path, file: shard.FileEntry) -> bool:
    try:
        return bool(shard.verify_file(root, file))
    except (shard.BundleError, OSError):
        return False


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
