"""A model's tree of modules: every module once, with all its names, and the copy that an operation works on.

The contract of every operation that is built on this module:

- Every module of the tree is seen once, with all the names it is reachable under. A module that is used
  in several places is replaced in all of them by one and the same replacement, so sharing survives.
- The plan is made first and carried out then. If anything fails, in planning or in carrying out, the
  model is as it was.
- With `inplace=False` the work is done on a deep copy and the model that was given is not touched.
  With `inplace=True` every parameter and buffer that stays keeps its identity: an optimizer that holds it
  goes on holding it. (It does not know the new ones: make the optimizer after the operation.)
- Modules that are not replaced are not touched: training flags, dtypes, devices and hooks stay.
- A module whose hooks a replacement would lose is not replaced; it is reported in `skipped`.
- Only `torch.nn.Module` attributes are followed, as in `model.named_modules()`: a module that is kept in
  a plain list or dictionary is not part of the tree.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer

from batchnorm._errors import InputTypeError, ModelError, message
from batchnorm.ops import look_behind_output

__all__ = ["Spot", "copied", "hooks_of", "prepared", "walk"]

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
    "_state_dict_hooks": "state_dict hook",
    "_state_dict_pre_hooks": "state_dict pre-hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict post-hook",
}


@dataclass(frozen=True, eq=False)
class Spot:
    """One module of a tree: all its names, and the (parent, key) pairs that hold it. The root has no place."""

    module: nn.Module
    names: tuple[str, ...]
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def name(self) -> str:
        """The first name, in the order of `model.named_modules()`; "" for the root."""
        return self.names[0]


def walk(model: nn.Module) -> tuple[Spot, ...]:
    """Every module of the tree once, in the order of `model.named_modules()`, with all its names."""
    modules: dict[int, nn.Module] = {}
    names: dict[int, list[str]] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}

    def visit(module: nn.Module, name: str, above: frozenset[int]) -> None:
        first = id(module) not in modules
        if first:
            modules[id(module)] = module
            names[id(module)] = []
            places.setdefault(id(module), [])
        names[id(module)].append(name)
        for key, child in module._modules.items():
            if child is None:
                continue
            if first:
                places.setdefault(id(child), []).append((module, key))
            # A module that contains itself has endlessly many names; the ones on the way down are enough.
            if id(child) not in above:
                visit(child, f"{name}.{key}" if name else key, above | {id(child)})

    visit(model, "", frozenset({id(model)}))
    return tuple(Spot(modules[i], tuple(names[i]), tuple(places[i])) for i in modules)


def hooks_of(module: nn.Module) -> list[str]:
    """What kinds of hooks were registered on this very module; the one of `fuse` only looks."""
    tables = {kind: getattr(module, name, None) or {} for name, kind in _HOOKS.items()}
    return [kind for kind, hooks in tables.items() if list(hooks.values()) not in ([], [look_behind_output])]


def copied(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy, on request with the parameters of the original."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share_parameters else {}
    for buffer in model.buffers():
        # PyTorch cannot copy the buffers of a lazy batch norm that has not seen its shape.
        if isinstance(buffer, UninitializedBuffer):
            fresh = {"device": buffer.device, "dtype": buffer.dtype}
            memo[id(buffer)] = UninitializedBuffer(**fresh)  # type: ignore[arg-type]  # torch's stub has neither
    return copy.deepcopy(model, memo)


def prepared(model: object, *, operation: str, inplace: bool) -> nn.Module:
    """The module to work on: the model itself, or a deep copy of it. Refuses what cannot be changed safely."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            message(
                f"{operation}: model", got=type(model).__name__, expected="a torch.nn.Module", fix="Pass one."
            )
        )
    for spot in walk(model):
        where = f"{operation}: {spot.name or 'model'}"
        if isinstance(spot.module, torch.jit.ScriptModule):
            raise ModelError(
                message(
                    where,
                    got="a scripted module",
                    expected="Python code",
                    fix="Change it before scripting it.",
                )
            )
        if type(spot.module).__module__.startswith(("torch.distributed", "torch.nn.parallel.distributed")):
            raise ModelError(
                message(
                    where,
                    got=f"{type(spot.module).__name__}, which has already counted its parameters",
                    expected="a model that is not wrapped yet",
                    fix="Change the model first and wrap it then.",
                )
            )
    if inplace:
        return model
    try:
        return copied(model)
    except Exception as error:  # a model's own __deepcopy__ may raise anything
        raise ModelError(
            message(
                f"{operation}: copy of the model",
                got=f"{type(error).__name__}: {error}",
                expected="a model that copy.deepcopy can copy",
                fix="Pass inplace=True to change the model itself.",
            )
        ) from error
