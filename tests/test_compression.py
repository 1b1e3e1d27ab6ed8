"""Importance-aware compression: the entropy-coded payload, the allocation of rates, and both at work on the reference model.

Checked against closed forms, published distortions, brute force, zlib and float64 references. The fuzz tests know the frame.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
from node_rig import HIDDEN, AgentProcess, Ground, agent_tables, make_bundle

from ground_station import benchmark_coders, benchmark_compression, evaluate, rates, selection
from ground_station.decode import Decoder
from ground_station.dispatch import Table
from ground_station.local_wire import Importance, WiredExperts
from ground_station.placement import round_robin
from ground_station.text import Text
from ground_station.trunk import Trunk
from node_agent import compress, entropy, entropy_code, frame, shard

REFERENCE = Path(__file__).resolve().parent.parent / "quantize" / "reference"
BUNDLE = REFERENCE / "bundle"


def gaussian(rows: int, hidden: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, hidden)).astype(np.float32)


def round_trip(x: np.ndarray, step: np.ndarray | float | None = None) -> tuple[np.ndarray, bytes]:
    payload = compress.encode("importance", x, step)
    return compress.decode(4, payload, *x.shape), payload


# ---------------------------------------------------------------- the older codecs


@pytest.mark.parametrize(
    ("codec", "digest"),
    [
        ("fp32", "4610282d8da75bf4"),
        ("fp16", "817f0bc9460608d9"),
        ("q8", "5da717cb305fcb7d"),
        ("q4", "a668542d30d173a7"),
    ],
)
def test_older_codecs_write_the_bytes_they_always_wrote(codec, digest):
    """Digests of what the version before this codec wrote (commit 4c68072)."""
    x = (((np.arange(5 * 77) * 7919) % 1009 - 504) / 37).astype(np.float32).reshape(5, 77)
    assert hashlib.sha256(compress.encode(codec, x)).hexdigest()[:16] == digest


def test_blocks_of_the_benchmark_are_the_codec_q4():
    x = gaussian(7, 100)
    back, size = benchmark_coders.Blocks(4, 32).reply(0, x)
    payload = compress.encode("q4", x)
    assert np.array_equal(back, compress.decode(3, payload, *x.shape)) and size == len(payload)


# ---------------------------------------------------------------- quantiser and code


@pytest.mark.parametrize("step", [0.05, 0.1, 0.25])
def test_distortion_at_high_rate_is_a_twelfth_of_the_square_of_the_step(step):
    x = gaussian(64, 512)
    step = frame.sent_step(step)
    back, _ = round_trip(x, step)
    assert np.square(back - x, dtype=np.float64).mean() == pytest.approx(step * step / 12, rel=0.02)
    assert np.abs(back - x).max() <= step / 2 * (1 + 1e-4)


@pytest.mark.parametrize("step", [0.8, 1.5, 2.5])
def test_distortion_of_coarse_steps_is_that_of_a_gaussian_rounded(step):
    step = frame.sent_step(step)
    grid = (np.arange(-80_000, 80_000) + 0.5) / 10_000
    density = np.exp(-grid * grid / 2) / math.sqrt(2 * math.pi) / 10_000
    expected = float(density @ np.square(grid - np.rint(grid / step) * step))
    x = gaussian(64, 1024, 2)
    back, _ = round_trip(x, step)
    assert np.square(back - x, dtype=np.float64).mean() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("bits", "lloyd_max"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_less_distortion_than_lloyd_max_at_the_same_bits_and_more_than_shannon_allows(bits, lloyd_max):
    """Distortions of optimal quantisers of fixed length for a Gaussian: Max 1960, table I. Bits are whole payloads.

    At 1 bit (0.3634) ours has more, by choice: centroids would shrink what is sent, and perplexity does not thank for it.
    """
    x = gaussian(64, 1024, 1)
    low, high = 0.05, 4.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        payload = compress.encode("importance", x, middle)
        low, high = (middle, high) if 8 * len(payload) > bits * x.size else (low, middle)
    back, payload = round_trip(x, high)
    spent = 8 * len(payload) / x.size
    assert bits - 0.1 < spent <= bits
    distortion = np.square(back - x, dtype=np.float64).mean()
    assert 2.0 ** (-2 * spent) < distortion < 0.9 * lloyd_max


@pytest.mark.parametrize("k", range(1, 16))
def test_every_class_codes_every_symbol_and_nearly_at_its_entropy(k):
    ratio, group, level = entropy_code.CLASSES[k]
    code = entropy_code.code_of(k)
    symbols = np.random.default_rng(k).permutation(np.arange(256).repeat(3)).astype(np.uint8)
    stream = code.prefix + entropy_code.pack_bits(symbols, code)
    assert zlib.decompressobj(-15).decompress(stream, len(symbols)) == symbols.tobytes()
    one = entropy_code.probabilities(ratio, level)
    assert one.sum() == pytest.approx(1) and len(one) == 2 * level + 1
    joint = one
    for _ in range(group - 1):
        joint = np.multiply.outer(joint, one).ravel()
    bits = float(joint @ code.lengths[: len(joint)])
    least = -float(joint[joint > 0] @ np.log2(joint[joint > 0]))
    assert least <= bits < least + 0.3  # per symbol; Huffman's own bound is 1
    assert sum(2.0**-length for length in code.lengths.tolist()) == pytest.approx(1, abs=2**-11)  # all but the end's


@pytest.mark.parametrize("weights", [[1, 1], [5, 1, 1, 1], [1, 2, 4, 8, 16, 32], [3, 3, 2, 2, 1, 1, 1]])
def test_code_lengths_against_huffman_by_hand(weights):
    """Cost of Huffman's tree: the sum of all merged weights."""
    heap, cost = sorted(weights), 0
    while len(heap) > 1:
        merged = heap.pop(0) + heap.pop(0)
        cost += merged
        heap = sorted([*heap, merged])
    lengths = entropy_code.code_lengths(weights)
    assert sum(w * n for w, n in zip(weights, lengths)) == cost
    assert sum(2.0**-n for n in lengths) == 1


