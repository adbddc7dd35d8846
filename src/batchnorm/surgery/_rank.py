"""How many axes the values of a traced graph have, as far as the graph alone tells."""

import re
from typing import Any

from torch import fx, nn
from torch.nn.modules.transformer import TransformerDecoder, TransformerDecoderLayer, TransformerEncoder

from batchnorm.surgery._kinds import words
from batchnorm.surgery._trace import Traced

__all__ = ["ranks"]

_SEQUENCES = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoderLayer,
    TransformerEncoder,
    TransformerDecoder,
    TransformerDecoderLayer,
)
_ND = re.compile(r"(?:conv|convtranspose|conv_transpose|pool|norm)([123])d$")
# Whatever the result of these has for axes, it is not what their input has.
_UNKNOWN = words(
    "bmm dim dist einsum getattr item matmul mm mv ndimension nonzero norm numel one_hot outer size tolist unbind"
)
# `squeeze` is among them: it is taken to find the axis of length 1 that it was written for.
_REDUCTIONS = words(
    "all amax amin any argmax argmin logsumexp max mean median min mode nanmean prod squeeze std sum var"
)
# These give a tuple, each entry with the axes that the whole is said to have.
_TUPLES = words("chunk kthvalue max median min mode sort split topk")


def ranks(traced: Traced) -> dict[fx.Node, int]:
    """The number of axes of each node's value; nodes whose number the graph does not tell are left out.

    A value that enters the model has an unknown number: the same MLP may be fed (N, C) or (N, L, C).
    """
    known: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        module = traced.module(node)
        if module is not None:
            rank = _of_layer(module, _first(node, known))
        elif node.op in ("call_function", "call_method"):
            rank = _of_call(node, known)
        else:
            rank = None
        if rank is not None:
            known[node] = rank
    return known


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def _first(node: fx.Node, known: dict[fx.Node, int]) -> int | None:
    """The rank of the first input that is known."""
    return next((known[each] for each in node.all_input_nodes if each in known), None)


def _of_layer(module: nn.Module, rank: int | None) -> int | None:
    if isinstance(module, _SEQUENCES):
        return 3
    if isinstance(module, nn.Flatten):
        return _flattened(rank, module.start_dim, module.end_dim)
    if isinstance(module, nn.Unflatten | nn.EmbeddingBag | nn.Bilinear):
        return None
    if isinstance(module, nn.Embedding):
        return None if rank is None else rank + 1
    for base in type(module).__mro__:
        found = _ND.search(base.__name__.lower())
        # BatchNorm1d takes (N, C) as well as (N, C, L), and so does a pool: (C, L).
        if found and (base.__name__.startswith("Conv") or found[1] != "1"):
            return int(found[1]) + 2
    return rank


def _flattened(rank: int | None, start: int, end: int) -> int | None:
    if start == 0 and end == -1:
        return 1
    if start == 1 and end == -1:
        return 2
    if rank is None:
        return None
    return rank - (end % rank - start % rank)


def _numbers(values: Any) -> list[Any]:
    """`view(2, 3)` and `view((2, 3))` alike."""
    return list(values[0]) if len(values) == 1 and isinstance(values[0], list | tuple) else list(values)


def _of_call(node: fx.Node, known: dict[fx.Node, int]) -> int | None:
    name = _name(node)
    rank, rest, options = _first(node, known), node.args[1:], dict(node.kwargs)
    if name == "flatten":
        return _flattened(rank, *_pair(rest, options))
    if name in ("view", "reshape"):
        shape = _numbers(rest) or _numbers([options.get("shape", options.get("size", ()))])
        # `view(x.size())` holds a node, not numbers: one entry that may stand for any count.
        unclear = not shape or (len(shape) == 1 and isinstance(shape[0], fx.Node))
        return None if unclear else len(shape)
    if name == "permute":
        return len(_numbers(rest)) or rank
    if name in _REDUCTIONS:
        return _reduced(rank, rest, options)
    if name in ("unsqueeze", "stack"):
        return None if rank is None else rank + 1
    if name == "getitem":
        return _indexed(node, rank)
    found = _ND.search(name)
    if found:
        return int(found[1]) + 2 if found[1] != "1" else rank
    if name in _UNKNOWN:
        return None
    inputs = [known[each] for each in node.all_input_nodes if each in known]
    # Broadcasting: the longest shape wins. With an unknown one among them the longest known is a lower bound.
    return max(inputs, default=None)


def _pair(rest: tuple[Any, ...], options: dict[str, Any]) -> tuple[int, int]:
    start = rest[0] if rest else options.get("start_dim", 0)
    end = rest[1] if len(rest) > 1 else options.get("end_dim", -1)
    return (start, end) if isinstance(start, int) and isinstance(end, int) else (0, 0)


def _reduced(rank: int | None, rest: tuple[Any, ...], options: dict[str, Any]) -> int | None:
    axes = rest[0] if rest else options.get("dim")
    keeps = rest[1] if len(rest) > 1 else options.get("keepdim", False)
    if rank is None or axes is None or isinstance(axes, fx.Node) or keeps:
        return rank if keeps else None
    return rank - (len(axes) if isinstance(axes, list | tuple) else 1)


def _indexed(node: fx.Node, rank: int | None) -> int | None:
    source, index = node.args[0], node.args[1]
    if isinstance(source, fx.Node) and isinstance(index, int):
        if source.op == "call_module":
            # A tuple of outputs: the first is the sequence, the rest are states and weights.
            return rank if index == 0 else None
        if _name(source) in _TUPLES:
            return rank
    if rank is None:
        return None
    parts = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(part, int | slice | type(None) | type(...)) for part in parts):
        return None
    return rank - sum(isinstance(part, int) for part in parts) + sum(part is None for part in parts)
