"""The gradient as training meets it: how earlier layers' updates change it, and how it changes along a step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from batchnorm._errors import InputError, message
from batchnorm.comparison.pairs import copied, given
from batchnorm.comparison.record import seeded

__all__ = [
    "Group",
    "Loss",
    "Probe",
    "Shift",
    "Smoothness",
    "Start",
    "covariate_shift",
    "layers_of",
    "smoothness",
]

Loss = Callable[[Tensor, Tensor], Tensor]
"""(scores, targets) -> a scalar."""


@dataclass(frozen=True)
class Group:
    """One weighted layer of a network and what is updated before it.

    Args:
        name: the layer's path in the model, empty where the model itself is the layer.
        weight: the names of the parameters that make up W_i: the layer's weight alone, or all that the weight is
            computed from where it is parametrized.
        before: the names of the parameters that come before the layer, in the order of `named_parameters`.
    """

    name: str
    weight: tuple[str, ...]
    before: tuple[str, ...]


@dataclass(frozen=True)
class Shift:
    """How far the updates of the layers before move one layer's gradient from G to G'.

    Args:
        name: the layer's path in the model.
        difference: ‖G − G'‖₂, in units of the gradient (loss per weight).
        relative: ‖G − G'‖₂/‖G‖₂; NaN where G is 0.
        cosine: G·G'/(‖G‖₂·‖G'‖₂), −1 to 1; NaN where G or G' is 0.
    """

    name: str
    difference: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class Smoothness:
    """Loss and gradient along the step direction: at θ − η·g, with g = ∇L(θ) and one point for each η of `steps`.

    A loss that is NaN or infinite is kept as it is, and a range or a maximum that meets a NaN is NaN.

    Args:
        steps: the step lengths η, in units of the learning rate.
        loss: L(θ).
        losses: L(θ − η·g) for each η.
        gradient: ‖g‖₂.
        changes: ‖∇L(θ − η·g) − g‖₂ for each η.

    Example:
        >>> found = Smoothness(steps=(0.1, 0.2), loss=3.0, losses=(2.0, 1.5), gradient=2.0, changes=(0.5, 0.8))
        >>> found.loss_low, found.loss_high, found.predictiveness, found.relative, found.beta
        (1.5, 2.0, 0.8, 0.4, 2.5)
    """

    steps: tuple[float, ...]
    loss: float
    losses: tuple[float, ...]
    gradient: float
    changes: tuple[float, ...]

    @property
    def loss_low(self) -> float:
        """The lowest loss at these points."""
        return -_highest(-loss for loss in self.losses)

    @property
    def loss_high(self) -> float:
        """The highest loss at these points."""
        return _highest(self.losses)

    @property
    def predictiveness(self) -> float:
        """max over η of ‖∇L(θ − η·g) − g‖₂: the lower, the more the gradient says about where the step leads."""
        return _highest(self.changes)

    @property
    def relative(self) -> float:
        """`predictiveness` in units of ‖g‖₂; NaN where g is 0."""
        return _ratio(self.predictiveness, self.gradient)

    @property
    def beta(self) -> float:
        """The effective β-smoothness, max over η of ‖∇L(θ − η·g) − g‖₂/‖η·g‖₂; NaN where g is 0.

        It is a lower bound of the Lipschitz constant of the gradient between these points.
        """
        return _highest(
            _ratio(change, step * self.gradient)
            for change, step in zip(self.changes, self.steps, strict=True)
        )


def layers_of(model: nn.Module, x: Tensor) -> tuple[Group, ...]:
    """The weighted layers in the order in which one forward pass in train mode first calls them.

    A layer is weighted if it has a parameter `weight` of two or more axes that is trained: linear layers,
    convolutions and embeddings, not normalization. Batch norm's γ and β come after the layer that feeds it, hence
    before the next one. Before a layer are

    - the parameters of every module that has been called, and has returned, when the layer is first called,
    - of all others those that the layer's input depends on: a module around the layer may hold parameters itself, and
      a module may use a parameter of one that it never calls.

    A layer that is never called is left out. A weight that two layers share belongs to the one called first.

    Args:
        model: it is copied, and not changed.
        x: a batch, (N, *features).

    Raises:
        ModelError: the model cannot be copied.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
        >>> first, second = layers_of(model, torch.randn(8, 4))
        >>> second.weight, second.before
        (('3.weight',), ('0.weight', '0.bias', '1.weight', '1.bias'))
        >>> first.name, first.before
        ('0', ())
    """
    model = copied(model).train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weighted: dict[nn.Module, tuple[str, tuple[str, ...]]] = {}
    groups: list[Group] = []
    returned: set[str] = set()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in weighted:
            return
        path, weight = weighted.pop(module)
        if any(name in group.weight for group in groups for name in weight):
            return
        earlier = returned | {names[key] for key in _depends((args, kwargs)) if key in names}
        before = tuple(name for name in names.values() if name in earlier and name not in weight)
        groups.append(Group(path, weight, before))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        returned.update(names[id(parameter)] for parameter in module.parameters(recurse=False))

    with seeded(0, x.device), torch.enable_grad():
        for path, module in model.named_modules():
            if weight := _weight(module, names):
                weighted[module] = path, weight
        for module in model.modules():
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave)
        model(given(model, x))
    return tuple(groups)


class Probe:
    """Loss and gradient of a copy of the model on one batch, for any parameters; two calls differ in nothing else.

    Every evaluation is made in train mode, under the same random state and from the same buffers, so dropout draws
    the same mask.

    Args:
        model: gives the structure, the buffers and the parameters that are not trained; it is copied, and not changed.
        x: the batch, (N, *features).
        y: its targets.
        loss: (scores, targets) -> a scalar.
        seed: seeds the generators for each evaluation.

    Raises:
        ModelError: the model cannot be copied.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> probe = Probe(model, torch.ones(2, 1), torch.zeros(2, 1), nn.functional.mse_loss, seed=0)
        >>> start = probe.start({"weight": torch.tensor([[3.0]])})
        >>> start.loss, start.gradient["weight"].item()
        (9.0, 6.0)
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, loss: Loss, seed: int) -> None:
        self.model = copied(model).train()
        self.trained = tuple(name for name, p in self.model.named_parameters() if p.requires_grad)
        self.x, self.y, self.loss, self.seed = x, y, loss, seed

    def start(self, parameters: Mapping[str, Tensor]) -> "Start":
        """Loss and gradient at `parameters`, name -> tensor of at least every trained parameter.

        Raises:
            InputError: `parameters` lacks a trained parameter.
        """
        self.check(parameters, "parameters")
        return Start(self, parameters, *self(parameters, self.trained))

    def check(self, parameters: Mapping[str, Tensor], what: str) -> None:
        """Raise InputError if `parameters` lacks a trained parameter."""
        missing = [name for name in self.trained if name not in parameters]
        if missing:
            raise InputError(
                message(
                    what,
                    got=f"no {', '.join(missing[:3])}" + (" and more" if missing[3:] else ""),
                    expected="a tensor for every trained parameter",
                )
            )

    def __call__(
        self, parameters: Mapping[str, Tensor], names: Sequence[str]
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss at `parameters`, and its gradient with respect to those in `names`; 0 where there is none."""
        state = {
            name: parameters.get(name, own).detach().clone().requires_grad_(own.requires_grad)
            for name, own in self.model.named_parameters()
        }
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        wanted = [state[name] for name in names]
        with seeded(self.seed, self.x.device), torch.enable_grad():
            output = functional_call(self.model, (state, buffers), (given(self.model, self.x),))
            value = self.loss(output, self.y)
            found: Sequence[Tensor | None] = [None] * len(wanted)
            if wanted and value.requires_grad:
                found = torch.autograd.grad(value, wanted, allow_unused=True)
        gradients = [
            torch.zeros_like(leaf) if g is None else g for leaf, g in zip(wanted, found, strict=True)
        ]
        return float(value.detach()), dict(
            zip(names, (g.detach().to_dense() for g in gradients), strict=True)
        )


@dataclass(frozen=True, eq=False)
class Start:
    """Where a step begins: the probe, the parameters θ, L(θ), and ∇L(θ) with respect to all trained parameters."""

    probe: Probe
    parameters: Mapping[str, Tensor]
    loss: float
    gradient: Mapping[str, Tensor]


def covariate_shift(start: Start, new: Mapping[str, Tensor], groups: Sequence[Group]) -> tuple[Shift, ...]:
    """Internal covariate shift: how much the updates of the layers before a layer change its gradient.

    For layer i, with the parameters W^t before and W^{t+1} after an optimizer step, it compares

        G  = ∇_{W_i} L(W_1^t, …, W_k^t; x, y)
        G' = ∇_{W_i} L(W_1^{t+1}, …, W_{i−1}^{t+1}, W_i^t, W_{i+1}^t, …, W_k^t; x, y)

    (Santurkar, Tsipras, Ilyas, Madry: How Does Batch Normalization Help Optimization?, NeurIPS 2018, Definition 2.1).
    It takes one forward and one backward pass a layer.

    Args:
        start: the parameters before the step, and the gradient there, on the batch of that step.
        new: name -> tensor of at least every trained parameter, after the step.
        groups: the layers, from `layers_of`.

    Returns:
        One `Shift` a group. With nothing trained before the layer G' is G, and the difference 0.

    Raises:
        InputError: `new` lacks a trained parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> same = dict(model.named_parameters())
        >>> start = Probe(model, x, y, nn.functional.cross_entropy, seed=0).start(same)
        >>> [shift.difference for shift in covariate_shift(start, same, layers_of(model, x))]
        [0.0, 0.0]
    """
    probe = start.probe
    probe.check(new, "new")
    # For every layer the gradients of all weights: what a backward pass may leave out could change how it rounds the
    # rest.
    weights = tuple(name for group in groups for name in group.weight)
    shifts: list[Shift] = []
    for group in groups:
        moved = start.gradient
        updated = {name: new[name] for name in group.before if name in new}
        if updated:
            _, moved = probe({**start.parameters, **updated}, weights)
        shifts.append(_shift(group, start.gradient, moved))
    return tuple(shifts)


def smoothness(start: Start, steps: Sequence[float]) -> Smoothness:
    """Loss and gradient at θ − η·g for each η of `steps`, where g = ∇L(θ) with respect to all trained parameters.

    The three quantities of figure 4 in Santurkar, Tsipras, Ilyas, Madry: How Does Batch Normalization Help
    Optimization?, NeurIPS 2018: the range of the loss, the change of the gradient and the effective β-smoothness.
    Two networks are compared over the same `steps`, which cover a range of step lengths around the learning rate. A
    step that is lost in the rounding of θ shows no change.

    Args:
        start: θ, and loss and gradient there.
        steps: the step lengths η, positive, in units of the learning rate.

    Raises:
        InputError: `steps` is empty or holds what is not positive and finite.

    Example:
        The loss w²/2 has the gradient w and β = 1 everywhere:

        >>> model = nn.Linear(1, 1, bias=False)
        >>> loss = lambda scores, targets: (scores - targets).square().mean() / 2
        >>> start = Probe(model, torch.ones(2, 1), torch.zeros(2, 1), loss, 0).start({"weight": torch.tensor([[3.0]])})
        >>> found = smoothness(start, steps=(0.25, 0.5))
        >>> found.gradient, found.changes, found.beta
        (3.0, (0.75, 1.5), 1.0)
    """
    if not steps or not all(math.isfinite(step) and step > 0 for step in steps):
        raise InputError(
            message("steps", got=tuple(steps), expected="one or more positive, finite step lengths")
        )
    probe, parameters, gradient = start.probe, start.parameters, start.gradient
    losses: list[float] = []
    changes: list[float] = []
    for step in steps:
        moved = {name: parameters[name].detach() - step * gradient[name] for name in probe.trained}
        value, there = probe({**parameters, **moved}, probe.trained)
        losses.append(value)
        changes.append(float((_flat(there, probe.trained) - _flat(gradient, probe.trained)).norm()))
    norm = float(_flat(gradient, probe.trained).norm())
    return Smoothness(tuple(map(float, steps)), start.loss, tuple(losses), norm, tuple(changes))


def _weight(module: nn.Module, names: Mapping[int, str]) -> tuple[str, ...]:
    """The names of the trained parameters behind the module's own weight; none where it has no weight matrix."""
    if parametrize.is_parametrized(module, "weight"):
        with torch.no_grad():
            weight: Any = module.weight
        parameters = list(module.parametrizations["weight"].parameters())  # type: ignore[union-attr, index]
    else:
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        parameters = [weight]
    if weight is None or weight.dim() < 2:
        return ()
    return tuple(names[id(p)] for p in parameters if p.requires_grad)


def _depends(value: Any) -> set[int]:
    """The ids of the leaves that the tensors in nested containers were computed from."""
    nodes = [tensor.grad_fn for tensor in _tensors(value)]
    seen: set[Any] = set()
    leaves = {id(tensor) for tensor in _tensors(value)}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return leaves


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _shift(group: Group, gradients: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> Shift:
    old, new = _flat(gradients, group.weight), _flat(moved, group.weight)
    difference, norm, other = float((old - new).norm()), float(old.norm()), float(new.norm())
    cosine = _ratio(float(old @ new), norm * other)
    if difference == 0 and not math.isnan(cosine):
        cosine = 1.0  # without the rounding of the norms
    # max and min pass a NaN on only as their first argument.
    return Shift(group.name, difference, _ratio(difference, norm), min(max(cosine, -1.0), 1.0))


def _flat(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """All their values in one row, in float64 on the CPU, where every device's values fit."""
    parts = [tensors[name].reshape(-1).to("cpu", torch.float64) for name in names]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _ratio(value: float, unit: float) -> float:
    return value / unit if unit else math.nan


def _highest(values: Iterable[float]) -> float:
    """The maximum; NaN where one of them is."""
    listed = list(values)
    return math.nan if any(map(math.isnan, listed)) else max(listed)
