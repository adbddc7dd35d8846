import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.nn.member import Member
from batchnorm.ops import HELD, Policy, Statistics
from batchnorm.policies.ghost import Ghosts

OURS = [batchnorm.BatchNorm1d, batchnorm.BatchNorm2d, batchnorm.BatchNorm3d]
TORCH = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]


class Ghost(Member):
    """Halves of the batch, each with statistics of its own."""

    def _policy(self) -> Ghosts:
        return Ghosts(2)


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


def after(layer: nn.Module, batches: list[Tensor], masks: list[Tensor] | None = None, copies: int = 1) -> Any:
    """The layer's buffers after one update by all batches together, by the formula, value after value in float64."""
    own = copy.deepcopy(layer)
    rows, weights = [], []
    for number, x in enumerate(batches):
        channels_last = x.double().movedim(1, -1)
        w = torch.ones(channels_last.shape[:-1]) if masks is None else masks[number]
        rows.append(channels_last.reshape(-1, x.shape[1]))
        weights.append(w.double().reshape(-1, 1))
    x, w = torch.cat(rows), torch.cat(weights)
    x = torch.where(w > 0, x, 0.0)
    n = w.sum()
    mean = (w * x).sum(0) / n
    mean = mean + (w * (x - mean)).sum(0) / n
    m2 = (w * (x - mean) ** 2).sum(0)
    n, m2 = n * copies, m2 * copies
    own.num_batches_tracked += 1
    m = 1 / own.num_batches_tracked.double() if own.momentum is None else own.momentum
    own.running_mean.copy_(own.running_mean.double() * (1 - m) + m * mean)
    own.running_var.copy_(own.running_var.double() * (1 - m) + m * m2 / (n - 1))
    return own.state_dict()


def same(layer: nn.Module, expected: dict[str, Tensor]) -> None:
    """1e-12 in float64, 2 units in the last place in float32, and the same counter."""
    state = layer.state_dict()
    for name in ("running_mean", "running_var"):
        mine, other = state[name], expected[name].to(state[name])
        if mine.dtype == torch.float64:
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
        else:
            away = (mine.view(torch.int32).long() - other.view(torch.int32).long()).abs().max()
            assert away <= 2, (name, away)
    assert state["num_batches_tracked"] == expected["num_batches_tracked"]


def parts(shape: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(size, *shape[1:]) * (1 + i) + 3 * i).to(dtype) for i, size in enumerate(sizes)]


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
@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, Ghost])
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


@pytest.mark.parametrize(("cls", "copies"), [(Ghost, 1), (Synced, 2)])
def test_layers_with_a_policy(cls: type[nn.Module], copies: int) -> None:
    layer = cls(3, dtype=torch.float64)
    batches = parts((4, 3, 5), (4, 2, 6), torch.float64)
    expected = after(layer, batches, copies=copies)
    with batchnorm.accumulate(layer, 3):
        for x in batches:
            layer(x)
    same(layer, expected)


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
        (Ghost, {}),
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


@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, nn.BatchNorm1d])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_drops_what_was_not_applied(cls: type[nn.Module], error: type[BaseException]) -> None:
    layer, batches = cls(3), parts((6, 3), (6, 4, 5))
    expected, objects = after(layer, batches[:2]), [id(buffer) for buffer in layer.buffers()]

    def loop() -> None:
        with batchnorm.accumulate(layer, 2):
            for x in batches:
                layer(x)
            raise error

    with pytest.raises(error):
        loop()
    same(layer, expected)
    assert [id(buffer) for buffer in layer.buffers()] == objects
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    layer(batches[0])
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, nn.BatchNorm1d])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_failed_does_not_count(cls: type[nn.Module], error: type[BaseException]) -> None:
    class Late(nn.Module):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise error
            return x

    net = nn.Sequential(cls(3), Late(), cls(3))
    batches = parts((6, 3), (6, 4))
    expected = after(net[0], batches)
    with batchnorm.accumulate(net, 2) as block:
        net(batches[0])
        net[1].fails = True
        with pytest.raises(error):
            net(torch.randn(9, 3))
        net[1].fails = False
        assert block.pending == 1
        net(batches[1])
    same(net[0], expected)


def test_ctrl_c_inside_of_a_layer_leaves_it_its_own_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.BatchNorm1d(3)
    before, objects = copy.deepcopy(layer.state_dict()), list(layer.buffers())

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        raise KeyboardInterrupt

    def loop() -> None:
        with batchnorm.accumulate(layer, 2):
            layer(torch.randn(4, 3))
            monkeypatch.setattr(nn.functional, "batch_norm", interrupted)
            layer(torch.randn(4, 3))

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert all(a is b for a, b in zip(layer.buffers(), objects, strict=True))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_ctrl_c_while_the_update_is_computed_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3))
    before, calls = copy.deepcopy(net.state_dict()), []
    moved = batchnorm.ops.moved

    def second_fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return moved(*args)

    monkeypatch.setattr(batchnorm.ops, "moved", second_fails)

    def loop() -> None:
        with batchnorm.accumulate(net, 1):
            net(torch.randn(4, 3))

    with pytest.raises(KeyboardInterrupt):
        loop()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        for given in ("wrapper", "network"):
            net = nn.Sequential(batchnorm.BatchNorm1d(3), nn.Linear(3, 2))
            wrapped, batches = nn.parallel.DistributedDataParallel(net), parts((6, 3), (6, 4))
            expected = after(net[0], batches)
            with batchnorm.accumulate(wrapped if given == "wrapper" else net, 2):
                for x in batches:
                    y = wrapped(x)
                    y.backward(torch.randn_like(y))
            same(net[0], expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, nn.BatchNorm1d])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("given", ["wrapper", "network"])
