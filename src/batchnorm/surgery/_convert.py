"""`convert`: batch norms of one class into those of another."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm._errors import InputError, InputTypeError, message
from batchnorm._walk import Changes, Plan, Spot, prepared
from batchnorm.nn import BatchRenorm
from batchnorm.nn.batch_norm import Extras
from batchnorm.nn.families import FAMILIES, Family, family_of
from batchnorm.nn.frozen import Frozen
from batchnorm.nn.member import AnyBatchNorm
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._fitness import inside, lost, unconvertible
from batchnorm.surgery._rank import ranks
from batchnorm.surgery._rebuild import (
    KEPT,
    make,
    part_of,
    ready_copy,
    rebuilt_of,
    takes_elsewhere,
)
from batchnorm.surgery._trace import Traced, trace_parts

__all__ = ["convert", "new_class", "plan_conversion", "recast", "target_of"]

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

    "domain" and "conditional" are the exception, whose layers hold other parameters: a new module stands in the layer's
    place, wherever that was. Every domain, or class, begins with the layer's numbers, so that the network computes what
    it did. A domain layer has the very weight and bias of the layer (`shared_affine=False`: its first domain has), a
    conditional one has new parameters; names in the state dict change; a layer with hooks is skipped. Back from them an
    option says whose numbers stay: `convert(model, "batchnorm", domain="clean")`, or `condition=3`. Without it they are
    left alone, and so is one whose domain or condition the traced forward gives as an argument.

    Skipped, each with the reason: subclasses, which may do more than their base; parametrized and frozen layers; a
    layer with an activation, or called with a residual or a mask, if the new class has none of that; a lazy layer if
    the new class has no lazy form; and SyncBatchNorm where nothing says for how many axes it is: neither `to`, nor the
    layer that was converted to it, nor a convolution before it in the `torch.fx` graph. A frozen layer is made another
    by `unfreeze` alone. To "frozen", a layer without running statistics is skipped, and weight and bias want no
    gradient afterwards.

    Args:
        model: any module.
        to: a family by its name, "batchnorm", "conditional", "domain", "frozen", "ghost", "renorm", "sync", "torch",
            "torch-sync" or "virtual", or a class of one. A class for one number of axes, as BatchNorm2d, takes the
            layers for that number only.
        inplace: change `model` itself; else a deep copy is changed.
        dry_run: change nothing, and return what would be changed.
        options: attributes of the new layers, as in the constructor: `process_group`, `nonfinite`, `backend`, `eps`,
            `momentum`, ...; and `domain` or `condition`, whose numbers stay.

    Returns:
        Changes: `model` has the converted layers; `revert()` gives every layer back its class and options, or puts the
        very layers of before in place again.

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
    family, only = target_of(to, "convert")
    kept = {name: options.pop(name) for name in KEPT & options.keys()}
    for cls in {*family.classes.values()}:
        _template(cls, options)
    target = prepared(model, operation="convert", inplace=inplace)
    changes = _Conversion(target, family, only, options, kept).plan().apply()
    if dry_run:
        changes.revert()
        changes.model = changes._original = model
        changes.dry_run = True
    return changes


def target_of(to: object, operation: str) -> tuple[Family, int]:
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
            message(f"{operation}: to", got=type(to).__name__, expected="a name or a class of batch norm")
        )
    known = ", ".join(repr(name) for name in sorted(FAMILIES))
    raise InputError(
        message(f"{operation}: to", got=repr(to), expected=f"one of {known}, or a class among these")
    )


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


class _Conversion:
    """What becomes of each batch norm; nothing is touched while it is found out."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        only: int,
        options: dict[str, Any],
        kept: Mapping[str, object],
    ) -> None:
        self.result = Plan("convert", model)
        self.family, self.only, self.options, self.kept = family, only, options, kept
        # Who loses the arguments residual and mask must not be called with them, nor who takes them elsewhere.
        self.poorer = family.rebuilt is None and not any(
            issubclass(cls, Extras) for cls in family.classes.values()
        )
        self.parts, self.problem = trace_parts(model, self._is_looked_up, training=None)
        self.replaced: set[int] = set()

    def _is_looked_up(self, module: nn.Module) -> bool:
        """Whether the graph has something to say on this module."""
        if isinstance(module, Extras) and (self.poorer or takes_elsewhere(self.family)):
            return True
        return rebuilt_of(module) is not None or (not self.only and _for_any_axes(module))

    def plan(self) -> Plan:
        spots = self.result.spots
        if self.problem and self.poorer and any(isinstance(spot.module, Extras) for spot in spots):
            self.result.note(
                f"whether layers are called with a residual or a mask was not seen everywhere ({self.problem})"
            )
        for name in self.kept.keys() - {
            found.rebuilt.kept for spot in spots if (found := rebuilt_of(spot.module)) and found.rebuilt
        }:
            self.result.note(f"{name}= says nothing here: no layer has several to keep one of")
        if self.options.get("activation") is not None:
            self.result.note(
                f"every converted layer does {self.options['activation']!r} now, also where an activation or an "
                "addition comes behind it: the network is another one. fuse(model) lets each layer take the activation "
                "behind it."
            )
        for spot in spots:
            if rebuilt_of(spot.module) is not None:
                self._from_rebuilt(spot)
            elif not isinstance(spot.module, _NormBase) or not kinds.is_batch_norm(spot.module):
                continue
            elif not inside(spot):
                self._to_rebuilt(spot) if self.family.rebuilt is not None else self._class(spot)
            elif not self._stays_inside(spot):
                self._class(spot)
        return self.result

    def _stays_inside(self, spot: Spot) -> bool:
        """Whether the batch norm of a domain stays what it is; the layer that holds it is reported."""
        gone = all(id(owner) in self.replaced for owner in inside(spot))
        there = type(spot.module) is AnyBatchNorm and self.family is FAMILIES["batchnorm"]
        return gone or there or self.poorer or self.family.rebuilt is not None

    def _class(self, spot: Spot) -> None:
        """Another class for the very layer."""
        cls, reason = _new_class_unless_frozen(spot.module, self.family, self.only, self.parts)
        reason = reason or (lost(spot.module, cls, self.parts) if cls is not None else "")
        if reason or cls is None:
            self.result.skip(spot, reason)
        elif cls is not type(spot.module) or self.options:
            plan_conversion(self.result, spot.module, cls, self.options)
            self.result.alter(spot)

    def _to_rebuilt(self, spot: Spot) -> None:
        """A new module in a plain layer's place."""
        ready, reason = ready_copy(spot.module)
        if ready is None:
            self.result.skip(spot, reason)
        else:
            self._make(spot, ready)

    def _make(self, spot: Spot, ready: nn.Module) -> None:
        assert self.family.rebuilt is not None
        known = family_of(type(ready))
        axes = vars(ready).get(_AXES) or (known[1] if known is not None else 0)
        # The layer is one of this package's, whose residual and mask the new one hands on.
        plain = type(ready) is AnyBatchNorm or (known is not None and known[0] is FAMILIES["torch"])
        cls = FAMILIES["batchnorm"].classes[axes] if plain and axes else type(ready)
        others = {
            name: each for name, each in self.options.items() if name not in self.family.rebuilt.options
        }
        recast(ready, cls, others)
        new, reason = make(spot.module, ready, self.family, self.options, self.parts)
        if new is None:
            self.result.skip(spot, reason)
            return
        if axes and isinstance(new, Extras):
            vars(new)[_AXES] = axes
        self._replace(spot, new, f"{self.family.rebuilt.parts}, all of which begin with its numbers")

    def _from_rebuilt(self, spot: Spot) -> None:
        """A layer with the numbers of one part in the place of one that has several."""
        if rebuilt_of(spot.module) is self.family and not self.kept and not self.options:
            return
        ready, note = part_of(spot.module, self.kept, self.parts)
        if ready is None:
            self.result.skip(spot, note)
            return
        if _AXES in vars(spot.module):
            vars(ready)[_AXES] = vars(spot.module)[_AXES]
        if self.family.rebuilt is not None:
            self._make(spot, ready)
            return
        cls, reason = _new_class_unless_frozen(ready, self.family, self.only, self.parts, spot.module)
        reason = reason or (lost(ready, cls, self.parts, spot.module) if cls is not None else "")
        if reason or cls is None:
            self.result.skip(spot, reason)
            return
        # By this plan, as its parameters may be those of the model: freezing them is to be reverted, too.
        if cls is not type(ready) or self.options:
            plan_conversion(self.result, ready, cls, self.options)
        self._replace(spot, ready, note)

    def _replace(self, spot: Spot, new: nn.Module, note: str) -> None:
        self.replaced.add(id(spot.module))
        self.result.replace(spot, new, note=note)


