"""`spacemoe image customize`: its arguments, progress on standard error, and what is printed at the end.

Leaves out: the work (hardware/customize.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from ground_station.cli_shared import EXIT_OK, UsageError, wrapped

MAX_SECRET_BYTES = 4096
_UNITS = {"": 1, "M": 1024**2, "G": 1024**3}


def add(kinds, command) -> None:
    """Declares it in `kinds`, the sub-commands of `spacemoe image`."""
    part = command("customize", "put the agent and a node's pack into a vendor's base image", _customize, kinds)
    part.add_argument("base", type=Path, metavar="BASE.img", help="also as .xz, .zst or .gz; it is never altered")
    part.add_argument(
        "--pack", type=Path, required=True, metavar="DIR", help="the node's provision pack, of `spacemoe fleet add`"
    )
    part.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT.img", help="or OUT.img.zst, OUT.img.xz; owner only"
    )
    part.add_argument("--board", metavar="NAME", help="if it is another than the pack says")
    part.add_argument("--hostname", metavar="NAME", help="default: the node's id")
    part.add_argument("--ssh-key", type=Path, metavar="FILE", help="a public key that may log in; default: nobody may")
    part.add_argument("--wifi-ssid", metavar="NAME", help="the WLAN; default: the cable only")
    part.add_argument("--wifi-password-file", type=Path, metavar="FILE", help="its passphrase, one line")
    part.add_argument("--wifi-country", metavar="CC", help="whose radio rules are kept, such as DE")
    part.add_argument(
        "--payload-cache",
        type=Path,
        metavar="DIR",
        help="wheels are kept there (default: ~/.cache/spacemoe/image)",
    )
    part.add_argument(
        "--max-size", type=_size, default="64G", metavar="N[M|G]", help="of the base, unpacked (default: %(default)s)"
    )
    part.add_argument("--dry-run", action="store_true", help="say what would be written, check that it fits, and stop")


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d{1,15})([MG]?)", text)
    if found is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or a number with M or G")
    return int(found[1]) * _UNITS[found[2]]


def _customize(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hardware import base_packages, customize, first_boot_files, payload
    from hardware.image_source import read_small

    wifi = (args.wifi_ssid, args.wifi_password_file, args.wifi_country)
    if any(part is not None for part in wifi) and None in wifi:
        raise UsageError("a WLAN needs all of --wifi-ssid, --wifi-password-file and --wifi-country")
    network = key = None
    if args.wifi_ssid is not None:
        text = read_small(args.wifi_password_file, MAX_SECRET_BYTES).decode("utf-8", "replace").rstrip("\r\n")
        network = first_boot_files.wlan(args.wifi_ssid, text, args.wifi_country)
    if args.ssh_key is not None:
        key = first_boot_files.ssh_key(read_small(args.ssh_key, MAX_SECRET_BYTES).decode("utf-8", "replace"))
    settings = customize.Settings(args.board, args.hostname, network, key, args.max_size, args.dry_run)
    cache = args.payload_cache or Path.home() / ".cache" / "spacemoe" / "image"

    def stage(text: str) -> None:
        if not args.json:
            tqdm.write(text, file=sys.stderr)

    with tqdm(
        total=None, unit="B", unit_scale=True, desc="copy", leave=False, disable=True if args.json else None
    ) as bar:

        def copied(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = customize.customize(
            args.base,
            args.pack,
            args.output,
            settings,
            lambda out, python: payload.build(out, python, cache, stage),
            lambda out, status, codename: base_packages.add(out, status, codename, cache, stage),
            stage,
            copied,
        )
    if args.json:
        print(json.dumps(report.tree()))
        return EXIT_OK
    print(
        wrapped(
            f"{report.kind}: {report.base}, Python {report.python}, for {report.node} ({report.board or 'no board'})"
        )
    )
    print(
        wrapped(
            f"  FAT partition: {len(report.fat_files)} files, {report.fat_needed_bytes} of {report.fat_free_bytes} free bytes"
        )
    )
    for path in report.fat_files:
        print(f"    {path}")
    print(
        wrapped(
            f"  root file system: {report.root_items} files, {report.root_needed_bytes} of {report.root_free_bytes} free bytes"
        )
    )
    if report.packages:
        print(wrapped(f"  the base lacked {len(report.packages)} Debian packages: {', '.join(report.packages)}"))
    for note in report.notes:
        print(wrapped(f"  note: {note}"))
    if report.output is None:
        print("this was a dry run: nothing was written")
    else:
        print(wrapped(f"{report.output}: checked; it holds the claim token, treat it as a secret"))
    return EXIT_OK
