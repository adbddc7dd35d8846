"""MODULE:FACTORY on the command line: the user's function that makes a model or a data set."""

import importlib
import inspect
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm._errors import BatchNormError, DataError, InputError, ModelError, message

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["is_spec", "load_data", "load_model", "load_optimizer"]


def is_spec(text: str) -> bool:
    """Return whether `text` names a factory rather than something built in."""
    return ":" in text


def load_model(spec: str, option: str) -> "Callable[[], nn.Module]":
    """Return a function that makes a fresh model each time, checked to be one.

    Raises:
        InputError: `spec` does not lead to something that can be called.
        ModelError: from the returned function, when the factory fails or returns something else.
    """
    from torch import nn

    factory = _load(spec, option)
    if isinstance(factory, nn.Module):
        raise ModelError(
            message(
                f"{option} {spec}",
                got="a model",
                expected="a function without arguments that makes a new one each time",
                fix="Give the class, or a function that returns the model.",
            )
        )

    def make_model() -> nn.Module:
        model = _call(factory, spec, option, ModelError)
        if not isinstance(model, nn.Module):
            raise ModelError(
                message(
                    f"{option} {spec}", got=_kind(model), expected="a function that returns a torch.nn.Module"
                )
            )
        return model

    # Reports call a network by its factory's name.
    make_model.__name__ = make_model.__qualname__ = spec.partition(":")[2]
    return make_model


def load_data(spec: str, option: str) -> Any:
    """Return what the data factory gives; `batchnorm.compare` checks it.

    Raises:
        InputError: `spec` does not lead to something that can be called.
        DataError: the factory fails.
    """
    return _call(_load(spec, option), spec, option, DataError)


def load_optimizer(spec: str, option: str) -> "Callable[[nn.Module], Optimizer]":
    """Return a function that makes the optimizer of a model, checked to be one.

    Raises:
        InputError: `spec` does not lead to something that can be called.
        ModelError: from the returned function, when the user's fails or returns something else.
    """
    from torch.optim import Optimizer

    factory = _load(spec, option)

    def make_optimizer(model: "nn.Module") -> Optimizer:
        optimizer = _call(factory, spec, option, ModelError, model)
        if not isinstance(optimizer, Optimizer):
            raise ModelError(
                message(
                    f"{option} {spec}",
                    got=_kind(optimizer),
                    expected="a function of the model that returns a torch.optim.Optimizer",
                )
            )
        return optimizer

    return make_optimizer


def _load(spec: str, option: str) -> Callable[..., Any]:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise InputError(
            message(option, got=repr(spec), expected="MODULE:FACTORY", fix="For example my_nets:make_net.")
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script may end itself
        raise InputError(
            message(
                f"{option} {spec}",
                got=f"{type(error).__name__} on importing {module_name} ({_line(error)})",
                expected="a module that imports",
                fix=_where(error, module_name, attribute, here),
            )
        ) from error
    try:
        factory = attrgetter(attribute)(module)
    except AttributeError as error:
        raise InputError(
            message(
                f"{option} {spec}",
                got=f"no {attribute!r} in {module_name}",
                expected="a function or a class",
                fix=_suggest(module),
            )
        ) from error
    if not callable(factory):
        raise InputError(message(f"{option} {spec}", got=_kind(factory), expected="a function or a class"))
    return factory  # type: ignore[no-any-return]


def _call(
    factory: Callable[..., Any],
    spec: str,
    option: str,
    error_type: type[ModelError] | type[DataError],
    *arguments: Any,
) -> Any:
    try:
        return factory(*arguments)
    except BatchNormError:
        raise
    except (Exception, SystemExit) as error:  # a script may end itself
        wrong = _unfit(factory, len(arguments)) if isinstance(error, TypeError) else ""
        if wrong:
            raise error_type(
                message(
                    f"{option} {spec}",
                    got=f"a function that {wrong}",
                    expected="a function of the model" if arguments else "a function without arguments",
                    fix="Write one that calls it.",
                )
            ) from error
        raise error_type(
            f"{option} {spec} raised {type(error).__name__}: {_line(error)}; batchnorm --debug ... shows where"
        ) from error


def _unfit(factory: Callable[..., Any], given: int) -> str:
    """Why a function cannot be called with so many arguments, "" if it can be."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*[None] * given)
    except TypeError:
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [
            each.name
            for each in signature.parameters.values()
            if each.default is each.empty and each.kind not in variable
        ]
        return f"needs {', '.join(needed)}" if len(needed) > given else "takes no arguments"
    return ""


def _where(error: BaseException, module_name: str, attribute: str, folder: str) -> str:
    plain = module_name.removesuffix(".py").replace("/", ".").strip(".")
    if plain != module_name:
        return f"Give the module, not the file: {plain}:{attribute}."
    missing = isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]
    if missing:
        return f"The folder {folder} and the installed packages were searched."
    return "batchnorm --debug ... shows where."


def _suggest(module: object) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__  # type: ignore[attr-defined]
    ]
    more = f" and {len(own) - 8} more" if len(own) > 8 else ""
    return f"It has: {', '.join(sorted(own)[:8])}{more}." if own else ""


def _kind(value: object) -> str:
    return f"an object of type {type(value).__name__}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"
