"""Reading checkpoints and describing families: exact values against safetensors and ml_dtypes, and every refusal by name."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

from tiny_checkpoints import make_without_torch  # noqa: E402

from quantize.checkpoint import Checkpoint, CheckpointError  # noqa: E402
from quantize.families import FAMILIES, FamilyError, architecture  # noqa: E402
from quantize.trunk_graph import rotary_table, spans  # noqa: E402
from quantize.weights import Weights  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_without_torch(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def model(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "model")


def change(model: Path, **values) -> Path:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_are_exact_in_every_type(model, dtype):
    stored = {"a": np.random.default_rng(0).normal(size=(5, 3, 2)).astype(dtype), "odd": np.arange(3).astype(dtype)}
    safetensors_numpy.save_file(stored, model / "model.safetensors")
    checkpoint = Checkpoint(model)
    for name, tensor in stored.items():
        read = checkpoint.read(name, tensor.shape)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, tensor.astype(np.float32))
    np.testing.assert_array_equal(checkpoint.read("a", part=3), stored["a"][3].astype(np.float32))
    np.testing.assert_array_equal(checkpoint.read("a", part=slice(1, 99)), stored["a"][1:].astype(np.float32))


def refusal(model: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint = Checkpoint(model)
        Weights(checkpoint, architecture(checkpoint.config)).expert(1, 5)
    text = str(caught.value)
    assert "\n" not in text and isinstance(caught.value, ValueError)
    return text


def test_missing_pieces_are_named(model, tmp_path):
    assert "no folder" in refusal(tmp_path / "nowhere")
    for name, said in (
        ("tokenizer.json", "tokenizer.json"),
        ("config.json", "no config.json"),
        ("model.safetensors", "download"),
    ):
        (model / name).rename(tmp_path / "aside")
        assert said in refusal(model)
        (tmp_path / "aside").rename(model / name)


@pytest.mark.parametrize("keep", [4, 600, -1])
def test_a_truncated_file_is_refused(model, keep):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "cut short" in refusal(model) and "again" in refusal(model)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{not json",
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,3]}}',
        b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}',
        b'{"x":{"dtype":"F32"}}',
    ],
)
def test_a_damaged_header_is_refused(model, header):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert "damaged" in refusal(model)


def test_a_header_length_beyond_the_file_is_refused_before_it_is_read(model):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "cut short" in refusal(model)


def test_an_index_must_stay_in_the_folder(model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    assert "weight_map" in refusal(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "part-2.safetensors"}}))
    assert "part-2.safetensors" in refusal(model)


def test_missing_and_misshapen_tensors_are_named(model):
    tensors = safetensors_numpy.load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    safetensors_numpy.save_file({k: v for k, v in tensors.items() if k != name}, model / "model.safetensors")
    assert name in refusal(model)
    tensors[name] = np.ascontiguousarray(tensors[name][:40])
    safetensors_numpy.save_file(tensors, model / "model.safetensors")
    assert name in refusal(model) and "[40, 64]" in refusal(model)


def test_stored_types_that_are_not_floats_are_named(model):
    safetensors_numpy.save_file({"a": np.arange(4, dtype=np.int8)}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="I8"):
        Checkpoint(model).read("a")


def test_fingerprint_tells_models_apart(made, tmp_path):
    assert Checkpoint(made).fingerprint() == Checkpoint(shutil.copytree(made, tmp_path / "copy")).fingerprint()
    other = make_without_torch(tmp_path / "other", seed=1)
    assert Checkpoint(made).fingerprint() != Checkpoint(other).fingerprint()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "deepseek_v3"}, "'deepseek_v3'"),
        ({"model_type": None}, "None"),
        ({"use_sliding_window": True, "sliding_window": 64}, "--max-context 64"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        ({"rope_theta": None}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"head_dim": 24}, "head_dim 24"),
        ({"num_experts_per_tok": 7}, "sizes"),
        ({"num_experts": 0}, "sizes"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"mlp_only_layers": [0, 1, 2]}, "no layer has experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized already"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model, changes, said):
    assert said in refusal(change(model, **changes))


def test_the_refusal_of_a_family_lists_those_supported(model):
    text = refusal(change(model, model_type="gpt_oss"))
    assert set(FAMILIES) == {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe"}
    assert all(family in text for family in FAMILIES)


def test_an_output_bias_of_the_attention_is_refused(model):
    tensors = safetensors_numpy.load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(64, np.float32)
    safetensors_numpy.save_file(tensors, model / "model.safetensors")
    checkpoint = Checkpoint(model)
    with pytest.raises(FamilyError, match="attention_bias"):
        Weights(checkpoint, architecture(checkpoint.config)).attention_out(0)


def test_the_new_place_of_rope_theta_is_read(model):
    config = json.loads((model / "config.json").read_text())
    old = architecture(config)
    theta = config.pop("rope_theta")
    assert architecture(config | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}) == old


def test_sparse_steps_give_the_layers_of_transformers():
    """transformers: (layer + 1) % decoder_sparse_step == 0 and not in mlp_only_layers."""
    config = {
        "model_type": "qwen2_moe",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "intermediate_size": 64,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    }
    arch = architecture(config)
    assert arch.moe_layers == (1, 5)
    assert [span.attention_layers for span in spans(6, arch.moe_layers)] == [(0, 1), (2, 3, 4, 5), ()]


def test_rotary_table_against_hand_values():
    """theta 10000, head 16: frequency of pair 4 is 10000^(-8/16) = 0.01."""
    cosines, sines = rotary_table(10000.0, 16, 8)
    assert cosines.shape == sines.shape == (8, 8)
    np.testing.assert_allclose([cosines[5, 0], sines[5, 0]], [0.2836622, -0.9589243], rtol=1e-6)  # cos 5, sin 5
    np.testing.assert_allclose([cosines[5, 4], sines[5, 4]], [0.9987503, 0.0499792], rtol=1e-5)  # cos 0.05, sin 0.05
