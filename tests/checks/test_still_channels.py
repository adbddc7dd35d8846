"""BN108: channels that varied in training and do not in these batches."""

from typing import Any

import pytest
import torch
from rule_helpers import found, only
from torch import Tensor, nn

import batchnorm
from batchnorm.checks._state import layers_of_model
from batchnorm.checks.measures import without_start


def experienced(norm: Any) -> Any:
    norm.running_var.fill_(1)
    norm.num_batches_tracked.fill_(100)
    return norm


def test_a_column_that_never_changes_here() -> None:
    batches = [torch.randn(16, 5) for _ in range(4)]
    for batch in batches:
        batch[:, 3] = 0.7
    model = nn.Sequential(experienced(nn.BatchNorm1d(5)), nn.Linear(5, 2))
    finding = only(model, "BN108", batches=batches)
    assert (finding.severity, finding.module) == ("warning", "0")
    assert finding.message == "1 of 5 channels are constant in these batches (3)"
    # The same inside a network is common.
    inside = nn.Sequential(nn.Identity(), nn.Linear(5, 5), experienced(nn.BatchNorm1d(5)))
    with torch.no_grad():
        inside[1].weight[2] = 0
    finding = only(inside, "BN108", batches=batches)
    assert (finding.severity, finding.evidence["channels"]) == ("info", 1)


def test_a_column_that_is_the_same_in_all_of_a_batch() -> None:
    batches = [torch.randn(16, 20) for _ in range(6)]
    for number, batch in enumerate(batches):
        batch[:, 3] = float(number)
    finding = only(experienced(nn.BatchNorm1d(20)), "BN108", batches=batches)
    assert (finding.severity, finding.evidence["differ"]) == ("warning", 1)
    assert "constant within each batch, and differ between batches" in finding.message


def test_constant_channels_that_are_no_news() -> None:
    batches = [torch.randn(16, 5) for _ in range(4)]
    for batch in batches:
        batch[:, 3] = 0.7
    never_varied, unused = experienced(nn.BatchNorm1d(5)), experienced(nn.BatchNorm1d(5))
    never_varied.running_var[3] = 0
    with torch.no_grad():
        unused.weight[3] = 0
    for model in (never_varied, unused, batchnorm.freeze(experienced(nn.BatchNorm1d(5))).model):
        assert found(model, "BN108", batches=batches) == ()
    assert found(experienced(nn.BatchNorm1d(5)), "BN108", batches=[torch.randn(16, 5)] * 4) == ()
    small = [torch.randn(16, 5) * torch.tensor([1, 1, 1, 1e-3, 1]) for _ in range(4)]
    assert found(experienced(nn.BatchNorm1d(5)), "BN108", batches=small) == ()


# Rare values


def rows(count: int, share: float, value: float = 1.0) -> Tensor:
    """Four columns of numbers, and one that is 0 but for a share of the rows."""
    x = torch.randn(count, 5)
    x[:, 4] = value * (torch.rand(count) < share)
    return x


def seen(x: Tensor, momentum: float = 0.01) -> nn.Sequential:
    """A batch norm that has gone through all of it."""
    model = nn.Sequential(nn.BatchNorm1d(5, momentum=momentum), nn.Linear(5, 2))
    for batch in x.split(32):
        model(batch)
    return model


def of_none(x: Tensor) -> list[Tensor]:
    """Eight batches without the rare value."""
    return list(x[x[:, 4] == 0][:256].split(32))


def test_a_rare_value_is_missing_by_chance() -> None:
    x = rows(32_000, 0.004)
    finding = only(seen(x), "BN108", batches=of_none(x))
    assert (finding.severity, finding.message) == (
        "info",
        "1 of 5 channels are constant in these batches (4)",
    )
    assert "rare" in finding.cause
    # Not in 256 rows, if it is in one of twenty.
    x = rows(32_000, 0.05)
    finding = only(seen(x), "BN108", batches=of_none(x))
    assert (finding.severity, "rare" in finding.cause) == ("warning", False)


