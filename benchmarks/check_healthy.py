"""Healthy models of the corpus: architectures after a short training, and two with the weights that they ship with.

What they are trained on are parts of five photographs, at 32x32 pixels where an architecture allows it; the label is
the photograph. `check` gets batches as in the training, the optimizer, and an average of the model.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bikeshare import split_days
from check_broken_runs import pairs, spoken
from check_broken_training import volumes
from check_nets import (
    Data,
    Gan,
    PreActivation,
    Residual,
    Sequences,
    Siamese,
    UNet,
    Volumes,
    conv_net,
    digits,
    fit,
    helpers,
    loader,
    mlp,
    package,
    shuffled,
    table,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import batchnorm
from batchnorm.comparison.datasets import bike_hours

BATCH = 16
# With a momentum of 0.1 a running average needs some 50 batches until its start no longer shows.
STEPS = 110
# Of architectures that take a quarter of a second or more for a step: fewer, and their statistics are still settling.
FEW = 40
HEAVY = (
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "efficientnet_b0",
    "res2net50_26w_4s",
    "hrnet_w18_small",
    "skresnet18",
    "cspresnet50",
    "selecsls42b",
    "rexnet_100",
    "repvit_m0_9",
    "dpn48b",
    "darknet17",
    "cs3darknet_s",
    "vgg11_bn",
)


@dataclass(frozen=True)
class Healthy:
    """One model that nothing is wrong with."""

    name: str
    source: str
    steps: int
    ready: Callable[[], tuple[nn.Module, dict[str, Any]]]  # the model and what goes to `check` with it


def judged(healthy: Healthy) -> dict[str, Any]:
    """Check the model: what is said of warning or above, and which rules had something to mention."""
    torch.manual_seed(0)
    model, given = healthy.ready()
    findings = batchnorm.check(model, **given)
    worse = findings.at_least("warning")
    return {
        "layers": findings.layers,
        "rules": len(findings.ran),
        "findings": [
            {
                "code": each.code,
                "severity": each.severity,
                "module": each.module,
                "message": each.message,
                "cause": each.cause,
            }
            for each in worse
        ],
        "mentioned": sorted({each.code for each in findings if each.severity == "info"}),
    }


@functools.cache
def crops(size: int, count: int = 640) -> Data:
    """Parts of the photographs, shuffled, and which photograph it is."""
    helpers()
    from pretrained import crops as parts
    from pretrained import photos

    pictures = photos()
    return shuffled((parts(pictures, count, size), torch.arange(count) % len(pictures)))


def trained(
    model: nn.Module, data: Data, *, steps: int = STEPS, batch: int = BATCH, **how: Any
) -> dict[str, Any]:
    """Train as one should; what `check` gets."""
    groups = batchnorm.parameter_groups(model, 1e-4)
    optimizer = torch.optim.SGD(groups, how.pop("lr", 0.05), momentum=0.9)
    average = batchnorm.averaged(model, decay=0.95)
    fit(
        model,
        loader(data, batch),
        steps,
        optimizer=optimizer,
        after=lambda: average.update_parameters(model),
        **how,
    )
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise RuntimeError("the training has diverged: this is no healthy model")
    return {"batches": loader(data, batch), "optimizer": optimizer, "averaged": average}


# Those that shrink their input more than others, or ask for a size.
SIZES = {"googlenet": 48, "dla34": 64}
TORCHVISION = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "googlenet",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet0_5",
    "mnasnet1_0",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "regnet_y_400mf",
    "regnet_x_400mf",
    "vgg11_bn",
]
TIMM = [
    "resnet10t",
    "resnet26d",
    "seresnet18",
    "skresnet18",
    "res2net50_26w_4s",
    "dla34",
    "hrnet_w18_small",
    "ese_vovnet19b_dw",
    "efficientnet_lite0",
    "mixnet_s",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "hardcorenas_a",
    "ghostnet_050",
    "rexnet_100",
    "repvgg_a0",
    "regnety_002",
    "cspresnet50",
    "selecsls42b",
    "tinynet_e",
    "lcnet_050",
    "mobileone_s0",
    "repvit_m0_9",
    "fbnetc_100",
    "semnasnet_075",
    "spnasnet_100",
    "dpn48b",
    "darknet17",
    "cs3darknet_s",
]
SHIPPED = ["mobilenet", "efficientnet_lite"]


class _Main(nn.Module):
    """Of a network with further outputs in training the first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        return y if isinstance(y, Tensor) else y[0]


