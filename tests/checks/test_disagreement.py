"""BN101, BN102 and BN107: statistics that do not fit the batches."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_packages import folder
from rule_helpers import found, only
from run_helpers import call_of, digits, digits_net, fit, made_up, shuffled
from torch import Tensor, nn

import batchnorm
from batchnorm.checks.measures import scatter
from batchnorm.checks.rule import rule_named

# BN101


def trained(momentum: float | None = 0.1, size: int = 32, epochs: int = 3) -> tuple[nn.Module, list[Tensor]]:
    x, y = digits()
    order = shuffled(len(x), size)
    return fit(digits_net(momentum), x, y, order, epochs), [x[rows] for rows in order[:8]]


@pytest.mark.parametrize("momentum", [0.1, 0.03, None])
def test_a_trained_network_agrees_with_itself(momentum: float | None) -> None:
    model, batches = trained(momentum)
    assert found(model, "BN101", batches=batches) == ()


def test_a_fresh_network_has_nothing_to_disagree() -> None:
    x, _ = digits()
    assert found(digits_net(), "BN101", batches=list(x[:256].split(32))) == ()


def test_too_few_updates_for_the_momentum() -> None:
    model, batches = trained(0.003)
    finding = only(model, "BN101", batches=batches)
    assert finding.severity == "warning"
    assert "too few updates: after 129 with momentum 0.003, 68 % of" in finding.cause
    assert finding.fix == "batchnorm.recalibrate(model, loader)"
    assert finding.evidence["gap"] > 0.3
    mended = batchnorm.recalibrate(model, [digits()[0][rows] for rows in shuffled(1347)])
    assert mended.samples == 1347
    assert found(model, "BN101", batches=batches) == ()


def test_a_network_of_three_updates_has_not_been_trained() -> None:
    x, y = digits()
    model = fit(digits_net(), x, y, shuffled(len(x))[:3], epochs=1)
    finding = only(model, "BN101", batches=list(x[:256].split(32)))
    assert (finding.severity, "too few updates: after 3" in finding.cause) == ("info", True)


def test_a_counter_that_was_set_back_does_not_make_the_updates_few() -> None:
    """Statistics from elsewhere: what is left of the start's 1 would be in every variance."""
    model, batches = trained()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.num_batches_tracked.fill_(6)
            layer.running_var.mul_(0.1)
    finding = only(model, "BN101", batches=batches)
    assert "updates" not in finding.cause
    assert finding.severity == "info"


def test_statistics_that_the_start_is_not_in_do_not_come_from_few_updates() -> None:
    """A mean of 50 after one update of 0.1 would need data around 500."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    with torch.no_grad():
        for _ in range(100):
            model(torch.randn(64, 4) * 10 + 50)
    model[0].num_batches_tracked.zero_()
    with torch.no_grad():
        model(torch.randn(64, 4) * 10 + 50)
    finding = only(model, "BN101", batches=[torch.randn(64, 4) * 10 + 70 for _ in range(6)])
    assert (finding.severity, "samples are of another kind" in finding.cause) == ("info", True)
    # The same data after the only update that there was.
    model[0].reset_running_stats()
    with torch.no_grad():
        model(torch.randn(64, 4) * 10 + 70)
    finding = only(model, "BN101", batches=[torch.randn(64, 4) * 10 + 70 for _ in range(6)])
    assert "too few updates: after 1 with momentum 0.1, 90 % of" in finding.cause


def test_a_momentum_of_zero_keeps_the_start() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.0), nn.Linear(4, 3))
    batches = [torch.randn(64, 4) * 10 + 70 for _ in range(6)]
    for batch in batches:
        model(batch)
    assert "100 % of the running statistics are still" in only(model, "BN101", batches=batches).cause
    model[0].running_mean.fill_(50)
    model[0].running_var.fill_(100)
    assert "still their start" not in only(model, "BN101", batches=batches).cause


def test_a_short_last_batch_is_not_why_they_disagree() -> None:
    model, _ = trained()
    x = digits()[0] + 0.5
    finding = only(model, "BN101", batches=[x[:64], x[64:128], x[128:130]])
    assert "BN103" not in finding.cause


def test_the_other_frameworks_momentum() -> None:
    """The last batches were other ones: what a training that ends on the last file leaves."""
    model, batches = trained(0.9)
    x, _ = digits()
    with torch.no_grad():
        model(0.3 * x[:16])
    finding = only(model, "BN101", batches=batches)
    assert "momentum 0.9: the running statistics are those of the last batches" in finding.cause
    assert finding.fix.startswith("layer.momentum = 0.1, then batchnorm.recalibrate")


def test_weights_that_have_moved_since() -> None:
    model, batches = trained()
    with torch.no_grad():
        model[3].weight.mul_(3)
    finding = only(model, "BN101", batches=batches)
    assert (finding.severity, finding.module) == ("warning", "4")
    assert "the weights before it have changed" in finding.cause
    assert 7 < finding.evidence["factor"] < 11


def test_outputs_that_overflow_in_eval_mode_are_as_far_apart_as_can_be() -> None:
    """Each layer multiplies by what its running variance lacks."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, momentum=1e-12), nn.ReLU()]
        nn.init.constant_(layers[-3].weight, 1e9)  # type: ignore[arg-type]
    model, batches = nn.Sequential(*layers), [torch.rand(16, 8) for _ in range(4)]
    for batch in batches * 2:
        model(batch)
    with torch.no_grad():
        assert not model.eval()(batches[0]).isfinite().any()
        assert model.train()(batches[0]).isfinite().all()
    finding = only(model, "BN101", batches=batches)
    assert (finding.severity, finding.evidence["gap"]) == ("warning", float("inf"))
    assert "outputs are NaN, infinite or all the same in eval mode" in finding.message
    assert "too few updates" in finding.cause


