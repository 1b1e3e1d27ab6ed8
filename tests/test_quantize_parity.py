"""The bundle of a tiny random model computes what transformers computes, for all five families.

Reference: transformers' own forward pass. Control: one expert scaled by 1.01 must fail the same comparison.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from bundle_runner import BundleRunner  # noqa: E402
from tiny_checkpoints import FAMILIES, make, reference_greedy  # noqa: E402

from quantize.pipeline import quantize  # noqa: E402

PROMPT = [1, 17, 200, 45, 45, 301, 8, 99, 120]
TOKENS = 12
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model = make(request.param, root / "model")
    quantize(model, root / "bundle", precisions=("fp32",), progress=False)
    return request.param, root, reference_greedy(model, PROMPT, TOKENS)


def test_greedy_tokens_and_logits_equal_transformers(pair):
    family, root, (tokens, logits) = pair
    runner = BundleRunner(root / "bundle", "fp32")
    ours, our_logits = runner.greedy(PROMPT, TOKENS)
    assert ours == tokens
    assert np.abs(our_logits - logits).max() <= TOLERANCE
    assert runner.calls >= TOKENS * len(runner.manifest.moe_layers) * runner.manifest.dims.top_k
    assert np.ptp(logits, axis=1).min() > 1.0 and len(set(tokens)) > 3  # equal noughts would prove nothing


def test_one_expert_scaled_by_a_hundredth_is_noticed(pair):
    family, root, (tokens, logits) = pair
    runner = BundleRunner(root / "bundle", "fp32")
    runner.greedy(PROMPT, 1)
    layer, expert = next(iter(runner.experts))  # one that the prompt uses
    runner.scaled = {(layer, expert): 1.01}
    runner.reset()
    moved = np.abs(runner.step_logits(PROMPT)[-1] - logits[0]).max()
    assert moved > 1e-3


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_trunk_stays_near(pair, precision, tmp_path):
    family, root, (tokens, logits) = pair
    quantize(root / "model", tmp_path / "bundle", precisions=("fp32",), trunk_precision=precision, progress=False)
    runner = BundleRunner(tmp_path / "bundle", "fp32")
    error = np.linalg.norm(runner.step_logits(PROMPT)[-1] - logits[0]) / np.linalg.norm(logits[0])
    assert 0 < error < {"int8": 0.25, "int4": 0.9}[precision]


def test_sharded_checkpoint_gives_the_same_bundle(tmp_path):
    model = make("qwen3_moe", tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "cut", max_shard_size="100KB", safe_serialization=True)
    assert (tmp_path / "cut/model.safetensors.index.json").exists()
    shutil.copy(model / "tokenizer.json", tmp_path / "cut")
    whole = quantize(model, tmp_path / "a", precisions=("int8",), progress=False)
    cut = quantize(tmp_path / "cut", tmp_path / "b", precisions=("int8",), progress=False)
    assert [shard.sha256 for shard in whole.shards] == [shard.sha256 for shard in cut.shards]
    assert [segment.files for segment in whole.segments] == [segment.files for segment in cut.segments]


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_tensors_of_transformers_5_give_the_same_shards(family, tmp_path):
    """The checkpoint is rewritten with the names of transformers 5: experts as [E, 2I, D] and [E, D, I]."""
    from safetensors.numpy import load_file, save_file

    model = make(family, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    fused: dict[str, np.ndarray] = {}
    groups: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for name, tensor in tensors.items():
        if family == "granitemoe":
            new = name.replace("input_linear.weight", "experts.gate_up_proj").replace(
                "output_linear.weight", "experts.down_proj"
            )
            fused[new.replace("block_sparse_moe", "mlp")] = tensor
        elif ".experts." in name:
            base, _, rest = name.partition(".experts.")
            number, matrix, _ = rest.split(".")
            groups.setdefault(base, {}).setdefault(int(number), {})[matrix] = tensor
        else:
            fused[name.replace("block_sparse_moe", "mlp")] = tensor
    for base, experts in groups.items():
        gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        base = base.replace("block_sparse_moe", "mlp")
        order = [experts[n] for n in range(len(experts))]
        fused[f"{base}.experts.gate_up_proj"] = np.stack([np.concatenate([e[gate], e[up]]) for e in order])
        fused[f"{base}.experts.down_proj"] = np.stack([e[down] for e in order])
    new = tmp_path / "fused"
    new.mkdir()
    save_file(fused, new / "model.safetensors")
    shutil.copy(model / "tokenizer.json", new)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (new / "config.json").write_text(json.dumps(config))
    first = quantize(model, tmp_path / "a", precisions=("fp32",), progress=False)
    second = quantize(new, tmp_path / "b", precisions=("fp32",), progress=False)
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in second.shards]
    assert [segment.files for segment in first.segments] == [segment.files for segment in second.segments]
