"""What `watch` has told, over a whole training: once each, again when it is worse, and mended by `findings.fix()`."""

import torch
from torch import nn
from watch_helpers import conv_net, pictures, told, train

import batchnorm

BATCHES = [pictures(seed=seed) for seed in range(8)]


def rows(count: int, steps: int = 3) -> torch.Tensor:
    return torch.randn(steps, count, 4, generator=torch.Generator().manual_seed(0))


def test_a_finding_that_becomes_worse_is_told_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    # Batches of 12 rows, of 4, of 12 and of 4: what has been told as bad is not told again.
    found = told(model, [*rows(12), *rows(4, 9), *rows(12, 9), *rows(4, 9)], select="BN103")
    assert [each.severity for each in found] == ["info", "warning"]


def test_one_bad_look_does_not_make_it_worse() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    found: list[batchnorm.Finding] = []
    with batchnorm.watch(model, every=1, table=False, select="BN103", on_finding=found.append) as watcher:
        train(model, [*rows(12), *rows(4, 1)])
    assert [each.severity for each in (*found, *watcher.findings)] == ["info", "info"]


def test_findings_that_become_one_are_there_once() -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(3)), nn.Linear(4, 2))
    found: list[batchnorm.Finding] = []
    with batchnorm.watch(model, every=1, table=False, select="BN004", on_finding=found.append) as watcher:
        for momenta in ((0.99, 0.1, 0.1), (0.99, 0.9, 0.1), (0.99, 0.99, 0.99), (0.99, 0.99, 0.9)):
            for layer, momentum in zip(model, momenta, strict=False):
                layer.momentum = momentum
            train(model, rows(16, 1))
            if momenta[2] == 0.99:
                (each,) = watcher.findings
                assert (each.module, each.also) == ("0", ("1", "2"))
    # The third layer's was in the finding of all three.
    assert [each.module for each in found] == ["0", "1"]
    assert [(each.module, each.also) for each in watcher.findings] == [("0", ("1",)), ("2", ())]


def test_findings_are_mended() -> None:
    model = conv_net(momentum=0.99)
    with batchnorm.watch(model, every=1, table=False, on_finding=lambda finding: None) as watcher:
        assert not watcher.findings.fix().changed
        train(model, BATCHES[:2])
        (finding,) = watcher.findings
        assert (finding.code, finding.mendable) == ("BN004", True)
        changes = watcher.findings.fix()
        assert [each.name for each in changes.changed] == ["1", "4"]
        assert (changes.model[1].momentum, model[1].momentum) == (0.01, 0.99)
        watcher.findings.fix(inplace=True)
        assert model[4].momentum == 0.01
        train(model, BATCHES[2:6])
    (gone,) = watcher.findings
    assert not gone.mendable
    model[1].momentum = 0.2
    assert not watcher.findings.fix(inplace=True).changed
    assert model[1].momentum == 0.2


def test_a_layer_that_is_gone_is_not_mended() -> None:
    model = conv_net(momentum=0.99)
    with batchnorm.watch(model, every=1, table=False, on_finding=lambda finding: None) as watcher:
        train(model, BATCHES[:2])
    model[1] = nn.Identity()
    assert not watcher.findings[0].mendable
    assert [each.name for each in watcher.findings.fix().changed] == ["4"]
