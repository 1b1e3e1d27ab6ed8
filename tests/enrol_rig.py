"""What the tests of enrolment share: a certificate authority, a TLS server that answers as it is told, and packs for it.

The server is real (ssl, http.server) and written apart from the ground station's, so that a board is tested against answers that
the real one never gives. Leaves out: who may have a certificate, which is the ground station's to decide.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Callable

import zmq
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from node_rig import toml

from node_agent import config, enrol, enrolment

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "tok_" + "A1b2C3d4" * 5
DAY_S = 86_400
GROUND_CURVE = zmq.curve_keypair()[0].decode()


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def name(common: str, organisation: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


class Authority:
    """A certificate authority in memory, and a server's certificate for 127.0.0.1 and localhost."""

    def __init__(self, fleet: str = "test"):
        self.fleet, self.key = fleet, ec.generate_private_key(ec.SECP256R1())
        self.subject = name(f"{fleet} authority", fleet)
        self.cert = self._signed(self.subject, self.key.public_key(), -40 * DAY_S, 4000 * DAY_S, ca=True)

    def _signed(self, subject, key, begin_s, end_s, *extensions, ca=False) -> x509.Certificate:
        now = time.time()
        at = [datetime.datetime.fromtimestamp(int(now + s), datetime.timezone.utc) for s in (begin_s, end_s)]
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self.subject).public_key(key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(at[0]).not_valid_after(at[1])
        builder = builder.add_extension(x509.BasicConstraints(ca, None), True)
        for extension in extensions:
            builder = builder.add_extension(extension, False)
        return builder.sign(self.key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        return self.cert.public_bytes(Encoding.PEM)

    def server(self, folder: Path, begin_s=-DAY_S, end_s=30 * DAY_S, host: str = "127.0.0.1") -> tuple[Path, Path]:
        """Files of a server's certificate and key."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        cert = self._signed(name("ground", self.fleet), key.public_key(), begin_s, end_s, names)
        paths = folder / "server.pem", folder / "server.key"
        paths[0].write_bytes(cert.public_bytes(Encoding.PEM))
        paths[1].write_bytes(pem(key))
        return paths

    def node(
        self, request: x509.CertificateSigningRequest, begin_s=-60, end_s=30 * DAY_S, usage="CLIENT_AUTH", **other
    ) -> x509.Certificate:
        """A node's certificate for a request; `other`: subject, key, san or ca where the test wants it wrong."""
        san = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return self._signed(
            other.get("subject", request.subject),
            other.get("key", request.public_key()),
            begin_s,
            end_s,
            other.get("san", san),
            x509.ExtendedKeyUsage([getattr(ExtendedKeyUsageOID, usage)]),
            ca=other.get("ca", False),
        )


def answer(*certificates: x509.Certificate) -> tuple[int, bytes]:
    return 200, base64.encodebytes(pkcs7.serialize_certificates(list(certificates), Encoding.DER))


class Responder:
    """A TLS server of EST's paths; `respond(path, request, authorization, client certificate)` gives (status, body)."""

    def __init__(self, authority: Authority, files: tuple[Path, Path], respond: Callable | None = None):
        self.authority = authority
        self.respond = respond or self.sign
        self.seen: list[tuple[str, x509.CertificateSigningRequest, str, bytes | None]] = []
        self.options: dict = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                der = base64.b64decode(self.rfile.read(int(self.headers["Content-Length"])))
                shown = self.connection.getpeercert(binary_form=True)
                seen = (self.path, x509.load_der_x509_csr(der), self.headers.get("Authorization", ""), shown)
                outer.seen.append(seen)
                status, body = outer.respond(*seen)
                if status is None:
                    body(self.wfile)
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # boards hang up on what they do not like

        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*files)
        tls.verify_mode = ssl.CERT_OPTIONAL
        tls.load_verify_locations(cadata=authority.pem.decode())
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]

    def sign(self, path, request, authorization, shown) -> tuple[int, bytes]:
        """A server that gives everybody what he asks for, as `options` say."""
        return answer(self.authority.node(request, **self.options))

    def __enter__(self) -> Responder:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def tables(port: int, **enrol_table) -> dict[str, dict]:
    """A pack's configuration as text tables; node n1 of fleet test."""
    return {
        "node": {"id": "n1", "fleet": "test", "board": "pi5", "state_dir": "state"},
        "broker": {"host": "127.0.0.1", "port": 8883, "ca": "ca.pem", "cert": "node.pem", "key": "node.key"},
        "data": {
            "endpoint": "tcp://127.0.0.1:5570",
            "server_public_key": GROUND_CURVE,
            "secret_key_file": "curve.key",
        },
        "enrol": {"url": f"https://127.0.0.1:{port}", "ca": "ca.pem", "token_file": "claim", **enrol_table},
    }


def write_pack(folder: Path, authority: bytes, port: int, token: str = TOKEN, **enrol_table) -> Path:
    """A provision pack as the ground station writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / enrolment.CONFIG).write_text(toml(tables(port, **enrol_table)))
    (folder / enrolment.CA).write_bytes(authority)
    (folder / enrolment.CLAIM).write_text(token + "\n")
    return folder


def identity(folder: Path) -> enrol.Identity:
    return enrol.identity(config.load(folder / enrolment.CONFIG, enrolled=False))


def node_agent(*arguments: object, timeout_s: float = 60) -> subprocess.CompletedProcess:
    """The command as a process."""
    return subprocess.run(
        [sys.executable, "-m", "node_agent.cli", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


CHANGES = ("mkdir", "replace", "rename", "unlink", "rmdir")


def killed_at(n: int, call: Callable[[], object]) -> bool:
    """`call` in a process of its own, which is killed (SIGKILL) before its n-th change of a folder; False where it ended before."""
    child = os.fork()
    if child == 0:
        left = [n]

        def counting(real):
            def counted(*arguments, **keywords):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return real(*arguments, **keywords)

            return counted

        try:
            for function in CHANGES:
                setattr(os, function, counting(getattr(os, function)))
            call()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the child failed ({code})"
    return code != 0


def as_json(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
