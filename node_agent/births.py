"""bdSeq, Sparkplug's number of a node's connection, kept across restarts; and the state folder's lock: one agent, one folder.

Leaves out: what is published with it (control.py).
"""

from __future__ import annotations

import fcntl
import logging
import time
from pathlib import Path

from node_agent.errors import AlreadyRunningError, ConfigError
from node_agent.shard import atomic_file

log = logging.getLogger("node_agent.control")


class BirthCounter:
    """bdSeq: one more for every connection that was tried, also across restarts. Holds the state folder for one process."""

    def __init__(self, state_dir: Path):
        """Raises: ConfigError for a folder that cannot be written, AlreadyRunningError."""
        self._file = state_dir / "bd_seq"
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            self._lock = open(state_dir / "lock", "a")  # noqa: SIM115 - held until the process ends
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunningError(
                f"another agent uses {state_dir}: stop it, or give this one its own state_dir"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"[node] state_dir {state_dir} cannot be used ({error.strerror}): give a folder to write"
            ) from None
        try:
            self.value = int(self._file.read_text()[:20])
        except FileNotFoundError:
            self.value = 0
        except (OSError, ValueError):
            # A lost counter must not bring back a bdSeq that was used: the clock is far above any number of connections.
            self.value = int(time.time())
            log.warning("%s is damaged: counting births from %d", self._file, self.value)

    def next(self) -> int:
        self.value = self.value + 1 if 0 <= self.value < 2**62 else 1
        with atomic_file(self._file) as file:
            file.write(str(self.value).encode())
        return self.value

    def close(self) -> None:
        self._lock.close()
