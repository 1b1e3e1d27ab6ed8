"""From a training checkpoint to a Hugging Face folder, and its held-out bits per byte.

Leaves out: training (train) and the bundle (quantize.pipeline).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from quantize.reference.mix import DOCUMENT_START
from quantize.reference.model import ModelConfig, ReferenceModel
from quantize.reference.state import config_of, load_checkpoint, write_atomically


def evaluate_bits_per_byte(
    model, tokens: np.ndarray, n_bytes: int, *, context: int = 512, stride: int = 256, batch: int = 4
) -> float:
    """Bits per byte of `tokens` (which stand for `n_bytes` bytes of text); every token is scored exactly once.

    Windows of `context` tokens move by `stride`, so that a token sees at least context - stride tokens before it
    (fewer only at the very beginning). `model.token_nll(ids [B,S], targets [B,S])` gives nats.
    """
    sequence = torch.from_numpy(np.concatenate(([DOCUMENT_START], tokens.astype(np.int64))))
    total, scored = len(tokens), 0
    windows = []  # (start, first position scored inside the window)
    start = 0
    while scored < total:
        start = min(start, max(0, total - context))
        windows.append((start, scored - start))
        scored = min(start + context, total)
        start += stride
    bits = 0.0
    for at in range(0, len(windows), batch):
        group = windows[at : at + batch]
        ids = torch.zeros(batch, context, dtype=torch.long)
        target = torch.zeros(batch, context, dtype=torch.long)
        for row, (start, _) in enumerate(group):
            piece = sequence[start : start + context + 1]
            ids[row, : len(piece) - 1], target[row, : len(piece) - 1] = piece[:-1], piece[1:]
        nll = model.token_nll(ids, target)
        for row, (start, first) in enumerate(group):
            bits += float(nll[row, first : min(context, total - start)].double().sum()) / np.log(2)
    return bits / n_bytes


def text_sample(work: Path, kind: str, limit: int | None) -> dict[str, tuple[np.ndarray, int]]:
    """domain -> (the first `limit` tokens of its `kind`- file, the bytes of text they stand for)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    sample = {}
    for path in sorted((work / "tokens").glob(f"{kind}-*.npy")):
        tokens = np.load(path)[:limit]
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        sample[path.stem.removeprefix(f"{kind}-")] = (tokens, len(text.encode()))
    return sample


def load_model(path: Path) -> tuple[ReferenceModel, dict]:
    """(the model of a checkpoint, the checkpoint)."""
    saved = load_checkpoint(path)
    model = ReferenceModel.allocate(config_of(saved))
    model.master.copy_(saved["master"])
    model.refresh()
    return model, saved


def hugging_face_config(config: ModelConfig) -> dict:
    """config.json as transformers 4.57 reads it."""
    dense = bool(config.dense_intermediate)
    values = {
        "architectures": ["Qwen3ForCausalLM" if dense else "Qwen3MoeForCausalLM"],
        "model_type": "qwen3" if dense else "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": DOCUMENT_START,
        "eos_token_id": DOCUMENT_START,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.dense_intermediate or config.experts_per_token * config.intermediate,
        "max_position_embeddings": 2048,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab,
    }
    if not dense:
        values |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": config.intermediate,
            "norm_topk_prob": True,
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.01,
        }
    return values


def hugging_face_tensors(model: ReferenceModel) -> dict[str, torch.Tensor]:
    """The weights under transformers' names, bf16, one tensor per expert and projection."""
    c, out = model.config, {}

    def put(name: str, tensor: torch.Tensor) -> None:
        out[f"model.{name}.weight"] = tensor.to(torch.bfloat16).contiguous().clone()

    put("embed_tokens", model.master_view("embed"))
    put("norm", model.master_view("norm"))
    for n in range(c.layers):
        prefix = f"layers.{n}"
        put(f"{prefix}.input_layernorm", model.master_view(f"{n}.norm1"))
        put(f"{prefix}.post_attention_layernorm", model.master_view(f"{n}.norm2"))
        rows = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        for letter, part in zip("qkv", model.master_view(f"{n}.qkv").split(rows), strict=True):
            put(f"{prefix}.self_attn.{letter}_proj", part)
        put(f"{prefix}.self_attn.o_proj", model.master_view(f"{n}.o"))
        put(f"{prefix}.self_attn.q_norm", model.master_view(f"{n}.q_norm"))
        put(f"{prefix}.self_attn.k_norm", model.master_view(f"{n}.k_norm"))
        gate_up, down = model.master_view(f"{n}.gate_up"), model.master_view(f"{n}.down")
        if not c.dense_intermediate:
            put(f"{prefix}.mlp.gate", model.master_view(f"{n}.router"))
        for e in range(gate_up.shape[0]):
            mlp = f"{prefix}.mlp" if c.dense_intermediate else f"{prefix}.mlp.experts.{e}"
            gate, up = gate_up[e].chunk(2, 0)
            put(f"{mlp}.gate_proj", gate)
            put(f"{mlp}.up_proj", up)
            put(f"{mlp}.down_proj", down[e])
    return out


def export(work: Path, name: str, out: Path, checkpoint: str = "state.pt") -> None:
    """Writes a Hugging Face folder: config.json, model.safetensors, tokenizer files, training.json."""
    from safetensors.torch import save_file

    model, saved = load_model(work / "runs" / name / checkpoint)
    out.mkdir(parents=True, exist_ok=True)

    def write_json(path: Path, value: dict) -> None:
        write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n"))

    write_json(out / "config.json", hugging_face_config(model.config))
    write_json(out / "generation_config.json", {"bos_token_id": DOCUMENT_START, "eos_token_id": DOCUMENT_START})
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": True,  # training documents begin with it
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    write_json(out / "tokenizer_config.json", tokenizer)
    write_atomically(out / "tokenizer.json", lambda p: p.write_bytes((work / "tokenizer.json").read_bytes()))
    tensors = hugging_face_tensors(model)
    write_atomically(out / "model.safetensors", lambda p: save_file(tensors, p, metadata={"format": "pt"}))
    (out / "model.safetensors").chmod(0o644)  # the library makes it private
    facts = {k: saved[k] for k in ("step", "tokens", "elapsed_s", "phase", "recipe")}
    write_json(out / "training.json", facts)


def evaluate_held_out(work: Path, name: str, checkpoint: str = "state.pt") -> dict:
    """Held-out bits per byte per domain and their mean, for a run with or without experts."""
    model, saved = load_model(work / "runs" / name / checkpoint)
    domains = {
        domain: round(evaluate_bits_per_byte(model, tokens, n_bytes), 4)
        for domain, (tokens, n_bytes) in text_sample(work, "heldout", None).items()
    }
    return {
        "run": name,
        "tokens": saved["tokens"],
        "steps": saved["step"],
        "elapsed_s": round(saved["elapsed_s"]),
        "domains": domains,
        "mean_bits_per_byte": round(sum(domains.values()) / len(domains), 4),
    }
