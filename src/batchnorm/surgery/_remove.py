"""`remove`: a network without its batch norms."""

from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm._walk import Changes, Plan, Spot, hooks_of, prepared
from batchnorm.nn.batch_norm import Extras
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._fitness import of_a_domain
from batchnorm.surgery._trace import Traced, Untraceable, apply_checked, trace
from batchnorm.surgery._unnormalized import Unnormalized

__all__ = ["remove"]


def remove(model: nn.Module, *, inplace: bool = False) -> Changes:
    """Take every batch norm out of a network, to see or to measure what it did there.

    Each batch norm (PyTorch's 1d, 2d, 3d and synchronized, and this package's) is replaced by `nn.Identity`. A layer
    of this package that holds an activation, or takes a residual or a mask, is replaced by a module that still does
    all that. The convolution or linear layer right before it gets a bias of zeros if it has none, since the batch
    norm's went. The weights of all other layers stay as they are.

    The result computes something else than the network did: it is a network to be trained without batch norm.

    A subclass with a forward of its own is skipped, because that forward may do more than normalize; so is a batch norm
    that carries hooks, that is lazy and has not seen its shape, or whose attributes the model reads.

    Which layer comes right before a batch norm is found by `torch.fx`. A model whose forward cannot be traced is
    treated by the order in which its layers were defined; `notes` says so.

    Args:
        model: any module, in training or evaluation mode. Make its optimizer afterwards.
        inplace: change `model` itself; else a deep copy is changed. A model that is itself a batch norm cannot be
            changed in place: take `Changes.model`.

    Returns:
        Changes: `model` is the network without batch norm, `changed` has one entry a batch norm; `revert()` takes it
        back.

    Raises:
        InputTypeError: `model` is no module.
        ModelError: the model is scripted, wrapped for distributed training or cannot be copied.

    Example:
        >>> from torch import nn
        >>> import batchnorm
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> changes = batchnorm.remove(net)
        >>> changes.model
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
        >>> changes.changed[0].note
        '0 given a bias of zeros'
    """
    target = prepared(model, operation="remove", inplace=inplace)
    traced: Traced | None = None
    problem = ""
    if any(kinds.is_batch_norm(module) for module in target.modules()):
        try:
            traced = trace(target)
        except Untraceable as error:
            problem = str(error)
    return apply_checked(target, traced, lambda kept: _plan(target, traced, problem, kept))


def _plan(model: nn.Module, traced: Traced | None, problem: str, kept: dict[str, str]) -> Plan:
    plan = Plan("remove", model)
    names = {id(spot.module): spot.name for spot in plan.spots}
    if problem:
        plan.note(
            f"the forward could not be traced ({problem}), so the layer before each batch norm was found by the "
            "order in which the layers were defined"
        )
    given: set[int] = set()
    for spot in plan.spots:
        if not kinds.is_batch_norm(spot.module):
            if _only_named_so(spot.module):
                plan.skip(spot, f"{type(spot.module).__name__} is not a subclass of PyTorch's batch norm")
            continue
        reason = next((kept[name] for name in spot.names if name in kept), "") or _unfit(spot, traced)
        if reason:
            plan.skip(spot, reason)
            continue
        before = list(_before_by_order(spot) if traced is None else _before_by_trace(spot, traced))
        notes = [_give_bias(plan, layer, spot.module, names[id(layer)], given) for layer in before]
        plan.replace(
            spot,
            _replacement(spot.module),
            note="; ".join(notes) or "no convolution or linear layer right before it",
        )
    return plan


def _only_named_so(module: nn.Module) -> bool:
    return not module._modules and "batchnorm" in type(module).__name__.lower()


def _unfit(spot: Spot, traced: Traced | None) -> str:
    """Why this batch norm stays; "" if it can go."""
    module = spot.module
    if of_a_domain(spot):
        return of_a_domain(spot)
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "its shape is not known yet: run one batch through the model first"
    if kinds.has_own_forward(module, _BatchNorm, nn.SyncBatchNorm, Extras):
        return f"{type(module).__name__} has a forward of its own, which may do more than normalize"
    hooks = hooks_of(module)
    if hooks:
        return f"it carries a {hooks[0]}, which would be lost"
    # The forward of a model that is a batch norm is that batch norm's: it reads its own parameters.
    read = traced.read_directly(module) if traced and spot.places else []
    if read:
        return f"the model reads its {read[0]} without calling it"
    return ""


def _replacement(module: nn.Module) -> nn.Module:
    new: nn.Module = nn.Identity()
    if isinstance(module, Extras):
        new = Unnormalized(module.activation, module.negative_slope)
    new.training = module.training
    return new


def _before_by_trace(spot: Spot, traced: Traced) -> Iterator[nn.Module]:
    """The layers whose output enters this batch norm, through nothing but dropout and reshapes."""
    found: set[int] = set()
    for call in traced.calls(spot.module):
        node = call.args[0] if call.args else call.kwargs.get("input")
        while isinstance(node, fx.Node):
            layer = traced.module(node)
            if layer is not None and kinds.is_producer(layer):
                if id(layer) not in found:
                    found.add(id(layer))
                    yield layer
                break
            node = _through(node, layer)


def _through(node: fx.Node, layer: nn.Module | None) -> fx.Node | None:
    """The one input of a node that only passes it on, None if it does more."""
    passes = (
        kinds.is_passing(layer)
        if layer is not None
        else (node.op == "call_method" and node.target in kinds.PASSING_METHODS)
        or (node.op == "call_function" and node.target in kinds.PASSING_FUNCTIONS)
    )
    return node.all_input_nodes[0] if passes and len(node.all_input_nodes) == 1 else None


def _before_by_order(spot: Spot) -> Iterator[nn.Module]:
    """The layer that was defined right before this batch norm in the same parent."""
    for owner, key in spot.places:
        children = [(name, child) for name, child in owner._modules.items() if child is not None]
        place = [name for name, _ in children].index(key)
        if place and kinds.is_producer(children[place - 1][1]):
            yield children[place - 1][1]


def _give_bias(plan: Plan, layer: nn.Module, norm: nn.Module, name: str, given: set[int]) -> str:
    """Plan a bias of zeros for the layer before a batch norm that goes, and say what was planned."""
    if id(layer) in given:
        return f"{name} given a bias of zeros"
    if layer._parameters.get("bias") is not None:
        return f"{name} has a bias"
    weight = getattr(layer, "weight", None)
    lazy = isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params()
    if lazy or "bias" not in layer._parameters or not isinstance(weight, torch.Tensor):
        return f"{name} cannot be given a bias"
    if kinds.width(layer) != norm.num_features:
        return f"{name} not given a bias: its channels are not the batch norm's"
    trained = norm.bias if norm._parameters.get("bias") is not None else weight
    zeros = torch.zeros(kinds.width(layer), device=weight.device, dtype=weight.dtype)
    plan.set_parameter(layer, "bias", nn.Parameter(zeros, requires_grad=bool(trained.requires_grad)))
    given.add(id(layer))
    return f"{name} given a bias of zeros"
