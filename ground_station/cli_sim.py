"""`spacemoe sim`: constellations without boards, and simulated boards for a ground station of one's own.

Leaves out: the run (constellation_report.py and what it calls), and how boards are started (simulated_boards.py).
"""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path

from ground_station.cli_shared import EXIT_OK, UsageError, bundle_of, positive, reference_bundle


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    sim = commands.add_parser("sim", help="constellations of thousands of satellites; simulated boards")
    kinds = sim.add_subparsers(dest="kind", metavar="KIND", required=True)
    run = command("run", "placements and policies on a whole constellation, in mission time", _run, kinds)
    run.add_argument("scenario", help="a file (TOML), or the name of one of the kit: space-xnet, starlink-like")
    run.add_argument("-o", "--output", type=Path, metavar="DIR", help="result.json and slots.parquet go there")
    run.add_argument("--placements", nargs="+", metavar="LABEL", help="only these of the file's placements")
    run.add_argument("--policies", nargs="+", metavar="LABEL", help="only these of the file's policies")
    run.add_argument("--slots", type=positive, help="instead of the file's; without its slot_s they divide an orbit")
    run.add_argument("--seed", type=int, help="instead of the file's")
    run.add_argument("--bundle", type=Path, help="whose calibration the routing takes (default: the reference model's)")
    up = command("up", "simulated boards that run until Ctrl-C, for a broker of one's own", _up, kinds)
    up.add_argument("--boards", type=positive, default=4, help="default: %(default)s")
    up.add_argument("--broker", default="127.0.0.1:1883", metavar="HOST:PORT", help="default: %(default)s")
    up.add_argument("--data", default="tcp://127.0.0.1:5570", metavar="ENDPOINT", help="default: %(default)s")
    up.add_argument("--delivery", default="", metavar="ENDPOINT", help="of `spacemoe place` (default: none)")
    up.add_argument("--fleet", default="demo", help="default: %(default)s")
    up.add_argument("--bundle", type=Path, help="bundle (default: the reference model)")
    up.add_argument("--precision", default="int8", help="of each expert's first copy (default: %(default)s)")
    up.add_argument("--replica", default="int4", help="precision of the copy on the next board (default: %(default)s)")
    up.add_argument("--empty", action="store_true", help="no expert yet: wait for `spacemoe place` (with --delivery)")


def _run(args: argparse.Namespace) -> int:
    try:
        from ground_station import constellation_file, constellation_report
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"sim run needs {error.name}, which is not installed: pip install 'spacemoe-kit[sim]'"
        ) from None
    study = constellation_file.find(args.scenario).narrowed(args.slots, args.seed, args.placements, args.policies)
    bundle = args.bundle or reference_bundle()
    if study.model.routing == "calibration" and not bundle.is_dir():
        raise UsageError(f"there is no bundle at {bundle}: give --bundle DIR, whose calibration says how tokens route")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise UsageError(f"{args.output} is no folder: give -o a new one")
    result = constellation_report.run(study, bundle, args.output)
    print(json.dumps(result) if args.json else constellation_report.text(result))
    return EXIT_OK


def _up(args: argparse.Namespace) -> int:
    from ground_station import simulated_boards

    if args.empty and not args.delivery:
        raise UsageError("--empty boards get their experts over --delivery: give its ENDPOINT, as tcp://127.0.0.1:5571")
    options = simulated_boards.Options(
        args.boards,
        bundle_of(args),
        args.broker,
        args.data,
        args.delivery,
        args.fleet,
        args.precision,
        args.replica,
        args.empty,
    )

    def started(what: dict) -> None:
        if args.json:
            print(json.dumps(what), flush=True)
            return
        for board in what["boards"]:
            print(f"{board['node']:20} {board['profile']:24} {board['shards']:4} shards (simulated sensors)")
        print(f"fleet {what['fleet']} at {what['broker']}, data {what['data']}; Ctrl-C stops them", flush=True)

    simulated_boards.run(options, started, threading.Event())
    return EXIT_OK
