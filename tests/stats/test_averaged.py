"""`averaged`: weights as PyTorch averages them, statistics by the same rule, integers copied."""

import pytest
import torch
from helpers import same_bits
from stats_helpers import Branches, norms
from torch import nn

import batchnorm


def changed(model: nn.Module, step: int) -> None:
    """New weights, statistics and counters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    for layer in norms(model).values():
        layer.running_mean.copy_(torch.randn(layer.num_features))
        layer.running_var.copy_(torch.rand(layer.num_features) + 0.1)
        layer.num_batches_tracked.fill_(10 * step)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_every_entry_is_averaged_by_the_rule(decay: float | None) -> None:
    model = Branches().train()
    model.register_buffer("table", torch.zeros(2))
    average = batchnorm.averaged(model, decay=decay)
    history = []
    for step in range(1, 5):
        changed(model, step)
        model.table.fill_(step)
        history.append({name: value.clone() for name, value in model.state_dict().items()})
        average.update_parameters(model)
    weights = [0.25] * 4 if decay is None else [0.729, 0.081, 0.09, 0.1]
    for name, value in average.module.state_dict().items():
        if "tracked" in name or name == "table":
            assert same_bits(value, history[-1][name]), name
            continue
        expected = sum(w * old[name].double() for w, old in zip(weights, history, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
    assert average.n_averaged == 4


def test_it_neither_trains_nor_follows_the_model() -> None:
    model = Branches().train()
    average = batchnorm.averaged(model)
    assert not any(module.training for module in average.modules())
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    before = {name: value.clone() for name, value in average.state_dict().items()}
    average(torch.randn(4, 2, 6, 6))
    changed(model, 1)
    for name, value in average.state_dict().items():
        assert same_bits(value, before[name]), name


def test_the_mean_of_a_layer_behind_a_linear_one_is_exact() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average, x = batchnorm.averaged(model), torch.randn(64, 3) + 1
    for _ in range(3):
        changed(model, 1)
        batchnorm.recalibrate(model, [x])
        average.update_parameters(model)
    linear = average.module[0](x).double()
    layer = average.module[1]
    torch.testing.assert_close(layer.running_mean.double(), linear.mean(0), rtol=1e-5, atol=1e-5)
    assert (layer.running_var.double() >= linear.var(0) - 1e-6).all()
    batchnorm.recalibrate(average, [x])
    torch.testing.assert_close(layer.running_var.double(), linear.var(0), rtol=1e-5, atol=1e-6)


def test_a_state_dict_comes_back() -> None:
    model = Branches()
    first, second = batchnorm.averaged(model, decay=0.5), batchnorm.averaged(model, decay=0.5)
    for step in range(2):
        changed(model, step)
        first.update_parameters(model)
    second.load_state_dict(first.state_dict())
    changed(model, 3)
    first.update_parameters(nn.DataParallel(model))
    second.update_parameters(model)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert same_bits(one, other)


def test_refused() -> None:
    model = Branches()
    for decay, error in (
        (0.0, batchnorm.InputError),
        (1.0, batchnorm.InputError),
        ("1", batchnorm.InputTypeError),
    ):
        with pytest.raises(error, match="decay: got"):
            batchnorm.averaged(model, decay=decay)
    with pytest.raises(batchnorm.InputTypeError, match="averaged: model: got int"):
        batchnorm.averaged(3)
    average = batchnorm.averaged(model)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    with pytest.raises(batchnorm.ModelError, match=r"differs in head\.weight"):
        average.update_parameters(Branches(width=7))
    for name, value in average.state_dict().items():
        assert same_bits(value, before[name]), name
