"""What holds for every member of the family: layouts, dtypes, modes, copies, compilers, conversion."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import lay_out, same_bits
from torch import Tensor, nn

import batchnorm
from batchnorm.nn.member import Member

Make = Callable[..., Member]

MEMBERS: dict[str, Make] = {
    "ghost": lambda *args, **options: batchnorm.GhostBatchNorm(*args, ghost_size=4, **options),
    "renorm": lambda *args, **options: batchnorm.BatchRenorm(*args, r_max=2, d_max=1, **options),
}
SHAPES = ((10, 3), (10, 3, 7), (10, 3, 4, 5), (10, 3, 2, 3, 4))


@pytest.fixture(params=MEMBERS)
def make(request: pytest.FixtureRequest) -> Make:
    return MEMBERS[request.param]


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dweight) of a call in training."""
    layer.zero_grad()
    given = x.detach().requires_grad_()
    y = layer(given)
    y.backward(dy)
    weight = layer.weight.grad
    return y.detach(), given.grad, weight


def fresh(make: Make, dtype: torch.dtype = torch.float32) -> Member:
    layer = make(3, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -2.0, 1.25]))
        layer.bias.copy_(torch.tensor([-1.0, 0.25, 0.5]))
    return layer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_layouts_agree(make: Make, shape: tuple[int, ...], layout: str) -> None:
    x, dy = torch.randn(2, *shape, dtype=torch.float64)
    plain = step(fresh(make, torch.float64), x, dy)
    laid = step(fresh(make, torch.float64), lay_out(x, layout), lay_out(dy, layout))
    for a, b in zip(plain, laid, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if layout == "channels_last":
        assert laid[0].stride() == lay_out(x, layout).stride()


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_as_exact_as_their_rounding(make: Make, dtype: torch.dtype, offset: float) -> None:
    x, dy = torch.randn(2, 10, 3, 6, 5)
    x = (x + offset).to(dtype)
    dy = dy.to(dtype)
    layer = fresh(make)  # float32 parameters beside half input, as under autocast
    wide = fresh(make, torch.float64)
    got, exact = step(layer, x, dy), step(wide, x.double(), dy.double())
    assert got[0].dtype == dtype
    room = {torch.float32: 3e-7, torch.bfloat16: 2.0**-8 * 1.01, torch.float16: 2.0**-11 * 1.01}[dtype]
    for a, b in zip(got[:2], exact[:2], strict=True):
        assert (a.double() - b).abs().max() <= room * b.abs().max()
    torch.testing.assert_close(layer.running_mean.double(), wide.running_mean, rtol=3e-7, atol=1e-6)


def test_autocast_keeps_the_statistics_in_float32(make: Make) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 1), fresh(make))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(8, 2, 5, 5))
    assert y.dtype == torch.bfloat16
    assert net[1].running_var.dtype == torch.float32
    y.float().square().sum().backward()
    assert net[1].weight.grad.dtype == torch.float32
    assert net[0].weight.grad.isfinite().all()


def test_copies_are_equal(make: Make) -> None:
    layer = fresh(make)
    layer(torch.randn(10, 3, 4))
    x, dy = torch.randn(2, 10, 3, 4)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    others = (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    )
    expected = step(layer, x, dy)
    for other in others:
        assert repr(other) == repr(layer)
        for a, b in zip(step(other, x, dy), expected, strict=True):
            assert same_bits(a, b)


def test_state_is_that_of_plain_batch_norm(make: Make) -> None:
    layer, plain = fresh(make), nn.BatchNorm2d(3)
    layer(torch.randn(10, 3, 4, 4))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    again = make(3)
    again.load_state_dict(plain.state_dict())
    assert same_bits(again.eval()(x), layer(x))
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)


def test_convert_both_ways(make: Make, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["make"]
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(12)).double()
    x = torch.randn(10, 2, 2, 2, dtype=torch.float64)
    net(x)
    changed = batchnorm.convert(net, name)
    assert [type(changed.model[i]) for i in (1, 3)] == [type(make(1))] * 2
    assert not changed.skipped
    back = batchnorm.convert(changed.model, "torch")
    assert [type(back.model[i]) for i in (1, 3)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert vars(back.model[1]).keys() == vars(net[1]).keys()
    for model in (changed.model, back.model):
        torch.testing.assert_close(model.eval()(x), net.eval()(x), rtol=1e-12, atol=1e-12)


def test_in_eval_it_folds(make: Make) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 1), fresh(make))
    net(torch.randn(10, 2, 4, 4))
    net.eval()
    x = torch.randn(5, 2, 4, 4)
    folded = batchnorm.fold(net, x).model
    assert not any(isinstance(module, Member) for module in folded.modules())
    torch.testing.assert_close(folded(x), net(x))


def test_symbolic_tracing_takes_it_for_a_leaf(make: Make) -> None:
    net = nn.Sequential(fresh(make))
    traced = torch.fx.symbolic_trace(net)
    x = torch.randn(10, 3, 4)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert same_bits(traced(x), fresh(make)(x))


def test_pytorchs_conversion_is_refused(make: Make) -> None:
    with pytest.raises(batchnorm.ModelError, match=r"convert_sync_batchnorm would drop what a \w+ does"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(make(3)))


def test_one_value_per_channel(make: Make) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fresh(make)(torch.randn(1, 3))
    layer = make(3, single="running")
    x = torch.randn(1, 3)
    assert same_bits(layer(x), layer.eval()(x))


def test_compiled_whole(make: Make) -> None:
    torch.compiler.reset()
    x, dy = torch.randn(2, 10, 3, 4, 4)
    layer, compiled = fresh(make), fresh(make)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for k in range(2):
        expected = step(layer, x + k, dy)
        compiled.zero_grad()
        given = (x + k).requires_grad_()
        y = call(given)
        y.backward(dy)
        for a, b in zip((y, given.grad, compiled.weight.grad), expected, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(compiled.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_exported_in_eval_it_holds_no_operator_of_ours(make: Make) -> None:
    layer = fresh(make).eval()
    x = torch.randn(10, 3, 4, 4)
    program = torch.export.export(layer, (x,))
    assert "batchnorm." not in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))
