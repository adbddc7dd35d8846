"""Broken models for the rules BN001 to BN011: numbers, settings and modes of the layers."""

import functools
import itertools
from typing import Any

import torch
from check_cases import Broken, broken
from check_nets import (
    Data,
    Gan,
    Residual,
    Sequences,
    UNet,
    conv_net,
    digits,
    fit,
    loader,
    mlp,
    pictures,
    shuffled,
    table,
    timm,
    torchvision,
    twin,
)
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.comparison.datasets import bike_hours

# BN001: a number that is not finite stays for good


def skip_bad_steps(model: nn.Module, batches: Any, steps: int) -> None:
    """A loop that looks at the loss and leaves out the step: the weights stay finite."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in itertools.islice(batches, steps):
        loss = F.cross_entropy(model(x), y)
        if loss.isfinite():
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@broken
def nan_image() -> Broken:
    """conv net on digits: one image holds a NaN; the training loop skips the step"""
    x, y = shuffled(digits())
    bad = x.clone()
    bad[100, 0, 3, 3] = float("nan")
    model = conv_net()
    skip_bad_steps(model, loader((bad, y)), 40)
    return Broken(model, {"BN001": "1"}, {"batches": loader((x, y))})


@broken
def missing_value() -> Broken:
    """MLP on a table: validation rows with a missing value went through in training mode"""
    x, y = shuffled(table("breast_cancer"))
    model = mlp(30, 2)
    fit(model, loader((x[:400], y[:400])))
    held_out = x[400:].clone()
    held_out[7, 3] = float("nan")
    with torch.no_grad():
        model(held_out)
    return Broken(model, {"BN001": "1"}, {"batches": loader((x[:400], y[:400]))})


@broken
def overflow_in_half() -> Broken:
    """residual net under float16 autocast: one batch of 16-bit images that nobody scaled"""
    x, y = shuffled(digits())
    model = Residual()
    fit(model, loader((x, y)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        model(65535 * x[:32])
    return Broken(model, {"BN001": "stem.1"}, {"batches": loader((x, y))})


# BN002: variances that no data has


def task_arithmetic() -> tuple[dict[str, Tensor], nn.Module]:
    x, y = shuffled(digits())
    base = Residual()
    fit(base, loader((x, y)), 150)
    tuned = twin(base)
    fit(tuned, loader((0.3 * x, y)), 60, lr=0.01)
    first, second = base.state_dict(), tuned.state_dict()
    far = {key: value + 2 * (second[key] - value) for key, value in first.items()}
    return far, base


@broken
def extrapolated_state() -> Broken:
    """residual net: task arithmetic, base + 2 (tuned - base), over all of the state dict"""
    state, _ = task_arithmetic()
    return Broken(state, {"BN002": "stem.1"})


@broken
def extrapolated_model() -> Broken:
    """the same, loaded, in eval mode"""
    state, model = task_arithmetic()
    model.load_state_dict(state)
    return Broken(model.eval(), {"BN002": "stem.1"})


def air_pressure(count: int = 2048, steps: int = 24) -> Data:
    """Pascals: 101325 and some tens more or less, which rise or fall."""
    random = torch.Generator().manual_seed(0)
    walk = 3 * torch.randn(count, 1, steps, generator=random).cumsum(2)
    return 101325 + walk, (walk[:, 0, -1] > 0).long()


@broken
def one_pass_variance() -> Broken:
    """1-d conv net on air pressure of 16 stations in pascals: statistics set by E[x²] - E[x]² in float32"""
    x, y = stations()
    model = nn.Sequential(nn.BatchNorm1d(16), Sequences(16, 2))
    fit(model, loader((x, y)), 60)
    total, square = torch.zeros(16), torch.zeros(16)
    for part in x.split(64):
        total, square = total + part.sum((0, 2)), square + part.square().sum((0, 2))
    count = x[:, 0].numel()
    model[0].running_mean.copy_(total / count)
    model[0].running_var.copy_(square / count - (total / count).square())
    return Broken(model.eval(), {"BN002": "0"}, follows=("BN101",))


def stations() -> Data:
    """Sixteen of them, at heights of their own."""
    x, y = air_pressure()
    random = torch.Generator().manual_seed(1)
    heights = 500 * torch.randn(1, 16, 1, generator=random)
    return x - heights + 3 * torch.randn(len(x), 16, x.shape[2], generator=random), y


# BN003: half precision


@broken
def bfloat16_unet() -> Broken:
    """U-Net: model.bfloat16(), and on with the training"""
    x, _ = shuffled(digits())
    clean = x.bfloat16()
    model = UNet().bfloat16()
    fit(model, loader((clean + 0.1 * torch.randn_like(clean), clean)), 40, loss=F.mse_loss)
    return Broken(model, {"BN003": "down.1"}, {"batches": loader((clean, clean))})


@broken
def half_mobilenet() -> Broken:
    """mobilenet_v2: model.half() after loading, then more training"""
    x, y = pictures()
    model = torchvision("mobilenet_v2")
    fit(model, loader((x, y), 16), 12)
    return Broken(model.half().train(), {"BN003": "features.0.1"})


@broken
def half_large_values() -> Broken:
    """MLP in float16 on a table that nobody scaled: variances above 65504"""
    x, y = shuffled(table("breast_cancer", standardized=False))
    model = nn.Sequential(nn.BatchNorm1d(30), nn.Linear(30, 2)).half()
    return Broken(
        model,
        {"BN003": "0"},
        {"batches": loader((x.half(), y))},
        severity={"BN003": "error"},
        follows=("BN001", "BN112"),
    )


# BN004: the other framework's momentum


@broken
def keras_momentum() -> Broken:
    """conv net with Keras' momentum of 0.99"""
    data = shuffled(digits())
    model = conv_net(functools.partial(nn.BatchNorm2d, momentum=0.99))
    fit(model, loader(data))
    return Broken(model, {"BN004": "1"}, {"batches": loader(data)}, follows=("BN101",))


