"""What is folded into what in a graph whose nodes call operators: an exported program, an ONNX file."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchnorm.surgery._folding import Norm, Weights

__all__ = ["Gone", "Step", "plan"]


@dataclass(eq=False)
class Step:
    """One operation: a batch norm (`is_norm`), a layer (`is_layer`), or one that passes its input on.

    `source` is the value that it works on, `result` the one that it gives. `why` says why its numbers cannot be moved;
    without a reason a batch norm has its `norm` and a layer its `weights`. `axes` are those behind a layer's channels,
    `rank` how many axes its output has, where that is known. `shift` says why it does not take a constant that is added
    to its input, `largest` is the largest number of its dtype.
    """

    name: str
    what: str
    source: Hashable
    result: Hashable
    node: Any = None
    is_norm: bool = False
    is_layer: bool = False
    why: str = ""
    norm: Norm | None = None
    weights: Weights | None = None
    axes: int = 0
    rank: int | None = None
    shift: str = ""
    has_bias: bool = True
    largest: float = float("inf")

    def __str__(self) -> str:
        return f"{self.what} ({self.name})"


@dataclass(eq=False)
class Gone:
    """A batch norm that is not called any more, and the layers that it is folded into; it may stand `behind` one."""

    step: Step
    behind: bool
    into: list[Step] = field(default_factory=list)

    @property
    def note(self) -> str:
        """What became of it, in words."""
        told = [each.name + ("" if each.has_bias else ", which has a bias now") for each in self.into]
        return f"folded into {' and '.join(told)}"


class _Planner:
    def __init__(
        self,
        steps: Sequence[Step],
        readers: Mapping[Hashable, Sequence[Step | str]],
        disturbed: Callable[[Step, Step], bool],
    ) -> None:
        self.readers, self.disturbed = readers, disturbed
        self.maker = {step.result: step for step in steps}
        self.gone: dict[Step, Gone] = {}

    def before(self, norm: Step) -> tuple[Step | None, str]:
        """The layer whose output goes to this batch norm and nowhere else."""
        value = norm.source
        while True:
            readers = self.readers.get(value, ())
            maker = self.maker.get(value)
            if maker is None:
                return None, "no convolution or linear layer comes before it"
            if len(readers) != 1:
                return None, f"the output of {maker} goes elsewhere, too"
            if maker.is_layer:
                return maker, ""
            if maker.is_norm and maker not in self.gone:
                return None, f"{maker} comes before it"
            value = maker.source

    def after(self, value: Hashable) -> tuple[list[Step], str]:
        """The layers that get this value, if nothing else does."""
        found: list[Step] = []
        readers = self.readers.get(value, ())
        if not readers:
            return [], "nothing reads it"
        for reader in readers:
            if isinstance(reader, str):
                return [], f"{reader} comes after it"
            if reader.is_layer:
                if reader.source != value:
                    return [], f"{reader} has it for another argument"
                found.append(reader)
            elif reader.is_norm and reader not in self.gone:
                return [], f"{reader} comes after it"
            else:
                more, why = self.after(reader.result)
                if why:
                    return [], why
                found += more
        return found, ""

    def into_the_one_before(self, norm: Step) -> str:
        layer, why = self.before(norm)
        if layer is None:
            return why
        assert norm.norm is not None  # it has no reason to stay
        if layer.why:
            return f"{layer} comes before it: {layer.why}"
        assert layer.weights is not None  # the same for the layer
        why = _unfit(layer, layer.weights.width, norm)
        if why:
            return f"{layer} comes before it{why}"
        folded = layer.weights.then(norm.norm)
        if not folded.fit(layer.largest):
            return f"the folded weight of {layer} does not fit its dtype"
        layer.weights = folded
        self.gone[norm] = Gone(norm, True, [layer])
        return ""

    def into_those_after(self, norm: Step) -> str:
        layers, why = self.after(norm.result)
        if why:
            return why
        assert norm.norm is not None  # it has no reason to stay
        trial: dict[Step, Weights] = {}
        for layer in layers:
            if layer.why:
                return f"{layer} comes after it: {layer.why}"
            assert layer.weights is not None  # the same for the layer
            why = _unfit(layer, layer.weights.depth, norm)
            if why:
                return f"{layer} comes after it{why}"
            if layer.shift and bool((norm.norm.offset != 0).any()):
                return f"{layer} comes after it and cannot take its shift: {layer.shift}"
            if self.disturbed(norm, layer):
                return f"something that may change its input in place comes before {layer}"
            trial[layer] = layer.weights.preceded(norm.norm)
            if not trial[layer].fit(layer.largest):
                return f"the folded weight of {layer} does not fit its dtype"
        for layer, weights in trial.items():
            layer.weights = weights
        self.gone[norm] = Gone(norm, False, layers)
        return ""


def _unfit(layer: Step, channels: int, norm: Step) -> str:
    assert norm.norm is not None  # asked for only where it is there
    if channels != norm.norm.mean.numel():
        return " with other channels"
    if layer.rank is None and layer.axes == 0:
        return ", and whether its input has two axes is not known"
    if layer.rank not in (None, layer.axes + 2):
        return ", and its channels lie on another axis than the batch norm's"
    return ""


def plan(
    steps: Sequence[Step],
    readers: Mapping[Hashable, Sequence[Step | str]],
    disturbed: Callable[[Step, Step], bool] = lambda norm, layer: False,
) -> tuple[list[Gone], list[tuple[Step, str]]]:
    """Fold as many batch norms as can be; the weights of the layers are changed then.

    Args:
        steps: the operations that matter, in the order in which they run.
        readers: who reads each value: a step, or in words what else does; one that has it twice is there twice.
        disturbed: whether something between a batch norm and a layer after it may change the batch norm's input.

    Returns:
        the batch norms that go, and those that stay, each with the reason.
    """
    planner = _Planner(steps, readers, disturbed)
    norms = [step for step in steps if step.is_norm]
    reasons = {norm: norm.why for norm in norms}
    for norm in norms:
        if not norm.why:
            reasons[norm] = planner.into_the_one_before(norm)
    for norm in reversed(norms):
        if not norm.why and norm not in planner.gone:
            reasons[norm] += f"; {planner.into_those_after(norm)}"
    gone = [planner.gone[norm] for norm in norms if norm in planner.gone]
    return gone, [(norm, reasons[norm]) for norm in norms if norm not in planner.gone]
