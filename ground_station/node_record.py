"""What is kept of a fleet and of each of its nodes, and which values these may have.

Leaves out: where it lies and how it is changed (fleet_records.py).
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import typing
from dataclasses import dataclass
from typing import Any, Literal

from ground_station.fleet_files import FleetFolderError
from node_agent import enrolment, wire

MAX_HOSTS = 32
CERTIFICATE_DAYS, MAX_CERTIFICATE_DAYS = 90, 397
MAX_REVOKED_SERIALS = 1024
"""None is ever forgotten, and that many fit into a record's file; a node that renews without end is stopped far below."""
_HOST = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_HEX = re.compile(r"[0-9a-f]*")

State = Literal["new", "enrolled", "revoked", "quarantined"]


@dataclass(frozen=True)
class Ports:
    """Where the ground station listens: TLS broker, enrolment, data plane, delivery of shards."""

    broker: int = 8883
    enrol: int = 8870
    data: int = 5570
    delivery: int = 5571


@dataclass(frozen=True)
class FleetInfo:
    """What holds for the whole fleet. `hosts`: names and addresses under which boards reach the ground station, best first."""

    fleet: str
    hosts: tuple[str, ...]
    ports: Ports = Ports()
    certificate_days: int = CERTIFICATE_DAYS


@dataclass(frozen=True)
class NodeRecord:
    """What the ground station knows of a node. Of its claim token only the hash; of its keys only the public halves.

    A node may hold two certificates at a time: the current one (`serial`) and the one before it, which it still needs when the
    answer to a renewal got lost. `revoked_serials` are on the certificate revocation list.
    """

    id: str
    board: str
    state: State = "new"
    token_sha256: str = ""
    token_expires_utc_s: float = 0.0
    claimed_utc_s: float = 0.0
    serial: str = ""
    not_after_utc_s: float = 0.0
    curve_public: str = ""
    public_key_sha256: str = ""
    revoked_serials: tuple[str, ...] = ()
    reason: str = ""
    created_utc_s: float = 0.0
    previous_serial: str = ""
    previous_not_after_utc_s: float = 0.0


def check_node(node: str) -> str:
    """Returns `node` if a node may have this name.  Raises: FleetFolderError."""
    try:
        wire.check_id(node)
    except wire.WireError as error:
        raise FleetFolderError(str(error)) from None
    if node == enrolment.GROUND:
        raise FleetFolderError(f"{node!r} is the ground station's own name: give the node another")
    return node


def check_host(host: str) -> str:
    """Returns `host` if boards can reach something under it.  Raises: FleetFolderError."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not isinstance(host, str) or not _HOST.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
            raise FleetFolderError(f"{str(host)[:80]!r} is no host: give a DNS name or an IP address") from None
        return host
    if address.is_unspecified or address.is_multicast or getattr(address, "scope_id", None):
        raise FleetFolderError(f"{host} is no address of one machine: give the one that boards reach this machine by")
    return host


def usable(record: NodeRecord) -> bool:
    """True where every text of a record is of its own form; the types are right already."""
    hexes = (
        record.token_sha256,
        record.serial,
        record.public_key_sha256,
        record.previous_serial,
        *record.revoked_serials,
    )
    try:
        wire.check_id(record.board, "board")
        if record.curve_public:
            enrolment.curve_urn(record.curve_public)
    except (wire.WireError, enrolment.EnrolmentError):
        return False
    return (
        record.state in typing.get_args(State)
        and all(_HEX.fullmatch(text) and len(text) <= 64 for text in hexes)
        and len(record.reason) <= 400
        and len(record.revoked_serials) <= MAX_REVOKED_SERIALS
    )


def checked(info: FleetInfo, where: Any) -> FleetInfo:
    """Returns `info` if it can be used.  Raises: FleetFolderError."""
    try:
        wire.check_id(info.fleet, "fleet name")
    except wire.WireError as error:
        raise FleetFolderError(str(error)) from None
    if not 1 <= len(info.hosts) <= MAX_HOSTS:
        raise FleetFolderError(
            f"{where}: {len(info.hosts)} hosts: give 1 to {MAX_HOSTS} that boards reach this machine by"
        )
    for host in info.hosts:
        check_host(host)
    for name, port in dataclasses.asdict(info.ports).items():
        if not 1 <= port <= 65_535:
            raise FleetFolderError(f"{where}: port {name} is {port}: give 1 to 65535")
    ports = dataclasses.astuple(info.ports)
    for port in ports:
        if ports.count(port) > 1:
            raise FleetFolderError(f"{where}: port {port} is given twice: give each of the four its own")
    if not 1 <= info.certificate_days <= MAX_CERTIFICATE_DAYS:
        raise FleetFolderError(
            f"{where}: certificate_days is {info.certificate_days}: give 1 to {MAX_CERTIFICATE_DAYS}"
        )
    return info
