"""Boots a card image in QEMU's emulation of a board: `-M virt` or `-M raspi3b`; serial console to a file, the network's packets too.

The emulated machine reaches this one's loopback ports as 10.0.2.2. Every packet of both directions is in the packet file, also those that
lead nowhere. A power cut is kill -9.
Leaves out: the boards' boot firmware (QEMU loads the kernel from the FAT partition's files itself), speed (TCG runs some ten times
slower than a board), heat and power.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from hardware import fat_files, image_source, partitions, program, sparse_copy

GROUND = "10.0.2.2"
"""This machine, as the emulated one sees it."""
CARD_BYTES = 4 * 1024**3
"""-M raspi3b takes cards whose size is a power of two."""
MAX_KERNEL_BYTES = 256 * 1024**2
MAX_LOG_BYTES = 64 * 1024**2
POLL_S = 0.5
USB_READY = "DWC OTG Controller"
"""Linux has found the USB controller of -M raspi3b."""
PLUG_IN_AFTER_S = 20.0


class QemuError(RuntimeError):
    """QEMU is missing, ended by itself, or the machine did not say in time what was waited for; the text names its log."""


@dataclass(frozen=True)
class Kind:
    """One of QEMU's machines. `network`: its device, which takes a mac= only where the machine has no address of its own; `append`: more
    words for the kernel; `plugged_in`: the network comes when USB does, as an adapter that a hand plugs in."""

    name: str
    words: tuple[str, ...]
    drive: tuple[str, ...]
    network: str
    console: str
    device_tree: str = ""
    append: str = ""
    plugged_in: bool = False


KINDS = {
    "virt": Kind(
        "virt",
        ("-M", "virt,gic-version=3", "-cpu", "cortex-a72", "-smp", "2", "-m", "1024", "-device", "virtio-rng-pci"),
        ("-drive", "if=none,id=card,file={card},format=raw,cache=writeback", "-device", "virtio-blk-pci,drive=card"),
        "virtio-net-pci,netdev=net,romfile=",
        "ttyAMA0",
    ),
    "raspi3b": Kind(
        "raspi3b",
        ("-M", "raspi3b"),
        ("-drive", "if=sd,file={card},format=raw,cache=writeback"),
        "usb-net,netdev=net",
        "ttyS1,115200",
        "bcm2837-rpi-3-b.dtb",
        # QEMU's power management takes the start of the watchdog for a reset that is due now. cdc_subset now and then takes what
        # cdc_ether drives. Two of the four cores: more than this machine has would wait for each other's locks. The moving lines of
        # systemd go through an emulated serial port.
        "module_blacklist=bcm2835_wdt,cdc_subset maxcpus=2 systemd.show_status=0",
        # Where the adapter is there from the start, the emulated controller is now and then too slow for the kernel's patience, and
        # QEMU 7.2 dies when it is taken out again.
        plugged_in=True,
    ),
}


def card(image: Path, target: Path, size_bytes: int = CARD_BYTES) -> Path:
    """A card with the image on it: sparse, of `size_bytes`.  Raises: image_source.ImageError, OSError."""
    sparse_copy.unpack(image_source.look(image, size_bytes), target, lambda done, of: None)
    os.truncate(target, size_bytes)
    return target


def boot_partition(card: Path) -> fat_files.Fat:
    """The card's FAT partition.  Raises: PartitionError, FatError, QemuError."""
    first = partitions.read_table(card).partitions[0]
    fat = fat_files.open_fat(card, first.start_bytes, first.size_bytes)
    if fat is None:
        raise QemuError(f"{card} has no FAT partition: give an image of `spacemoe image build`")
    return fat


def put_pack(card: Path, pack: Path) -> None:
    """Puts a provision pack on the card, as `spacemoe flash` does.  Raises: FatError, OSError."""
    files = {f"/spacemoe/{path.name}": path.read_bytes() for path in sorted(pack.iterdir()) if path.is_file()}
    boot_partition(card).put(files)


