"""Healthy models: no rule that needs no batches finds anything that would be a warning."""

import pytest
import torch
from model_packages import package
from pretrained import NETWORKS
from torch import nn

import batchnorm

TORCHVISION = [
    "resnet18",
    "resnet50",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "regnet_x_800mf",
    "vgg11_bn",
    "vgg16_bn",
]
TIMM = [
    "resnet26d",
    "resnet50d",
    "resnetv2_50d_gn",
    "skresnet18",
    "res2net50_26w_4s",
    "dla34",
    "hrnet_w18_small",
    "ese_vovnet19b_dw",
    "efficientnet_b0",
    "efficientnet_lite0",
    "mixnet_s",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "hardcorenas_a",
    "ghostnet_100",
    "rexnet_100",
    "repvgg_a0",
    "regnety_002",
    "cspresnet50",
    "darknet53",
    "selecsls42b",
    "tinynet_a",
    "lcnet_050",
    "levit_128",
    "xcit_nano_12_p8_224",
    "mobilevit_s",
    "edgenext_xx_small",
    "inception_v4",
    "xception41",
    "pit_ti_224",
    "mobileone_s0",
    "fastvit_t8",
    "repvit_m0_9",
    "efficientformerv2_s0",
    "tresnet_m",
    "dpn68",
]


def assert_healthy(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=1e-4)
    for mode in (True, False):
        findings = batchnorm.check(model.train(mode), optimizer=optimizer, select="BN0")
        assert findings.at_least("warning") == (), findings
    assert batchnorm.check(model.state_dict()).at_least("warning") == ()


@pytest.mark.packages
@pytest.mark.parametrize("name", NETWORKS)
def test_trained_weights(name: str) -> None:
    model = NETWORKS[name]()
    assert_healthy(model)
    average = batchnorm.averaged(model)
    average.update_parameters(model)
    findings = batchnorm.check(model, averaged=average, select=["BN017", "BN005", "BN007", "BN008"])
    assert {each.code for each in findings} == {"BN005", "BN007"}
    assert all(each.severity == "info" for each in findings)
    # Half precision for inference is no warning either.
    assert batchnorm.check(model.half().eval(), select="BN0").at_least("warning") == ()
    assert batchnorm.check(model.bfloat16(), select="BN0").at_least("warning") == ()


@pytest.mark.packages
@pytest.mark.parametrize("name", TORCHVISION)
def test_fresh_models_of_torchvision(name: str) -> None:
    models = package("torchvision.models")
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(models, name)(weights=None, **more)
    assert_healthy(model)
    assert not [each for each in batchnorm.check(model, select=["BN006", "BN007", "BN008"])]


@pytest.mark.packages
@pytest.mark.parametrize("name", TIMM)
def test_fresh_models_of_timm(name: str) -> None:
    assert_healthy(package("timm").create_model(name))
