"""transformers and four real agents write the same text: five families, fp32 shards and codec, over real sockets.

Reference: transformers' own forward pass without a cache. Control: the same comparison fails when one expert is scaled by
1.01 in the bundle.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cluster import NODES, Cluster, greedy
from tiny_checkpoints import FAMILIES, make, reference_greedy

from ground_station.trunk import Trunk
from node_agent import shard
from quantize.pipeline import quantize

pytestmark = [pytest.mark.torch, pytest.mark.broker]
PROMPT = [1, 17, 200, 45, 45, 301, 8, 99, 120]
TOKENS = 16
TOLERANCE = 1e-4


def differences(
    bundle: Path, run_dir: Path, expected: tuple[list[int], np.ndarray]
) -> tuple[list[int], float, set[str]]:
    """(tokens, largest logit difference while the texts agree, nodes that served) of the distributed run."""
    with Cluster(bundle, run_dir, "fp32", replicas=(), precision="fp32") as cluster:
        tokens, logits, costs = greedy(cluster.decoder, TOKENS, PROMPT)
        assert not any(cost.rungs for cost in costs)
        same = next((i for i, (a, b) in enumerate(zip(tokens, expected[0])) if a != b), TOKENS - 1) + 1
        return tokens, float(np.abs(logits[:same] - expected[1][:same]).max()), set(cluster.remote.served)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_agents_write_what_transformers_writes(family, tmp_path):
    model = make(family, tmp_path / "model")
    bundle = tmp_path / "bundle"
    quantize(model, bundle, precisions=("fp32",), progress=False)
    expected = reference_greedy(model, PROMPT, TOKENS)
    tokens, worst, served = differences(bundle, tmp_path / "run", expected)
    assert tokens == expected[0]
    assert worst <= TOLERANCE
    assert served == set(NODES)
    assert len(set(tokens)) > 3  # one token over and over would prove little

    # control: a checkpoint with one expert that the prompt uses scaled by 1.01 must not pass the same comparison
    scaled = tmp_path / "scaled"
    shutil.copytree(model, scaled)
    scale_expert(scaled, *chosen_expert(bundle), 1.01)
    quantize(scaled, tmp_path / "bundle-scaled", precisions=("fp32",), progress=False)
    assert differences(tmp_path / "bundle-scaled", tmp_path / "run-scaled", expected)[1] > TOLERANCE


def chosen_expert(bundle: Path) -> tuple[int, int]:
    """(layer, expert): the first choice of the last prompt token in the first MoE layer."""
    manifest = shard.read_manifest(bundle)
    seen: dict[int, int] = {}

    def moe(layer: int, hidden: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen[layer] = int(logits[-1].argmax())
        return np.zeros_like(hidden)

    # without the experts' output the hidden states differ, so only the first MoE layer's choice is the model's own
    Trunk(bundle, manifest).sequence(32).prefill(PROMPT, moe)
    layer = manifest.moe_layers[0]
    return layer, seen[layer]


def scale_expert(folder: Path, layer: int, expert: int, factor: float) -> None:
    """Scales the output of one expert in a checkpoint."""
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    ends = (f"experts.{expert}.down_proj.weight", f"experts.{expert}.w2.weight", "output_linear.weight")
    (name,) = [name for name in tensors if f".{layer}." in name.split("moe")[0].split("mlp")[0] and name.endswith(ends)]
    tensors[name] = tensors[name].copy()
    if name.endswith("output_linear.weight"):
        tensors[name][expert] *= factor
    else:
        tensors[name] *= factor
    save_file(tensors, path, metadata={"format": "pt"})
