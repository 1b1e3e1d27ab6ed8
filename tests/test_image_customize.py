"""Vendor base images take the agent and a pack: every kind, compressed ones, and what is refused; e2fsprogs, mtools, sfdisk are the judges.

The base images are made here with each vendor's layout (vendor_images.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
from vendor_images import (
    CMDLINE,
    KEY,
    LAYOUTS,
    MIB,
    ROOT_MIB,
    TOKEN,
    UNITS,
    WLAN,
    add_python,
    base_image,
    cat,
    digest,
    fat_text,
    made,
    make_pack,
    need_programs,
    no_packages,
    root_of,
    sh,
    small_payload,
)

from ground_station import cli
from hardware import base_kinds, customize, fat_files, partitions
from hardware.customize_plan import CustomizeError, Settings, plan, read_pack


@pytest.fixture(scope="session", autouse=True)
def programs():
    need_programs()


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Makes each kind of base once; tests read it, or copy it to harm it."""
    folder = tmp_path_factory.mktemp("bases")

    def base(kind: str) -> Path:
        image = folder / f"{kind}.bin"  # a name that tells nothing
        return image if image.exists() else base_image(image, LAYOUTS[kind])

    return base


@pytest.fixture
def pack(tmp_path) -> Path:
    return make_pack(tmp_path / "pack", "sat-7", "pi4")


# ---------------------------------------------------------------- every kind of base


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_base_takes_the_agent_and_the_pack(kind, bases, tmp_path, pack):
    if kind == "jetson":
        pack = make_pack(tmp_path / "jetson", "sat-7", "jetson-orin-nano")
    base, out = bases(kind), tmp_path / "out.img"
    before, table = digest(base), sh("sfdisk", "-d", str(base)).replace(str(base), "IMG")
    own = kind == "spacemoe"
    report = made(base, pack, out, **({} if own else {"network": WLAN, "ssh_key": KEY}))
    assert (report.kind, report.python, report.node) == (kind, LAYOUTS[kind].python, "sat-7")
    # the judges
    assert digest(base) == before
    assert sh("sfdisk", "-d", str(out)).replace(str(out), "IMG") == table
    sh("e2fsck", "-fn", root_of(out)[0])
    assert out.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "jetson") == ["out.img", "pack"]
    if kind != "jetson":
        listing = sh("mdir", "-b", "-i", f"{out}@@{MIB}", "::/spacemoe").split()
        assert sorted(listing) == [f"::/spacemoe/{name}" for name in ("ca.pem", "claim", "spacemoe.toml")]
        assert fat_text(out, "/spacemoe/claim").strip() == TOKEN
        cut, raw = tmp_path / "fat", out.read_bytes()
        cut.write_bytes(raw[MIB : root_of(out)[1]])
        sh("fsck.vfat", "-n", str(cut))
        assert TOKEN.encode() in raw[: root_of(out)[1]]
        assert TOKEN.encode() not in raw[root_of(out)[1] :], "the token is nowhere in the root file system"
    if own:
        assert report.root_items == 0
        return
    units = "/etc/systemd/system"
    assert cat(out, f"{units}/spacemoe-agent.service") == (UNITS / "spacemoe-agent.service").read_text()
    for name in ("spacemoe-first-boot.service", "spacemoe-agent.service"):
        shown = sh("debugfs", "-R", f"stat {units}/multi-user.target.wants/{name}", root_of(out)[0])
        assert f'Fast link dest: "{units}/{name}"' in shown
    shown = sh("debugfs", "-R", "stat /usr/bin/node-agent", root_of(out)[0])
    assert re.search(r"Type: regular +Mode: +0755", shown) and re.search(r"User: +0 +Group: +0 ", shown)
    assert cat(out, "/opt/spacemoe/agent/package/module_3.py") == f"python = {LAYOUTS[kind].python!r}\n" * 3
    sh("debugfs", "-R", f"dump /opt/spacemoe/agent/package/native.so {tmp_path}/native", root_of(out)[0])
    assert (tmp_path / "native").read_bytes() == bytes(range(256)) * 4000
    {"raspios-bookworm": bookworm, "debian-raspi": debian, "jetson": jetson}.get(kind, cloud)(out)


