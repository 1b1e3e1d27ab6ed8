"""Weight matrices in blocks of 8, 4 or 2 bits: the layout of onnxruntime's MatMulNBits, round-to-nearest and GPTQ.

A matrix w is float32 [N, K] (N outputs, K inputs); each row is cut into blocks of `block` consecutive inputs, and a block has
one float32 scale and, where asymmetric, one zero point: w = (code - zero point) * scale. Source of GPTQ: Frantar et al.,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023), algorithm 1.
Leaves out: collecting Hessians (calibration) and ONNX graphs (expert_graph); numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BITS = (2, 4, 8)
MIN_BLOCK = 16  # what MatMulNBits takes: a power of two from 16 on
MAX_DAMP = 1e3
LEAST_RANGE = 0.6
TRIES = 17  # parts of a block's range, from all of it down to `least_range`, that the search for a scale tries
MOST_GAIN = 1.25  # by which a row is stretched at most to keep its gain


class NBitsError(ValueError):
    """A matrix cannot be quantized as asked; the text says what to change."""


@dataclass(frozen=True, eq=False)
class NBits:
    """A quantized matrix [n, k] as MatMulNBits takes it. B is the number of blocks of a row, ceil(k / block).

    `packed` uint8 [n, B, block * bits / 8], several codes to a byte from its low bits on; `scales` float32 [n, B];
    `zero_points` None (the middle code) or uint8 [n, ceil(B * bits / 8)], packed like the codes.
    """

    bits: int
    block: int
    n: int
    k: int
    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None

    @property
    def bytes(self) -> int:
        zero = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.packed.nbytes + self.scales.nbytes + zero


def _checked(w: np.ndarray, bits: int, block: int) -> np.ndarray:
    if bits not in BITS:
        raise NBitsError(f"{bits} bits: use one of {BITS}")
    if block < MIN_BLOCK or block & (block - 1):
        raise NBitsError(f"block {block}: use a power of two from {MIN_BLOCK} on")
    if w.ndim != 2 or not w.size:
        raise NBitsError(f"shape {w.shape}: a matrix [N, K] is needed")
    w = np.ascontiguousarray(w, np.float32)
    if not np.isfinite(w).all():
        raise NBitsError("the matrix holds values that are not finite: the checkpoint is damaged")
    return w


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [..., M] -> uint8 [..., ceil(M * bits / 8)], the first code in the lowest bits of a byte."""
    each = 8 // bits
    lack = -codes.shape[-1] % each
    if lack:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], lack), codes.dtype)], -1)
    packed = codes[..., 0::each].copy()
    for place in range(1, each):
        packed |= codes[..., place::each] << (place * bits)
    return np.ascontiguousarray(packed)


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [..., B] -> the first `count` codes [..., count]."""
    each = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * each), np.uint8)
    for place in range(each):
        codes[..., place::each] = packed >> (place * bits) & (2**bits - 1)
    return codes[..., :count]


def _assemble(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int, block: int, symmetric: bool) -> NBits:
    """codes [N, K], scale and zero [N, B], all float32 with whole codes -> NBits."""
    n, k = codes.shape
    blocks = scale.shape[1]
    whole = np.repeat(zero, block, axis=1).astype(np.uint8)  # padding holds the zero point: it stands for 0
    whole[:, :k] = codes
    whole = whole.reshape(n, blocks, block)
    points = zero.astype(np.uint8)
    return NBits(
        bits=bits,
        block=block,
        n=n,
        k=k,
        packed=_pack(whole, bits),
        scales=np.ascontiguousarray(scale, np.float32),
        zero_points=None if symmetric else _pack(points, bits),
    )


def _grid(low: np.ndarray, high: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point for values in [low, high], as onnxruntime's own quantizer chooses them."""
    top = np.float32(2**bits - 1)
    middle = np.float32(2 ** (bits - 1))
    if symmetric:  # the value of largest magnitude, with its sign, gets code 0
        scale = np.where(np.abs(high) > np.abs(low), high, low) / -middle
        zero = np.full_like(scale, middle)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / top
        zero = np.clip(np.rint(np.divide(-low, scale, out=np.zeros_like(low), where=scale != 0)), 0, top)
    return scale.astype(np.float32), zero.astype(np.float32)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > np.finfo(np.float32).tiny)


