"""What changed, for everyone who watches: each frame encoded once, a bounded queue per watcher. Leaves out what the frames say.

A watcher that does not keep up loses frames, is told how many, and never makes anybody wait. Frames are server-sent events
(WHATWG HTML, 9.2): `event:` and `data:` lines, the data one line of JSON.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

MAX_QUEUED_BYTES = 2 * 1024 * 1024
MAX_WATCHERS = 64


class TooManyWatchers(RuntimeError):
    """MAX_WATCHERS are connected already."""


def encode(kind: str, content: Any) -> bytes:
    """One server-sent event.  Raises: ValueError for a NaN or an infinity."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), compact(content))


def compact(content: Any) -> bytes:
    """JSON without spaces, UTF-8; lone surrogates stay escaped.  Raises: ValueError for a NaN or an infinity."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


class Watcher:
    """One subscription; `wake` is called, from any thread, whenever frames wait."""

    def __init__(self, wake: Callable[[], None], max_bytes: int):
        self._wake, self._max_bytes = wake, max_bytes
        self._lock = threading.Lock()
        self._frames: deque[bytes] = deque()
        self._bytes = self._missed = 0
        self.lost = 0  # over its whole life

    def put(self, frame: bytes) -> None:
        with self._lock:
            if self._missed or self._bytes + len(frame) > self._max_bytes:
                self._missed += 1
                self.lost += 1
            else:
                self._frames.append(frame)
                self._bytes += len(frame)
        self._wake()

    def take(self) -> list[bytes]:
        """All that waits, in order; after a loss a last frame `lost` says how many went: what is shown must be fetched anew."""
        with self._lock:
            frames, missed = list(self._frames), self._missed
            self._frames.clear()
            self._bytes = self._missed = 0
        if missed:
            frames.append(encode("lost", {"frames": missed}))
        return frames


class Feed:
    """Hands frames to every watcher. Thread safe."""

    def __init__(self, max_watchers: int = MAX_WATCHERS, max_bytes: int = MAX_QUEUED_BYTES):
        self._lock = threading.Lock()
        self._watchers: tuple[Watcher, ...] = ()
        self._max_watchers, self._max_bytes = max_watchers, max_bytes
        self.frames = self.lost = 0

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def publish(self, kind: str, content: Any) -> None:
        """Encodes once, for all; nothing where nobody watches.  Raises: ValueError for a NaN or an infinity."""
        watchers = self._watchers
        if watchers:
            frame = encode(kind, content)
            self.frames += 1
            for watcher in watchers:
                watcher.put(frame)

    def watch(self, wake: Callable[[], None]) -> Watcher:
        """Raises: TooManyWatchers."""
        watcher = Watcher(wake, self._max_bytes)
        with self._lock:
            if len(self._watchers) >= self._max_watchers:
                raise TooManyWatchers(f"{self._max_watchers} pages are open already: close one")
            self._watchers = (*self._watchers, watcher)
        return watcher

    def leave(self, watcher: Watcher) -> None:
        with self._lock:
            self._watchers = tuple(each for each in self._watchers if each is not watcher)
            self.lost += watcher.lost
