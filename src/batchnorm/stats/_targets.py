"""Which batch norms of a model an operation on statistics is about, and the model as it can be run."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm._errors import InputTypeError, ModelError, message
from batchnorm._walk import Skipped, Spot, walk
from batchnorm.nn import VirtualBatchNorm
from batchnorm.nn.frozen import Frozen, FrozenBatchNorm

__all__ = ["Target", "bare", "frozen", "refuse_lazy", "targets"]

_BY_FREEZE = "frozen by freeze"
_FROZEN = "frozen: it is a FrozenBatchNorm"
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, eq=False)
class Target:
    """A batch norm whose running statistics are to be set."""

    name: str
    also: tuple[str, ...]
    module: _BatchNorm
    mean: Tensor
    var: Tensor
    counter: Tensor | None

    @property
    def channels(self) -> int:
        """C."""
        return int(self.mean.shape[0])


def bare(model: object, operation: str) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel or torch.compile, which share its tensors.

    Raises:
        InputTypeError: no module.
        ModelError: scripted or sharded.
    """
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[attr-defined]
        else:
            break
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            message(
                f"{operation}: model", got=type(model).__name__, expected="a torch.nn.Module", fix="Pass one."
            )
        )
    for spot in walk(model):
        where = f"{operation}: {spot.name or 'model'}"
        if isinstance(spot.module, torch.jit.ScriptModule):
            raise ModelError(
                message(
                    where,
                    got="a scripted module",
                    expected="Python code",
                    fix="Do it before scripting the model.",
                )
            )
        if type(spot.module).__module__.startswith("torch.distributed.fsdp"):
            raise ModelError(
                message(
                    where,
                    got=type(spot.module).__name__,
                    expected="a model in one piece",
                    fix="Load the full state dict into an unsharded model and give that.",
                )
            )
    return model


def frozen(root: nn.Module, layer: _BatchNorm) -> str:
    """Why the running statistics of this layer are not to be moved; "" if they are."""
    if layer.running_mean is None or layer.running_var is None:
        return "it has no running statistics"
    if isinstance(layer, VirtualBatchNorm):
        return "frozen: its statistics are those of its reference batch"
    if not layer.track_running_stats:
        return "frozen: track_running_stats is False"
    if layer.momentum == 0.0:
        return "frozen: momentum is 0"
    if isinstance(layer, FrozenBatchNorm):
        return _FROZEN
    if isinstance(layer, Frozen):
        return _BY_FREEZE
    if root.training and not layer.training:
        return "frozen: in eval mode while the model is in training mode"
    return ""


def targets(model: nn.Module, operation: str) -> tuple[tuple[Target, ...], tuple[Skipped, ...]]:
    """The batch norms that track statistics, and those that are left alone.

    Raises:
        ModelError: there is no batch norm, all are left alone, or one does not know its shape yet.
    """
    found: list[Target] = []
    skipped: list[Skipped] = []
    for spot in walk(model):
        if not isinstance(spot.module, _BatchNorm):
            continue
        refuse_lazy(spot, operation)
        reason = frozen(model, spot.module)
        if reason:
            skipped.append(Skipped(spot.name, reason, spot.names[1:]))
        else:
            layer = spot.module
            mean, var, counter = layer.running_mean, layer.running_var, layer.num_batches_tracked
            if mean is not None and var is not None:
                found.append(Target(spot.name, spot.names[1:], layer, mean, var, counter))
    if not found:
        got = "none" if not skipped else "; ".join(f"{s.name or 'model'}: {s.reason}" for s in skipped[:3])
        by_freeze = any(each.reason in (_BY_FREEZE, _FROZEN) for each in skipped)
        raise ModelError(
            message(
                f"{operation}: batch norms with running statistics to set",
                got=got,
                expected="at least one",
                fix="Take the freezing back first: batchnorm.unfreeze(model, inplace=True)."
                if by_freeze
                else "",
            )
        )
    return tuple(found), tuple(skipped)


def refuse_lazy(spot: Spot, operation: str) -> None:
    if isinstance(spot.module, LazyModuleMixin) and spot.module.has_uninitialized_params():
        raise ModelError(
            message(
                f"{operation}: {spot.name or 'model'}",
                got=f"a {type(spot.module).__name__} that has not seen its shape",
                expected="a model that has run once",
                fix="Run one batch through the model first.",
            )
        )
