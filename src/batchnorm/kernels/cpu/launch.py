"""The CPU kernels under the names and signatures of `batchnorm.reference`, and two compositions of them.

A tensor is handed over as an address and a shape: `last` says that the channel is the fastest axis (2-D and
channels-last input), else memory is (N, C, S). Input that is neither is copied. Results are allocated here, in the
memory layout of the input. silu and gelu are PyTorch's operators behind the kernel (before it, in backward).
"""

from math import nan
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.cpu import extension

__all__ = [
    "backward",
    "eval_forward",
    "forward",
    "grad_input",
    "grad_sums",
    "moments",
    "normalize",
    "train_backward",
    "train_forward",
    "unpack",
    "update_running_",
]

_cpu: Any = extension()

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "leaky_relu": 3, "hardswish": 4}
_WITH_BITS = ("relu", "relu6", "leaky_relu")
_HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten
_BEHIND = {"silu": _aten.silu_.default, "gelu": _aten.gelu_.default}
_BEFORE = {"silu": _aten.silu_backward.grad_input, "gelu": _aten.gelu_backward.grad_input}
_double = torch.float64


def _see(x: Tensor) -> tuple[Tensor, bool, int, int, int]:
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


def _beside(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in the dtype and memory order of the dense x, copied if it must be."""
    if tensor.dtype == x.dtype and tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x).copy_(tensor)


def _vector(parameter: Tensor | None) -> tuple[int, int, Tensor | None]:
    """(address, code of the dtype, what must live until the call is over)."""
    if parameter is None:
        return 0, 0, None
    code = _CODES.get(parameter.dtype)
    if code is None:
        parameter, code = parameter.double(), 1
    if not parameter.is_contiguous():
        parameter = parameter.contiguous()
    return parameter.data_ptr(), code, parameter


def _bits(x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Room for the bits of act′, eight elements a byte in the order of x's memory."""
    count = (x.numel() + 7) // 8 if residual is not None and activation in _WITH_BITS else 0
    return torch.empty(count, dtype=torch.uint8)


def _arithmetic(x: Tensor, residual: Tensor | None, activation: str | None) -> torch.dtype:
    """The dtype in which the call keeps the digits of a wider residual and of what stands before silu and gelu."""
    if activation in _BEHIND and x.dtype in _HALF:
        return torch.float32
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _back(result: Tensor, input: Tensor) -> Tensor:
    """`result` in the dtype and the memory layout that torch.empty_like(input) has."""
    if result.dtype == input.dtype and (input.is_contiguous() or result.stride() == input.stride()):
        return result
    return torch.empty_like(input).copy_(result)


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    statistics: tuple[int, int],
    running: tuple[int, int, int, int, float, bool] = (0, 0, 0, 0, 0.0, False),
) -> tuple[Tensor, Tensor | None]:
    """(output, bits), with mean and var written to the two addresses."""
    if (residual is not None or activation in _BEHIND) and (
        wide := _arithmetic(input, residual, activation)
    ) != input.dtype:
        y, bits = _forward(
            input.to(wide), weight, bias, residual, eps, activation, slope, statistics, running
        )
        return _back(y, input), bits
    x, last, n, c, s = _see(input)
    y = torch.empty_like(x)
    w, w_code, w_alive = _vector(weight)
    b, b_code, b_alive = _vector(bias)
    bits, r, kept = None, 0, 0
    if residual is not None:
        residual = _beside(residual, x)
        bits = _bits(x, residual, activation)
        r, kept = residual.data_ptr(), bits.data_ptr()
    act = _ACTIVATIONS.get(activation, 0)
    code = _CODES[x.dtype]
    _cpu.train_forward(
        code, last, n, c, s, x.data_ptr(), w, w_code, b, b_code, r, y.data_ptr(), kept, act, slope, eps,
        *statistics, *running,
    )  # fmt: skip
    if activation in _BEHIND:
        _BEHIND[activation](y)
    return (y if x is input else _back(y, input)), bits


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
    """Training: (output, mean, var, count, saved)."""
    channels = input.shape[1]
    mean, var = torch.empty(1, channels, dtype=_double), torch.empty(1, channels, dtype=_double)
    y, bits = _forward(
        input, weight, bias, residual, eps, activation, slope, (mean.data_ptr(), var.data_ptr())
    )
    count = torch.full((1, 1), float(input.numel() // channels if channels else 0), dtype=_double)
    return y, mean, var, count, torch.empty(0, dtype=torch.uint8) if bits is None else bits


def train_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Any,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(output, bits, statistics (2, C)); counts the batch and moves the running statistics in the same call."""
    channels = input.shape[1]
    statistics = torch.empty(2, channels, dtype=_double)
    mean = statistics.data_ptr()
    addresses = (mean, mean + 8 * channels)
    if running is None:
        y, bits = _forward(input, weight, bias, residual, eps, activation, slope, addresses)
        return y, bits, statistics
    running_mean, running_var, tracked, momentum, skip = running
    dtype = running_mean.dtype
    if (
        dtype == running_var.dtype
        and dtype in _CODES
        and running_mean.is_contiguous()
        and running_var.is_contiguous()
        and (tracked is None or tracked.dtype == torch.int64)
    ):
        moves = (
            running_mean.data_ptr(), running_var.data_ptr(), _CODES[dtype], 0 if tracked is None else tracked.data_ptr(),
            nan if momentum is None else momentum, skip,
        )  # fmt: skip
        y, bits = _forward(input, weight, bias, residual, eps, activation, slope, addresses, moves)
        # Autograd must notice that they changed.
        torch.autograd.graph.increment_version(
            (running_mean, running_var) if tracked is None else (running_mean, running_var, tracked)
        )
        return y, bits, statistics
    y, bits = _forward(input, weight, bias, residual, eps, activation, slope, addresses)
    if tracked is not None:
        tracked.add_(1)
    count = torch.full((1, 1), float(input.numel() // channels if channels else 0), dtype=_double)
    update_running_(
        running_mean, running_var, tracked, statistics[:1], statistics[1:], count, momentum, skip
    )
    return y, bits, statistics


def _backward(
    grad_output: Tensor,
    input: Tensor,
    statistics: tuple[int, int],
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    residual: bool,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dresidual)."""
    bits = residual and activation in _WITH_BITS
    added = kept if residual and activation is not None and not bits else None
    if (added is not None or activation in _BEHIND) and (
        wide := _arithmetic(input, added, activation)
    ) != input.dtype:
        dx, dweight, dbias, dresidual = _backward(
            grad_output, input.to(wide), statistics, weight, bias, kept, residual, eps, activation, slope
        )
        return _back(dx, input), dweight, dbias, None if dresidual is None else _back(dresidual, input)
    x, last, n, c, s = _see(input)
    dy = grad_output
    if dy.dtype != x.dtype or dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    if added is not None:
        added = _beside(added, x)
    w, w_code, w_alive = _vector(weight)
    b, b_code, b_alive = _vector(bias)
    dresidual = None
    if activation in _BEHIND:
        z = torch.empty_like(x)
        _cpu.preactivation(
            _CODES[x.dtype], last, n, c, s, x.data_ptr(), w, w_code, b, b_code,
            0 if added is None else added.data_ptr(), z.data_ptr(), eps, *statistics,
        )  # fmt: skip
        dy = _BEFORE[activation](dy, z, grad_input=z)
        activation, added = None, None
        dresidual = dy if residual else None
    elif residual:
        dresidual = torch.empty_like(x)
    dx = torch.empty_like(x)
    dweight = None if w_alive is None else torch.empty_like(w_alive)
    dbias = None if b_alive is None else torch.empty_like(b_alive)
    _cpu.train_backward(
        _CODES[x.dtype], last, n, c, s, x.data_ptr(), w, w_code, b, b_code, dy.data_ptr(),
        0 if added is None else added.data_ptr(), kept.data_ptr() if bits and kept is not None else 0,
        _ACTIVATIONS[activation], slope, eps, *statistics, dx.data_ptr(),
        0 if dresidual is None or dresidual is dy else dresidual.data_ptr(),
        0 if dweight is None else dweight.data_ptr(), 0 if dbias is None else dbias.data_ptr(),
    )  # fmt: skip
    if x is not input:
        dx = _back(dx, input)
        dresidual = None if dresidual is None else _back(dresidual, input)
    if weight is not None and dweight is not None and dweight.dtype != weight.dtype:
        dweight = dweight.to(weight.dtype)
    if bias is not None and dbias is not None and dbias.dtype != bias.dtype:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def train_backward(
    grad_output: Tensor,
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    residual: bool,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `train_forward`, None for what there is not."""
    mean = statistics.data_ptr()
    addresses = (mean, mean + 8 * input.shape[1])
    return _backward(
        grad_output, input, addresses, weight, bias, kept, residual, eps, activation, slope
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
    mean, var = _numbers(mean), _numbers(var)
    dx, dweight, dbias, dresidual = _backward(
        grad_output, input, (mean.data_ptr(), var.data_ptr()), weight, bias, kept, residual, eps, activation, slope
    )  # fmt: skip
    return (
        dx,
        torch.empty(0, dtype=_double) if dweight is None else dweight,
        torch.empty(0, dtype=_double) if dbias is None else dbias,
        input.new_empty(0) if dresidual is None else dresidual,
    )


def _numbers(values: Tensor) -> Tensor:
    """Per-channel numbers as the kernels read them: float64, one after the other."""
    return values.to(_double).contiguous()


def moments(input: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and m2 = Σ(x − mean)², both (1, C), and the count (1, 1)."""
    x, last, n, c, s = _see(input)
    mean, m2 = torch.empty(1, c, dtype=_double), torch.empty(1, c, dtype=_double)
    _cpu.moments(_CODES[x.dtype], last, n, c, s, x.data_ptr(), mean.data_ptr(), m2.data_ptr())
    return mean, m2, torch.full((1, 1), float(n * s), dtype=_double)


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
) -> tuple[Tensor, Tensor]:
    """Given statistics: (output, saved)."""
    mean, invstd = _numbers(mean), _numbers(invstd)
    y, bits = _normalize(
        input, weight, bias, residual, activation, slope, (mean.data_ptr(), invstd.data_ptr()), None
    )
    return y, torch.empty(0, dtype=torch.uint8) if bits is None else bits


def eval_forward(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Given running statistics: (output, bits, (mean, invstd) as (2, C))."""
    channels = input.shape[1]
    statistics = torch.empty(2, channels, dtype=_double)
    mean = statistics.data_ptr()
    m, m_code, _m = _vector(running_mean)
    v, v_code, _v = _vector(running_var)
    y, bits = _normalize(
        input, weight, bias, residual, activation, slope, (mean, mean + 8 * channels), (eps, m, m_code, v, v_code), out
    )  # fmt: skip
    return y, bits, statistics


def _normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    slope: float,
    statistics: tuple[int, int],
    running: tuple[float, int, int, int, int] | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(output, bits) by (mean, invstd), which are written first where running statistics are given."""
    if (residual is not None or activation in _BEHIND) and (
        wide := _arithmetic(input, residual, activation)
    ) != input.dtype:
        y, bits = _normalize(
            input.to(wide), weight, bias, residual, activation, slope, statistics, running
        )
        return _back(y, input) if out is None else out.copy_(y), bits
    x, last, n, c, s = _see(input)
    y = torch.empty_like(x) if out is None or x is not input else out
    w, w_code, _w = _vector(weight)
    b, b_code, _b = _vector(bias)
    bits, r, kept = None, 0, 0
    if residual is not None:
        residual = _beside(residual, x)
        bits = _bits(x, residual, activation)
        r, kept = residual.data_ptr(), bits.data_ptr()
    common = (
        _CODES[x.dtype], last, n, c, s, x.data_ptr(), w, w_code, b, b_code, r, y.data_ptr(), kept,
        _ACTIVATIONS.get(activation, 0), slope,
    )  # fmt: skip
    if running is None:
        _cpu.normalize(*common, *statistics)
    else:
        _cpu.eval_forward(*common, *running, *statistics)
    if activation in _BEHIND:
        _BEHIND[activation](y)
    if x is input:
        return y, bits
    return _back(y, input) if out is None else out.copy_(y), bits


def _gradient(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    activation: str | None,
    slope: float,
) -> tuple[tuple[Any, ...], Tensor, Tensor | None, list[Tensor | None]]:
    """What grad_sums and grad_input share: (the kernels' arguments, x, g where it is known already, what must live)."""
    bits = residual and activation in _WITH_BITS
    added = kept if residual and activation is not None and not bits else None
    wide = _arithmetic(input, added, activation)
    x, last, n, c, s = _see(input if wide == input.dtype else input.to(wide))
    dy = _beside(grad_output, x)
    added = None if added is None else _beside(added, x)
    mean, invstd = _numbers(mean), _numbers(invstd)
    w, w_code, w_alive = _vector(weight)
    b, b_code, b_alive = _vector(bias)
    before = (_CODES[x.dtype], last, n, c, s, x.data_ptr(), w, w_code, b, b_code)
    known = None
    if activation in _BEHIND:
        z = torch.empty_like(x)
        _cpu.normalize(
            *before, 0 if added is None else added.data_ptr(), z.data_ptr(), 0, 0, slope,
            mean.data_ptr(), invstd.data_ptr(),
        )  # fmt: skip
        dy = known = _BEFORE[activation](dy, z, grad_input=z)
        activation, added = None, None
    arguments = (
        *before, dy.data_ptr(), 0 if added is None else added.data_ptr(), kept.data_ptr() if bits else 0,
        _ACTIVATIONS[activation], slope, mean.data_ptr(), invstd.data_ptr(),
    )  # fmt: skip
    return arguments, x, known, [dy, added, mean, invstd, w_alive, b_alive]


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
) -> tuple[Tensor, Tensor]:
    """Given statistics: Σg and Σg·x̂, both (1, C)."""
    arguments, _, _, alive = _gradient(
        grad_output, input, mean, invstd, weight, bias, kept, residual, activation, slope
    )
    sums = torch.empty_like(mean, dtype=_double), torch.empty_like(mean, dtype=_double)
    _cpu.grad_sums(*arguments, sums[0].data_ptr(), sums[1].data_ptr())
    del alive
    return sums


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
) -> tuple[Tensor, Tensor]:
    """Given statistics and sums: (grad_input, grad_residual)."""
    arguments, x, known, alive = _gradient(
        grad_output, input, mean, invstd, weight, bias, kept, residual, activation, slope
    )
    sums = _numbers(sum_grad), _numbers(sum_grad_xhat)
    dx = torch.empty_like(x)
    dresidual = (torch.empty_like(x) if known is None else known) if residual else None
    _cpu.grad_input(
        *arguments, sums[0].data_ptr(), sums[1].data_ptr(), count.item(), dx.data_ptr(),
        0 if dresidual is None or dresidual is known else dresidual.data_ptr(),
    )  # fmt: skip
    del alive
    return _back(dx, input), input.new_empty(0) if dresidual is None else _back(dresidual, input)


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
    """Move the running statistics, in place; the caller has counted the batch."""
    buffers = []
    for buffer in (running_mean, running_var):
        plain = buffer.is_contiguous() and buffer.dtype in _CODES
        buffers.append(buffer if plain else buffer.to(_double, memory_format=torch.contiguous_format))
    tracked = None if num_batches_tracked is None else num_batches_tracked.to(torch.int64)
    mean, var = _numbers(mean), _numbers(var)
    _cpu.update_running(
        buffers[0].data_ptr(), _CODES[buffers[0].dtype], buffers[1].data_ptr(), _CODES[buffers[1].dtype],
        0 if tracked is None else tracked.data_ptr(), mean.shape[-1], mean.data_ptr(), var.data_ptr(), count.item(),
        nan if momentum is None else momentum, skip_nonfinite,
    )  # fmt: skip
    for buffer, moved in zip((running_mean, running_var), buffers, strict=True):
        if moved is buffer:
            torch.autograd.graph.increment_version(buffer)
        else:
            buffer.copy_(moved)


def unpack(packed: Tensor, input: Tensor) -> Tensor:
    """The bits that `forward` or `normalize` kept for `input`, as booleans of its shape."""
    x, last, n, c, s = _see(input)
    places = torch.arange(8, dtype=torch.uint8)
    on = ((packed.unsqueeze(1) >> places) & 1).reshape(-1)[: x.numel()].bool()
    if last and input.dim() > 2:
        return on.view(n, *input.shape[2:], c).movedim(-1, 1)
    return on.view(input.shape)
