"""Gradients under an update and along a step, against copies that are really overwritten and against closed forms."""

import copy
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import batchnorm
from batchnorm import BatchNormError
from batchnorm.comparison.gradients import Group, Probe, Smoothness, covariate_shift, layers_of, smoothness

State = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
STEPS = (0.01, 0.1, 0.4)
cross_entropy: Loss = F.cross_entropy


def squared(scores: Tensor, targets: Tensor) -> Tensor:
    """Its Hessian with respect to the weights of a linear model is XᵀX/N."""
    return (scores - targets).square().sum() / (2 * len(scores))


def norm_of(value: Tensor) -> float:
    return float(value.detach().double().norm())


def parameters_of(model: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, scale: float = 0.1) -> State:
    """Other parameters nearby, as after a step."""
    return {name: p + scale * torch.randn_like(p) for name, p in parameters_of(model).items()}


def slow_gradient(
    model: nn.Module, parameters: State, x: Tensor, y: Tensor, loss: Loss, seed: int
) -> tuple[float, State]:
    """A copy whose parameters are overwritten, and backward()."""
    other = copy.deepcopy(model).train()
    other.zero_grad()
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(parameters[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value = loss(other(x.clone()), y)
        value.backward()
    return value.item(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in other.named_parameters()
    }


def perceptron(norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Module:
    first = nn.Linear(5, 7), norm(7), nn.ReLU(), nn.Dropout(0.3)
    return nn.Sequential(*first, nn.Linear(7, 6), norm(6), nn.Tanh(), nn.Linear(6, 4))


def convolutional() -> nn.Module:
    first = nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3)
    return nn.Sequential(*first, nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 4))


def parametrized() -> nn.Module:
    last = parametrizations.spectral_norm(nn.Linear(7, 4))  # every call in train mode updates its buffers
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 7)), nn.Tanh(), last)


