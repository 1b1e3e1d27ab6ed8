"""A recorded run: what is needed to repeat its decisions without boards, in two files of a folder.

    head.json   format, bundle and its manifest's sha256, prompt, sampling, policy, partition, codec, scenario; sha256 of run.npz
    run.npz     looks at the fleet with their times and the prices that followed, every choice, tokens, every telemetry message

The head is written last: a folder without one, or with one of another run.npz, is refused. Numbers that are not known are UNKNOWN in the
file, since node_agent.npz_file takes finite ones alone. Digests tell damage; who means harm can write new ones, and is found by the
decisions. Leaves out: hidden states and logits (the bundle gives them again), replaying (replay.py).

Shape letters: U looks, C columns of a look, N nodes, P precisions, Q calls of the policy, S all pairs of all calls, T tokens, M messages.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ground_station.live_prices import COLUMNS, Costs, Look
from ground_station.recording_tape import MAX_CALLS, MAX_TOKENS, MESSAGE, Tape
from ground_station.selection_choice import Choice
from ground_station.selection_world import PRECISIONS
from node_agent import npz_file, shard, wire

FORMAT, VERSION = "spacemoe-recording", 1
HEAD, RUN = "head.json", "run.npz"
UNKNOWN = 1e30
MAX_HEAD_BYTES = 4 << 20
MAX_SAID = 80
_SHA256 = re.compile(r"[0-9a-f]{64}")


class RecordingError(ValueError):
    """A recording cannot be used; the text names the next step."""


@dataclass(frozen=True)
class Board:
    """A node of the run: memory that the partition had, its simulated board's profile and further keys ("" for a real board)."""

    node: str
    memory_bytes: int
    profile: str
    simulated: str  # JSON


@dataclass(frozen=True)
class Head:
    """Everything but arrays. scenario: its TOML, or empty; temp_provenance, power_provenance: what nodes said of their readings, by node;
    costs_source: of live_prices.Costs; truncated: the run went on after what is recorded."""

    format: str
    version: int
    made_utc_s: float
    bundle: str
    manifest_sha256: str
    prompt: str
    temperature: float
    top_p: float
    seed: int
    policy: str
    temp_limit_c: float
    precision: str
    replica: str | None
    codec: str
    bits_per_value: float | None
    boards: tuple[Board, ...]
    scenario: str
    costs_source: tuple[str, ...]
    temp_provenance: dict[str, str]
    power_provenance: dict[str, str]
    truncated: bool
    choices_sha256: str
    run_sha256: str


@dataclass(frozen=True, eq=False)
class Recording:
    """A run. looks [U, C, N], look_times [U, 3] (UTC, monotonic, and the queues' seconds), look_call [U]: calls of the policy before it;
    prices [U, 2, N] (joule, byte). choices: one per call. tokens, token_call (its first call), token_whole (no rung of the ladder,
    every node up) [T]; text_tokens: how many tokens each text has. messages [M, 9] by MESSAGE."""

    head: Head
    costs: Costs
    looks: np.ndarray
    look_times: np.ndarray
    look_call: np.ndarray
    prices: np.ndarray
    choices: list[Choice]
    tokens: np.ndarray
    token_call: np.ndarray
    token_whole: np.ndarray
    text_tokens: np.ndarray
    messages: np.ndarray

    def look(self, index: int) -> Look:
        utc_s, mono_s, time_s = self.look_times[index].tolist()
        return Look(utc_s, mono_s, time_s, self.looks[index])


def digest(choices: list[Choice]) -> str:
    """sha256 over every decision: experts, gates, nodes and precisions of each call, little-endian."""
    found = hashlib.sha256()
    for choice in choices:
        found.update(np.array(choice.experts.shape, "<i8").tobytes())
        found.update(choice.experts.astype("<i8").tobytes())
        found.update(choice.gates.astype("<f4").tobytes())
        for part in (choice.nodes, choice.precisions):
            found.update(b"-" if part is None else part.astype("<i8").tobytes())
    return found.hexdigest()


def check_writable(folder: Path) -> None:
    """A folder that cannot be written is told before the run.  Raises: OSError."""
    try:
        if folder.exists() and not folder.is_dir():
            raise OSError("is no folder")
        folder.mkdir(parents=True, exist_ok=True)
        with shard.atomic_file(folder / f"{RUN}.probe") as probe:
            probe.write(b"x")
        (folder / f"{RUN}.probe").unlink()
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror or error}): give another --record DIR") from None


