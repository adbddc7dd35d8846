"""How a kernel is started, and the memory that a reduction needs beside its results.

Two doors: Triton's own, which looks at every argument and compiles, and a direct one for what it has compiled before:
a layer with two launches a direction takes 250 µs of the host through the former and 172 through the latter, forward
and backward; PyTorch's layer with its ReLU takes 186 (measured on an H100 machine). The direct door needs what Triton
compiled for: the same dtypes, and the same addresses that are multiples of 16.
"""

from collections.abc import Callable
from functools import lru_cache, reduce
from operator import or_
from threading import Lock
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

    # Whether the direct door fits the installed Triton.
    direct = True

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
        # (device, which addresses are multiples of 16, None for all, dtypes) to (what runs it, handle, metadata)
        self._kept: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}

    def __call__(self, tensors: tuple[Tensor | None, ...], floats: tuple[float, ...] = ()) -> None:
        """Start it on the current stream of the first tensor's device, which must be the current one."""
        device = tensors[0].get_device()  # type: ignore[union-attr]
        if device < 0 or not Launch.direct or _watched():
            self._ask_triton(tensors, floats)
            return
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        odd = tuple(address % 16 == 0 for address in addresses) if reduce(or_, addresses) % 16 else None
        key = (device, odd, *[None if tensor is None else tensor.dtype for tensor in tensors])
        kept = self._kept.get(key)
        if kept is None:
            compiled = self._ask_triton(tensors, floats)
            self._kept[key] = (compiled.run, compiled.function, compiled.packed_metadata)
            return
        run, function, metadata = kept
        stream = torch._C._cuda_getCurrentRawStream(device)
        try:
            run(
                *self.grid, stream, function, metadata, None, None, None,
                *addresses, *floats, *self.numbers, *self.constants,
            )  # fmt: skip
        except TypeError:  # another version of Triton takes other arguments: nothing was started
            Launch.direct = False
            self._ask_triton(tensors, floats)

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
# Bytes of partial results that a stream keeps for its next reduction; the layers of ResNet-50 need less than 1.2 MB.
_KEPT = 4 << 20


class _Stream:
    """What the reductions of a stream, one after the other, use again: an allocation less for each."""

    def __init__(self) -> None:
        self.counters: Tensor | None = None
        self.partials: dict[torch.dtype, Tensor] = {}

    def room(self, x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        found = self.partials.get(dtype)
        if found is None or found.numel() < count:
            found = torch.empty(count, dtype=dtype, device=x.device)
            if found.nbytes <= _KEPT:
                self.partials[dtype] = found
        return found


class _Counters:
    """A page of zeros, handed out once: every kernel leaves the counters it used at 0 again."""

    def __init__(self, page: Tensor) -> None:
        self.page = page
        self.used = 0
        self.streams: dict[int, _Stream] = {}
        # Backward runs in threads of autograd's own.
        self.lock = Lock()

    def cut(self, count: int) -> Tensor | None:
        """Counters that nobody else gets, at a multiple of 16 bytes; None when the page is used up."""
        with self.lock:
            begin = self.used
            if begin + count > self.page.numel():
                return None
            self.used = begin + -(-count // 4) * 4
        return self.page[begin : begin + count]

    def on(self, number: int, count: int) -> tuple[_Stream, Tensor | None]:
        """A stream's memory and its counters."""
        stream = self.streams.setdefault(number, _Stream())
        found = stream.counters
        if found is None or found.numel() < count:
            found = self.cut(max(count, 256))
            if found is not None:
                stream.counters = found
        return stream, found


_counters: dict[int, _Counters] = {}


def _kept(x: Tensor, partials: int, counters: int, dtype: torch.dtype) -> Scratch | None:
    """Memory without an allocation and counters that need no zeroing; None where there are none left, or none yet and
    a graph is being captured.

    A captured call gets counters of its own: its graph may run beside other work of the stream that it was captured on.
    """
    index = x.get_device()
    known = _counters.get(index)
    capturing = torch.cuda.is_current_stream_capturing()
    if known is None:
        if capturing:
            return None
        known = _counters[index] = _Counters(torch.zeros(_PAGE, dtype=torch.int32, device=x.device))
        # Once a device: another stream may be the first to count.
        torch.cuda.current_stream(x.device).synchronize()
    if capturing:
        found = known.cut(counters)
        return None if found is None else Scratch(torch.empty(partials, dtype=dtype, device=x.device), found)
    stream, found = known.on(torch._C._cuda_getCurrentRawStream(index), counters)
    return None if found is None else Scratch(stream.room(x, partials, dtype), found)


def scratch_for(x: Tensor, partials: int, counters: int, wide: bool, keep: bool) -> Scratch:
    """Room for `partials` numbers and `counters` counters; none where one program does all of a block of channels.

    With `keep` both may be those of the stream. Without, they are made in the call, as they must be under a compiler,
    which wants to know of all memory: 2 µs more on the device.
    """
    if not partials:
        return Scratch(None, None)
    dtype = torch.float64 if wide else torch.float32
    found = _kept(x, partials, counters, dtype) if keep and x.is_cuda else None
    if found is not None:
        return found
    room = torch.empty(partials, dtype=dtype, device=x.device)
    return Scratch(room, torch.zeros(counters, dtype=torch.int32, device=x.device))
