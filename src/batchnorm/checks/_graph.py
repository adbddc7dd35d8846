"""What stands right before and behind every batch norm in the forward, as far as torch.fx can follow it."""

from typing import Any

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from batchnorm._errors import ModelError
from batchnorm._walk import copied
from batchnorm.checks._watching import Norms
from batchnorm.checks.evidence import Neighbours
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery import fold
from batchnorm.surgery._links import Links, layer_input
from batchnorm.surgery._trace import Traced, trace_parts

__all__ = ["neighbours"]


def neighbours(model: nn.Module, norms: Norms) -> tuple[dict[str, Neighbours], str]:
    """Of every layer that a part of the forward calls, by name; and why not all of the forward could be followed."""
    wanted = {id(module): name for name, module in norms}
    parts, problem = trace_parts(model, lambda module: id(module) in wanted, training=None)
    stays = _stays(model)
    found: dict[str, Neighbours] = {}
    for part in parts:
        links = Links(part, dropped=False)
        for name, module in norms:
            if part.calls(module):
                found[name] = _around(part, links, module, stays.get(name, ""))
    return found, problem


def _stays(model: nn.Module) -> dict[str, str]:
    """The layers that `fold` would leave, and why. None where it cannot be asked."""
    try:
        return {each.name: each.reason for each in fold(copied(model).eval(), inplace=True).skipped}
    except (
        ModelError,
        RuntimeError,
        TypeError,
    ):  # not to be copied or folded as a whole: then nothing is said
        return {}


def _around(part: Traced, links: Links, module: nn.Module, unfoldable: str) -> Neighbours:
    layer, why = links.feeding(module)
    behind, _ = links.fed(module)
    before = _name_of(part, layer)
    bias = getattr(layer, "bias", None)
    return Neighbours(
        before=before,
        before_kind=type(layer).__name__ if layer is not None else "",
        before_bias=layer is not None and not why and kinds.is_producer(layer) and bias is not None,
        dropout_before=_dropout(part, part.calls(module)[0]),
        unfoldable=unfoldable,
        unfoldable_into=_name_of(part, behind[0]) if behind else "",
    )


def _name_of(part: Traced, module: nn.Module | None) -> str:
    if module is None:
        return ""
    calls = part.calls(module)
    return str(calls[0].target) if calls else ""


def _dropout(part: Traced, call: fx.Node) -> str:
    """The dropout whose output reaches a call through nothing that mixes channels or positions."""
    node: Any = layer_input(call)
    while isinstance(node, fx.Node):
        module = part.module(node)
        if isinstance(module, _DropoutNd):
            return str(node.target) if module.p > 0 else ""
        passes = module is not None and (kinds.is_passing(module) or type(module) is nn.Identity)
        if not passes and not (node.op == "call_method" and node.target in kinds.PASSING_METHODS):
            return ""
        node = layer_input(node)
    return ""