def write(folder: Path, tape: Tape, choices: list[Choice], costs: Costs, head: dict) -> Head:
    """Writes a run; `head`: the fields of Head that the tape does not know. Only whole texts are kept; `choices` are
    theirs, from the first on.  Raises: OSError."""
    texts = tape.text_tokens
    tokens = tape.tokens[: sum(texts)]
    if len(tokens) < len(tape.tokens):  # it ended in the middle of a text
        choices = choices[: tape.tokens[len(tokens)][1]]
    truncated = tape.truncated or len(tokens) < len(tape.tokens)
    looks = [look for look in tape.looks if look[0] <= len(choices)]
    n, u = len(tape.nodes), len(looks)
    pairs = [np.concatenate([part[i].ravel() for part in map(_parts, choices)] or [np.zeros(0)]) for i in range(4)]
    token = np.array(tokens, np.int64).reshape(-1, 3)
    arrays = {
        "looks": np.array([look.values for _, look, _, _ in looks], float).reshape(u, len(COLUMNS), n),
        "look_times": np.array([(each.utc_s, each.mono_s, each.time_s) for _, each, _, _ in looks], float).reshape(
            u, 3
        ),
        "look_call": np.array([call for call, *_ in looks], np.int64),
        "prices": np.array([(joule, byte) for *_, joule, byte in looks], float).reshape(u, 2, n),
        "call_shape": np.array([each.gates.shape for each in choices], np.int32).reshape(-1, 2),
        "call_named": np.array([each.nodes is not None for each in choices], np.int8),
        "experts": pairs[0].astype(np.int16),
        "gates": pairs[1].astype(np.float32),
        "pair_nodes": pairs[2].astype(np.int16),
        "precisions": pairs[3].astype(np.int8),
        "tokens": token[:, 0],
        "token_call": token[:, 1],
        "token_whole": token[:, 2].astype(np.int8),
        "text_tokens": np.array(texts, np.int64),
        "messages": tape.messages,
        "cost_joules": costs.joules,
        "cost_ms": costs.ms,
        "cost_row_bytes": costs.row_bytes,
    }
    arrays = {
        name: np.where(np.isnan(each), UNKNOWN, each) if each.dtype == np.float64 else each
        for name, each in arrays.items()
    }
    with shard.atomic_file(folder / RUN) as file:
        np.savez_compressed(file, **arrays)
    made = Head(
        format=FORMAT,
        version=VERSION,
        costs_source=costs.source,
        temp_provenance=tape.provenance("temp_c"),
        power_provenance=tape.provenance("power_w"),
        truncated=truncated,
        choices_sha256=digest(choices),
        run_sha256=shard.sha256_of(folder / RUN),
        **head,
    )
    with shard.atomic_file(folder / HEAD) as file:
        file.write(wire.encode(made) + b"\n")
    return made


def _parts(choice: Choice) -> tuple[np.ndarray, ...]:
    nobody = np.full(choice.experts.shape, -1)
    return (
        choice.experts,
        choice.gates,
        nobody if choice.nodes is None else choice.nodes,
        nobody if choice.precisions is None else choice.precisions,
    )


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _head(folder: Path) -> Head:
    path = folder / HEAD
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # to open it would wait for a writer
            raise RecordingError(f"{path} is no plain file: record again")
        with open(path, "rb") as file:
            content = file.read(MAX_HEAD_BYTES + 1)
    except OSError as error:
        raise RecordingError(
            f"{folder} holds no recording ({HEAD}: {error.strerror}): make one by `spacemoe demo --record DIR`"
        ) from None
    if len(content) > MAX_HEAD_BYTES:
        raise RecordingError(f"{path} is over the limit of {MAX_HEAD_BYTES} bytes: record again")
    try:
        tree = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise RecordingError(f"{path} is not JSON: record again") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise RecordingError(f"{path} is not of format {FORMAT}: give a folder of `spacemoe demo --record`")
    if tree.get("version") != VERSION:
        raise RecordingError(
            f"{path} has version {str(tree.get('version'))[:20]}, this build reads {VERSION}: record again"
        )
    try:
        head = wire.build(Head, tree)
    except wire.WireError as error:
        raise RecordingError(f"{path} is damaged ({str(error)[:120]}): record again") from None
    sound = all(_SHA256.fullmatch(each) for each in (head.manifest_sha256, head.choices_sha256, head.run_sha256))
    nodes = {board.node for board in head.boards}
    said = (*head.temp_provenance.values(), *head.power_provenance.values())
    sound = sound and all(wire.ID_PATTERN.fullmatch(node) for node in nodes)
    sound = sound and all(len(each) <= MAX_SAID and each.isprintable() for each in said)  # a terminal shows them
    if not sound or not nodes or len(nodes) != len(head.boards) or len(head.costs_source) != len(nodes):
        raise RecordingError(f"{path} is damaged (its digests, nodes or provenances cannot be): record again")
    return head


