"""`spacemoe nodes`, `top`, `events`, `alarms`, `command` and `trend`: a running ground station, watched and operated from a terminal.

Here are the arguments, and what operates. Leaves out watching (cli_mission_watch.py) and how it is asked (mission_client.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from ground_station import cli_mission_watch
from ground_station.cli_mission_watch import SEVERITIES, client_of, path_of, rows_of
from ground_station.cli_shared import EXIT_FAILED, EXIT_OK, UsageError, plain, positive, wrapped

TIME_HELP = "2026-11-30T12:00Z, a time ago such as 10m or 2h, or seconds since 1970"
DONE = "exit codes: 0 done; 1 no ground station answers, or it refuses; 2 wrong usage, or what was named is not there"
SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", re.ASCII)
SPAN_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def add(commands, command) -> None:
    """Declares them in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""

    def part(name: str, help: str, run, group=commands, more: str = "") -> argparse.ArgumentParser:
        sub = command(name, help, run, group)
        sub.epilog = DONE + more
        sub.add_argument("--url", help="of the ground station (default: $SPACEMOE_URL, or http://127.0.0.1:8642)")
        sub.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token (default: $SPACEMOE_TOKEN)")
        sub.add_argument("--ca", type=Path, metavar="FILE", help="PEM file of who signed the station's certificate")
        return sub

    def past(sub: argparse.ArgumentParser, lines: int) -> None:
        sub.add_argument("--since", metavar="TIME", help=TIME_HELP)
        sub.add_argument("--until", metavar="TIME", help="as --since")
        sub.add_argument("--lines", type=positive, default=lines, metavar="N", help="the last N (default: %(default)s)")

    nodes = part("nodes", "the nodes of a running fleet; with NODE all that one says", cli_mission_watch.nodes)
    nodes.add_argument("node", nargs="?", metavar="NODE")
    nodes.add_argument(
        "--filter", default="", metavar="TEXT", help="only what holds this text: node, state or board; of NODE a signal"
    )
    top = part("top", "the fleet, live in the terminal; q ends it", cli_mission_watch.top)
    top.add_argument("--once", action="store_true", help="print it once, and end")
    events = part("events", "what happened; -f goes on as it happens", cli_mission_watch.events)
    events.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C; connects anew where it breaks")
    past(events, 50)
    events.add_argument("--filter", default="", metavar="TEXT", help="only those that hold this text")
    events.add_argument("--node", default="", metavar="NODE", help="only of this node")
    events.add_argument("--severity", choices=SEVERITIES, default="", help="only from this one on")
    alarms = commands.add_parser(
        "alarms", help="alarms: list, acknowledge, shelve, clear", description=__doc__.splitlines()[0]
    )
    actions = alarms.add_subparsers(dest="alarms_command", metavar="COMMAND", required=True)
    each = part("list", "the alarms that stand, the gravest first", _alarms, actions)
    each.add_argument("--filter", default="", metavar="TEXT", help="only those that hold this text")
    for name, help in (
        ("ack", "acknowledge it: somebody knows"),
        ("shelve", "silence it for a time"),
        ("unshelve", "end that time"),
        ("clear", "end it"),
    ):
        each = part(name, f"an alarm: {help}", _act, actions)
        each.set_defaults(action=name)
        each.add_argument("alarm", metavar="ID")
        each.add_argument("--comment", default="", metavar="TEXT", help="kept with it")
        if name == "shelve":
            each.add_argument(
                "--for", dest="span", default="30m", metavar="TIME", help="10m, 2h or seconds (default: %(default)s)"
            )
        if name == "clear":
            each.add_argument("--yes", action="store_true", help="also one whose cause still holds")
    order = part(
        "command",
        "send a node a command, and wait for what comes of it",
        _command,
        more="; a command that the node refuses or does not answer: 1",
    )
    order.add_argument("node", metavar="NODE")
    order.add_argument("name", metavar="NAME", help="ping, sample, duty, burn, stop, ...")
    order.add_argument("arguments", nargs="*", metavar="KEY=VALUE")
    order.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    order.add_argument("--yes", action="store_true", help="do not ask before a hazardous one")
    trend = part("trend", "a signal of a node over time", cli_mission_watch.trend)
    trend.add_argument("node", metavar="NODE")
    trend.add_argument("signal", metavar="SIGNAL", help="temp_c, power_w, ...: `spacemoe nodes NODE` names them")
    trend.add_argument("--since", default="15m", metavar="TIME", help=TIME_HELP)
    trend.add_argument("--until", metavar="TIME", help="as --since")
    trend.add_argument(
        "--points", type=positive, metavar="N", help="at most (default: what the picture holds; with --json 600)"
    )
    trend.add_argument("--table", action="store_true", help="numbers instead of a picture")


