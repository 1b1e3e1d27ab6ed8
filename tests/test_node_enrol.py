"""How a board gets and renews its certificate: against servers that answer wrongly in every way, and the ground station's own.

OpenSSL's program is the judge of what was got; each check of an answer has the answer that must fail it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from conftest import lacking
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from enrol_rig import (
    DAY_S,
    ROOT,
    TOKEN,
    Authority,
    Responder,
    answer,
    as_json,
    identity,
    killed_at,
    name,
    node_agent,
    pem,
    write_pack,
)
from node_rig import Observer

from ground_station import fleet_changes, fleet_pack
from ground_station.broker import accepts_mqtt5, free_port
from ground_station.enrol_server import EnrolServer
from ground_station.fleet_records import FleetFolder, Ports
from node_agent import cli, config, control, curve_key, enrol, enrolment, est_client, key_pair, renewal, secret_file
from node_agent.errors import CertificateError, ClockError, ConfigError, EnrolError, RefusedError

NOW_S = time.time()
LEFT = ["ca.pem", "curve.key", "node.key", "node.pem", "spacemoe.toml"]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory) -> tuple[Path, Path]:
    return authority.server(tmp_path_factory.mktemp("server"))


@pytest.fixture
def server(authority, files):
    with Responder(authority, files) as running:
        yield running


@pytest.fixture
def pack(authority, server, tmp_path) -> Path:
    return write_pack(tmp_path / "node", authority.pem, server.port)


def openssl(*arguments: object) -> subprocess.CompletedProcess:
    if shutil.which("openssl") is None:
        lacking("openssl", "apt-get install openssl")
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=30)


def asked(server: Responder) -> list[tuple[str, bytes]]:
    """(path, public key) of each request that came."""
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return [(path, request.public_key().public_bytes(*form)) for path, request, *_ in server.seen]


def judged(pack: Path) -> str:
    """What openssl says of the certificate that was got; of the key too."""
    done = openssl("verify", "-purpose", "sslclient", "-CAfile", pack / "ca.pem", pack / "node.pem")
    assert done.returncode == 0, done.stderr
    of_cert = openssl("x509", "-in", pack / "node.pem", "-noout", "-pubkey").stdout
    assert (
        of_cert.startswith("-----BEGIN PUBLIC KEY")
        and of_cert == openssl("pkey", "-in", pack / "node.key", "-pubout").stdout
    )
    return openssl("x509", "-in", pack / "node.pem", "-noout", "-subject", "-ext", "subjectAltName").stdout


def test_a_claim_from_the_first_key_to_the_certificate(pack, server, authority, capsys):
    assert cli.main(["enrol", "--config", str(pack / "spacemoe.toml"), "--once", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    text = judged(pack)
    assert "CN = n1" in text and "O = test" in text and "URI:urn:spacemoe:curve:" in text
    assert (first["node"], first["new"]) == ("n1", True)
    path, request, authorization, shown = server.seen[0]
    assert (path, shown) == (enrolment.ENROL, None)
    assert base64.b64decode(authorization.removeprefix("Basic ")).decode() == f"n1:{TOKEN}"
    assert request.is_signature_valid
    for file, mode in (("node.key", 0o600), ("curve.key", 0o600), ("node.pem", 0o644)):
        assert stat.S_IMODE((pack / file).stat().st_mode) == mode
    assert sorted(each.name for each in pack.iterdir()) == [
        "ca.pem",
        "curve.key",
        "node.key",
        "node.pem",
        "spacemoe.toml",
    ]
    assert first["curve_public"] == curve_key.own_key(pack / "curve.key")[0].decode()
    # once more: nothing is asked, nothing changes
    before = {each.name: each.read_bytes() for each in pack.iterdir()}
    assert cli.main(["enrol", "--config", str(pack / "spacemoe.toml"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == first | {"new": False} and len(server.seen) == 1
    assert {each.name: each.read_bytes() for each in pack.iterdir()} == before


def test_openssl_can_say_no(pack, tmp_path):
    """The judge's own control: a certificate of a stranger, and a key of another."""
    enrol.obtain(identity(pack))
    (pack / "ca.pem").write_bytes(Authority().pem)
    with pytest.raises(AssertionError):
        judged(pack)


