"""Who gets a certificate: the rules for a claim with a one-time token and for a renewal, on the records of the fleet folder.

A token is for one key. Whoever shows it again with that key gets the same certificate, since a power cut may have eaten the answer;
with another key it is a replay. A node holds at most two certificates, the current one and the one before; whatever drops out
before its end goes on the revocation list. Leaves out: HTTP and TLS (enrol_server.py), signing (fleet_authority.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import logging
import time

from cryptography import x509
from cryptography.x509.oid import NameOID

from ground_station import enrol_request, fleet_authority
from ground_station.enrol_request import Request, RequestError
from ground_station.fleet_records import FleetFolder, FleetFolderError, NodeRecord, check_node
from node_agent import enrolment

log = logging.getLogger("spacemoe.enrol")
MAX_REVOKED = 256
"""Certificates of one node that may stand on the revocation list before it has to wait."""
_UNKNOWN = "0" * 64


class RefusedError(RuntimeError):
    """No certificate; `status` is the HTTP status, the text says why and what to do."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def claim(folder: FleetFolder, node: str, token: str, der: bytes) -> x509.Certificate:
    """The certificate for a request that came with a claim token.  Raises: RefusedError, FleetFolderError, FleetBusyError, OSError."""
    _check_token(folder.node(node) if _listed(folder, node) else None, token)
    request = _request(folder, der)
    if request.node != node:
        raise RefusedError(403, f"the request is for node {request.node!r}, the claim for {node!r}")
    now_utc_s = time.time()
    with folder.change(node) as record:
        _check_token(record, token)  # it may have been replaced since
        if record.state not in ("new", "enrolled"):
            raise RefusedError(403, f"node {node} is {record.state}: ask the ground station's operator")
        if record.claimed_utc_s and record.public_key_sha256 != request.public_key_sha256:
            raise RefusedError(403, f"the token was used already: `spacemoe fleet add {node} --again` makes another")
        if now_utc_s >= record.token_expires_utc_s:
            raise RefusedError(403, f"the token has expired: `spacemoe fleet add {node} --again` makes another")
        again = _same(folder, record, request, now_utc_s)
        if again is not None:
            log.info("node %s asked again with its key and gets certificate %s again", node, record.serial)
            return again
        claimed = dataclasses.replace(record, claimed_utc_s=record.claimed_utc_s or now_utc_s)
        dead = fleet_authority.live_serials(record, now_utc_s)
        certificate = _issue(folder, claimed, request, "", 0.0, dead)
    log.info("node %s claimed certificate %s", node, fleet_authority.serial_of(certificate))
    return certificate


def renew(folder: FleetFolder, shown: x509.Certificate, der: bytes) -> x509.Certificate:
    """The certificate for a request over a TLS connection whose client certificate was verified by the fleet's authority.

    Raises: RefusedError, FleetFolderError, FleetBusyError, OSError.
    """
    node = _owner(folder, shown)
    if not _listed(folder, node):
        raise RefusedError(403, f"node {node} is not of this fleet any more")
    request = _request(folder, der)
    if request.node != node:
        raise RefusedError(403, f"the request is for node {request.node!r}, the certificate is of {node!r}")
    now_utc_s = time.time()
    serial = fleet_authority.serial_of(shown)
    with folder.change(node) as record:
        if record.state != "enrolled":
            raise RefusedError(403, f"node {node} is {record.state}: ask the ground station's operator")
        if serial not in fleet_authority.live_serials(record, now_utc_s) or serial in record.revoked_serials:
            raise RefusedError(
                403,
                f"certificate {serial} of node {node} is revoked, expired or replaced: "
                f"`spacemoe fleet add {node} --again` makes a new claim",
            )
        if len(record.revoked_serials) >= MAX_REVOKED:
            raise RefusedError(
                429, f"node {node} renews too often: {len(record.revoked_serials)} certificates are revoked"
            )
        if serial == record.serial:
            previous, end_utc_s = record.serial, record.not_after_utc_s
            dead = (record.previous_serial,) if record.previous_not_after_utc_s > now_utc_s else ()
        else:  # the answer to its last renewal never reached it
            again = _same(folder, record, request, now_utc_s)
            if again is not None:
                log.info("node %s asked again with its key and gets certificate %s again", node, record.serial)
                return again
            previous, end_utc_s, dead = serial, record.previous_not_after_utc_s, (record.serial,)
        certificate = _issue(folder, record, request, previous, end_utc_s, dead)
    log.info("node %s renewed: certificate %s", node, fleet_authority.serial_of(certificate))
    return certificate


