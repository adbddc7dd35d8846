"""Compile the Triton kernels for a GPU that need not be there: `python tests/triton_compile.py cuda 90`.

A launch is not started but compiled, with the types, values and alignments of its arguments, which are tensors without
memory. It prints a line for each kernel.
"""

import os
import sys
from typing import Any

if __name__ == "__main__":  # the collection of doctests imports this file, too
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchnorm.kernels.triton import launch, launching, tensors
from batchnorm.kernels.triton.plan import Machine
from batchnorm.ops.aten import Running

META = torch.device("meta")
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
DIVISIBLE = [["tt.divisibility", 16]]


def compiles(target: GPUTarget) -> Any:
    """What takes the place of a launch."""
    seen = set()

    def call(self: Any, pointers: Any, floats: Any = ()) -> None:
        signature, constants, attributes = {}, {}, {}
        arguments = (*pointers, *floats, *self.numbers, *self.constants)
        for at, (parameter, value) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if parameter.is_constexpr or value is None or (whole and value == 1):
                signature[parameter.name], constants[at,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], attributes[at,] = "*" + TYPES[value.dtype], DIVISIBLE
            elif whole:
                signature[parameter.name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[at,] = DIVISIBLE
            else:
                signature[parameter.name] = "fp32"
        name = self.kernel.fn.__name__
        key = (name, str(signature), str(constants), str(attributes))
        if key in seen:
            return
        seen.add(key)
        options = {"num_warps": self.warps, **self.options}
        if target.backend != "cuda":
            options.pop("maxnreg", None)
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=options)
        print(name, compiled.metadata.num_warps, compiled.metadata.shared, flush=True)

    return call


def step(
    shape: tuple[int, ...], last: bool, dtype: torch.dtype, activation: str | None, residual: bool,
    mask: torch.dtype | None = None, groups: int = 1,
) -> None:  # fmt: skip
    """Every kernel once."""

    def empty(*sizes: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device=META)

    x = empty(shape[0], *shape[2:], shape[1], of=dtype).movedim(-1, 1) if last else empty(*shape, of=dtype)
    r = torch.empty_like(x) if residual else None
    dy, channels = torch.empty_like(x), shape[1]
    weight, bias = empty(channels), empty(channels)
    rule = (1e-5, activation, 0.1)
    if mask is None and groups == 1:
        running = Running(empty(channels), empty(channels), empty(of=torch.int64), 0.1, False)
        _, bits, statistics = launch.train_forward(x, weight, bias, r, running, *rule)
        kept = bits if activation in tensors.WITH_BITS else r
        launch.train_backward(dy, x, statistics, weight, bias, kept, residual, *rule)
        launch.eval_forward(x, empty(channels), empty(channels), weight, bias, r, *rule)
        return
    weights = None if mask is None else empty(shape[0], *shape[2:], of=mask)
    _, mean, var, count, saved = launch.forward(x, weight, bias, r, weights, groups, *rule)
    kept = saved if activation in tensors.WITH_BITS else r
    tail = (weight, bias, kept, residual, weights)
    launch.backward(dy, x, mean, var, count, *tail, *rule)
    launch.moments(x, weights, groups)
    sums = launch.grad_sums(dy, x, mean, var, *tail, *rule[1:])
    launch.grad_input(dy, x, mean, var, *tail, *sums, count, *rule[1:])
    buffers = (empty(channels), empty(channels), empty(of=torch.int64))
    launch.update_running_(*buffers, mean[:1], var[:1], count[:1], None, True)


def main() -> None:
    """Compile for the architecture of the command line."""
    backend, architecture = sys.argv[1:3]
    on_cuda = backend == "cuda"
    target = GPUTarget(backend, int(architecture) if on_cuda else architecture, 32 if on_cuda else 64)
    tensors._machines[META] = Machine(132)
    launching.Launch.__call__ = compiles(target)  # type: ignore[method-assign]
    half = torch.bfloat16 if architecture != "75" else torch.float16
    step((128, 256, 56, 56), True, half, "relu", True)
    step((128, 512, 7, 7), False, half, None, False)
    if "all" in sys.argv:
        step((128, 256, 14, 14), False, torch.float32, "relu6", True)
        step((64, 3), True, torch.float32, "silu", False)
        step((8, 3, 50, 50), False, torch.float64, "hardswish", True)
        step((8, 24, 10, 10), True, torch.float16, "leaky_relu", True, torch.uint8)
        step((8, 24, 10, 10), False, half, "gelu", True, torch.float32, 4)
        # One channel, one row, and numbers that 32 bits do not hold.
        step((4, 1, 50), False, half, "relu", True)
        step((2, 40), True, half, None, False)
        step((2**31 + 16, 8), True, half, "relu", True)
        step((1, 2, 2**31 + 16), False, half, None, False)


if __name__ == "__main__":
    main()
