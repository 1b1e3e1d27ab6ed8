"""A bundle of random weights in the form of Qwen3-MoE, for measuring speed at any size; its text is noise and says so.

Every tensor is a seeded Gaussian as in an initialised model (standard deviation 0.02, norms 1), drawn when it is needed.
Leaves out: a tokenizer (callers feed token ids) and calibration (weights are rounded to nearest).
"""

from __future__ import annotations

import shutil
import zlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from node_agent.shard import Dims, FileEntry, Manifest, Segment, ShardEntry, write_manifest
from quantize import trunk_graph
from quantize.families import architecture
from quantize.nbits import round_to_nearest
from quantize.pipeline import disk_room, write_shard
from quantize.recipe import BLOCKS, DYNAMIC, PRECISIONS, RecipeError
from quantize.weights import Weights

INITIAL_STD = 0.02  # transformers' initializer_range of this family
ROPE_THETA = 1e6


class GaussianTensors:
    """Stands where a checkpoint would: any tensor of the family, drawn from a generator seeded by seed and name."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __contains__(self, name: str) -> bool:
        return not name.endswith(".bias")

    def read(self, name: str, shape: tuple[int, ...], part: int | slice | None = None) -> np.ndarray:
        if "norm" in name:
            tensor = np.ones(shape, np.float32)
        else:
            rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
            tensor = rng.standard_normal(shape, np.float32)
            tensor *= np.float32(INITIAL_STD)
        return tensor if part is None else tensor[part]


def _config(hidden: int, intermediate: int, layers: int, experts: int, top_k: int, **sizes: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"],
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": sizes["max_context"],
        "norm_topk_prob": True,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }


def _refuse_what_does_not_fit(out: Path, dims: Dims, precision: tuple[str, ...]) -> None:
    """Raises: RecipeError when the experts alone, or one matrix in memory, are beyond this machine."""
    parent = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    bits = sum(32 if name == "fp32" else BLOCKS[name][0] for name in precision)
    one = 3 * dims.hidden * dims.intermediate
    need, free = dims.layers * dims.experts * one * bits // 8, shutil.disk_usage(parent).free
    if need > free or 16 * max(one, dims.vocab * dims.hidden) > psutil.virtual_memory().available:
        raise RecipeError(
            f"the experts of this shape need {need / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB free (or one matrix does "
            f"not fit into memory): give smaller sizes"
        )


def synthetic(
    out: Path,
    hidden: int,
    intermediate: int,
    layers: int,
    experts: int,
    top_k: int,
    *,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 128,
    vocab: int = 4096,
    max_context: int = 4096,
    precision: tuple[str, ...] = ("int4",),
    trunk_precision: str = "fp32",
    seed: int = 0,
) -> Manifest:
    """Writes the bundle below `out` and returns its manifest.  Raises: FamilyError, RecipeError (ValueErrors), DiskFullError."""
    possible = tuple(name for name in PRECISIONS if name != DYNAMIC)
    unknown = [name for name in precision if name not in possible]
    if unknown or not precision:
        raise RecipeError(f"precision {', '.join(unknown) or '(none)'} is unknown: choose from {', '.join(possible)}")
    if trunk_precision not in trunk_graph.TRUNK_PRECISIONS:
        raise RecipeError(
            f"trunk precision {trunk_precision!r} is unknown: choose from {', '.join(trunk_graph.TRUNK_PRECISIONS)}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} exists and is not empty: give another folder")
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "vocab": vocab, "max_context": max_context}
    arch = architecture(_config(hidden, intermediate, layers, experts, top_k, **sizes), max_context)
    _refuse_what_does_not_fit(out, arch.dims, precision)
    weights = Weights(GaussianTensors(seed), arch)  # type: ignore[arg-type]
    shared: dict[str, FileEntry] = {}
    segments: list[Segment] = []
    shards: list[ShardEntry] = []
    with disk_room(out):
        for position in range(len(arch.moe_layers) + 1):
            segments.append(trunk_graph.write_segment(out, weights, position, trunk_precision, shared))
        for layer in arch.moe_layers:
            for expert in range(experts):
                matrices = weights.expert(layer, expert)
                for name in precision:
                    coded = matrices if name == "fp32" else tuple(round_to_nearest(w, *BLOCKS[name]) for w in matrices)
                    shards.append(write_shard(out, layer, expert, name, *coded))
        manifest = Manifest(
            name=f"synthetic-{hidden}-{intermediate}-{layers}-{experts}-{top_k}",
            family=arch.family,
            base_model="synthetic: random weights, not a language model",
            revision=f"seed {seed}",
            licence="none: random numbers",
            dims=arch.dims,
            routing=arch.routing,
            bos_id=None,
            eos_ids=(),
            moe_layers=arch.moe_layers,
            trunk_precision=trunk_precision,
            segments=tuple(segments),
            shards=tuple(shards),
            files=(),
            recipe={
                "synthetic": f"Gaussian weights, standard deviation {INITIAL_STD}, seed {seed}",
                **{
                    name: "float32"
                    if name == "fp32"
                    else "MatMulNBits, {} bit, blocks of {}, round-to-nearest".format(*BLOCKS[name])
                    for name in precision
                },
            },
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        write_manifest(out, manifest)
    return manifest