def test_code_lengths_keep_deflates_limit():
    weights = [1, 1]
    while len(weights) < 30:  # Fibonacci: unlimited, the longest code would have 29 bits
        weights.append(weights[-1] + weights[-2])
    lengths = entropy_code.code_lengths(weights)
    assert max(lengths) == entropy_code.MAX_CODE_BITS and sum(2.0**-n for n in lengths) <= 1


def test_rows_of_all_sizes_keep_their_own_steps():
    x = gaussian(12, 200) * np.float32(10.0) ** np.arange(-6, 6, dtype=np.float32)[:, None]
    steps = np.full(12, 1e-3)
    x[3] = 0
    x[5, 7] = 9e3  # one value far out: its row's step has to grow
    back, _ = round_trip(x, steps)
    assert not back[3].any() and not back[:2].any()  # rows below the step are nothing
    used = (
        np.abs(x).max(1) / entropy.MAX_LEVEL
    )  # or the step asked for, where that is larger; a third of an octave coarse
    allowed = 0.5 * np.maximum(used * 2 ** (1 / 3), 1e-3 * 2 ** (1 / 6)) * 1.01
    # a message's steps reach over 5 octaves: rows that need less may only be finer or as coarse as the base
    base = np.maximum(used.max() / 2 ** (14 / 3), 0) * 1.01
    assert (np.abs(back - x).max(1) <= np.maximum(allowed, base)).all()
    assert np.abs(back[11] - x[11]).max() < np.abs(x[11]).max() / 200


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 31), (5, 64), (300, 256), (3, 2049)])
def test_shapes_and_default_steps(shape):
    """300 x 256 is long enough for codes of its own."""
    x = gaussian(*shape, 3)
    back, _ = round_trip(x)
    rms = np.sqrt(np.square(x).mean(1, keepdims=True))
    assert (np.abs(back - x) <= rms * entropy.DEFAULT_STEP / 2 * 2 ** (1 / 6) * 1.01).all()


def test_extremes_are_finite_and_zeros_cost_a_byte_a_row():
    back, payload = round_trip(np.zeros((9, 64), np.float32), 1.0)
    assert not back.any() and len(payload) == 2 + 9
    for value in (3e38, 1e-38):
        with np.errstate(over="ignore"):  # the sum that looks for infinities is itself infinite
            back, _ = round_trip(np.full((2, 8), value, np.float32), 1.0)
        assert np.isfinite(back).all()
    for x, step in (
        (np.full((1, 4), np.nan, np.float32), 1.0),
        (gaussian(1, 4), -1.0),
        (gaussian(2, 4), np.array([1, np.inf])),
    ):
        with pytest.raises(compress.CodecError):
            compress.encode("importance", x, step)


