"""Telemetry for the archive's tests, and a writer to run in a process of its own.

`python archive_rig.py FOLDER [PERIOD_S]` hands over 200 messages a second and prints the number of each and the monotonic time.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from ground_station.archive_read import ArchiveReader
from ground_station.fleet import Instant, Taken
from node_agent.wire import Birth, Event, Sample, Telemetry

NOW_UTC_S = time.time()


def samples(values, at_s: float, unit: str = "degC", provenance: str = "measured") -> tuple[Sample, ...]:
    """Samples s0, s1, ... of `values`; None: missing."""
    return tuple(
        Sample(f"s{place}", value, unit, "missing" if value is None else "ok", provenance, "board", at_s)
        for place, value in enumerate(values)
    )


def taken(node: str, number: int, values, at_s: float, run: int = 7, late: bool = False, **more) -> Taken:
    """A message made at `at_s` by the node's clock and come 0.01 s later."""
    telemetry = Telemetry(node, run, number, at_s, samples(values, at_s, **more), run, number)
    return Taken(telemetry, Instant(at_s + 0.01, 5.0), late)


def birth(node: str, at_s: float, bd_seq: int = 7) -> Birth:
    return Birth(node, bd_seq, "1", "pi5", at_s, (), (), "", 1, "tcp://x:1")


def event(node: str, at_s: float, text: str, severity: str = "info", kind: str = "test") -> Event:
    return Event(node, at_s, severity, kind, text)


def telemetry_of(reader: ArchiveReader) -> list[Taken]:
    return [kept.message for kept in reader.messages() if isinstance(kept.message, Taken)]


def main(folder: Path, period_s: float | None) -> None:
    from ground_station import archive

    if period_s is not None:
        archive.PERIOD_S = period_s
    chance = random.Random(1)
    with archive.Archive(folder) as kept:
        begun_s, number = time.monotonic(), 0
        while True:
            number += 1
            kept.telemetry("n1", taken("n1", number, [chance.random() for _ in range(30)], time.time()))
            print(number, time.monotonic(), flush=True)
            time.sleep(max(0.0, begun_s + number / 200 - time.monotonic()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else None)
