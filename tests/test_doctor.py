"""`spacemoe doctor` on machines that lack something: each condition is made for real, around a process of its own.

Mounts are made in a mount namespace of that process, so that nothing of this machine changes. A healthy machine is the control.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import lacking
from mission_cli import environment, spacemoe

from ground_station import doctor_clock, doctor_machine, doctor_ports, fleet_records
from ground_station.cli_shared import reference_bundle
from ground_station.doctor import Setting, examine
from ground_station.time_server import TimeServer

NAMESPACE = ("unshare", "-m") if os.geteuid() == 0 else ("unshare", "-r", "-m")


@functools.cache
def mounts() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def inside(script: str) -> tuple[str, ...]:
    """What runs a command after `script` in a mount namespace."""
    if not mounts():
        pytest.skip("no mount namespace may be made here: run as root, or allow user namespaces")
    return (*NAMESPACE, "sh", "-ec", f'{script}\nexec "$@"', "sh")


def checks(done: subprocess.CompletedProcess) -> dict[str, dict]:
    assert done.returncode in (0, 3), done.stderr
    facts = json.loads(done.stdout)
    assert facts["ok"] == (done.returncode == 0) == all(each["ok"] for each in facts["checks"])
    assert all(bool(each["fix"]) != each["ok"] for each in facts["checks"])  # a command for each failure, and only then
    return {each["name"]: each for each in facts["checks"]}


@pytest.fixture(scope="module")
def control(tmp_path_factory) -> dict[str, dict]:
    """This machine as it is."""
    return checks(spacemoe("doctor", "--json", "--state", tmp_path_factory.mktemp("state")))


def test_as_it_is(control):
    assert {
        "python",
        "packages",
        "mosquitto",
        "disk",
        "memory",
        "open_files",
        "clock",
        "reference_bundle",
    } <= control.keys()
    for name in ("python", "packages", "disk", "clock", "reference_bundle"):
        assert control[name]["ok"], control[name]


def test_text_says_the_same(tmp_path):
    done = spacemoe("doctor", "--bundle", tmp_path / "none", "--state", tmp_path)
    assert (
        done.returncode == 3
        and "FAIL bundle: " in done.stdout
        and f"mend: spacemoe quantize MODEL -o {tmp_path}" in done.stdout
    )
    assert "\x1b" not in done.stdout


def test_without_mosquitto(control, tmp_path):
    if not control["mosquitto"]["ok"]:
        lacking("mosquitto", "apt-get install mosquitto")
    places = [
        path
        for folder in (*os.environ["PATH"].split(":"), "/usr/sbin", "/usr/local/sbin")
        if (path := Path(folder) / "mosquitto").exists()
    ]
    hide = "\n".join(f"mount --bind /dev/null {path}" for path in {path.resolve() for path in places})
    found = checks(spacemoe("doctor", "--json", "--state", tmp_path, before=inside(hide)))
    assert found["mosquitto"] == {
        "name": "mosquitto",
        "ok": False,
        "text": found["mosquitto"]["text"],
        "fix": "sudo apt-get install mosquitto",
    }


def test_an_old_mosquitto(control, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    old = folder / "mosquitto"
    old.write_text("#!/bin/sh\necho 'mosquitto version 1.6.12'\nexit 3\n")
    old.chmod(0o755)
    found = checks(
        spacemoe("doctor", "--json", "--state", tmp_path, env=environment(PATH=f"{folder}:{os.environ['PATH']}"))
    )
    assert not found["mosquitto"]["ok"] and "1.6.12" in found["mosquitto"]["text"]


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    fill = f"mount -t tmpfs -o size=1m none {disk}\ncat /dev/zero > {disk}/fill 2>/dev/null || true"
    found = checks(spacemoe("doctor", "--json", "--state", disk, before=inside(fill)))
    assert not found["disk"]["ok"] and "No space left on device" in found["disk"]["text"]
    assert f"du -xh --max-depth=2 {disk}" in found["disk"]["fix"]


def test_a_disk_that_is_nearly_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    found = checks(
        spacemoe("doctor", "--json", "--state", disk, before=inside(f"mount -t tmpfs -o size=9m none {disk}"))
    )
    assert not found["disk"]["ok"] and "0.0 GB free" in found["disk"]["text"]
    many = f"mount -t tmpfs -o size=2g,nr_inodes=100 none {disk}"
    found = checks(spacemoe("doctor", "--json", "--state", disk, before=inside(many)))
    assert not found["disk"]["ok"] and "more files" in found["disk"]["text"]
    room = checks(
        spacemoe("doctor", "--json", "--state", disk, before=inside(f"mount -t tmpfs -o size=2g none {disk}"))
    )
    assert room["disk"]["ok"]


def test_a_disk_that_cannot_be_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    found = checks(
        spacemoe("doctor", "--json", "--state", disk, before=inside(f"mount -t tmpfs -o ro,size=2g none {disk}"))
    )
    assert not found["disk"]["ok"] and "Read-only file system" in found["disk"]["text"]


@pytest.mark.parametrize("day, why", [("2001-01-01 00:00:00", "was written"), ("2090-01-01 00:00:00", "years after")])
def test_a_wrong_clock(tmp_path, day, why):
    if shutil.which("faketime") is None:
        lacking("faketime", "apt-get install faketime")
    before = ("env", "NO_FAKE_STAT=1", "faketime", "-f", f"@{day}")
    found = checks(spacemoe("doctor", "--json", "--state", tmp_path, before=before))
    assert not found["clock"]["ok"] and day[:4] in found["clock"]["text"] and why in found["clock"]["text"]
    assert found["clock"]["fix"].startswith("sudo timedatectl set-ntp true")


def test_a_clock_behind_its_own_files(tmp_path):
    """A day behind is plausible; a file from then on says otherwise, and a file of now does not."""
    (tmp_path / "kept").write_text("")
    late = Setting(state=tmp_path, now_utc_s=lambda: time.time() - 86_400.0)
    assert "kept" in next(iter(doctor_clock.clock(late))).text
    right = Setting(state=tmp_path)
    assert next(iter(doctor_clock.clock(right))).ok


def test_the_clock_against_a_time_server(tmp_path):
    """The kit's own server, which a test compares with ntplib, in a process with the right time."""
    with TimeServer("127.0.0.1", 0) as server:
        where = f"127.0.0.1:{server.port}"
        found = checks(spacemoe("doctor", "--json", "--state", tmp_path, "--ntp", where))
        assert found["clock_offset"]["ok"]
        for shift_s in (3600.0, -90.0):
            offset_s, _ = doctor_clock.offset("127.0.0.1", server.port, lambda shift_s=shift_s: time.time() + shift_s)
            assert offset_s == pytest.approx(-shift_s, abs=0.5)
        wrong = doctor_clock.asked(where, lambda: time.time() + 3600.0, "set it")
        assert not wrong.ok and "ahead of" in wrong.text and wrong.fix == "set it"
    assert not doctor_clock.asked(where, time.time, "set it").ok  # nobody answers any more


