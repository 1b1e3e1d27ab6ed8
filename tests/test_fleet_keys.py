"""A fleet's keys, records and packs. Judges: openssl for certificates and revocation lists, file modes, a second process for the lock."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import lacking

from ground_station import cli, cli_fleet, enrol_request, fleet_authority, fleet_changes, fleet_records
from ground_station.fleet_records import FleetFolder, FleetFolderError, NodeRecord
from node_agent import toml_file

DAY_S = 86_400


def openssl(*arguments: object, data: bytes | None = None) -> subprocess.CompletedProcess:
    program = shutil.which("openssl") or lacking("openssl", "apt-get install openssl")
    return subprocess.run([program, *map(str, arguments)], input=data, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return FleetFolder.create(tmp_path_factory.mktemp("made") / "lab", "lab", ["ground.local", "10.0.2.2"]).root


@pytest.fixture
def folder(made, tmp_path) -> FleetFolder:
    return FleetFolder.open(shutil.copytree(made, tmp_path / "lab"))


def spacemoe(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def enrolled(folder: FleetFolder, node: str = "sat-1", days: float = 90.0) -> NodeRecord:
    """A record as after a claim, with a certificate of the folder's authority."""
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    certificate = fleet_authority.issue(folder, enrol_request.Request(node, folder.curve_keys()[0].decode(), key))
    now_utc_s = time.time()
    record = NodeRecord(
        node,
        "pi5",
        "enrolled",
        serial=fleet_authority.serial_of(certificate),
        not_after_utc_s=now_utc_s + days * DAY_S,
        created_utc_s=now_utc_s,
    )
    with folder.locked():
        folder.write(record)
        fleet_authority.store_certificate(folder, node, certificate)
    return record


# ---------------------------------------------------------------- keys and certificates


def test_openssl_accepts_what_init_makes(folder):
    ca, ground, crl = (folder.path(name) for name in ("ca.pem", "ground.pem", "crl.pem"))
    strict = ("verify", "-x509_strict", "-crl_check", "-CAfile", ca, "-CRLfile", crl)
    for check in (["-verify_hostname", "ground.local"], ["-verify_ip", "10.0.2.2"], ["-verify_hostname", "localhost"]):
        for purpose in ("sslserver", "sslclient"):
            done = openssl(*strict, "-purpose", purpose, *check, ground)
            assert done.returncode == 0, done.stderr
    assert openssl(*strict, "-verify_hostname", "elsewhere.local", ground).returncode != 0
    # a board whose clock has fallen back by weeks still gets in, one of last year does not
    assert openssl("verify", "-CAfile", ca, "-attime", int(time.time() - 29 * DAY_S), ground).returncode == 0
    assert openssl("verify", "-CAfile", ca, "-attime", int(time.time() - 31 * DAY_S), ground).returncode != 0
    text = openssl("x509", "-in", ca, "-noout", "-text").stdout.decode()
    assert "CA:TRUE, pathlen:0" in text and "Certificate Sign, CRL Sign" in text and "prime256v1" in text
    text = openssl("x509", "-in", ground, "-noout", "-subject").stdout.decode()
    assert "O = lab, CN = ground" in text
    for name in ("ca", "ground"):  # the key beside a certificate is its own
        public = openssl("x509", "-in", folder.path(f"{name}.pem"), "-noout", "-pubkey").stdout
        assert openssl("pkey", "-in", folder.path(f"{name}.key"), "-pubout").stdout == public
    der = openssl("pkey", "-in", folder.path("signing.key"), "-pubout", "-outform", "DER").stdout
    assert der[-32:].hex() == folder.signer()


def test_another_fleets_authority_is_not_this_ones(folder, tmp_path):
    other = FleetFolder.create(tmp_path / "other", "lab", ["ground.local"])
    assert openssl("verify", "-CAfile", other.path("ca.pem"), folder.path("ground.pem")).returncode != 0


def test_keys_are_their_owners_alone(folder, tmp_path):
    assert folder.root.stat().st_mode & 0o777 == 0o700
    for name in fleet_records.SECRETS:
        assert folder.path(name).stat().st_mode & 0o777 == 0o600, name
    folder.path("ca.key").chmod(0o640)
    with pytest.raises(FleetFolderError, match="ca.key can be read by others: chmod 600"):
        fleet_authority.renew_ground(folder)


