"""Which layers are joined by nothing else: everything that one gives goes to the other."""

from typing import Any

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._trace import Traced
from batchnorm.surgery._unnormalized import matched

__all__ = ["Links", "called", "layer_input"]

_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"})
_DROPOUTS = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
)


def layer_input(node: fx.Node) -> Any:
    """What a layer is called with first."""
    return node.args[0] if node.args else node.kwargs.get("input")


def called(node: fx.Node, module: nn.Module | None) -> str:
    """A node in words."""
    if module is not None:
        return f"{type(module).__name__} ({node.target})"
    if node.op in ("placeholder", "output"):
        return {"placeholder": "the model's input", "output": "the model's output"}[node.op]
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "a call")


class Links:
    """Follows the values of a traced forward through what does nothing to them.

    That is `nn.Identity`, where `dropped` dropout that is switched off, and the modules in `gone`, which are about to
    become an identity.
    """

    def __init__(self, traced: Traced, *, dropped: bool) -> None:
        self.traced = traced
        self.dropped = dropped
        self.gone: set[int] = set()

    def source(self, node: Any) -> Any:
        """Where a value was made."""
        while isinstance(node, fx.Node) and self._passes(node):
            node = layer_input(node)
        return node

    def sinks(self, node: fx.Node) -> list[fx.Node]:
        """Who reads a value, readers of its shape aside; a reader that has it twice is there twice."""
        found: list[fx.Node] = []
        for user in node.users:
            if _reads_shape(user, node):
                continue
            if self._passes(user) and layer_input(user) is node:
                found += self.sinks(user)
            else:
                found += [user] * _count(user, node)
        return found

    def stored(self, node: fx.Node) -> bool:
        """Whether the forward leaves a value behind as an attribute of a module."""
        passed = [user for user in node.users if self._passes(user)]
        return node in self.traced.stored or any(self.stored(user) for user in passed)

    def feeding(self, module: nn.Module) -> tuple[nn.Module | None, str]:
        """The one layer from which every call of `module` has its input, and which feeds nothing else; or why none."""
        found: nn.Module | None = None
        for call in self.traced.calls(module):
            node = self.source(layer_input(call))
            if not isinstance(node, fx.Node):
                return None, "its input is not a value of the forward"
            layer = self.traced.module(node)
            if layer is None:
                return None, f"{called(node, layer)} comes before it"
            if self.traced.through_hooks(node, call):
                return None, "its input passes a hook of the module that one of the two stands in"
            if found is not None and layer is not found:
                return None, "it is called behind several layers"
            found = layer
        if found is None:
            return None, "the forward does not call it"
        return found, self._else(found, module)

    def _else(self, layer: nn.Module, module: nn.Module) -> str:
        """What else the layer feeds, or that it feeds the module another way than as its input."""
        for call in self.traced.calls(layer):
            sinks = self.sinks(call)
            if self.stored(call):
                return f"the output of {called(call, layer)}, which comes before it, is kept as an attribute"
            if not sinks:
                return f"an output of {called(call, layer)} is not used"
            for sink in sinks:
                if self.traced.module(sink) is not module or sinks.count(sink) > 1:
                    other = called(sink, self.traced.module(sink))
                    return f"{called(call, layer)}, which comes before it, also feeds {other}"
                if self.source(layer_input(sink)) is not call:
                    return f"{called(call, layer)} does not feed it as its input"
        return ""

    def fed(self, module: nn.Module) -> tuple[list[nn.Module], str]:
        """The layers that get all that the calls of `module` give, and nothing but that; or why there are none."""
        layers: list[nn.Module] = []
        for call in self.traced.calls(module):
            sinks = self.sinks(call)
            if self.stored(call):
                return [], "its output is kept as an attribute"
            if not sinks:
                return [], "nothing uses its output"
            for sink in sinks:
                layer = self.traced.module(sink)
                if layer is None:
                    return [], f"it feeds {called(sink, layer)}"
                if self.traced.through_hooks(call, sink):
                    return [], "its output passes a hook of the module that one of the two stands in"
                if self.source(layer_input(sink)) is not call or sinks.count(sink) > 1:
                    return [], f"{called(sink, layer)} does not have it as its input alone"
                if all(layer is not each for each in layers):
                    layers.append(layer)
        for layer in layers:
            for call in self.traced.calls(layer):
                node = self.source(layer_input(call))
                if self.traced.module(node) is not module:
                    return [], f"{called(call, layer)} is called behind other layers, too"
        return layers, ""

    def _passes(self, node: fx.Node) -> bool:
        module = self.traced.module(node)
        if module is not None:
            if id(module) in self.gone or type(module) is nn.Identity:
                return True
            drops = isinstance(module, _DropoutNd) or kinds.is_drop(module)
            return self.dropped and drops and not module.training
        if not self.dropped or node.op != "call_function" or node.target not in _DROPOUTS:
            return False
        return (node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)) is False


def _count(user: fx.Node, node: fx.Node) -> int:
    times = 0

    def look(each: fx.Node) -> fx.Node:
        nonlocal times
        times += each is node
        return each

    fx.map_arg((user.args, user.kwargs), look)
    return times


def _reads_shape(user: fx.Node, node: fx.Node) -> bool:
    if user.op == "call_method":
        return user.target in kinds.SHAPE_METHODS
    if user.op != "call_function":
        return False
    if user.target is matched:
        return user.args[0] is not node
    return user.target is getattr and user.args[1] in _SHAPE_ATTRIBUTES
