"""`spacemoe image`: bootable images from Debian packages, and what a vendor's image is given.

Leaves out: how they are made (the hardware room).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ground_station import cli_customize
from ground_station.cli_shared import EXIT_OK, positive, wrapped

BOARDS = (
    "qemu-virt",
    "pi3",
    "pi4",
    "zero2w",
)  # hardware.image_boards': named here so that --help stays fast; a test compares


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    image = commands.add_parser("image", help="SD-card images: build one, or prepare a vendor's")
    kinds = image.add_subparsers(dest="kind", metavar="KIND", required=True)
    build = command("build", "a bootable arm64 image from Debian packages", _build, kinds)
    build.add_argument("--board", choices=BOARDS, required=True, help=f"one of {', '.join(BOARDS)}", metavar="BOARD")
    build.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT.img.zst",
        help="the image; .bmap, .sha256, .sbom.json and .rpi-imager.json go beside it",
    )
    build.add_argument(
        "--size-mb",
        type=positive,
        metavar="N",
        help="of the whole card image (default: as much as is needed); the root grows to the card at first boot",
    )
    build.add_argument(
        "--read-only-root",
        action="store_true",
        help="the root is never written to; a small third partition holds /var/lib/spacemoe",
    )
    build.add_argument(
        "--pack", type=Path, metavar="DIR", help="a provision pack of `spacemoe fleet add`, put on the FAT partition"
    )
    build.add_argument(
        "--shards", type=Path, metavar="DIR", help="a bundle whose shards are baked in, in /var/lib/spacemoe/bundle"
    )
    build.add_argument(
        "--ssh-key",
        type=Path,
        metavar="FILE",
        help="a public key that may log in as root; without it there is no SSH server",
    )
    build.add_argument(
        "--cache", type=Path, metavar="DIR", help="layers are kept there (default: ~/.cache/spacemoe/image)"
    )
    build.add_argument(
        "--mirror", metavar="URL", help="of Debian's packages (default: the one in this machine's apt sources)"
    )
    build.add_argument("--offline", action="store_true", help="use the cached packages as they are; ask no mirror")
    build.add_argument(
        "--console", action="store_true", help="what the kernel and the agent say goes to the serial console, too"
    )
    build.add_argument("--dry-run", action="store_true", help="say what would be made of what, and stop")
    build.add_argument(
        "--progress", action="store_true", help="show steps on standard error, also when it is no terminal"
    )
    cli_customize.add(kinds, command)


def _build(args: argparse.Namespace) -> int:
    from hardware import image_build

    recipe = image_build.Recipe(
        board=args.board,
        output=args.output,
        size_mb=args.size_mb,
        read_only_root=args.read_only_root,
        pack=args.pack,
        shards=args.shards,
        ssh_key=args.ssh_key,
        cache=args.cache or Path.home() / ".cache" / "spacemoe" / "image",
        mirror=args.mirror,
        offline=args.offline,
        console=args.console,
    )
    show = args.progress or sys.stderr.isatty()

    def progress(step: str) -> None:
        if show:
            print(step, file=sys.stderr, flush=True)

    if args.dry_run:
        plan = image_build.plan(recipe)
        print(json.dumps(plan) if args.json else "\n".join(f"{name:12} {value}" for name, value in plan.items()))
        return EXIT_OK
    built = image_build.build(recipe, progress)
    print(json.dumps(built.as_tree()) if args.json else "\n".join(wrapped(line) for line in built.as_text()))
    return EXIT_OK