def test_init_refuses_what_exists_and_leaves_nothing_half_made(folder, tmp_path, monkeypatch):
    before = folder.path("ca.pem").read_bytes()
    with pytest.raises(FleetFolderError, match="exists"):
        FleetFolder.create(folder.root, "lab", ["ground.local"])
    assert folder.path("ca.pem").read_bytes() == before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fleet_authority, "write_revocations", full)
    with pytest.raises(OSError, match="No space"):
        FleetFolder.create(tmp_path / "second", "lab", ["ground.local"])
    assert sorted(os.listdir(tmp_path)) == ["lab"]


@pytest.mark.parametrize(
    "name, hosts",
    [("Lab", ["h"]), ("../lab", ["h"]), ("lab", []), ("lab", ["a b"]), ("lab", ["0.0.0.0"]), ("lab", ["1.2.3"])],
)
def test_init_refuses_names_that_are_none(tmp_path, name, hosts):
    with pytest.raises(FleetFolderError):
        FleetFolder.create(tmp_path / "x", name, hosts)
    assert os.listdir(tmp_path) == []


def test_the_ground_certificate_is_renewed_before_it_ends_and_for_new_hosts(folder):
    old, version = folder.path("ground.pem").read_bytes(), folder.version()
    assert fleet_authority.renew_ground_if_due(folder) is None  # 397 days are left
    assert folder.path("ground.pem").read_bytes() == old and folder.version() == version
    assert fleet_authority.renew_ground_if_due(folder, left_days=400) is not None
    assert folder.path("ground.pem").read_bytes() != old and folder.version() != version
    with folder.locked():
        folder.store_info(dataclasses.replace(folder.info, hosts=("new.local", "fd00::7")))
    assert fleet_authority.renew_ground_if_due(folder) is not None
    done = openssl("verify", "-CAfile", folder.path("ca.pem"), "-verify_ip", "fd00::7", folder.path("ground.pem"))
    assert done.returncode == 0, done.stderr
    assert FleetFolder.open(folder.root).info.hosts == ("new.local", "fd00::7")


def test_a_start_carries_a_revocation_out_that_was_cut_short(folder, monkeypatch):
    record = enrolled(folder)
    monkeypatch.setattr(fleet_changes.fleet_authority, "write_revocations", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the power went after the record was written
        fleet_changes.revoke(folder, "sat-1")
    monkeypatch.undo()

    def listed() -> bool:
        text = openssl("crl", "-in", folder.path("crl.pem"), "-noout", "-text").stdout.decode().lower()
        return record.serial in text

    assert not listed()
    assert fleet_authority.refresh(folder) == [] and listed()
    monkeypatch.setattr(fleet_authority, "GROUND_DUE_DAYS", 400)
    assert fleet_authority.renew_ground_if_due(folder, fleet_authority.GROUND_DUE_DAYS) is not None


def test_the_revocation_list_keeps_dates_counts_up_and_forgets_nothing(folder):
    record = enrolled(folder)
    fleet_changes.revoke(folder, record.id)
    first = openssl("crl", "-in", folder.path("crl.pem"), "-noout", "-text", "-crlnumber").stdout.decode()
    assert first.upper().count(record.serial.upper()) == 1 and "crlNumber=0x02" in first
    later = dataclasses.replace(folder.node("sat-1"), revoked_serials=("ab", record.serial))
    with folder.locked():
        folder.write(later)
    fleet_authority.write_revocations(folder)
    text = openssl("crl", "-in", folder.path("crl.pem"), "-noout", "-text", "-crlnumber").stdout.decode()
    assert text.count("Serial Number:") == 2 and "crlNumber=0x03" in text
    date = first.split("Revocation Date: ")[1].splitlines()[0]
    assert text.split(record.serial.upper())[1].split("Revocation Date: ")[1].splitlines()[0] == date
    real = time.time
    try:
        fleet_authority.time.time = lambda: real() + 400 * DAY_S
        assert fleet_authority.write_revocations(folder) == 2
    finally:
        fleet_authority.time.time = real
    assert folder.node("sat-1") == later


# ---------------------------------------------------------------- records


def test_a_record_comes_back_as_it_was_written_and_moves_the_version(folder):
    seen = [folder.version()]
    record = NodeRecord("sat-1", "pi5", revoked_serials=("ab", "cd"), reason="why not")
    with folder.locked():
        folder.write(record)
        seen.append(folder.version())
    assert FleetFolder.open(folder.root).nodes() == {"sat-1": record}
    with folder.change("sat-1") as found:
        folder.write(dataclasses.replace(found, state="quarantined"))
    seen.append(folder.version())
    assert folder.node("sat-1").state == "quarantined"
    assert len(set(seen)) == 3 and folder.version() == seen[-1]


def test_nothing_is_written_without_the_lock(folder):
    with pytest.raises(RuntimeError, match="lock"):
        folder.write(NodeRecord("sat-1", "pi5"))
    assert folder.nodes() == {}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1]",
        b'{"format": 2}',
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"format": 1, "id": "sat-2", "board": "pi5"}',
        b'{"format": 1, "id": "sat-1", "board": "pi5", "state": "root"}',
        b'{"format": 1, "id": "sat-1", "board": "pi5", "not_after_utc_s": NaN}',
        b'{"format": 1, "id": "sat-1", "board": "pi5", "serial": "../../x"}',
        b'{"format": 1, "id": "sat-1", "board": "pi5", "revoked_serials": [1]}',
        b'{"format": 1, "id": "sat-1", "board": "pi5", "colour": "red"}',
        b" " * 70_000,
    ],
)
def test_a_damaged_record_names_its_file_and_the_remedy(folder, text):
    path = folder.root / "nodes" / "sat-1.json"
    path.write_bytes(text)
    for read in (folder.nodes, lambda: folder.node("sat-1")):
        with pytest.raises(FleetFolderError, match=r"sat-1\.json .*(restore|remove)") as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_damaged_record_keeps_no_other_node_from_being_revoked(folder, caplog):
    first, second = enrolled(folder), enrolled(folder, "sat-2")
    fleet_changes.revoke(folder, "sat-1")
    folder.record_path("sat-1").write_text("{")
    fleet_changes.revoke(folder, "sat-2")
    text = openssl("crl", "-in", folder.path("crl.pem"), "-noout", "-text").stdout.decode().lower()
    assert first.serial in text and second.serial in text and "sat-1.json is damaged" in caplog.text


