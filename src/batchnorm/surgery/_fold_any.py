"""`fold` on what is no module: an exported program, an ONNX model, a file that holds one."""

import os
from typing import Any

from torch.export import ExportedProgram

from batchnorm._errors import InputError, message
from batchnorm._walk import Changes, prepared
from batchnorm.surgery._fold_onnx import fold_onnx
from batchnorm.surgery._fold_program import fold_program
from batchnorm.surgery._model_files import load_model, run_onnx, without_warnings
from batchnorm.surgery._verify import Example, differences

__all__ = ["fold_graph"]


def fold_graph(model: Any, example: object, *, inplace: bool) -> Changes:
    """Fold it, and compare on the example."""
    if isinstance(model, str | os.PathLike):
        model = load_model(model)
    is_onnx = type(model).__name__ == "ModelProto"
    if not is_onnx and not isinstance(model, ExportedProgram):
        prepared(model, operation="fold", inplace=inplace)
    if inplace:
        raise InputError(
            message(
                "fold: inplace",
                got=f"True with {type(model).__name__}",
                expected="a module",
                fix="Leave it out: the folded model is a new one.",
            )
        )
    if is_onnx:
        changes = fold_onnx(model)
        found = [] if example is None else _compared(model, changes.model, example)
    else:
        with without_warnings():
            changes = fold_program(model)
            found = [] if example is None else _compared_programs(model, changes.model, example)
    changes.notes += tuple(f"on the example, {line}" for line in found)
    if not (changes.changed or changes.skipped):
        found_none = ["the model has no batch norm"]
        if is_onnx:
            found_none.append("exporters such as torch.onnx.export fold it themselves unless told not to")
        changes.notes = (*found_none, *changes.notes)
    return changes


def _compared(before: Any, after: Any, example: object) -> list[str]:
    return differences(run_onnx(before, example), run_onnx(after, example), "fold")


def _compared_programs(before: ExportedProgram, after: ExportedProgram, example: object) -> list[str]:
    return Example(example, "fold", before.module()).compare(after.module())
