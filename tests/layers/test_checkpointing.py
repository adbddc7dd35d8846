"""A forward that is computed again in a backward pass gives the same bits and counts only once."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm


def ghost(channels: int, **options: Any) -> batchnorm.GhostBatchNorm:
    """A layer with a policy: halves of the batch."""
    return batchnorm.GhostBatchNorm(channels, splits=2, **options)


def renorm(channels: int, **options: Any) -> batchnorm.BatchRenorm:
    """A layer whose output depends on the running statistics, which have moved when it is computed again."""
    return batchnorm.BatchRenorm(channels, r_max=3, d_max=2, **options)


class Again(torch.autograd.Function):
    """Keeps the input alone and runs the module once more in its backward."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x, *parameters)
        return module(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.module(x)
        return (None, *torch.autograd.grad(y, (x, *parameters), dy))


def reentrant(net: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(net, x, use_reentrant=True)


def saved_tensors(net: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(net, x, use_reentrant=False)


def nested(net: nn.Module, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=False)

    return checkpoint(inner, x, use_reentrant=False)


def both(net: nn.Module, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=False)

    return checkpoint(inner, x, use_reentrant=True)


def by_hand(net: nn.Module, x: Tensor) -> Tensor:
    return Again.apply(net, x, *net.parameters())


WAYS = [reentrant, saved_tensors, nested, both, by_hand]
Way = Callable[[nn.Module, Tensor], Tensor]


def step(way: Way | None, net: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of one training step; forwards and backwards follow each other twice."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = net(x) if way is None else way(net, x)
        y.backward(dy)
    return y.detach(), [x.grad, *(parameter.grad for parameter in net.parameters())]


def check(way: Way, net: nn.Module, x: Tensor) -> None:
    """Same bits as without, in everything: output, gradients, running statistics and counters."""
    plain = copy.deepcopy(net)
    with torch.no_grad():
        dy = torch.randn_like(copy.deepcopy(net)(x))
    expected, grads = step(None, plain, x, dy)
    before = copy.deepcopy(dict(net.named_buffers()))
    output, found = step(way, net, x, dy)
    assert torch.equal(output, expected)
    for one, other in zip(found, grads, strict=True):
        assert torch.equal(one, other)
    for name, buffer in plain.named_buffers():
        assert torch.equal(net.get_buffer(name), buffer), name
        assert not torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("cls", [batchnorm.BatchNorm2d, ghost, renorm])
def test_checkpointed_layers_count_once(way: Way, momentum: float | None, cls: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), cls(4, momentum=momentum), nn.ReLU(), nn.Conv2d(4, 2, 1))
    check(way, net, torch.randn(4, 3, 6, 6))
    assert net[1].num_batches_tracked == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (batchnorm.BatchNorm1d, (5, 3)),
        (batchnorm.BatchNorm1d, (5, 3, 4)),
        (batchnorm.BatchNorm3d, (2, 3, 4, 3, 3)),
        (batchnorm.LazyBatchNorm2d, (2, 3, 4, 3)),
        (batchnorm.WhitenedBatchNorm, (5, 3, 4)),
    ],
)
def test_every_class(way: Way, cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    layer = cls(activation="relu") if issubclass(cls, batchnorm.LazyBatchNorm2d) else cls(3)
    layer.eval()(torch.randn(shape))
    check(way, layer.train(), torch.randn(shape))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"nonfinite": "skip"}])
def test_every_backend(way: Way, backend: str, options: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(3, 3), batchnorm.BatchNorm1d(3, backend=backend, **options))
    check(way, net, torch.randn(6, 3))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, ghost, renorm])
def test_mask_and_residual(way: Way, cls: type[nn.Module]) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = nn.Conv1d(3, 3, 1), cls(3, activation="gelu")

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.linear(x), residual=x, mask=torch.arange(5) < 4)

    check(way, Masked(), torch.randn(4, 3, 5))