def test_a_pipe_in_the_place_of_a_record_holds_nobody_up(folder):
    os.mkfifo(folder.root / "nodes" / "sat-1.json")
    with pytest.raises(FleetFolderError, match="no plain file"):
        folder.nodes()


@pytest.mark.parametrize("name", ["ground", "../ca", "a/b", "", "A", "x" * 33, "sat-1\n"])
def test_no_record_has_a_name_that_is_none(folder, name):
    for attempt in (folder.node, folder.record_path):
        with pytest.raises(FleetFolderError):
            attempt(name)
    with pytest.raises(FleetFolderError):
        fleet_changes.add_node(folder, name, "pi5")
    assert folder.nodes() == {}


def _count(path: Path, times: int) -> None:
    folder = FleetFolder.open(path)
    for _ in range(times):
        with folder.change("sat-1") as record:
            folder.write(dataclasses.replace(record, reason=str(int(record.reason) + 1)))


def test_changes_of_two_processes_and_two_threads_do_not_get_lost(folder):
    from concurrent.futures import ThreadPoolExecutor

    with folder.locked():
        folder.write(NodeRecord("sat-1", "pi5", reason="0"))
    other = multiprocessing.get_context("fork").Process(target=_count, args=(folder.root, 20))
    other.start()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: _count(folder.root, 10), range(2)))
    other.join(30)
    assert other.exitcode == 0 and folder.node("sat-1").reason == "40"


def test_a_lock_that_is_never_let_go_of_is_named(folder, monkeypatch):
    monkeypatch.setattr(fleet_records, "LOCK_PATIENCE_S", 0.05)
    with FleetFolder.open(folder.root).locked():
        with pytest.raises(fleet_records.FleetBusyError, match=r"\.lock"):
            with folder.locked():
                pass
    with folder.locked(), folder.locked():
        pass  # its own thread may nest it


def test_a_folder_that_is_none_or_lacks_a_key_is_named(folder, tmp_path):
    with pytest.raises(FleetFolderError, match="spacemoe fleet init"):
        FleetFolder.open(tmp_path)
    folder.path("ca.key").unlink()
    with pytest.raises(FleetFolderError, match="ca.key is missing"):
        FleetFolder.open(folder.root)


# ---------------------------------------------------------------- commands


