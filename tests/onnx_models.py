"""ONNX models made by hand, for the tests of what reads and writes them."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

RANDOM = np.random.default_rng(0)
KINDS = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}


def norm(source: str, result: str, name: str = "bn", more: tuple[str, ...] = (), **attributes: Any) -> Any:
    names = [f"{name}_{part}" for part in ("scale", "B", "mean", "var")]
    return helper.make_node("BatchNormalization", [source, *names], [result, *more], name=name, **attributes)


def statistics(channels: int, name: str = "bn") -> dict[str, np.ndarray]:
    return {
        f"{name}_scale": RANDOM.normal(size=channels),
        f"{name}_B": RANDOM.normal(size=channels),
        f"{name}_mean": RANDOM.normal(size=channels),
        f"{name}_var": RANDOM.uniform(0.3, 3, size=channels),
    }


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """A node named after its first output; names with blanks between them."""
    name = attributes.pop("name", outputs.split()[0])
    return helper.make_node(kind, inputs.split(" "), outputs.split(), name=name, **attributes)


def model(
    nodes: list[Any],
    constants: dict[str, np.ndarray],
    shape: tuple[Any, ...],
    *,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    ir: int = 8,
    dtype: str = "float64",
    check: bool = True,
) -> Any:
    kind = KINDS[dtype]
    held = [
        numpy_helper.from_array(value.astype(dtype) if value.dtype == np.float64 else value, name)
        for name, value in constants.items()
    ]
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    if ir < 4:
        inputs += [helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in held]
    results = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    graph = helper.make_graph(nodes, "made", inputs, results, initializer=held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    # The checker wants to know the shapes of outputs.
    if check:
        made = onnx.shape_inference.infer_shapes(made)
        onnx.checker.check_model(made)
    return made


def run(made: Any, x: np.ndarray) -> list[np.ndarray]:
    """The outputs: by onnx's reference, which knows float64, or in float32 by onnxruntime as it is used."""
    if x.dtype == np.float32:
        runtime = pytest.importorskip("onnxruntime")
        return runtime.InferenceSession(made.SerializeToString()).run(None, {"x": x})
    return ReferenceEvaluator(made).run(None, {"x": x})


def count(made: Any, kind: str = "BatchNormalization") -> int:
    return sum(each.op_type == kind for each in made.graph.node)


def constants_of(made: Any) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in made.graph.initializer}


def export(net: torch.nn.Module, x: torch.Tensor, path: Path) -> Path:
    """A file in which the batch norms are still there: the exporter's own optimizer folds those behind convolutions."""
    optimizer = pytest.importorskip("onnxscript.optimizer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(net, (x,), dynamo=True, verbose=False, optimize=False)
    assert exported is not None
    optimizer.fold_constants(exported.model, onnx_shape_inference=True)
    optimizer.remove_unused_nodes(exported.model)
    exported.save(path)
    return path
