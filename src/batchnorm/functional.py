"""`batch_norm`: the argument checks, train and eval, the momentum rule, and the choice of backend and door."""

from typing import Literal, get_args

import torch
from torch import Tensor

from batchnorm import ops
from batchnorm._activations import activation_named
from batchnorm._errors import InputError, InputTypeError, message
from batchnorm.ops import HELD

__all__ = ["SINGLE", "Single", "batch_norm", "check_call", "check_residual", "layer_batch_norm"]

Single = Literal["error", "running", "zero"]
SINGLE: tuple[Single, ...] = get_args(Single)

_HALF = (torch.float16, torch.bfloat16)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    inplace: bool = False,
    single: Single = "error",
    backend: str | None = None,
) -> Tensor:
    r"""Batch normalization, with an activation, a residual and a mask if you like.

    $$y = \mathrm{act}\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \varepsilon}} \cdot \gamma + \beta +
    \mathrm{residual}\right)$$

    The positional arguments are those of `torch.nn.functional.batch_norm`. In training the mean and the biased
    variance are those of the batch, per channel over N and S, and the running statistics move towards the batch's
    mean and unbiased variance: running ← (1 − momentum)·running + momentum·batch. In eval they are the running ones.

    They move in forward alone: a call inside a backward pass, where activation checkpointing computes a forward again,
    leaves them as they are. (A first forward there, as in a hook on a gradient, does so, too.)

    Args:
        input: shape (N, C, *S), floating point.
        running_mean: shape (C,), or None (training only); updated in place in training.
        running_var: shape (C,), or None together with `running_mean`.
        weight: γ of shape (C,), or None for 1.
        bias: β of shape (C,), or None for 0.
        training: use the batch's statistics.
        momentum: weight of the new batch in the running statistics.
        eps: ε, added to the variance; positive in training.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu".
        negative_slope: slope of leaky_relu below 0.
        residual: same shape as `input`, added before the activation.
        mask: shape (N, *S), or broadcastable to it: True (or a weight, taken as a frequency) where the input is
            valid. The output is 0 where it is not, and what stands there (NaN included) reaches nothing.
        inplace: write y into the memory of `input` and return it; for inference alone: eval mode, without a gradient.
        single: what to do in training with one value per channel, which has no variance: "error" is PyTorch's rule;
            "running" normalizes by the running statistics and leaves them alone; "zero" takes the variance for 0, so
            that x̂ is 0, and running_var stays.
        backend: None for the best one, or a name; `explain_backend` lists them.

    Returns:
        y, with the shape, dtype and memory layout of `input`.

    Raises:
        InputError: shapes, devices or options that do not fit, one value per channel in training, or `inplace` where
            the input is needed again (training, autograd, tracing) or its elements share memory (expanded).
        InputTypeError: integer or complex input.
        BackendError: a `backend` asked for by name cannot run the call.

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167.

    Example:
        >>> import torch, batchnorm
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> batchnorm.batch_norm(x, None, None, training=True, activation="relu").round(decimals=3)
        tensor([[0., 0.],
                [1., 1.]])
    """
    if momentum is None:
        raise InputTypeError(
            message(
                "momentum",
                got="None",
                expected="a number",
                fix="The plain average over all batches needs a counter: use a layer, or 1 / k in the k-th batch.",
            )
        )
    return layer_batch_norm(
        input,
        running_mean,
        running_var,
        None,
        weight,
        bias,
        training,
        momentum,
        eps,
        activation,
        negative_slope,
        residual,
        mask,
        False,
        backend,
        None,
        inplace,
        single=single,
    )


