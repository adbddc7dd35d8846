"""`fuse`: activation and residual into the batch norm before them, for training."""

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from batchnorm import nn as ours
from batchnorm import ops
from batchnorm._walk import Changes, Plan, Spot, hooks_of, prepared
from batchnorm.surgery import _kinds as kinds
from batchnorm.surgery._fitness import of_a_domain, outside, unconvertible
from batchnorm.surgery._links import Links
from batchnorm.surgery._matches import Activation, Match, common, match
from batchnorm.surgery._memory import AGAIN, Memory, check_memory, too_long
from batchnorm.surgery._rewrite import fused_class
from batchnorm.surgery._trace import Traced, Untraceable, apply_checked, trace, trace_parts

__all__ = ["fuse"]

CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: ours.BatchNorm1d,
    nn.BatchNorm2d: ours.BatchNorm2d,
    nn.BatchNorm3d: ours.BatchNorm3d,
    ours.BatchNorm1d: ours.BatchNorm1d,
    ours.BatchNorm2d: ours.BatchNorm2d,
    ours.BatchNorm3d: ours.BatchNorm3d,
}
_CALLED = ("forward hook", "forward pre-hook", "backward hook", "backward pre-hook")


def fuse(model: nn.Module, *, memory: Memory = "keep", inplace: bool = False) -> Changes:
    r"""Let each batch norm do what comes right behind it, in one pass: the same network, to be trained faster.

    $$y = \mathrm{act}\left(\mathrm{bn}(x) + \mathrm{residual}\right)$$

    Every BatchNorm1d, 2d and 3d of `torch.nn` becomes the one of this package, as the very same object: parameters,
    buffers, hooks and names in the state dict stay. It takes over the activation that follows it (relu, relu6,
    leaky_relu, silu, hardswish, and gelu in its exact form; as a layer, a function or a method, in place or not), an
    addition that follows it, or both.

    An activation layer that nothing else uses becomes `nn.Identity`; so does one in an `nn.Sequential`, there. Where
    the addition or the activation stands in the code of a forward, as in a residual block, the innermost module that
    holds all of it gets a forward that is written anew from its `torch.fx` graph. It stays the same object with the
    same children, and its class is a subclass of the one it had. Such a forward is the code as it was at this moment:
    attributes that it decides by (`if self.downsample is not None`) have been decided.

    What stays between batch norm and activation, and why, is in the notes of `changed`: dropout or anything else
    between the two, an output that goes elsewhere, too, hooks on one of the two, a forward that is another one in
    training than in evaluation, has optional arguments or a `with` block (`torch.no_grad()`). `skipped` has the batch
    norms that were not touched: synchronized and lazy ones, subclasses, parametrized ones.

    Where a forward as a whole cannot be traced, its largest parts that can be are fused each by itself, and `notes`
    says so. A sum has the shape and the dtype of the batch norm's output: a residual that is smaller is expanded, a
    larger one is an error when the model is called.

    With `memory="recompute"` the output of a batch norm is not kept for the backward of what it goes to (a convolution,
    a pooling, a product) but computed again from the input of the batch norm, which is kept anyway, with the mean and
    the variance of the forward: a third less memory for activations in a ResNet-50, for a pass over the elements
    each. Gradients have the same bits with this package's kernels (rounding apart in float64, and with PyTorch's). In a
    residual block the residual is needed, too, and may be computed again itself; after two in a row an output is kept,
    and `changed` says which. Outputs are kept as before where PyTorch or somebody else decides what is kept: inside
    torch.compile, under saved-tensor hooks and in what torch.utils.checkpoint runs.

    Args:
        model: any module, in training or evaluation mode.
        memory: "keep" or "recompute" what backward needs of the outputs. "keep" leaves a layer that recomputes as it
            is; `revert()` makes it keep again.
        inplace: change `model` itself; else a deep copy is changed. An optimizer of the model stays valid.

    Returns:
        Changes: `model` is the fused network, `changed` has the batch norms, activations and modules that are others
        now; `revert()` takes it back.

    Raises:
        InputTypeError: `model` is no module.
        InputError: `memory` is none of the two.
        ModelError: the model is scripted, wrapped for distributed training or cannot be copied.

    Example:
        >>> from torch import nn
        >>> import batchnorm
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> batchnorm.fuse(net).model
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): BatchNorm2d(8, eps=1e-05, momentum=0.1, ..., activation=relu)
          (2): Identity()
        )
    """
    check_memory(memory)
    target = prepared(model, operation="fuse", inplace=inplace)
    parts, problem = trace_parts(target, kinds.is_batch_norm, training=True)
    notes = []
    if problem:
        taken = ", ".join(part.part for part in parts) or "none"
        notes = [
            f"the forward could not be traced ({problem}); parts that could, taken each by itself: {taken}"
        ]
    return apply_checked(target, parts, lambda kept: _Fusing(target, parts, kept, memory).plan(notes))


