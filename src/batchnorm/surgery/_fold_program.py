"""`fold` on what `torch.export` gives."""

import operator
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from batchnorm._walk import Change, Changes, Skipped
from batchnorm.surgery._fold_graph import Gone, Step, plan
from batchnorm.surgery._folding import Norm, Weights, reaches_all

__all__ = ["fold_program"]

_aten = torch.ops.aten
_TRANSPOSED = {_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input}
_CONVOLUTIONS = _TRANSPOSED | {
    _aten.conv1d.default,
    _aten.conv1d.padding,
    _aten.conv2d.default,
    _aten.conv2d.padding,
    _aten.conv3d.default,
    _aten.conv3d.padding,
    _aten.convolution.default,
}
_NORMS = {
    _aten.batch_norm.default,
    _aten.native_batch_norm.default,
    _aten._native_batch_norm_legit.default,
    _aten._native_batch_norm_legit.no_stats,
    _aten._native_batch_norm_legit_functional.default,
    _aten._native_batch_norm_legit_no_training.default,
}
_PASSING = {_aten.alias.default, _aten.detach.default, _aten.clone.default}
_DROPOUTS = {_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default}
_CONSTANT = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_PRESERVED = "a module whose calls the program preserves gives or takes its output"


def fold_program(program: ExportedProgram) -> Changes:
    """Fold the batch norms of an exported program into a new one; the program itself stays as it is."""
    reading = _Reading(program)
    gone, stays = plan(reading.steps, reading.readers, reading.disturbed)
    skipped = [Skipped(step.name, reason) for step, reason in stays]
    skipped += [Skipped(name, "it stands in a branch or a loop") for name in _inner_norms(program)]
    folded = _Writing(reading).folded(gone) if gone else program
    changed = tuple(Change(each.step.name, each.step.what, "gone", note=each.note) for each in gone)
    return Changes(folded, changed, tuple(skipped), "fold", _original=program)


def _inner_norms(program: ExportedProgram) -> Iterator[str]:
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule) and module is not program.graph_module:
            yield from (_name(node) for node in module.graph.nodes if node.target in _NORMS)


def _copied(graph: fx.Graph) -> fx.Graph:
    """The same nodes with the same names, to be changed."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for new, old in zip(copy.nodes, graph.nodes, strict=True):
        new.name, new.meta = old.name, dict(old.meta)
    return copy


def _given(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by their names in the operator's schema."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]  # asked of operators only
    given = {each.name: each.default_value for each in arguments if each.has_default_value()}
    return {**given, **dict(zip((each.name for each in arguments), node.args, strict=False)), **node.kwargs}


def _op(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _name(node: fx.Node) -> str:
    """The module whose forward made the call; the node's own name where that is the model's."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack and stack[-1][0] else node.name


def _parts(node: fx.Node) -> list[fx.Node]:
    """Who takes a part of a tuple."""
    return [user for user in node.users if user.target is operator.getitem and user.args[0] is node]


def _is_transpose(node: object) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.args[0] if node.args else None, fx.Node):
        return False
    swapped: dict[Any, tuple[Any, ...]] = {
        _aten.permute.default: ([1, 0],),
        _aten.transpose.int: (0, 1),
        _aten.t.default: (),
    }
    wanted = swapped.get(node.target)
    return wanted is not None and tuple(node.args[1:]) in (wanted, wanted[::-1])


