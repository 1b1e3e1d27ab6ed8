"""Puts one file into a finished bundle, in place of the one of that name or beside the others, and its entry into the manifest.

The new file is written beside its place, then the manifest, then it is renamed. Cut off between the last two, the manifest speaks of a
file that is not yet in place: every reader says so, and `finish` (or the same command again) puts it there.
Leaves out: shards and trunk segments, and signing: a signature is of the old manifest and has to be made again.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node_agent.shard import BundleError, FileEntry, Manifest, atomic_file, read_manifest, sha256_of, write_manifest

SUFFIX = ".new"
SIGNATURE = "manifest.sig"
SIGNATURE_BYTES = 64  # Ed25519
SHARD_SIGNATURES = "shards.sig"


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds the bundle's folder against other writers, as the pipeline that makes bundles does.  Raises: shard.BundleError."""
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BundleError(f"{root} cannot be opened ({error.strerror}): give a bundle's folder") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BundleError(f"another run is writing {root}: wait for it") from None
    finally:
        os.close(folder)


def entry_of(manifest: Manifest, relative: str) -> FileEntry | None:
    return next((item for item in manifest.files if item.path == relative), None)


def put(root: Path, relative: str, data: bytes) -> Manifest:
    """Writes the file and returns the new manifest. To be called under `alone`.  Raises: shard.BundleError, OSError."""
    entry = FileEntry(relative, len(data), hashlib.sha256(data).hexdigest())
    with atomic_file(root / (relative + SUFFIX)) as file:
        file.write(data)
    manifest = read_manifest(root)  # just now: others may have added shards since the caller read it
    known = entry_of(manifest, relative) is not None
    files = tuple(entry if item.path == relative else item for item in manifest.files) + (() if known else (entry,))
    manifest = dataclasses.replace(manifest, files=files)
    write_manifest(root, manifest)
    finish(root, entry)
    return manifest


def finish(root: Path, entry: FileEntry) -> None:
    """Puts a new file in place where the manifest speaks of it, and drops one of which it does not."""
    new = root / (entry.path + SUFFIX)
    if not new.exists():
        return
    if new.stat().st_size == entry.bytes and sha256_of(new) == entry.sha256:
        new.replace(root / entry.path)
    else:
        new.unlink()


def stale_signature(root: Path) -> str:
    """What to say of a signature after the manifest changed; '' where there is none."""
    signed = [name for name in (SIGNATURE, SHARD_SIGNATURES) if (root / name).exists()]
    if not signed:
        return ""
    verb = "is" if len(signed) == 1 else "are"
    return f"{' and '.join(signed)} {verb} of the old manifest: sign the bundle again"
