"""Building images: the disk judged by sfdisk, fsck.vfat, e2fsck, mtools and bmaptool, units by systemd-analyze, the rest by its schema.

Leaves out: Debian's packages, the emulated root and booting, which take minutes (`make image-test`).
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import lacking

from hardware import (
    ext4_times,
    flash_front,
    image_boards,
    image_bootstrap,
    image_disk,
    image_initrd,
    image_output,
    image_root,
    image_sbom,
    image_wheels,
    partitions,
    payload,
    qemu_packets,
)
from hardware.image_build import BuildError, Recipe, check

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
FAT = 40 * MIB  # small, but still a FAT32
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
PROGRAMS = {
    "sfdisk": "fdisk",
    "fsck.vfat": "dosfstools",
    "mkfs.vfat": "dosfstools",
    "e2fsck": "e2fsprogs",
    "mke2fs": "e2fsprogs",
    "mdir": "mtools",
    "bmaptool": "bmap-tools",
    "zstd": "zstd",
    "cpio": "cpio",
    "systemd-analyze": "systemd",
}


def program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        lacking(name, f"apt-get install {PROGRAMS[name]}")
    return found


def run(name: str, *words: object, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [program(name), *map(str, words)], capture_output=True, text=True, cwd=cwd, env=os.environ | {"LC_ALL": "C"}
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- the disk


def parts(folder: Path, backwards: bool = False) -> tuple[dict[str, Path], tuple[Path, Path]]:
    """Files for the FAT partition, and two small ext4 file systems, all of them new files."""
    folder.mkdir()
    files = {}
    for name, data in {
        "vmlinuz": b"kernel" * 5000,
        "cmdline.txt": b"root=LABEL=spacemoe-root\n",
        "spacemoe/spacemoe.toml": b"[node]\n",
        "spacemoe/claim": b"x" * 43,
        "zeros.bin": b"a" + bytes(40_000) + b"b",
    }.items():
        path = folder / name.replace("/", "-")
        path.write_bytes(data)
        files[name] = path
    systems = []
    for index, uuid in enumerate(image_disk.ids("seed")[2]):
        tree = folder / f"tree-{index}"
        (tree / "etc").mkdir(parents=True)
        for name in ("hostname", *(f"file-{number}" for number in sorted(range(40), reverse=backwards))):
            (tree / "etc" / name).write_text(f"part {index} {name}\n")
        for path in (*(tree / "etc").iterdir(), tree / "etc", tree):
            os.utime(path, (1_700_000_000, 1_700_000_000))
        system = folder / f"system-{index}.ext4"
        subprocess.run(
            [program("mke2fs"), "-q", "-t", "ext4", "-U", uuid, "-E", f"hash_seed={uuid},root_owner=0:0", "-d", tree]
            + [system, "9M" if index else "16M"],
            check=True,
            env=os.environ | {"E2FSPROGS_FAKE_TIME": "1700000000"},
            capture_output=True,
        )
        ext4_times.settle(system, 1_700_000_000)
        systems.append(system)
    return files, (systems[0], systems[1])


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A whole small disk image and what it was made of."""
    folder = tmp_path_factory.mktemp("disk")
    for name in PROGRAMS:
        program(name)
    files, systems = parts(folder / "parts")
    made = image_disk.Disk("SPACEMOE", files, systems, "seed", 1_700_000_000, fat_bytes=FAT)
    image_disk.assemble(made, folder / "disk.img")
    return folder / "disk.img", made


def partition(image: Path, number: int, target: Path) -> Path:
    """Cuts a partition out by sfdisk's own reading of the table."""
    table = json.loads(run("sfdisk", "--json", image).stdout)["partitiontable"]["partitions"][number - 1]
    with open(image, "rb") as source:
        source.seek(table["start"] * 512)
        target.write_bytes(source.read(table["size"] * 512))
    return target


