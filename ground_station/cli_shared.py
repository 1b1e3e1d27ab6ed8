"""What the modules of the command line share: exit codes, types of arguments, the bundle that is meant, lines of 80 columns.

Leaves out: the sub-commands (the other cli modules). Nothing heavy is imported at the top: `spacemoe --help` reads this file.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_CHECK, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 3, 130, 143
COLUMNS = 80
MAX_CHARACTERS = 4000  # of one line: more is no text for people, whoever sent it

# Of node_agent.compress, placement_policies and selection: named here so that --help stays fast; a test compares them.
CODECS = ("fp32", "fp16", "q8", "q4", "importance")
PLACEMENTS = ("random", "intra", "roundrobin", "ring", "eplb", "affinity", "hotcore", "budgeted", "coverage", "exact")
POLICIES = ("topk", "random", "coolest", "topp", "naee", "des", "wlr", "similarity", "equinox", "budgeted")


class UsageError(ValueError):
    """An argument's value cannot be used; the text says what to give."""


def reference_bundle() -> Path:
    """The reference model's bundle in this clone (it is not part of an installed wheel)."""
    return Path(__file__).resolve().parent.parent / "quantize" / "reference" / "bundle"


def bundle_of(args: argparse.Namespace) -> Path:
    path = args.bundle or reference_bundle()
    if not path.is_dir():
        hint = "give --bundle DIR" if args.bundle is None else "make one by `spacemoe quantize MODEL -o BUNDLE`"
        raise UsageError(f"there is no bundle at {path}: {hint}")
    return path


def check_writable(path: Path | None, option: str) -> None:
    """Raises: UsageError for a path that can never be a file."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"{path} cannot be written: give {option} a file in a folder that is there")


def plain(text: object, limit: int = MAX_CHARACTERS) -> str:
    """One line with nothing in it that a terminal would obey, cut at `limit` characters: it may quote a stranger's file or board."""
    line = str(text)
    if len(line) > limit:
        line = f"{line[:limit]}... (cut: {len(line)} characters)"
    return "".join(
        each if each.isprintable() else " " if each in "\t\n\v\f\r" else each.encode("unicode_escape").decode()
        for each in line
    )


def wrapped(line: str) -> str:
    """A line of output as plain lines of at most 80 columns; words stay whole, so that paths can be copied."""
    return textwrap.fill(plain(line), COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def scenario_of(name: str):
    try:
        from ground_station import scenario_demo
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"--scenario needs {error.name}, which is not installed: pip install 'spacemoe-kit[sim]'"
        ) from None
    return scenario_demo.find(name)
