"""Spot checks of a real fleet: a node that is quarantined is so in the fleet's records, and the alarm goes out on the control plane.

The record is what lasts: the data plane lets only enrolled nodes in (allow_list.py), so a quarantined one stays out until
`spacemoe fleet release NODE`. Leaves out: when and how a node is checked (spot_check.py, spot_checker.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ground_station.control import Control
from ground_station.fleet_records import FleetFolder
from ground_station.spot_bundle import Bundle
from ground_station.spot_check import Rules
from ground_station.spot_checker import SpotChecker
from node_agent import shard, wire

MAX_REASON = 400


def quarantine(folder: FleetFolder, node: str, reason: str) -> None:
    """Marks an enrolled node's record; one that is revoked stays so.  Raises: FleetFolderError, FleetBusyError, OSError."""
    with folder.change(node) as record:
        if record.state == "enrolled":
            folder.write(dataclasses.replace(record, state="quarantined", reason=" ".join(reason.split())[:MAX_REASON]))


@contextmanager
def checking(
    folder: FleetFolder,
    control: Control,
    root: Path,
    manifest: shard.Manifest,
    births: Mapping[str, wire.Birth],
    say: Callable[[str], None],
    rules: Rules = Rules(),
) -> Iterator[SpotChecker]:
    """A checker whose third opinion is the bundle at `root`; `births`: boards of one kind with one version of the
    agent are taken to compute alike; `say` gets each alarm as well.  Raises: shard.BundleError."""
    bundle = Bundle(root, manifest)

    def alarm(event: wire.Event) -> None:
        say(f"\nALARM {event.kind}: {event.text}\n")
        control.alarm(event)

    try:
        yield SpotChecker(
            rules,
            bundle,
            kinds={node: f"{birth.board} {birth.agent_version}" for node, birth in births.items()},
            on_alarm=alarm,
            on_quarantine=lambda node, reason: quarantine(folder, node, reason),
        )
    finally:
        bundle.close()
