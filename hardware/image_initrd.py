"""The initial RAM disk: busybox, the modules that reach the root file system, and a script that mounts it.

Debian's kernel has the disk drivers and ext4 as modules, so there must be one; Debian's own way of making it takes ten minutes
emulated. Modules are unpacked here, put in the order that their dependencies want, and loaded one after another; what fails to
load belongs to another board. Same inputs, same bytes.
Leaves out: roots on USB disks, encrypted roots, LVM, RAID, roots on a network, udev (it starts on the root file system).
"""

from __future__ import annotations

import io
import lzma
import re
from pathlib import Path

WANTED = (
    # file systems; ext4 asks for its checksum by name (a "softdep"), which modules.dep does not tell
    "crc32c_generic",
    "ext4",
    # QEMU's -M virt
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    # the Raspberry Pi's SD slot, its clocks, regulators and DMA
    "clk_raspberrypi",
    "bcm2835_dma",
    "raspberrypi_power",
    "gpio_raspberrypi_exp",
    "gpio_regulator",
    "fixed",
    "sdhci_iproc",
    "bcm2835",
    "mmc_block",
)
NEEDED = ("ext4", "virtio_blk", "mmc_block")
"""Without these, as modules or built in, no board finds its root; the others are not in every kernel."""
MAX_MODULE_BYTES = 64 * 1024**2
INIT = """#!/bin/busybox sh
# Mounts the root that the kernel's command line names, read-only, and starts its system.
/bin/busybox mkdir -p /dev /proc /sys /root /run
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
export PATH=/bin
for name in mount switch_root findfs sleep insmod reboot cat; do
    /bin/busybox ln -s busybox "/bin/$name"
done
for module in /modules/*; do
    insmod "$module" 2>/dev/null
done
root= type=ext4
for word in $(cat /proc/cmdline); do
    case $word in
    root=*) root=${word#root=} ;;
    esac
done
tries=0
while :; do
    case $root in
    LABEL=* | UUID=*) device=$(findfs "$root" 2>/dev/null) ;;
    *) device=$root ;;
    esac
    if [ -b "$device" ] && mount -t "$type" -o ro "$device" /root; then
        break
    fi
    tries=$((tries + 1))
    if [ "$tries" = 300 ]; then
        echo "spacemoe: no root file system $root after 60 s: starting again"
        cat /proc/partitions
        sleep 5
        reboot -f
    fi
    sleep 0.2
done
mount -o move /dev /root/dev
mount -o move /proc /root/proc
mount -o move /sys /root/sys
exec switch_root /root /sbin/init
"""


class InitrdError(ValueError):
    """The kernel package holds no module that is needed."""


def order(dep: str, builtin: str, wanted: tuple[str, ...] = WANTED) -> list[str]:
    """Paths below the modules' folder, each after what it depends on.

    `dep`, `builtin`: the texts of modules.dep and modules.builtin. Raises: InitrdError.
    """
    needs = {}
    for line in dep.splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    names = {_name(path): path for path in needs}
    inside = {_name(path) for path in builtin.splitlines()}
    missing = [name for name in NEEDED if name not in names and name not in inside]
    if missing:
        raise InitrdError(f"the kernel package holds no module {', '.join(missing)}")
    found: list[str] = []

    def take(path: str) -> None:
        if path not in found:
            for other in reversed(needs.get(path, [])):  # modules.dep lists the deepest last
                take(other)
            found.append(path)

    for name in wanted:
        if name in names:
            take(names[name])
    return found


def _name(path: str) -> str:
    return re.sub(r"\.ko(\.xz)?$", "", path.rpartition("/")[2]).replace("-", "_")


def make(boot: Path, epoch_s: int) -> bytes:
    """The archive, as xz with CRC32, which the kernel reads.

    Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst (cpio, newc).
    `boot` holds busybox and modules/. Raises: InitrdError, OSError.
    """
    modules = boot / "modules"
    out = io.BytesIO()
    number = 0

    def add(name: str, mode: int, data: bytes = b"") -> None:
        nonlocal number
        number += 1
        links = 2 if mode & 0o170000 == 0o040000 else 1
        fields = (number, mode, 0, 0, links, epoch_s, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out.write(b"070701" + b"".join(b"%08X" % each for each in fields) + name.encode() + b"\0")
        out.write(bytes(-out.tell() % 4) + data)
        out.write(bytes(-out.tell() % 4))

    for folder in ("bin", "modules"):
        add(folder, 0o040755)
    add("init", 0o100755, INIT.encode())
    add("bin/busybox", 0o100755, (boot / "busybox").read_bytes())
    for index, path in enumerate(order(*((modules / f"modules.{each}").read_text() for each in ("dep", "builtin")))):
        data = (modules / path).read_bytes()
        if path.endswith(".xz"):
            data = lzma.LZMADecompressor(memlimit=MAX_MODULE_BYTES).decompress(data, MAX_MODULE_BYTES)
        add(f"modules/{index:03}-{_name(path)}.ko", 0o100644, data)
    add("TRAILER!!!", 0)
    return lzma.compress(out.getvalue(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, preset=6)