def wrong_answers(authority: Authority):
    rogue, other = Authority(), ec.generate_private_key(ec.SECP256R1())
    urn = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(enrolment.curve_urn("a" * 40))])
    return {
        "another authority's": (lambda r: answer(rogue.node(r)), "is not of"),
        "another node's": (lambda r: answer(authority.node(r, subject=name("n2", "test"))), "names ['n2']"),
        "another fleet's": (lambda r: answer(authority.node(r, subject=name("n1", "other"))), "names ['other']"),
        "another key's": (
            lambda r: answer(authority.node(r, key=other.public_key())),
            "0 certificates of this node's key",
        ),
        "two": (lambda r: answer(authority.node(r), authority.node(r)), "2 certificates"),
        "the authority's own": (lambda r: answer(authority.cert), "0 certificates"),
        "a server's": (lambda r: answer(authority.node(r, usage="SERVER_AUTH")), "is not for clients"),
        "an authority's": (lambda r: answer(authority.node(r, ca=True)), "is an authority's"),
        "another CURVE key's": (lambda r: answer(authority.node(r, san=urn)), "is not bound"),
        "expired": (lambda r: answer(authority.node(r, begin_s=-9 * DAY_S, end_s=-DAY_S)), "has expired"),
        "of tomorrow": (lambda r: answer(authority.node(r, begin_s=DAY_S)), "set the clock"),
        "oversized": (lambda r: (200, b"A" * (enrolment.MAX_ANSWER_BYTES + 4)), "over 65536 bytes"),
        "no base64": (lambda r: (200, b"%%%"), "not base64"),
        "no PKCS #7": (lambda r: (200, base64.b64encode(b"\x30\x82\xff\xff" * 40)), "no PKCS #7"),
        "an empty body": (lambda r: (200, b""), "no PKCS #7"),
        "busy": (lambda r: (503, b"come back\x1b[31m later"), "HTTP 503: come back[31m later"),
        "elsewhere": (lambda r: (302, b""), "HTTP 302"),
        "refused": (lambda r: (403, b"the token was used\nalready"), "refuses this node: the token was used already"),
        "unknown": (lambda r: (401, b"wrong token"), "refuses this node: wrong token"),
    }


@pytest.mark.parametrize("kind", list(wrong_answers(Authority())))
def test_a_wrong_answer_is_named_and_leaves_no_certificate(kind, pack, server, authority):
    respond, said = wrong_answers(authority)[kind]
    server.respond = lambda path, request, *_: respond(request)
    with pytest.raises((EnrolError, CertificateError)) as caught:
        enrol.obtain(identity(pack))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert isinstance(caught.value, RefusedError) == (kind in ("refused", "unknown"))
    assert isinstance(caught.value, ClockError) == (kind == "of tomorrow")
    assert not (pack / "node.pem").exists() and (pack / "claim").read_text() == TOKEN + "\n"
    assert TOKEN not in str(caught.value)
    # the same board, the same key and token, once the server answers as it should
    key = (pack / "node.key").read_bytes()
    server.respond = server.sign
    assert enrol.obtain(identity(pack))[1] and (pack / "node.key").read_bytes() == key


def test_a_server_that_stalls_or_drips_costs_a_bounded_time(pack, server, monkeypatch):
    monkeypatch.setattr(est_client, "TIMEOUT_S", 0.5)

    def drip(file) -> None:
        file.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n")
        for _ in range(100):
            file.write(b"A")
            file.flush()
            time.sleep(0.05)

    for respond in (lambda *_: (None, lambda file: time.sleep(3)), lambda *_: (None, drip)):
        server.respond = respond
        with pytest.raises(EnrolError, match="no answer from 127.0.0.1"):
            enrol.obtain(identity(pack))


