"""Control-plane contract: MQTT topics, message types and their versions, strict JSON decoding.

Semantics follow Sparkplug 3.0 (birth, death by last will, bdSeq, seq, rebirth) with readable JSON instead of protobuf.
A topic is bound to its message type here and nowhere else. Everything from the network is untrusted: `decode` bounds the
size before it parses and checks every field's type, so that a caller sees either a well-formed message or a `WireError`.
Leaves out: the tensor frames of the data plane (`frame.py`) and anything that opens a socket.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union

PROTOCOL_VERSION = 1
TOPIC_ROOT = "spacemoe/v1"
MAX_MESSAGE_BYTES = 256 * 1024
MAX_LIST_ITEMS = 65_536
ID_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")

Validity = Literal["ok", "stale", "missing", "invalid"]
# Bits of the sample `guard_state`: why a node computes less than it could (node_agent.guard).
GUARD_HEAT, GUARD_UNKNOWN_TEMP, GUARD_FLAGS, GUARD_GROUND, GUARD_SILENT, GUARD_MEMORY, GUARD_NO_LIMIT = (
    1 << bit for bit in range(7)
)
Provenance = Literal["measured", "derived", "estimated", "simulated", "virtual"]
StatusText = Literal["online", "offline"]


class WireError(ValueError):
    """A message or name from outside does not follow the contract; the text says how."""


def check_id(text: str, what: str = "node id") -> str:
    """Returns `text` if it is a legal fleet or node id (1-32 of a-z, 0-9, inner '-').  Raises: WireError."""
    if not isinstance(text, str) or not ID_PATTERN.fullmatch(text):
        raise WireError(f"{what} {text!r} is not legal: use 1-32 of a-z, 0-9 and inner '-'")
    return text


# ---------------------------------------------------------------- message types


@dataclass(frozen=True)
class Sample:
    """One reading. `value` is None unless validity is 'ok' or 'stale': never a fake zero.

    `generated_at` is the node's UTC clock in seconds; the receiver adds its own time of arrival.
    """

    name: str
    value: float | None
    unit: str
    validity: Validity
    provenance: Provenance
    scope: str
    generated_at: float


@dataclass(frozen=True)
class SensorInfo:
    """What a node says of a sensor in its birth certificate."""

    name: str
    unit: str
    scope: str
    provenance: Provenance
    rate_hz: float


@dataclass(frozen=True)
class HostedShard:
    """A shard that is loaded and ready on a node."""

    layer: int
    expert: int
    precision: str
    sha256: str


@dataclass(frozen=True)
class Birth:
    """Retained, QoS 1: everything the ground station must know of a node before it uses it."""

    node: str
    bd_seq: int
    agent_version: str
    board: str
    generated_at: float
    sensors: tuple[SensorInfo, ...]
    shards: tuple[HostedShard, ...]
    bundle: str
    memory_bytes: int
    data_endpoint: str
    data_public_key: str = ""
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class Status:
    """Retained; 'offline' is also the last will. A receiver ignores a death whose bd_seq is not the current birth's."""

    node: str
    status: StatusText
    bd_seq: int


@dataclass(frozen=True)
class Telemetry:
    """QoS 0, each second. `seq` counts from the birth; a gap makes the ground station ask for a rebirth.

    `bd_seq` is the session it was made in, also while the broker was away; seq 0: made before the agent's first birth.
    `run` is the first bd_seq that the agent process drew and `number` counts its messages from 1, over all births, so
    (run, number) names a message for ever; number 0: the sender does not count and keeps no history.
    """

    node: str
    bd_seq: int
    seq: int
    generated_at: float
    samples: tuple[Sample, ...]
    run: int = 0
    number: int = 0


@dataclass(frozen=True)
class History:
    """QoS 1: telemetry that was kept on the node, in the order of `number`; never a reason to ask for a rebirth.

    `oldest`: the lowest number that the node still holds, so what is missing below it is gone for good. `dropped`: how
    many messages of this run were lost because the store was full. `owed`: how many are still to come after this batch.
    """

    node: str
    run: int
    oldest: int
    dropped: int
    owed: int
    messages: tuple[Telemetry, ...]


@dataclass(frozen=True)
class ClockQuery:
    """QoS 0: a node asks for the ground station's time; the answer is the command 'clock' with the same `id`.

    `sent_at` is the node's UTC clock in seconds, which may be wrong by decades. The command's arguments are decimal seconds
    of the ground station's UTC clock: `received_at` (of the query) and `answered_at`.
    """

    node: str
    id: str
    sent_at: float


