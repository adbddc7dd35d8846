"""fuse(memory="recompute"): the same gradients, from outputs that are not kept."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from helpers import same_bits
from surgery_helpers import alive, notes, randomize, reasons
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm


class Block(nn.Module):
    """A residual block of widths w, w, 2w."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.short = None
        if before != 2 * width:
            self.short = nn.Sequential(nn.Conv2d(before, 2 * width, 1), nn.BatchNorm2d(2 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.short is None else self.short(x)
        return F.relu(y)


class Net(nn.Module):
    """What saves an output here: convolutions, a pooling, a product, and a linear layer (its flattened view)."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(Block(6, 4), *(Block(8, 4) for _ in range(blocks - 1)))
        self.gate = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2))
        self.last = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Hardswish(), nn.Flatten())
        self.head = nn.Linear(4 * 9, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(self.last(x * self.gate(x)))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def pair(net: nn.Module | None = None, backend: str | None = None) -> tuple[nn.Module, nn.Module]:
    """The fused network that keeps, and the one that recomputes, with the same weights."""
    torch.manual_seed(0)
    keeping = batchnorm.fuse(randomize(Net()) if net is None else net).model
    recomputing = batchnorm.fuse(keeping, memory="recompute").model
    for module in (*keeping.modules(), *recomputing.modules()):
        if isinstance(module, batchnorm.BatchNorm2d):
            module.backend = backend
    return keeping, recomputing


def step(net: nn.Module, x: Tensor, within: Callable = nullcontext, **options: bool) -> list[Tensor]:
    """Output, gradients and buffers of a training step."""
    net.zero_grad()
    x = x.detach().requires_grad_()
    with within():
        y = net(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * dy).sum().backward(**options)
    return [
        y.detach(),
        x.grad,
        *(p.grad.clone() for p in net.parameters()),
        *(b.clone() for b in net.buffers()),
    ]


def check_same(net: nn.Module, other: nn.Module, x: Tensor = X, **options: Callable) -> None:
    for actual, wanted in zip(step(other, x, **options), step(net, x, **options), strict=True):
        assert same_bits(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_bits(dtype: torch.dtype, layout: torch.memory_format) -> None:
    keeping, recomputing = pair()
    check_same(
        keeping.to(dtype, memory_format=layout),
        recomputing.to(dtype, memory_format=layout),
        X.to(dtype, memory_format=layout),
    )


@pytest.mark.parametrize(
    ("backend", "dtype", "error"),
    [(None, torch.float64, 1e-14), ("reference", torch.float64, 1e-14), ("reference", torch.float32, 1e-6),
     ("aten", torch.float64, 1e-13), ("aten", torch.float32, 1e-5)],
)  # fmt: skip
def test_the_same_but_for_rounding(backend: str | None, dtype: torch.dtype, error: float) -> None:
    keeping, recomputing = (net.to(dtype) for net in pair(backend=backend))
    expected = step(keeping, X.to(dtype))
    for actual, wanted in zip(step(recomputing, X.to(dtype)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=error * float(wanted.abs().max() + 1))


@pytest.mark.parametrize("backend", [None, "aten", "reference"])
def test_outputs_are_gone_after_forward(backend: str | None) -> None:
    keeping, recomputing = pair(backend=backend)
    kept, more = alive(keeping, X)
    left, less = alive(recomputing, X)
    # blocks.0.short.1 is added to and saved by nobody; last.3 is a view of the output of last.1.
    norms = {name for name, m in keeping.named_modules() if isinstance(m, batchnorm.BatchNorm2d)}
    assert norms - kept == {"blocks.0.short.1"}
    assert kept - left == norms - {"blocks.0.short.1", "blocks.1.bn2"} | {"last.3"}
    assert left < kept
    assert less < 0.65 * more


def test_what_is_kept_is_what_fuse_says() -> None:
    changes = batchnorm.fuse(Net(), memory="recompute")
    found = notes(changes)
    assert found["stem.1"] == "takes its activation; its output is computed again in backward"
    assert found["blocks.1.bn2"].endswith(
        "; its output is kept: the output of blocks.0.bn2, which is added to it, is computed again itself, and "
        "2 in a row are the most"
    )
    again = {name for name, note in found.items() if note.endswith("is computed again in backward")}
    norms = {name for name, m in changes.model.named_modules() if isinstance(m, batchnorm.BatchNorm2d)}
    assert norms - again == {"blocks.1.bn2"}
    assert {
        name for name, m in changes.model.named_modules() if getattr(m, "memory", "") == "recompute"
    } == again
    assert "memory=recompute" in repr(changes.model.stem[1])
    for memory in ("Recompute", None, True):
        with pytest.raises(batchnorm.InputError, match="expected 'keep' or 'recompute'"):
            batchnorm.fuse(Net(), memory=memory)


def test_fused_layers_can_be_told_later_and_taken_back() -> None:
    fused = batchnorm.fuse(Net(), inplace=True).model
    changes = batchnorm.fuse(fused, memory="recompute", inplace=True)
    assert (
        notes(changes)["stem.1"] == "it has an activation already; its output is computed again in backward"
    )
    assert "its output is kept" in reasons(changes)["blocks.1.bn2"]
    assert len(fused._forward_hooks) == 1
    assert batchnorm.fuse(fused, memory="recompute", inplace=True).changed == ()
    assert len(fused._forward_hooks) == 1
    assert changes.revert() is fused
    assert not fused._forward_hooks
    assert {m.memory for m in fused.modules() if isinstance(m, batchnorm.BatchNorm2d)} == {"keep"}


def test_copies_keep_the_option() -> None:
    keeping, recomputing = pair()
    file = io.BytesIO()
    torch.save(recomputing, file)
    file.seek(0)
    copies = [copy.deepcopy(recomputing), pickle.loads(pickle.dumps(recomputing))]
    copies.append(torch.load(file, weights_only=False))
    expected, left = step(copy.deepcopy(keeping), X), alive(copy.deepcopy(recomputing), X)
    for each in copies:
        for actual, wanted in zip(step(copy.deepcopy(each), X), expected, strict=True):
            assert same_bits(actual, wanted)
        assert alive(each, X) == left
    assert list(recomputing.state_dict()) == list(keeping.state_dict())
    keeping.load_state_dict(recomputing.state_dict())


def test_a_part_of_the_model_by_itself() -> None:
    """Without the model's own hook it is the output of the last layer alone that stays."""
    _, recomputing = pair()
    part = nn.Sequential(recomputing.stem, recomputing.blocks)
    norms = {name for name, m in part.named_modules() if isinstance(m, batchnorm.BatchNorm2d)}
    assert alive(part, X)[0] & norms == {"1.1.bn2", "1.3.bn2"}


@pytest.mark.parametrize("statistics", ["eval", "frozen"])
def test_running_statistics(statistics: str) -> None:
    keeping, recomputing = pair()
    for net in (keeping, recomputing):
        net.eval() if statistics == "eval" else batchnorm.freeze(net, affine=False, inplace=True)
    check_same(keeping, recomputing)
    assert alive(recomputing, X)[1] < 0.75 * alive(keeping, X)[1]


def test_parameters_that_need_no_gradient() -> None:
    keeping, recomputing = pair()
    for net in (keeping, recomputing):
        for module in (net.stem, net.blocks[0]):
            module.requires_grad_(False)
    x = X.clone()
    for actual, wanted in zip(gradients(recomputing, x), gradients(keeping, x), strict=True):
        assert actual is wanted is None or same_bits(actual, wanted)


def gradients(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    net(x).square().sum().backward()
    return [p.grad for p in net.parameters()]


def test_without_a_gradient_nothing_is_remembered() -> None:
    keeping, recomputing = pair()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert same_bits(recomputing(X), keeping(X))


def test_the_graph_a_second_time() -> None:
    keeping, recomputing = pair()
    found = []
    for net in (keeping, recomputing):
        loss = net(X).square().sum()
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in net.parameters()]
        loss.backward()
        found.append([*first, *(p.grad for p in net.parameters())])
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert all(same_bits(*each) for each in zip(*found, strict=True))


def test_second_derivatives() -> None:
    keeping, recomputing = (net.double() for net in pair())
    found = []
    for net in (keeping, recomputing):
        x = X.double().requires_grad_()
        (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    for actual, wanted in zip(*found[::-1], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max() + 1))


def test_autocast_saves_a_copy_of_the_output() -> None:
    class Cast(nn.Module):
        """float32 up to the batch norm, a convolution in half behind it: it saves the output in half."""

        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv, self.out = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.out(self.conv(F.relu(self.bn(x))))

    def half() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    keeping, recomputing = pair(Cast())
    check_same(keeping, recomputing, within=half)
    with half():
        y = recomputing(X.clone().requires_grad_())
    node = y.grad_fn.next_functions[0][0]
    assert node.name() == "ConvolutionBackward0"
    assert not isinstance(node._raw_saved_input.data, Tensor)
    saved = node._saved_input
    assert (saved.dtype, saved.shape) == (torch.bfloat16, X.shape)
    keeping, recomputing = pair()
    check_same(keeping, recomputing, within=half)


class Fork(nn.Module):
    """One output, two convolutions."""

    def __init__(self, between: Callable[[Tensor], object] = lambda y: None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.left, self.right, self.between = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, padding=1), between
        self.values: dict[str, Tensor] = {}

    def forward(self, x):
        x = self.conv(x)
        y = self.bn(x)
        self.between(y)
        self.values = {"input": x, "output": y}
        return self.left(y) + self.right(y)


def layers(between: Callable[[Tensor], object] = lambda y: None) -> tuple[Fork, Fork]:
    return pair(Fork(between))


def test_two_that_saved_one_output() -> None:
    keeping, recomputing = layers()
    check_same(keeping, recomputing)
    recomputing.values = {}
    recomputing.between = lambda y: gone.append(StorageWeakRef(y.untyped_storage()))
    gone: list[StorageWeakRef] = []
    y = recomputing(X)
    recomputing.values = {}
    assert gone[0].expired()
    assert y.grad_fn is not None


@pytest.mark.parametrize("which", ["input", "output"])
def test_a_change_in_place_is_noticed(which: str) -> None:
    for net in layers():
        loss = net(X).sum()
        with torch.no_grad():
            net.values[which].view(-1)[0] = 7
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_input_that_changed_is_not_computed_with() -> None:
    """The gradient of the convolution behind it needs it now, too."""
    _, net = layers()
    loss = net(X).sum()
    with torch.no_grad():
        net.values["input"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: the input of a batch norm"):
        torch.autograd.grad(loss, net.left.weight)


def test_a_copy_that_changed_before_it_was_saved_is_kept() -> None:
    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1, dtype=torch.bfloat16)

        def forward(self, x):
            y = self.bn(x).bfloat16()
            with torch.no_grad():
                y.mul_(2)
            return self.conv(y)

    check_same(*pair(Copied()))


def test_a_change_before_it_was_saved_is_kept() -> None:
    def change(y: Tensor) -> None:
        with torch.no_grad():
            y.mul_(2)

    keeping, recomputing = layers(change)
    check_same(keeping, recomputing)
    keeping, recomputing = layers(lambda y: y.mul_(2))
    check_same(keeping, recomputing)


def test_parameters_that_change_before_backward_do_not_matter_to_the_output() -> None:
    """As where they are kept: the convolution's gradient is that of the output that there was."""
    found = []
    for net in layers():
        loss = net(X).square().sum()
        with torch.no_grad():
            net.bn.running_mean.add_(1)
            net.bn.weight.data.mul_(3)
        found.append(torch.autograd.grad(loss, [net.left.weight, net.right.weight]))
    assert all(same_bits(*each) for each in zip(*found, strict=True))


def test_a_graph_whose_layer_is_through_already() -> None:
    """What saved the output may run its backward when that of the batch norm is over."""
    found = []
    for net in layers():
        net(X)
        y = net.values["output"]
        left, right = net.left(y).square().sum(), net.right(y).square().sum()
        batchnorm.ops.look_behind(left, right)
        left.backward()
        found.append(torch.autograd.grad(right, net.right.weight)[0])
    assert same_bits(*found)


def test_no_cycle_and_nothing_left_behind() -> None:
    _, recomputing = pair()
    inputs: list[weakref.ref[Tensor]] = []
    for module in recomputing.modules():
        if isinstance(module, batchnorm.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    gc.collect()
    gc.disable()
    try:
        y = recomputing(X)
        assert all(each() is not None for each in inputs)
        loss = y.sum()
        loss.backward()
        del y
        # The graph is still there, and holds nothing.
        assert all(each() is None for each in inputs)
        assert loss.grad_fn is not None
        inputs.clear()
        y = recomputing(X)
        del y
        assert inputs
        assert all(each() is None for each in inputs)
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(self.last(x * self.gate(x)))

    torch.manual_seed(0)
    net = randomize(Checkpointed())
    check_same(batchnorm.fuse(net).model, batchnorm.fuse(net, memory="recompute").model)
    keeping, recomputing = pair()
    wrapped = [
        lambda x, net=net: checkpoint(net, x, use_reentrant=reentrant) for net in (keeping, recomputing)
    ]
    found = []
    for net, call in zip((keeping, recomputing), wrapped, strict=True):
        x = X.clone().requires_grad_()
        call(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(same_bits(*each) for each in zip(*found, strict=True))


def test_hooks_of_others_come_first() -> None:
    keeping, recomputing = pair()
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    def hooks() -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    check_same(keeping, recomputing, within=hooks)
    half = len(packed) // 2
    assert packed[:half] == packed[half:]
    check_same(keeping, recomputing, within=torch.autograd.graph.save_on_cpu)


def test_compiled_and_traced() -> None:
    keeping, recomputing = pair()
    compiled = torch.compile(recomputing, backend="aot_eager", fullgraph=True)
    for actual, wanted in zip(step(compiled, X), step(keeping, X), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    recomputing.eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(recomputing)(X), recomputing(X))
    torch.testing.assert_close(torch.export.export(recomputing, (X,)).module()(X), recomputing(X))
    folded = batchnorm.fold(recomputing)
    assert (len(folded.changed), folded.skipped) == (12, ())


def test_a_mask_and_an_input_that_is_an_output() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one = nn.Conv2d(3, 4, 3), batchnorm.BatchNorm2d(4, activation="relu")
            self.two, self.out = batchnorm.BatchNorm2d(4, activation="silu"), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.conv(x)
            y = self.one(x, mask=torch.arange(6) < 4)
            return self.out(self.two(y, residual=x) * y)

    net = randomize(Masked())
    recomputing = batchnorm.fuse(net, memory="recompute").model
    check_same(net, recomputing)
    assert "two" not in alive(recomputing, X)[0]
    assert {"one", "two"} <= alive(net, X)[0]


def test_a_residual_that_backward_needs_itself() -> None:
    class Smooth(nn.Module):
        """silu has no bits: its residual is kept, and here it is an output that can be computed again."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.next, self.norm, self.out = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = F.gelu(self.bn(self.conv(x)))
            return self.out(F.silu(self.norm(self.next(y)) + y))

    for backend in (None, "aten"):
        keeping, recomputing = pair(Smooth(), backend)
        assert {"bn", "norm"} <= alive(keeping, X)[0]
        assert not {"bn", "norm"} & alive(recomputing, X)[0]
        if backend is None:
            check_same(keeping, recomputing)


def test_pytorch_s_activations_save_no_output() -> None:
    for name in ("relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu"):
        layer = batchnorm.BatchNorm2d(3, activation=name, backend="aten")
        for residual in (None, X):
            layer.memory = "keep"
            x = X.clone().requires_grad_()
            expected = gradient(layer(x, residual), x)
            layer.memory = "recompute"
            y = layer(x, residual)
            (saved,) = [each for each in dir(type(y.grad_fn)) if each.startswith("_raw_saved_")]
            assert not isinstance(getattr(y.grad_fn, saved).data, Tensor)
            torch.testing.assert_close(gradient(y, x), expected, rtol=1e-5, atol=1e-5)


def gradient(y: Tensor, x: Tensor) -> Tensor:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(y, x, dy)[0]


def test_threads_and_one_process_of_many(tmp_path) -> None:
    keeping, recomputing = pair()
    expected = step(keeping, X)
    wrapped = nn.DataParallel(copy.deepcopy(recomputing))
    for actual, wanted in zip(step(wrapped, X), expected, strict=True):
        assert same_bits(actual, wanted)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(recomputing))
        for actual, wanted in zip(step(model, X), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
        assert alive(model, X)[1] < 0.75 * alive(keeping, X)[1]
    finally:
        torch.distributed.destroy_process_group()


class Landing(torch.autograd.Function):
    """x + 1, at a given address if it is free."""

    address = 0

    @staticmethod
    def forward(ctx, x):
        tries = [torch.empty_like(x)]
        while tries[-1].data_ptr() != Landing.address and len(tries) < 50:
            tries.append(torch.empty_like(x))
        return tries[-1].copy_(x + 1)

    @staticmethod
    def backward(ctx, dy):
        return dy


def test_memory_that_is_used_again_is_no_output() -> None:
    """What is saved three operators later may lie where the output was: it is another value."""

    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)
            self.same = False

        def forward(self, x):
            y = self.bn(self.conv(x))
            Landing.address = y.data_ptr()
            y = -y
            y = Landing.apply(y)
            self.same = y.data_ptr() == Landing.address
            return self.out(y)

    # More than 32 MB: glibc takes each tensor from the system, and the system gives the same place again.
    keeping, recomputing = pair(Chained())
    check_same(keeping, recomputing, torch.randn(1, 1, 2100, 2100))
    if not recomputing.same:
        pytest.skip("this allocator did not use the memory again")


def test_views_that_are_no_part_of_the_output() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.factor = nn.Parameter(torch.randn(3, dtype=torch.complex64))

        def forward(self, x):
            y = self.bn(self.conv(x))
            z = torch.view_as_complex(y.unflatten(-1, (3, 2))) * self.factor
            return z.abs().sum() + (y.transpose(1, 2)[..., 1:] ** 2).sum() + (y.unsqueeze(0)[:, 1] ** 3).sum()

    check_same(*pair(Complex()))
