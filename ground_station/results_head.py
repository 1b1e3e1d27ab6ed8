"""What a folder of an experiment's results says of itself (experiment.json, summary.json), as a stranger's: bounded, typed, printable.

Leaves out: its tables (results_folder.py), and writing it (experiment_store.py).
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from node_agent import wire

MAX_JSON_BYTES = 1 << 22
MAX_TEXT = 600
MAX_POLICIES, MAX_SEEDS, MAX_NODES, MAX_SLOTS = 64, 100, 1000, 1_000_000
MAX_NUMBER = 1e15
AGAIN = "write the folder anew by `spacemoe experiment run FILE -o DIR`"


class ResultsError(ValueError):
    """A folder or file of results cannot be used; the text names the file and what to do."""


@dataclass(frozen=True)
class Contender:
    label: str
    policy: str
    admission: str
    knobs: dict[str, float]


@dataclass(frozen=True)
class Played:
    """What was played: experiment.Experiment as JSON. costs: precision -> (joules, ms)."""

    name: str
    slots: int
    slot_s: float
    tokens_per_s: float
    coverage: float
    kl_nats: float
    contacts: bool
    seeds: tuple[int, ...]
    precisions: tuple[str, ...]
    costs: dict[str, tuple[float, ...]]
    source: str
    contenders: tuple[Contender, ...]


@dataclass(frozen=True)
class ScenarioFacts:
    name: str
    limit_c: float
    floor_soc: float
    idle_w: float
    busy_w: float
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class BundleFacts:
    name: str
    manifest_sha256: str


@dataclass(frozen=True)
class Head:
    """experiment.json."""

    format: int
    digest: str
    experiment: Played
    scenario: ScenarioFacts
    bundle: BundleFacts
    provenance: str
    versions: dict[str, str]
    written_utc: str


@dataclass(frozen=True)
class Bound:
    """The upper bound of summary.json; useful_tokens None: there is none, and `why`."""

    useful_tokens: float | None
    why: str | None = None
    share_of_demand: float | None = None
    mixes: int | None = None
    disagreement_of_two_formulations: float | None = None
    too_kind_k: float | None = None


@dataclass(frozen=True)
class Summary:
    """What a report needs of summary.json; everything else is worked out of the tables."""

    useful: str
    bound: Bound | None
    notes: tuple[str, ...] = ()


def built(kind: type, tree: dict, path: Path) -> Any:
    """A dataclass of JSON, its texts clean.  Raises: ResultsError."""
    try:
        return _clean(wire.build(kind, tree))
    except wire.WireError as error:
        raise ResultsError(f"{path} is damaged ({clean(str(error))}): {AGAIN}") from None


def clean(text: str) -> str:
    """Text of a file as a page may show it: printable, and no longer than MAX_TEXT."""
    text = "".join(each if each.isprintable() else "\ufffd" for each in text[: MAX_TEXT + 1])
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, tuple):
        return tuple(_clean(each) for each in value)
    if isinstance(value, dict):
        return {clean(key): _clean(each) for key, each in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{name: _clean(getattr(value, name)) for name in value.__dataclass_fields__})
    return value


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def read_json(path: Path, hint: str) -> dict:
    """A JSON object of at most MAX_JSON_BYTES. `hint`: what to do about a damaged one.  Raises: ResultsError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ResultsError(f"{path} is no plain file: {hint}")
        with open(path, "rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ResultsError(f"{path} cannot be read ({error.strerror}): {hint}") from None
    if len(content) > MAX_JSON_BYTES:
        raise ResultsError(f"{path} is over the limit of {MAX_JSON_BYTES} bytes: {hint}")
    try:
        tree = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ResultsError(f"{path} is not JSON: {hint}") from None
    if not isinstance(tree, dict):
        raise ResultsError(f"{path} holds no JSON object: {hint}")
    return tree


def check(head: Head, summary: Summary | None, folder: Path) -> None:
    """What types alone do not say.  Raises: ResultsError."""
    played, scenario = head.experiment, head.scenario
    labels = [each.label for each in played.contenders]
    sizes = (
        (labels, MAX_POLICIES, "policies"),
        (played.seeds, MAX_SEEDS, "seeds"),
        (scenario.nodes, MAX_NODES, "nodes"),
    )
    for values, most, what in sizes:
        if not 1 <= len(values) <= most or len(set(values)) != len(values):
            raise ResultsError(
                f"{folder}: experiment.json names {len(values)} {what}; 1 to {most} different ones are read: {AGAIN}"
            )
    good = 1 <= played.slots <= MAX_SLOTS and 0 < played.slot_s <= 1e6 and 0 < played.tokens_per_s <= 1e9
    good = good and all(len(cost) == 2 for cost in played.costs.values())
    good = good and abs(scenario.limit_c) <= 1e4 and 0 <= scenario.floor_soc <= 1
    if not good:
        raise ResultsError(f"{folder}: experiment.json has slots, demand, costs or limits that cannot be: {AGAIN}")
    if summary is not None and summary.bound is not None and not 0 <= (summary.bound.useful_tokens or 0) <= MAX_NUMBER:
        raise ResultsError(f"{folder}: summary.json has a bound that cannot be: {AGAIN}")
