"""What `spacemoe nodes`, `top`, `events` and `trend` do once their arguments are read; and how a ground station is found.

Leaves out: the arguments and what changes something (cli_mission.py), the connection (mission_client.py), the drawing (top_screen.py,
trend_text.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from ground_station.cli_shared import COLUMNS, EXIT_OK, UsageError, plain, wrapped

SEVERITIES = ("info", "watch", "warning", "distress", "critical", "severe")  # of archive_records; a test compares them


def client_of(args: argparse.Namespace):
    from ground_station.mission_client import MissionClient, station_of

    return MissionClient(station_of(args.url, args.token_file, args.ca))


def _moment(text: str | None) -> float | None:
    from ground_station import time_words

    return None if text is None else time_words.utc_s(text, time.time())


def path_of(*parts: str) -> str:
    from urllib.parse import quote

    return "/".join(quote(part, safe="") for part in parts)


def rows_of(answer: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of a list in an answer."""
    rows = answer.get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


# ---------------------------------------------------------------- watching


def nodes(args: argparse.Namespace) -> int:
    client = client_of(args)
    if args.node is not None:
        node = client.get(path_of("nodes", args.node))
        print(json.dumps(node) if args.json else "\n".join(_one(node, args.filter.lower())))
        return EXIT_OK
    answer = client.get("nodes", filter=args.filter)
    if args.json:
        print(json.dumps(answer))
        return EXIT_OK
    from ground_station import top_screen

    rows = rows_of(answer, "nodes")
    wide = max([4, *(min(32, len(plain(row.get("node")))) for row in rows)])
    print(f"{'node':{wide}} {'state':7} {'age':>5} {'temp C':>9} {'power W':>9} {'duty':>6} level    board")
    for row in rows:
        signals = row.get("signals") if isinstance(row.get("signals"), dict) else {}
        values = [signals.get(name, {}).get("value") for name in top_screen.COLUMNS]
        level = min((str(each.get("level")) for each in signals.values()), key=_rank, default=".")
        shown = " ".join(
            f"{top_screen.number(value, 2 if i == 2 else 1):>{size}}"
            for i, (value, size) in enumerate(zip(values, (9, 9, 6)))
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
        facts.append(
            "messages: " + ", ".join(f"{plain(name)} {plain(count)}" for name, count in node["counts"].items() if count)
        )
    lines = [wrapped(fact) for fact in facts]
    signals = node.get("signals") if isinstance(node.get("signals"), dict) else {}
    lines.append(f"{'signal':28} {'value':>11} {'unit':8} {'validity':8} {'provenance':10} level")
    for name, each in signals.items():
        if wanted not in name.lower():
            continue
        value = number(each.get("value"), 3)
        provenance, level = plain(each.get("provenance"))[:10], LEVEL_WORDS.get(str(each.get("level")), "-")
        lines.append(
            f"{plain(name, 100):28} {value:>11} {plain(each.get('unit'))[:8]:8} {plain(each.get('validity'))[:8]:8} {provenance:10} {level}"
        )
    return lines


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def top(args: argparse.Namespace) -> int:
    import shutil

    from ground_station import top_screen

    client, view = client_of(args), top_screen.View()
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


def events(args: argparse.Namespace) -> int:
    from ground_station.time_words import iso

    query = {"node": args.node, "severity": args.severity, "filter": args.filter, "lines": args.lines}
    query |= {"since": _moment(args.since), "until": _moment(args.until)}
    if query["since"] is not None and query["until"] is not None and query["since"] >= query["until"]:
        raise UsageError(f"--since {args.since} is not before --until {args.until}")
    if args.follow and args.until is not None:
        raise UsageError("--until and -f exclude each other: leave one out")
    client = client_of(args)

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
            for row in rows_of(answer, "events"):
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


def trend(args: argparse.Namespace) -> int:
    import shutil

    from ground_station import trend_text

    width = min(200, max(40, shutil.get_terminal_size((COLUMNS, 24)).columns))
    points = args.points or (600 if args.json else 50 if args.table else trend_text.room(width))
    query = {"node": args.node, "signal": args.signal, "since": _moment(args.since), "until": _moment(args.until)}
    found = client_of(args).get("trend", **query, points=min(points, 5000))
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(trend_text.table(found) if args.table else trend_text.picture(found, width)))
    return EXIT_OK
