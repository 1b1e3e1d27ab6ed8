"""Tiny random checkpoints of the five families, made by transformers itself, for parity tests.

Weights are wider than an initialised model's, so that every part of the graph moves the logits. Leaves out: training.
"""

from __future__ import annotations

from pathlib import Path

STD = 0.15
CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "The expert sees the hidden state of a token.",
    "0123456789",
]
COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
QWEN = COMMON | {"num_experts": 6, "moe_intermediate_size": 48, "intermediate_size": 80}
# Each family with what only it has: dense layers, shared expert, biases, norms, clipping, multipliers, tied embeddings.
SETTINGS = {
    "mixtral": COMMON | {"intermediate_size": 96, "num_local_experts": 6, "sliding_window": None, "rope_theta": 1e6},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "norm_topk_prob": False},
    "qwen3_moe": QWEN | {"head_dim": 32, "mlp_only_layers": [0], "norm_topk_prob": True, "tie_word_embeddings": True},
    "olmoe": COMMON | {"intermediate_size": 48, "num_experts": 6, "norm_topk_prob": False, "clip_qkv": 1.0},
    "granitemoe": COMMON
    | {
        "intermediate_size": 48,
        "num_local_experts": 6,
        "embedding_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.8,
        "logits_scaling": 0.5,
        "tie_word_embeddings": True,
    },
}
FAMILIES = tuple(SETTINGS)


def write_tokenizer(folder: Path, vocab: int = 320) -> None:
    """A byte-level BPE with <pad>, <bos>, <eos>; it puts nothing in front of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=["<pad>", "<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def make_model(family: str, seed: int = 0, **changes):
    """The transformers model in float32, random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(SETTINGS[family] | changes))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.7, 1.3)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, STD)
    return model


def make(family: str, folder: Path, seed: int = 0, **changes) -> Path:
    """Writes config.json, model.safetensors and tokenizer.json of a random model of `family` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(family, seed, **changes).save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder)
    return folder


def reference_greedy(folder: Path, prompt: list[int], tokens: int):
    """(greedy tokens, their logits float32 [tokens, V]) by transformers, without a cache: each step runs the whole text."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, logits = list(prompt), []
    with torch.no_grad():
        for _ in range(tokens):
            logits.append(model(torch.tensor([ids])).logits[0, -1].numpy())
            ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], np.stack(logits)


def make_without_torch(
    folder: Path, seed: int = 0, layers: int = 3, experts: int = 6, hidden: int = 64, width: int = 48
) -> Path:
    """A random Qwen3-MoE checkpoint in bfloat16 written with safetensors alone; layer 0 is dense, embeddings are tied."""
    import json

    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    head, heads, kv_heads, vocab, dense = 32, 4, 2, 320, 80
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        n = f"model.layers.{layer}"
        shapes |= {f"{n}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{n}.self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
        shapes |= {
            f"{n}.self_attn.{x}_proj.weight": (c * head, hidden) for x, c in zip("qkv", (heads, kv_heads, kv_heads))
        }
        shapes[f"{n}.self_attn.o_proj.weight"] = (hidden, heads * head)
        mlps = {f"{n}.mlp": dense} if layer == 0 else {f"{n}.mlp.experts.{e}": width for e in range(experts)}
        for prefix, rows in mlps.items():
            shapes |= {f"{prefix}.{x}_proj.weight": (rows, hidden) for x in ("gate", "up")}
            shapes[f"{prefix}.down_proj.weight"] = (hidden, rows)
        if layer:
            shapes[f"{n}.mlp.gate.weight"] = (experts, hidden)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.uniform(0.7, 1.3, shape) if "norm" in name else rng.normal(0, STD, shape)
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": width,
        "intermediate_size": dense,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nRandom weights.\n")
    write_tokenizer(folder)
    return folder
