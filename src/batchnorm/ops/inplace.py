"""Inference into the input's own memory: when that is safe, and how each backend does it."""

import torch
from torch import Tensor

from batchnorm._errors import InputError, message
from batchnorm.ops import aten
from batchnorm.ops.backends import COMPOSED, kernels_of

__all__ = ["check_inplace", "normalize_"]


def check_inplace(input: Tensor, training: bool, traced: bool, *others: Tensor | None) -> None:
    """Refuse `inplace=True` where the input's values are needed again or where its elements share memory.

    `others` are the tensors besides the input that may require a gradient.
    """
    if training:
        _refuse(
            "a call in training",
            "eval mode with running statistics",
            "Backward needs the input, which relu and a weight of 0 destroy: call eval() first, or leave inplace out.",
        )
    if traced:
        _refuse(
            "a call that is traced",
            "eager execution",
            "Leave inplace out: a compiler reuses memory itself.",
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *others)):
        _refuse(
            "a call that autograd records",
            "inference",
            "Backward needs the input. Call the layer under torch.no_grad() or torch.inference_mode().",
        )
    if input.is_inference() and not torch.is_inference_mode_enabled():
        _refuse(
            "an inference tensor outside of inference mode",
            "a tensor that may be written to",
            "Call the layer under torch.inference_mode(), or clone() the input.",
        )
    if _may_overlap(input):
        _refuse(
            f"an input of shape {tuple(input.shape)} and strides {input.stride()}, whose elements share memory",
            "an input with memory of its own for every element",
            "Make it dense with input.contiguous() (or clone()), or leave inplace out.",
        )


def _refuse(got: str, expected: str, fix: str) -> None:
    raise InputError(message("inplace=True", got=got, expected=expected, fix=fix))


def _may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may have one address: not where every stride is beyond the reach of the smaller ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _unless_shared(tensor: Tensor | None, input: Tensor) -> Tensor | None:
    """The tensor, or a copy where it lies in the input's memory and is not the input itself, element by element."""
    if tensor is None or tensor is input:
        return tensor
    shared = tensor.untyped_storage().data_ptr() == input.untyped_storage().data_ptr()
    return tensor.clone() if shared else tensor


def normalize_(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str | None,
    slope: float,
    backend: str,
) -> Tensor:
    """Normalize by the running statistics (C,) into the memory of the input, which is returned."""
    if backend == "aten":
        y = aten.batch_norm(
            input, running_mean, running_var, None, weight, bias, residual, mask, eps, activation, slope
        )
        return input.copy_(y)
    kernels = kernels_of(backend)
    if backend in COMPOSED and mask is None:
        residual = _unless_shared(residual, input)
        kernels.eval_forward(
            input, running_mean, running_var, weight, bias, residual, eps, activation, slope, input
        )
        if not input.is_inference():
            torch._C._increment_version((input,))
        return input
    wide = torch.float32 if input.device.type == "mps" else torch.float64
    mean, var = running_mean.to(wide)[None], running_var.to(wide)[None]
    y, _ = kernels.normalize(
        input, mean, (var + eps).rsqrt(), weight, bias, residual, mask, activation, slope
    )
    return input.copy_(y)
