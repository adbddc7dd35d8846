"""`insert`: batch norm before each hidden activation."""

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from batchnorm._walk import Changes, Plan, Spot, prepared
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._rank import ranks
from batchnorm.surgery._trace import Traced, Untraceable, apply_checked, trace

__all__ = ["insert"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def insert(model: nn.Module, *, inplace: bool = False) -> Changes:
    """Put batch norm before each hidden activation, as the original paper does.

    A convolution (1d, 2d, 3d, transposed) or linear layer gets a batch norm when its output reaches a hidden
    activation through nothing but additions, dropout, pooling, resizing, concatenation and reshapes: conv-relu becomes
    conv-bn-relu, and conv-add-relu becomes conv-bn-add-relu, as in a residual network. It does not matter whether
    the activation is a layer, a function or a layer that is used in many places. An activation that feeds the
    model's output is not hidden.

    The layer is replaced by `nn.Sequential(layer, batch_norm)`, so `conv.weight` becomes `conv.0.weight` in the
    state dict. Its bias goes: the batch norm subtracts it again and has one of its own. The batch norm has PyTorch's
    defaults and the layer's dtype, device and training flag.

    Where a layer's input is known to have more than two axes, (N, L, C) as in a transformer, a linear layer has its
    channels last and batch norm does not fit behind it. Such a layer is skipped, and so is one that is called more
    than once, shares its weight, computes it (weight norm), is already followed by a normalization, or has not yet
    seen its lazy shape.

    The order of the calls is found by `torch.fx`. A model whose forward cannot be traced is treated by the order in
    which its layers were defined (a layer followed by an activation layer in the same parent); `notes` says so.

    Args:
        model: any module. Make its optimizer afterwards.
        inplace: change `model` itself; else a deep copy is changed.

    Returns:
        Changes: `model` is the network with batch norm, `changed` and `skipped` tell what was done and what not;
        `revert()` takes it back.

    Raises:
        InputTypeError: `model` is no module.
        ModelError: the model is scripted, wrapped for distributed training or cannot be copied.

    Source: Ioffe and Szegedy, Batch Normalization, 2015, section 3.2.

    Example:
        >>> from torch import nn
        >>> import batchnorm
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> changes = batchnorm.insert(net)
        >>> changes.model[0][1]
        BatchNorm2d(8, eps=1e-05, ...)
        >>> changes.skipped[0].name, changes.skipped[0].reason
        ('3', "its output is the model's output")
    """
    target = prepared(model, operation="insert", inplace=inplace)
    traced: Traced | None = None
    problem = ""
    try:
        traced = trace(target)
    except Untraceable as error:
        problem = str(error)
    return apply_checked(target, traced, lambda kept: _plan(target, traced, problem, kept))


@dataclass(frozen=True)
class _Finding:
    """Whether a batch norm belongs behind a layer, and the sentence that says why."""

    yes: bool
    why: str


def _plan(model: nn.Module, traced: Traced | None, problem: str, kept: dict[str, str]) -> Plan:
    plan = Plan("insert", model)
    uses = Counter(id(p) for spot in plan.spots for p in spot.module._parameters.values() if p is not None)
    if traced is None:
        plan.note(
            f"the forward could not be traced ({problem}), so layers were paired with activations by the order in "
            "which they were defined; activations that are functions were not seen"
        )
    finder = _ByOrder(plan.spots) if traced is None else _ByTrace(traced)
    for spot in plan.spots:
        if not kinds.is_producer(spot.module):
            continue
        reason = next((kept[name] for name in spot.names if name in kept), "") or _unfit(spot, uses)
        finding = _Finding(False, reason) if reason else finder.look(spot)
        if finding.yes:
            _wrap(plan, spot, finding.why)
        else:
            plan.skip(spot, finding.why)
    return plan


def _unfit(spot: Spot, uses: Counter[int]) -> str:
    """Why this layer cannot be followed by a batch norm whatever comes after it; "" if nothing speaks against it."""
    module = spot.module
    if not spot.places:
        return "it is the whole model, so no hidden activation follows"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "its shape is not known yet: run one batch through the model first"
    weight = module._parameters.get("weight")
    if weight is None or parametrize.is_parametrized(module):
        return "its weight is computed from other parameters (a parametrization)"
    if any(uses[id(parameter)] > 1 for parameter in module._parameters.values() if parameter is not None):
        return "it shares a parameter with another layer"
    if not weight.is_floating_point():
        return f"batch norm works on real floating-point numbers, and its weight is {weight.dtype}"
    for owner, _ in spot.places:
        if type(owner).__module__.startswith("torch.nn.") and not isinstance(owner, _CONTAINERS):
            return f"it is a part of {type(owner).__name__}, which uses it in its own way"
    return ""


def _wrap(plan: Plan, spot: Spot, why: str) -> None:
    module = spot.module
    weight = module._parameters["weight"]
    assert weight is not None  # _unfit has looked
    norm = kinds.batch_norm_class(module)(kinds.width(module), device=weight.device, dtype=weight.dtype)
    replacement = nn.Sequential(module, norm)
    norm.training = replacement.training = module.training
    notes = [why]
    if module._parameters.get("bias") is not None:
        if type(module).forward.__module__.startswith("torch.nn.") and "forward" not in vars(module):
            plan.set_parameter(module, "bias", None)
            notes.append("its bias dropped")
        else:
            notes.append("its bias kept, since it has a forward of its own that may need it")
    plan.replace(spot, replacement, note="; ".join(notes))


class _ByTrace:
    """Follows a layer's output through the traced graph."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.ranks = ranks(traced)

    def look(self, spot: Spot) -> _Finding:
        calls = self.traced.calls(spot.module)
        if not calls:
            return _Finding(False, "the model's forward does not call it as a layer")
        if len(calls) > 1:
            return _Finding(
                False, f"it is called {len(calls)} times, and each call has statistics of its own"
            )
        read = self.traced.read_directly(spot.module)
        if read:
            return _Finding(False, f"the model reads its {read[0]} without calling it")
        (node,) = calls
        if len(node.args) + len(node.kwargs) != 1:
            return _Finding(False, "it is called with more than its input")
        rank = next((self.ranks[each] for each in node.all_input_nodes if each in self.ranks), None)
        if isinstance(spot.module, nn.Linear) and rank is not None and rank > 2:
            return _Finding(
                False,
                f"its input has {rank} axes with the channels last, where batch norm expects them on axis 1",
            )
        return self._fate(node)

    def _fate(self, start: fx.Node) -> _Finding:
        """What the output of a layer comes to, looking through everything that keeps its channels apart."""
        queue, seen = [start], {start}
        hidden, outer, blocked, ends = "", "", "", False
        while queue:
            for user in queue.pop(0).users:
                if user in seen:
                    continue
                seen.add(user)
                if self._is(user, "norm"):
                    return _Finding(False, f"{self._called(user)} already follows it")
                if self._is(user, "activation"):
                    if self._feeds_output_only(user):
                        outer = outer or self._called(user)
                    else:
                        hidden = hidden or self._called(user)
                elif self._is(user, "addition") or self._is(user, "passing"):
                    queue.append(user)
                elif user.op == "output":
                    ends = True
                elif not self._is(user, "shape"):
                    blocked = blocked or self._called(user)
        if hidden:
            return _Finding(True, f"before {hidden}")
        if outer:
            return _Finding(False, f"{outer}, which it feeds, is the model's output and not hidden")
        if blocked:
            return _Finding(False, f"{blocked} follows it before any activation")
        return _Finding(False, "its output is the model's output" if ends else "nothing uses its output")

    def _feeds_output_only(self, node: fx.Node) -> bool:
        """Whether the value goes to the model's output and nowhere else, reshapes and dropout aside."""
        users = [user for user in node.users if not self._is(user, "shape")]
        return all(
            user.op == "output" or (self._is(user, "passing") and self._feeds_output_only(user))
            for user in users
        )

    def _is(self, node: fx.Node, kind: str) -> bool:
        module = self.traced.module(node)
        if module is not None:
            return bool(_LAYER_KINDS.get(kind, _never)(module))
        if node.op == "call_method":
            return node.target in _METHOD_KINDS.get(kind, ())
        if node.op != "call_function":
            return False
        if kind == "shape":
            return node.target is getattr
        if kind == "passing" and (_is_slice(node) or _is_record(node)):
            return True
        return node.target in _FUNCTION_KINDS.get(kind, ())

    def _called(self, node: fx.Node) -> str:
        module = self.traced.module(node)
        if module is not None:
            return f"{type(module).__name__} ({node.target})"
        return (
            str(node.target)
            if isinstance(node.target, str)
            else getattr(node.target, "__name__", str(node.target))
        )


def _never(module: nn.Module) -> bool:
    return False


def _is_slice(node: fx.Node) -> bool:
    """x[:, :, :-1]: some of the positions of every channel."""
    index = (
        node.args[1] if getattr(node.target, "__name__", "") == "getitem" and len(node.args) == 2 else None
    )
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, slice | type(...)) for part in parts)


