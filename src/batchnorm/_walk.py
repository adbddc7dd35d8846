"""The one tree walker, and `Changes`: what an operation did to a model and how to take it back.

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
import html
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer
from torch.utils.hooks import RemovableHandle

from batchnorm._errors import InputTypeError, ModelError, message
from batchnorm._files import write_whole
from batchnorm.ops import look_behind_output

__all__ = [
    "Change",
    "Changes",
    "Plan",
    "Skipped",
    "Spot",
    "copied",
    "hooks_of",
    "html_table",
    "line",
    "prepared",
    "walk",
]

SCHEMA_VERSION = 1

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


def line(module: nn.Module) -> str:
    """A module in one readable line."""
    if isinstance(module, nn.Sequential):
        return f"{type(module).__name__}({', '.join(line(child) for child in module)})"
    return " ".join(repr(module).split())


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


@dataclass(frozen=True)
class Change:
    """One module that was replaced. `also` holds its further names, `note` what else was done and why."""

    name: str
    before: str
    after: str
    also: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """One module that could have been meant and was left alone, and why. `also` holds its further names."""

    name: str
    reason: str
    also: tuple[str, ...] = ()


_MISSING: Any = object()  # no entry at all: before an edit that adds one


@dataclass(frozen=True, eq=False)
class _Edit:
    """One thing about a module, before and after: an entry of one of its tables, a flag of a parameter, its class."""

    owner: nn.Module
    table: str  # "_modules", "_parameters", "_buffers", "_forward_hooks", "__dict__", "requires_grad", "__class__"
    key: Any  # a name; the number of a hook
    old: Any
    new: Any

    def make(self) -> None:
        self._put(self.new)

    def undo(self) -> None:
        self._put(self.old)

    def still_there(self) -> bool:
        now = self._now()
        if self.table in ("_parameters", "_buffers"):
            # Moving a model to a device may give it new tensors, so their identity says nothing.
            return (now is None) == (self.new is None)
        return now is self.new

    def _now(self) -> Any:
        if self.table == "__class__":
            return type(self.owner)
        if self.table == "requires_grad":
            return getattr(self.owner._parameters[self.key], "requires_grad", _MISSING)
        return getattr(self.owner, self.table).get(self.key, _MISSING)

    def _put(self, value: Any) -> None:
        if self.table == "__class__":
            object.__setattr__(self.owner, "__class__", value)
        elif self.table == "requires_grad":
            getattr(self.owner, self.key).requires_grad_(value)
        elif value is _MISSING:
            getattr(self.owner, self.table).pop(self.key, None)
        else:
            getattr(self.owner, self.table)[self.key] = value


@dataclass(eq=False)
class Changes:
    """What an operation did to a model.

    `model` is the changed model; `changed` and `skipped` say which modules were replaced and which were left
    alone, by their names before the operation; `notes` is what holds for the model as a whole.

    Example:
        >>> from torch import nn
        >>> import batchnorm
        >>> changes = batchnorm.remove(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()))
        >>> print(changes)
        remove: 1 changed, 0 skipped
          1: BatchNorm1d(8, eps=1e-05, ...) -> Identity() (0 has a bias)
        >>> changes.revert()[1]
        BatchNorm1d(8, eps=1e-05, ...)
    """

    model: Any = field(repr=False)  # a module, or what else `fold` was given
    changed: tuple[Change, ...]
    skipped: tuple[Skipped, ...]
    operation: str = ""
    notes: tuple[str, ...] = ()
    _original: Any = field(default=None, repr=False)
    _edits: tuple[_Edit, ...] = field(default=(), repr=False)
    _flags: tuple[tuple[nn.Module, bool], ...] = field(default=(), repr=False)

    def revert(self) -> Any:
        """Take the operation back and return the model (the copy, where the operation made one).

        The very modules, parameters and buffers of before are in place again, and every training flag is what it
        was. What training did to parameters that stayed in the model is not undone. If the model was moved to
        another device or dtype in between, move it again: the modules that come back have not moved.
        Reverting twice does nothing more.

        Raises:
            ModelError: the places that were changed have been changed again since; nothing is reverted then.
        """
        for edit in self._edits:
            if not edit.still_there():
                raise ModelError(
                    message(
                        f"revert of {self.operation}",
                        got=f"{type(edit.owner).__name__}.{edit.key}, which something else has changed since",
                        expected="the model as the operation left it",
                        fix="Revert the later change first.",
                    )
                )
        for edit in reversed(self._edits):
            edit.undo()
        for module, training in self._flags:
            module.training = training
        if self._original is not None:
            self.model = self._original
        self._edits, self._flags = (), ()
        return self.model

    def to_json(self) -> str:
        """The report (not the model) as JSON, with `schema_version` and `kind` "changes"."""
        payload = {
            "schema_version": SCHEMA_VERSION,
            "kind": "changes",
            "operation": self.operation,
            "changed": [
                {"name": c.name, "also": list(c.also), "before": c.before, "after": c.after, "note": c.note}
                for c in self.changed
            ],
            "skipped": [{"name": s.name, "also": list(s.also), "reason": s.reason} for s in self.skipped],
            "notes": list(self.notes),
        }
        return json.dumps(payload, indent=2, ensure_ascii=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a file, whole or not at all: JSON for `.json`, HTML for `.html`, else plain text.

        Raises:
            OutputError: the file cannot be written.
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".json":
            return write_whole(path, self.to_json() + "\n")
        if suffix in {".html", ".htm"}:
            title = f"<title>{html.escape(self._headline())}</title>"
            head = f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">{title}</head>'
            return write_whole(path, f"{head}\n<body>\n{self._repr_html_()}\n</body>\n</html>\n")
        return write_whole(path, f"{self}\n")

    def _headline(self) -> str:
        return f"{self.operation or 'changes'}: {len(self.changed)} changed, {len(self.skipped)} skipped"

    def __str__(self) -> str:
        lines = [self._headline()]
        for change in self.changed:
            note = f" ({change.note})" if change.note else ""
            lines.append(f"  {_shown(change.name, change.also)}: {change.before} -> {change.after}{note}")
        if self.skipped:
            lines.append("skipped:")
            lines += [f"  {_shown(skip.name, skip.also)}: {skip.reason}" for skip in self.skipped]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        changed = [(_shown(c.name, c.also), c.before, c.after, c.note) for c in self.changed]
        skipped = [(_shown(s.name, s.also), s.reason) for s in self.skipped]
        parts = [f"<p><strong>{html.escape(self._headline())}</strong></p>"]
        parts += html_table(("module", "before", "after", "note"), changed)
        parts += html_table(("skipped", "reason"), skipped)
        parts += [f"<p><small>{html.escape(note)}</small></p>" for note in self.notes]
        return "\n".join(parts)


def _shown(name: str, also: Sequence[str]) -> str:
    return " = ".join(each or "(the model itself)" for each in (name, *also))


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of plain texts; none without rows."""
    if not rows:
        return []
    cells = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return [f"<table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"]


