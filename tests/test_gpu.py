"""On a CUDA device, against PyTorch's layer in float64 on the same numbers.

`make test-gpu` runs this file with nothing installed but torch and pytest: import nothing else here (but helpers
that do not either).
"""

import importlib.util
from pathlib import Path

import pytest
import sync_cases
import sync_worker
import torch
from torch import Tensor, nn

import batchnorm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
BACKENDS = ["aten", "reference"]
if importlib.util.find_spec("triton") is not None:
    BACKENDS.append("triton")
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")

# Of the largest value. float32 sums lose a few digits, the half types round the output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    scale = exact.abs().max()
    assert (ours.to(exact) - exact).abs().max() <= tolerance * scale


def pair(
    channels: int, activation: str | None, backend: str | None = None
) -> tuple[nn.Module, nn.BatchNorm2d]:
    ours = batchnorm.BatchNorm2d(channels, activation=activation, device=DEVICE, backend=backend)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        ours.bias.uniform_(-1, 1)
    exact = nn.BatchNorm2d(channels, device=DEVICE, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())
    return ours, exact


LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@LAYOUTS
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(6, 7, 5, 9), (32, 64, 28, 28), (8, 96, 14, 14), (16, 512, 7, 7)], ids=str)
def test_training_step_is_that_of_torch(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
    activation: str | None,
    backend: str,
) -> None:
    ours, exact = pair(shape[1], activation, backend)
    x = (torch.randn(shape, device=DEVICE) * 2 + 3).to(dtype).contiguous(memory_format=layout)
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


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "aten"])
def test_mask_shuts_out_what_stands_under_it(backend: str) -> None:
    ours, exact = pair(4, None, backend)
    x = torch.randn(6, 4, 3, 3, device=DEVICE)
    mask = torch.tensor([True, True, False, True, False, True], device=DEVICE).view(6, 1, 1)
    x[~mask.view(6)] = torch.nan
    y = ours(x, mask=mask)
    close(y[mask.view(6)], exact(x[mask.view(6)].double()), 1e-5)
    assert not y[~mask.view(6)].any()
    close(ours.running_var, exact.running_var, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eval_agrees_on_every_backend(backend: str) -> None:
    ours, exact = pair(5, None)
    ours.backend = backend
    with torch.no_grad():
        ours.running_mean.uniform_(-1, 1)
        ours.running_var.uniform_(0.5, 2)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 4, 4, device=DEVICE)
    close(ours.eval()(x), exact.eval()(x.double()), 1e-6)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_step_can_be_replayed_as_a_cuda_graph(backend: str) -> None:
    ours, exact = pair(3, "relu", backend)
    x = torch.randn(8, 3, 60, 60, device=DEVICE, requires_grad=True)
    dy = torch.randn_like(x)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(ours(x), [x, *ours.parameters()], dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ours(x)
        gradients = torch.autograd.grad(y, [x, *ours.parameters()], dy)
    ours.load_state_dict(before)
    for counted in (1, 2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x) * 3)
        graph.replay()
        torch.cuda.synchronize()
        x64 = x.detach().double().requires_grad_()
        y64 = exact(x64).relu()
        close(y, y64, 1e-5)
        wanted = torch.autograd.grad(y64, [x64, exact.weight, exact.bias], dy.double())
        for got, want in zip(gradients, wanted, strict=True):
            # dx next to a kink may take either slope: the few such elements are left out.
            off = (got.double() - want).abs() > 1e-4 * want.abs().max()
            assert off.double().mean() < 1e-3
        close(ours.running_var, exact.running_var, 1e-5)
        assert int(ours.num_batches_tracked) == counted


def train(layer: nn.Module, x: Tensor, dy: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    y = layer(x, residual=residual)
    return (y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy))


def bits(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        result.view(torch.int16 if result.element_size() == 2 else torch.int32).clone() for result in results
    ]


@needs_triton
@LAYOUTS
@pytest.mark.parametrize(("channels", "side"), [(64, 56), (256, 14), (2048, 7)])
def test_same_bits_every_time_and_no_memory_is_read_unwritten(
    channels: int, side: int, layout: torch.memory_format
) -> None:
    layer = batchnorm.BatchNorm2d(channels, activation="relu", device=DEVICE, backend="triton")
    x, dy, r = (
        torch.randn(32, channels, side, side, device=DEVICE).bfloat16().contiguous(memory_format=layout)
        for _ in range(3)
    )
    first = bits(train(layer, x, dy, r))
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        for _ in range(100):
            for got, want in zip(bits(train(layer, x, dy, r)), first, strict=True):
                assert torch.equal(got, want)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_triton
