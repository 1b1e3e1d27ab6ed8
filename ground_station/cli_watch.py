"""The arguments of mission control that `up` and `demo` have in common. Leaves out what they begin (mission_up.py)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ground_station.cli_shared import UsageError

if TYPE_CHECKING:
    from ground_station import mission_up

WEB_PORT = 8642  # web_server.PORT: named here so that --help stays fast; a test compares them


def watch_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--web-port", type=int, default=WEB_PORT, metavar="N", help="of page and API; 0: neither (default: %(default)s)"
    )
    sub.add_argument("--limits", type=Path, metavar="FILE", help="limits of signals, as TOML (default: the kit's)")
    sub.add_argument("--limit-set", metavar="NAME", help="bench, flight, eclipse ... (default: the file's active one)")
    sub.add_argument(
        "--keep-days", type=float, default=30.0, metavar="D", help="age of the archive; 0: all (default: %(default)g)"
    )
    sub.add_argument(
        "--keep-mb", type=float, default=4000.0, metavar="MB", help="size of the archive (default: %(default)g)"
    )


def watch_of(args: argparse.Namespace, archive: Path, limits: Path | None, **web: object) -> mission_up.Options:
    """What the arguments ask for; `web`: of web_server.Options.  Raises: UsageError, ModuleNotFoundError."""
    from ground_station import mission_up, web_server
    from ground_station.archive_records import Retention

    if not 0 <= args.web_port < 65_536:
        raise UsageError(f"--web-port {args.web_port} is no port: give 0 to 65535")
    if not (0 <= args.keep_days < 1e5 and 16 <= args.keep_mb < 1e9):
        raise UsageError(
            f"--keep-days {args.keep_days:g} --keep-mb {args.keep_mb:g}: give 0 or more days and at least 16 MB"
        )
    return mission_up.Options(
        archive,
        web_server.Options(port=args.web_port, fallback=args.web_port == WEB_PORT, **web),
        limits,
        args.limit_set,
        Retention(args.keep_days or None, int(args.keep_mb * 1e6)),
    )
