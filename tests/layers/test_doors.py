"""The eager and the traced door give the same bits; export, ONNX and fx see what they must."""

import io
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, SLOPE, leaf, same_bits
from torch import Tensor, fx, nn

import batchnorm

MASK = torch.tensor([True, False, True, True, True])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def layer_of(activation: str | None, **options: Any) -> nn.Module:
    layer = batchnorm.BatchNorm1d(3, activation=activation, negative_slope=SLOPE, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, -1.0, 0.5]))
        layer.bias.copy_(torch.tensor([0.5, 1.0, -0.3]))
    return layer


def step(
    layer: nn.Module, call: Any, x: Tensor, r: Tensor | None, mask: Tensor | None, dy: Tensor
) -> list[Tensor]:
    a, b = leaf(x), leaf(r)
    y = call(a, b, mask)
    wanted = [a, *([b] if b is not None else []), *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy), *[value.clone() for value in layer.buffers()]]


COMPILED = [(None, False, False), ("gelu", False, False), ("relu", True, False), ("gelu", True, True)]
COMPILED += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(ACTIVATIONS, [False, True], [False, True])
    if case not in COMPILED
]


@pytest.mark.parametrize(("activation", "residual", "masked"), COMPILED, ids=str)
def test_compiled_is_eager_bit_by_bit(activation: str | None, residual: bool, masked: bool) -> None:
    eager, traced = (layer_of(activation, backend="reference") for _ in range(2))
    compiled = torch.compile(traced, fullgraph=True, dynamic=True, backend="aot_eager")
    for training, samples in ((True, 4), (True, 7), (False, 5)):
        eager.train(training)
        traced.train(training)
        x, dy = torch.randn(samples, 3, 5) * 2, torch.randn(samples, 3, 5)
        r, mask = torch.randn(samples, 3, 5) if residual else None, MASK if masked else None
        results = zip(step(eager, eager, x, r, mask, dy), step(traced, compiled, x, r, mask, dy), strict=True)
        for mine, other in results:
            assert same_bits(mine, other)
    assert traced.num_batches_tracked.item() == 2


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"nonfinite": "skip"}, {"track_running_stats": False}], ids=str
)
def test_compiled_options(options: dict[str, Any]) -> None:
    eager, traced = (layer_of("relu", backend="reference", **options) for _ in range(2))
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, dy = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
        if "nonfinite" in options:
            x[1, 1, 1] = float("nan")
        results = zip(
            step(eager, eager, x, None, None, dy), step(traced, compiled, x, None, None, dy), strict=True
        )
        for mine, other in results:
            torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_compiled_with_the_backend_of_its_choice() -> None:
    eager, traced = (layer_of("silu") for _ in range(2))
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    x, r, dy = torch.randn(3, 4, 3, 5)
    for mine, other in zip(
        step(eager, eager, x, r, None, dy), step(traced, compiled, x, r, None, dy), strict=True
    ):
        torch.testing.assert_close(mine, other)


# inductor itself imports what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "reference"])
def test_inductor(backend: str | None) -> None:
    eager, traced = (layer_of("relu", backend=backend) for _ in range(2))
    compiled = torch.compile(traced, fullgraph=True, dynamic=True)
    for samples in (4, 6):
        x, r, dy = torch.randn(3, samples, 3, 5)
        for mine, other in zip(
            step(eager, eager, x, r, None, dy), step(traced, compiled, x, r, None, dy), strict=True
        ):
            torch.testing.assert_close(mine, other)
    assert traced.num_batches_tracked.item() == 2


class Block(nn.Module):
    """Two layers of the kind a residual network has."""

    def __init__(self, activation: str | None, masked: bool = False, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.first = batchnorm.BatchNorm2d(3, activation=activation, negative_slope=SLOPE, **options)
        self.second = batchnorm.BatchNorm2d(3, activation=activation, negative_slope=SLOPE, **options)
        for layer in (self.first, self.second):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.conv(x)), residual=x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_export_of_eval_has_no_operator_of_ours(activation: str | None) -> None:
    block = Block(activation).eval()
    x = torch.randn(2, 3, 6, 6)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("batch_norm" in target for target in targets)
    assert not [target for target in targets if target.startswith("batchnorm")]
    for samples in (2, 5):
        x = torch.randn(samples, 3, 6, 6)
        torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.slow
