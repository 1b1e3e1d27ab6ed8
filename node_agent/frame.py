"""Data-plane contract: binary frames for hidden states over ZeroMQ (never pickle, never JSON).

One EXPERTS frame carries, for one layer, T rows of hidden states and P (row, expert, precision, gate) pairs that one node
is to run; one PARTIAL frame brings back T rows, row t = sum over its pairs of gate * expert(x[t]). Sizes are checked
against limits before anything is allocated. All integers little-endian.
Leaves out: sockets, deadlines as clocks (a frame's `budget_us` is relative: the clocks of boards are not trusted).
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np

from node_agent import compress, entropy

MAGIC = b"SMoE"
VERSION = 1
MAX_TOKENS = 4_096
MAX_HIDDEN = 32_768
MAX_PAIRS = 65_536
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
MAX_FRAME_BYTES = MAX_PAYLOAD_BYTES + 2 * 1024 * 1024
MAX_ERROR_BYTES = 512

HELLO, WELCOME, EXPERTS, PARTIAL, ERROR, PING, PONG = 1, 2, 3, 4, 5, 6, 7
KINDS = frozenset((HELLO, WELCOME, EXPERTS, PARTIAL, ERROR, PING, PONG))
GROUND = 0  # address of whoever runs the trunk; nodes get theirs (1..65535) in WELCOME

REFUSALS = THROTTLED, NO_MEMORY, NO_GUARD = "throttled", "memory", "guard"
"""Kinds of ERROR by which a node takes no work to protect itself; its text is '<node>: <kind>: <reason>'."""

PRECISIONS = ("fp32", "int8", "int4", "int8dyn", "int2")  # index = id on the wire: new ones go to the end
PRECISION_ID = {name: index for index, name in enumerate(PRECISIONS)}

# magic, version, kind, codec, reply codec, hop limit, layer, source, destination, request id, T, D, P, budget us / compute us,
# codec us / reply step (EXPERTS: entropy.step_code of the step that a reply by `importance` is to have, 0: the node's own choice)
_HEADER = struct.Struct("<4sBBBBBxHHHQIHHII")
HEADER_BYTES = _HEADER.size
PAIR = np.dtype([("row", "<u2"), ("expert", "<u2"), ("precision", "u1"), ("gate", "<f4")])


class FrameError(ValueError):
    """A frame does not follow the contract. `request_id` is the frame's, or 0 where it could not be read."""

    def __init__(self, text: str, request_id: int = 0):
        super().__init__(text)
        self.request_id = request_id


class Frame(NamedTuple):
    """One frame. A NamedTuple, because it is made on the hot path, at a third of a frozen dataclass's cost.

    `x` is float32 [T, D] (EXPERTS, PARTIAL), `pairs` is PAIR [P] (EXPERTS), `text` the node id or an error.
    `budget_us`: how long the receiver may take (EXPERTS); `compute_us` and `codec_us`: what it took (PARTIAL).
    `reply_step`: quantiser step of the answer (EXPERTS with a reply codec that takes one), 0 for none. `size`: bytes of a frame
    that was received.
    """

    kind: int
    request_id: int = 0
    layer: int = 0
    source: int = GROUND
    destination: int = GROUND
    hop_limit: int = 1
    codec: str = "fp32"
    reply_codec: str = "fp32"
    x: np.ndarray | None = None
    pairs: np.ndarray | None = None
    text: str = ""
    budget_us: int = 0
    compute_us: int = 0
    codec_us: int = 0
    reply_step: float = 0.0
    size: int = 0


def sent_step(step: float) -> float:
    """A reply step as the receiver of a request reads it."""
    return entropy.step_of(entropy.step_code(step))


def _pack_header(frame: Frame, t: int, d: int, p: int) -> bytes:
    timing = frame.compute_us if frame.kind == PARTIAL else frame.budget_us
    last = entropy.step_code(frame.reply_step) if frame.reply_step else frame.codec_us
    return _HEADER.pack(
        MAGIC,
        VERSION,
        frame.kind,
        compress.CODECS[frame.codec].id,
        compress.CODECS[frame.reply_codec].id,
        frame.hop_limit,
        frame.layer,
        frame.source,
        frame.destination,
        frame.request_id,
        t,
        d,
        p,
        min(timing, 2**32 - 1),
        min(last, 2**32 - 1),
    )


