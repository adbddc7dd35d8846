"""Tensors as the kernels see them: addresses, shapes, and codes for dtypes and activations."""

import torch
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "BEFORE",
    "BEHIND",
    "CODES",
    "DOUBLE",
    "WITH_BITS",
    "arithmetic",
    "back",
    "beside",
    "frequencies",
    "numbers",
    "room_for_bits",
    "see",
    "vector",
]

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "leaky_relu": 3, "hardswish": 4}
WITH_BITS = ("relu", "relu6", "leaky_relu")
_HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten
BEHIND = {"silu": _aten.silu_.default, "gelu": _aten.gelu_.default}
BEFORE = {"silu": _aten.silu_backward.grad_input, "gelu": _aten.gelu_backward.grad_input}
DOUBLE = torch.float64


def see(x: Tensor) -> tuple[Tensor, bool, int, int, int]:
    """(x or a dense copy, last, N, C, S)."""
    shape = x.shape
    n, c = shape[0], shape[1]
    if x.is_contiguous():
        if len(shape) == 2:
            return x, True, n, c, 1
        s = x.numel() // (n * c) if n and c else 0
        return x, s == 1, n, c, s
    s = x.numel() // (n * c) if n and c else 0
    if not x.movedim(1, -1).is_contiguous():
        return x.contiguous(), False, n, c, s
    return x, True, n, c, s


def beside(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in the dtype and memory order of the dense x, copied if it must be."""
    if tensor.dtype == x.dtype and tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x).copy_(tensor)


def vector(parameter: Tensor | None) -> tuple[int, int, Tensor | None]:
    """(address, code of the dtype, what must live until the call is over)."""
    if parameter is None:
        return 0, 0, None
    code = CODES.get(parameter.dtype)
    if code is None:
        parameter, code = parameter.double(), 1
    if not parameter.is_contiguous():
        parameter = parameter.contiguous()
    return parameter.data_ptr(), code, parameter


def room_for_bits(x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Room for the bits of act′, eight elements a byte in the order of x's memory."""
    count = (x.numel() + 7) // 8 if residual is not None and activation in WITH_BITS else 0
    return torch.empty(count, dtype=torch.uint8)


def arithmetic(
    x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None
) -> torch.dtype:
    """The dtype in which the call keeps the digits of a wider residual and of what stands before silu and gelu."""
    if activation in BEHIND:
        if x.dtype in _HALF:
            return torch.float32
        if mask is not None:  # PyTorch's float32 silu and gelu are off by more than all the rest
            return DOUBLE
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def back(result: Tensor, input: Tensor) -> Tensor:
    """`result` in the dtype and the memory layout that torch.empty_like(input) has."""
    if result.dtype == input.dtype and (input.is_contiguous() or result.stride() == input.stride()):
        return result
    return torch.empty_like(input).copy_(result)


def numbers(values: Tensor) -> Tensor:
    """Per-channel numbers as the kernels read them: float64, one after the other."""
    return values.to(DOUBLE).contiguous()


def frequencies(mask: Tensor | None) -> tuple[int, Tensor | None]:
    """A mask (N, *S) as the kernels read it, float64: (address, what must live until the call is over)."""
    if mask is None:
        return 0, None
    mask = numbers(mask)
    return mask.data_ptr(), mask
