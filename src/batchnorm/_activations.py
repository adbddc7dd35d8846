"""The activations that can follow batch norm: what they compute and what their gradient needs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm._errors import InputError, message

__all__ = ["ACTIVATIONS", "Activation", "activation_named"]


@dataclass(frozen=True)
class Activation:
    """One activation y = act(z) and its gradient g = dy·act′(z), with PyTorch's values at the kinks.

    `on(z)` is given where act′ takes only two values, 1 (where z is NaN, too) and `slope` (0 for
    relu): then one bit an element is all that backward must keep.
    """

    name: str
    forward: Callable[[Tensor, float], Tensor]
    backward: Callable[[Tensor, Tensor, float], Tensor]
    on: Callable[[Tensor], Tensor] | None = None
    leaks: bool = False

    def backward_from_bits(self, dy: Tensor, on: Tensor, slope: float) -> Tensor:
        """g = dy where the bit is set, dy·slope (leaky) or 0 elsewhere."""
        return torch.where(on, dy, dy * slope if self.leaks else torch.zeros_like(dy))


_ops = torch.ops.aten

ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation(
            "relu",
            lambda z, slope: F.relu(z),
            lambda dy, z, slope: _ops.threshold_backward(dy, z, 0),
            on=lambda z: ~(z <= 0),
        ),
        Activation(
            "relu6",
            lambda z, slope: F.relu6(z),
            lambda dy, z, slope: _ops.hardtanh_backward(dy, z, 0.0, 6.0),
            on=lambda z: ~((z <= 0) | (z >= 6)),
        ),
        Activation(
            "leaky_relu",
            lambda z, slope: F.leaky_relu(z, slope),
            lambda dy, z, slope: _ops.leaky_relu_backward(dy, z, slope, False),
            on=lambda z: z > 0,
            leaks=True,
        ),
        Activation(
            "silu",
            lambda z, slope: F.silu(z),
            lambda dy, z, slope: _ops.silu_backward(dy, z),
        ),
        Activation(
            "hardswish",
            lambda z, slope: F.hardswish(z),
            lambda dy, z, slope: _ops.hardswish_backward(dy, z),
        ),
        Activation(
            "gelu",
            lambda z, slope: F.gelu(z),
            lambda dy, z, slope: _ops.gelu_backward(dy, z),
        ),
    )
}


def activation_named(name: str | None) -> Activation | None:
    """The activation of that name, None for None."""
    if name is None:
        return None
    found = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if found is None:
        raise InputError(
            message(
                "activation",
                got=repr(name),
                expected=f"None or one of {', '.join(sorted(ACTIVATIONS))}",
                fix="Put any other activation behind the layer.",
            )
        )
    return found