def cloud(out: Path) -> None:
    first, _, text = fat_text(out, "/user-data").partition("\n")
    tree = json.loads(text)
    assert (first, tree["hostname"]) == ("#cloud-config", "sat-7")
    assert tree["users"][0]["ssh_authorized_keys"] == [KEY]
    assert json.loads(fat_text(out, "/meta-data"))["instance-id"].startswith("spacemoe-sat-7-")
    radio = json.loads(fat_text(out, "/network-config"))["network"]["wifis"]["wlan0"]
    assert radio["access-points"] == {"lab 2": {"password": WLAN.key}}


def bookworm(out: Path) -> None:
    words = fat_text(out, "/cmdline.txt").split()
    assert words[:6] == CMDLINE.split()
    assert words[6:] == [
        "cfg80211.ieee80211_regdom=DE",
        "systemd.run=/boot/firmware/firstrun.sh",
        "systemd.run_success_action=reboot",
        "systemd.unit=kernel-command-line.target",
    ]
    sh("sh", "-n", send=fat_text(out, "/firstrun.sh").encode())


def debian(out: Path) -> None:
    assert cat(out, "/etc/hostname") == "sat-7\n"
    assert "127.0.1.1\tsat-7" in cat(out, "/etc/hosts") and "raspberrypi" not in cat(out, "/etc/hosts")
    assert f"wpa-psk {WLAN.key}" in cat(out, "/etc/network/interfaces.d/spacemoe-wlan")
    shown = sh("debugfs", "-R", "stat /root/.ssh/authorized_keys", root_of(out)[0])
    assert re.search(r"Mode: +0600", shown) and cat(out, "/root/.ssh/authorized_keys").strip() == KEY


def jetson(out: Path) -> None:
    where = root_of(out)[0]
    shown = sh("debugfs", "-R", "stat /etc/systemd/system/default.target", where)
    assert 'Fast link dest: "/lib/systemd/system/multi-user.target"' in shown
    shown = sh("debugfs", "-R", "stat /boot/spacemoe", where)
    assert re.search(r"Type: directory +Mode: +0700", shown)
    assert cat(out, "/boot/spacemoe/claim").strip() == TOKEN
    assert "--pack /boot/spacemoe " in cat(out, "/etc/systemd/system/spacemoe-first-boot.service.d/pack.conf")
    shown = sh("debugfs", "-R", "stat /etc/NetworkManager/system-connections/spacemoe-wlan.nmconnection", where)
    assert re.search(r"Mode: +0600", shown)


@pytest.mark.parametrize("packer", [["xz", "-0"], ["zstd", "-q"], ["gzip", "-1"]], ids=lambda argv: argv[0])
def test_compressed_bases_and_outputs(packer, bases, tmp_path, pack):
    base = tmp_path / "base"
    with open(base, "wb") as file:
        subprocess.run([*packer, "-c", str(bases("spacemoe"))], stdout=file, check=True)
    before, out = digest(base), tmp_path / "out.img.zst"
    made(base, pack, out)
    sh("zstd", "-q", "-d", str(out), "-o", str(tmp_path / "out.img"))
    assert fat_text(tmp_path / "out.img", "/spacemoe/claim").strip() == TOKEN
    assert digest(base) == before


def test_what_was_customized_can_be_customized_again(bases, tmp_path, pack):
    made(bases("raspios-bookworm"), pack, tmp_path / "one.img")
    made(tmp_path / "one.img", make_pack(tmp_path / "other", "sat-8", "pi4"), tmp_path / "two.img")
    assert fat_text(tmp_path / "two.img", "/cmdline.txt").count("systemd.run=") == 1
    assert 'id = "sat-8"' in fat_text(tmp_path / "two.img", "/spacemoe/spacemoe.toml")
    sh("e2fsck", "-fn", root_of(tmp_path / "two.img")[0])


