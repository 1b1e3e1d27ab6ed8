"""`spacemoe flash`: lists the cards that may be written, asks, writes an image to several at once, verifies, prints their labels.

Leaves out: which disks are safe (hardware/block_devices.py), writing and reading back (hardware/flash.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from ground_station.cli_shared import EXIT_CHECK, EXIT_FAILED, EXIT_OK, UsageError, wrapped

MAX_CARD_GB = 1100
LAST_CHARACTERS = 4
MIN_SERIAL_CHARACTERS = 4
ASK_TRIES = 3
SHOWN = 2
FILE = "virtual card"
DIGEST_DIGITS = 12


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    flash = command(
        "flash", "write an image to SD cards, verify them by reading back, give each its node's identity", _flash
    )
    flash.add_argument("image", type=Path, nargs="?", metavar="IMAGE", help=".img, .img.xz, .img.zst or .img.gz")
    flash.add_argument("devices", nargs="*", metavar="DEVICE", help="whole disks, as /dev/sdb; without: list them")
    flash.add_argument("--list", action="store_true", help="which disks may be written, and why each other one may not")
    flash.add_argument(
        "--yes", action="append", default=[], metavar="SERIAL", help="of each card: write without asking"
    )
    which = flash.add_mutually_exclusive_group()
    which.add_argument(
        "--pack", action="append", type=Path, default=[], metavar="DIR", help="one node's, for each card"
    )
    which.add_argument(
        "--packs", type=Path, metavar="DIR", help="of `fleet add`: the unused ones in order, a card each"
    )
    flash.add_argument("--again", action="store_true", help="also packs that a card had before")
    flash.add_argument("--sha256", metavar="HEX", help="of the image, packed or raw (default: of IMAGE.sha256)")
    maps = flash.add_mutually_exclusive_group()
    maps.add_argument(
        "--bmap", type=Path, metavar="FILE", help="write only these blocks (default: the .bmap beside it)"
    )
    maps.add_argument("--no-bmap", action="store_true", help="write every block")
    flash.add_argument("--to-file", action="append", type=Path, default=[], metavar="OUT", help="a file for a card")
    flash.add_argument(
        "--max-card-gb", type=float, default=MAX_CARD_GB, metavar="GB", help="larger is no card (default: %(default)s)"
    )
    flash.add_argument(
        "--force", action="store_true", help="write over a file of --to-file; take an image without a partition table"
    )
    flash.add_argument("--dry-run", action="store_true", help="show what would be written, and write nothing")
    flash.epilog = (
        "exit codes: 0 every card is written and verified (or listed); 1 a card failed; 2 refused before the first byte, or a "
        "damaged image; 3 a card does not give back what was written, or the image is not the one of its sha256 or block map; "
        "130 interrupted; 143 terminated. A card that was not finished does not boot; start again, there is no resuming."
    )


def _flash(args: argparse.Namespace) -> int:
    from ground_station.flash_bars import Bars, counting
    from hardware import block_devices, bmap, flash, flash_front, flash_pack, image_source

    if not 0 < args.max_card_gb < 1e6:
        raise UsageError(f"--max-card-gb {args.max_card_gb:g} is no number of GB above 0")
    rules = block_devices.Rules(int(args.max_card_gb * 1e9))
    targets = len(args.devices) + len(args.to_file)
    if args.list or args.image is None or not targets:
        return _list(args, rules)
    disks = _chosen(args.devices, rules)
    if not args.dry_run:
        _check_rights(disks)
    packs = _packs(args, targets)
    # a new virtual card is as large as its image
    sizes = [disk.bytes for disk in disks] + [_file_bytes(path, args.force) for path in args.to_file]
    source = image_source.look(args.image, min(filter(None, sizes), default=None), counting(args.json))
    if not args.force and not flash_front.has_table(source):
        raise UsageError(
            f"{args.image} has no partition table, so no board boots from it: take the image of a whole disk, or give --force"
        )
    announced = image_source.announced(source, args.sha256)
    found = None if args.no_bmap else args.bmap or bmap.beside(args.image)
    block_map = bmap.read(found) if found is not None else None
    places = [(Path(disk.path), disk.number) for disk in disks] + [(path, None) for path in args.to_file]
    jobs = tuple(
        flash.Job(flash.Target(path, size or source.bytes, number), pack)
        for (path, number), size, pack in zip(places, sizes, packs)
    )
    plan = flash.planned(source, jobs, block_map)
    facts = _facts(plan, found, announced, disks)
    if not args.json:
        print("\n".join(map(wrapped, _about(facts))), flush=True)
    if args.dry_run:
        print(json.dumps(facts) if args.json else "this was a dry run: nothing was written")
        return EXIT_OK
    with flash_pack.taken(filter(None, packs), args.again):
        _confirm(args, disks, packs)
        if _chosen(args.devices, rules) != disks:  # a card may have been changed while the question stood
            raise UsageError("the disks are not the same any more as when they were shown: start again")
        try:
            with Bars(jobs, quiet=args.json) as show:
                done = flash.flash(plan, announced, show)
        except flash.DigestError as error:
            print(f"spacemoe: {error}", file=sys.stderr)
            return EXIT_CHECK
        except BaseException as stop:
            if not isinstance(stop, Exception):  # Ctrl-C, SIGTERM, SIGHUP
                print("\nwhat was not finished does not boot: start again, there is no resuming", file=sys.stderr)
            raise
        return _told(args, facts, done, plan)


def _chosen(devices: list[str], rules) -> tuple:
    """The disks that were named, each one allowed.  Raises: DiskError."""
    from hardware import block_devices

    if not devices:
        return ()
    disks, system = block_devices.listed(), block_devices.system_numbers()
    found = tuple(block_devices.find(disks, device) for device in devices)
    for disk in found:
        block_devices.check(disk, rules, system)
    return found


def _check_rights(disks: tuple) -> None:
    for disk in disks:
        if not os.access(disk.path, os.R_OK | os.W_OK):
            raise PermissionError(f"{disk.path} may not be written by this user: run the command with sudo")


def _file_bytes(path: Path, force: bool) -> int:
    """0 for a file that is to be made.  Raises: UsageError, also for one that would be written over without `force`."""
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: give --to-file a file in a folder that is there")
        return 0
    if not path.is_file():
        raise UsageError(f"{path} is no plain file: --to-file takes files, disks are named without it")
    size = path.stat().st_size
    if size and not force:
        raise UsageError(f"{path} exists and would be written over: name another file, or give --force")
    return size


def _used_up(packs: Path) -> dict[str, str]:
    """Node -> why its pack in the folder `packs` is of no use any more, as the records of the fleet around it say.

    Empty for a folder that is not in a fleet's. Raises: FleetFolderError.
    """
    import shlex

    from ground_station import fleet_records

    root = Path(os.path.abspath(packs)).parent
    if not (root / fleet_records.FLEET_FILE).is_file():
        return {}
    shown = packs.parent if packs.name not in ("", "..") else root
    return {
        record.id: f"{record.id} {'has enrolled' if record.state == 'enrolled' else f'is {record.state}'}: `spacemoe fleet add "
        f"{record.id} --board {record.board} --again --dir {shlex.quote(str(shown))}` makes a new pack"
        for record in fleet_records.FleetFolder.open(root).nodes().values()
        if record.state != "new"
    }


def _packs(args: argparse.Namespace, targets: int) -> list:
    """A pack or None for each target.  Raises: UsageError, PackError."""
    if not args.pack and args.packs is None:
        return [None] * targets
    from hardware import flash_pack

    if args.packs is None:
        for path in () if args.again else args.pack:
            if (why := _used_up(path.parent).get(os.path.basename(os.path.abspath(path)))) is not None:
                raise UsageError(f"{path}: {why}")
        packs = list(map(flash_pack.read_pack, args.pack))
    else:
        spent = _used_up(args.packs)
        packs = list(flash_pack.packs_in(args.packs, args.again, spent))
        for node, why in spent.items():
            if (args.packs / node).is_dir():
                print(wrapped(f"left out: {why}"), file=sys.stderr)
        if len(packs) < targets:
            raise UsageError(
                f"{args.packs} has {len(packs)} unused packs for {targets} cards: `spacemoe fleet add` more"
            )
        packs = packs[:targets]
    if len(packs) != targets:
        raise UsageError(f"{len(packs)} packs for {targets} cards: give --pack DIR for each, or --packs DIR")
    if len({(pack.fleet, pack.node) for pack in packs}) != len(packs):
        raise UsageError("two cards would be the same node: give each card a pack of its own")
    if not args.again:
        for pack in packs:
            flash_pack.check_unused(pack)
    return packs


def _list(args: argparse.Namespace, rules) -> int:
    from hardware import block_devices

    system = block_devices.system_numbers()
    rows = [
        {
            "device": disk.path,
            "name": disk.name,
            "serial": disk.serial,
            "bytes": disk.bytes,
            "refused": list(block_devices.refusals(disk, rules, system)),
        }
        for disk in block_devices.listed()
    ]
    ready = [row for row in rows if not row["refused"]]
    if args.json:
        print(json.dumps({"disks": rows}))
    else:
        lines = [] if ready else ["no card that may be written: put one in"]
        for row in sorted(rows, key=lambda row: bool(row["refused"])):
            what = f"{row['device']}  {row['name']}  {block_devices.size_text(row['bytes'])}  serial {row['serial'] or 'none'}"
            lines.append(what if not row["refused"] else f"refused: {what}: it {_shown(row['refused'])}")
        print("\n".join(map(wrapped, lines)))
    if args.image is not None and not args.list:
        raise UsageError(
            f"no DEVICE is named: spacemoe flash {args.image} {ready[0]['device'] if ready else '/dev/...'}"
        )
    return EXIT_OK


def _shown(reasons: list[str]) -> str:
    more = f"; and {len(reasons) - SHOWN} more reasons (--json)" if len(reasons) > SHOWN else ""
    return "; it ".join(reasons[:SHOWN]) + more


def _facts(plan, map_path: Path | None, announced, disks: tuple) -> dict:
    cards = [
        {
            "device": str(job.target.path),
            "name": disk.name if disk is not None else FILE,
            "serial": disk.serial if disk is not None else "",
            "bytes": job.target.bytes,
            "node": job.pack.node if job.pack is not None else None,
            "fleet": job.pack.fleet if job.pack is not None else None,
            "board": job.pack.board if job.pack is not None else None,
        }
        for job, disk in zip(plan.jobs, (*disks, *[None] * len(plan.jobs)))
    ]
    return {
        "image": str(plan.source.path),
        "kind": plan.source.kind,
        "image_bytes": plan.source.bytes,
        "write_bytes": plan.bytes,
        "bmap": str(map_path) if map_path is not None else None,
        "announced_sha256": announced.sha256 if announced is not None else None,
        "cards": cards,
    }


def _about(facts: dict) -> list[str]:
    from hardware.block_devices import size_text

    lines = [f"{facts['image']}: {size_text(facts['image_bytes'])} unpacked ({facts['kind']})"]
    if facts["bmap"]:
        lines.append(f"{size_text(facts['write_bytes'])} of it are in use by {facts['bmap']}: only these are written")
    if facts["announced_sha256"] is None:
        lines.append("no sha256 is given for it, by --sha256 or IMAGE.sha256: damage in transit would go unseen")
    for card in facts["cards"]:
        lines.append(f"{_card_text(card)}: everything on it will be lost")
    return lines


def _card_text(card: dict) -> str:
    from hardware.block_devices import size_text

    serial = f", serial {card['serial'] or 'none'}" if card["name"] != FILE else ""
    node = f", becomes {card['node']} of fleet {card['fleet']} ({card['board']})" if card["node"] else ""
    return f"{card['device']}: {card['name']}, {size_text(card['bytes'])}{serial}{node}"


def _confirm(args: argparse.Namespace, disks: tuple, packs: list) -> None:
    """Every card is named by its serial, by --yes or typed.  Raises: UsageError."""
    left = [text.strip() for text in args.yes]
    for disk, pack in zip(disks, packs):
        if args.yes:
            if len(disk.serial) < MIN_SERIAL_CHARACTERS:
                raise UsageError(
                    f"{disk.path} has no serial number to go by: leave out --yes and confirm at a terminal"
                )
            if disk.serial not in left:
                raise UsageError(f"the serial of {disk.path} ({disk.name}) is {disk.serial}: no --yes says so")
            left.remove(disk.serial)
        else:
            _ask(disk, pack, args.json)
    if left:
        raise UsageError(f"--yes {left[0]} is no serial of a card that is named: take it out")


def _ask(disk, pack, to_stderr: bool) -> None:
    if not sys.stdin or not sys.stdin.isatty():
        raise UsageError(
            f"nobody can be asked, there is no terminal: give --yes SERIAL of {disk.path} (--list shows it)"
        )
    last = disk.serial[-LAST_CHARACTERS:]
    usable = len(disk.serial) >= MIN_SERIAL_CHARACTERS
    wanted = {disk.serial.lower(), last.lower()} if usable else {disk.path.lower()}
    what = (
        f"the last {LAST_CHARACTERS} characters of its serial {disk.serial}"
        if usable
        else f"{disk.path} (it has no serial)"
    )
    node = f" as {pack.node}" if pack is not None else ""
    for _ in range(ASK_TRIES):
        print(wrapped(f"to overwrite {disk.path} ({disk.name}){node}, type {what}:"), file=sys.stderr)
        try:
            answer = input()
        except EOFError:
            answer = ""
        if answer.strip().lower() in wanted:
            return
        if not answer.strip():
            break
    raise UsageError(f"{disk.path} was not confirmed: nothing was written")


def _told(args: argparse.Namespace, facts: dict, done, plan) -> int:
    """Prints how it ended for each card, with its label, and marks the packs.  The exit code."""
    from hardware.flash import VerifyError
    from hardware.flash_label import label
    from hardware.flash_pack import mark_used

    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts |= {"image_sha256": done.sha256 or None, "bmap_checksum": plan.map_checksum or None}
    digest = done.sha256[:DIGEST_DIGITS] or f"bmap {plan.map_checksum[:DIGEST_DIGITS]}"
    code = EXIT_OK
    for card, outcome in zip(facts["cards"], done.outcomes):
        card |= {"verified": outcome.error is None, "error": str(outcome.error) if outcome.error else None}
        card |= {"written_bytes": outcome.written_bytes, "read_back": outcome.read_back, "remark": outcome.remark}
        card |= {"write_s": round(outcome.write_s, 3), "verify_s": round(outcome.verify_s, 3), "label": None}
        if outcome.error is not None:
            kind = EXIT_CHECK if isinstance(outcome.error, VerifyError) else EXIT_FAILED
            code = kind if code in (EXIT_OK, kind) else EXIT_FAILED
            print(f"spacemoe: {outcome.error}", file=sys.stderr)
            continue
        card["label"] = list(label(outcome.job.pack, plan.source.path.name, digest, now[:10]))
        if outcome.job.pack is not None:
            try:
                mark_used(
                    outcome.job.pack,
                    f"{card['device']} ({' '.join(filter(None, (card['name'], card['serial'])))})",
                    plan.source.path.name,
                    now,
                )
            except OSError as error:
                card["remark"] += f" {outcome.job.pack.folder} could not be marked as used ({error.strerror})"
        if not args.json:
            print("\n".join(map(wrapped, _done_lines(card, outcome))))
    if args.json:
        print(json.dumps(facts))
    return code


def _done_lines(card: dict, outcome) -> list[str]:
    from hardware.block_devices import size_text

    rate = outcome.written_bytes / max(outcome.write_s, 1e-3)
    lines = [
        f"{card['device']}: {size_text(outcome.written_bytes)} written in {outcome.write_s:.1f} s ({size_text(int(rate))}/s), "
        f"read back in {outcome.verify_s:.1f} s ({outcome.read_back}) and the same"
    ]
    if card["remark"]:
        lines.append(f"note: {card['remark'].strip()}")
    return lines + ["label:"] + [f"    {line}" for line in card["label"]]
