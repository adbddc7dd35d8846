"""Broken models for the rules BN012 to BN019: neighbours of the layers, optimizers, averages, processes."""

import functools

import torch
from check_cases import Broken, broken
from check_nets import (
    PreActivation,
    Residual,
    Sequences,
    UNet,
    Volumes,
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

import batchnorm

# BN012 and BN013: what stands before a batch norm


@broken
def dead_bias() -> Broken:
    """conv net: convolutions with a bias before each batch norm"""
    return Broken(conv_net(bias=True), {"BN012": "1"})


@broken
def dead_bias_unet() -> Broken:
    """U-Net: convolutions with a bias before each batch norm"""
    return Broken(UNet(bias=True), {"BN012": "up.1"})


@broken
def dead_bias_vgg() -> Broken:
    """vgg11_bn, as torchvision makes it"""
    return Broken(torchvision("vgg11_bn"), {"BN012": "features.1"})


@broken
def dropout_before() -> Broken:
    """MLP: dropout of 0.5 right before a batch norm"""
    data = shuffled(table("breast_cancer"))
    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.Linear(32, 2))
    fit(model, loader(data))
    return Broken(model, {"BN013": "3"}, {"batches": loader(data)}, follows=("BN101",))


@broken
def dropout_of_channels_before() -> Broken:
    """conv net: Dropout2d right before a batch norm"""
    data = shuffled(digits())
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Dropout2d(0.3), nn.BatchNorm2d(16), nn.Flatten())
    model.append(nn.Linear(16 * 36, 10))
    fit(model, loader(data))
    return Broken(model, {"BN013": "3"}, {"batches": loader(data)}, follows=("BN101",))


# BN014: weight decay


@broken
def adamw_on_everything() -> Broken:
    """residual net: AdamW(model.parameters())"""
    data = shuffled(digits())
    model = Residual()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    fit(model, loader(data), optimizer=optimizer)
    return Broken(model, {"BN014": "stem.1"}, {"optimizer": optimizer, "batches": loader(data)})


@broken
def sgd_on_everything() -> Broken:
    """shufflenet_v2: SGD(model.parameters(), weight_decay=1e-4)"""
    model = torchvision("shufflenet_v2_x0_5")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, weight_decay=1e-4)
    fit(model, loader(pictures(), 16), 12, optimizer=optimizer)
    return Broken(model, {"BN014": "conv1.1"}, {"optimizer": optimizer})


# BN015: momentum=None


@broken
def plain_average() -> Broken:
    """MLP trained 1,200 steps with momentum=None"""
    data = shuffled(table("wine"))
    model = mlp(13, 3, 16, functools.partial(nn.BatchNorm1d, momentum=None))
    fit(model, loader(data, 32), 1200)
    return Broken(model, {"BN015": "1"}, {"batches": loader(data, 32)}, follows=("BN101",))


@broken
def plain_average_compiled() -> Broken:
    """conv net with momentum=None, compiled"""
    return Broken(torch.compile(conv_net(functools.partial(nn.BatchNorm2d, momentum=None))), {"BN015": "1"})


# BN016: processes


@broken
def four_processes() -> Broken:
    """resnet18 on four processes with eight pictures each, not synchronized"""
    data = pictures(64)
    model = torchvision("resnet18")
    fit(model, loader(data, 8), 12)
    return Broken(
        model, {"BN016": "bn1"}, {"batches": loader(data, 8), "world_size": 4}, follows=("BN103", "BN101")
    )


@broken
def eight_processes() -> Broken:
    """3-d conv net on eight processes with two volumes each, not synchronized"""
    x, y = volumes()
    model = Volumes()
    fit(model, loader((x, y), 2), 120, lr=0.01)
    return Broken(
        model, {"BN016": "bn1"}, {"batches": loader((x, y), 2), "world_size": 8}, follows=("BN103", "BN101")
    )


def volumes(count: int = 240) -> tuple[Tensor, Tensor]:
    """A digit that grows faint from slice to slice."""
    x, y = shuffled(digits())
    return x[:count, :, None] * torch.linspace(1, 0.2, 8).view(1, 1, 8, 1, 1), y[:count]


# BN017: averages


@broken
def ema_of_parameters() -> Broken:
    """conv net: an EMA over parameters from the start, as deepcopy and a loop over parameters() make it"""
    data = shuffled(digits())
    model = conv_net()
    average = twin(model)
    fit(model, loader(data), 150, after=functools.partial(follow, average, model, 0.95))
    return Broken(model, {"BN017": None}, {"averaged": average, "batches": loader(data)})


def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)


@broken
def ema_after_warmup() -> Broken:
    """residual net: the same, begun after ten warmup steps"""
    data = shuffled(digits())
    model = Residual()
    fit(model, loader(data), 10, lr=0.1)
    average = twin(model)
    fit(model, loader(data), 200, lr=0.1, after=functools.partial(follow, average, model, 0.98))
    return Broken(model, {"BN017": None}, {"averaged": average, "batches": loader(data)})


@broken
def swa_without_buffers() -> Broken:
    """MLP: AveragedModel over parameters, with an avg_fn of one's own and update_bn forgotten"""
    data = shuffled(table("breast_cancer"))
    model = mlp(30, 2)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
    buffers = {name: value.clone() for name, value in average.module.named_buffers()}
    fit(model, loader(data), 150)
    follow(average.module, model, 0.0)
    assert all(bool((value == buffers[name]).all()) for name, value in average.module.named_buffers())
    return Broken(model, {"BN017": None}, {"averaged": average, "batches": loader(data)})


# BN018 and BN019: what other tools get wrong


@broken
def before_a_padded_convolution() -> Broken:
    """residual net whose batch norms stand straight before padded convolutions"""

    class Straight(nn.Module):
        def __init__(self, width: int, norm: object = None) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.relu(self.conv(self.bn(x)))

    model = Residual(block=Straight)
    fit(model, loader(shuffled(digits())), 40)  # a new one has no shift that the padding could lack
    return Broken(model, {"BN018": "blocks.0.bn"})


@broken
def before_activations() -> Broken:
    """residual net of the second kind: batch norm, ReLU, convolution"""
    return Broken(Residual(block=PreActivation), {"BN018": "blocks.0.bn1"})


@broken
def before_activations_densenet() -> Broken:
    """densenet121, as torchvision makes it"""
    return Broken(torchvision("densenet121"), {"BN018": "features.denseblock1.denselayer1.norm1"})


@broken
def activation_inside_timm() -> Broken:
    """timm's efficientnet_lite0, whose batch norms hold the activation"""
    return Broken(timm("efficientnet_lite0"), {"BN019": "bn1"})


@broken
def activation_inside() -> Broken:
    """MLP with this package's layers and activation="relu", to be converted by another library"""
    norm = functools.partial(batchnorm.BatchNorm1d, activation="relu")
    model = nn.Sequential(nn.Linear(13, 16, bias=False), norm(16), nn.Linear(16, 3))
    return Broken(model, {"BN019": "1"})


@broken
def activation_assigned() -> Broken:
    """1-d conv net whose batch norm got a module as an attribute"""
    model = Sequences(1, 2)
    model.bn1.gate = nn.SiLU()
    return Broken(model, {"BN019": "bn1"})
