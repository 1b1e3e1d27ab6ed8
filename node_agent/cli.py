"""Command line of a board: `node-agent run | selftest | sensors | enrol | first-boot`.

Exit codes: 0 success, 1 a self-test check failed or the ground station refuses this node, 2 wrong usage or configuration,
3 a bundle or shard cannot be used, 4 anything else on this machine, 75 another agent is to be started (an update).
Errors are one line on stderr that names the next step.
Leaves out: all logic; heavy imports happen inside the sub-commands, so that --help is fast.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from node_agent import enrol

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_BUNDLE, EXIT_MACHINE = 0, 1, 2, 3, 4
EXIT_AGAIN = 75  # of sysexits.h: try again


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        try:
            print(f"node-agent {metadata.version('spacemoe-kit')}")
        except metadata.PackageNotFoundError:
            print("node-agent source")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="node-agent",
        description="Serves expert shards and telemetry from a board.",
        epilog="exit codes: 0 done or stopped, 1 a self-test check failed or the ground station refuses this node, 2 wrong usage "
        "or configuration, 3 a bundle cannot be used, 4 anything else on this machine, 75 start again (an update)",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="serve until stopped")
    run.add_argument("--config", required=True, type=Path, metavar="FILE", help="the agent's TOML file")
    selftest = commands.add_parser("selftest", help="check this machine, and measure a bundle's experts on it")
    selftest.add_argument(
        "--bundle", type=Path, metavar="DIR", help="verify every file of this bundle and time its experts"
    )
    place = selftest.add_mutually_exclusive_group()
    place.add_argument("--sysroot", type=Path, default=Path("/"), metavar="DIR", help="folder that /sys is below")
    place.add_argument(
        "--config", type=Path, metavar="FILE", help="the agent's TOML file: its sysroot, board and [power_model]"
    )
    selftest.add_argument("--board", metavar="NAME", help="the kind of board, for the costs of its experts")
    selftest.add_argument(
        "--burst-s",
        type=float,
        default=2.0,
        metavar="S",
        help="with --bundle and a power sensor: joules from three rests and bursts of so long for each precision, on a board "
        "that does nothing else; 0: no joules (default: %(default)s)",
    )
    selftest.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    sensors = commands.add_parser("sensors", help="list the sensors found, and read each once")
    where = sensors.add_mutually_exclusive_group()
    where.add_argument("--sysroot", type=Path, default=Path("/"), metavar="DIR", help="folder that /sys is below")
    where.add_argument(
        "--config", type=Path, metavar="FILE", help="the agent's TOML file: its sysroot, and its [power_model] too"
    )
    sensors.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    sensors.add_argument(
        "--rate", action="store_true", help="measure rates that no driver tells, by a burst of 0.5 s for each sensor"
    )
    enrol = commands.add_parser("enrol", help="get this node's certificate from the ground station")
    enrol.add_argument("--config", required=True, type=Path, metavar="FILE", help="the agent's TOML file, with [enrol]")
    enrol.add_argument(
        "--renew", action="store_true", help="a new key and certificate, though the present one is valid"
    )
    first = commands.add_parser("first-boot", help="take the provision pack from the card's FAT partition, and enrol")
    first.add_argument("--pack", required=True, type=Path, metavar="DIR", help="the pack; its claim token is removed")
    first.add_argument("--to", required=True, type=Path, metavar="DIR", help="where this node's identity lives")
    first.add_argument("--owner", metavar="USER", help="the agent's user (default: who owns the folder above --to)")
    first.add_argument("--hostname", action="store_true", help="name this machine after its node")
    for command in (enrol, first):
        command.add_argument("--once", action="store_true", help="one try instead of tries for ever")
        command.add_argument("--json", action="store_true", help="one JSON object instead of a line")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    import logging

    from node_agent import config

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    settings = config.load(arguments.config)  # before onnxruntime is imported: a typing error is told at once
    from node_agent import agent

    agent.run(settings)
    return EXIT_OK


def _selftest(arguments: argparse.Namespace) -> int:
    from node_agent import selftest
    from node_agent.errors import ConfigError

    if not 0 <= arguments.burst_s <= 600:
        raise ConfigError(f"--burst-s {arguments.burst_s:g} is not between 0 and 600")
    sysroot, model, board = arguments.sysroot, None, arguments.board
    if arguments.config is not None:
        from node_agent import config

        settings = config.load(arguments.config)
        sysroot, model, board = settings.node.sysroot, settings.power_model, board or settings.node.board
    report = selftest.run(arguments.bundle, sysroot, board or "unknown", model, arguments.burst_s)
    print(json.dumps(selftest.as_tree(report), indent=1) if arguments.json else selftest.as_table(report))
    return EXIT_OK if report.ok else EXIT_FAILED


def _sensors(arguments: argparse.Namespace) -> int:
    from node_agent import power_model, sensors, sensors_table
    from node_agent.errors import ConfigError

    sysroot, model = arguments.sysroot, None
    if arguments.config is not None:
        from node_agent import config

        settings = config.load(arguments.config)
        sysroot, model = settings.node.sysroot, settings.power_model
    if not sysroot.is_dir():
        raise ConfigError(f"sysroot {sysroot} is no folder: give the folder that /sys is below")
    found = power_model.with_model(sensors.find(sysroot), power_model.CpuTime(sysroot), model)
    rows = sensors_table.rows(found, arguments.rate)
    if arguments.json:
        print(json.dumps(sensors_table.as_tree(found, rows), indent=1))
    else:
        print(sensors_table.as_table(found, rows, sysroot))
    return EXIT_OK


def _say(text: str) -> None:
    print(f"node-agent: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _enrol(arguments: argparse.Namespace) -> int:
    from node_agent import config, enrol

    who = enrol.identity(config.load(arguments.config, enrolled=False))
    if arguments.renew:
        made, new = enrol.renew(who), True
    else:
        made, new = enrol.until_enrolled(who, arguments.once, _say)
    return _enrolled(who.node, made, new, arguments.json)


def _first_boot(arguments: argparse.Namespace) -> int:
    from node_agent import config, enrolment, first_boot

    user = first_boot.owner(arguments.owner, arguments.to)
    made, new = first_boot.run(arguments.pack, arguments.to, user, arguments.hostname, arguments.once, _say)
    node = config.load(arguments.to / enrolment.CONFIG).node.id
    return _enrolled(node, made, new, arguments.json)


def _enrolled(node: str, made: enrol.Certificate, new: bool, as_json: bool) -> int:
    import dataclasses
    import time

    if as_json:
        print(json.dumps({"node": node, "new": new} | dataclasses.asdict(made), indent=1))
    else:
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(made.not_after_utc_s))
        print(f"{node} {'has got' if new else 'has'} certificate {made.serial}, valid until {until}")
    return EXIT_OK


def main(argv: list[str] | None = None) -> int:
    """Parses, runs one sub-command, and turns expected errors into one line and an exit code."""
    arguments = _parser().parse_args(argv)
    from node_agent.errors import AgentError, ConfigError, ExpertError, RefusedError, StartAgainError
    from node_agent.shard import BundleError

    command = {"run": _run, "selftest": _selftest, "sensors": _sensors, "enrol": _enrol, "first-boot": _first_boot}
    try:
        return command[arguments.command](arguments)
    except ConfigError as error:
        text, code = str(error), EXIT_USAGE
    except (BundleError, ExpertError) as error:
        text, code = str(error), EXIT_BUNDLE
    except RefusedError as error:
        text, code = str(error), EXIT_FAILED
    except StartAgainError as error:
        text, code = str(error), EXIT_AGAIN
    except (AgentError, OSError) as error:
        text, code = str(error), EXIT_MACHINE
    except ImportError as error:
        text, code = f"{error}: install the base package again (pip install spacemoe-kit)", EXIT_MACHINE
    except KeyboardInterrupt:
        text, code = "interrupted", 130
    _say(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