MODELS = {
    "perceptron": (perceptron, 5),
    "own layers": (lambda: perceptron(batchnorm.BatchNorm1d), 5),
    "convolutional": (convolutional, 36),
    "parametrized": (parametrized, 5),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    build, features = MODELS[request.param]
    return build().double().eval(), torch.randn(9, features, dtype=torch.float64), torch.randint(4, (9,))


def test_layers_come_in_the_order_of_the_calls_and_batch_norm_belongs_before_the_next() -> None:
    groups = layers_of(perceptron(), torch.randn(8, 5))
    assert [group.name for group in groups] == ["0", "4", "7"]
    assert [group.weight for group in groups] == [("0.weight",), ("4.weight",), ("7.weight",)]
    block = ("0.weight", "0.bias", "1.weight", "1.bias")
    assert [group.before for group in groups] == [
        (),
        block,
        (*block, "4.weight", "4.bias", "5.weight", "5.bias"),
    ]


class Tangled(nn.Module):
    """Registered in another order than called; `twice` is called twice, `never` not at all, `last` read early."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.never = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.alias = self.twice
        self.first = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.shift = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.ones(3))
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.alias(self.frozen(self.twice(self.first(x)) + self.shift)) @ self.matrix
        return self.last(input=torch.tanh(x) * self.last.weight.norm()) * self.scale


def test_calls_and_not_registration_decide() -> None:
    model = Tangled()
    first, twice, last = layers_of(model, torch.randn(3, 4))
    assert first == Group("first", ("first.weight",), ())
    assert twice == Group("twice", ("twice.weight",), ("first.weight", "first.bias"))
    assert (last.name, last.weight) == ("last", ("last.weight",))
    # The model's own parameters: what is added later is not before, and `scale` comes after the last layer.
    assert set(last.before) == {
        *("shift", "matrix", "twice.weight", "twice.bias", "first.weight", "first.bias"),
        *("frozen.weight", "frozen.bias"),
    }
    order = [name for name, _ in model.named_parameters()]
    assert list(last.before) == sorted(last.before, key=order.index)


def test_parametrized_weight_is_the_parameters_behind_it() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.spectral_norm(nn.Linear(4, 3))
    )
    first, second = layers_of(model, torch.randn(3, 4))
    behind = ("0.parametrizations.weight.original0", "0.parametrizations.weight.original1")
    assert first == Group("0", behind, ())
    assert second.name == "1"
    assert second.weight == ("1.parametrizations.weight.original",)
    assert second.before == ("0.bias", *behind)


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def test_parametrization_that_draws_leaves_the_generator() -> None:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", Noisy())
    before = torch.get_rng_state()
    assert [group.name for group in layers_of(layer, torch.randn(3, 4, generator=torch.Generator()))] == [""]
    assert torch.equal(before, torch.get_rng_state())


class Attending(nn.Module):
    """Attention uses its output projection's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.recurrent(self.attention(x, x, x)[0])[0]
        return self.head(self.out(x).mean(1))


def test_parameters_of_modules_that_are_not_called_and_tied_weights() -> None:
    model = Attending()
    x, y = torch.randint(11, (5, 6)), torch.randint(4, (5,))
    embed, head = layers_of(model, x)
    assert embed == Group("embed", ("embed.weight",), ())
    assert set(head.before) == {name for name, _ in model.named_parameters()} - {"head.weight", "head.bias"}
    old, new = parameters_of(model), moved(model)
    found = covariate_shift(Probe(model, x, y, cross_entropy, 0).start(old), new, (embed, head))
    _, expected = slow_gradient(model, old, x, y, cross_entropy, 0)
    mixed = {**old, **{name: new[name] for name in head.before}}
    _, after = slow_gradient(model, mixed, x, y, cross_entropy, 0)
    difference = norm_of(after["head.weight"] - expected["head.weight"])
    assert found[0].difference == 0
    assert found[1].difference == pytest.approx(difference, rel=1e-4)


def test_layers_of_nothing_weighted() -> None:
    assert layers_of(nn.BatchNorm1d(4), torch.randn(8, 4)) == ()


def test_shift_equals_backward_of_copies_that_are_really_overwritten(
    case: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, x, y = case
    groups = layers_of(model, x)
    old, new = parameters_of(model), moved(model)
    found = covariate_shift(Probe(model, x, y, cross_entropy, 5).start(old), new, groups)
    assert [shift.name for shift in found] == [group.name for group in groups]
    for group, shift in zip(groups, found, strict=True):
        mixed = {name: new[name] if name in group.before else old[name] for name in old}
        _, before = slow_gradient(model, old, x, y, cross_entropy, 5)
        _, after = slow_gradient(model, mixed, x, y, cross_entropy, 5)
        g, other = (torch.cat([part[name].flatten() for name in group.weight]) for part in (before, after))
        assert shift.difference == pytest.approx(norm_of(g - other), rel=1e-11, abs=1e-14)
        assert shift.relative == pytest.approx(norm_of(g - other) / norm_of(g), rel=1e-11, abs=1e-13)
        assert shift.cosine == pytest.approx(float(F.cosine_similarity(g, other, dim=0)), abs=1e-13)
    assert found[0].difference == 0
    assert found[1].difference > 1e-3


def test_shift_of_two_linear_layers_by_hand() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    old, new = parameters_of(model), moved(model)
    # L = ‖h·W₂ᵀ − y‖²/2N with h = x·W₁ᵀ, so ∂L/∂W₂ = (h·W₂ᵀ − y)ᵀ·h/N
    w2 = old["1.weight"]
    g, other = ((h @ w2.T - y).T @ h / 8 for h in (x @ old["0.weight"].T, x @ new["0.weight"].T))
    first, second = covariate_shift(Probe(model, x, y, squared, 0).start(old), new, layers_of(model, x))
    assert (first.difference, first.relative, first.cosine) == (0, 0, 1)
    assert second.difference == pytest.approx(norm_of(g - other), rel=1e-12)
    assert second.relative == pytest.approx(norm_of(g - other) / norm_of(g), rel=1e-12)
    assert second.cosine == pytest.approx(float((g * other).sum()) / norm_of(g) / norm_of(other), rel=1e-12)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, batchnorm.BatchNorm1d, nn.Identity])
