"""The traced door: the registered operators of the namespace `batchnorm`.

torch.compile, torch.export and dispatch modes see these operators whole. They are functional and of fixed arity;
the update of the running statistics is an operator of its own, because PyTorch refuses autograd for one that
mutates. An absent tensor is returned as an empty one.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm._activations import activation_named
from batchnorm.ops import by_batch, formula
from batchnorm.ops.aten import Running
from batchnorm.ops.backends import bits_of, kernels_of
from batchnorm.ops.eager import keep, like, normalize_gradients

__all__ = ["Registered", "normalize", "normalize_by_batch", "train"]

_ARGUMENTS = "Tensor? weight, Tensor? bias"
_GIVEN = f"Tensor mean, Tensor invstd, {_ARGUMENTS}"
_RULE = "str? activation, float slope, str backend"
_SCHEMAS = {
    "forward": f"(Tensor input, {_ARGUMENTS}, Tensor? residual, Tensor? mask, int groups, float eps, {_RULE})"
    " -> (Tensor output, Tensor mean, Tensor var, Tensor count, Tensor saved)",
    "backward": f"(Tensor grad_output, Tensor input, Tensor mean, Tensor var, Tensor count, {_ARGUMENTS},"
    f" Tensor kept, bool residual, Tensor? mask, float eps, {_RULE})"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    "moments": "(Tensor input, Tensor? mask, int groups, str backend) -> (Tensor mean, Tensor m2, Tensor count)",
    "normalize": f"(Tensor input, {_GIVEN}, Tensor? residual, Tensor? mask, {_RULE}) -> (Tensor output, Tensor saved)",
    "normalize_by_batch": f"(Tensor input, Tensor mean, Tensor invstd, Tensor count, {_ARGUMENTS}, Tensor? residual,"
    f" Tensor? mask, float eps, str? activation, float slope, str? group, str backend)"
    " -> (Tensor output, Tensor saved)",
    "grad_sums": f"(Tensor grad_output, Tensor input, {_GIVEN}, Tensor kept, bool residual, Tensor? mask, {_RULE})"
    " -> (Tensor sum_grad, Tensor sum_grad_xhat)",
    "grad_input": f"(Tensor grad_output, Tensor input, {_GIVEN}, Tensor kept, bool residual, Tensor? mask,"
    f" Tensor sum_grad, Tensor sum_grad_xhat, Tensor count, {_RULE}) -> (Tensor grad_input, Tensor grad_residual)",
    "update_running_": "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor? num_batches_tracked, Tensor mean,"
    " Tensor var, Tensor count, float? momentum, bool skip_nonfinite, str backend) -> ()",
}
# The outputs of each operator that take the memory layout of the input.
_LAID_OUT = {
    "forward": (0,),
    "backward": (0, 3),
    "normalize": (0,),
    "normalize_by_batch": (0,),
    "grad_input": (0, 1),
}


def _define(name: str) -> None:
    torch.library.define(f"batchnorm::{name}", _SCHEMAS[name])
    laid_out = _LAID_OUT.get(name, ())
    input_at = 1 if "grad_output" in _SCHEMAS[name] else 0

    def call(*args: Any) -> Any:
        *arguments, backend = args
        if name == "normalize_by_batch":
            # The count, ε and the group are for its gradient.
            input, mean, invstd, _, *rest, _, activation, slope, _ = arguments
            results = kernels_of(backend).normalize(input, mean, invstd, *rest, activation, slope)
        else:
            results = getattr(kernels_of(backend), name)(*arguments)
        if not laid_out:
            return results
        model = args[input_at]
        return tuple(
            like(result, model) if at in laid_out and result.shape == model.shape else result
            for at, result in enumerate(results)
        )

    torch.library.impl(f"batchnorm::{name}", "default")(call)


for _name in _SCHEMAS:
    _define(_name)


def _wide(input: Tensor, *shape: int) -> Tensor:
    return input.new_empty(shape, dtype=torch.float32 if input.device.type == "mps" else torch.float64)


def _saved(input: Tensor, residual: Tensor | None, activation: str | None, backend: str) -> Tensor:
    act = activation_named(activation)
    bits = residual is not None and act is not None and act.on is not None
    return input.new_empty(bits_of(backend, input) if bits else 0, dtype=torch.uint8)


def _gradient_like(parameter: Tensor | None, input: Tensor) -> Tensor:
    return _wide(input, 0) if parameter is None else torch.empty_like(parameter)


@torch.library.register_fake("batchnorm::forward")
def _(input, weight, bias, residual, mask, groups, eps, activation, slope, backend):  # type: ignore[no-untyped-def]
    channels = input.shape[1]
    statistics = _wide(input, groups, channels), _wide(input, groups, channels), _wide(input, groups, 1)
    return torch.empty_like(input), *statistics, _saved(input, residual, activation, backend)


@torch.library.register_fake("batchnorm::backward")
def _(dy, input, mean, var, count, weight, bias, kept, residual, mask, eps, activation, slope, backend):  # type: ignore[no-untyped-def]
    grad_residual = torch.empty_like(input) if residual else input.new_empty(0)
    return torch.empty_like(input), _gradient_like(weight, input), _gradient_like(bias, input), grad_residual


@torch.library.register_fake("batchnorm::moments")
def _(input, mask, groups, backend):  # type: ignore[no-untyped-def]
    channels = input.shape[1]
    return _wide(input, groups, channels), _wide(input, groups, channels), _wide(input, groups, 1)


@torch.library.register_fake("batchnorm::normalize")
def _(input, mean, invstd, weight, bias, residual, mask, activation, slope, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(input), _saved(input, residual, activation, backend)


@torch.library.register_fake("batchnorm::normalize_by_batch")
def _(input, mean, invstd, count, weight, bias, residual, mask, eps, activation, slope, group, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(input), _saved(input, residual, activation, backend)


@torch.library.register_fake("batchnorm::grad_sums")
def _(dy, input, mean, invstd, weight, bias, kept, residual, mask, activation, slope, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(mean), torch.empty_like(mean)


@torch.library.register_fake("batchnorm::grad_input")
def _(  # type: ignore[no-untyped-def]
    dy, input, mean, invstd, weight, bias, kept, residual, mask, s, t, count, activation, slope, backend
):
    return torch.empty_like(input), torch.empty_like(input) if residual else input.new_empty(0)


@torch.library.register_fake("batchnorm::update_running_")
def _(running_mean, running_var, tracked, mean, var, count, momentum, skip_nonfinite, backend):  # type: ignore[no-untyped-def]
    return None


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, bias, residual, mask, groups, eps, activation, slope, backend = inputs
    _, mean, var, count, saved = output
    ctx.save_for_backward(input, weight, bias, mask, mean, var, count, keep(activation, residual, saved))
    ctx.rule, ctx.backend, ctx.groups = (eps, activation, slope), backend, groups
    ctx.residual_dtype = None if residual is None else residual.dtype


def _forward_backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, mask, mean, var, count, kept = ctx.saved_tensors
    residual = ctx.residual_dtype is not None
    if torch.is_grad_enabled():
        kernels = kernels_of(ctx.backend)
        dx, dweight, dbias, dresidual = formula.gradients(
            kernels, grad_output, input, weight, bias, kept, residual, mask, None, ctx.groups, *ctx.rule
        )
    else:
        dx, dweight, dbias, dresidual = torch.ops.batchnorm.backward(
            grad_output, input, mean, var, count, weight, bias, kept, residual, mask, *ctx.rule, ctx.backend
        )
    return (*_present(dx, dweight, dbias, dresidual, weight, bias, ctx.residual_dtype), *(None,) * 6)


def _normalize_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, mean, invstd, weight, bias, residual, mask, activation, slope, backend = inputs
    ctx.save_for_backward(input, weight, bias, mask, mean, invstd, keep(activation, residual, output[1]))
    ctx.rule, ctx.backend = (activation, slope), backend
    ctx.residual_dtype = None if residual is None else residual.dtype


class Registered:
    """The primitives as registered operators, with the backend bound: what traced code calls."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def moments(self, *args: Any) -> Any:
        return torch.ops.batchnorm.moments(*args, self.backend)

    def normalize(self, *args: Any) -> Any:
        return torch.ops.batchnorm.normalize(*args, self.backend)

    def update_running_(self, *args: Any) -> None:
        torch.ops.batchnorm.update_running_(*args, self.backend)

    def grad_sums(self, *args: Any) -> Any:
        return torch.ops.batchnorm.grad_sums(*args, self.backend)

    def grad_input(self, *args: Any) -> Any:
        return torch.ops.batchnorm.grad_input(*args, self.backend)


