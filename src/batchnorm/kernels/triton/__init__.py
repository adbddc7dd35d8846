"""The Triton kernels for GPUs, or the reason in plain words why they cannot run. Nothing here imports triton.

>>> from batchnorm.kernels import triton
>>> triton.why_not("cuda") != "" or triton.installed()
True
"""

import importlib.util
import os

import torch

__all__ = ["installed", "interpreted", "why_not"]

# The oldest compute capabilities that triton compiles for: at all, and with bfloat16.
_OLDEST, _OLDEST_BFLOAT16 = (7, 0), (8, 0)


def installed() -> bool:
    """Whether triton is there; PyTorch's builds for CUDA and ROCm bring it."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether triton's interpreter runs the kernels, on the CPU: with TRITON_INTERPRET=1, which is for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not(device: str, dtype: torch.dtype = torch.float32) -> str:
    """Why the kernels cannot run on a type of device, in plain words, or an empty string when they can."""
    if device == "cpu" and interpreted():
        return "" if installed() else "triton is not installed"
    if device != "cuda":
        return f"its kernels run on GPUs (CUDA or ROCm), and the input is on {device}"
    if not installed():
        return "triton is not installed. PyTorch's builds for CUDA bring it; else: pip install triton"
    if torch.cuda.is_available() and torch.version.hip is None:
        found = torch.cuda.get_device_capability()
        wanted = _OLDEST_BFLOAT16 if dtype == torch.bfloat16 else _OLDEST
        if found < wanted:
            return (
                f"triton compiles {dtype} for compute capability {wanted[0]}.{wanted[1]} and newer, "
                f"and this device has {found[0]}.{found[1]}"
            )
    return ""
