"""BN014 to BN017: the optimizer, the compiler, several processes, an average of the weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from rule_helpers import found, only, plain, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel

import batchnorm

# BN014


def test_weight_decay_on_all_parameters() -> None:
    model = plain(nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4))
    finding = only(model, "BN014", optimizer=torch.optim.SGD(model.parameters(), 0.1, weight_decay=5e-4))
    assert (finding.severity, finding.module, finding.also) == ("info", "1", ("4",))
    assert "0.0005 on γ and β" in finding.message
    groups = batchnorm.parameter_groups(model, 5e-4)  # what its fix says
    assert found(model, "BN014", optimizer=torch.optim.SGD(groups, 0.1)) == ()
    assert found(model, "BN014", optimizer=torch.optim.SGD(model.parameters(), 0.1)) == ()


def test_weight_decay_on_one_of_them() -> None:
    model = plain(nn.BatchNorm2d(4))
    groups = [
        {"params": [model[1].weight], "weight_decay": 0.1},
        {"params": [model[1].bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    assert only(model, "BN014", optimizer=optimizer).evidence == {"decay": {"γ": 0.1}}
    model[1].weight.requires_grad_(False)
    assert found(model, "BN014", optimizer=optimizer) == ()


# BN015


@pytest.mark.parametrize(("updates", "says"), [(1000, 1), (999, 0)])
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
def test_plain_average_over_a_long_training(cls: type[nn.Module], updates: int, says: int) -> None:
    model = trained(plain(cls(4, momentum=None)))
    model[1].num_batches_tracked.fill_(updates)
    findings = found(model, "BN015")
    assert len(findings) == says
    assert all(each.severity == "info" and "1,000 batches" in each.message for each in findings)
    model[1].momentum = 0.1
    assert found(model, "BN015") == ()


def compiled_whole(model: nn.Module) -> object:
    return torch.compile(model, backend="eager")


def compiled_inside(model: nn.Module) -> object:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiling", [compiled_whole, compiled_inside])
def test_plain_average_in_a_compiled_model(compiling: Callable[[nn.Module], object]) -> None:
    model = compiling(plain(nn.BatchNorm2d(4, momentum=None), batchnorm.BatchNorm2d(4, momentum=None)))
    finding = only(model, "BN015")
    assert (finding.severity, finding.module, finding.also) == ("info", "1", ())
    assert found(compiling(plain(nn.BatchNorm2d(4))), "BN015") == ()
    assert found(plain(nn.BatchNorm2d(4, momentum=None)), "BN015") == ()  # not compiled


def test_what_compiles_and_what_does_not() -> None:
    x = torch.randn(2, 4, 3, 3)
    ours = torch.compile(batchnorm.BatchNorm2d(4, momentum=None), backend="eager", fullgraph=True)
    assert ours(x).shape == x.shape
    theirs = torch.compile(nn.BatchNorm2d(4, momentum=None), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="data-dependent"):
        theirs(x)


# BN016


def batches(samples: int, count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(samples, 4, 6, 6) for _ in range(count)]


@pytest.mark.parametrize(("samples", "processes", "fix"), [(8, 4, "sync"), (15, 2, "sync"), (2, 4, "renorm")])
def test_few_samples_in_every_process(samples: int, processes: int, fix: str) -> None:
    model = plain(nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4))
    finding = only(model, "BN016", batches=batches(samples), world_size=processes)
    assert (finding.severity, finding.module, finding.also) == ("warning", "1", ("4",))
    together = samples * processes
    assert finding.evidence == {
        "samples": samples,
        "world_size": processes,
        "together": together,
        "to": fix,
    }
    assert f"{samples} samples of its own" in finding.message
    assert f"{samples * processes} together" in finding.message
    assert fix in finding.fix


def test_enough_samples_or_one_process() -> None:
    model = plain(nn.BatchNorm2d(4))
    assert found(model, "BN016", batches=batches(16), world_size=8) == ()
    # The last batch is smaller, which says nothing of the others.
    assert found(model, "BN016", batches=[*batches(16), *batches(2, 1)], world_size=8) == ()
    findings = batchnorm.check(model, select="BN016", batches=batches(4))
    assert (findings.ran, list(findings.not_run)) == ((), ["BN016"])


def test_layers_that_do_not_normalize_by_few_samples() -> None:
    small = batches(4)
    frozen = batchnorm.freeze(trained(plain(nn.BatchNorm2d(4)))).model
    assert found(frozen, "BN016", batches=small, world_size=4) == ()
    for norm in (batchnorm.GhostBatchNorm(4, ghost_size=2), batchnorm.BatchRenorm(4)):
        assert found(plain(norm), "BN016", batches=small, world_size=4) == ()

    class Synchronized(nn.BatchNorm2d):  # PyTorch's own runs in a process group only
        pass

    Synchronized.__name__ = "NaiveSyncBatchNorm"
    assert found(plain(Synchronized(4)), "BN016", batches=small, world_size=4) == ()


# BN017


def moved_on(model: nn.Module, updates: int = 100, shift: float = 0.0, scale: float = 1.0) -> nn.Module:
    """The model later: its statistics have moved by this much."""
    later = copy.deepcopy(model)
    for module in later.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += shift * module.running_var.sqrt()
            module.running_var *= scale**2
            module.num_batches_tracked += updates
    return later


def test_average_over_parameters_alone_from_the_start() -> None:
    average = plain(nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4))
    model = trained(copy.deepcopy(average))
    finding = only(model, "BN017", averaged=average)
    assert (finding.severity, finding.module, finding.also) == ("warning", "1", ("4",))
    assert "still 0 and 1" in finding.message
    assert found(average, "BN017", averaged=copy.deepcopy(average)) == ()  # both are fresh


@pytest.mark.parametrize(
    ("shift", "scale", "severity"),
    [
        (0.3, 1.0, "warning"),
        (0.2, 1.0, "info"),
        (0.0, 1.6, "warning"),
        (0.0, 1.2, "info"),
        (0.0, 0.6, "warning"),
        (0.05, 1.05, None),
    ],
)
def test_statistics_of_another_time(shift: float, scale: float, severity: str | None) -> None:
    average = trained(plain(nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4)))
    model = moved_on(average, shift=shift, scale=scale)
    findings = found(model, "BN017", averaged=average)
    assert [each.severity for each in findings] == ([severity] if severity else [])
    assert all("100 updates behind" in each.message for each in findings)
    wrapped = AveragedModel(average)  # which holds a copy of it
    assert [each.message for each in found(model, "BN017", averaged=wrapped)] == [
        each.message for each in findings
    ]


def test_one_dead_channel_says_nothing() -> None:
    average = trained(plain(nn.BatchNorm2d(4)))
    average[1].running_var[0] = 0
    model = moved_on(average)
    model[1].running_mean[0] += 1.0  # 316 √eps
    assert found(model, "BN017", averaged=average) == ()


def test_averages_that_are_kept_properly() -> None:
    model = trained(plain(nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4)))
    averages = [batchnorm.averaged(model, decay=0.9), batchnorm.averaged(model), AveragedModel(model)]
    for step in range(4):
        model = moved_on(model, shift=0.1 * step)
        for average in averages:
            average.update_parameters(model)
    for average in averages:
        assert found(model, "BN017", averaged=average) == ()
    # Set from data: far behind by its counter, and near.
    loader = [torch.randn(64, 4, 6, 6) for _ in range(2)]
    batchnorm.recalibrate(model, loader)
    for norm in (model[1], model[4]):
        norm.num_batches_tracked.fill_(10_000)
    average = batchnorm.averaged(model)
    average.update_parameters(model)
    batchnorm.recalibrate(average, loader)
    assert found(model, "BN017", averaged=average) == ()
