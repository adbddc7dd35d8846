"""Which outputs of fused batch norms backward can do without, as far as the forward can be followed."""

from collections.abc import Container, Iterable
from typing import Any, Literal

from torch import fx, nn

from batchnorm import ops
from batchnorm._errors import InputError, message
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._links import Links
from batchnorm.surgery._matches import match
from batchnorm.surgery._trace import Traced
from batchnorm.surgery._unnormalized import matched

__all__ = ["AGAIN", "Memory", "check_memory", "too_long"]

Memory = Literal["keep", "recompute"]

AGAIN = "its output is computed again in backward"


def check_memory(memory: object) -> None:
    """Refuse what is none of the two."""
    if memory not in ("keep", "recompute"):
        raise InputError(message("fuse: memory", got=repr(memory), expected="'keep' or 'recompute'"))


def too_long(graphs: Iterable[Traced], fused: Container[int]) -> dict[int, str]:
    """The batch norms whose outputs must stay, by their ids: their residuals would have to be computed again, too.

    The rule is that of `ops.remember`, which goes by what is called: an output without a residual is a chain of one,
    one whose residual is such an output is one longer. `fused` has the batch norms that take what comes behind them.
    """
    found: dict[int, str] = {}
    for traced in graphs:
        links = Links(traced, dropped=False)
        outputs: dict[Any, tuple[fx.Node, Any]] = {}
        for node in traced.graph.nodes:
            module = traced.module(node)
            if module is not None and kinds.is_batch_norm(module):
                output, residual = _ends(node, module, links, fused)
                outputs[output] = (node, _source(residual, links))
        # The length of the chain that ends in a value, and the batch norm whose output it is.
        chains: dict[Any, tuple[int, str]] = {}
        for node in traced.graph.nodes:
            if node not in outputs:
                continue
            norm, residual = outputs[node]
            before, name = chains.get(residual, (0, ""))
            if before < ops.CHAIN:
                chains[node] = (before + 1, str(norm.target))
            else:
                found[id(traced.module(norm))] = (
                    f"its output is kept: the output of {name}, which is added to it, is computed again itself, and "
                    f"{ops.CHAIN} in a row are the most"
                )
    return found


def _ends(node: fx.Node, module: nn.Module, links: Links, fused: Container[int]) -> tuple[Any, Any]:
    """The value that a layer gives, with what it takes of what comes behind it, and the residual."""
    given = [*node.args[1:], *(node.kwargs[name] for name in ("residual",) if name in node.kwargs)]
    if given:
        return node, given[0]
    taken = match(node, links)[0] if id(module) in fused else None
    return (taken.activation or taken.addition, taken.residual) if taken is not None else (node, None)


def _source(residual: Any, links: Links) -> Any:
    """Where a residual was made; the check of its shape is passed over."""
    value = links.source(residual)
    while isinstance(value, fx.Node) and value.target is matched:
        value = links.source(value.args[0])
    return value
