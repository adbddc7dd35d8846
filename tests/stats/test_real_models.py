"""The statistics tools, freeze, convert and absorb_bias on architectures of torchvision and timm, random weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from model_packages import package
from stats_helpers import assert_same_state, in_training_mode, norms, state
from surgery_helpers import randomize
from torch import Tensor, nn

import batchnorm

pytestmark = pytest.mark.packages

# Batch norms, and how many of them stand behind a convolution with a bias.
NETWORKS = {
    "torchvision/resnet18": (20, 0),
    "torchvision/densenet121": (121, 0),
    "torchvision/shufflenet_v2_x0_5": (56, 0),
    "torchvision/regnet_y_400mf": (53, 0),
    "timm/hrnet_w18_small": (91, 4),
    # Its batch norms hold the activation, in a class with a forward of its own.
    "timm/efficientnet_lite0": (49, 0),
}
OWN_FORWARD = ("timm/efficientnet_lite0",)
Named = tuple[str, nn.Module]


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Named:
    """In eval mode, with statistics that fit; tests work on copies."""
    source, _, name = request.param.partition("/")
    models = package("torchvision.models")
    create: Callable[..., nn.Module] = package("timm").create_model if source == "timm" else models.get_model
    torch.manual_seed(0)
    net = randomize(
        create(name, **({"pretrained": False} if source == "timm" else {"weights": None}))
    ).double()
    for layer in norms(net).values():
        layer.momentum = 1.0
    with torch.no_grad():
        net.train()(pictures())
    for layer in norms(net).values():
        layer.momentum = 0.1
    return request.param, net.eval()


def pictures(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def see(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(pictures())


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))


def test_convert_and_back(network: Named) -> None:
    name, net = network
    changes = batchnorm.convert(net, "batchnorm")
    left = NETWORKS[name][0] if name in OWN_FORWARD else 0
    assert (len(changes.changed), len(changes.skipped)) == (NETWORKS[name][0] - left, left)
    close(see(changes.model), see(net))
    back = batchnorm.convert(changes.model, "torch").model
    assert [type(module) for module in back.modules()] == [type(module) for module in net.modules()]
    assert torch.equal(see(back), see(net))


def test_freeze_and_unfreeze(network: Named) -> None:
    name, net = network
    changes = batchnorm.freeze(net)
    assert len(changes.changed) == NETWORKS[name][0]
    frozen = changes.model.train()
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    frozen(pictures()).square().mean().backward()
    for key, layer in norms(frozen).items():
        assert not any(parameter.requires_grad for parameter in layer.parameters()), key
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, before[key]), key
    thawed = batchnorm.unfreeze(frozen).model
    assert all(parameter.requires_grad for parameter in thawed.parameters())
    assert torch.equal(see(thawed.eval()), see(net))


def test_absorb_bias(network: Named) -> None:
    name, net = network
    changes = batchnorm.absorb_bias(net)
    assert len(changes.changed) == NETWORKS[name][1]
    close(see(changes.model), see(net))
    assert torch.equal(see(changes.revert()), see(net))


def test_recalibrate(network: Named) -> None:
    name, net = network
    renewed = copy.deepcopy(net)
    before, expected = state(renewed), in_training_mode(net, pictures().split(4))
    result = batchnorm.recalibrate(renewed, pictures().split(4), tolerance=0)
    assert len(result.layers) == NETWORKS[name][0]
    for key, layer in norms(renewed).items():
        mean, var = expected[key]
        sigma = (var + layer.eps).sqrt()
        assert ((layer.running_mean - mean).abs() / sigma).max() < 1e-8, key
        assert ((layer.running_var - var).abs() / (var + layer.eps)).max() < 1e-8, key
    result.revert()
    assert_same_state(renewed, before)


def test_adapt(network: Named) -> None:
    _, net = network
    used = copy.deepcopy(net)
    before = state(used)
    with batchnorm.adapt(used, "batch") as adapted, pytest.warns(UserWarning, match="6 samples are noise"):
        found = adapted(pictures())
    assert_same_state(used, before)
    for layer in norms(used).values():
        layer.train()
    with torch.no_grad():
        close(found, used(pictures()))


def test_parameter_groups(network: Named) -> None:
    name, net = network
    decaying, others = batchnorm.parameter_groups(net, 0.1)
    assert len(decaying["params"]) + len(others["params"]) == len(list(net.parameters()))
    assert all(parameter.dim() > 1 for parameter in decaying["params"])
    assert all(parameter.dim() == 1 for parameter in others["params"])
    assert len(others["params"]) >= 2 * NETWORKS[name][0]


def test_averaged_and_merged_with_itself(network: Named) -> None:
    _, net = network
    average = batchnorm.averaged(net)
    for _ in range(2):
        average.update_parameters(net)
    assert torch.equal(see(average), see(net))
    merged = batchnorm.merge_statistics([net.state_dict()] * 2, [1e15, 1e15])
    again = copy.deepcopy(net)
    again.load_state_dict(merged)
    close(see(again), see(net))


def test_to_another_framework_and_back(network: Named) -> None:
    name, net = network
    there = batchnorm.to_framework("flax", net.state_dict())
    assert len(there.layers) == NETWORKS[name][0]
    back = batchnorm.from_framework("flax", there.values, **there.options)
    again = copy.deepcopy(net)
    for layer in norms(again).values():
        layer.reset_parameters()
    assert again.load_state_dict(back.values, strict=False).unexpected_keys == []
    assert torch.equal(see(again), see(net))
