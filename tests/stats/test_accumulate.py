import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accumulate_helpers import after, parts, same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.nn.member import Member
from batchnorm.ops import HELD, Policy, Statistics

OURS = [batchnorm.BatchNorm1d, batchnorm.BatchNorm2d, batchnorm.BatchNorm3d]
TORCH = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]


def ghost(channels: int, **options: Any) -> batchnorm.GhostBatchNorm:
    """Halves of the batch, each with statistics of its own."""
    return batchnorm.GhostBatchNorm(channels, splits=2, **options)


class OfTwo(Policy):
    """As if another process had the same batch: its values count, too."""

    def statistics(self, mean: Tensor, m2: Tensor, count: Tensor) -> Statistics:
        return super().statistics(mean, 2 * m2, 2 * count)


class Synced(Member):
    """A layer whose counts are those of all processes."""

    def _policy(self) -> OfTwo:
        return OfTwo()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert not HELD


@pytest.mark.parametrize("classes", [OURS, TORCH])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 7), (4, 3, 5, 4), (2, 3, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_equals_one_big_batch(
    classes: list[type[nn.Module]], shape: tuple[int, ...], dtype: torch.dtype, momentum: float | None
) -> None:
    layer = classes[max(0, len(shape) - 3)](3, momentum=momentum, dtype=dtype)
    for group in (parts(shape, (4, 4, 4), dtype), parts(shape, (5, 2, 7), dtype)):
        expected = after(layer, group)
        plain = copy.deepcopy(layer)
        plain(torch.cat(group))
        with batchnorm.accumulate(layer, 3):
            for x in group[:2]:
                before = copy.deepcopy(layer.state_dict())
                layer(x)
                torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
            layer(group[2])
            same(layer, expected)
        same(layer, expected)
        if classes is OURS:  # PyTorch's own sums are less exact than 2 units in the last place
            same(layer, plain.state_dict())


@pytest.mark.parametrize("cls", [*OURS[1:2], *TORCH[1:2]])
def test_outputs_and_gradients_are_those_of_the_micro_batches(cls: type[nn.Module]) -> None:
    layer, twin = cls(3), cls(3)
    with batchnorm.accumulate(layer, 2):
        for x in parts((4, 3, 5, 5), (4, 6)):
            one, other = (x.clone().requires_grad_() for _ in range(2))
            y, expected = layer(one), twin(other)
            assert torch.equal(y, expected)
            dy = torch.randn_like(y)
            y.backward(dy)
            expected.backward(dy)
            torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, ghost])
def test_masks(weighted: bool, cls: type[nn.Module]) -> None:
    layer = cls(3, dtype=torch.float64)
    batches = parts((4, 3, 7), (4, 2, 6), torch.float64)
    masks = [torch.rand(x.shape[0], 7) * 3 if weighted else torch.rand(x.shape[0], 7) > 0.4 for x in batches]
    masks[1] = masks[1] * 0  # nothing is valid
    batches[1][:] = torch.nan
    expected = after(layer, batches, masks)
    with batchnorm.accumulate(layer, 3):
        for x, mask in zip(batches, masks, strict=True):
            layer(x, mask=mask)
    same(layer, expected)


@pytest.mark.parametrize(("cls", "copies"), [(ghost, 1), (Synced, 2)])
def test_layers_with_a_policy(cls: type[nn.Module], copies: int) -> None:
    layer = cls(3, dtype=torch.float64)
    batches = parts((4, 3, 5), (4, 2, 6), torch.float64)
    expected = after(layer, batches, copies=copies)
    with batchnorm.accumulate(layer, 3):
        for x in batches:
            layer(x)
    same(layer, expected)


def test_renorm_counts_whole_batches() -> None:
    """Until the last micro-batch of a group all are corrected as the whole batch would be: by the same numbers."""
    layer = batchnorm.BatchRenorm(3, r_max=((0, 1.0), (2, 3.0)), d_max=1, warmup=1, dtype=torch.float64)
    whole = copy.deepcopy(layer)
    with batchnorm.accumulate(layer, 2):
        for _ in range(4):
            x = torch.randn(8, 3, dtype=torch.float64) * 3 + 1
            y = layer(x), layer(x)
            expected = whole(torch.cat([x, x]))
            torch.testing.assert_close(torch.cat(y), expected)
            same(layer, whole.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [batchnorm.BatchNorm2d, nn.BatchNorm2d])
def test_half_inputs(cls: type[nn.Module], dtype: torch.dtype) -> None:
    layer, batches = cls(3), parts((4, 3, 5, 5), (4, 6), dtype)
    expected = after(layer, batches)
    with batchnorm.accumulate(layer, 2):
        for x in batches:
            layer(x)
    same(layer, expected)


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
def test_every_backend(backend: str) -> None:
    layer, batches = batchnorm.BatchNorm1d(3, backend=backend), parts((4, 3, 5), (4, 6))
    expected = after(layer, batches)
    with batchnorm.accumulate(layer, 2):
        for x in batches:
            layer(x, residual=torch.randn_like(x))
    torch.testing.assert_close(layer.state_dict(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, nn.BatchNorm1d])
def test_a_mean_far_from_zero(cls: type[nn.Module]) -> None:
    layer = cls(3, momentum=1.0, dtype=torch.float64)
    batches = [x + 1e7 for x in parts((8, 3), (8, 8), torch.float64)]
    with batchnorm.accumulate(layer, 2):
        for x in batches:
            layer(x)
    x = torch.cat(batches) - 1e7
    torch.testing.assert_close(layer.running_var, x.var(0), rtol=1e-8, atol=0)