@dataclass(eq=False)
class _Calls:
    """What all calls of one batch norm have behind them, in training and in evaluation."""

    module: nn.Module
    part: Traced
    matches: list[Match] = field(default_factory=list)
    kind: Activation | None = None

    def layers(self) -> set[int]:
        """The activation layers behind it, by their ids; empty if one of them is none, or comes behind an addition."""
        found = {id(each.layer) for each in self.matches if each.layer is not None and each.addition is None}
        plain = all(each.layer is not None and each.addition is None for each in self.matches)
        return found if plain else set()

    def inside(self, owner: str) -> set[str]:
        """The modules within `owner` in whose forwards a part of it happens."""
        return {name for each in self.frames() for name in each[each.index(owner) + 1 if owner else 0 :]}

    def frames(self) -> list[tuple[str, ...]]:
        """Where each of its calls, and each addition and activation, is made."""
        nodes = [node for m in self.matches for node in (m.norm, m.addition, m.activation)]
        return [self.part.frame(node) for node in nodes if node is not None]


class _Fusing:
    """What becomes of each batch norm; nothing is touched while it is found out."""

    def __init__(
        self, model: nn.Module, parts: Sequence[Traced], kept: Mapping[str, str], memory: Memory
    ) -> None:
        self.result = Plan("fuse", model)
        self.model, self.kept, self.memory = model, kept, memory
        self.outputs_kept: dict[int, str] = {}
        self.spots = {id(spot.module): spot for spot in self.result.spots}
        self.graphs: dict[str, list[Traced]] = {}
        self.notes: dict[int, str] = {}
        self.taken: dict[int, Activation | None] = {}
        self.identities: set[int] = set()
        self.places: list[Spot] = []
        self.rewritten: dict[int, type[nn.Module]] = {}
        for part in parts:
            try:
                other = trace(model, training=False, part=part.part)
            except Untraceable:
                continue
            self.graphs[part.part] = [part, other]

    def plan(self, notes: Sequence[str]) -> Plan:
        for note in notes:
            self.result.note(note)
        for graphs in self.graphs.values():
            self._part(graphs)
        if self.memory == "recompute":
            self.outputs_kept = too_long([graphs[0] for graphs in self.graphs.values()], self.taken)
        for spot in self.result.spots:
            if kinds.is_batch_norm(spot.module):
                self._norm(spot)
            elif id(spot.module) in self.identities:
                new = nn.Identity()
                new.training = spot.module.training
                self.result.replace(spot, new, note="the batch norm before it does it")
            elif id(spot.module) in self.rewritten:
                self.result.set_class(spot.module, self.rewritten[id(spot.module)])
                self.result.alter(spot, note="its forward calls the fused layers")
        for place in self.places:
            new = nn.Identity()
            new.training = place.module.training
            self.result.replace(place, new, note="the batch norm before it does it")
        if self.memory == "recompute":
            # What the last operators of the model have saved, no layer behind them sees.
            self.result.add_forward_hook(self.model, ops.look_behind_output)
            if not ops.CAN_SEE:
                self.result.note("outputs are kept all the same: this version of PyTorch hides what is saved")
        return self.result

    def _norm(self, spot: Spot) -> None:
        module = spot.module
        reason = next((self.kept[name] for name in spot.names if name in self.kept), "")
        reason = reason or of_a_domain(spot) or unconvertible(module, CLASSES)
        kind = self.taken.get(id(module))
        why = self.notes.get(id(module), "no forward that could be traced calls it")
        again = self.memory == "recompute" and id(module) not in self.outputs_kept
        same = not again or getattr(module, "memory", "keep") == "recompute"
        if not reason and CLASSES[type(module)] is type(module) and id(module) not in self.taken and same:
            reason = "; ".join(each for each in (why, self.outputs_kept.get(id(module))) if each)
        if reason:
            self.result.skip(spot, reason)
            return
        self.result.set_class(module, CLASSES[type(module)])
        # By this attribute torch.fx takes the layer for a leaf, as it does PyTorch's.
        self.result.set_attribute(module, "__module__", nn.BatchNorm1d.__module__)
        if kind is not None:
            self.result.set_attribute(module, "activation", kind.name)
            self.result.set_attribute(module, "negative_slope", kind.slope)
        if again:
            self.result.set_attribute(module, "memory", "recompute")
        output = AGAIN if again else self.outputs_kept.get(id(module), "")
        only_class = id(module) not in self.taken and not again
        self.result.alter(spot, note=f"{why}; {output}" if output else why, only_class=only_class)

    def _part(self, graphs: list[Traced]) -> None:
        candidates: dict[int, _Calls] = {}
        for graph in graphs:
            links = Links(graph, dropped=False)
            modules = {id(m): m for node in graph.graph.nodes if (m := graph.module(node)) is not None}
            for module in modules.values():
                if kinds.is_batch_norm(module) and id(module) not in self.notes:
                    self._look(module, links, candidates)
        self._whole_layers(candidates, graphs)
        self._in_sequences(candidates)
        self._in_forwards(candidates)

    def _look(self, module: nn.Module, links: Links, candidates: dict[int, _Calls]) -> None:
        """What follows the calls of one batch norm; a note where it is not one thing that the layer can do."""
        why = self._unfit(module, links.traced)
        calls = candidates.setdefault(id(module), _Calls(module, links.traced))
        for call in links.traced.calls(module):
            found, why_not = match(call, links)
            why = why or why_not
            if found is not None:
                if calls.matches and found.kind != calls.kind:
                    why = why or "its calls are followed by different activations"
                calls.matches.append(found)
                calls.kind = found.kind
        if why:
            self.notes[id(module)] = why
            candidates.pop(id(module))

    def _unfit(self, module: nn.Module, part: Traced) -> str:
        if type(module) not in CLASSES:
            return "it is not converted"
        called = [hook for hook in hooks_of(module) if hook in _CALLED]
        if called:
            return f"it carries a {called[0]}, which would see the activation's output"
        if getattr(module, "activation", None) is not None:
            return "it has an activation already"
        if any(len(call.args) + len(call.kwargs) > 1 for call in part.calls(module)):
            return "it is called with more than its input"
        spot = self.spots[id(module)]
        return next((self.kept[name] for name in spot.names if name in self.kept), "") or outside(part, spot)

    def _whole_layers(self, candidates: dict[int, _Calls], graphs: list[Traced]) -> None:
        """Activation layers that only ever come behind batch norms."""
        possible = {key: calls for key, calls in candidates.items() if calls.layers()}
        while True:
            ends = {match.activation for calls in possible.values() for match in calls.matches}
            whole = {
                layer
                for calls in possible.values()
                for layer in calls.layers()
                if self._only_behind(layer, ends, graphs)
            }
            still = {key: calls for key, calls in possible.items() if calls.layers() <= whole}
            if len(still) == len(possible):
                break
            possible = still
        for key, calls in possible.items():
            self._take(calls, "its activation")
            self.identities |= calls.layers()
            del candidates[key]

    def _only_behind(self, layer: int, ends: Container[object], graphs: Iterable[Traced]) -> bool:
        spot = self.spots[layer]
        if hooks_of(spot.module) or any(outside(graph, spot) for graph in graphs):
            return False
        if any(name in self.kept for name in spot.names) or not spot.places:
            return False
        return all(call in ends for graph in graphs for call in graph.calls(spot.module))

    def _in_sequences(self, candidates: dict[int, _Calls]) -> None:
        """Activation layers that are used elsewhere, too, but stand behind this batch norm in an nn.Sequential."""
        for key, calls in list(candidates.items()):
            layers, held = calls.layers(), self.spots[key].places
            places = [self._next(owner, name, layers) for owner, name in held]
            names = {name for owner, _ in held for name in self.spots[id(owner)].names}
            there = all(_named(calls.part, each) in names for each in calls.frames())
            if layers and places and there and all(place is not None for place in places):
                self._take(calls, "its activation")
                self.places += [place for place in places if place is not None]
                del candidates[key]

    def _next(self, owner: nn.Module, key: str, layers: set[int]) -> Spot | None:
        """The place behind a batch norm in an nn.Sequential, if one of these layers stands there."""
        if type(owner).forward is not nn.Sequential.forward:
            return None
        keys = list(owner._modules)
        for name in keys[keys.index(key) + 1 :]:
            child = owner._modules[name]
            if child is not None and id(child) in layers:
                names = tuple(f"{each}.{name}".strip(".") for each in self.spots[id(owner)].names)
                return Spot(child, names, ((owner, name),))
            if type(child) is not nn.Identity:
                return None
        return None

    def _in_forwards(self, candidates: dict[int, _Calls]) -> None:
        """Additions and activations in the code of a forward, which is written anew."""
        owners: dict[str, list[_Calls]] = defaultdict(list)
        for calls in candidates.values():
            owners[common(calls.frames())].append(calls)
        for owner, all_calls in owners.items():
            part = all_calls[0].part
            name = _named(part, (owner,) if owner else ())
            spot = self.spots[id(part.modules[name])]
            why = outside(part, spot) if name != part.root else ""
            why = why or next((self.kept[each] for each in spot.names if each in self.kept), "")
            # All of them, or as many as can be.
            if why or not self._rewrite(spot, owner, all_calls):
                fine: list[_Calls] = []
                for calls in all_calls:
                    self.notes[id(calls.module)] = why
                    if not why and self._rewrite(spot, owner, [*fine, calls]):
                        fine.append(calls)

    def _rewrite(self, spot: Spot, owner: str, all_calls: list[_Calls]) -> bool:
        wanted = {id(calls.module): calls.kind for calls in all_calls}
        inside = {name.removeprefix(f"{owner}.") for calls in all_calls for name in calls.inside(owner)}
        cls, why = fused_class(spot.module, wanted, sorted(inside))
        if cls is None:
            self.notes[id(all_calls[-1].module)] = why
            return False
        self.rewritten[id(spot.module)] = cls
        for calls in all_calls:
            added = any(each.addition is not None for each in calls.matches)
            words = ["the addition"] * added + ["the activation"] * (calls.kind is not None)
            self._take(calls, f"{' and '.join(words)} in the forward of {spot.name or 'the model'}")
        return True

    def _take(self, calls: _Calls, what: str) -> None:
        self.taken[id(calls.module)] = calls.kind
        self.notes[id(calls.module)] = f"takes {what}"


def _named(part: Traced, frames: tuple[str, ...]) -> str:
    """The name in the model of the innermost of some modules that are named as in a part."""
    inner = frames[-1] if frames else ""
    return ".".join(each for each in (part.root, inner) if each)
