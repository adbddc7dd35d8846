"""The shapes of real networks, counted again by hand and by the networks themselves."""

import math

import pytest
import torch
from model_packages import package
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.bench.suites import EPILOGUES, SUITES, Norm


@pytest.mark.parametrize(
    ("name", "norms", "channels"),
    [
        ("resnet50", 53, 64 + 3 * 384 + 256 + 4 * 768 + 512 + 6 * 1536 + 1024 + 3 * 3072 + 2048),
        ("mobilenet_v2", 52, 17056),
        # The stem; in each block layers of 32 more channels and 128; three transitions; the end.
        (
            "densenet121",
            121,
            64
            + sum(
                sum(start + 32 * layer + 128 for layer in range(layers))
                for start, layers in ((64, 6), (128, 12), (256, 24), (512, 16))
            )
            + 256
            + 512
            + 1024
            + 1024,
        ),
        ("unet3d", 14, 2 * (256 + 128 + 64) + 32 + 64 + 64 + 128 + 128 + 256 + 256 + 512),
    ],
)
def test_every_batch_norm_is_counted(name: str, norms: int, channels: int) -> None:
    suite = SUITES[name]
    assert suite.count == norms
    assert sum(norm.channels * norm.count for norm in suite.norms) == channels


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_a_suite_names_each_shape_once(suite: object) -> None:
    assert isinstance(suite, type(SUITES["tiny"]))
    keys = [(norm.channels, norm.size, norm.epilogue, norm.batch) for norm in suite.norms]
    assert len(set(keys)) == len(keys)
    assert all(norm.epilogue in EPILOGUES and norm.count > 0 for norm in suite.norms)


def test_what_follows_in_each_network() -> None:
    def counts(name: str) -> dict[str, int]:
        found = dict.fromkeys(EPILOGUES, 0)
        for norm in SUITES[name].norms:
            found[norm.epilogue] += norm.count
        return {epilogue: count for epilogue, count in found.items() if count}

    assert counts("resnet50") == {"none": 4, "relu": 33, "residual+relu": 16}
    assert counts("mobilenet_v2") == {"none": 7, "relu6": 35, "residual": 10}
    assert counts("densenet121") == {"relu": 121}


def test_the_elements_of_resnet50() -> None:
    elements = sum(math.prod(norm.shape(1)) * norm.count for norm in SUITES["resnet50"].norms)
    assert elements == 11_113_984  # of one image: its 11.1 million activations


def test_a_shape_of_its_own_batch_keeps_it() -> None:
    assert Norm(8, (), "none", batch=4).shape(99) == (4, 8)
    assert Norm(8, (5, 5), "none").shape(99) == (99, 8, 5, 5)


@pytest.mark.packages
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet121"])
def test_the_networks_have_these_inputs(name: str) -> None:
    model = package("torchvision").models.get_model(name, weights=None).eval()
    seen: dict[tuple[int, tuple[int, ...]], int] = {}

    def note(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        key = arguments[0].shape[1], tuple(arguments[0].shape[2:])
        seen[key] = seen.get(key, 0) + 1

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    ours: dict[tuple[int, tuple[int, ...]], int] = {}
    for norm in SUITES[name].norms:
        ours[norm.channels, norm.size] = ours.get((norm.channels, norm.size), 0) + norm.count
    assert ours == seen