def _clock(utc_s: Any) -> str:
    if not isinstance(utc_s, (int, float)) or not 0 <= utc_s < 4e9:
        return "-"
    day = time.strftime("%Y-%m-%d", time.gmtime(utc_s))
    same = day == time.strftime("%Y-%m-%d", time.gmtime())
    return time.strftime("%H:%M:%SZ" if same else "%Y-%m-%d %H:%M:%SZ", time.gmtime(utc_s))


def _alarms(args: argparse.Namespace) -> int:
    answer = client_of(args).get("alarms", filter=args.filter)
    if args.json:
        print(json.dumps(answer))
        return EXIT_OK
    rows = rows_of(answer, "alarms")
    for row in rows:
        print(_alarm(row))
    print("no alarm stands" if not rows else f"{len(rows)} alarm{'s' * (len(rows) != 1)}")
    return EXIT_OK


def _alarm(row: dict[str, Any]) -> str:
    value = "" if row.get("value") is None else f" {plain(row.get('value'))} {plain(row.get('unit', ''))}".rstrip()
    who = f", {plain(row['who'])}" if row.get("who") else ""
    comment = f" ({plain(row['comment'])})" if row.get("comment") else ""
    text = f": {plain(row['text'])}" if row.get("text") else ""
    head = f"{plain(row.get('id'))}  {plain(row.get('severity'))}  {plain(row.get('state'))}{who}{comment}"
    return wrapped(
        f"{head}  {_clock(row.get('since_utc_s'))}  {plain(row.get('node'))} {plain(row.get('signal'))}{value} "
        f"{plain(row.get('level'))}{text}"
    )


def _act(args: argparse.Namespace) -> int:
    content: dict[str, Any] = {"comment": args.comment}
    if args.action == "shelve":
        content["for_s"] = span_s(args.span)
    if args.action == "clear":
        content["yes"] = args.yes
    done = client_of(args).post(path_of("alarms", args.alarm, args.action), content)
    print(json.dumps(done) if args.json else _alarm(done))
    return EXIT_OK


def span_s(text: str) -> float:
    """Seconds of '10m', '2h' or '90'.  Raises: UsageError."""
    found = SPAN.fullmatch(text)
    seconds = float(found[1]) * SPAN_S[found[2]] if found else 0.0
    if not seconds:
        raise UsageError(f"{text[:40]!r} is no time: give 10m, 2h, 1d or seconds")
    return seconds


def _command(args: argparse.Namespace) -> int:
    arguments = {}
    for pair in args.arguments:
        key, equal, value = pair.partition("=")
        if not equal or not key:
            raise UsageError(f"{pair[:60]!r} is not KEY=VALUE")
        arguments[key] = value
    client = client_of(args)
    content = {"node": args.node, "name": args.name, "arguments": arguments}
    would = client.post("commands", content | {"dry_run": True})
    if args.dry_run:
        given = " ".join(f"{plain(key)}={plain(value)}" for key, value in dict(would.get("arguments", {})).items())
        hazard = f"; hazardous: {plain(would['hazard'])}" if would.get("hazard") else ""
        lines = [
            wrapped(f"{plain(args.name)} {given}".strip() + f" would be sent to {plain(would.get('topic'))}{hazard}")
        ]
        print(json.dumps(would) if args.json else "\n".join([*lines, "this was a dry run: nothing was sent"]))
        return EXIT_OK
    yes = args.yes
    if would.get("hazard") and not yes:
        what = f"{args.name} to {args.node} is hazardous: {would['hazard']}"
        if args.json or not sys.stdin or not sys.stdin.isatty():
            raise UsageError(f"{what}: give --yes, or --dry-run to see what it does")
        print(wrapped(what), file=sys.stderr)
        print(f"Send {plain(args.name)} to {plain(args.node)}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise RuntimeError("nothing was sent: the answer was not yes")
        yes = True
    done = client.post("commands", content | {"yes": yes})
    took = (done.get("done_utc_s") or 0.0) - (done.get("at_utc_s") or 0.0)
    if args.json:
        print(json.dumps(done))
    else:
        print(
            wrapped(
                f"{plain(args.name)} to {plain(args.node)}: {plain(done.get('state'))} after {took:.2f} s: {plain(done.get('text'))}"
            )
        )
    return EXIT_OK if done.get("state") == "ok" else EXIT_FAILED
