"""A module whose forward is written anew: the same object, children and class but for that one method."""

import importlib
import inspect
import linecache
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import fx, nn

from batchnorm._walk import hooks_of
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._links import Links, layer_input
from batchnorm.surgery._matches import Activation, Match, match
from batchnorm.surgery._trace import Traced, Untraceable, follow, optional
from batchnorm.surgery._unnormalized import matched

__all__ = ["Rewritten", "fused_class"]


class Rewritten(nn.Module):
    """The base of the classes that are made here. Their objects can be copied, and pickled if the user's class can."""

    _base: ClassVar[type[nn.Module]]
    _source: ClassVar[str]
    _names: ClassVar[dict[str, Any]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the user's class and the source of the forward."""
        reduced: Any = super().__reduce_ex__(protocol)
        packed = {name: _packed(value) for name, value in self._names.items()}
        return (_again, (self._base, self._source, packed), *reduced[2:])


def _packed(value: object) -> tuple[str, object]:
    return ("module", value.__name__) if isinstance(value, types.ModuleType) else ("object", value)


def _again(base: type[nn.Module], source: str, packed: Mapping[str, tuple[str, Any]]) -> nn.Module:
    names = {
        name: importlib.import_module(value) if kind == "module" else value
        for name, (kind, value) in packed.items()
    }
    cls = _made(base, source, names)
    return cls.__new__(cls)


_MADE: dict[tuple[type[nn.Module], str], type[Rewritten]] = {}


def _made(base: type[nn.Module], source: str, names: dict[str, Any]) -> type[Rewritten]:
    """The class, one for each source."""
    found = _MADE.get((base, source))
    if found is not None:
        return found
    file = f"<batchnorm.fuse {base.__qualname__} {len(_MADE)}>"
    space = dict(names)
    exec(compile(source, file, "exec"), space)
    # Tracebacks and inspect.getsource find the text here.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    cls = type(
        f"Fused{base.__name__}",
        (Rewritten, base),
        {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "forward": space["forward"],
            "_base": base,
            "_source": source,
            "_names": names,
        },
    )
    _MADE[base, source] = cls
    return cls


def unfit(module: nn.Module) -> str:
    """Why a module's forward cannot be written anew; "" if it can."""
    name = type(module).__name__
    if isinstance(module, Rewritten):
        return f"the forward of {name} has been written anew before"
    if isinstance(module, fx.GraphModule):
        return "its forward is a graph, which makes its own code"
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return f"{name} runs its layers in a row, and this one is shared"
    if "forward" in vars(module):
        return f"the forward of {name} was replaced on the object"
    rest = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    arguments = inspect.signature(module.forward).parameters.values()
    if optional(module.forward) or any(each.kind in rest for each in arguments):
        return f"the forward of {name} has optional arguments, which may change what it does"
    return ""


def fused_class(
    module: nn.Module, wanted: Mapping[int, Activation | None], inside: Sequence[str]
) -> tuple[type[nn.Module] | None, str]:
    """The class of `module` with a forward in which these batch norms do what comes behind them; or why there is none.

    `wanted` has the activation of each batch norm by its id. `inside` names the containers within `module` (relative
    to it) whose layers are called one by one then. Everything else that the forward calls is called as before.
    """
    why = unfit(module)
    for name in inside:
        child = module.get_submodule(name)
        if type(child).forward is not nn.Sequential.forward or hooks_of(child):
            why = (
                why
                or f"a part of it stands in the forward of {type(child).__name__} ({name}), a part outside"
            )
    if why:
        return None, why
    sources = []
    for training in (True, False):
        try:
            traced = follow(module, inside, training=training)
        except Untraceable as error:
            return None, f"the forward of {type(module).__name__} cannot be followed by itself ({error})"
        why = _change(traced, wanted)
        if why:
            return None, why
        code = traced.graph.python_code("self")
        sources.append(code.src)
    if sources[0] != sources[1]:
        return None, f"the forward of {type(module).__name__} is another one in training than in evaluation"
    return _made(type(module), sources[0].lstrip("\n"), dict(code.globals)), ""


def _change(traced: Traced, wanted: Mapping[int, Activation | None]) -> str:
    """Let the batch norms of a graph do what comes behind them; or say why they cannot."""
    links = Links(traced, dropped=False)
    calls = [node for node in traced.graph.nodes if id(traced.module(node)) in wanted]
    for call in calls:
        found, why = match(call, links)
        if found is None or found.kind != wanted[id(traced.module(call))]:
            return why or "its calls are followed by different activations"
        if found.addition is not None:
            why = _cannot_move(call, found.addition, links)
            if why:
                return why
        _replace(traced.graph, found)
    return ""


def _cannot_move(norm: fx.Node, addition: fx.Node, links: Links) -> str:
    """Why a batch norm cannot be called at the place of the addition instead; "" if it can."""
    between = []
    node = norm.next
    while node is not addition:
        between.append(node)
        node = node.next
    module = links.traced.module(norm)
    if any(links.traced.module(each) is module for each in between):
        return "it is called again before the addition"
    # A fresh output of a layer that nothing else has cannot be changed in between.
    source = layer_input(norm)
    maker = links.traced.module(source)
    fresh = maker is not None and kinds.is_producer(maker) and len(source.users) == 1
    if not fresh and any(each.op != "get_attr" for each in between):
        return "other calls, which may change its input in place, come before the addition"
    return ""


def _replace(graph: fx.Graph, found: Match) -> None:
    """One call of the layer in place of the three."""
    last = found.activation or found.addition
    assert last is not None  # a match has one of the two
    value = layer_input(found.norm)
    at = found.addition or found.norm
    with graph.inserting_before(at.next):
        arguments: tuple[Any, ...] = (value,)
        if found.residual is not None:
            fitting = graph.call_function(matched, (found.residual, value))
            fitting.meta["is_wrapped"] = True  # whoever traces the written code does not look into it either
            arguments = (value, fitting)
        new = graph.call_module(str(found.norm.target), arguments)
    last.replace_all_uses_with(new)
    node = last
    while True:
        before = _towards(node, found)
        # Whoever only reads the shape of what goes finds it at the layer's input, too.
        node.replace_all_uses_with(value)
        graph.erase_node(node)
        if node is found.norm:
            return
        node = before


def _towards(node: fx.Node, found: Match) -> fx.Node:
    """The input of a node that leads back to the batch norm."""
    other = found.residual if node is found.addition else None
    return next(each for each in node.all_input_nodes if each is not other)