@pytest.mark.parametrize(
    "spoil",
    [
        lambda packet: packet[:40],
        lambda packet: packet[:24] + bytes(8) + packet[32:],
        lambda packet: b"\x23" + packet[1:],
    ],
    ids=["short", "not-asked", "a-question"],
)
def test_what_is_no_time_is_not_taken(spoil):
    """An answer of someone who guesses, or of another protocol; the unspoilt one of the test above is the control."""
    import threading

    from ground_station.time_server import answer

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.bind(("127.0.0.1", 0))

        def once():
            question, peer = link.recvfrom(512)
            link.sendto(spoil(answer(question, time.time(), time.time())), peer)

        worker = threading.Thread(target=once)
        worker.start()
        with pytest.raises(ValueError, match="no time"):
            doctor_clock.offset("127.0.0.1", link.getsockname()[1], time.time)
        worker.join()


def test_a_busy_port(control, tmp_path):
    program = (
        "import socket,sys; s=socket.socket(); s.setsockopt(1,2,1); s.bind(('127.0.0.1',8642)); s.listen(); "
        "print('on',flush=True); sys.stdin.read()"
    )
    if not control["port_web"]["ok"]:
        pytest.skip("port 8642 is held on this machine")
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"on\n"
        found = checks(spacemoe("doctor", "--json", "--state", tmp_path))
        assert not found["port_web"]["ok"] and f"process {other.pid}" in found["port_web"]["text"]
        assert found["port_web"]["fix"] == f"kill {other.pid}"
        subprocess.run(found["port_web"]["fix"].split(), check=True)  # the command mends it
        other.wait(10)
    finally:
        other.kill()
        other.wait()
    assert checks(spacemoe("doctor", "--json", "--state", tmp_path))["port_web"]["ok"]