def _is_record(node: fx.Node) -> bool:
    """A named tuple, in which some models collect their outputs."""
    return isinstance(node.target, type) and issubclass(node.target, tuple)


_LAYER_KINDS = {"norm": kinds.is_norm, "activation": kinds.is_activation, "passing": kinds.is_passing}
_METHOD_KINDS = {
    "activation": kinds.ACTIVATION_METHODS,
    "addition": kinds.ADDITION_METHODS,
    "passing": kinds.PASSING_METHODS,
    "shape": kinds.SHAPE_METHODS,
}
_FUNCTION_KINDS = {
    "norm": kinds.NORM_FUNCTIONS,
    "activation": kinds.ACTIVATION_FUNCTIONS,
    "addition": kinds.ADDITION_FUNCTIONS,
    "passing": kinds.PASSING_FUNCTIONS,
}


class _ByOrder:
    """Goes by the order in which a parent's layers were defined, where no graph is to be had."""

    def __init__(self, spots: tuple[Spot, ...]) -> None:
        self.last = spots[-1].module
        self.sequence = next((type(s.module).__name__ for s in spots if self._makes_sequences(s.module)), "")

    @staticmethod
    def _makes_sequences(module: nn.Module) -> bool:
        return isinstance(module, nn.RNNBase | nn.MultiheadAttention | nn.Embedding)

    def look(self, spot: Spot) -> _Finding:
        if isinstance(spot.module, nn.Linear) and self.sequence:
            return _Finding(
                False,
                f"the model holds {self.sequence}, so its input may have its channels on the last of 3 axes",
            )
        findings = [self._after(owner, key) for owner, key in spot.places]
        return next((finding for finding in findings if not finding.yes), findings[0])

    def _after(self, owner: nn.Module, key: str) -> _Finding:
        children = [(name, child) for name, child in owner._modules.items() if child is not None]
        place = [name for name, _ in children].index(key)
        for name, child in children[place + 1 :]:
            called = f"{type(child).__name__} ({name})"
            if kinds.is_norm(child):
                return _Finding(False, f"{called} already follows it")
            if kinds.is_activation(child):
                if child is self.last:
                    return _Finding(False, f"{called}, which it feeds, is the last layer and not hidden")
                return _Finding(True, f"before {called}, by the order of definition")
            if not kinds.is_passing(child):
                return _Finding(False, f"{called} follows it in its parent, not an activation")
        return _Finding(False, "no activation layer follows it in its parent")
