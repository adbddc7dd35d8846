"""Why the numbers of a layer cannot be moved into another one."""

import typing
from collections import Counter
from collections.abc import Container

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from batchnorm._walk import Spot, hooks_of
from batchnorm.nn.batch_norm import Extras
from batchnorm.nn.domains import DomainBatchNorm
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._links import layer_input
from batchnorm.surgery._trace import Traced

__all__ = [
    "has_more",
    "inside",
    "lost",
    "of_a_domain",
    "outside",
    "unconvertible",
    "unfit_norm",
    "unfit_pair",
    "unfit_producer",
]

_PRODUCERS = typing.get_args(kinds.Producer)
_RANKS = {nn.BatchNorm1d: (0, 1), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,)}


def inside(spot: Spot) -> tuple[DomainBatchNorm, ...]:
    """The layers that hold this one as the batch norm of a domain."""
    return tuple(owner for owner, _ in spot.places if isinstance(owner, DomainBatchNorm))


def of_a_domain(spot: Spot) -> str:
    """Whether a layer is called in one domain only, where others take its place; "" if not."""
    if not inside(spot):
        return ""
    return "it is the batch norm of one domain: keep one first, batchnorm.convert(model, 'batchnorm', domain=...)"


def outside(part: Traced, spot: Spot) -> str:
    """Whether a layer of a part is held by something outside of that part, too."""
    if not part.part:
        return ""
    within = {id(module) for module in part.modules[part.part].modules()}
    if all(id(owner) in within for owner, _ in spot.places):
        return ""
    return f"it is used outside of {part.part}, too, and the forward as a whole could not be traced"


def has_more(norm: nn.Module, traced: Traced) -> bool:
    """Whether a batch norm is called with more than its input."""
    return any(
        any(
            value is not None and value is not False
            for value in (*node.args, *node.kwargs.values())
            if value is not layer_input(node)
        )
        or sum(value is layer_input(node) for value in (*node.args, *node.kwargs.values())) > 1
        for node in traced.calls(norm)
    )


def _unfit(module: nn.Module, traced: Traced) -> str:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "its shape is not known yet: run one batch through the model first"
    if parametrize.is_parametrized(module):
        return "its parameters are computed from others (a parametrization)"
    hooks = hooks_of(module)
    if hooks:
        return f"it carries a {hooks[0]}, which would see other values"
    read = traced.read_directly(module)
    if read:
        return f"the model reads its {read[0]} without calling it"
    if any(tensor.is_meta for tensor in (*module.parameters(False), *module.buffers(False))):
        return "it is on the meta device and has no numbers"
    return ""


def unfit_norm(module: nn.Module, traced: Traced, *, statistics: bool = True) -> str:
    """Why a batch norm is no fixed affine map (without `statistics`: no batch norm that is known); "" if it is one."""
    if kinds.has_own_forward(module, _BatchNorm, nn.SyncBatchNorm, Extras):
        return f"{type(module).__name__} has a forward of its own, which may do more than normalize"
    reason = _unfit(module, traced)
    if reason or not statistics:
        return reason
    if module._buffers.get("running_mean") is None or module._buffers.get("running_var") is None:
        return "it has no running statistics and normalizes with the batch's"
    if module.training:
        return "it is in training mode and normalizes with the batch's statistics"
    return ""


def unfit_producer(module: nn.Module, traced: Traced, uses: Counter[int]) -> str:
    """Why the weight or bias of a layer cannot be changed; "" if it can."""
    base = next((each for each in _PRODUCERS if isinstance(module, each)), None)
    if base is None:
        return "it is no convolution or linear layer"
    own = kinds.has_own_forward(module, *_PRODUCERS)
    if own or getattr(type(module), "_conv_forward", None) is not getattr(base, "_conv_forward", None):
        return f"{type(module).__name__} has a forward of its own"
    reason = _unfit(module, traced)
    if reason:
        return reason
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return "its weight is computed from other parameters"
    if any(uses[id(parameter)] > 1 for parameter in module._parameters.values() if parameter is not None):
        return "it shares a parameter with another layer"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    return ""


def unfit_pair(layer: nn.Module, norm: nn.Module, dimensions: int, rank: set[int | None]) -> str:
    """Why the channels of a layer with so many axes behind them are not those of a batch norm beside it."""
    fitting = next((axes for cls, axes in _RANKS.items() if isinstance(norm, cls)), None)
    if fitting is not None and dimensions not in fitting:
        return f"{type(norm).__name__} and {type(layer).__name__} work on other axes"
    wanted = dimensions + 2
    known = {each for each in rank if each is not None}
    if known - {wanted}:
        if dimensions == 0:
            return "its input has more than two axes: a linear layer has its channels on the last, batch norm on axis 1"
        return f"{type(layer).__name__} is called without a batch axis, so batch norm takes another axis for channels"
    return ""


def unconvertible(module: nn.Module, classes: Container[type[nn.Module]]) -> str:
    """Why a batch norm cannot become one of another class; "" if its own class is one of those that can."""
    name = type(module).__name__
    if type(module) in classes:
        return "its forward was replaced on the object" if "forward" in vars(module) else ""
    if parametrize.is_parametrized(module):
        return "its parameters are computed from others (a parametrization)"
    if isinstance(module, LazyModuleMixin):
        return "its shape is not known yet: run one batch through the model first"
    if type(module) is nn.SyncBatchNorm:
        return "it is synchronized: its statistics are those of all processes"
    return f"{name} is a class of its own, which may do more than normalize"


def lost(
    module: nn.Module, cls: type[nn.Module], parts: tuple[Traced, ...], called: nn.Module | None = None
) -> str:
    """What the new class could not do, and this layer does; `called` is what the model calls in its place."""
    if not isinstance(module, Extras) or issubclass(cls, Extras):
        return ""
    if module.activation is not None:
        return f"it holds the activation {module.activation!r}, which {cls.__name__} does not have"
    for name in ("nonfinite", "single"):
        if getattr(module, name) != getattr(Extras, name):
            return f"it has {name}={getattr(module, name)!r}, which {cls.__name__} does not have"
    if any(has_more(called or module, part) for part in parts):
        return f"it is called with a residual or a mask, which {cls.__name__} does not take"
    return ""