def test_a_pack_goes_to_where_the_base_mounts_its_fat(bases, tmp_path):
    """A Jetson image whose EFI partition is mounted: the token is on it, and the first-boot unit looks there."""
    image = bases("jetson")
    base = base_kinds.recognise(image)
    fat = fat_files.Fat(image, 0, MIB, "ESP", 512)
    pack = read_pack(make_pack(tmp_path / "pack", "sat-7", "jetson-orin-nano"))
    there = plan(dataclasses.replace(base, fat=fat, fat_mount="/boot/efi"), pack, Settings(), lambda path: None)
    assert "/spacemoe/claim" in there.fat and not any("claim" in path for path in there.root)
    text = there.root["/etc/systemd/system/spacemoe-first-boot.service.d/pack.conf"][0].decode()
    assert "--pack /boot/efi/spacemoe " in text and "RequiresMountsFor=/boot/efi\n" in text
    assert "claim" in " ".join(plan(base, pack, Settings(), lambda path: None).root)  # control: without one


def test_a_debian_base_without_python_gets_it(tmp_path, pack):
    """raspi.debian.net's images have none. Which packages those are apt decides; see base_packages.py."""
    status = "Package: libc6\nStatus: install ok installed\n\n"
    bare = dataclasses.replace(LAYOUTS["debian-raspi"], python="", files={"var/lib/dpkg/status": status})
    asked = []

    def bring(out: Path, status: bytes, codename: str) -> tuple[str, ...]:
        asked.append((status.decode(), codename))
        add_python(out, "3.11")
        return ("python3.11",)

    report = made(base_image(tmp_path / "base", bare), pack, tmp_path / "out.img", packages=bring)
    assert asked == [(status, "bookworm")] and (report.python, report.packages) == ("3.11", ("python3.11",))
    assert 'Fast link dest: "python3.11"' in sh(
        "debugfs", "-R", "stat /usr/bin/python3", root_of(tmp_path / "out.img")[0]
    )
    assert cat(tmp_path / "out.img", "/opt/spacemoe/agent/package/module_1.py") == "python = '3.11'\n"
    sh("e2fsck", "-fn", root_of(tmp_path / "out.img")[0])
    # control: on any other base that is an error
    other = dataclasses.replace(LAYOUTS["raspios-bookworm"], python="")
    with pytest.raises(CustomizeError, match="lacks Python"):
        made(base_image(tmp_path / "other", other), pack, tmp_path / "other.img")


# ---------------------------------------------------------------- what is refused leaves nothing behind


@pytest.fixture
def refused(tmp_path, pack):
    """Calls customize and gives its one-line error, after checking that nothing is left and the base is as it was."""

    def call(base: Path, out: Path | None = None, pack: Path = pack, payload=small_payload, **settings) -> str:
        before, there = base.stat(), sorted(tmp_path.rglob("*"))
        with pytest.raises((ValueError, OSError, RuntimeError)) as error:
            made(base, pack, out or tmp_path / "out.img", payload, **settings)
        assert sorted(tmp_path.rglob("*")) == there and base.stat().st_mtime_ns == before.st_mtime_ns
        assert "\n" not in str(error.value)
        return str(error.value)

    return call


def harmed(base: Path, folder: Path, *writes: tuple[int, bytes]) -> Path:
    copy = folder / "harmed.img"
    sh("cp", "--sparse=always", str(base), str(copy))
    with open(copy, "r+b") as file:
        for at, data in writes:
            file.seek(at)
            file.write(data)
    return copy


