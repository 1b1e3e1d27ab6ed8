"""Small disk images with each vendor's layout (table, labels, identifying and first-boot files), for the tests of `image customize`.

No vendor's own image can be had here, so that what these lack is not tried: a kernel, a boot loader, services.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import struct
import subprocess
from pathlib import Path

from conftest import lacking

from hardware import base_kinds, customize, first_boot_files, partitions
from hardware.customize_plan import Settings

PROGRAMS = {
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
    "debugfs": "e2fsprogs",
    "sfdisk": "fdisk",
    "xz": "xz-utils",
    "zstd": "zstd",
    "busybox": "busybox-static",
}
MIB = 1024 * 1024
ROOT_MIB = 26
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIL7tY1vJr0Dq0s2v5kq2M3l9Xl3Jt6cQmJ2n0cE8uJ1M someone"
WLAN = first_boot_files.wlan("lab 2", "a passphrase", "DE")
TOKEN = "t" * 43
ELF_AARCH64 = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, 183, 1) + bytes(40)
UNITS = Path(customize.__file__).parent / "units"


def need_programs() -> None:
    """Skips where a program that makes or judges images is missing."""
    if "/usr/sbin" not in os.environ["PATH"].split(":"):
        os.environ["PATH"] += ":/usr/sbin:/sbin"
    for name, package in PROGRAMS.items():
        if shutil.which(name) is None:
            lacking(name, f"apt-get install {package}")


def sh(*argv: str, ok: tuple[int, ...] = (0,), send: bytes = b"", cwd: Path | None = None) -> str:
    done = subprocess.run(argv, input=send, capture_output=True, cwd=cwd, timeout=60)
    assert done.returncode in ok, (argv, done.stdout[-500:], done.stderr[-500:])
    return done.stdout.decode(errors="replace")


@dataclasses.dataclass
class Layout:
    """What identifies a kind of base. `fat_label` None: no FAT partition."""

    release: dict[str, str]
    fat_label: str | None
    fat_files: dict[str, str]
    mount: str | None = "/boot/firmware"
    root_label: str = "rootfs"
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    links: dict[str, str] = dataclasses.field(default_factory=dict)
    python: str = "3.11"
    gpt: bool = False
    fat_mib: int = 8
    """FAT32 needs 36 MiB at least; all vendors have it, one of the images here is enough."""


CMDLINE = "console=serial0,115200 root=PARTUUID=1b0a7ac4-02 rootfstype=ext4 rootwait quiet init=/usr/lib/raspberrypi-sys-mods/firstboot\n"
CLOUD = {
    "user-data": "#cloud-config\n",
    "meta-data": "dsmode: local\ninstance_id: base\n",
    "network-config": "network: {version: 2}\n",
}
DEBIAN = {"ID": "debian", "PRETTY_NAME": '"Debian GNU/Linux 12 (bookworm)"', "VERSION_CODENAME": "bookworm"}
TRIXIE = {"ID": "debian", "PRETTY_NAME": '"Debian GNU/Linux 13 (trixie)"', "VERSION_CODENAME": "trixie"}
UBUNTU = {"ID": "ubuntu", "PRETTY_NAME": '"Ubuntu 24.04.1 LTS"', "VERSION_CODENAME": "noble"}
RPI = {"etc/rpi-issue": "Raspberry Pi reference 2025-05-13\n"}
OWN_UNIT = base_kinds.FIRST_BOOT_UNIT.lstrip("/")
LAYOUTS = {
    "raspios-trixie": Layout(
        TRIXIE,
        "bootfs",
        {"cmdline.txt": CMDLINE, **CLOUD},
        files=RPI | {"etc/cloud/cloud.cfg": "\n"},
        python="3.13",
        fat_mib=36,
    ),
    "raspios-bookworm": Layout(DEBIAN, "bootfs", {"cmdline.txt": CMDLINE, "config.txt": "arm_64bit=1\n"}, files=RPI),
    "ubuntu": Layout(
        UBUNTU, "system-boot", CLOUD, root_label="writable", files={"etc/cloud/cloud.cfg": "\n"}, python="3.12"
    ),
    "debian-raspi": Layout(DEBIAN, "RASPIFIRM", {"sysconf.txt": "#hostname=rpi\n"}, root_label="RASPIROOT"),
    "jetson": Layout(
        UBUNTU | {"VERSION_CODENAME": "jammy"},
        None,
        {},
        None,
        "",
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0\n",
            "lib/systemd/system/nv-oem-config.target": "[Unit]\nConflicts=multi-user.target\n",
        },
        {"etc/systemd/system/default.target": "/lib/systemd/system/nv-oem-config.target"},
        "3.10",
        True,
    ),
    "spacemoe": Layout(TRIXIE, "SPACEMOE", {}, files={OWN_UNIT: "[Unit]\n", "opt/spacemoe/agent/x": ""}, python="3.13"),
}


def tree(folder: Path, layout: Layout) -> Path:
    """The root file system: usr-merged as all of them are, with the identifying files."""
    for path in ("etc/systemd/system", "usr/bin", "usr/lib/systemd/system", "root", "var/lib", "boot/firmware"):
        (folder / path).mkdir(parents=True)
    for name in ("bin", "lib"):
        (folder / name).symlink_to(f"usr/{name}")
    release = "".join(f"{name}={value}\n" for name, value in layout.release.items())
    (folder / "usr/lib/os-release").write_text(release)
    (folder / "etc/os-release").symlink_to("../usr/lib/os-release")
    fstab = "" if layout.mount is None else f"LABEL=x {layout.mount} vfat defaults 0 2\n"
    (folder / "etc/fstab").write_text("LABEL=root / ext4 defaults 0 1\n" + fstab)
    (folder / "etc/hosts").write_text("127.0.0.1 localhost\n127.0.1.1 raspberrypi\n")
    (folder / "etc/hostname").write_text("raspberrypi\n")
    (folder / "usr/bin/dash").write_bytes(ELF_AARCH64)
    (folder / "usr/bin/sh").symlink_to("dash")
    if layout.python:
        add_python(folder, layout.python)
    for path, text in layout.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    for path, target in layout.links.items():
        (folder / path).symlink_to(target)
    return folder


def add_python(folder: Path, version: str) -> None:
    """What shows that a system has a Python that the agent can run in."""
    for path in ("usr/bin", f"usr/lib/python{version}", "usr/lib/aarch64-linux-gnu"):
        (folder / path).mkdir(parents=True, exist_ok=True)
    (folder / f"usr/bin/python{version}").write_bytes(ELF_AARCH64)
    (folder / "usr/bin/python3").symlink_to(f"python{version}")
    (folder / f"usr/lib/python{version}/ssl.py").write_text("# as in libpython3-stdlib\n")
    (folder / "usr/lib/aarch64-linux-gnu/libstdc++.so.6.0.30").write_bytes(ELF_AARCH64)
    (folder / "usr/lib/aarch64-linux-gnu/libstdc++.so.6").symlink_to("libstdc++.so.6.0.30")


def no_packages(out: Path, status: bytes, codename: str) -> tuple[str, ...]:
    raise AssertionError("the base has all packages")


def base_image(image: Path, layout: Layout, root_mib: int = ROOT_MIB, inodes: int = 1000) -> Path:
    root = tree(image.parent / f"{image.name}.tree", layout)
    fat_mib = layout.fat_mib if layout.fat_label else 0
    with open(image, "wb") as file:
        file.truncate((1 + fat_mib + root_mib + 1) * MIB)
    at = (1 + fat_mib) * MIB
    if layout.gpt:
        script = f"label: gpt\nstart=1MiB, size={root_mib}MiB, name=APP\n"
    else:
        script = f"label: dos\nstart=1MiB, size={fat_mib}MiB, type=c\nsize={root_mib}MiB, type=83\n"
    sh("sfdisk", "-q", str(image), send=script.encode())
    if layout.fat_label:
        width = "32" if fat_mib >= 36 else "16"
        mkfs = ["mkfs.vfat", "-F", width, "-s", "1", "-n", layout.fat_label, "--offset", "2048", str(image)]
        sh(*mkfs, str(fat_mib * 1024))
        for name, text in layout.fat_files.items():
            sh("mcopy", "-i", f"{image}@@{MIB}", "-", f"::/{name}", send=text.encode())
    extra = ["-L", layout.root_label] if layout.root_label else []
    sh(
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        *extra,
        *("-J", "size=1", "-N", str(inodes), "-d"),
        str(root),
        "-E",
        f"root_owner=0:0,offset={at}",
        str(image),
        f"{root_mib}M",
    )
    shutil.rmtree(root)
    return image


def make_pack(folder: Path, node: str, board: str) -> Path:
    folder.mkdir()
    (folder / "spacemoe.toml").write_text(f'[node]\nid = "{node}"\nfleet = "bench"\nboard = "{board}"\n')
    (folder / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    (folder / "claim").write_text(f"{TOKEN}\n")
    return folder


def small_payload(out: Path, python: str) -> None:
    """The kit's own units and launcher, and a package with an extension module's size; building the real one needs an index."""
    for name, where in (
        ("spacemoe-first-boot.service", "etc/systemd/system"),
        ("spacemoe-agent.service", "etc/systemd/system"),
        ("node-agent", "usr/bin"),
    ):
        (out / where).mkdir(parents=True, exist_ok=True)
        shutil.copy(UNITS / name, out / where / name)
    (out / "usr/bin/node-agent").chmod(0o755)
    wants = out / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    for name in ("spacemoe-first-boot.service", "spacemoe-agent.service"):
        (wants / name).symlink_to(f"/etc/systemd/system/{name}")
    package = out / "opt/spacemoe/agent/package"
    package.mkdir(parents=True)
    for index in range(12):
        (package / f"module_{index}.py").write_text(f"python = {python!r}\n" * index)
    (package / "native.so").write_bytes(bytes(range(256)) * 4000)


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def made(
    base: Path, pack: Path, out: Path, payload=small_payload, packages=no_packages, **settings
) -> customize.Report:
    return customize.customize(base, pack, out, Settings(**settings), payload, packages)


def root_of(image: Path) -> tuple[str, int]:
    part = partitions.read_table(image).partitions[-1]
    return f"{image}?offset={part.start_bytes}", part.start_bytes


def cat(image: Path, path: str) -> str:
    return sh("debugfs", "-R", f"cat {path}", root_of(image)[0])


def fat_text(image: Path, path: str) -> str:
    return sh("mtype", "-i", f"{image}@@{MIB}", f"::{path}")
