"""The trunk as ONNX: everything of the model but the experts, cut where an MoE layer's experts are called.

M MoE layers give M + 1 segments with the inputs and outputs that node_agent.shard.Segment documents. Built with onnx.helper
for few operators per token: fused query/key/value product, residual addition inside the norm, rotary inside the attention.
Files that several segments use (rotary table, embedding where it is also the head) lie beside them and are mapped.
Leaves out: the experts (expert_graph), running the graphs, and calibrating the trunk: its 8 and 4 bits are rounded to nearest.

Shape letters: B rows, S tokens, D hidden, H heads, KV key/value heads, C cache capacity, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper

from node_agent.shard import FileEntry, Segment, atomic_file, write_file
from quantize.expert_graph import IR_VERSION, OPSET, Matrix, Piece, external_tensors, linear, swiglu
from quantize.nbits import round_to_nearest
from quantize.weights import Weights

FOLDER = "trunk"
ROTARY, EMBEDDING, HEAD = "rotary.bin", "embedding.bin", "head.bin"
STREAM_BYTES = 64 * 1024 * 1024  # of a table that is copied at a time
TRUNK_PRECISIONS = {"fp32": None, "int8": (8, 128), "int4": (4, 32)}  # (bits, block)
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Span:
    """Layers of one segment: attention of all of them, and the MoE layer that ends it (None: the last segment)."""

    attention_layers: tuple[int, ...]
    moe_layer: int | None


def spans(layers: int, moe_layers: tuple[int, ...]) -> list[Span]:
    """The M + 1 segments of a model."""
    result, start = [], 0
    for layer in moe_layers:
        result.append(Span(tuple(range(start, layer + 1)), layer))
        start = layer + 1
    result.append(Span(tuple(range(start, layers)), None))
    return result


def rotary_table(theta: float, head_dim: int, max_context: int) -> np.ndarray:
    """float32 [2, max_context, head_dim / 2]: cosines, then sines, of position * theta^(-2i / head_dim)."""
    inverse = 1.0 / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    angle = np.arange(max_context, dtype=np.float32)[:, None] * inverse.astype(np.float32)[None]
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)


def _external(name: str, location: str, offset: int, shape: tuple[int, ...]) -> TensorProto:
    """A float32 initialiser in a file that another writer makes."""
    proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", 4 * int(np.prod(shape)))):
        entry = proto.external_data.add()
        entry.key, entry.value = key, str(value)
    return proto


class _SegmentGraph:
    """Collects the operators of one segment. `quantised` turns a weight into what `linear` takes."""

    def __init__(self, weights: Weights, quantised: Callable[[np.ndarray], Matrix]) -> None:
        self.weights, self.arch, self.quantised = weights, weights.arch, quantised
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.inline: dict[str, np.ndarray] = {}  # shapes, which must be known when the graph is loaded
        self.shared: list[TensorProto] = []

    def op(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes) -> str:
        self.nodes.append(helper.make_node(kind, inputs, outputs, outputs[0] + "." + kind, domain=domain, **attributes))
        return outputs[0]

    def add(self, piece: Piece, out: str) -> str:
        self.nodes += piece.nodes
        self.tensors.update(piece.tensors)
        return out

    def const(self, name: str, array: np.ndarray) -> str:
        self.tensors[name] = np.ascontiguousarray(array, np.float32)
        return name

    def ints(self, name: str, values: list[int]) -> str:
        self.inline[name] = np.array(values, np.int64)
        return name

    def scaled(self, x: str, factor: float, out: str) -> str:
        if factor == 1.0:
            return x
        return self.op("Mul", [x, self.const(f"{out}.factor", np.array([factor]))], [out])

    def norm(self, name: str, x: str, delta: str | None, scale: np.ndarray, out: str, total: str) -> tuple[str, str]:
        """(RMS norm of x + delta, x + delta)"""
        gamma = self.const(f"{name}.scale", scale)
        if delta is None:
            return self.op("SimplifiedLayerNormalization", [x, gamma], [out], axis=-1, epsilon=self.arch.eps), x
        self.op(
            "SkipSimplifiedLayerNormalization",
            [x, delta, gamma],
            [out, "", "", total],
            MICROSOFT,
            epsilon=self.arch.eps,
        )
        return out, total

    def mlp(self, name: str, x: str, gate_up: np.ndarray, down: np.ndarray) -> str:
        self.add(linear(f"{name}.gate_up", x, self.quantised(gate_up), f"{name}.h"), "")
        self.add(swiglu(name, f"{name}.h", f"{name}.a"), "")
        return self.add(linear(f"{name}.down", f"{name}.a", self.quantised(down), f"{name}.y"), f"{name}.y")

    def attention(self, layer: int, x: str) -> str:
        """Adds nothing to the residual: returns the attention's output [B, S, D], times the residual multiplier."""
        d, n = self.arch.dims, f"L{layer}"
        q_width, kv_width = d.heads * d.head_dim, d.kv_heads * d.head_dim
        weight, bias = self.weights.qkv(layer)
        self.add(linear(f"{n}.qkv", x, self.quantised(weight), f"{n}.qkv", bias), "")
        query, key, value = f"{n}.qkv", "", ""  # packed
        if self.arch.qk_norm == "head":
            query = self._head_norm(layer, query)
        elif self.arch.qk_norm == "projection":
            sizes = self.ints("qkv.sizes", [q_width, kv_width, kv_width])
            parts = [f"{n}.q", f"{n}.k", f"{n}.v"]
            self.op("Split", [query, sizes], parts, axis=-1)
            scales = self.weights.qk_norms(layer)
            query, key = (
                self.norm(f"{n}.{x}_norm", part, None, scale, f"{part}.normed", "")[0]
                for x, part, scale in zip("qk", parts, scales)
            )
            value = parts[2]
        if self.arch.clip_qkv is not None:
            bound = np.float32(self.arch.clip_qkv)
            self.inline |= {"clip.low": np.array(-bound), "clip.high": np.array(bound)}
            query, key, value = (
                self.op("Clip", [x, "clip.low", "clip.high"], [f"{x}.clip"]) if x else "" for x in (query, key, value)
            )
        scale = {} if self.arch.attention_scale is None else {"scale": float(self.arch.attention_scale)}
        self.op(
            "GroupQueryAttention",
            [
                query,
                key,
                value,
                f"past_key_{layer}",
                f"past_value_{layer}",
                "seqlens_k",
                "total_sequence_length",
                "cos",
                "sin",
            ],
            [f"{n}.attended", f"present_key_{layer}", f"present_value_{layer}"],
            MICROSOFT,
            num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            do_rotary=1,
            **scale,
        )
        out = self.weights.attention_out(layer) * np.float32(self.arch.residual_multiplier)
        return self.add(linear(f"{n}.o", f"{n}.attended", self.quantised(out), f"{n}.o"), f"{n}.o")

    def _head_norm(self, layer: int, packed: str) -> str:
        """RMS norm of each query and key head, values as they are: one norm without scale over both, then both scales.

        Measured against two separate norms on one token: 2.3 instead of 3.5 us.
        """
        d, n = self.arch.dims, f"L{layer}.qk"
        both = d.heads + d.kv_heads
        q_scale, k_scale = self.weights.qk_norms(layer)
        sizes = self.ints("qk.sizes", [both * d.head_dim, d.kv_heads * d.head_dim])
        self.op("Split", [packed, sizes], [n, f"{n}.v"], axis=-1)
        self.op("Reshape", [n, self.ints("qk.heads", [0, 0, both, d.head_dim])], [f"{n}.heads"])
        self.norm("qk.unit", f"{n}.heads", None, np.ones(d.head_dim), f"{n}.unit", "")
        scales = self.const(
            f"{n}.scale", np.concatenate([np.tile(q_scale, (d.heads, 1)), np.tile(k_scale, (d.kv_heads, 1))])
        )
        self.op("Mul", [f"{n}.unit", scales], [f"{n}.scaled"])
        self.op("Reshape", [f"{n}.scaled", self.ints("qk.flat", [0, 0, both * d.head_dim])], [f"{n}.flat"])
        return self.op("Concat", [f"{n}.flat", f"{n}.v"], [f"{n}.packed"], axis=-1)

    def shared_expert(self, layer: int, x: str, residual: str, out: str) -> None:
        gate_up, down, gate = self.weights.shared(layer)
        n = f"L{layer}.shared"
        y = self.mlp(n, x, gate_up, down)
        self.add(linear(f"{n}.gate_logit", x, gate, f"{n}.gate_logit"), "")
        self.op("Sigmoid", [f"{n}.gate_logit"], [f"{n}.gate_open"])
        self.op("Mul", [y, f"{n}.gate_open"], [f"{n}.gated"])
        self.op("Add", [residual, f"{n}.gated"], [out])

    def head(self, x: str, precision: str) -> None:
        d = self.arch.dims
        if precision == "fp32":
            file = EMBEDDING if self.arch.tied else HEAD
            self.shared.append(_external("head.w", file, 0, (d.vocab, d.hidden)))
            self.op("FusedMatMul", [x, "head.w"], ["logits"], MICROSOFT, transB=1, alpha=1.0 / self.arch.logits_scaling)
            return
        weight = self.weights.head(slice(None)) / np.float32(self.arch.logits_scaling)
        self.add(linear("head", x, self.quantised(weight), "logits"), "")


