"""The model's own input, cell by cell: no weight stands before it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from batchnorm import ops
from batchnorm.checks.evidence import Call
from batchnorm.stats._batches import samples_in

__all__ = ["cells", "samples_of", "shape_of"]

# Pictures are cut into so many cells a side, and of other input so many features are taken.
_CELLS = 8
_FEATURES = 1024


def samples_of(args: Any, kwargs: Any) -> int:
    """How many samples a call of the model gets; 0 where that cannot be told."""
    size = samples_in(args)
    return (samples_in(kwargs) if size is None else size) or 0


def shape_of(args: Any, kwargs: Any) -> tuple[int, ...]:
    """What the cells of two calls must have in common to be compared: a sample's shape, of pictures the channels."""
    x = _first(args, kwargs)
    return () if x is None else tuple(x.shape[1:2] if x.dim() == 4 else x.shape[1:])


def cells(args: Any, kwargs: Any) -> Call | None:
    """The moments of the model's first floating-point input over the samples, in every cell or feature of it.

    They stay on their device.
    """
    samples = samples_of(args, kwargs)
    x = _first(args, kwargs)
    if x is None or samples < 2 or x.shape[0] != samples or not x.numel():
        return None
    if x.dim() == 4:
        x = F.adaptive_avg_pool2d(x, (min(_CELLS, x.shape[2]), min(_CELLS, x.shape[3])))
    x = x.flatten(1)
    x = x[:, :: -(-x.shape[1] // _FEATURES)].to(torch.float32 if x.device.type == "mps" else torch.float64)
    mean, m2, _ = ops.moments(x)
    var = m2[0] / samples
    return Call(0, 0, samples, 1, mean[0], var, var * samples / (samples - 1))


def _first(args: Any, kwargs: Any) -> Tensor | None:
    leaves = (each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
    return next((each.detach() for each in leaves if each.is_floating_point() and each.dim() > 1), None)