class Machine:
    """A running emulated board. Use as a context manager: leaving it cuts the power."""

    def __init__(self, kind: str, card: Path, folder: Path, quiet: bool = True) -> None:
        """`folder`: new or the one of an earlier boot; logs are numbered.  Raises: QemuError, FatError, OSError."""
        if shutil.which("qemu-system-aarch64") is None:
            raise QemuError("qemu-system-aarch64 is not installed: apt-get install qemu-system-arm")
        self.kind, self.card, self.folder = KINDS[kind], card, folder
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + len(list(folder.glob("console-*.log")))
        self.log, self.packets = folder / f"console-{number}.log", folder / f"packets-{number}.pcap"
        self._monitor = folder / "monitor"
        self._plug_at_s: float | None = None  # None: not seen yet, or done
        self._plugged = not self.kind.plugged_in
        self._load()
        self.started_s = time.monotonic()
        with open(folder / f"qemu-{number}.log", "wb") as errors:
            self._errors = Path(errors.name)
            self.process = subprocess.Popen(
                ["nice", "-n", "5", *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )

    def _load(self) -> None:
        """Takes kernel, RAM disk and device tree off the card, as a board's firmware would."""
        fat = boot_partition(self.card)
        wanted = ["vmlinuz", "initrd.img"] + ([self.kind.device_tree] if self.kind.device_tree else [])
        for name in wanted:
            data = fat.read(f"/{name}", MAX_KERNEL_BYTES)
            if data is None:
                raise QemuError(f"{self.card} has no {name} on its FAT partition: it was built for another board")
            (self.folder / name).write_bytes(data)
        text = (fat.read("/cmdline.txt") or b"").decode("ascii", "replace").strip()
        words = (re.sub(r"console=\S+", f"console={self.kind.console}", text), self.kind.append)
        self._append = " ".join(filter(None, words))

    def command(self) -> list[str]:
        words = [
            "qemu-system-aarch64",
            *self.kind.words,
            "-accel",
            "tcg,thread=multi",
            "-display",
            "none",
            "-monitor",
            "none",
            "-qmp",
            f"unix:{os.path.relpath(self._monitor)},server=on,wait=off",
        ]
        words += ["-no-reboot", "-chardev", f"file,id=console,path={self.log}"]
        # -M raspi3b's second serial port is the one that Linux calls ttyS1
        words += (
            ["-serial", "null", "-serial", "chardev:console"]
            if self.kind.device_tree
            else ["-serial", "chardev:console"]
        )
        words += [
            "-kernel",
            str(self.folder / "vmlinuz"),
            "-initrd",
            str(self.folder / "initrd.img"),
            "-append",
            self._append,
        ]
        if self.kind.device_tree:
            words += ["-dtb", str(self.folder / self.kind.device_tree)]
        words += [each.format(card=self.card) for each in self.kind.drive]
        words += ["-netdev", "user,id=net"] + ([] if self.kind.plugged_in else ["-device", self.kind.network])
        return [*words, "-object", f"filter-dump,id=packets,netdev=net,file={self.packets}"]

    def text(self) -> str:
        """What it has said on its console."""
        if not self.log.is_file():
            return ""
        with open(self.log, "rb") as file:
            return file.read(MAX_LOG_BYTES).decode("utf-8", "replace")

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match:
        """Waits for a line.  Raises: QemuError when QEMU ends or the time is over."""
        until = time.monotonic() + timeout_s
        while True:
            text = self.text()
            found = re.search(pattern, text)
            if found:
                return found
            if not self._plugged and USB_READY in text:
                self._plug_in()
            if self.process.poll() is not None:
                raise QemuError(
                    f"qemu ended ({self.process.returncode}) before {pattern!r}: see {self._errors} and {self.log}"
                )
            if time.monotonic() >= until:
                raise QemuError(f"the machine did not say {pattern!r} within {timeout_s:.0f} s: see {self.log}")
            time.sleep(POLL_S)

    def _plug_in(self) -> None:
        """The network adapter, a little after its controller.  Raises: QemuError."""
        now_s = time.monotonic()
        self._plug_at_s = self._plug_at_s or now_s + PLUG_IN_AFTER_S
        if now_s >= self._plug_at_s:
            driver, _, _ = self.kind.network.partition(",")
            self._ask("device_add", {"driver": driver, "netdev": "net", "id": "plug"})
            self._plugged = True

    def _ask(self, name: str, arguments: dict[str, str]) -> None:
        """Gives QEMU a command of its machine protocol (QMP).  Raises: QemuError."""
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(10.0)
            try:
                link.connect(os.path.relpath(self._monitor))
                with link.makefile("rw") as lines:
                    lines.readline()  # its greeting
                    for order, given in (("qmp_capabilities", {}), (name, arguments)):
                        lines.write(json.dumps({"execute": order, "arguments": given}) + "\n")
                        lines.flush()
                        while "return" not in (answer := json.loads(lines.readline())):  # events come in between
                            if "error" in answer:
                                raise QemuError(f"qemu: {order}: {answer['error'].get('desc')}")
            except (OSError, ValueError) as error:
                raise QemuError(f"qemu's monitor does not answer ({error}): see {self._errors}") from None

    def reports(self) -> list[dict[str, str]]:
        """The memory reports of an image built with --console, oldest first."""
        lines = re.findall(r"spacemoe-report (up_s=[^\r\n]*)", self.text())
        return [dict(pair.split("=", 1) for pair in line.split() if "=" in pair) for line in lines]

    def cut_power(self) -> None:
        """kill -9: nothing is flushed by the machine; what QEMU had been given is in this machine's page cache."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut_power()


def missing() -> list[str]:
    """Debian packages that booting needs and that are not here."""
    wanted = {"qemu-system-aarch64": "qemu-system-arm", "mcopy": "mtools"}
    lacks = []
    for name, package in wanted.items():
        try:
            program.find(name)
        except program.ProgramError:
            lacks.append(package)
    return lacks