def test_a_constant_at_the_mean_is_no_rare_value() -> None:
    """It would be one as far away as one likes: what the other columns do not reach is not believed."""
    x = torch.randn(32_000, 5)
    batches = [x[:32].clone() for _ in range(4)]
    for batch in batches:
        batch[:, 1:4] = torch.randn(32, 3)
        batch[:, 4] = x[:, 4].mean()
    assert only(seen(x), "BN108", batches=batches).severity == "warning"
    # Columns of large numbers reach everything.
    far = rows(32_000, 0.004, 30.0)
    assert only(seen(far), "BN108", batches=of_none(far)).severity == "warning"
    far[:, 0] *= 20
    assert only(seen(far), "BN108", batches=of_none(far)).severity == "info"


def test_what_is_odd_is_told_apart_from_what_is_rare() -> None:
    x = rows(32_000, 0.004)
    model, batches = seen(x), of_none(x)
    for batch in batches:
        batch[:, 1] = 3.0
    finding = only(model, "BN108", batches=batches)
    assert (finding.severity, finding.message) == (
        "warning",
        "1 of 5 channels are constant in these batches (1)",
    )
    assert finding.evidence["channels"] == 1
    for batch in batches:  # nothing varies: no other column to compare with
        batch[:] = torch.tensor([0.0, 0, 0, 0, 0])
    assert "5 of 5 channels" in only(model, "BN108", batches=batches).message


@pytest.mark.parametrize("updates", [1, 20, 60, 100])
def test_the_start_of_the_running_variance_is_no_variation(updates: int) -> None:
    """After 100 updates 3e-5 of the 1 is left, more than eps; the column has been 0 all the time."""
    x = rows(32 * updates, 0.0)
    model = seen(x, 0.1)
    assert float(model[0].running_var[4]) > 1e-5
    assert found(model, "BN108", batches=[rows(32, 0.0) for _ in range(4)]) == ()


def test_running_statistics_without_their_start() -> None:
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(32 * 7, 4)
    norm = nn.BatchNorm1d(4, momentum=0.1).double()
    weights, mean, var = [], torch.zeros(4).double(), torch.zeros(4).double()
    for step, batch in enumerate(x.double().split(32)):
        norm(batch)
        weights.append(0.9 ** (6 - step))
        mean, var = mean + weights[-1] * batch.mean(0), var + weights[-1] * batch.var(0)
    (layer,) = layers_of_model(norm)
    cleared_mean, cleared_var, left = without_start(layer)
    torch.testing.assert_close(cleared_mean, mean / sum(weights))
    torch.testing.assert_close(cleared_var, var / sum(weights))
    assert left == pytest.approx(0.9**7)
    # A variance that the start is not in came from elsewhere.
    norm.running_var[2] = 0.1
    (layer,) = layers_of_model(norm)
    assert torch.equal(without_start(layer)[1], norm.running_var)
    assert without_start(layer)[2] == 0.0


def test_without_an_update_that_counts_nothing_is_divided_out() -> None:
    """A momentum of 0: numbers from elsewhere are what they are, and the start is nothing."""
    norm = nn.BatchNorm1d(4, momentum=0.0)
    norm.num_batches_tracked.fill_(100)
    (layer,) = layers_of_model(norm)
    assert [each.tolist() for each in without_start(layer)[:2]] == [[0.0] * 4, [0.0] * 4]
    batches = [torch.randn(32, 4) * 1.2 + 0.5 for _ in range(6)]
    for batch in batches:
        batch[:, 1] = 0.7
    assert found(norm, "BN108", batches=batches) == ()  # nothing says that it ever varied
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(1.5)
    (layer,) = layers_of_model(norm)
    cleared_mean, cleared_var, left = without_start(layer)
    assert torch.equal(cleared_mean, layer.mean)
    assert torch.equal(cleared_var, layer.var)
    assert left == 0.0
    assert only(norm, "BN108", batches=batches).evidence["channels"] == 1
    assert found(norm, "BN108", batches=[torch.randn(32, 4) for _ in range(6)]) == ()
