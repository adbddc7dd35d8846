"""Tensors as the kernels want them: dense, in one memory order, with a plan. Nothing here imports triton."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from batchnorm.kernels.triton.plan import Machine, Plan, bytes_of_bits, layout_of, plan_of

__all__ = [
    "DOUBLE",
    "FLOATS",
    "WITH_BITS",
    "Seen",
    "back",
    "beside",
    "count_of_nothing",
    "even",
    "frequencies",
    "machine_of",
    "numbers",
    "on_its_device",
    "plain",
    "present",
    "room_for_bits",
    "see",
    "unpack",
]

DOUBLE = torch.float64
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WITH_BITS = ("relu", "relu6", "leaky_relu")
# Below this eps a variance counts that float32 does not hold: the arithmetic is then float64.
_TINY_EPS = 1e-30
# The interpreter runs one program after the other in numpy, some milliseconds each.
_INTERPRETER = Machine(multiprocessors=1, tile=512, channels=16)
_machines: dict[torch.device, Machine] = {}


class Seen(NamedTuple):
    """A dense tensor and how it is cut; `wide` says that the arithmetic is float64."""

    x: Tensor
    plan: Plan
    wide: bool


def machine_of(device: torch.device) -> Machine:
    """What the plans depend on beside the shape."""
    found = _machines.get(device)
    if found is None:
        found = _INTERPRETER
        if device.type != "cpu":
            found = Machine(torch.cuda.get_device_properties(device).multi_processor_count)
        _machines[device] = found
    return found


def see(input: Tensor, groups: int, eps: float | None = None) -> Seen:
    """The input, or a dense copy, and its plan."""
    layout = layout_of(input.shape, input.stride())
    if layout is None:
        input = input.contiguous()
        layout = layout_of(input.shape, input.stride())
        assert layout is not None  # contiguous
    wide = input.dtype == torch.float64 or (eps is not None and eps < _TINY_EPS)
    return Seen(input, plan_of(layout, groups, wide, machine_of(input.device)), wide)


def beside(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in the memory order of the dense x, copied if it must be; its dtype is its own."""
    if tensor.stride() == x.stride():
        return tensor
    order = layout_of(tensor.shape, tensor.stride())
    if order is not None and order == layout_of(x.shape, x.stride()):
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


def back(result: Tensor, input: Tensor) -> Tensor:
    """`result` in the memory layout that torch.empty_like(input) has."""
    if result.stride() == input.stride() or input.is_contiguous():
        return result
    return torch.empty_like(input).copy_(result)


def numbers(values: Tensor) -> Tensor:
    """Per-channel numbers as the kernels read them: float64, one after the other."""
    return values.to(DOUBLE).contiguous()


def even(channels: int) -> int:
    """The length of a row of float64 after which the next one begins at a multiple of 16 bytes."""
    return channels + channels % 2


def plain(parameter: Tensor | None) -> Tensor | None:
    """Weight or bias with one value after the other."""
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()


def frequencies(mask: Tensor | None, wide: bool) -> Tensor | None:
    """A mask (N, *S) as the kernels read it: bytes for booleans, else in the dtype of the arithmetic."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return mask.contiguous().view(torch.uint8)
    return mask.to(torch.float64 if wide else torch.float32).contiguous()


def room_for_bits(x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """Room for the bits of act′; of one size for both memory orders, because a compiler may choose another one."""
    if residual is None or activation not in WITH_BITS:
        return None
    count = max(bytes_of_bits(x.shape[0], x.shape[1], x.shape[2:].numel()))
    return torch.empty(count, dtype=torch.uint8, device=x.device)


def unpack(packed: Tensor, input: Tensor) -> Tensor:
    """The bits that `forward` or `normalize` kept for `input`, as booleans of its shape."""
    x = input if layout_of(input.shape, input.stride()) is not None else input.contiguous()
    layout = layout_of(x.shape, x.stride())
    assert layout is not None
    samples, channels, positions, last = layout
    length = channels if last else positions
    rows = samples * (positions if last else channels)
    if channels == 1:
        rows, length = 1, samples * positions
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    taken = packed[: rows * ((length + 7) // 8)].view(rows, -1, 1)
    on = ((taken >> places) & 1).view(rows, -1)[:, :length].bool()
    if last:
        return on.reshape(samples, *input.shape[2:], channels).movedim(-1, 1)
    return on.reshape(input.shape)


def present(bits: Tensor | None, input: Tensor) -> Tensor:
    """The bits, or the empty tensor that stands for none."""
    return input.new_empty(0, dtype=torch.uint8) if bits is None else bits


def count_of_nothing(input: Tensor, mask: Tensor | None, count: Tensor) -> Tensor:
    """The count of an input without elements: there may be positions, of no channel."""
    if mask is None:
        return count.fill_(input.shape[0] * input.shape[2:].numel() / count.shape[0])
    return count.copy_(mask.reshape(count.shape[0], -1).sum(1, keepdim=True, dtype=DOUBLE))


_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def on_its_device(
    function: Callable[Concatenate[Tensor, _Rest], _Result],
) -> Callable[Concatenate[Tensor, _Rest], _Result]:
    """Make the device of the first argument the current one, for whose current stream kernels are launched."""
    inner: Callable[..., _Result] = function

    @wraps(function)
    def call(first: Tensor, *args: Any) -> _Result:
        device = first.get_device()
        if device < 0 or device == torch.cuda.current_device():
            return inner(first, *args)
        with torch.cuda.device(device):
            return inner(first, *args)

    return call  # type: ignore[return-value]
