"""`spacemoe token`: who may use a ground station's page and API beyond loopback. Leaves out the file of tokens (web_tokens.py)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ground_station.cli_shared import EXIT_OK, plain

FILE = "web-tokens.json"


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    group = commands.add_parser(
        "token",
        help="who may use the page and API beyond loopback",
        description="tokens for the page and the API: a viewer sees, an operator commands",
    ).add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, about, run in (
        ("add", "a new token, shown once: only its hash is kept", _add),
        ("list", "who has one", _list),
        ("remove", "takes one back: it is refused within a second", _remove),
    ):
        sub = command(name, about, run, group)
        if name != "list":
            sub.add_argument("name", help="of the person or program")
        if name == "add":
            sub.add_argument("--role", choices=("viewer", "operator"), default="viewer", help="default: %(default)s")
        sub.add_argument("--dir", type=Path, required=True, metavar="FLEET", help="folder of `spacemoe fleet init`")


def _file(args: argparse.Namespace) -> Path:
    from ground_station.fleet_records import FleetFolder

    return FleetFolder.open(args.dir).path(FILE)


def _add(args: argparse.Namespace) -> int:
    from ground_station import web_tokens

    token = web_tokens.add(_file(args), args.name, args.role)
    if args.json:
        print(json.dumps({"name": args.name, "role": args.role, "token": token}))
    else:
        print(
            f"{token}\nit is not shown again; as {args.role} {args.name}: `Authorization: Bearer ...`, SPACEMOE_TOKEN, or the page"
        )
    return EXIT_OK


def _list(args: argparse.Namespace) -> int:
    from ground_station import web_tokens

    entries = web_tokens.read(_file(args))
    if args.json:
        print(json.dumps({"tokens": [{"name": entry.name, "role": entry.role} for entry in entries]}))
    else:
        print(
            "\n".join(plain(f"{entry.name:34}{entry.role}") for entry in entries) or "nobody: `spacemoe token add NAME`"
        )
    return EXIT_OK


def _remove(args: argparse.Namespace) -> int:
    from ground_station import web_tokens

    web_tokens.remove(_file(args), args.name)
    print(json.dumps({"removed": args.name}) if args.json else f"{plain(args.name)} may not come in any more")
    return EXIT_OK
