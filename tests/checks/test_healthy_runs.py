"""Healthy models on batches of pictures: no rule that runs batches finds anything that would be a warning."""

import pytest
import torch
from model_packages import package
from pretrained import NETWORKS, crops, photos
from torch import Tensor, nn

import batchnorm

TORCHVISION = [
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "googlenet",
    "densenet121",
    "efficientnet_b0",
    "regnet_x_400mf",
    "vgg11_bn",
    "mnasnet0_5",
]
TIMM = ["ghostnet_050", "repvgg_a0", "hrnet_w18_small", "dla34", "mixnet_s", "res2net50_26w_4s", "lcnet_050"]


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """Noise at many scales, each picture with a colour of its own: smooth like photographs, and all different."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 * torch.randn(count, 3, 1, 1, generator=generator).expand(count, 3, size, size)
    for side, weight in ((4, 1.0), (8, 0.7), (16, 0.5), (size // 2, 0.3), (size, 0.15)):
        noise = torch.randn(count, 3, side, side, generator=generator)
        x = x + weight * nn.functional.interpolate(noise, size=size, mode="bilinear")
    return x


def assert_healthy(model: nn.Module, batches: list[Tensor]) -> batchnorm.Findings:
    findings = batchnorm.check(model, batches=batches, select="BN1", ignore="BN109")
    assert findings.at_least("warning") == (), [(str(each), each.cause) for each in findings]
    return findings


@pytest.mark.packages
@pytest.mark.parametrize("name", NETWORKS)
def test_trained_weights_on_photographs_and_on_other_pictures(name: str) -> None:
    model = NETWORKS[name]()
    some = crops(photos(), 32, 128)[torch.randperm(32)]
    assert_healthy(model, list(some.split(8)))
    assert_healthy(model, list(pictures(32, 128).split(8)))


def made(name: str) -> nn.Module:
    if name in TIMM:
        return package("timm").create_model(name, num_classes=10)
    more = {"init_weights": False} if name == "googlenet" else {}
    return package("torchvision.models").get_model(name, weights=None, num_classes=10, **more)


@pytest.mark.packages
@pytest.mark.parametrize("name", [*TORCHVISION, *TIMM])
def test_architectures(name: str) -> None:
    """Freshly made, and with statistics that are right for other pictures of the same kind."""
    model = made(name)
    batches = list(pictures(64, 64).split(8))
    assert_healthy(model, batches)
    batchnorm.recalibrate(model, list(pictures(128, 64, seed=1).split(32)))
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.num_batches_tracked.fill_(10_000)
    assert_healthy(model, batches)
