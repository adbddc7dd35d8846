"""BN104 to BN106, BN110, BN111 and BN113: what calls of layers, loaders and optimizers show."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from rule_helpers import found, only
from run_helpers import call_of, made_up
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import batchnorm
from batchnorm.checks.rule import rule_named

# BN104


def table() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))


def images() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))


def test_a_last_batch_of_one() -> None:
    loader = DataLoader(TensorDataset(torch.randn(33, 3)), batch_size=8)
    # Seen, because all is run, and foreseen, because the loader says so.
    seen = only(table(), "BN104", batches=loader)
    assert (seen.severity, seen.module, seen.also) == ("error", "1", ("3",))
    foreseen = only(table(), "BN104", batches=loader, max_batches=2)
    assert (foreseen.severity, foreseen.module, foreseen.also) == ("warning", "1", ("3",))
    assert foreseen.evidence == {"last": 1, "batch": 8}
    # An image has many values: training goes on.
    pictures = DataLoader(TensorDataset(torch.randn(33, 1, 8, 8)), batch_size=8)
    for most in (2, 8):
        assert only(images(), "BN104", batches=pictures, max_batches=most).severity == "info"


def test_last_batches_that_are_right() -> None:
    data = TensorDataset(torch.randn(33, 3))
    for loader in (DataLoader(data, batch_size=8, drop_last=True), DataLoader(data, batch_size=31)):
        for most in (2, 8):
            assert found(table(), "BN104", batches=loader, max_batches=most) == ()
    assert found(table(), "BN104", batches=[torch.randn(8, 3)] * 3) == ()
    loader = DataLoader(data, batch_size=8)
    assert found(batchnorm.freeze(table()).model, "BN104", batches=loader) == ()
    only(table(), "BN104", batches=[torch.randn(1, 3)] * 3)


def test_layers_that_bear_one_value() -> None:
    model = nn.Sequential(nn.Linear(3, 4), batchnorm.BatchNorm1d(4, single="running"))
    finding = only(model, "BN104", batches=DataLoader(TensorDataset(torch.randn(33, 3)), batch_size=8))
    assert finding.severity == "warning"  # nothing stops


# BN105


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.first = nn.Linear(3, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return checkpoint(self.part, x, use_reentrant=self.reentrant) if self.training else self.part(x)


class Twice(nn.Module):
    def __init__(self, shift: float = 0.0, scale: float = 1.0, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3) if norm is None else norm
        self.shift, self.scale = shift, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm(self.scale * x.flip(1) + self.shift)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_twice(reentrant: bool) -> None:
    finding = only(Recomputed(reentrant), "BN105", batches=[torch.randn(8, 3)])
    assert (finding.severity, finding.module) == ("warning", "part.1")
    assert finding.message == "2 updates of the running statistics in a step, 1 of them in backward"
    assert "0.1 acts as 0.19" in finding.cause
    assert "layer.momentum = 0.0513" in finding.fix
    assert found(Recomputed(reentrant).part, "BN105", batches=[torch.randn(8, 3)]) == ()


def test_several_calls_a_forward_are_common() -> None:
    finding = only(Twice(), "BN105", batches=[torch.randn(8, 3)])
    assert (finding.severity, finding.evidence) == ("info", {"forward": 2, "step": 2, "cause": "calls"})
    frozen = batchnorm.freeze(Twice()).model
    assert found(frozen, "BN105", batches=[torch.randn(8, 3)]) == ()
    untracked = Twice(norm=nn.BatchNorm1d(3, track_running_stats=False))
    assert found(untracked, "BN105", batches=[torch.randn(8, 3)]) == ()


# BN106


def sequences(lengths: list[int], total: int = 20) -> Tensor:
    x = torch.randn(len(lengths), 4, total)
    for row, length in enumerate(lengths):
        x[row, :, length:] = 0
    return x


class Rows(nn.Module):
    """Steps of sequences as rows of a table, as one gives them to a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2).flatten(0, 1))


def test_padding_takes_part() -> None:
    batches = [sequences([20, 14, 16, 18]), sequences([20, 20, 10, 17])]
    for model in (
        nn.Sequential(nn.Conv1d(4, 5, 1), nn.BatchNorm1d(5)),
        nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), batchnorm.BatchNorm1d(5)),
        Rows(),
    ):
        finding = only(model, "BN106", batches=batches)
        assert finding.severity == "warning"
        assert 0.1 < finding.evidence["share"] < 0.2
    few = found(nn.BatchNorm1d(4), "BN106", batches=[sequences([20, 18, 18, 20, 20, 20])])  # 3 %
    assert few == ()
    assert found(nn.BatchNorm1d(4), "BN106", batches=[sequences([20] * 4)]) == ()
    assert found(batchnorm.freeze(Rows()).model, "BN106", batches=batches) == ()


