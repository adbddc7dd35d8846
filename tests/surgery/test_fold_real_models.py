"""`fold` on what torchvision's networks become as exported programs and ONNX files."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from model_packages import folder, package
from onnx_models import count, export, onnx
from pretrained import line_of_text
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
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    path = export(net, x, tmp_path / "net.onnx")
    before = count(onnx.load(path))
    assert before == len(norms)
    changes = batchnorm.fold(path, np.asarray(x))
    onnx.checker.check_model(changes.model)
    assert (len(changes.changed), len(changes.skipped)) == (before - NETWORKS[name], NETWORKS[name])


# The batch norms folded and left in the three networks of PP-OCR, and what the two lines say of the first.
TEXT = {
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": (35, 0),
    "ch_PP-OCRv4_rec_infer.onnx": (6, 0),
    "ch_PP-OCRv4_det_infer.onnx": (2, 1),
}


@pytest.mark.parametrize("file", TEXT)
def test_fold_onnx_files_from_another_framework(file: str, tmp_path: Path) -> None:
    """Trained in PaddlePaddle, exported by paddle2onnx; a line of a printed page, upright and upside down."""
    path = folder("rapidocr_onnxruntime") / "models" / file
    # The detector wants multiples of 32.
    line = line_of_text(64 if "det" in file else 48)
    changes = batchnorm.fold(path, line)
    assert (len(changes.changed), len(changes.skipped)) == TEXT[file]
    assert count(changes.model) == len(changes.skipped)
    onnx.save(changes.model, tmp_path / "folded.onnx")
    runtime = package("onnxruntime")
    before, after = (
        runtime.InferenceSession(each, providers=["CPUExecutionProvider"]).run(None, {"x": line})[0]
        for each in (path, tmp_path / "folded.onnx")
    )
    np.testing.assert_allclose(after, before, rtol=0, atol=5e-5)
    if "cls" in file:  # which way up?
        assert (after[0, 0] > 0.99, after[1, 1] > 0.99) == (True, True)
