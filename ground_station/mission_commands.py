"""The commands an operator can send a node: names, arguments, which are hazardous, and what would be sent. Pure; sends nothing.

The agent checks everything again (node_agent: control.py, guard.py, burn.py). An agent has no `reboot`: `stop` ends it, and its
service manager starts it anew; a new agent or image goes by `spacemoe update` and `spacemoe flash`. Leaves out `clock`, which only
answers a node's question.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MAX_TEXT = 4000


class CommandRefused(ValueError):
    """This command is not sent; the text says why, `fix` what to give. `hazardous`: it only lacks a yes."""

    def __init__(self, text: str, fix: str, hazardous: bool = False):
        super().__init__(text)
        self.fix, self.hazardous = fix, hazardous


@dataclass(frozen=True)
class Argument:
    """A number from `low` to `high`, or (`pattern`) a text; the empty default must be given."""

    name: str
    about: str
    low: float = -math.inf
    high: float = math.inf
    pattern: str = ""
    default: str = ""


@dataclass(frozen=True)
class Known:
    """A command. `hazard`: why it asks for a yes, or empty."""

    name: str
    about: str
    arguments: tuple[Argument, ...] = ()
    hazard: str = ""


CATALOGUE: dict[str, Known] = {
    known.name: known
    for known in (
        Known("ping", "the node answers pong"),
        Known("sample", "telemetry now, not at the next period"),
        Known("rebirth", "the birth certificate again"),
        Known(
            "history",
            "telemetry that the node has kept, again",
            (
                Argument("run", "the agent's run", pattern=r"[0-9]{1,19}"),
                Argument(
                    "ranges", "numbers, as 5-9,12-12", pattern=r"[0-9]{1,19}-[0-9]{1,19}(,[0-9]{1,19}-[0-9]{1,19})*"
                ),
            ),
        ),
        Known(
            "duty",
            "the most it may compute, as a share of time: its power budget",
            (
                Argument("cap", "0 to 1; 1 lifts it", 0.0, 1.0),
                Argument("valid_s", "seconds until its own safe duty", 0.1, 86_400.0),
            ),
            "it overrides the power budget that the ground station or a twin has set",
        ),
        Known(
            "burn",
            "load for a power calibration; 0 seconds ends it",
            (
                Argument("seconds", "0 to 3600", 0.0, 3600.0),
                Argument("duty", "share of time, 0.01 to 1", 0.01, 1.0, default="1"),
            ),
            "it heats the board and draws full power",
        ),
        Known(
            "stop",
            "the agent ends; where a service manager watches it, it starts anew",
            hazard="the node serves nothing until somebody starts its agent",
        ),
    )
}


def check(name: str, arguments: Mapping[str, str], yes: bool) -> tuple[Known, dict[str, str]]:
    """The command, and its arguments with defaults filled in.  Raises: CommandRefused."""
    known = CATALOGUE.get(name)
    if known is None:
        raise CommandRefused(f"command {name[:40]!r} is unknown", f"use one of {', '.join(CATALOGUE)}")
    if unknown := sorted(set(arguments) - {argument.name for argument in known.arguments}):
        takes = ", ".join(argument.name for argument in known.arguments) or "no arguments"
        raise CommandRefused(f"{name} has no argument {unknown[0][:40]!r}", f"it takes {takes}")
    given = {argument.name: _value(known, argument, arguments.get(argument.name)) for argument in known.arguments}
    if known.hazard and not yes:
        raise CommandRefused(f"{name} is hazardous: {known.hazard}", "confirm it: yes = true, or --yes", hazardous=True)
    return known, given


def _value(known: Known, argument: Argument, text: str | None) -> str:
    text = argument.default if text is None or text == "" else text
    if argument.pattern:
        if len(text) > MAX_TEXT or not re.fullmatch(argument.pattern, text):
            raise CommandRefused(
                f"{known.name}'s {argument.name} is {text[:40]!r}", f"give {argument.name}: {argument.about}"
            )
        return text
    try:
        number = float(text) if len(text) <= 32 else math.nan
    except ValueError:
        number = math.nan
    if not argument.low <= number <= argument.high:
        raise CommandRefused(
            f"{known.name}'s {argument.name} is {text[:40]!r}",
            f"give {argument.name} as a number of {argument.low:g} to {argument.high:g}",
        )
    return text


def catalogue() -> list[dict[str, Any]]:
    """For the page and for completion in a shell."""
    rows = []
    for known in CATALOGUE.values():
        row = asdict(known)
        for argument in row["arguments"]:
            for bound in ("low", "high"):
                if not math.isfinite(argument[bound]):
                    argument[bound] = None
        rows.append(row)
    return rows
