"""`freeze` and `unfreeze`: batch norms that keep their statistics, or their weight and bias, in training."""

import itertools
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm._errors import InputError, message
from batchnorm._walk import Changes, Plan, Spot, prepared
from batchnorm.nn.batch_norm import Extras
from batchnorm.nn.frozen import Frozen, FrozenBatchNorm
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._convert import new_class, plan_conversion, target_of
from batchnorm.surgery._trace import Traced, trace_parts

__all__ = ["freeze", "plan_freeze", "unfreeze"]

# Each operation leaves a number of its own on the layers that it changed. Where a later one has put another there,
# the earlier cannot be reverted before it: that would leave a layer half frozen.
_STAMP = "_frozen_by"
_stamps = itertools.count(1000)  # small integers are one object each, and identity is what is compared


class _FrozenFrom(Frozen):
    """The base of the classes that `freeze` makes, each from the class of a layer that it freezes."""

    _base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the class it was frozen from: the frozen one is made when it is needed."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_again, (self._base,), *reduced[2:])


def _again(base: type[nn.Module]) -> nn.Module:
    cls = frozen_class(base)
    return cls.__new__(cls)


_MADE: dict[type[nn.Module], type[_FrozenFrom]] = {}


def frozen_class(base: type[nn.Module]) -> type[_FrozenFrom]:
    """The class of the frozen layers of a class, one for each; its objects are those of that class still."""
    if base not in _MADE:
        space = {"__module__": base.__module__, "__doc__": base.__doc__, "_base": base}
        _MADE[base] = type(f"Frozen{base.__name__}", (_FrozenFrom, base), space)
    return _MADE[base]


def freeze(
    model: nn.Module, *, statistics: bool = True, affine: bool = True, inplace: bool = False
) -> Changes:
    """Keep the batch norms of a network as they are while the rest is trained, for fine-tuning on small batches.

    With frozen statistics a layer normalizes with its running statistics and does not update them, in training too:
    `model.train()` does not reach it, nor does setting `training`; the mode is remembered and holds again after
    `unfreeze`. `reset_running_stats` does nothing. The layer is the same object; its class is a subclass of the one it
    had, so `isinstance` holds, and its names in the state dict stay. Loading a state dict still changes it.

    With frozen `affine`, weight and bias do not require a gradient. An optimizer skips them once their old gradient
    is gone (`optimizer.zero_grad()`).

    A layer without running statistics has none to freeze and is skipped, and so is a lazy one without a shape. A
    `FrozenBatchNorm` is frozen already.

    Args:
        model: any module; its batch norms are PyTorch's, this package's and subclasses of them.
        statistics: freeze mean and variance.
        affine: freeze weight and bias.
        inplace: change `model` itself; else a deep copy is changed.

    Returns:
        Changes: `model` has the frozen layers; `revert()` gives every layer back its class, its flags and the mode that
            the model is in then. After a second `freeze` or `unfreeze` of the same layers that one comes first.

    Raises:
        InputTypeError: `model` is no module.
        InputError: neither `statistics` nor `affine`.
        ModelError: the model is scripted, wrapped for distributed training or cannot be copied.

    Example:
        >>> from torch import nn
        >>> import batchnorm
        >>> net = batchnorm.freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).model.train()
        >>> net[1].training, net[1].weight.requires_grad, isinstance(net[1], nn.BatchNorm2d)
        (False, False, True)
    """
    plan = _prepared("freeze", model, statistics, affine, inplace)
    for spot in plan.spots:
        module = spot.module
        if not kinds.is_batch_norm(module):
            continue
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            plan.skip(spot, "its shape is not known yet: run one batch through the model first")
            continue
        done, why = [], []
        if statistics and isinstance(module, Frozen):
            why.append("its statistics are frozen already")
        elif statistics and (module._buffers.get("running_mean") is None or not module.track_running_stats):
            why.append("it has no running statistics to normalize with")
        elif statistics:
            plan.set_class(module, frozen_class(type(module)))
            done.append("statistics")
        if affine:
            done += _require(plan, module, False)
            why += [] if done and done[-1] != "statistics" else ["no weight or bias of it is trained"]
        _report(plan, spot, done, why, "frozen")
    return plan.apply()


