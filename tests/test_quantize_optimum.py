"""The sharded bundle against Optimum's uncut ONNX export of the same checkpoint, and Optimum's arm64 recipe for experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("torch")
optimum = pytest.importorskip("optimum.exporters.onnx")

from bundle_runner import BundleRunner  # noqa: E402
from tiny_checkpoints import make, make_without_torch  # noqa: E402

from node_agent.shard import read_manifest  # noqa: E402
from quantize import optimum_int8  # noqa: E402
from quantize.pipeline import quantize  # noqa: E402

PROMPT = [1, 17, 200, 45, 45, 301, 8, 99, 120, 33, 7]
ROOT = Path(__file__).resolve().parent.parent


def test_logits_equal_optimums_uncut_export(tmp_path):
    model = make("qwen3_moe", tmp_path / "model")
    optimum.main_export(
        str(model), str(tmp_path / "uncut"), task="text-generation", do_validation=False, no_post_process=True
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "uncut" / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.array([PROMPT], np.int64)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    expected = session.run(["logits"], feed)[0][0]
    quantize(model, tmp_path / "bundle", precisions=("fp32",), progress=False)
    runner = BundleRunner(tmp_path / "bundle", "fp32")
    logits = runner.step_logits(PROMPT)
    assert np.abs(logits - expected).max() <= 1e-4
    layer, expert = next(iter(runner.experts))
    runner.scaled = {(layer, expert): 1.01}
    runner.reset()
    assert np.abs(runner.step_logits(PROMPT) - expected).max() > 1e-3  # the comparison can fail


class QuickGelu(OpRun):
    """ONNX Runtime's own operator (ContribOperators.md): x * sigmoid(alpha * x)."""

    op_domain = "com.microsoft"

    def _run(self, x, alpha=None):
        return ((x / (1 + np.exp(-alpha * x))).astype(np.float32),)


def test_optimums_arm64_recipe_as_a_precision(tmp_path):
    model = make_without_torch(tmp_path / "model", layers=2)
    text = tmp_path / "text.txt"
    text.write_text("".join(file.read_text() for file in sorted((ROOT / "node_agent").glob("*.py"))))
    manifest = quantize(
        model, tmp_path / "b", precisions=("int8", "int8dyn"), calibration_text=text, max_tokens=600, progress=False
    )
    assert read_manifest(tmp_path / "b").precisions == ("int8", "int8dyn")
    assert "row by row" in manifest.recipe["int8dyn"]
    errors = [shard.rel_error for shard in manifest.shards if shard.precision == "int8dyn"]
    saturates = optimum_int8.kernels_saturate()
    assert saturates == ("saturate" in manifest.recipe["int8dyn"])
    assert len(errors) == 6 and 1e-4 < min(errors) and max(errors) < (0.6 if saturates else 0.1)
    shard = manifest.shard(1, 0, "int8dyn")
    assert shard.files[1].bytes < 3 * 64 * 48 * 4 / 3  # a third of float32, scales included
    session = onnxruntime.InferenceSession(
        str(tmp_path / "b" / shard.files[0].path), providers=["CPUExecutionProvider"]
    )
    # onnx's own reference evaluator adds whole numbers: what an Arm board gives, whatever processor this is
    exact = ReferenceEvaluator(onnx.load(tmp_path / "b" / shard.files[0].path), new_ops=[QuickGelu])
    x = (
        np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
        * np.linspace(0.2, 3, 32, dtype=np.float32)[:, None]
    )
    alone = np.concatenate([session.run(["y"], {"x": row})[0] for row in np.split(x, 32)])
    together = session.run(["y"], {"x": x})[0]
    fp32 = quantize(model, tmp_path / "fp32", precisions=("fp32",), progress=False).shard(1, 0, "fp32").files[0].path
    float32 = onnxruntime.InferenceSession(str(tmp_path / "fp32" / fp32), providers=["CPUExecutionProvider"])
    truth = float32.run(["y"], {"x": x})[0]
    whole = np.concatenate([exact.run(["y"], {"x": row})[0] for row in np.split(x, 32)])
    assert 1e-4 < np.linalg.norm(whole - truth) / np.linalg.norm(truth) < 0.1
    assert (np.linalg.norm(alone - whole) / np.linalg.norm(whole) < 0.02) == (not saturates)
    assert np.abs(alone - together).max() > 1e-3  # why it is run row by row
