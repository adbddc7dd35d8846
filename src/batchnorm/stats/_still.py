"""A model that is run and afterwards is as it was: flags, buffers, hooks, whatever happens in between."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from batchnorm._files import Interrupts

__all__ = ["Still", "plainly"]


@contextmanager
def plainly(grad: bool) -> Iterator[None]:
    """Run models with or without gradients, and compiled code as it was written: it would not see new hooks."""
    with torch.set_grad_enabled(grad), torch.compiler.set_stance("force_eager"):
        yield


def _moved(buffer: Tensor, version: int, value: Tensor) -> bool:
    # PyTorch's batch norm moves its running statistics without counting that as a change of theirs.
    if buffer._version != version:
        return True
    return buffer.layout is torch.strided and not torch.equal(buffer, value)


class Still:
    """Every module in eval mode; at the end all is put back.

    The flags are set one by one: `model.eval()` may do more in a model with a `train` of its own.

    `put` gives a module another buffer for the time being; the one that it has is not touched. Of the `parameters`
    named, the values, the gradients and requires_grad are put back, too.
    """

    def __init__(self, model: nn.Module, parameters: tuple[nn.Parameter, ...] = ()) -> None:
        self.model = model
        self._parameters = [(p, p.requires_grad, p.grad, p._version, p.detach().clone()) for p in parameters]
        self._flags: list[tuple[nn.Module, bool]] = []
        self._tables: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._values: list[tuple[Tensor, int, Tensor]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        modules = list(self.model.modules())
        # A frozen layer says False, and remembers the mode that it was put in.
        self._flags = [(module, vars(module).get("training", module.training)) for module in modules]
        self._tables = [(module, dict(module._buffers)) for module in modules]
        for buffer in self.model.buffers():
            if not isinstance(buffer, UninitializedBuffer) and not buffer.is_inference():
                self._values.append((buffer, buffer._version, buffer.detach().clone()))
        for module in modules:
            module.training = False
        return self

    def put(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Let the module have `value` as its buffer `name` until the end."""
        module._buffers[name] = value

    def keep(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        """Take this hook away at the end."""
        self._hooks.append(handle)

    def rewind(self) -> None:
        """Give every buffer the value that it had, now, so that the next run starts from the same state.

        What `put` has lent is taken away, too.
        """
        for module, table in self._tables:
            module._buffers.clear()
            module._buffers.update(table)
        with torch.no_grad():
            for index, (buffer, version, value) in enumerate(self._values):
                if _moved(buffer, version, value):
                    buffer.copy_(value)
                    self._values[index] = buffer, buffer._version, value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with Interrupts() as interrupts:
            interrupts.hold()
            for handle in self._hooks:
                handle.remove()
            for module, training in self._flags:
                module.training = training
            for module, table in self._tables:
                module._buffers.clear()
                module._buffers.update(table)
            with torch.no_grad():
                for buffer, version, value in self._values:
                    if _moved(buffer, version, value):
                        buffer.copy_(value)
                for parameter, wanted, gradient, version, value in self._parameters:
                    if parameter._version != version:
                        parameter.copy_(value)
                    parameter.requires_grad_(wanted)
                    parameter.grad = gradient
        if interrupts.pressed and error is None:
            raise KeyboardInterrupt
