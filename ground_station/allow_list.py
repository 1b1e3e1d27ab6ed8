"""Which data-plane key belongs to which node by the fleet's records, and who enforces a change of the records while things run.

The fleet folder is the one source of truth. `AllowList` is what the data plane asks (curve_gate.py); `FleetWatch` looks at the
folder four times a second and carries a change to the broker: rights, certificates, revocation list.
Leaves out: sockets (curve_gate.py), the broker's commands (broker_rights.py).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

from ground_station.fleet_records import CRL, GROUND_CERT, FleetFolder, FleetFolderError

if TYPE_CHECKING:
    from ground_station.broker import Broker
    from ground_station.broker_rights import Rights

log = logging.getLogger("spacemoe.fleet")

LOOK_S = 0.25
# A node that came back between its kick and the new revocation list, or had a connection half open (mosquitto ends such a one after
# 90 s), has no rights; it is disconnected all the same.
KICK_AGAIN_S = (0.3, 0.6, 1.2, 5.0, 15.0, 30.0, 60.0, 95.0)
JOIN_S = 10.0


class AllowList:
    """The data-plane keys of enrolled nodes. May be used from any thread, and by several sockets."""

    def __init__(self, folder: FleetFolder):
        """Raises: FleetFolderError."""
        self._folder = folder
        self._lock = threading.Lock()
        self._version: Hashable = None
        self._nodes: Mapping[str, bytes] = {}
        self._names: Mapping[bytes, str] = {}
        self.refresh()

    def refresh(self) -> Mapping[str, bytes]:
        """Node -> key (Z85), as the records are now; cheap where nothing changed, and then the same object as before.

        Raises: FleetFolderError, OSError; then the list stays as it was.
        """
        with self._lock:
            version = self._folder.version()
            if version != self._version:
                records, _ = self._folder.scan()  # a damaged record lets nobody in, and keeps nobody else out
                nodes = {
                    name: record.curve_public.encode()
                    for name, record in records.items()
                    if record.state == "enrolled" and record.curve_public
                }
                names: dict[bytes, str] = {}
                for name, key in nodes.items():
                    # a key of two nodes could be either: it lets nobody in
                    names[key] = "" if key in names else name
                self._nodes = {name: key for name, key in nodes.items() if names[key] == name}
                self._names = names
                self._version = version
            return self._nodes

    def node_of(self, key: bytes) -> str | None:
        """Whose key (Z85) that is; None for a key that lets nobody in."""
        return self._names.get(key) or None

    def holds(self, node: str, key: bytes) -> bool:
        """Whether `node` may speak with this key."""
        return self._nodes.get(node) == key

    def allows(self, node: str) -> bool:
        return node in self._nodes


class FleetWatch:
    """Carries changes of the fleet folder to the broker, from its start to its end. Use as a context manager.

    Args:
        rights: connected; reconciled with the records.
        broker: told to read its certificates and the revocation list again when they were written; started again should it end.
    `failures` counts looks that failed; each is tried again at the next look, and the first of a kind is logged.
    """

    def __init__(self, folder: FleetFolder, rights: Rights | None = None, broker: Broker | None = None):
        self._folder, self._rights, self._broker = folder, rights, broker
        self._done_version: Hashable = None
        self._files: Hashable = None
        self._disabled: frozenset[str] = frozenset()
        self._kicks: list[tuple[float, frozenset[str]]] = []  # (when, whom)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet watch", daemon=True)
        self._said = ""
        self.failures = 0

    def __enter__(self) -> FleetWatch:
        """Raises: RightsError, FleetFolderError, OSError where the first look fails."""
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(JOIN_S)

    def look(self) -> None:
        """Enforces what has changed since the last look.

        Raises: RightsError, BrokerError, FleetFolderError, FleetBusyError, OSError.
        """
        if self._folder.version() == self._done_version:
            return
        with self._folder.locked():  # a revocation writes a record and then the list: half of it is not acted upon
            version, files = self._folder.version(), self._certificates()
            records, damaged = self._folder.scan()
        for error in damaged:
            log.error("a node without a sound record has no rights: %s", error)
        self._disabled = frozenset(name for name, record in records.items() if record.state != "enrolled")
        if files != self._files and self._broker is not None:
            # before the kick: who comes back after it must find the new list
            self._broker.reload()
        self._files = files
        if self._rights is not None:
            cut = self._rights.reconcile(records)
            if cut:
                log.warning("cut off from the broker: %s", ", ".join(sorted(cut)))
                now_s = time.monotonic()
                self._kicks += [(now_s + after_s, cut) for after_s in KICK_AGAIN_S]
        self._done_version = version

    def _certificates(self) -> Hashable:
        found = [os.stat(self._folder.path(name)) for name in (CRL, GROUND_CERT)]
        return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in found)

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                if self._broker is not None and not self._broker.running:
                    log.error("the fleet's broker ended: starting it again")
                    self._broker.restart()
                self.look()
                now_s = time.monotonic()
                due = frozenset().union(*(cut for at_s, cut in self._kicks if at_s <= now_s))
                if due:
                    self._rights.kick(due & self._disabled)  # one that was released meanwhile would be disabled by it
                self._kicks = [(at_s, cut) for at_s, cut in self._kicks if at_s > now_s]
                self._said = ""
            except (RuntimeError, FleetFolderError, OSError) as error:
                self.failures += 1
                if str(error) != self._said:
                    self._said = str(error)
                    log.error("the fleet's records are not enforced yet, trying again: %s", error)
