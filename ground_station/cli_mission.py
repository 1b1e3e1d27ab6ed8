"""`spacemoe nodes`, `top`, `events`, `alarms`, `command` and `trend`: a running ground station, watched and operated from a terminal.

Leaves out: how it is asked (mission_client.py), and what is drawn (top_screen.py, trend_text.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from ground_station.cli_shared import COLUMNS, EXIT_FAILED, EXIT_OK, UsageError, plain, positive, wrapped

SEVERITIES = ("info", "watch", "warning", "distress", "critical", "severe")  # of archive_records; a test compares them
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

    nodes = part("nodes", "the nodes of a running fleet; with NODE all that one says", _nodes)
    nodes.add_argument("node", nargs="?", metavar="NODE")
    nodes.add_argument("--filter", default="", metavar="TEXT", help="only what holds this text: node, state or board; of NODE a signal")
    top = part("top", "the fleet, live in the terminal; q ends it", _top)
    top.add_argument("--once", action="store_true", help="print it once, and end")
    events = part("events", "what happened; -f goes on as it happens", _events)
    events.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C; connects anew where it breaks")
    past(events, 50)
    events.add_argument("--filter", default="", metavar="TEXT", help="only those that hold this text")
    events.add_argument("--node", default="", metavar="NODE", help="only of this node")
    events.add_argument("--severity", choices=SEVERITIES, default="", help="only from this one on")
    alarms = commands.add_parser("alarms", help="alarms: list, acknowledge, shelve, clear", description=__doc__.splitlines()[0])
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
            each.add_argument("--for", dest="span", default="30m", metavar="TIME", help="10m, 2h or seconds (default: %(default)s)")
        if name == "clear":
            each.add_argument("--yes", action="store_true", help="also one whose cause still holds")
    order = part("command", "send a node a command, and wait for what comes of it", _command, more="; a command that the node refuses or does not answer: 1")
    order.add_argument("node", metavar="NODE")
    order.add_argument("name", metavar="NAME", help="ping, sample, duty, burn, stop, ...")
    order.add_argument("arguments", nargs="*", metavar="KEY=VALUE")
    order.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    order.add_argument("--yes", action="store_true", help="do not ask before a hazardous one")
    trend = part("trend", "a signal of a node over time", _trend)
    trend.add_argument("node", metavar="NODE")
    trend.add_argument("signal", metavar="SIGNAL", help="temp_c, power_w, ...: `spacemoe nodes NODE` names them")
    trend.add_argument("--since", default="15m", metavar="TIME", help=TIME_HELP)
    trend.add_argument("--until", metavar="TIME", help="as --since")
    trend.add_argument("--points", type=positive, metavar="N", help="at most (default: what the picture holds; with --json 600)")
    trend.add_argument("--table", action="store_true", help="numbers instead of a picture")


def _client(args: argparse.Namespace):
    from ground_station.mission_client import MissionClient, station_of

    return MissionClient(station_of(args.url, args.token_file, args.ca))


def _moment(text: str | None) -> float | None:
    from ground_station import time_words

    return None if text is None else time_words.utc_s(text, time.time())


def _path(*parts: str) -> str:
    from urllib.parse import quote

    return "/".join(quote(part, safe="") for part in parts)


def _clock(utc_s: Any) -> str:
    if not isinstance(utc_s, (int, float)) or not 0 <= utc_s < 4e9:
        return "-"
    day = time.strftime("%Y-%m-%d", time.gmtime(utc_s))
    same = day == time.strftime("%Y-%m-%d", time.gmtime())
    return time.strftime("%H:%M:%SZ" if same else "%Y-%m-%d %H:%M:%SZ", time.gmtime(utc_s))


def _rows(answer: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of a list in an answer."""
    rows = answer.get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


# ---------------------------------------------------------------- watching