def test_damaged_payloads_are_refused():
    x = gaussian(6, 64) * np.array([1, 1, 4, 4, 0, 1], np.float32)[:, None]
    payload = compress.encode("importance", x, 0.5)
    assert len(set(payload[2:8])) == 3
    compress.decode(4, payload, 6, 64)
    for bad, t, d in (
        (payload[:-4], 6, 64),
        (payload[:9], 6, 64),
        (payload[:5], 6, 64),
        (b"", 1, 1),
        (payload[:8] + b"\xff\xff\xff\xff" + payload[12:], 6, 64),
        (payload, 6, 128),
        (compress.encode("importance", np.zeros((2, 4), np.float32), 1.0) + b"x", 2, 4),
    ):
        with pytest.raises(compress.CodecError):
            compress.decode(4, bad, t, d)


def test_a_small_frame_cannot_ask_for_a_large_array():
    zeros = np.zeros(frame.MAX_TOKENS, np.uint8)
    with pytest.raises(compress.CodecError, match="limit"):
        compress.decode(4, b"\0\x80" + zeros.tobytes(), frame.MAX_TOKENS, frame.MAX_HIDDEN)
    with pytest.raises(compress.CodecError, match="fewer rows"):
        compress.encode("importance", np.broadcast_to(np.float32(0), (frame.MAX_TOKENS, 2048)), 1.0)


def test_reply_step_travels_in_the_frame_and_only_there():
    x, pairs = gaussian(1, 8), np.array([(0, 0, 0, 1.0)], frame.PAIR)
    for step in (1e-9, 0.37, 4e7):
        sent = frame.Frame(frame.EXPERTS, 5, x=x, pairs=pairs, reply_codec="importance", reply_step=step)
        data = frame.pack(sent)
        got = frame.unpack(data)
        assert got.reply_step == frame.sent_step(step) == pytest.approx(step, rel=2 ** (1 / 1024) - 1 + 1e-9)
        assert got.size == len(data) and got.codec_us == 0
    plain = frame.Frame(frame.EXPERTS, 5, x=x, pairs=pairs)
    assert frame.unpack(frame.pack(plain)).reply_step == 0
    with pytest.raises(frame.FrameError, match="reply step"):
        frame.unpack(data[:36] + b"\0\0\1\0" + data[40:])
    late = frame.Frame(frame.PARTIAL, 5, x=x, codec="importance", reply_codec="importance", codec_us=70_000)
    assert frame.unpack(frame.pack(late)).codec_us == 70_000


# ---------------------------------------------------------------- allocation


@pytest.mark.parametrize("seed", range(5))
def test_allocation_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    weight2, variance = rng.exponential(size=4), np.exp(2 * rng.standard_normal(4))
    budget = float(rng.uniform(0.5, 8))
    bits = rates.allocate(weight2, variance, budget)
    assert bits.sum() == pytest.approx(budget) and (bits >= 0).all()

    def loss(b):
        return float((weight2 * variance * 2.0 ** (-2 * np.asarray(b))).sum())

    grid = np.linspace(0, budget, 25)
    best = min(loss((*b, budget - sum(b))) for b in itertools.product(grid, repeat=3) if sum(b) <= budget)
    assert loss(bits) <= best <= loss(bits) * 1.1  # the grid is coarse
    water = (weight2 * variance * 2.0 ** (-2 * bits))[bits > 0]
    assert water == pytest.approx(water[0])  # one level for all that get bits
    assert (weight2 * variance)[bits == 0].max(initial=0) <= water[0] * (1 + 1e-9)


def test_allocation_grows_with_the_budget_and_spares_what_has_no_weight():
    weight2, variance = np.array([1.0, 0.0, 0.2, 3.0]), np.array([1.0, 5.0, 2.0, 0.0])
    previous = np.zeros(4)
    for budget in (0, 0.1, 1, 3, 30):
        bits = rates.allocate(weight2, variance, budget)
        assert (bits >= previous - 1e-12).all() and bits.sum() == pytest.approx(budget)
        assert bits[1] == bits[3] == 0
        previous = bits
    # by hand: energies 1 and 0.4, 3 bits: the mean of 1.5 and half of log2(2.5) / 2 to each side
    assert rates.allocate(weight2, variance, 3)[[0, 2]] == pytest.approx(
        [1.5 + math.log2(2.5) / 4, 1.5 - math.log2(2.5) / 4]
    )
    with pytest.raises(ValueError):
        rates.allocate(np.zeros(3), np.ones(3), 1)
    with pytest.raises(ValueError):
        rates.allocate(np.ones(3), np.ones(3), -1)


