"""What is collected while batches run, against what is computed by hand; the model is afterwards as it was."""

import copy
from typing import Any

import pytest
import torch
from run_helpers import call_of, digits_net, evidence
from stats_helpers import assert_same_state, state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import batchnorm
from batchnorm.checks._loaders import holds_pairs, last_size, replaced
from batchnorm.checks._padding import padded_share


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was(norm: type[nn.Module], training: bool) -> None:
    """PyTorch's batch norm moves its running statistics without counting that as a change of theirs."""
    model = digits_net(norm=norm).train(training)
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    kept = [parameter.grad.clone() for parameter in model.parameters()]
    batches = [torch.randn(6, 1, 8, 8) for _ in range(3)]
    before, seed = state(model), torch.random.get_rng_state()
    batchnorm.check(model, batches=batches, select="BN1")
    assert_same_state(model, before)
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), kept, strict=True))


def test_a_frozen_layer_remembers_its_mode() -> None:
    model = batchnorm.freeze(digits_net().train()).model
    batchnorm.check(model, batches=[torch.randn(6, 1, 8, 8)], select="BN101")
    assert batchnorm.unfreeze(model).model[1].training


def test_the_model_is_as_it_was_after_a_batch_that_it_does_not_take() -> None:
    model = digits_net()
    before = state(model)
    with pytest.raises(batchnorm.DataError, match="batch 2 in train mode"):
        evidence(model, [torch.randn(6, 1, 8, 8), torch.randn(6, 2, 8, 8)])
    assert_same_state(model, before)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
def test_every_run_starts_from_the_same_statistics(norm: type[nn.Module]) -> None:
    """The gap of a batch is the one that it has alone, and the one that a user would see."""
    model = digits_net(norm=norm)
    batches = [torch.randn(6, 1, 8, 8) for _ in range(3)]
    together = evidence(model, batches)
    alone = evidence(model, batches[2:])
    assert together.run.gap[2] == alone.run.gap[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        evaluated = twin.eval()(batches[2]).double()
        trained = twin.train()(batches[2]).double()
    spread = (evaluated - evaluated.mean(0)).square().mean().sqrt()
    assert alone.run.gap[0] == pytest.approx(((trained - evaluated).square().mean().sqrt() / spread).item())


def test_calls_hold_the_moments_of_their_inputs() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    batches = [torch.randn(5, 3, 4, 2) * 3 + 7, torch.randn(4, 3, 4, 2)]
    seen = evidence(model, batches).seen["0"]
    for calls in (seen.train, seen.eval):
        for index, call in enumerate(calls):
            expected = call_of(batches[index].flatten(2), index)
            assert (call.batch, call.samples, call.positions) == (index, *expected_size(batches[index]))
            for name in ("mean", "var", "between"):
                torch.testing.assert_close(getattr(call, name), getattr(expected, name), rtol=1e-6, atol=1e-9)
    assert seen.raw
    assert seen.training
    assert not seen.batch_in_eval
    assert not seen.channels_last
    assert (seen.updates_forward, seen.updates_step) == (1, 1)


def expected_size(batch: Tensor) -> tuple[int, int]:
    return batch.shape[0], batch.shape[2] * batch.shape[3]


def test_layout_order_and_what_is_raw() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    batch = torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last)
    seen = evidence(model, [batch]).seen
    assert seen["0"].channels_last
    assert (seen["0"].raw, seen["2"].raw) == (True, False)
    assert (seen["0"].place, seen["2"].place) == (0, 1)
    transposed = evidence(nn.BatchNorm2d(3), [torch.randn(5, 3, 4, 6).transpose(2, 3)]).seen[""]
    assert not transposed.channels_last


