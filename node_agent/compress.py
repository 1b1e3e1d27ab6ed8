"""Codec contract: hidden states as bytes, array [T, D] float32 <-> payload, for both directions of the data plane.

T is rows (tokens), D the hidden size. Block codecs use blocks of 32 values with one fp16 scale, the format of peers
(Q8_0: 8.5 bits per value, Q4_0: 4.5; ggml, MIT), so that our better codecs have an honest baseline.
`importance` (entropy.py) has no fixed size: a step per row decides.
Leaves out: which codec to use when (the ground station's decision).
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple

import numpy as np

from node_agent import entropy

BLOCK = 32


class CodecError(ValueError):
    """A payload is not what its codec and shape say, or holds values that are not finite."""


def _blocks(d: int) -> int:
    return -(-d // BLOCK)


def _to_blocks(x: np.ndarray) -> np.ndarray:
    """[T, D] -> [T * blocks, 32], the last block of a row padded by zeros."""
    t, d = x.shape
    if d % BLOCK:
        x = np.pad(x, ((0, 0), (0, _blocks(d) * BLOCK - d)))
    return x.reshape(-1, BLOCK)


def _from_blocks(blocks: np.ndarray, t: int, d: int) -> np.ndarray:
    x = blocks.reshape(t, _blocks(d) * BLOCK)
    return x if x.shape[1] == d else np.ascontiguousarray(x[:, :d])


def _encode_fp32(x: np.ndarray) -> bytes:
    return x.astype("<f4", copy=False).tobytes()


def _decode_fp32(payload: memoryview, t: int, d: int) -> np.ndarray:
    return np.frombuffer(payload, "<f4").reshape(t, d)


FP16_MAX = float(np.finfo(np.float16).max)


def _encode_fp16(x: np.ndarray) -> bytes:
    return np.minimum(np.maximum(x, -FP16_MAX), FP16_MAX).astype("<f2").tobytes()


def _decode_fp16(payload: memoryview, t: int, d: int) -> np.ndarray:
    return np.frombuffer(payload, "<f2").astype(np.float32).reshape(t, d)


def _scales(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp16 scales and the reciprocals of their rounded values; a block of zeros has scale 0 and reciprocal 0."""
    half = np.minimum(np.maximum(scale, -FP16_MAX), FP16_MAX).astype("<f2")
    rounded = half.astype(np.float32)
    if rounded.all():
        return half, np.reciprocal(rounded)
    return half, np.divide(1.0, rounded, out=np.zeros_like(rounded), where=rounded != 0)


def _encode_q8(x: np.ndarray) -> bytes:
    blocks = _to_blocks(x)
    half, inverse = _scales(np.abs(blocks).max(1) * np.float32(1 / 127))
    codes = blocks * inverse[:, None]
    np.rint(codes, out=codes)
    np.minimum(codes, 127, out=codes)  # half the cost of np.clip on small arrays
    np.maximum(codes, -127, out=codes)
    return half.tobytes() + codes.astype(np.int8).tobytes()


def _decode_q8(payload: memoryview, t: int, d: int) -> np.ndarray:
    n = t * _blocks(d)
    scale = np.frombuffer(payload, "<f2", n).astype(np.float32)
    codes = np.frombuffer(payload, np.int8, n * BLOCK, 2 * n).reshape(n, BLOCK)
    return _from_blocks(codes * scale[:, None], t, d)


def _encode_q4(x: np.ndarray) -> bytes:
    blocks = _to_blocks(x)
    high, low = blocks.max(1), blocks.min(1)
    extreme = np.where(high > -low, high, low)  # the value of largest magnitude, with its sign, maps to code 0
    half, inverse = _scales(extreme * np.float32(-1 / 8))
    codes = blocks * inverse[:, None]
    np.rint(codes, out=codes)
    codes += 8
    np.minimum(codes, 15, out=codes)
    np.maximum(codes, 0, out=codes)
    codes = codes.astype(np.uint8)
    return half.tobytes() + (codes[:, :16] | codes[:, 16:] << 4).tobytes()


def _decode_q4(payload: memoryview, t: int, d: int) -> np.ndarray:
    n = t * _blocks(d)
    scale = np.frombuffer(payload, "<f2", n).astype(np.float32)
    packed = np.frombuffer(payload, np.uint8, n * 16, 2 * n).reshape(n, 16)
    codes = np.empty((n, BLOCK), np.float32)
    codes[:, :16] = packed & 15
    codes[:, 16:] = packed >> 4
    codes -= 8
    codes *= scale[:, None]
    return _from_blocks(codes, t, d)


class Codec(NamedTuple):
    """`encode` takes float32 [T, D]; `decode` takes exactly `size(T, D)` bytes and gives float32 [T, D].

    Without `size` the length depends on the values: `decode` then checks it, and `encode` takes a step (see `encode` below).
    """

    name: str
    id: int
    encode: Callable[..., bytes]
    decode: Callable[[memoryview, int, int], np.ndarray]
    size: Callable[[int, int], int] | None


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("fp32", 0, _encode_fp32, _decode_fp32, lambda t, d: 4 * t * d),
        Codec("fp16", 1, _encode_fp16, _decode_fp16, lambda t, d: 2 * t * d),
        Codec("q8", 2, _encode_q8, _decode_q8, lambda t, d: t * _blocks(d) * (2 + BLOCK)),
        Codec("q4", 3, _encode_q4, _decode_q4, lambda t, d: t * _blocks(d) * (2 + BLOCK // 2)),
        Codec("importance", 4, entropy.encode, entropy.decode, None),
    )
}
CODEC_OF_ID: dict[int, Codec] = {codec.id: codec for codec in CODECS.values()}


def _all_finite(x: np.ndarray) -> bool:
    """A sum is finite only if every term is, and costs half as much; it may overflow, hence the second look."""
    return math.isfinite(np.add.reduce(x, None)) or bool(np.isfinite(x).all())


def encode(name: str, x: np.ndarray, step: np.ndarray | float | None = None) -> bytes:
    """Payload of x, float32 [T, D]. `step`: quantiser step of all rows or of each [T], for codecs of no fixed size alone.

    Raises: CodecError for an unknown codec, values that are not finite, steps or sizes that the codec cannot hold.
    """
    codec = CODECS.get(name)
    if codec is None:
        raise CodecError(f"codec {name!r} is unknown: use one of {', '.join(CODECS)}")
    if not _all_finite(x):
        raise CodecError("hidden states hold values that are not finite")
    if codec.size is not None:
        return codec.encode(x)
    try:
        return codec.encode(x, step)
    except entropy.EntropyError as error:
        raise CodecError(str(error)) from None


def decode(codec_id: int, payload: bytes | memoryview, t: int, d: int) -> np.ndarray:
    """float32 [T, D] (maybe read-only).  Raises: CodecError when length, codec or values are not right."""
    codec = CODEC_OF_ID.get(codec_id)
    if codec is None:
        raise CodecError(f"codec id {codec_id} is unknown to this version")
    if codec.size is None:
        try:
            return codec.decode(memoryview(payload), t, d)  # steps and levels are finite by their encoding
        except entropy.EntropyError as error:
            raise CodecError(str(error)) from None
    if len(payload) != codec.size(t, d):
        raise CodecError(f"{codec.name} [{t}, {d}] needs {codec.size(t, d)} bytes, got {len(payload)}")
    x = codec.decode(memoryview(payload), t, d)
    if not _all_finite(x):
        raise CodecError(f"{codec.name} payload holds values that are not finite")
    return x
