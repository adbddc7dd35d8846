"""The user's arrays as tensors, checked: inputs, class numbers, and numbers to predict."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm._errors import DataError, InputTypeError, message

__all__ = ["as_inputs", "as_labels", "as_values", "check_classes", "check_varies"]

# Larger labels are numbers of something else; a network with an output for each would not fit the memory.
MAX_CLASSES = 1_000_000
RENUMBER = "Number the classes: numpy.unique(y, return_inverse=True)[1]."


def as_inputs(value: Any, name: str) -> Tensor:
    """`value` as a tensor of finite numbers; float64 and uint8 become float32, other dtypes stay."""
    x = _as_tensor(value, name)
    if x.layout is not torch.strided:
        raise InputTypeError(
            message(name, got=f"a sparse tensor ({x.layout})", expected="a dense one", fix="Use .to_dense().")
        )
    if x.dim() == 0:
        raise DataError(message(name, got="a single number", expected="samples along the first axis"))
    if x.dtype in (torch.float64, torch.uint8):
        x = x.float()
    if x.is_floating_point():
        _check_finite(x, name)
    return x


def as_labels(value: Any, name: str) -> Tensor:
    """`value` as an int64 tensor (N,) of class numbers from 0 on."""
    y = _as_tensor(value, name)
    if y.layout is not torch.strided:
        y = y.to_dense()
    if _one_hot(y):
        raise DataError(
            message(
                name,
                got=f"one-hot rows of shape {tuple(y.shape)}",
                expected="class numbers of shape (N,)",
                fix="Convert with .argmax(1).",
            )
        )
    if y.is_floating_point() or y.is_complex():
        raise _no_class_numbers(y, name)
    if y.dim() != 1:
        raise DataError(
            message(
                name,
                got=f"shape {tuple(y.shape)}",
                expected="shape (N,)",
                fix="Give one class number a sample.",
            )
        )
    y = y.long()
    if len(y) and int(y.min()) < 0:
        raise DataError(
            message(name, got=f"the label {int(y.min())}", expected="class numbers from 0 on", fix=RENUMBER)
        )
    if len(y) and int(y.max()) >= MAX_CLASSES:
        raise DataError(
            message(
                name,
                got=f"the label {int(y.max())}",
                expected=f"class numbers from 0 on, below {MAX_CLASSES}",
                fix=RENUMBER,
            )
        )
    return y


def _check_finite(values: Tensor, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise DataError(
            message(
                name,
                got=f"{bad} NaN or infinite value{'s' if bad > 1 else ''}",
                expected="finite numbers",
                fix="Remove or fill them first.",
            )
        )


def _one_hot(y: Tensor) -> bool:
    if y.dim() != 2 or y.shape[1] < 2 or y.is_complex() or not len(y):
        return False
    return bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all())


def _no_class_numbers(y: Tensor, name: str) -> DataError:
    broken = y[y != y.round()] if y.is_floating_point() else y
    if broken.numel():
        return DataError(
            message(
                name,
                got=f"numbers such as {broken.flatten()[0].item():.4g}",
                expected="integer class numbers",
                fix='Numbers to predict are learned with task="regression" (--task regression).',
            )
        )
    return DataError(
        message(
            name,
            got=f"dtype {_short(y.dtype)}",
            expected="integer class numbers",
            fix='Convert an array with .astype("int64"), a tensor with .long().',
        )
    )


def check_classes(y: Tensor, name: str) -> None:
    """Refuse labels that name one class only: there is nothing to learn."""
    if int(y.min()) == int(y.max()):
        raise DataError(message(name, got=f"only the class {int(y[0])}", expected="at least two classes"))


def as_values(value: Any, name: str) -> Tensor:
    """`value` as a float64 tensor (N, outputs) of finite numbers to predict; (N,) becomes (N, 1)."""
    y = _as_tensor(value, name)
    y = y.to_dense() if y.layout is not torch.strided else y
    if y.is_complex() or y.dim() not in (1, 2) or (y.dim() == 2 and y.shape[1] == 0):
        got = "complex numbers" if y.is_complex() else f"shape {tuple(y.shape)}"
        raise DataError(
            message(
                name,
                got=got,
                expected="real numbers of shape (N,) or (N, outputs)",
                fix="Give one number a sample, or one row of numbers.",
            )
        )
    y = y.double()
    _check_finite(y, name)
    return y if y.dim() == 2 else y.unsqueeze(1)


def check_varies(y: Tensor, name: str) -> None:
    """Refuse numbers of which an output has the same everywhere: there is nothing to learn."""
    same = (y == y[:1]).all(0)
    if bool(same.any()):
        at = int(same.nonzero()[0])
        got = f"the same number {y[0, at].item():.4g} for every sample"
        raise DataError(message(name, got=got, expected="numbers that differ"))


def _as_tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        return torch.as_tensor(_without_strides(value))
    except (TypeError, ValueError, RuntimeError) as error:
        fix = ""
        if hasattr(value, "toarray"):
            fix = "Use .toarray()."
        elif getattr(getattr(value, "dtype", None), "kind", "") in ("U", "S", "O"):
            fix = (
                RENUMBER
                if name.startswith(("y_", "labels"))
                else "Turn text and categories into numbers first."
            )
        raise InputTypeError(
            message(name, got=_kind(value), expected="a tensor or an array of numbers", fix=fix)
        ) from error


def _without_strides(value: Any) -> Any:
    # torch takes no array that is flipped, and warns of one that is read-only; both are common.
    if isinstance(value, np.ndarray) and (not value.flags.writeable or min((*value.strides, 0)) < 0):
        return value.copy()
    return value


def _kind(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ + (f" of {dtype}" if dtype is not None else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
