"""`batchnorm.testing.assert_healthy`."""

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.testing import assert_healthy


def net(momentum: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, momentum=momentum))
    with torch.no_grad():
        for _ in range(200):
            model(torch.randn(32, 6))
    return model


def test_a_healthy_model_passes_with_and_without_batches() -> None:
    assert_healthy(net())
    assert_healthy(net(), batches=[torch.randn(32, 6) for _ in range(3)])
    assert_healthy(net().state_dict())
    assert_healthy(nn.Linear(2, 2))


def test_the_text_holds_every_finding_with_its_fix() -> None:
    model = net(momentum=0.99)
    model[1].running_mean[3] = torch.nan  # type: ignore[index,operator]
    with pytest.raises(AssertionError) as caught:
        assert_healthy(model)
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 findings in 1 batch norm"
    assert lines[1].startswith("1: BN001 error: 1 of 8 channels")
    assert lines[3] == "  fix: batchnorm.recalibrate(model, loader)"
    assert lines[4].startswith("1: BN004 warning: momentum is 0.99")
    assert len(lines) == 7


def test_batches_are_run_and_the_model_is_as_it_was() -> None:
    model = net(momentum=0.0001)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [5 + torch.randn(32, 6) for _ in range(3)]
    assert_healthy(model)
    with pytest.raises(AssertionError, match="BN101 warning"):
        assert_healthy(model, batches=batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_healthy(model, batches=batches, ignore="BN101")
    assert_healthy(model, batches=batches, ignore=["BN1"])


def test_severity_decides() -> None:
    model = nn.Sequential(nn.Linear(6, 8), *net(momentum=0.99))
    with pytest.raises(AssertionError, match="BN004"):
        assert_healthy(model)
    assert_healthy(model, severity="error")
    with pytest.raises(AssertionError, match="BN012"):
        assert_healthy(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), severity="info")
    assert_healthy(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))


def test_options_reach_check() -> None:
    with pytest.raises(AssertionError, match="1 finding in"):
        assert_healthy(net(momentum=0.99), select=["BN004"])
    assert_healthy(net(momentum=0.99), select="BN001")
    model = net()
    decaying = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    assert_healthy(model, severity="info", select="BN001", optimizer=decaying)
    with pytest.raises(AssertionError, match="BN014"):
        assert_healthy(model, severity="info", optimizer=decaying)


def test_bad_arguments() -> None:
    with pytest.raises(
        batchnorm.InputError, match="severity: got 'never', expected one of error, warning, info"
    ):
        assert_healthy(net(), severity="never")  # type: ignore[arg-type]
    with pytest.raises(batchnorm.InputError, match="ignore: got 'X'"):
        assert_healthy(net(), ignore="X")
    with pytest.raises(TypeError, match="unexpected keyword"):
        assert_healthy(net(), loader=[])