def test_the_worst_layer_is_the_worst_in_mean_or_variance() -> None:
    """A variance that is off ninefold is worse than a mean that is off by 0.4 σ."""
    model, batches = trained()
    with torch.no_grad():
        model[4].running_var.div_(9)
        model[8].running_mean.add_(0.4 * model[8].running_var.sqrt())
    finding = only(model, "BN101", batches=batches)
    assert (finding.severity, finding.module, finding.also) == ("warning", "4", ("8",))
    assert 7 < finding.evidence["factor"] < 11


def test_other_samples_than_in_training_are_no_fault() -> None:
    model, batches = trained()
    finding = only(model, "BN101", batches=[3 * batch + 2 for batch in batches])
    assert (finding.severity, finding.module) == ("info", "1")
    assert "of another kind" in finding.cause
    assert "batchnorm.adapt" in finding.fix


def test_layers_that_do_not_normalize_by_the_batch_are_left_out() -> None:
    model, batches = trained(0.003)
    assert found(batchnorm.freeze(model).model, "BN101", batches=batches) == ()
    untracked = copy.deepcopy(model)
    for layer in untracked.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean = layer.running_var = None
            layer.track_running_stats = False
    assert found(untracked, "BN101", batches=batches) == ()


def test_the_momentum_is_too_small_where_the_weights_go_on_moving() -> None:
    """The start is gone, and what is averaged are weights that are gone, too."""
    x, y = digits()
    order = shuffled(len(x))
    model = digits_net(0.03)
    for scale in (4.0, 1.0):
        with torch.no_grad():
            model[3].weight.mul_(scale)
        fit(model, x, y, order, epochs=2)
    with torch.no_grad():
        model[3].weight.mul_(3)
    finding = only(model, "BN101", batches=[x[rows] for rows in order[:8]])
    assert "momentum 0.03 is small for 172 updates" in finding.cause


# BN102


