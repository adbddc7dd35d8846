"""The exceptions of the package.

    BatchNormError
    ├── InputError              (ValueError, RuntimeError)   a tensor or an option that does not fit
    ├── InputTypeError          (TypeError, NotImplementedError)  a dtype or a type that does not fit
    ├── BackendError            (RuntimeError)               an explicit backend that cannot run the call
    ├── ModelError              (ValueError)                 a model that an operation cannot work on
    ├── DataError               (ValueError)                 data that cannot be used
    ├── OutputError             (OSError)                    a file that cannot be written
    └── MissingDependencyError  (ImportError)                an optional package that is not installed

PyTorch raises ValueError for some wrong shapes, RuntimeError for others and NotImplementedError (a
RuntimeError) for dtypes; `InputError` and `InputTypeError` are both kinds, so code that catches
PyTorch's exception catches ours.
"""

__all__ = [
    "BackendError",
    "BatchNormError",
    "DataError",
    "InputError",
    "InputTypeError",
    "MissingDependencyError",
    "ModelError",
    "OutputError",
    "message",
]


class BatchNormError(Exception):
    """Root of every exception that this package raises on purpose."""


class InputError(BatchNormError, ValueError, RuntimeError):
    """A tensor's shape, device or value, or an option, does not fit the call."""


class InputTypeError(BatchNormError, TypeError, NotImplementedError):
    """A tensor's dtype, or an argument's type, does not fit the call."""


class BackendError(BatchNormError, RuntimeError):
    """A backend asked for by name cannot run the call."""


class ModelError(BatchNormError, ValueError):
    """A model is not what the operation needs."""


class DataError(BatchNormError, ValueError):
    """A data set is empty, malformed or unknown."""


class OutputError(BatchNormError, OSError):
    """A result could not be written; nothing was left half-written."""


class MissingDependencyError(BatchNormError, ImportError):
    """An optional package is needed and not installed."""


def message(what: str, *, got: object, expected: object, fix: str = "") -> str:
    """One line that says what is wrong, what came, what was expected and how to mend it."""
    text = f"{what}: got {got}, expected {expected}"
    return f"{text}. {fix}" if fix else text