@dataclass(frozen=True)
class Event:
    """QoS 1: something happened on a node. `severity` as in Yamcs."""

    node: str
    generated_at: float
    severity: Literal["info", "watch", "warning", "distress", "critical", "severe"]
    kind: str
    text: str


@dataclass(frozen=True)
class Command:
    """QoS 1. `expires_at` is UTC seconds; a node refuses a command that comes later than that."""

    name: str
    id: str
    expires_at: float
    arguments: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """QoS 1: a node's answer to a command."""

    node: str
    id: str
    ok: bool
    text: str


@dataclass(frozen=True)
class GroundStatus:
    """Retained; 'offline' is the ground station's last will, upon which nodes start to store and forward."""

    status: StatusText
    generated_at: float


# ---------------------------------------------------------------- topics


@dataclass(frozen=True)
class Satellite:
    """QoS 0, from the ground station: the virtual satellite that a node stands in for. Its samples are never the board's.

    `mission_at`: mission time, UTC seconds; `scale`: mission seconds per second (energy claims hold only at 1); `invalid`: why
    the run is invalid, or empty.
    """

    node: str
    mission_at: float
    scale: float
    generated_at: float
    samples: tuple[Sample, ...]
    invalid: str = ""


@dataclass(frozen=True)
class Topics:
    """All topics of one fleet. `node="+"` gives the subscription of every node."""

    fleet: str

    def __post_init__(self) -> None:
        check_id(self.fleet, "fleet id")

    def _node(self, node: str, leaf: str) -> str:
        return f"{TOPIC_ROOT}/{self.fleet}/node/{node if node == '+' else check_id(node)}/{leaf}"

    def birth(self, node: str) -> str:
        return self._node(node, "birth")

    def status(self, node: str) -> str:
        return self._node(node, "status")

    def telemetry(self, node: str) -> str:
        return self._node(node, "telemetry")

    def history(self, node: str) -> str:
        return self._node(node, "history")

    def clock(self, node: str) -> str:
        return self._node(node, "clock")

    def event(self, node: str) -> str:
        return self._node(node, "event")

    def command(self, node: str, name: str = "+") -> str:
        return self._node(node, f"command/{name}")

    def result(self, node: str) -> str:
        return self._node(node, "result")

    def satellite(self, node: str) -> str:
        return f"{TOPIC_ROOT}/{self.fleet}/satellite/{node if node == '+' else check_id(node)}"

    def ground_status(self) -> str:
        return f"{TOPIC_ROOT}/{self.fleet}/ground/status"

    def ground_event(self) -> str:
        """Events that the ground station itself found; `node` names whom they are about."""
        return f"{TOPIC_ROOT}/{self.fleet}/ground/event"

    def parse_node(self, topic: str) -> tuple[str, str]:
        """('node id', 'leaf') of a node topic of this fleet.  Raises: WireError for any other topic."""
        prefix = f"{TOPIC_ROOT}/{self.fleet}/node/"
        if not topic.startswith(prefix):
            raise WireError(f"topic {topic[:120]!r} is not of fleet {self.fleet}")
        node, _, leaf = topic[len(prefix) :].partition("/")
        return check_id(node), leaf


MESSAGE_OF_LEAF: dict[str, type] = {
    "birth": Birth,
    "status": Status,
    "telemetry": Telemetry,
    "history": History,
    "clock": ClockQuery,
    "event": Event,
    "result": Result,
}

# ---------------------------------------------------------------- JSON

M = TypeVar("M")


def encode(message: Any) -> bytes:
    """Compact UTF-8 JSON of a message dataclass.  Raises: ValueError for a NaN or an infinity."""
    # `vars` and not dataclasses.asdict, whose copies cost four times as much as the rest.
    return json.dumps(vars(message), separators=(",", ":"), allow_nan=False, default=vars).encode()


def encode_history(head: History, messages: Sequence[bytes]) -> bytes:
    """`head` (whose own `messages` is empty) with telemetry that is encoded already: what is kept is not parsed again."""
    empty = encode(head)
    return empty.removesuffix(b"]}") + b",".join(messages) + b"]}"


def build(kind: type[M], tree: Any) -> M:
    """A dataclass of type `kind` from parsed JSON, every field checked.  Raises: WireError."""
    try:
        return _quick(kind)(tree)
    except _Unfit:
        return _build(kind, tree, kind.__name__)  # says what is wrong, and where


def _refuse_constant(text: str) -> float:
    raise WireError(f"{text} is not a number")


