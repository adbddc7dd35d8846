"""The networks of whole training steps: ResNets written out, so that PyTorch is all they need, and torchvision's."""

from typing import Any

from torch import Tensor, nn

from batchnorm._errors import InputError, MissingDependencyError, message
from batchnorm._files import require

__all__ = ["BUILT_IN", "ResNet", "network"]


class _Block(nn.Module):
    """Convolutions with batch norm, a shortcut, ReLU after the addition."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * width
        if expansion == 1:
            shapes = [(channels, width, 3, stride), (width, width, 3, 1)]
        else:
            shapes = [(channels, width, 1, 1), (width, width, 3, stride), (width, wide, 1, 1)]
        self.conv1, self.bn1 = _convolution(*shapes[0]), nn.BatchNorm2d(shapes[0][1])
        self.conv2, self.bn2 = _convolution(*shapes[1]), nn.BatchNorm2d(shapes[1][1])
        self.conv3 = _convolution(*shapes[2]) if expansion > 1 else None
        self.bn3 = nn.BatchNorm2d(wide) if expansion > 1 else None
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != wide:
            self.downsample = nn.Sequential(_convolution(channels, wide, 1, stride), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        """relu(f(x) + shortcut(x))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.conv3 is not None and self.bn3 is not None:
            y = self.relu(y)
            y = self.bn3(self.conv3(y))
        y = y + shortcut
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    """He et al. 2015, with the stride in the 3×3 convolution; modules are named as torchvision names them."""

    def __init__(self, blocks: tuple[int, int, int, int], expansion: int, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(64, 64, 1, blocks[0], expansion)
        self.layer2 = _stage(64 * expansion, 128, 2, blocks[1], expansion)
        self.layer3 = _stage(128 * expansion, 256, 2, blocks[2], expansion)
        self.layer4 = _stage(256 * expansion, 512, 2, blocks[3], expansion)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * expansion, classes)

    def forward(self, x: Tensor) -> Tensor:
        """The scores of the classes."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(self.avgpool(x).flatten(1))
        return scores


def _stage(channels: int, width: int, stride: int, count: int, expansion: int) -> nn.Sequential:
    first = _Block(channels, width, stride, expansion)
    return nn.Sequential(first, *(_Block(width * expansion, width, 1, expansion) for _ in range(count - 1)))


def _convolution(channels: int, out: int, size: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, out, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


BUILT_IN: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "resnet18": ((2, 2, 2, 2), 1),
    "resnet50": ((3, 4, 6, 3), 4),
}


def network(name: str) -> nn.Module:
    """A network with random weights: one of `BUILT_IN`, or torchvision's of that name.

    Raises:
        InputError: torchvision has none of that name.
        MissingDependencyError: it is not built in, and torchvision is not installed, or not for this PyTorch.
    """
    if name in BUILT_IN:
        return ResNet(*BUILT_IN[name])
    models = _torchvision_models(name)
    if name not in models.list_models(module=models):
        raise InputError(
            message(
                "network",
                got=repr(name),
                expected=f"{', '.join(BUILT_IN)}, or a name of torchvision.models, as mobilenet_v2",
            )
        )
    model: nn.Module = models.get_model(name, weights=None)
    return model


def _torchvision_models(name: str) -> Any:
    purpose = f"the network {name} (built in are {' and '.join(BUILT_IN)})"
    try:
        return require("torchvision.models", package="torchvision", purpose=purpose)
    except RuntimeError as error:  # one that was built for another PyTorch fails while it is imported
        reason = str(error).strip().partition("\n")[0]
        raise MissingDependencyError(
            f"{purpose} needs torchvision, and the one that is installed does not fit this PyTorch ({reason}). "
            "Run: pip install --upgrade torchvision"
        ) from error
