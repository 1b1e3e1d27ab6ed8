"""What the fuzz tests share: bad input in quantity, and the contract written a second time to say what is to become of it.

The verdicts below are made from the documented layout of a frame (frame.py's header comment) and the documented fields of
a message, with `struct` and `json` alone: our own decoders are what they judge. Everything is fixed by seeds.
Leaves out: who is fuzzed (the test_fuzz files).
"""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from node_agent import entropy_code, frame, wire

# No chance: the same code gives the same examples (hypothesis also draws from the constants of the modules that are loaded, so a
# test alone and the whole suite may differ). Verdicts are computed for whatever comes.
FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=200,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
MEMORY_MB = 20  # what the issue allows a process to grow


def collected(strategy: st.SearchStrategy, count: int) -> list:
    """`count` examples of a strategy, the same each time."""
    kept: list = []

    @settings(FUZZ, max_examples=count + count // 10 + 50, phases=(Phase.generate,))
    @given(strategy)
    def collect(example) -> None:
        kept.append(example)

    collect()
    assert len(kept) >= count, f"hypothesis gave only {len(kept)} of {count} examples"
    return kept[:count]


# ---------------------------------------------------------------- frames

# magic, version, kind, codec, reply codec, hops, pad, layer, source, destination, request id, T, D, P, timing, codec us
HEADER = struct.Struct("<4sBBBBBxHHHQIHHII")
PAIR_BYTES = 9
EXPERTS, PARTIAL, ERROR_KIND, PING, WELCOME, HELLO = 3, 4, 5, 6, 2, 1
EXTREMES = {8: (0, 1, 2, 3, 4, 7, 127, 128, 255), 16: (0, 1, 64, 32_768, 32_769, 65_535)}
EXTREMES[32] = (*EXTREMES[16], 4_096, 4_097, 2**31 - 1, 2**31, 2**32 - 1)
EXTREMES[64] = (*EXTREMES[32], 2**63, 2**64 - 1)


# Few draws make a header, because every one costs hypothesis 0.1 ms: the combinations are laid out beforehand.
_OPENINGS = [
    struct.pack("<4sBBBB", magic, version, kind, codec, reply)
    for magic, version in ((b"SMoE", 1), (b"SMoE", 1), (b"SMoE", 1), (b"smoe", 1), (b"SMoE", 0), (b"SMoE", 2))
    for kind in (EXPERTS, EXPERTS, 1, 2, 4, 5, 6, 7, 0, 8, 255)
    for codec in (0, 1, 2, 3, 4, 5, 255)
    for reply in (0, 3, 4, 5)
]
_SHAPES = [
    (t, d, p)
    for t in (0, 1, 2, 3, 4_096, 4_097, 2**31, 2**32 - 1)
    for d in (0, 1, 2, 33, 64, 64, 32_768, 32_769, 65_535)
    for p in (0, 1, 2, 3, 64, 513, 65_535)
]
_LAYERS = (0, 0, 1, 1, 2, 65_535)
_headers = st.builds(
    lambda opening, layer, middle, shape, timing: b"".join(
        (opening, middle[:2], struct.pack("<H", layer), middle[2:], struct.pack("<IHH", *shape), timing)
    ),
    st.sampled_from(_OPENINGS),
    st.sampled_from(_LAYERS),
    st.binary(min_size=14, max_size=14),
    st.one_of(st.sampled_from(_SHAPES), st.tuples(*(st.integers(0, 2**bits - 1) for bits in (32, 16, 16)))),
    st.binary(min_size=8, max_size=8),
)


def body_bytes(header: bytes) -> int:
    """What a header says that follows it; only for headers whose codec is known."""
    _, _, kind, codec, _, _, _, _, _, _, t, d, p, _, _ = HEADER.unpack(header)
    return p if kind not in (EXPERTS, PARTIAL) else PAIR_BYTES * p + payload_bytes(codec, t, d)


@st.composite
def _consistent(draw) -> bytes:
    """A header and exactly as many bytes as it asks for, where these are few."""
    header = draw(_headers)
    size = body_bytes(header) if header[6] <= 3 else 0
    return header + draw(st.binary(min_size=size, max_size=size)) if size < 3_000 else header


random_frames = st.one_of(
    st.binary(max_size=300),
    _headers,
    st.builds(lambda header, rest: header + rest, _headers, st.binary(max_size=600)),
    _consistent(),
)


def payload_bytes(codec: int, t: int, d: int) -> int:
    """fp32, fp16, and blocks of 32 values with one fp16 scale: 8 or 4 bits each."""
    blocks = t * -(-d // 32)
    return (4 * t * d, 2 * t * d, blocks * 34, blocks * 18)[codec]


# values per symbol of the classes 1..15 of `importance`, as entropy.py documents them
GROUPS = (5, 5, 3, 2, 2, 2, *[1] * 9)


def importance_is_whole(payload: bytes, t: int, d: int) -> bool:
    """Whether a payload follows entropy.py's layout. The Huffman codes alone are taken from there: they are what a class means."""
    if t * d > 1 << 21 or len(payload) < 2 + t:
        return False
    rows = [row & 15 for row in payload[2 : 2 + t]]
    present, rest = sorted(set(rows) - {0}), payload[2 + t :]
    for k in present:
        size = len(rest)
        if k != present[-1]:
            if len(rest) < 4:
                return False
            size, rest = struct.unpack_from("<I", rest)[0], rest[4:]
        if size > len(rest):
            return False
        stream, rest = rest[:size], rest[size:]
        wanted = -(-rows.count(k) * d // GROUPS[k - 1])
        opening = entropy_code.code_of(k).prefix if wanted < 16_384 else b""
        try:
            if len(zlib.decompressobj(-15).decompress(opening + stream, wanted)) != wanted:
                return False
        except zlib.error:
            return False
    return not rest


def _finite_payload(codec: int, payload: bytes, t: int, d: int) -> bool:
    if codec in (0, 1):
        return all(map(math.isfinite, struct.unpack(f"<{t * d}{'fe'[codec]}", payload)))
    scales = t * -(-d // 32)  # an infinite scale makes every value of its block infinite or NaN
    return all(map(math.isfinite, struct.unpack_from(f"<{scales}e", payload)))


def frame_verdict(data: bytes) -> tuple[str, int]:
    """('version' | 'malformed' | the kind's number as text, request id as far as it can be read)."""
    if data[:4] == b"SMoE" and len(data) > 4 and data[4] != 1:
        return "version", HEADER.unpack_from(data)[9] if len(data) >= 40 else 0
    if len(data) < 40 or data[:4] != b"SMoE":
        return "malformed", 0
    _, _, kind, codec, reply, _, _, _, _, request_id, t, d, p, _, step = HEADER.unpack_from(data)
    malformed = ("malformed", request_id)
    if not 1 <= kind <= 7 or codec > 4 or reply > 4 or (kind == EXPERTS and reply == 4 and step > 65_535):
        return malformed
    if kind not in (EXPERTS, PARTIAL):
        return malformed if t or d or p > 512 or len(data) != 40 + p else (str(kind), request_id)
    if not 1 <= t <= 4_096 or not 1 <= d <= 32_768:
        return malformed
    if codec == 4:
        if len(data) < 40 + PAIR_BYTES * p or not importance_is_whole(data[40 + PAIR_BYTES * p :], t, d):
            return malformed
    elif len(data) != 40 + PAIR_BYTES * p + payload_bytes(codec, t, d):
        return malformed
    if kind == EXPERTS:
        pairs = pairs_of(data)
        if not pairs or any(row >= t or precision > 4 or not math.isfinite(g) for row, _, precision, g in pairs):
            return malformed
    if codec != 4 and not _finite_payload(codec, data[40 + PAIR_BYTES * p :], t, d):
        return malformed
    return str(kind), request_id


def pairs_of(data: bytes) -> list[tuple[int, int, int, float]]:
    """(row, expert, precision, gate) of an EXPERTS frame that is whole."""
    p = HEADER.unpack_from(data)[12]
    return [struct.unpack_from("<HHBf", data, 40 + PAIR_BYTES * i) for i in range(p)]


def request_verdict(data: bytes, held: set[tuple[int, int, int]], hidden: int) -> str:
    """What a node that holds `held` (layer, expert, precision) has to say to a whole EXPERTS frame; '' is a partial sum."""
    _, _, _, _, _, _, layer, _, _, _, _, d, _, _, _ = HEADER.unpack_from(data)
    pairs = pairs_of(data)
    if layer not in {layer for layer, _, _ in held}:
        return "layer"
    if d != hidden:
        return "shape"
    if any((layer, expert, precision) not in held for _, expert, precision, _ in pairs):
        return "expert"
    return "shape" if len({pair[:3] for pair in pairs}) < len(pairs) else ""


def real_frames(hidden: int) -> list[bytes]:
    """Frames of every kind as the project sends them; requests in every codec, of one row and of three."""
    rng = np.random.default_rng(3)
    frames = []
    for index, codec in enumerate(("fp32", "fp16", "q8", "q4", "importance")):
        for rows in (1, 3):
            x = rng.standard_normal((rows, hidden)).astype(np.float32)
            pairs = np.array([(row, expert, expert % 3, 0.25) for row in range(rows) for expert in (0, 3)], frame.PAIR)
            fields = {"codec": codec, "reply_codec": codec, "x": x, "layer": rows % 2}
            frames.append(frame.pack(frame.Frame(EXPERTS, 100 + index, pairs=pairs, budget_us=60_000_000, **fields)))
            frames.append(frame.pack(frame.Frame(PARTIAL, 200 + index, source=1, compute_us=300, codec_us=9, **fields)))
    for kind, text in (
        (PING, "are you there"),
        (WELCOME, "n1"),
        (ERROR_KIND, "n1: no such expert"),
        (HELLO, "n1"),
        (7, ""),
    ):
        frames.append(frame.pack(frame.Frame(kind, 300 + kind, destination=1, text=text)))
    return frames


def mutations(originals: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies: bits flipped, bytes set, cut short, made longer, two spliced, a piece twice, a field extreme."""
    rng = random.Random(seed)
    originals = [data for data in originals if len(data) >= 8]
    for index in range(count):
        data = bytearray(rng.choice(originals))
        how = index % 8
        if how <= 2:  # the commonest damage gets the most tries
            for _ in range(rng.randrange(1, 5)):
                bit = rng.randrange(8 * min(len(data), (60, len(data))[how % 2]))
                data[bit // 8] ^= 1 << bit % 8
        elif how == 3:
            del data[rng.randrange(len(data)) :]
        elif how == 4:
            data += rng.randbytes(rng.choice((1, 2, 9, 40, 300)))
        elif how == 5:
            other = rng.choice(originals)
            data = data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
        elif how == 6:
            start = rng.randrange(len(data))
            piece = data[start : start + rng.randrange(1, 50)]
            data[start:start] = piece
        else:
            width = rng.choice((1, 2, 4, 8))
            start = rng.randrange(max(1, min(len(data), 50) - width))
            data[start : start + width] = rng.choice(EXTREMES[8 * width]).to_bytes(width, "little")
        yield bytes(data)


# ---------------------------------------------------------------- messages


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _one_of(*allowed: str):
    return lambda value: isinstance(value, str) and value in allowed


def _list_of(fields: dict):
    return lambda value: isinstance(value, list) and all(_has(item, fields) for item in value)


def _has(tree: object, fields: dict) -> bool:
    """Whether an object has every field, each right; a name that ends in '?' may be left out."""
    if not isinstance(tree, dict):
        return False
    for name, is_right in fields.items():
        key = name.rstrip("?")
        if key not in tree:
            if name == key:
                return False
        elif not is_right(tree[key]):
            return False
    return True


_provenance = _one_of("measured", "derived", "estimated", "simulated", "virtual")
_SAMPLE = {
    "name": _is_text,
    "value": lambda value: value is None or _is_number(value),
    "unit": _is_text,
    "validity": _one_of("ok", "stale", "missing", "invalid"),
    "provenance": _provenance,
    "scope": _is_text,
    "generated_at": _is_number,
}
_SENSOR = {"name": _is_text, "unit": _is_text, "scope": _is_text, "provenance": _provenance, "rate_hz": _is_number}
_SHARD = {"layer": _is_int, "expert": _is_int, "precision": _is_text, "sha256": _is_text}
FIELDS: dict[str, dict] = {
    "birth": {
        "node": _is_text,
        "bd_seq": _is_int,
        "agent_version": _is_text,
        "board": _is_text,
        "generated_at": _is_number,
        "sensors": _list_of(_SENSOR),
        "shards": _list_of(_SHARD),
        "bundle": _is_text,
        "memory_bytes": _is_int,
        "data_endpoint": _is_text,
        "data_public_key?": _is_text,
        "protocol?": _is_int,
    },
    "status": {"node": _is_text, "status": _one_of("online", "offline"), "bd_seq": _is_int},
    "telemetry": {
        "node": _is_text,
        "bd_seq": _is_int,
        "seq": _is_int,
        "generated_at": _is_number,
        "samples": _list_of(_SAMPLE),
        "run?": _is_int,
        "number?": _is_int,
    },
    "clock": {"node": _is_text, "id": _is_text, "sent_at": _is_number},
    "ground_status": {"status": _one_of("online", "offline"), "generated_at": _is_number},
    "event": {
        "node": _is_text,
        "generated_at": _is_number,
        "severity": _one_of("info", "watch", "warning", "distress", "critical", "severe"),
        "kind": _is_text,
        "text": _is_text,
    },
    "result": {"node": _is_text, "id": _is_text, "ok": lambda value: isinstance(value, bool), "text": _is_text},
    "command": {
        "name": _is_text,
        "id": _is_text,
        "expires_at": _is_number,
        "arguments?": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    },
}

FIELDS["history"] = {name: _is_int for name in ("run", "oldest", "dropped", "owed")}
FIELDS["history"] |= {"node": _is_text, "messages": _list_of(FIELDS["telemetry"])}


def _no_constant(text: str) -> float:
    raise ValueError(text)


def read_message(kind: str, payload: bytes) -> dict | None:
    """The tree of a message that follows the contract, or None."""
    if len(payload) > 262_144:
        return None
    try:
        tree = json.loads(payload, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return tree if _has(tree, FIELDS[kind]) else None


def real_messages(node: str, at: float) -> dict[str, dict]:
    """One message of every kind, as a node or the ground station would send it at UTC `at`."""
    sample = {"name": "temp_c", "value": 41.5, "unit": "degC", "validity": "ok", "provenance": "measured"}
    sample |= {"scope": "module", "generated_at": at}
    sensor = {"name": "temp_c", "unit": "degC", "scope": "module", "provenance": "measured", "rate_hz": 1.0}
    shard = {"layer": 0, "expert": 3, "precision": "int8", "sha256": "ab" * 32}
    birth = {"node": node, "bd_seq": 4, "agent_version": "0.1.0", "board": "bench", "generated_at": at, "bundle": "b"}
    birth |= {"sensors": [sensor], "shards": [shard], "memory_bytes": 1000, "data_endpoint": "tcp://127.0.0.1:1"}
    telemetry = {
        "node": node,
        "bd_seq": 4,
        "seq": 7,
        "generated_at": at,
        "samples": [sample] * 3,
        "run": 2,
        "number": 9,
    }
    return {
        "birth": birth,
        "status": {"node": node, "status": "online", "bd_seq": 4},
        "telemetry": telemetry,
        "history": {"node": node, "run": 2, "oldest": 3, "dropped": 0, "owed": 1, "messages": [telemetry] * 2},
        "clock": {"node": node, "id": "0011223344556677", "sent_at": at},
        "ground_status": {"status": "online", "generated_at": at},
        "event": {"node": node, "generated_at": at, "severity": "info", "kind": "started", "text": "up"},
        "result": {"node": node, "id": "0011223344556677", "ok": True, "text": "pong"},
        "command": {"name": "ping", "id": "0011223344556677", "expires_at": at + 1e7, "arguments": {"a": "b"}},
    }


_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from((-1, 2**63, 2**64, 10**400, 1e308, -0.0)),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(("online", "ok", "measured", "n1", "ping", "\ud800")),
)
_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def almost_messages(draw, kind: str, node: str = "n1") -> bytes:
    """A real message of a kind in which some fields are taken away, added or given any value that JSON has."""
    original = real_messages(node, 1.8e9)[kind]
    tree = dict(original)
    for name in draw(st.lists(st.sampled_from([*tree, "more"]), min_size=1, max_size=3)):
        if draw(st.integers(0, 4)) == 0:
            tree.pop(name, None)
        elif isinstance(original.get(name), list) and draw(st.booleans()):
            inner = dict(original[name][0])
            inner[draw(st.sampled_from([*inner]))] = draw(_trees)
            tree[name] = [*original[name], inner]
        else:
            tree[name] = draw(_trees)
    return json.dumps(tree).encode()  # NaN and Infinity are written as Python does: no number in JSON


def random_messages(kind: str, node: str = "n1") -> st.SearchStrategy[bytes]:
    """Bytes, JSON of any form, and messages that are nearly right."""
    return st.one_of(
        st.binary(max_size=200),
        _trees.map(lambda tree: json.dumps(tree).encode()),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
        almost_messages(kind, node),
        almost_messages(kind, node),
    )


def nested(kind: str, node: str = "n1", depths: Iterable[int] = (100, 900, 1_000, 100_000)) -> list[bytes]:
    """Messages with a field that is nested so deep, around and beyond what an interpreter's stack holds."""
    tree = real_messages(node, 1.8e9)[kind]
    payloads = []
    for depth in depths:
        for name in tree:
            text = json.dumps(tree | {name: "@"})
            payloads.append(text.replace('"@"', "[" * depth + "]" * depth).encode()[: wire.MAX_MESSAGE_BYTES + 900])
        payloads.append(b"[" * depth)
    return payloads
