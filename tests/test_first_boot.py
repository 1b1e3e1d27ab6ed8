"""First boot: the pack moves from FAT to the board's disk and its token is gone, wherever the power fails in between.

Power cuts are real kills of a real process at each change of a folder; that what came before is on the disk by then is seen from
the order of fsync and rename, since a kill leaves the kernel's cache alone.
"""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
from enrol_rig import TOKEN, Authority, Responder, as_json, killed_at, node_agent, write_pack

from node_agent import cli, enrolment, first_boot, secret_file
from node_agent.errors import ConfigError

OTHER_TOKEN = "other-" + "Z9" * 20
FILES = ["ca.pem", "claim", "pack.sha256", "spacemoe.toml"]
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def fat(authority, tmp_path) -> Path:
    return write_pack(tmp_path / "fat", authority.pem, 8870)


def quiet(text: str) -> None:
    pass


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_from_a_card_to_a_certificate_and_nothing_the_next_time(authority, tmp_path, capsys):
    with Responder(authority, authority.server(tmp_path)) as server:
        fat = write_pack(tmp_path / "fat", authority.pem, server.port, provisioned_utc_s=1_700_000_000)
        os.link(fat / "claim", tmp_path / "same blocks")
        to = tmp_path / "disk/node"
        command = ["first-boot", "--pack", str(fat), "--to", str(to), "--once", "--json"]
        made = as_json(node_agent(*command))
        assert (made["node"], made["new"]) == ("n1", True) and len(server.seen) == 1
        assert (tmp_path / "same blocks").read_bytes() == bytes(len(TOKEN) + 1)
        assert names(fat) == ["ca.pem", "spacemoe.toml"]
        assert names(to) == ["ca.pem", "curve.key", "node.key", "node.pem", "pack.sha256", "spacemoe.toml"]
        assert names(to.parent) == ["node"]
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in (to, *to.iterdir())}
        assert modes == {
            "node": 0o750,
            "ca.pem": 0o640,
            "spacemoe.toml": 0o640,
            "pack.sha256": 0o640,
            "node.key": 0o600,
            "curve.key": 0o600,
            "node.pem": 0o644,
        }
        assert TOKEN.encode() not in b"".join(each.read_bytes() for each in to.iterdir())
        before = {each.name: (each.read_bytes(), each.stat().st_mtime_ns) for each in to.iterdir()}
        assert cli.main(command) == 0 and len(server.seen) == 1
        assert '"new": false' in capsys.readouterr().out
        shutil.rmtree(fat)  # the partition is not mounted, or was formatted
        assert cli.main(command) == 0
        assert {each.name: (each.read_bytes(), each.stat().st_mtime_ns) for each in to.iterdir()} == before
        # a card that is provisioned anew: a new identity, and nothing left of the old one
        write_pack(fat, authority.pem, server.port, OTHER_TOKEN)
        assert cli.main(command) == 0 and len(server.seen) == 2
        assert names(fat) == ["ca.pem", "spacemoe.toml"] and names(to.parent) == ["node"]
        assert (to / "node.key").read_bytes() != before["node.key"][0]
        assert (to / "curve.key").read_bytes() != before["curve.key"][0]