class Plan:
    """What is going to happen to a model. Nothing is touched before `apply`."""

    def __init__(self, operation: str, model: nn.Module) -> None:
        self.operation = operation
        self.model = model
        self.spots = walk(model)
        self._edits: list[_Edit] = []
        self._replaced: list[tuple[Spot, nn.Module, str]] = []
        self._skipped: list[Skipped] = []
        self._notes: list[str] = []

    def replace(self, spot: Spot, new: nn.Module, *, note: str = "") -> None:
        """Put `new` wherever the module stands."""
        for owner, key in spot.places:
            self._edits.append(_Edit(owner, "_modules", key, spot.module, new))
        self._replaced.append((spot, new, note))

    def set_parameter(self, module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        """Give the module this parameter in place of the one (or the None) that it has."""
        self._edits.append(_Edit(module, "_parameters", name, module._parameters[name], value))

    def set_buffer(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Give the module this buffer in place of the one that it has."""
        self._edits.append(_Edit(module, "_buffers", name, module._buffers[name], value))

    def set_requires_grad(self, module: nn.Module, name: str, value: bool) -> None:
        """Whether this parameter of the module is trained."""
        old = getattr(module, name).requires_grad
        self._edits.append(_Edit(module, "requires_grad", name, old, value))

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Give the module this plain attribute."""
        self._edits.append(_Edit(module, "__dict__", name, vars(module).get(name, _MISSING), value))

    def drop_attribute(self, module: nn.Module, name: str) -> None:
        """Take this plain attribute away from the module."""
        self._edits.append(_Edit(module, "__dict__", name, vars(module)[name], _MISSING))

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Make the very module an object of this class: hooks, parameters and all that refers to it stay."""
        self._edits.append(_Edit(module, "__class__", "", type(module), cls))

    def add_forward_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Have this function called behind the module's forward, if it is not yet."""
        number = RemovableHandle(module._forward_hooks).id
        if hook not in module._forward_hooks.values():
            self._edits.append(_Edit(module, "_forward_hooks", number, _MISSING, hook))

    def alter(self, spot: Spot, *, note: str = "") -> None:
        """Report the module as changed, which is still the same object."""
        self._replaced.append((spot, spot.module, note))

    def skip(self, spot: Spot, reason: str) -> None:
        """Leave the module alone and say why."""
        self._skipped.append(Skipped(spot.name, reason, spot.names[1:]))

    def note(self, text: str) -> None:
        """Say something that holds for the model as a whole."""
        self._notes.append(text)

    def apply(self) -> Changes:
        """Carry it out, whole or not at all."""
        flags = tuple((spot.module, spot.module.training) for spot in self.spots)
        before = [line(spot.module) for spot, _, _ in self._replaced]
        tried: list[_Edit] = []
        try:
            for edit in self._edits:
                tried.append(edit)
                edit.make()
            changed = tuple(
                Change(spot.name, old, line(new), spot.names[1:], note)
                for (spot, new, note), old in zip(self._replaced, before, strict=True)
            )
        except BaseException:
            for edit in reversed(tried):
                edit.undo()
            raise
        root: dict[int, Any] = {id(spot.module): new for spot, new, _ in self._replaced if not spot.places}
        return Changes(
            model=root.get(id(self.model), self.model),
            changed=changed,
            skipped=tuple(self._skipped),
            operation=self.operation,
            notes=tuple(self._notes),
            _original=self.model,
            _edits=tuple(self._edits),
            _flags=flags,
        )
