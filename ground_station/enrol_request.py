"""A board's certificate request (PKCS #10), checked against the contract before anything else looks at it.

Leaves out: whether the node may have a certificate (enrol_rules.py), and signing it (fleet_authority.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from ground_station.fleet_records import FleetFolderError, check_node
from node_agent import enrolment

REQUEST_HASHES = ("sha256", "sha384", "sha512")
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion)
UNREADABLE += (x509.DuplicateExtension, x509.UnsupportedGeneralNameType, x509.AttributeNotFound)
"""What the parsers raise for a stranger's bytes."""


class RequestError(ValueError):
    """A certificate request cannot be granted; the text says why."""


@dataclass(frozen=True)
class Request:
    """What a checked request asks for."""

    node: str
    curve_public: str
    public_key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

    @property
    def public_key_sha256(self) -> str:
        return hashlib.sha256(
            self.public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        ).hexdigest()


def read_request(der: bytes, fleet: str) -> Request:
    """A PKCS #10 request whose signature, key, subject and names are as the contract says.  Raises: RequestError."""
    if len(der) > enrolment.MAX_REQUEST_BYTES:
        raise RequestError(f"the request has {len(der)} bytes: at most {enrolment.MAX_REQUEST_BYTES}")
    try:
        request = x509.load_der_x509_csr(der)
        key = request.public_key()
    except UNREADABLE:
        raise RequestError("the request is no PKCS #10 request of a known key type") from None
    if isinstance(key, ec.EllipticCurvePublicKey):
        usable = isinstance(key.curve, ec.SECP256R1)
    else:
        usable = isinstance(key, ed25519.Ed25519PublicKey)
    if not usable:  # before its signature is looked at: checking a huge RSA key takes long
        raise RequestError("the request's key is neither EC P-256 nor Ed25519")
    try:
        digest = request.signature_hash_algorithm
        if digest is not None and digest.name not in REQUEST_HASHES:
            raise RequestError(f"the request is signed by {digest.name}: use one of {', '.join(REQUEST_HASHES)}")
        signed = request.is_signature_valid
        names = {attribute.oid: attribute.value for attribute in request.subject}
        count = len(list(request.subject))
        extensions = request.extensions
    except UNREADABLE:
        raise RequestError("the request's signature, subject or extensions cannot be read") from None
    if not signed:
        raise RequestError("the request's signature is wrong: whoever sent it does not hold the key")
    if count != 2 or set(names) != {NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME}:
        raise RequestError("the request's subject is not CN = node id and O = fleet id and nothing else")
    if names[NameOID.ORGANIZATION_NAME] != fleet:
        raise RequestError(
            f"the request is for fleet {str(names[NameOID.ORGANIZATION_NAME])[:40]!r}, this is {fleet!r}"
        )
    try:
        node = check_node(names[NameOID.COMMON_NAME])
        alternatives = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except FleetFolderError as error:
        raise RequestError(str(error)[:200]) from None
    except x509.ExtensionNotFound:
        alternatives = []
    if len(alternatives) != 1 or not isinstance(alternatives[0], x509.UniformResourceIdentifier):
        raise RequestError("the request's subject alternative name is not one URI with the CURVE key")
    try:
        curve_public = enrolment.curve_key(alternatives[0].value)
    except enrolment.EnrolmentError as error:
        raise RequestError(str(error)) from None
    if not _is_point(curve_public):
        raise RequestError(f"{curve_public!r} is no CURVE key: its text stands for no 32 bytes")
    return Request(node, curve_public, key)


def _is_point(key: str) -> bool:
    """Whether a Z85 text stands for 32 bytes: five characters can also say more than 32 bits hold."""
    import zmq.utils.z85 as z85

    try:
        return len(z85.decode(key)) == 32
    except Exception:  # pyzmq lets struct.error through, or ValueError, or KeyError, by its version
        return False
