"""Who may do what in a fleet: on the broker (a real mosquitto, judged by mosquitto_pub, mosquitto_sub and openssl) and on the data
plane (judged by DEALERs of libzmq). Every refusal stands beside the same thing done by somebody who may.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import zmq
from conftest import lacking
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from zmq.utils.monitor import recv_monitor_message

from ground_station import broker_fleet, curve_gate, fleet_authority, fleet_changes
from ground_station.allow_list import AllowList, FleetWatch
from ground_station.broker import MAX_QUEUED_BYTES, AddressError, Broker, BrokerError, accepts_mqtt5, free_port
from ground_station.broker_rights import Rights, RightsError, changes, initial, node_role
from ground_station.control import Control, ControlError
from ground_station.delivery import Deliverer
from ground_station.fleet_records import FleetFolder, NodeRecord, Ports
from ground_station.link import Link, LinkError
from node_agent import frame, wire

ROOT = "spacemoe/v1/lab"
WITHIN_S = 2.0  # what a revocation may take
WAIT_S = 10.0
NAMES = ("a", "b", "c", "d", "e", "f")


def program(name: str) -> str:
    return shutil.which(name) or lacking(
        name, f"apt-get install {'openssl' if name == 'openssl' else 'mosquitto-clients'}"
    )


@dataclasses.dataclass(frozen=True)
class Papers:
    """Certificate, key and CURVE keys of somebody."""

    name: str
    cert: Path
    key: Path
    curve: tuple[bytes, bytes] = (b"", b"")


def keep(folder: Path, name: str, certificate: x509.Certificate, key, curve=(b"", b"")) -> Papers:
    cert, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key_file.write_bytes(key.private_bytes(*form))
    return Papers(name, cert, key_file, curve)


def enrol(fleet: FleetFolder, home: Path, name: str) -> Papers:
    """As after a claim."""
    key, curve = ec.generate_private_key(ec.SECP256R1()), zmq.curve_keypair()
    certificate = fleet_authority.issue(fleet, fleet_authority.Request(name, curve[0].decode(), key.public_key()))
    record = NodeRecord(
        name,
        "pi5",
        "enrolled",
        serial=fleet_authority.serial_of(certificate),
        not_after_utc_s=certificate.not_valid_after_utc.timestamp(),
        curve_public=curve[0].decode(),
        public_key_sha256=hashlib.sha256(name.encode()).hexdigest(),
    )
    with fleet.locked():
        fleet.write(record)
    return keep(home, name, certificate, key, curve)


def signed_by(ca_key, issuer: x509.Name, name: str, days: tuple[int, int], home: Path, file: str) -> Papers:
    """A certificate for `name`, valid between these days from now."""
    now, key = datetime.datetime.now(datetime.timezone.utc), ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now + datetime.timedelta(days[0])).not_valid_after(now + datetime.timedelta(days[1]))
    return keep(home, file, made.sign(ca_key, hashes.SHA256()), key)


class Lab:
    """A fleet, its broker, and what clients of others' making see there."""

    def __init__(self, home: Path, stack: contextlib.ExitStack):
        ports = Ports(*(free_port() for _ in range(4)))
        self.home = home
        self.fleet = FleetFolder.create(home / "lab", "lab", ["127.0.0.1"], ports)
        self.papers = {name: enrol(self.fleet, home, name) for name in NAMES}
        ca, cert, key = broker_fleet.ground_files(self.fleet)
        self.ca, self.ground = ca, Papers("ground", cert, key)
        self.broker = stack.enter_context(Broker(home / "run", "mosquitto", ports.broker, fleet=self.fleet))
        self.rights = stack.enter_context(Rights(self.fleet, "127.0.0.1", self.broker.port))
        self.watch = stack.enter_context(FleetWatch(self.fleet, rights=self.rights, broker=self.broker))
        self.seen = Listener(self, self.ground, f"{ROOT}/#")
        stack.callback(self.seen.stop)

    def arguments(self, who: Papers | None) -> list[str]:
        common = ["-h", "127.0.0.1", "-p", str(self.broker.port), "-V", "5", "-q", "1", "-d", "--cafile", str(self.ca)]
        return common if who is None else [*common, "--cert", str(who.cert), "--key", str(who.key)]

    def publish(self, who: Papers | None, topic: str, text: str, *more: str) -> subprocess.CompletedProcess:
        command = [program("mosquitto_pub"), *self.arguments(who), "-t", topic, "-m", text, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)

    def granted(self, who: Papers, topic: str) -> str:
        """What the broker answers to a subscription: '1' is QoS 1, '135' not authorized; '' where it ends the connection."""
        command = [program("mosquitto_sub"), *self.arguments(who), "-t", topic, "-E"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
        found = re.search(r"Subscribed \(mid: 1\): (\d+)", done.stdout + done.stderr)
        return found.group(1) if found else ""

    def arrived(self) -> list[str]:
        """Lines "topic text" that the ground station has got so far: all that was sent before this call."""
        mark = os.urandom(8).hex()
        assert self.publish(self.ground, f"{ROOT}/ground/mark", mark).returncode == 0
        self.seen.wait(mark)
        return [line for line in self.seen.lines if line.startswith("spacemoe/")]


class Listener:
    """A mosquitto_sub that runs; `lines` is all it says, with the time."""

    def __init__(self, lab: Lab, who: Papers, *topics: str, more: Sequence[str] = ()):
        wanted = [part for topic in topics for part in ("-t", topic)]
        self.process = subprocess.Popen(
            ["stdbuf", "-oL", program("mosquitto_sub"), *lab.arguments(who), "-v", *wanted, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.times: list[float] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.wait("Subscribed")

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.strip())
                self.times.append(time.monotonic())
                self._changed.notify_all()

    def wait(self, text: str, after: int = 0) -> float:
        """When a line with `text` came."""

        def found():
            return [at for line, at in zip(self.lines[after:], self.times[after:]) if text in line]

        with self._changed:
            assert self._changed.wait_for(found, WAIT_S), f"no {text!r} in {self.lines[-20:]}"
            return found()[0]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join(WAIT_S)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    for name in ("mosquitto_pub", "mosquitto_sub", "openssl", "stdbuf"):
        program(name)
    try:
        broker_fleet.find_plugin()
    except BrokerError:
        lacking("mosquitto with its dynamic-security plugin", "apt-get install mosquitto")
    with contextlib.ExitStack() as stack:
        yield Lab(tmp_path_factory.mktemp("rights"), stack)


# ------------------------------------------------------------ the broker


def test_a_node_publishes_its_own_leaves_and_nothing_else(lab):
    leaves = ("birth", "status", "telemetry", "history", "clock", "event", "result")
    mine = [f"{ROOT}/node/a/{leaf}" for leaf in leaves]
    others = [f"{ROOT}/node/b/{leaf}" for leaf in leaves]
    others += [
        f"{ROOT}/node/a/command/ping",
        f"{ROOT}/node/b/command/ping",
        f"{ROOT}/ground/status",
        f"{ROOT}/satellite/a",
    ]
    others += [f"{ROOT}/node/a", f"{ROOT}/node/a/other", f"{ROOT}/node/a/birth/x", "spacemoe/v1/other/node/a/birth"]
    others += ["$CONTROL/dynamic-security/v1"]
    answers = {}
    for topic in (*mine, *others):
        done = lab.publish(lab.papers["a"], topic, "from-a")
        answers[topic] = re.search(r"received PUBACK \(Mid: 1, RC:(\d+)\)", done.stdout + done.stderr).group(1)
    got = {line.split()[0] for line in lab.arrived() if line.endswith("from-a")}
    assert got == set(mine)
    assert {topic for topic, code in answers.items() if code in ("0", "16")} == set(mine)
    assert {answers[topic] for topic in others} == {"135"}  # MQTT 5: not authorized
    # nobody's will may speak for another; its own may
    for topic in (mine[1], others[1]):
        will = ["--will-topic", topic, "--will-payload", "last-words", "--will-qos", "1"]
        Listener(lab, lab.papers["a"], f"{ROOT}/ground/status", more=will).stop()  # killed: the broker says the will
    lab.seen.wait("last-words")
    assert [line.split()[0] for line in lab.arrived() if line.endswith("last-words")] == [mine[1]]


def test_a_node_hears_its_own_commands_and_no_others(lab):
    ours = (f"{ROOT}/node/a/command/+", f"{ROOT}/node/a/command/#", f"{ROOT}/node/a/status", f"{ROOT}/ground/status")
    for topic in ours:
        assert lab.granted(lab.papers["a"], topic) == "1", topic
    theirs = (
        f"{ROOT}/node/b/command/+",
        f"{ROOT}/node/+/command/+",
        f"{ROOT}/node/b/status",
        f"{ROOT}/#",
        "#",
        "$SYS/#",
    )
    theirs += (
        f"$share/g/{ROOT}/node/b/command/#",
        "$CONTROL/#",
        "$CONTROL/dynamic-security/v1/response",
        f"{ROOT}/satellite/b",
    )
    for topic in theirs:
        assert lab.granted(lab.papers["a"], topic) == "135", topic
    assert lab.granted(lab.ground, f"{ROOT}/#") == "1"
    both = Listener(lab, lab.papers["a"], f"{ROOT}/node/a/command/+", f"{ROOT}/node/b/command/+")
    assert lab.publish(lab.ground, f"{ROOT}/node/b/command/x", "for-b").returncode == 0
    assert lab.publish(lab.ground, f"{ROOT}/node/a/command/x", "for-a").returncode == 0
    both.wait("for-a")
    both.stop()
    assert not [line for line in both.lines if "for-b" in line]


def test_without_a_good_certificate_nothing_is_had(lab):
    ca = x509.load_pem_x509_certificate(lab.ca.read_bytes())
    ca_key = serialization.load_pem_private_key(lab.fleet.read("ca.key"), None)
    rogue_key = ec.generate_private_key(ec.SECP256R1())
    strangers = {
        "none": None,
        "rogue": signed_by(rogue_key, ca.subject, "a", (-1, 30), lab.home, "rogue"),
        "expired": signed_by(ca_key, ca.subject, "a", (-30, -1), lab.home, "expired"),
        "early": signed_by(ca_key, ca.subject, "a", (1, 30), lab.home, "early"),
    }
    for name, who in strangers.items():
        done = lab.publish(who, f"{ROOT}/node/a/event", f"from-{name}")
        assert done.returncode != 0, name
        assert "CONNACK (0)" not in done.stdout, name
    # the same names and dates, signed by the fleet and valid now, get in: what failed above was what it says
    good = signed_by(ca_key, ca.subject, "a", (-1, 30), lab.home, "good")
    assert lab.publish(good, f"{ROOT}/node/a/event", "from-good").returncode == 0
    # of the authority, and of no node: in, without any right
    nobody = signed_by(ca_key, ca.subject, "nobody", (-1, 30), lab.home, "nobody")
    lab.publish(nobody, f"{ROOT}/node/nobody/event", "from-nobody")
    assert lab.granted(nobody, f"{ROOT}/node/nobody/command/#") == "135"
    assert [line.split()[1] for line in lab.arrived() if " from-" in line and line.split()[1] != "from-a"] == [
        "from-good"
    ]
    plain = [program("mosquitto_pub"), "-h", "127.0.0.1", "-p", str(lab.broker.port), "-t", "x", "-m", "x"]
    assert subprocess.run(plain, capture_output=True, timeout=WAIT_S).returncode != 0
    assert handshake(lab, good, "-tls1_2") and handshake(lab, good, "-tls1_3")
    old = client(lab, good, "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0")
    done = subprocess.run(old, stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT_S)
    assert b"alert protocol version" in done.stderr


def handshake(lab: Lab, who: Papers, *more: str) -> str:
    """'New' or 'Reused' where openssl and the broker agree on a session and the broker takes an MQTT CONNECT in it; else ''."""
    connect = b"\x10\x10\x00\x04MQTT\x05\x02\x00\x05\x00\x00\x03abc"
    with subprocess.Popen(
        client(lab, who, *more), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as session:
        said = b""
        try:
            session.stdin.write(connect)
            session.stdin.flush()
            while not re.search(rb"\x20.\x00\x00", said, re.DOTALL):  # CONNACK: its length, no session, reason 0
                part = os.read(session.stdout.fileno(), 65536)
                if not part:
                    return ""
                said += part
        except BrokenPipeError:
            return ""
        finally:
            session.kill()
    return "Reused" if b"\nReused, " in said else "New"


def client(lab: Lab, who: Papers, *more: str) -> list[str]:
    where = [program("openssl"), "s_client", "-connect", f"127.0.0.1:{lab.broker.port}", "-CAfile", str(lab.ca)]
    return [*where, "-cert", str(who.cert), "-key", str(who.key), *more]


def test_a_revoked_node_is_disconnected_within_two_seconds_and_cannot_return(lab):
    who, other = lab.papers["c"], lab.papers["b"]
    ticket = lab.home / "ticket"
    assert handshake(lab, who, "-tls1_2", "-sess_out", str(ticket)) == "New"
    assert handshake(lab, who, "-tls1_2", "-sess_in", str(ticket)) == "Reused"  # so that it proves something below
    online = wire.encode(wire.Status("c", "online", 7)).decode()
    assert lab.publish(who, f"{ROOT}/node/c/status", online, "-r").returncode == 0
    assert online in " ".join(lab.arrived())
    node, neighbour = Listener(lab, who, f"{ROOT}/node/c/command/+"), Listener(lab, other, f"{ROOT}/node/b/command/+")
    began_s = time.monotonic()
    fleet_changes.revoke(lab.fleet, "c", "lost")
    cut_s = node.wait("Received DISCONNECT (152)") - began_s  # administrative action
    print(f"cut off the broker after {cut_s:.3f} s")
    assert cut_s < WITHIN_S
    tries = [lab.publish(who, f"{ROOT}/node/c/event", "from-revoked").returncode for _ in range(5)]
    assert 0 not in tries
    assert handshake(lab, who) == "" and handshake(lab, other) == "New"
    assert handshake(lab, who, "-tls1_2", "-sess_in", str(ticket)) == ""
    assert not any("from-revoked" in line for line in lab.arrived())
    # what the others are told, since mosquitto sends no last will here
    gone = wire.encode(wire.Status("c", "offline", 7)).decode()
    assert gone in " ".join(lab.arrived())
    # the neighbour never noticed
    assert lab.publish(lab.ground, f"{ROOT}/node/b/command/x", "still-there").returncode == 0
    neighbour.wait("still-there")
    assert sum("CONNACK" in line for line in neighbour.lines) == 1
    for each in (node, neighbour):
        each.stop()


def test_a_node_in_quarantine_has_no_rights_until_it_is_released(lab):
    who = lab.papers["d"]
    node = Listener(lab, who, f"{ROOT}/node/d/command/+")
    with lab.fleet.change("d") as record:
        lab.fleet.write(dataclasses.replace(record, state="quarantined", reason="wrong sums"))
    node.wait("Received DISCONNECT (152)")
    node.stop()
    lab.publish(who, f"{ROOT}/node/d/event", "from-quarantine")
    assert lab.granted(who, f"{ROOT}/node/d/command/+") in ("135", "")
    fleet_changes.release(lab.fleet, "d")
    end_s = time.monotonic() + WAIT_S
    while lab.granted(who, f"{ROOT}/node/d/command/+") != "1":
        assert time.monotonic() < end_s
    lab.publish(who, f"{ROOT}/node/d/event", "from-released")
    said = [line.split()[1] for line in lab.arrived() if line.startswith(f"{ROOT}/node/d/")]
    assert said == ["from-released"]


def test_a_node_that_enrols_later_has_its_rights_soon_and_the_control_plane_speaks_tls(lab):
    papers = enrol(lab.fleet, lab.home, "late")
    end_s = time.monotonic() + WAIT_S
    while lab.granted(papers, f"{ROOT}/node/late/command/+") != "1":
        assert time.monotonic() < end_s
    files = (lab.ca, lab.ground.cert, lab.ground.key)
    with Control("lab", "127.0.0.1", lab.broker.port, tls=files) as control:
        event = wire.Event("late", time.time(), "info", "hello", "here")
        assert lab.publish(papers, f"{ROOT}/node/late/event", wire.encode(event).decode()).returncode == 0
        end_s = time.monotonic() + WAIT_S
        while not (state := control.snapshot().get("late")) or not state.events:
            assert time.monotonic() < end_s
            time.sleep(0.01)
    with pytest.raises(ControlError, match="cannot be used"):
        Control("lab", "127.0.0.1", lab.broker.port, tls=(lab.ca, lab.ground.cert, papers.key))


def test_all_is_as_it_should_be_after_the_first_time_and_after_the_broker_s_end(lab):
    records = lab.fleet.nodes()
    listed = [{"command": "listClients", "verbose": True}, {"command": "listRoles", "verbose": True}]

    def now():
        end_s = time.monotonic() + WAIT_S
        while True:
            try:
                clients, roles = (answer["data"] for answer in lab.rights.ask(listed))
                break
            except RightsError:  # while the broker restarts
                assert time.monotonic() < end_s
        clients = {each["username"]: each for each in clients["clients"]}
        return clients, {each["rolename"]: each for each in roles["roles"]}

    assert changes("lab", records, *now()) == ([], frozenset())
    lab.rights.ask([{"command": "removeRoleACL", "rolename": "node-b", **node_role("lab", "b")["acls"][0]}])
    lab.rights.ask([{"command": "createClient", "username": "stranger", "roles": [{"rolename": "ground"}]}])
    commands, cut = changes("lab", records, *now())
    assert [each["command"] for each in commands] == ["modifyRole", "disableClient", "modifyClient", "deleteClient"]
    assert lab.rights.reconcile(records) == cut == {"stranger"}
    assert changes("lab", records, *now()) == ([], frozenset())
    with pytest.raises(RightsError, match="refuses deleteRole no-such"):
        lab.rights.ask([{"command": "deleteRole", "rolename": "no-such"}])
    # a broker that is killed is started again by the watch, with the rights of the records
    psutil.Process(lab.broker._child.pid).children()[0].kill()
    lab.seen.wait("connection was lost")
    assert changes("lab", records, *now()) == ([], frozenset())
    assert lab.publish(lab.papers["c"], f"{ROOT}/node/c/event", "from-revoked").returncode != 0
    assert lab.publish(lab.papers["b"], f"{ROOT}/node/b/event", "from-b").returncode == 0
    assert os.stat(lab.broker.folder / broker_fleet.RIGHTS_FILE).st_mode & 0o077 == 0


def test_what_a_fleet_s_broker_refuses(lab, tmp_path, monkeypatch):
    with pytest.raises(BrokerError, match="knows no certificates"):
        Broker(tmp_path, "embedded", fleet=lab.fleet)
    with pytest.raises(AddressError, match="without certificates does not listen on 0.0.0.0"):
        Broker(tmp_path, "mosquitto", bind="0.0.0.0")
    with pytest.raises(AddressError, match="no IP address"):
        Broker(tmp_path, "mosquitto", fleet=lab.fleet, bind="here")
    monkeypatch.setattr(broker_fleet, "PLUGIN", "no-such.so")
    with pytest.raises(BrokerError, match="apt-get install mosquitto"):
        Broker(tmp_path, "mosquitto", fleet=lab.fleet).start()
    monkeypatch.undo()
    (tmp_path / "copy").mkdir()
    copy = FleetFolder.open(shutil.copytree(lab.fleet.root, tmp_path / "copy" / "lab"))
    copy.path("ground.key").write_bytes(lab.papers["b"].key.read_bytes())
    with pytest.raises(BrokerError, match="cannot be used"):
        Broker(tmp_path, "mosquitto", fleet=copy).start()
    with Broker(tmp_path / "with space", "mosquitto", fleet=lab.fleet, bind="0.0.0.0") as broker:
        assert broker.host == "127.0.0.1"
    with monkeypatch.context() as without:
        without.setattr("ground_station.broker.find_mosquitto", lambda: None)
        with pytest.raises(BrokerError, match="apt-get install mosquitto") as told:
            Broker(tmp_path, "mosquitto", fleet=lab.fleet)
        assert "embedded" not in str(told.value)


def test_the_ground_station_s_own_clients_reach_any_address_of_it_and_a_folder_has_one_broker(lab, tmp_path):
    with Broker(tmp_path, "mosquitto", fleet=lab.fleet, bind="127.0.0.2") as broker:  # in no certificate
        config = broker.folder / "mosquitto.conf"
        before = config.read_bytes()
        with pytest.raises(BrokerError, match="another `spacemoe up` runs on"):
            Broker(tmp_path, "mosquitto", fleet=lab.fleet, bind="127.0.0.3").start()
        assert config.read_bytes() == before and broker.running
        tls = broker_fleet.ground_files(lab.fleet)
        with Rights(lab.fleet, broker.host, broker.port), Control("lab", broker.host, broker.port, tls=tls):
            broker.restart()
        own = broker_fleet.client_context(*tls)
        assert accepts_mqtt5(broker.host, broker.port, 5.0, own)
        for more in ([], ["-verify_hostname", "127.0.0.2"]):  # openssl, which asks for the address, does not take it
            command = [program("openssl"), "s_client", "-connect", f"127.0.0.2:{broker.port}", "-CAfile", lab.ca]
            command += ["-cert", lab.ground.cert, "-key", lab.ground.key, "-verify_return_error", *more]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT_S)
            assert (b"hostname mismatch" in done.stderr.lower()) is bool(more)
    # a server with a certificate of the fleet that is none of the ground station's is not taken for it
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(papers: Papers) -> None:
            server.load_cert_chain(papers.cert, papers.key)
            with contextlib.suppress(OSError):
                server.wrap_socket(listener.accept()[0], server_side=True).close()

        for papers, good in ((lab.papers["b"], False), (lab.ground, True)):
            thread = threading.Thread(target=serve, args=(papers,))
            thread.start()
            plain = socket.create_connection(listener.getsockname(), 5)
            with pytest.raises(ssl.SSLCertVerificationError) if not good else contextlib.nullcontext():
                own.wrap_socket(plain, server_hostname="127.0.0.1").close()
            plain.close()
            thread.join()


def test_what_waits_for_a_node_that_is_away_is_bounded(lab):
    node = lab.papers["b"]
    status, away = f"{ROOT}/node/b/status", ("-i", "b-away", "-x", "3600", "-c")
    plain = [program("mosquitto_sub"), *lab.arguments(node), "-t", status, *away]
    assert subprocess.run([*plain, "-E"], capture_output=True, timeout=WAIT_S).returncode == 0
    sent, text = 160, "x" * 250_000
    command = [program("mosquitto_pub"), *lab.arguments(node), "-t", status, "-l"]
    command.remove("-d")
    done = subprocess.run(command, input=f"{text}\n" * sent, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    plain.remove("-d")
    done = subprocess.run([*plain, "-F", "%l", "-W", "1"], capture_output=True, text=True, timeout=WAIT_S)
    held = sum(int(line) for line in done.stdout.split())
    assert MAX_QUEUED_BYTES / 2 < held < MAX_QUEUED_BYTES + 2 * len(text) < sent * len(text)
    assert lab.publish(node, f"{ROOT}/node/b/event", "after-the-flood").returncode == 0
    records = {
        "x": NodeRecord("x", "pi5", "revoked"),
        "y": NodeRecord("y", "pi5", "enrolled"),
        "z": NodeRecord("z", "pi5"),
    }
    tree = initial("lab", records)
    assert not any(tree["defaultACLAccess"].values())
    assert [each["rolename"] for each in tree["roles"]] == ["ground", "node-y"]
    assert {each["username"]: bool(each.get("disabled")) for each in tree["clients"]} == {
        "ground": False,
        "x": True,
        "y": False,
        "z": True,
    }


# ------------------------------------------------------------ the data plane


class Node:
    """A DEALER of libzmq that names itself `name` and holds `papers`."""

    def __init__(self, context: zmq.Context, endpoint: str, server: bytes, papers: Papers, name: str = ""):
        self.name = name or papers.name
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.routing_id = self.name.encode()
        self.socket.curve_serverkey = server
        self.socket.curve_publickey, self.socket.curve_secretkey = papers.curve
        self.monitor = self.socket.get_monitor_socket()
        self.socket.connect(endpoint)

    def hello(self) -> None:
        self.socket.send(frame.pack(frame.Frame(frame.HELLO, text=self.name)))

    def event(self, wanted: int, timeout_s: float = WAIT_S) -> float | None:
        """When the connection's next `wanted` event came; None where it does not come in time."""
        end_s = time.monotonic() + timeout_s
        while (left_s := end_s - time.monotonic()) > 0 and self.monitor.poll(left_s * 1e3):
            if recv_monitor_message(self.monitor)["event"] == wanted:
                return time.monotonic()
        return None

    def close(self) -> None:
        if not self.socket.closed:
            self.socket.disable_monitor()
            self.monitor.close()
            self.socket.close()


@pytest.fixture
def data(tmp_path):
    """A fleet of a, b and c with a Link and a Deliverer; node(...) makes a DEALER."""
    fleet = FleetFolder.create(tmp_path / "lab", "lab", ["127.0.0.1"])
    papers = {name: enrol(fleet, tmp_path, name) for name in ("a", "b", "c")}
    keys = fleet.curve_keys()
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        allowed = AllowList(fleet)
        link = stack.enter_context(Link("tcp://127.0.0.1:*", keys, allowed))
        deliverer = stack.enter_context(Deliverer("tcp://127.0.0.1:*", keys, allowed))

        def node(name: str, as_name: str = "", where=None, own: Papers | None = None) -> Node:
            made = Node(context, (where or link).endpoint, keys[0], own or papers[name], as_name)
            stack.callback(made.close)
            return made

        yield fleet, link, deliverer, node


def welcomed(link: Link, node: Node) -> str:
    """The name under which the ground station answers a HELLO."""
    end_s = time.monotonic() + WAIT_S
    while not node.socket.poll(1):
        link.drain()
        assert time.monotonic() < end_s
    return frame.unpack(node.socket.recv()).text


def served(link: Link, node: Node, timeout_s: float = WAIT_S) -> bool:
    """Whether what the ground station sends to the node's name gets to this DEALER."""
    token = os.urandom(8)
    assert link.ask(node.name, 1, token) is None
    end_s = time.monotonic() + timeout_s
    while (left_s := end_s - time.monotonic()) > 0 and node.socket.poll(left_s * 1e3):
        if node.socket.recv() == token:
            return True
    return False


def test_a_node_speaks_under_its_own_name_whatever_name_it_gives(data):
    fleet, link, _, node = data
    keys = fleet.curve_keys()
    b = node("b")
    b.hello()
    assert not link.wait_for({"b"}, WAIT_S) and served(link, b)
    for _ in range(20):  # it must not win a race either
        thief = node("a", as_name="b")
        thief.hello()
        assert welcomed(link, thief) == "a"
        assert served(link, b) and not thief.socket.poll(0)
        thief.close()
    assert set(link.peers) == {"a", "b"} and link.dropped_connections == {}
    # the same with a door that is open to any key: there the name is the thief's to choose
    with Link("tcp://127.0.0.1:*", keys, any_key=True) as open_link:
        victim = node("b", where=open_link)
        victim.hello()
        assert not open_link.wait_for({"b"}, WAIT_S) and served(open_link, victim)
        thief = node("a", as_name="b", where=open_link)
        thief.hello()
        assert welcomed(open_link, thief) == "b"
        assert served(open_link, thief) and not victim.socket.poll(0)


def test_a_message_under_another_s_name_is_dropped_and_its_connection_cut(data, monkeypatch):
    """As if libzmq let peers name themselves in spite of the gate's answer: the second check stands on its own."""
    monkeypatch.setattr(
        curve_gate,
        "_property",
        lambda name, value, real=curve_gate._property: real(b"X-Identity" if name == b"Identity" else name, value),
    )
    _, link, _, node = data
    honest, thief = node("c"), node("a", as_name="b")
    honest.hello()
    assert not link.wait_for({"c"}, WAIT_S)
    thief.hello()
    end_s = time.monotonic() + WAIT_S
    while not link.dropped_connections.get("impostor"):
        link.drain()
        assert time.monotonic() < end_s
    assert thief.event(zmq.EVENT_DISCONNECTED) is not None
    assert set(link.peers) == {"c"} and served(link, honest)


def test_a_revoked_node_is_cut_off_the_data_plane_within_two_seconds_and_cannot_return(data):
    fleet, link, deliverer, node = data
    stays, goes, silent = node("b"), node("a"), node("a", where=deliverer)
    for each in (stays, goes):
        each.hello()
    assert not link.wait_for({"a", "b"}, WAIT_S) and served(link, goes) and served(link, stays)
    assert silent.event(zmq.EVENT_HANDSHAKE_SUCCEEDED) is not None
    began_s = time.monotonic()
    fleet_changes.revoke(fleet, "a", "stolen")
    for each in (goes, silent):  # nobody touches the sockets meanwhile
        cut_s = each.event(zmq.EVENT_DISCONNECTED) - began_s
        print(f"cut off the data plane after {cut_s:.3f} s")
        assert cut_s < WITHIN_S
    # each tries again by itself, and a new one too; libzmq says how that ends: status 400 of ZAP
    for each in (goes, silent, node("a"), node("a", where=deliverer), node("a", as_name="b")):
        assert each.event(zmq.EVENT_HANDSHAKE_FAILED_AUTH) is not None
    assert link.ask("a", 1, b"x").kind == "unreachable" and not goes.socket.poll(0)
    # the other one kept its connection
    assert served(link, stays) and stays.event(zmq.EVENT_DISCONNECTED, 0.05) is None
    # back with the same key only by a record that says so
    with fleet.change("a") as record:
        fleet.write(dataclasses.replace(record, state="enrolled"))
    time.sleep(2 * curve_gate.LOOK_S)
    again = node("a")
    again.hello()
    welcomed(link, again)
    assert served(link, again)


def test_a_node_s_new_key_ends_the_connection_with_the_old_one(data):
    fleet, link, _, node = data
    old, other = node("a"), node("b")
    for each in (old, other):
        each.hello()
    assert not link.wait_for({"a", "b"}, WAIT_S)
    curve = zmq.curve_keypair()
    with fleet.change("a") as record:
        fleet.write(dataclasses.replace(record, curve_public=curve[0].decode()))
    assert old.event(zmq.EVENT_DISCONNECTED) is not None
    new = node("a", own=Papers("a", Path(), Path(), curve))
    new.hello()
    welcomed(link, new)
    assert old.event(zmq.EVENT_HANDSHAKE_FAILED_AUTH) is not None and served(link, other)


def test_who_is_let_in(data, tmp_path):
    fleet, link, _, node = data
    keys = fleet.curve_keys()
    rogue = node("a", own=Papers("a", Path(), Path(), zmq.curve_keypair()))
    rogue.hello()
    assert rogue.event(zmq.EVENT_HANDSHAKE_FAILED_AUTH) is not None
    good = node("a")
    good.hello()
    assert not link.wait_for({"a"}, WAIT_S)
    # records that cannot be read let nobody new in, and throw nobody out
    nodes = fleet.path("nodes")
    nodes.rename(tmp_path / "away")
    late = node("b")
    late.hello()
    assert late.event(zmq.EVENT_HANDSHAKE_SUCCEEDED, 0.5) is None and served(link, good)
    (tmp_path / "away").rename(nodes)
    time.sleep(2 * curve_gate.LOOK_S)
    node("b").hello()
    assert not link.wait_for({"b"}, WAIT_S)
    # a damaged record is one node's loss
    (nodes / "c.json").write_text("{")
    allowed = AllowList(fleet)
    assert allowed.refresh().keys() == {"a", "b"} and allowed.refresh() is allowed.refresh()
    for kind in (Link, Deliverer):
        with pytest.raises(LinkError, match="every key would be let in"):
            kind("tcp://0.0.0.0:*", keys)
        with pytest.raises(LinkError, match="give both"):
            kind("tcp://127.0.0.1:*", None, allowed)
        for more in ({"allowed": allowed}, {"any_key": True}):
            with kind("tcp://0.0.0.0:*", keys, **more):
                pass
