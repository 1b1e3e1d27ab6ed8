"""`spacemoe tools`: definitions for other people's programs: a Grafana dashboard, Home Assistant discovery, a COSMOS target.

Leaves out: what is in them (grafana.py, home_assistant.py, cosmos.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ground_station.cli_shared import EXIT_OK, UsageError, check_writable, plain, wrapped


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    tools = commands.add_parser(
        "tools", help="definitions for Grafana, Home Assistant and COSMOS", description=__doc__.splitlines()[0]
    )
    parts = tools.add_subparsers(dest="tools_command", metavar="COMMAND", required=True)

    def part(name: str, help: str, run, fleet: bool) -> None:
        sub = command(name, help, run, parts)
        sub.add_argument("-o", "--output", type=Path, metavar="FILE", help="instead of printing it")
        if fleet:
            sub.add_argument("--fleet", required=True, metavar="NAME", help="of `spacemoe fleet init`")
            sub.add_argument(
                "--node",
                action="append",
                metavar="NODE",
                help="with the signals of every board; else all nodes of a running station",
            )
            sub.add_argument("--url", help="of the ground station (default: $SPACEMOE_URL, or http://127.0.0.1:8642)")
            sub.add_argument(
                "--token-file", type=Path, metavar="FILE", help="holds the token (default: $SPACEMOE_TOKEN)"
            )
            sub.add_argument("--ca", type=Path, metavar="FILE", help="PEM file of who signed the station's certificate")

    part("grafana", "a dashboard to import; Prometheus reads the ground station's /metrics", _grafana, False)
    part("home-assistant", "MQTT discovery: JSON of topic and content, to be published retained", _home_assistant, True)
    part("cosmos", "a cmd_tlm file with a telemetry packet per node", _cosmos, True)


def _nodes(args: argparse.Namespace) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(node, board, ((signal, unit), ...)), as the ground station knows them, or as named."""
    from ground_station import home_assistant
    from node_agent import wire

    if args.node:
        base = [(signal.name, signal.unit) for signal in home_assistant.BASE]
        return [(wire.check_id(node), "", base) for node in dict.fromkeys(args.node)]
    from ground_station.mission_client import MissionClient, station_of

    answer = MissionClient(station_of(args.url, args.token_file, args.ca)).get("nodes")
    try:
        found = [
            (
                wire.check_id(row["node"]),
                str(row["board"]),
                [(name, str(each["unit"])) for name, each in row["signals"].items()],
            )
            for row in answer["nodes"]
        ]
    except (KeyError, TypeError, AttributeError):
        raise RuntimeError("the ground station's answer is not as this version knows it: update spacemoe-kit") from None
    if not found:
        raise UsageError("the ground station has heard no node yet: wait for one, or name it by --node")
    return found


def _write(args: argparse.Namespace, text: str, facts: dict) -> int:
    from node_agent.shard import atomic_file

    check_writable(args.output, "-o")
    if args.output is None:
        print(text)
        return EXIT_OK
    with atomic_file(args.output) as file:
        file.write(text.encode() + b"\n")
    print(
        json.dumps(facts | {"output": str(args.output)})
        if args.json
        else wrapped(f"{args.output}: {plain(facts)[1:-1]}")
    )
    return EXIT_OK


def _grafana(args: argparse.Namespace) -> int:
    from ground_station import grafana

    made = grafana.dashboard()
    return _write(args, json.dumps(made, indent=1), {"panels": len(made["panels"])})


def _home_assistant(args: argparse.Namespace) -> int:
    from ground_station import home_assistant

    nodes = [(node, board, [home_assistant.Signal(*each) for each in signals]) for node, board, signals in _nodes(args)]
    made = home_assistant.messages(args.fleet, nodes)
    return _write(args, json.dumps(made, indent=1), {"messages": len(made), "nodes": len(nodes)})


def _cosmos(args: argparse.Namespace) -> int:
    from ground_station import cosmos

    nodes = [(node, signals) for node, _, signals in _nodes(args)]
    return _write(args, cosmos.definition(args.fleet, nodes), {"packets": len(nodes)})
