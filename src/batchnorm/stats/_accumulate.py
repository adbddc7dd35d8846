"""`accumulate`: running statistics that move once for several micro-batches, as they would by the whole batch."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import ops
from batchnorm._errors import InputError, InputTypeError, ModelError, message
from batchnorm._walk import walk
from batchnorm.nn.batch_norm import Extras
from batchnorm.nn.conditional import ConditionalBatchNorm
from batchnorm.nn.frozen import Frozen
from batchnorm.nn.virtual import VirtualBatchNorm
from batchnorm.stats._held_layer import HeldLayer
from batchnorm.stats._moments import Moments
from batchnorm.stats._targets import bare, refuse_lazy

__all__ = ["Accumulation", "accumulate"]

_FORWARDS = (Extras.forward, ConditionalBatchNorm.forward, _BatchNorm.forward)


class Accumulation:
    """The block of `batchnorm.accumulate`; `pending` says how many micro-batches wait to be applied.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), batchnorm.BatchNorm1d(2))
        >>> with batchnorm.accumulate(net, 4) as group:
        ...     for x in torch.randn(6, 8, 2):
        ...         _ = net(x)
        ...     print(group)
        Accumulation(Sequential, 4: 2 pending)
    """

    def __init__(self, model: nn.Module, entry: nn.Module, layers: list[HeldLayer], k: int) -> None:
        self.pending = 0
        self._model, self._entry, self._layers, self._k = model, entry, layers, k
        self._open = self._running = False
        self._forwards = 0
        self._handles: list[Any] = []

    def __repr__(self) -> str:
        return f"Accumulation({type(self._model).__name__}, {self._k}: {self.pending} pending)"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model, or a pickle of it, takes no part: its hooks do nothing."""
        return (_no_part, ())

    def __enter__(self) -> Self:
        taken = [layer.name for layer in self._layers if id(layer.mean) in ops.HELD]
        if self._open or taken:
            raise ModelError(
                message(
                    f"accumulate: {taken[0] if taken else 'the model'}",
                    got="a block inside of another one",
                    expected="one at a time",
                    fix="End the outer block first.",
                )
            )
        self._open, self._running, self.pending, self._forwards = True, False, 0, 0
        for layer in self._layers:
            layer.begin(self._taker(layer))
            ops.HELD[id(layer.mean)] = layer.take
        for layer in self._layers:
            if layer.is_torch:
                self._handles += layer.watch()
        # Before and after the layers' own, should the model be a layer.
        self._handles += [
            self._entry.register_forward_pre_hook(self._forward_begins, prepend=True),
            self._entry.register_forward_hook(self._forward_ends),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._check_seen()
                self.apply()
        finally:
            for handle in self._handles:
                handle.remove()
            for layer in self._layers:
                ops.HELD.pop(id(layer.mean), None)
                layer.end()
            self._handles, self._open, self.pending = [], False, 0

    def apply(self) -> None:
        """Apply what has come together so far, and begin a new group: for a group that is shorter than the others.

        Raises:
            ModelError: the block has ended.
        """
        if not self._open:
            raise ModelError(
                message("accumulate", got="apply() outside of the block", expected="a call inside of it")
            )
        # All that is new is there before the first buffer is written, and they are written in one call, which no
        # Ctrl-C divides.
        buffers, values = [], []
        for layer in self._layers:
            for buffer, value in layer.moved():
                buffers.append(buffer)
                values.append(value)
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(buffers, values)
        self.pending = 0
        for layer in self._layers:
            layer.groups.clear()
            layer.note()

    def _taker(self, layer: HeldLayer) -> ops.Take:
        def take(mean: Tensor, var: Tensor, count: Tensor) -> None:
            if torch._C._are_functorch_transforms_active():
                raise ModelError(
                    message(
                        "accumulate",
                        got="a training call inside of a function transform (torch.func)",
                        expected="ordinary calls of the model",
                    )
                )
            if not self._running:
                raise ModelError(
                    message(
                        f"accumulate: {layer.name or 'the model'}",
                        got="a training call outside of the model's forward",
                        expected="calls of the model that accumulate was given",
                        fix="Pass the module that you call: its forwards are counted as micro-batches.",
                    )
                )
            layer.calls.append(Moments(count.reshape(()), mean[0], var[0] * count.reshape(())))

        return take

    # Python code with a memory: under torch.compile it is no part of a graph.
    @torch._disable_dynamo
    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is not self._entry or not self._open:
            return
        for layer in self._layers:
            layer.calls.clear()  # of a forward that ended in an exception
            layer.give_back()
            layer.check_between()
            layer.note()
        self._running = True
        self._forwards += 1

    @torch._disable_dynamo
    def _forward_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self._entry or not self._open:
            return
        if not self._running:
            raise ModelError(
                message("accumulate", got="a model that calls itself", expected="one forward at a time")
            )
        self._running = False
        for layer in self._layers:
            layer.check()
        if any([layer.commit() for layer in self._layers]):
            self.pending += 1
        if self.pending == self._k:
            self.apply()

    def _check_seen(self) -> None:
        """Whether training went by that no hook has seen."""
        for layer in self._layers:
            if self._forwards:
                layer.check_between()
            else:
                layer.check()


def _no_part() -> Accumulation:
    """What a copy of a model has in its hooks."""
    return Accumulation(nn.Identity(), nn.Identity(), [], 1)


def accumulate(model: nn.Module, k: int) -> Accumulation:
    r"""Gradient accumulation with one step of the running statistics for all of them: a `with` block for the loop.

    $$\mu = \sum_i \frac{n_i}{n}\,\mu_i, \qquad
    \sigma^2 = \frac{1}{n-1}\sum_i \left(m_{2,i} + n_i\,(\mu_i - \mu)^2\right), \qquad
    \mathrm{running} \leftarrow (1 - m)\,\mathrm{running} + m\,\mathrm{batch}$$

    Over k micro-batches a layer otherwise makes k steps of its momentum, each with the variance of a micro-batch, which
    lacks what lies between them. Inside the block the mean, m2 = Σ(x − mean)² and the count of every training call are
    kept in float64, and after the k-th training forward of the model the layer makes one step: with their exact mean
    and unbiased variance, and num_batches_tracked + 1. At the end of the block what is left, a last short group, is
    applied as the smaller batch that it is; `apply()` does so earlier, as at the end of an epoch.

    Each micro-batch is still normalized by its own statistics. Output and gradients are therefore those of ghost
    batches, not of the whole batch. The running statistics are exactly those of all that a layer saw: of the whole
    batch, in a layer with no other batch norm before it; behind one, of what its ghosts made of it. (No accumulation
    can change that, as the whole batch is not there when the first part of it is normalized.)

    A micro-batch is one forward of `model` in which a batch norm was trained. A layer that is called twice in a forward
    makes two steps, as it would with the whole batch. Forwards in eval mode, frozen layers and forwards that are
    computed again in a backward pass (activation checkpointing) leave all as it is, and a forward that ended in an
    exception does not count. Where the block itself ends in an exception, Ctrl-C included, the micro-batches that were
    not applied are dropped, and the running statistics are those of the last full group.

    It works inside DistributedDataParallel; with synchronized statistics of this package the counts are those of all
    processes. The layers of this package take part on their way, PyTorch's own read their input once more. Under
    `torch.compile` batch norms are left out of the graphs for the time of the block; with fullgraph=True the compiler
    raises its error. A replayed CUDA graph cannot take part: capture nothing that runs inside.

    Args:
        model: the module that the loop calls, in DistributedDataParallel or compiled if you like.
        k: micro-batches a step, at least 1.

    Returns:
        Accumulation: to be entered with `with`; its `pending` is how many micro-batches wait.

    Raises:
        InputError: k below 1.
        InputTypeError: `model` is no module, `k` no integer.
        ModelError: no batch norm has running statistics, one has a forward of its own or does not know its shape; the
            model is scripted, sharded or in DataParallel. Inside the block: another block, a layer that is trained
            outside of the model's forward, or buffers that something else has moved.

    Source:
        Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.

    Example:
        >>> import torch, batchnorm
        >>> net, x = batchnorm.BatchNorm1d(2), torch.randn(64, 2)
        >>> with batchnorm.accumulate(net, 4):
        ...     for part in x.split(16):
        ...         _ = net(part)
        >>> torch.allclose(net.running_var, 0.9 + 0.1 * x.var(0)), net.num_batches_tracked.item()
        (True, 1)
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise InputTypeError(message("accumulate: k", got=type(k).__name__, expected="an integer"))
    if k < 1:
        raise InputError(message("accumulate: k", got=k, expected="at least 1"))
    inner = bare(model, "accumulate")
    return Accumulation(inner, _entry(model), _layers(inner), k)


def _entry(model: nn.Module) -> nn.Module:
    """The module whose forwards are counted: the outermost, but inside of what sends buffers before its forward."""
    entry = inner = model
    while True:
        if isinstance(inner, nn.DataParallel):
            raise ModelError(
                message(
                    "accumulate",
                    got="DataParallel, whose forward runs on copies of the layers",
                    expected="the model itself, or DistributedDataParallel",
                )
            )
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            entry = inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod  # type: ignore[assignment]
        else:
            return entry


def _layers(model: nn.Module) -> list[HeldLayer]:
    found = []
    for spot in walk(model):
        module = spot.module
        if isinstance(module, _BatchNorm):
            refuse_lazy(spot, "accumulate")
        if isinstance(module, Frozen):
            continue
        mean, var = module._buffers.get("running_mean"), module._buffers.get("running_var")
        if isinstance(module, _BatchNorm) and mean is not None and var is not None and _is_plain(module):
            found.append(HeldLayer(spot.name, module, mean, var))
        elif isinstance(module, VirtualBatchNorm):
            continue  # its statistics are those of a reference batch, which training does not move
        elif module._buffers.get("num_batches_tracked") is not None:
            raise ModelError(
                message(
                    f"accumulate: {spot.name or 'the model'}",
                    got=f"a {type(module).__name__}, whose forward is its own",
                    expected="batch norms of this package, or PyTorch's BatchNorm1d, 2d and 3d",
                    fix="Convert it: batchnorm.convert(model, 'batchnorm')."
                    if isinstance(module, _BatchNorm)
                    else "It moves its statistics itself, with every micro-batch.",
                )
            )
    if not found:
        raise ModelError(
            message("accumulate: batch norms with running statistics", got="none", expected="at least one")
        )
    return found


def _is_plain(module: _BatchNorm) -> bool:
    """Whether its forward moves the running statistics as PyTorch's does, or tells us."""
    forward: Callable[..., Any] = type(module).forward
    return "forward" not in vars(module) and forward in _FORWARDS
