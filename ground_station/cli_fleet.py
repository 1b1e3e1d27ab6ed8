"""`spacemoe fleet`: makes a fleet's keys, adds, revokes and releases nodes, shows how they stand, renews the ground certificate.

Leaves out: the work (fleet_records.py, fleet_authority.py, fleet_changes.py, fleet_pack.py), serving a fleet, and writing cards.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

from ground_station.cli_shared import COLUMNS, EXIT_OK, UsageError, wrapped

BOARDS = "pi5, pi4, zero2w, jetson-orin-nano, ..."
PORTS = {"broker": 8883, "enrol": 8870, "data": 5570, "delivery": 5571}  # of fleet_records.Ports; a test compares them
CERTIFICATE_DAYS, TOKEN_DAYS = 90, 30.0


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    fleet = commands.add_parser(
        "fleet", help="a fleet's keys, nodes and certificates", description=__doc__.splitlines()[0]
    )
    parts = fleet.add_subparsers(dest="fleet_command", metavar="COMMAND", required=True)

    def part(name: str, help: str, run) -> argparse.ArgumentParser:
        sub = command(name, help, run, parts)
        if name != "init":
            sub.add_argument("--dir", type=Path, required=True, metavar="FLEET", help="the folder that fleet init made")
        return sub

    init = part("init", "make a fleet: authority, ground station's identity, keys", _init)
    init.add_argument("name", metavar="NAME", help="1-32 of a-z, 0-9 and inner '-'")
    init.add_argument("--host", action="append", required=True, metavar="HOST", help="boards reach this machine by it")
    init.add_argument("--dir", type=Path, metavar="DIR", help="a new folder (default: ./NAME)")
    init.add_argument(
        "--certificate-days", type=int, default=CERTIFICATE_DAYS, metavar="N", help="default: %(default)s"
    )
    for name, port in PORTS.items():
        init.add_argument(f"--{name}-port", type=int, default=port, metavar="PORT", help="default: %(default)s")
    new = part("add", "add a node: its record, and a pack with a one-time claim token", _add)
    new.add_argument("node", metavar="NODE", help="1-32 of a-z, 0-9 and inner '-'")
    new.add_argument("--board", required=True, metavar="B", help=BOARDS)
    new.add_argument("--out", type=Path, metavar="PACKS", help="the pack goes to PACKS/NODE (default: FLEET/packs)")
    new.add_argument("--valid-days", type=float, default=TOKEN_DAYS, metavar="D", help="of the token (default: 30)")
    new.add_argument("--again", action="store_true", help="the node is known: new token, old certificate revoked")
    new.add_argument("--any-board", action="store_true", help="also a board that has no board file")
    new.add_argument("--yes", action="store_true", help="do not ask")
    new.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    revoke = part("revoke", "cut a node off for good", _revoke)
    revoke.add_argument("node", metavar="NODE")
    revoke.add_argument("--reason", default="", metavar="TEXT", help="kept in the node's record")
    revoke.add_argument("--yes", action="store_true", help="do not ask")
    revoke.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    part("release", "put a quarantined node back to work", _release).add_argument("node", metavar="NODE")
    part("list", "nodes, their states, and what expires when", _list)
    renew = part("renew-ground", "a new key and certificate for the ground station", _renew_ground)
    renew.add_argument("--host", action="append", metavar="HOST", help="instead of the hosts so far")


def _day(utc_s: float) -> str:
    return datetime.fromtimestamp(utc_s, timezone.utc).strftime("%Y-%m-%d")


def _print(args: argparse.Namespace, facts: dict, lines: list[str]) -> int:
    print(json.dumps(facts) if args.json else "\n".join(map(wrapped, lines)))
    return EXIT_OK


def _init(args: argparse.Namespace) -> int:
    from ground_station import fleet_authority, fleet_records

    path = args.dir or Path(args.name)
    ports = fleet_records.Ports(**{name: getattr(args, f"{name}_port") for name in PORTS})
    folder = fleet_records.FleetFolder.create(path, args.name, args.host, ports, args.certificate_days)
    ends = {}
    for name in (fleet_records.CA_CERT, fleet_records.GROUND_CERT):
        ends[name] = fleet_authority.certificate_of(folder, name).not_valid_after_utc.timestamp()
    info = folder.info
    facts = {"fleet": info.fleet, "dir": str(path), "hosts": info.hosts, "ports": dataclasses.asdict(info.ports)}
    facts |= {"certificate_days": info.certificate_days, "signer": folder.signer()}
    facts |= {"data_public_key": folder.curve_keys()[0].decode(), "expires_utc_s": ends}
    lines = [
        f"made fleet {info.fleet} in {path} (mode 0700): certificate authority until {_day(ends[fleet_records.CA_CERT])}, "
        f"certificate of the ground station until {_day(ends[fleet_records.GROUND_CERT])} for {', '.join(info.hosts)}, "
        "data-plane key, key that signs bundles, empty revocation list",
        f"whoever has {fleet_records.CA_KEY} can add boards: keep a backup of {path} where nobody else can read it",
        f"next: spacemoe fleet add NODE --board BOARD --dir {shlex.quote(str(path))}",
    ]
    return _print(args, facts, lines)


def _confirmed(args: argparse.Namespace, what: str, text: str, question: str) -> None:
    """Asks on standard error unless --yes is given.  Raises: UsageError where nobody can be asked; RuntimeError for a no."""
    if args.yes:
        return
    if args.json or not sys.stdin or not sys.stdin.isatty():
        raise UsageError(f"{what} needs a yes: give --yes, or --dry-run to see what it does")
    print(wrapped(text), file=sys.stderr)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RuntimeError("nothing was changed: the answer was not yes")


def _ends(record, now_utc_s: float) -> str:
    """What a new start of the node ends, in words; empty where it holds no certificate that is good."""
    from ground_station import fleet_authority

    if record is None or not set(fleet_authority.live_serials(record, now_utc_s)) - set(record.revoked_serials):
        return ""
    until = _day(max(record.not_after_utc_s, record.previous_not_after_utc_s))
    return (
        f"node {record.id} ({record.board}) is {record.state}: its certificate, valid until {until}, is revoked at once, "
        "and the board is cut off until it is flashed with the new pack"
    )


def _add(args: argparse.Namespace) -> int:
    import time

    from ground_station import fleet_changes, fleet_pack, fleet_records
    from hardware import board_file

    folder = fleet_records.FleetFolder.open(args.dir)
    fleet_records.check_node(args.node)
    boards = board_file.names()
    if args.board not in boards and not args.any_board:
        raise UsageError(
            f"there is no board {args.board[:40]!r}: use one of {', '.join(boards)}; or --any-board for one without a board file"
        )
    out = args.out or args.dir / fleet_pack.PACKS
    fleet_pack.check_place(out, args.node)
    known = fleet_changes.check_addable(folder, args.node, args.board, args.valid_days, args.again)
    ends = _ends(known, time.time())
    if args.dry_run:
        facts = {"node": args.node, "board": args.board, "pack": str(out / args.node), "again": args.again}
        lines = [ends] if ends else []
        lines.append(
            f"node {args.node} ({args.board}) would be added to {folder.info.fleet}, its pack is {out / args.node}"
        )
        return _print(
            args, facts | {"dry_run": True, "ends": ends}, [*lines, "this was a dry run: nothing was changed"]
        )
    if ends:
        _confirmed(args, f"cutting {args.node} off", ends, f"Cut {args.node} off, and make a new pack?")
    with folder.locked():  # the pack's token is the record's, whoever else adds the node at this moment
        record, token = fleet_changes.add_node(folder, args.node, args.board, args.valid_days, args.again)
        try:
            pack = fleet_pack.write_pack(folder, record, token, out)
        except OSError as error:
            raise RuntimeError(
                f"node {record.id} was added, but its pack could not be written ({error}): mend that, then "
                f"`spacemoe fleet add {record.id} --board {record.board} --again`"
            ) from None
    facts = {"node": record.id, "board": record.board, "state": record.state, "pack": str(pack), "again": args.again}
    facts |= {"token_expires_utc_s": record.token_expires_utc_s, "known_board": record.board in boards, "ends": ends}
    lines = [
        f"node {record.id} ({record.board}) added to {folder.info.fleet}: its pack is {pack}",
        f"the pack's claim token is good once, until {_day(record.token_expires_utc_s)}: it goes onto this board's card and nowhere else",
    ]
    if record.board not in boards:
        lines.append(f"note: there is no board file for {record.board!r}; known: {', '.join(boards)}")
    return _print(args, facts, lines)


def _revoke(args: argparse.Namespace) -> int:
    import time

    from ground_station import fleet_authority, fleet_changes, fleet_pack, fleet_records

    folder = fleet_records.FleetFolder.open(args.dir)
    record = folder.node(args.node)
    live = fleet_authority.live_serials(record, time.time())
    facts = {"node": record.id, "was": record.state, "serials": live, "dry_run": args.dry_run}
    what = (
        f"{len(live)} certificates go on the revocation list"
        if len(live) != 1
        else "its certificate goes on the revocation list"
    )
    text = f"node {record.id} ({record.board}, {record.state}): {what}, its claim token and its pack end"
    if args.dry_run:
        return _print(args, facts, [text, "this was a dry run: nothing was changed"])
    question = f"Cut {record.id} off? It has to be flashed again to come back."
    _confirmed(args, f"revoking {record.id}", text, question)
    with folder.locked():  # a pack that is made anew at this moment stays
        record = fleet_changes.revoke(folder, args.node, args.reason)
        left = fleet_pack.remove_pack(args.dir / fleet_pack.PACKS, record.id)
    return _print(
        args,
        facts | {"state": record.state, "reason": record.reason, "pack_left": left},
        [
            f"node {record.id} is revoked: {what}. A ground station that is up cuts it off now, one that is not will not let it in",
            f"to take the board back: spacemoe fleet add {record.id} --board {record.board} --again "
            f"--dir {shlex.quote(str(args.dir))}, and flash it again",
            *([f"note: its pack could not be removed: {left}"] if left else []),
        ],
    )


def _release(args: argparse.Namespace) -> int:
    from ground_station import fleet_changes, fleet_records

    record = fleet_changes.release(fleet_records.FleetFolder.open(args.dir), args.node)
    return _print(args, {"node": record.id, "state": record.state}, [f"node {record.id} is back at work"])


def _renew_ground(args: argparse.Namespace) -> int:
    from ground_station import fleet_authority, fleet_records

    folder = fleet_records.FleetFolder.open(args.dir)
    end_utc_s = fleet_authority.renew_ground(folder, args.host).not_valid_after_utc.timestamp()
    facts = {"fleet": folder.info.fleet, "hosts": folder.info.hosts, "expires_utc_s": end_utc_s}
    lines = [f"new certificate of the ground station until {_day(end_utc_s)} for {', '.join(folder.info.hosts)}"]
    if args.host:
        lines.append(
            f"packs that are made from now on name {folder.info.hosts[0]}; boards that are flashed keep what they have"
        )
    return _print(args, facts, lines)


def _list(args: argparse.Namespace) -> int:
    import time

    from ground_station import fleet_authority, fleet_changes, fleet_records

    folder = fleet_records.FleetFolder.open(args.dir)
    now_utc_s = time.time()
    rows = fleet_changes.standings(folder, now_utc_s)
    ground_days, warnings = {}, []
    for name in (fleet_records.CA_CERT, fleet_records.GROUND_CERT):
        end_utc_s = fleet_authority.certificate_of(folder, name).not_valid_after_utc.timestamp()
        ground_days[name] = (end_utc_s - now_utc_s) / fleet_authority.DAY_S
    if ground_days[fleet_records.GROUND_CERT] < fleet_authority.GROUND_DUE_DAYS:
        warnings.append(
            f"the ground station's certificate ends in {ground_days[fleet_records.GROUND_CERT]:.0f} days: "
            f"spacemoe fleet renew-ground --dir {shlex.quote(str(args.dir))}"
        )
    warnings += [f"{row.id}: {row.warning}" for row in rows if row.warning]
    facts = {"fleet": folder.info.fleet, "hosts": folder.info.hosts, "days_left": ground_days, "warnings": warnings}
    facts["nodes"] = [dataclasses.asdict(row) for row in rows]
    if args.json:
        print(json.dumps(facts))
        return EXIT_OK
    print(
        wrapped(
            f"fleet {folder.info.fleet}: {len(rows)} node{'s' * (len(rows) != 1)}, hosts {', '.join(folder.info.hosts)}"
        )
    )
    if rows:
        print("\n".join(_table(rows)))
    for warning in warnings:
        print(wrapped(f"warning: {warning}"))
    return EXIT_OK


def _table(rows) -> list[str]:
    """A line per node; where 80 columns are too few, the board's name gives way."""
    cells = [("node", "board", "state", "certificate", "claim token")]
    cells += [(row.id, row.board, row.state, _left(row.certificate_days), _left(row.token_days)) for row in rows]
    wide = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    wide[1] = max(5, min(wide[1], COLUMNS - sum(wide) + wide[1] - 2 * (len(wide) - 1)))
    shown = [(row[0], row[1] if len(row[1]) <= wide[1] else row[1][: wide[1] - 1] + "~", *row[2:]) for row in cells]
    return ["  ".join(text.ljust(size) for text, size in zip(row, wide)).rstrip() for row in shown]


def _left(days: float | None) -> str:
    if days is None:
        return "-"
    if days <= 0:
        return "expired"
    return f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} hours"
