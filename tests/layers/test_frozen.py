import copy
import pickle

import pytest
import torch
from helpers import EXACT
from surgery_helpers import names, notes, randomize, reasons
from torch import Tensor, nn

import batchnorm

SHAPES = [(6, 3), (5, 3, 7), (4, 3, 5, 4), (2, 3, 3, 4, 5)]


def frozen(dtype: torch.dtype = torch.float64, **options) -> batchnorm.FrozenBatchNorm:
    return randomize(batchnorm.FrozenBatchNorm(3, dtype=dtype, **options))


def by_formula(layer: nn.Module, x: Tensor) -> Tensor:
    """(x − running_mean) / √(running_var + ε) · γ + β, one operation after the other in float64."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var, weight, bias = (
        tensor.detach().double().reshape(shape)
        for tensor in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x.double() - mean) / (var + layer.eps).sqrt() * weight + bias


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - expected).abs().max()
    assert error <= EXACT[dtype] * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_the_gradient_of_the_input(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = frozen(torch.float64 if dtype == torch.float64 else torch.float32).train()
    before = copy.deepcopy(layer.state_dict())
    x, dy = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    y = layer(x)
    y.backward(dy)
    close(y, by_formula(layer, x.detach()), dtype)
    scale = (layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()).reshape(
        1, -1, *[1] * (x.dim() - 2)
    )
    close(x.grad, dy.double() * scale, dtype)
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_same_bits_as_a_layer_in_eval_mode() -> None:
    layer, x = frozen(torch.float32, activation="relu"), torch.randn(4, 3, 5, 5)
    other = batchnorm.BatchNorm2d(3, activation="relu").eval()
    other.load_state_dict(layer.state_dict())
    residual, mask = torch.randn_like(x), torch.rand(4, 5, 5) > 0.5
    for arguments in ({}, {"residual": residual}, {"mask": mask}, {"residual": residual, "mask": mask}):
        assert torch.equal(layer.train()(x, **arguments), other(x, **arguments))
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(layer(last), other(last))
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.bfloat16()), other(x.bfloat16()))
    torch.testing.assert_close(torch.vmap(layer)(x.unsqueeze(0)), other(x).unsqueeze(0))


def test_derivatives_against_finite_differences() -> None:
    layer = frozen(activation="gelu")
    x, residual = (torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(layer, (x, residual))
    assert torch.autograd.gradgradcheck(layer, (x, residual))


def test_no_mode_no_reset_and_no_optimizer_moves_it() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 3, 3), batchnorm.FrozenBatchNorm(3), nn.Conv2d(3, 2, 1)))
    before, conv = copy.deepcopy(net[1].state_dict()), net[0].weight.clone()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        net.train()
        net[1].training = True
        optimizer.zero_grad()
        net(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 6, 6)], net)
    assert not net[1].training
    assert not torch.equal(net[0].weight, conv)
    torch.testing.assert_close(net[1].state_dict(), before, rtol=0, atol=0)
    assert [parameter.requires_grad for parameter in net[1].parameters()] == [False, False]
    net[1].requires_grad_()
    net(torch.randn(4, 3, 6, 6)).square().sum().backward()
    assert net[1].weight.grad.abs().sum() > 0


class OfTorchvision(nn.Module):
    """A frozen layer as torchvision's: four buffers, no counter, and PyTorch's default version of a module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))


class OfDetectron2(OfTorchvision):
    """As detectron2's: version 3, and a variance that starts at 1 − ε."""

    _version = 3

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels)
        self.running_var -= eps


@pytest.mark.parametrize(("cls", "version"), [(OfTorchvision, 1), (OfDetectron2, 3)])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_frozen_layers_of_others_load_strictly(
    cls: type[nn.Module], version: int, with_metadata: bool
) -> None:
    other = randomize(nn.Sequential(cls(3)))
    state = other.state_dict()
    assert state._metadata["0"]["version"] == version
    if not with_metadata:
        state = dict(state)
    keys = list(state)
    net = nn.Sequential(batchnorm.FrozenBatchNorm(3))
    net[0].num_batches_tracked.fill_(7)
    net.load_state_dict(state, strict=True)
    assert list(state) == keys == ["0.weight", "0.bias", "0.running_mean", "0.running_var"]
    for name in keys:
        assert torch.equal(net.state_dict()[name], state[name])
    assert net[0].num_batches_tracked == 7
    x = torch.randn(4, 3, 5)
    other[0].eps = 1e-5
    close(net(x), by_formula(other[0], x), torch.float32)


