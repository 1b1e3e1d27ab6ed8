"""An expert by Optimum's arm64 recipe: dynamic int8, weights per channel (precision 'int8dyn', optional).

Its activation scale spans a whole call, so a row's result depends on its batch: a node runs such a shard row by row.
Leaves out: static quantization, and everything where the optional packages (extra [reference]) are not needed.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx

from quantize.expert_graph import expert_model, external_tensors

MIN_EXTERNAL_BYTES = 1024  # scales and zero points of one value stay in the graph


def available() -> bool:
    return find_spec("optimum") is not None and find_spec("transformers") is not None


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
