"""Enrolment contract: how a board asks for its certificate (EST, RFC 7030, with a one-time claim token), and the files of a provision pack.

The board posts a PKCS #10 request (base64 of DER) to ENROL with HTTP Basic authentication (node id, claim token) over TLS whose
certificate authority it knows from its pack; the answer is a PKCS #7 "certs-only" message (base64 of DER). Renewal goes to RENEW with
the certificate that is still valid as TLS client certificate. The request's subject is CN = node id, O = fleet id; its subject
alternative name holds one URI, `curve_urn` of the node's public data-plane key, so that the certificate binds both keys to one name.
Leaves out: keys and requests (enrol.py on the board), issuing (the ground station).
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

CACERTS = "/.well-known/est/cacerts"
ENROL = "/.well-known/est/simpleenroll"
RENEW = "/.well-known/est/simplereenroll"
REQUEST_TYPE = "application/pkcs10"
ANSWER_TYPE = "application/pkcs7-mime; smime-type=certs-only"
MAX_REQUEST_BYTES = 16 * 1024
MAX_ANSWER_BYTES = 64 * 1024

CONFIG, CA, CLAIM = "spacemoe.toml", "ca.pem", "claim"
"""Files of a provision pack."""
FLASHED = "flashed.json"
"""Beside them once the pack went onto a card: its token may be used by then."""
CERT, KEY, CURVE_KEY = "node.pem", "node.key", "curve.key"
"""What the board makes or gets beside them."""
MAX_PACK_FILE_BYTES = 256 * 1024
PACK_FOLDER = "spacemoe"
"""Folder of the pack on the card's FAT partition."""

GROUND = "ground"
"""The ground station's own name in its certificate: no node may have it."""

TOKEN = re.compile(r"[A-Za-z0-9_-]{32,64}")
_URN = "urn:spacemoe:curve:"
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


class EnrolmentError(ValueError):
    """A text does not follow the contract."""


def curve_urn(public_key: str) -> str:
    """The URI that stands for a CURVE public key (Z85, 40 characters).  Raises: EnrolmentError."""
    if not _Z85.fullmatch(public_key):
        raise EnrolmentError(f"{public_key[:60]!r} is no CURVE key of 40 characters (Z85)")
    return _URN + quote(public_key, safe="")


def curve_key(urn: str) -> str:
    """The CURVE public key that a URI stands for.  Raises: EnrolmentError."""
    key = unquote(urn.removeprefix(_URN)) if urn.startswith(_URN) and len(urn) <= len(_URN) + 120 else ""
    if not _Z85.fullmatch(key) or curve_urn(key) != urn:
        raise EnrolmentError(f"{urn[:80]!r} names no CURVE key")
    return key