def pack(frame: Frame, payload: bytes | None = None) -> bytes:
    """Bytes of a frame; `payload` is x already encoded by `frame.codec`, where the caller has timed or cached that.

    Raises: FrameError over a limit, compress.CodecError for x that cannot be encoded.
    """
    if frame.kind in (EXPERTS, PARTIAL):
        t, d = frame.x.shape
        p = len(frame.pairs) if frame.kind == EXPERTS else 0
        if t > MAX_TOKENS or d > MAX_HIDDEN or p > MAX_PAIRS - 1:
            raise FrameError(f"frame [{t}, {d}] with {p} pairs is over a limit", frame.request_id)
        if payload is None:
            payload = compress.encode(frame.codec, frame.x)
        pairs = frame.pairs.tobytes() if p else b""
        return b"".join((_pack_header(frame, t, d, p), pairs, payload))
    text = frame.text.encode()[:MAX_ERROR_BYTES]
    return _pack_header(frame, 0, 0, len(text)) + text


def unpack(data: bytes | memoryview) -> Frame:
    """The frame in `data`.

    Raises: FrameError for anything that is not a whole, well-formed frame of this version.
    """
    size = len(data)
    if size < HEADER_BYTES:
        raise FrameError(f"{size} bytes is shorter than a header of {HEADER_BYTES}")
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"{size} bytes is over the limit of {MAX_FRAME_BYTES}")
    (
        magic,
        version,
        kind,
        codec_id,
        reply_id,
        hops,
        layer,
        source,
        destination,
        request_id,
        t,
        d,
        p,
        timing,
        codec_us,
    ) = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FrameError("not a spacemoe frame")
    if version != VERSION:
        raise FrameError(f"frame version {version}; this build speaks {VERSION}: update the older side", request_id)
    if kind not in KINDS:
        raise FrameError(f"frame kind {kind} is unknown", request_id)
    codec, reply = compress.CODEC_OF_ID.get(codec_id), compress.CODEC_OF_ID.get(reply_id)
    if codec is None or reply is None:
        raise FrameError(f"codec id {codec_id if codec is None else reply_id} is unknown", request_id)
    is_partial = kind == PARTIAL
    reply_step = 0.0
    if reply.size is None and kind == EXPERTS:
        if codec_us > 65_535:
            raise FrameError(f"reply step {codec_us} is outside [0..65535]", request_id)
        reply_step, codec_us = entropy.step_of(codec_us) if codec_us else 0.0, 0

    def frame(x: np.ndarray | None = None, pairs: np.ndarray | None = None, text: str = "") -> Frame:
        return Frame(
            kind,
            request_id,
            layer,
            source,
            destination,
            hops,
            codec.name,
            reply.name,
            x,
            pairs,
            text,
            0 if is_partial else timing,
            timing if is_partial else 0,
            codec_us,
            reply_step,
            size,
        )

    if not is_partial and kind != EXPERTS:
        if t or d or p > MAX_ERROR_BYTES or size != HEADER_BYTES + p:
            raise FrameError("a control frame's length is not what its header says", request_id)
        return frame(text=bytes(data[HEADER_BYTES:]).decode("utf-8", "replace"))
    if not 0 < t <= MAX_TOKENS or not 0 < d <= MAX_HIDDEN:
        raise FrameError(f"shape [{t}, {d}] is outside [1..{MAX_TOKENS}, 1..{MAX_HIDDEN}]", request_id)
    start = HEADER_BYTES + p * PAIR.itemsize
    expected = start + codec.size(t, d) if codec.size is not None else max(size, start)
    if expected > MAX_FRAME_BYTES or size != expected:
        raise FrameError(f"[{t}, {d}] {codec.name} with {p} pairs needs {expected} bytes, got {size}", request_id)
    pairs = None
    if not is_partial:
        pairs = np.frombuffer(data, PAIR, p, HEADER_BYTES)
        _check_pairs(pairs, t, request_id)
    try:
        return frame(compress.decode(codec_id, memoryview(data)[start:], t, d), pairs)
    except compress.CodecError as error:
        raise FrameError(str(error), request_id) from None


def _check_pairs(pairs: np.ndarray, t: int, request_id: int) -> None:
    if not len(pairs):
        raise FrameError("no expert asked for", request_id)
    if len(pairs) <= 16:  # plain Python is faster than numpy on a handful
        rows, _, precisions, gates = zip(*pairs.tolist())
        row, precision, finite = max(rows), max(precisions), all(map(math.isfinite, gates))
    else:
        row, precision = int(pairs["row"].max()), int(pairs["precision"].max())
        finite = bool(np.isfinite(pairs["gate"]).all())
    if row >= t:
        raise FrameError("a pair points past the last row", request_id)
    if precision >= len(PRECISIONS):
        raise FrameError("a pair asks for a precision that is unknown", request_id)
    if not finite:
        raise FrameError("a gate is not finite", request_id)