def test_unknown_bases_are_refused_with_what_was_found(tmp_path, refused):
    alpine = {"ID": "alpine", "PRETTY_NAME": '"Alpine Linux v3.20"'}
    text = refused(
        base_image(tmp_path / "raspios-trixie.img", dataclasses.replace(LAYOUTS["spacemoe"], release=alpine, files={}))
    )
    assert (
        "no base image that is known" in text
        and "take one of: Raspberry Pi OS" in text
        and "Alpine Linux v3.20" in text
        and "FAT 'SPACEMOE'" in text
    )
    (tmp_path / "raspios-trixie.img").unlink()
    old = dataclasses.replace(LAYOUTS["raspios-bookworm"], python="3.9")
    assert "Python 3.9" in refused(base_image(tmp_path / "old.img", old))


def test_a_32_bit_base_is_refused(tmp_path, bases, refused):
    image = harmed(bases("debian-raspi"), tmp_path)
    (tmp_path / "elf").write_bytes(b"\x7fELF\x01\x01\x01" + bytes(9) + struct.pack("<HHI", 3, 40, 1) + bytes(40))
    commands = f"cd /usr/bin\nrm python3.11\nwrite {tmp_path}/elf python3.11\n"
    sh("debugfs", "-w", "-f", "-", root_of(image)[0], send=commands.encode())
    assert "no 64-bit Arm" in refused(image)


def test_a_damaged_root_is_refused(tmp_path, bases, refused):
    base = bases("debian-raspi")
    at = root_of(base)[1]
    image = harmed(base, tmp_path)
    sh("debugfs", "-w", "-R", "clri /usr/lib", root_of(image)[0])
    sh("e2fsck", "-fn", root_of(image)[0], ok=(4,))  # the judge agrees
    assert "e2fsck finds" in refused(image)
    flags = struct.unpack("<I", image.read_bytes()[at + 1024 + 96 : at + 1024 + 100])[0]
    dirty = harmed(base, tmp_path, (at + 1024 + 96, struct.pack("<I", flags | 4)))
    assert "not unmounted cleanly" in refused(dirty)


def test_full_file_systems_are_refused_with_the_bytes_that_lack(tmp_path, bases, refused, pack):
    image = harmed(bases("debian-raspi"), tmp_path)
    free = fat_files.open_fat(image, MIB, 8 * MIB).free_bytes()
    sh("mcopy", "-i", f"{image}@@{MIB}", "-", "::/filler", send=os.urandom(free - 2048))
    text = refused(image)
    assert "FAT partition" in text and re.search(r"[1-9]\d* are lacking", text)

    def large(out: Path, python: str) -> None:
        small_payload(out, python)
        with open(out / "opt/spacemoe/agent/large", "wb") as file:
            file.truncate(ROOT_MIB * MIB)

    text = refused(bases("debian-raspi"), payload=large)
    assert "root file system" in text and re.search(r"[1-9]\d{6,} are lacking", text)
    # control: the same base takes the small one
    assert made(bases("debian-raspi"), pack, tmp_path / "out.img", dry_run=True).output is None


def test_damaged_containers_are_refused(tmp_path, bases, refused):
    base = bases("jetson")
    table = partitions.read_table(base)
    raw = base.read_bytes()
    bad = harmed(base, tmp_path, (1024 + 40, bytes(8)))  # an entry's last sector
    assert "checksum of the GPT entries" in refused(bad)
    assert "checksum of the GPT header" in refused(harmed(base, tmp_path, (512 + 72, b"\x07")))
    with open(bad, "wb") as file:
        file.write(raw[: table.partitions[0].start_bytes + MIB])
    assert "outside the file" in refused(bad)
    overlong = harmed(bases("spacemoe"), tmp_path, (446 + 16 + 12, struct.pack("<I", 1 << 30)))
    assert "outside the file" in refused(overlong)
    bad.write_bytes(os.urandom(MIB))
    text = refused(bad)
    assert "no disk image" in text and "take one of: Raspberry Pi OS" in text
    bad.write_bytes(b"")
    assert "empty" in refused(bad)
    packed = tmp_path / "base.img.xz"
    with open(packed, "wb") as file:
        subprocess.run(["xz", "-0", "-c", str(bases("spacemoe"))], stdout=file, check=True)
    packed.write_bytes(packed.read_bytes()[:-5000])
    assert "truncated or damaged" in refused(packed)