def _searched_grid(
    values: np.ndarray, weight: np.ndarray, bits: int, symmetric: bool, least_range: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [N] for values [b, N] whose rows weigh `weight` [b]: the range that is cut least harmfully.

    Minimises sum_i weight_i * (w_i - quantized w_i)^2 over TRIES parts of the range.
    """
    low, high = values.min(0), values.max(0)
    top = np.float32(2**bits - 1)
    best_scale, best_zero = _grid(low, high, bits, symmetric)
    best = np.full(values.shape[1], np.inf, np.float32)
    weight = weight.astype(np.float32)
    for shrink in np.linspace(1.0, least_range, TRIES, dtype=np.float32):
        scale, zero = _grid(low * shrink, high * shrink, bits, symmetric)
        error = values * _inverse(scale)
        error += zero
        np.rint(error, out=error)
        np.clip(error, 0, top, out=error)
        error -= zero
        error *= scale
        error -= values
        np.square(error, out=error)
        loss = weight @ error
        better = loss < best
        best[better] = loss[better]
        best_scale[better] = scale[better]
        best_zero[better] = zero[better]
    return best_scale, best_zero


def round_to_nearest(w: np.ndarray, bits: int, block: int, symmetric: bool = False) -> NBits:
    """w [N, K] in blocks, each value to the nearest code of its block's full range.  Raises: NBitsError."""
    w = _checked(w, bits, block)
    n, k = w.shape
    blocks = -(-k // block)
    padded = np.pad(w, ((0, 0), (0, blocks * block - k))).reshape(n, blocks, block)
    scale, zero = _grid(padded.min(2), padded.max(2), bits, symmetric)
    codes = np.clip(np.rint(padded * _inverse(scale)[..., None] + zero[..., None]), 0, 2**bits - 1)
    return _assemble(codes.reshape(n, -1)[:, :k], scale, zero, bits, block, symmetric)


def _inverse_factor(hessian: np.ndarray, damp: float) -> np.ndarray:
    """Upper U with U.T @ U = (H + damping)^-1; the damping grows tenfold until H can be factored.  Raises: NBitsError."""
    mean = float(np.mean(np.diag(hessian))) or 1.0
    identity = np.eye(len(hessian))
    while damp <= MAX_DAMP:
        try:
            # With P reversing the order and P H P = L L.T, H^-1 = U.T U for the upper U = P L^-1 P: no inverse is formed first.
            lower = np.linalg.cholesky((hessian + damp * mean * identity)[::-1, ::-1])
            return np.linalg.solve(lower, identity)[::-1, ::-1]
        except np.linalg.LinAlgError:
            damp = max(damp, 1e-4) * 10
    raise NBitsError("the Hessian cannot be factored: collect calibration inputs again")


def gptq(
    w: np.ndarray,
    hessian: np.ndarray,
    bits: int = 4,
    block: int = 32,
    damp: float = 0.01,
    act_order: bool = True,
    symmetric: bool = False,
    least_range: float = LEAST_RANGE,
    keep_gain: bool = False,
) -> NBits:
    """w [N, K] in blocks, so that ||x w - x quantized w|| is small for inputs x whose sum of x.T x is `hessian` [K, K].

    One input after the other is rounded, and its error is made good by the inputs not rounded yet. `act_order` takes the
    inputs with the largest activations first (scales are then fixed from the unmodified weights, because blocks stay blocks of
    consecutive inputs); otherwise a block's scales are chosen when it is reached. `damp` is the part of the Hessian's mean
    diagonal added to its diagonal. An input that is always 0 in calibration is rounded to nearest. `least_range`: the smallest part
    of a block's range that is tried. `keep_gain`: each row's scales are stretched so that its output's projection on the exact one is
    as long as the exact one (least squares shrinks, and what shrinks outputs costs more than its squared error says).

    Raises: NBitsError when shapes do not fit or values are not finite.
    """
    w = _checked(w, bits, block)
    n, k = w.shape
    if hessian.shape != (k, k):
        raise NBitsError(f"Hessian of shape {hessian.shape} for a matrix of {k} inputs: it must be [{k}, {k}]")
    if not 0 < least_range <= 1:
        raise NBitsError(f"least_range {least_range:g}: use a part of the range, above 0 and at most 1")
    hessian = np.array(hessian, np.float64)
    if not np.isfinite(hessian).all():
        raise NBitsError("the Hessian holds values that are not finite: collect calibration inputs again")
    dead = np.diag(hessian) <= 0
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    alive_mean = float(np.diag(hessian)[~dead].mean()) if not dead.all() else 1.0
    hessian[dead, dead] = alive_mean

    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(k)
    upper = _inverse_factor(hessian[np.ix_(order, order)], damp)
    importance = np.empty(k)
    importance[order] = 1 / np.diag(upper) ** 2  # what an error of this input costs once later inputs have made it good
    upper = upper.astype(np.float32)

    top = np.float32(2**bits - 1)
    blocks = -(-k // block)
    scale = np.empty((blocks, n), np.float32)
    zero = np.empty((blocks, n), np.float32)
    left = np.ascontiguousarray(w.T[order])  # [K, N]: inputs in the order of rounding, changed as errors are passed on
    codes = np.empty((k, n), np.float32)  # rows in the natural order
    if act_order:
        for b in range(blocks):
            part = slice(b * block, min((b + 1) * block, k))
            scale[b], zero[b] = _searched_grid(
                np.ascontiguousarray(w.T[part]), importance[part], bits, symmetric, least_range
            )

    for start in range(0, k, block):
        end = min(start + block, k)
        if not act_order:
            b = start // block
            scale[b], zero[b] = _searched_grid(left[start:end], importance[start:end], bits, symmetric, least_range)
        errors = np.empty((end - start, n), np.float32)
        for i in range(start, end):
            column = left[i]
            if i > start:
                column = column - upper[start:i, i] @ errors[: i - start]
            s, z = scale[order[i] // block], zero[order[i] // block]
            code = np.clip(np.rint(column * _inverse(s) + z), 0, top)
            codes[order[i]] = code
            errors[i - start] = (column - (code - z) * s) / upper[i, i]
        if end < k:
            left[end:] -= upper[start:end, end:].T @ errors
    if keep_gain:
        values = (codes - np.repeat(zero, block, 0)[:k]) * np.repeat(scale, block, 0)[:k]  # [K, N]
        through = w @ hessian  # [N, K]
        gain = (through * w).sum(1), (through * values.T).sum(1)
        stretch = np.divide(*gain, out=np.ones(n), where=gain[1] > 0)
        scale = (scale * np.clip(stretch, 1 / MOST_GAIN, MOST_GAIN)).astype(np.float32)
    return _assemble(codes.T, scale.T, zero.T, bits, block, symmetric)


def dequantize(q: NBits) -> np.ndarray:
    """The matrix float32 [N, K] that MatMulNBits computes with."""
    blocks = q.scales.shape[1]
    codes = _unpack(q.packed, q.bits, q.block)
    if q.zero_points is None:
        zero = np.full((q.n, blocks), 2 ** (q.bits - 1), np.uint8)
    else:
        zero = _unpack(q.zero_points, q.bits, blocks)
    values = (codes.astype(np.float32) - zero[..., None].astype(np.float32)) * q.scales[..., None]
    return np.ascontiguousarray(values.reshape(q.n, -1)[:, : q.k])
