"""`remove` and `insert` on architectures of torchvision, timm and efficientnet-lite, with random weights."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers import same_bits
from model_packages import package
from surgery_helpers import alive, randomize
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm

pytestmark = pytest.mark.packages


def _torchvision(name: str, **options: object) -> nn.Module:
    return package("torchvision").models.get_model(name, weights=None, **options)


def _count(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def _runs(model: nn.Module, size: int = 64) -> None:
    """Forward and backward in training, forward in eval: everything finite, every parameter reached."""
    x = torch.randn(2, 3, size, size)
    y = model.train()(x)
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        assert torch.isfinite(model.eval()(x)).all()


@pytest.mark.parametrize(
    ("name", "norms", "inserted"),
    [
        ("resnet18", 20, 20),
        ("resnet50", 53, 53),
        # The 17 projections of the inverted residuals are linear on purpose: no activation comes before the next
        # convolution, so none of them is given a batch norm.
        ("mobilenet_v2", 52, 35),
        # 120 convolutions and 121 batch norms: in a dense block the batch norm stands before the convolution, and
        # one more before the classifier.
        ("densenet121", 121, 120),
        # The 8 convolutions, and the 2 hidden linear layers that vgg11_bn leaves without.
        ("vgg11_bn", 8, 10),
    ],
)
def test_torchvision(name: str, norms: int, inserted: int) -> None:
    model = _torchvision(name)
    assert _count(model) == norms
    removed = batchnorm.remove(model)
    assert (len(removed.changed), removed.skipped, removed.notes) == (norms, (), ())
    assert _count(removed.model) == 0
    assert _count(model) == norms
    state = model.state_dict()
    for key, value in removed.model.state_dict().items():
        assert torch.equal(value, state[key]) if key in state else not value.any()

    again = batchnorm.insert(removed.model)
    assert (len(again.changed), again.notes) == (inserted, ())
    assert _count(again.model) == inserted
    _runs(removed.model)
    _runs(again.model)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_residual_network_without_and_with_batch_norm_again_is_the_same_function(name: str) -> None:
    model = _torchvision(name).double().train()
    again = batchnorm.insert(batchnorm.remove(model).model).model
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(again(x), model(x))


def test_vgg_gets_its_batch_norms_where_the_bn_variant_has_them() -> None:
    plain, normalized = _torchvision("vgg11"), _torchvision("vgg11_bn").double().train()
    features = batchnorm.insert(
        nn.Sequential(*plain.features, nn.Conv2d(512, 1, 1)).double(), inplace=True
    ).model[:-1]
    convs = [
        [m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (features, normalized.features)
    ]
    for ours, theirs in zip(*convs, strict=True):
        ours.weight.data.copy_(theirs.weight.data)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(features(x), normalized.features(x))


def test_insert_into_transformers_and_their_kin_leaves_channels_last_layers_alone() -> None:
    for name in ("vit_b_16", "swin_t", "convnext_tiny"):
        changes = batchnorm.insert(_torchvision(name))
        assert (changes.changed, changes.notes) == ((), ())
        assert any("channels last" in skip.reason for skip in changes.skipped)


def test_training_branches_of_googlenet() -> None:
    model = _torchvision("googlenet", init_weights=False).eval()
    removed = batchnorm.remove(model)
    assert len(removed.changed) == _count(model) == 59
    again = batchnorm.insert(removed.model)
    # Two more than there were: the hidden linear layer of each auxiliary classifier.
    assert len(again.changed) == 61
    assert {"aux1.fc1", "aux2.fc1"} <= {change.name for change in again.changed}
    assert not any(module.training for module in again.model.modules())


def test_efficientnet_lite_and_its_own_convolutions() -> None:
    model = package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    removed = batchnorm.remove(model)
    assert len(removed.changed) == _count(model) == 49
    assert Counter(change.note.split(" ", 1)[1] for change in removed.changed) == {
        "given a bias of zeros": 49
    }
    again = batchnorm.insert(removed.model)
    assert len(again.changed) == 33
    assert all("bias kept" in change.note for change in again.changed)
    _runs(removed.model)


@pytest.mark.parametrize(
    ("name", "removed", "skipped"),
    [("resnet18", 20, 0), ("hrnet_w18_small", 91, 0), ("efficientnet_lite0", 0, 49), ("densenet121", 0, 121)],
)
def test_timm(name: str, removed: int, skipped: int) -> None:
    package("torchvision")
    create: Callable[..., nn.Module] = package("timm").create_model
    model = create(name, pretrained=False)
    changes = batchnorm.remove(model)
    assert (len(changes.changed), len(changes.skipped)) == (removed, skipped)
    # timm's BatchNormAct2d holds the activation: without it the network would be linear.
    assert all("BatchNormAct2d has a forward of its own" in skip.reason for skip in changes.skipped)
    x = torch.randn(2, 3, 64, 64)
    assert torch.isfinite(changes.model.eval()(x)).all()
    if skipped:
        torch.testing.assert_close(changes.model(x), model.eval()(x))


def _trained(model: nn.Module, size: int = 64) -> nn.Module:
    """Batch norms with statistics that fit and parameters of either sign."""
    x = torch.randn(8, 3, size, size)
    randomize(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.double().eval()


@pytest.mark.parametrize(
    ("name", "folded", "left"),
    [
        ("resnet18", 20, 0),
        ("resnet50", 53, 0),
        ("mobilenet_v2", 52, 0),
        ("mobilenet_v3_small", 34, 0),
        ("efficientnet_b0", 49, 0),
        ("shufflenet_v2_x0_5", 56, 0),
        ("regnet_y_400mf", 53, 0),
        ("mnasnet0_5", 52, 0),
        ("vgg11_bn", 8, 0),
        # Batch norm, relu, convolution: only those behind a convolution alone can go.
        ("densenet121", 59, 62),
        ("googlenet", 57, 0),
        ("inception_v3", 94, 0),
    ],
)
def test_fold_torchvision(name: str, folded: int, left: int) -> None:
    options = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    size = 96 if name == "inception_v3" else 64
    model = _trained(_torchvision(name, **options), size)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        changes = batchnorm.fold(model)
        assert (len(changes.changed), len(changes.skipped), changes.notes) == (folded, left, ())
        torch.testing.assert_close(changes.model(x), before, rtol=1e-9, atol=1e-9 * float(before.abs().max()))
    assert len(batchnorm.fold(model.float(), x.float()).changed) == folded


def _step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients and buffers of a training step, and the output in evaluation."""
    torch.manual_seed(0)
    y = model.train()(x)
    (y * torch.randn_like(y)).sum().backward()
    found = [y.detach(), *(p.grad for p in model.parameters()), *(b.double() for b in model.buffers())]
    with torch.no_grad():
        return [*found, model.eval()(x)]


