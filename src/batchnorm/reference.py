"""Batch normalization as the textbook has it: forward, and by closed form the backward under it.

Everything is computed in float64 (float32 where a device has no float64), in plain PyTorch, for any device,
dtype and layout. It is the oracle of every test and the fallback of every device. The numbers in
parentheses are the equations of `docs/math.md`; `x` is seen as (G, n, C, S): G groups of n samples, C channels,
S positions. Per-channel numbers are (G, C), the count is (G, 1), weight and bias are (C,) or (G, C).

Sums are taken by adding halves, element by element: the error grows with log2 of the length, and the bits depend
neither on the number of threads nor on the memory layout.
"""

import torch
from torch import Tensor

from batchnorm._activations import activation_named
from batchnorm._errors import InputError, message

__all__ = [
    "backward",
    "forward",
    "grad_input",
    "grad_sums",
    "moments",
    "normalize",
    "parameter_grad",
    "unpack",
    "update_running_",
]

Sums = tuple[Tensor, Tensor]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _view(x: Tensor, groups: int) -> Tensor:
    """(N, C, *S) as (G, n, C, S), in the dtype of the arithmetic."""
    batch, channels = x.shape[0], x.shape[1]
    positions = x.shape[2:].numel()
    return x.reshape(groups, batch // groups, channels, positions).to(_wide(x))


def _weights(mask: Tensor | None, groups: int) -> Tensor | None:
    """A mask (N, *S) as frequencies (G, n, 1, S)."""
    return None if mask is None else _view(mask.unsqueeze(1), groups)


def _channel(values: Tensor) -> Tensor:
    """(G, C) or (C,) as (G, 1, C, 1) or (1, 1, C, 1)."""
    return values.reshape(-1, 1, values.shape[-1], 1)


def _valid(x: Tensor, w: Tensor | None) -> Tensor:
    """What stands under a weight of 0, NaN included, becomes 0."""
    return x if w is None else torch.where(w > 0, x, 0.0)


def _times(x: Tensor, w: Tensor | None) -> Tensor:
    return x if w is None else x * w


def total(x: Tensor) -> Tensor:
    """Σ over samples and positions, (G, n, C, S) to (G, 1, C, 1)."""
    for axis in (1, 3):
        if x.shape[axis] == 0:
            x = x.sum(axis, keepdim=True)
        while (length := x.shape[axis]) > 1:
            half = length // 2
            folded = x.narrow(axis, 0, half) + x.narrow(axis, half, half)
            x = torch.cat([folded, x.narrow(axis, 2 * half, 1)], axis) if length % 2 else folded
    return x


def _count(x: Tensor, w: Tensor | None) -> Tensor:
    """W, the sum of the weights, as (G, 1, 1, 1)."""
    if w is None:
        return x.new_full((x.shape[0], 1, 1, 1), x.shape[1] * x.shape[3])
    return total(w)


def _per_one(sums: Tensor, count: Tensor) -> Tensor:
    return sums / torch.where(count > 0, count, 1.0)


def _center(x: Tensor, mean: Tensor, w: Tensor | None, count: Tensor) -> Sums:
    """x − mean, and the mean. What rounding has left of the mean is taken off once more: at an offset of
    10⁷ σ the rounding of a float64 mean alone is 1e-9 σ.
    """
    deviation = _valid(x - mean, w)
    rest = _per_one(total(_times(deviation, w)), count)
    return _valid(deviation - rest, w), mean + rest


def _statistics(input: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w = _weights(mask, groups)
    x = _valid(_view(input, groups), w)
    count = _count(x, w)
    mean = _per_one(total(_times(x, w)), count)  # (1)
    deviation, mean = _center(x, mean, w, count)
    m2 = total(_times(deviation.square(), w))  # (2)
    return deviation, mean, m2, count


def moments(input: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(1), (2): mean and m2 = Σ(x − mean)², both (G, C), and count (G, 1)."""
    _, mean, m2, count = _statistics(input, mask, groups)
    return mean.flatten(1), m2.flatten(1), count.flatten(1)


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ·x̂ + β of (4)."""
    z = xhat if weight is None else xhat * _channel(weight.to(xhat.dtype))
    return z if bias is None else z + _channel(bias.to(xhat.dtype))


def _finish(
    xhat: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    w: Tensor | None,
    activation: str | None,
    slope: float,
) -> Sums:
    """(4), (5): y = act(γ·x̂ + β + residual), and the bits that backward needs."""
    act = activation_named(activation)
    z = _affine(xhat, weight, bias)
    saved = torch.empty(0, dtype=torch.uint8, device=z.device)
    if residual is not None:
        z = z + _valid(_view(residual, z.shape[0]), w)
        if act is not None and act.on is not None:
            saved = _pack(act.on(z))
    y = z if act is None else act.forward(z, slope)
    return _valid(y, w), saved


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Training: (output, mean, var, count, saved). var is biased: m2 / count."""
    deviation, mean, m2, count = _statistics(input, mask, groups)
    var = _per_one(m2, count)
    xhat = deviation * (var + eps).rsqrt()  # (3)
    y, saved = _finish(xhat, weight, bias, residual, _weights(mask, groups), activation, slope)
    return (
        y.reshape(input.shape).to(input.dtype, copy=True),
        mean.flatten(1),
        var.flatten(1),
        count.flatten(1),
        saved,
    )


def backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training: (grad_input, grad_weight, grad_bias, grad_residual); empty where there is nothing to differentiate."""
    groups = mean.shape[0]
    w = _weights(mask, groups)
    x = _valid(_view(input, groups), w)
    n = _channel(count)
    rstd = (_channel(var) + eps).rsqrt()
    deviation, _ = _center(x, _channel(mean), w, n)
    xhat = deviation * rstd
    g = _gated(grad_output, xhat, weight, bias, kept, residual, w, activation, slope)  # (7)
    sum_g = total(g)
    # (9) with e = g − w·Σg/W, so that an offset of the gradient cancels before anything is multiplied by it;
    # Σe·x̂ = Σg·x̂, because Σw·x̂ = 0.
    e = g - _times(_per_one(sum_g, n), w)
    e = e - _times(_per_one(total(e), n), w)
    sum_gxhat = total(e * xhat)
    dx = rstd * (e - _times(xhat * _per_one(sum_gxhat, n), w))
    dx = _valid(_affine(dx, weight, None), w)
    return (
        dx.reshape(input.shape).to(input.dtype, copy=True),
        _nothing(x) if weight is None else parameter_grad(sum_gxhat.flatten(1), weight),  # (8)
        _nothing(x) if bias is None else parameter_grad(sum_g.flatten(1), bias),
        g.reshape(input.shape).to(input.dtype, copy=True) if residual else _nothing(input),
    )


def normalize(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
) -> Sums:
    """Given statistics: (output, saved)."""
    w = _weights(mask, mean.shape[0])
    xhat = _normalized(input, mean, invstd, w)
    y, saved = _finish(xhat, weight, bias, residual, w, activation, slope)
    return y.reshape(input.shape).to(input.dtype, copy=True), saved


def grad_sums(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
) -> Sums:
    """Given statistics: Σg and Σg·x̂ of (8), both (G, C)."""
    w = _weights(mask, mean.shape[0])
    xhat = _normalized(input, mean, invstd, w)
    g = _gated(grad_output, xhat, weight, bias, kept, residual, w, activation, slope)
    return total(g).flatten(1), total(g * xhat).flatten(1)


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    mask: Tensor | None,
    sum_grad: Tensor,
    sum_grad_xhat: Tensor,
    count: Tensor,
    activation: str | None,
    slope: float,
) -> Sums:
    """Given statistics and sums: (grad_input, grad_residual) of (9) and (11).

    With both sums 0 the statistics are constants, and this is (10): the gradient of eval mode.
    """
    w = _weights(mask, mean.shape[0])
    xhat = _normalized(input, mean, invstd, w)
    g = _gated(grad_output, xhat, weight, bias, kept, residual, w, activation, slope)
    n = _channel(count)
    mean_g, mean_gxhat = _per_one(_channel(sum_grad), n), _per_one(_channel(sum_grad_xhat), n)
    dx = _channel(invstd) * (g - _times(mean_g + xhat * mean_gxhat, w))
    dx = _valid(_affine(dx, weight, None), w)
    grad_residual = g.reshape(input.shape).to(input.dtype, copy=True) if residual else _nothing(input)
    return dx.reshape(input.shape).to(input.dtype, copy=True), grad_residual


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    """(6), in place: running ← running + momentum·(batch − running), with the unbiased variance m2 / (count − 1).

    momentum None is the cumulative average 1 / num_batches_tracked; without that counter nothing moves. An empty
    batch changes nothing, a count of at most 1 leaves the variance alone, and with `skip_nonfinite` a channel whose
    statistics are not finite leaves both alone.
    """
    if mean.shape[0] != 1:
        raise InputError(
            message(
                "update_running_", got=f"{mean.shape[0]} groups", expected="statistics merged into one group"
            )
        )
    n, wide = count[0], mean.dtype
    batch_mean, batch_var = mean[0], var[0] * n / torch.where(n > 1, n - 1, 1.0)
    factor: Tensor | float = 0.0 if momentum is None else momentum
    if momentum is None and num_batches_tracked is not None:
        factor = 1.0 / num_batches_tracked.to(wide)
    new_mean = (running_mean.to(wide) * (1 - factor) + batch_mean * factor).to(running_mean.dtype)
    new_var = (running_var.to(wide) * (1 - factor) + batch_var * factor).to(running_var.dtype)
    keep_mean, keep_var = n <= 0, n <= 1
    if skip_nonfinite:
        bad = ~(batch_mean.isfinite() & batch_var.isfinite() & new_mean.isfinite() & new_var.isfinite())
        keep_mean, keep_var = keep_mean | bad, keep_var | bad
    running_mean.copy_(torch.where(keep_mean, running_mean, new_mean))
    running_var.copy_(torch.where(keep_var, running_var, new_var))


def _normalized(input: Tensor, mean: Tensor, invstd: Tensor, w: Tensor | None) -> Tensor:
    """x̂ of (3) from given statistics."""
    return _valid((_view(input, mean.shape[0]) - _channel(mean)) * _channel(invstd), w)


def _gated(
    grad_output: Tensor,
    xhat: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    w: Tensor | None,
    activation: str | None,
    slope: float,
) -> Tensor:
    """(7): g = dy·act′(z). `kept` holds what z cannot be had from: the bits of act′, or the residual."""
    g = _valid(_view(grad_output, xhat.shape[0]), w)
    act = activation_named(activation)
    if act is None:
        return g
    if residual and act.on is not None:
        return act.backward_from_bits(g, unpack(kept, g), slope)
    z = _affine(xhat, weight, bias)
    if residual:
        z = z + _valid(_view(kept, xhat.shape[0]), w)
    return act.backward(g, z, slope)


def parameter_grad(sums: Tensor, parameter: Tensor) -> Tensor:
    """(G, C) sums over the groups that share the parameter, in its shape and dtype."""
    return (sums if parameter.dim() == 2 else sums.sum(0)).to(parameter.dtype)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _pack(bits: Tensor) -> Tensor:
    """Eight booleans a byte, in the order of the elements."""
    flat = bits.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, input: Tensor) -> Tensor:
    """The bits that `forward` or `normalize` saved for `input`, as booleans of its shape."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> places) & 1).reshape(-1)[: input.numel()].view(input.shape).bool()