def segment_model(weights: Weights, index: int, precision: str, external: str) -> tuple[bytes, bytes, tuple[str, ...]]:
    """Segment `index` of the trunk: (ONNX graph, bytes of its own file `external`, names of the shared files it needs)."""
    arch, d = weights.arch, weights.arch.dims
    span = spans(d.layers, arch.moe_layers)[index]
    bits = TRUNK_PRECISIONS[precision]
    g = _SegmentGraph(weights, (lambda w: w) if bits is None else (lambda w: round_to_nearest(w, *bits)))
    inputs, outputs = _interface(weights, index)
    if index == 0:
        g.shared.append(_external("embedding", EMBEDDING, 0, (d.vocab, d.hidden)))
        g.op("Gather", ["embedding", "input_ids"], ["embedded"], axis=0)
        x, delta = g.scaled("embedded", arch.embedding_multiplier, "x"), None
    else:
        x, delta = "residual", g.scaled("moe_out", arch.residual_multiplier, "moe_scaled")
    if span.attention_layers:
        half = (d.max_context, d.head_dim // 2)
        g.shared += [_external("cos", ROTARY, 0, half), _external("sin", ROTARY, 4 * half[0] * half[1], half)]
    for layer in span.attention_layers:
        n, ends = f"L{layer}", layer == span.moe_layer
        h, x = g.norm(f"{n}.norm1", x, delta, weights.input_norm(layer), f"{n}.h1", f"{n}.x1")
        delta = g.attention(layer, h)
        total = "residual_out" if ends and not arch.shared_intermediate else f"{n}.x2"
        h, x = g.norm(f"{n}.norm2", x, delta, weights.post_norm(layer), "hidden" if ends else f"{n}.h2", total)
        if not ends:
            delta = g.scaled(g.mlp(f"{n}.mlp", h, *weights.dense(layer)), arch.residual_multiplier, f"{n}.delta")
            continue
        g.add(linear("router", "hidden", weights.router(layer), "router_logits"), "")
        if arch.shared_intermediate:
            g.shared_expert(layer, "hidden", x, "residual_out")
    if span.moe_layer is None:
        h, _ = g.norm("norm", x, delta, weights.final_norm(), "normed", "x_last")
        g.head(h, precision)
    protos, blob = external_tensors(g.tensors, external)
    protos += g.shared + [onnx.numpy_helper.from_array(array, name) for name, array in g.inline.items()]
    graph = helper.make_graph(g.nodes, f"trunk{index}", inputs, outputs, protos)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, producer_name="spacemoe-kit", opset_imports=opsets, ir_version=IR_VERSION)
    needed = {entry.value for proto in g.shared for entry in proto.external_data if entry.key == "location"}
    return model.SerializeToString(), blob, tuple(sorted(needed))


