"""`Plan`: what is going to happen to a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from batchnorm._walk.changes import MISSING, Change, Changes, Edit, Skipped
from batchnorm._walk.short import short
from batchnorm._walk.tree import Spot, walk

__all__ = ["Plan"]


class Plan:
    """What is going to happen to a model. Nothing is touched before `apply`."""

    def __init__(self, operation: str, model: nn.Module) -> None:
        self.operation = operation
        self.model = model
        self.spots = walk(model)
        self._edits: dict[tuple[int, str, Any], Edit] = {}
        self._replaced: list[tuple[Spot, nn.Module, str, bool]] = []
        self._skipped: list[Skipped] = []
        self._notes: list[str] = []

    def replace(self, spot: Spot, new: nn.Module, *, note: str = "") -> None:
        """Put `new` wherever the module stands."""
        for owner, key in spot.places:
            self._edit(Edit(owner, "_modules", key, spot.module, new))
        self._replaced.append((spot, new, note, False))

    def set_parameter(self, module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        """Give the module this parameter in place of the one (or the None) that it has."""
        self._edit(Edit(module, "_parameters", name, module._parameters[name], value))

    def set_buffer(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Give the module this buffer in place of the one that it has."""
        self._edit(Edit(module, "_buffers", name, module._buffers[name], value))

    def set_requires_grad(self, module: nn.Module, name: str, value: bool) -> None:
        """Whether this parameter of the module is trained."""
        old = getattr(module, name).requires_grad
        self._edit(Edit(module, "requires_grad", name, old, value))

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Give the module this plain attribute."""
        self._edit(Edit(module, "__dict__", name, vars(module).get(name, MISSING), value))

    def drop_attribute(self, module: nn.Module, name: str) -> None:
        """Take this plain attribute away from the module."""
        self._edit(Edit(module, "__dict__", name, vars(module)[name], MISSING))

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Make the very module an object of this class: hooks, parameters and all that refers to it stay."""
        self._edit(Edit(module, "__class__", "", type(module), cls))

    def add_forward_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Have this function called behind the module's forward, if it is not yet."""
        number = RemovableHandle(module._forward_hooks).id
        if hook not in module._forward_hooks.values():
            self._edit(Edit(module, "_forward_hooks", number, MISSING, hook))

    def alter(self, spot: Spot, *, note: str = "", only_class: bool = False) -> None:
        """Report the module as changed, which is still the same object; `only_class`: it does nothing new."""
        self._replaced.append((spot, spot.module, note, only_class))

    def skip(self, spot: Spot, reason: str) -> None:
        """Leave the module alone and say why."""
        self._skipped.append(Skipped(spot.name, reason, spot.names[1:]))

    def note(self, text: str) -> None:
        """Say something that holds for the model as a whole."""
        self._notes.append(text)

    def apply(self) -> Changes:
        """Carry it out, whole or not at all."""
        before = [short(spot.module) for spot, *_ in self._replaced]
        tried: list[Edit] = []
        try:
            for edit in self._edits.values():
                tried.append(edit)
                edit.make()
            changed = tuple(
                Change(spot.name, old, short(new), spot.names[1:], note, only_class)
                for (spot, new, note, only_class), old in zip(self._replaced, before, strict=True)
            )
        except BaseException:
            for edit in reversed(tried):
                edit.undo()
            raise
        root: dict[int, Any] = {id(spot.module): new for spot, new, *_ in self._replaced if not spot.places}
        return Changes(
            model=root.get(id(self.model), self.model),
            changed=changed,
            skipped=tuple(self._skipped),
            operation=self.operation,
            notes=(*self._notes, *self._nothing()),
            _original=self.model,
            _edits=tuple(self._edits.values()),
            _modes=tuple(
                (spot.module, new, new.training) for spot, new, *_ in self._replaced if new is not spot.module
            ),
        )

    def _edit(self, edit: Edit) -> None:
        """Take it in; what was planned for the same thing before gives way, so that one edit undoes it."""
        self._edits[id(edit.owner), edit.table, edit.key] = edit

    def _nothing(self) -> list[str]:
        """Why there is nothing to report, if there is not."""
        if self._replaced or self._skipped:
            return []
        norms = sum(isinstance(spot.module, _BatchNorm) for spot in self.spots)
        if self.operation == "insert":
            return ["the model has no layer that batch norm could follow"]
        if norms:
            return [
                f"nothing to do: {norms} batch norm{'s' if norms > 1 else ''} in the model, all as wanted"
            ]
        return ["the model has no batch norm"]
