"""Where a fleet's broker is and how it is entered: by a fleet's folder (mutual TLS), or by an address alone (plain, a broker of one's own).

Leaves out: the data plane's keys, which only the commands that bind it need.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ground_station.broker import LOOPBACK, Broker
from ground_station.broker_fleet import ground_files
from ground_station.fleet_records import FleetFolder

PLAIN = f"{LOOPBACK}:1883"
FLEET = "demo"

Tls = tuple[Path, Path, Path]
"""(authority, certificate, key), PEM files."""


class AccessError(ValueError):
    """What was given does not go together; the text says what does."""


@dataclass(frozen=True)
class Access:
    """`folder` and `tls` None: a plain broker."""

    fleet: str
    host: str
    port: int
    folder: FleetFolder | None = None
    tls: Tls | None = None


def access(folder: Path | None, broker: str | None, fleet: str | None) -> Access:
    """`broker` HOST:PORT; None takes the folder's, or PLAIN.  Raises: AccessError, FleetFolderError, AddressError."""
    if folder is None:
        there = Broker(Path(), "external", external=PLAIN if broker is None else broker)
        return Access(fleet or FLEET, there.host, there.port)
    if fleet is not None:
        raise AccessError("--fleet goes without --dir: the fleet's folder says its name")
    known = FleetFolder.open(folder)
    there = Broker(Path(), "external", external=f"{LOOPBACK}:{known.info.ports.broker}" if broker is None else broker)
    return Access(known.info.fleet, there.host, there.port, known, ground_files(known))