def _normalize_backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias, dresidual = normalize_gradients(
        ctx, grad_output, kernels_of(ctx.backend), Registered(ctx.backend)
    )
    if dresidual is not None:
        dresidual = dresidual.to(ctx.residual_dtype)
    return dx, None, None, dweight, dbias, dresidual, *(None,) * 4


def _by_batch_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, mean, invstd, count, weight, bias, residual, mask, eps, activation, slope, group, backend = inputs
    kept = keep(activation, residual, output[1])
    ctx.save_for_backward(input, weight, bias, mask, mean, invstd, count, kept)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.rule, ctx.group = (eps, activation, slope, backend, Registered(backend)), group


def _by_batch_backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    def sums_of_all(sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:
        collectives = torch.ops._c10d_functional
        own = torch.stack((sum_grad, sum_grad_xhat))
        whole = collectives.wait_tensor(collectives.all_reduce(own, "sum", ctx.group))
        return whole[0], whole[1]

    dx, dweight, dbias, dresidual = by_batch.gradients(
        ctx.saved_tensors,
        grad_output,
        ctx.residual_dtype,
        *ctx.rule,
        sums_of_all=None if ctx.group is None else sums_of_all,
    )
    return dx, None, None, None, dweight, dbias, dresidual, *(None,) * 6


def _present(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_dtype: torch.dtype | None,
) -> formula.Gradients:
    """The gradients of what there is: `backward` returns an empty tensor for what there is not."""
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None if residual_dtype is None or dresidual is None else dresidual.to(residual_dtype),
    )


