"""`fold` on ONNX models."""

import copy
import functools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from batchnorm._errors import ModelError, message
from batchnorm._files import require
from batchnorm._walk import Change, Changes, Skipped
from batchnorm.surgery._fold_graph import Gone, Step, plan
from batchnorm.surgery._folding import Norm, Weights, reaches_all

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["fold_onnx"]

_OLDEST = 7
_OWN = ("", "ai.onnx")
_SMALL = 1024  # elements of a constant that shape inference gets to see: it needs those that are shapes
_COMPUTED = "its weight, bias or statistics are no initializers, or a caller may override them"


def fold_onnx(model: "ModelProto") -> Changes:
    """Fold the batch norms of an ONNX model into a new one; the model itself stays as it is.

    Raises:
        ModelError: its operator set is older than 7.
    """
    onnx = require("onnx", package="onnx", purpose="Folding an ONNX file")
    version = next((each.version for each in model.opset_import if each.domain in _OWN), 0)
    if version < _OLDEST:
        raise ModelError(
            message(
                "fold: operator set of the ONNX model",
                got=version or "none",
                expected=f"{_OLDEST} or newer",
                fix="onnx.version_converter.convert_version(model, 7) makes a newer one.",
            )
        )
    new = copy.deepcopy(model)
    reading = _Reading(onnx, new, version)
    gone, stays = plan(reading.steps, reading.readers)
    skipped = [Skipped(step.name, reason) for step, reason in stays]
    skipped += [Skipped(name, f"it stands {where}") for name, where in _inner_norms(model)]
    if gone:
        _Writing(reading).write(gone)
    changed = tuple(Change(each.step.name, each.step.what, "gone", note=each.note) for each in gone)
    return Changes(new if gone else model, changed, tuple(skipped), "fold", _original=model)


def _name(node: "NodeProto") -> str:
    return node.name or next((each for each in node.output if each), node.op_type)


def _is(node: "NodeProto", *kinds: str) -> bool:
    return node.domain in _OWN and node.op_type in kinds


def _bodies(node: "NodeProto") -> Iterator["GraphProto"]:
    """The graphs that a node holds: branches, the body of a loop."""
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs


def _inner_norms(model: "ModelProto") -> Iterator[tuple[str, str]]:
    for node in model.graph.node:
        for body in _bodies(node):
            for inner in _all_nodes(body.node):
                if _is(inner, "BatchNormalization"):
                    yield _name(inner), f"in a graph of {node.op_type} ({_name(node)})"
    for function in model.functions:
        for inner in _all_nodes(function.node):
            if _is(inner, "BatchNormalization"):
                yield _name(inner), f"in the function {function.name}"


def _all_nodes(nodes: Sequence["NodeProto"]) -> Iterator["NodeProto"]:
    for node in nodes:
        yield node
        for body in _bodies(node):
            yield from _all_nodes(body.node)


def _captured(node: "NodeProto") -> Iterator[str]:
    """What the graphs that a node holds may take from outside; names of their own among it do no harm."""
    for body in _bodies(node):
        yield from (output.name for output in body.output)
        for inner in _all_nodes(body.node):
            yield from (name for name in inner.input if name)
            for further in _bodies(inner):
                yield from (output.name for output in further.output)


