"""Carries out an ordered list of moves of shards, with progress, so that it can be stopped, gone on with, and undone.

Every step is one that may be done twice: delivering what is there sends nothing, dropping what is not there is done already. A
journal on the disk says how far a list is, so that a new process goes on with it; the way back is the done steps in reverse order,
each turned round, which again copies before it drops.
Leaves out: which moves (placement_moves.py); all copies come from the bundle here, none from node to node.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ground_station.delivery import Delivered, Deliverer
from ground_station.delivery_pace import Windows
from ground_station.placement_moves import Move
from node_agent import shard, wire
from node_agent.delivery_frame import Shard

MAX_JOURNAL_BYTES = 64 * 1024 * 1024


class JournalError(ValueError):
    """A journal cannot be used; the text names the file and the next step."""


@dataclass(frozen=True)
class Step:
    """`kind` "copy": the shard is to be on the node; "drop": it is not to be there any more."""

    kind: Literal["copy", "drop"]
    node: str
    shard: Shard

    @property
    def inverse(self) -> Step:
        return dataclasses.replace(self, kind="drop" if self.kind == "copy" else "copy")


@dataclass(frozen=True)
class Journal:
    """A list of steps of one bundle, the first `done` of which are carried out."""

    bundle: str
    steps: tuple[Step, ...]
    done: int = 0


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` (counted from 0) is under way, and `bytes` of `total_bytes` of its shard are on the node."""

    step: int
    steps: int
    what: Step
    bytes: int
    total_bytes: int


def steps_of(
    moves: Iterable[Move], nodes: Sequence[str], precisions: Sequence[str], moe_layers: Sequence[int]
) -> tuple[Step, ...]:
    """Steps of placement_moves' indices, which stand for these nodes, variants and layers."""
    return tuple(
        Step(move.kind, nodes[copy.node], Shard(moe_layers[copy.layer], copy.expert, precisions[copy.variant]))
        for move in moves
        for copy in (move.copy,)
    )


def undone(journal: Journal) -> Journal:
    """The way back from where a list has got to."""
    return Journal(journal.bundle, tuple(step.inverse for step in reversed(journal.steps[: journal.done])))


def read_journal(path: Path) -> Journal:
    """Raises: JournalError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_JOURNAL_BYTES + 1)
        if len(raw) > MAX_JOURNAL_BYTES:
            raise JournalError(f"{path} is over {MAX_JOURNAL_BYTES} bytes: not a journal of ours")
        journal = wire.build(Journal, json.loads(raw))
        for step in journal.steps:
            wire.check_id(step.node)
    except OSError as error:
        raise JournalError(f"{path} cannot be read ({error.strerror}): give the journal of a placement") from None
    except (wire.WireError, ValueError, RecursionError) as error:
        if isinstance(error, JournalError):
            raise
        raise JournalError(f"{path} is damaged ({str(error)[:120]}): plan the placement again") from None
    if not 0 <= journal.done <= len(journal.steps):
        raise JournalError(f"{path} says that {journal.done} of {len(journal.steps)} steps are done: plan again")
    return journal


def write_journal(path: Path, journal: Journal) -> None:
    with shard.atomic_file(path) as file:
        file.write(json.dumps(dataclasses.asdict(journal)).encode())


def carry_out(
    journal: Journal,
    deliverer: Deliverer,
    root: Path,
    manifest: shard.Manifest,
    path: Path | None = None,
    progress: Callable[[Progress], None] = lambda now: None,
    on_step: Callable[[Step], None] = lambda step: None,
    windows_to: Callable[[str], Windows | None] = lambda node: None,
) -> tuple[Journal, tuple[Delivered, ...]]:
    """Goes on with `journal` to its end; (the journal then, what was sent). After each step the journal is written to `path`.

    `on_step(step)` is called before a drop and after a copy: requests must not be sent to a shard that goes, and may be sent to
    one that came. `windows_to(node)`: contacts to impose.
    Raises: JournalError for another bundle's, shard.BundleError, delivery.DeliveryError; what was done by then is in the journal.
    """
    if journal.bundle != manifest.name:
        raise JournalError(f"the journal is of bundle {journal.bundle[:80]}, not of {manifest.name}: give that bundle")
    entries = {(entry.layer, entry.expert, entry.precision): entry for entry in manifest.shards}
    for step in journal.steps:
        if dataclasses.astuple(step.shard) not in entries:
            raise JournalError(f"bundle {manifest.name} has no shard {step.shard.stem}: plan the placement again")
    sent = []
    if path is not None:
        write_journal(path, journal)
    for number in range(journal.done, len(journal.steps)):
        step = journal.steps[number]
        entry = entries[dataclasses.astuple(step.shard)]

        def told(
            done: int, total: int, number: int = number, count: int = len(journal.steps), step: Step = step
        ) -> None:
            progress(Progress(number, count, step, done, total))

        if step.kind == "copy":
            sent.append(deliverer.deliver(step.node, root, manifest, entry, windows_to(step.node), told))
            on_step(step)
        else:
            on_step(step)
            told(0, 0)
            deliverer.drop(step.node, step.shard)
        journal = dataclasses.replace(journal, done=number + 1)
        if path is not None:
            write_journal(path, journal)
    return journal, tuple(sent)
