"""`parameter_groups`: every parameter once, and decay where it belongs."""

import pytest
import torch
from torch import nn

import batchnorm


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(4),
                batchnorm.BatchNorm2d(4),
                nn.SyncBatchNorm(4),
                nn.BatchNorm2d(4, affine=False),
                nn.InstanceNorm2d(4, affine=True),
                nn.GroupNorm(2, 4),
                nn.LayerNorm(4),
                nn.RMSNorm(4),
            ]
        )
        self.again = self.norms[0]
        self.head, self.tied = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.tied.weight = self.head.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.conv.weight.requires_grad_(False)


def test_every_parameter_once_and_decay_where_it_belongs() -> None:
    model = Net()
    decaying, others = batchnorm.parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decaying["params"]} == {"conv.weight", "head.weight", "scale"}
    together = [id(p) for p in decaying["params"] + others["params"]]
    assert sorted(together) == sorted(names)
    assert len(together) == len(set(together))
    torch.optim.SGD([decaying, others], 0.1)


def test_the_shrinking_is_the_decay() -> None:
    model = Net()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(batchnorm.parameter_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 0.95 if name in ("conv.weight", "head.weight", "scale") else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor)


def test_a_weight_that_a_norm_shares_does_not_decay() -> None:
    model = nn.Module()
    model.norm, model.own = nn.BatchNorm1d(4), nn.Linear(1, 4, bias=False)
    model.own.bias_like = model.norm.weight
    (only, other) = batchnorm.parameter_groups(model, 0.1)
    assert [len(only["params"]), len(other["params"])] == [1, 2]
    assert [len(group["params"]) for group in batchnorm.parameter_groups(nn.BatchNorm1d(2), 0.1)] == [2]


@pytest.mark.parametrize(
    ("model", "decay", "error", "text"),
    [
        (3, 0.1, batchnorm.InputTypeError, "model: got int.*not its parameters"),
        (nn.Linear(1, 1), -1, batchnorm.InputError, "weight_decay: got -1"),
        (nn.Linear(1, 1), float("inf"), batchnorm.InputError, "weight_decay: got inf"),
        (nn.Linear(1, 1), "0.1", batchnorm.InputTypeError, "weight_decay: got str"),
        (nn.ReLU(), 0.1, batchnorm.ModelError, "no parameters"),
        (
            nn.Sequential(nn.LazyLinear(2)),
            0.1,
            batchnorm.ModelError,
            r"parameter 0\.weight: got no shape yet",
        ),
    ],
)
def test_refused(model: nn.Module, decay: float, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        batchnorm.parameter_groups(model, decay)
