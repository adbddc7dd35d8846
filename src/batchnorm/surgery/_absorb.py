"""`absorb_bias`: the bias right before a batch norm, which does nothing, into the running mean."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from batchnorm._walk import Changes, Plan, prepared
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._fitness import outside, unfit_norm, unfit_pair, unfit_producer
from batchnorm.surgery._folding import dimensions
from batchnorm.surgery._links import Links
from batchnorm.surgery._rank import ranks
from batchnorm.surgery._trace import Traced, Untraceable, apply_checked, trace, trace_parts
from batchnorm.surgery._verify import Example

__all__ = ["absorb_bias"]


def absorb_bias(model: nn.Module, example: object = None, *, inplace: bool = False) -> Changes:
    r"""Drop the bias of each convolution or linear layer right before a batch norm, which subtracts it again.

    $$\mathrm{bn}(W x + b) = \mathrm{bn}'(W x), \qquad \mathrm{mean}' = \mathrm{mean} - b$$

    In training the batch's mean takes the bias out, so it gets a gradient of zero and only costs time and memory. The
    running mean takes it over, so that the outputs in evaluation are what they were (up to rounding).

    A pair is left alone, with the reason in `skipped`, where the layer's output goes elsewhere, too, or its batch norm
    is called behind other layers; where one of the two carries hooks, is parametrized, shares a parameter or has a
    forward of its own; and where a linear layer is fed more than two axes. Where neither the graph nor an example tells
    the number of axes, a linear layer is taken to be fed (N, C), and the change says so.

    Args:
        model: any module, in training or evaluation mode. Make its optimizer afterwards.
        example: the arguments of one call, as in `fold`: the model is run on it before and after and has to give the
            same.
        inplace: change `model` itself; else a deep copy is changed.

    Returns:
        Changes: `changed` has the layers that lost their bias; `revert()` takes it back.

    Raises:
        InputTypeError: `model` is no module.
        ModelError: the model is scripted, wrapped for distributed training or cannot be copied; the example does not
            run or gives something else.

    Example:
        >>> from torch import nn
        >>> import batchnorm
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> changes = batchnorm.absorb_bias(net)
        >>> changes.model[0].bias is None, changes.changed[0].note
        (True, 'its bias absorbed by 1')
    """
    target = prepared(model, operation="absorb_bias", inplace=inplace)
    check = None if example is None else Example(example, "absorb_bias", target)
    parts, problem = trace_parts(target, kinds.is_batch_norm, training=True)
    observed = {} if check is None else check.ranks
    changes = apply_checked(target, parts, lambda kept: _plan(target, parts, problem, observed, kept))
    if check is not None and changes.changed:
        try:
            changes.notes += tuple(f"on the example, {line}" for line in check.compare(changes.model))
        except BaseException:
            changes.revert()
            raise
    return changes


def _plan(
    model: nn.Module,
    parts: tuple[Traced, ...],
    problem: str,
    observed: Mapping[str, set[int]],
    kept: Mapping[str, str],
) -> Plan:
    plan = Plan("absorb_bias", model)
    if problem:
        taken = ", ".join(part.part for part in parts) or "none"
        plan.note(
            f"the forward could not be traced ({problem}); parts that could, taken each by itself: {taken}"
        )
    uses = Counter(id(p) for spot in plan.spots for p in spot.module._parameters.values() if p is not None)
    spots = {id(spot.module): spot for spot in plan.spots}
    for part in parts:
        try:
            graphs = (part, trace(model, training=False, part=part.part))
        except Untraceable:
            continue
        norms = {
            id(m): m for g in graphs for node in g.graph.nodes if kinds.is_batch_norm(m := _module(g, node))
        }
        for norm in norms.values():
            spot = spots[id(norm)]
            reason = next((kept[name] for name in spot.names if name in kept), "") or outside(part, spot)
            reason = reason or unfit_norm(norm, part, statistics=False)
            layer, why = _layer(norm, graphs)
            if layer is None or (kinds.is_producer(layer) and layer._parameters.get("bias") is None):
                continue
            rank: set[int | None] = {each for name in spot.names for each in observed.get(name, ())}
            rank = rank or _ranks(norm, part)
            reason = reason or why or outside(part, spots[id(layer)]) or unfit_producer(layer, part, uses)
            reason = reason or unfit_pair(layer, norm, dimensions(layer), rank)
            if reason:
                plan.skip(spot, reason)
                continue
            _absorb(plan, layer, norm)
            guess = "" if dimensions(layer) or rank == {2} else "; its input taken to be (N, C)"
            plan.alter(spots[id(layer)], note=f"its bias absorbed by {spot.name}{guess}")
    return plan


def _module(graph: Traced, node: torch.fx.Node) -> nn.Module:
    return graph.module(node) or nn.Identity()


def _ranks(norm: nn.Module, part: Traced) -> set[int | None]:
    known = ranks(part)
    return {known.get(node.all_input_nodes[0]) for node in part.calls(norm)}


def _layer(norm: nn.Module, graphs: tuple[Traced, ...]) -> tuple[nn.Module | None, str]:
    """The layer that feeds a batch norm and nothing else, in training and in evaluation."""
    found: nn.Module | None = None
    why = ""
    for graph in graphs:
        if not graph.calls(norm):
            continue
        layer, reason = Links(graph, dropped=False).feeding(norm)
        if layer is None or not kinds.is_producer(layer) or (found is not None and layer is not found):
            return None, ""
        found, why = layer, why or reason
    alone = [graph for graph in graphs if found is not None and graph.calls(found) and not graph.calls(norm)]
    return found, why or ("the layer before it is called without it in one of the modes" if alone else "")


def _absorb(plan: Plan, layer: nn.Module, norm: nn.Module) -> None:
    bias, mean = layer._parameters["bias"], norm._buffers.get("running_mean")
    plan.set_parameter(layer, "bias", None)
    if bias is not None and mean is not None:
        moved = mean.double() - bias.detach().to(mean.device).double()
        plan.set_buffer(norm, "running_mean", moved.to(mean.dtype))