def test_init_add_list_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = spacemoe(capsys, "fleet", "init", "lab", "--host", "ground.local", "--enrol-port", 9443)
    assert code == 0 and "next: spacemoe fleet add NODE --board BOARD --dir lab" in out
    code, out, err = spacemoe(capsys, "fleet", "init", "lab", "--host", "ground.local")
    assert code == 2 and "exists" in err and out == ""
    code, out, _ = spacemoe(capsys, "fleet", "add", "sat-1", "--board", "pi5", "--dir", "lab", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["pack"] == "lab/packs/sat-1"
    pack = Path(facts["pack"])
    token = (pack / "claim").read_text().strip()
    assert (
        token not in out and (pack / "claim").stat().st_mode & 0o777 == 0o600 and pack.stat().st_mode & 0o777 == 0o700
    )
    folder = FleetFolder.open(Path("lab"))
    # the token is nowhere but in the pack; nor is a private key in the pack
    holding = [path for path in Path(".").rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert holding == [pack / "claim"]
    assert (
        openssl("dgst", "-sha256", "-r", data=token.encode()).stdout.split()[0].decode()
        == folder.node("sat-1").token_sha256
    )
    assert sorted(os.listdir(pack)) == ["ca.pem", "claim", "spacemoe.toml"]
    secrets = [folder.path(name).read_bytes() for name in fleet_records.SECRETS]
    assert all(secret not in path.read_bytes() for path in pack.iterdir() for secret in secrets)
    tree = toml_file.loads((pack / "spacemoe.toml").read_text())
    assert tree["enrol"]["url"] == "https://ground.local:9443" and tree["broker"]["port"] == 8883
    assert tree["data"]["server_public_key"].encode() == folder.curve_keys()[0]
    assert tree["bundle"]["signers"] == [folder.signer()] and abs(tree["enrol"]["provisioned_utc_s"] - time.time()) < 60
    assert (pack / "ca.pem").read_bytes() == folder.path("ca.pem").read_bytes()
    code, _, err = spacemoe(capsys, "fleet", "add", "sat-1", "--board", "pi5", "--dir", "lab")
    assert code == 2 and "--again" in err and (pack / "claim").read_text().strip() == token
    (pack / "flashed.json").write_text("{}")  # as `spacemoe flash` leaves it
    code, out, _ = spacemoe(capsys, "fleet", "add", "sat-1", "--board", "pi5", "--dir", "lab", "--again")
    assert code == 0 and (pack / "claim").read_text().strip() != token
    assert not (pack / "flashed.json").exists()
    node, board = "a" * 32, "b" * 32
    add = ("fleet", "add", node, "--board", board, "--dir", "lab", "--valid-days", 2)
    code, _, err = spacemoe(capsys, *add)
    assert code == 2 and "pi5" in err and "--any-board" in err and node not in folder.nodes()
    code, out, _ = spacemoe(capsys, *add, "--any-board", "--dry-run")
    assert code == 0 and "nothing was changed" in out and node not in folder.nodes()
    code, out, _ = spacemoe(capsys, *add, "--any-board")
    assert code == 0 and "no board file" in out
    code, out, _ = spacemoe(capsys, "fleet", "list", "--dir", "lab")
    assert code == 0 and node in out and "30 days" in out and "48 hours" in out and "warning: " + node in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = spacemoe(capsys, "fleet", "list", "--dir", "lab", "--json")
    facts = json.loads(out)
    assert [each["id"] for each in facts["nodes"]] == [node, "sat-1"] and len(facts["warnings"]) == 1


def test_revoke_asks_first_and_release_is_for_the_quarantined(folder, capsys):
    record = enrolled(folder)
    pem = folder.root / "certificates" / "sat-1.pem"
    verify = ("verify", "-crl_check", "-CAfile", folder.path("ca.pem"), "-CRLfile", folder.path("crl.pem"), pem)
    where = ("--dir", folder.root)
    version = folder.version()
    code, _, err = spacemoe(capsys, "fleet", "revoke", "sat-1", *where)
    assert code == 2 and "--yes" in err
    code, out, _ = spacemoe(capsys, "fleet", "revoke", "sat-1", *where, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["serials"] == [record.serial]
    code, _, err = spacemoe(capsys, "fleet", "release", "sat-1", *where)
    assert code == 2 and "not quarantined" in err
    assert folder.version() == version and folder.node("sat-1") == record and openssl(*verify).returncode == 0
    with folder.change("sat-1") as found:
        folder.write(dataclasses.replace(found, state="quarantined", reason="wrong sums"))
    assert spacemoe(capsys, "fleet", "release", "sat-1", *where)[0] == 0
    assert folder.node("sat-1") == record
    code, out, _ = spacemoe(capsys, "fleet", "revoke", "sat-1", *where, "--yes", "--reason", "lost\nin the sea")
    assert code == 0 and "--again" in out
    done = openssl(*verify)
    assert done.returncode != 0 and b"certificate revoked" in done.stderr
    assert (folder.node("sat-1").state, folder.node("sat-1").reason) == ("revoked", "lost in the sea")
    code, _, err = spacemoe(capsys, "fleet", "revoke", "sat-9", *where, "--yes")
    assert code == 2 and "no node 'sat-9'" in err


def test_adding_again_asks_before_it_cuts_a_board_off(folder, capsys, monkeypatch):
    record, (ours, theirs) = enrolled(folder), pty.openpty()
    again = ("fleet", "add", "sat-1", "--board", "pi5", "--dir", folder.root, "--again")
    for more in ((), ("--json",)):
        code, out, err = spacemoe(capsys, *again, *more)
        assert code == 2 and "--yes" in err and out == ""
    code, out, _ = spacemoe(capsys, *again, "--dry-run")
    assert code == 0 and "is revoked at once" in " ".join(out.split())
    assert time.strftime("%Y-%m-%d", time.gmtime(record.not_after_utc_s)) in out
    with os.fdopen(theirs, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(ours, b"n\n")
        code, _, err = spacemoe(capsys, *again)
        assert code == 1 and "Cut sat-1 off" in err and "nothing was changed" in err
        code, _, err = spacemoe(capsys, *again, "--json")  # at a terminal, too
        assert code == 2 and "--yes" in err
        assert folder.node("sat-1") == record and not (folder.root / "packs").exists()
        os.write(ours, b"y\n")
        assert spacemoe(capsys, *again)[0] == 0
    os.close(ours)
    assert folder.node("sat-1").state == "new" and (folder.root / "packs/sat-1/claim").exists()
    enrolled(folder)
    assert spacemoe(capsys, *again, "--json", "--yes")[0] == 0 and folder.node("sat-1").state == "new"
    enrolled(folder)
    fleet_changes.revoke(folder, "sat-1")
    assert spacemoe(capsys, *again)[0] == 0  # nothing is cut off: nobody is asked


def test_adding_again_ends_the_old_certificate(folder, tmp_path):
    record = enrolled(folder)
    with folder.change("sat-1") as found:
        folder.write(dataclasses.replace(found, previous_serial="abc", previous_not_after_utc_s=time.time() + 5))
    fleet_changes.add_node(folder, "sat-1", "pi4", again=True)
    after = folder.node("sat-1")
    assert (after.state, after.board, after.serial, after.curve_public) == ("new", "pi4", "", "")
    assert after.revoked_serials == (record.serial, "abc") and after.created_utc_s == record.created_utc_s
    text = openssl("crl", "-in", folder.path("crl.pem"), "-noout", "-text").stdout.decode()
    assert record.serial.upper() in text


def test_a_pack_goes_nowhere_that_something_else_lies(folder, tmp_path, capsys):
    out = tmp_path / "packs"
    (out / "sat-1").mkdir(parents=True)
    (out / "sat-1" / "claim").symlink_to(tmp_path / "elsewhere")
    code, _, err = spacemoe(capsys, "fleet", "add", "sat-1", "--board", "pi5", "--dir", folder.root, "--out", out)
    assert code == 2 and "in the way" in err and not (tmp_path / "elsewhere").exists() and folder.nodes() == {}


@pytest.mark.parametrize(
    "left_days, state, word",
    [
        (45, "enrolled", ""),
        (14, "enrolled", "connect the board"),
        (-1, "enrolled", "expired"),
        (45, "quarantined", "release"),
    ],
)
def test_a_warning_says_what_to_do_before_it_is_too_late(left_days, state, word):
    record = NodeRecord("sat-1", "pi5", state, serial="ab", not_after_utc_s=1e9 + left_days * DAY_S)
    standing = fleet_changes.standing(record, 90, 1e9)
    assert standing.certificate_days == pytest.approx(left_days) and word in standing.warning
    assert bool(word) == bool(standing.warning)


def test_the_command_lines_defaults_are_the_records_own():
    assert dataclasses.asdict(fleet_records.Ports()) == cli_fleet.PORTS
    assert (cli_fleet.CERTIFICATE_DAYS, cli_fleet.TOKEN_DAYS) == (
        fleet_records.CERTIFICATE_DAYS,
        fleet_changes.TOKEN_DAYS,
    )


@pytest.mark.parametrize("damage", ["folder", "circle", "pipe", "text"])
def test_a_record_that_cannot_be_read_keeps_no_revocation_waiting(folder, damage):
    record, path = enrolled(folder), folder.root / "nodes" / "old.json"
    make = {"folder": path.mkdir, "circle": lambda: path.symlink_to(path), "pipe": lambda: os.mkfifo(path)}
    make.get(damage, lambda: path.write_text("{"))()
    found, damaged = folder.scan()
    assert set(found) == {"sat-1"} and len(damaged) == 1 and "old.json" in str(damaged[0])
    listed = ("crl", "-in", folder.path("crl.pem"), "-noout", "-text")
    assert record.serial.upper() not in openssl(*listed).stdout.decode()
    fleet_changes.revoke(folder, "sat-1")
    assert record.serial.upper() in openssl(*listed).stdout.decode()


def test_a_clock_that_is_ahead_for_a_while_lets_nobody_in_again(folder, monkeypatch):
    first, second, third = (enrolled(folder, node) for node in ("sat-1", "sat-2", "sat-3"))
    fleet_changes.revoke(folder, "sat-1")
    real = time.time
    monkeypatch.setattr(fleet_authority.time, "time", lambda: real() + 500 * DAY_S)
    assert len(fleet_authority.refresh(folder)) == 1  # the ground certificate would have run out
    fleet_changes.revoke(folder, "sat-2")
    monkeypatch.undo()
    check = ("verify", "-CAfile", folder.path("ca.pem"), folder.path("ground.pem"))
    assert b"not yet valid" in openssl(*check).stderr
    assert len(fleet_authority.refresh(folder)) == 1 and openssl(*check).returncode == 0
    assert fleet_authority.refresh(folder) == []
    check = ("verify", "-crl_check", "-CAfile", folder.path("ca.pem"), "-CRLfile", folder.path("crl.pem"))
    for record, good in ((first, False), (second, False), (third, True)):
        done = openssl(*check, folder.root / "certificates" / f"{record.id}.pem")
        assert (done.returncode == 0) is good and (b"certificate revoked" in done.stderr) is not good
    # before the authority itself no certificate would be valid: another one helps nobody
    monkeypatch.setattr(fleet_authority.time, "time", lambda: 1e6)
    assert fleet_authority.renew_ground_if_due(folder) is None


@pytest.mark.parametrize("cut_at", ["ground.key.next", "ground.pem", ""])
def test_a_renewal_that_is_cut_short_leaves_a_pair(folder, monkeypatch, cut_at):
    def pair() -> tuple[bytes, bytes]:
        public = openssl("x509", "-in", folder.path("ground.pem"), "-noout", "-pubkey").stdout
        return public, openssl("pkey", "-in", folder.path("ground.key"), "-pubout").stdout

    before, store = pair(), FleetFolder.store
    assert before[0] == before[1]

    def cut(self, name, data):
        if name != cut_at:
            store(self, name, data)
        if name == (cut_at or "ground.pem"):
            raise KeyboardInterrupt

    monkeypatch.setattr(FleetFolder, "store", cut)
    with pytest.raises(KeyboardInterrupt):
        fleet_authority.renew_ground(folder)
    if not cut_at:  # between the two renames: the pair does not fit until somebody opens the folder
        assert pair()[0] != pair()[1]
    FleetFolder.open(folder.root)
    assert pair()[0] == pair()[1] and (pair() == before) is bool(cut_at)


def test_two_ports_that_are_one_are_refused(tmp_path, capsys):
    init = ("fleet", "init", "lab", "--host", "h", "--dir", tmp_path / "lab", "--enrol-port")
    code, _, err = spacemoe(capsys, *init, 8883)
    assert code == 2 and "port 8883 is given twice" in err and os.listdir(tmp_path) == []
    assert spacemoe(capsys, *init, 8884)[0] == 0