def test_the_table_is_what_sfdisk_reads(disk):
    image, made = disk
    table = json.loads(run("sfdisk", "--json", image).stdout)["partitiontable"]
    assert table["label"] == "dos" and table["id"] == f"0x{image_disk.ids('seed')[0]:08x}"
    fat, root, data = table["partitions"]
    assert (fat["start"] * 512, fat["size"] * 512, fat["type"], fat["bootable"]) == (4 * MIB, FAT, "c", True)
    assert (root["start"] * 512, root["size"] * 512, root["type"]) == (4 * MIB + FAT, 16 * MIB, "83")
    assert (data["start"] * 512, data["size"] * 512) == (20 * MIB + FAT, 12 * MIB), "9 MiB, in steps of 4"
    assert image.stat().st_size == 32 * MIB + FAT and image.stat().st_mode & 0o777 == 0o600
    verified = run("sfdisk", "--verify", image)
    assert "No errors detected" in verified.stdout + verified.stderr


def test_the_file_systems_pass_their_own_checkers(disk, tmp_path):
    image, made = disk
    fat = partition(image, 1, tmp_path / "fat")
    run("fsck.vfat", "-n", fat)
    listing = run("mdir", "-i", fat, "-/", "-b", "::").stdout.split()
    assert set(listing) == {
        "::/vmlinuz",
        "::/zeros.bin",
        "::/cmdline.txt",
        "::/spacemoe/",
        "::/spacemoe/spacemoe.toml",
        "::/spacemoe/claim",
    }
    assert (
        subprocess.run([shutil.which("mtype"), "-i", fat, "::/vmlinuz"], capture_output=True).stdout == b"kernel" * 5000
    )
    for number in (2, 3):
        run("e2fsck", "-fn", partition(image, number, tmp_path / f"ext4-{number}"))
    # the checkers can find something: one directory entry or one block altered is enough
    with open(fat, "r+b") as file:
        file.seek(fat.read_bytes().index(b"VMLINUZ ") + 26)
        file.write(b"\xf0\x7f")
    assert run("fsck.vfat", "-n", fat, check=False).returncode != 0
    with open(tmp_path / "ext4-2", "r+b") as file:
        file.seek((tmp_path / "ext4-2").read_bytes().index(b"hostname"))
        file.write(b"h\0s")
    assert run("e2fsck", "-fn", tmp_path / "ext4-2", check=False).returncode != 0


def test_the_same_parts_make_the_same_bytes_on_another_day(disk, tmp_path, monkeypatch):
    image, made = disk
    time.sleep(2.1)  # FAT counts in 2 s
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    files, systems = parts(tmp_path / "parts", backwards=True)
    again = tmp_path / "disk.img"
    image_disk.assemble(replace(made, fat=files, systems=systems), again)
    assert sha256(again) == sha256(image)
    image_disk.assemble(replace(made, seed="another"), again)
    assert sha256(again) != sha256(image)


def test_a_size_makes_the_last_partition_larger_or_is_refused(disk, tmp_path):
    _, made = disk
    size = 256 * MIB
    script, offsets, total = image_disk.table(replace(made, size_bytes=size))
    assert total == size and offsets[-1] == 20 * MIB + FAT
    assert f"size={(size - 20 * MIB - FAT) // 512}" in script
    with pytest.raises(image_disk.DiskError, match="too small: 7[0-9] MB are needed"):
        image_disk.table(replace(made, size_bytes=70 * MIB))
    (tmp_path / "large").write_bytes(b"")
    os.truncate(tmp_path / "large", FAT)
    with pytest.raises(image_disk.DiskError, match="do not fit on the FAT partition"):
        image_disk.assemble(replace(made, fat={"a": tmp_path / "large"}, systems=()), tmp_path / "no.img")


# ---------------------------------------------------------------- what is published


