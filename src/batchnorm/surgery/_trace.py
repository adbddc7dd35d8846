"""The order in which a model calls its layers, found by torch.fx without running it."""

import contextlib
import functools
import inspect
import operator
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from batchnorm._errors import ModelError, message
from batchnorm._walk import Changes, Plan, copied, hooks_of, walk
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._blocks import modes, opens_block
from batchnorm.surgery._unnormalized import Rows, Unnormalized

__all__ = ["Traced", "Untraceable", "apply_checked", "follow", "optional", "trace", "trace_parts"]


# What wraps a model without changing what it computes, and the name under which it holds it.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module"}


class Untraceable(Exception):  # noqa: N818 - a finding that callers handle, not an error of the user's
    """torch.fx cannot follow the model's forward.

    `reader` is the name of a module and of an attribute that it does not have, where that was the reason.
    """

    def __init__(self, reason: str, reader: tuple[str, str] | None = None) -> None:
        super().__init__(reason)
        self.reader = reader


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; fx's own takes it for `x = x + y`, which leaves the first x as it was."""

    def _record(self, function: Callable[..., Any], other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
):
    setattr(_Proxy, f"__{_name}__", functools.partialmethod(_Proxy._record, getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Looks into every module but torch's own and those that are a unit here, whatever package they come from."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["modes"] = modes()
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        unit = kinds.is_producer(m) or kinds.is_norm(m) or kinds.is_activation(m) or kinds.is_passing(m)
        return unit or isinstance(m, Unnormalized | Rows) or super().is_leaf_module(m, module_qualified_name)


class _LevelTracer(_Tracer):
    """Looks into the modules of these names alone."""

    def __init__(self, inside: Sequence[str]) -> None:
        super().__init__()
        self.inside = frozenset(inside)
        self.block = ""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.block = self.block or opens_block()
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.inside


@dataclass(frozen=True, eq=False)
class Traced:
    """The graph of a model's forward, with the model's own modules in the place of their names.

    `part` names the module whose forward it is ("" for the model's own), `root` the one that a wrapper holds in its
    place; `hooked` the modules, as in the nodes' frames, whose hooks may change what enters or leaves them; `training`
    and `given` are those of `trace`. `stored` holds the values that the forward leaves behind as attributes.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    part: str = ""
    training: bool | None = True
    given: Mapping[str, Any] | None = None
    stored: frozenset[fx.Node] = frozenset()
    root: str = ""
    hooked: frozenset[str] = frozenset()

    def module(self, node: object) -> nn.Module | None:
        """The layer that a node calls, None if it calls none."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.modules[str(node.target)]

    @functools.cached_property
    def _calls(self) -> dict[int, list[fx.Node]]:
        calls: dict[int, list[fx.Node]] = {}
        for node in self.graph.nodes:
            module = self.module(node)
            if module is not None:
                calls.setdefault(id(module), []).append(node)
        return calls

    def calls(self, module: nn.Module) -> list[fx.Node]:
        """The nodes that call this module."""
        return self._calls.get(id(module), [])

    @staticmethod
    def frame(node: fx.Node) -> tuple[str, ...]:
        """The names of the modules whose forwards are running where a call is made, from the outside in."""
        names = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
        return tuple(names[:-1] if node.op == "call_module" else names)

    def through_hooks(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a value passes hooks between two nodes: it enters or leaves a module that carries some."""
        return bool(self.hooked and self.hooked & (set(self.frame(node)) ^ set(self.frame(user))))

    def read_directly(self, module: nn.Module) -> list[str]:
        """The parameters and buffers of this module that the model reads without calling it."""
        read = (str(node.target).rpartition(".") for node in self.graph.nodes if node.op == "get_attr")
        return sorted({name for owner, _, name in read if self.modules.get(owner) is module})


def optional(forward: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that a forward can do without, and their defaults."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(forward).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in named and p.default is not p.empty}


def _fixed(forward: Callable[..., Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments that are not followed as tensors: traced as one, `if mask is not None` would be taken."""
    fixed = optional(forward)
    for name, value in (given or {}).items():
        if value is None or isinstance(value, bool | int | float | str):
            fixed[name] = value
        else:
            fixed.pop(name, None)
    return fixed


def _scratch(model: nn.Module, training: bool | None) -> nn.Module:
    """A copy that shares the parameters: forward may leave traces of its own on the modules it runs through."""
    scratch = copied(model, share_parameters=True)
    for module in scratch.modules():
        if training is not None:
            module.training = training
        # Hooks are the user's code, for tensors: they are not run on what only stands for one.
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
    return scratch


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Random numbers drawn inside are not missing outside, and warnings of this trial run are nobody's."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)


def trace(
    model: nn.Module,
    *,
    training: bool | None = True,
    given: Mapping[str, Any] | None = None,
    part: str = "",
) -> Traced:
    """Follow the model's forward; a compiled or data-parallel model's is that of the model inside.

    Args:
        model: any module.
        training: the mode of all its modules; by default training, so that branches of training are seen. None: each
            module's own.
        given: what the arguments of forward are in a call, by name. Others have their defaults.
        part: follow the forward of the module of this name instead.

    Raises:
        Untraceable: it branches on values, creates modules on the way, or does something else on proxies that
            only works on tensors.
    """
    modules = {name: spot.module for spot in walk(model) for name in spot.names}
    wrapped = "" if part else _WRAPPERS.get(type(model).__name__, "")
    name = wrapped if wrapped in model._modules else part
    prefix = f"{name}." if name else ""
    hooked = frozenset(
        key for key, module in modules[name].named_modules(remove_duplicate=False) if key and hooks_of(module)
    )
    if "forward" in vars(modules[name]):
        raise Untraceable("its forward was replaced on the object, where torch.fx does not look")
    scratch: nn.Module | None = None
    try:
        with _undisturbed():
            scratch = _scratch(modules[name], training)
            graph = _Tracer().trace(scratch, concrete_args=_fixed(scratch.forward, given) or None)
    except Exception as error:  # forward is any code at all, so it may fail on proxies in any way
        raise Untraceable(_first_sentence(error), _reader(error, scratch, prefix)) from error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = prefix + str(node.target)
            if node.op == "call_module" and node.target not in modules:
                raise Untraceable(f"forward creates the module {node.target}")
    return Traced(graph, modules, part, training, given, frozenset(_stored(scratch)), name, hooked)


def _stored(scratch: nn.Module) -> Iterator[fx.Node]:
    """The values that a traced forward has put on its modules."""
    values = [value for module in scratch.modules() for value in vars(module).values()]
    while values:
        value = values.pop()
        if isinstance(value, fx.Proxy):
            yield value.node
        elif type(value) in (list, tuple):
            values += value
        elif type(value) is dict:
            values += value.values()


def follow(module: nn.Module, inside: Sequence[str], *, training: bool) -> Traced:
    """The forward of one module, whose children are called and not looked into, those named in `inside` excepted.

    Raises:
        Untraceable: it cannot be followed, or does more than the graph could do again: draws random numbers or makes
            tensors on the way, keeps values, changes attributes, opens `with` blocks or switches gradients off.
    """
    modules = {name: spot.module for spot in walk(module) for name in spot.names}
    scratch = _scratch(module, training)
    before = _plain(scratch, inside)
    try:
        with _undisturbed():
            drawn = _draws()
            tracer, outside = _LevelTracer(inside), modes()
            graph = tracer.trace(scratch)
            random_numbers = drawn != _draws()
    except Exception as error:  # forward is any code at all
        raise Untraceable(_first_sentence(error)) from error
    if random_numbers:
        raise Untraceable("it draws random numbers")
    if tracer.block:
        raise Untraceable(f"{tracer.block} has a `with` block, which the graph does not show")
    if any(node.meta["modes"] != outside for node in graph.nodes):
        raise Untraceable(
            "a part of it runs without gradients, under autocast or with hooks that it sets itself"
        )
    if any(_stored(scratch)) or _plain(scratch, inside) != before:
        raise Untraceable("it changes attributes")
    held = {name for name, _ in (*module.named_parameters(remove_duplicate=False),)}
    held |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in held:
            raise Untraceable("it makes tensors on the way")
        if node.op == "call_module" and node.target not in modules:
            raise Untraceable(f"it creates the module {node.target}")
    return Traced(graph, modules, training=training)


def _draws() -> tuple[object, bytes, bytes]:
    """The states of the random generators."""
    generator = np.random.get_state(legacy=False)["state"]
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), repr(generator).encode()


def _plain(scratch: nn.Module, inside: Sequence[str]) -> list[tuple[str, object]]:
    """The attributes of plain kinds on the modules whose forwards are followed."""
    plain = (bool, int, float, str, type(None))
    modules = [scratch, *(scratch.get_submodule(name) for name in inside)]
    return [(key, value) for each in modules for key, value in vars(each).items() if isinstance(value, plain)]


def trace_parts(
    model: nn.Module,
    wanted: Callable[[nn.Module], bool],
    *,
    training: bool | None = None,
    given: Mapping[str, Any] | None = None,
) -> tuple[tuple[Traced, ...], str]:
    """The model's forward, or where it cannot be followed those of the largest parts whose forward can.

    Only parts that hold a module that is `wanted`, and that are called with all the arguments they have: an optional
    one may be given by the caller. The text says why the whole could not be followed.
    """
    if not any(wanted(module) for module in model.modules()):
        return (), ""
    try:
        return (trace(model, training=training, given=given),), ""
    except Untraceable as error:
        problem = str(error)
    found: list[Traced] = []
    seen: set[int] = set()

    def descend(module: nn.Module, name: str) -> None:
        for key, child in module._modules.items():
            if child is None or id(child) in seen or not any(wanted(each) for each in child.modules()):
                continue
            seen.add(id(child))
            part = f"{name}.{key}" if name else key
            if child._modules and _only_required(child):
                with contextlib.suppress(Untraceable):
                    found.append(trace(model, training=training, part=part))
                    seen.update(id(each) for each in child.modules())
                    continue
            descend(child, part)

    descend(model, "")
    return tuple(found), problem


def _only_required(module: nn.Module) -> bool:
    kinds = {p.kind for p in inspect.signature(module.forward).parameters.values()}
    open_ended = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return not (optional(module.forward) or kinds & open_ended)


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}"


def _reader(error: Exception, scratch: nn.Module | None, prefix: str) -> tuple[str, str] | None:
    """Which module lacked which attribute, if that is what the error is about."""
    if scratch is None or not isinstance(error, AttributeError) or not isinstance(error.obj, nn.Module):
        return None
    found = [name for name, module in scratch.named_modules() if module is error.obj]
    return (prefix + found[0], str(error.name)) if found else None


def apply_checked(
    model: nn.Module, traced: Traced | Sequence[Traced] | None, make: Callable[[dict[str, str]], Plan]
) -> Changes:
    """Carry a plan out and follow the forward again; leave out what it does not run with.

    A forward may read `self.conv.out_channels`, which the replacement of `conv` does not have, or call a layer only
    if it is an `nn.Conv2d`. `make` gets the names that must not be replaced, each with the reason.
    """
    parts = (traced,) if isinstance(traced, Traced) else tuple(traced or ())
    kept: dict[str, str] = {}
    while True:
        changes = make(dict(kept)).apply()
        if not changes.changed:
            return changes
        try:
            found: dict[str, str] = {}
            for part in parts:
                found.update(_not_run_with(changes, part))
        except BaseException:
            changes.revert()
            raise
        if not found:
            return changes
        changes.revert()
        kept.update(found)


def _not_run_with(changes: Changes, before: Traced) -> dict[str, str]:
    """The replaced layers that the forward does not accept in their new form, each with the reason."""
    try:
        after = trace(changes.model, training=before.training, given=before.given, part=before.part)
    except Untraceable as error:
        replaced = {name for change in changes.changed for name in (change.name, *change.also)}
        if error.reader is None or error.reader[0] not in replaced:
            raise ModelError(
                message(
                    f"{changes.operation}: the model's forward",
                    got=str(error),
                    expected="a forward that runs with the replaced layers",
                    fix="It depends on what kind of layers the model holds; nothing was changed.",
                )
            ) from error
        name, attribute = error.reader
        return {name: f"the model reads its attribute {attribute!r}, which a replacement lacks"}
    ignored = {}
    for change in changes.changed:
        old, new = before.modules[change.name], after.modules[change.name]
        if new is not old and after.calls(old):
            continue  # it was replaced in one of its places only
        last = new[-1] if isinstance(new, nn.Sequential) else new
        if len(after.calls(last)) != len(before.calls(old)):
            ignored[change.name] = "the model decides by the type of a layer whether to call it"
    return ignored