def test_steps_follow_gates_and_norms():
    sensitivity = rates.Sensitivity(np.array([2.0, 6.0]), np.array([[1.0, 4.0], [1.0, 1.0]]), {0: 0, 3: 1})
    allocator = rates.Allocator(sensitivity, 0.1, input_gain=1.0)
    x = np.array([[3.0, -3.0], [1.0, 1.0]], np.float32)
    pairs = np.array([(0, 0, 0, 0.6), (0, 1, 0, 0.4), (1, 1, 0, 0.25)], frame.PAIR)
    # weight: sqrt(0.36 * 1 + 0.16 * 4) = 1, and 0.25 * 2; step = level * residual * rms / weight
    assert allocator.input_steps(0, x, pairs) == pytest.approx([0.1 * 2 * 3 / 1, 0.1 * 2 * 1 / 0.5])
    assert allocator.reply_step(3) == pytest.approx(0.6)


def test_steering_moves_towards_the_target_and_stays_in_bounds():
    assert rates.steer(0.1, 4.0, 3.0) == pytest.approx(0.2) and rates.steer(0.1, 2.5, 3.0) == pytest.approx(
        0.1 / 2**0.5
    )
    assert rates.steer(0.1, 50.0, 3.0) == pytest.approx(0.2)
    assert rates.steer(9.0, 8.0, 0.1) == rates.LEVELS[1]
    for bad in ({"level": 0.0}, {"bits_per_value": 0.0}, {"bits_per_value": 9.0}):
        with pytest.raises(ValueError):
            rates.Allocator(rates.Sensitivity(np.ones(1), np.ones((1, 1)), {0: 0}), **bad)


def test_codec_and_rate_must_fit_the_bundle(tmp_path):
    manifest = shard.read_manifest(BUNDLE)
    assert rates.for_codec("q8", BUNDLE, manifest) is None
    assert isinstance(rates.for_codec("importance", BUNDLE, manifest), rates.Allocator)
    with pytest.raises(ValueError, match="fixed rate"):
        rates.for_codec("q8", BUNDLE, manifest, bits_per_value=2.0)
    with pytest.raises(rates.RatesError, match="calibration text"):
        rates.for_codec("importance", BUNDLE, dataclasses.replace(manifest, files=()))
    for content in (b"no zip", _npz(moe_to_residual=np.ones(4)), _npz(moe_to_residual=np.ones(10**6))):
        entry = shard.write_file(tmp_path, rates.CALIBRATION, content)
        with pytest.raises(rates.RatesError, match="write the bundle again"):
            rates.Sensitivity.read(tmp_path, dataclasses.replace(manifest, files=(entry,)))


def _npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


# ---------------------------------------------------------------- at work


@pytest.fixture(scope="module")
def rig_bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def test_request_over_a_real_agent(rig_bundle, tmp_path):
    """Both directions: the answer is the float64 sum of what the node decoded, within half a reply step; frames as counted."""
    x = gaussian(6, HIDDEN) * np.array([1, 1, 2, 2, 0.1, 1], np.float32)[:, None]
    pairs = np.array([(row, expert, 0, 0.2 + row / 10) for row in range(6) for expert in (0, 2)], frame.PAIR)
    steps = np.array([0.05, 0.1, 0.2, 0.4, 0.05, 0.05])
    payload = compress.encode("importance", x, steps)
    request = frame.Frame(
        frame.EXPERTS, 9, 1, codec="importance", reply_codec="importance", x=x, pairs=pairs, reply_step=0.01
    )
    with Ground() as ground, AgentProcess(tmp_path, agent_tables(tmp_path, ground.endpoint, rig_bundle)):
        ground.hello()
        got = ground.ask(frame.pack(request, payload))
    assert (got.kind, got.codec, got.x.shape) == (frame.PARTIAL, "importance", x.shape)
    decoded = compress.decode(4, payload, *x.shape)
    assert (np.abs(decoded - x).max(1) <= steps / 2 * 2 ** (1 / 6) * 1.01).all()
    want = rig_bundle.partial(1, decoded, pairs.tolist())
    # the step asked for, or what |q| <= 127 needs, a third of an octave coarse
    step = np.maximum(0.01 * 2 ** (1 / 6), np.abs(want).max() / 127 * 2 ** (1 / 3))
    assert np.abs(got.x - want).max() <= step / 2 * 1.01 + 1e-5
    assert np.abs(got.x - rig_bundle.partial(1, x, pairs.tolist())).max() > step  # the request's steps show as well
    again = compress.encode("importance", got.x, frame.sent_step(0.01))
    assert got.size == pytest.approx(frame.HEADER_BYTES + len(again), abs=2)


