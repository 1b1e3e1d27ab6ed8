"""Payload of the codec `importance`: rows quantised uniformly, each with its own step, and entropy coded in numpy and zlib.

A row's step is the caller's (ground_station.rates derives it from gates and norms): a row that weighs more gets a smaller step
and so more bits; a row whose values all round to 0 costs one byte. Uniform steps with an entropy code are within 0.25 bit of
the rate-distortion bound of a Gaussian at any rate (Gish and Pierce 1968), where a Lloyd-Max quantiser of fixed length is not.

Layout, little-endian: u2 step code c, base step 2^((c - 32768) / 512); T bytes, one per row: class in the low 4 bits, r in the
high 4 bits, the row's step is base * 2^(r / 3); then the streams of the classes that occur, ascending, each but the last after its
u4 length. A stream is raw deflate of one byte per group of values. With fewer than ADAPTIVE symbols the deflate block's header,
which holds its Huffman code, and its end are left out: both sides know the code from the class. Class 0 is a row of zeros.
Leaves out: transforms between channels, and which step a row deserves.
"""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np

from node_agent.entropy_code import CLASSES, MAX_LEVEL, EntropyError, code_of, pack_bits, probabilities, values_of

MAX_VALUES = 1 << 21  # a row of zeros is one byte: without a limit a small frame would ask for a large array
ADAPTIVE = 16_384  # symbols from which a code made for the stream pays for its header
DEFAULT_STEP = 0.25  # of a row's RMS, where the caller gives none
_CODES_PER_OCTAVE, _ZERO_CODE, _ROW_STEPS = 512, 32_768, 16
_STREAM_BYTES = 1024  # of a class beside its symbols of at most 15 bits: its length and its code
_U4 = struct.Struct("<I")
_ROW_FACTOR = np.exp2(np.arange(_ROW_STEPS) / 3).astype(np.float32)


def step_code(step: float) -> int:
    """The nearest step that a u2 can say, 1..65535 (0 is kept for 'none given').  Raises: EntropyError."""
    if not 0 < step < math.inf:
        raise EntropyError(f"step {step} is not a positive number")
    return min(max(round(_CODES_PER_OCTAVE * math.log2(step)) + _ZERO_CODE, 1), 65_535)


def step_of(code: int) -> float:
    return 2.0 ** ((code - _ZERO_CODE) / _CODES_PER_OCTAVE)


_NO_R = np.zeros(1, np.uint8)

# ---------------------------------------------------------------- rows


def _class_bounds() -> np.ndarray:
    """Mean |q| between two neighbouring classes, ascending: of a Gaussian half-way between their ratios."""
    bounds = []
    for k in range(1, 15):
        p = probabilities(CLASSES[k].ratio * 2**0.25, 200)
        bounds.append(float(np.abs(np.arange(-200, 201)) @ p))
    return np.array(bounds)


_BOUNDS = _class_bounds()
# the lowest class whose levels reach |q| = 0..8; everything larger is as 8
_LOWEST = np.array([1, 1, 3, *[4] * 5, 7])


def _row_steps(x: np.ndarray, step: np.ndarray) -> tuple[int, np.ndarray]:
    """(base step code, r [T] 0..15): at least the steps asked for where |q| would pass MAX_LEVEL, else the nearest to them."""
    if len(x) == 1:  # decoding one token: plain numbers are faster than arrays of one
        return step_code(max(float(step[0]), max(float(x.max()), -float(x.min())) / MAX_LEVEL, step_of(1))), _NO_R
    needed = np.maximum(x.max(1), -x.min(1)) * np.float32(1 / MAX_LEVEL)
    largest = float(needed.max())
    base = max(float(np.maximum(step, needed).min()), largest * 2.0 ** -((_ROW_STEPS - 2) / 3), step_of(1))
    code = step_code(base)
    base = step_of(code)
    r = np.rint(3 * np.log2(np.maximum(step, base) / base))
    short = needed > base * np.exp2(r / 3)
    if short.any():
        r = np.where(short, np.ceil(3 * np.log2(np.maximum(needed, base) / base)), r)
    return code, np.minimum(r, _ROW_STEPS - 1).astype(np.uint8)


def _symbols(q: np.ndarray, k: int) -> np.ndarray:
    """uint8 symbols of integers int8 [n], the last group filled up by zeros."""
    _, group, level = CLASSES[k]
    digits = q.view(np.uint8) + np.uint8(level)  # modulo 256, as intended
    if group == 1:
        return digits
    if len(digits) % group:
        digits = np.concatenate((digits, np.full(-len(digits) % group, level, np.uint8)))
    symbols = digits[::group]
    for i in range(1, group):
        symbols = symbols * np.uint8(2 * level + 1) + digits[i::group]
    return symbols


