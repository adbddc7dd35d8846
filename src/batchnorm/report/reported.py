"""What every result has that can be read as a report: JSON, a page, a notebook's cell."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from batchnorm._errors import InputError, message
from batchnorm._files import write_whole
from batchnorm.report.document import Document
from batchnorm.report.json import to_json

__all__ = ["Reported"]


class Reported(ABC):
    """A result that tells itself as a document and as plain data."""

    kind: ClassVar[str]
    schema_version: ClassVar[int]

    @abstractmethod
    def document(self) -> Document:
        """The report, ready to be drawn for a terminal or a browser."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries and lists."""

    def to_json(self) -> str:
        """Everything as strict JSON with `kind` and `schema_version`; NaN and infinities become null."""
        return to_json(self.to_dict(), kind=self.kind, schema_version=self.schema_version)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it, whole or not at all: a self-contained page for `.html`, the numbers for `.json`.

        Raises:
            InputError: another suffix.
            MissingDependencyError: `.html` without the packages that draw it.
            OutputError: the file cannot be written.
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".json":
            return write_whole(path, self.to_json() + "\n")
        if suffix in (".html", ".htm"):
            from batchnorm.report.html import render  # jinja2 is optional; JSON does without

            return write_whole(path, render(self.document(), self.to_dict()))
        raise InputError(
            message(
                "output path",
                got=str(path),
                expected="a name that ends in .html or .json",
                fix="Add a suffix.",
            )
        )

    def _repr_html_(self) -> str:
        from batchnorm.report.html import render_fragment  # jinja2 is optional; only notebooks ask for this

        return render_fragment(self.document())