def test_ports_of_this_kit_are_no_failure():
    program = (
        "import socket,sys; s=socket.socket(); s.bind(('127.0.0.1',0)); s.listen(); "
        "print(s.getsockname()[1],flush=True); sys.stdin.read()"
    )
    for words, ours in ((["ground_station.cli"], True), (["/opt/x/bin/spacemoe"], True), (["spacemoe-photos"], False)):
        other = subprocess.Popen([sys.executable, "-c", program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            port = int(other.stdout.readline())
            assert doctor_ports.look(doctor_ports.Wanted("port", port, "")).ok is ours
        finally:
            other.kill()
            other.wait()


def test_a_udp_port_that_is_held():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.bind(("127.0.0.1", 0))
        port = link.getsockname()[1]
        held = doctor_ports.look(doctor_ports.Wanted("port_time", port, "", udp=True))
        assert not held.ok and f"process {os.getpid()}" in held.text
        assert doctor_ports.look(doctor_ports.Wanted("port", port, "")).ok  # the same number of TCP is free
    assert doctor_ports.look(doctor_ports.Wanted("port_time", port, "", udp=True)).ok


def test_a_missing_and_a_damaged_bundle(tmp_path):
    found = checks(spacemoe("doctor", "--json", "--state", tmp_path, "--bundle", tmp_path / "no"))
    assert found["bundle"]["fix"] == f"spacemoe quantize MODEL -o {tmp_path / 'no'}" and not found["bundle"]["ok"]
    copy = tmp_path / "copy"
    shutil.copytree(reference_bundle(), copy)
    setting = Setting(bundle=copy, state=tmp_path)
    assert next(each for each in examine(setting) if each.name == "bundle").ok
    shard = next((copy / "experts").rglob("*.onnx"))
    shard.write_bytes(shard.read_bytes()[:-1])
    cut = next(each for each in examine(setting) if each.name == "bundle")
    assert not cut.ok and shard.name in cut.text
    (copy / "manifest.json").write_text("{")
    assert not next(each for each in examine(setting) if each.name == "bundle").ok


@pytest.fixture
def folder(tmp_path) -> fleet_records.FleetFolder:
    return fleet_records.FleetFolder.create(tmp_path / "lab", "lab", ["127.0.0.1"])


def of(checks_, name):
    return next(each for each in checks_ if each.name == name)


def test_a_fleet(folder, tmp_path):
    setting = Setting(fleet=folder.root, state=tmp_path)
    well = list(examine(setting))
    for name in ("fleet", "fleet_keys", "fleet_authority", "fleet_certificate"):
        assert of(well, name).ok, of(well, name)
    assert {"port_broker", "port_enrol", "port_data", "port_delivery", "port_time"} <= {each.name for each in well}
    key = folder.root / "ca.key"
    key.chmod(0o644)
    keys = of(examine(setting), "fleet_keys")
    assert not keys.ok and "ca.key" in keys.text
    subprocess.run(keys.fix.split(), check=True)
    assert of(examine(setting), "fleet_keys").ok
    key.unlink()
    assert "ca.key is missing" in of(examine(setting), "fleet").text


def test_certificates_that_end_or_have_not_begun(folder, tmp_path):
    from ground_station import fleet_authority

    until = fleet_authority.certificate_of(folder, fleet_records.GROUND_CERT).not_valid_after_utc.timestamp()
    for now_utc_s, ok in ((until - 8 * 86_400, True), (until - 6 * 86_400, False), (until + 86_400, False)):
        check = of(
            examine(Setting(fleet=folder.root, state=tmp_path, now_utc_s=lambda at=now_utc_s: at)), "fleet_certificate"
        )
        assert check.ok is ok
        assert ok or check.fix == f"spacemoe fleet renew-ground --dir {folder.root}"
    early = fleet_authority.certificate_of(folder, fleet_records.CA_CERT).not_valid_before_utc.timestamp() - 3600
    check = of(examine(Setting(fleet=folder.root, state=tmp_path, now_utc_s=lambda: early)), "fleet_authority")
    assert not check.ok and "the clock is wrong" in check.text


def test_no_fleet(tmp_path):
    check = of(examine(Setting(fleet=tmp_path / "none", state=tmp_path)), "fleet")
    assert check.fix == f"spacemoe fleet init NAME --host HOST --dir {tmp_path / 'none'}"


def test_a_damaged_archive(tmp_path):
    from ground_station.archive import Archive

    with Archive(tmp_path):
        pass
    assert of(examine(Setting(state=tmp_path)), "archive").ok
    file = next(tmp_path.glob("*.sqlite"))
    raw = bytearray(file.read_bytes())
    raw[4096:8192] = bytes(4096)
    file.write_bytes(raw)
    check = of(examine(Setting(state=tmp_path)), "archive")
    assert not check.ok and ".recover" in check.fix


def test_too_few_open_files(tmp_path):
    found = checks(spacemoe("doctor", "--json", "--state", tmp_path, before=("prlimit", "--nofile=256:4096", "--")))
    assert not found["open_files"]["ok"] and found["open_files"]["fix"] == "ulimit -n 1024"


def test_a_package_that_is_missing_or_old(monkeypatch):
    lines = ["no-such-package-of-anyone>=1", "psutil>=999", "pytest>=1; extra == 'dev'", "numpy"]
    monkeypatch.setattr(doctor_machine.metadata, "requires", lambda _name: lines)
    check = next(doctor_machine.packages())
    assert not check.ok and "no-such-package-of-anyone is not installed" in check.text and "psutil is " in check.text
    assert re.search(r"pip install .*spacemoe|pip install -c", check.fix)
    monkeypatch.setattr(doctor_machine.metadata, "requires", lambda _name: ["numpy", "no-such; extra == 'dev'"])
    assert next(doctor_machine.packages()).ok


def test_hostile_names_are_shown_as_text(tmp_path):
    done = spacemoe("doctor", "--bundle", tmp_path / "a\x1b[31m\u202eb", "--state", tmp_path)
    assert done.returncode == 3 and "\x1b" not in done.stdout and "\u202e" not in done.stdout


def test_a_check_that_breaks_is_a_finding(monkeypatch, tmp_path):
    def broken():
        raise OSError("no such thing")
        yield

    monkeypatch.setattr(doctor_machine, "memory", broken)
    found = list(examine(Setting(state=tmp_path)))
    assert not of(found, "memory").ok and "no such thing" in of(found, "memory").text
    assert of(found, "open_files").name  # and what comes after is still looked at
