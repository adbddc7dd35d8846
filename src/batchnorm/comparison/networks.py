"""The built-in networks, all without batch norm: `batchnorm.insert` adds it, for these as for any other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from batchnorm._errors import InputError, ModelError, message

__all__ = ["NETWORKS", "Network", "network"]

# Half decades around the best rates on the digits, without and with batch norm: 0.1 and 1 for deep-mlp, 0.3 and 3 for
# cnn, 3 and 10 for mlp. So every best rate lies inside its sweep.
CONVOLUTION_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RELU_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SIGMOID_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Network:
    """A built-in network: how to build it for a sample's shape and a number of outputs, and what suits it.

    Args:
        name: its name.
        describe: one sentence for the report.
        build: from (sample shape, outputs) to a module whose weights are drawn from the global generator.
        rates: the learning rates of its default sweep, for plain SGD.
        steps: default training steps.
    """

    name: str
    describe: str
    build: Callable[[tuple[int, ...], int], nn.Module]
    rates: tuple[float, ...]
    steps: int


def network(name: str) -> Network:
    """A built-in network by name: "mlp", "deep-mlp" or "cnn".

    Raises:
        InputError: an unknown name.

    Example:
        >>> model = network("mlp").build((1, 8, 8), 10)
        >>> sum(isinstance(module, nn.Sigmoid) for module in model)
        3
    """
    if name not in NETWORKS:
        raise InputError(
            message(
                "network",
                got=repr(name),
                expected=f"one of {', '.join(NETWORKS)}",
                fix="Your own network is given as a function that builds it.",
            )
        )
    return NETWORKS[name]


def _perceptron(
    depth: int, width: int, activation: type[nn.Module]
) -> Callable[[tuple[int, ...], int], nn.Module]:
    def build(shape: tuple[int, ...], outputs: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        features = torch.Size(shape).numel()
        for _ in range(depth):
            layers += [nn.Linear(features, width), activation()]
            features = width
        layers.append(nn.Linear(features, outputs))
        return _initialized(nn.Sequential(*layers), activation)

    return build


def _convolutional(shape: tuple[int, ...], outputs: int) -> nn.Module:
    if len(shape) != 3 or min(shape[1:]) < 2:
        raise ModelError(
            message(
                "network cnn",
                got=f"samples of shape {shape}",
                expected="images of shape (channels, height, width), at least 2 x 2",
                fix="Use deep-mlp for data without a spatial layout.",
            )
        )
    layers: list[nn.Module] = []
    channels = shape[0]
    for position, width in enumerate((16, 16, 32, 32)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        if position == 1:
            layers.append(nn.MaxPool2d(2))
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs)]
    return _initialized(nn.Sequential(*layers), nn.ReLU)


def _initialized(model: nn.Module, activation: type[nn.Module]) -> nn.Module:
    """He's initialization before ReLU, Xavier's before sigmoid and at the output, all biases 0.

    With PyTorch's default a deep plain network barely starts, and the comparison would flatter batch norm.
    """
    weighted = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for module in weighted:
        if activation is nn.ReLU and module is not weighted[-1]:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        else:
            nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


NETWORKS = {
    item.name: item
    for item in (
        Network(
            "mlp",
            "three hidden layers of 100, sigmoid, Xavier's initialization: the first network of the paper",
            _perceptron(3, 100, nn.Sigmoid),
            SIGMOID_RATES,
            1000,
        ),
        Network(
            "deep-mlp",
            "ten hidden layers of 100, ReLU, He's initialization",
            _perceptron(10, 100, nn.ReLU),
            RELU_RATES,
            500,
        ),
        Network(
            "cnn",
            "four 3x3 convolutions of 16, 16, 32 and 32 channels, ReLU, He's initialization",
            _convolutional,
            CONVOLUTION_RATES,
            300,
        ),
    )
}