def test_compiled(cls: type[nn.Module], before: bool, given: str) -> None:
    torch.compiler.reset()
    net = nn.Sequential(cls(3), nn.ReLU(), nn.Linear(3, 2))
    compiled = torch.compile(net, backend="aot_eager")
    batches = parts((6, 3), (6, 4, 5, 3))
    if before:
        compiled(batches[0])
    expected = copy.deepcopy(net[0])
    for group in (batches[:2], batches[2:]):
        expected.load_state_dict(after(expected, group))

    def loop() -> None:
        with batchnorm.accumulate(compiled if given == "wrapper" else net, 2):
            for x in batches:
                compiled(x).square().mean().backward()

    if before and cls is nn.BatchNorm1d:
        # A graph that is there already knows nothing of the hooks: an error, and no wrong numbers without a word.
        with pytest.raises(batchnorm.ModelError, match="moved by something else"):
            loop()
        return
    loop()
    same(net[0], expected.state_dict())
    compiled(batches[0])
    assert net[0].num_batches_tracked == expected.num_batches_tracked + 1


def test_a_compiled_call_that_no_hook_saw_last() -> None:
    torch.compiler.reset()
    net, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(6, 3)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x)
    with pytest.raises(batchnorm.ModelError, match="moved by something else"), batchnorm.accumulate(net, 2):
        net(x)
        compiled(x)


def test_compiled_without_graph_breaks_is_an_error() -> None:
    torch.compiler.reset()
    net = nn.Sequential(batchnorm.BatchNorm1d(3))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 3)
    compiled(x)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="uncompiled"), batchnorm.accumulate(compiled, 2):
        compiled(x)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    compiled(x)
    assert net[0].num_batches_tracked == 2


def test_copies_and_pickles_take_no_part() -> None:
    net = nn.Sequential(batchnorm.BatchNorm1d(3), nn.BatchNorm1d(3))
    with batchnorm.accumulate(net, 2) as block:
        net(torch.randn(4, 3))
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            other(torch.randn(4, 3))
            assert [int(norm.num_batches_tracked) for norm in other] == [1, 1]
        assert block.pending == 1
    assert [int(norm.num_batches_tracked) for norm in net] == [1, 1]


def refused(model: nn.Module, match: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(batchnorm.ModelError, match=match):
        batchnorm.accumulate(model, 2)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_is_refused() -> None:
    net = nn.Sequential(batchnorm.BatchNorm1d(3), nn.Linear(3, 3))
    for k, error in (
        (0, batchnorm.InputError),
        (True, batchnorm.InputTypeError),
        (2.0, batchnorm.InputTypeError),
    ):
        with pytest.raises(error, match="accumulate: k"):
            batchnorm.accumulate(net, k)
    with pytest.raises(batchnorm.InputTypeError, match="accumulate: model"):
        batchnorm.accumulate("net", 2)

    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("num_batches_tracked", torch.tensor(0))

    refused(nn.Sequential(Own(3)), "0: got a Own, whose forward is its own")
    refused(nn.Sequential(net, Other()), "1: got a Other, whose forward is its own")
    refused(nn.Sequential(nn.SyncBatchNorm(3)), "a SyncBatchNorm")
    refused(nn.Sequential(net, nn.InstanceNorm1d(3, track_running_stats=True)), "InstanceNorm1d")
    refused(nn.DataParallel(net), "DataParallel")
    refused(nn.Linear(3, 3), "none")
    refused(batchnorm.freeze(net).model, "none")
    with pytest.raises(batchnorm.ModelError, match="not seen its shape"):
        batchnorm.accumulate(nn.LazyBatchNorm1d(), 2)


def inside(net: nn.Module, match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(batchnorm.ModelError, match=match), batchnorm.accumulate(net, 2):
        call()


@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, nn.BatchNorm1d])
def test_what_is_refused_inside(cls: type[nn.Module]) -> None:
    net, x = nn.Sequential(cls(3), nn.Linear(3, 3)), torch.randn(4, 3)
    block = batchnorm.accumulate(net, 2)
    inside(net, "one at a time", lambda: batchnorm.accumulate(net[0], 2).__enter__())
    with block:
        inside(net, "one at a time", lambda: None)
        with pytest.raises(batchnorm.ModelError, match="one at a time"):
            block.__enter__()
    inside(net, "outside of the model's forward", lambda: net[0](x))

    def load() -> None:
        state = copy.deepcopy(net.state_dict())
        handle = net[1].register_forward_hook(lambda *_: net.load_state_dict(state) and None)
        try:
            net(x)
        finally:
            handle.remove()

    inside(net, "moved by something else", load)
    inside(net, "other buffers", lambda: net.double()(x.double()))
    net.float()
    net(x)
    with pytest.raises(batchnorm.ModelError, match="moved by something else"), batchnorm.accumulate(net, 2):
        net[0].running_mean.add_(1)  # and not one forward was seen


def test_function_transforms_are_refused() -> None:
    net, x = nn.Sequential(batchnorm.BatchNorm1d(3)), torch.randn(4, 3)
    inside(net, "torch.func", lambda: torch.func.grad(lambda x: net(x).square().sum())(x))


def test_loading_between_forwards_is_the_users_own_business() -> None:
    layer, x = batchnorm.BatchNorm1d(3), torch.randn(6, 3)
    other = batchnorm.BatchNorm1d(3)
    other(torch.randn(6, 3) + 5)
    expected = after(other, [x, x])
    with batchnorm.accumulate(layer, 2):
        layer(x)
        layer.load_state_dict(other.state_dict())
        layer(x)
    same(layer, expected)
