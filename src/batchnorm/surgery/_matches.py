"""Batch norm, an addition, an activation: where a forward does the three in a row."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from batchnorm._walk import hooks_of
from batchnorm.surgery._links import Links, called, layer_input

__all__ = ["Activation", "Match", "activation_of", "common", "match"]

_FUNCTIONS = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
_LAYERS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
}
_ADDITIONS = frozenset({operator.add, torch.add, "add", "__add__", "__radd__"})
_ADDITIONS_INPLACE = frozenset({operator.iadd, "add_", "__iadd__"})
# Behind these a value has fewer positions, so that what is added to it may be the larger one.
_POOLED = ("pool", "mean", "sum", "amax", "max")


@dataclass(frozen=True)
class Activation:
    """An activation that a batch norm can hold, and the slope of leaky_relu."""

    name: str
    slope: float = 0.01


@dataclass(frozen=True, eq=False)
class Match:
    """One call of a batch norm, and what comes behind it that the layer can do itself.

    `layer` is the activation layer, where the activation is one.
    """

    norm: fx.Node
    addition: fx.Node | None
    residual: fx.Node | None
    activation: fx.Node | None
    kind: Activation | None
    layer: nn.Module | None = None


def activation_of(node: fx.Node, module: nn.Module | None) -> Activation | None:
    """What a call does if it is one of the activations of our layers, in exactly their form."""
    if module is not None:
        name = _LAYERS.get(type(module))
        if name is None or hooks_of(module) or len(node.args) != 1 or node.kwargs:
            return None
        if name == "gelu" and module.approximate != "none":
            return None
        return _leaky(name, module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.01)
    known: Any = {"call_method": _METHODS, "call_function": _FUNCTIONS}.get(node.op, {})
    name = known.get(node.target)
    if name is None or not node.args:
        return None
    options = dict(node.kwargs)
    options.pop("inplace", None)
    rest = list(node.args[1:])
    if name == "leaky_relu":
        slope = rest.pop(0) if rest else options.pop("negative_slope", 0.01)
        return None if options or any(type(each) is not bool for each in rest) else _leaky(name, slope)
    if name == "gelu" and options.pop("approximate", "none") != "none":
        return None
    # What is left is `inplace`, given by position.
    return None if options or any(type(each) is not bool for each in rest) else Activation(name)


def _leaky(name: str, slope: object) -> Activation | None:
    return Activation(name, float(slope)) if isinstance(slope, int | float) else None


def match(norm: fx.Node, links: Links) -> tuple[Match | None, str]:
    """What a call of a batch norm is followed by; or why the layer cannot do it."""
    user, why = _only_user(norm, links)
    if user is None:
        return None, why
    module = links.traced.module(user)
    kind = activation_of(user, module)
    if kind is not None:
        return Match(norm, None, None, user, kind, module), ""
    residual, why = _residual(user, norm, links)
    if residual is None:
        return None, why
    after, _ = _only_user(user, links)
    layer = None if after is None else links.traced.module(after)
    kind = None if after is None else activation_of(after, layer)
    if kind is None:
        return Match(norm, user, residual, None, None), ""
    return Match(norm, user, residual, after, kind, layer), ""


def _only_user(node: fx.Node, links: Links) -> tuple[fx.Node | None, str]:
    sinks = links.sinks(node)
    if links.stored(node):
        return None, "its output is kept as an attribute"
    if len(sinks) != 1:
        names = ", ".join(called(sink, links.traced.module(sink)) for sink in sinks) or "nothing"
        return None, f"its output goes to {names}"
    if links.traced.through_hooks(node, sinks[0]):
        return None, "its output passes a hook of the module that it stands in"
    if sinks[0].op != "output" and sinks[0].meta["modes"] != node.meta["modes"]:
        return None, f"{called(sinks[0], links.traced.module(sinks[0]))} behind it runs in another block"
    return sinks[0], ""


def _residual(node: fx.Node, norm: fx.Node, links: Links) -> tuple[fx.Node | None, str]:
    """What an addition adds to the output of a batch norm."""
    inplace = node.target in _ADDITIONS_INPLACE
    if node.op not in ("call_function", "call_method") or not (inplace or node.target in _ADDITIONS):
        return None, f"{called(node, links.traced.module(node))} follows it"
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"}:
        return None, "the addition that follows it does more than add two values"
    own = [links.source(each) is norm for each in node.args]
    other = node.args[1] if own[0] else node.args[0]
    if not isinstance(other, fx.Node):
        return None, "a number is added to its output"
    if inplace and not own[0]:
        return None, "its output is added in place to another value"
    if other.op == "get_attr":
        return None, "a parameter or buffer is added to its output"
    rival = links.traced.module(links.source(other))
    if (
        own[1]
        and isinstance(rival, nn.modules.batchnorm._BatchNorm)
        and len(links.sinks(links.source(other))) == 1
    ):
        return (
            None,
            f"{type(rival).__name__} ({links.source(other).target}), to which it is added, takes the addition",
        )
    if _pooled(layer_input(norm), other):
        return None, "its input is pooled, so what is added to its output may be larger"
    return other, ""


def _pooled(node: Any, other: fx.Node) -> bool:
    """Whether a pooling stands on the way to a batch norm, behind the last value that it shares with the other one."""
    shared, queue = {other}, [other]
    while queue:
        for each in queue.pop().all_input_nodes:
            if each not in shared:
                shared.add(each)
                queue.append(each)
    small: dict[fx.Node, bool] = {}

    def is_small(node: fx.Node) -> bool:
        """Whether all that a value was made of is pooled: in a product the larger factor gives the shape."""
        if node not in small:
            small[node] = False
            called_module = [cls.__name__ for _, cls in node.meta.get("nn_module_stack", {}).values()][-1:]
            name = called_module[0] if node.op == "call_module" and called_module else _name(node)
            inputs = [each for each in node.all_input_nodes if each.op != "get_attr"]
            if node in shared:
                small[node] = False
            elif any(word in name.lower() for word in _POOLED):
                small[node] = True
            elif inputs:
                small[node] = all(is_small(each) for each in inputs)
        return small[node]

    return isinstance(node, fx.Node) and is_small(node)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def common(frames: list[tuple[str, ...]]) -> str:
    """The innermost module in whose forward all of it happens; "" for the model itself."""
    name = ""
    for level in zip(*frames, strict=False):
        if len(set(level)) > 1:
            break
        name = level[0]
    return name