class Noisy(nn.Module):
    """Random numbers in eval mode, which are no dependence on other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + torch.randn_like(x)


def test_neighbours_are_replaced_under_the_same_random_numbers() -> None:
    run = evidence(Noisy(), [torch.randn(8, 3)]).run
    assert run.neighbours_eval == 0
    assert run.neighbours_train is not None
    assert run.neighbours_train > 0.05


def test_a_batch_of_one_is_noted_where_training_would_stop() -> None:
    for norm in (nn.BatchNorm1d(3), batchnorm.BatchNorm1d(3)):
        run = evidence(nn.Sequential(norm), [torch.randn(4, 3), torch.randn(1, 3)]).run
        assert [fed.refused for fed in run.batches] == [False, True]
        assert len(run.gap) == 1
        assert run.last == 1
        run = evidence(nn.Sequential(norm), [torch.randn(1, 3)]).run
        assert [fed.refused for fed in run.batches] == [True]
        assert run.gap == ()


class NoWayBack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).exp()
        z = y.square()
        y.add_(1)  # what the square needs again
        return z


def test_a_backward_that_cannot_be_run_is_noted() -> None:
    model = NoWayBack()
    before = state(model)
    findings = batchnorm.check(model, batches=[torch.randn(8, 3)], select="BN105")
    assert any("backward pass could not be run" in note for note in findings.notes)
    assert len(findings) == 0
    assert_same_state(model, before)


class Checkpointed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.more = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.more(self.norm(x)), x, use_reentrant=False)


def test_updates_of_a_forward_and_of_a_step() -> None:
    seen = evidence(Checkpointed(nn.BatchNorm1d(3)), [torch.randn(8, 3)]).seen["norm"]
    assert (seen.updates_forward, seen.updates_step) == (1, 2)


# Loaders


def test_the_last_batch_of_a_loader() -> None:
    data = TensorDataset(torch.randn(33, 2))
    assert last_size(DataLoader(data, batch_size=8)) == 1
    assert last_size(DataLoader(data, batch_size=8, drop_last=True)) == 8
    assert last_size(DataLoader(data, batch_size=11)) == 11
    assert last_size(DataLoader(data, batch_size=64)) == 33
    assert last_size([torch.randn(3, 2)]) is None

    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            yield from torch.randn(9, 2)

    class Sampled(Dataset[Tensor]):
        def __getitem__(self, index: int) -> Tensor:
            return torch.randn(2)

    assert last_size(DataLoader(Stream(), batch_size=8)) is None
    assert last_size(DataLoader(Sampled(), batch_size=8, sampler=range(17))) == 1
    # Known without loading all of it.
    assert evidence(nn.BatchNorm1d(2), DataLoader(data, batch_size=8), most=2).run.last == 1
    assert evidence(nn.BatchNorm1d(2), iter([torch.randn(4, 2)] * 9), most=2).run.last is None


def test_rows_are_replaced_wherever_there_is_a_row_a_sample() -> None:
    x, lengths, scale = torch.arange(4.0)[:, None], torch.arange(4), torch.tensor(2.0)
    rows = torch.tensor([0, 0, 2, 2])
    got = replaced({"x": (x, [lengths]), "scale": scale, "name": "a"}, rows)
    assert got["x"][0].flatten().tolist() == [0, 0, 2, 2]
    assert got["x"][1][0].tolist() == [0, 0, 2, 2]
    assert (got["scale"], got["name"]) == (scale, "a")


class TwoViews(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second


class OneView(nn.Module):
    def forward(self, first: Tensor, **rest: Tensor) -> Tensor:
        return first


def test_pairs_are_two_views_that_the_model_gets() -> None:
    x = torch.randn(8, 3, 6)
    view, other, labels = x + 0.3 * torch.randn_like(x), torch.randn_like(x), torch.arange(8)
    assert holds_pairs(nn.Identity(), ([x, view], labels), False)
    assert holds_pairs(TwoViews(), {"first": x, "second": view}, False)
    assert holds_pairs(nn.Identity(), (x, view), True)  # called by the user's own function
    assert not holds_pairs(nn.Identity(), (x, view), False)  # the second is a target
    assert not holds_pairs(OneView(), {"first": x, "target": view}, False)
    for batch in ([x, other], [x, x], [x, view[:, :2]], [x, labels], [x]):
        assert not holds_pairs(nn.Identity(), (batch, labels), False)


# Padding


def padded(lengths: list[int], channels: int = 4, total: int = 20, value: float = 0.0) -> Tensor:
    x = torch.randn(len(lengths), channels, total)
    for row, length in enumerate(lengths):
        x[row, :, length:] = value
    return x


def test_padding_is_counted() -> None:
    x = padded([20, 12, 15, 18])
    assert padded_share(x, 4) == pytest.approx((8 + 5 + 2) / 80)
    assert padded_share(x.flip(2), 4) == pytest.approx(15 / 80)  # on the left
    assert padded_share(padded([20, 12, 15, 18], value=3.7), 4) == pytest.approx(15 / 80)
    # A linear layer makes something else of it, rounded differently.
    through = nn.Linear(4, 6)(x.transpose(1, 2)).transpose(1, 2).detach()
    assert padded_share(through * (1 + 1e-7 * torch.randn_like(through)), 4) == pytest.approx(15 / 80)
    # Rows, sample by sample and step by step.
    assert padded_share(x.transpose(1, 2).reshape(80, 4), 4) == pytest.approx(15 / 80)
    assert padded_share(x.permute(2, 0, 1).reshape(80, 4), 4) == pytest.approx(15 / 80)
    # A sample that is nothing else counts, too, but is no sign by itself.
    assert padded_share(padded([20, 12, 15, 0]), 4) == pytest.approx((8 + 5 + 20) / 80)


def test_what_is_no_padding() -> None:
    nothing = [
        torch.randn(4, 4, 20),
        torch.randn(4, 4, 20).relu(),
        padded([15, 15, 15, 15]),  # alike in all: data, or cut
        padded([20, 20, 20, 20]),
        padded([20, 20, 12, 20]),  # a single one
        padded([20, 20, 0, 0]),  # empty samples
        torch.zeros(4, 4, 20),
        torch.randint(0, 2, (64, 1, 8)).float(),  # the value is everywhere
        torch.randn(4, 4, 20, 20) * (torch.arange(20) < 15),  # images
        padded([20, 12, 15, 18])[:, :, 0],  # a table
        torch.randn(4, 4, 1),
        torch.randn(1, 4, 20),
    ]
    assert [padded_share(x, x.shape[0]) for x in nothing] == [0.0] * len(nothing)
    one_hot = nn.functional.one_hot(torch.randint(0, 4, (64, 30)), 4).float().transpose(1, 2)
    assert padded_share(one_hot, 64) == 0
    table = torch.zeros(80, 4)  # equal rows of a table whose samples are its rows
    assert padded_share(table, 80) == 0
