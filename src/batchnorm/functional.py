"""`batch_norm`: the argument checks, train and eval, the momentum rule, and the choice of backend and door."""

import torch
from torch import Tensor

from batchnorm import ops
from batchnorm._activations import activation_named
from batchnorm._errors import InputTypeError, message
from batchnorm._validation import (
    Single,
    check_input,
    check_per_channel,
    check_residual,
    check_statistics,
    expand_mask,
    fits,
    is_single,
    train_single,
)
from batchnorm.ops import HELD

__all__ = ["batch_norm", "layer_batch_norm"]


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
            that x̂ is 0; running_mean and the counter move, and running_var stays. It goes by the shape: a mask that
            leaves one value has a variance of 0.
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
    check_input(input, dimensions)
    activation_named(activation)
    check_statistics(running_mean, running_var, training, eps)
    if training and mask is None and is_single(input, policy):
        training = train_single(input, running_mean, single)
    if mask is not None:
        mask = expand_mask(input, mask)
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
        if not (same_dtype and fits(input, running_mean, running_var, weight, bias)):
            check_per_channel(
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
    # A policy's statistics and coefficients are not those that a recipe is made of.
    recompute = recompute and policy is None and not ops.is_traced(input) and ops.can_recompute()
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
