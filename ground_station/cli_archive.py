"""`spacemoe export` and `spacemoe archive`: what a ground station kept, as files for other programs, shown, or checked for damage.

Leaves out: the work (archive_export.py, archive_read.py, archive_schema.py).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from ground_station.cli_shared import EXIT_CHECK, EXIT_OK, UsageError, wrapped

FORMATS = ("parquet", "csv", "jsonl")  # of archive_export, which imports numpy; a test compares them
TIME_HELP = "2026-11-30T12:00Z, a time ago such as 10m, 2h or 1d, or seconds since 1970"


def add(commands, command) -> None:
    """Declares them in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    export = command("export", "write an archive as Parquet, CSV or JSON lines", _export)
    export.add_argument("archive", type=Path, metavar="ARCHIVE", help="folder of the archive, or its archive.sqlite")
    export.add_argument(
        *("-o", "--output"),
        type=Path,
        required=True,
        metavar="DIR|FILE",
        help="a new folder for all tables; or a file named .parquet, .csv or .jsonl for the telemetry alone",
    )
    export.add_argument("--format", choices=FORMATS, help="default: as FILE is named, else parquet")
    export.add_argument("--since", metavar="TIME", help=TIME_HELP)
    export.add_argument("--until", metavar="TIME", help="as --since")
    export.add_argument("--node", action="append", metavar="NODE", help="only this one; may be given again")
    export.add_argument("--signal", action="append", metavar="NAME", help="only this one; may be given again")
    archive = commands.add_parser(
        "archive", help="what a ground station kept: show it, check it", description=__doc__.splitlines()[0]
    )
    parts = archive.add_subparsers(dest="archive_command", metavar="COMMAND", required=True)
    for name, help, run in (
        ("show", "how much of what is in an archive, from when to when, of which nodes", _show),
        ("check", "read all of an archive for damage", _check),
    ):
        part = command(name, help, run, parts)
        part.add_argument("archive", type=Path, metavar="ARCHIVE", help="its folder, or its archive.sqlite")


def _export(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ground_station import archive_export, time_words
    from ground_station.archive_read import ArchiveReader

    now_utc_s = time.time()
    since_s, until_s = (
        None if text is None else time_words.utc_s(text, now_utc_s) for text in (args.since, args.until)
    )
    if since_s is not None and until_s is not None and since_s >= until_s:
        raise UsageError(f"--since {args.since} is not before --until {args.until}")
    named = args.output.suffix.lstrip(".")
    alone = named in FORMATS and not args.output.is_dir()
    format = args.format or (named if alone else "parquet")
    if alone and format != named:
        raise UsageError(f"{args.output} is named .{named} and --format says {format}: give one or the other")
    if format == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ModuleNotFoundError:
            raise RuntimeError(
                "Parquet needs pyarrow, which is not installed: pip install 'spacemoe-kit[experiments]', or give --format csv"
            ) from None
    chosen = archive_export.Selection(
        *(since_s, until_s),
        *(None if names is None else tuple(dict.fromkeys(names)) for names in (args.node, args.signal)),
    )
    with ArchiveReader(args.archive) as reader:
        with tqdm(desc="export", unit=" messages", leave=False, disable=True if args.json else None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            if alone:
                rows = {"telemetry": archive_export.telemetry_file(reader, args.output, format, chosen, progress)}
            else:
                rows = archive_export.folder(reader, args.output, format, chosen, progress)
    if args.json:
        print(json.dumps({"output": str(args.output), "format": format, "rows": rows}))
    else:
        print(wrapped(f"{args.output}: {format}, " + ", ".join(f"{count} {name}" for name, count in rows.items())))
    return EXIT_OK


def _show(args: argparse.Namespace) -> int:
    from ground_station import archive_retention, time_words
    from ground_station.archive_read import ArchiveReader

    with ArchiveReader(args.archive) as reader:
        tables, nodes = reader.summary(), reader.nodes()
        size = archive_retention.disk_bytes(reader.file)
        file = reader.file
    if args.json:
        shown = [{"node": each.node, "first_utc_s": each.first_utc_s, "last_utc_s": each.last_utc_s} for each in nodes]
        print(json.dumps({"file": str(file), "bytes": size, "tables": tables, "nodes": shown}))
        return EXIT_OK
    print(wrapped(f"{file}: {size / 1e6:.1f} MB"))
    for name, facts in tables.items():
        span = (
            f"{time_words.iso(facts['first_utc_s'])} to {time_words.iso(facts['last_utc_s'])}" if facts["rows"] else ""
        )
        print(wrapped(f"{name:10} {facts['rows']:>10}  {span}".rstrip()))
    for each in nodes:
        print(wrapped(f"{each.node}: {time_words.iso(each.first_utc_s)} to {time_words.iso(each.last_utc_s)}"))
    return EXIT_OK


def _check(args: argparse.Namespace) -> int:
    from ground_station import archive_schema

    file = archive_schema.file_of(args.archive)
    found = archive_schema.damage(file)
    if args.json:
        print(json.dumps({"file": str(file), "ok": not found, "found": found}))
    else:
        for line in found:
            print(wrapped(f"{file}: {line}"))
        print(
            wrapped(
                f"{file}: damaged; get back what can be read by `sqlite3 {file} .recover | sqlite3 NEW`"
                if found
                else f"{file}: ok"
            )
        )
    return EXIT_CHECK if found else EXIT_OK
