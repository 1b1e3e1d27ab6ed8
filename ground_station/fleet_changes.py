"""What an operator does to a fleet's nodes: add, revoke, release, and look how they stand.

Each change is one step under the fleet folder's lock; who serves the fleet sees the folder's version move. Leaves out: the words
and questions of the command line (cli_fleet.py), and what cutting a node off means at the broker and on the data plane.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time
from dataclasses import dataclass

from ground_station import fleet_authority, fleet_records
from ground_station.fleet_authority import DAY_S
from ground_station.fleet_records import FleetFolder, FleetFolderError, NodeRecord, check_node
from node_agent import wire

TOKEN_BYTES = 32
TOKEN_DAYS, MAX_TOKEN_DAYS = 30.0, 365.0
TOKEN_WARN_DAYS = 3.0
RENEWAL_SHARE, LATE_SHARE = 1 / 3, 1 / 6
"""A board renews when this share of its certificate's time is left; when this little is left, it should have long done so."""


@dataclass(frozen=True)
class Standing:
    """How a node stands. Days are None where there is nothing that could expire."""

    id: str
    board: str
    state: str
    certificate_days: float | None
    certificate_expires_utc_s: float | None
    token_days: float | None
    token_expires_utc_s: float | None
    serial: str
    revoked: int
    reason: str
    warning: str


def check_addable(
    folder: FleetFolder, node: str, board: str, valid_days: float = TOKEN_DAYS, again: bool = False
) -> NodeRecord | None:
    """The record so far of a node that may be added; None: it is new.  Raises: FleetFolderError."""
    check_node(node)
    try:
        wire.check_id(board, "board")
    except wire.WireError as error:
        raise FleetFolderError(str(error)) from None
    if not 0 < valid_days <= MAX_TOKEN_DAYS:
        raise FleetFolderError(f"a token for {valid_days:g} days: give more than 0 and at most {MAX_TOKEN_DAYS:g}")
    known = folder.record_path(node).exists()
    if known and not again:
        raise FleetFolderError(
            f"{folder.info.fleet} has a node {node!r}: --again makes a new token for a board that was flashed again; "
            "its old certificate ends then"
        )
    if not known and len(folder.nodes()) >= fleet_records.MAX_NODES:
        raise FleetFolderError(f"{folder.info.fleet} has {fleet_records.MAX_NODES} nodes: make another fleet")
    return folder.node(node) if known else None


def add_node(
    folder: FleetFolder, node: str, board: str, valid_days: float = TOKEN_DAYS, again: bool = False
) -> tuple[NodeRecord, str]:
    """A new record and its claim token, which is kept nowhere. `again`: a node that is known starts anew, its old token and
    certificates are dead from now on.  Raises: FleetFolderError, FleetBusyError, OSError."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    with folder.locked():
        now_utc_s = time.time()
        old = check_addable(folder, node, board, valid_days, again) or NodeRecord(node, board)
        dead = fleet_authority.held_serials(old)
        record = NodeRecord(
            id=node,
            board=board,
            token_sha256=hashlib.sha256(token.encode()).hexdigest(),
            token_expires_utc_s=now_utc_s + valid_days * DAY_S,
            revoked_serials=fleet_authority.revoked_now(old, *dead),
            created_utc_s=old.created_utc_s or now_utc_s,
        )
        folder.write(record)
        if dead:
            fleet_authority.write_revocations(folder)
    return record, token


def revoke(folder: FleetFolder, node: str, reason: str = "") -> NodeRecord:
    """Ends a node's token and certificates; also mends a revocation that was cut short.

    Raises: FleetFolderError, FleetBusyError, OSError.
    """
    with folder.change(node) as record:
        record = dataclasses.replace(
            record,
            state="revoked",
            token_sha256="",
            token_expires_utc_s=0.0,
            revoked_serials=fleet_authority.revoked_now(record, *fleet_authority.held_serials(record)),
            reason=" ".join(reason.split())[:400],
        )
        folder.write(record)
        fleet_authority.write_revocations(folder)
    return record


def release(folder: FleetFolder, node: str) -> NodeRecord:
    """Puts a quarantined node back to work.  Raises: FleetFolderError, FleetBusyError, OSError."""
    with folder.change(node) as record:
        if record.state != "quarantined":
            raise FleetFolderError(f"node {node} is {record.state}, not quarantined: there is nothing to release")
        record = dataclasses.replace(record, state="enrolled", reason="")
        folder.write(record)
    return record


def standings(folder: FleetFolder, now_utc_s: float) -> list[Standing]:
    """Every node, by id.  Raises: FleetFolderError."""
    return [standing(record, folder.info.certificate_days, now_utc_s) for record in folder.nodes().values()]


def standing(record: NodeRecord, certificate_days: int, now_utc_s: float) -> Standing:
    """How one node stands at `now_utc_s`, with a warning that says what to do where it will not go on by itself."""
    held = record.state in ("enrolled", "quarantined") and bool(record.serial)
    waits = record.state == "new" and bool(record.token_sha256)
    left_days = (record.not_after_utc_s - now_utc_s) / DAY_S if held else None
    token_days = (record.token_expires_utc_s - now_utc_s) / DAY_S if waits else None
    again = f"`spacemoe fleet add {record.id} --board {record.board} --again`"
    reason = "".join(each if each.isprintable() else " " for each in record.reason)
    warning = ""
    if held and left_days <= 0:
        warning = f"its certificate has expired: {again} and flash the board again"
    elif held and left_days < certificate_days * LATE_SHARE:
        warning = f"its certificate ends in {left_days:.0f} days and it has not renewed: connect the board"
    elif waits and token_days <= 0:
        warning = f"its claim token has expired: {again}"
    elif waits and token_days < TOKEN_WARN_DAYS:
        warning = f"its claim token ends in {token_days * 24:.0f} hours: start the board, or {again}"
    elif record.state == "quarantined":
        warning = f"quarantined ({reason or 'no reason given'}): `spacemoe fleet release {record.id}` puts it back"
    return Standing(
        record.id,
        record.board,
        record.state,
        left_days,
        record.not_after_utc_s if held else None,
        token_days,
        record.token_expires_utc_s if waits else None,
        record.serial,
        len(record.revoked_serials),
        reason,
        warning,
    )
