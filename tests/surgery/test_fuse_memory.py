"""fuse(memory="recompute"): the same gradients, from outputs that are not kept."""

import copy
import io
import pickle

import processes
import pytest
import torch
from helpers import same_bits
from recompute_helpers import Net, X, check_same, pair, step
from surgery_helpers import alive, notes, randomize, reasons
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm


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


def test_statistics_that_are_rounded_are_not_computed_with() -> None:
    """PyTorch's CPU kernel saves the mean of bfloat16 in bfloat16: there outputs are kept."""
    keeping, recomputing = (net.bfloat16() for net in pair(backend="aten"))
    check_same(keeping, recomputing, X.bfloat16())


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


@pytest.mark.parametrize("backend", [None, "aten"])
@pytest.mark.parametrize("statistics", ["eval", "frozen"])
def test_running_statistics(statistics: str, backend: str | None) -> None:
    keeping, recomputing = pair(backend=backend)
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


def test_function_transforms() -> None:
    found = []
    for net in pair():
        parameters = {name: p.detach() for name, p in net.eval().named_parameters()}

        def loss(given: dict[str, Tensor], x: Tensor, net: nn.Module = net) -> Tensor:
            return torch.func.functional_call(net, given, (x,)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X.unsqueeze(1))
        found.append([*torch.func.grad(loss)(parameters, X).values(), *each.values()])
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max() + 1))


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
    with processes.alone(tmp_path):
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(recomputing))
        for actual, wanted in zip(step(model, X), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
        assert alive(model, X)[1] < 0.75 * alive(keeping, X)[1]
