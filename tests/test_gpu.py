"""On a CUDA device, against PyTorch's layer in float64 on the same numbers.

`make test-gpu` runs this file with nothing installed but torch and pytest: import nothing else here.
"""

import pytest
import torch
from torch import Tensor, nn

import batchnorm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"

# Of the largest value. float32 sums lose a few digits, the half types round the output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    scale = exact.abs().max()
    assert (ours.to(exact) - exact).abs().max() <= tolerance * scale


def pair(channels: int, activation: str | None) -> tuple[nn.Module, nn.BatchNorm2d]:
    ours = batchnorm.BatchNorm2d(channels, activation=activation, device=DEVICE)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        ours.bias.uniform_(-1, 1)
    exact = nn.BatchNorm2d(channels, device=DEVICE, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())
    return ours, exact


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_training_step_is_that_of_torch(
    dtype: torch.dtype, layout: torch.memory_format, activation: str | None
) -> None:
    ours, exact = pair(7, activation)
    x = (torch.randn(6, 7, 5, 9, device=DEVICE) * 2 + 3).to(dtype).contiguous(memory_format=layout)
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    x64 = x.double().requires_grad_()
    x.requires_grad_()

    z64 = exact(x64) + residual
    y64 = z64.relu() if activation else z64
    y = ours(x, residual=residual)
    assert (y.dtype, y.device.type) == (dtype, "cuda")
    assert y.is_contiguous(memory_format=layout)
    close(y, y64, TOLERANCE[dtype])

    # Where the pre-activation is a rounding away from the kink, either slope is right: no gradient there.
    dy = torch.where(z64.abs() < 0.05, 0, dy.double()).to(dtype)
    wanted = torch.autograd.grad(y64, [x64, exact.weight, exact.bias], dy.double())
    for got, want in zip(torch.autograd.grad(y, [x, ours.weight, ours.bias], dy), wanted, strict=True):
        close(got, want, TOLERANCE[dtype])
    close(ours.running_mean, exact.running_mean, 1e-6)
    close(ours.running_var, exact.running_var, 1e-5)
    assert int(ours.num_batches_tracked) == 1


def test_mask_shuts_out_what_stands_under_it() -> None:
    ours, exact = pair(4, None)
    x = torch.randn(6, 4, 3, 3, device=DEVICE)
    mask = torch.tensor([True, True, False, True, False, True], device=DEVICE).view(6, 1, 1)
    x[~mask.view(6)] = torch.nan
    y = ours(x, mask=mask)
    close(y[mask.view(6)], exact(x[mask.view(6)].double()), 1e-5)
    assert not y[~mask.view(6)].any()
    close(ours.running_var, exact.running_var, 1e-5)


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_eval_agrees_on_every_backend(backend: str) -> None:
    ours, exact = pair(5, None)
    ours.backend = backend
    with torch.no_grad():
        ours.running_mean.uniform_(-1, 1)
        ours.running_var.uniform_(0.5, 2)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 4, 4, device=DEVICE)
    close(ours.eval()(x), exact.eval()(x.double()), 1e-6)


def test_step_can_be_replayed_as_a_cuda_graph() -> None:
    ours, exact = pair(3, "relu")
    x = torch.randn(8, 3, 6, 6, device=DEVICE)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ours(x)
    ours.load_state_dict(before)
    x.copy_(torch.randn_like(x) * 3)
    graph.replay()
    torch.cuda.synchronize()
    close(y, exact(x.double()).relu(), 1e-5)
    close(ours.running_var, exact.running_var, 1e-5)
    assert int(ours.num_batches_tracked) == 1


def test_devices_that_differ_are_refused() -> None:
    layer = batchnorm.BatchNorm2d(3, device=DEVICE)
    with pytest.raises((batchnorm.InputError, batchnorm.InputTypeError), match="cuda"):
        layer(torch.randn(2, 3, 4, 4))
    with pytest.raises(batchnorm.InputError, match="residual"):
        layer(torch.randn(2, 3, 4, 4, device=DEVICE), residual=torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_that_are_computed_again(dtype: torch.dtype, layout: torch.memory_format) -> None:
    net = nn.Sequential()
    for _ in range(3):
        net.extend([nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)])
    net = net.to(DEVICE, dtype, memory_format=layout)
    x = torch.randn(16, 8, 64, 64, device=DEVICE, dtype=dtype).contiguous(memory_format=layout)
    dy, kept, gradients = torch.randn_like(x), [], []
    for memory in ("keep", "recompute"):
        fused = batchnorm.fuse(net, memory=memory).model
        fused(x).backward(dy)  # what libraries take once
        fused.zero_grad()
        before = torch.cuda.memory_allocated()
        y = fused(x)
        kept.append(torch.cuda.memory_allocated() - before)
        y.backward(dy)
        gradients.append([parameter.grad for parameter in fused.parameters()])
    # Two of the three outputs; the last one is the model's.
    assert kept[0] - kept[1] > 1.9 * x.numel() * x.element_size()
    for again, wanted in zip(gradients[1], gradients[0], strict=True):
        close(again, wanted.double(), TOLERANCE[dtype])