def _nodes(args: argparse.Namespace) -> int:
    client = _client(args)
    if args.node is not None:
        node = client.get(_path("nodes", args.node))
        print(json.dumps(node) if args.json else "\n".join(_one(node, args.filter.lower())))
        return EXIT_OK
    answer = client.get("nodes", filter=args.filter)
    if args.json:
        print(json.dumps(answer))
        return EXIT_OK
    from ground_station import top_screen

    rows = _rows(answer, "nodes")
    wide = max([4, *(min(32, len(plain(row.get("node")))) for row in rows)])
    print(f"{'node':{wide}} {'state':7} {'age':>5} {'temp C':>9} {'power W':>9} {'duty':>6} level    board")
    for row in rows:
        signals = row.get("signals") if isinstance(row.get("signals"), dict) else {}
        values = [signals.get(name, {}).get("value") for name in top_screen.COLUMNS]
        level = min((str(each.get("level")) for each in signals.values()), key=_rank, default=".")
        shown = " ".join(
            f"{top_screen.number(value, 2 if i == 2 else 1):>{size}}" for i, (value, size) in enumerate(zip(values, (9, 9, 6)))
        )
        old = row.get("age_s") if isinstance(row.get("age_s"), (int, float)) else None
        word = top_screen.LEVEL_WORDS.get(level, "-")
        line = f"{plain(row.get('node'), 32):{wide}} {plain(row.get('state'))[:7]:7} {top_screen.age(old):>5} {shown} {word:8} "
        print(line + plain(row.get("board"))[: max(8, COLUMNS - len(line))])
    if not rows:
        print("no node has been heard" + (f" that holds {plain(args.filter)!r}" if args.filter else ""))
    return EXIT_OK


def _rank(letter: str) -> int:
    from ground_station.top_screen import ORDER

    return ORDER.index(letter) if letter in ORDER and letter else len(ORDER)


def _one(node: dict[str, Any], wanted: str) -> list[str]:
    from ground_station.top_screen import LEVEL_WORDS, age, number

    facts = [f"{plain(node.get('node'))}: {plain(node.get('state'))}, {plain(node.get('board')) or 'board unknown'}"]
    old = node.get("age_s") if isinstance(node.get("age_s"), (int, float)) else None
    facts.append(
        f"agent {plain(node.get('agent_version')) or '-'}, bundle {plain(node.get('bundle')) or '-'}, "
        f"{plain(node.get('shards'))} shards, heard {age(old)} ago"
    )
    if isinstance(node.get("counts"), dict):
        facts.append("messages: " + ", ".join(f"{plain(name)} {plain(count)}" for name, count in node["counts"].items() if count))
    lines = [wrapped(fact) for fact in facts]
    signals = node.get("signals") if isinstance(node.get("signals"), dict) else {}
    lines.append(f"{'signal':32} {'value':>12} {'unit':8} {'validity':8} {'provenance':10} level")
    for name, each in signals.items():
        if wanted not in name.lower():
            continue
        value = number(each.get("value"), 3)
        provenance, level = plain(each.get("provenance"))[:10], LEVEL_WORDS.get(str(each.get("level")), "-")
        lines.append(
            f"{plain(name, 100):32} {value:>12} {plain(each.get('unit'))[:8]:8} {plain(each.get('validity'))[:8]:8} {provenance:10} {level}"
        )
    return lines


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def _top(args: argparse.Namespace) -> int:
    import shutil

    from ground_station import top_screen

    client, view = _client(args), top_screen.View()
    live = not args.once and not args.json
    if live and not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("top needs a terminal: give --once to print it once, or --json")
    if not live:
        for kind, content in client.stream():
            if kind == "snapshot":
                if args.json:
                    print(json.dumps(content))
                    return EXIT_OK
                view.apply(kind, content, time.time())
                size = shutil.get_terminal_size((COLUMNS, 0))
                look = top_screen.Look(size.columns, len(view.nodes) + 16, _colour())
                print("\n".join(top_screen.lines(view, look, time.time())[:-1]))
                return EXIT_OK
        raise RuntimeError("the ground station has ended the stream: try again")
    return _live(client, view)


def _live(client, view) -> int:
    import queue
    import threading

    from ground_station import top_screen

    frames: queue.Queue = queue.Queue(maxsize=1000)

    def read() -> None:
        def lost(why: str) -> None:
            frames.put(("note", why))

        try:
            for each in client.follow(lost):
                frames.put(each)
        except BaseException as error:  # told where the screen is put back
            frames.put(("failed", error))

    threading.Thread(target=read, name="stream", daemon=True).start()
    first = frames.get()
    if first[0] == "failed":  # before the screen is taken
        raise first[1]
    frames.queue.appendleft(first)
    sort, top = "n", 0
    with top_screen.Terminal() as terminal:
        while True:
            for _ in range(frames.qsize()):
                kind, content = frames.get()
                if kind == "failed":
                    raise content
                if kind == "note":
                    view.note = f"{content}: trying again"
                else:
                    view.apply(kind, content, time.time())
            width, height = terminal.size()
            top = max(0, min(top, len(view.nodes) - 1))
            terminal.draw(top_screen.lines(view, top_screen.Look(width, height, _colour(), sort, top), time.time()))
            key = terminal.key(0.5)
            if key in ("q", "Q", "eof", "\x04"):
                return EXIT_OK
            if key in top_screen.SORTS:
                sort = key
            elif key in ("j", "k", " "):
                top += {"j": 1, "k": -1, " ": max(1, height - 8)}[key]


