"""A layer by itself: a copy without hooks, and random input of the kind that it gets."""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.checks.evidence import Seen
from batchnorm.nn.families import family_of

__all__ = ["copy_of", "input_for", "is_plain"]

# Those whose forward takes an input and no more.
_PLAIN = ("torch", "batchnorm", "ghost", "renorm")


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is of a class that can be run by itself; one with another's forward need not be."""
    found = family_of(type(layer))
    return found is not None and found[0].name in _PLAIN


def copy_of(layer: _BatchNorm) -> _BatchNorm:
    """The layer with tensors of its own, in training mode, without its hooks and what they hold."""
    twin = copy.copy(layer)  # hooks are bound to whatever registered them: they must not be copied, nor run
    for name, value in vars(layer).items():
        if isinstance(value, OrderedDict) and "hooks" in name:
            twin.__dict__[name] = OrderedDict()
    twin._parameters = {
        name: None if value is None else nn.Parameter(value.detach().clone())
        for name, value in layer._parameters.items()
    }
    twin._buffers = {
        name: None if value is None else value.detach().clone() for name, value in layer._buffers.items()
    }
    twin.training = True
    return twin


def input_for(layer: _BatchNorm, seen: Seen, most: int) -> Tensor | None:
    """Random numbers of the first input's shape, dtype, layout, means and variances, of about `most` elements.

    Means are kept within three σ, so that nothing depends on how the data is shifted. None if there are no numbers to
    draw from.
    """
    call, device = seen.train[0], next(layer.parameters(), next(layer.buffers(), None))
    if seen.dtype is None or not (call.mean.isfinite() & call.var.isfinite()).all():
        return None
    shape = list(seen.shape)
    for axis in range(2, len(shape)):
        per_row = torch.Size(shape[1:]).numel()
        if 2 * per_row > most:
            shape[axis] = max(1, shape[axis] * most // (2 * per_row))
    shape[0] = max(2, min(shape[0], most // torch.Size(shape[1:]).numel()))
    sigma = call.var.sqrt().clamp(min=1e-30)
    mean = call.mean.clamp(-3 * sigma, 3 * sigma)
    channels = (1, -1, *[1] * (len(shape) - 2))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    x = (x * sigma.view(channels) + mean.view(channels)).to(seen.dtype)
    if seen.channels_last:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x if device is None else x.to(device.device)