def _architecture(source: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not asked for
        package("torchvision")
        if source == "timm":
            model = package("timm").create_model(name, num_classes=5)
        else:
            more = {"init_weights": False} if name == "googlenet" else {}
            model = package("torchvision.models").get_model(name, weights=None, num_classes=5, **more)
    if name == "googlenet":
        model = _Main(model)
    for layer in model.modules():
        # MobileNetV3 comes with 0.01 and MNASNet with 0.0003, for trainings of 100,000 steps: after 110, two thirds
        # or all of the statistics are still their start, and `check` is right to say so.
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None:
            layer.momentum = max(layer.momentum, 0.1)
    lr = (
        0.01 if name.startswith("vgg") else 0.05
    )  # its two hidden linear layers, without a norm, diverge at 0.05
    return model, trained(model, crops(SIZES.get(name, 32)), steps=steps_of(name), lr=lr)


def steps_of(name: str) -> int:
    return FEW if name in HEAVY else STEPS


def _shipped(name: str) -> tuple[nn.Module, dict[str, Any]]:
    helpers()
    from pretrained import NETWORKS

    model = NETWORKS[name]()
    return model.train(), {"batches": loader(crops(128, 128), BATCH)}


def _noisy() -> Data:
    clean = shuffled(digits())[0]
    return clean + 0.1 * torch.randn_like(clean), clean


def _hours() -> Data:
    hours = bike_hours()
    split = split_days(hours.x, hours.y, hours.day, 0)
    return split.x, split.y.unsqueeze(1)


def _hours_by_wind() -> Data:
    """One column for each speed of the wind, of which the highest ones are rare."""
    x, y = _hours()
    speed = x[:, -1].unique(return_inverse=True)[1]
    columns = F.one_hot(speed).float()
    return torch.cat([x[:, :-1], columns], 1), y


def _inked() -> Data:
    """The pixels that have ink in some digit, be it one of 1,797."""
    x, y = digits()
    rows = x.flatten(1)
    return rows[:, rows.amax(0) > 0], y


def _noisy_pairs() -> Data:
    """The second picture of each pair from a camera with a little more noise."""
    x, y = pairs()
    x[:, 1] += 0.1 * torch.randn_like(x[:, 1])
    return x, y


def _rows_in_pairs() -> Data:
    x, y = shuffled(table("breast_cancer"))
    x, y = x[:568], y[:568]
    return torch.stack([x[::2], x[1::2]], 1), (y[::2] == y[1::2]).float().unsqueeze(1)


# The networks that the broken models are made of, without the mistakes, and some that are near one.
OWN: dict[str, Callable[[], tuple[nn.Module, Data, dict[str, Any]]]] = {
    "MLP on a table": lambda: (mlp(30, 2), table("breast_cancer"), {}),
    "MLP on rented bikes, shuffled": lambda: (mlp(7, 1), _hours(), {"loss": F.mse_loss, "lr": 0.01}),
    "MLP on wines, batch norm on the input": lambda: (
        nn.Sequential(nn.BatchNorm1d(13), *mlp(13, 3)),
        table("wine"),
        {},
    ),
    "conv net on digits": lambda: (conv_net(), digits(), {}),
    "residual net on digits": lambda: (Residual(), digits(), {}),
    "residual net of the second kind": lambda: (Residual(block=PreActivation), digits(), {}),
    "U-Net on noisy digits": lambda: (UNet(), _noisy(), {"loss": F.mse_loss}),
    "1-d conv net on sequences": lambda: (Sequences(28, 10), spoken(), {}),
    "3-d conv net on volumes": lambda: (Volumes(), volumes(), {}),
    "siamese conv net": lambda: (Siamese(conv_net()), pairs(), {"loss": F.mse_loss}),
    "siamese conv net, more noise in the second picture": lambda: (
        Siamese(conv_net()),
        _noisy_pairs(),
        {"loss": F.mse_loss},
    ),
    "siamese MLP on a table, pairs of eight": lambda: (
        Siamese(mlp(30, 16)),
        _rows_in_pairs(),
        {"loss": F.mse_loss, "batch": 8, "lr": 0.02},
    ),
    "MLP on rented bikes, each speed of the wind a column": lambda: (
        nn.Sequential(nn.BatchNorm1d(33), *mlp(33, 1)),
        _hours_by_wind(),
        {"loss": F.mse_loss, "lr": 0.01},
    ),
    "MLP on raw digits, pixels that have ink in a few": lambda: (
        nn.Sequential(nn.BatchNorm1d(61), *mlp(61, 10)),
        _inked(),
        {},
    ),
    "generator of digits": lambda: (_Generator(), digits(), {"loss": F.mse_loss}),
    "conv net, layers of this package": lambda: (
        conv_net(functools.partial(batchnorm.BatchNorm2d, activation="relu")),
        digits(),
        {},
    ),
    "conv net, batch renormalization": lambda: (conv_net(batchnorm.BatchRenorm), digits(), {}),
}


class _Generator(nn.Module):
    """An autoencoder with a GAN's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16))
        self.generator = Gan().generator

    def forward(self, x: Tensor) -> Tensor:
        return self.generator(self.encoder(x)[:, :, None, None])


def _own(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, data, how = OWN[name]()
    x, y = shuffled(data)
    if "generator" in name:
        y = x
    return model, trained(model, (x, y), **{"batch": 32, **how})


def _pruned() -> tuple[nn.Module, dict[str, Any]]:
    """A third of the weights, as in the corpus' broken one, and the statistics measured anew."""
    data = shuffled(digits())
    model = conv_net()
    given = trained(model, data, batch=32)
    for layer in model:
        if isinstance(layer, nn.Conv2d) and layer.in_channels > 1:
            prune.l1_unstructured(layer, "weight", amount=0.67)
            prune.remove(layer, "weight")
    batchnorm.recalibrate(model, loader(data))
    return model, {"batches": given["batches"]}


def _fine_tuned() -> tuple[nn.Module, dict[str, Any]]:
    """Large batches first, then small ones and a small learning rate for darker digits."""
    x, y = shuffled(digits())
    model = Residual()
    fit(model, loader((x, y)), STEPS)
    return model, trained(model, (0.7 * x, y), batch=8, lr=0.002)


NEAR: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "conv net pruned to a third of its weights, recalibrated": _pruned,
    "residual net, fine-tuned on eight digits a batch": _fine_tuned,
}


def every() -> list[Healthy]:
    return [
        *(Healthy(name, "this corpus", STEPS, functools.partial(_own, name)) for name in OWN),
        *(Healthy(name, "this corpus", STEPS, ready) for name, ready in NEAR.items()),
        *(
            Healthy(f"{name} (shipped weights)", "shipped", 0, functools.partial(_shipped, name))
            for name in SHIPPED
        ),
        *(
            Healthy(
                f"{source}: {name}", source, steps_of(name), functools.partial(_architecture, source, name)
            )
            for source, names in (("torchvision", TORCHVISION), ("timm", TIMM))
            for name in names
        ),
    ]
