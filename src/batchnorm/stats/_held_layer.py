"""A batch norm whose running statistics `accumulate` moves: what it saw, by call, and its buffers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import ops
from batchnorm._errors import ModelError, message
from batchnorm.nn.batch_norm import Extras
from batchnorm.stats._moments import Moments

__all__ = ["HeldLayer"]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class HeldLayer:
    """One batch norm of the block."""

    def __init__(self, name: str, module: _BatchNorm, mean: Tensor, var: Tensor) -> None:
        self.name, self.module, self.mean, self.var = name, module, mean, var
        self.calls: list[Moments] = []  # of the forward that is running
        # By the number of the call within a forward: a layer that is called twice there moves twice by a batch.
        self.groups: list[Moments] = []
        self.lent: dict[str, Tensor | None] = {}
        self.versions = (0, 0)
        self.counter: Tensor | None = None
        self.take: ops.Take = _nowhere

    def __reduce__(self) -> tuple[Any, ...]:
        """In a copy of the layer the hooks do nothing."""
        return (_none, ())

    def begin(self, take: ops.Take) -> None:
        """The block begins."""
        self.take = take
        self.forget()
        self.note()

    def end(self) -> None:
        """The block ends."""
        self.give_back()
        self.forget()
        self.take = _nowhere

    def forget(self) -> None:
        """Drop all that was seen."""
        self.calls.clear()
        self.groups.clear()

    def _versions(self) -> tuple[int, int]:
        mean, var = self.mean, self.var
        # Tensors of inference mode count no versions.
        return (0, 0) if mean.is_inference() or var.is_inference() else (mean._version, var._version)

    @property
    def is_torch(self) -> bool:
        """Whether hooks do what a layer of this package does itself."""
        return not isinstance(self.module, Extras)

    def note(self) -> None:
        """Remember how often the buffers have been written to."""
        self.versions = self._versions()
        counter = self.module._buffers["num_batches_tracked"]
        self.counter = counter.clone() if self.is_torch and counter is not None else None

    def check_between(self) -> None:
        """Whether no training call has gone by between two forwards: by a graph without the hooks, say.

        DistributedDataParallel writes to the buffers there, which leaves the counter as it was.
        """
        counter = self.module._buffers["num_batches_tracked"]
        if self.counter is None or counter is None or self._versions() == self.versions:
            return
        if not torch.equal(counter, self.counter):
            self.check()

    def check(self) -> None:
        """Whether the buffers are the same and nobody has written to them."""
        own = self.module._buffers
        if own["running_mean"] is not self.mean or own["running_var"] is not self.var:
            got, fix = "other buffers than at the beginning", "Move and load the model before the block."
        elif self._versions() != self.versions:
            got = "running statistics that were moved by something else"
            fix = "Convert PyTorch's layers (batchnorm.convert(model, 'batchnorm')), or compile in the block."
        else:
            return
        raise ModelError(
            message(
                f"accumulate: {self.name or 'the model'}",
                got=got,
                expected="buffers that nothing but the block moves",
                fix=fix,
            )
        )

    def commit(self) -> bool:
        """Take the calls of a forward into their groups; whether there were any."""
        for place, moments in enumerate(self.calls):
            if place < len(self.groups):
                self.groups[place] = self.groups[place].merged(moments)
            else:
                self.groups.append(moments)
        called = bool(self.calls)
        self.calls.clear()
        return called

    def moved(self) -> list[tuple[Tensor, Tensor]]:
        """The buffers, each with what it becomes."""
        if not self.groups:
            return []
        module = self.module
        mean, var, counter = self.mean, self.var, module._buffers.get("num_batches_tracked")
        skip = isinstance(module, Extras) and module.nonfinite == "skip"
        for group in self.groups:
            counter = None if counter is None else counter + 1
            running = ops.Running(mean, var, counter, module.momentum, skip)
            mean, var = ops.moved(
                running, group.mean[None], group.biased_var[None], group.count.reshape(1, 1)
            )
        result = [(self.mean, mean), (self.var, var)]
        own = module._buffers.get("num_batches_tracked")
        return result if own is None or counter is None else [*result, (own, counter)]

    def watch(self) -> list[Any]:
        """Hooks for a layer of PyTorch's: its input is read once more, and it is lent buffers to move."""
        return [
            self.module.register_forward_pre_hook(self.lend, with_kwargs=True),
            self.module.register_forward_hook(self.back, always_call=True),
        ]

    @torch._disable_dynamo
    def lend(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer's forward."""
        input = args[0] if args else kwargs.get("input")
        # A graph compiled in the block may call its hooks later, too.
        if module is not self.module or self.take is _nowhere:
            return
        if not (module.training and self.module.track_running_stats):
            return
        if not (isinstance(input, Tensor) and input.dim() > 1 and input.is_floating_point()):
            return  # which the layer refuses
        if not ops.is_recomputation():
            mean, m2, count = ops.moments(input)
            self.take(mean, m2 / torch.where(count > 0, count, 1.0), count)
        for name in _BUFFERS:
            buffer = self.lent[name] = module._buffers[name]
            module._buffers[name] = None if buffer is None else buffer.clone()

    @torch._disable_dynamo
    def back(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it, or after its failure."""
        if module is self.module:
            self.give_back()

    def give_back(self) -> None:
        """Put the layer's own buffers back."""
        for name, buffer in self.lent.items():
            self.module._buffers[name] = buffer
        self.lent.clear()


def _none() -> "HeldLayer":
    nothing = torch.empty(0)
    return HeldLayer("", nn.BatchNorm1d(0), nothing, nothing)


def _nowhere(mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Where statistics go outside of a block."""