def test_a_graph_may_run_beside_the_stream_that_it_was_captured_on() -> None:
    layer = batchnorm.BatchNorm2d(256, device=DEVICE, backend="triton", track_running_stats=False)
    x, dy = torch.randn(2, 64, 256, 28, 28, device=DEVICE)
    expected = train(layer, x, dy)
    graph, captured_on, other = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(captured_on):
        train(layer, x, dy)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=captured_on):
        replayed = train(layer, x, dy)
    for _ in range(50):
        with torch.cuda.stream(other):
            graph.replay()
        with torch.cuda.stream(captured_on):
            found = [train(layer, x, dy) for _ in range(3)]
        torch.cuda.synchronize()
        for results in (*found, replayed):
            for got, want in zip(results, expected, strict=True):
                assert torch.equal(got, want)


@needs_triton
def test_work_goes_to_the_current_stream_and_asks_the_device_for_nothing() -> None:
    layer = batchnorm.BatchNorm2d(64, activation="relu", device=DEVICE, backend="triton")
    x, dy = torch.randn(2, 32, 64, 28, 28, device=DEVICE)
    expected = train(layer, x, dy)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    source = torch.zeros_like(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)
            source.copy_(x)  # a launch on another stream would come before this
            found = train(layer, source, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@needs_triton
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_other_than_the_current_one() -> None:
    layer = batchnorm.BatchNorm2d(64, activation="relu", device="cuda:0", backend="triton")
    x, dy = torch.randn(2, 32, 64, 28, 28, device="cuda:0")
    expected = train(layer, x, dy)
    for _ in range(2):
        found = train(layer.to("cuda:1"), x.to("cuda:1"), dy.to("cuda:1"))
        for got, want in zip(found, expected, strict=True):
            assert got.device == torch.device("cuda:1")
            assert torch.equal(got.to("cuda:0"), want)
    assert torch.cuda.current_device() == 0


@needs_triton
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_under_torch_compile_without_a_graph_break(activation: str, mode: str) -> None:
    def model(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        return layer(x * 1.5, residual=residual) * 2

    compiled = torch.compile(model, fullgraph=True, mode=mode)
    ours, _ = pair(64, activation, "triton")
    twin = batchnorm.BatchNorm2d(64, activation=activation, device=DEVICE, backend="triton")
    twin.load_state_dict(ours.state_dict())
    for _ in range(4):
        x, r, dy = torch.randn(3, 16, 64, 14, 14, device=DEVICE).bfloat16()
        found = []
        for function, layer in ((compiled, ours), (model, twin)):
            a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
            y = function(layer, a, b)
            found.append((y.detach().clone(), *torch.autograd.grad(y, [a, b, *layer.parameters()], dy)))
        for got, want in zip(*found, strict=True):
            close(got, want.double(), 2e-2)
    close(ours.running_var, twin.running_var.double(), 1e-6)
    assert int(ours.num_batches_tracked) == 4


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_network_under_autocast(dtype: torch.dtype) -> None:
    def network(norm: type, **options: object) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3), norm(32, **options), nn.Conv2d(32, 8, 3), norm(8, **options)
        ).cuda()

    ours, theirs = network(batchnorm.BatchNorm2d, backend="triton"), network(nn.BatchNorm2d)
    x = torch.randn(16, 3, 20, 20, device=DEVICE)
    losses = []
    for model in (ours, theirs):
        scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            with torch.autocast("cuda", dtype):
                y = model(x)
                loss = (y.float() - x[:, :1, 2:-2, 2:-2]).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert y.dtype == dtype
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@needs_triton
@LAYOUTS
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e7], ids=str)
def test_offsets(offset: float, layout: torch.memory_format) -> None:
    ours, exact = pair(64, None, "triton")
    x = (torch.randn(16, 64, 28, 28, device=DEVICE) + offset).contiguous(memory_format=layout)
    dy = (torch.randn_like(x) + min(offset, 1e6)).contiguous(memory_format=layout)
    x64 = x.double().requires_grad_()
    y64 = exact(x64)
    found = train(ours, x, dy)
    close(found[0], y64, 1e-6)
    wanted = torch.autograd.grad(y64, [x64, exact.weight, exact.bias], dy.double())
    # PyTorch's own gradient in float64 loses a digit for each of the offset's.
    for got, want in zip(found[1:], wanted, strict=True):
        close(got, want, 1e-6 if offset < 1e6 else 1e-4)


