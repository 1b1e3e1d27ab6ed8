"""The walk before onnxruntime: every shard that the kit writes passes; graphs that never end or fill the memory are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from node_rig import make_bundle
from onnx import TensorProto, helper, numpy_helper

import quantize.reference
from node_agent import experts, graph_ops, selftest_graph, shard
from node_agent.errors import ExpertError

REFERENCE = Path(quantize.reference.__file__).parent / "bundle"
D = 8


def model(nodes, weights=(), functions=(), rank=2) -> onnx.ModelProto:
    shape = ["T", D][:rank]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [x], [y], list(weights))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def loop() -> onnx.ModelProto:
    """2^62 trips around y = x."""
    ints = [helper.make_tensor_value_info(n, t, []) for n, t in (("i", TensorProto.INT64), ("c", TensorProto.BOOL))]
    v = helper.make_tensor_value_info("v", TensorProto.FLOAT, ["T", D])
    w = helper.make_tensor_value_info("w", TensorProto.FLOAT, ["T", D])
    c2 = helper.make_tensor_value_info("c2", TensorProto.BOOL, [])
    body = [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["v", "v"], ["w"])]
    body = helper.make_graph(body, "b", [*ints, v], [c2, w])
    trips = numpy_helper.from_array(np.array(2**62, np.int64), "trips")
    return model([helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body)], [trips])


def large() -> onnx.ModelProto:
    """2 GB of constants, folded while the session is made."""
    one = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["c"], value=one),
        helper.make_node("ReduceSum", ["c"], ["r"], keepdims=0),
        helper.make_node("Mul", ["x", "r"], ["y"]),
    ]
    return model(nodes, [numpy_helper.from_array(np.array([500_000_000], np.int64), "s")])


def nested_in_a_known_operator() -> onnx.ModelProto:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [])
    return model([helper.make_node("Mul", ["x", "x"], ["y"], body=inner)])


def own_function() -> onnx.ModelProto:
    body = [helper.make_node("Identity", ["a"], ["b"])]
    function = helper.make_function("own", "Mul", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    return model([helper.make_node("Mul", ["x"], ["y"], domain="own")], functions=[function])


def outside() -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[D, D], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor])


def sparse() -> onnx.ModelProto:
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight("w", D, D)])
    indices = numpy_helper.from_array(np.array([0], np.int64), "i")
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(weight("v", 1), indices, [50_000, 50_000]))
    return made


def outer_product() -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("MatMul", ["x", "c"], ["y"])]
    return model(nodes, [weight("a", 1000, 1), weight("b", 1, 1000)])


ATTACKS = [
    (loop(), "operator Loop is none of an expert's"),
    (large(), "operator ConstantOfShape is none"),
    (nested_in_a_known_operator(), "operator Mul has a graph inside it"),
    (own_function(), "functions of its own"),
    (outside(), r"weights in '../../secret', which is not beside it"),
    (sparse(), "sparse tensor"),
    (outer_product(), "operator MatMul works on something else than x"),
    (model([helper.make_node("Mul", ["x", "w"], ["y"])], [weight("w", 99, 1)]), "Mul has a weight of 2 dimensions"),
    (model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight("w", 9, D, 1)]), "MatMul has a weight of 3"),
    (model([helper.make_node("Mul", ["x", "x"], ["y"], domain="own")]), "operator own.Mul is none"),
]


@pytest.mark.parametrize(("attack", "why"), ATTACKS)
def test_what_no_expert_needs_is_refused_before_a_session_is_made(attack, why, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(experts.onnxruntime, "InferenceSession", lambda *a, **k: opened.append(a))
    path = tmp_path / "L00E000.fp32.onnx"
    path.write_bytes(attack.SerializeToString())
    entry = shard.ShardEntry(0, 0, "fp32", (shard.FileEntry("experts/L00E000.fp32.onnx", 1, "ab" * 32),))
    with pytest.raises(ExpertError, match=f"cannot load .*L00E000.fp32.onnx .*{why}"):
        experts.Experts(D).add(entry, path)
    assert not opened


def test_the_graphs_that_the_kit_writes_pass(tmp_path):
    reference = sorted((REFERENCE / "experts").glob("*.onnx"))
    rig = sorted((make_bundle(tmp_path).root / "experts").glob("*.onnx"))
    assert len(reference) >= 100 and {path.stem.rpartition(".")[2] for path in rig} == {"fp32", "int8", "int4"}
    for path in (*reference, *rig):
        graph_ops.check(path.read_bytes())
    graph_ops.check(selftest_graph.onnx_bytes())
    manifest = shard.read_manifest(REFERENCE)
    for precision in manifest.precisions:
        entry = manifest.shard(0, 0, precision)
        loaded = experts.Experts(manifest.dims.hidden)
        loaded.add(entry, REFERENCE / entry.files[0].path)
        assert loaded.hosted


def test_dynamic_int8_passes(tmp_path):
    """onnxruntime's quantize_dynamic is what Optimum's arm64 recipe calls (int8 weights per channel)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from quantize.expert_graph import expert_model

    rng = np.random.default_rng(0)
    gate_up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((96, 64), (64, 48)))
    graph, blob = expert_model(gate_up, down, "e.bin")
    (tmp_path / "e.onnx").write_bytes(graph)
    (tmp_path / "e.bin").write_bytes(blob)
    quantize_dynamic(tmp_path / "e.onnx", tmp_path / "q.onnx", per_channel=True, weight_type=QuantType.QInt8)
    kinds = {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= kinds
    graph_ops.check((tmp_path / "q.onnx").read_bytes())


def test_bytes_that_two_readers_could_take_for_different_things_are_refused():
    good = model([helper.make_node("Mul", ["x", "x"], ["y"])]).SerializeToString()
    graph_ops.check(good)
    hidden = loop().graph.SerializeToString()
    size = bytes([len(hidden) & 0x7F | 0x80, len(hidden) >> 7])
    cut_key = bytes([7 << 3 | 2 | 0x80, 0x80, 0x80, 0x80, 0x10])  # 2^32 + the key of `graph`: its key after 32 bits
    for bad in (good + cut_key + size + hidden, good[:-1], b"", b"ORTM1234", good + b"\x3b", good + b"\xff" * 11):
        with pytest.raises(graph_ops.GraphError):
            graph_ops.check(bad)
    with pytest.raises(graph_ops.GraphError, match="operator Loop"):  # merged with the first one by every reader
        graph_ops.check(good + bytes([7 << 3 | 2]) + size + hidden)
    with pytest.raises(graph_ops.GraphError, match="more than 100000 fields"):
        graph_ops.check(good + b"\x08\x0a" * 100_000)
    with pytest.raises(graph_ops.GraphError, match="at most"):
        graph_ops.check(bytes(graph_ops.MAX_GRAPH_BYTES + 1))
