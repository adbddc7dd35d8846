"""`convert`: batch norms of one class into those of another."""

import inspect
import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm._errors import InputError, InputTypeError, message
from batchnorm._walk import Changes, Plan, Spot, prepared
from batchnorm.nn.batch_norm import Extras
from batchnorm.nn.families import FAMILIES, Family, family_of
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._fitness import has_more, unconvertible
from batchnorm.surgery._freeze import Frozen
from batchnorm.surgery._rank import ranks
from batchnorm.surgery._trace import Traced, trace_parts

__all__ = ["convert"]

# What belongs to the numbers of a layer and not to its class.
_FIXED = ("num_features", "affine", "bias", "track_running_stats", "device", "dtype")
# A layer of a class that serves every number of axes remembers here which it had, so that it can go back.
_AXES = "_axes"


def convert(
    model: nn.Module,
    to: str | type[nn.Module],
    *,
    inplace: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> Changes:
    """Make the batch norms of a network layers of another class: PyTorch's, this package's, synchronized ones.

    The layers stay the very same objects and get another class. So a layer that is used in several places stays one
    layer, an optimizer stays valid, and parameters, buffers, hooks, mode, eps, momentum and names in the state dict are
    what they were. (`torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes new layers and loses some of that.)

    Skipped, each with the reason: subclasses, which may do more than their base; parametrized and frozen layers; a
    layer with an activation, or called with a residual or a mask, if the new class has none of that; a lazy layer if
    the new class has no lazy form; and SyncBatchNorm where nothing says for how many axes it is: neither `to`, nor the
    layer that was converted to it, nor a convolution before it in the `torch.fx` graph.

    Args:
        model: any module.
        to: "batchnorm" and "sync" (this package's), "torch", "torch-sync", or a class among these. A class for one
            number of axes, as BatchNorm2d, takes the layers for that number only.
        inplace: change `model` itself; else a deep copy is changed.
        dry_run: change nothing, and return what would be changed.
        options: attributes of the new layers, as in the constructor: `process_group`, `nonfinite`, `backend`, `eps`,
            `momentum`, ...

    Returns:
        Changes: `model` has the converted layers; `revert()` gives every layer back its class and options.

    Raises:
        InputTypeError: `model` is no module, `to` is neither a name nor a class, `eps` or `momentum` no number.
        InputError: `to` is not known, an option is none of the class's, `eps` is not positive, or `momentum` not from 0
            to 1. (PyTorch's constructors take any number and compute nonsense with it.)
        ModelError: the model is scripted, wrapped for distributed training or cannot be copied.

    Example:
        >>> from torch import nn
        >>> import batchnorm
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> changes = batchnorm.convert(net, "batchnorm", nonfinite="skip")
        >>> type(changes.model[1]).__module__, changes.model[1].nonfinite
        ('batchnorm.nn.batch_norm', 'skip')
        >>> type(changes.revert()[1]).__module__
        'torch.nn.modules.batchnorm'
    """
    family, only = _target(to)
    for cls in {*family.classes.values()}:
        _template(cls, options)
    target = prepared(model, operation="convert", inplace=inplace)
    changes = _plan(target, family, only, options).apply()
    if dry_run:
        changes.revert()
        changes.model = changes._original = model
        changes.dry_run = True
    return changes


def _target(to: object) -> tuple[Family, int]:
    """The family, and the number of axes if `to` is a class for one."""
    if isinstance(to, str):
        if to in FAMILIES:
            return FAMILIES[to], 0
    elif isinstance(to, type):
        found = family_of(to)
        if found is not None and not found[2]:
            return found[0], found[1]
    else:
        raise InputTypeError(
            message("convert: to", got=type(to).__name__, expected="a name or a class of batch norm")
        )
    known = ", ".join(repr(name) for name in sorted(FAMILIES))
    raise InputError(message("convert: to", got=repr(to), expected=f"one of {known}, or a class among these"))


def _template(cls: type[nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    """The plain attributes of a layer with these options."""
    wrong = [name for name in options if name in _FIXED]
    if wrong:
        raise InputError(
            message(
                f"convert: {wrong[0]}", got="an option", expected="what the layers have: it cannot be changed"
            )
        )
    parameters = inspect.signature(cls).parameters.values()
    known = [each.name for each in parameters if each.name not in _FIXED]
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    unknown = [] if anything else [name for name in options if name not in known]
    if unknown:
        raise InputError(
            message(
                f"convert: option of {cls.__name__}",
                got=repr(unknown[0]),
                expected=f"one of {', '.join(known)}",
            )
        )
    _check_numbers(options)
    make: Any = cls
    try:
        layer = make(**options) if issubclass(cls, nn.modules.lazy.LazyModuleMixin) else make(1, **options)
    except TypeError as error:
        raise InputError(
            message(f"convert: options of {cls.__name__}", got=str(error), expected="options that it has")
        ) from error
    return {name: value for name, value in vars(layer).items() if name == "__module__" or name[0] != "_"}


def _check_numbers(options: dict[str, Any]) -> None:
    """Refuse an eps and a momentum that no layer can work with; the constructors take them."""
    for name in ("eps", "momentum"):
        value = options.get(name)
        if name not in options or (name == "momentum" and value is None):
            continue
        expected = "a number above 0" if name == "eps" else "a number from 0 to 1, or None"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputTypeError(message(f"convert: {name}", got=type(value).__name__, expected=expected))
        if not (0 < value < math.inf if name == "eps" else 0 <= value <= 1):
            raise InputError(message(f"convert: {name}", got=value, expected=expected))


def _plan(model: nn.Module, family: Family, only: int, options: dict[str, Any]) -> Plan:
    plan = Plan("convert", model)
    # Who loses the arguments residual and mask must not be called with them.
    poorer = not any(issubclass(cls, Extras) for cls in family.classes.values())
    parts, problem = trace_parts(
        model,
        lambda module: (poorer and isinstance(module, Extras)) or (not only and _for_any_axes(module)),
        training=None,
    )
    if problem and poorer and any(isinstance(spot.module, Extras) for spot in plan.spots):
        plan.note(f"whether layers are called with a residual or a mask was not seen everywhere ({problem})")
    if options.get("activation") is not None:
        plan.note(
            f"every converted layer does {options['activation']!r} now, also where an activation or an addition comes "
            "behind it: the network is another one. fuse(model) lets each layer take the activation behind it."
        )
    for spot in plan.spots:
        if not isinstance(spot.module, _NormBase) or not kinds.is_batch_norm(spot.module):
            continue
        cls, reason = _new_class(spot.module, family, only, parts)
        reason = reason or (_lost(spot.module, cls, parts) if cls is not None else "")
        if reason or cls is None:
            plan.skip(spot, reason)
        elif cls is not type(spot.module) or options:
            _convert(plan, spot, cls, options)
    return plan


def _for_any_axes(module: nn.Module) -> bool:
    """Whether a layer's class is one for every number of axes, and the layer has not come from another."""
    found = family_of(type(module))
    return found is not None and not found[1] and _AXES not in vars(module)


def _axes_of(module: nn.Module, parts: tuple[Traced, ...]) -> int:
    """How many axes behind the channels the graph says that such a layer is for; 0 if it does not."""
    found = set()
    for part in parts:
        known = ranks(part)
        found |= {known.get(node.all_input_nodes[0]) for node in part.calls(module)}
    rank = found.pop() if len(found) == 1 else None
    return 0 if rank is None else max(rank - 2, 1)


def _new_class(
    module: nn.Module, family: Family, only: int, parts: tuple[Traced, ...]
) -> tuple[type[nn.Module] | None, str]:
    if isinstance(module, Frozen):
        return None, "it is frozen: unfreeze it first"
    found = family_of(type(module))
    reason = unconvertible(module, () if found is None else (type(module),))
    if found is None or reason:
        return None, reason
    _, axes, lazy = found
    axes = axes or vars(module).get(_AXES, 0) or only or _axes_of(module, parts)
    if only and axes != only:
        return None, f"{type(module).__name__} takes input of another number of axes"
    classes = family.lazy if lazy else family.classes
    if not axes:
        # The same class, or one that serves every number of axes as this one does.
        single = set(classes.values())
        if len(single) == 1:
            return single.pop(), ""
        known = ", ".join(each.__name__ for each in classes.values())
        return None, (
            f"{type(module).__name__} does not say for how many axes it is, and no convolution before it does: name "
            f"the class to convert to, one of {known}"
        )
    if axes not in classes:
        return None, "its shape is not known yet: run one batch through the model first"
    return classes[axes], ""


def _lost(module: nn.Module, cls: type[nn.Module], parts: tuple[Traced, ...]) -> str:
    """What the new class could not do, and this layer does."""
    if not isinstance(module, Extras) or issubclass(cls, Extras):
        return ""
    if module.activation is not None:
        return f"it holds the activation {module.activation!r}, which {cls.__name__} does not have"
    if module.nonfinite != "propagate":
        return f"it has nonfinite={module.nonfinite!r}, which {cls.__name__} does not have"
    if any(has_more(module, part) for part in parts):
        return f"it is called with a residual or a mask, which {cls.__name__} does not take"
    return ""


def _convert(plan: Plan, spot: Spot, cls: type[nn.Module], options: dict[str, Any]) -> None:
    module = spot.module
    before, after = _template(type(module), {}), _template(cls, options)
    plan.set_class(module, cls)
    old, new = family_of(type(module)), family_of(cls)
    if old is not None and old[1] and new is not None and not new[1]:
        plan.set_attribute(module, _AXES, old[1])
    elif _AXES in vars(module) and new is not None and new[1]:
        plan.drop_attribute(module, _AXES)
    for name, value in after.items():
        if name in options or name not in before:
            plan.set_attribute(module, name, value)
    for name in before:
        if name not in after and name in vars(module):
            plan.drop_attribute(module, name)
    plan.alter(spot)
