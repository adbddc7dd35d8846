"""How a kernel is started, and the memory that a reduction needs beside its results.

Two doors: Triton's own, which looks at every argument, compiles, and costs some 40 µs a launch; and a direct one for a
kernel that it has compiled before, with a fifth of that (measured on an H100 machine, host time). The direct door
needs what Triton compiled for: the same dtypes, and addresses that are multiples of 16.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

__all__ = ["Launch", "Scratch", "launched", "scratch_for"]

_Maker = TypeVar("_Maker", bound=Callable[..., "Launch"])


def launched(make: _Maker) -> _Maker:
    """Keep the Launch of every shape and option: looking it up costs 1 µs, making it some 10."""
    return lru_cache(maxsize=4096)(make)  # type: ignore[return-value]


class Launch:
    """One kernel for one shape: its grid, its numbers and constants, and, once it is compiled, its code.

    The kernel's parameters are pointers, floats, `numbers` and `constants`, in this order.
    """

    __slots__ = ("_kept", "constants", "grid", "kernel", "numbers", "options", "warps")

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
        warps: int,
        registers: int | None = None,
    ) -> None:
        self.kernel, self.grid, self.warps = kernel, (programs, 1, 1), warps
        self.numbers, self.constants = numbers, constants
        # By name, because Triton 3.9 warns that the default of the first will change. AMD's compiler has no limit.
        self.options: dict[str, Any] = {"enable_fp_fusion": True}
        if registers is not None and torch.version.hip is None:
            self.options["maxnreg"] = registers
        # (device, dtypes) to (what runs it, its handle, its metadata)
        self._kept: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}

    def __call__(self, tensors: tuple[Tensor | None, ...], floats: tuple[float, ...] = ()) -> None:
        """Start it on the current stream of the first tensor's device, which must be the current one."""
        device = tensors[0].get_device()  # type: ignore[union-attr]
        if device < 0 or _watched():
            self._ask_triton(tensors, floats)
            return
        addresses, seen = [], 0
        for tensor in tensors:
            address = 0 if tensor is None else tensor.data_ptr()
            addresses.append(address)
            seen |= address
        if seen % 16:
            self._ask_triton(tensors, floats)
            return
        key = (device, *[None if tensor is None else tensor.dtype for tensor in tensors])
        kept = self._kept.get(key)
        if kept is None:
            compiled = self._ask_triton(tensors, floats)
            self._kept[key] = (compiled.run, compiled.function, compiled.packed_metadata)
            return
        run, function, metadata = kept
        run(
            *self.grid, torch._C._cuda_getCurrentRawStream(device), function, metadata, None, None, None,
            *addresses, *floats, *self.numbers, *self.constants,
        )  # fmt: skip

    def _ask_triton(self, tensors: tuple[Tensor | None, ...], floats: tuple[float, ...]) -> Any:
        arguments = (*tensors, *floats, *self.numbers, *self.constants)
        return self.kernel[self.grid](*arguments, num_warps=self.warps, **self.options)


def _watched() -> bool:
    """Whether a profiler wants to see every launch; the direct door does not tell it."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


class Scratch(NamedTuple):
    """Memory of a reduction: partial results, and for each block of channels a counter that is 0 before and after."""

    partials: Tensor | None
    counters: Tensor | None


# Counters of a device: a page of zeros, cut into pieces that are each used by one stream, or one captured call, alone.
_PAGE = 1 << 18


class _Counters:
    """Zeros of one device, handed out once: every kernel leaves the counters it used at 0 again."""

    def __init__(self, device: torch.device) -> None:
        self.page = torch.zeros(_PAGE, dtype=torch.int32, device=device)
        self.used = 0
        self.of_stream: dict[int, Tensor] = {}
        # Once a device: another stream may be the first to count.
        torch.cuda.current_stream(device).synchronize()

    def cut(self, count: int) -> Tensor | None:
        if self.used + count > _PAGE:
            return None
        self.used += count
        return self.page[self.used - count : self.used]

    def on(self, stream: int, count: int) -> Tensor | None:
        found = self.of_stream.get(stream)
        if found is None or found.numel() < count:
            found = self.cut(max(count, 256))
            if found is not None:
                self.of_stream[stream] = found
        return found


_counters: dict[int, _Counters] = {}


def _kept_counters(device: torch.device, count: int) -> Tensor | None:
    """Counters that need no zeroing; None where there are none left, or none yet and a graph is being captured.

    A captured call gets counters of its own: its graph may run beside other work of the stream that it was captured on.
    """
    index = device.index
    known = _counters.get(index)
    capturing = torch.cuda.is_current_stream_capturing()
    if known is None:
        if capturing:
            return None
        known = _counters[index] = _Counters(device)
    return known.cut(count) if capturing else known.on(torch._C._cuda_getCurrentRawStream(index), count)


def scratch_for(x: Tensor, partials: int, counters: int, wide: bool, keep: bool) -> Scratch:
    """Room for `partials` numbers and `counters` counters; none where one program does all of a block of channels.

    With `keep` the counters may be those of the device. Without, they are made in the call, as they must be under a
    compiler, which wants to know of all memory: 2 µs more on the device.
    """
    if not partials:
        return Scratch(None, None)
    dtype = torch.float64 if wide else torch.float32
    room = torch.empty(partials, dtype=dtype, device=x.device)
    found = _kept_counters(x.device, counters) if keep and x.is_cuda else None
    if found is None:
        found = torch.zeros(counters, dtype=torch.int32, device=x.device)
    return Scratch(room, found)
