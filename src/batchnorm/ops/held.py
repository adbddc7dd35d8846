"""Updates of running statistics that somebody takes instead of the buffers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.ops.aten import Running

__all__ = ["HELD", "Held", "Take", "held", "moved", "uncompiled"]

# Given mean, biased variance (1, C) and count (1, 1) of a training call, in float64.
Take = Callable[[Tensor, Tensor, Tensor], None]

# The running means whose updates are taken, by their id: empty but inside of a block that takes them.
HELD: dict[int, Take] = {}


class Held(Running):
    """Running statistics that stay: without momentum and counter, as all it wants are the batch's."""

    take: Take

    def update(self, kernels: Any, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Hand the batch's statistics over."""
        self.take(mean, var, count)

    def lend(self) -> Running:
        """For kernels that move the buffers themselves: some that a momentum of 1 sets to this batch's statistics."""
        wide = torch.float32 if self.mean.device.type == "mps" else torch.float64
        mean, var = (torch.zeros_like(buffer, dtype=wide) for buffer in (self.mean, self.var))
        return Running(mean, var, None, 1.0, False)

    def take_back(self, lent: Running, count: int) -> None:
        """Hand over what the lent buffers hold of a batch with so many values a channel: mean and unbiased variance."""
        mean, var = lent.mean[None], lent.var[None] * ((count - 1) / count if count else 1.0)
        self.take(mean, var, mean.new_full((1, 1), count))


# Not torch.compiler.disable, which imports the compiler at once. Its absence from a graph is what fullgraph=True tells.
@torch._disable_dynamo
def uncompiled(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """A call that torch.compile leaves out of its graph: what takes an update is Python code with a memory."""
    return function(*args)


def held(running: Running) -> Running:
    """The same running statistics, or what takes their update."""
    take = HELD.get(id(running.mean))
    if take is None:
        return running
    result = Held(running.mean, running.var, None, None, False)
    result.take = take
    return result


def moved(running: Running, mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """What running mean and variance become by a batch; nothing is written. The counter has been moved already."""
    after = running.mean.clone(), running.var.clone()
    with torch.no_grad():
        reference.update_running_(*after, running.num_batches_tracked, mean, var, count, *running[3:])
    return after