def _interface(weights: Weights, index: int) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    arch, d = weights.arch, weights.arch.dims
    span = spans(d.layers, arch.moe_layers)[index]
    info, real = helper.make_tensor_value_info, TensorProto.FLOAT
    if index == 0:
        inputs = [info("input_ids", TensorProto.INT64, ["B", "S"])]
    else:
        inputs = [info(name, real, ["B", "S", d.hidden]) for name in ("residual", "moe_out")]
    if span.moe_layer is None:
        outputs = [info("logits", real, ["B", "S", d.vocab])]
    else:
        outputs = [info(name, real, ["B", "S", d.hidden]) for name in ("residual_out", "hidden")]
        outputs.append(info("router_logits", real, ["B", "S", d.experts]))
    if span.attention_layers:
        inputs += [info("seqlens_k", TensorProto.INT32, ["B"]), info("total_sequence_length", TensorProto.INT32, [1])]
    for layer in span.attention_layers:
        cache = ["B", d.kv_heads, "C", d.head_dim]
        inputs += [info(f"past_{kind}_{layer}", real, cache) for kind in ("key", "value")]
        outputs += [info(f"present_{kind}_{layer}", real, cache) for kind in ("key", "value")]
    return inputs, outputs


def _table_chunks(rows_of: Callable[[slice], np.ndarray], rows: int, width: int) -> Iterator[bytes]:
    step = max(1, STREAM_BYTES // (4 * width))
    for start in range(0, rows, step):
        yield np.ascontiguousarray(rows_of(slice(start, start + step)), "<f4").tobytes()


def _stream_file(root: Path, relative: str, chunks: Iterator[bytes]) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with atomic_file(root / relative) as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(relative, size, digest.hexdigest())


def write_shared_file(root: Path, weights: Weights, name: str) -> FileEntry:
    """Writes rotary.bin, embedding.bin or head.bin below root/trunk; tables are copied in pieces."""
    d, relative = weights.arch.dims, f"{FOLDER}/{name}"
    if name == ROTARY:
        return write_file(
            root, relative, rotary_table(weights.arch.rope_theta, d.head_dim, d.max_context).astype("<f4").tobytes()
        )
    rows_of = weights.embedding if name == EMBEDDING else weights.head
    return _stream_file(root, relative, _table_chunks(rows_of, d.vocab, d.hidden))


def write_segment(root: Path, weights: Weights, index: int, precision: str, shared: dict[str, FileEntry]) -> Segment:
    """Writes one segment below root/trunk and returns its entry. `shared` holds the shared files written so far, and grows."""
    stem = f"{FOLDER}/S{index:02d}"
    external = f"S{index:02d}.bin"
    graph, blob, needed = segment_model(weights, index, precision, external)
    for name in needed:
        if name not in shared:
            shared[name] = write_shared_file(root, weights, name)
    files = (write_file(root, f"{stem}.onnx", graph), write_file(root, f"{FOLDER}/{external}", blob))
    span = spans(weights.arch.dims.layers, weights.arch.moe_layers)[index]
    return Segment(files + tuple(shared[name] for name in needed), span.attention_layers, span.moe_layer)
