"""Weight matrices in blocks of 8 or 4 bits: the layout of onnxruntime's MatMulNBits, round-to-nearest and GPTQ.

A matrix w is float32 [N, K] (N outputs, K inputs); each row is cut into blocks of `block` consecutive inputs, and a block has
one float32 scale and, where asymmetric, one zero point: w = (code - zero point) * scale. Source of GPTQ: Frantar et al.,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023), algorithm 1.
Leaves out: collecting Hessians (calibration) and ONNX graphs (expert_graph); numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BITS = (4, 8)
MIN_BLOCK = 16  # what MatMulNBits takes: a power of two from 16 on
MAX_DAMP = 1e3
SHRINKS = np.linspace(1.0, 0.6, 17, dtype=np.float32)  # parts of a block's range that the search for a scale tries


class NBitsError(ValueError):
    """A matrix cannot be quantized as asked; the text says what to change."""


@dataclass(frozen=True, eq=False)
class NBits:
    """A quantized matrix [n, k] as MatMulNBits takes it. B is the number of blocks of a row, ceil(k / block).

    `packed` uint8 [n, B, block * bits / 8], of 4-bit codes the even input in the low half; `scales` float32 [n, B];
    `zero_points` None (the middle code) or uint8 [n, B] (8 bit) or [n, ceil(B / 2)] (4 bit, the even block in the low half).
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


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes [..., M] of 4 bits -> uint8 [..., ceil(M / 2)], the even one in the low half."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], -1)
    return np.ascontiguousarray(codes[..., 0::2] | codes[..., 1::2] << 4)


def _from_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
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
        packed=_nibbles(whole) if bits == 4 else np.ascontiguousarray(whole),
        scales=np.ascontiguousarray(scale, np.float32),
        zero_points=None if symmetric else _nibbles(points) if bits == 4 else points,
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


def _searched_grid(values: np.ndarray, weight: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [N] for values [b, N] whose rows weigh `weight` [b]: the range that is cut least harmfully.

    Minimises sum_i weight_i * (w_i - quantized w_i)^2 over SHRINKS of the range.
    """
    low, high = values.min(0), values.max(0)
    top = np.float32(2**bits - 1)
    best_scale, best_zero = _grid(low, high, bits, symmetric)
    best = np.full(values.shape[1], np.inf, np.float32)
    weight = weight.astype(np.float32)
    for shrink in SHRINKS:
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
) -> NBits:
    """w [N, K] in blocks, so that ||x w - x quantized w|| is small for inputs x whose sum of x.T x is `hessian` [K, K].

    One input after the other is rounded, and its error is made good by the inputs not rounded yet. `act_order` takes the
    inputs with the largest activations first (scales are then fixed from the unmodified weights, because blocks stay blocks of
    consecutive inputs); otherwise a block's scales are chosen when it is reached. `damp` is the part of the Hessian's mean
    diagonal added to its diagonal. An input that is always 0 in calibration is rounded to nearest.

    Raises: NBitsError when shapes do not fit or values are not finite.
    """
    w = _checked(w, bits, block)
    n, k = w.shape
    if hessian.shape != (k, k):
        raise NBitsError(f"Hessian of shape {hessian.shape} for a matrix of {k} inputs: it must be [{k}, {k}]")
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
            scale[b], zero[b] = _searched_grid(np.ascontiguousarray(w.T[part]), importance[part], bits, symmetric)

    for start in range(0, k, block):
        end = min(start + block, k)
        if not act_order:
            b = start // block
            scale[b], zero[b] = _searched_grid(left[start:end], importance[start:end], bits, symmetric)
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
    return _assemble(codes.T, scale.T, zero.T, bits, block, symmetric)


def dequantize(q: NBits) -> np.ndarray:
    """The matrix float32 [N, K] that MatMulNBits computes with."""
    blocks = q.scales.shape[1]
    codes = _from_nibbles(q.packed, q.block) if q.bits == 4 else q.packed
    if q.zero_points is None:
        zero = np.full((q.n, blocks), 2 ** (q.bits - 1), np.uint8)
    else:
        zero = _from_nibbles(q.zero_points, blocks) if q.bits == 4 else q.zero_points
    values = (codes.astype(np.float32) - zero[..., None].astype(np.float32)) * q.scales[..., None]
    return np.ascontiguousarray(values.reshape(q.n, -1)[:, : q.k])
