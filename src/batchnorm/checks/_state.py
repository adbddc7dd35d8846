"""The layers as they stand: of a model, or of a state dict alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm._walk import Spot, walk
from batchnorm.checks.evidence import Layer
from batchnorm.nn.batch_norm import Extras
from batchnorm.nn.frozen import Frozen

__all__ = ["layers_of_model", "layers_of_state", "norms_of"]

_SUFFIX = "running_mean"


def norms_of(model: nn.Module) -> tuple[tuple[str, _BatchNorm], ...]:
    """The batch norms of a model that know their shape, by their first name."""
    return tuple((spot.name, spot.module) for spot in walk(model) if _is_norm(spot.module))  # type: ignore[misc]


def _is_norm(module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm):
        return False
    return not (isinstance(module, LazyModuleMixin) and module.has_uninitialized_params())


def layers_of_model(model: nn.Module) -> tuple[Layer, ...]:
    """Every batch norm that knows its shape."""
    return tuple(_layer(spot) for spot in walk(model) if _is_norm(spot.module))


def _layer(spot: Spot) -> Layer:
    module: Any = spot.module
    tracked = module._buffers.get("num_batches_tracked")
    mean = module._buffers.get("running_mean")
    return Layer(
        name=spot.name,
        channels=module.num_features,
        kind=type(module).__name__,
        also=spot.names[1:],
        eps=module.eps,
        momentum=module.momentum,
        cumulative=module.momentum is None,
        training=module.training,
        tracks=module.track_running_stats,
        mean=_wide(mean),
        var=_wide(module._buffers.get("running_var")),
        kept_in=None if mean is None else mean.dtype,
        updates=None if tracked is None or tracked.is_meta else int(tracked),
        weight=_wide(module.weight),
        bias=_wide(module.bias),
        weight_trained=module.weight is not None and module.weight.requires_grad,
        bias_trained=module.bias is not None and module.bias.requires_grad,
        frozen=isinstance(module, Frozen),
        synchronized="Sync" in type(module).__name__,
        ours=isinstance(module, Extras),
        holds=_holds(module),
    )


def _holds(module: nn.Module) -> tuple[str, ...]:
    """What a converter that knows PyTorch's constructor alone would leave behind."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    found = [
        f"{name} ({type(child).__name__})"
        for name, child in children.items()
        if type(child) is not nn.Identity
    ]
    if isinstance(module, Extras) and module.activation is not None:
        found.append(f"activation={module.activation!r}")
    return tuple(found)


def layers_of_state(state: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The layers that a state dict has running statistics of."""
    found = []
    for key, mean in state.items():
        name, _, last = key.rpartition(".")
        var = state.get(f"{name}.running_var" if name else "running_var")
        if last != _SUFFIX or not isinstance(mean, Tensor) or not isinstance(var, Tensor):
            continue
        own = {each: state.get(f"{name}.{each}" if name else each) for each in _PARTS}
        tracked = own["num_batches_tracked"]
        found.append(
            Layer(
                name=name,
                channels=mean.numel(),
                mean=_wide(mean),
                var=_wide(var),
                kept_in=mean.dtype,
                updates=int(tracked) if isinstance(tracked, Tensor) and tracked.numel() == 1 else None,
                weight=_wide(own["weight"]),
                bias=_wide(own["bias"]),
            )
        )
    return tuple(found)


_PARTS = ("weight", "bias", "num_batches_tracked")


def _wide(values: Any) -> Tensor | None:
    """One number a channel in float64 on the CPU: a copy, so that nothing changes under the rules."""
    if not isinstance(values, Tensor) or values.is_meta or values.dim() != 1:
        return None
    return values.detach().to("cpu", torch.float64, copy=True)