def test_wrong_arguments_are_refused(tmp_path, bases, refused, pack, monkeypatch):
    base = harmed(bases("spacemoe"), tmp_path)
    assert "never altered" in refused(base, out=base)
    (tmp_path / "link.img").symlink_to(base)
    assert "never altered" in refused(base, out=tmp_path / "link.img")
    assert "end in .img" in refused(base, out=tmp_path / "out.bin")
    assert "no folder" in refused(base, out=tmp_path / "no" / "out.img")
    os.mkfifo(tmp_path / "pipe.img")
    assert "no plain file" in refused(base, out=tmp_path / "pipe.img")
    assert "--max-size" in refused(base, max_bytes=MIB)
    assert "takes the pack only" in refused(base, host_name="x")
    assert "does not boot" in refused(bases("debian-raspi"), board="jetson-orin-nano")
    assert "no host name" in refused(bases("debian-raspi"), host_name="-x")
    (pack / "claim").write_text("short\n")
    assert "no claim token" in refused(base)
    (pack / "claim").unlink()
    assert "fleet add" in refused(base)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("hardware.program._SBIN", str(tmp_path))
    assert "apt-get install mtools" in refused(base, pack=make_pack(tmp_path / "good", "a", "pi4"))


@pytest.mark.parametrize("at", [0, 4, 6])
def test_an_interrupt_leaves_nothing(at, bases, tmp_path, pack):
    """While the base is copied, while what was written is checked, while the result is compressed."""
    seen = []

    def stage(text: str) -> None:
        seen.append(text)
        if len(seen) == at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        customize.customize(
            bases("ubuntu"), pack, tmp_path / "out.img.xz", Settings(), small_payload, no_packages, stage
        )
    assert re.match({0: "copying", 4: "checking", 6: "compressing"}[at], seen[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_a_dry_run_reads_a_raw_base_where_it_is(bases, tmp_path, pack, monkeypatch):
    base, shown = bases("raspios-bookworm"), []
    before = digest(base)
    monkeypatch.setattr(customize.sparse_copy, "unpack", lambda *_: 1 / 0)
    report = customize.customize(
        base, pack, tmp_path / "out.img", Settings(dry_run=True), small_payload, no_packages, shown.append
    )
    assert report.output is None and report.image_bytes == base.stat().st_size and "where they are" in shown[0]
    assert digest(base) == before and [path.name for path in tmp_path.iterdir()] == ["pack"]
    with pytest.raises(ZeroDivisionError):  # control: what is to be written is copied
        made(base, pack, tmp_path / "out.img")


def test_the_command(bases, tmp_path, pack, capsys):
    base, out = str(bases("spacemoe")), tmp_path / "out.img"
    argv = ["image", "customize", base, "--pack", str(pack), "-o", str(out), "--json"]
    assert cli.main([*argv, "--dry-run"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["output"], out.exists()) == ("spacemoe", None, False)
    assert cli.main(argv) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["output"] == str(out) and answer["fat_files"][1] == "/spacemoe/claim"
    assert fat_text(out, "/spacemoe/claim").strip() == TOKEN
    assert cli.main([*argv, "--wifi-ssid", "x"]) == 2
    assert "--wifi-country" in capsys.readouterr().err
    secret = tmp_path / "secret"
    secret.write_text("tiny")
    wifi = ["--wifi-ssid", "x", "--wifi-password-file", str(secret), "--wifi-country", "DE"]
    assert cli.main([*argv, *wifi]) == 2
    err = capsys.readouterr().err
    assert "passphrase" in err and "tiny" not in err
    assert cli.main(["image", "customize", str(pack / "claim"), "--pack", str(pack), "-o", str(out)]) == 2
    assert CustomizeError.__name__ not in capsys.readouterr().err