def _events(args: argparse.Namespace) -> int:
    from ground_station.time_words import iso

    query = {"node": args.node, "severity": args.severity, "filter": args.filter, "lines": args.lines}
    query |= {"since": _moment(args.since), "until": _moment(args.until)}
    if query["since"] is not None and query["until"] is not None and query["since"] >= query["until"]:
        raise UsageError(f"--since {args.since} is not before --until {args.until}")
    if args.follow and args.until is not None:
        raise UsageError("--until and -f exclude each other: leave one out")
    client = _client(args)

    def show(row: dict[str, Any]) -> None:
        if args.json:
            print(json.dumps(row), flush=True)
            return
        at = row.get("at_utc_s")
        who = plain(row.get("node")) + (" (ground)" if row.get("source") == "ground" else "")
        text = f"{iso(at)[:19] + 'Z' if isinstance(at, (int, float)) else '-'} {plain(row.get('severity')):8} {who}: "
        print(wrapped(f"{text}{plain(row.get('kind'))}: {plain(row.get('text'))}"), flush=True)

    if not args.follow:
        answer = client.get("events", **query)
        if args.json:
            print(json.dumps(answer))
        else:
            for row in _rows(answer, "events"):
                show(row)
        return EXIT_OK
    least = SEVERITIES.index(args.severity) if args.severity else 0

    def wanted(row: dict[str, Any]) -> bool:
        rank = SEVERITIES.index(row["severity"]) if row.get("severity") in SEVERITIES else 0
        text = f"{row.get('kind')} {row.get('text')}".lower()
        return rank >= least and args.node in ("", row.get("node")) and args.filter.lower() in text

    def lost(why: str) -> None:
        print(plain(f"{why}: connecting again"), file=sys.stderr, flush=True)

    for row in client.follow_events(query, wanted, lost):
        show(row)
    return EXIT_OK


# ---------------------------------------------------------------- operating


def _alarms(args: argparse.Namespace) -> int:
    answer = _client(args).get("alarms", filter=args.filter)
    if args.json:
        print(json.dumps(answer))
        return EXIT_OK
    rows = _rows(answer, "alarms")
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
        f"{head}  {_clock(row.get('since_utc_s'))}  {plain(row.get('node'))} {plain(row.get('signal'))}{value} {plain(row.get('level'))}{text}"
    )


def _act(args: argparse.Namespace) -> int:
    content: dict[str, Any] = {"comment": args.comment}
    if args.action == "shelve":
        content["for_s"] = span_s(args.span)
    if args.action == "clear":
        content["yes"] = args.yes
    done = _client(args).post(_path("alarms", args.alarm, args.action), content)
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
    client = _client(args)
    content = {"node": args.node, "name": args.name, "arguments": arguments}
    would = client.post("commands", content | {"dry_run": True})
    if args.dry_run:
        given = " ".join(f"{plain(key)}={plain(value)}" for key, value in dict(would.get("arguments", {})).items())
        hazard = f"; hazardous: {plain(would['hazard'])}" if would.get("hazard") else ""
        lines = [wrapped(f"{plain(args.name)} {given}".strip() + f" would be sent to {plain(would.get('topic'))}{hazard}")]
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
        print(wrapped(f"{plain(args.name)} to {plain(args.node)}: {plain(done.get('state'))} after {took:.2f} s: {plain(done.get('text'))}"))
    return EXIT_OK if done.get("state") == "ok" else EXIT_FAILED


def _trend(args: argparse.Namespace) -> int:
    import shutil

    from ground_station import trend_text

    width = min(200, max(40, shutil.get_terminal_size((COLUMNS, 24)).columns))
    points = args.points or (600 if args.json else 50 if args.table else trend_text.room(width))
    query = {"node": args.node, "signal": args.signal, "since": _moment(args.since), "until": _moment(args.until)}
    found = _client(args).get("trend", **query, points=min(points, 5000))
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(trend_text.table(found) if args.table else trend_text.picture(found, width)))
    return EXIT_OK
