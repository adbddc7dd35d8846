"""What the user passes as data, whatever its form, as a `Data` or `Loaders`."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from batchnorm._errors import DataError, InputError, message
from batchnorm.comparison.data import CLASSIFICATION, Data, Loaders
from batchnorm.comparison.datasets import DATASETS, load_data
from batchnorm.comparison.tasks import task_named

__all__ = ["resolve_data"]


def resolve_data(data: object, task: str | None = None) -> Data | Loaders:
    """A name, a `Data`, four tensors or two loaders as one of the two kinds that training knows.

    Args:
        data: what the user gave.
        task: the task asked for; None takes that of the named data or the `Data`, and else classification.

    Raises:
        DataError: something else, or arrays that cannot be trained on.
        InputError: an unknown task, or one that the data are not made for.
        InputTypeError: an array of something else than numbers.
    """
    if task is not None:
        task_named(task)
    known = load_data(data) if isinstance(data, str) else data
    if isinstance(known, Data | Loaders):
        if task not in (None, known.task):
            raise InputError(
                message(
                    "task",
                    got=repr(task),
                    expected=f"{known.task}, which the data {known.name} are for",
                    fix="Leave the task out, or "
                    + ("give your own arrays." if isinstance(data, str) else "make the data with this one."),
                )
            )
        return known
    return _given(data, task or CLASSIFICATION)


def _given(data: object, task: str) -> Data | Loaders:
    if isinstance(data, tuple | list):
        if len(data) == 4:
            _check_order(data)
            x_train, y_train, x_test, y_test = data
            return Data(x_train, y_train, x_test, y_test, task=task)
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
            return Loaders(data[0], data[1], task=task)
        if len(data) == 2:
            raise DataError(
                message(
                    "data",
                    got=f"a pair of {type(data[0]).__name__} and {type(data[1]).__name__}",
                    expected="(train_loader, test_loader)",
                    fix="Call them: give what they return."
                    if any(_is_function(part) for part in data)
                    else "Give tensors as four: (x_train, y_train, x_test, y_test).",
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
            expected=f"one of the names {', '.join(DATASETS)}, a folder with MNIST's files, a Data, four arrays "
            "(x_train, y_train, x_test, y_test) or two loaders (train_loader, test_loader)",
            fix=f"Call it: data={_called(data)}()." if _is_function(data) else "",
        )
    )


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


def _is_function(value: object) -> bool:
    """Whether it makes the data when called, as the command line's MODULE:FUNCTION does."""
    return callable(value) and not isinstance(value, nn.Module)


def _called(function: object) -> str:
    name = str(getattr(function, "__name__", ""))
    return name if name.isidentifier() else "function"


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
