"""One EST exchange (RFC 7030): a request is posted over TLS, and what comes back is bounded in time and size.

The server is known by the fleet's own authority and its name; this machine's other authorities and proxy settings do not count.
Leaves out: what is asked and whether the answer is any good (enrol.py).
"""

from __future__ import annotations

import base64
import binascii
import http.client
import re
import ssl
import time
from pathlib import Path

from node_agent import enrolment
from node_agent.errors import ConfigError, EnrolError, RefusedError

TIMEOUT_S = 30.0
"""For a whole exchange; reaching the server has as much again."""
MAX_REASON_CHARS = 200
NOT_YET_VALID, EXPIRED = 9, 10  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_CLIENT_ALERT = re.compile(r"ALERT.*(CERTIFICATE|UNKNOWN_CA|ACCESS_DENIED|BAD_CERT)")


class _Timed(ssl.SSLSocket):
    """A server that sends a byte now and then gains no time: reads end at `end_s` of the monotonic clock, all together."""

    end_s = 0.0

    def recv_into(self, *arguments: object, **keywords: object) -> int:
        self.end_s = self.end_s or time.monotonic() + TIMEOUT_S
        left_s = self.end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the answer takes too long")
        self.settimeout(left_s)
        return super().recv_into(*arguments, **keywords)


def clock_text(now_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s))


def context(ca: Path, pair: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """TLS as the fleet has it; `pair`: this node's certificate and key.  Raises: ConfigError."""
    try:
        made = ssl.create_default_context(cafile=str(ca))
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        if pair:
            made.load_cert_chain(*map(str, pair))
    except (OSError, ValueError) as error:
        raise ConfigError(f"[enrol] {ca} cannot be used ({error}): put the node's pack on the card again") from None
    made.sslsocket_class = _Timed
    return made


def post(host: str, port: int, tls: ssl.SSLContext, path: str, request: bytes, login: tuple[str, str] | None) -> bytes:
    """Posts a PKCS #10 request (DER) and returns the PKCS #7 answer (DER, not looked into).

    `login`: node id and claim token. Raises: EnrolError, RefusedError; no text of theirs holds the token.
    """
    headers = {"Content-Type": enrolment.REQUEST_TYPE, "Content-Transfer-Encoding": "base64", "Connection": "close"}
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(login).encode()).decode()
    where = f"{host}:{port}"
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=tls)
    try:
        connection.request("POST", path, base64.b64encode(request), headers)
        answer = connection.getresponse()
        body = answer.read(enrolment.MAX_ANSWER_BYTES + 1)
    except (ssl.SSLEOFError, ConnectionError) as error:  # RemoteDisconnected is one
        # with TLS 1.3 our side of the handshake is done before the server has looked at our certificate
        hint = "" if login or isinstance(error, ConnectionRefusedError) else "; it may refuse this node's certificate"
        raise EnrolError(f"no answer from {where} ({error}){hint}") from None
    except ssl.SSLError as error:
        raise _tls_error(where, error) from None
    except OSError as error:
        raise EnrolError(f"no answer from {where} ({error})") from None
    except (http.client.HTTPException, UnicodeError, ValueError) as error:
        raise EnrolError(f"{where} does not answer as a ground station ({type(error).__name__})") from None
    finally:
        connection.close()
    if answer.status in (401, 403):
        raise RefusedError(f"{where} refuses this node: {_reason(body)}")
    if answer.status != 200:
        raise EnrolError(f"{where} answers with HTTP {answer.status}: {_reason(body)}")
    if len(body) > enrolment.MAX_ANSWER_BYTES:
        raise EnrolError(f"the answer of {where} is over {enrolment.MAX_ANSWER_BYTES} bytes: not a certificate")
    try:
        return base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error:
        raise EnrolError(f"the answer of {where} is not base64: not a certificate") from None


def _reason(body: bytes) -> str:
    """What the server says, as one line that a terminal can bear."""
    text = " ".join(body[: 4 * MAX_REASON_CHARS].decode(errors="replace").split())
    return "".join(each for each in text if each.isprintable())[:MAX_REASON_CHARS] or "no reason given"


def _tls_error(where: str, error: ssl.SSLError) -> EnrolError:
    if isinstance(error, ssl.SSLCertVerificationError):
        now = clock_text(time.time())
        if error.verify_code == NOT_YET_VALID:
            return EnrolError(
                f"the certificate of {where} is not yet valid by this machine's clock, which says {now}: set the clock"
            )
        if error.verify_code == EXPIRED:
            return EnrolError(
                f"the certificate of {where} has expired, or this machine's clock ({now}) is ahead: look at both"
            )
        return EnrolError(
            f"{where} is not this fleet's ground station ({error.verify_message}): nothing was sent to it"
        )
    if _CLIENT_ALERT.search(error.reason or ""):
        return RefusedError(f"{where} refuses this node's certificate ({error.reason})")
    return EnrolError(f"TLS with {where} fails ({error.reason or error})")