def test_a_step_of_length_zero_shifts_nothing_by_a_bit(norm: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(4)
    model = perceptron(norm)
    x, y = torch.randn(64, 5), torch.randint(4, (64,))
    same = parameters_of(model)
    found = covariate_shift(Probe(model, x, y, cross_entropy, 9).start(same), same, layers_of(model, x))
    assert [(shift.difference, shift.relative, shift.cosine) for shift in found] == [(0, 0, 1)] * 3


def test_another_seed_draws_another_mask() -> None:
    torch.manual_seed(5)
    model, x, y = perceptron(), torch.randn(16, 5), torch.randint(4, (16,))
    old, new, groups = parameters_of(model), moved(model), layers_of(model, x)
    starts = [Probe(model, x, y, cross_entropy, seed).start(old) for seed in (1, 1, 2)]
    found = [covariate_shift(start, new, groups) for start in starts]
    assert found[0] == found[1] != found[2]


def test_shift_of_a_dead_layer_has_no_relative_size() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, y = torch.rand(8, 3), torch.randn(8, 2)
    old = {**parameters_of(model), "0.bias": torch.full((4,), -100.0)}
    alive = {**old, "0.bias": torch.zeros(4), "0.weight": torch.rand(4, 3)}
    first, second = covariate_shift(Probe(model, x, y, squared, 0).start(old), alive, layers_of(model, x))
    assert first.difference == 0
    assert second.difference > 0.01
    assert all(math.isnan(value) for shift in (first, second) for value in (shift.relative, shift.cosine))
    # The other way round G' is 0: all of G is lost, and there is no angle.
    second = covariate_shift(Probe(model, x, y, squared, 0).start(alive), old, layers_of(model, x))[1]
    assert second.relative == 1
    assert math.isnan(second.cosine)


def test_gradients_that_are_not_finite_are_nan() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    old = parameters_of(model)
    new = {name: torch.full_like(p, torch.inf) for name, p in old.items()}
    second = covariate_shift(Probe(model, x, y, squared, 0).start(old), new, layers_of(model, x))[1]
    assert all(map(math.isnan, (second.difference, second.relative, second.cosine)))


def test_what_the_loss_does_not_depend_on_has_gradient_zero() -> None:
    model, x, y = Tangled(), torch.randn(8, 4), torch.randn(8, 3)
    unused = (Group("never", ("never.weight",), ("first.weight",)),)
    start = Probe(model, x, y, squared, 0).start(parameters_of(model))
    (shift,) = covariate_shift(start, moved(model), unused)
    assert shift.difference == 0
    detached = Probe(model, x, y, lambda s, t: s.detach().sum(), 0)
    found = smoothness(detached.start(parameters_of(model)), STEPS)
    assert (found.gradient, found.changes) == (0, (0, 0, 0))
    assert all(map(math.isnan, (shift.relative, shift.cosine, found.relative, found.beta)))


def test_missing_parameters_are_named() -> None:
    model = nn.Linear(3, 2)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    old = parameters_of(model)
    with pytest.raises(BatchNormError, match=r"new: got no weight, bias"):
        covariate_shift(Probe(model, x, y, squared, 0).start(old), {}, layers_of(model, x))
    with pytest.raises(BatchNormError, match=r"parameters: got no bias"):
        smoothness(Probe(model, x, y, squared, 0).start({"weight": old["weight"]}), STEPS)


def test_frozen_parameters_may_be_left_out() -> None:
    torch.manual_seed(7)
    model = perceptron()
    model[4].requires_grad_(False)
    x, y = torch.randn(16, 5), torch.randint(4, (16,))
    groups = layers_of(model, x)
    assert [group.name for group in groups] == ["0", "7"]
    old, new = parameters_of(model), moved(model)
    new.update({name: old[name] for name in ("4.weight", "4.bias")})
    trained = [{name: p for name, p in state.items() if not name.startswith("4.")} for state in (old, new)]
    probe = Probe(model, x, y, cross_entropy, 0)
    found = [covariate_shift(probe.start(before), after, groups) for before, after in (trained, (old, new))]
    assert found[0] == found[1]


def test_smoothness_of_a_linear_model_is_its_hessian() -> None:
    torch.manual_seed(8)
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    w = torch.randn(3, 4).double()
    found = smoothness(Probe(model, x, y, squared, 0).start({"weight": w}), STEPS)
    hessian = x.T @ x / 20
    g = (x @ w.T - y).T @ x / 20
    assert found.gradient == pytest.approx(norm_of(g), rel=1e-12)
    assert found.loss == pytest.approx(float(squared(x @ w.T, y)), rel=1e-12)
    # ∇L(θ − ηg) − g = −η·g·H, exactly
    assert found.changes == pytest.approx([step * norm_of(g @ hessian) for step in STEPS], rel=1e-11)
    assert found.losses == pytest.approx([float(squared(x @ (w - s * g).T, y)) for s in STEPS], rel=1e-12)
    assert found.predictiveness == pytest.approx(0.4 * norm_of(g @ hessian), rel=1e-11)
    assert found.relative == pytest.approx(0.4 * norm_of(g @ hessian) / norm_of(g), rel=1e-11)
    assert found.beta == pytest.approx(norm_of(g @ hessian) / norm_of(g), rel=1e-11)
    values, vectors = torch.linalg.eigh(hessian)
    assert float(values[0]) < found.beta < float(values[-1])
    # It is reached where g is the eigenvector.
    vector = {"weight": vectors[:, -1:].T.expand(3, 4)}
    along = smoothness(Probe(model, x, torch.zeros_like(y), squared, 0).start(vector), STEPS)
    assert along.beta == pytest.approx(float(values[-1]), rel=1e-11)


def test_smoothness_equals_backward_of_copies_that_are_really_overwritten(
    case: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, x, y = case
    parameters = moved(model)  # not the model's own
    found = smoothness(Probe(model, x, y, cross_entropy, 5).start(parameters), STEPS)
    loss, g = slow_gradient(model, parameters, x, y, cross_entropy, 5)
    losses, changes = [], []
    for step in STEPS:
        there = {name: p - step * g[name] for name, p in parameters.items()}
        value, other = slow_gradient(model, there, x, y, cross_entropy, 5)
        losses.append(value)
        changes.append(math.sqrt(sum(norm_of(other[name] - g[name]) ** 2 for name in g)))
    norm = math.sqrt(sum(norm_of(part) ** 2 for part in g.values()))
    assert found.loss == pytest.approx(loss, rel=1e-12)
    assert found.losses == pytest.approx(losses, rel=1e-12)
    assert (found.loss_low, found.loss_high) == (min(found.losses), max(found.losses))
    assert found.gradient == pytest.approx(norm, rel=1e-12)
    assert found.changes == pytest.approx(changes, rel=1e-10)
    slopes = [change / step / norm for change, step in zip(changes, STEPS, strict=True)]
    assert found.beta == pytest.approx(max(slopes), rel=1e-10)


def test_frozen_parameters_are_not_moved() -> None:
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    model[0].requires_grad_(False)
    x, y = torch.randn(20, 4).double(), torch.randn(20, 2).double()
    found = smoothness(Probe(model, x, y, squared, 0).start(parameters_of(model)), STEPS)
    h = x @ model[0].weight.T
    g = (h @ model[1].weight.T - y).T @ h / 20
    assert found.gradient == pytest.approx(norm_of(g), rel=1e-12)
    assert found.beta == pytest.approx(norm_of(g @ h.T @ h / 20) / norm_of(g), rel=1e-11)


def test_steps_that_overflow_are_recorded() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    found = smoothness(Probe(model, x, y, squared, 0).start(parameters_of(model)), (0.1, 1e20, 1e38))
    assert math.isfinite(found.losses[0])
    assert not any(map(math.isfinite, found.losses[1:]))
    assert not math.isfinite(found.loss_high)
    assert not any(map(math.isfinite, (found.predictiveness, found.relative, found.beta)))
    assert math.isfinite(found.gradient)


def test_a_nan_anywhere_is_the_maximum() -> None:
    found = Smoothness((1.0, 2.0, 3.0), 1.0, (math.inf, math.nan, 1.0), 1.0, (1.0, math.nan, 2.0))
    values = found.loss_low, found.loss_high, found.predictiveness, found.relative, found.beta
    assert all(map(math.isnan, values))


@pytest.mark.parametrize("steps", [(), (0.0,), (-0.1,), (0.1, math.inf), (math.nan,)])
def test_steps_without_a_length_are_refused(steps: tuple[float, ...]) -> None:
    model = nn.Linear(3, 2)
    start = Probe(model, torch.randn(4, 3), torch.randn(4, 2), squared, 0).start(parameters_of(model))
    with pytest.raises(BatchNormError, match="steps"):
        smoothness(start, steps)


class Counting(nn.Module):
    """Changes an attribute, a buffer, a plain tensor and its input, and draws from all three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.memory = torch.zeros(1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.memory += 1
        self.seen = self.seen + 1
        return x.mul_(1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", ["layers_of", "covariate_shift", "smoothness"])
def test_the_model_is_left_as_it_was(what: str, training: bool) -> None:
    torch.manual_seed(11)
    model = nn.Sequential(Counting(), *perceptron()).train(training)
    model[5].eval()
    x, y = torch.randn(9, 5), torch.randint(4, (9,))
    first = next(model.parameters())
    first.grad = torch.randn_like(first)
    kept, grad, inputs = copy.deepcopy(model.state_dict()), first.grad.clone(), x.clone()
    old, new = dict(model.named_parameters()), moved(model)
    groups = (Group("5", ("5.weight",), ("1.weight",)),)
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with torch.no_grad():
        if what == "layers_of":
            assert len(layers_of(model, x)) == 3
        else:
            start = Probe(model, x, y, cross_entropy, 0).start(old)
            if what == "covariate_shift":
                assert covariate_shift(start, new, groups)[0].difference > 0
            else:
                assert smoothness(start, STEPS).predictiveness > 0
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(states[0], after[0])
    assert states[1:] == after[1:]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert torch.equal(first.grad, grad)
    assert [p.grad is None for p in model.parameters()] == [False] + [True] * (len(old) - 1)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (model[0].calls, model[0].memory.item()) == (0, 0)
    assert torch.equal(x, inputs)
    assert all(p.requires_grad for p in model.parameters())