@pytest.fixture(scope="module")
def published(disk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    return image_output.publish(disk[0], folder / "card.img.zst", private=True)


def test_bmaptool_copies_and_compares(disk, published, tmp_path):
    image, copy = disk[0], tmp_path / "card"
    copy.write_bytes(b"")
    run("bmaptool", "copy", published.image, copy)  # finds card.img.bmap beside it
    assert sha256(copy) == published.raw_sha256 == sha256(image)
    assert published.mapped_bytes < published.raw_bytes / 8
    assert copy.stat().st_blocks * 512 <= published.mapped_bytes + 65536
    # a map for other bytes is refused
    other, where = tmp_path / "other.img", 4 * MIB + FAT + 1024 + 56
    shutil.copyfile(image, other)
    with open(other, "r+b") as file:
        file.seek(where)
        file.write(b"\xff\xff")
    failed = run("bmaptool", "copy", "--bmap", image_output.beside(published.image, ".bmap"), other, copy, check=False)
    assert failed.returncode != 0 and "checksum" in failed.stdout + failed.stderr


@pytest.mark.parametrize("keeps", [True, False], ids=["what a FAT has in use", "without it, the control"])
def test_a_used_card_gives_none_of_its_old_bytes(disk, tmp_path, monkeypatch, keeps):
    """Only what the map names is written (bmaptool would empty a plain file first); the FAT must be right all the same."""
    if not keeps:
        monkeypatch.setattr(image_output, "look_at_front", lambda source: flash_front.Front(None, ()))
    made = image_output.publish(disk[0], tmp_path / "card.img.zst", private=True)
    card = tmp_path / "card"
    card.write_bytes(b"\xaa" * made.raw_bytes)
    ranges = re.findall(
        r"<Range[^>]*>\s*(\d+)(?:-(\d+))?\s*</Range>", image_output.beside(made.image, ".bmap").read_text()
    )
    with open(disk[0], "rb") as image, open(card, "r+b") as file:
        for begin, end in ranges:
            for each in (image, file):
                each.seek(int(begin) * 4096)
            file.write(image.read((int(end or begin) - int(begin) + 1) * 4096))
    first = partitions.read_table(card).partitions[0]
    fat = tmp_path / "fat"
    with open(card, "rb") as file:
        file.seek(first.start_bytes)
        fat.write_bytes(file.read(first.size_bytes))
    clean = run("fsck.vfat", "-n", fat, check=False).returncode == 0
    got = subprocess.run(["mtype", "-i", fat, "::zeros.bin"], capture_output=True).stdout
    assert (clean and got == b"a" + bytes(40_000) + b"b") is keeps
    root = tmp_path / "root"
    second = partitions.read_table(card).partitions[1]
    with open(card, "rb") as file:
        file.seek(second.start_bytes)
        root.write_bytes(file.read(second.size_bytes))
    run("e2fsck", "-fn", root)


def test_sha256sum_and_zstd_agree(published):
    folder = published.image.parent
    done = subprocess.run(["sha256sum", "--check", "card.img.zst.sha256"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "card.img.zst: OK" in done.stdout
    assert f"{published.raw_bytes} B" in run("zstd", "-lv", published.image).stdout, "the header tells the raw size"
    assert published.image.stat().st_mode & 0o077 == 0


def test_the_same_image_compresses_to_the_same_bytes(disk, published, tmp_path):
    again = image_output.publish(disk[0], tmp_path / "card.img.zst", private=False)
    assert again.sha256 == published.sha256
    assert again.image.stat().st_mode & 0o777 == 0o644
    assert sha256(image_output.beside(again.image, ".bmap")) == sha256(image_output.beside(published.image, ".bmap"))


def test_rpi_imagers_manifest(published):
    board = image_boards.find("pi4")
    entry = image_output.manifest(published, board, "1.2", 1_700_000_000)["os_list"][0]
    assert entry["extract_sha256"] == published.raw_sha256 and entry["extract_size"] == published.raw_bytes
    assert entry["image_download_size"] == published.image.stat().st_size
    assert entry["devices"] == ["pi4-64bit"] and entry["init_format"] == "none"
    assert entry["url"].startswith("file:///") and entry["release_date"] == "2023-11-14"


# ---------------------------------------------------------------- the payload and its units


def test_the_agents_packages_are_those_of_pyproject():
    base = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[A-Za-z0-9-]+", each).group() for each in base}
    assert {re.match(r"[A-Za-z0-9-]+", each).group() for each in image_wheels.BASE} == names


def test_pins_are_read_for_the_boards_python_not_for_ours():
    text = (ROOT / "constraints.txt").read_text()
    assert image_wheels.pins(text, "3.10")["onnxruntime"] == "1.23.2"
    assert image_wheels.pins(text, "3.13")["onnxruntime"] == "1.32.0"
    assert "tomli" in image_wheels.pins(text, "3.10") and "tomli" not in image_wheels.pins(text, "3.11")
    with pytest.raises(image_wheels.WheelError, match="'3.9' is none of"):
        image_wheels.pins(text, "3.9")
    with pytest.raises(image_wheels.WheelError, match="no exact version"):
        image_wheels.pins("numpy>=2\n", "3.13")


def test_a_wheel_that_reaches_outside_is_refused(tmp_path):
    import zipfile

    wheel = tmp_path / "evil-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("../../etc/passwd", "x")
    with pytest.raises(image_wheels.WheelError, match="outside of itself"):
        image_wheels.unpack(wheel, lambda name: True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The payload's tree without wheels, and our own image's settings, unpacked by tar."""
    folder = tmp_path_factory.mktemp("tree")
    entries = payload._entries([], payload._own_files())
    for name, part in (
        ("payload", entries),
        ("root", image_root.entries(image_root.Options(True, "ssh-ed25519 AAAA me", True))),
    ):
        with open(folder / f"{name}.tar", "wb") as file:
            payload.write_tar(file, part)
        subprocess.run(["tar", "-xf", folder / f"{name}.tar", "-C", folder, "--no-same-owner"], check=True)
    return folder


def test_the_payload_is_the_same_twice_and_belongs_to_root(tree, tmp_path):
    with open(tmp_path / "again.tar", "wb") as file:
        payload.write_tar(file, payload._entries([], payload._own_files()))
    assert sha256(tmp_path / "again.tar") == sha256(tree / "payload.tar")
    listing = subprocess.run(
        ["tar", "-tvf", tree / "payload.tar", "--numeric-owner", "--full-time"], capture_output=True, text=True
    )
    assert listing.returncode == 0
    for line in listing.stdout.splitlines():
        assert " 0/0 " in line and "2020-01-01 00:00:00" in line, line
    with tarfile.open(tree / "payload.tar") as archive:
        names = archive.getnames()
    assert "opt/spacemoe/agent/node_agent/launcher.py" in names and not [
        each for each in names if "__pycache__" in each
    ]


def test_the_launcher_runs_the_agent_of_the_tree(tree):
    """With the paths of the tree in place of the image's, and this Python for the board's."""
    script = (
        (tree / "usr/bin/node-agent")
        .read_text()
        .replace("/opt/", f"{tree}/opt/")
        .replace("/usr/bin/python3", sys.executable)
    )
    done = subprocess.run(["sh", "-c", script, "node-agent", "--version"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and done.stdout.strip() == f"node-agent {payload.kit_version()}"


def test_units_are_sound_for_systemd(tree):
    root = tree
    for name in (
        "usr/bin/python3",
        "bin/touch",
        "bin/mkdir",
        "usr/bin/ssh-keygen",
        "usr/bin/systemctl",
        "usr/bin/systemd-sysusers",
        "usr/bin/systemd-tmpfiles",
    ):
        path = root / name  # programs of Debian's that units call
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    units = sorted((root / "etc/systemd/system").glob("spacemoe-*.service"))
    assert len(units) == 7
    for name in ("ssh.service", "systemd-timesyncd.service", "systemd-networkd.service", "systemd-remount-fs.service"):
        (root / "etc/systemd/system" / name).write_text("[Service]\nExecStart=/bin/touch\n") if not (
            root / "etc/systemd/system" / name
        ).exists() else None
    done = run(
        "systemd-analyze",
        "verify",
        "--man=no",
        "--recursive-errors=no",
        f"--root={root}",
        *(path.name for path in units),
        check=False,
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "spacemoe-" in line]
    assert done.returncode == 0 and said == [], said
    broken = root / "etc/systemd/system/spacemoe-broken.service"
    broken.write_text(units[0].read_text().replace("[Service]", "[Service]\nProtectSytem=strict"))
    done = run("systemd-analyze", "verify", "--man=no", f"--root={root}", broken.name, check=False)
    broken.unlink()
    assert "'ProtectSytem'" in done.stdout + done.stderr  # "Unknown key name" before systemd 252


@pytest.mark.parametrize("name, most", [("spacemoe-agent.service", 20), ("spacemoe-first-boot.service", 50)])
def test_units_may_do_little(tree, name, most):
    """systemd's own exposure level, in tenths: 0 nothing exposed, 100 everything."""
    words = ("security", "--offline=true", f"--threshold={most}")
    run("systemd-analyze", *words, tree / "etc/systemd/system" / name)
    bare = tree / "bare.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    assert run("systemd-analyze", *words, bare, check=False).returncode != 0


def test_nothing_of_our_image_calls_home(tree):
    for timer in ("apt-daily.timer", "apt-daily-upgrade.timer"):
        assert os.readlink(tree / "etc/systemd/system" / timer) == "/dev/null"
    assert "FallbackNTP=\n" in (tree / "etc/systemd/timesyncd.conf.d/spacemoe.conf").read_text()
    assert "ORT_DISABLE_TELEMETRY=1" in (tree / "etc/systemd/system/spacemoe-agent.service").read_text()


def test_the_time_server_is_the_ground_station_of_the_pack(tree, tmp_path):
    (tmp_path / "spacemoe.toml").write_text('[enrol]\nurl = "https://ground.example:8870"\n[broker]\nhost = "other"\n')
    script = (tree / "usr/lib/spacemoe/time-server").read_text()
    words = [sys.executable, "-I", "-c", script, tmp_path / "spacemoe.toml", tmp_path / "out" / "ntp.conf"]
    subprocess.run(words, check=True)
    assert (tmp_path / "out" / "ntp.conf").read_text() == "[Time]\nNTP=ground.example\nFallbackNTP=\n"
    (tmp_path / "spacemoe.toml").write_text('[broker]\nhost = "a b\\nNTP=evil"\n')
    failed = subprocess.run(words, capture_output=True, text=True)
    assert failed.returncode == 1 and "is no host name" in failed.stderr


# ---------------------------------------------------------------- initial RAM disk, boards, packages


def test_the_initial_ram_disk_unpacks_and_loads_in_order(tmp_path):
    modules = tmp_path / "boot" / "modules"
    needs = {
        "ext4": "jbd2 mbcache",
        "jbd2": "",
        "mbcache": "",
        "virtio_blk": "",
        "mmc_block": "mmc_core",
        "mmc_core": "",
        "nouveau": "",
    }
    modules.mkdir(parents=True)
    lines = [
        f"kernel/{name}.ko.xz: {' '.join(f'kernel/{each}.ko.xz' for each in others.split())}".rstrip()
        for name, others in needs.items()
    ]
    (modules / "modules.dep").write_text("\n".join(lines) + "\n")
    (modules / "modules.builtin").write_text("kernel/drivers/mmc/core/mmc_block.ko\n")
    (modules / "kernel").mkdir()
    for name in needs:
        (modules / "kernel" / f"{name}.ko.xz").write_bytes(lzma.compress(name.encode() * 100))
    (tmp_path / "boot" / "busybox").write_bytes(b"\x7fELF" + b"b" * 999)
    packed = image_initrd.make(tmp_path / "boot", 1_700_000_000)
    assert packed == image_initrd.make(tmp_path / "boot", 1_700_000_000)
    (tmp_path / "out").mkdir()
    raw = subprocess.run(["xz", "--decompress", "--stdout"], input=packed, capture_output=True, check=True).stdout
    subprocess.run([program("cpio"), "-idm", "--quiet"], input=raw, cwd=tmp_path / "out", check=True)
    assert (tmp_path / "out/bin/busybox").read_bytes() == b"\x7fELF" + b"b" * 999
    assert os.access(tmp_path / "out/init", os.X_OK)
    assert subprocess.run(["sh", "-n", tmp_path / "out/init"]).returncode == 0
    names = [path.name.partition("-")[2].removesuffix(".ko") for path in sorted((tmp_path / "out/modules").iterdir())]
    assert set(names) == set(needs) - {"nouveau"}
    for name in names:
        assert all(names.index(other) < names.index(name) for other in needs[name].split()), names
    assert (tmp_path / "out/modules" / f"{names.index('ext4'):03}-ext4.ko").read_bytes() == b"ext4" * 100
    with pytest.raises(image_initrd.InitrdError, match="no module ext4"):
        image_initrd.order("kernel/virtio_blk.ko:\n", "kernel/drivers/mmc/core/mmc_block.ko\n")


def test_mirrors_are_apts_own(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(
        "Types: deb deb-src\nURIs: http://mirror.example/debian/\nSuites: bookworm bookworm-updates\nComponents: main\n"
        f"Signed-By: {__file__}\n\nTypes: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\nComponents: main\n"
        f"Signed-By: {__file__}\n\nTypes: deb\nURIs: https://vendor.example/debian\nSuites: bookworm\nEnabled: no\n"
    )
    found = image_bootstrap.sources(None, tmp_path)
    assert [(each.uri, each.suite) for each in found] == [
        ("http://mirror.example/debian", "trixie"),
        ("http://mirror.example/debian-security", "trixie-security"),
    ]
    (tmp_path / "sources.list.d" / "debian.sources").unlink()
    (tmp_path / "sources.list").write_text(
        f"# none\ndeb [arch=amd64 signed-by={__file__}] http://old.example/debian stable main\n"
    )
    assert [(each.uri, each.suite) for each in image_bootstrap.sources(None, tmp_path)] == [
        ("http://old.example/debian", "trixie")
    ]
    (tmp_path / "sources.list").write_text("deb http://archive.example/ubuntu noble main\n")
    with pytest.raises(image_bootstrap.MirrorError, match="give --mirror URL"):
        image_bootstrap.sources(None, tmp_path)
    with pytest.raises(image_bootstrap.MirrorError, match="is no address"):
        image_bootstrap.sources("-oEvil=1")


def test_boards(tmp_path):
    from ground_station import cli_image

    assert tuple(image_boards.BOARDS) == cli_image.BOARDS
    text = image_boards.boot_files(image_boards.find("pi4"), quiet=True)
    assert "root=LABEL=spacemoe-root ro" in text["cmdline.txt"] and text["cmdline.txt"].count("\n") == 1
    assert "kernel=vmlinuz" in text["config.txt"]
    with pytest.raises(image_boards.BoardError, match="customize a vendor's image"):
        image_boards.find("pi5")


STATUS = """Package: zlib1g
Status: install ok installed
Architecture: arm64
Source: zlib
Version: 1:1.3.dfsg+really1.3.1-1

Package: gone
Status: deinstall ok config-files
Architecture: arm64
Version: 1

"""


def bill() -> dict:
    bootstrap = image_bootstrap.Bootstrap(Path("x"), "k", (), {"zlib1g": "ab" * 32}, 1_700_000_000)
    wheel = image_wheels.Wheel("numpy", "2.4.6", "numpy-2.4.6-cp313.whl", "cd" * 32, "BSD-3-Clause")
    return image_sbom.document("spacemoe-pi4", "0.1.0", "key", bootstrap, STATUS, {"zlib1g": "Zlib"}, (wheel,))


def test_the_bill_of_materials_follows_cyclonedx():
    import jsonschema

    try:
        from cyclonedx.schema import _res
    except ModuleNotFoundError:
        lacking("CycloneDX's schema", "pip install cyclonedx-python-lib")
    from referencing import Registry, Resource

    folder = Path(_res.__file__).parent

    def retrieve(uri: str) -> Resource:
        return Resource.from_contents(json.loads((folder / uri.rpartition("/")[2]).read_text()))

    schema = json.loads((folder / "bom-1.6.SNAPSHOT.schema.json").read_text())
    validator = jsonschema.Draft7Validator(schema, registry=Registry(retrieve=retrieve))
    tree = json.loads(json.dumps(bill()))
    validator.validate(tree)
    assert [each["name"] for each in tree["components"]] == ["zlib1g", "numpy", "spacemoe-kit"]
    assert (
        tree["components"][0]["purl"] == "pkg:deb/debian/zlib1g@1%3A1.3.dfsg%2Breally1.3.1-1?arch=arm64&distro=trixie"
    )
    tree["components"][0]["hashes"][0]["content"] = "no hash"
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(tree)


# ---------------------------------------------------------------- who a board spoke to


def ethernet(kind: int, data: bytes, source: bytes = b"\x40\x54\x00\x12\x34\x57") -> bytes:
    return b"\xff" * 6 + source + kind.to_bytes(2, "big") + data


def version_4(target: str, protocol: int = 17, ports: tuple[int, int] = (40000, 8883)) -> bytes:
    addresses = ipaddress.ip_address("10.0.2.15").packed + ipaddress.ip_address(target).packed
    return struct.pack(">BBHHHBBH", 0x45, 0, 28, 0, 0, 64, protocol, 0) + addresses + struct.pack(">HHHH", *ports, 8, 0)


def version_6(target: str, following: int, data: bytes) -> bytes:
    addresses = ipaddress.ip_address("fe80::1").packed + ipaddress.ip_address(target).packed
    return struct.pack(">IHBB", 0x60000000, len(data), following, 255) + addresses + data


def test_every_packet_that_went_elsewhere_is_named(tmp_path):
    frames = [
        ethernet(0x0806, bytes(28)),
        ethernet(0x0800, version_4("255.255.255.255", 17, (68, 67))),
        ethernet(0x0800, version_4("10.0.2.2", 6)),
        ethernet(0x86DD, version_6("ff02::1:ff00:1", 58, bytes([135]) + bytes(23))),
        ethernet(0x86DD, version_6("ff02::16", 0, bytes([58, 0, 5, 2, 0, 0, 1, 0]) + bytes([143]) + bytes(27))),
        ethernet(0x0800, version_4("8.8.8.8", 17, (40000, 53)), source=b"\x52\x55\x0a\x00\x02\x02"),
    ]
    path = tmp_path / "packets.pcap"

    def write(all_frames) -> None:
        head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
        path.write_bytes(
            head
            + b"".join(
                struct.pack("<IIII", index, 0, len(each), len(each)) + each for index, each in enumerate(all_frames)
            )
        )

    write(frames)
    found = qemu_packets.summary(qemu_packets.read(path, "10.0.2.2"))
    assert (
        found["kinds"] == {"arp": 1, "dhcp": 1, "ground": 1, "neighbour": 1, "listener": 1} and found["elsewhere"] == {}
    )
    # a packet to anyone else, or of a kind that nobody expects, is named
    bad = [
        ethernet(0x0800, version_4("8.8.8.8", 17, (40000, 53))),
        ethernet(0x88CC, bytes(46)),
        ethernet(0x86DD, version_6("ff02::fb", 17, bytes(8))),
    ]
    write([*frames, *bad])
    assert list(qemu_packets.summary(qemu_packets.read(path, "10.0.2.2"))["elsewhere"]) == [
        "IPv4 protocol 17 to 8.8.8.8 port 53",
        "EtherType 0x88cc to ff:ff:ff:ff:ff:ff",
        "IPv6 protocol 17 to ff02::fb",
    ]
    path.write_bytes(b"no packets here, but enough bytes for a head")
    with pytest.raises(qemu_packets.PacketError, match="is no pcap file"):
        qemu_packets.read(path, "10.0.2.2")


# ---------------------------------------------------------------- the command


def spacemoe(*words: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "ground_station.cli", "image", "build", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(tmp_path):
    out = tmp_path / "card.img.zst"
    done = spacemoe(
        "--board",
        "pi4",
        "-o",
        out,
        "--mirror",
        "http://mirror.example/debian",
        "--dry-run",
        "--json",
        "--cache",
        tmp_path / "cache",
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (
        plan["board"].startswith("pi4")
        and plan["mirror"] == "http://mirror.example/debian trixie"
        and plan["ssh"] == "none"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_built_is_refused_before_anything_is_made(tmp_path):
    recipe = {"board": "pi4", "output": tmp_path / "a.img.zst", "cache": tmp_path / "cache"}
    check(Recipe(**recipe))
    with pytest.raises(image_output.OutputError, match="call the image NAME.img.zst"):
        check(Recipe(**recipe | {"output": tmp_path / "a.img"}))
    with pytest.raises(BuildError, match="in a folder that is there"):
        check(Recipe(**recipe | {"output": tmp_path / "none" / "a.img.zst"}))
    (tmp_path / "pack").mkdir()
    with pytest.raises(BuildError, match="spacemoe.toml is missing.*fleet add"):
        check(Recipe(**recipe, pack=tmp_path / "pack"))
    with pytest.raises(BuildError, match="holds no manifest.json"):
        check(Recipe(**recipe, shards=tmp_path))
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n")
    with pytest.raises(ValueError, match="not the private one"):
        check(Recipe(**recipe, ssh_key=tmp_path / "key"))
    assert not (tmp_path / "cache").exists()
    done = spacemoe("--board", "pi4", "-o", tmp_path / "a.img", "--dry-run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
