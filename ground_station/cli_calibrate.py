"""`spacemoe calibrate`: its arguments, and the calls that fit a board's thermal network or its power model.

Leaves out: the fits (calibrate.py, calibrate_power.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ground_station.cli_shared import EXIT_OK, UsageError, bundle_of, check_writable, positive, wrapped


def add(commands, command) -> None:
    """Declares them in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    calibrate = command(
        "calibrate", "fit a board's Foster network, or its power model, to loads that it is given", _calibrate
    )
    calibrate.add_argument("node", metavar="NODE", help="id of the board's node")
    where = calibrate.add_mutually_exclusive_group()
    where.add_argument("--broker", metavar="HOST:PORT", help="default: 127.0.0.1:1883, or as the fleet's folder says")
    where.add_argument("--simulated", metavar="PROFILE", help="try it on a simulated board of this profile")
    calibrate.add_argument(
        "--dir", type=Path, metavar="FLEET", help="folder of `spacemoe fleet init`, for flashed boards"
    )
    calibrate.add_argument("--fleet", metavar="NAME", help="without --dir (default: demo)")
    for name, default, help in (
        ("settle-s", 1800.0, "idle so long at most before the step"),
        ("window-s", 120.0, "of the drift's measurement"),
        ("drift", 0.2, "K/min: a board that drifts less is at rest"),
        ("step-s", 1200.0, "the step's seconds"),
        ("cool-s", 0.0, "watch it cool for so long"),
    ):
        calibrate.add_argument(f"--{name}", type=float, default=default, help=f"{help} (default: %(default)s)")
    calibrate.add_argument(
        "--power-model",
        action="store_true",
        help="fit watts to busy cores instead, for like boards that have no power sensor",
    )
    calibrate.add_argument(
        "--level-s",
        type=float,
        default=20.0,
        help="of --power-model: seconds at each of six loads (default: %(default)s)",
    )
    calibrate.add_argument("--branches", type=positive, default=2, help="of the network (default: %(default)s)")
    calibrate.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write a TOML fragment for a scenario, or for an agent's configuration",
    )
    calibrate.add_argument("--bundle", type=Path, help="of a simulated board (default: the reference model)")
    calibrate.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")


def _calibrate(args: argparse.Namespace) -> int:
    import contextlib

    from ground_station import calibrate, calibrate_power, calibrate_report, power_fit, power_step
    from ground_station.fleet_access import FLEET, Access, access

    if args.simulated and args.dir:
        raise UsageError("--simulated goes without --dir: it starts a board and a broker of its own")
    where: Access | None = None if args.simulated else access(args.dir, args.broker, args.fleet)
    fleet = where.fleet if where else args.fleet or FLEET
    method = calibrate_power if args.power_model else calibrate
    if args.power_model:
        options = power_fit.Options(args.node, fleet, args.level_s)
    else:
        options = power_step.Options(
            args.node, fleet, args.settle_s, args.window_s, args.drift, args.step_s, args.cool_s, args.branches
        )
    check_writable(args.output, "--output")
    if args.dry_run:
        from ground_station import calibrate_check

        if args.simulated:
            found = calibrate_check.simulated_board(args.simulated, bundle_of(args))
        else:
            found = calibrate_check.node(args.node, fleet, where.host, where.port, where.tls)
        steps, note = method.plan(options), "this was a dry run: nothing was sent or started"
        tree = {"found": found, "plan": steps, "note": note}
        print(json.dumps(tree) if args.json else "\n".join(wrapped(line) for line in (found, *steps, note)))
        return EXIT_OK
    if args.output is not None:
        calibrate_report.check_writable(args.output)
    with contextlib.ExitStack() as stack:
        if args.simulated:
            source = calibrate.simulated(args.simulated, args.node, bundle_of(args), fleet)
            result = method.calibrate(options, *stack.enter_context(source))
        else:
            result = method.calibrate(options, where.host, where.port, where.tls)
    if args.power_model:
        table = power_fit.fragment(result)
        result["toml"], text = table, power_fit.report(result, table)
    else:
        table, text = calibrate_report.fragment(result), calibrate_report.report(result)
    print(json.dumps(result) if args.json else text, flush=True)
    if args.output is not None:  # last: what was measured is not lost with a disk that is full by now
        calibrate_report.write(args.output, table)
    return EXIT_OK