@broken
def keras_momentum_mobilenet() -> Broken:
    """mobilenet_v2 with momentum 0.9 and eps 1e-3, as in a port"""
    norm = functools.partial(nn.BatchNorm2d, momentum=0.9, eps=1e-3)
    model = torchvision("mobilenet_v2", norm_layer=norm)
    fit(model, loader(pictures(), 16), 12)
    return Broken(model, {"BN004": "features.0.1"}, {"batches": loader(pictures(), 16)}, follows=("BN101",))


@broken
def keras_momentum_timm() -> Broken:
    """timm's lcnet_050 made with bn_momentum=0.99"""
    return Broken(timm("lcnet_050", bn_momentum=0.99), {"BN004": "bn1"})


# BN005: eps


@broken
def eps_of_a_new_head() -> Broken:
    """resnet18 with a new head that came with Keras' eps of 1e-3"""
    model = torchvision("resnet18")
    model.fc = nn.Sequential(nn.Linear(512, 32, bias=False), nn.BatchNorm1d(32, eps=1e-3), nn.Linear(32, 10))
    return Broken(model, {"BN005": "fc.1"})


@broken
def eps_above_the_data() -> Broken:
    """MLP with batch norm on inputs of 1e-3 (metres, where they were micrometres)"""
    x, y = shuffled(table("breast_cancer"))
    small = (1e-3 * x, y)
    model = nn.Sequential(nn.BatchNorm1d(30), *mlp(30, 2))
    fit(model, loader(small), 200)
    return Broken(model, {"BN005": "0"}, {"batches": loader(small)})


# BN006: statistics that nothing moved


@broken
def parameters_alone() -> Broken:
    """conv net given another one's named_parameters(), strict=False: no buffers"""
    trained, model = conv_net(), conv_net()
    fit(trained, loader(shuffled(digits())))
    model.load_state_dict(dict(trained.named_parameters()), strict=False)
    return Broken(model.eval(), {"BN006": "1"})


@broken
def trained_in_eval_mode() -> Broken:
    """MLP trained after a forgotten model.eval()"""
    data = shuffled(table("wine"))
    model = mlp(13, 3).eval()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    fit(model, loader(data, 16), optimizer=optimizer)
    return Broken(model, {"BN006": "1"}, {"optimizer": optimizer})


