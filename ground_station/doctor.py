"""`spacemoe doctor`: what a ground station needs, looked at one by one, each failure with the command that mends it.

Nothing is changed, and nothing is asked over the network unless a time server is named. Leaves out the looking itself
(doctor_machine.py, doctor_clock.py, doctor_ports.py, doctor_kept.py) and the command line (cli_doctor.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `text`: what was found; `fix`: the command that mends it, empty where `ok`."""

    name: str
    ok: bool
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Setting:
    """What is meant. `fleet`, `bundle`: folders, or None for what was not named; `state`: the folder that a run writes to;
    `ntp`: HOST or HOST:PORT to ask for the time, or empty. `now_utc_s`: the clock that is looked at."""

    fleet: Path | None = None
    bundle: Path | None = None
    state: Path = Path(".")
    ntp: str = ""
    now_utc_s: Callable[[], float] = time.time


def examine(setting: Setting) -> Iterator[Check]:
    """Every check, in the order of the report; one that breaks is itself a finding and hides no other."""
    from ground_station import doctor_clock, doctor_kept, doctor_machine, doctor_ports

    looks: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
        ("python", doctor_machine.python),
        ("packages", doctor_machine.packages),
        ("mosquitto", lambda: doctor_machine.mosquitto(setting.fleet is not None)),
        ("disk", lambda: doctor_machine.disk(setting.state)),
        ("memory", doctor_machine.memory),
        ("open_files", doctor_machine.open_files),
        ("clock", lambda: doctor_clock.clock(setting)),
        ("ports", lambda: doctor_ports.ports(setting.fleet)),
        ("reference_bundle", doctor_kept.reference),
        ("bundle", lambda: doctor_kept.bundle(setting.bundle)),
        ("fleet", lambda: doctor_kept.fleet(setting.fleet, setting.now_utc_s())),
        ("archive", lambda: doctor_kept.archive(setting.state)),
    )
    for name, look in looks:
        try:
            yield from look()
        except Exception as error:  # what breaks a check is what a person came to find out
            text = f"this could not be looked at ({type(error).__name__}: {str(error)[:200]})"
            yield Check(name, False, text, "run it again as the user who runs the ground station")