@pytest.mark.parametrize("way", [reentrant, saved_tensors, nested])
def test_with_outputs_that_backward_computes_again(way: Way) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    check(way, batchnorm.fuse(net, memory="recompute").model, torch.randn(4, 3, 6, 6))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_backward_twice(momentum: float | None) -> None:
    layer = batchnorm.BatchNorm1d(3, momentum=momentum)
    x = torch.randn(6, 3, requires_grad=True)
    y = saved_tensors(layer, x)
    dy = torch.randn_like(y)
    once = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    after = copy.deepcopy(layer.state_dict())
    assert torch.equal(torch.autograd.grad(y, x, dy, retain_graph=True)[0], once)
    torch.testing.assert_close(layer.state_dict(), after, rtol=0, atol=0)
    assert layer.num_batches_tracked == 1
    layer(x)
    assert layer.num_batches_tracked == 2


def test_several_forwards_before_their_backward() -> None:
    """Each is corrected by the running statistics that it had."""
    layer, twin = renorm(3), renorm(3)
    inputs = [(torch.randn(6, 3) * (1 + i) + i).requires_grad_() for i in range(4)]
    others = [x.detach().clone().requires_grad_() for x in inputs]
    outputs, expected = [saved_tensors(layer, x) for x in inputs], [twin(x) for x in others]
    dy = torch.randn(4, 6, 3)
    for i in (2, 0, 3, 1):
        outputs[i].backward(dy[i])
        expected[i].backward(dy[i])
        assert torch.equal(inputs[i].grad, others[i].grad)
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_the_function_and_layers_without_a_counter() -> None:
    mean, var = torch.zeros(3), torch.ones(3)

    def function(x: Tensor) -> Tensor:
        return batchnorm.batch_norm(x, mean, var, training=True, momentum=0.5)

    x = torch.randn(6, 3, requires_grad=True)
    y = checkpoint(function, x, use_reentrant=False)
    after = mean.clone(), var.clone()
    torch.testing.assert_close(mean, x.mean(0).detach() / 2)
    y.backward(torch.randn_like(y))
    assert torch.equal(mean, after[0])
    assert torch.equal(var, after[1])
    untracked = batchnorm.BatchNorm1d(3, track_running_stats=False)
    y = checkpoint(untracked, x, use_reentrant=False)
    y.backward(torch.randn_like(y))


def test_a_forward_in_a_hook_does_not_count() -> None:
    """It cannot be told from one that is done again; the docstring says so."""
    layer, x = batchnorm.BatchNorm1d(3), torch.randn(6, 3, requires_grad=True)
    y = layer(x)
    y.register_hook(lambda grad: layer(x.detach()).detach())
    y.backward(torch.randn_like(y))
    assert layer.num_batches_tracked == 1


def test_after_a_backward_that_failed_forwards_count_again() -> None:
    layer, x = batchnorm.BatchNorm1d(3), torch.randn(6, 3, requires_grad=True)

    def broken(grad: Tensor) -> Tensor:
        raise ValueError("stop")

    y = layer(x)
    y.register_hook(broken)
    with pytest.raises(ValueError, match="stop"):
        y.backward(torch.randn_like(y))
    layer(x)
    assert layer.num_batches_tracked == 2


# inductor itself, and what shares code with it, imports what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled(momentum: float | None) -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 1), batchnorm.BatchNorm1d(4, momentum=momentum), nn.ReLU())
    twin, x = copy.deepcopy(net), torch.randn(4, 3, 5)

    @torch.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    def compiled(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=False)

    y, expected = compiled(x), twin(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(net.state_dict(), twin.state_dict())
    assert net[1].num_batches_tracked == 1


def test_selective_checkpointing_corrects_renorm_as_at_first() -> None:
    def keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(net: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(
            net,
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(keep_products),
        )

    net = nn.Sequential(nn.Linear(3, 3), renorm(3), nn.Tanh())
    plain = copy.deepcopy(net)
    x, dy = torch.randn(2, 8, 3) * 3
    expected = step(None, plain, x, dy)
    found = step(selective, net, x, dy)
    for one, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_more_forwards_than_are_remembered() -> None:
    layer = renorm(3)
    inputs = [torch.randn(8, 3, requires_grad=True) for _ in range(40)]
    outputs = [checkpoint(layer, x, use_reentrant=False) for x in inputs]
    outputs[-1].sum().backward()  # the last ones are known
    with pytest.raises(batchnorm.ModelError, match="more than 32 forwards"):
        outputs[0].sum().backward()