def test_what_is_no_http_and_what_is_not_there(pack, server):
    server.respond = lambda *_: (None, lambda file: file.write(b"SSH-2.0-OpenSSH_9\r\n\r\n"))
    with pytest.raises(EnrolError, match="does not answer as a ground station"):
        enrol.obtain(identity(pack))
    server._server.shutdown()
    server._server.server_close()
    with pytest.raises(EnrolError, match="no answer from 127.0.0.1:.*refused"):
        enrol.obtain(identity(pack))


@pytest.mark.parametrize(
    "kind, said",
    [
        ("rogue", "is not this fleet's ground station"),
        ("not yet", "not yet valid by this machine's clock, which says"),
        ("expired", "has expired, or this machine's clock"),
        ("other host", "is not this fleet's ground station (IP address mismatch"),
    ],
)
def test_a_server_that_is_not_ours_gets_no_token(kind, said, authority, tmp_path):
    change = {
        "not yet": {"begin_s": DAY_S},
        "expired": {"begin_s": -9 * DAY_S, "end_s": -DAY_S},
        "other host": {"host": "127.0.0.2"},
    }.get(kind, {})
    other = Authority() if kind == "rogue" else authority
    with Responder(other, other.server(tmp_path, **change)) as server:
        pack = write_pack(tmp_path / "node", authority.pem, server.port)
        with pytest.raises(EnrolError) as caught:
            enrol.obtain(identity(pack))
        assert said in str(caught.value)
        assert server.seen == []


def test_a_refusal_and_a_missing_claim_end_the_command_in_one_line(pack, server, capsys):
    def ended(*arguments) -> tuple[int, str]:
        code, error = cli.main([*arguments, "--config", str(pack / "spacemoe.toml")]), capsys.readouterr().err
        assert len(error.splitlines()) == 1 and TOKEN not in error
        return code, error

    server.respond = lambda *_: (401, b"unknown node or wrong claim token")
    code, said = ended("enrol", "--once")
    assert code == 1 and "refuses this node: unknown node or wrong claim token" in said
    server.respond = lambda *_: (503, b"")
    assert ended("enrol", "--once")[0] == 4
    (pack / "claim").unlink()
    code, said = ended("enrol")
    assert code == 2 and "no claim token" in said
    code, said = ended("run")
    assert code == 2 and f"run `node-agent enrol --config {pack}/spacemoe.toml`" in said


def test_tries_go_on_with_growing_pauses_and_slowly_after_a_refusal(pack, server):
    waits, said = [], []
    statuses = iter([503] * 8 + [403] * 2)

    def respond(*seen):
        status = next(statuses, None)
        return server.sign(*seen) if status is None else (status, b"no")

    server.respond = respond
    made, new = enrol.until_enrolled(identity(pack), False, said.append, waits.append)
    assert new and made.not_after_utc_s > NOW_S
    assert len(waits) == len(said) == 10 and waits[8:] == [60.0, 60.0]
    for n, wait_s in enumerate(waits[:8]):
        assert min(60, 2 * 2**n) / 2 <= wait_s <= min(60, 2 * 2**n)
    assert TOKEN not in "".join(said) and "trying again in 60 s" in said[-1]


# ---------------------------------------------------------------- power cuts