class _Reading:
    """The steps of an ONNX graph."""

    def __init__(self, onnx: Any, model: "ModelProto", version: int) -> None:
        self.onnx, self.model, self.graph, self.version = onnx, model, model.graph, version
        self.nodes = list(self.graph.node)
        self.values: dict[str, TensorProto] = {each.name: each for each in self.graph.initializer}
        if model.ir_version >= 4:  # an initializer that is an input, too, is a default then
            for each in self.graph.input:
                self.values.pop(each.name, None)
        for node in self.nodes:
            if _is(node, "Constant"):
                self.values.update(
                    (node.output[0], each.t) for each in node.attribute if each.name == "value"
                )
        self.uses = uses(self.graph, self.nodes)
        self.steps: list[Step] = []
        self.readers: dict[Hashable, list[Step | str]] = defaultdict(list)
        added: list[NodeProto] = []
        for node in self.nodes:
            step = None if node in added else self._step(node)
            if step is not None:
                self.steps.append(step)
                added += step.node[1:]
            for name in (*node.input, *_captured(node)):
                if not (node in added and self.steps and self._inside(name)):
                    self.readers[name].append(step or node.op_type)
        for output in self.graph.output:
            self.readers[output.name].append("an output of the model")

    def _inside(self, name: str) -> bool:
        """Whether a value is the product to which a layer of two nodes adds its bias."""
        return any(len(step.node) > 1 and name in step.node[0].output for step in self.steps)

    def _step(self, node: "NodeProto") -> Step | None:
        if _is(node, "BatchNormalization"):
            return self._norm(node)
        if _is(node, "Conv", "ConvTranspose"):
            return self._convolution(node)
        if _is(node, "Gemm"):
            return self._gemm(node)
        if _is(node, "MatMul"):
            return self._product(node)
        if _is(node, "Identity") or (_is(node, "Dropout") and self._off(node)):
            return Step(_name(node), node.op_type, node.input[0], node.output[0], [node])
        return None

    def _off(self, dropout: "NodeProto") -> bool:
        """Whether a dropout passes its input on: it has no output but that, and is not told to train."""
        return len(dropout.output) == 1 and (len(dropout.input) < 3 or not dropout.input[2])

    def _attributes(self, node: "NodeProto") -> dict[str, Any]:
        read = self.onnx.helper.get_attribute_value
        return {each.name: read(each) for each in node.attribute}

    def number(self, name: str) -> Tensor | None:
        """The numbers of a value that is the same in every call, in float64."""
        held = self.values.get(name)
        if held is None:
            return None
        return torch.from_numpy(np.array(self.onnx.numpy_helper.to_array(held), dtype=np.float64))

    def _norm(self, node: "NodeProto") -> Step:
        given, numbers = self._attributes(node), [self.number(name) for name in node.input[1:]]
        eps = float(given.get("epsilon", 1e-5))
        channels = next((each.numel() for each in numbers if each is not None), 0)
        what = f"BatchNormalization({channels}, epsilon={eps:.6g})"
        step = Step(_name(node), what, node.input[0], node.output[0], [node], is_norm=True)
        outputs = sum(bool(name) for name in node.output)
        training = given.get("training_mode", 0) if self.version >= 14 else outputs > 1
        if training:
            step.why = "it is in training mode and normalizes with the batch's statistics"
        elif outputs > 1:
            step.why = "more than its output is used"
        elif self.version < 9 and not given.get("spatial", 1):
            step.why = "it has statistics for each place (spatial=0)"
        elif len(numbers) != 4 or any(each is None or each.numel() != channels for each in numbers):
            step.why = _COMPUTED
        else:
            gamma, beta, mean, var = numbers
            step.norm = Norm.given(channels, mean, var, gamma, beta, eps)
        return step

    def _convolution(self, node: "NodeProto") -> Step:
        given, transposed = self._attributes(node), node.op_type == "ConvTranspose"
        step = self._layer([node], node.input[1], node.input[2] if len(node.input) > 2 else "")
        weight = self.number(node.input[1])
        if step.why or weight is None:
            return step
        step.axes = weight.dim() - 2
        auto = given.get("auto_pad", b"NOTSET").decode()
        padding: Any = {"NOTSET": given.get("pads", ()), "VALID": "valid"}.get(auto, "same")
        if transposed:
            more = given.get("output_shape", given.get("output_padding", ()))
            padding = () if padding == "valid" else padding
            stride = given.get("strides", (1,))
            step.shift = reaches_all(weight.shape[2:], padding, stride=stride, more=more)
        else:
            step.shift = reaches_all(weight.shape[2:], padding)
        self._weigh(step, weight, step.node[0].input[2:3], int(given.get("group", 1)), transposed)
        return step

    def _gemm(self, node: "NodeProto") -> Step:
        given = self._attributes(node)
        step = self._layer([node], node.input[1], node.input[2] if len(node.input) > 2 else "")
        step.rank = 2
        weight = self.number(node.input[1])
        if given.get("transA", 0):
            step.why = "it transposes its input"
        if step.why or weight is None:
            return step
        weight = weight if given.get("transB", 0) else weight.T
        self._weigh(step, weight * given.get("alpha", 1.0), step.node[0].input[2:3])
        if step.weights is not None:
            step.weights.bias = step.weights.bias * given.get("beta", 1.0)
        return step

    def _product(self, node: "NodeProto") -> Step | None:
        weight = self.number(node.input[1])
        if weight is None or weight.dim() != 2:
            return None
        after = [each for each in self.nodes if node.output[0] in each.input]
        nodes, bias = [node], ""
        if len(after) == 1 and self.uses[node.output[0]] == 1 and _is(after[0], "Add"):
            other = next((name for name in after[0].input if name != node.output[0]), "")
            held = self.number(other)
            if held is not None and held.numel() in (1, weight.shape[1]) and held.dim() <= 2:
                nodes, bias = [node, after[0]], other
        step = self._layer(nodes, node.input[1], bias)
        step.rank = self.ranks.get(nodes[-1].output[0])
        if not step.why:
            self._weigh(step, weight.T, [bias])
        return step

    def _layer(self, nodes: "list[NodeProto]", weight: str, bias: str) -> Step:
        """A step for a layer, without its weights."""
        what = "+".join(each.op_type for each in nodes)
        step = Step(_name(nodes[0]), what, nodes[0].input[0], nodes[-1].output[0], nodes, is_layer=True)
        step.has_bias = bool(bias)
        held = self.values.get(weight)
        if held is None or (bias and bias not in self.values):
            step.why = _COMPUTED
        elif self.uses[weight] > 1:
            step.why = "its weight is used elsewhere, too"
        else:
            kind = self.onnx.helper.tensor_dtype_to_np_dtype(held.data_type).name
            found = getattr(torch, kind, None)
            if found is None or not found.is_floating_point:
                step.why = f"its weight is {kind}"
            else:
                step.largest = torch.finfo(found).max
        return step

    def _weigh(
        self, step: Step, weight: Tensor, bias: Sequence[str], groups: int = 1, transposed: bool = False
    ) -> None:
        weights = Weights(weight, torch.empty(0), groups, transposed)
        held = self.number(bias[0]) if bias and bias[0] else None
        if held is not None and held.numel() not in (1, weights.width):
            step.why = "its bias is no vector"
            return
        zeros = torch.zeros(weights.width, dtype=torch.float64)
        weights.bias = zeros if held is None else zeros + held.reshape(-1)
        step.weights = weights

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """How many axes each value has, as far as it can be told. Large constants are replaced by their shapes."""
        make = self.onnx.helper
        light = self.onnx.ModelProto()
        light.ir_version = max(self.model.ir_version, 4)
        light.opset_import.extend(self.model.opset_import)
        light.functions.extend(self.model.functions)
        light.graph.name = self.graph.name
        light.graph.node.extend(self.nodes)
        light.graph.output.extend(self.graph.output)
        known = {each.name for each in self.graph.input}
        light.graph.input.extend(self.graph.input)
        for each in self.graph.initializer:
            if int(np.prod(each.dims)) <= _SMALL:
                light.graph.initializer.append(each)
            elif each.name not in known:
                light.graph.input.append(make.make_tensor_value_info(each.name, each.data_type, each.dims))
        try:
            graph = self.onnx.shape_inference.infer_shapes(light).graph
        except (self.onnx.shape_inference.InferenceError, RuntimeError):
            # A node of another package, or one that does not fit: what is declared is known all the same.
            graph = self.graph
        told = (each for each in (*graph.value_info, *graph.input, *graph.output))
        return {
            each.name: len(each.type.tensor_type.shape.dim)
            for each in told
            if each.type.tensor_type.HasField("shape")
        }