def test_exported_file_runs_where_the_package_is_not_installed(tmp_path: Path) -> None:
    block = Block("relu").eval()
    x = torch.randn(2, 3, 6, 6)
    torch.export.save(torch.export.export(block, (x,)), tmp_path / "block.pt2")
    torch.save((x, block(x).detach()), tmp_path / "expected.pt")
    code = """
import sys, torch
sys.modules["batchnorm"] = None
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x).detach(), expected)
print("equal")
"""
    files = [str(tmp_path / name) for name in ("block.pt2", "expected.pt")]
    result = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=False)
    assert result.stdout == "equal\n", result.stderr


def test_export_of_training_updates_the_buffers() -> None:
    layer = layer_of("relu", backend="reference")
    x = torch.randn(4, 3, 5)
    program = torch.export.export(layer, (x,))
    module = program.module()
    torch.testing.assert_close(module(x), layer(x))
    state = module.state_dict()
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(state[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_file_runs_in_onnxruntime(activation: str | None) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    block = Block(activation).eval()
    x = torch.randn(2, 3, 6, 6)
    buffer = io.BytesIO()
    torch.onnx.export(block, (x,), dynamo=True, verbose=False).save(buffer)
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), block(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_symbolic_trace_trains_as_the_original(backend: str | None, activation: str | None) -> None:
    original = Block(activation, backend=backend)
    torch.manual_seed(0)
    again = Block(activation, backend=backend)
    again.load_state_dict(original.state_dict())
    traced = fx.symbolic_trace(again)
    x, dy = torch.randn(2, 4, 3, 6, 6)
    for module in (original, traced):
        module(x).backward(dy)
    for (name, mine), other in zip(traced.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(traced.state_dict()[name], value)
    assert traced.get_submodule("first").num_batches_tracked.item() == 1


class Inner(fx.Tracer):
    """Traces through our layers, too, instead of keeping them whole."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_traced_through_the_layers(training: bool) -> None:
    original = Block("relu", backend="reference").train(training)
    again = Block("relu", backend="reference").train(training)
    again.load_state_dict(original.state_dict())
    traced = fx.GraphModule(again, Inner().trace(again))
    for samples in (4, 6):
        x, dy = torch.randn(2, samples, 3, 6, 6)
        a, b = original(x), traced(x)
        torch.testing.assert_close(a, b)
        for mine, other in zip(
            torch.autograd.grad(b, list(traced.parameters()), dy),
            torch.autograd.grad(a, list(original.parameters()), dy),
            strict=True,
        ):
            torch.testing.assert_close(mine, other)
    state = traced.state_dict()  # of what the graph uses: in eval it counts no batches
    assert ("first.num_batches_tracked" in state) is training
    for name, value in state.items():
        torch.testing.assert_close(value, original.state_dict()[name])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_traced_through_layer_still_checks_shapes(training: bool) -> None:
    layer = nn.Sequential(batchnorm.BatchNorm2d(3)).train(training)
    traced = fx.GraphModule(layer, Inner().trace(layer))
    with pytest.raises(ValueError, match="4D"):
        traced(torch.randn(2, 3, 4))
    with pytest.raises(batchnorm.InputError, match="got"):
        traced(torch.randn(2, 5, 4, 4))


@pytest.mark.parametrize(
    ("training", "activation"), list(itertools.product([True, False], [None, "silu"])), ids=str
)
def test_function_compiles(training: bool, activation: str | None) -> None:
    def function(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return batchnorm.batch_norm(
            x, mean, var, training=training, activation=activation, backend="reference"
        )

    stats = [torch.zeros(3), torch.ones(3)]
    copies = [value.clone() for value in stats]
    x = torch.randn(4, 3, 5)
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(x, *stats)
    assert same_bits(y, function(x, *copies))
    for mine, other in zip(stats, copies, strict=True):
        assert same_bits(mine, other)
