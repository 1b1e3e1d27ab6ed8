"""What a run of an expert costs on a board: the contract of the self-test's `costs`, and of costs.json in a bundle.

Written by node_agent.selftest, stored by `spacemoe bundle costs`, read by ground_station.costs. Both are files of strangers: sizes are
bounded before anything is read, values must make sense. Leaves out: measuring (selftest_costs.py).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from node_agent import wire
from node_agent.frame import PRECISIONS

FILE = "costs.json"
FORMAT, FORMAT_VERSION = "spacemoe-costs", 1
MAX_BYTES = 1 << 20
MAX_BOARDS = 256
MAX_TEXT = 200
MAX_MS, MAX_JOULES, MAX_RUNS = 1e6, 1e6, 10**12
BATCH_ROWS = 8
_NEXT = "give what node-agent selftest --bundle DIR --json printed"


class CostsError(ValueError):
    """A self-test's file or costs.json cannot be used; the text names the next step."""


@dataclass(frozen=True)
class Spread:
    """Milliseconds of one call: median, tenth and ninetieth percentile of `n` calls over all timed shards."""

    n: int
    median_ms: float
    p10_ms: float
    p90_ms: float


@dataclass(frozen=True)
class Energy:
    """Joules of one run of one row over idle: mean, least and most of `n` bursts, together `runs` runs.

    `idle_w`, `burst_w`: the board's watts meanwhile; `cpu_ms`: processor time of one run over idle, the call included.
    `provenance` as wire.Provenance: a meter's own (measured, derived), estimated by a power model, or simulated; `scope`: what
    the meter sees, in words.
    """

    joules: float
    least_j: float
    most_j: float
    n: int
    runs: int
    idle_w: float
    burst_w: float
    cpu_ms: float
    provenance: wire.Provenance
    scope: str


@dataclass(frozen=True)
class Cost:
    """Of one precision: one row, and one call of BATCH_ROWS rows. `energy` None: `no_energy` says why."""

    precision: str
    row: Spread
    batch: Spread
    energy: Energy | None
    no_energy: str = ""


@dataclass(frozen=True)
class BoardCosts:
    """One self-test: `board` is the kind of board, `threads` of a session, `at` UTC in ISO 8601, `bundle` its name and D and I its
    experts' sizes; `machine`: what computed, in words. `simulated`: the sensors were; the times are the machine's all the same."""

    board: str
    agent_version: str
    at: str
    bundle: str
    hidden: int
    intermediate: int
    threads: int
    machine: str
    simulated: bool
    costs: tuple[Cost, ...]


@dataclass(frozen=True)
class _File:
    boards: tuple[BoardCosts, ...]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


def check(found: BoardCosts) -> BoardCosts:
    """The same, if it makes sense.  Raises: CostsError."""

    def must(holds: bool, text: str) -> None:
        if not holds:
            raise CostsError(f"costs of {found.board[:40]!r}: {text}: run node-agent selftest again")

    texts = [found.board, found.agent_version, found.at, found.bundle, found.machine]
    for cost in found.costs:
        texts += [cost.no_energy, cost.energy.scope if cost.energy else ""]
    for text in texts:
        must(len(text) <= MAX_TEXT and (not text or text.isprintable()), f"{text[:40]!r} is no short printable text")
    must(bool(found.board), "the board has no name")
    names = [cost.precision for cost in found.costs]
    must(bool(names) and set(names) <= set(PRECISIONS) and len(set(names)) == len(names), "precisions are unknown")
    for cost in found.costs:
        for spread in (cost.row, cost.batch):
            ordered = 0 < spread.p10_ms <= spread.median_ms <= spread.p90_ms <= MAX_MS
            must(ordered and 0 < spread.n <= MAX_RUNS, f"milliseconds of {cost.precision} are none")
        if (energy := cost.energy) is not None:
            must(0 < energy.joules <= MAX_JOULES, f"joules of {cost.precision} are none")
            must(energy.least_j <= energy.joules <= energy.most_j <= MAX_JOULES, f"joules of {cost.precision} are none")
            must(0 < energy.n <= energy.runs <= MAX_RUNS, f"runs of {cost.precision} are none")
            must(not found.simulated or energy.provenance != "measured", "simulated joules are called measured")
        else:
            must(bool(cost.no_energy), f"no reason for no joules of {cost.precision}")
    return found


