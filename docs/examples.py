"""An extension of Griffe: the section `Example:` of a docstring is shown as code, as `Examples:` is."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Give the section the one name that the parser of Google-style docstrings knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
