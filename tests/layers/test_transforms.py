"""What PyTorch does to a layer: autocast, torch.func, checkpointing, conversion to SyncBatchNorm, hooks, scripting."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import leaf, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm

BACKENDS = [None, "reference"]


def twins(**options: Any) -> tuple[nn.Module, nn.Module]:
    return batchnorm.BatchNorm1d(3, **options), nn.BatchNorm1d(3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtypes(dtype: torch.dtype, backend: str | None) -> None:
    results = []
    for layer in twins(backend=backend):
        torch.manual_seed(0)
        x = leaf(torch.randn(8, 3))
        linear = nn.Linear(3, 3)
        with torch.autocast("cpu", dtype=dtype):
            y = layer(linear(x))
            alone = layer(x)
        (y.float() ** 2).sum().backward()
        results.append((y, alone, x.grad, layer.weight.grad, linear.weight.grad, layer.running_var))
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_with_a_float32_residual(backend: str | None) -> None:
    layer = batchnorm.BatchNorm1d(3, activation="relu", backend=backend)
    x, linear = torch.randn(8, 3), nn.Linear(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = linear(x)
        assert low.dtype == torch.bfloat16
        y = layer(low, residual=x)
    expected = F.relu(F.batch_norm(low.float(), None, None, training=True) + x)
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call_and_grad(backend: str | None) -> None:
    ours, torchs = twins(backend=backend)
    x, dy = torch.randn(2, 6, 3)
    results = []
    for layer in (ours, torchs):
        parameters = {"weight": torch.tensor([1.0, 2, 3]), "bias": torch.tensor([0.1, 0.2, 0.3])}
        buffers = {name: value.clone() for name, value in layer.named_buffers()}

        def loss(parameters: Any, buffers: Any, x: Tensor, layer: nn.Module = layer) -> Tensor:
            return (torch.func.functional_call(layer, (parameters, buffers), (x,)) * dy).sum()

        gradients, dx = torch.func.grad(loss, argnums=(0, 2))(parameters, buffers, x)
        results.append((*gradients.values(), dx, *buffers.values()))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)
    assert ours.num_batches_tracked.item() == torchs.num_batches_tracked.item() == 0
    assert ours.running_mean.tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # the first jvp of torch itself
@pytest.mark.parametrize("backend", BACKENDS)
def test_hessian_vector_product(backend: str | None) -> None:
    x, v, dy = torch.randn(3, 5, 2, dtype=torch.float64)
    products = []
    for function in (
        lambda x: F.silu(F.batch_norm(x, None, None, training=True)),
        lambda x: batchnorm.batch_norm(x, None, None, training=True, activation="silu", backend=backend),
    ):
        gradient = torch.func.grad(lambda x, function=function: (function(x) * dy).sum())
        products.append(torch.func.vjp(gradient, x)[1](v)[0])
        products.append(torch.func.jvp(function, (x,), (v,))[1])
    torch.testing.assert_close(products[2:], products[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["eval", "no running statistics"])
def test_vmap_as_torch(kind: str, backend: str | None) -> None:
    options = {"track_running_stats": False} if kind != "eval" else {}
    ours = batchnorm.BatchNorm1d(3, backend=backend, activation="relu", **options)
    torchs = nn.BatchNorm1d(3, **options)
    if kind == "eval":
        ours.eval()
        torchs.eval()
    x = torch.randn(4, 6, 3)
    expected = F.relu(torch.func.vmap(torchs)(x))
    torch.testing.assert_close(torch.func.vmap(ours)(x), expected)
    torch.testing.assert_close(torch.stack([ours(one) for one in x]), expected)
    each = torch.func.vmap(torch.func.grad(lambda x: (ours(x) ** 2).sum()))(x)
    for one, mine in zip(x, each, strict=True):
        a = leaf(one)
        (F.relu(torchs(a)) ** 2).sum().backward()
        torch.testing.assert_close(mine, a.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_with_shared_running_statistics_is_refused_as_by_torch(backend: str | None) -> None:
    ours, torchs = twins(backend=backend)
    x = torch.randn(4, 6, 3)
    with pytest.raises(RuntimeError) as expected:
        torch.func.vmap(torchs)(x)
    with pytest.raises(RuntimeError) as error:
        torch.func.vmap(ours)(x)
    assert type(expected.value) is RuntimeError
    assert "track_running_stats" in str(error.value)
    assert ours.running_mean.tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_an_ensemble(backend: str | None) -> None:
    layers = [batchnorm.BatchNorm1d(3, backend=backend) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")
    skeleton.eval()
    x = torch.randn(2, 6, 3)
    y = torch.func.vmap(lambda p, b, x: torch.func.functional_call(skeleton, (p, b), (x,)))(
        parameters, buffers, x
    )
    torch.testing.assert_close(
        y, torch.stack([layer.eval()(one) for layer, one in zip(layers, x, strict=True)])
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, backend: str | None) -> None:
    layer = batchnorm.BatchNorm1d(3, activation="silu", backend=backend)
    plain = copy.deepcopy(layer)
    x, r, dy = torch.randn(3, 6, 3)
    a, b, c, d = (leaf(value.clone()) for value in (x, r, x, r))
    y = checkpoint(layer, a, b, use_reentrant=reentrant)
    expected = plain(c, d)
    y.backward(dy)
    expected.backward(dy)
    assert same_bits(y, expected)
    for mine, other in ((a, c), (b, d), (layer.weight, plain.weight), (layer.bias, plain.bias)):
        assert same_bits(mine.grad, other.grad)
    # Unlike in torch: a batch that is computed again is not seen a second time.
    assert layer.num_batches_tracked.item() == 1
    assert same_bits(layer.running_mean, plain.running_mean)
    assert same_bits(layer.running_var, plain.running_var)


def test_conversion_to_sync_batch_norm_without_extras() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), batchnorm.BatchNorm2d(3, eps=1e-3))
    model(torch.randn(2, 2, 4, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1]) is nn.SyncBatchNorm
    assert converted[1].eps == 1e-3
    for name, value in before.items():
        assert same_bits(converted.state_dict()[name], value)


def test_conversion_to_sync_batch_norm_does_not_drop_an_activation() -> None:
    model = nn.Sequential(batchnorm.BatchNorm2d(3, activation="relu")).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    with pytest.raises((batchnorm.BatchNormError, AttributeError), match="activation") as error:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert "\n" not in str(error.value)
    assert same_bits(model(x), expected)  # and the model is as it was


def test_hooks_see_the_call() -> None:
    layer = batchnorm.BatchNorm1d(3, activation="relu")
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.min().item()))
    layer.register_full_backward_hook(lambda module, grads, outputs: seen.append(grads[0].shape))
    layer(leaf(torch.randn(4, 3))).sum().backward()
    assert seen == [(4, 3), 0.0, (4, 3)]


def test_inference_mode_and_update_bn() -> None:
    model = nn.Sequential(batchnorm.BatchNorm1d(3, activation="relu"), nn.Linear(3, 2))
    with torch.inference_mode():
        assert model(torch.randn(4, 3)).shape == (4, 2)
    batches = [torch.randn(5, 3) + 4 for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, model)
    torch.testing.assert_close(model[0].running_mean, torch.stack(batches).mean((0, 1)))
    assert model[0].momentum == 0.1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_scripting_is_refused_and_what_the_error_advises_works(dimensions: int, lazy: bool) -> None:
    name = f"{'Lazy' if lazy else ''}BatchNorm{dimensions}d"
    layer = getattr(batchnorm, name)(*() if lazy else (3,), activation="relu")
    model = nn.Sequential(nn.ReLU(), nn.Sequential(layer))
    modules = list(model.modules())
    with pytest.raises(batchnorm.ModelError) as error:
        torch.jit.script(model)
    text = str(error.value)
    assert text.startswith(f"torch.jit.script: got a model with a {name} of batchnorm, expected ")
    assert "\n" not in text
    assert list(model.modules()) == modules
    x = torch.randn(4, 3, *[2] * dimensions)
    model(x)
    expected = model.eval()(x)
    for advised in (torch.jit.trace(model.eval(), x), torch.export.export(model.eval(), (x,)).module()):
        torch.testing.assert_close(advised(x), expected)