def _issue(
    folder: FleetFolder, record: NodeRecord, request: Request, previous: str, previous_end_utc_s: float, dead
) -> x509.Certificate:
    """Signs, stores, and revokes what drops out, all under the caller's lock, before anything is answered."""
    if request.curve_public.encode() == folder.curve_keys()[0]:
        raise RefusedError(403, "the CURVE key is the ground station's own")
    for other in folder.nodes().values():
        if other.id == record.id:
            continue
        if other.curve_public == request.curve_public or other.public_key_sha256 == request.public_key_sha256:
            raise RefusedError(403, f"a key of the request belongs to node {other.id}: make new keys on the board")
    certificate = fleet_authority.issue(folder, request)
    fleet_authority.store_certificate(folder, record.id, certificate)
    dead = tuple(filter(None, dead))
    folder.write(
        dataclasses.replace(
            record,
            state="enrolled",
            serial=fleet_authority.serial_of(certificate),
            not_after_utc_s=certificate.not_valid_after_utc.timestamp(),
            curve_public=request.curve_public,
            public_key_sha256=request.public_key_sha256,
            previous_serial=previous,
            previous_not_after_utc_s=previous_end_utc_s,
            revoked_serials=fleet_authority.revoked_now(record, *dead),
        )
    )
    if dead:
        fleet_authority.write_revocations(folder)
    return certificate


def _same(folder: FleetFolder, record: NodeRecord, request: Request, now_utc_s: float) -> x509.Certificate | None:
    """The current certificate where it is for the same keys as the request and still good."""
    if record.public_key_sha256 != request.public_key_sha256 or record.curve_public != request.curve_public:
        return None
    certificate = fleet_authority.stored_certificate(folder, record)
    return certificate if certificate is not None and certificate.not_valid_after_utc.timestamp() > now_utc_s else None


def _check_token(record: NodeRecord | None, token: str) -> None:
    """One text for an unknown node and a wrong token: it tells a stranger nothing of which nodes there are."""
    given = hashlib.sha256(token.encode(errors="replace")).hexdigest()
    known = record.token_sha256 if record is not None and record.token_sha256 else _UNKNOWN
    if not hmac.compare_digest(given, known) or not enrolment.TOKEN.fullmatch(token):
        raise RefusedError(
            401, "unknown node or wrong claim token: flash the card with the node's newest pack (`spacemoe fleet add`)"
        )


def _listed(folder: FleetFolder, node: str) -> bool:
    """Whether there is a record of this name, sound or not."""
    try:
        return folder.record_path(node).exists()
    except FleetFolderError:
        return False


def _request(folder: FleetFolder, der: bytes) -> Request:
    try:
        return enrol_request.read_request(der, folder.info.fleet)
    except RequestError as error:
        raise RefusedError(400, str(error)) from None


def _owner(folder: FleetFolder, shown: x509.Certificate) -> str:
    """The node that a certificate of ours is for.  Raises: RefusedError."""
    names = {attribute.oid: attribute.value for attribute in shown.subject}
    if names.get(NameOID.ORGANIZATION_NAME) != folder.info.fleet:
        raise RefusedError(403, "the certificate is of another fleet")
    try:
        return check_node(names.get(NameOID.COMMON_NAME, ""))
    except FleetFolderError:
        raise RefusedError(403, "the certificate is no node's") from None