@torch.fx.wrap
def layer_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    slope: float,
    residual: Tensor | None,
    mask: Tensor | None,
    skip_nonfinite: bool,
    backend: str | None,
    dimensions: tuple[int, ...] | None = None,
    inplace: bool = False,
    recompute: bool = False,
    single: Single = "error",
    policy: ops.Policy | None = None,
) -> Tensor:
    """`batch_norm` with what only a layer has: num_batches_tracked, the rule for non-finite statistics, its rank.

    With `recompute` whoever saves the output for its backward is given a recipe instead of it. In training a `policy`
    says by which statistics to normalize.

    One call, wrapped for torch.fx, so that symbolic tracing sees no control flow and records no update.
    """
    if HELD and torch.compiler.is_compiling():
        return ops.uncompiled(
            layer_batch_norm, input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum,
            eps, activation, slope, residual, mask, skip_nonfinite, backend, dimensions, inplace, recompute, single,
            policy,
        )  # fmt: skip
    _check_input(input, dimensions)
    activation_named(activation)
    _check_statistics(running_mean, running_var, training, eps)
    if training and mask is None and (policy is None or policy.local) and _is_single(input):
        training = _train_single(input, running_mean, single)
    if mask is not None:
        mask = _expand_mask(input, mask)
    policy = policy if training else None
    name = ops.choose(
        input,
        training,
        activation,
        residual is not None,
        mask is not None,
        policy is not None,
        backend,
        not training and ops.is_traced(input),
    )
    if not ops.is_jit_tracing():  # there a size is a tensor, and a check on it is a warning
        same_dtype = name == "aten" or (name in ops.COMPOSED and backend is None)
        if not (same_dtype and _fits(input, running_mean, running_var, weight, bias)):
            _check_per_channel(
                input,
                same_dtype,
                running_mean=running_mean,
                running_var=running_var,
                weight=weight,
                bias=bias,
            )
        if residual is not None:
            check_residual(input, residual)
    if inplace:
        ops.check_inplace(input, training, ops.is_traced(input), weight, bias, residual)
    recompute = recompute and not ops.is_traced(input) and ops.can_recompute()
    if recompute:
        ops.look_behind(input, residual)
    given = None
    if not training and running_mean is not None and running_var is not None:
        given = (running_mean, running_var)
        output = (ops.normalize_ if inplace else ops.normalize)(
            input, weight, bias, residual, mask, *given, eps, activation, slope, name
        )
    else:
        running = None
        if running_mean is not None and running_var is not None:
            running = ops.Running(running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
            if ops.is_recomputation():
                running = ops.uncounted(running, name)
            elif HELD:
                running = ops.held(running)
        arguments = (input, weight, bias, residual, mask, running)
        if policy is None:
            output = ops.train(*arguments, 1, eps, activation, slope, name)
        else:
            output = ops.train_by(policy, *arguments, eps, activation, slope, name, ops.is_traced(input))
    if recompute:
        ops.remember(output, input, weight, bias, residual, mask, given, eps, activation, slope, name)
    return output


def _check_input(input: Tensor, dimensions: tuple[int, ...] | None) -> None:
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


def _fits(input: Tensor, *per_channel: Tensor | None) -> bool:
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


def _check_per_channel(input: Tensor, same_dtype: bool, **per_channel: Tensor | None) -> None:
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


def _is_single(input: Tensor) -> bool:
    """Whether there is one value per channel. The first question costs a quarter of the last, and is seldom yes."""
    return (
        input.numel() == input.shape[1]
        and not ops.is_jit_tracing()
        and input.shape[0] * input.shape[2:].numel() == 1
    )


def _train_single(input: Tensor, running_mean: Tensor | None, single: Single) -> bool:
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


def _check_statistics(
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


def _expand_mask(input: Tensor, mask: Tensor) -> Tensor:
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
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and _holds_values(mask):
        lowest = mask.amin().item() if mask.numel() else 0
        if not lowest >= 0:
            raise InputError(
                message(
                    "mask", got=f"the weight {lowest}", expected="weights ≥ 0, or bool", fix="Clamp it at 0."
                )
            )
        return
    torch._assert_async((mask >= 0).all(), "batch_norm: the mask holds a negative weight")


def _holds_values(mask: Tensor) -> bool:
    """Whether Python may look at the values: not under a transform or a tracing mode."""
    return (
        type(mask) is Tensor
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


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
    _check_input(input, None)
    if not ops.is_jit_tracing():
        _check_per_channel(input, False, **per_channel)
        if residual is not None:
            check_residual(input, residual)
    if training and mask is None and _is_single(input):
        training = _train_single(input, per_channel.get("running_mean"), single)
    return None if mask is None else _expand_mask(input, mask), training