@broken
def momentum_zero() -> Broken:
    """residual net with momentum=0: every update thrown away"""
    data = shuffled(digits())
    model = Residual(functools.partial(nn.BatchNorm2d, momentum=0.0))
    fit(model, loader(data))
    return Broken(model, {"BN006": "blocks.0.bn1"}, follows=("BN101",))


# BN007: dead channels


@broken
def slimmed() -> Broken:
    """conv net with an L1 penalty on γ"""
    data = shuffled(digits())
    model = conv_net()
    gammas = [layer.weight for layer in model if isinstance(layer, nn.BatchNorm2d)]

    def penalized(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y) + 0.05 * sum(gamma.abs().sum() for gamma in gammas)

    fit(model, loader(data), 300, loss=penalized)
    return Broken(model, {"BN007": None}, {"batches": loader(data)})


@broken
def empty_borders() -> Broken:
    """MLP with batch norm on raw digits: pixels of the border are always 0"""
    x, y = shuffled(digits())
    data = (x.flatten(1), y)
    model = nn.Sequential(nn.BatchNorm1d(64), *mlp(64, 10))
    fit(model, loader(data), 250)
    return Broken(model, {"BN007": "0"}, {"batches": loader(data)})


# BN008: means of more than 1000 σ


@broken
def time_stamps() -> Broken:
    """MLP with batch norm on raw columns, one of them seconds since 1970, of one week"""
    hours = bike_hours()
    x, y = hours.x[:168], hours.y[:168]
    stamps = 1.3e9 + 3600.0 * torch.arange(168).unsqueeze(1)
    data = shuffled((torch.cat([x, stamps], 1), (y > y.median()).long()))
    model = nn.Sequential(nn.BatchNorm1d(x.shape[1] + 1), *mlp(x.shape[1] + 1, 2))
    fit(model, loader(data, 24), 150)
    return Broken(model, {"BN008": "0"}, {"batches": loader(data, 24)})


@broken
def pascals() -> Broken:
    """1-d conv net with batch norm on air pressure in pascals"""
    data = air_pressure()
    model = nn.Sequential(nn.BatchNorm1d(1), Sequences(1, 2))
    fit(model, loader(data), 200)
    return Broken(model, {"BN008": "0"}, {"batches": loader(data)})


# BN009: mixed modes


@broken
def half_in_eval_mode() -> Broken:
    """resnet18 in training with two of its stages in eval mode"""
    model = torchvision("resnet18").train()
    model.layer1.eval()
    model.layer2.eval()
    return Broken(model, {"BN009": "layer1.0.bn1"})


@broken
def dropout_at_test_time() -> Broken:
    """1-d conv net in eval mode, a part set to train() for its dropout"""
    model = nn.Sequential(
        Sequences(1, 16), nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.3)), nn.Linear(16, 2)
    )
    fit(model, loader(tuple_of_walks()))
    model.eval()
    model[1].train()
    return Broken(model, {"BN009": "1.0"}, severity={"BN009": "error"})


def tuple_of_walks() -> Data:
    x, y = air_pressure()
    return (x - 101325) / 30, y


# BN010: frozen weights, live statistics


@broken
def linear_probe() -> Broken:
    """resnet18: requires_grad_(False) for all but the last layer"""
    data = pictures()
    model = torchvision("resnet18")
    fit(model, loader(data, 16), 10)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    return Broken(model, {"BN010": "bn1"})


@broken
def adapters() -> Broken:
    """1-d conv net with a low-rank adapter, all else frozen"""
    base = Sequences(1, 2)
    fit(base, loader(tuple_of_walks()))
    base.requires_grad_(False)
    base.out = nn.Sequential(base.out, nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    return Broken(base, {"BN010": "bn1"}, {"batches": loader(tuple_of_walks())})


# BN011: no running statistics


@broken
def transductive() -> Broken:
    """conv net for few-shot learning with track_running_stats=False"""
    data = shuffled(digits())
    model = conv_net(functools.partial(nn.BatchNorm2d, track_running_stats=False))
    fit(model, loader(data))
    return Broken(model, {"BN011": "1", "BN102": "1"}, {"batches": loader(data)})


@broken
def untracked_generator() -> Broken:
    """GAN whose generator tracks no statistics"""
    model = Gan(functools.partial(nn.BatchNorm2d, track_running_stats=False))
    return Broken(model, {"BN011": "generator.1"})
