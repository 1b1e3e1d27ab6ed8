"""The model families that can be cut at their experts: from config.json and tensor names to one common description.

One small adapter per family; a family or a feature that is not computed exactly is refused by name, never approximated.
Leaves out: reading tensors (weights, checkpoint) and building graphs (trunk_graph).
Source: transformers 4.57 models/{mixtral,qwen2_moe,qwen3_moe,olmoe,granitemoe}/modeling_*.py; the fused tensor names are
those of transformers 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

from node_agent.shard import MAX_DIM, Dims, Routing
from quantize.checkpoint import CheckpointError

DEFAULT_MAX_CONTEXT = 4096
MAX_LAYERS = 1024
ROTARY_MULTIPLE = 16  # the attention kernel wants half a head in multiples of 8


class FamilyError(CheckpointError):
    """The model is of a family, or uses a feature, that is not supported; the text names it and what is."""


@dataclass(frozen=True)
class ExpertNames:
    """Tensors of the experts below `model.layers.L.`; {e} is the expert. `up` None: gate and up are one tensor [E, 2I, D]."""

    gate: str
    up: str | None
    down: str


@dataclass(frozen=True)
class Architecture:
    """What differs between the families. D hidden, I intermediate, E experts (node_agent.shard.Dims).

    `qk_norm`: 'none', 'head' (RMS norm of each head) or 'projection' (of the whole projection). `attention_scale` None is
    1/sqrt(head_dim). `dense_intermediate`, `shared_intermediate`: width of the dense layers and of the shared expert, 0 for none.
    """

    family: str
    dims: Dims
    routing: Routing
    eps: float
    rope_theta: float
    moe_layers: tuple[int, ...]
    routers: tuple[str, ...]
    experts: tuple[ExpertNames, ...]
    qk_norm: str = "none"
    attention_scale: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    clip_qkv: float | None = None
    dense_intermediate: int = 0
    shared_intermediate: int = 0
    tied: bool = False


Config = dict[str, Any]
_QWEN_EXPERTS = (
    ExpertNames(
        "mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "mlp.experts.{e}.down_proj.weight"
    ),
    ExpertNames("mlp.experts.gate_up_proj", None, "mlp.experts.down_proj"),
)
_MIXTRAL_EXPERTS = (
    ExpertNames(
        "block_sparse_moe.experts.{e}.w1.weight",
        "block_sparse_moe.experts.{e}.w3.weight",
        "block_sparse_moe.experts.{e}.w2.weight",
    ),
    ExpertNames("block_sparse_moe.experts.gate_up_proj", None, "block_sparse_moe.experts.down_proj"),
    ExpertNames("mlp.experts.gate_up_proj", None, "mlp.experts.down_proj"),
)
_GRANITE_EXPERTS = (
    ExpertNames("block_sparse_moe.input_linear.weight", None, "block_sparse_moe.output_linear.weight"),
    ExpertNames("block_sparse_moe.experts.gate_up_proj", None, "block_sparse_moe.experts.down_proj"),
    ExpertNames("mlp.experts.gate_up_proj", None, "mlp.experts.down_proj"),
)


def _int(config: Config, *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise FamilyError(
                    f"config.json: {name} is {value!r}, not a whole number: copy the model's config.json again"
                )
            return value
    if default is None:
        raise FamilyError(f"config.json has no {names[0]}: copy the model's config.json again")
    return default


def _float(config: Config, name: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise FamilyError(f"config.json: {name} is {value!r}, not a number: copy the model's config.json again")
    return float(value)


def _sparse_layers(config: Config) -> tuple[int, ...]:
    """Qwen: layers with experts; the others are dense."""
    step = max(1, _int(config, "decoder_sparse_step", default=1))
    dense = set(config.get("mlp_only_layers") or ())
    return tuple(n for n in range(_int(config, "num_hidden_layers")) if n not in dense and (n + 1) % step == 0)


def _mixtral(config: Config) -> dict[str, Any]:
    return {
        "routing": Routing("softmax_topk", True),
        "moe_intermediate": _int(config, "intermediate_size"),
        "experts_count": _int(config, "num_local_experts"),
        "routers": ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        "experts": _MIXTRAL_EXPERTS,
    }


def _qwen2_moe(config: Config) -> dict[str, Any]:
    return _qwen3_moe(config) | {
        "qk_norm": "none",
        "shared_intermediate": _int(config, "shared_expert_intermediate_size"),
    }


def _qwen3_moe(config: Config) -> dict[str, Any]:
    return {
        "routing": Routing("softmax_topk", bool(config.get("norm_topk_prob", False))),
        "moe_intermediate": _int(config, "moe_intermediate_size"),
        "experts_count": _int(config, "num_experts"),
        "moe_layers": _sparse_layers(config),
        "dense_intermediate": _int(config, "intermediate_size", default=0),
        "routers": ("mlp.gate.weight",),
        "experts": _QWEN_EXPERTS,
        "qk_norm": "head",
    }


def _olmoe(config: Config) -> dict[str, Any]:
    clip = config.get("clip_qkv")
    return {
        "routing": Routing("softmax_topk", bool(config.get("norm_topk_prob", False))),
        "moe_intermediate": _int(config, "intermediate_size"),
        "experts_count": _int(config, "num_experts"),
        "routers": ("mlp.gate.weight",),
        "experts": _QWEN_EXPERTS,
        "qk_norm": "projection",
        "clip_qkv": None if clip is None else _float(config, "clip_qkv", 0.0),
    }


def _granitemoe(config: Config) -> dict[str, Any]:
    return {
        "routing": Routing("topk_softmax", True),
        "moe_intermediate": _int(config, "intermediate_size"),
        "experts_count": _int(config, "num_local_experts"),
        "routers": ("block_sparse_moe.router.layer.weight", "mlp.router.layer.weight", "mlp.gate.weight"),
        "experts": _GRANITE_EXPERTS,
        "attention_scale": _float(config, "attention_multiplier", 1.0),
        "embedding_multiplier": _float(config, "embedding_multiplier", 1.0),
        "residual_multiplier": _float(config, "residual_multiplier", 1.0),
        "logits_scaling": _float(config, "logits_scaling", 1.0),
    }


FAMILIES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "granitemoe": _granitemoe,
}


def _rope_theta(config: Config) -> float:
    """transformers 4 keeps rope_theta and rope_scaling at the top, 5 both in rope_parameters."""
    new = config.get("rope_parameters") or {}
    for name, scaling in (("rope_scaling", config.get("rope_scaling")), ("rope_parameters", new)):
        kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
        if kind != "default":
            raise FamilyError(
                f"config.json: {name} of type {kind!r} is not supported, only the default rotary embedding is"
            )
    for source in (config, new):
        if float(source.get("partial_rotary_factor") or 1.0) != 1.0:
            raise FamilyError("config.json: partial_rotary_factor is not supported, only rotation of whole heads is")
    source = new if "rope_theta" in new else config
    if "rope_theta" not in source:
        raise FamilyError("config.json has no rope_theta: copy the model's config.json again")
    return _float(source, "rope_theta", 0.0)


def _max_context(config: Config, family: str, limit: int) -> int:
    context = min(_int(config, "max_position_embeddings"), limit)
    window = config.get("sliding_window")
    slides = (
        family == "mixtral"
        or bool(config.get("use_sliding_window"))
        or "sliding_attention" in (config.get("layer_types") or ())
    )
    if slides and window is not None and window < context:
        raise FamilyError(
            f"config.json: a sliding window of {window} tokens is not supported in a context of {context}: give --max-context {window}"
        )
    return context


def architecture(config: Config, max_context: int = DEFAULT_MAX_CONTEXT) -> Architecture:
    """The common description of a model.  Raises: FamilyError for an unsupported family or feature."""
    family = config.get("model_type")
    adapter = FAMILIES.get(family) if isinstance(family, str) else None
    if adapter is None:
        raise FamilyError(f"model family {family!r} is not supported: give a model of {', '.join(FAMILIES)}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise FamilyError(f"config.json: hidden_act {config['hidden_act']!r} is not supported, only silu is")
    if config.get("quantization_config"):
        raise FamilyError(
            "config.json: the weights are quantized already; give the original model in bfloat16, float16 or float32"
        )
    traits = adapter(config)
    hidden, heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    dims = Dims(
        hidden=hidden,
        intermediate=traits.pop("moe_intermediate"),
        layers=_int(config, "num_hidden_layers"),
        experts=traits.pop("experts_count"),
        top_k=_int(config, "num_experts_per_tok"),
        vocab=_int(config, "vocab_size"),
        heads=heads,
        kv_heads=_int(config, "num_key_value_heads", default=heads),
        head_dim=_int(config, "head_dim", default=hidden // max(heads, 1)),
        max_context=_max_context(config, family, max_context),
    )
    if max(vars(dims).values()) > MAX_DIM or dims.layers > MAX_LAYERS:
        raise FamilyError(
            f"config.json or --max-context: a size is beyond any model ({dims}): correct it, at most {MAX_DIM}"
            f" and {MAX_LAYERS} layers"
        )
    if min(vars(dims).values()) < 1 or dims.top_k > dims.experts or dims.heads % dims.kv_heads:
        raise FamilyError(f"config.json: sizes do not fit together ({dims}): copy the model's config.json again")
    if dims.head_dim % ROTARY_MULTIPLE:
        raise FamilyError(
            f"config.json: head_dim {dims.head_dim} is not supported, only multiples of {ROTARY_MULTIPLE} are"
        )
    moe_layers = traits.pop("moe_layers", tuple(range(dims.layers)))
    if not moe_layers:
        raise FamilyError(
            "config.json: no layer has experts (mlp_only_layers, decoder_sparse_step): there is nothing to distribute"
        )
    return Architecture(
        family=family,
        dims=dims,
        eps=_float(config, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(config),
        moe_layers=moe_layers,
        tied=bool(config.get("tie_word_embeddings", False)),
        **traits,
    )