def plan_freeze(plan: Plan, module: nn.Module, cls: type[nn.Module]) -> None:
    """Plan that the layer keeps its statistics, as one of the frozen layers of this class."""
    plan.set_class(module, frozen_class(cls))
    plan.set_attribute(module, _STAMP, next(_stamps))


def unfreeze(
    model: nn.Module,
    *,
    statistics: bool = True,
    affine: bool = True,
    to: str | type[nn.Module] = "batchnorm",
    inplace: bool = False,
) -> Changes:
    """Take `freeze` back, for all batch norms of a network or of a part of it.

    `unfreeze(model.layer4, inplace=True)` is for one part. A layer gets its class back and is in the mode that the
    model was last put in; with `affine`, weight and bias require a gradient. `freeze(...).revert()` is exact instead:
    a weight that was not trained before is not trained afterwards.

    A `FrozenBatchNorm` serves every number of axes; unfrozen, it is of the class for as many as the layer had that was
    converted to it, or as a convolution before it in the `torch.fx` graph has. Where nothing says how many that are it
    is skipped, unless `to` is a class for one number of axes, as BatchNorm2d.

    Args:
        model: any module.
        statistics: unfreeze mean and variance.
        affine: unfreeze weight and bias.
        to: what a `FrozenBatchNorm` becomes: a name or a class that `convert` knows.
        inplace: change `model` itself; else a deep copy is changed.

    Returns:
        Changes: `changed` has the layers that were frozen; `revert()` freezes them again.

    Raises:
        InputTypeError: `model` is no module.
        InputError: neither `statistics` nor `affine`, or `to` is not known.
        ModelError: the model is scripted, wrapped for distributed training or cannot be copied.

    Example:
        >>> from torch import nn
        >>> import batchnorm
        >>> net = batchnorm.freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).model.train()
        >>> batchnorm.unfreeze(net, affine=False, inplace=True).changed[0].note
        'statistics unfrozen'
        >>> net[1].training, net[1].weight.requires_grad
        (True, False)
    """
    family, only = target_of(to, "unfreeze")
    plan = _prepared("unfreeze", model, statistics, affine, inplace)
    parts: tuple[Traced, ...] = ()
    if statistics and not only:
        parts, _ = trace_parts(plan.model, lambda module: type(module) is FrozenBatchNorm, training=None)
    for spot in plan.spots:
        module = spot.module
        if not kinds.is_batch_norm(module):
            continue
        done = []
        if statistics and isinstance(module, _FrozenFrom):
            plan.set_class(module, module._base)
            done.append("statistics")
        elif statistics and isinstance(module, FrozenBatchNorm):
            cls, reason = new_class(module, family, only, parts)
            if cls is None:  # and not half unfrozen
                plan.skip(spot, reason)
                continue
            if cls is not type(module):
                plan_conversion(plan, module, cls, {})
                done.append("statistics")
        if affine:
            done += _require(plan, module, True)
        _report(plan, spot, done, [], "unfrozen")
    return plan.apply()


def _prepared(operation: str, model: nn.Module, statistics: bool, affine: bool, inplace: bool) -> Plan:
    if not (statistics or affine):
        raise InputError(
            message(operation, got="statistics=False, affine=False", expected="at least one of them")
        )
    return Plan(operation, prepared(model, operation=operation, inplace=inplace))


def _require(plan: Plan, module: nn.Module, wanted: bool) -> list[str]:
    """Plan the flags of weight and bias, and say which ones change."""
    done = []
    names = module._affine_names if isinstance(module, Extras) else ("weight", "bias")
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.requires_grad != wanted:
            plan.set_requires_grad(module, name, wanted)
            done.append(name)
    return done


def _report(plan: Plan, spot: Spot, done: list[str], why: list[str], how: str) -> None:
    if done:
        plan.set_attribute(spot.module, _STAMP, next(_stamps))
        plan.alter(spot, note="; ".join([f"{', '.join(done)} {how}", *why]))
    elif why:
        plan.skip(spot, "; ".join(why))
