"""`spacemoe doctor`: looks at this machine as a ground station. Leaves out the looking (doctor.py and its parts)."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from ground_station.cli_shared import EXIT_CHECK, EXIT_OK, plain, wrapped


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    doctor = command("doctor", "what this machine lacks as a ground station, and the command that mends it", _doctor)
    doctor.add_argument("--dir", type=Path, metavar="FLEET", help="also look at this fleet's folder and its ports")
    doctor.add_argument("--bundle", type=Path, metavar="DIR", help="also look at this bundle")
    doctor.add_argument(
        "--state",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where runs and the archive are written (default: here)",
    )
    doctor.add_argument(
        "--ntp", default="", metavar="HOST", help="also ask this time server (nothing is asked without it)"
    )
    doctor.epilog = "exit codes: 0 all is well; 3 something is not: its line says which command mends it"


def _doctor(args: argparse.Namespace) -> int:
    from ground_station import doctor

    checks = []
    for check in doctor.examine(doctor.Setting(args.dir, args.bundle, args.state, args.ntp)):
        check = dataclasses.replace(check, text=plain(check.text), fix=plain(check.fix))
        checks.append(check)
        if not args.json:
            print(wrapped(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.text}"))
            if not check.ok:
                print(f"     mend: {check.fix}", flush=True)  # in one piece, to be copied
    failed = [check for check in checks if not check.ok]
    if args.json:
        facts = {"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}
        print(json.dumps(facts))
    else:
        print(f"{len(checks)} checks, {len(failed)} failed" if failed else f"{len(checks)} checks, all well")
    return EXIT_CHECK if failed else EXIT_OK