class _Reading:
    """The steps of an exported program."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        signature = program.graph_signature
        self.specs = {each.arg.name: each for each in signature.input_specs if hasattr(each.arg, "name")}
        self.mutated = {*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()}
        calls = [each.signature for each in program.module_call_graph if each.fqn and each.signature]
        self.preserved = {
            str(getattr(each, "name", "")) for call in calls for each in (*call.inputs, *call.outputs)
        }
        self.graph = _copied(program.graph)
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.steps: list[Step] = []
        self.readers: dict[Hashable, list[Step | str]] = defaultdict(list)
        for node in self.graph.nodes:
            step = self._step(node)
            if step is not None:
                self.steps.append(step)
            for value in _values(node):
                if node.target is operator.getitem and value.target in _NORMS and node.args[1] == 0:
                    continue  # the output of the batch norm itself
                self.readers[value].append(step or ("the output" if node.op == "output" else _op(node)))

    def disturbed(self, norm: Step, layer: Step) -> bool:
        """Whether something between a batch norm and a layer may change the batch norm's input in place."""
        between = range(self.order[norm.node] + 1, self.order[layer.node])
        return any(
            getattr(getattr(node.target, "_schema", None), "is_mutable", node.op == "call_function")
            for node, index in self.order.items()
            if index in between and node.target is not operator.getitem
        )

    def _step(self, node: fx.Node) -> Step | None:
        if node.op != "call_function":
            return None
        if node.target in _NORMS:
            return self._norm(node)
        if node.target in _CONVOLUTIONS:
            return self._convolution(node)
        if node.target in (_aten.linear.default, _aten.addmm.default, _aten.mm.default):
            return self._linear(node)
        if node.target in _PASSING:
            return Step(_name(node), _op(node), _given(node)["self"], node, node)
        if node.target in _DROPOUTS and not _given(node)["train"]:
            return Step(_name(node), _op(node), _given(node)["input"], node, node)
        return None

    def _norm(self, node: fx.Node) -> Step:
        given, parts = _given(node), _parts(node)
        channels = int(given["input"].meta["val"].shape[1])
        what = f"{_op(node)}({channels}, eps={given['eps']})"
        result = next((each for each in parts if each.args[1] == 0), node)
        step = Step(_name(node), what, given["input"], result, node, is_norm=True)
        constants = [given.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
        numbers = [self.constant(each) for each in constants]
        if constants[0] is None or constants[1] is None:
            step.why = "it has no running statistics and normalizes with the batch's"
        elif given.get("training", node.target is not _aten._native_batch_norm_legit_no_training.default):
            step.why = "it was exported in training mode and normalizes with the batch's statistics"
        elif len(parts) > 1 or (parts and result is node):
            step.why = "more than its output is used"
        elif {node.name, getattr(result, "name", "")} & self.preserved:
            step.why = _PRESERVED
        elif any(a is not None and b is None for a, b in zip(constants, numbers, strict=True)):
            step.why = "its statistics, weight or bias are computed or changed in the program"
        else:
            mean, var, weight, bias = numbers
            step.norm = Norm.given(channels, mean, var, weight, bias, float(given["eps"]))
        return step

    def _convolution(self, node: fx.Node) -> Step:
        given = _given(node)
        transposed = node.target in _TRANSPOSED or bool(given.get("transposed"))
        step = self._layer(node, given["input"], given["weight"], given["bias"], given["groups"], transposed)
        size = [int(each) for each in given["weight"].meta["val"].shape[2:]]
        step.axes = len(size)
        stride = given["stride"] if transposed else None
        step.shift = reaches_all(size, given["padding"], stride=stride, more=given.get("output_padding", ()))
        return step

    def _linear(self, node: fx.Node) -> Step | None:
        given = _given(node)
        if node.target is _aten.linear.default:
            return self._layer(node, given["input"], given["weight"], given["bias"], 1, False)
        if not _is_transpose(given["mat2"]):
            return None
        source, bias = (given["mat1"], given["self"]) if "mat1" in given else (given["self"], None)
        step = self._layer(node, source, given["mat2"].args[0], bias, 1, False)
        if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
            step.why = "it scales what it adds up"
        if len(given["mat2"].users) > 1:
            step.why = "its weight is used elsewhere, too"
        return step

    def _layer(
        self, node: fx.Node, source: Hashable, weight: fx.Node, bias: object, groups: int, transposed: bool
    ) -> Step:
        step = Step(_name(node), _op(node), source, node, node, is_layer=True, has_bias=bias is not None)
        step.rank = int(node.meta["val"].dim())
        held, added = self.constant(weight), self.constant(bias)
        if held is None or (added is None and bias is not None):
            step.why = "its weight or bias is computed or changed in the program"
        elif len(weight.users) > 1 or _values(node).count(weight) > 1:
            step.why = "its weight is used elsewhere, too"
        elif node.name in self.preserved:
            step.why = _PRESERVED
        elif not held.is_floating_point():
            step.why = f"its weight is {held.dtype}"
        else:
            wide = held.detach().to("cpu", torch.float64)
            step.weights = Weights(wide, torch.empty(0), int(groups), transposed)
            step.weights.bias = torch.zeros(step.weights.width, dtype=torch.float64)
            if added is not None:
                step.weights.bias = added.detach().to("cpu", torch.float64).expand(step.weights.width)
            step.largest = torch.finfo(held.dtype).max
        return step

    def constant(self, node: object) -> Tensor | None:
        """The numbers of a value that is the same in every call."""
        spec = self.specs.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None
        if spec is None or spec.target is None or spec.kind not in _CONSTANT or spec.target in self.mutated:
            return None
        held = self.program.state_dict.get(spec.target, self.program.constants.get(spec.target))
        return held if isinstance(held, Tensor) and not held.is_meta else None


def _values(node: fx.Node) -> list[fx.Node]:
    """What a node reads; what it reads twice is there twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda value: found.append(value))
    return found


class _Writing:
    """The folded program, made from the copy of the graph that was read."""

    def __init__(self, reading: _Reading) -> None:
        self.graph, self.program, self.by_name = reading.graph, reading.program, dict(reading.specs)
        self.specs = list(reading.program.graph_signature.input_specs)
        self.state = dict(reading.program.state_dict)
        self.constants = dict(reading.program.constants)
        self.unread = {node.name for node in self.graph.nodes if node.op == "placeholder" and not node.users}

    def folded(self, gone: Sequence[Gone]) -> ExportedProgram:
        """A new program without these batch norms, with the layers' weights as they are now."""
        counters = {self._counter(each.step.node) for each in gone}
        for layer in {id(layer): layer for each in gone for layer in each.into}.values():
            self._store(layer)
        renamed: dict[str, str] = {}
        for each in gone:
            result, node = each.step.result, each.step.node
            source = _given(node)["input"]
            assert isinstance(result, fx.Node)  # as all values of this graph
            renamed[result.name] = source.name
            result.replace_all_uses_with(source)
            self.graph.erase_node(result)
            if result is not node:
                self.graph.erase_node(node)
        for node in list(self.graph.nodes):
            spec = self.by_name.get(node.name) if node.op == "placeholder" and not node.users else None
            if spec is None or spec.kind not in _CONSTANT:
                continue
            if node.name not in self.unread or spec.target in counters:
                self.graph.erase_node(node)
                self.specs = [other for other in self.specs if other is not spec]
                if all(other.target != spec.target for other in self.specs):
                    self.state.pop(str(spec.target), None)
                    self.constants.pop(str(spec.target), None)
        return self._program(renamed)

    def _program(self, renamed: dict[str, str]) -> ExportedProgram:
        outputs = []
        for output in self.program.graph_signature.output_specs:
            name = getattr(output.arg, "name", None)
            while name in renamed:
                name = renamed[name]
            changed = name != getattr(output.arg, "name", None)
            outputs.append(replace(output, arg=replace(output.arg, name=name)) if changed else output)
        return ExportedProgram(
            self.program.graph_module,
            self.graph,
            ExportGraphSignature(self.specs, outputs),
            self.state,
            dict(self.program.range_constraints),
            list(self.program.module_call_graph),
            self.program.example_inputs,
            self.constants,
            verifiers=self.program.verifiers,
        )

    def _counter(self, norm: fx.Node) -> str:
        """The batch counter, which no call reads, that belongs to a running mean."""
        target = str(self.by_name[_given(norm)["running_mean"].name].target)
        return f"{target.removesuffix('running_mean')}num_batches_tracked"

    def _store(self, layer: Step) -> None:
        """The new weight and bias of a layer."""
        assert layer.weights is not None  # only layers that have them take a batch norm
        given = _given(layer.node)
        matrix = layer.node.target in (_aten.addmm.default, _aten.mm.default)
        weight = given["mat2"].args[0] if matrix else given["weight"]
        bias = given["self"] if layer.node.target is _aten.addmm.default else given.get("bias")
        old = self._numbers(weight)
        self._set(weight, _like(old, layer.weights.weight))
        if (
            bias is not None
            and len(bias.users) == 1
            and self._numbers(bias).shape == layer.weights.bias.shape
        ):
            self._set(bias, _like(self._numbers(bias), layer.weights.bias))
            return
        new = self._parameter(weight, _like(old, layer.weights.bias))
        arguments = list(layer.node.args)
        if layer.node.target is _aten.mm.default:
            layer.node.target = _aten.addmm.default
            arguments.insert(0, new)
        else:
            layer.node.kwargs = {name: value for name, value in layer.node.kwargs.items() if name != "bias"}
            place = 0 if matrix else 2
            arguments[place : place + 1] = [new]
        layer.node.args = tuple(arguments)

    def _numbers(self, node: fx.Node) -> Tensor:
        target = self.by_name[node.name].target
        found = self.state.get(str(target), self.constants.get(str(target)))
        assert isinstance(found, Tensor)  # it was read before
        return found

    def _set(self, node: fx.Node, value: Tensor) -> None:
        target = str(self.by_name[node.name].target)
        holder = self.state if target in self.state else self.constants
        holder[target] = value

    def _parameter(self, weight: fx.Node, value: Tensor) -> fx.Node:
        """A new parameter beside a layer's weight."""
        spec = self.by_name[weight.name]
        owner, _, name = str(spec.target).rpartition(".")
        wanted = "bias" if name == "weight" else f"{name}_bias"
        target = f"{owner}.{wanted}" if owner else wanted
        while target in self.state or target in self.constants:
            target += "_folded"
        value = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        self.state[target] = value
        with self.graph.inserting_after(weight):
            node = self.graph.placeholder("p_" + re.sub(r"\W", "_", target))
        node.meta["val"] = weight.meta["val"].fake_mode.from_tensor(value, static_shapes=True)
        new = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target)
        place = next(index for index, each in enumerate(self.specs) if each is spec)
        self.specs.insert(place + 1, new)
        self.by_name[node.name] = new
        return node


def _like(old: Tensor, value: Tensor) -> Tensor:
    """Numbers in the dtype and on the device of a tensor, and a parameter if that is one."""
    new = torch.empty_like(old, memory_format=torch.preserve_format) if old.shape == value.shape else None
    new = value.to(old.device, old.dtype) if new is None else new.detach().copy_(value)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