def test_a_mask_leaves_it_out() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batchnorm.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, mask=(x != 0).any(1))

    assert found(Masked(), "BN106", batches=[sequences([20, 14, 16, 18])]) == ()


# BN110


@pytest.mark.parametrize(("shift", "scale"), [(2.0, 1.0), (-1.0, 1.0), (0.0, 3.0), (0.0, 0.3)])
def test_two_sources_in_one_layer(shift: float, scale: float) -> None:
    batches = [torch.randn(32, 3) for _ in range(4)]
    finding = only(Twice(shift, scale), "BN110", batches=batches)
    assert (finding.severity, finding.module) == ("warning", "norm")
    assert finding.fix == 'batchnorm.convert(model, "domain")'
    assert finding.evidence["sigma"] == pytest.approx(abs(shift), abs=0.3 + abs(shift) / 4)


def test_sources_that_are_alike() -> None:
    batches = [torch.randn(32, 3) for _ in range(4)]
    for shift, scale in ((0.0, 1.0), (0.3, 1.0), (0.0, 1.5)):
        assert found(Twice(shift, scale), "BN110", batches=batches) == ()
    # One call a forward, one batch, no running statistics that could be a mixture.
    assert found(nn.BatchNorm1d(3), "BN110", batches=batches) == ()
    assert found(Twice(3.0), "BN110", batches=batches[:1]) == ()
    untracked = Twice(3.0, norm=nn.BatchNorm1d(3, track_running_stats=False))
    assert found(untracked, "BN110", batches=batches) == ()
    # Small batches of the same source, apart by chance.
    assert found(Twice(), "BN110", batches=[torch.randn(4, 3) for _ in range(8)]) == ()


def shifted(channels: int, shift: float, batch: int, site: int, samples: int = 32) -> Any:
    """Eight channels, of which some are higher at the second place."""
    x = torch.randn(samples, 8, 1)
    x[:, :channels] += shift * site
    return call_of(x, batch, site)


@pytest.mark.parametrize(("channels", "says"), [(8, 1), (3, 1), (2, 0), (0, 0)])
def test_sources_that_differ_in_some_channels(channels: int, says: int) -> None:
    """A quarter of the channels must show it: two of eight are on the border."""
    calls = [shifted(channels, 1.5, batch, site) for batch in range(4) for site in range(2)]
    findings = list(rule_named("BN110").find(made_up(calls)))
    assert len(findings) == says
    assert all("a quarter of the channels" in each.message for each in findings)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 8])