class _Reference:
    def __init__(self) -> None:
        self.manifest = shard.read_manifest(BUNDLE)
        dims = self.manifest.dims
        table = Table(round_robin(self.manifest, {f"n{i}": 2**62 for i in range(4)}, "int8"))
        self.experts = WiredExperts(BUNDLE, self.manifest, table, None, threads=1, verify=False)
        self.topk = selection.make("topk", self.manifest.routing, dims.top_k, dims.experts)
        self.trunk = Trunk(BUNDLE, self.manifest, 1, verify=False)
        text = Text(BUNDLE, self.manifest)
        heldout = evaluate.domains(REFERENCE / "heldout")
        self.texts = [
            [0, *text.encode(" ".join(heldout[name])[:3000])[:400]] for name in ("sotu", "rust_books", "wordnet")
        ]
        self.sensitivity = rates.Sensitivity.read(BUNDLE, self.manifest)

    def measure(self, coder) -> tuple[float, float]:
        """(nats per token, bytes per token)."""
        self.experts.coder = coder
        self.experts.sent_bytes = self.experts.received_bytes = 0
        decoder = Decoder(self.trunk, self.topk, self.experts, self.manifest.eos_ids)
        scores = [evaluate.score(decoder, ids, 1) for ids in self.texts]
        tokens = sum(score.tokens for score in scores)
        return sum(s.nats for s in scores) / tokens, (self.experts.sent_bytes + self.experts.received_bytes) / tokens


@pytest.fixture(scope="module")
def reference():
    return _Reference()


def test_importance_beats_blocks_on_the_reference_model_and_disorder_does_not(reference):
    base, _ = reference.measure(None)
    blocks = {size: reference.measure(benchmark_coders.Blocks(3, size)) for size in (32, 64)}
    nats, spent = reference.measure(Importance(rates.Allocator(reference.sensitivity, 0.17)))
    for loss, size in blocks.values():
        assert nats < loss and 1.3 * spent < size
    worse = []
    for order in (np.random.default_rng(0).permutation, benchmark_coders.reversed_order):
        coder = benchmark_coders.Stepped(rates.Allocator(reference.sensitivity, 0.17), order)
        loss, size = reference.measure(coder)
        assert size > spent
        worse.append(loss - base)
    assert worse[1] > worse[0] > 2 * (nats - base) > 0
    # the same coder in its own order: a control that does nothing
    same, _ = reference.measure(
        benchmark_coders.Stepped(rates.Allocator(reference.sensitivity, 0.17), lambda values: values)
    )
    assert same == pytest.approx(nats, abs=2e-3)


def test_steered_runs_spend_the_bits_asked_for(reference):
    allocator = rates.Allocator(reference.sensitivity, 1.0, bits_per_value=2.5)
    coder = Importance(allocator)
    levels = []
    for _ in range(3):
        reference.measure(coder)
        levels.append(allocator.level)
    reference.experts.values = 0
    spent = allocator._bits / allocator._values  # of the last pass
    assert spent == pytest.approx(2.5, abs=0.2) and levels[-1] == pytest.approx(levels[-2], rel=0.2)


def test_counted_bytes_are_those_of_frames(reference):
    """Every message of one layer, packed."""
    hidden = gaussian(5, reference.manifest.dims.hidden)
    choice = reference.topk(0, gaussian(5, reference.manifest.dims.experts, 2))
    allocator = rates.Allocator(reference.sensitivity)
    sizes = []

    class Packing(Importance):
        def request(self, layer, x, pairs):
            payload = compress.encode("importance", x, allocator.input_steps(layer, x, pairs))
            request = frame.Frame(frame.EXPERTS, x=x, pairs=pairs, codec="importance", reply_codec="importance")
            sizes.append(len(frame.pack(request._replace(reply_step=allocator.reply_step(layer)), payload)))
            return super().request(layer, x, pairs)

        def reply(self, layer, y):
            payload = compress.encode("importance", y, frame.sent_step(allocator.reply_step(layer)))
            sizes.append(len(frame.pack(frame.Frame(frame.PARTIAL, x=y, codec="importance"), payload)))
            return super().reply(layer, y)

    experts = reference.experts
    experts.coder = Packing(allocator)
    experts.sent_bytes = experts.received_bytes = 0
    experts.run(0, hidden, choice.experts, choice.gates)
    assert sum(sizes) == experts.sent_bytes + experts.received_bytes and len(sizes) >= 6


