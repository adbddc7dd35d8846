"""Ghost batches: parts of the batch, each with statistics of its own."""

import torch

from batchnorm.ops import Policy

__all__ = ["Ghosts"]


class Ghosts(Policy):
    """Consecutive ghosts of `size` samples, or `splits` of them; the rest of the batch is a ghost as well.

    A rest of one value per channel has no variance, and joins the ghost before it. The running statistics take those
    of all ghosts merged, which are those of the batch.
    """

    def __init__(self, size: int | None, splits: int | None) -> None:
        self.size, self.splits = size, splits

    def parts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        """The full ghosts, and the short one if there is one."""
        samples, positions = shape[0], shape[2:].numel()
        # -(-a // b) rounds up: torch.chunk's rule.
        size = self.size or max(1, -(-samples // (self.splits or 1)))
        full, rest = samples // size, samples % size  # not divmod, which torch.compile cannot follow
        if full == 0:
            return ((samples, 1),)
        if rest * positions == 1:
            full, rest = full - 1, rest + size
        whole = ((full * size, full),) if full else ()
        return (*whole, (rest, 1)) if rest else whole

    def is_single(self, shape: torch.Size) -> bool:
        """Whether every ghost is one value: a rest of one would have joined another."""
        return shape[2:].numel() == 1 and any(samples == groups for samples, groups in self.parts(shape))
