"""What recalibrate refuses, each in one line that says how to mend it, and with the model as it was."""

from typing import Any

import pytest
import torch
from stats_helpers import assert_same_state, state
from torch import nn

import batchnorm

DATA = [torch.randn(4, 2, 3, 3)]


def net() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))


@pytest.mark.parametrize(
    ("data", "options", "error", "text"),
    [
        (DATA[0], {}, batchnorm.InputTypeError, r"loader: got a Tensor.*\[batch\]"),
        (3, {}, batchnorm.InputTypeError, "loader: got a int"),
        ({"x": DATA[0]}, {}, batchnorm.InputTypeError, "loader: got a dict"),
        ([], {}, batchnorm.DataError, "loader: got no batch"),
        ([()], {}, batchnorm.DataError, "batch: got an empty tuple.*forward="),
        (["text"], {}, batchnorm.DataError, "batch: got a str"),
        ([DATA[0].numpy()], {}, batchnorm.DataError, r"got a ndarray.*torch\.as_tensor"),
        (
            [{"image": DATA[0]}],
            {},
            batchnorm.DataError,
            r"a dict of image, expected .* input among them.*model\(batch\['image'\]\)",
        ),
        ([{}], {}, batchnorm.DataError, "a dict of nothing"),
        ([torch.randn(1, 2, 1, 1)], {}, batchnorm.DataError, "1 values a channel.*more than one"),
        (iter(DATA), {"mode": "sequential"}, batchnorm.DataError, "only once"),
        (DATA, {"mode": "both"}, batchnorm.InputError, "mode: got 'both'"),
        (DATA, {"samples": 1}, batchnorm.InputError, "samples: got 1"),
        (DATA, {"samples": 10.0}, batchnorm.InputTypeError, "samples: got float"),
        (DATA, {"samples": True}, batchnorm.InputTypeError, "samples: got bool"),
        (DATA, {"tolerance": -0.1}, batchnorm.InputError, "tolerance: got -0.1"),
        (DATA, {"tolerance": float("nan")}, batchnorm.InputError, "tolerance: got nan"),
        (DATA, {"tolerance": "1"}, batchnorm.InputTypeError, "tolerance: got str"),
        (DATA, {"forward": 3}, batchnorm.InputTypeError, "forward: got int"),
        (DATA, {"group": 3}, batchnorm.InputTypeError, "group: got int"),
        (DATA, {"forward": lambda model, batch: None}, batchnorm.DataError, "no call of any batch norm"),
        ([torch.randn(4, 3, 3, 3)], {}, RuntimeError, "running_mean should contain"),
    ],
)
def test_refused_and_unchanged(data: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    model = net()
    before = state(model)
    with pytest.raises(error, match=text):
        batchnorm.recalibrate(model, data, **options)
    assert_same_state(model, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_models_that_it_is_not_for() -> None:
    frozen = nn.Sequential(nn.BatchNorm2d(2, momentum=0.0))
    for model, error, text in (
        (3, batchnorm.InputTypeError, "model: got int"),
        (nn.Linear(2, 2), batchnorm.ModelError, "got none, expected at least one"),
        (frozen, batchnorm.ModelError, "0: frozen: momentum is 0, expected at least one$"),
        (
            batchnorm.freeze(net()).model,
            batchnorm.ModelError,
            r"frozen by freeze.*batchnorm\.unfreeze\(model",
        ),
        (
            nn.Sequential(nn.LazyBatchNorm2d()),
            batchnorm.ModelError,
            "LazyBatchNorm2d that has not seen its shape",
        ),
        (torch.jit.script(nn.Sequential(nn.BatchNorm2d(2))), batchnorm.ModelError, "scripted"),
    ):
        with pytest.raises(error, match=text):
            batchnorm.recalibrate(model, DATA)


def test_a_loader_of_one_pass_serves_joint() -> None:
    model = net()
    assert batchnorm.recalibrate(model, (x for x in DATA)).samples == 4


def test_an_empty_batch_changes_nothing() -> None:
    first, second = net(), net()
    second.load_state_dict(first.state_dict())
    x = torch.randn(8, 2, 3, 3)
    batchnorm.recalibrate(first, [x])
    batchnorm.recalibrate(second, [x[:0], x])
    assert torch.equal(first[0].running_mean, second[0].running_mean)
    assert second[2].num_batches_tracked == 1
