"""A synthetic bundle is whole, says what it is, runs, and is the same for the same seed."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("onnx")

from bundle_runner import BundleRunner  # noqa: E402

from node_agent.shard import read_manifest, verify_file  # noqa: E402
from quantize.recipe import RecipeError  # noqa: E402
from quantize.synthetic import synthetic  # noqa: E402

SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 256, "max_context": 64}


@pytest.mark.parametrize("trunk", ["fp32", "int8", "int4"])
def test_it_runs_and_says_that_it_is_synthetic(tmp_path, trunk):
    manifest = synthetic(tmp_path / "b", 64, 48, 3, 4, 2, precision=("int4", "int8"), trunk_precision=trunk, **SIZES)
    assert read_manifest(tmp_path / "b") == manifest
    assert "synthetic" in manifest.base_model and "synthetic" in manifest.recipe and manifest.files == ()
    for entry in [f for part in (*manifest.segments, *manifest.shards) for f in part.files]:
        verify_file(tmp_path / "b", entry)
    for precision in ("int4", "int8"):
        tokens, logits = BundleRunner(tmp_path / "b", precision).greedy([3, 1, 4, 1, 5], 4)
        assert logits.shape == (4, 256) and np.isfinite(logits).all() and np.ptp(logits) > 0


def test_the_seed_decides_the_weights(tmp_path):
    make = lambda name, seed: synthetic(tmp_path / name, 64, 48, 2, 4, 2, seed=seed, **SIZES)  # noqa: E731
    first, same, other = make("a", 7), make("b", 7), make("c", 8)
    assert [s.sha256 for s in first.shards] == [s.sha256 for s in same.shards]
    assert len({s.sha256 for s in first.shards} | {s.sha256 for s in other.shards}) == 16
    with pytest.raises(RecipeError, match="another folder"):
        make("a", 7)


def test_weights_are_those_of_an_initialised_model(tmp_path):
    """transformers' initializer_range of Qwen3-MoE is 0.02; dequantized here from the stored bytes of one expert."""
    manifest = synthetic(tmp_path / "b", 64, 48, 1, 2, 1, precision=("fp32",), **SIZES)
    weights = np.fromfile(tmp_path / "b" / manifest.shards[0].files[1].path, "<f4")
    assert weights.size == 3 * 64 * 48
    assert abs(weights.std() - 0.02) < 0.001 and abs(weights.mean()) < 0.001


def test_rows_of_different_length_decode_together_as_alone(tmp_path):
    """Decoding takes any number of rows, each with its own length: first segment of the trunk, two rows against one."""
    manifest = synthetic(tmp_path / "b", 64, 48, 2, 4, 2, **SIZES)
    segment, d = manifest.segments[0], manifest.dims
    session = onnxruntime.InferenceSession(
        str(tmp_path / "b" / segment.files[0].path), providers=["CPUExecutionProvider"]
    )
    lengths, capacity = [3, 9], 16
    rng = np.random.default_rng(0)
    caches = {
        f"past_{kind}_0": rng.normal(size=(2, d.kv_heads, capacity, d.head_dim)).astype(np.float32)
        for kind in ("key", "value")
    }

    def run(rows: list[int]) -> np.ndarray:
        feed = {name: cache[rows] for name, cache in caches.items()}
        feed["input_ids"] = np.array([[11], [42]])[rows]
        feed["seqlens_k"] = np.array(lengths, np.int32)[rows]  # valid length after this step, less 1
        feed["total_sequence_length"] = np.array([max(lengths[row] for row in rows) + 1], np.int32)
        return session.run(["residual_out"], feed)[0]

    together = run([0, 1])
    np.testing.assert_allclose(together, np.concatenate([run([0]), run([1])]), rtol=1e-5, atol=1e-7)
    caches["past_key_0"][0, :, 5:] += 1.0  # beyond the first row's length: must not matter
    np.testing.assert_array_equal(run([0, 1]), together)
    caches["past_key_0"][0, :, 1] += 1.0  # within it: must
    assert np.abs(run([0, 1])[0] - together[0]).max() > 1e-6


def test_a_shape_beyond_this_machine_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RecipeError, match="smaller sizes"):
        synthetic(tmp_path / "b", 16_000, 16_000, 99, 1_000, 2)
    assert not (tmp_path / "b").exists()
