"""`Changes`: what an operation did to a model and how to take it back."""

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from batchnorm._errors import ModelError, message
from batchnorm._files import write_whole

__all__ = ["MISSING", "Change", "Changes", "Edit", "Skipped", "html_table"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Change:
    """One module that was replaced. `also` holds its further names, `note` what else was done and why.

    `only_class`: it does nothing else than before, as a layer of this package.
    """

    name: str
    before: str
    after: str
    also: tuple[str, ...] = ()
    note: str = ""
    only_class: bool = False

    @property
    def text(self) -> str:
        """Before and after, and the note."""
        # What changed does not show in the text of every layer: a parameter that is not trained, for example.
        what = self.before if self.before == self.after else f"{self.before} -> {self.after}"
        return f"{what} ({self.told})" if self.told else what

    @property
    def told(self) -> str:
        """The note, and whether that is all."""
        return f"only its class: {self.note}" if self.only_class else self.note


@dataclass(frozen=True)
class Skipped:
    """One module that could have been meant and was left alone, and why. `also` holds its further names."""

    name: str
    reason: str
    also: tuple[str, ...] = ()


MISSING: Any = object()  # no entry at all: before an edit that adds one


@dataclass(frozen=True, eq=False)
class Edit:
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

    @property
    def where(self) -> str:
        """What was edited, for messages."""
        name = type(self.owner).__name__
        return f"{name}.{self.key}" if self.key and not self.key.startswith("_") else name

    def _now(self) -> Any:
        if self.table == "__class__":
            return type(self.owner)
        if self.table == "requires_grad":
            return getattr(self.owner._parameters[self.key], "requires_grad", MISSING)
        return getattr(self.owner, self.table).get(self.key, MISSING)

    def _put(self, value: Any) -> None:
        if self.table == "__class__":
            object.__setattr__(self.owner, "__class__", value)
        elif self.table == "requires_grad":
            getattr(self.owner, self.key).requires_grad_(value)
        elif value is MISSING:
            getattr(self.owner, self.table).pop(self.key, None)
        else:
            getattr(self.owner, self.table)[self.key] = value


@dataclass(eq=False, repr=False)
class Changes:
    """What an operation did to a model.

    `model` is the changed model; `changed` and `skipped` say which modules were replaced and which were left
    alone, by their names before the operation; `notes` is what holds for the model as a whole. `dry_run`: nothing was
    done, and `changed` says what would have been. `print(changes)` shows all of it.

    Example:
        >>> from torch import nn
        >>> import batchnorm
        >>> changes = batchnorm.remove(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()))
        >>> changes
        Changes(remove: 1 changed, 0 skipped)
        >>> print(changes)
        remove: 1 changed, 0 skipped
          1: torch.nn.BatchNorm1d(8) -> Identity() (0 has a bias)
        >>> changes.revert()[1]
        BatchNorm1d(8, eps=1e-05, ...)
        >>> changes
        Changes(remove (reverted): 1 changed, 0 skipped)
    """

    model: Any = field(repr=False)  # a module, or what else `fold` was given
    changed: tuple[Change, ...]
    skipped: tuple[Skipped, ...]
    operation: str = ""
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    _original: Any = field(default=None, repr=False)
    _edits: tuple[Edit, ...] = field(default=(), repr=False)
    _modes: tuple[tuple[nn.Module, nn.Module, bool], ...] = field(default=(), repr=False)
    _reverted: bool = field(default=False, repr=False)

    def revert(self) -> Any:
        """Take the operation back and return the model (the copy, where the operation made one).

        The very modules, parameters and buffers of before are in place again. Training and evaluation mode are not
        taken back: every module is in the mode that it, or what stood in its place, is in now. What training did to
        parameters that stayed in the model is not undone. If the model was moved to another device or dtype in
        between, move it again: the modules that come back have not moved. Reverting twice does nothing more.

        Raises:
            ModelError: the places that were changed have been changed again since; nothing is reverted then.
        """
        for edit in self._edits:
            if not edit.still_there():
                raise ModelError(
                    message(
                        f"revert of {self.operation}",
                        got=f"{edit.where}, which something else has changed since",
                        expected="the model as the operation left it",
                        fix="Revert the later change first.",
                    )
                )
        self._hand_modes_over()
        for edit in reversed(self._edits):
            edit.undo()
        if self._original is not None:
            self.model = self._original
        self._edits, self._modes = (), ()
        self._reverted = not self.dry_run
        return self.model

    def _hand_modes_over(self) -> None:
        """Put what comes back into the mode that its replacement has been put into since."""
        inside = {id(module) for module in self.model.modules()} if self._modes else set()
        for old, new, training in self._modes:
            for module in old.modules():
                # A layer that went into its replacement was there when the mode changed.
                if new.training != training and id(module) not in inside:
                    module.training = new.training

    def to_json(self) -> str:
        """The report (not the model) as JSON, with `schema_version` and `kind` "changes"."""
        payload = {
            "schema_version": SCHEMA_VERSION,
            "kind": "changes",
            "operation": self.operation,
            "dry_run": self.dry_run,
            "changed": [
                {
                    "name": c.name,
                    "also": list(c.also),
                    "before": c.before,
                    "after": c.after,
                    "note": c.note,
                    "only_class": c.only_class,
                }
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
        only = sum(change.only_class for change in self.changed)
        counts = [f"{len(self.changed) - only} changed"]
        counts += [f"{only} only given another class"] if only else []
        state = " (dry run, nothing was changed)" if self.dry_run else " (reverted)" if self._reverted else ""
        return f"{self.operation or 'changes'}{state}: {', '.join(counts)}, {len(self.skipped)} skipped"

    def __repr__(self) -> str:
        return f"Changes({self._headline()})"

    def __str__(self) -> str:
        lines = [self._headline()]
        lines += [f"  {_shown(change.name, change.also)}: {change.text}" for change in self.changed]
        if self.skipped:
            lines.append("skipped:")
            lines += [f"  {_shown(skip.name, skip.also)}: {skip.reason}" for skip in self.skipped]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        changed = [(_shown(c.name, c.also), c.before, c.after, c.told) for c in self.changed]
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
