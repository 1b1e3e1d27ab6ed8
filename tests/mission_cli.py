"""Runs `spacemoe` in a process of its own with the sub-commands of mission control, also before cli.py lists them."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ground_station import cli  # noqa: E402

ORIGINAL = cli.parser
PARTS = ("doctor", "mission", "completion", "tools")
COMMAND = [sys.executable, str(Path(__file__).resolve())]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def spacemoe(
    *arguments: object, before: tuple[str, ...] = (), timeout: float = 120, **options
) -> subprocess.CompletedProcess:
    options.setdefault("env", environment())
    return subprocess.run(
        [*before, *COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **options
    )


def parser() -> argparse.ArgumentParser:
    root = ORIGINAL()
    commands = next(action for action in root._actions if isinstance(action, argparse._SubParsersAction))

    def command(name, help, run, group=commands):
        sub = group.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return sub

    for part in PARTS:
        name = {"mission": "nodes"}.get(part, part)
        if name not in commands.choices and (ROOT / "ground_station" / f"cli_{part}.py").is_file():
            importlib.import_module(f"ground_station.cli_{part}").add(commands, command)
    return root


def main(argv: list[str] | None = None) -> int:
    cli.parser = parser
    try:
        return cli.main(argv)
    finally:
        cli.parser = ORIGINAL


def here(*arguments: object, **more: str) -> subprocess.CompletedProcess:
    """The same in this process, which has loaded everything already; `more` are environment variables."""
    out, err = io.StringIO(), io.StringIO()
    before, stdin = dict(os.environ), sys.stdin
    os.environ.update(more)
    try:
        with open(os.devnull) as sys.stdin, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(list(map(str, arguments)))
            except SystemExit as error:  # argparse's
                code = error.code
    finally:
        sys.stdin = stdin
        os.environ.clear()
        os.environ.update(before)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


if __name__ == "__main__":
    sys.exit(main())
