"""Expert graphs: the SwiGLU expert as a small ONNX model whose weights lie in a file beside it (external data).

Built with onnx.helper (no tracing). `linear` makes one matrix multiplication in fp32 or in n bits and serves the trunk too.
MatMulNBits runs with accuracy_level 4: it rounds each row of x to 8 bits per block, so a row never sees its neighbours. To the
last bit that holds for blocks of 32 (EXACT_BLOCK): with larger ones AVX-512 VNNI has kernels of their own for one row and for
many, which add up in another order (differences of 1e-7 to 4e-5).
Leaves out: quantization itself (nbits) and writing files (node_agent.shard).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from quantize.nbits import NBits

OPSET = 21  # read by onnxruntime 1.23.2 too, the last one for Python 3.10
IR_VERSION = 10
EXACT_BLOCK = 32  # the block to quantize in, at 8, 4 and 2 bit
ALIGNMENT = 64  # of tensors in the external file: a cache line
ACCURACY_LEVEL = 4  # int8 arithmetic; the default is several times slower (MODELS.md)

Matrix = np.ndarray | NBits


@dataclass(frozen=True)
class Piece:
    """Nodes of a graph and the tensors they need, by name."""

    nodes: tuple[onnx.NodeProto, ...]
    tensors: dict[str, np.ndarray]


def linear(name: str, x: str, weight: Matrix, out: str, bias: np.ndarray | None = None) -> Piece:
    """out [..., N] = x [..., K] @ weight.T (+ bias [N]); weight is float32 [N, K] or NBits."""
    tensors = {} if bias is None else {f"{name}.bias": np.ascontiguousarray(bias, np.float32)}
    if isinstance(weight, NBits):
        zero = "" if weight.zero_points is None else f"{name}.zero"
        inputs = [x, f"{name}.q", f"{name}.scale", zero, "", f"{name}.bias" if tensors else ""]
        tensors |= {f"{name}.q": weight.packed, f"{name}.scale": weight.scales}
        if zero:
            tensors[zero] = weight.zero_points
        node = helper.make_node(
            "MatMulNBits",
            inputs[: max(i for i, given in enumerate(inputs) if given) + 1],
            [out],
            name,
            domain="com.microsoft",
            K=weight.k,
            N=weight.n,
            bits=weight.bits,
            block_size=weight.block,
            accuracy_level=ACCURACY_LEVEL,
        )
        return Piece((node,), tensors)
    product = f"{name}.product" if tensors else out
    nodes = [helper.make_node("MatMul", [x, f"{name}.w"], [product], name)]
    if tensors:
        nodes.append(helper.make_node("Add", [product, f"{name}.bias"], [out], f"{name}.add"))
    tensors[f"{name}.w"] = np.ascontiguousarray(weight.T, np.float32)
    return Piece(tuple(nodes), tensors)


def swiglu(name: str, gate_up: str, out: str) -> Piece:
    """out [..., I] = silu(gate) * up, of gate_up [..., 2I] whose first half is the gate."""
    gate, up, silu = f"{name}.gate", f"{name}.up", f"{name}.silu"
    nodes = (
        helper.make_node("Split", [gate_up], [gate, up], f"{name}.split", axis=-1, num_outputs=2),
        helper.make_node("QuickGelu", [gate], [silu], f"{name}.act", domain="com.microsoft", alpha=1.0),
        helper.make_node("Mul", [silu, up], [out], f"{name}.mul"),
    )
    return Piece(nodes, {})


def external_tensors(tensors: dict[str, np.ndarray], external: str) -> tuple[list[TensorProto], bytes]:
    """Initialisers that point into the sibling file `external`, and that file's bytes (little-endian, aligned)."""
    protos, parts, offset = [], [], 0
    for name, array in tensors.items():
        array = np.ascontiguousarray(array)
        padding = -offset % ALIGNMENT
        parts += [bytes(padding), array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()]
        offset += padding
        proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("offset", offset), ("length", array.nbytes)):
            entry = proto.external_data.add()
            entry.key, entry.value = key, str(value)
        protos.append(proto)
        offset += array.nbytes
    return protos, b"".join(parts)


def model_of(
    name: str,
    pieces: list[Piece],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    external: str,
) -> tuple[bytes, bytes]:
    """(ONNX graph, bytes of the file `external`) of pieces in order."""
    tensors: dict[str, np.ndarray] = {}
    for piece in pieces:
        tensors.update(piece.tensors)
    protos, weights = external_tensors(tensors, external)
    nodes = [node for piece in pieces for node in piece.nodes]
    graph = helper.make_graph(nodes, name, inputs, outputs, protos)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, producer_name="spacemoe-kit", opset_imports=opsets, ir_version=IR_VERSION)
    return model.SerializeToString(), weights


def _shape(matrix: Matrix) -> tuple[int, int]:
    return (matrix.n, matrix.k) if isinstance(matrix, NBits) else matrix.shape


def expert_model(gate_up: Matrix, down: Matrix, external: str) -> tuple[bytes, bytes]:
    """The expert x float32 [T, D] -> y float32 [T, D]: y = (silu(x gate.T) * (x up.T)) down.T.

    gate_up [2I, D] holds the gate's rows first, down is [D, I]; each is float32 or NBits.
    Returns the graph and the bytes of the file `external`, which must lie beside it.  Raises: ValueError for other shapes or names.
    """
    if "/" in external or not external:
        raise ValueError(f"external file {external!r}: give the bare name of a file beside the graph")
    (twice, d), (rows, i) = _shape(gate_up), _shape(down)
    if twice != 2 * i or rows != d:
        raise ValueError(f"gate_up [{twice}, {d}] and down [{rows}, {i}] are no expert: need [2I, D] and [D, I]")
    pieces = [
        linear("gate_up", "x", gate_up, "h"),
        swiglu("swiglu", "h", "a"),
        linear("down", "a", down, "y"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", d])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", d])
    return model_of("expert", pieces, [x], [y], external)