def test_a_power_cut_anywhere_in_a_claim_is_made_up_for(authority, server, tmp_path, monkeypatch):
    """Killed before each change of the folder in turn: the next run ends with one whole pair, and no token."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a kill is no test of it
    for cut in range(40):
        folder = write_pack(tmp_path / str(cut), authority.pem, server.port)
        who = identity(folder)
        killed = killed_at(cut, lambda who=who: enrol.obtain(who))
        if (folder / "node.pem").exists():
            enrol.current(who)  # whole
        enrol.obtain(who)
        assert key_pair.matches(who.cert, who.key)
        assert sorted(each.name for each in folder.iterdir()) == LEFT
        if not killed:
            break
    assert 6 <= cut < 39
    # every try of one board was for one key
    assert len({key for _, key in asked(server)}) <= cut + 1 + 2  # two cuts come before the key is on the disk


def test_a_power_cut_anywhere_in_a_renewal_leaves_the_old_pair_or_the_new_one(pack, server):
    who = identity(pack)
    enrol.obtain(who)
    for cut in range(40):
        before = enrol.current(who)
        killed = killed_at(cut, lambda: enrol.renew(who))
        now = enrol.current(who)
        assert key_pair.matches(who.cert, who.key)
        assert (now == before) or server.seen[-1][0] == enrolment.RENEW
        if not killed:
            assert now != before
            break
    assert 4 <= cut < 39
    enrol.renew(who)
    judged(pack)
    assert not key_pair.next_key(who.key).exists()


def test_tries_of_one_renewal_ask_for_one_key(pack, server):
    who = identity(pack)
    old, _ = enrol.obtain(who)
    server.respond = lambda *_: (503, b"")
    for _ in range(2):
        with pytest.raises(EnrolError):
            enrol.renew(who)
    waiting = key_pair.next_key(who.key).read_bytes()
    assert enrol.current(who) == old and key_pair.settle(who.cert, who.key) is False
    server.respond = server.sign
    renewed = enrol.renew(who)
    assert len({old.serial, renewed.serial}) == 2 and judged(pack)
    assert who.key.read_bytes() == waiting
    assert not key_pair.next_key(who.key).exists()


def test_a_fresh_claim_beside_a_valid_certificate_is_a_new_identity(pack, server):
    who = identity(pack)
    first, _ = enrol.obtain(who)
    key = who.key.read_bytes()
    (pack / "claim").write_text("B" * 40)
    server.respond = lambda *_: (503, b"")
    with pytest.raises(EnrolError):
        enrol.obtain(who)
    assert enrol.current(who) == first  # it works until the new one is there
    server.respond = server.sign
    second, new = enrol.obtain(who)
    assert new and second.serial != first.serial and who.key.read_bytes() != key and judged(pack)
    assert not (pack / "claim").exists() and not (pack / "claim.used").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda pack: (pack / "node.pem").write_text("nonsense"), "cannot be used"),
        (lambda pack: (pack / "node.pem").write_text("x" * 70_000), "is over 65536 bytes"),
        (lambda pack: (pack / "node.key").write_bytes(pem(ec.generate_private_key(ec.SECP256R1()))), "of another key"),
        (lambda pack: (pack / "node.key").chmod(0o640), "can be read by others"),
        (lambda pack: (pack / "curve.key").unlink(), "no data-plane key"),
        (lambda pack: ((pack / "node.pem").unlink(), os.mkfifo(pack / "node.pem")), "no plain file"),
    ],
)
def test_a_damaged_identity_is_named_and_a_new_claim_mends_it(pack, server, change, said):
    who = identity(pack)
    enrol.obtain(who)
    change(pack)
    with pytest.raises(ConfigError, match="no claim token") as caught:
        enrol.obtain(who)
    assert said in str(caught.value)
    assert "PRIVATE KEY" not in str(caught.value)


def test_keys_are_in_no_text(pack):
    who = identity(pack)
    key = enrol.own_key(who.key)
    secret = re.sub(r"-----.*?-----|\s", "", who.key.read_text())
    assert secret not in repr(who) + repr(key) + str(key)
    who.key.write_text(who.key.read_text().replace("A", "!", 1))
    with pytest.raises(ConfigError) as caught:
        enrol.own_key(who.key)
    assert not any(part in str(caught.value) for part in re.findall(".{16}", secret))
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_secret_files(tmp_path):
    path = tmp_path / "secret"
    previous = os.umask(0)
    try:
        secret_file.write(path, b"0123456789")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keep = tmp_path / "same blocks"
    os.link(path, keep)
    secret_file.wipe(path)
    assert keep.read_bytes() == bytes(10) and not path.exists()  # overwritten where it lay, then removed
    secret_file.wipe(path)
    (tmp_path / "link").symlink_to(keep)
    with pytest.raises(OSError):
        secret_file.wipe(tmp_path / "link")
    with pytest.raises(OSError):
        secret_file.read(tmp_path / "link", 100)
    with pytest.raises(OSError, match="over 9 bytes"):
        secret_file.read(keep, 9)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"url": "http://127.0.0.1:1"}, "url is"),
        ({"url": "https://127.0.0.1"}, "url is"),
        ({"url": "https://127.0.0.1:1/path"}, "url is"),
        ({"url": "https://a:b@127.0.0.1:1"}, "url is"),
        ({"url": "https://127.0.0.1:99999"}, "url is"),
        ({"renew_share": 1.0}, "renew_share"),
        ({"provisioned_utc_s": 1e12}, "provisioned_utc_s"),
        ({"tokens": "x"}, "'tokens', which is unknown"),
    ],
)
def test_what_the_table_may_not_say(change, said, tmp_path):
    pack = write_pack(tmp_path, b"", 1, **change)
    with pytest.raises(ConfigError, match=re.escape(said)):
        config.load(pack / "spacemoe.toml", enrolled=False)


# ---------------------------------------------------------------- renewal


def test_the_plan_of_a_renewal():
    months = renewal.plan(0.0, 90 * DAY_S, 2 / 3)
    assert months.due_s == pytest.approx(60 * DAY_S) and (months.first_retry_s, months.last_retry_s) == (60.0, 3600.0)
    assert [months.retry_s(n) for n in (1, 2, 3, 9, 10**6)] == [60, 120, 240, 3600, 3600]
    assert months.severity(82 * DAY_S) == "warning" and months.severity(83.5 * DAY_S) == "critical"
    hour = renewal.plan(0.0, 3600.0, 0.5)
    assert hour.due_s == 1800 and hour.first_retry_s == 3.6 and hour.severity(3000) == "warning"


def test_the_thread_renews_says_what_fails_and_takes_up_a_file_that_changed(pack, server, monkeypatch):
    monkeypatch.setattr(renewal, "LOOK_S", 0.05)
    server.options = {"begin_s": -2, "end_s": 2}
    who = identity(pack)
    first, _ = enrol.obtain(who)
    server.respond, served = (lambda *_: (503, b"not now")), []
    events, reloads = [], []
    with renewal.Renewal(
        who, 0.6, lambda: reloads.append(who.cert.read_bytes()), lambda *e: events.append(e)
    ) as running:
        wait_for(lambda: len(events) >= 2)
        assert {each[:2] for each in events[:2]} == {("warning", "renewal")} and "HTTP 503: not now" in events[0][2]
        assert reloads == [] and 0 < running.samples(time.time())[0].value < 2.5
        server.options = {"begin_s": -60, "end_s": 9 * DAY_S}
        server.respond = server.sign
        wait_for(lambda: events[-1][:2] == ("info", "renewal"))
        second = enrol.current(who)
        assert second.serial != first.serial and second.serial in events[-1][2]
        assert reloads == [who.cert.read_bytes()]
        served = [seen for seen in server.seen if seen[0] == enrolment.RENEW]
        assert all(seen[3] is not None and seen[2] == "" for seen in served)  # by the old certificate, without a token
        assert x509.load_der_x509_certificate(served[-1][3]).serial_number == int(first.serial, 16)
        assert running.samples(0.0)[0].value == pytest.approx(second.not_after_utc_s)
        third = enrol.renew(who)  # by hand, in another process
        left = pytest.approx([third.not_after_utc_s])
        # for a moment there may be no sample at all: the file is being changed
        wait_for(lambda: len(reloads) == 2 and [each.value for each in running.samples(0.0)] == left)


def wait_for(condition, timeout_s: float = 15.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


# ---------------------------------------------------------------- the ground station's own server


@pytest.fixture
def fleet(tmp_path):
    """(fleet folder, pack of n1): a real one, whose enrolment server runs. Its certificates last a day."""
    folder = FleetFolder.create(
        tmp_path / "fleet", "test", ["127.0.0.1"], Ports(free_port(), free_port(), free_port(), free_port()), 1
    )
    record, token = fleet_changes.add_node(folder, "n1", "pi5")
    made = fleet_pack.write_pack(folder, record, token, tmp_path / "packs")
    text = (made / "spacemoe.toml").read_text()
    (made / "spacemoe.toml").write_text(text.replace('"/var/lib/spacemoe"', f'"{tmp_path}/state"'))
    with EnrolServer(folder, port=folder.info.ports.enrol):
        yield folder, made


def test_a_board_and_the_ground_station_from_an_empty_folder_to_a_renewal(fleet):
    folder, pack = fleet
    token = (pack / "claim").read_text()
    made = as_json(node_agent("enrol", "--config", pack / "spacemoe.toml", "--once", "--json"))
    text = judged(pack)
    assert "CN = n1" in text and "O = test" in text
    record = folder.node("n1")
    assert (record.state, record.serial, record.curve_public) == ("enrolled", made["serial"], made["curve_public"])
    who = identity(pack)
    renewed = enrol.renew(who)
    record = folder.node("n1")
    assert judged(pack) and (record.serial, record.previous_serial) == (renewed.serial, made["serial"])
    # the token was for one key: another board that copied it gets nothing
    thief = shutil.copytree(pack, pack.parent / "thief", ignore=shutil.ignore_patterns("node.*", "curve.key"))
    (thief / "claim").write_text(token)
    with pytest.raises(RefusedError, match="token was used already"):
        enrol.obtain(identity(thief))
    fleet_changes.revoke(folder, "n1", "lost")
    with pytest.raises(EnrolError, match="refuse"):
        enrol.renew(who)


def test_a_running_agent_renews_and_connects_again_with_the_new_certificate(fleet, mosquitto, tmp_path):
    """A certificate of a day, dated back a day, is past half of its life: the agent renews it as soon as it runs."""
    folder, pack = fleet
    text = (pack / "spacemoe.toml").read_text().replace("[enrol]", "[enrol]\nrenew_share = 0.5")
    (pack / "spacemoe.toml").write_text(text + "\n[telemetry]\nperiod_s = 0.1\n")
    who = identity(pack)
    first, _ = enrol.obtain(who)
    plain, conf = free_port(), tmp_path / "mosquitto.conf"
    conf.write_text(
        f"per_listener_settings true\nuser root\nlistener {plain} 127.0.0.1\nallow_anonymous true\n"
        f"listener {folder.info.ports.broker} 127.0.0.1\nrequire_certificate true\nuse_identity_as_username true\n"
        f"cafile {folder.root}/ca.pem\ncertfile {folder.root}/ground.pem\nkeyfile {folder.root}/ground.key\n"
    )
    broker = subprocess.Popen([mosquitto, "-c", conf], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: accepts_mqtt5("127.0.0.1", plain))
        with Observer("127.0.0.1", plain) as seen:
            agent = subprocess.Popen(
                [sys.executable, "-m", "node_agent.cli", "run", "--config", pack / "spacemoe.toml"],
                stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                text=True,
            )
            try:
                births = [seen.next("birth")["bd_seq"] for _ in range(2)]
                assert births[1] == births[0] + 1
                event = seen.next("event", lambda tree: tree["kind"] == "renewal")
                second = enrol.current(who)
                assert event["severity"] == "info" and second.serial in event["text"] and second.serial != first.serial
                left = seen.next(
                    "telemetry", lambda tree: any(s["name"] == "certificate_left_s" for s in tree["samples"])
                )
                sample = next(s for s in left["samples"] if s["name"] == "certificate_left_s")
                assert sample["provenance"] == "derived" and 86_000 < sample["value"] <= 86_400
            finally:
                agent.terminate()
                said = agent.communicate(timeout=15)[1]
        assert said.count("connected to the broker at") == 2 and "lost" not in said, said
        assert "with the new certificate" in said and "PRIVATE" not in said
        record = folder.node("n1")
        assert (record.serial, record.previous_serial) == (second.serial, first.serial)
    finally:
        broker.terminate()
        broker.wait(10)


def test_an_event_that_met_a_breaking_connection_is_sent_again_and_breaks_nothing():
    """Paho's record of it raises when it is asked; the broker's thread once ended by that, for good."""
    event, record = control._Event(b"{}"), mqtt.MQTTMessageInfo(1)
    record.rc = mqtt.MQTT_ERR_NO_CONN
    with pytest.raises(RuntimeError):
        record.is_published()
    event.sent = record
    assert event.arrived is False
