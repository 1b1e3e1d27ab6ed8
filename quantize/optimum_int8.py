"""An expert by Optimum's arm64 recipe: dynamic int8, weights per channel (precision 'int8dyn', optional).

Its activation scale spans a whole call, so a row's result depends on its batch: a node runs such a shard row by row.
Leaves out: static quantization, and everything where the optional packages (extra [reference]) are not needed.
"""

from __future__ import annotations

import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from quantize.expert_graph import expert_model, external_tensors

MIN_EXTERNAL_BYTES = 1024  # scales and zero points of one value stay in the graph


def available() -> bool:
    return find_spec("optimum") is not None and find_spec("transformers") is not None


@cache
def kernels_saturate() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 overflow 16 bits on this processor, as on x86-64 with AVX2 or AVX-512 but
    without VNNI (ONNX Runtime, "Quantize ONNX models", U8S8): what this recipe gives is then worse here than on an Arm board.
    """
    k = 64
    product = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, k])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [1, k])
    weights = onnx.numpy_helper.from_array(np.full((k, k), 127, np.int8), "w")
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(
        helper.make_graph([product], "probe", [x], [y], [weights]), opset_imports=[opset], ir_version=8
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool((session.run(["y"], {"x": np.full((1, k), 255, np.uint8)})[0] != 255 * 127 * k).any())


def expert_model_int8dyn(gate_up: np.ndarray, down: np.ndarray, external: str) -> tuple[bytes, bytes]:
    """gate_up float32 [2I, D], down [D, I] -> (ONNX graph, bytes of the file `external`), as expert_graph.expert_model."""
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
    from transformers import PretrainedConfig

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "expert.onnx"
        graph, blob = expert_model(gate_up, down, "expert.bin")
        source.write_bytes(graph)
        (source.parent / "expert.bin").write_bytes(blob)
        quantizer = ORTQuantizer(source, config=PretrainedConfig())
        recipe = AutoQuantizationConfig.arm64(is_static=False, per_channel=True)
        quantizer.quantize(recipe, save_dir=Path(folder) / "int8", file_suffix=None)
        model = onnx.load(Path(folder) / "int8" / "expert.onnx")
    large = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    large = {name: array for name, array in large.items() if array.nbytes >= MIN_EXTERNAL_BYTES}
    small = [item for item in model.graph.initializer if item.name not in large]
    protos, weights = external_tensors(large, external)
    del model.graph.initializer[:]
    model.graph.initializer.extend(small + protos)
    return model.SerializeToString(), weights
