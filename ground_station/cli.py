"""The umbrella command `spacemoe`: parse -> one library call -> print, signals, and errors as one line.

Exit codes: 0 done, 1 the work failed, 2 wrong usage (an argument, or what is in a file that it names, cannot be used: a
ValueError), 3 a check did not hold (parity, verify), 130 interrupted, 143 told to end (SIGTERM, SIGHUP).
Leaves out: the sub-commands, which are in the cli_* modules. Those alone may import sibling rooms, inside sub-commands only, so
that `spacemoe --help` stays fast and needs no extra.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading

from ground_station import (
    cli_archive,
    cli_benchmark,
    cli_boards,
    cli_calibrate,
    cli_completion,
    cli_decide,
    cli_demo,
    cli_doctor,
    cli_flash,
    cli_fleet,
    cli_image,
    cli_mission,
    cli_models,
    cli_place,
    cli_sim,
    cli_token,
    cli_tools,
    cli_up,
    cli_update,
)
from ground_station.cli_shared import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    EXIT_USAGE,
    plain,
    reference_bundle,
)

__all__ = ["main", "parser", "reference_bundle"]

# What the system says without a next step.
NEXT_STEPS = {
    errno.ENOSPC: "free space on the disk",
    errno.EDQUOT: "free space on the disk",
    errno.EROFS: "choose a folder that may be written",
    errno.EACCES: "choose a folder that may be written, or change who may use this one",
}


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="spacemoe",
        description="Mixture-of-experts language models spread over small boards that stand in for satellites.",
        epilog="exit codes: 0 done; 1 the work failed; 2 wrong usage: an argument's value, or what is in a file that it names, cannot "
        "be used; 3 a check did not hold; 130 interrupted; 143 terminated",
    )
    root.add_argument("--version", action="store_true", help="print the version and exit")
    commands = root.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help: str, run, group=commands) -> argparse.ArgumentParser:
        sub = group.add_parser(name, help=help.replace("%", "%%"), description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return sub

    # in the order of the help
    for part in (
        cli_demo,
        cli_models,
        cli_calibrate,
        cli_decide,
        cli_sim,
        cli_place,
        cli_fleet,
        cli_up,
        cli_mission,
        cli_archive,
        cli_token,
        cli_doctor,
        cli_tools,
        cli_completion,
        cli_image,
        cli_flash,
        cli_update,
        cli_boards,
        cli_benchmark,
    ):
        part.add(commands, command)
    return root


class _Terminated(BaseException):
    """SIGTERM or SIGHUP came. A BaseException, as KeyboardInterrupt is: nobody may take it for an error of the work."""


def _unwind_when_told_to_end() -> None:
    """Lets SIGTERM and SIGHUP stop children and remove temporary folders as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        return

    def terminate(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # one is enough: a second must not cut the stopping short
        raise _Terminated

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup's choice stands
            signal.signal(number, terminate)


def _line(error: object) -> str:
    """An error's text as users get it: one line that is plain; the system's own words get the path and the next step."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in NEXT_STEPS and error.strerror == os.strerror(error.errno):
        names = " and ".join(
            os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))
        )
        text = f"{names}: {error.strerror}" if names else error.strerror
        text += f": {NEXT_STEPS[error.errno]}"
    return plain(" ".join(text.split()))


def main(argv: list[str] | None = None) -> int:
    """Entry point. Errors are one line that names the next step; a bug shows its traceback."""
    try:
        root = parser()
        args = root.parse_args(argv)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if args.version:
        from importlib import metadata

        try:
            print(f"spacemoe-kit {metadata.version('spacemoe-kit')}")
        except metadata.PackageNotFoundError:
            print("spacemoe-kit source")
        return EXIT_OK
    if args.command is None:
        root.print_help()
        return EXIT_USAGE
    try:
        _unwind_when_told_to_end()
        code = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a closed pipe shows here, not after the exit code was chosen
        return code
    except _Terminated:
        print("terminated: everything that was started has been stopped", file=sys.stderr)
        return EXIT_TERMINATED
    except BrokenPipeError:
        # the reader has gone (`spacemoe ... | head`); what is left in the buffer must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("spacemoe: nobody reads the output any more: stopped", file=sys.stderr)
        return EXIT_FAILED
    except MemoryError as error:
        text = _line(error) or "out of memory"
        print(f"spacemoe: {text}: free memory or take a smaller model or context", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("\ninterrupted: everything that was started has been stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        print(
            f"spacemoe: {_line(error.name)} is not installed: in a clone: pip install -c constraints.txt -e '.[all]'",
            file=sys.stderr,
        )
        return EXIT_FAILED
    except (ValueError, RuntimeError, OSError) as error:
        # RuntimeError's and OSError's own text can span lines; users get one
        print(f"spacemoe: {_line(error)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