def encode(x: np.ndarray, step: np.ndarray | float | None = None) -> bytes:
    """Payload of finite float32 [T, D]; `step`: float or [T], > 0 (None or 0: DEFAULT_STEP of each row's RMS).

    Raises: EntropyError for more than MAX_VALUES values or a step that is not positive.
    """
    t, d = x.shape
    if t * d > MAX_VALUES:
        raise EntropyError(
            f"{t} rows of {d} values are over the limit of {MAX_VALUES} for this codec: send fewer rows at once"
        )
    if step is None or (np.ndim(step) == 0 and step == 0):
        step = np.maximum(np.sqrt(np.square(x, dtype=np.float64).mean(1)), 1e-18) * DEFAULT_STEP
    step = np.broadcast_to(np.asarray(step, np.float64), (t,))
    if not (step.min() > 0 and math.isfinite(step.max())):
        raise EntropyError("steps have to be positive numbers")
    code, r = _row_steps(x, step)
    if t == 1:
        return _encode_row(x[0], code)
    inverse = (1 / (step_of(code) * _ROW_FACTOR)).astype(np.float32)
    q = x * inverse[r][:, None]
    np.rint(q, out=q)
    np.minimum(q, MAX_LEVEL, out=q)
    np.maximum(q, -MAX_LEVEL, out=q)
    magnitude = np.abs(q)
    highest = magnitude.max(1)
    classes = np.maximum(_BOUNDS.searchsorted(magnitude.mean(1)) + 1, _LOWEST[np.minimum(highest, 8).astype(np.int64)])
    classes[highest == 0] = 0
    levels = q.astype(np.int8)
    parts = []
    for k in np.unique(classes).tolist():
        if k:
            parts.append(_stream(levels[classes == k].ravel(), k))
    body = b"".join(_U4.pack(len(part)) + part for part in parts[:-1]) + (parts[-1] if parts else b"")
    return code.to_bytes(2, "little") + (classes.astype(np.uint8) | r << 4).tobytes() + body


def _encode_row(x: np.ndarray, code: int) -> bytes:
    """As `encode` for the one row x [D], at two thirds of its cost."""
    q = x * np.float32(1 / step_of(code))
    np.rint(q, out=q)
    np.minimum(q, MAX_LEVEL, out=q)
    np.maximum(q, -MAX_LEVEL, out=q)
    magnitude = np.abs(q)
    highest = int(magnitude.max())
    k = max(int(_BOUNDS.searchsorted(magnitude.mean())) + 1, int(_LOWEST[min(highest, 8)])) if highest else 0
    return code.to_bytes(2, "little") + bytes((k,)) + (_stream(q.astype(np.int8), k) if k else b"")


def _stream(q: np.ndarray, k: int) -> bytes:
    """The values int8 [n] of one class, entropy coded."""
    symbols = _symbols(q, k)
    if len(symbols) < ADAPTIVE:
        return pack_bits(symbols, code_of(k))
    deflate = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(symbols) + deflate.flush()


def decode(payload: memoryview, t: int, d: int) -> np.ndarray:
    """float32 [T, D].  Raises: EntropyError for a payload that is not of this shape, before anything large is allocated."""
    if t * d > MAX_VALUES:
        raise EntropyError(f"{t} rows of {d} values are over the limit of {MAX_VALUES}")
    if len(payload) > 2 + t + 2 * t * d + len(CLASSES) * _STREAM_BYTES:
        # deflate can say nothing in as many bytes as it likes: 60 MB of empty blocks took 3 s
        raise EntropyError(f"{len(payload)} bytes are more than {t} rows of {d} values can take")
    if len(payload) < 2 + t:
        raise EntropyError(f"{len(payload)} bytes do not hold a step and {t} rows")
    rows = np.frombuffer(payload, np.uint8, t, 2)
    steps = (step_of(int.from_bytes(payload[:2], "little")) * _ROW_FACTOR[rows >> 4]).astype(np.float32)
    classes = rows & 15
    present = [k for k in np.unique(classes).tolist() if k]
    at, streams = 2 + t, []
    for k in present:
        size = len(payload) - at
        if k != present[-1]:
            if size < 4:
                raise EntropyError(f"the payload ends before the length of class {k}")
            size, at = _U4.unpack_from(payload, at)[0], at + 4
        if size > len(payload) - at:
            raise EntropyError(f"class {k} is to have {size} bytes, {len(payload) - at} are left")
        streams.append((k, payload[at : at + size]))
        at += size
    if at != len(payload):
        raise EntropyError(f"{len(payload) - at} bytes are left over")
    x = np.zeros((t, d), np.float32) if not present or len(present) > 1 or 0 in classes else None
    for k, stream in streams:
        chosen = classes == k
        n = t if x is None else int(np.count_nonzero(chosen))
        values = _inflate(stream, n * d, k).reshape(n, d)
        if x is None:
            x = values
            x *= steps[:, None]
        else:
            x[chosen] = values * steps[chosen][:, None]
    return x


def _inflate(stream: memoryview, count: int, k: int) -> np.ndarray:
    """The first `count` values, float32, of a class's stream."""
    wanted = -(-count // CLASSES[k].group)
    opening = code_of(k).prefix if wanted < ADAPTIVE else b""
    try:
        symbols = zlib.decompressobj(-15).decompress(opening + stream, wanted)
    except zlib.error as error:
        raise EntropyError(f"the stream of class {k} is damaged: {error}") from None
    if len(symbols) != wanted:
        raise EntropyError(f"class {k} needs {wanted} symbols, its stream holds {len(symbols)}")
    return values_of(k).take(np.frombuffer(symbols, np.uint8), 0).ravel()[:count]
