"""`fold` on what torchvision's networks become as exported programs and ONNX files."""

import warnings

import numpy as np
import pytest
import torch
from model_packages import package
from onnx_models import count, onnx
from surgery_helpers import randomize
from torch import nn

import batchnorm

pytestmark = [pytest.mark.packages, pytest.mark.slow]

# The batch norms that stay: in DenseNet and in the transitions of a pre-activation network they stand before a ReLU.
NETWORKS = {
    "resnet18": 0,
    "mobilenet_v3_small": 0,
    "googlenet": 0,
    "shufflenet_v2_x0_5": 0,
    "regnet_y_400mf": 0,
    "densenet121": 62,
}


def network(name: str) -> nn.Module:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    net = getattr(package("torchvision.models"), name)(weights=None, **options)
    for each in net.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight)
    return randomize(net).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_exported_program(name: str) -> None:
    net, x = network(name).double(), torch.randn(2, 3, 64, 64).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (x,))
    changes = batchnorm.fold(program, x)
    assert len(changes.skipped) == NETWORKS[name]
    expected = net(x).detach()
    torch.testing.assert_close(
        changes.model.module()(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())
    )


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_onnx_file(name: str, tmp_path) -> None:
    net, x = network(name), torch.randn(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(net, (x,), dynamo=True, verbose=False, optimize=False)
        exported.optimize()
    exported.save(tmp_path / "net.onnx", external_data=True)
    before = count(onnx.load(tmp_path / "net.onnx"))
    changes = batchnorm.fold(tmp_path / "net.onnx", np.asarray(x))
    onnx.checker.check_model(changes.model)
    assert len(changes.changed) + len(changes.skipped) == before
    assert len(changes.skipped) <= NETWORKS[name]