def test_few_samples_of_one_source_are_apart_by_chance(samples: int) -> None:
    rule = rule_named("BN110")
    for _ in range(150):
        width = float(torch.rand(()) + 0.5)
        x = [width * torch.randn(samples, 1, 6) + torch.randn(samples, 4, 6).cumsum(1) for _ in range(6)]
        calls = [call_of(each, number // 2, number % 2) for number, each in enumerate(x)]
        assert list(rule.find(made_up(calls))) == []


def test_few_samples_of_two_sources_are_found() -> None:
    calls = [shifted(8, 4.0, batch, site, 4) for batch in range(8) for site in range(2)]
    assert [each.module for each in rule_named("BN110").find(made_up(calls))] == ["norm"]


def test_what_scatters_from_batch_to_batch_is_chance_too() -> None:
    """Frames of one clip a batch: a thousand rows that are one sample, and places that are apart in every batch."""
    rule, steps = rule_named("BN110"), (0.6, 5.0, 0.7)
    calls = []
    for batch, step in enumerate(steps):
        for site in range(2):
            calls.append(call_of(torch.randn(1000, 4, 1) + step * site, batch, site))
    assert list(rule.find(made_up(calls))) == []


@pytest.mark.parametrize(
    ("gap", "noise", "says"), [(0.25, 0.1, 0), (0.9, 0.1, 1), (0.9, 0.7, 0), (None, None, 0)]
)
def test_smaller_differences_count_where_the_outputs_differ(
    gap: float | None, noise: float | None, says: int
) -> None:
    calls = [shifted(8, 0.4, batch, site, 2000) for batch in range(4) for site in range(2)]
    evidence = made_up(calls)
    run = replace(evidence.run, gap=() if gap is None else (gap,), neighbours_train=noise)
    assert len(list(rule_named("BN110").find(replace(evidence, run=run)))) == says
    alike = [shifted(8, 0.1, batch, site, 2000) for batch in range(4) for site in range(2)]
    assert not list(rule_named("BN110").find(replace(made_up(alike), run=run)))


def test_sources_that_change_places_from_batch_to_batch() -> None:
    calls = []
    for batch in range(6):
        for site in range(2):
            shift = 2.0 if (batch + site) % 2 else -2.0
            calls.append(call_of(torch.randn(32, 3, 1) + shift, batch, site))
    rule = rule_named("BN110")
    assert list(rule.find(made_up(calls))) == []
    steady = [call_of(torch.randn(32, 3, 1) + 4 * site, batch, site) for batch in range(6) for site in (0, 1)]
    assert [each.module for each in rule.find(made_up(steady))] == ["norm"]


def test_eval_of_a_mixture_is_explained_by_its_sources() -> None:
    model = Twice(6.0)
    batches = [torch.randn(32, 3) for _ in range(8)]
    for _ in range(20):
        for batch in batches:
            model(batch)
    finding = only(model, "BN101", batches=batches)
    assert "the layer is fed from 2 places (BN110)" in finding.cause


# BN111


def stepped(k: int, steps: int = 20, more: int = 0, optimizer: Any = torch.optim.Adam) -> tuple[Any, Any]:
    model = table()
    made = optimizer(model.parameters(), 1e-3)
    for index in range(k * steps + more):
        model(torch.randn(8, 3)).square().sum().backward()
        if (index + 1) % k == 0:
            made.step()
            made.zero_grad()
    return model, made


@pytest.mark.parametrize(("k", "more"), [(2, 0), (4, 3)])
def test_accumulated_gradients(k: int, more: int) -> None:
    model, optimizer = stepped(k, more=more)
    finding = only(model, "BN111", optimizer=optimizer)
    assert (finding.severity, finding.module, finding.also) == ("info", "1", ("3",))
    assert finding.fix == f"batchnorm.accumulate(model, {k})"
    assert finding.evidence["steps"] == 20


def test_counts_that_do_not_say_accumulation() -> None:
    model, optimizer = stepped(1)
    assert found(model, "BN111", optimizer=optimizer) == ()
    # A trained network with a new optimizer, and SGD, which counts no steps.
    model[1].num_batches_tracked.fill_(137)
    model[3].num_batches_tracked.fill_(1_431_430)
    assert found(model, "BN111", optimizer=optimizer) == ()
    model, optimizer = stepped(4, optimizer=torch.optim.SGD)
    assert found(model, "BN111", optimizer=optimizer) == ()
    model, optimizer = stepped(2, steps=4)
    assert found(model, "BN111", optimizer=optimizer) == ()


def test_what_one_step_counts_by_itself_is_no_accumulation() -> None:
    model = Recomputed(False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(20):
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
    given = {"optimizer": optimizer, "batches": [torch.randn(8, 3)]}
    assert [each.code for each in batchnorm.check(model, select=["BN105", "BN111"], **given)] == ["BN105"]


# BN113


class Contrastive(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), norm, nn.ReLU(), nn.Linear(16, 8))

    def forward(self, views: list[Tensor]) -> Tensor:
        return self.encoder(torch.cat(list(views)))[: len(views[0])]


def views(noise: float = 0.3) -> list[Any]:
    batches = []
    for _ in range(3):
        x = torch.randn(16, 3, 16)
        batches.append(([x, x + noise * torch.randn_like(x)], torch.arange(16)))
    return batches


def test_samples_leak_in_a_contrastive_setting() -> None:
    finding = only(Contrastive(nn.BatchNorm1d(16)), "BN113", batches=views())
    assert (finding.severity, finding.module) == ("warning", "encoder.2")
    assert finding.evidence["moved"] > 0.05
    both = Contrastive(nn.BatchNorm1d(16)).encoder
    only(
        both,
        "BN113",
        batches=[batch[0] for batch in views()],
        forward=lambda model, batch: (model(batch[0]), model(batch[1])),
    )


def test_one_batch_whose_views_look_unrelated_changes_nothing() -> None:
    other = ([torch.randn(16, 3, 16), torch.randn(16, 3, 16)], torch.arange(16))
    batches = views()
    only(Contrastive(nn.BatchNorm1d(16)), "BN113", batches=[*batches[:2], other])
    assert found(Contrastive(nn.BatchNorm1d(16)), "BN113", batches=[batches[0], other]) == ()
    assert found(Contrastive(nn.BatchNorm1d(16)), "BN113", batches=[batches[0], other, other]) == ()


def test_no_leak_where_nothing_is_compared_or_mixed() -> None:
    model = Contrastive(nn.BatchNorm1d(16))
    unrelated = [([torch.randn(16, 3, 16), torch.randn(16, 3, 16)], torch.arange(16)) for _ in range(3)]
    assert found(model, "BN113", batches=unrelated) == ()
    assert found(Contrastive(batchnorm.GhostBatchNorm(16, ghost_size=8)), "BN113", batches=views()) == ()
    assert found(Contrastive(nn.LayerNorm(16)), "BN113", batches=views()) == ()
    assert found(batchnorm.freeze(model).model, "BN113", batches=views()) == ()
    # An input and its target: noisy and clean images.
    plain = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16))
    assert found(plain, "BN113", batches=[tuple(batch[0]) for batch in views()]) == ()
