"""`parameter_groups`: weight decay where it belongs."""

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from batchnorm._errors import InputError, InputTypeError, ModelError, message
from batchnorm._walk import walk
from batchnorm.nn import WhitenedBatchNorm

__all__ = ["parameter_groups"]

_NORMS = (_NormBase, WhitenedBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of a model in two groups for an optimizer: those that decay, and those that do not.

    Without weight decay stay

    - γ and β of every batch norm, PyTorch's or this package's, and of the other normalization layers (layer, group,
      instance, RMS). Before a normalization a weight's size means nothing, so its decay only raises the effective
      learning rate; γ itself is the scale of what follows, and pulling it to 0 shrinks the signal.
    - biases of all layers: one number a channel has next to nothing to overfit with, and a decay would pull the output
      towards 0 for no reason.

    Every parameter is in exactly one group, once, also one that is shared or does not require a gradient; a parameter
    that a normalization layer or a bias shares with something else does not decay.

    Args:
        model: any module whose parameters have their shapes.
        weight_decay: of the first group; the optimizer's unit.

    Returns:
        `[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]`, in the order of
        `model.parameters()`. A group without parameters is left out.

    Raises:
        InputError: a negative or infinite `weight_decay`.
        InputTypeError: `model` is no module, or `weight_decay` no number.
        ModelError: a lazy parameter without a shape, or no parameters.

    Source:
        van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, arXiv:1706.05350; He et al., Bag
        of Tricks for Image Classification, 2018, arXiv:1812.01187, section 3.1.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> groups = batchnorm.parameter_groups(net, 5e-4)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.0005), (3, 0.0)]
        >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            message(
                "model",
                got=type(model).__name__,
                expected="a torch.nn.Module",
                fix="Give the model, not its parameters: what a parameter belongs to decides.",
            )
        )
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, int | float):
        raise InputTypeError(message("weight_decay", got=type(weight_decay).__name__, expected="a number"))
    if not 0 <= weight_decay < math.inf:
        raise InputError(message("weight_decay", got=weight_decay, expected="a finite number ≥ 0"))
    spared: set[int] = set()
    for spot in walk(model):
        own: dict[str, Any] = spot.module._parameters
        for name, parameter in own.items():
            if parameter is not None and is_lazy(parameter):
                where = f"{spot.name}.{name}" if spot.name else name
                raise ModelError(
                    message(
                        f"parameter {where}",
                        got="no shape yet",
                        expected="a model that has run once",
                        fix="Run one batch through it first.",
                    )
                )
            if parameter is not None and (name == "bias" or isinstance(spot.module, _NORMS)):
                spared.add(id(parameter))
    parameters = list(model.parameters())
    if not parameters:
        raise ModelError(message("model", got="no parameters", expected="at least one"))
    decaying = {
        "params": [p for p in parameters if id(p) not in spared],
        "weight_decay": float(weight_decay),
    }
    others = {"params": [p for p in parameters if id(p) in spared], "weight_decay": 0.0}
    return [group for group in (decaying, others) if group["params"]]
