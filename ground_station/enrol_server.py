"""Enrolment over TLS (EST, RFC 7030: cacerts, simpleenroll, simplereenroll): where boards claim and renew their certificates.

Everything that comes in is a stranger's: bytes, connections per address and in all, seconds per connection and failed attempts are
bounded, and the TLS handshake happens in the connection's own thread, so that nobody who says nothing holds up the others. The
certificate, the authority and the revocation list are read anew when the fleet folder changes. Leaves out: the rules (enrol_rules.py).
"""

from __future__ import annotations

import base64
import binascii
import http.client
import http.server
import logging
import ssl
import threading
import time

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from ground_station import enrol_rules, fleet_authority, fleet_records
from ground_station.enrol_connections import CONNECTION_S, Attempts, BoundedHead, BoundedServer
from ground_station.enrol_rules import RefusedError
from ground_station.fleet_records import FleetBusyError, FleetFolder, FleetFolderError
from node_agent import enrolment

log = logging.getLogger("spacemoe.enrol")
DRAIN_BYTES = 256 * 1024
"""How much of a body that is refused is read all the same, so that the answer is not lost to a reset."""
LOOK_S = 0.1
"""How often overdue connections are looked for; also how long a stop may take."""
_TEXT = "text/plain; charset=utf-8"


class EnrolServer:
    """Serves a fleet folder on host:port (0: any free one, see `port`). Start it with `with` or start()."""

    def __init__(self, folder: FleetFolder, host: str = "127.0.0.1", port: int = 0, connection_s: float = CONNECTION_S):
        """Raises: OSError naming the address when it is taken, FleetFolderError when the folder cannot be used."""
        self.folder, self.attempts = folder, Attempts()
        self._version = folder.version()  # before what it stands for, so that no change is missed
        self._context = _context(folder)
        self._context_lock = threading.Lock()
        try:
            self._server = BoundedServer((host, port), _Handler, self.context, connection_s)
            self._server.enrol = self
        except OSError as error:
            raise OSError(
                f"{host}:{port} cannot be listened on ({error.strerror}): end what uses it, or change the port"
            ) from None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def start(self) -> EnrolServer:
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(LOOK_S,), name="enrolment", daemon=True
        )
        self._thread.start()
        return self

    def stop(self) -> None:
        """Returns once nothing listens any more and every connection is closed."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()
        self._server.cut(float("inf"))
        self._server.joined(5.0)

    def __enter__(self) -> EnrolServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def context(self) -> ssl.SSLContext:
        """The TLS settings of the folder as it is now; those before, where it cannot be read."""
        with self._context_lock:
            try:
                version = self.folder.version()
                if version != self._version:
                    self._context = _context(self.folder)
                    self._version = version
            except (FleetFolderError, OSError) as error:
                log.error("the fleet folder's certificates cannot be read anew: %s", error)
            return self._context


def _context(folder: FleetFolder) -> ssl.SSLContext:
    """Raises: FleetFolderError naming the file that TLS cannot use."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    name = fleet_records.GROUND_CERT
    try:
        context.load_cert_chain(folder.path(name), folder.path(fleet_records.GROUND_KEY))
        for name in (fleet_records.CA_CERT, fleet_records.CRL):
            context.load_verify_locations(folder.path(name))
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None) or error.strerror
        raise FleetFolderError(
            f"{folder.path(name)} cannot be used for TLS ({reason}): restore it from a backup"
        ) from None
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    context.verify_mode = ssl.CERT_OPTIONAL
    # a resumed session would not look at the revocation list again
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request per connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "spacemoe", ""

    def setup(self) -> None:
        super().setup()
        self.rfile = BoundedHead(self.rfile)

    def handle(self) -> None:
        self.close_connection = True
        self.handle_one_request()

    def parse_request(self) -> bool:
        self.server.spoke()
        return super().parse_request()

    def do_GET(self) -> None:
        if self.path != enrolment.CACERTS:
            self._refuse(
                405 if self.path in (enrolment.ENROL, enrolment.RENEW) else 404, "there is nothing to GET here"
            )
            return
        folder = self.server.enrol.folder
        try:
            certificate = fleet_authority.certificate_of(folder, fleet_records.CA_CERT)
        except (FleetFolderError, OSError) as error:
            self._failed(error)
            return
        self._certificates(certificate)

    def do_POST(self) -> None:
        peer, attempts = self.client_address[0], self.server.enrol.attempts
        wait_s = attempts.wait_s(peer, time.monotonic())
        try:
            if wait_s:
                raise RefusedError(429, f"too many failed attempts from {peer}: try again in {wait_s:.0f} s")
            if self.path == enrolment.ENROL:
                node, token = self._credentials()
                certificate = enrol_rules.claim(self.server.enrol.folder, node, token, self._body())
            elif self.path == enrolment.RENEW:
                shown = self.connection.getpeercert(binary_form=True)
                if not shown:
                    raise RefusedError(401, "a renewal needs the node's present certificate as TLS client certificate")
                shown = x509.load_der_x509_certificate(shown)
                certificate = enrol_rules.renew(self.server.enrol.folder, shown, self._body())
            else:
                raise RefusedError(405 if self.path == enrolment.CACERTS else 404, "there is nothing to POST to here")
        except RefusedError as error:
            if error.status != 429:
                attempts.failed(peer, time.monotonic())
            log.warning("%s from %s refused (%d): %s", _shown(self.path), peer, error.status, error)
            self._refuse(error.status, str(error), wait_s)
        except (FleetFolderError, FleetBusyError, OSError) as error:
            if isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError)):
                raise  # the board's end, not the folder's
            self._failed(error)
        else:
            self._certificates(certificate)

    def _credentials(self) -> tuple[str, str]:
        """Node and token of HTTP Basic.  Raises: RefusedError."""
        kind, _, text = self.headers.get("Authorization", "").partition(" ")
        try:
            if kind.lower() != "basic" or len(text) > 512:
                raise ValueError
            node, colon, token = base64.b64decode(text.strip(), validate=True).decode("ascii").partition(":")
            if not colon:
                raise ValueError
        except ValueError:  # binascii.Error and UnicodeDecodeError are ones
            raise RefusedError(401, "give the node id and its claim token by HTTP Basic authentication") from None
        return node, token

    def _body(self) -> bytes:
        """The request's DER.  Raises: RefusedError."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit() and len(length) < 16):
            raise RefusedError(411, "give the request's length as Content-Length")
        if int(length) > 2 * enrolment.MAX_REQUEST_BYTES:
            left = min(int(length), DRAIN_BYTES)
            while left > 0 and (part := self.rfile.read(min(left, 65_536))):
                left -= len(part)
            raise RefusedError(413, f"the request has {length} bytes: at most {2 * enrolment.MAX_REQUEST_BYTES}")
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise RefusedError(400, "the request ends before its length")
        try:
            return base64.b64decode(b"".join(body.split()), validate=True)
        except binascii.Error:
            raise RefusedError(400, "the request is not base64 of a DER PKCS #10 request") from None

    def _certificates(self, certificate: x509.Certificate) -> None:
        body = base64.encodebytes(pkcs7.serialize_certificates([certificate], Encoding.DER))
        self._answer(200, enrolment.ANSWER_TYPE, body, {"Content-Transfer-Encoding": "base64"})

    def _refuse(self, status: int, text: str, wait_s: float = 0.0) -> None:
        more = {"WWW-Authenticate": 'Basic realm="spacemoe"'} if status == 401 and self.path == enrolment.ENROL else {}
        more |= {"Retry-After": str(int(wait_s) + 1)} if wait_s else {}
        self._answer(status, _TEXT, (" ".join(text.split()) + "\n").encode(), more)

    def _failed(self, error: Exception) -> None:
        """The folder's trouble is the operator's: the board only hears that it should try again."""
        log.error("%s from %s failed: %s", _shown(self.path), self.client_address[0], error)
        text = "the ground station cannot use its fleet folder, its log says why: try again later\n"
        self._answer(503, _TEXT, text.encode(), {"Retry-After": "30"})

    def _answer(self, status: int, kind: str, body: bytes, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Connection": "close",
            **more,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if getattr(self, "command", None) != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the parser of the standard library refuses: one line, and nothing of what was sent."""
        self.close_connection = True
        self._answer(int(code), _TEXT, b"the request cannot be read\n", {})

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a request's line is a stranger's text; what matters is logged where it is decided."""


def _shown(path: str) -> str:
    return repr(path[:60])
