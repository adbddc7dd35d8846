"""Blocks that a forward opens (`with torch.no_grad():`). A torch.fx graph has the calls in them, and not the blocks."""

import dis
import functools
import sys
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import fx

__all__ = ["Modes", "modes", "opens_block"]

# What PyTorch's own functions open, they open again when the graph calls them; what stays open is in `modes`.
_TORCH = str(Path(torch.__file__).parent)
_TRACE = fx.Tracer.trace.__code__

Modes = tuple[object, ...]


def modes() -> Modes:
    """How PyTorch would run an operator now: with a gradient or without, under autocast, with whose hooks."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ("cpu", "cuda" if accelerator is None else accelerator.type)
    autocast = tuple(
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices
    )
    hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, hooks


def opens_block() -> str:
    """The function with a `with` statement that is running on the way from the trace to here; "" if there is none.

    Whether the block is open at this moment is not looked into: what a context manager does when it is left may matter
    as well.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _TRACE:
        code = frame.f_code
        if not code.co_filename.startswith(_TORCH) and _has_with(code):
            return code.co_name
        frame = frame.f_back
    return ""


@functools.cache
def _has_with(code: CodeType) -> bool:
    return any(instruction.opname == "WITH_EXCEPT_START" for instruction in dis.get_instructions(code))
