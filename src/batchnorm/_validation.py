"""What the arguments of a call must be, and PyTorch's words for what they are not."""

from typing import Literal, get_args

import torch
from torch import Tensor

from batchnorm import ops
from batchnorm._errors import InputError, InputTypeError, message

__all__ = [
    "SINGLE",
    "Single",
    "check_call",
    "check_input",
    "check_per_channel",
    "check_residual",
    "check_statistics",
    "expand_mask",
    "fits",
    "is_single",
    "train_single",
]

Single = Literal["error", "running", "zero"]
SINGLE: tuple[Single, ...] = get_args(Single)

_HALF = (torch.float16, torch.bfloat16)


def check_input(input: Tensor, dimensions: tuple[int, ...] | None) -> None:
    if not isinstance(input, Tensor):
        raise InputTypeError(message("input", got=type(input).__name__, expected="a torch.Tensor"))
    if dimensions is not None and input.dim() not in dimensions:
        # PyTorch's own words first: code and tests match them.
        wanted = " or ".join(f"{d}D" for d in dimensions)
        raise InputError(
            f"expected {wanted} input (got {input.dim()}D input): the shape is {tuple(input.shape)}"
        )
    if input.dim() < 2:
        raise InputError(
            message(
                "input",
                got=f"shape {tuple(input.shape)}",
                expected="(N, C) or (N, C, *S)",
                fix="Add a batch axis.",
            )
        )
    if not input.is_floating_point():
        raise InputTypeError(
            message(
                "input",
                got=str(input.dtype),
                expected="a real floating-point dtype",
                fix="Convert it first: input.float(), or normalize the real and imaginary parts apart."
                if input.is_complex()
                else "Convert it first: input.float().",
            )
        )


def fits(input: Tensor, *per_channel: Tensor | None) -> bool:
    """Whether all is as in the usual call: seen at a tenth of the price of saying what is wrong."""
    shape, dtype, cpu = (input.shape[1],), input.dtype, input.is_cpu
    for tensor in per_channel:
        if tensor is not None and not (
            isinstance(tensor, Tensor)
            and tensor.dtype is dtype
            and tensor.shape == shape
            and (tensor.is_cpu if cpu else tensor.device == input.device)
        ):
            return False
    return True


def check_per_channel(input: Tensor, same_dtype: bool, **per_channel: Tensor | None) -> None:
    """One value a channel on the input's device; with `same_dtype`, by PyTorch's rule for dtypes, too."""
    channels, dtype, device = input.shape[1], input.dtype, input.device
    for name, tensor in per_channel.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputTypeError(message(name, got=got, expected="a real floating-point tensor or None"))
        if tensor.dim() != 1 or tensor.shape[0] != channels:
            raise InputError(
                message(
                    f"{name} should contain {channels} elements, one a channel of the input {tuple(input.shape)}",
                    got=f"shape {tuple(tensor.shape)}",
                    expected=f"({channels},)",
                    fix=f"Make the layer with num_features={channels}, or put the channels on axis 1.",
                )
            )
        if tensor.device != device:
            raise InputError(
                message(
                    f"{name} and input must be on one device",
                    got=f"{name} on {tensor.device}",
                    expected=str(device),
                    fix="Move the model and the data to the same device with .to(device).",
                )
            )
        if same_dtype and tensor.dtype != dtype and not (dtype in _HALF and tensor.dtype == torch.float32):
            raise InputTypeError(
                message(
                    f"{name} has another dtype than the input",
                    got=f"{tensor.dtype} beside an input of {dtype}",
                    expected=f"{dtype} or torch.float32" if dtype in _HALF else str(dtype),
                    fix=f"Convert one of them: input.to({tensor.dtype}) or layer.to({dtype}).",
                )
            )


def is_single(input: Tensor, policy: ops.Policy | None = None) -> bool:
    """Whether there is one value per channel. The first question costs a quarter of the last, and is seldom yes."""
    if policy is not None:
        return policy.local and not ops.is_jit_tracing() and policy.is_single(input.shape)
    return (
        input.numel() == input.shape[1]
        and not ops.is_jit_tracing()
        and input.shape[0] * input.shape[2:].numel() == 1
    )


