"""What torch.jit.script is told by modules that it cannot compile."""

from typing import NoReturn

from batchnorm._errors import ModelError, message

__all__ = ["Unscriptable"]


class Unscriptable:
    """A mixin for modules whose forward TorchScript cannot compile: a clear error instead of the compiler's."""

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks every module for what to compile in its place: the moment to say that nothing is."""
        raise ModelError(
            message(
                "torch.jit.script",
                got=f"a model with a {type(self).__name__} of batchnorm",
                expected="layers whose forward TorchScript can compile",
                fix="Record a call in eval mode: torch.jit.trace(model.eval(), input), or "
                "torch.export.export(model.eval(), (input,)).",
            )
        )
