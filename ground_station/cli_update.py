"""`spacemoe update`: makes a signed package of the agent, or brings one onto boards, which go back by themselves where it is no good.

Binds the data plane and the socket for shards while it runs, as `generate` does: a new agent is good only if the ground station is there.
Leaves out: the work (agent_update.py).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from ground_station.cli_shared import EXIT_CHECK, EXIT_OK, UsageError, wrapped

LOOPBACK = "127.0.0.1"


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    update = command("update", "a new agent for boards, signed; one that is no good gives way by itself", _update)
    update.add_argument("nodes", nargs="*", metavar="NODE")
    what = update.add_mutually_exclusive_group(required=True)
    what.add_argument("--package", type=Path, metavar="FILE", help="send this to the nodes, and wait how it does")
    what.add_argument("--make", type=Path, metavar="FILE", help="make a package, and FILE.sig, of the agent here")
    update.add_argument("--dir", type=Path, metavar="FLEET", help="folder of `spacemoe fleet init`")
    update.add_argument("--key", type=Path, metavar="FILE", help="with --make: signing key, in place of the fleet's")
    update.add_argument("--site", type=Path, metavar="DIR", help="with --make: all of this folder of Python packages")
    update.add_argument("--label", metavar="TEXT", help="with --make: version in its name (default: the kit's)")
    update.add_argument("--bind", default=LOOPBACK, metavar="ADDRESS", help="to listen on (default: %(default)s)")
    update.add_argument(
        "--patience", type=float, default=60.0, metavar="S", help="without progress (default: %(default)s)"
    )
    update.add_argument(
        "--trial", type=float, default=2100.0, metavar="S", help="for the boards' trials (default: %(default)s)"
    )


def _update(args: argparse.Namespace) -> int:
    return _make(args) if args.make is not None else _send(args)


def _make(args: argparse.Namespace) -> int:
    from ground_station import agent_update, bundle_sign

    if args.nodes:
        raise UsageError("--make goes without nodes: send what it makes by --package")
    path = args.key
    if path is None:
        if args.dir is None:
            raise UsageError("give --dir FLEET or --key FILE: boards take signed packages only")
        from ground_station import fleet_records

        path = fleet_records.FleetFolder.open(args.dir).path(fleet_records.SIGNING_KEY)
    package = agent_update.make(args.make, bundle_sign.load_key(path), args.site, args.label)
    facts = {"file": str(package.path), "name": package.offer.name, "bytes": package.offer.bytes}
    facts["sha256"] = package.offer.sha256
    if args.json:
        print(json.dumps(facts))
    else:
        print(wrapped(f"{args.make}: {package.offer.name}, {package.offer.bytes / 1e6:.2f} MB, signed"))
        fleet = shlex.quote(str(args.dir)) if args.dir is not None else "FLEET"
        print(wrapped(f"next: spacemoe update NODE --package {shlex.quote(str(args.make))} --dir {fleet}"))
    return EXIT_OK


def _send(args: argparse.Namespace) -> int:
    from ground_station import agent_update
    from ground_station.allow_list import AllowList
    from ground_station.delivery import Deliverer
    from ground_station.fleet_records import FleetFolder
    from ground_station.link import Link

    if not args.nodes or args.dir is None:
        raise UsageError("give the nodes that are to get it, and --dir FLEET")
    if not (0 < args.patience < 1e6 and 0 < args.trial < 1e6):
        raise UsageError("--patience and --trial are seconds above 0")
    folder, package = FleetFolder.open(args.dir), agent_update.read(args.package)
    records = folder.nodes()
    if unknown := [node for node in args.nodes if node not in records]:
        raise UsageError(f"{', '.join(unknown[:8])}: not of this fleet; `spacemoe fleet list` says who is")
    if shut := [
        _why_not(records[node], args.dir) for node in dict.fromkeys(args.nodes) if records[node].state != "enrolled"
    ]:
        raise UsageError("; ".join(shut[:8]))
    keys, allowed, ports = folder.curve_keys(), AllowList(folder), folder.info.ports

    def say(node: str, text: str) -> None:
        if not args.json:
            print(wrapped(_said(node, text)), file=sys.stderr, flush=True)

    with (
        Link(f"tcp://{args.bind}:{ports.data}", keys, allowed) as link,
        Deliverer(f"tcp://{args.bind}:{ports.delivery}", keys, allowed) as deliverer,
    ):
        found = agent_update.carry_out(
            deliverer, tuple(dict.fromkeys(args.nodes)), package, say, args.patience, args.trial, link.drain
        )
    if args.json:
        print(json.dumps({"name": package.offer.name, "sha256": package.offer.sha256, "nodes": found}))
    else:
        for node, text in found.items():
            print(wrapped(_said(node, f"runs {package.offer.name}" if text == "good" else text)))
    return EXIT_OK if set(found.values()) == {"good"} else EXIT_CHECK


def _said(node: str, text: str) -> str:
    """A line about a node; many texts begin with its name already."""
    return text if text.startswith(f"{node} ") else f"{node}: {text}"


def _why_not(record, fleet: Path) -> str:
    """Why a node that is not enrolled gets no update, and the next step."""
    where = f"--dir {shlex.quote(str(fleet))}"
    again = f"`spacemoe fleet add {record.id} --board {record.board} --again {where}` and flash it again"
    return {
        "new": f"{record.id} has not enrolled yet: flash its card and start it while `spacemoe up` runs",
        "quarantined": f"{record.id} is quarantined: `spacemoe fleet release {record.id} {where}` puts it back",
    }.get(record.state, f"{record.id} is {record.state}: {again}")