class Stubborn(nn.Module):
    """A train() that keeps the batch norm in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def train(self, mode: bool = True) -> "Stubborn":
        super().train(mode)
        self.part[1].training = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) - x.mean(0)


def test_a_layer_that_stays_in_training_mode() -> None:
    finding = only(Stubborn(), "BN102", batches=[torch.randn(8, 3)])
    assert (finding.severity, finding.module) == ("error", "part.1")
    assert "although the model is in eval mode" in finding.cause
    assert finding.evidence["moved"] > 0.01


def test_layers_without_running_statistics() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), batchnorm.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4)
    )
    finding = only(model, "BN102", batches=[torch.randn(8, 3)])
    assert (finding.module, finding.also, finding.severity) == ("1", (), "error")
    assert "no running statistics" in finding.cause


def test_something_else_that_mixes_samples_may_be_meant() -> None:
    finding = only(Mixed(), "BN102", batches=[torch.randn(8, 3)])
    assert (finding.severity, finding.module) == ("info", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rounding_is_no_dependence(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5)).to(dtype)
    for size in (4, 7, 64):
        assert found(model, "BN102", batches=[torch.randn(size, 16, dtype=dtype)]) == ()
    # Too few samples to replace some.
    assert found(Stubborn(), "BN102", batches=[torch.randn(3, 3)]) == ()


# BN107


def by_class() -> tuple[nn.Module, list[Tensor]]:
    x, y = digits()
    order = list((y + 0.5 * torch.rand(len(y))).argsort().split(32))
    order = [order[index] for index in torch.randperm(len(order))]
    return fit(digits_net(), x, y, order), [x[rows] for rows in order[:8]]


def test_batches_sorted_by_class() -> None:
    model, batches = by_class()
    finding = only(model, "BN107", batches=batches)
    assert (finding.severity, finding.module) == ("warning", "8")
    assert finding.evidence["ratio"] > 4
    assert finding.evidence["sigma"] > 0.5
    assert "shuffle=True" in finding.fix
    # Three batches say nothing, and neither do the same samples shuffled.
    assert found(model, "BN107", batches=batches[:3]) == ()
    together = torch.cat(batches)
    mixed = [together[rows] for rows in shuffled(len(together))]
    assert found(model, "BN107", batches=mixed) == ()
    # BN101 names it as the cause.
    assert "BN107" in only(model, "BN101", batches=batches).cause


def test_a_random_walk_in_batches_of_its_own_order() -> None:
    walk = torch.randn(256, 6).cumsum(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert only(model, "BN107", batches=list(walk.split(32))).module == "0"
    assert found(model, "BN107", batches=[walk[rows] for rows in shuffled(256)]) == ()


def test_a_difference_that_is_sure_and_small() -> None:
    """Large batches show a tenth of a σ, which does no harm."""
    calls = [call_of(torch.randn(2000, 8, 1) + 0.1 * torch.randn(1, 8, 1), batch) for batch in range(8)]
    evidence = made_up(calls)
    measured = scatter(evidence.seen["norm"], evidence.run)
    assert measured is not None
    assert measured.sure
    assert measured.excess < 0.25
    assert list(rule_named("BN107").find(evidence)) == []


def test_frames_that_lie_in_the_samples_axis_say_nothing_of_the_batches() -> None:
    """Frames of a clip are alike: their batch norm has more rows than the batch has samples."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.flatten(0, 1)).view_as(x).mean(1)

    clips = [torch.randn(4, 1, 3) + 0.1 * torch.randn(4, 16, 3) for _ in range(8)]
    assert found(Frames(), "BN107", batches=clips) == ()


def random_calls(seed: int) -> list[Any]:
    """Batches of independent samples, of different sizes and distributions, with channels that depend on each other."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    batches, size, positions = pick(4, 6, 8, 8, 8, 16), pick(2, 4, 8, 16, 32, 64), pick(1, 1, 4, 16)
    channels, kind = pick(1, 2, 8, 16, 32), pick(0, 1, 2, 3)
    mix = torch.randn(3, channels, generator=generator)
    calls = []
    for batch in range(batches):
        noise = torch.randn(size, channels, positions, generator=generator)
        few = (torch.randn(size, 3, generator=generator) @ mix)[:, :, None]
        x = (noise, (2 * noise).exp(), (noise.mean(2, keepdim=True) - 1).relu() * noise, few + 0.1 * noise)[
            kind
        ]
        calls.append(call_of(x, batch))
    return calls


def test_no_false_alarm_in_a_thousand_shuffled_runs() -> None:
    rule, largest = rule_named("BN107"), 0.0
    for seed in range(1000):
        evidence = made_up(random_calls(seed))
        assert list(rule.find(evidence)) == [], seed
        measured = scatter(evidence.seen["norm"], evidence.run)
        largest = max(largest, measured.certainty if measured is not None else 0.0)
    # The bound is 5; that some runs come near half of it shows that something is measured.
    assert 2 < largest < 4.5


def test_the_scatter_is_that_of_an_analysis_of_variance() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = [torch.randn(12, 1, 1) + 0.7 * torch.randn(1) for _ in range(6)]
    evidence = made_up([call_of(batch, index) for index, batch in enumerate(x)])
    measured = scatter(evidence.seen["norm"], evidence.run)
    expected = stats.f_oneway(*[batch.double().flatten().numpy() for batch in x])
    assert measured is not None
    assert measured.ratio**2 == pytest.approx(expected.statistic)
    assert measured.certainty == pytest.approx(stats.norm.isf(expected.pvalue), abs=0.1)


@pytest.mark.packages
def test_rented_bikes_one_day_per_batch() -> None:
    """docs/evidence.md: five times the error, because a day's batch hides how warm the day is."""
    folder("ISLP")
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        import bikeshare
    finally:
        sys.path.pop(0)
    hours = bikeshare.bike_hours()
    split = bikeshare.split_days(hours.x, hours.y, hours.day, 0)
    for training, expected in (("shuffled", ()), ("by day", ("BN107",))):
        model = bikeshare.train(split, training, 0, epochs=4)
        batches = [split.x[rows] for rows in bikeshare.batches(split, training)]
        findings = batchnorm.check(model, batches=batches, select="BN1")
        assert tuple(each.code for each in findings.at_least("warning")) == expected
        if expected:
            finding = findings.at_least("warning")[0]
            assert finding.module == "1"  # the first batch norm
            assert finding.evidence["ratio"] > 2.5
            assert finding.evidence["sigma"] > 0.4
