"""The layers as they stand: of a model, or of a state dict alone."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm._walk import Spot, walk
from batchnorm.checks._host import on_host
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
    spots = [spot for spot in walk(model) if _is_norm(spot.module)]
    wanted = [(place, key, part) for place, spot in enumerate(spots) for key, part in _parts_of(spot.module)]
    copies = on_host([part for _, _, part in wanted])
    numbers: list[dict[str, Tensor]] = [{} for _ in spots]
    for (place, key, _), copy in zip(wanted, copies, strict=True):
        numbers[place][key] = copy
    return tuple(_layer(spot, own) for spot, own in zip(spots, numbers, strict=True))


def _parts_of(module: Any) -> list[tuple[str, Tensor]]:
    """What a layer keeps a number a channel of, and its counter."""
    parts = [(key, module._buffers.get(key)) for key in ("running_mean", "running_var")]
    parts += [(key, getattr(module, key)) for key in ("weight", "bias")]
    found = [(key, part) for key, part in parts if _is_wide(part)]
    tracked = module._buffers.get("num_batches_tracked")
    return found if tracked is None or tracked.is_meta else [*found, ("num_batches_tracked", tracked)]


def _layer(spot: Spot, own: Mapping[str, Tensor]) -> Layer:
    module: Any = spot.module
    tracked = own.get("num_batches_tracked")
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
        mean=own.get("running_mean"),
        var=own.get("running_var"),
        kept_in=None if mean is None else mean.dtype,
        updates=None if tracked is None else int(tracked),
        weight=own.get("weight"),
        bias=own.get("bias"),
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
    return values.detach().to("cpu", torch.float64, copy=True) if _is_wide(values) else None


def _is_wide(values: Any) -> TypeGuard[Tensor]:
    return isinstance(values, Tensor) and not values.is_meta and values.dim() == 1
