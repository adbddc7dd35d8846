"""The operations on networks with trained ImageNet weights and on photographs: what they see must not change."""

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from model_packages import package
from onnx_models import count, export, onnx
from pretrained import NETWORKS, check_known, crops, labels, photos
from surgery_helpers import steps
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm

pytestmark = pytest.mark.packages
NORMS = {"mobilenet": 52, "efficientnet_lite": 49}


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return photos()


@pytest.fixture(scope="module", params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(name: str) -> nn.Module:
    """One for all tests of the module: none of them may change it."""
    return NETWORKS[name]()


@pytest.fixture(scope="module")
def expected(trained: nn.Module, pictures: Tensor) -> Tensor:
    return see(trained, pictures)


@pytest.fixture(autouse=True)
def _unchanged(trained: nn.Module) -> object:
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    yield
    assert not any(module.training for module in trained.modules())
    for key, value in trained.state_dict().items():
        assert torch.equal(value, before[key]), key


def see(net: nn.Module, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        return net(pictures)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two logits, in units of the largest logit."""
    return float((actual - expected).abs().max() / expected.abs().max())


def norms(net: nn.Module) -> list[_BatchNorm]:
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


def test_it_knows_the_photographs(name: str, expected: Tensor) -> None:
    check_known(name, expected)


def test_fold(name: str, trained: nn.Module, pictures: Tensor, expected: Tensor) -> None:
    changes = batchnorm.fold(trained, pictures)
    folded = see(changes.model, pictures)
    check_known(name, folded)
    if (
        name == "efficientnet_lite"
    ):  # whose convolutions pad by themselves: the next tests fold it all the same
        assert (len(changes.changed), len(changes.skipped)) == (0, NORMS[name])
        assert all(
            "Conv2dStaticSamePadding has a forward of its own" in each.reason for each in changes.skipped
        )
        assert torch.equal(folded, expected)
        return
    assert (len(changes.changed), changes.skipped, norms(changes.model)) == (NORMS[name], (), [])
    assert distance(folded, expected) < 5e-6
    wide, x = copy.deepcopy(trained).double(), pictures.double()
    assert distance(see(batchnorm.fold(wide, x).model, x), see(wide, x)) < 1e-12
    # Its state dict fits every network of the kind that was folded.
    other = copy.deepcopy(trained)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other = batchnorm.fold(other).model
    other.load_state_dict(changes.model.state_dict())
    assert torch.equal(see(other, pictures), folded)
    assert torch.equal(see(changes.revert(), pictures), expected)


def test_fold_the_exported_program(name: str, trained: nn.Module, pictures: Tensor, expected: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(trained, (pictures,))
    changes = batchnorm.fold(program, pictures)
    # In the graph a convolution that pads by itself is a padding and a convolution.
    assert (len(changes.changed), changes.skipped) == (NORMS[name], ())
    folded = see(changes.model.module(), pictures)
    assert distance(folded, expected) < 5e-6
    check_known(name, folded)


@pytest.mark.slow
def test_fold_the_onnx_file(
    name: str, trained: nn.Module, pictures: Tensor, expected: Tensor, tmp_path: Path
) -> None:
    path = export(trained, pictures, tmp_path / "net.onnx")
    assert count(onnx.load(path)) == NORMS[name]
    changes = batchnorm.fold(path, np.asarray(pictures))
    assert (len(changes.changed), changes.skipped, count(changes.model)) == (NORMS[name], (), 0)
    onnx.save(changes.model, tmp_path / "folded.onnx")
    session = package("onnxruntime").InferenceSession(
        tmp_path / "folded.onnx", providers=["CPUExecutionProvider"]
    )
    (folded,) = session.run(None, {session.get_inputs()[0].name: pictures.numpy()})
    assert distance(torch.from_numpy(folded), expected) < 5e-6
    check_known(name, torch.from_numpy(folded))


def test_fuse(name: str, trained: nn.Module, pictures: Tensor, expected: Tensor) -> None:
    changes = batchnorm.fuse(trained)
    assert changes.skipped == ()
    fused = see(changes.model, pictures)
    assert distance(fused, expected) < 5e-6
    check_known(name, fused)
    assert list(changes.model.state_dict()) == list(trained.state_dict())
    assert torch.equal(see(changes.revert(), pictures), expected)

    # A step of training, float64: output, gradients, statistics, and the output in evaluation are PyTorch's.
    x = crops(pictures, 4, 96).double()
    wanted = steps(copy.deepcopy(trained).double(), x)
    largest = max(float(each.abs().max()) for each in wanted[1:-1])
    for actual, each in zip(steps(batchnorm.fuse(trained).model.double(), x), wanted, strict=True):
        scale = max(float(each.abs().max()), 1e-6 * largest)
        torch.testing.assert_close(actual, each, rtol=1e-7, atol=1e-9 * scale)


def test_convert_and_back(name: str, trained: nn.Module, pictures: Tensor, expected: Tensor) -> None:
    changes = batchnorm.convert(trained, "batchnorm")
    ours = changes.model
    assert (len(changes.changed), changes.skipped) == (NORMS[name], ())
    assert all(isinstance(norm, batchnorm.BatchNorm2d) for norm in norms(ours))
    assert {(norm.eps, norm.momentum) for norm in norms(ours)} == {
        (norm.eps, norm.momentum) for norm in norms(trained)
    }
    assert distance(see(ours, pictures), expected) < 5e-6
    check_known(name, see(ours, pictures))
    back = batchnorm.convert(ours, "torch").model
    assert [type(module) for module in back.modules()] == [type(module) for module in trained.modules()]
    assert torch.equal(see(back, pictures), expected)
    fresh = batchnorm.convert(trained, "batchnorm").model
    for norm in norms(fresh):
        norm.reset_parameters()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(see(fresh, pictures), see(ours, pictures))


def test_freeze_for_fine_tuning(name: str, trained: nn.Module, pictures: Tensor, expected: Tensor) -> None:
    frozen = batchnorm.freeze(trained).model
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    head = [p for p in frozen.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(head, lr=1e-4, weight_decay=0.1)
    x = crops(pictures, 4, 96)
    for _ in range(2):
        loss = nn.functional.cross_entropy(frozen.train()(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held = {
        f"{key}.{part}"
        for key, module in trained.named_modules()
        if isinstance(module, _BatchNorm)
        for part in module.state_dict()
    }
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, before[key]) == (key in held), key
    # All of them thawed: their statistics move again.
    thawed = batchnorm.unfreeze(frozen).model.train()
    with torch.no_grad():
        thawed(x)
    assert all(
        not torch.equal(norm.running_mean, old.running_mean)
        for norm, old in zip(norms(thawed), norms(trained), strict=True)
    )
    untouched = batchnorm.unfreeze(batchnorm.freeze(trained).model).model
    assert torch.equal(see(untouched.eval(), pictures), expected)


def test_absorb_bias(name: str, trained: nn.Module, pictures: Tensor, expected: Tensor) -> None:
    # Neither network has biases there. With some, and statistics that know of them, it is the same function.
    assert batchnorm.absorb_bias(trained).changed == ()
    biased, last = copy.deepcopy(trained), None
    for module in biased.modules():
        if isinstance(module, nn.Conv2d):
            module.bias, last = nn.Parameter(torch.randn(module.out_channels)), module
        elif isinstance(module, _BatchNorm) and last is not None and last.out_channels == module.num_features:
            module.running_mean += last.bias.detach()
    assert distance(see(biased, pictures), expected) < 1e-4
    changes = batchnorm.absorb_bias(biased)
    assert len(changes.changed) + len(changes.skipped) == NORMS[name]
    assert len(changes.changed) == (NORMS[name] if name == "mobilenet" else 0), changes.skipped[:1]
    assert distance(see(changes.model, pictures), expected) < 1e-4
    check_known(name, see(changes.model, pictures))
    assert sum(
        conv.bias is not None for conv in changes.model.modules() if isinstance(conv, nn.Conv2d)
    ) == len(changes.skipped)


def test_remove_insert_and_take_back(
    name: str, trained: nn.Module, pictures: Tensor, expected: Tensor
) -> None:
    removed = batchnorm.remove(trained)
    assert (len(removed.changed), removed.skipped, norms(removed.model)) == (NORMS[name], (), [])
    # Without its batch norms a trained network sees nothing: they are no decoration.
    assert labels(see(removed.model, pictures)) != labels(expected)
    weights = trained.state_dict()
    kept = [key for key in removed.model.state_dict() if key in weights]
    assert len(kept) == NORMS[name] + 2  # a weight for each convolution, and the classifier
    for key in kept:
        assert torch.equal(removed.model.state_dict()[key], weights[key])
    again = batchnorm.insert(removed.model)
    assert len(again.changed) == {"mobilenet": 35, "efficientnet_lite": 33}[name]
    assert torch.equal(see(again.revert(), pictures), see(removed.model, pictures))
    assert batchnorm.insert(trained).changed == ()
    assert torch.equal(see(removed.revert(), pictures), expected)
