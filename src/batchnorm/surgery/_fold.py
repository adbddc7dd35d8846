"""`fold`: batch norm into the layer beside it, for inference."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from batchnorm._errors import ModelError, message
from batchnorm._walk import Changes, Plan, prepared
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._fitness import has_more, of_a_domain, outside, unfit_norm, unfit_pair, unfit_producer
from batchnorm.surgery._fold_any import fold_graph
from batchnorm.surgery._folding import Folded, Norm, dimensions, takes_shift
from batchnorm.surgery._links import Links
from batchnorm.surgery._rank import ranks
from batchnorm.surgery._trace import Traced, apply_checked, optional, trace_parts
from batchnorm.surgery._unnormalized import Rows, Unnormalized, activation_layer
from batchnorm.surgery._verify import Example

__all__ = ["fold"]


def fold(model: Any, example: object = None, *, inplace: bool = False) -> Changes:
    r"""Fold batch norm into the convolution or linear layer beside it: the same outputs, for inference.

    $$y = \frac{\gamma}{\sqrt{\mathrm{var} + \varepsilon}} (W x + b - \mathrm{mean}) + \beta$$

    With the running statistics this is again a layer with a weight and a bias. It is computed in float64 and stored in
    the layer's dtype. Convolutions and transposed convolutions (1d, 2d, 3d, groups) and linear layers take the batch
    norm behind them, or the one before them where nothing but them reads it and the shift survives the padding: zeros
    that a convolution pads with would not get it. A batch norm next to another one is folded into that. What stands
    between the two may be `nn.Identity` or dropout. The activation that a layer of this package holds stays in its
    place, and so do its residual and its mask.

    Left alone, each with the reason in `skipped`: a batch norm in training mode or without running statistics; a layer
    whose output goes elsewhere, too, or that is called behind several batch norms; what carries hooks, computes its
    weight (parametrizations, weight norm), shares it with another layer, or has a forward of its own. A linear layer
    that is fed (N, L, C) has its channels last, BatchNorm1d behind it has them on axis 1, so these two are not folded;
    where neither the graph nor an example tells the number of axes, a `Rows` layer stays behind that raises an error
    on anything but (N, C).

    The calls are found by `torch.fx`, in the mode that the model is in. Where the forward as a whole cannot be
    followed, the largest parts that can be are folded each by itself, and `notes` says so. That is safe unless
    something outside reaches into such a part; an example checks it.

    An exported program (`torch.export`) and an ONNX model, or their files, are folded by their graphs into a new one:
    `changes.model` is what `torch.export.save` and `onnx.save` write. A batch norm next to another batch norm, one in
    a branch or a loop, and a layer whose weight is no constant or is used twice stay; an ONNX model needs operator set
    7 or newer and the package onnx. `batchnorm fold` does the same on the command line.

    Args:
        model: any module in evaluation mode, a `torch.export.ExportedProgram`, an `onnx.ModelProto`, or the path of a
            `.pt2` or an `.onnx` file.
        example: the arguments of one call: a tensor, a tuple of positional or a dictionary of keyword arguments. The
            model is run on it before and after; `notes` has the error of each output. A relative error (to the
            largest value) above √eps of the dtype, 3.5e-4 for float32, is an error.
        inplace: change `model` itself, a module; else a deep copy is changed. Weights and biases that are folded are
            new parameters either way.

    Returns:
        Changes: `model` is the folded network, `changed` has one entry a batch norm that went; `revert()` takes it
        back.

    Raises:
        InputTypeError: `model` is none of these.
        InputError: `inplace` with another thing than a module; a file of another kind, or none.
        ModelError: the model is in training mode, scripted, wrapped for distributed training or cannot be copied; the
            example does not run, or gives something else after folding. Nothing is changed then.

    Source: Jacob et al., Quantization and Training of Neural Networks, 2018, section 3.2, arXiv:1712.05877.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import batchnorm
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> changes = batchnorm.fold(net, torch.randn(1, 3, 6, 6))
        >>> changes.model
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
        >>> changes.changed[0].note
        'folded into 0, which has a bias now'
    """
    if not isinstance(model, nn.Module):
        return fold_graph(model, example, inplace=inplace)
    target = prepared(model, operation="fold", inplace=inplace)
    if target.training:
        raise ModelError(
            message(
                "fold: model",
                got="a model in training mode",
                expected="evaluation mode, in which batch norm is a fixed affine map",
                fix="Call model.eval() first.",
            )
        )
    check = None if example is None else Example(example, "fold", target)
    given = None if check is None else check.arguments(target)
    parts, problem = trace_parts(target, kinds.is_batch_norm, given=given)
    notes = _notes(target, parts, problem, checked=check is not None)
    observed = {} if check is None else check.ranks
    changes = apply_checked(target, parts, lambda kept: _Folding(target, parts, observed, kept).plan(notes))
    if check is not None and changes.changed:
        try:
            changes.notes += tuple(f"on the example, {line}" for line in check.compare(changes.model))
        except BaseException:
            changes.revert()
            raise
    return changes


def _notes(model: nn.Module, parts: Sequence[Traced], problem: str, *, checked: bool) -> list[str]:
    if problem:
        taken = ", ".join(part.part for part in parts) or "none"
        tail = "" if checked else "; pass an example to check that nothing outside reaches into them"
        return [
            f"the forward could not be traced ({problem}); parts that could, taken each by itself: {taken}{tail}"
        ]
    arguments = sorted(optional(model.forward)) if parts and not checked else []
    if arguments:
        return [f"traced with these arguments at their defaults: {', '.join(arguments)}"]
    return []


class _Folding:
    """What is folded into what; nothing is touched while it is found out."""

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Traced],
        observed: Mapping[str, set[int]],
        kept: Mapping[str, str],
    ) -> None:
        self.result = Plan("fold", model)
        self.parts, self.observed, self.kept = parts, observed, kept
        self.spots = {id(spot.module): spot for spot in self.result.spots}
        self.uses = Counter(
            id(p) for spot in self.result.spots for p in spot.module._parameters.values() if p is not None
        )
        self.layers: dict[int, Folded] = {}
        self.norms: dict[int, Norm] = {}
        self.merged: dict[int, nn.Module] = {}
        self.folded: dict[int, tuple[nn.Module, list[nn.Module]]] = {}
        self.reasons: dict[int, str] = {}

    def plan(self, notes: Sequence[str]) -> Plan:
        for note in notes:
            self.result.note(note)
        for part in self.parts:
            self._part(part)
        for spot in self.result.spots:
            key = id(spot.module)
            if key in self.folded:
                stays, into = self.folded[key]
                self.result.replace(spot, stays, note=self._told(into))
            elif kinds.is_batch_norm(spot.module):
                reason = self.reasons.get(key, "no forward that could be traced calls it")
                self.result.skip(spot, of_a_domain(spot) or reason)
        for layer in self.layers.values():
            weight, bias = layer.parameters()
            self.result.set_parameter(layer.layer, "weight", weight)
            self.result.set_parameter(layer.layer, "bias", bias)
        for note in self._guarded():
            self.result.note(note)
        for key, module in self.merged.items():
            if key not in self.folded:
                self._rewrite(module, self.norms[key])
        return self.result

    def _part(self, part: Traced) -> None:
        links = Links(part, dropped=True)
        known = ranks(part)
        called = {
            id(module): module for node in part.graph.nodes if (module := part.module(node)) is not None
        }
        norms = [module for module in called.values() if kinds.is_batch_norm(module)]
        sound = []
        for norm in norms:
            spot = self.spots[id(norm)]
            reason = next((self.kept[name] for name in spot.names if name in self.kept), "")
            reason = reason or outside(part, spot) or unfit_norm(norm, part)
            if reason:
                self.reasons[id(norm)] = reason
            else:
                sound.append(norm)
                self.norms[id(norm)] = Norm.of(norm)
        for norm in sound:
            rank = self._rank(norm, {known.get(node.all_input_nodes[0]) for node in part.calls(norm)})
            self.reasons[id(norm)] = self._into_the_one_before(norm, links, rank)
        for norm in reversed(sound):
            if id(norm) in self.folded:
                continue
            rank = self._rank(norm, {known.get(node.all_input_nodes[0]) for node in part.calls(norm)})
            why = self._into_those_after(norm, links, rank)
            self.reasons[id(norm)] += f"; {why}"

    def _rank(self, norm: nn.Module, known: set[int | None]) -> set[int | None]:
        seen: set[int | None] = set()
        for name in self.spots[id(norm)].names:
            seen |= self.observed.get(name, set())
        return seen or known

    def _into_the_one_before(self, norm: nn.Module, links: Links, rank: set[int | None]) -> str:
        layer, why = links.feeding(norm)
        why = why or self._unfit(layer, norm, links.traced, rank)
        if why or layer is None:
            return why
        if kinds.width(layer) != norm.num_features:
            return f"{self._named(layer)} comes before it with other channels"
        guarded = dimensions(layer) == 0 and rank != {2}
        if guarded and has_more(norm, links.traced):
            return f"whether {self._named(layer)} is fed (N, C) is not known: pass an example"
        folded = (self.layers.get(id(layer)) or Folded(layer)).then(self.norms[id(norm)])
        if not folded.fits:
            return self._overflows(layer)
        self.layers[id(layer)] = folded
        self._go(norm, [layer], links, guarded=guarded)
        return ""

    def _into_those_after(self, norm: nn.Module, links: Links, rank: set[int | None]) -> str:
        layers, why = links.fed(norm)
        if why:
            return why
        if getattr(norm, "activation", None) is not None or has_more(norm, links.traced):
            return "its activation, residual or mask comes before the layer after it"
        if len(layers) == 1 and kinds.is_batch_norm(layers[0]):
            return self._merge(norm, layers[0], links)
        numbers = self.norms[id(norm)]
        for layer in layers:
            why = self._unfit(layer, norm, links.traced, rank)
            if not why and kinds.depth(layer) != norm.num_features:
                why = f"{self._named(layer)} comes after it with other channels"
            if not why and bool((numbers.offset != 0).any()) and takes_shift(layer):
                why = f"{self._named(layer)} comes after it and cannot take its shift: {takes_shift(layer)}"
            if why:
                return why
        trial = {
            id(layer): (self.layers.get(id(layer)) or Folded(layer)).preceded(numbers) for layer in layers
        }
        if not all(folded.fits for folded in trial.values()):
            return self._overflows(layers[0])
        self.layers.update(trial)
        self._go(norm, layers, links, guarded=any(dimensions(each) == 0 for each in layers) and rank != {2})
        return ""

    def _unfit(self, layer: nn.Module | None, norm: nn.Module, traced: Traced, rank: set[int | None]) -> str:
        if layer is None:
            return ""
        why = outside(traced, self.spots[id(layer)]) or unfit_producer(layer, traced, self.uses)
        why = why or unfit_pair(layer, norm, dimensions(layer), rank)
        return f"{self._named(layer)} stands next to it: {why}" if why else ""

    def _merge(self, norm: nn.Module, after: nn.Module, links: Links) -> str:
        if id(after) not in self.norms:
            return f"{self._named(after)} comes after it: {self.reasons[id(after)]}"
        if after._parameters.get("weight") is None or after._parameters.get("bias") is None:
            return f"{self._named(after)} comes after it and has no weight and bias to take it"
        if after.num_features != norm.num_features:
            return f"{self._named(after)} comes after it with other channels"
        if any(self.uses[id(p)] > 1 for p in after._parameters.values() if p is not None):
            return f"{self._named(after)} comes after it and shares a parameter with another layer"
        self.norms[id(after)] = self.norms[id(after)].after(self.norms[id(norm)])
        self.merged[id(after)] = after
        self._go(norm, [after], links, guarded=False)
        return ""

    def _go(self, norm: nn.Module, into: list[nn.Module], links: Links, *, guarded: bool) -> None:
        activation = getattr(norm, "activation", None)
        slope = float(getattr(norm, "negative_slope", 0.01))
        more = has_more(norm, links.traced)
        stays: nn.Module = Unnormalized(activation, slope) if more else activation_layer(activation, slope)
        if activation is None and not more:
            links.gone.add(id(norm))
        if guarded:
            stays = Rows() if activation is None else nn.Sequential(Rows(), stays)
        for module in stays.modules():
            module.training = norm.training
        self.folded[id(norm)] = (stays, into)

    def _named(self, module: nn.Module) -> str:
        return f"{type(module).__name__} ({self.spots[id(module)].name})"

    def _overflows(self, layer: nn.Module) -> str:
        weight = layer._parameters["weight"]
        return f"the folded weight of {self._named(layer)} does not fit {weight.dtype if weight is not None else ''}"

    def _told(self, into: Sequence[nn.Module]) -> str:
        parts = []
        for layer in into:
            gains = not kinds.is_batch_norm(layer) and layer._parameters.get("bias") is None
            parts.append(self.spots[id(layer)].name + (", which has a bias now" if gains else ""))
        return f"folded into {' and '.join(parts)}"

    def _guarded(self) -> list[str]:
        """What is to be known of the `Rows` layers that stay."""
        names = [
            spot.name
            for spot in self.result.spots
            if id(spot.module) in self.folded
            and any(isinstance(each, Rows) for each in self.folded[id(spot.module)][0].modules())
        ]
        if not names:
            return []
        return [
            f"whether the input of the linear layer is (N, C) was not seen for {', '.join(names)}: Rows stays there, "
            "which raises an error on input of another number of axes; with an example it is not needed"
        ]

    def _rewrite(self, module: nn.Module, norm: Norm) -> None:
        """Other numbers for a batch norm that took the one before it; its variance stays."""
        for name, value in norm.as_layer(module).items():
            if name == "running_mean":
                self.result.set_buffer(module, name, value)
            else:
                old = module._parameters[name]
                self.result.set_parameter(
                    module,
                    name,
                    nn.Parameter(value, requires_grad=bool(old is not None and old.requires_grad)),
                )
