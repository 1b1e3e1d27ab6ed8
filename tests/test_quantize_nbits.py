"""Quantized matrices and expert graphs, judged by onnxruntime's kernels, its own C++ quantizer, and GPTQ written out in full.

Leaves out: timing (benchmarks) and quality on a trained model (the evaluation of a bundle).
"""

from __future__ import annotations

import uuid

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from quantize import expert_graph, nbits

NEEDED = (1, 32)  # of onnxruntime, whose MatMulNBits takes 2 bits; 1.23.2, the last one for Python 3.10, does not
TWO = pytest.param(
    2,
    marks=pytest.mark.skipif(
        tuple(int(part) for part in ort.__version__.split(".")[:2]) < NEEDED,
        reason=f"onnxruntime {ort.__version__} runs no 2-bit MatMulNBits",
    ),
)
SIZES = ((256, 128), (1024, 768), (1024, 1408))  # (D, I)


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _session(folder, graph: bytes, weights: bytes, external: str = "w.bin", threads: int = 1) -> ort.InferenceSession:
    # A folder each: onnxruntime maps external data, so writing over the file would change a session that is open.
    folder = folder / uuid.uuid4().hex
    folder.mkdir()
    (folder / "m.onnx").write_bytes(graph)
    (folder / external).write_bytes(weights)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(folder / "m.onnx"), options, providers=["CPUExecutionProvider"])


def _linear_session(folder, weight, k: int, n: int, bias=None) -> ort.InferenceSession:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", n])
    piece = expert_graph.linear("m", "x", weight, "y", bias)
    return _session(folder, *expert_graph.model_of("linear", [piece], [x], [y], "w.bin"))


def _run(session: ort.InferenceSession, x: np.ndarray) -> np.ndarray:
    return session.run(["y"], {"x": x})[0]