def read(folder: Path) -> Recording:
    """Raises: RecordingError for what is no whole, unaltered recording."""
    head = _head(folder)
    path, n = folder / RUN, len(head.boards)
    shapes: dict[str, npz_file.Shape] = {
        "looks": (None, len(COLUMNS), n),
        "look_times": (None, 3),
        "look_call": (None,),
        "prices": (None, 2, n),
        "call_shape": (None, 2),
        "call_named": (None,),
        "experts": (None,),
        "gates": (None,),
        "pair_nodes": (None,),
        "precisions": (None,),
        "tokens": (None,),
        "token_call": (None,),
        "token_whole": (None,),
        "text_tokens": (None,),
        "messages": (None, len(MESSAGE)),
        "cost_joules": (n, PRECISIONS),
        "cost_ms": (n, PRECISIONS),
        "cost_row_bytes": (n,),
    }
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or device has no end
            raise RecordingError(f"{path} is no plain file: record again")
        if path.stat().st_size > npz_file.MAX_FILE_BYTES:
            raise RecordingError(f"{path} is over the limit of {npz_file.MAX_FILE_BYTES} bytes: record a shorter run")
        if shard.sha256_of(path) != head.run_sha256:
            raise RecordingError(f"{path} is altered or of another run (its sha256 is not the head's): record again")
        found = npz_file.read(path, shapes)
    except OSError as error:
        raise RecordingError(f"{path} cannot be read ({error.strerror}): record again") from None
    except npz_file.NpzError as error:
        raise RecordingError(f"{path} cannot be used ({error}): record again") from None
    _check(path, found)
    choices = _choices(found)
    if digest(choices) != head.choices_sha256:
        raise RecordingError(f"{path} is altered (its choices are not of the head's sha256): record again")
    found = {name: np.where(values == UNKNOWN, np.nan, values) for name, values in found.items()}
    costs = Costs(found["cost_joules"], found["cost_ms"], found["cost_row_bytes"], head.costs_source)
    return Recording(
        head,
        costs,
        found["looks"],
        found["look_times"],
        found["look_call"].astype(np.int64),
        found["prices"],
        choices,
        found["tokens"].astype(np.int64),
        found["token_call"].astype(np.int64),
        found["token_whole"] > 0,
        found["text_tokens"].astype(np.int64),
        found["messages"],
    )


def _check(path: Path, found: dict[str, np.ndarray]) -> None:
    """Raises: RecordingError where arrays do not fit each other."""
    shape, calls, tokens = found["call_shape"], len(found["call_shape"]), len(found["tokens"])
    sizes = shape[:, 0] * shape[:, 1] if calls else np.zeros(0)
    holds = (
        tokens <= MAX_TOKENS
        and calls <= MAX_CALLS
        and (shape >= 1).all()
        and (shape <= 1 << 16).all()
        and all(len(found[name]) == sizes.sum() for name in ("experts", "gates", "pair_nodes", "precisions"))
        and len(found["call_named"]) == calls
        and len(found["token_call"]) == len(found["token_whole"]) == tokens == found["text_tokens"].sum()
        and (found["text_tokens"] >= 1).all()
        and len(found["look_times"]) == len(found["looks"]) == len(found["look_call"]) == len(found["prices"])
        and all(
            (each >= 0).all() and (np.diff(each) >= 0).all() and (each <= calls).all()
            for each in (found["look_call"], found["token_call"])
        )
        and all((found[name] >= 0).all() for name in ("cost_joules", "cost_ms", "cost_row_bytes"))
    )
    if not holds:
        raise RecordingError(f"{path} is damaged (its arrays do not fit each other): record again")


def _choices(found: dict[str, np.ndarray]) -> list[Choice]:
    shapes = found["call_shape"].astype(int).tolist()
    whole = {name: found[name].astype(np.int64) for name in ("experts", "pair_nodes", "precisions")}
    gates = found["gates"].astype(np.float32)
    choices, start = [], 0
    for shape, named in zip(shapes, (found["call_named"] > 0).tolist()):
        end = start + shape[0] * shape[1]
        experts, nodes, precisions = (whole[name][start:end].reshape(shape) for name in whole)
        own = gates[start:end].reshape(shape)
        choices.append(Choice(experts, own, nodes, precisions) if named else Choice(experts, own))
        start = end
    return choices