def uses(graph: "GraphProto", nodes: Sequence["NodeProto"]) -> Counter[str]:
    """How often each value is read; an output of the graph is read once more."""
    found = Counter(name for node in nodes for name in (*node.input, *_captured(node)))
    found.update(each.name for each in graph.output)
    return found


class _Writing:
    """Changes the graph that was read."""

    def __init__(self, reading: _Reading) -> None:
        self.onnx, self.graph, self.read = reading.onnx, reading.graph, reading
        self.old_ir = reading.model.ir_version < 4
        self.nodes = list(reading.nodes)
        self.names = {name for node in _all_nodes(self.nodes) for name in (*node.input, *node.output)}
        self.names |= {each.name for each in (*self.graph.input, *self.graph.initializer)}

    def write(self, gone: Sequence[Gone]) -> None:
        """Store the weights, take the batch norms out and whatever only they read."""
        for layer in {id(layer): layer for each in gone for layer in each.into}.values():
            self._store(layer)
        for each in gone:
            self._drop(each)
        now = uses(self.graph, self.nodes)

        def needed(name: str) -> bool:
            return bool(now[name]) or not self.read.uses[name]

        nodes = [node for node in self.nodes if not _is(node, "Constant") or needed(node.output[0])]
        kept = [each for each in self.graph.initializer if needed(each.name)]
        gone_names = {each.name for each in self.graph.initializer} - {each.name for each in kept}
        inputs = [each for each in self.graph.input if not (self.old_ir and each.name in gone_names)]
        alive = {name for node in nodes for name in (*node.input, *node.output)}
        infos = [each for each in self.graph.value_info if each.name in alive]
        tables = (("node", nodes), ("initializer", kept), ("input", inputs), ("value_info", infos))
        for name, rows in tables:
            rows = [copy.deepcopy(each) for each in rows]
            self.graph.ClearField(name)
            getattr(self.graph, name).extend(rows)

    def _drop(self, gone: Gone) -> None:
        (node,) = gone.step.node
        source, result = node.input[0], node.output[0]
        self.nodes = [each for each in self.nodes if each is not node]
        for each in self.nodes:
            # Behind a layer the result keeps its name, which an output of the model may have.
            names = each.output if gone.behind else each.input
            old, new = (source, result) if gone.behind else (result, source)
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new

    def _store(self, layer: Step) -> None:
        """The new weight and bias of a layer."""
        weights, first, last = layer.weights, layer.node[0], layer.node[-1]
        assert weights is not None  # only layers that have them take a batch norm
        old = self.read.values[first.input[1]]
        weight = weights.weight
        if first.op_type == "MatMul":
            weight = weight.T
        elif first.op_type == "Gemm":
            attributes = self.read._attributes(first)
            weight = weight if attributes.get("transB", 0) else weight.T
            kept = [copy.deepcopy(each) for each in first.attribute if each.name not in ("alpha", "beta")]
            first.ClearField("attribute")
            first.attribute.extend(kept)
        name = first.input[1]
        first.input[1] = self._put(name, weight, old.data_type, name)
        if first.op_type == "MatMul":
            self._add(layer, weights.bias, old.data_type)
            return
        bias = first.input[2] if len(first.input) > 2 else ""
        new = self._put(bias, weights.bias, old.data_type, name)
        if len(first.input) > 2:
            first.input[2] = new
        else:
            last.input.append(new)

    def _add(self, layer: Step, bias: Tensor, kind: int) -> None:
        """The bias of a matrix product, with an addition of its own where there was none."""
        product = layer.node[0]
        if len(layer.node) > 1:
            addition = layer.node[1]
            place = 1 - list(addition.input).index(product.output[0])
            addition.input[place] = self._put(addition.input[place], bias, kind, product.input[1])
            return
        result = product.output[0]
        product.output[0] = self._fresh(f"{result}_product")
        name = self._put("", bias, kind, product.input[1])
        addition = self.onnx.helper.make_node("Add", [product.output[0], name], [result])
        addition.name = f"{_name(product)}_bias" if product.name else ""
        self.nodes.insert(self.nodes.index(product) + 1, addition)

    def _put(self, name: str, value: Tensor, kind: int, beside: str) -> str:
        """Store numbers as an initializer: under this name where nothing else reads it, else under a new one."""
        numbers = value.contiguous().numpy().astype(self.onnx.helper.tensor_dtype_to_np_dtype(kind))
        for each in self.graph.initializer:
            if name and each.name == name and self.read.uses[name] == 1:
                each.CopyFrom(self.onnx.numpy_helper.from_array(numbers, name))
                self._declare(name, kind, numbers.shape)
                return name
        new = self._fresh(f"{beside}_folded" if name else f"{beside}_bias")
        self.graph.initializer.append(self.onnx.numpy_helper.from_array(numbers, new))
        self._declare(new, kind, numbers.shape)
        return new

    def _declare(self, name: str, kind: int, shape: Sequence[int]) -> None:
        """Before version 4 of the format every initializer is an input, too."""
        if self.old_ir:
            rows = [copy.deepcopy(each) for each in self.graph.input if each.name != name]
            rows.append(self.onnx.helper.make_tensor_value_info(name, kind, shape))
            self.graph.ClearField("input")
            self.graph.input.extend(rows)

    def _fresh(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self.names:
            name, number = f"{wanted}_{number}", number + 1
        self.names.add(name)
        return name