@needs_triton
@pytest.mark.parametrize("shape", [(70_000, 64, 4), (3, 100_000), (200_000, 1), (1, 2, 10**6)], ids=str)
def test_shapes_beyond_a_grid(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=DEVICE) + 3
    y = batchnorm.batch_norm(x, None, None, training=True, backend="triton")
    close(y, batchnorm.batch_norm(x.double(), None, None, training=True, backend="reference"), 1e-6)


@needs_triton
@pytest.mark.parametrize("last", [True, False], ids=["rows", "planes"])
def test_more_than_two_billion_elements(last: bool) -> None:
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB")
    from batchnorm.kernels.triton import launch

    count = 2**31 // 64 + 1000
    x = torch.zeros((count, 64) if last else (1, 64, count), dtype=torch.bfloat16, device=DEVICE)
    tail = x[-500:] if last else x[0, :, -500:]
    tail.fill_(1)
    mean, m2, total = launch.moments(x, None, 1)
    assert float(total) == count
    close(mean, torch.full_like(mean, 500 / count), 1e-6)
    close(m2, torch.full_like(m2, 500 - 500**2 / count), 1e-5)
    y, _ = launch.normalize(x, mean * 0, mean * 0 + 1, None, None, None, None, None, 0.0)
    assert torch.equal(y, x)


@needs_triton
def test_the_direct_door_is_open() -> None:
    from batchnorm.kernels.triton import launching

    layer = batchnorm.BatchNorm2d(48, device=DEVICE, backend="triton")
    asked = []
    door = launching.Launch._ask_triton

    def noted(self: object, *arguments: object) -> object:
        asked.append(self)
        return door(self, *arguments)

    x, dy = torch.randn(2, 8, 48, 12, 12, device=DEVICE)
    train(layer, x, dy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching.Launch, "_ask_triton", noted)
        found = [train(layer, x, dy) for _ in range(3)]
    assert not asked, "every launch went through Triton's door"
    assert launching.Launch.direct
    for got, want in zip(found[0], found[2], strict=True):
        assert torch.equal(got, want)


@needs_triton
def test_the_benchmark_measures_the_backend_that_it_is_asked_for() -> None:
    from batchnorm.bench import _worker
    from batchnorm.bench.case import Case

    case = Case(
        "tiny",
        (8, 16, 12, 12),
        1,
        "residual+relu",
        "channels-last",
        "float32",
        DEVICE,
        None,
        "as-is",
        "triton",
    )
    found = _worker.measure_case(case, ["eager"], 1)
    assert found["failure"] == ""
    assert found["backends"] == {"training": "triton", "inference": "triton"}
    assert set(found["times"]["forward+backward"]) == {"batchnorm", "eager"}


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


NCCL = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason="needs two CUDA devices, one for each process"
    ),
    id="nccl",
)


@pytest.mark.parametrize("device", [NCCL, pytest.param("cuda:0", id="gloo")])
def test_two_processes_are_one_with_the_whole_batch(device: str, tmp_path: Path) -> None:
    """As tests/layers/test_sync.py on the CPU."""
    results = sync_worker.together(2, tmp_path, device)
    for name, case in sync_cases.CASES.items():
        exact = sync_cases.whole(case, 2)
        for way in ("gather", "reduce"):
            found = [result["cases"][f"{way}: {name}"] for result in results]
            tolerance = max(TOLERANCE.get(case.dtype, 0.0), 1e-5)
            for step, wanted in enumerate(exact["steps"]):
                for at in (0, 1):  # y and dx
                    close(
                        torch.cat([part["steps"][step][at] for part in found]), wanted[at].double(), tolerance
                    )
            for key, value in exact["buffers"].items():
                close(found[0]["buffers"][key], value.double(), 1e-5)
                assert torch.equal(found[0]["buffers"][key], found[1]["buffers"][key])
