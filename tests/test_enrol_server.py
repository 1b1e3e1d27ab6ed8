"""Enrolment over TLS. Judges: curl as EST client, openssl for requests, answers and revocation; raw sockets for rude clients."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import http.client
import logging
import os
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from conftest import lacking
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import NameOID

from ground_station import enrol_connections, enrol_request, enrol_rules, fleet_authority, fleet_changes
from ground_station.enrol_connections import Attempts
from ground_station.enrol_server import EnrolServer
from ground_station.fleet_records import FleetFolder, FleetFolderError
from node_agent import enrolment

DAY_S = 86_400


def run(*arguments: object, data: bytes | None = None) -> subprocess.CompletedProcess:
    program = shutil.which(str(arguments[0])) or lacking(str(arguments[0]), f"apt-get install {arguments[0]}")
    return subprocess.run([program, *map(str, arguments[1:])], input=data, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return FleetFolder.create(tmp_path_factory.mktemp("made") / "lab", "lab", ["127.0.0.1"]).root


@pytest.fixture
def folder(made, tmp_path) -> FleetFolder:
    return FleetFolder.open(shutil.copytree(made, tmp_path / "lab"))


@pytest.fixture
def server(folder):
    with EnrolServer(folder) as running:
        yield running


class Board:
    """Keys of a board, and the requests it makes."""

    def __init__(self, node: str = "sat-1", key=None, curve: str | None = None):
        self.node = node
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        self.curve = curve or zmq.curve_keypair()[0].decode()

    def request(self, fleet: str = "lab", names=None, alternatives=None, sign_with=None, digest=None) -> bytes:
        pairs = names or [(NameOID.COMMON_NAME, self.node), (NameOID.ORGANIZATION_NAME, fleet)]
        builder = x509.CertificateSigningRequestBuilder(x509.Name([x509.NameAttribute(*pair) for pair in pairs]))
        if alternatives is None:
            alternatives = [x509.UniformResourceIdentifier(enrolment.curve_urn(self.curve))]
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        plain = isinstance(self.key, ed25519.Ed25519PrivateKey)
        der = builder.sign(self.key, None if plain else digest or hashes.SHA256())
        return der.public_bytes(serialization.Encoding.DER)


def context(
    folder: FleetFolder, cert: x509.Certificate | None = None, key=None, ca: Path | None = None
) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(ca or folder.path("ca.pem")))
    if cert is not None:
        path = folder.root.parent / f"client-{os.urandom(4).hex()}.pem"
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        pem = serialization.Encoding.PEM
        path.write_bytes(cert.public_bytes(pem) + key.private_bytes(pem, *form))
        made.load_cert_chain(path)
    return made


def post(server: EnrolServer, path: str, body: bytes, login: str = "", tls=None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPSConnection(
        "127.0.0.1", server.port, context=tls or context(server.folder), timeout=10
    )
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def claim(server: EnrolServer, board: Board, token: str, der: bytes | None = None, node: str | None = None):
    body = base64.b64encode(board.request() if der is None else der)
    return post(server, enrolment.ENROL, body, f"{node or board.node}:{token}")


def renew(server: EnrolServer, board: Board, cert: x509.Certificate, key, der: bytes | None = None):
    body = base64.b64encode(der or board.request())
    return post(server, enrolment.RENEW, body, tls=context(server.folder, cert, key))


def certificate(answer: tuple[int, bytes]) -> x509.Certificate:
    assert answer[0] == 200, answer
    (found,) = pkcs7.load_der_pkcs7_certificates(base64.b64decode(answer[1]))
    return found


def added(folder: FleetFolder, node: str = "sat-1", **how) -> str:
    return fleet_changes.add_node(folder, node, "pi5", **how)[1]


# ---------------------------------------------------------------- the way it should go


def test_a_board_enrols_with_curl_and_openssl_alone(server, tmp_path):
    folder, token = server.folder, added(server.folder)
    ca, url = folder.path("ca.pem"), f"https://127.0.0.1:{server.port}"
    done = run("curl", "-sS", "--fail", "--cacert", ca, url + enrolment.CACERTS)
    assert done.returncode == 0, done.stderr
    listed = run("openssl", "pkcs7", "-inform", "DER", "-print_certs", data=base64.b64decode(done.stdout)).stdout
    assert (
        run("openssl", "x509", "-outform", "DER", data=listed).stdout
        == run("openssl", "x509", "-in", ca, "-outform", "DER").stdout
    )
    curve = zmq.curve_keypair()[0].decode()
    urn = enrolment.curve_urn(curve)
    key, request = tmp_path / "node.key", tmp_path / "node.req"
    ask = ["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key]
    done = run(
        *ask, "-subj", "/O=lab/CN=sat-1", "-addext", f"subjectAltName=URI:{urn}", "-outform", "DER", "-out", request
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "body").write_bytes(base64.encodebytes(request.read_bytes()))
    (tmp_path / "login").write_text(f'user = "sat-1:{token}"\n')
    curl = ["curl", "-sS", "--cacert", ca, "-H", f"Content-Type: {enrolment.REQUEST_TYPE}", "--data-binary"]
    curl += [f"@{tmp_path / 'body'}", "-w", "\n%{http_code} %{content_type}"]
    done = run(*curl, url + enrolment.ENROL)  # without the token
    assert done.stdout.endswith(b"401 text/plain; charset=utf-8") and folder.node("sat-1").state == "new"
    done = run(*curl, "-K", tmp_path / "login", url + enrolment.ENROL)
    assert done.stdout.endswith(f"200 {enrolment.ANSWER_TYPE}".encode()), done
    der = base64.b64decode(done.stdout.rpartition(b"\n")[0])
    pem = run("openssl", "pkcs7", "-inform", "DER", "-print_certs", data=der).stdout
    node = tmp_path / "node.pem"
    node.write_bytes(pem)
    text = run("openssl", "x509", "-in", node, "-noout", "-text").stdout.decode()
    assert "Subject: O = lab, CN = sat-1" in text and f"URI:{urn}" in text and "CA:FALSE" in text
    assert "TLS Web Client Authentication" in text and "TLS Web Server Authentication" not in text
    assert run("openssl", "x509", "-in", node, "-checkend", 89 * DAY_S).returncode == 0
    assert run("openssl", "x509", "-in", node, "-checkend", 91 * DAY_S).returncode == 1
    assert (
        run("openssl", "x509", "-in", node, "-pubkey", "-noout").stdout
        == run("openssl", "pkey", "-in", key, "-pubout").stdout
    )
    verify = [
        "openssl",
        "verify",
        "-x509_strict",
        "-crl_check",
        "-CAfile",
        ca,
        "-CRLfile",
        folder.path("crl.pem"),
        node,
    ]
    assert run(*verify[:3], "-purpose", "sslclient", *verify[3:]).returncode == 0
    assert run(*verify[:3], "-purpose", "sslserver", *verify[3:]).returncode != 0
    record = folder.node("sat-1")
    serial = run("openssl", "x509", "-in", node, "-noout", "-serial").stdout.decode().strip().partition("=")[2]
    assert int(record.serial, 16) == int(serial, 16) and record.curve_public == curve and record.state == "enrolled"
    # renewal by the certificate itself, with the same key
    done = run(*curl, "--cert", node, "--key", key, url + enrolment.RENEW)
    assert done.stdout.endswith(f"200 {enrolment.ANSWER_TYPE}".encode()), done
    assert folder.node("sat-1").previous_serial == record.serial and folder.node("sat-1").serial != record.serial
    # revoked: neither TLS nor openssl takes it any more
    fleet_changes.revoke(folder, "sat-1")
    assert b"certificate revoked" in run(*verify).stderr
    assert run(*curl, "--cert", node, "--key", key, url + enrolment.RENEW).returncode != 0
    assert run("curl", "-sS", "--fail", "--cacert", ca, url + enrolment.CACERTS).returncode == 0


def test_the_agents_own_enrolment_gets_on_with_the_server(server, tmp_path):
    from ground_station import fleet_pack
    from node_agent import enrol

    record, token = fleet_changes.add_node(server.folder, "sat-1", "pi5")
    pack = fleet_pack.write_pack(server.folder, record, token, tmp_path / "packs")
    who = enrol.Identity(
        "sat-1", "lab", "127.0.0.1", server.port, pack / "ca.pem", pack / "node.pem", pack / "node.key",
        pack / "curve.key", pack / "claim",
    )  # fmt: skip
    first, new = enrol.obtain(who)
    assert new and server.folder.node("sat-1").serial == first.serial and not (pack / "claim").exists()
    second = enrol.renew(who)
    record = server.folder.node("sat-1")
    assert (record.serial, record.previous_serial, record.curve_public) == (
        second.serial,
        first.serial,
        second.curve_public,
    )


def test_ed25519_keys_are_taken_too(server):
    token, board = added(server.folder), Board(key=ed25519.Ed25519PrivateKey.generate())
    assert certificate(claim(server, board, token)).public_key() == board.key.public_key()


def test_a_new_ground_certificate_is_shown_at_once_and_other_fleets_are_not_trusted(server, tmp_path, made):
    def shown() -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), 5) as plain:
            with context(server.folder).wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                return secure.getpeercert(binary_form=True)

    first = shown()
    assert shown() == first
    fleet_authority.renew_ground(server.folder)
    assert shown() != first
    other = FleetFolder.create(tmp_path / "other", "lab", ["127.0.0.1"])
    with pytest.raises(ssl.SSLCertVerificationError):
        post(server, enrolment.ENROL, b"", tls=context(other))


# ---------------------------------------------------------------- claims


def test_a_token_is_for_one_key(server):
    folder, token, board = server.folder, added(server.folder), Board()
    first = certificate(claim(server, board, token))
    record, version = folder.node("sat-1"), folder.version()
    # the answer got lost in a power cut: the same key gets the same certificate
    assert certificate(claim(server, board, token)) == first
    assert (folder.node("sat-1"), folder.version()) == (record, version)
    status, text = claim(server, Board(), token)  # a replay with another key
    assert status == 403 and b"used already" in text and folder.version() == version
    # it made a new data-plane key since: proven by the same key, so it gets a new certificate, and the lost one ends
    second = certificate(claim(server, Board(key=board.key), token))
    assert folder.node("sat-1").revoked_serials == (fleet_authority.serial_of(first),) and second != first
    with folder.change("sat-1") as record:
        folder.write(dataclasses.replace(record, token_expires_utc_s=time.time() - 1))
    status, text = claim(server, board, token)
    assert status == 403 and b"expired" in text


def test_an_expired_token_is_refused(server):
    token = added(server.folder)
    with server.folder.change("sat-1") as record:
        server.folder.write(dataclasses.replace(record, token_expires_utc_s=time.time() - 1))
    status, text = claim(server, Board(), token)
    assert status == 403 and b"expired" in text and server.folder.node("sat-1").state == "new"


def test_two_claims_of_one_token_at_once_give_one_key_a_certificate(server):
    token = added(server.folder)
    for _ in range(3):
        boards = [Board() for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(claim, [server] * 6, boards, [token] * 6))
        assert sorted(status for status, _ in answers) == [200, 403, 403, 403, 403, 403]
        winner = boards[[status for status, _ in answers].index(200)]
        assert server.folder.node("sat-1").curve_public == winner.curve
        token = added(server.folder, again=True)


@pytest.mark.parametrize("state", ["revoked", "quarantined"])
def test_who_is_cut_off_neither_claims_nor_renews(server, state):
    folder, token, board = server.folder, added(server.folder), Board()
    cert = certificate(claim(server, board, token))
    with folder.change("sat-1") as record:  # of the record alone: the certificate is on no list
        folder.write(dataclasses.replace(record, state=state))
    for status, text in (claim(server, board, token), renew(server, board, cert, board.key)):
        assert status == 403 and state.encode() in text
    with folder.change("sat-1") as record:
        folder.write(dataclasses.replace(record, state="enrolled"))
    assert renew(server, board, cert, board.key)[0] == 200


def test_what_a_request_may_not_be(server):
    folder, token = server.folder, added(server.folder)
    added(folder, "sat-2")
    board = Board()
    urn = x509.UniformResourceIdentifier(enrolment.curve_urn(board.curve))
    common, organization = (NameOID.COMMON_NAME, "sat-1"), (NameOID.ORGANIZATION_NAME, "lab")
    good = board.request()
    altered = bytearray(good)
    altered[-1] ^= 1
    overflow = "#####" * 8  # of the alphabet, and more than 32 bits
    wrong = {
        "another node": (403, Board("sat-2").request()),
        "another fleet": (400, board.request(fleet="other")),
        "no fleet": (400, board.request(names=[common])),
        "two names": (400, board.request(names=[common, common, organization])),
        "more in the subject": (400, board.request(names=[common, organization, (NameOID.COUNTRY_NAME, "DE")])),
        "the ground station": (400, Board("ground").request()),
        "a path": (400, Board("../sat-1").request()),
        "no CURVE key": (400, board.request(alternatives=[])),
        "two CURVE keys": (400, board.request(alternatives=[urn, urn])),
        "a host name": (400, board.request(alternatives=[urn, x509.DNSName("ground.local")])),
        "a host name alone": (400, board.request(alternatives=[x509.DNSName("ground.local")])),
        "another URI": (400, board.request(alternatives=[x509.UniformResourceIdentifier("urn:x:y")])),
        "a key of no 32 bytes": (400, Board(curve=overflow).request()),
        "the ground station's CURVE key": (403, Board(curve=folder.curve_keys()[0].decode()).request()),
        "RSA": (400, Board(key=rsa.generate_private_key(65537, 1024)).request()),
        "P-384": (400, Board(key=ec.generate_private_key(ec.SECP384R1())).request()),
        "SHA-1": (400, good.replace(b"\x2a\x86\x48\xce\x3d\x04\x03\x02", b"\x2a\x86\x48\xce\x3d\x04\x01\x02")),
        "a wrong signature": (400, bytes(altered)),
        "no request": (400, b"hello"),
        "nothing": (400, b""),
        "too much": (400, good + bytes(enrolment.MAX_REQUEST_BYTES)),
    }
    for what, (status, der) in wrong.items():
        server.attempts = Attempts()
        answer = claim(server, board, token, der)
        assert answer[0] == status and answer[1].endswith(b"\n") and answer[1].count(b"\n") == 1, (what, answer)
        assert folder.node("sat-1").state == "new", what
    assert claim(server, board, token)[0] == 200  # the token outlived all that
    token = added(folder, "sat-2", again=True)
    for taken in (Board("sat-2", curve=board.curve), Board("sat-2", key=board.key)):
        status, text = claim(server, taken, token)
        assert status == 403 and b"belongs to node sat-1" in text


def test_altered_requests_are_refused_and_break_nothing():
    draw, good, taken = random.Random(5), Board().request(), 0
    for _ in range(1500):
        altered = bytearray(good)
        for _ in range(draw.choice((1, 2, 4))):
            place, what = draw.randrange(len(altered)), draw.random()
            if what < 0.7:
                altered[place] = draw.randrange(256)
            elif what < 0.85:
                del altered[place]
            else:
                altered.insert(place, draw.randrange(256))
        try:
            taken += enrol_request.read_request(bytes(altered), "lab").node != "sat-1"
        except enrol_request.RequestError as error:
            assert "\n" not in str(error) and str(error).isprintable()
    assert taken == 0 and enrol_request.read_request(good, "lab").node == "sat-1"


def test_strangers_learn_nothing_and_no_token_gets_into_the_log(server, caplog):
    caplog.set_level(logging.DEBUG)
    token, board = added(server.folder), Board()
    wrong = "A" * 43
    unknown = claim(server, Board("sat-9"), wrong)
    assert unknown[0] == 401 and claim(server, board, wrong) == unknown
    for node in ("ground", "../nodes/sat-1", "", "sat-1\n", "sat-1/../sat-1"):
        assert claim(server, Board("sat-9"), token, node=node or " ")[0] == 401
    body = base64.b64encode(board.request())
    for login in ("", "sat-1", f"sat-1:{token}x", f"sat-1:{token.lower()}"):
        assert post(server, enrolment.ENROL, body, login)[0] == 401
    assert claim(server, board, token)[0] == 200 and claim(server, Board(), token)[0] == 403
    assert "refused" in caplog.text and "used already" in caplog.text and "claimed certificate" in caplog.text
    assert (
        token not in caplog.text
        and wrong not in caplog.text
        and base64.b64encode(token.encode()).decode() not in caplog.text
    )


# ---------------------------------------------------------------- renewals


def test_a_renewal_leaves_two_certificates_and_the_third_ends(server):
    folder, token, board = server.folder, added(server.folder), Board()
    first = certificate(claim(server, board, token))
    newer = Board(curve=board.curve)
    second = certificate(renew(server, newer, first, board.key))
    # its answer got lost: the old certificate still asks, and the same new key gets the same certificate
    assert certificate(renew(server, newer, first, board.key)) == second and folder.node("sat-1").revoked_serials == ()
    newest = Board(curve=board.curve)
    third = certificate(renew(server, newest, second, newer.key))
    record = folder.node("sat-1")
    assert record.revoked_serials == (fleet_authority.serial_of(first),)
    assert (record.serial, record.previous_serial) == tuple(map(fleet_authority.serial_of, (third, second)))
    with pytest.raises(OSError):  # TLS itself ends it: it is on the list
        renew(server, newest, first, board.key)
    # a lost answer with yet another key: the certificate that never arrived ends
    other = Board(curve=board.curve)
    fourth = certificate(renew(server, other, second, newer.key))
    record = folder.node("sat-1")
    assert record.revoked_serials[-1] == fleet_authority.serial_of(third)
    assert (record.serial, record.previous_serial) == tuple(map(fleet_authority.serial_of, (fourth, second)))


def test_a_renewal_needs_this_nodes_own_certificate(server, tmp_path):
    folder, board, second = server.folder, Board(), Board("sat-2")
    cert = certificate(claim(server, board, added(folder)))
    certificate(claim(server, second, added(folder, "sat-2")))
    body = base64.b64encode(board.request())
    assert post(server, enrolment.RENEW, body)[0] == 401
    status, text = renew(server, second, cert, board.key)
    assert status == 403 and b"the certificate is of 'sat-1'" in text
    ground = x509.load_pem_x509_certificate(folder.read("ground.pem"))
    key = serialization.load_pem_private_key(folder.read("ground.key"), None)
    status, text = renew(server, board, ground, key)
    assert status == 403 and b"no node's" in text
    # a rogue authority of the same name, and a certificate of ours that has run out
    rogue = FleetFolder.create(tmp_path / "rogue", "lab", ["127.0.0.1"])
    false = fleet_authority.issue(rogue, enrol_request.Request("sat-1", board.curve, board.key.public_key()))
    ca_key = serialization.load_pem_private_key(folder.read("ca.key"), None)
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(cert.issuer, cert.subject, cert.public_key(), cert.serial_number)
    builder = builder.not_valid_before(now - datetime.timedelta(days=2)).not_valid_after(
        now - datetime.timedelta(hours=1)
    )
    for extension in cert.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    version = folder.version()
    for bad in (false, builder.sign(ca_key, hashes.SHA256())):
        with pytest.raises(OSError):  # an alert of TLS, which reaches the client with its first read
            renew(server, board, bad, board.key)
    # a good signature is not enough: the serial must be one that the record knows
    issued = fleet_authority.issue(folder, enrol_request.Request("sat-1", board.curve, board.key.public_key()))
    status, text = renew(server, board, issued, board.key)
    assert status == 403 and b"replaced" in text and folder.version() == version
    assert renew(server, board, cert, board.key)[0] == 200


# ---------------------------------------------------------------- rude clients


def test_who_says_nothing_holds_nobody_up_and_is_cut(folder):
    with EnrolServer(folder, connection_s=1.0) as server:
        token, silent = added(folder), [socket.create_connection(("127.0.0.1", server.port), 5) for _ in range(8)]
        talks = context(folder).wrap_socket(
            socket.create_connection(("127.0.0.1", server.port), 5), server_hostname="127.0.0.1"
        )
        talks.sendall(b"POST /.well-known/est/simpleenroll HTTP/1.1\r\nContent-Length: 20\r\n")
        assert claim(server, Board(), token)[0] == 200  # while all of them are open
        with contextlib.suppress(OSError):
            while True:  # a byte now and then does not buy more time
                talks.sendall(b"x")
                time.sleep(0.05)
        for each in silent:
            assert each.recv(100) == b""
            each.close()
        talks.close()


def test_who_does_not_begin_is_cut_long_before_who_does(folder, monkeypatch):
    monkeypatch.setattr(enrol_connections, "SPEAK_S", 0.5)
    with EnrolServer(folder, connection_s=3.0) as server:
        began_s = time.monotonic()
        quiet, begun, slow = (socket.create_connection(("127.0.0.1", server.port), 5) for _ in range(3))
        begun, slow = (context(folder).wrap_socket(each, server_hostname="127.0.0.1") for each in (begun, slow))
        begun.sendall(b"GET /.well-known/est/cacerts HTTP/1.1\r\n")
        slow.sendall(b"GET /.well-known")  # after the handshake, and no whole line
        assert quiet.recv(1) == b""
        with contextlib.suppress(OSError):
            assert slow.recv(1) == b""
        assert time.monotonic() - began_s < 2.5
        begun.sendall(b"\r\n")
        assert begun.recv(12) == b"HTTP/1.1 200"
        for each in (quiet, begun, slow):
            each.close()


def test_connections_are_bounded_per_address_and_free_again_afterwards(server):
    silent = [socket.create_connection(("127.0.0.1", server.port), 5) for _ in range(enrol_connections.MAX_PER_PEER)]
    over = socket.create_connection(("127.0.0.1", server.port), 5)
    assert over.recv(100) == b""  # closed at once, while the others are still open
    silent[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        silent[0].recv(1)
    for each in (*silent, over):
        each.close()
    for _ in range(100):
        with contextlib.suppress(OSError):
            assert claim(server, Board(), "A" * 43)[0] == 401
            break
        time.sleep(0.02)
    else:
        pytest.fail("no connection was free again")
    assert threading.active_count() < 20


def test_bodies_and_heads_are_bounded(server):
    login = f"sat-1:{added(server.folder)}"
    status, text = post(server, enrolment.ENROL, bytes(100_000), login)
    assert status == 413 and b"100000" in text
    assert post(server, enrolment.ENROL, b"x", login, **{"Content-Length": "-1"})[0] == 411
    assert post(server, enrolment.ENROL, b"x", login, **{"Content-Length": "9" * 30})[0] == 411
    assert post(server, enrolment.ENROL, b"0\r\n\r\n", login, **{"Transfer-Encoding": "chunked"})[0] == 411
    assert post(server, enrolment.ENROL, b"not base64", login)[0] == 400
    for path, status in (("/", 404), (enrolment.ENROL + "?x", 404), (enrolment.CACERTS, 405)):
        assert post(server, path, b"")[0] == status
    raw = context(server.folder).wrap_socket(
        socket.create_connection(("127.0.0.1", server.port), 5), server_hostname="127.0.0.1"
    )
    with raw:
        with contextlib.suppress(OSError):
            raw.sendall(b"GET " + enrolment.CACERTS.encode() + b" HTTP/1.1\r\nX: " + b"a" * 200_000)
        raw.settimeout(5)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert not raw.recv(100).startswith(b"HTTP/1.1 200")
    with socket.create_connection(("127.0.0.1", server.port), 5) as plain:  # no TLS at all
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while plain.recv(1000):
                pass
    assert claim(server, Board(), login.partition(":")[2])[0] == 200


def test_failed_attempts_are_limited_per_address_in_a_bounded_table(server):
    table = Attempts(limit=3, window_s=10.0, peers=4)
    for now_s in (0.0, 1.0, 2.0):
        assert table.wait_s("a", now_s) == 0.0
        table.failed("a", now_s)
    assert table.wait_s("a", 2.5) == 7.5 and table.wait_s("b", 2.5) == 0.0 and table.wait_s("a", 10.0) == 0.0
    for peer in "bcde":
        table.failed(peer, 3.0)
    assert table.wait_s("a", 3.0) == 0.0 and len(table._failed) == 4
    server.attempts = Attempts(limit=2)
    token = added(server.folder)
    assert [claim(server, Board(), "A" * 43)[0] for _ in range(3)] == [401, 401, 429]
    assert claim(server, Board(), token)[0] == 429 and server.folder.node("sat-1").state == "new"
    server.attempts = Attempts(limit=2)
    assert claim(server, Board(), token)[0] == 200


def test_a_damaged_record_is_the_operators_trouble(server, caplog):
    token, broken = added(server.folder), added(server.folder, "sat-2")
    server.folder.record_path("sat-2").write_text("{")
    status, text = claim(server, Board("sat-2"), broken)
    assert status == 503 and b"log" in text and b"sat-2" not in text and "sat-2.json is damaged" in caplog.text
    server.folder.record_path("sat-2").unlink()
    assert claim(server, Board(), token)[0] == 200


def test_a_damaged_revocation_list_is_named_and_a_running_server_keeps_the_old_one(server, caplog):
    token = added(server.folder)
    with server.folder.locked():
        server.folder.store("crl.pem", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")
    with pytest.raises(FleetFolderError, match=r"crl\.pem cannot be used for TLS"):
        EnrolServer(server.folder)
    assert claim(server, Board(), token)[0] == 200 and "crl.pem cannot be used" in caplog.text


def test_an_address_that_is_taken_is_named(server):
    with pytest.raises(OSError, match=f"127.0.0.1:{server.port} cannot be listened on"):
        EnrolServer(server.folder, port=server.port)


def test_a_node_that_renews_without_end_has_to_wait(server, monkeypatch):
    monkeypatch.setattr(enrol_rules, "MAX_REVOKED", 1)
    board, answers = Board(), []
    cert = certificate(claim(server, board, added(server.folder)))
    for _ in range(3):
        answers.append(renew(server, board, cert, board.key))
        cert = certificate(answers[-1]) if answers[-1][0] == 200 else cert
    assert [status for status, _ in answers] == [200, 200, 429]
