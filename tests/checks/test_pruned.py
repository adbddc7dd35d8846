"""BN101 and weights that are exactly 0, and the graph of models whose weights a hook computes."""

import copy
import warnings

import pytest
import torch
from rule_helpers import found, only
from run_helpers import digits, digits_net, fit, shuffled
from stats_helpers import assert_same_state, state
from torch import Tensor, nn
from torch.nn.utils import prune

import batchnorm
from batchnorm.checks._graph import neighbours
from batchnorm.checks._state import norms_of


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, list[Tensor]]:
    x, y = digits()
    order = shuffled(len(x))
    return fit(digits_net(), x, y, order), [x[rows] for rows in order[:8]]


def pruned(net: nn.Module, *names: str, amount: float = 0.8) -> nn.Module:
    """A copy without the smallest weights of these layers."""
    model = copy.deepcopy(net)
    for name in names:
        prune.l1_unstructured(model.get_submodule(name), "weight", amount)
        prune.remove(model.get_submodule(name), "weight")
    return model


def test_pruned_weights_are_named(net: tuple[nn.Module, list[Tensor]]) -> None:
    model = pruned(net[0], "3")
    finding = only(model, "BN101", batches=net[1])
    assert (finding.severity, finding.module) == ("warning", "4")
    assert (
        finding.cause
        == "80 % of the weights before it are exactly 0: they were pruned after the statistics were made"
    )
    batchnorm.recalibrate(model, [digits()[0][rows] for rows in shuffled(1347)])  # what its fix says
    assert found(model, "BN101", batches=net[1]) == ()


def test_pruned_weights_before_another_layer(net: tuple[nn.Module, list[Tensor]]) -> None:
    """What stands behind them has other inputs, though its own weights are whole."""
    model = pruned(net[0], "3", amount=0.45)
    with torch.no_grad():
        model[7].weight.mul_(1.9)
    finding = only(model, "BN101", batches=net[1])
    assert (finding.severity, finding.module) == ("warning", "8")
    assert finding.cause.startswith("45 % of the weights before 4 are exactly 0")


def test_few_zeros_are_no_pruning(net: tuple[nn.Module, list[Tensor]]) -> None:
    model = pruned(net[0], "3", amount=0.25)
    with torch.no_grad():
        model[3].weight.mul_(0.6)
    finding = only(model, "BN101", batches=net[1])
    assert (finding.severity, "exactly 0" in finding.cause) == ("info", False)


def test_a_pruned_network_on_samples_of_another_kind(net: tuple[nn.Module, list[Tensor]]) -> None:
    """Its statistics are right, and the first batch norm says that it is the samples, or there is none before."""
    for names in (("3",), ("0", "3")):
        model = pruned(net[0], *names)
        batchnorm.recalibrate(model, [digits()[0][rows] for rows in shuffled(1347)])
        for _, norm in norms_of(model):
            norm.num_batches_tracked.fill_(500)
        finding = only(model, "BN101", batches=[3 * batch + 2 for batch in net[1]])
        assert finding.severity == "info"
        assert "of another kind" in finding.cause


def test_zeros_before_the_first_batch_norm_are_only_mentioned(net: tuple[nn.Module, list[Tensor]]) -> None:
    finding = only(pruned(net[0], "0", "3", "7"), "BN101", batches=net[1])
    assert (finding.severity, finding.module) == ("info", "8")
    assert "(80 % of the weights before it are exactly 0)" in finding.cause


def test_sparse_weights_that_are_still_being_trained_are_no_pruning() -> None:
    """Masked from the start, and after 43 updates: the statistics lag behind, as they do at first."""
    x, y = digits()
    order = shuffled(len(x))
    model = digits_net()
    prune.random_unstructured(model[3], "weight", 0.6)
    fit(model, x, y, order, epochs=1)
    with torch.no_grad():
        model[3].weight_orig.mul_(2.5)
    finding = only(model, "BN101", batches=[x[rows] for rows in order[:8]])
    assert (finding.severity, "still move faster" in finding.cause) == ("info", True)


# The graph


def zeros(model: nn.Module) -> dict[str, float]:
    around, _ = neighbours(model, norms_of(model))
    return {name: each.zeros for name, each in around.items()}


def test_zeros_are_those_of_the_layer_straight_before() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 8, False),
    ).append(nn.BatchNorm1d(8))
    with torch.no_grad():
        model[0].weight[:, 0] = 0
        model[3].weight[:] = 0  # of a batch norm: no pruning
        model[5].weight[0, 0] = 0
    assert zeros(model) == {"1": pytest.approx(1 / 3), "3": 0.0, "6": 1 / 32}
    assert zeros(nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4))) == {"1": 0.0}


@pytest.mark.parametrize("kind", ["prune", "weight_norm", "spectral_norm"])
def test_weights_that_a_hook_computes(kind: str) -> None:
    """After a forward they hang on its graph, and such a tensor cannot be copied."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    if kind == "prune":
        prune.l1_unstructured(model[3], "weight", 0.5)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's: there is a newer way
            getattr(nn.utils, kind)(model[3])
    model(torch.randn(2, 3, 4, 4))
    assert not model[3].weight.is_leaf
    weight, before = model[3].weight, state(model)
    assert zeros(model) == {"1": 0.0, "4": 0.5 if kind == "prune" else 0.0}
    assert model[3].weight is weight
    assert_same_state(model, before)
    findings = batchnorm.check(model, select=["BN012", "BN018"])
    assert findings.ran == ("BN012", "BN018")
    assert findings.notes == ()
