"""Whether Python may look at a value, and what is to be done where it must not."""

import torch
from torch import Tensor

from batchnorm._errors import ModelError

__all__ = ["demand", "is_free"]


def is_free(value: Tensor) -> bool:
    """Whether Python may look at a value: no device is waited for, and no trace, transform or mode looks on."""
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(value) is Tensor
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def demand(holds: Tensor, text: str) -> None:
    """Raise ModelError where it does not hold: at once if that is free to see, else on the device."""
    if not is_free(holds):
        torch._assert_async(holds, text)
    elif not holds.item():
        raise ModelError(text)
