"""What is measured: one shape under one set of circumstances, and the bytes that it has to move."""

import math
from dataclasses import dataclass

from batchnorm.bench.suites import EPILOGUES

__all__ = ["MEMORY", "OPERATIONS", "SIZES", "Case", "counted_tensors"]

# In this order within a process; "forward" is that of training.
OPERATIONS = ("forward", "forward+backward", "inference")

# How the process gets its memory: glibc as it is, or told to keep what it has once got.
MEMORY = ("as-is", "raised")

SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Case:
    """One worker's task: a shape, its layout and type, what follows, and how the process gets its memory.

    `backend` runs our layer; None for the one that runs when nothing is asked for.
    """

    suite: str
    shape: tuple[int, ...]
    count: int
    epilogue: str
    layout: str
    dtype: str
    device: str
    threads: int | None
    memory: str
    backend: str | None = None

    @property
    def elements(self) -> int:
        """Values in the input."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of one tensor of the input's shape."""
        return self.elements * SIZES[self.dtype]

    @property
    def label(self) -> str:
        """The shape as a reader writes it: 16×64×56²."""
        batch, channels, *size = self.shape
        power = {1: "", 2: "²", 3: "³"}
        if len(size) > 1 and len(set(size)) == 1:
            return f"{batch}×{channels}×{size[0]}{power[len(size)]}"
        return "×".join(map(str, self.shape))

    def __str__(self) -> str:
        return f"{self.label} {self.epilogue}, {self.layout}, {self.dtype}, malloc {self.memory}"


def counted_tensors(operation: str, epilogue: str) -> int:
    """How many tensors of the input's size an operation has to read or write, each pass counted.

    Training needs the statistics before it can normalize, and the sums of the gradient before the gradient of the
    input, so both ways read their inputs twice:

        forward     read x, read x, write y
        backward    read x and dy, read x and dy, write dx
        inference   read x, write y

    A residual is read once on the way forward. Backward writes its gradient where an activation follows; without one
    that gradient is dy itself. An activation costs nothing by this count, nor does what backward must keep of it.

    Example:
        >>> counted_tensors("forward+backward", "relu"), counted_tensors("forward+backward", "residual+relu")
        (8, 10)
    """
    follows = EPILOGUES[epilogue]
    read = 1 if follows.residual else 0
    written = 1 if follows.residual and follows.activation else 0
    return {"forward": 3 + read, "forward+backward": 8 + read + written, "inference": 2 + read}[operation]
