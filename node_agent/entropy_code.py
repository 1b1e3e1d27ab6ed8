"""Huffman codes of the codec `importance`: one per class of rows, computed alike on both sides and never sent.

A class is a ratio of deviation to step; its code is optimal for a Gaussian of that ratio and written as deflate would write it, so
that zlib decodes it. Leaves out: rows and payloads (entropy.py).
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import NamedTuple

import numpy as np

MAX_LEVEL = 127  # largest |q|: beyond, a row's step grows
MAX_CODE_BITS = 15  # deflate's
_ZERO, _LOW, _32 = np.zeros(1, np.int64), np.uint64(0xFFFFFFFF), np.uint64(32)


class EntropyError(ValueError):
    """A payload that does not follow the layout, or values that it cannot hold."""


class Class(NamedTuple):
    """Rows of about `ratio` = deviation / step; `group` values share a symbol, each within -level..level."""

    ratio: float
    group: int
    level: int


# A symbol is a byte: 5 values of 3 levels, 3 of 5, 2 of 15, or 1 of 255. Grouped, because deflate gives no symbol less than a bit.
CLASSES = (
    Class(0.0, 1, 0),
    *(
        Class(2 ** ((k - 5) / 2), *((5, 1) if k < 3 else (3, 2) if k == 3 else (2, 7) if k < 7 else (1, MAX_LEVEL)))
        for k in range(1, 16)
    ),
)


def probabilities(ratio: float, level: int) -> np.ndarray:
    """Of q = -level..level: a Gaussian whose deviation is spread by a quarter, as rows of one class and tails of channels are."""
    edges = np.arange(-level, level) + 0.5
    total = np.zeros(2 * level + 1)
    for spread, share in ((0.8, 0.25), (1.0, 0.5), (1.25, 0.25)):
        below = [0.5 * math.erfc(-edge / (ratio * spread * math.sqrt(2))) for edge in edges]
        total += share * np.diff([0.0, *below, 1.0])
    return total


def code_lengths(weights: list[int]) -> list[int]:
    """Lengths of an optimal prefix code of at most MAX_CODE_BITS bits (package-merge, Larmore and Hirschberg 1990)."""
    items = sorted((weight, (symbol,)) for symbol, weight in enumerate(weights))
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(MAX_CODE_BITS):
        merged = sorted(items + packages, key=lambda package: package[0])
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(merged[::2], merged[1::2])]
    lengths = [0] * len(weights)
    for _, symbols in packages[: len(weights) - 1]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def _canonical(lengths: list[int]) -> list[int]:
    """Codes of RFC 1951, 3.2.2, bits reversed: deflate writes a code from its most significant bit on."""
    codes, code, last = [0] * len(lengths), 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - last
        codes[symbol], last = int(f"{code:0{length}b}"[::-1], 2), length
        code += 1
    return codes


class Code(NamedTuple):
    prefix: bytes  # opening of a deflate stream with this code, a whole number of bytes
    codes: np.ndarray  # uint64 [256]
    lengths: np.ndarray  # int64 [256]


def _opening(lengths: list[int]) -> bytes:
    """An empty fixed block and the header of a dynamic block (RFC 1951, 3.2.7): 1,120 bits, so that codes begin at a byte."""
    fields = [(0, 1), (1, 2), (0, 7)]  # not final, fixed code, end of block
    fields += [(0, 1), (2, 2), (1, 5), (0, 5), (15, 4)]  # dynamic; 258 lengths, 1 distance, 19 lengths of lengths
    fields += [(0, 3)] * 3 + [(4, 3)] * 16  # lengths 0..15 are written as 4 bits each, repeats are not used
    fields += [(int(f"{length:04b}"[::-1], 2), 4) for length in (*lengths, 0, 0)]
    bits, at = 0, 0
    for value, width in fields:
        bits |= value << at
        at += width
    return bits.to_bytes(at // 8, "little")


@functools.cache
def code_of(k: int) -> Code:
    _, group, level = CLASSES[k]
    one = probabilities(CLASSES[k].ratio, level)
    joint = one
    for _ in range(group - 1):
        joint = np.multiply.outer(joint, one).ravel()
    weights = [max(1, round(p * 2**24)) for p in joint.tolist()]
    weights += [1] * (
        257 - len(weights)
    )  # symbols that do not occur, and the end of the block, keep a code: no input is an error
    lengths = code_lengths(weights)
    if zlib.crc32(bytes(lengths)) != _CHECK[k]:
        raise EntropyError(
            f"the code of class {k} comes out differently on this machine: report it, and use another codec"
        )
    codes = np.array(_canonical(lengths)[:256], np.uint64)
    return Code(_opening(lengths), codes, np.array(lengths[:256], np.int64))


# crc32 of each class's code lengths: a mathematics library that rounded otherwise would make a code that nobody else reads.
_CHECK = (
    0,
    0xA7D68CF7,
    0x6324D44D,
    0x9643E294,
    0x1EDFFC71,
    0xDA4FD127,
    0xDCD7C426,
    0x8D0D8DA1,
    0x2C41313D,
    0xA43A32D5,
    0xD8D9D118,
    0x122B71F7,
    0xA28EE40E,
    0xFF61D414,
    0x17F9BC57,
    0xC15B79EC,
)


@functools.cache
def values_of(k: int) -> np.ndarray:
    """float32 [256, group]: the values of each symbol; symbols past the last one stand for the largest."""
    _, group, level = CLASSES[k]
    base = 2 * level + 1
    symbols = np.minimum(np.arange(256), base**group - 1)
    digits = [symbols // base ** (group - 1 - i) % base - level for i in range(group)]
    return np.stack(digits, 1).astype(np.float32)


def pack_bits(symbols: np.ndarray, code: Code) -> bytes:
    """The codes of uint8 symbols one after the other. Every 32 bits begin two codes or more, so none is without a start."""
    values, lengths = code.codes[symbols], code.lengths[symbols]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    values <<= (starts & 31).view(np.uint64)
    word = starts >> 5
    first = np.flatnonzero(word[1:] != word[:-1]) + 1
    sums = np.add.reduceat(values, np.concatenate((_ZERO, first)))
    out = np.zeros(len(sums) + 1, np.uint64)
    out[:-1] = sums & _LOW
    out[1:] |= sums >> _32
    return out.astype("<u4").tobytes()[: (int(ends[-1]) + 7) // 8]
