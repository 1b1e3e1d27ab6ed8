"""Flashing: which disks may be written (by lsblk's listings), what is on a card afterwards, and that a half-written one does not boot.

Judges are the programs themselves: xz, zstd, gzip and sha256sum make and measure the images, bmaptool the block maps, cmp compares,
mtools reads the FAT partition; the kernel refuses a mounted loop device. The listings in lsblk_records follow lsblk 2.38's columns:
virtual-machine.json was recorded, the others were written by hand after such machines.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import lacking

from ground_station import cli, cli_flash
from ground_station.fleet_records import FleetFolder
from hardware import block_devices, bmap, flash, flash_card, flash_front, flash_pack, image_source
from hardware.block_devices import DiskError, Rules
from hardware.flash import HEAD_BYTES, DigestError, Job, Target
from hardware.flash_label import COLUMNS, label
from hardware.image_errors import ImageError, ImageTooLarge

RECORDS = Path(__file__).parent / "lsblk_records"
MB = 1024 * 1024
IMAGE_BYTES = 9 * MB
HOLE, HOLE_END = 5 * MB, 6 * MB
CARD_BYTES = 12 * MB
FAT_START = 5 * MB
TOKEN = "tOkEn-of-one-use_0123456789abcdefghijklmnop"
PACKAGES = {
    "bmaptool": "bmap-tools",
    "cmp": "diffutils",
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
    "sfdisk": "fdisk",
    "xz": "xz-utils",
}


def program(name: str, *arguments: object, **options) -> str:
    found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if found is None:
        lacking(name, f"apt-get install {PACKAGES.get(name, name)}")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, timeout=60, **options)
    assert done.returncode == 0, (name, done.stderr[-300:])
    return done.stdout.decode(errors="replace")


def same(one: Path, other: Path, *options: str) -> bool:
    return subprocess.run(["cmp", "-s", *options, one, other], timeout=60).returncode == 0


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """An image of 5 MB, a hole of one, and 3 MB; some of it does not compress, above all what is near its end."""
    path = tmp_path_factory.mktemp("image") / "small.img"
    block = os.urandom(4096)
    with open(path, "wb") as file:
        file.write(os.urandom(256 * 1024) + block * 1216)
        file.seek(HOLE_END)
        file.write(block * 592 + os.urandom(MB // 2) + block * 48)
    program("sfdisk", "-q", path, input=b"label: dos\nstart=2048,type=83\n")
    assert path.stat().st_size == IMAGE_BYTES
    return path


@pytest.fixture(scope="module")
def fat_image(tmp_path_factory):
    """make(FAT's first byte) -> an image with a partition table and an empty FAT partition."""
    folder = tmp_path_factory.mktemp("fat")

    def make(start: int) -> Path:
        path = folder / f"{start}.img"
        if not path.exists():
            with open(path, "wb") as file:
                file.truncate(IMAGE_BYTES)
                file.seek(8 * MB)
                file.write(os.urandom(MB))
            program("sfdisk", "-q", path, input=f"label: dos\nstart={start // 512},size=6144,type=e\n".encode())
            program("mkfs.vfat", "-F", "16", "-s", "1", "--offset", start // 512, path, 3072)
        return path

    return make


def pack(folder: Path, node: str = "sat-1") -> Path:
    path = folder / node
    path.mkdir(parents=True)
    (path / "spacemoe.toml").write_text(f'[node]\nid = "{node}"\nfleet = "lab"\nboard = "raspberry-pi-5"\n')
    (path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n" * 200)
    (path / "claim").write_text(TOKEN + "\n")
    return path


def onto(path: Path, size: int = CARD_BYTES, pack_path: Path | None = None) -> Job:
    """A card whose former content is 0xff, so that what was not written can be told from zeros."""
    path.write_bytes(b"\xff" * size)
    return Job(Target(path, size), flash_pack.read_pack(pack_path) if pack_path else None)


def written(*arguments) -> flash.Flashed:
    return flash.flash(flash.planned(*arguments))


def unbootable(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES) == bytes(HEAD_BYTES)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(each) for each in ("flash", *arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# which disks


def record(name: str) -> tuple[block_devices.Disk, ...]:
    return block_devices.disks_of(json.loads((RECORDS / f"{name}.json").read_text()))


def disk(name: str, device: str) -> block_devices.Disk:
    return block_devices.find(record(name), device)


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        (
            "laptop",
            "/dev/nvme0n1",
            "is the system disk: it holds /boot/efi (/dev/nvme0n1p1), /boot (/dev/nvme0n1p2), / (/d",
        ),
        ("laptop", "/dev/nvme0n1", "holds /dev/nvme0n1p3, which is encrypted with LUKS"),
        ("laptop", "/dev/sda", "holds /dev/sda1, which is mounted at /media/ada/PHOTOS: umount /dev/sda1"),
        ("laptop", "/dev/sdc", "has no card in it"),
        ("laptop", "/dev/sdd", "is read-only"),
        ("laptop", "/dev/sr0", "is no disk but of type rom"),
        ("laptop", "/dev/loop0", "is a loop device"),
        ("server", "/dev/sda", "is the system disk: it holds / (/dev/sda1)"),
        ("server", "/dev/sdb", "is a built-in disk (sata)"),
        ("server", "/dev/sdb", "is held by /dev/md0 (raid1)"),
        ("server", "/dev/sdc", "holds /dev/sdc1, which is a member of a RAID (linux_raid_member)"),
        ("server", "/dev/sdd", "holds /dev/sdd1, which is a member of LVM"),
        ("server", "/dev/sde", "is encrypted with LUKS"),
        ("server", "/dev/sdf", "is swap in use: swapoff /dev/sdf1"),
        ("server", "/dev/sdg", "is too large for a card: 4.0 TB"),
        (
            "raspberry-pi",
            "/dev/mmcblk0",
            "is the system disk: it holds /boot/firmware (/dev/mmcblk0p1), / (/dev/mmcblk0p2)",
        ),
        ("raspberry-pi", "/dev/zram0", "is a built-in disk"),
        ("usb-system", "/dev/sda", "is the system disk: it holds /boot/firmware (/dev/sda1), / (/dev/mapper/root)"),
        ("usb-system", "/dev/mmcblk1boot0", "is an eMMC's boot area"),
        ("virtual-machine", "/dev/vda", "is the system disk"),
    ],
)
def test_a_disk_is_refused_and_the_reason_named(name, device, reason):
    assert any(reason in each for each in block_devices.refusals(disk(name, device)))
    with pytest.raises(DiskError, match="is refused: it "):
        block_devices.check(disk(name, device))


@pytest.mark.parametrize(
    ("name", "device"),
    [("laptop", "/dev/sdb"), ("laptop", "/dev/mmcblk0"), ("raspberry-pi", "/dev/sda"), ("usb-system", "/dev/mmcblk1")],
)
def test_a_card_may_be_written(name, device):
    block_devices.check(disk(name, device))


def test_each_reason_goes_away_with_its_cause():
    """Control: nothing but what is named makes these disks refused."""
    stick = disk("laptop", "/dev/sda")
    free = dataclasses.replace(stick, nodes=tuple(dataclasses.replace(each, mounts=()) for each in stick.nodes))
    assert block_devices.refusals(free) == ()
    assert block_devices.refusals(free, system=frozenset({"8:1"}))  # by number, where lsblk shows no mount
    for device in ("/dev/sdd", "/dev/sde", "/dev/sdf"):
        found = disk("server", device)
        blank = tuple(dataclasses.replace(each, mounts=(), filesystem="vfat") for each in found.nodes)
        assert block_devices.refusals(dataclasses.replace(found, nodes=blank)) == ()
    assert block_devices.refusals(disk("server", "/dev/sdg"), Rules(most_bytes=5 * 10**12)) == ()
    fixed = dataclasses.replace(free, removable=False, hotplug=False, transport="", subsystems=("block", "scsi", "pci"))
    assert "is a built-in disk" in block_devices.refusals(fixed)[0]


def test_a_part_a_file_and_nothing_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for path, says in (
        ("/dev/sdb1", "is a part of /dev/sdb"),
        (str(tmp_path / "file"), "give it as --to-file"),
        ("/dev/none", "there is no disk /dev/none"),
    ):
        with pytest.raises(DiskError, match=says):
            block_devices.find(record("laptop"), path)


def test_this_machines_lsblk_has_the_columns_of_the_records_and_its_root_is_refused():
    """The judge of the records is lsblk itself; that a card in a slot is named by sysfs is shown on a folder that stands for it."""
    program("lsblk", "--version")
    listing = block_devices._lsblk()
    read = {
        "path",
        "type",
        "fstype",
        "mountpoints",
        "maj:min",
        "size",
        "vendor",
        "model",
        "serial",
        "tran",
        "subsystems",
    }
    for entry in listing["blockdevices"]:
        assert (read | {"rm", "hotplug", "ro"}) <= {*entry}
    system = block_devices.system_numbers()
    for found in block_devices.listed():
        if any("/" in node.mounts or node.number in system for node in found.nodes):
            assert any("is the system disk" in each for each in block_devices.refusals(found, Rules(), system))


def test_a_card_in_a_slot_gets_its_name_from_sysfs(tmp_path):
    folder = tmp_path / "block" / "mmcblk0" / "device"
    folder.mkdir(parents=True)
    (folder / "name").write_text("SC32G\x1b[2J\n")
    found = block_devices.listed(lambda: json.loads((RECORDS / "laptop.json").read_text()), tmp_path)
    assert block_devices.find(found, "/dev/mmcblk0").name == "SC32G?[2J"


@pytest.mark.parametrize("listing", [{}, {"blockdevices": 3}, {"blockdevices": [{"children": 7}]}, [], None])
def test_a_listing_that_is_none_is_one_line(listing):
    with pytest.raises(block_devices.ListingError, match="util-linux 2.33"):
        block_devices.disks_of(listing)


def test_the_serial_confirms(capsys):
    cards = (disk("laptop", "/dev/sdb"), disk("usb-system", "/dev/mmcblk1"))

    def confirm(*yes: str) -> None:
        cli_flash._confirm(cli.parser().parse_args(["flash", *(f"--yes={each}" for each in yes)]), cards, [None, None])

    confirm("000000001536", "0x51d2e3a1")
    for wrong in (("000000001536",), ("000000001536", "0x51d2e3a2"), ("000000001536", "0x51d2e3a1", "4C530001")):
        with pytest.raises(cli_flash.UsageError, match="--yes"):
            confirm(*wrong)
    bare = dataclasses.replace(cards[0], serial="")
    with pytest.raises(cli_flash.UsageError, match="no serial number"):
        cli_flash._confirm(cli.parser().parse_args(["flash", "--yes", ""]), (bare,), [None])


@pytest.mark.parametrize(
    ("typed", "good"),
    [("1536", True), ("000000001536", True), ("no\n1536", True), ("", False), ("y", False), ("yes\nyes\nyes", False)],
)
def test_a_person_types_the_end_of_the_serial(typed, good, monkeypatch, capsys):
    ours, theirs = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(theirs, "r"))
    os.write(ours, (typed + "\n\n").encode())
    args = cli.parser().parse_args(["flash"])
    card = disk("laptop", "/dev/sdb")
    try:
        if good:
            cli_flash._confirm(args, (card,), [None])
        else:
            with pytest.raises(cli_flash.UsageError, match="/dev/sdb was not confirmed: nothing was written"):
                cli_flash._confirm(args, (card,), [None])
        assert "Generic STORAGE DEVICE" in capsys.readouterr().err
    finally:
        sys.stdin.close()
        os.close(ours)


def test_without_a_terminal_nobody_is_asked(monkeypatch):
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(cli_flash.UsageError, match="there is no terminal: give --yes"):
            cli_flash._confirm(cli.parser().parse_args(["flash"]), (disk("laptop", "/dev/sdb"),), [None])


def test_disks_are_listed_with_the_reasons(capsys, image):
    program("lsblk", "--version")
    code, out, _ = run(capsys, "--list", "--json")
    shown = {row["device"]: row["refused"] for row in json.loads(out)["disks"]}
    there = {each.path for each in block_devices.listed() if each.type == "disk"}  # loop devices come and go
    assert code == 0 and {path for path in shown if path in there} == there
    code, out, error = run(capsys, image)
    assert (
        code == 2 and "no DEVICE is named: spacemoe flash" in error and max(map(len, out.splitlines()), default=0) <= 80
    )


# images


@pytest.fixture(scope="module")
def packed(image):
    """packed(kind, folder) -> a copy of the image as the real programs pack it, also in the ways that hide its size."""
    made: dict[str, Path] = {}

    def copy(kind: str, folder: Path) -> Path:
        if kind not in made:
            made[kind] = pack_image(image, kind, image.parent / kind)
        return Path(shutil.copy(made[kind], folder))

    return copy


def pack_image(image: Path, kind: str, folder: Path) -> Path:
    folder.mkdir()
    path = folder / f"{image.name}.{kind.partition('-')[0]}"
    data = image.read_bytes()
    half = len(data) // 2 // 4096 * 4096

    def one(name: str, *options: str, part: bytes) -> bytes:
        found = shutil.which(name) or lacking(name, f"apt-get install {PACKAGES.get(name, name)}")
        return subprocess.run([found, *options], input=part, stdout=subprocess.PIPE, check=True, timeout=60).stdout

    if kind == "xz":
        path.write_bytes(one("xz", "-0", "--block-size=1MiB", "-c", part=data))
    elif kind == "xz-two":  # two streams with padding between, other checks
        streams = one("xz", "-0", "-c", part=data[:half]), one("xz", "-0", "-C", "crc32", "-c", part=data[half:])
        path.write_bytes(streams[0] + bytes(8) + streams[1] + bytes(4))
    elif kind == "zst":
        program("zstd", "-q", "-1", image, "-o", path)
    elif kind == "zst-pipe":  # the frame's header does not say the size
        path.write_bytes(one("zstd", "-q", "-1", "-c", part=data))
    elif kind == "zst-two":  # two frames and one to skip
        path.write_bytes(b"")
        for number, part in enumerate((data[:half], data[half:])):
            piece = folder / f"piece{number}"
            piece.write_bytes(part)
            program("zstd", "-q", "-1", piece, "-o", f"{piece}.zst")
            with open(path, "ab") as file:
                file.write(Path(f"{piece}.zst").read_bytes() + b"\x5a\x2a\x4d\x18\x03\0\0\0abc")
    elif kind == "gz-two":
        path.write_bytes(one("gzip", "-1", "-c", part=data[:half]) + one("gzip", "-1", "-c", part=data[half:]))
    return path


KINDS = ("xz", "xz-two", "zst", "zst-pipe", "zst-two", "gz-two")


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_image_says_its_size_and_is_written_whole(kind, image, packed, tmp_path):
    path = packed(kind, tmp_path)
    counted = []
    source = image_source.look(path, progress=lambda done, total: counted.append(done))
    assert source.bytes == IMAGE_BYTES and source.raw_name == image.name
    assert bool(counted) == (kind in ("zst-pipe", "gz-two"))  # the others say it without being read through
    if kind.startswith("xz"):
        totals = program("xz", "--robot", "--list", path).splitlines()[-1].split("\t")
        assert totals[0] == "totals" and int(totals[4]) == source.bytes
    job = onto(tmp_path / "card")
    done = written(source, (job,))
    assert done.outcomes[0].error is None and same(image, job.target.path, f"--bytes={IMAGE_BYTES}")
    assert done.sha256 == program("sha256sum", path).split()[0]
    assert done.outcomes[0].read_back in (flash_card.DIRECT, flash_card.DROPPED)


@pytest.mark.parametrize("kind", ("raw", "xz", "zst", "zst-pipe", "gz-two"))
def test_a_too_large_image_is_refused_before_a_byte_is_written(kind, image, packed, tmp_path, capsys):
    path = image if kind == "raw" else packed(kind, tmp_path)
    card = tmp_path / "card"
    card.write_bytes(b"\xff" * (IMAGE_BYTES - 512))
    os.utime(card, ns=(1, 1))
    code, out, error = run(capsys, path, "--to-file", card, "--force")
    assert code == 2 and "does not fit" in error and error.count("\n") == 1 and out == ""
    assert card.stat().st_mtime_ns == 1 and card.read_bytes() == b"\xff" * (IMAGE_BYTES - 512)
    with pytest.raises(ImageTooLarge):  # the writer refuses by itself, too
        flash.planned(image_source.look(path), (Job(Target(card, IMAGE_BYTES - 512)),))
    assert card.stat().st_mtime_ns == 1
    if kind == "raw":  # control: 512 bytes more, and it fits
        card.write_bytes(bytes(IMAGE_BYTES))
        assert run(capsys, path, "--to-file", card, "--force")[0] == 0 and same(image, card)


@pytest.mark.parametrize("kind", ("xz", "zst", "zst-pipe", "gz-two"))
def test_a_truncated_image_is_refused_before_a_byte_is_written(kind, image, packed, tmp_path):
    path = packed(kind, tmp_path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)
    with pytest.raises(ImageError, match="truncated or damaged"):
        image_source.look(path)


@pytest.mark.parametrize("kind", ("xz", "zst"))
def test_a_damaged_stream_leaves_a_card_that_does_not_boot(kind, image, packed, tmp_path):
    path = packed(kind, tmp_path)
    if kind == "zst":  # its checksum is at the end of the frame; xz has one in each block
        with open(path, "r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(b"damaged")
    else:
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size * 9 // 10)
            file.write(b"damaged")
    source, job = image_source.look(path), onto(tmp_path / "card")  # the tables still hold
    with pytest.raises(ImageError, match="truncated or damaged after"):
        written(source, (job,))
    assert unbootable(job.target.path)


def test_a_stream_that_lies_about_its_size_is_an_error(image, packed, tmp_path):
    """The frame's header says one sector less than comes out."""
    path = packed("zst", tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(IMAGE_BYTES.to_bytes(4, "little"), 0, 32)
    data[at : at + 4] = (IMAGE_BYTES - 512).to_bytes(4, "little")
    path.write_bytes(data)
    source, job = image_source.look(path), onto(tmp_path / "card")
    assert source.bytes == IMAGE_BYTES - 512
    with pytest.raises(ImageError, match="damaged|announces"):
        written(source, (job,))
    assert unbootable(job.target.path)


def test_what_is_no_image_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.img")
    for name, data, says in (
        ("a.img", b"", "is empty"),
        ("b.img", b"PK\x03\x04" + bytes(508), "zip archive"),
        ("c.img", bytes(700), "no whole number of sectors"),
        ("d.img.xz", bytes(512), "is not compressed so"),
        ("e.img.xz", b"\xfd7zXZ\x00" + bytes(506), "index does not hold"),
        ("f.img.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 508, "frames do not end"),
        ("pipe.img", None, "no plain file"),
        ("none.img", None, "No such file"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=says):
            image_source.look(tmp_path / name)


def test_the_sha256_beside_an_image_is_compared(image, packed, tmp_path, capsys):
    path = packed("zst", tmp_path)
    card, sidecar = tmp_path / "card", tmp_path / (path.name + ".sha256")
    for target in (path, image):  # sha256sum's own lines: of the file as it lies there, or of the raw image
        sidecar.write_text(program("sha256sum", target.name, cwd=target.parent))
        assert run(capsys, path, "--to-file", card, "--force")[0] == 0
    sidecar.write_text(sidecar.read_text().replace(image.name, "other.img"))
    code, _, error = run(capsys, path, "--to-file", card, "--force")
    assert code == 2 and "0 checksums" in error and not unbootable(card)  # refused before a byte
    sidecar.unlink()
    code, _, error = run(capsys, path, "--to-file", card, "--force", "--sha256", "0" * 64)
    assert code == 3 and "as announced" in error and unbootable(card)
    assert run(capsys, path, "--to-file", card, "--force", "--sha256", "f00")[0] == 2


# writing and reading back


def test_one_flipped_byte_is_found(image, tmp_path):
    """Another process flips one byte of one card after it was flushed; the other card is the control."""
    jobs = (onto(tmp_path / "bad"), onto(tmp_path / "good"))
    at = 8 * MB + 123456

    def show(step: flash.Step) -> None:
        if step == flash.Step(0, flash.VERIFY, 0, IMAGE_BYTES):
            old = image.read_bytes()[at]
            octal = f"\\{old ^ 1:03o}"
            flip = f"printf '{octal}' | dd of={tmp_path / 'bad'} bs=1 seek={at} conv=notrunc status=none"
            subprocess.run(["sh", "-c", flip], check=True, timeout=30)

    bad, good = flash.flash(flash.planned(image_source.look(image), jobs), show=show).outcomes
    assert isinstance(bad.error, flash.VerifyError) and good.error is None
    assert f"between byte {8 * MB} and {9 * MB}" in str(bad.error)
    assert unbootable(tmp_path / "bad") and same(image, tmp_path / "good", f"--bytes={IMAGE_BYTES}")


def test_where_the_cache_cannot_be_gone_past_it_is_dropped(tmp_path):
    """The way of file systems without O_DIRECT, also on one that has it."""
    path, data = tmp_path / "card", os.urandom(6 * MB)
    with flash_card.Card(Target(path, 6 * MB), 6 * MB) as card:
        card.write(0, data)
        card.read(0, 512)
        if card._direct is not None:
            os.close(card._direct)
        card._direct, card.read_back = None, flash_card.DROPPED
        for offset, count in ((0, 4 * MB), (4 * MB + 512, 1000), (6 * MB - 512, 512)):
            assert card.read(offset, count) == data[offset : offset + count]
        with pytest.raises(flash.VerifyError, match="ends at byte"):
            os.truncate(path, 5 * MB)
            card.read(4 * MB, 2 * MB)


def test_what_cannot_be_had_alone_leaves_every_card_as_it_was(image, tmp_path):
    jobs = (onto(tmp_path / "free"), onto(tmp_path / "held"))
    holder = subprocess.Popen(["flock", tmp_path / "held", "sh", "-c", "echo; exec sleep 30"], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(flash.FlashError, match="held is being written by another program"):
            written(image_source.look(image), jobs)
        assert all(job.target.path.read_bytes() == b"\xff" * CARD_BYTES for job in jobs)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_signal_leaves_a_card_that_does_not_boot(tmp_path):
    """Real processes are stopped in the middle: the image has 4 GB, most of it a hole."""
    path = tmp_path / "large.img"
    with open(path, "wb") as file:
        file.write(b"\xaa" * (2 * HEAD_BYTES))
        file.truncate(4 << 30)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    wanted = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    children = {}
    try:
        for number in wanted:
            card = tmp_path / number.name
            command = [sys.executable, "-m", "ground_station.cli", "flash", path, "--to-file", card, "--force"]
            children[number] = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
            )
        for number, child in children.items():
            card, begun, deadline = tmp_path / number.name, b"", time.monotonic() + 60
            while begun != b"\xaa" and time.monotonic() < deadline and child.poll() is None:
                time.sleep(0.02)
                if card.exists():
                    with open(card, "rb") as file:
                        file.seek(HEAD_BYTES)
                        begun = file.read(1)
            assert begun == b"\xaa" and child.poll() is None, number  # control: it was in the middle
            child.send_signal(number)
        for number, child in children.items():
            _, error = child.communicate(timeout=60)
            assert child.returncode == wanted[number] and unbootable(tmp_path / number.name), (number, error)
            if number != signal.SIGKILL:
                assert b"does not boot: start again" in error and b"Traceback" not in error
    finally:
        for child in children.values():
            child.kill()
            child.communicate()


def test_the_former_content_has_no_partition_table_left(image, tmp_path):
    """A GPT's second copy at the end goes away, what is between stays."""
    job = onto(tmp_path / "card")
    written(image_source.look(image), (job,))
    left = job.target.path.read_bytes()
    assert left[11 * MB :] == bytes(MB) and left[IMAGE_BYTES : 11 * MB] == b"\xff" * (2 * MB)


def test_a_dry_run_writes_nothing(image, tmp_path, capsys):
    card = tmp_path / "card"
    code, out, _ = run(capsys, image, "--to-file", card, "--dry-run")
    assert code == 0 and "this was a dry run" in out and not card.exists()
    facts = json.loads(run(capsys, image, "--to-file", card, "--dry-run", "--json")[1])
    assert facts["write_bytes"] == IMAGE_BYTES and not card.exists()


# block maps


@pytest.fixture(scope="module")
def mapped(image) -> Path:
    path = image.with_name(image.name + ".bmap")
    program("bmaptool", "create", image, "-o", path)
    yield path
    path.unlink()


def test_a_block_map_writes_what_bmaptool_writes(image, mapped, tmp_path):
    judge, card = tmp_path / "judge", tmp_path / "card"
    program("bmaptool", "copy", "--bmap", mapped, image, judge)
    card.write_bytes(bytes(HOLE) + b"\xee" * MB + bytes(CARD_BYTES - HOLE_END))
    found = bmap.read(bmap.beside(image))
    done = written(image_source.look(image), (Job(Target(card, CARD_BYTES)),), found)
    assert done.outcomes[0].error is None and done.outcomes[0].written_bytes == found.mapped_bytes == 8 * MB
    assert not same(judge, card, f"--bytes={IMAGE_BYTES}")  # the hole is not written
    with open(card, "r+b") as file:
        file.seek(HOLE)
        assert file.read(MB) == b"\xee" * MB
        file.seek(HOLE)
        file.write(bytes(MB))
    assert same(judge, card, f"--bytes={IMAGE_BYTES}") and same(image, judge)


def test_an_image_that_its_block_map_does_not_fit_does_not_boot(image, mapped, tmp_path):
    other = tmp_path / "other.img"
    shutil.copy(image, other)
    with open(other, "r+b") as file:
        file.seek(8 * MB)
        file.write(b"X")
    job = onto(tmp_path / "card")
    with pytest.raises(DigestError, match=f"between byte {HOLE_END} and {IMAGE_BYTES}"):
        written(image_source.look(other), (job,), bmap.read(mapped))
    assert unbootable(job.target.path)
    os.truncate(other, 8 * MB)
    with pytest.raises(ImageError, match="the block map is of an image of"):
        written(image_source.look(other), (job,), bmap.read(mapped))


def map_of_what_is_not_zero(image: Path) -> bytes:
    """A block map that leaves out every block of zeros, also those that a file system has in use."""
    data, block = image.read_bytes(), 4096
    numbers = [at // block for at in range(0, len(data), block) if data[at : at + block] != bytes(block)]
    ranges = "".join(
        f'<Range chksum="{hashlib.sha256(data[n * block : (n + 1) * block]).hexdigest()}"> {n} </Range>'
        for n in numbers
    )
    text = (
        f'<bmap version="2.0"><ImageSize> {len(data)} </ImageSize><BlockSize> {block} </BlockSize>'
        f"<BlocksCount> {len(data) // block} </BlocksCount><MappedBlocksCount> {len(numbers)} </MappedBlocksCount>"
        f"<ChecksumType> sha256 </ChecksumType><BmapFileChecksum> {'0' * 64} </BmapFileChecksum>"
        f"<BlockMap>{ranges}</BlockMap></bmap>"
    )
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1).encode()


def fsck(card: Path, folder: Path) -> int:
    part = folder / "part"
    with open(card, "rb") as file:
        file.seek(FAT_START)
        part.write_bytes(file.read(3 * MB))
    return subprocess.run(["fsck.vfat", "-n", part], capture_output=True, timeout=60).returncode


def test_what_a_fat_has_in_use_is_written_whatever_the_map_says(fat_image, tmp_path):
    """Blocks of zeros in a file and in the table of clusters; fsck.vfat and mtools are the judges, on a card of 0xff."""
    path, file = tmp_path / "zeros.img", tmp_path / "zeros"
    shutil.copy(fat_image(FAT_START), path)
    file.write_bytes(b"a" + bytes(300_000) + b"z")
    program("mcopy", "-i", f"{path}@@{FAT_START}", file, "::/zeros")
    (tmp_path / "map").write_bytes(map_of_what_is_not_zero(path))
    job, source, found = onto(tmp_path / "card"), image_source.look(path), bmap.read(tmp_path / "map")

    def holds() -> tuple[bool, bool]:
        program("mcopy", "-n", "-o", "-i", f"{job.target.path}@@{FAT_START}", "::/zeros", tmp_path / "back")
        return fsck(job.target.path, tmp_path) == 0, same(file, tmp_path / "back")

    done = written(source, (job,), found)
    assert done.outcomes[0].error is None and done.outcomes[0].written_bytes < IMAGE_BYTES * 2 // 3 and all(holds())
    onto(job.target.path)  # control: by the map alone, file and table have 0xff in them
    flash.flash(dataclasses.replace(flash.planned(source, (job,), found), ranges=found.ranges))
    assert holds() == (False, False)


@pytest.mark.parametrize(("bits", "sectors"), [(16, 6144), (32, 68_000)])
def test_the_clusters_in_use_are_those_that_fsck_counts(bits, sectors, tmp_path):
    path, part = tmp_path / "image", tmp_path / "part"
    with open(part, "wb") as file:
        file.truncate(sectors * 512)
    program("mkfs.vfat", "-F", bits, "-s", "1", part)
    (tmp_path / "file").write_bytes(bytes(300_000))
    program("mcopy", "-i", part, tmp_path / "file", "::/one")
    program("mcopy", "-i", part, tmp_path / "file", "::/two")
    program("mdel", "-i", part, "::/one")  # used clusters are not the first ones
    with open(path, "wb") as file:
        file.write(bytes(MB))
        file.truncate(MB + sectors * 512)
    program("sfdisk", "-q", path, input=b"label: dos\nstart=2048,type=c\n")
    program("dd", f"if={part}", f"of={path}", "bs=1M", "seek=1", "conv=notrunc,sparse")
    counted = int(program("fsck.vfat", "-n", part).split("files, ")[1].split("/")[0])
    front = flash_front.look_at_front(image_source.look(path))
    assert front.fat.offset_bytes == front.used[0][0] == MB
    begin = next(start for start, end in front.used[1:] if end - start >= 300_000)
    assert begin > MB + 300_000
    tables = front.used[0][1] - MB - (512 if bits == 32 else 0)  # the root folder of FAT32 is a cluster
    assert sum(end - start for start, end in front.used) - tables == counted * 512


def test_data_that_a_block_map_leaves_out_is_found(image, mapped, tmp_path):
    """An image to which something was added where its map says that there is nothing."""
    other = tmp_path / "other.img"
    shutil.copy(image, other)
    with open(other, "r+b") as file:
        file.seek(HOLE + 1000)
        file.write(b"X")
    job = onto(tmp_path / "card")
    with pytest.raises(DigestError, match="that its block map leaves out"):
        written(image_source.look(other), (job,), bmap.read(mapped))
    assert unbootable(job.target.path)


def test_a_damaged_block_map_is_refused(mapped):
    raw = mapped.read_bytes()
    assert bmap.parse(raw).ranges[0].bytes == HOLE  # control
    for old, new in ((b" 0-", b" 1-"), (b'chksum="', b'chksum="0'), (b"<BlockSize> ", b"<BlockSize> 1")):
        assert old in raw
        with pytest.raises(ImageError, match="its own checksum does not hold"):
            bmap.parse(raw.replace(old, new, 1))
    for wrong, says in (
        (b"", "no XML"),
        (b"<bmap/>", "no block map of version"),
        (b"<!DOCTYPE x>" + raw, "document type"),
        ("<?xml version='1.0' encoding='utf-16'?><!DOCTYPE x><x/>".encode("utf-16"), "document type"),
        (b"<bmap>" * 1_000_000, "nested deeper"),
        (b"<bmap " + b" ".join(b'a%d=""' % each for each in range(700_000)) + b"/>", "a tag or text of over"),
        (b"<bmap>" + b"<a/>" * 1_500_000, "over 200000 elements"),
    ):
        with pytest.raises(ImageError, match=says):
            bmap.parse(wrong)


# packs


@pytest.mark.parametrize("start", (FAT_START, MB))
def test_each_card_becomes_its_node(start, fat_image, tmp_path, capsys):
    """With the FAT behind the head and within it; mtools is the judge."""
    path, packs = fat_image(start), tmp_path / "packs"
    for node in ("sat-1", "sat-2"):
        pack(packs, node)
    cards = [tmp_path / "one", tmp_path / "two"]
    code, out, error = run(capsys, path, "--packs", packs, *(f"--to-file={card}" for card in cards))
    assert code == 0 and TOKEN not in out + error and "sat-2 of lab" in out
    for card, node in zip(cards, ("sat-1", "sat-2")):
        where = f"{card}@@{start}"
        assert f'id = "{node}"' in program("mcopy", "-n", "-i", where, "::/spacemoe/spacemoe.toml", "-")
        assert program("mcopy", "-n", "-i", where, "::/spacemoe/claim", "-") == TOKEN + "\n"
        assert "claim" not in program("mdir", "-b", "-i", f"{path}@@{start}", "::/")  # control
        assert same(path, card, f"--bytes={start}")
    code, _, error = run(capsys, path, "--packs", packs, "--to-file", cards[0], "--force")
    assert code == 2 and "0 unused packs" in error
    code, _, error = run(capsys, path, "--pack", packs / "sat-1", "--to-file", cards[0], "--force")
    assert code == 2 and "its claim works once" in error
    assert f"on {cards[0]} (virtual card) at" in error
    assert run(capsys, path, "--pack", packs / "sat-1", "--to-file", cards[0], "--again", "--force")[0] == 0


def test_packs_of_nodes_that_have_enrolled_or_are_revoked_are_left_out(fat_image, tmp_path, capsys):
    """The packs and records are those that the commands make; only the state of sat-1 is set as a claim leaves it."""
    path, lab, card = fat_image(FAT_START), tmp_path / "lab", tmp_path / "card"
    folder = FleetFolder.create(lab, "lab", ["ground.local"])
    for node in ("sat-1", "sat-2", "sat-3"):
        assert cli.main(["fleet", "add", node, "--board", "pi4", "--dir", str(lab)]) == 0
    with folder.change("sat-1") as record:
        folder.write(dataclasses.replace(record, state="enrolled", token_sha256=""))
    claim = (lab / "packs/sat-2/claim").read_text()
    assert cli.main(["fleet", "revoke", "sat-2", "--dir", str(lab), "--yes"]) == 0
    assert not (lab / "packs/sat-2").exists() and (lab / "packs/sat-3/claim").exists()
    capsys.readouterr()
    code, out, error = run(capsys, path, "--packs", lab / "packs", "--to-file", card)
    assert code == 0 and "sat-3 of lab" in out and "sat-1 of lab" not in out
    said = " ".join(error.split())
    assert f"left out: sat-1 has enrolled: `spacemoe fleet add sat-1 --board pi4 --again --dir {lab}`" in said
    code, _, error = run(capsys, path, "--packs", lab / "packs", "--again", "--to-file", card, "--force")
    assert code == 0  # sat-3's, a second time; control for what follows
    (lab / "packs/sat-3").rename(tmp_path / "sat-3")
    code, _, error = run(capsys, path, "--packs", lab / "packs", "--again", "--to-file", card, "--force")
    assert code == 2 and "0 unused packs" in error
    code, _, error = run(capsys, path, "--pack", lab / "packs/sat-1", "--to-file", card, "--force")
    assert code == 2 and "sat-1 has enrolled: `spacemoe fleet add" in error
    assert run(capsys, path, "--pack", lab / "packs/sat-1", "--again", "--to-file", card, "--force")[0] == 0
    (lab / "packs/sat-2").mkdir()  # a pack that was put back, as from a backup
    for name, text in (("claim", claim), ("ca.pem", "x"), ("spacemoe.toml", "[node]")):
        (lab / "packs/sat-2" / name).write_text(text)
    code, _, error = run(capsys, path, "--pack", lab / "packs/sat-2", "--to-file", card, "--force")
    assert code == 2 and "sat-2 is revoked: `spacemoe fleet add" in error


def test_another_name_of_the_image_is_refused_and_a_virtual_card_is_its_owners_alone(image, tmp_path, capsys):
    own, other, card = tmp_path / "own.img", tmp_path / "other", tmp_path / "card"
    shutil.copyfile(image, own)
    os.link(own, other)
    before = own.read_bytes()
    code, _, error = run(capsys, own, "--to-file", other, "--force")
    assert code == 2 and "is the image itself" in error and own.read_bytes() == before
    other.unlink()
    card.write_bytes(b"")
    card.chmod(0o644)
    assert run(capsys, own, "--to-file", card)[0] == 0 and same(own, card)
    assert card.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_there_and_an_image_without_a_table_need_force(image, tmp_path, capsys):
    card, bare = tmp_path / "card", tmp_path / "bare.img"
    card.write_bytes(b"\xff" * IMAGE_BYTES)
    code, _, error = run(capsys, image, "--to-file", card)
    assert code == 2 and "exists and would be written over" in error and "--force" in error
    assert card.read_bytes() == b"\xff" * IMAGE_BYTES
    assert run(capsys, image, "--to-file", card, "--no-bmap", "--force")[0] == 0 and same(image, card)
    card.write_bytes(b"")  # as mktemp leaves it: nothing is lost
    assert run(capsys, image, "--to-file", card, "--no-bmap")[0] == 0 and same(image, card)
    with open(bare, "wb") as file:
        file.truncate(MB)
    program("mkfs.vfat", "-F", "12", bare)  # has 55 AA, and boot code where a table would be
    for data in (bare.read_bytes(), os.urandom(510) + bytes(2), bytes(510) + b"\x55\xaa"):
        bare.write_bytes(data + bytes(MB - len(data)))
        code, _, error = run(capsys, bare, "--to-file", tmp_path / "new")
        assert code == 2 and "has no partition table" in error and not (tmp_path / "new").exists()
    assert run(capsys, bare, "--to-file", tmp_path / "new", "--force")[0] == 0


def test_a_missing_zstandard_is_named_with_what_brings_it(packed, tmp_path, capsys, monkeypatch):
    path = packed("zst", tmp_path)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    code, _, error = run(capsys, path, "--to-file", tmp_path / "card")
    assert code == 1 and "pip install 'spacemoe-kit[hardware]'" in error and not (tmp_path / "card").exists()


def test_a_pack_that_another_run_has_is_refused(fat_image, tmp_path, capsys):
    given = pack(tmp_path / "packs")
    handle = os.open(given, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        code, _, error = run(capsys, fat_image(FAT_START), "--to-file", tmp_path / "card", "--pack", given)
        assert code == 2 and "another run" in error and not (tmp_path / "card").exists()
    finally:
        os.close(handle)
    assert run(capsys, fat_image(FAT_START), "--to-file", tmp_path / "card", "--pack", given)[0] == 0


def test_a_card_that_does_not_take_its_pack_does_not_boot(fat_image, tmp_path, capsys):
    full, start = tmp_path / "full.img", FAT_START
    shutil.copy(fat_image(start), full)
    room = int(
        program("mdir", "-i", f"{full}@@{start}", "::/").split("bytes free")[0].splitlines()[-1].replace(" ", "")
    )
    (tmp_path / "filler").write_bytes(bytes(room - 4096))
    program("mcopy", "-i", f"{full}@@{start}", tmp_path / "filler", "::/")
    card, folder = tmp_path / "card", pack(tmp_path / "packs")
    code, _, error = run(capsys, full, "--pack", folder, "--to-file", card)
    assert code == 1 and "does not take the pack sat-1" in error and unbootable(card)
    assert not (folder / flash_pack.MARK).exists()


def test_a_pack_that_cannot_be_used_is_refused_before_a_byte_is_written(image, fat_image, tmp_path, capsys):
    card, good = tmp_path / "card", pack(tmp_path / "packs")
    assert "has no FAT partition" in run(capsys, image, "--pack", good, "--to-file", card)[2]
    path = fat_image(FAT_START)
    other = tmp_path / "other"
    for name, text, says in (
        ("claim", "short", "holds no claim token"),
        ("spacemoe.toml", "[node]\nid = 7", "does not say id, fleet and board"),
        ("spacemoe.toml", "[node", "cannot be read"),
        ("ca.pem", None, "it has no ca.pem"),
        ("sub dir", "", "files that are of no provision pack"),
    ):
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(good, other)
        (other / name).write_text(text) if text is not None else (other / name).unlink()
        code, _, error = run(capsys, path, "--pack", other, "--to-file", card)
        assert code == 2 and says in error and TOKEN not in error
    code, _, error = run(capsys, path, "--pack", good, "--pack", good, "--to-file", card, "--to-file", tmp_path / "b")
    assert code == 2 and "would be the same node" in error
    assert run(capsys, path, "--pack", good, "--to-file", card, "--to-file", tmp_path / "b")[0] == 2
    assert not card.exists() and TOKEN not in repr(flash_pack.read_pack(good))


def test_labels_fit_a_label_maker(tmp_path):
    lines = label(
        flash_pack.read_pack(pack(tmp_path)), "spacemoe-raspberry-pi-5-of-a-long-name.img", "ab" * 6, "2026-11-30"
    )
    assert lines == ("sat-1 of lab", "raspberry-pi-5", "spacemoe-raspberry-pi-5-of-a-lo~", "abababababab 2026-11-30")
    assert max(map(len, lines)) <= COLUMNS and label(None, "a", "b", "c")[0] == "no node identity"


# a real block device


@pytest.fixture
def loop(tmp_path):
    """A loop device and its file; needs root."""
    if os.geteuid() != 0 or shutil.which("losetup", path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
        pytest.skip("loop devices need root and losetup")
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xff" * CARD_BYTES)
    done = subprocess.run(["losetup", "--show", "-P", "-f", backing], capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"no loop device here: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield Path(device), backing
    subprocess.run(["losetup", "-d", device], check=True, timeout=30)


def test_a_block_device_is_written_and_a_mounted_one_is_not(loop, fat_image, tmp_path, capsys):
    device, backing = loop
    code, _, error = run(capsys, fat_image(FAT_START), device, "--yes", "none")
    assert code == 2 and "is a loop device" in error
    found = block_devices.find(block_devices.listed(), str(device))
    block_devices.check(found, Rules(loops=True))  # for this test alone
    job = Job(Target(device, found.bytes, found.number), flash_pack.read_pack(pack(tmp_path)))
    source = image_source.look(fat_image(FAT_START))
    outcome = written(source, (job,)).outcomes[0]
    assert outcome.error is None and outcome.read_back == flash_card.DIRECT and outcome.remark == ""
    assert same(source.path, backing, f"--bytes={FAT_START}")
    assert TOKEN in program("mcopy", "-n", "-i", f"{device}@@{FAT_START}", "::/spacemoe/claim", "-")
    with pytest.raises(flash.FlashError, match="is not the disk any more that was chosen"):
        written(source, (dataclasses.replace(job, target=Target(device, found.bytes, "7:999")),))

    program("mkfs.ext4", "-q", "-F", device)
    where = tmp_path / "mounted"
    where.mkdir()
    program("mount", device, where)
    try:
        before = backing.read_bytes()
        with pytest.raises(flash.FlashError, match="is in use"):
            written(source, (job,))
        os.close(os.open(device, os.O_RDWR))  # control: without O_EXCL the kernel lets it be written
        assert backing.read_bytes() == before
        found = block_devices.find(block_devices.listed(), str(device))
        assert f"is mounted at {where}: umount {device}" in block_devices.refusals(found, Rules(loops=True))
    finally:
        program("umount", where)
    assert written(source, (job,)).outcomes[0].error is None  # control: unmounted, it goes