def recast(layer: nn.Module, cls: type[nn.Module], options: dict[str, Any]) -> None:
    """Give a layer that is in no model yet another class and options."""
    if cls is not type(layer) or options:
        plan = Plan("convert", layer)
        plan_conversion(plan, layer, cls, options)
        plan.apply()


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


def _new_class_unless_frozen(
    module: nn.Module,
    family: Family,
    only: int,
    parts: tuple[Traced, ...],
    called: nn.Module | None = None,
) -> tuple[type[nn.Module] | None, str]:
    found = family_of(type(module))
    if isinstance(module, Frozen) and (found is None or found[0] is not family):
        return None, "it is frozen: unfreeze it first"
    cls, reason = new_class(module, family, only, parts, called)
    without = module._buffers.get("running_mean") is None or not module.track_running_stats
    if without and cls is not None and issubclass(cls, Frozen):
        return None, "it has no running statistics to normalize with"
    uncounted = without or module._buffers.get("num_batches_tracked") is None
    if uncounted and cls is not None and issubclass(cls, BatchRenorm):
        return None, "it has no running statistics, or no count of batches, to correct towards"
    return cls, reason


def new_class(
    module: nn.Module,
    family: Family,
    only: int,
    parts: tuple[Traced, ...],
    called: nn.Module | None = None,
) -> tuple[type[nn.Module] | None, str]:
    """The class of the family that a layer becomes, or why there is none; `called`: what the model calls for it."""
    found = (None, 0, False) if type(module) is AnyBatchNorm else family_of(type(module))
    reason = unconvertible(module, () if found is None else (type(module),))
    if found is None or reason:
        return None, reason
    _, axes, lazy = found
    axes = axes or vars(module).get(_AXES, 0) or only or _axes_of(called or module, parts)
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


def plan_conversion(plan: Plan, module: nn.Module, cls: type[nn.Module], options: dict[str, Any]) -> None:
    """Plan that the layer becomes one of this class."""
    before, after = _template(type(module), {}), _template(cls, options)
    plan.set_class(module, cls)
    for name in getattr(type(module), "_transient", ()):
        if name in vars(module):
            plan.drop_attribute(module, name)
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
    if issubclass(cls, Frozen):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                plan.set_requires_grad(module, name, False)