def _relative(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def _expert_weights(seed: int, d: int, i: int) -> tuple[np.ndarray, np.ndarray]:
    return _normal(seed, 2 * i, d) / np.float32(np.sqrt(d)), _normal(seed + 1, d, i) / np.float32(np.sqrt(i))


def _expert_by_numpy(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gate, up = np.split(x.astype(np.float64) @ gate_up.T, 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up) @ down.T


# --- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", (TWO, 4, 8))
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("k", (32, 96, 200))
def test_matmulnbits_computes_with_the_dequantized_matrix(tmp_path, bits, symmetric, k):
    q = nbits.round_to_nearest(_normal(1, 40, k), bits, 32, symmetric)
    y = _run(_linear_session(tmp_path, q, k, 40), np.eye(k, dtype=np.float32))
    np.testing.assert_allclose(y.T, nbits.dequantize(q), rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("block", (16, 32, 128))
def test_round_to_nearest_is_that_of_onnxruntime(bits, symmetric, block):
    n, k = 48, 4 * block
    w = _normal(2, n, k)
    packed = np.zeros((n, 4, block * bits // 8), np.uint8)
    scales, zero = np.zeros((n, 4), np.float32), np.zeros((n, 4 * bits // 8), np.uint8)
    quantizer = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    quantizer(packed, np.ascontiguousarray(w.T), scales, zero, block, n, k, symmetric)
    q = nbits.round_to_nearest(w, bits, block, symmetric)
    np.testing.assert_array_equal(q.scales, scales)
    assert (q.packed != packed).mean() < 1e-3  # values halfway between two codes may go either way
    if symmetric:
        assert q.zero_points is None
    else:
        np.testing.assert_array_equal(q.zero_points, zero)


def test_a_worked_block():
    """Range [-1, 14] in 15 steps of 1: zero point 1, so that -1 is code 0 and 14 is code 15; the even input is the low half."""
    w = np.array([[-1, 14, 0, 3] + [0] * 12], np.float32)
    q = nbits.round_to_nearest(w, 4, 16)
    assert (q.scales.tolist(), q.zero_points.tolist()) == ([[1.0]], [[1]])
    assert q.packed[0, 0, :3].tolist() == [0xF0, 0x41, 0x11]


def test_a_worked_block_of_two_bits():
    """Range [-1, 2] in 3 steps of 1: zero point 1; the codes 0, 3, 1, 2 of the first four inputs fill a byte from its low bits on."""
    w = np.array([[-1, 2, 0, 1] + [0] * 12, [0, 3] + [0] * 14], np.float32)
    q = nbits.round_to_nearest(w, 2, 16)
    assert (q.scales.tolist(), q.zero_points.tolist()) == ([[1.0], [1.0]], [[1], [0]])
    assert q.packed.shape == (2, 1, 4) and q.packed[0, 0].tolist() == [
        0b10_01_11_00,
        0b01010101,
        0b01010101,
        0b01010101,
    ]
    np.testing.assert_array_equal(nbits.dequantize(q), w)
    several = nbits.round_to_nearest(np.tile(w[:1], (1, 5)), 2, 16)  # five blocks: their zero points fill two bytes
    assert several.zero_points.tolist() == [[0b01010101, 0b01]]


# --- gptq -----------------------------------------------------------------------------------------------------------


def _activations(seed: int, k: int, rows: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """Calibration and test inputs [rows, k]: correlated, and of different strength from input to input, as in real models."""
    mix = _normal(seed, k, k) * (np.arange(1, k + 1, dtype=np.float32) ** -0.4)[:, None]
    mix *= np.exp(0.7 * _normal(seed + 1, k))
    return _normal(seed + 2, rows, k) @ mix, _normal(seed + 3, rows, k) @ mix


def _output_error(q: nbits.NBits, w: np.ndarray, x: np.ndarray) -> float:
    return _relative(x @ nbits.dequantize(q).T, x @ w.T)


@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize("block", (32, 128))
def test_gptq_loses_far_less_than_round_to_nearest(block, act_order):
    k = 256
    w = _normal(3, 128, k)
    calibration, held_out = _activations(4, k)
    hessian = calibration.T @ calibration
    nearest = _output_error(nbits.round_to_nearest(w, 4, block), w, held_out)
    q = nbits.gptq(w, hessian, 4, block, act_order=act_order)
    assert _output_error(q, w, held_out) < 0.7 * nearest
    foreign = _activations(40, k)[0]  # negative control: the gain comes from this layer's activations, not from luck
    wrong = nbits.gptq(w, foreign.T @ foreign, 4, block, act_order=act_order)
    assert _output_error(wrong, w, held_out) > 0.9 * nearest


def _optimal_brain_codes(w, hessian, damp, order, scale, zero, top) -> np.ndarray:
    """Codes [N, K] by the recursion that GPTQ speeds up: an explicit inverse, reduced by one input after each rounding."""
    k = len(hessian)
    inverse = np.linalg.inv(hessian + damp * np.mean(np.diag(hessian)) * np.eye(k))
    w, codes = w.astype(np.float64).copy(), np.empty(w.shape)
    for i in order:
        codes[:, i] = np.clip(np.rint(w[:, i] / scale[:, i] + zero[:, i]), 0, top)
        error = (w[:, i] - (codes[:, i] - zero[:, i]) * scale[:, i]) / inverse[i, i]
        w -= np.outer(error, inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("act_order", (False, True))
def test_gptq_rounds_as_the_full_recursion_does(act_order):
    n, k, block = 24, 96, 32
    w = _normal(5, n, k)
    x = _activations(6, k)[0].astype(np.float64)
    hessian = x.T @ x
    q = nbits.gptq(w, hessian, 8, block, damp=0.02, act_order=act_order)
    scale, zero = (np.repeat(a.astype(np.float64), block, axis=1) for a in (q.scales, q.zero_points))
    order = np.argsort(-np.diag(hessian)) if act_order else range(k)
    codes = _optimal_brain_codes(w, hessian, 0.02, order, scale, zero, 255)
    difference = np.abs(codes - q.packed.reshape(n, k))
    assert (difference > 0).mean() < 0.01 and difference.max() <= 1  # float32 against float64 near a half
    nearest = np.clip(np.rint(w / scale + zero), 0, 255)  # negative control: plain rounding is told apart
    assert (codes != nearest).mean() > 0.1


@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize("bits", (4, 8))
def test_gptq_takes_dead_inputs_and_few_samples(bits, act_order):
    k = 200  # not a multiple of the block
    w = _normal(7, 16, k)
    x = _activations(8, k, rows=40)[0]  # fewer samples than inputs: a singular Hessian
    x[:, [0, 31, 32, 199]] = 0
    q = nbits.gptq(w, x.T @ x, bits, 32, act_order=act_order)
    assert (q.n, q.k, q.scales.shape) == (16, k, (16, 7))
    back = nbits.dequantize(q)
    assert np.isfinite(back).all() and _relative(back, w) < 0.5
    step = np.repeat(np.abs(q.scales), 32, axis=1)[:, :k]
    assert (np.abs(back - w)[:, 199] <= 2 * step[:, 199]).all()
    assert _output_error(q, w, x) < _output_error(nbits.round_to_nearest(w, bits, 32), w, x)


def test_gptq_without_any_activation_still_gives_the_matrix():
    w = _normal(9, 8, 64)
    q = nbits.gptq(w, np.zeros((64, 64)), 8, 32)
    assert _relative(nbits.dequantize(q), w) < 0.02
    zeros = nbits.gptq(np.zeros((8, 64), np.float32), np.eye(64), 4, 32)
    assert not nbits.dequantize(zeros).any()


def test_a_gain_that_is_kept_projects_on_the_exact_output_as_that_does_itself():
    k = 128
    w, x = _normal(30, 32, k), _activations(31, k)[0]
    hessian = x.T @ x
    exact = x @ w.T

    def gain(**how) -> np.ndarray:
        q = nbits.gptq(w, hessian, 2, 32, act_order=False, least_range=0.8, **how)
        return (exact * (x @ nbits.dequantize(q).T)).sum(0) / (exact**2).sum(0)

    assert np.abs(gain(keep_gain=True) - 1).max() < 1e-3
    assert gain().mean() < 0.99  # negative control: rounding alone shrinks
    wide = nbits.gptq(w, hessian, 2, 32, least_range=1.0)
    assert np.abs(wide.scales).mean() > np.abs(nbits.gptq(w, hessian, 2, 32, least_range=0.5).scales).mean()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w: nbits.gptq(w, np.eye(64), 2, 32, least_range=0), "least_range 0"),
        (lambda w: nbits.round_to_nearest(w, 3, 32), "3 bits"),
        (lambda w: nbits.round_to_nearest(w, 4, 48), "block 48"),
        (lambda w: nbits.round_to_nearest(w[0], 4, 32), "matrix"),
        (lambda w: nbits.round_to_nearest(w * np.float32(np.nan), 4, 32), "not finite"),
        (lambda w: nbits.gptq(w, np.eye(32), 4, 32), r"\[64, 64\]"),
        (lambda w: nbits.gptq(w, np.full((64, 64), np.inf), 4, 32), "not finite"),
    ],
)
def test_what_cannot_be_quantized_is_refused_in_one_line(call, words):
    with pytest.raises(nbits.NBitsError, match=words) as caught:
        call(_normal(10, 4, 64))
    assert "\n" not in str(caught.value)


# --- graphs ---------------------------------------------------------------------------------------------------------


def _quantized(w: np.ndarray, bits: int | None) -> np.ndarray | nbits.NBits:
    return w if bits is None else nbits.round_to_nearest(w, bits, expert_graph.EXACT_BLOCK, symmetric=bits == 8)


@pytest.mark.parametrize(
    ("bits", "tolerance"), [(None, 2e-6), (8, 0.02), (4, 0.02), pytest.param(2, 0.02, marks=TWO.marks)]
)
def test_expert_computes_swiglu(tmp_path, bits, tolerance):
    """n bits: against the dequantized weights, so what is left is onnxruntime's rounding of activations to 8 bits."""
    d, i = 192, 96
    gate_up, down = (_quantized(w, bits) for w in _expert_weights(11, d, i))
    graph, weights = expert_graph.expert_model(gate_up, down, "L00E000.bin")
    session = _session(tmp_path, graph, weights, "L00E000.bin")
    x = _normal(12, 5, d)
    plain = [w if bits is None else nbits.dequantize(w) for w in (gate_up, down)]
    assert _relative(_run(session, x), _expert_by_numpy(x, *plain)) < tolerance
    swapped = np.roll(plain[0], i, axis=0)  # negative control: gate and up are not interchangeable
    assert _relative(_run(session, x), _expert_by_numpy(x, swapped, plain[1])) > 0.1
    zeros = _run(session, np.zeros((2, d), np.float32))
    assert np.isfinite(zeros).all() and not zeros.any()


@pytest.mark.parametrize("bits", (None, 8, 4))
def test_linear_adds_a_bias(tmp_path, bits):
    w, bias, x = _normal(13, 24, 64), _normal(14, 24), np.zeros((3, 64), np.float32)
    session = _linear_session(tmp_path, _quantized(w, bits), 64, 24, bias)
    np.testing.assert_array_equal(_run(session, x), np.tile(bias, (3, 1)))
    without = _linear_session(tmp_path, _quantized(w, bits), 64, 24)
    x = _normal(15, 3, 64)
    np.testing.assert_allclose(_run(session, x), _run(without, x) + bias, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bits", (None, 8, 4))
def test_weights_lie_outside_the_graph_and_aligned(bits):
    gate_up, down = (_quantized(w, bits) for w in _expert_weights(16, 160, 96))
    graph, weights = expert_graph.expert_model(gate_up, down, "w.bin")
    model = onnx.load_from_string(graph)
    assert len(graph) < 4096 and model.ir_version <= 10 and {o.domain: o.version for o in model.opset_import}[""] <= 21
    ends = [0]
    for tensor in model.graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        offset, length = int(entry["offset"]), int(entry["length"])
        assert entry["location"] == "w.bin" and offset % 64 == 0 and offset >= ends[-1]
        ends.append(offset + length)
    assert ends[-1] == len(weights)


def test_shapes_that_are_no_expert_are_refused():
    with pytest.raises(ValueError, match="no expert"):
        expert_graph.expert_model(_normal(17, 64, 32), _normal(18, 32, 64), "w.bin")
    with pytest.raises(ValueError, match="bare name"):
        expert_graph.expert_model(*_expert_weights(19, 32, 16), "../w.bin")


# --- a row and its batch --------------------------------------------------------------------------------------------


def _rows(seed: int, d: int) -> np.ndarray:
    return _normal(seed, 64, d) * np.exp(_normal(seed + 1, 64, 1))  # rows of very different size


def _largest_dependence(session: ort.InferenceSession, x: np.ndarray) -> float:
    """Largest |row alone - row in a batch| over batches of 2..64, relative to the largest output."""
    alone = np.concatenate([_run(session, x[t : t + 1]) for t in range(len(x))])
    worst = max(np.abs(_run(session, x[:t]) - alone[:t]).max() for t in (2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 32, 33, 64))
    loud = x.copy()
    loud[1:] *= 100
    worst = max(worst, np.abs(_run(session, loud)[0] - alone[0]).max())
    return float(worst / np.abs(alone).max())


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("bits", (8, 4, TWO))
@pytest.mark.parametrize(("d", "i"), SIZES)
def test_a_row_does_not_depend_on_its_batch(tmp_path, d, i, bits, threads):
    gate_up, down = (_quantized(w, bits) for w in _expert_weights(20, d, i))
    session = _session(tmp_path, *expert_graph.expert_model(gate_up, down, "w.bin"), threads=threads)
    assert _largest_dependence(session, _rows(21, d)) == 0.0


def test_dynamic_int8_does_depend_on_its_batch(tmp_path):
    """Negative control: one activation scale for the whole call, as onnxruntime's dynamic quantization has it."""
    d, n = 256, 128
    w = _normal(22, d, n)
    scale = np.abs(w).max() / 127
    tensors = {"w": np.rint(w / scale).astype(np.int8), "ws": np.array(scale, np.float32)}
    nodes = (
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "w", "xz"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["whole"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "ws"], ["s"]),
        helper.make_node("Mul", ["whole", "s"], ["y"]),
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", d])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", n])
    piece = expert_graph.Piece(nodes, tensors)
    session = _session(tmp_path, *expert_graph.model_of("dynamic", [piece], [x], [y], "w.bin"))
    assert _largest_dependence(session, _rows(23, d)) > 1e-3
