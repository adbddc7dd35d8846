import json

import numpy as np
import pytest
import torch

from batchnorm.report.document import Document
from batchnorm.report.json import document_to_dict, to_json


def test_the_envelope_comes_first_and_the_order_is_kept() -> None:
    text = to_json({"z": 1, "a": 2}, kind="example", schema_version=3)
    assert list(json.loads(text)) == ["kind", "schema_version", "z", "a"]
    assert json.loads(text)["schema_version"] == 3


def test_numbers_that_json_lacks_become_null_at_every_depth() -> None:
    payload = {
        "python": [1.5, float("nan"), {"deep": float("-inf")}],
        "numpy": np.array([1.0, np.nan]),
        "scalar": np.float32("nan"),
        "torch": torch.tensor([[1.0], [float("inf")]]),
    }
    content = json.loads(to_json(payload, kind="example", schema_version=1), parse_constant=pytest.fail)
    assert content["python"] == [1.5, None, {"deep": None}]
    assert content["numpy"] == [1.0, None]
    assert content["scalar"] is None
    assert content["torch"] == [[1.0], [None]]


def test_a_payload_cannot_overwrite_the_envelope() -> None:
    with pytest.raises(ValueError, match="'kind'"):
        to_json({"kind": "other"}, kind="example", schema_version=1)


def test_what_json_cannot_hold_is_an_error() -> None:
    with pytest.raises(TypeError, match="set"):
        to_json({"value": {1, 2}}, kind="example", schema_version=1)


def test_a_document_keeps_every_block_and_its_kind(document: Document) -> None:
    content = document_to_dict(document)
    kinds = [[block["type"] for block in section["blocks"]] for section in content["sections"]]
    assert kinds == [
        ["verdict"] * 4 + ["figure"],
        ["figure", "table"],
        ["figure", "paragraph"],
        ["paragraph", "figure"],
    ]
    rates = content["sections"][1]["blocks"][0]
    assert rates["data"][1]["y"][-1] is None
    assert json.loads(to_json(content, kind="document", schema_version=1))["title"] == document.title