def test_a_new_layer_of_detectron2_is_the_identity_here_too() -> None:
    layer = batchnorm.FrozenBatchNorm(3)
    layer.load_state_dict(OfDetectron2(3).state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x), x, rtol=1e-7, atol=1e-7)


def test_checkpoints_of_trained_layers_and_back() -> None:
    plain = randomize(nn.BatchNorm2d(3))
    plain(torch.randn(4, 3, 5, 5))
    layer = batchnorm.FrozenBatchNorm(3)
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert layer.state_dict()._metadata == plain.state_dict()._metadata
    for cls in (nn.BatchNorm2d, batchnorm.BatchNorm2d):
        back = cls(3)
        back.load_state_dict(layer.state_dict(), strict=True)
        torch.testing.assert_close(back.state_dict(), plain.state_dict(), rtol=0, atol=0)
    old = dict(plain.state_dict())
    del old["running_mean"]
    with pytest.raises(RuntimeError, match="running_mean"):
        layer.load_state_dict(old)


def test_memory_from_the_meta_device() -> None:
    layer = batchnorm.FrozenBatchNorm(3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    expected = batchnorm.FrozenBatchNorm(3)
    torch.testing.assert_close(layer.state_dict(), expected.state_dict(), rtol=0, atol=0)
    meta = batchnorm.FrozenBatchNorm(3, device="meta")
    meta.load_state_dict(OfDetectron2(3).state_dict(), assign=True)
    assert meta(torch.randn(2, 3)).shape == (2, 3)
    assert meta.num_batches_tracked == 0


def test_repr_copies_and_pickle() -> None:
    layer = frozen(torch.float32, activation="relu").train()
    assert repr(layer).startswith("FrozenBatchNorm(3, eps=1e-05, affine=True")
    assert repr(layer).endswith(", activation=relu)")
    assert not {"momentum", "track"} & set(repr(layer).replace("_", " ").replace("=", " ").split())
    x = torch.randn(4, 3, 2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is batchnorm.FrozenBatchNorm
        assert not other.train().training
        assert not other.weight.requires_grad
        assert torch.equal(other(x), layer(x))


def test_traced_and_compiled() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 1), frozen(torch.float32)).train()
    x = torch.randn(4, 2, 5)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    exported = torch.export.export(net.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), net(x))


