"""The door of the policies: with a policy that does nothing it is plain batch norm, whoever calls."""

import pytest
import torch
from family_helpers import TIGHT
from helpers import ACTIVATIONS, SLOPE, same_bits
from torch import Tensor

import batchnorm
from batchnorm.nn.member import Member
from batchnorm.ops import Policy, Statistics, merged


class Plain(Member):
    def _policy(self) -> Policy:
        return Policy()


class Elsewhere(Member):
    """As if the statistics were those of two processes with the same input."""

    def _policy(self) -> Policy:
        policy = Doubled()
        policy.local = False
        return policy


class Doubled(Policy):
    def statistics(self, mean: Tensor, m2: Tensor, count: Tensor) -> Statistics:
        return super().statistics(mean, 2 * m2, 2 * count)

    def sums(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * sum_grad, 2 * sum_grad_xhat


def pair(cls: type[Member] = Plain, **options: object) -> tuple[Member, batchnorm.BatchNorm2d]:
    options = {"dtype": torch.float64, "negative_slope": SLOPE, **options}
    one, other = cls(3, **options), batchnorm.BatchNorm2d(3, **options)
    with torch.no_grad():
        one.weight.uniform_(-2, 2)
        one.bias.uniform_(-1, 1)
    other.load_state_dict(one.state_dict())
    return one, other


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_a_policy_of_its_own_it_is_batch_norm(
    activation: str | None, added: bool, masked: bool, backend: str | None
) -> None:
    one, other = pair(activation=activation, backend=backend)
    x, r, dy = torch.randn(3, 6, 3, 4, 5, dtype=torch.float64)
    x = x * 3 + 1e3
    mask = torch.randint(0, 3, (6, 4, 5)).double() if masked else None
    results = []
    for layer in (one, other):
        given = leaves(x, r)
        y = layer(given[0], given[1] if added else None, mask)
        y.backward(dy)
        grads = [given[0].grad, layer.weight.grad, layer.bias.grad, given[1].grad if added else dy]
        results.append([y.detach(), *grads, *layer.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_the_gradient_goes_through_the_statistics_of_all() -> None:
    one, other = pair(Elsewhere)
    x, dy = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    a, b = leaves(x, x)
    y = one(a)
    y.backward(dy)
    twice = other(torch.cat([b, b]))
    twice.backward(torch.cat([dy, dy]))
    torch.testing.assert_close(y, twice[:6], **TIGHT)
    torch.testing.assert_close(2 * a.grad, b.grad, **TIGHT)
    torch.testing.assert_close(2 * one.weight.grad, other.weight.grad, **TIGHT)
    torch.testing.assert_close(one.running_var, other.running_var, **TIGHT)


def test_what_other_processes_have_a_say_in_has_first_derivatives_alone() -> None:
    one, _ = pair(Elsewhere, track_running_stats=False)
    x = torch.randn(6, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(batchnorm.ModelError, match="second derivatives"):
        torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
    with pytest.raises(batchnorm.ModelError, match=r"torch\.func"):
        torch.func.grad(lambda x: one(x).square().sum())(x.detach())


def test_function_transforms() -> None:
    one, other = pair(track_running_stats=False)
    x = torch.randn(4, 6, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(one)(x), torch.func.vmap(other)(x), **TIGHT)

    def loss(layer: torch.nn.Module) -> Tensor:
        return torch.func.grad(lambda x: layer(x).pow(3).sum())(x[0])

    torch.testing.assert_close(loss(one), loss(other), **TIGHT)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    torch.compiler.reset()
    one, other = pair(activation="relu")
    call = torch.compile(one, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (6, 9):
        x, r, dy = torch.randn(3, size, 3, 4, 5, dtype=torch.float64)
        a, b = leaves(x, r), leaves(x, r)
        y, wanted = call(*a), other(*b)
        y.backward(dy)
        wanted.backward(dy)
        for mine, theirs in zip((y, a[0].grad, a[1].grad), (wanted, b[0].grad, b[1].grad), strict=True):
            torch.testing.assert_close(mine, theirs, **TIGHT)
    for mine, theirs in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


def test_aten_is_refused_for_it() -> None:
    one, _ = pair(backend="aten")
    with pytest.raises(batchnorm.BackendError, match="knows no statistics but its own"):
        one(torch.randn(6, 3, 4, 5, dtype=torch.float64))
    assert one.eval()(torch.randn(6, 3, 4, 5, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_merging_is_exact_at_any_offset(offset: float) -> None:
    groups = [torch.randn(n, 3, dtype=torch.float64) + k for k, n in enumerate((4, 9, 1, 2))]
    whole = torch.cat(groups)
    means = torch.stack([group.mean(0) for group in groups]) + offset
    found = merged(
        Statistics(
            means,
            torch.stack([group.var(0, unbiased=False) for group in groups]),
            torch.tensor([[4.0], [9.0], [1.0], [2.0]], dtype=torch.float64),
        )
    )
    room = {"rtol": 1e-12, "atol": 1e-7 if offset else 1e-12}
    torch.testing.assert_close(found.mean[0] - offset, whole.mean(0), **room)
    torch.testing.assert_close(found.var[0], whole.var(0, unbiased=False), **room)
    assert found.counts.tolist() == [[16.0]]


def test_merging_leaves_groups_without_values_out() -> None:
    one = torch.full((1, 2), 3.0, dtype=torch.float64)
    empty = torch.zeros(1, 2, dtype=torch.float64)
    found = merged(
        Statistics(
            torch.cat([empty, one]),
            torch.cat([empty, one]),
            torch.tensor([[0.0], [5.0]], dtype=torch.float64),
        )
    )
    assert same_bits(found.mean, one)
    assert same_bits(found.var, one)
    nothing = merged(Statistics(empty.repeat(2, 1), empty.repeat(2, 1), empty[:, :1].repeat(2, 1)))
    assert not any(each.any() for each in nothing)
