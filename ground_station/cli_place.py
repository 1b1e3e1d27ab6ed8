"""`spacemoe place`: carries a placement out on a running fleet, goes on with one that was cut short, or undoes one.

The nodes dial this command's own socket for shards (their `[data] delivery_endpoint`) while it runs. Leaves out: the plan
(placement_live.py) and the transfers (carry_out.py, delivery.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ground_station.cli_shared import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    PLACEMENTS,
    UsageError,
    bundle_of,
    check_writable,
    wrapped,
)

if TYPE_CHECKING:
    from ground_station.allow_list import AllowList
    from ground_station.fleet_access import Access

LISTEN = "tcp://127.0.0.1:5571"
KEY_CHARACTERS = 40  # Z85 of 32 bytes
BAR = 24


class CutShort(RuntimeError):
    """A step failed; the text says how many are done and how to go on."""


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    place = command("place", "carry a placement out on a running fleet, resume it, or undo it", _place)
    place.add_argument("bundle", type=Path, nargs="?", help="bundle (default: the reference model)")
    place.add_argument("--nodes", type=Path, metavar="FILE", help="as of plan (default: every node that is online)")
    place.add_argument("--memory", type=float, metavar="MB", help="per node for experts, resident (without --nodes)")
    place.add_argument("--policy", choices=PLACEMENTS, default="budgeted", help="default: %(default)s")
    place.add_argument("--seed", type=int, default=0, help="of routing sets and of random (default: %(default)s)")
    place.add_argument(
        "--dir",
        type=Path,
        metavar="FLEET",
        help="of `spacemoe fleet init`: says broker, fleet, keys and who may dial in",
    )
    place.add_argument("--bind", default="127.0.0.1", metavar="ADDRESS", help="with --dir (default: %(default)s)")
    place.add_argument("--broker", metavar="HOST:PORT", help="default: 127.0.0.1:1883, or as the fleet's folder says")
    place.add_argument("--fleet", metavar="NAME", help="without --dir (default: demo)")
    place.add_argument("--listen", metavar="ENDPOINT", help=f"nodes dial it, without --dir (default: {LISTEN})")
    place.add_argument("--key", type=Path, metavar="FILE", help="secret CURVE key, needed off loopback without --dir")
    place.add_argument("--any-key", action="store_true", help="with --key: let in whoever knows its public half")
    place.add_argument("--patience", type=float, default=30.0, metavar="S", help="for a node (default: %(default)s)")
    place.add_argument("--force", action="store_true", help="also where the gain is below the price of moving")
    what = place.add_mutually_exclusive_group()
    what.add_argument("--journal", type=Path, metavar="FILE", help="says what is done; goes on with one that is there")
    what.add_argument("--undo", type=Path, metavar="FILE", help="go back what this journal says; journal: FILE.undo")
    place.add_argument("--dry-run", action="store_true", help="show the steps, and send nothing")


def _keys(path: Path | None) -> tuple[bytes, bytes] | None:
    """(public, secret) of a file that holds the secret key.  Raises: UsageError."""
    if path is None:
        return None
    import zmq

    try:
        with open(path, "rb") as file:
            text = file.read(KEY_CHARACTERS + 2).strip()
        if path.stat().st_mode & 0o077:
            raise UsageError(f"{path} can be read by others: chmod 600 {path}")
        return zmq.curve_public(text), text
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give --key FILE with the secret key") from None
    except (ValueError, zmq.ZMQError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} holds no secret key of {KEY_CHARACTERS} characters (Z85)") from None


@dataclass(frozen=True)
class _Ground:
    """Where the fleet is. `allowed` None: whoever has a key, or anybody on loopback."""

    access: Access
    listen: str
    keys: tuple[bytes, bytes] | None
    allowed: AllowList | None = None


def _ground(args: argparse.Namespace) -> _Ground:
    """Raises: UsageError, AccessError, FleetFolderError, AddressError."""
    from ground_station.fleet_access import access

    if args.dir is None:
        keys = _keys(args.key)
        return _Ground(access(None, args.broker, args.fleet), args.listen or LISTEN, keys)
    for name in ("listen", "key"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} goes without --dir: the fleet's folder says it")
    from ground_station.allow_list import AllowList

    found = access(args.dir, args.broker, args.fleet)
    folder = found.folder
    listen = f"tcp://{args.bind}:{folder.info.ports.delivery}"
    return _Ground(found, listen, folder.curve_keys(), AllowList(folder))


def _place(args: argparse.Namespace) -> int:
    from ground_station import carry_out, placement_live, plan_fleet
    from ground_station.control import Control
    from node_agent import shard

    if not 0 < args.patience < 1e6:
        raise UsageError(f"--patience {args.patience:g} is no number of seconds above 0")
    if args.nodes is not None and args.memory is not None:
        raise UsageError("--memory goes without --nodes: a file of nodes names each one's memory_mb")
    root, ground = bundle_of(args), _ground(args)
    manifest = shard.read_manifest(root)
    path = args.journal if args.undo is None else args.undo.with_name(args.undo.name + ".undo")
    if path is None and not args.dry_run:
        raise UsageError("give --journal FILE: it says what is done, for going on and for going back")
    check_writable(path, "--journal")
    facts: dict = {"went_on": path is not None and path.exists()}
    journal = before = None
    if facts["went_on"]:
        journal = before = carry_out.read_journal(path)
    elif args.undo is not None:
        before = carry_out.read_journal(args.undo)
        journal = placement_live.way_back(before)
    fleet = plan_fleet.read(args.nodes) if args.nodes is not None else None
    if journal is None and fleet is None and args.memory is None:
        raise UsageError("give --memory MB: what each node has for experts; or --nodes FILE")
    where = ground.access
    with Control(where.fleet, where.host, where.port, tls=where.tls) as control:
        if journal is None:
            names = () if fleet is None else tuple(node.id for node in fleet.nodes)
            found = placement_live.births(control, names, args.patience)
            fleet = fleet or placement_live.fleet_of(found, args.memory)
            plan = placement_live.planned(root, manifest, fleet, found, args.policy, args.seed)
            facts |= {"latency_ms": plan.latency_ms, "objective_ms": plan.objective_ms, "worth": plan.worth}
            facts |= {"stays_ms": plan.stays_ms}
            facts["planned_steps"] = len(plan.steps)
            wanted = plan.steps if plan.worth or args.force else ()
            journal = carry_out.Journal(manifest.name, wanted)
        else:
            if journal.bundle != manifest.name:
                raise UsageError(f"{path} is of bundle {journal.bundle[:80]!r}, not {manifest.name}: give that bundle")
            found = {}
            if journal.steps:
                found = placement_live.births(control, sorted({step.node for step in journal.steps}), args.patience)
            # going back may leave nodes as empty as they were; going on may not
            lost = placement_live.orphaned(journal.steps[journal.done :], found) if args.undo is None else []
            if lost and not args.force:
                raise UsageError(
                    f"{path} drops the only copy of an expert ({', '.join(lost[:3])}): plan again with another "
                    "--journal, or --force"
                )
            # a list that others have moved shards under could drop the only copy of an expert
            remedy = "this is not what the journal left: plan again with another --journal"
            if args.undo is not None and facts["went_on"]:
                remedy = f"this is not what {path} left: where that is of an earlier way back, move it away"
            placement_live.confirm(control, placement_live.settled(before), placement_live.LOOK_S, remedy)
        rows = _rows(journal, manifest)
        facts |= {"steps": rows, "bytes": sum(row["bytes"] for row in rows), "dry_run": args.dry_run}
        facts |= {"done": journal.done, "sent_bytes": 0, "had_bytes": 0}
        if not args.json:
            print("\n".join(map(wrapped, _report(facts, journal, path, args.undo is not None))), flush=True)
        if not args.dry_run and journal.done < len(journal.steps):
            try:
                done, sent = _carried_out(args, control, journal, root, ground, manifest, path)
            except (carry_out.JournalError, placement_live.FleetNotReady):
                raise  # before the first step, or after the last
            except (ValueError, RuntimeError, OSError) as error:
                kind = UsageError if isinstance(error, ValueError) else CutShort
                raise kind(f"{error}; {_how_far(path, journal)}") from error
            except BaseException as stop:  # Ctrl-C, SIGTERM, SIGHUP: the sockets are closed by now
                if isinstance(stop, Exception):
                    raise  # a bug shows its traceback
                word, code = "terminated", EXIT_TERMINATED
                if isinstance(stop, KeyboardInterrupt):
                    word, code = "interrupted", EXIT_INTERRUPTED
                bar = "\n" if sys.stderr.isatty() else ""
                print(f"{bar}{word}: {_how_far(path, journal)}", file=sys.stderr)
                return code
            had_bytes = sum(each.had_bytes for each in sent)
            facts |= {"done": done, "sent_bytes": sum(each.sent_bytes for each in sent), "had_bytes": had_bytes}
            if not args.json:
                there = f"{had_bytes / 1e6:.2f} MB was on the nodes' disks already"
                print(
                    wrapped(f"done: {facts['sent_bytes'] / 1e6:.2f} MB sent, {there}; the nodes' births say the same")
                )
    if args.json:
        print(json.dumps(facts))
    return EXIT_OK


def _carried_out(args: argparse.Namespace, control, journal, root: Path, ground: _Ground, manifest, path: Path):
    """(steps done, what was sent), once every node that a step needs has dialled in, and the births say that it is so."""
    from ground_station import carry_out, placement_live

    show = (lambda now: None) if args.json or not sys.stderr.isatty() else _show
    with placement_live.PatientDeliverer(
        ground.listen, ground.keys, args.patience, ground.allowed, args.any_key
    ) as deliverer:
        deliverer.reach(step.node for step in journal.steps[journal.done :])
        journal, sent = carry_out.carry_out(journal, deliverer, root, manifest, path, show)
    placement_live.confirm(control, journal.steps, args.patience, "see the nodes' logs, and plan again")
    return journal.done, sent


def _how_far(path: Path, begun) -> str:
    """How many steps are done by the journal on the disk, and how to go on and back."""
    from ground_station import carry_out

    if not path.exists():  # it is written before the first step
        return f"0 of {len(begun.steps)} steps are done: give the same command again"
    now = carry_out.read_journal(path)
    return (
        f"{now.done} of {len(now.steps)} steps are done: the same command goes on, "
        f"`spacemoe place ... --undo {path}` goes back"
    )


def _rows(journal, manifest) -> list[dict]:
    """The steps that are not done yet."""
    size = {(entry.layer, entry.expert, entry.precision): entry.bytes for entry in manifest.shards}
    return [
        {
            "kind": step.kind,
            "node": step.node,
            "shard": step.shard.stem,
            "bytes": size.get((step.shard.layer, step.shard.expert, step.shard.precision), 0) * (step.kind == "copy"),
        }
        for step in journal.steps[journal.done :]
    ]


def _report(facts: dict, journal, path: Path | None, back: bool) -> list[str]:
    rows = facts["steps"]
    if facts["went_on"] and not rows:
        word = "gone back" if back else "carried out"
        return [f"already {word}: all {journal.done} steps of {path} are done, the nodes' births say the same"]
    lines = [f"goes on with {path} after step {journal.done} of {len(journal.steps)}"] if facts["went_on"] else []
    for row in rows:
        where, size = ("to", f" ({row['bytes'] / 1e6:.3f} MB)") if row["kind"] == "copy" else ("from", "")
        lines.append(f"{row['kind']} {row['shard']} {where} {row['node']}{size}")
    if "latency_ms" in facts:
        if rows:
            lines.append(f"expected latency then {facts['latency_ms']:.3f} ms per token (experts and paths)")
        else:
            if facts["planned_steps"]:
                lines.append("moving is not worth its price here (--force moves all the same)")
            lines.append(
                f"what is held stays: expected latency {facts['stays_ms']:.3f} ms per token (experts and paths)"
            )
    lines.append(f"{len(rows)} steps, {facts['bytes'] / 1e6:.2f} MB" if rows else "nothing is to be moved")
    if facts["dry_run"]:
        lines.append("this was a dry run: nothing was sent")
    return lines


def _show(now) -> None:
    share = now.bytes / now.total_bytes if now.total_bytes else 0.0
    bar = "#" * int(BAR * (now.step + share) / now.steps)
    print(
        f"\r[{bar:{BAR}}] {now.step + 1}/{now.steps} {now.what.kind} {now.what.shard.stem} {now.what.node[:16]:16}",
        end="\n" if now.step + 1 == now.steps and (share == 1.0 or now.what.kind == "drop") else "",
        file=sys.stderr,
        flush=True,
    )
