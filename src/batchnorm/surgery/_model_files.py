"""Files that hold a model: ONNX and `torch.export`. (Weights alone are the command line's: cli/_weights.py.)"""

import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm._errors import InputError, ModelError, message
from batchnorm._files import check_writable, require, write_whole

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "external_files",
    "load_model",
    "random_inputs",
    "run_onnx",
    "save",
    "without_warnings",
]

# What a protobuf message holds at most; beyond that the weights go into a file of their own.
_ONE_FILE = 2**31 - 2**20


@contextmanager
def without_warnings() -> Iterator[None]:
    """What torch.export warns of about its own code is nobody's here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_model(path: str | os.PathLike[str]) -> Any:
    """The model in an `.onnx` or a `.pt2` file.

    Raises:
        InputError: another kind of file, or none.
        ModelError: it does not hold what its name says.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in (".onnx", ".pt2"):
        expected = ".onnx or .pt2 (what torch.export.save writes)"
        raise InputError(message("model file", got=file.name or str(path), expected=expected))
    if not file.is_file():
        got = f"the folder {file}" if file.is_dir() else f"{file}, which is not there"
        raise InputError(message("model file", got=got, expected="a file"))
    try:
        if suffix == ".onnx":
            onnx = require("onnx", package="onnx", purpose="Reading an ONNX file")
            model = onnx.load(file)
            if not model.ir_version or not model.graph.output:
                raise ValueError("it has no graph")
            return model
        return _load_program(file)
    except ImportError:
        raise
    except Exception as error:  # broken files fail in any way
        raise ModelError(
            message(f"model file {file}", got=_told(error), expected=f"a file that holds a {suffix} model")
        ) from error


def _load_program(file: Path) -> Any:
    """The exported program. Why it cannot be read, PyTorch logs with a traceback and does not raise."""
    logger, reasons = logging.getLogger("torch.export"), _Reasons()
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [reasons], False
    try:
        with without_warnings():
            return torch.export.load(file)
    except Exception as error:
        raise (reasons.first or error) from error
    finally:
        logger.handlers, logger.propagate = before


class _Reasons(logging.Handler):
    """Keeps the first exception that is logged."""

    first: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.first is None and record.exc_info:
            self.first = record.exc_info[1]


def external_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files in which an ONNX file keeps its weights.

    Raises:
        ModelError: it is no ONNX file.
    """
    onnx = require("onnx", package="onnx", purpose="Reading an ONNX file")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # broken files fail in any way
        raise ModelError(
            message(f"model file {path}", got=_told(error), expected="a file that holds a .onnx model")
        ) from error
    names = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [Path(path).parent / name for name in sorted(names)]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:500]


def save(model: Any, path: str | os.PathLike[str]) -> list[Path]:
    """Write an ONNX model or an exported program, by what `model` is; the files written.

    Raises:
        OutputError: it cannot be written; nothing is left half-written.
    """
    file = check_writable(path)
    if type(model).__name__ == "ModelProto":
        return _save_onnx(model, file)
    buffer = io.BytesIO()
    with without_warnings():
        torch.export.save(model, buffer)
    return [write_whole(file, buffer.getvalue())]


def _save_onnx(model: "ModelProto", file: Path) -> list[Path]:
    if model.ByteSize() <= _ONE_FILE:
        return [write_whole(file, model.SerializeToString())]
    onnx = require("onnx", package="onnx", purpose="Writing an ONNX file")
    data = check_writable(file.with_name(f"{file.name}.data"))
    with tempfile.TemporaryDirectory(prefix=".batchnorm-", dir=file.parent) as folder:
        # onnx.save takes the weights out of the model that it is given.
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        inside = Path(folder) / file.name
        onnx.save(copy, inside, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
        # The weights first: until the model is there, too, nothing refers to them.
        os.replace(inside.with_name(data.name), data)
        return [write_whole(file, inside.read_bytes()), data]


def random_inputs(model: Any, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Normal random numbers of these shapes in the dtypes that a model takes; zeros where those are no numbers.

    Raises:
        ModelError: the model takes another number of tensors.
    """
    if isinstance(model, nn.Module):
        first = next((each for each in model.parameters() if each.is_floating_point()), None)
        kinds = [torch.get_default_dtype() if first is None else first.dtype] * len(shapes)
    elif type(model).__name__ == "ModelProto":
        onnx = require("onnx", package="onnx", purpose="Reading an ONNX file")
        constants = {each.name for each in model.graph.initializer}
        given = [each.type.tensor_type for each in model.graph.input if each.name not in constants]
        names = [onnx.helper.tensor_dtype_to_np_dtype(each.elem_type).name for each in given]
        kinds = [getattr(torch, name) for name in names]
    else:
        read = set(model.graph_signature.user_inputs)
        values = (node.meta.get("val") for node in model.graph.nodes if node.name in read)
        kinds = [each.dtype for each in values if isinstance(each, Tensor)]
    if len(kinds) != len(shapes):
        raise ModelError(
            message(
                "fold: the example", got=f"{len(shapes)} shapes", expected=f"{len(kinds)}, one for each input"
            )
        )
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(*shape, generator=generator).to(kind)
        if kind.is_floating_point
        else torch.zeros(*shape, dtype=kind)
        for shape, kind in zip(shapes, kinds, strict=True)
    )