# ---------------------------------------------------------------- reading the curve


def test_bytes_at_a_loss_by_hand():
    curve = [(100.0, 1.0), (50.0, 4.0), (25.0, 16.0)]
    assert benchmark_compression.bytes_at(2.0, curve) == pytest.approx(75)  # half-way in the logarithm
    assert benchmark_compression.bytes_at(8.0, curve) == pytest.approx(37.5)
    assert benchmark_compression.bytes_at(1.0, curve) == pytest.approx(100)
    assert benchmark_compression.bytes_at(0.5, curve) is None and benchmark_compression.bytes_at(16.0, curve) is None
    # noise around nothing: below 0 counts as very little
    assert 80 < benchmark_compression.bytes_at(1.0, [(100.0, -0.01), (50.0, 4.0)]) * 1.45 < 100


def test_controls_and_fewer_experts():
    values = np.array([3.0, 1.0, 2.0])
    assert benchmark_coders.reversed_order(values).tolist() == [1.0, 3.0, 2.0]
    manifest = shard.read_manifest(BUNDLE)
    topk = selection.make("topk", manifest.routing, 4, 16)
    logits = gaussian(9, 16, 5)
    whole, fewer = topk(0, logits), benchmark_coders.FewerExperts(topk, 2)(0, logits)
    assert fewer.gates.shape == (9, 2) and fewer.gates.sum(1) == pytest.approx(whole.gates.sum(1))
    for row in range(9):
        best = np.sort(whole.gates[row])[::-1][:2]
        assert fewer.gates[row] / fewer.gates[row].sum() == pytest.approx(best / best.sum())
        assert set(fewer.experts[row]) <= set(whole.experts[row])


def test_the_benchmark_end_to_end_on_little_text(monkeypatch, tmp_path):
    """Small windows of three domains and coarse curves: every figure is there and follows from the curves."""
    for name, value in {
        "WINDOW": 140,
        "BLOCK_SIZES": (32,),
        "BLOCK_BITS": (2, 3, 5),
        "LEVELS": (0.035, 0.1, 0.4),
        "FLAT_STEPS": (0.2, 1.3),
        "SPEED_RUNS": 1,
    }.items():
        monkeypatch.setattr(benchmark_compression, name, value)
    for name in ("sotu", "rust_books", "wordnet"):
        (tmp_path / f"{name}.jsonl").write_bytes((REFERENCE / "heldout" / f"{name}.jsonl").read_bytes())
    result = benchmark_compression.compression(BUNDLE, tmp_path, draws=2, threads=1)
    assert result["n"] == 2 and result["tokens"] == {"choosing": 6 * 139, "per_draw": 3 * 139}
    curve = result["curve"]
    assert curve["fp16"]["bits_per_value"] == pytest.approx(16.3, abs=0.2)  # headers and pairs come on top
    assert abs(curve["fp16"]["loss_percent"]) < 0.2
    for loss in ("1", "5"):
        found = result["ratios"][loss]
        assert found["uniform_over_importance"] == pytest.approx(
            found["bytes_per_token_uniform"] / found["bytes_per_token_importance"], abs=2e-3
        )
        assert found["uniform_over_importance"] > 1.2
        assert found["one_row_per_message"]["bytes_per_token_importance"] > found["bytes_per_token_importance"]
        for control in ("random order", "reversed"):
            name = f"{control} at the level for {loss} %"
            assert curve[name]["loss_percent"] > curve[f"chosen for {loss} %"]["loss_percent"]
    assert set(result["fewer_experts"]) == {f"top-{kept} at 4 bits" for kept in (1, 2, 3)}
    assert all(each["mb_per_s"] > 0 for each in result["speed"].values())
    assert max(map(len, benchmark_compression.report(result).splitlines())) <= 80
    with pytest.raises(evaluate.EvaluationError, match="fewer draws"):
        benchmark_compression.compression(BUNDLE, tmp_path, draws=500, threads=1)


def test_a_payload_that_says_nothing_at_length_is_refused_at_once():
    """60 MB of empty deflate blocks decoded for 3 s; the longest honest payload is far below the limit."""
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    for step in (1e-9, 1e-3, 0.1, 10.0):
        data = entropy.encode(x, step)
        assert np.isfinite(entropy.decode(memoryview(data), 64, 256)).all()
    with pytest.raises(entropy.EntropyError, match="more than 1 rows of 64"):
        entropy.decode(memoryview(bytes((0, 128, 15)) + b"\x00" * 20_000), 1, 64)
