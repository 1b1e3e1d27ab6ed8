"""The boards that our own image boots on: what lies on the FAT partition, the kernel's command line, what rpi-imager calls them.

Leaves out: boards whose vendor's image is customised instead (Raspberry Pi 5, Jetson), and what a board measures (board files).
"""

from __future__ import annotations

from dataclasses import dataclass

from hardware.image_root import ROOT_LABEL

COMMON = f"root=LABEL={ROOT_LABEL} ro rootwait fsck.repair=yes systemd.getty_auto=no"


class BoardError(ValueError):
    """No such board; the text lists those that there are."""


@dataclass(frozen=True)
class ImageBoard:
    name: str
    title: str
    device_trees: tuple[str, ...]
    """Below the kernel package's broadcom folder; none: the machine brings its own."""
    console: str
    """The kernel's name of the serial port."""
    firmware: bool
    """Whether the Raspberry Pi's boot firmware is needed."""
    imager_devices: tuple[str, ...] = ()
    """Tags of rpi-imager's device list."""
    notes: str = ""

    def command_line(self, quiet: bool) -> str:
        return f"{COMMON} console={self.console}" + (" quiet" if quiet else "")


BOARDS = {
    board.name: board
    for board in (
        ImageBoard("qemu-virt", "QEMU -M virt (64-bit Arm)", (), "ttyAMA0", False),
        ImageBoard(
            "pi3",
            "Raspberry Pi 3 (A+, B, B+)",
            tuple(f"bcm2837-rpi-3-{kind}.dtb" for kind in ("a-plus", "b", "b-plus")),
            "ttyS1,115200",
            True,
            ("pi3-64bit",),
        ),
        ImageBoard(
            "pi4",
            "Raspberry Pi 4 and 400",
            ("bcm2711-rpi-4-b.dtb", "bcm2711-rpi-400.dtb", "bcm2711-rpi-cm4-io.dtb"),
            "ttyS1,115200",
            True,
            ("pi4-64bit",),
        ),
        ImageBoard(
            "zero2w",
            "Raspberry Pi Zero 2 W",
            ("bcm2837-rpi-zero-2-w.dtb",),
            "ttyS1,115200",
            True,
            ("pi3-64bit",),
            "needs a USB network adapter: this image has no Wi-Fi",
        ),
    )
}


def find(name: str) -> ImageBoard:
    """Raises: BoardError."""
    if name not in BOARDS:
        raise BoardError(f"there is no image for {name!r}: take {', '.join(BOARDS)}, or customize a vendor's image")
    return BOARDS[name]


CONFIG_TXT = """\
# Read by the Raspberry Pi's firmware (see its config.txt documentation).
arm_64bit=1
enable_uart=1
upstream_kernel=1
kernel=vmlinuz
initramfs initrd.img followkernel
disable_splash=1
"""


def boot_files(board: ImageBoard, quiet: bool) -> dict[str, str]:
    """Text files of the FAT partition."""
    files = {"cmdline.txt": board.command_line(quiet) + "\n"}
    if board.firmware:
        files["config.txt"] = CONFIG_TXT
    return files