torch.library.register_autograd("batchnorm::forward", _forward_backward, setup_context=_forward_context)
torch.library.register_autograd("batchnorm::normalize", _normalize_backward, setup_context=_normalize_context)
torch.library.register_autograd(
    "batchnorm::normalize_by_batch", _by_batch_backward, setup_context=_by_batch_context
)


def train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running | None,
    groups: int,
    eps: float,
    activation: str | None,
    slope: float,
    backend: str,
) -> Tensor:
    """What `eager.Train` does, in registered operators."""
    output, mean, var, count, _ = torch.ops.batchnorm.forward(
        input, weight, bias, residual, mask, groups, eps, activation, slope, backend
    )
    if running is not None:
        running.update(Registered(backend), mean.detach(), var.detach(), count.detach())
    return output  # type: ignore[no-any-return]


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str | None,
    slope: float,
    backend: str,
) -> Tensor:
    """What `eager.Normalize` does, in registered operators."""
    return Registered(backend).normalize(  # type: ignore[no-any-return]
        input, mean, invstd, weight, bias, residual, mask, activation, slope
    )[0]


def normalize_by_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    eps: float,
    activation: str | None,
    slope: float,
    backend: str,
    group: str | None,
) -> Tensor:
    """What `policy.train_by` does behind the statistics, in registered operators."""
    return torch.ops.batchnorm.normalize_by_batch(  # type: ignore[no-any-return]
        input, mean, invstd, count, weight, bias, residual, mask, eps, activation, slope, group, backend
    )[0]