def test_what_is_refused() -> None:
    with pytest.raises(batchnorm.InputError, match="activation"):
        batchnorm.FrozenBatchNorm(3, activation="tanh")
    with pytest.raises(TypeError, match="momentum"):
        batchnorm.FrozenBatchNorm(3, momentum=0.1)
    layer = batchnorm.FrozenBatchNorm(3)
    with pytest.raises(batchnorm.InputTypeError):
        layer(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(batchnorm.InputError):
        layer(torch.randn(2, 4))
    model = nn.Sequential(batchnorm.freeze(nn.BatchNorm2d(3)).model)
    for norm in (layer, model):
        with pytest.raises(batchnorm.ModelError, match="which would be frozen no longer"):
            nn.SyncBatchNorm.convert_sync_batchnorm(norm)


def test_one_sample_is_enough_in_training() -> None:
    layer = frozen().train()
    x = torch.randn(1, 3, dtype=torch.float64)
    close(layer(x), by_formula(layer, x), torch.float64)


# The rest: what surgery and the tools for statistics make of it.


@pytest.mark.parametrize("to", ["batchnorm", "torch"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_frozen_by_convert_and_unfrozen_again(to: str, axes: int) -> None:
    cls = {
        "batchnorm": [batchnorm.BatchNorm1d, batchnorm.BatchNorm2d, batchnorm.BatchNorm3d],
        "torch": [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d],
    }[to][axes - 1]
    layer = randomize(cls(3, momentum=0.3, eps=0.01))
    attributes, x = set(vars(layer)), torch.randn(4, 3, *[5] * axes)
    expected = copy.deepcopy(layer).eval()(x)
    changes = batchnorm.convert(layer, "frozen", inplace=True)
    assert type(layer) is batchnorm.FrozenBatchNorm
    assert [parameter.requires_grad for parameter in layer.parameters()] == [False, False]
    torch.testing.assert_close(layer.train()(x), expected)
    assert "it is frozen: unfreeze it first" in reasons(batchnorm.convert(layer, to)).values()
    back = batchnorm.unfreeze(layer, to=to, inplace=True)
    assert notes(back)[""] == "statistics, weight, bias unfrozen"
    assert type(layer) is cls
    assert (layer.momentum, layer.eps, layer.training) == (0.3, 0.01, True)
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert set(vars(layer)) - attributes == {"_frozen_by"}
    assert attributes <= set(vars(layer))
    back.revert()
    changes.revert()
    assert type(layer) is cls
    assert set(vars(layer)) == attributes
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_how_many_axes_an_unfrozen_layer_has() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = batchnorm.FrozenBatchNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) if x.sum() > 0 else x

    net = nn.Sequential(nn.Conv2d(3, 3, 1), batchnorm.FrozenBatchNorm(3))
    assert type(batchnorm.unfreeze(net).model[1]) is batchnorm.BatchNorm2d
    plain = batchnorm.unfreeze(net, to="torch").model[1]
    assert vars(plain).keys() - {"_frozen_by"} == vars(nn.BatchNorm2d(3)).keys()
    changes = batchnorm.unfreeze(Opaque(), affine=False)
    assert "name the class to convert to" in reasons(changes)["bn"]
    whole = batchnorm.unfreeze(Opaque())
    assert not whole.changed
    assert len(whole.skipped) == 1
    assert not whole.model.bn.weight.requires_grad  # not half unfrozen
    changes = batchnorm.unfreeze(Opaque(), to=batchnorm.BatchNorm2d)
    assert type(changes.model.bn) is batchnorm.BatchNorm2d
    kept = batchnorm.unfreeze(Opaque(), statistics=False).model.bn
    assert type(kept) is batchnorm.FrozenBatchNorm
    assert kept.weight.requires_grad
    with pytest.raises(batchnorm.InputError, match="unfreeze: to: got 'thawed'"):
        batchnorm.unfreeze(net, to="thawed")


def test_it_is_frozen_already() -> None:
    net = nn.Sequential(batchnorm.FrozenBatchNorm(3), batchnorm.freeze(nn.BatchNorm2d(3)).model)
    already = "its statistics are frozen already; no weight or bias of it is trained"
    assert reasons(batchnorm.freeze(net)) == {"0": already, "1": already}
    changes = batchnorm.convert(net, "frozen", eps=0.5)
    assert changes.model[0].eps == 0.5
    assert reasons(changes) == {"1": "it is frozen: unfreeze it first"}
    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    assert "no running statistics" in reasons(batchnorm.convert(untracked, "frozen"))["0"]


def test_it_is_folded() -> None:
    net = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3), batchnorm.FrozenBatchNorm(4, activation="relu"), nn.Conv2d(4, 2, 1))
    ).eval()
    x = torch.randn(2, 3, 6, 6)
    changes = batchnorm.fold(net, example=x)
    assert names(changes) == ["1"]
    torch.testing.assert_close(changes.model(x), net(x))
    assert not any(isinstance(module, batchnorm.FrozenBatchNorm) for module in changes.model.modules())


def test_recalibrate_leaves_it_alone() -> None:
    net = nn.Sequential(batchnorm.FrozenBatchNorm(3), nn.BatchNorm1d(3))
    result = batchnorm.recalibrate(net, [torch.randn(8, 3) for _ in range(3)])
    assert [(s.name, s.reason) for s in result.skipped] == [("0", "frozen: it is a FrozenBatchNorm")]
    with pytest.raises(batchnorm.ModelError, match="unfreeze"):
        batchnorm.recalibrate(net[:1], [torch.randn(8, 3)])