def _tree(path: Path) -> Any:
    """Raises: CostsError."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CostsError(f"{path} cannot be read ({error.strerror}): {_NEXT}") from None
    if len(content) > MAX_BYTES:
        raise CostsError(f"{path} is over the limit of {MAX_BYTES} bytes: {_NEXT}")

    def refuse(text: str) -> float:
        raise ValueError(f"{text} is no number")

    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise CostsError(f"{path} is not JSON: {_NEXT}") from None


def from_selftest(path: Path) -> BoardCosts:
    """The costs in what `node-agent selftest --bundle DIR --json` printed.  Raises: CostsError."""
    tree = _tree(path)
    costs = tree.get("costs") if isinstance(tree, dict) else None
    if costs is None:
        raise CostsError(f"{path} holds no costs: write it by node-agent selftest --bundle DIR --board NAME --json")
    try:
        return check(wire.build(BoardCosts, costs))
    except wire.WireError as error:
        raise CostsError(f"{path} is damaged ({error}): run node-agent selftest again") from None


def read(path: Path) -> dict[str, BoardCosts]:
    """costs.json by board.  Raises: CostsError."""
    tree = _tree(path)
    try:
        found = wire.build(_File, tree)
    except wire.WireError as error:
        raise CostsError(f"{path} is damaged ({error}): store the costs again by `spacemoe bundle costs`") from None
    if found.format != FORMAT or found.format_version != FORMAT_VERSION:
        raise CostsError(
            f"{path} is not of format {FORMAT} {FORMAT_VERSION}: update spacemoe-kit, or store the costs again"
        )
    if len(found.boards) > MAX_BOARDS:
        raise CostsError(f"{path} has {len(found.boards)} boards, {MAX_BOARDS} are allowed")
    return {each.board: check(each) for each in found.boards}


def content(boards: dict[str, BoardCosts]) -> bytes:
    """costs.json.  Raises: CostsError for too many boards."""
    if len(boards) > MAX_BOARDS:
        raise CostsError(f"{len(boards)} boards are over the limit of {MAX_BOARDS}: take one out of {FILE}")
    ordered = tuple(boards[name] for name in sorted(boards))
    return json.dumps(asdict(_File(ordered)), indent=1, allow_nan=False).encode() + b"\n"


def words(costs: BoardCosts) -> list[str]:
    """For people: one line for the board, one per precision."""
    board = f"board {costs.board}{' (simulated)' if costs.simulated else ''}: {costs.bundle} on {costs.machine}"
    lines = [
        f"{board}, {costs.threads} thread{'s' if costs.threads != 1 else ''}, agent {costs.agent_version}, {costs.at}"
    ]
    for cost in costs.costs:
        text = f"{cost.precision} {cost.row.median_ms:.4g} ms a row ({cost.row.p10_ms:.4g} to {cost.row.p90_ms:.4g}, n {cost.row.n})"
        text += f", {cost.batch.median_ms:.4g} ms for {BATCH_ROWS}"
        if cost.energy is not None:
            e = cost.energy
            text += f", {e.joules:.3g} J ({e.least_j:.3g} to {e.most_j:.3g}, n {e.n}, {e.provenance}: {e.scope})"
        else:
            text += f", no joules: {cost.no_energy}"
        lines.append(text)
    return lines


def per_run(costs: BoardCosts) -> tuple[list[float], list[float]]:
    """(joules, ms) of one row through one expert, by precision id [P]; not a number where unknown."""
    joules, ms = [math.nan] * len(PRECISIONS), [math.nan] * len(PRECISIONS)
    for cost in costs.costs:
        index = PRECISIONS.index(cost.precision)
        ms[index] = cost.row.median_ms
        joules[index] = cost.energy.joules if cost.energy else math.nan
    return joules, ms