@pytest.mark.parametrize("replaced", [False, True], ids=["first pack", "a second pack"])
def test_a_power_cut_anywhere_is_made_up_for_at_the_next_boot(replaced, authority, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a kill is no test of it
    for cut in range(60):
        here = tmp_path / str(cut)
        fat, to = write_pack(here / "fat", authority.pem, 8870), here / "disk/node"
        if replaced:
            first_boot.take(fat, to, None, quiet)
            (to / "node.key").write_text("an old secret")
            (to / "claim").unlink()
            write_pack(fat, authority.pem, 8870, OTHER_TOKEN)
        token = (fat / "claim").read_text()
        killed = killed_at(cut, lambda fat=fat, to=to: first_boot.take(fat, to, None, quiet))
        held = [each.read_text() for each in here.glob("**/claim")]
        assert token in held  # somewhere it is whole
        assert not (to / "claim").exists() or names(to) == FILES  # what is in its place is whole
        first_boot.take(fat, to, None, quiet)
        assert names(to) == FILES and (to / "claim").read_text() == token
        assert names(to.parent) == ["node"] and names(fat) == ["ca.pem", "spacemoe.toml"]
        if not killed:
            break
    assert 12 <= cut < 59


def test_the_token_is_on_the_disk_before_it_leaves_the_card(fat, tmp_path, monkeypatch):
    """The order of what makes it last: each file, the folder, the renames with their folder; then zeros, and only then unlink."""
    to, done = tmp_path / "disk/node", []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink")}

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        zeros = path.is_file() and not path.read_bytes().strip(b"\0")
        done.append((f"zeros of {path.parent.name}/" if zeros else "fsync ") + path.name)
        real["fsync"](handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace", "unlink"):

        def logged(*paths, name=name, **keywords):
            done.append(f"{name} {Path(paths[-1]).parent.name}/{Path(paths[-1]).name}")
            return real[name](*paths, **keywords)

        monkeypatch.setattr(os, name, logged)
    first_boot.take(fat, to, None, quiet)
    order = [
        "fsync claim.partial",
        "replace node.partial/claim",
        "fsync node.partial",
        "rename disk/node.new",
        "fsync disk",
    ]
    order += ["rename disk/node", "fsync disk", "zeros of fat/claim", "unlink fat/claim", "fsync fat"]
    at = -1
    for each in order:
        at = done.index(each, at + 1)
    assert done.count("unlink fat/claim") == done.count("zeros of fat/claim") == 1


def damage(name: str, data: bytes):
    return lambda fat: (fat / name).write_bytes(data)


@pytest.mark.parametrize(
    "change, said",
    [
        (damage("claim", b"short\n"), "claim holds no claim token"),
        (damage("claim", b"x" * 300_000), "over 262144 bytes"),
        (damage("ca.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n"), "ca.pem holds no certificate"),
        (damage("ca.pem", b"\xff" * 100), "ca.pem holds no certificate"),
        (damage("spacemoe.toml", b"[node\n"), "spacemoe.toml: not TOML"),
        (damage("spacemoe.toml", b"\xff\xfe"), "is not UTF-8"),
        (damage("spacemoe.toml", b"#" * 300_000), "over 262144 bytes"),
        (lambda fat: (fat / "spacemoe.toml").unlink(), "spacemoe.toml is missing"),
        (lambda fat: (fat / "ca.pem").unlink(), "ca.pem is missing"),
        (lambda fat: ((fat / "ca.pem").unlink(), os.mkfifo(fat / "ca.pem")), "no plain file"),
        (lambda fat: ((fat / "claim").unlink(), (fat / "claim").symlink_to("/etc/passwd")), "pack:"),
        (
            lambda fat: (fat / "spacemoe.toml").write_text((fat / "spacemoe.toml").read_text().partition("[enrol]")[0]),
            "[enrol] is missing",
        ),
    ],
)
@pytest.mark.parametrize("there", [False, True], ids=["empty disk", "identity there"])
def test_a_damaged_pack_is_named_and_nothing_is_touched(change, said, there, authority, fat, tmp_path, capsys):
    to = tmp_path / "disk/node"
    if there:
        first_boot.take(fat, to, None, quiet)
        write_pack(fat, authority.pem, 8870, OTHER_TOKEN)
    change(fat)
    before = sorted((str(each), each.stat().st_mtime_ns) for each in tmp_path.glob("**/*") if each.is_file())
    code = cli.main(["first-boot", "--pack", str(fat), "--to", str(to), "--once"])
    text = capsys.readouterr().err
    assert code == 2 and said in text and len(text.splitlines()) == 1
    assert before == sorted((str(each), each.stat().st_mtime_ns) for each in tmp_path.glob("**/*") if each.is_file())
    assert [each.name for each in tmp_path.glob("disk/*")] == (["node"] if there else [])


def test_without_a_pack_and_without_an_identity(tmp_path, capsys):
    assert cli.main(["first-boot", "--pack", str(tmp_path / "none"), "--to", str(tmp_path / "disk/node")]) == 2
    assert "holds no identity" in capsys.readouterr().err and names(tmp_path) == []


def test_a_wipe_that_was_cut_short_is_finished(fat, tmp_path):
    first_boot.take(fat, tmp_path / "node", None, quiet)
    for left in (b"", bytes(40)):
        (fat / "claim").write_bytes(left)
        assert first_boot.take(fat, tmp_path / "node", None, quiet) is False
        assert not (fat / "claim").exists()


def test_a_card_that_cannot_be_written_is_said_and_does_no_harm(fat, tmp_path, monkeypatch):
    said = []

    def wipe(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(secret_file, "wipe", wipe)
    assert first_boot.take(fat, tmp_path / "node", None, said.append) is True
    assert "could not be removed (Read-only file system)" in said[0] and TOKEN not in said[0]
    assert first_boot.take(fat, tmp_path / "node", None, said.append) is False  # the same token: nothing new


@root
def test_files_are_the_owners_and_root_follows_no_link_of_his(authority, fat):
    nobody = first_boot.owner("nobody", Path("/"))
    place = Path(tempfile.mkdtemp(prefix="spacemoe-test-"))
    try:
        place.chmod(0o755)
        to = place / "var/node"
        assert first_boot.owner(None, to) is None
        first_boot.take(fat, to, nobody, quiet)
        assert first_boot.owner(None, to) == nobody  # what he has is his
        for path in (to.parent, to, *to.iterdir()):
            assert (path.stat().st_uid, path.stat().st_gid) == (nobody.uid, nobody.gid), path
        assert os.geteuid() == 0 and os.getegid() == 0
        # the owner puts links where root is about to write
        precious = place / "precious"
        precious.mkdir(mode=0o700)
        (precious / "ca.pem").write_text("root's")
        (to.parent / "node.partial").symlink_to(precious)
        (to.parent / "node.old").symlink_to(precious)
        write_pack(fat, authority.pem, 8870, OTHER_TOKEN)
        try:
            first_boot.take(fat, to, nobody, quiet)
        except OSError:
            pass  # refusing is as good
        assert names(precious) == ["ca.pem"] and (precious / "ca.pem").read_text() == "root's"
        assert precious.stat().st_uid == 0
    finally:
        shutil.rmtree(place)


@root
def test_the_network_is_met_without_roots_rights():
    nobody = first_boot.owner("nobody", Path("/"))
    child = os.fork()
    if child == 0:
        try:
            first_boot.become(nobody)
            good = os.getresuid() == (nobody.uid,) * 3 and os.getresgid() == (nobody.gid,) * 3
            good = good and os.getgroups() == [nobody.gid]
            try:
                os.seteuid(0)
                good = False
            except PermissionError:
                pass
        finally:
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_owner_that_is_none(monkeypatch):
    with pytest.raises(ConfigError, match="no user of this machine"):
        first_boot.owner("no-such-user-here", Path("/"))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="only root"):
        first_boot.owner(pwd.getpwuid(0).pw_name, Path("/"))
    assert first_boot.owner(None, Path("/root/node")) is None


def test_the_clock_goes_forward_only_and_where_it_may_not_that_is_said(monkeypatch):
    calls, said = [], []
    monkeypatch.setattr(first_boot.time, "clock_settime", lambda *call: calls.append(call))
    assert first_boot.set_clock(2000.0, said.append, lambda: 1000.0) and calls == [
        (first_boot.time.CLOCK_REALTIME, 2000.0)
    ]
    assert "was behind and is set to 1970-01-01 00:33 UTC" in said[0]
    for stamp in (None, 999.0, 1000.0):
        assert not first_boot.set_clock(stamp, said.append, lambda: 1000.0)
    assert len(calls) == len(said) == 1

    def may_not(*call) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(first_boot.time, "clock_settime", may_not)
    assert not first_boot.set_clock(2000.0, said.append, lambda: 1000.0)
    assert "cannot be set (Operation not permitted)" in said[1]


def test_the_machine_is_named_after_its_node(tmp_path):
    file, calls, said = tmp_path / "hostname", [], []
    file.write_text("raspberrypi\n")
    first_boot.set_hostname("sat-7", said.append, file, calls.append)
    assert (file.read_text(), calls, said) == ("sat-7\n", ["sat-7"], [])
    first_boot.set_hostname("sat-7", said.append, tmp_path / "no/folder", calls.append)
    assert "could not be set to sat-7" in said[0]


def test_the_pack_files_are_the_contracts():
    assert set(first_boot._MODES) == {enrolment.CONFIG, enrolment.CA, enrolment.CLAIM}