def run_onnx(model: "ModelProto", example: object) -> list[tuple[str, Tensor]]:
    """The outputs of an ONNX model: by onnxruntime where that is installed and runs it, else by onnx's reference.

    Raises:
        ModelError: it does not run on these inputs.
    """
    onnx = require("onnx", package="onnx", purpose="Running an ONNX file")
    constants = {each.name for each in model.graph.initializer}
    names = [each.name for each in model.graph.input if each.name not in constants]
    if isinstance(example, Mapping):
        feeds = {str(name): np.asarray(value) for name, value in example.items()}
    else:
        given = example if isinstance(example, tuple) else (example,)
        if len(given) != len(names):
            raise ModelError(
                message(
                    "fold: the example",
                    got=f"{len(given)} inputs",
                    expected=f"{len(names)} ({', '.join(names)})",
                )
            )
        feeds = dict(zip(names, (np.asarray(each) for each in given), strict=True))
    outputs = [each.name for each in model.graph.output]
    try:
        found = _run_fast(model, outputs, feeds)
        if found is None:
            found = _reference(onnx, model).run(outputs, feeds)
    except Exception as error:  # an evaluator may fail in any way
        raise ModelError(
            message("fold: model on the example", got=_told(error), expected="a call that runs")
        ) from error
    return [(name, torch.from_numpy(np.array(value))) for name, value in zip(outputs, found, strict=True)]


def _reference(onnx: Any, model: "ModelProto") -> Any:
    """The reference of the package onnx, whose batch norms before operator set 14 take the batch's statistics."""
    from onnx.reference.op_run import OpRun

    class BatchNormalization(OpRun):
        op_domain = ""

        def _run(self, x: Any, *given: Any, epsilon: float = 1e-5, **rest: Any) -> tuple[Any]:
            shape = (1, -1, *[1] * (x.ndim - 2))
            scale, bias, mean, var = (each.reshape(shape) for each in given)
            y = scale * (x - mean) / np.sqrt(var + epsilon) + bias
            return (y.astype(x.dtype),)

    old = any(each.domain in ("", "ai.onnx") and each.version < 14 for each in model.opset_import)
    return onnx.reference.ReferenceEvaluator(model, new_ops=[BatchNormalization] if old else None)


def _run_fast(model: "ModelProto", outputs: list[str], feeds: dict[str, Any]) -> list[Any] | None:
    """By onnxruntime, without its own folding; None where it is not there or cannot run this model."""
    try:
        runtime = require("onnxruntime", package="onnxruntime", purpose="Running an ONNX file")
    except ImportError:
        return None
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        source: Any = Path(folder) / "model.onnx"
        _save_onnx(model, source)
        try:
            session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception:  # it knows fewer operators and dtypes than the format has
            return None
        found: list[Any] = session.run(outputs, feeds)
        return found
