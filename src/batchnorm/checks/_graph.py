"""What stands right before and behind every batch norm in the forward, as far as torch.fx can follow it."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from batchnorm._errors import ModelError
from batchnorm._walk import copied
from batchnorm.checks._watching import Norms
from batchnorm.checks.evidence import Neighbours
from batchnorm.nn.batch_norm import Extras
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery import absorb_bias, fold
from batchnorm.surgery._folding import takes_shift
from batchnorm.surgery._links import Links, layer_input
from batchnorm.surgery._trace import Traced, trace_parts

__all__ = ["neighbours"]

# A model that cannot be copied, or changed as a whole: then nothing is said.
_NOT_TO_BE_ASKED = (ModelError, RuntimeError, TypeError)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


def neighbours(model: nn.Module, norms: Norms) -> tuple[dict[str, Neighbours], str]:
    """Of every layer that a part of the forward calls, by name; and why not all of the forward could be followed."""
    wanted = {id(module): name for name, module in norms}
    with _computed_weights_cut_off(model):
        parts, problem = trace_parts(model, lambda module: id(module) in wanted, training=None)
        stays, absorbed = _stays(model), _absorbed(model)
    found: dict[str, Neighbours] = {}
    for part in parts:
        links = Links(part, dropped=False)
        for name, module in norms:
            if part.calls(module):
                found[name] = _around(part, links, module, stays.get(name, ""), absorbed)
    return found, problem


@contextlib.contextmanager
def _computed_weights_cut_off(model: nn.Module) -> Iterator[None]:
    """While a model is copied, no weight hangs on the last forward's graph, which deepcopy refuses.

    `torch.nn.utils.prune`, and `weight_norm` and `spectral_norm` of old, compute weights in a hook and leave them.
    """
    computed = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    for module, name, value in computed:
        vars(module)[name] = value.detach()
    try:
        yield
    finally:
        for module, name, value in computed:
            vars(module)[name] = value


def _scratch(model: nn.Module) -> nn.Module:
    """A copy to try operations on; they give a layer other parameters and write into none."""
    scratch = copied(model, share_parameters=True)
    for module in scratch.modules():  # not eval(), which may do more in a model with one of its own
        module.training = False
    return scratch


def _stays(model: nn.Module) -> dict[str, str]:
    """The layers that `fold` would leave, and why. None where it cannot be asked."""
    try:
        return {each.name: each.reason for each in fold(_scratch(model), inplace=True).skipped}
    except _NOT_TO_BE_ASKED:
        return {}


def _absorbed(model: nn.Module) -> frozenset[str]:
    """The layers whose bias `absorb_bias` would take."""
    try:
        changed = absorb_bias(_scratch(model), inplace=True).changed
    except _NOT_TO_BE_ASKED:
        return frozenset()
    return frozenset(name for each in changed for name in (each.name, *each.also))


def _around(
    part: Traced, links: Links, module: nn.Module, unfoldable: str, absorbed: frozenset[str]
) -> Neighbours:
    layer, _ = links.feeding(module)
    behind, _ = links.fed(module)
    padded = [
        each
        for each in behind
        if kinds.is_producer(each) and takes_shift(each) and _ends_with_its_shift(module)
    ]
    before = _name_of(part, layer)
    dropout, share = _dropout(part, part.calls(module)[0])
    return Neighbours(
        before=before,
        before_kind=type(layer).__name__ if layer is not None else "",
        zeros=_zeros(layer),
        before_bias=before in absorbed,
        dropout_before=dropout,
        dropout=share,
        unfoldable=unfoldable,
        padded_behind=_name_of(part, padded[0]) if padded else "",
    )


def _zeros(layer: nn.Module | None) -> float:
    """The share of a convolution's or linear layer's weights that are exactly 0."""
    weight = getattr(layer, "weight", None)
    if layer is None or not kinds.is_producer(layer) or not isinstance(weight, Tensor):
        return 0.0
    if is_lazy(weight) or weight.is_meta:
        return 0.0
    return float((weight == 0).double().mean()) if weight.numel() else 0.0


def _ends_with_its_shift(norm: nn.Module) -> bool:
    """Whether a batch norm does nothing after it has normalized."""
    own = kinds.has_own_forward(norm, _BatchNorm, nn.SyncBatchNorm, Extras)
    return not own and getattr(norm, "activation", None) is None


def _name_of(part: Traced, module: nn.Module | None) -> str:
    if module is None:
        return ""
    calls = part.calls(module)
    return str(calls[0].target) if calls else ""


def _dropout(part: Traced, call: fx.Node) -> tuple[str, float]:
    """The dropout whose output reaches a call through nothing that mixes channels or positions, and its share."""
    node: Any = layer_input(call)
    while isinstance(node, fx.Node):
        module = part.module(node)
        # AlphaDropout is made to keep mean and variance.
        if isinstance(module, _DropoutNd) and not isinstance(
            module, nn.AlphaDropout | nn.FeatureAlphaDropout
        ):
            return (str(node.target), float(module.p)) if module.p > 0 else ("", 0.0)
        if node.op == "call_function" and node.target in _DROPOUTS:
            share = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            return ("F.dropout", share) if isinstance(share, float) and share > 0 else ("", 0.0)
        passes = module is not None and (kinds.is_passing(module) or type(module) is nn.Identity)
        if not passes and not (node.op == "call_method" and node.target in kinds.PASSING_METHODS):
            return "", 0.0
        node = layer_input(node)
    return "", 0.0
