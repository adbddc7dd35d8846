"""Broken models for the rules BN108 to BN113: inputs, layouts, sources, accumulation, devices, contrast."""

from typing import Any

import torch
from bikeshare import split_days
from check_broken_runs import pairs, spoken
from check_cases import Broken, broken
from check_nets import (
    Gan,
    Pyramid,
    Residual,
    Sequences,
    Siamese,
    UNet,
    conv_net,
    digits,
    fit,
    forever,
    loader,
    mlp,
    pictures,
    shuffled,
    table,
    torchvision,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from batchnorm.comparison.datasets import bike_hours

# BN108: inputs that stand still


@broken
def sensor_off() -> Broken:
    """MLP with batch norm on a table: a column is filled with a default in the new rows"""
    x, y = shuffled(table("wine"))
    model = nn.Sequential(nn.BatchNorm1d(13), *mlp(13, 3))
    fit(model, loader((x[:120], y[:120]), 16), 120)
    later = x[120:].clone()
    later[:, 5] = 0.0
    return Broken(model, {"BN108": "0"}, {"batches": loader((later, y[120:]), 16)})


@broken
def channel_missing() -> Broken:
    """resnet18 with batch norm on its pictures: grey ones were given with two empty channels"""
    data = pictures()
    model = nn.Sequential(nn.BatchNorm2d(3), torchvision("resnet18"))
    fit(model, loader(data, 16), 30)
    x, y = data[0].clone(), data[1]
    x[:, 1:] = 0.0
    return Broken(model, {"BN108": "0"}, {"batches": loader((x, y), 16)})


@broken
def same_all_day() -> Broken:
    """MLP with batch norm on the hours of rented bikes, one day per batch: working day is constant in each"""
    hours = bike_hours()
    split = split_days(hours.x, hours.y, hours.day, 0)
    model = nn.Sequential(nn.BatchNorm1d(split.x.shape[1]), *mlp(split.x.shape[1], 1))
    everything = loader((split.x, split.y.unsqueeze(1)), 24)
    fit(model, everything, 150, loss=F.mse_loss)
    days = [split.x[split.day == number] for number in split.day.unique()]
    batches = [each for each in days[:: len(days) // 12] if len(each) > 1]
    return Broken(
        model, {"BN108": "0", "BN107": None}, {"batches": batches, "max_batches": 12}, follows=("BN101",)
    )


# BN109: slow layouts


@broken
def contiguous_pictures() -> Broken:
    """conv net on pictures of 56x56 in PyTorch's usual layout, on this CPU"""
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return Broken(model, {"BN109": "1"}, {"batches": loader(pictures(56), 16), "max_batches": 1})


@broken
def contiguous_resnet() -> Broken:
    """resnet18 in PyTorch's usual layout, on this CPU"""
    return Broken(
        torchvision("resnet18"),
        {"BN109": "bn1"},
        {"batches": loader(pictures(112), 8), "max_batches": 1},
        follows=("BN103",),
    )


# BN110: sources


@broken
def real_and_made() -> Broken:
    """GAN: the discriminator gets real and made digits apart from each other"""
    data = shuffled(digits())
    model = Gan()
    players = (model.discriminator, model.generator)
    optimizers = [torch.optim.Adam(each.parameters(), 2e-3, betas=(0.5, 0.99)) for each in players]
    batches = forever(loader(data))
    for _ in range(60):
        real = next(batches)[0]
        said = (model.discriminator(real), model.discriminator(model.made(len(real)).detach()))
        wanted = (torch.ones_like(said[0]), torch.zeros_like(said[1]))
        step(optimizers[0], sum(map(F.binary_cross_entropy_with_logits, said, wanted)))
        fooled = model.discriminator(model.made(len(real)))
        step(optimizers[1], F.binary_cross_entropy_with_logits(fooled, torch.ones_like(fooled)))
    return Broken(model, {"BN110": "discriminator.1"}, {"batches": loader(data)}, follows=("BN101",))


def step(optimizer: torch.optim.Optimizer, loss: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@broken
def two_scanners() -> Broken:
    """siamese conv net: pictures of the second scanner are brighter and paler"""
    x, y = pairs()
    x[:, 1] = 0.7 + 0.3 * x[:, 1]
    model = Siamese(conv_net())
    fit(model, loader((x, y)), 120, loss=F.mse_loss)
    return Broken(model, {"BN110": "encoder.1"}, {"batches": loader((x, y))}, follows=("BN101",))


@broken
def one_head_for_all_scales() -> Broken:
    """pyramid with one head, and its batch norm, for three scales"""
    data = shuffled(digits())
    model = Pyramid()
    fit(model, loader(data), 120)
    return Broken(model, {"BN110": "head.1"}, {"batches": loader(data)}, follows=("BN101",))


@broken
def two_domains() -> Broken:
    """MLP for two tables through one network: measurements, and the same in other units"""
    x, y = shuffled(table("breast_cancer"))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(30, 2)

        def forward(self, x: Tensor) -> Tensor:
            here, there = x[:, 0], x[:, 1]
            return torch.cat([self.net(here), self.net(there)], 1)

    both = torch.stack([x, 2.5 * x + 1.0], 1)
    model = Both()

    def twice(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :2], y) + F.cross_entropy(logits[:, 2:], y)

    fit(model, loader((both, y)), 120, loss=twice)
    return Broken(model, {"BN110": "net.1"}, {"batches": loader((both, y))}, follows=("BN101",))


# BN111: accumulation


def accumulated(
    model: nn.Module, batches: "DataLoader[Any]", optimizer: torch.optim.Optimizer, parts: int, steps: int
) -> torch.optim.Optimizer:
    for number, (x, y) in zip(range(parts * steps), forever(batches), strict=False):
        (F.cross_entropy(model(x), y) / parts).backward()
        if number % parts == parts - 1:
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


@broken
def accumulated_by_four() -> Broken:
    """conv net: gradients of four batches of 16 for each step of Adam"""
    batches = loader(shuffled(digits()), 16)
    model = conv_net()
    optimizer = accumulated(model, batches, torch.optim.Adam(model.parameters(), 3e-3), 4, 40)
    return Broken(model, {"BN111": "1"}, {"optimizer": optimizer, "batches": batches})


@broken
def accumulated_by_eight() -> Broken:
    """1-d conv net: gradients of eight batches of 16 for each step of AdamW"""
    batches = loader(spoken(), 16)
    model = Sequences(28, 10)
    optimizer = accumulated(model, batches, torch.optim.AdamW(model.parameters(), 3e-3), 8, 20)
    return Broken(model, {"BN111": "bn1"}, {"optimizer": optimizer, "batches": batches})


# BN112: a device that computes wrongly. There is none here, so PyTorch's operators are made wrong as those devices'
# were: for float32, while the check runs.

ATEN = torch.ops.aten


class WrongGradient(TorchDispatchMode):
    """Backward without the terms of the mean and the variance, as if the statistics were constants."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is ATEN.native_batch_norm_backward.default and args[0].dtype == torch.float32:
            dy, x, weight, std = args[0], args[1], args[2], args[6]
            factor = (std if weight is None else std * weight).view(1, -1, *[1] * (x.dim() - 2))
            return (dy * factor, *found[1:])
        return found


class WrongLayout(TorchDispatchMode):
    """Output of an input that is not contiguous, written as if it were."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is ATEN.native_batch_norm.default and args[0].dtype == torch.float32:
            y = found[0]
            if y.dim() == 4 and not args[0].is_contiguous():
                return (y.permute(0, 2, 3, 1).reshape(y.shape), *found[1:])
        return found


@broken
def wrong_gradient() -> Broken:
    """residual net on a device whose backward leaves the mean out"""
    data = shuffled(digits())
    model = Residual()
    fit(model, loader(data), 100)
    return Broken(model, {"BN112": "stem.1"}, {"batches": loader(data)}, during=WrongGradient)


@broken
def wrong_layout() -> Broken:
    """U-Net in channels-last on a device that takes every input for contiguous"""
    x, _ = shuffled(digits())
    model = UNet().to(memory_format=torch.channels_last)
    data = (x.to(memory_format=torch.channels_last), x)
    return Broken(model, {"BN112": "below.1"}, {"batches": loader(data)}, during=WrongLayout)


# BN113: samples that see each other


def views(x: Tensor) -> "DataLoader[Any]":
    """Two copies of each picture, each cropped out of its padded self, with noise of its own."""

    def cropped(image: Tensor) -> Tensor:
        side, far = image.shape[-1], image.shape[-1] // 8
        top, left = (int(torch.randint(0, 2 * far + 1, ())) for _ in range(2))
        large = F.pad(image, (far,) * 4, mode="reflect")
        return large[:, top : top + side, left : left + side] + 0.1 * torch.randn_like(image)

    def collate(some: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        return [torch.stack([cropped(each) for each in some]) for _ in range(2)], torch.arange(len(some))

    random = torch.Generator().manual_seed(0)
    return DataLoader(x, 32, shuffle=True, drop_last=True, collate_fn=collate, generator=random)  # type: ignore[arg-type]


class Contrastive(nn.Module):
    """One vector for each view."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, both: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(F.normalize(self.encoder(each)) for each in both)


def contrast(both: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return F.cross_entropy(both[0] @ both[1].T / 0.2, y)


@broken
def contrastive_digits() -> Broken:
    """contrastive conv net, both views in the batch, batch norm in the encoder"""
    batches = views(pictures(16)[0][:, :1])
    model = Contrastive(conv_net())
    fit(model, batches, 100, loss=contrast)  # type: ignore[arg-type]
    return Broken(model, {"BN113": "encoder.1"}, {"batches": batches}, follows=("BN101",))


@broken
def contrastive_table() -> Broken:
    """contrastive MLP on a table: two copies of each row with columns from other rows"""
    x, _ = shuffled(table("breast_cancer"))

    def collate(some: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        rows, both = torch.stack(some), []
        for _ in range(2):
            others = x[torch.randint(len(x), rows.shape), torch.arange(rows.shape[1])]
            both.append(torch.where(torch.rand(rows.shape) < 0.3, others, rows))
        return both, torch.arange(len(some))

    random = torch.Generator().manual_seed(0)
    batches = DataLoader(x, 32, shuffle=True, drop_last=True, collate_fn=collate, generator=random)  # type: ignore[arg-type]
    model = Contrastive(mlp(30, 16))
    fit(model, batches, 100, loss=contrast)  # type: ignore[arg-type]
    return Broken(model, {"BN113": "encoder.1"}, {"batches": batches}, follows=("BN101",))