def decode(kind: type[M], payload: bytes | bytearray | memoryview) -> M:
    """The message of type `kind` in `payload`; unknown fields are ignored so that older receivers go on working.

    Raises: WireError when it is too large, not JSON, lacks a field or has one of the wrong type.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise WireError(f"{kind.__name__} of {len(payload)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        tree = json.loads(bytes(payload), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{kind.__name__} is not JSON: {str(error)[:120]}") from None
    return build(kind, tree)


@functools.lru_cache(maxsize=None)
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(hint: Any, tree: Any, where: str) -> Any:
    """`tree` checked against a type hint and turned into it (dataclasses, tuples, dicts, Literals, unions)."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(tree, dict):
            raise WireError(f"{where} is not an object")
        values = {}
        for item in dataclasses.fields(hint):
            if item.name in tree:
                values[item.name] = _build(_hints(hint)[item.name], tree[item.name], f"{where}.{item.name}")
            elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise WireError(f"{where} lacks {item.name!r}")
        return hint(**values)
    if origin is tuple:
        if not isinstance(tree, list) or len(tree) > MAX_LIST_ITEMS:
            raise WireError(f"{where} is not a list of at most {MAX_LIST_ITEMS}")
        inner = typing.get_args(hint)[0]
        return tuple(_build(inner, item, f"{where}[]") for item in tree)
    if origin is dict:
        if not isinstance(tree, dict) or len(tree) > MAX_LIST_ITEMS:
            raise WireError(f"{where} is not an object")
        inner = typing.get_args(hint)[1]
        return {key: _build(inner, item, f"{where}.{key[:40]}") for key, item in tree.items()}
    if origin is Literal:
        if tree not in typing.get_args(hint):
            raise WireError(f"{where} is {str(tree)[:40]!r}, not one of {', '.join(map(str, typing.get_args(hint)))}")
        return tree
    if origin in (Union, types.UnionType):
        if tree is None and type(None) in typing.get_args(hint):
            return None
        return _build(next(a for a in typing.get_args(hint) if a is not type(None)), tree, where)
    if hint is float and isinstance(tree, (int, float)) and not isinstance(tree, bool):
        try:
            number = float(tree)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise WireError(f"{where} is not finite")
        return number
    if hint is int and isinstance(tree, int) and not isinstance(tree, bool) and -(2**63) <= tree < 2**64:
        return tree
    if hint in (str, bool) and isinstance(tree, hint):
        return tree
    raise WireError(f"{where} is not of type {getattr(hint, '__name__', hint)}")


# The same checks compiled once per type: a ground station decodes 200 messages of 30 samples a second, and walking the type
# hints for each value takes five times as long. Whatever does not fit is given to `_build`, which has the last word.


class _Unfit(Exception):
    """Not what the type says, or not known here."""


@functools.lru_cache(maxsize=None)
def _quick(hint: Any) -> Callable[[Any], Any]:
    """A function from parsed JSON to a value of that hint.  Raises (when called): _Unfit."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _quick_object(hint)
    if origin is tuple:
        inner = _quick(typing.get_args(hint)[0])

        def many(tree: Any) -> Any:
            if type(tree) is not list or len(tree) > MAX_LIST_ITEMS:
                raise _Unfit
            return tuple([inner(item) for item in tree])

        return many
    if origin is Literal:
        allowed = frozenset(typing.get_args(hint))

        def word(tree: Any) -> Any:
            if type(tree) is not str or tree not in allowed:
                raise _Unfit
            return tree

        return word
    if origin in (Union, types.UnionType) and type(None) in typing.get_args(hint):
        some = _quick(next(a for a in typing.get_args(hint) if a is not type(None)))
        return lambda tree: None if tree is None else some(tree)
    if hint is float:

        def number(tree: Any) -> Any:
            if type(tree) is float and -math.inf < tree < math.inf:
                return tree
            if type(tree) is int and -_EXACT < tree < _EXACT:
                return float(tree)
            raise _Unfit

        return number
    if hint is int:

        def whole(tree: Any) -> Any:
            if type(tree) is int and -(2**63) <= tree < 2**64:
                return tree
            raise _Unfit

        return whole
    if hint is str:

        def text(tree: Any) -> Any:
            if type(tree) is str:
                return tree
            raise _Unfit

        return text
    return _unfit


_EXACT = 2**53


def _unfit(_tree: Any) -> Any:
    raise _Unfit


def _quick_object(kind: type) -> Callable[[Any], Any]:
    hints = _hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    makers = [(name, _quick(hints[name])) for name in names]

    def make(tree: Any) -> Any:
        if type(tree) is not dict:
            raise _Unfit
        try:
            return kind(*[maker(tree[name]) for name, maker in makers])
        except KeyError:
            raise _Unfit from None  # a field that may be absent: the other way knows its default

    return make