def train_single(input: Tensor, running_mean: Tensor | None, single: Single) -> bool:
    """Whether one value per channel is to be trained on all the same, as `single` says; else its error."""
    if single == "zero":
        return True
    if single == "running" and running_mean is not None:
        return False
    if single not in SINGLE:
        raise InputError(
            message("single", got=repr(single), expected=f"one of {', '.join(map(repr, SINGLE))}")
        )
    raise InputError(
        f"Expected more than 1 value per channel when training, got input size {input.shape}. "
        + (
            "Use batches of at least 2 (drop_last=True in the DataLoader), or call eval() on the layer."
            if single == "error"
            else "single='running' needs running statistics: use a layer with track_running_stats=True."
        )
    )


def check_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, eps: float
) -> None:
    if (running_mean is None) != (running_var is None):
        raise InputError(
            message(
                "running_mean and running_var must either both be None or neither be None",
                got="one of them",
                expected="both or neither",
            )
        )
    if not training:
        if running_mean is None:
            raise InputError(
                message(
                    "running_mean must be defined in evaluation mode",
                    got="None",
                    expected="running statistics",
                    fix="Pass them, or training=True to use the batch's.",
                )
            )
        if eps < 0:
            raise InputError(message("batch_norm eps must be non-negative", got=eps, expected="eps ≥ 0"))
        return
    if eps <= 0:
        raise InputError(
            message("batch_norm eps must be positive during training", got=eps, expected="eps > 0")
        )


def check_residual(input: Tensor, residual: Tensor) -> None:
    """Refuse what cannot be added to the input."""
    if not isinstance(residual, Tensor):
        raise InputTypeError(message("residual", got=type(residual).__name__, expected="a torch.Tensor"))
    if residual.shape != input.shape:
        raise InputError(
            message(
                "residual",
                got=f"shape {tuple(residual.shape)}",
                expected=f"the input's shape {tuple(input.shape)}",
            )
        )
    if residual.device != input.device:
        raise InputError(message("residual", got=f"device {residual.device}", expected=str(input.device)))
    if not residual.is_floating_point():
        raise InputTypeError(
            message("residual", got=str(residual.dtype), expected="a real floating-point dtype")
        )


def expand_mask(input: Tensor, mask: Tensor) -> Tensor:
    """The mask as (N, *S), checked: bool, or weights ≥ 0."""
    if not isinstance(mask, Tensor):
        raise InputTypeError(message("mask", got=type(mask).__name__, expected="a torch.Tensor"))
    shape = (input.shape[0], *input.shape[2:])
    if mask.device != input.device:
        raise InputError(message("mask", got=f"device {mask.device}", expected=str(input.device)))
    if mask.is_complex():
        raise InputTypeError(message("mask", got=str(mask.dtype), expected="bool, or real weights"))
    try:
        expanded = mask.expand(shape)
    except RuntimeError:
        raise InputError(
            message(
                "mask",
                got=f"shape {tuple(mask.shape)}",
                expected=f"(N, *S) = {shape}, or a shape that broadcasts to it",
                fix="The mask has no channel axis: take one of size 1 out with mask.squeeze(1).",
            )
        ) from None
    if mask.dtype != torch.bool and not mask.is_meta:
        _check_weights(mask)
    return expanded


def _check_weights(mask: Tensor) -> None:
    if ops.is_free(mask):
        lowest = mask.amin().item() if mask.numel() else 0
        if not lowest >= 0:
            raise InputError(
                message(
                    "mask", got=f"the weight {lowest}", expected="weights ≥ 0, or bool", fix="Clamp it at 0."
                )
            )
        return
    torch._assert_async((mask >= 0).all(), "batch_norm: the mask holds a negative weight")


def check_call(
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    training: bool,
    single: Single,
    **per_channel: Tensor | None,
) -> tuple[Tensor | None, bool]:
    """The checks of `layer_batch_norm` for a layer that composes PyTorch's own operators.

    Returns:
        The mask as (N, *S), and whether to train: not on one value per channel if `single` says so.
    """
    check_input(input, None)
    if not ops.is_jit_tracing():
        check_per_channel(input, False, **per_channel)
        if residual is not None:
            check_residual(input, residual)
    if training and mask is None and is_single(input):
        training = train_single(input, per_channel.get("running_mean"), single)
    return None if mask is None else expand_mask(input, mask), training
