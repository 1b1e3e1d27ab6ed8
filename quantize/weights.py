"""The tensors of a model by their role, whatever the family or the version of transformers calls them.

Shapes are checked against the architecture; everything is float32 and read when asked for. Leaves out: keeping any of it.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np

from quantize.checkpoint import Checkpoint
from quantize.families import Architecture, FamilyError


class Weights:
    """The tensors of a model by their role, shapes checked against the architecture. Everything is float32."""

    def __init__(self, checkpoint: Checkpoint, arch: Architecture) -> None:
        self.checkpoint, self.arch = checkpoint, arch
        first = arch.moe_layers[0]
        self._router = self._existing(first, arch.routers, lambda name: name)
        self._experts = self._existing(first, arch.experts, lambda names: names.gate.format(e=0))

    def _existing(self, layer: int, candidates: tuple, name_of: Callable[[Any], str]) -> Any:
        for candidate in candidates:
            if f"model.layers.{layer}.{name_of(candidate)}" in self.checkpoint:
                return candidate
        self.checkpoint.shape(f"model.layers.{layer}.{name_of(candidates[0])}")  # raises, with the name
        raise AssertionError("unreachable")

    def _layer(self, layer: int, name: str, shape: tuple[int, ...], part: int | None = None) -> np.ndarray:
        return self.checkpoint.read(f"model.layers.{layer}.{name}", shape, part)

    def input_norm(self, layer: int) -> np.ndarray:
        return self._layer(layer, "input_layernorm.weight", (self.arch.dims.hidden,))

    def post_norm(self, layer: int) -> np.ndarray:
        return self._layer(layer, "post_attention_layernorm.weight", (self.arch.dims.hidden,))

    def final_norm(self) -> np.ndarray:
        return self.checkpoint.read("model.norm.weight", (self.arch.dims.hidden,))

    def qkv(self, layer: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Query, key and value projections as one [(H + 2 KV) head, D], and their bias or None."""
        d = self.arch.dims
        rows = {"q": d.heads * d.head_dim, "k": d.kv_heads * d.head_dim, "v": d.kv_heads * d.head_dim}
        weight = np.concatenate(
            [self._layer(layer, f"self_attn.{x}_proj.weight", (n, d.hidden)) for x, n in rows.items()]
        )
        if f"model.layers.{layer}.self_attn.q_proj.bias" not in self.checkpoint:
            return weight, None
        return weight, np.concatenate([self._layer(layer, f"self_attn.{x}_proj.bias", (n,)) for x, n in rows.items()])

    def qk_norms(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Scales of the query and key norms: [head] each, or the whole projection's."""
        d = self.arch.dims
        whole = self.arch.qk_norm == "projection"
        return (
            self._layer(layer, "self_attn.q_norm.weight", (d.heads * d.head_dim if whole else d.head_dim,)),
            self._layer(layer, "self_attn.k_norm.weight", (d.kv_heads * d.head_dim if whole else d.head_dim,)),
        )

    def attention_out(self, layer: int) -> np.ndarray:
        """[D, H head]"""
        if f"model.layers.{layer}.self_attn.o_proj.bias" in self.checkpoint:
            raise FamilyError("a bias on the attention's output projection (attention_bias) is not supported")
        d = self.arch.dims
        return self._layer(layer, "self_attn.o_proj.weight", (d.hidden, d.heads * d.head_dim))

    def router(self, layer: int) -> np.ndarray:
        """[E, D]"""
        return self._layer(layer, self._router, (self.arch.dims.experts, self.arch.dims.hidden))

    def expert(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """(gate_up [2I, D] with the gate's rows first, down [D, I]) of one expert."""
        d, names = self.arch.dims, self._experts
        if names.up is None:
            gate_up = self._layer(layer, names.gate, (d.experts, 2 * d.intermediate, d.hidden), expert)
            return gate_up, self._layer(layer, names.down, (d.experts, d.hidden, d.intermediate), expert)
        gate, up, down = (name.format(e=expert) for name in (names.gate, names.up, names.down))
        rows = (d.intermediate, d.hidden)
        gate_up = np.concatenate([self._layer(layer, gate, rows), self._layer(layer, up, rows)])
        return gate_up, self._layer(layer, down, (d.hidden, d.intermediate))

    def dense(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(gate_up, down) of a layer without experts."""
        return self._mlp(layer, "mlp", self.arch.dense_intermediate)

    def shared(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(gate_up, down, gate [1, D]) of the expert that every token uses, times sigmoid of the gate."""
        gate = self._layer(layer, "mlp.shared_expert_gate.weight", (1, self.arch.dims.hidden))
        return *self._mlp(layer, "mlp.shared_expert", self.arch.shared_intermediate), gate

    def _mlp(self, layer: int, prefix: str, width: int) -> tuple[np.ndarray, np.ndarray]:
        d = self.arch.dims.hidden
        halves = [self._layer(layer, f"{prefix}.{x}_proj.weight", (width, d)) for x in ("gate", "up")]
        return np.concatenate(halves), self._layer(layer, f"{prefix}.down_proj.weight", (d, width))

    def embedding(self, rows: slice) -> np.ndarray:
        """Rows of the table [V, D]."""
        return self.checkpoint.read("model.embed_tokens.weight", (self.arch.dims.vocab, self.arch.dims.hidden), rows)

    def head(self, rows: slice) -> np.ndarray:
        """Rows of the output projection [V, D]; those of the embedding where the two are tied."""
        if self.arch.tied:
            return self.embedding(rows)
        return self.checkpoint.read("lm_head.weight", (self.arch.dims.vocab, self.arch.dims.hidden), rows)