class Net(nn.Module):
    """Two layers behind one another, one called twice, and a branch that is not always taken."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.twice, self.aside = cls(3), cls(3), cls(3)
        self.branch = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x)) * 2 + 1
        x = self.twice(x.sin())
        return self.aside(x) if self.branch else x


@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, nn.BatchNorm1d])
def test_layers_called_twice_and_branches(cls: type[nn.Module]) -> None:
    net = Net(cls)
    seen: dict[str, list[Tensor]] = {"first": [], "twice": [], "aside": []}
    for name, inputs in seen.items():
        net.get_submodule(name).register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.append(args[0].detach())
        )
    start = copy.deepcopy(net)
    with batchnorm.accumulate(net, 3) as group:
        for number, x in enumerate(parts((6, 3), (6, 4, 5))):
            net.branch = number == 1
            net(x)
            assert group.pending == (number + 1) % 3
    same(net.first, after(start.first, seen["first"]))
    expected = copy.deepcopy(start.twice)
    for call in (0, 1):
        expected.load_state_dict(after(expected, seen["twice"][call::2]))
    same(net.twice, expected.state_dict())
    same(net.aside, after(start.aside, seen["aside"]))
    assert [int(each.num_batches_tracked) for each in (net.first, net.twice, net.aside)] == [1, 2, 1]


def test_k_that_does_not_divide_and_groups_that_end_early() -> None:
    layer, batches = batchnorm.BatchNorm1d(3), parts((6, 3), (6, 4, 5, 7, 3))
    expected = copy.deepcopy(layer)
    for group in (batches[:2], batches[2:4], batches[4:]):
        expected.load_state_dict(after(expected, group))
    with batchnorm.accumulate(layer, 2) as block:
        for x in batches:
            layer(x)
        assert block.pending == 1
        assert repr(block) == "Accumulation(BatchNorm1d, 2: 1 pending)"
    same(layer, expected.state_dict())
    other = batchnorm.BatchNorm1d(3)
    with batchnorm.accumulate(other, 100) as block:
        for number, x in enumerate(batches):
            other(x)
            if number in (1, 3):
                block.apply()
                assert block.pending == 0
        block.apply()
        block.apply()
    same(other, expected.state_dict())
    with pytest.raises(batchnorm.ModelError, match="outside of the block"):
        block.apply()
    with block:  # the same object serves again
        other(batches[0])
    assert other.num_batches_tracked == 4


def test_what_leaves_all_alone() -> None:
    net = nn.Sequential(
        batchnorm.BatchNorm1d(3),
        batchnorm.FrozenBatchNorm(3),
        batchnorm.freeze(nn.BatchNorm1d(3)).model,
        nn.BatchNorm1d(3),
        batchnorm.BatchNorm1d(3, track_running_stats=False),
    )
    x, frozen = torch.randn(6, 3), [copy.deepcopy(net[i].state_dict()) for i in (1, 2)]
    expected = after(net[0], [x, x * 2])
    with batchnorm.accumulate(net.train(), 2) as block:
        net(x)
        before = copy.deepcopy(net.state_dict())
        net.eval()(torch.randn(50, 3))
        assert block.pending == 1
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        net.train()(x * 2)
        assert block.pending == 0
    same(net[0], expected)
    assert net[3].num_batches_tracked == 1
    for i, state in zip((1, 2), frozen, strict=True):
        torch.testing.assert_close(net[i].state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_a_batch_with_nan(nonfinite: str) -> None:
    layer, batches = batchnorm.BatchNorm1d(3, nonfinite=nonfinite), parts((6, 3), (6, 4))
    batches[0][2, 1] = torch.nan
    expected = copy.deepcopy(layer)
    expected(torch.cat(batches))
    with batchnorm.accumulate(layer, 2):
        for x in batches:
            layer(x)
    torch.testing.assert_close(layer.state_dict(), expected.state_dict(), equal_nan=True)
    assert layer.running_mean[1].isnan() == (nonfinite == "propagate")
    assert not layer.running_mean[0].isnan()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (nn.BatchNorm1d, {}),
        (ghost, {}),
        *((batchnorm.BatchNorm1d, {"backend": backend}) for backend in ("cpu", "aten", "reference")),
        (batchnorm.BatchNorm1d, {"backend": "aten", "momentum": None}),
    ],
)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_checkpointing_inside(
    cls: type[nn.Module], options: dict[str, Any], use_reentrant: bool, late: bool
) -> None:
    net = nn.Sequential(nn.Linear(3, 3), cls(3, **options), nn.ReLU())
    seen: list[Tensor] = []
    handle = net[0].register_forward_hook(lambda module, args, y: seen.append(y.detach()))

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=use_reentrant)

    start, model = copy.deepcopy(net[1]), Checkpointed()
    with batchnorm.accumulate(model, 2):
        for x in parts((6, 3), (6, 4)):
            y = model(x.requires_grad_())
            if not late:
                y.backward(torch.randn_like(y))
    if late:  # what PyTorch's layers do then is theirs
        state = copy.deepcopy(net[1].state_dict())
        y.backward(torch.randn_like(y))
        if cls is nn.BatchNorm1d:
            net[1].load_state_dict(state)
    handle.remove()
    expected = after(start, seen[:2] if late else seen[::2])
    if options.get("backend") == "aten":
        torch.testing.assert_close(net[1].state_dict(), expected, rtol=1e-6, atol=1e-6)
    else:
        same(net[1], expected)