@pytest.mark.parametrize(
    ("name", "activations", "additions"),
    [
        ("resnet18", 17, 8),
        ("resnet50", 49, 16),
        ("mobilenet_v2", 35, 10),
        ("mobilenet_v3_small", 23, 6),
        ("regnet_y_400mf", 49, 16),
        ("densenet121", 121, 0),
        ("googlenet", 57, 0),
        ("shufflenet_v2_x0_5", 37, 0),
        ("vgg11_bn", 8, 0),
    ],
)
def test_fuse_torchvision(name: str, activations: int, additions: int) -> None:
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = randomize(_torchvision(name, **options)).double()
    changes = batchnorm.fuse(model)
    fused = changes.model
    assert list(fused.state_dict()) == list(model.state_dict())
    norms = [module for module in fused.modules() if isinstance(module, _BatchNorm)]
    assert all(isinstance(norm, batchnorm.BatchNorm2d) for norm in norms)
    assert sum(norm.activation is not None for norm in norms) == activations
    assert sum(change.note.startswith("takes the addition") for change in changes.changed) == additions
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    expected = _step(model, x)
    # Gradients that are zero but for rounding (of a bias before a batch norm) are compared with the largest one.
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for actual, wanted in zip(_step(fused, x), expected, strict=True):
        atol = 1e-10 * max(largest, float(wanted.abs().max()))
        torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=atol)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "hrnet_w18_small", "dla34", "vovnet39a", "cspresnet50"]
)
def test_fuse_and_fold_timm(name: str) -> None:
    package("torchvision")
    create: Callable[..., nn.Module] = package("timm").create_model
    model = _trained(create(name, pretrained=False))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fused = batchnorm.fuse(model)
    assert list(fused.model.state_dict()) == list(model.state_dict())
    folded = batchnorm.fold(model, x)
    again = batchnorm.fold(fused.model, x)
    with torch.no_grad():
        expected = model(x)
        scale = float(expected.abs().max())
        for each in (fused, folded, again):
            torch.testing.assert_close(each.model(x), expected, rtol=1e-9, atol=1e-9 * scale)
    if name.startswith(("resnet", "hrnet", "dla")):
        assert folded.skipped == again.skipped == ()
        assert sum("takes" in change.note for change in fused.changed) > 8


@pytest.mark.parametrize(
    ("name", "most"), [("resnet18", 0.7), ("resnet50", 0.7), ("mobilenet_v2", 0.7), ("densenet121", 0.8)]
)
def test_recompute_torchvision(name: str, most: float) -> None:
    """The same bits as the fused model, and less memory than the one as it was, whose ReLU is in place."""
    model = _torchvision(name)
    fused = batchnorm.fuse(model).model
    again = batchnorm.fuse(model, memory="recompute").model
    assert list(again.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    kept = [alive(net, x)[1] for net in (model, fused, again)]
    assert kept[2] < most * min(kept[:2])
    for net in (fused, again):
        net.load_state_dict(model.state_dict())
    for actual, wanted in zip(_step(again, x), _step(fused, x), strict=True):
        assert same_bits(actual, wanted)
