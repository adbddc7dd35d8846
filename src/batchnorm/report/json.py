"""Machine-readable output: strict JSON in a fixed envelope, and documents as plain dictionaries."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from batchnorm.report.document import Block, Document, finite

__all__ = ["document_to_dict", "to_json"]


def to_json(payload: Mapping[str, Any], kind: str, schema_version: int) -> str:
    """Return `payload` as strict JSON, behind the two keys that tell a reader what it holds.

    Keys come out in the order in which they were put in, so equal results are equal text. NaN and
    infinities, which JSON lacks, become null. NumPy and torch values are written as numbers and lists.

    Args:
        payload: the content; it may not use the keys "kind" and "schema_version".
        kind: what the content is, for example "comparison".
        schema_version: version of the payload's structure, raised when a reader would break.

    Raises:
        ValueError: `payload` uses a key of the envelope.
        TypeError: `payload` holds something that JSON cannot.

    Example:
        >>> print(to_json({"loss": float("nan")}, kind="example", schema_version=1))
        {
          "kind": "example",
          "schema_version": 1,
          "loss": null
        }
    """
    envelope = {"kind": kind, "schema_version": schema_version}
    if clash := sorted(envelope.keys() & payload.keys()):
        raise ValueError(f"payload uses the keys {clash} of the envelope; rename them")
    content = finite({**envelope, **payload})
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=plain)


def plain(value: Any) -> Any:
    """Return what an array or a tensor holds as Python numbers and lists (JSON's `default` hook)."""
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    raise TypeError(f"JSON cannot hold a {type(value).__name__}: {value!r}")


def document_to_dict(document: Document) -> dict[str, Any]:
    """Return a document as plain dictionaries; each block carries its kind under "type".

    Example:
        >>> from batchnorm.report.document import Document, Paragraph, Section
        >>> report = Document("Title", "All is well.", [Section("First", [Paragraph("Hello.")])])
        >>> document_to_dict(report)["sections"][0]["blocks"]
        [{'type': 'paragraph', 'text': 'Hello.', 'small': False, 'lead': ''}]
    """
    content: dict[str, Any] = finite(
        {
            "title": document.title,
            "verdict": document.verdict,
            "incomplete": document.incomplete,
            "facts": document.facts,
            "sections": [
                {
                    "title": section.title,
                    "folded": section.folded,
                    "blocks": [_block_to_dict(block) for block in section.blocks],
                }
                for section in document.sections
            ],
        }
    )
    return content


def _block_to_dict(block: Block) -> dict[str, Any]:
    content = {item.name: getattr(block, item.name) for item in fields(block)}
    return {"type": type(block).__name__.lower(), **content}
