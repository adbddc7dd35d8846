"""BN103: batches with too few values per channel, or too few samples."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from rule_helpers import found, only
from run_helpers import call_of, digits, digits_net, made_up
from torch import nn

import batchnorm
from batchnorm.checks.measures import usual_error
from batchnorm.checks.rule import rule_named


def test_the_standard_error_of_small_batches() -> None:
    net = digits_net()
    x, _ = digits()
    finding = only(net, "BN103", batches=list(x[:32].split(4)))
    assert (finding.severity, finding.module, finding.also) == ("warning", "8", ())
    assert finding.evidence["values"] == 4
    assert finding.evidence["standard_error"] == pytest.approx(1 / 4**0.5)
    eight = only(net, "BN103", batches=list(x[:64].split(8)))
    assert (eight.severity, eight.module) == ("info", "8")
    assert found(net, "BN103", batches=list(x[:128].split(16))) == ()


def test_positions_of_one_sample_do_not_make_up_for_samples() -> None:
    """A thousand positions that are all alike: two values."""
    model = nn.BatchNorm2d(4)
    alike = [torch.randn(2, 4, 1, 1) + 0.05 * torch.randn(2, 4, 32, 32) for _ in range(4)]
    finding = only(model, "BN103", batches=alike)
    assert (finding.severity, finding.evidence["values"]) == ("warning", 2048)
    assert found(model, "BN103", batches=[torch.randn(3, 4, 32, 32)]) == ()


def test_several_processes_and_layers_that_bear_few_values() -> None:
    x = [torch.randn(4, 3) for _ in range(4)]
    evidence = made_up([call_of(batch[:, :, None], index) for index, batch in enumerate(x)])
    rule = rule_named("BN103")
    assert [each.severity for each in rule.find(evidence)] == ["warning"]
    for layer, processes, expected in (
        ({"synchronized": True}, 8, []),
        ({"synchronized": True}, 2, ["info"]),
        ({"synchronized": False}, 8, ["warning"]),
        ({"kind": "BatchRenorm"}, 1, []),
    ):
        assert [each.severity for each in rule.find(changed(evidence, layer, processes))] == expected
    assert not list(rule.find(made_up(evidence.seen["norm"].train, training=False)))


def changed(evidence: Any, layer: dict[str, Any], processes: int) -> Any:
    return replace(evidence, layers=(replace(evidence.layers[0], **layer),), world_size=processes)


def test_two_samples_are_too_few_however_sure_their_mean_is() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    finding = only(model, "BN103", batches=[torch.randn(2, 1, 32, 32) for _ in range(4)])
    assert (finding.severity, finding.module, finding.also) == ("warning", "1", ("4",))
    assert finding.message.startswith("2 samples in a batch: ")
    assert finding.evidence["standard_error"] < 0.1
    assert "half of its own mean and variance" in finding.cause
    for samples in (1, 3):  # of batches of one nothing is said
        assert found(model, "BN103", batches=[torch.randn(samples, 1, 32, 32) for _ in range(4)]) == ()
    # The usual batch counts.
    last = [*[torch.randn(6, 1, 32, 32) for _ in range(3)], torch.randn(2, 1, 32, 32)]
    assert found(model, "BN103", batches=last) == ()


def test_a_short_last_batch_does_not_set_the_error() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    for sizes in ((64, 64, 2), (64, 2), (2, 64, 64)):
        assert found(model, "BN103", batches=[torch.randn(size, 4) for size in sizes]) == ()
    # The error is that of the batch whose count is told.
    finding = only(model, "BN103", batches=[torch.randn(size, 4) for size in (8, 8, 8, 3)])
    assert (finding.severity, finding.evidence["values"]) == ("info", 8)
    assert finding.evidence["standard_error"] == pytest.approx(1 / 8**0.5)
    finding = only(model, "BN103", batches=[torch.randn(size, 4) for size in (2, 64, 2)])
    assert (finding.severity, finding.evidence["values"]) == ("warning", 2)
    assert finding.evidence["standard_error"] == pytest.approx(1 / 2**0.5)


def test_the_error_of_the_usual_batch_by_hand() -> None:
    """Drawn from a known distribution: samples that differ by 1 σ, and positions by another."""
    sizes = (16, 16, 16, 4, 1)
    calls = [
        call_of(torch.randn(size, 200, 1) + torch.randn(size, 200, 50), index)
        for index, size in enumerate(sizes)
    ]
    # A sample's mean has the variance 1 + 1 / 50, a value 2.
    expected = ((1 + 1 / 50) / 16 / 2) ** 0.5
    assert float(usual_error(calls).median()) == pytest.approx(expected, rel=0.05)
    assert float(usual_error(calls, 4).median()) == pytest.approx(expected / 2, rel=0.05)
    assert usual_error(calls[-1:]).isnan().all()


def test_two_samples_of_every_process_are_two_or_many() -> None:
    evidence = made_up([call_of(torch.randn(2, 3, 400), batch) for batch in range(4)])
    rule = rule_named("BN103")
    for layer, processes, expected in (
        ({}, 1, ["warning"]),
        ({}, 8, ["warning"]),
        ({"synchronized": True}, 2, []),
        ({"kind": "BatchRenorm"}, 1, []),
    ):
        assert [each.severity for each in rule.find(changed(evidence, layer, processes))] == expected


@pytest.mark.slow
def test_two_volumes_together_lose_what_sixteen_learn() -> None:
    """What the rule's page says of volumes: the same steps, normalized by twos and by all sixteen."""
    x, y = digits()
    volumes = x[:, :, None] * torch.linspace(1, 0.2, 8).view(1, 1, 8, 1, 1)
    score = {size: trained_on(volumes, y, size) for size in (2, 16)}
    assert score[16] > 0.8
    assert score[2] < score[16] - 0.06


def trained_on(x: torch.Tensor, y: torch.Tensor, size: int) -> float:
    torch.manual_seed(0)
    norm = functools.partial(batchnorm.GhostBatchNorm, ghost_size=size)
    first, second = nn.Conv3d(1, 8, 3, padding=1, bias=False), nn.Conv3d(8, 16, 3, 2, 1, bias=False)
    pool = nn.AdaptiveAvgPool3d(1)
    net = nn.Sequential(
        first, norm(8), nn.ReLU(), second, norm(16), nn.ReLU(), pool, nn.Flatten(), nn.Linear(16, 10)
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    for _ in range(250):
        rows = torch.randint(1000, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((net.eval()(x[1000:]).argmax(1) == y[1000:]).float().mean())
