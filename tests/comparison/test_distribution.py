"""Percentiles of a hidden layer against numpy's, and the drift of known sequences."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import BatchNormError
from batchnorm.comparison.distribution import (
    LEVELS,
    Percentiles,
    drift,
    observe,
    percentiles,
    typical,
)


def curves(*medians: list[float], width: float = 1.0) -> np.ndarray:
    """(T, 3, C) with these medians at each evaluation and half width `width`."""
    middle = np.array(medians)
    return np.stack([middle - width, middle, middle + width], axis=1)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 3, 2),
        nn.BatchNorm1d(3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


@pytest.mark.parametrize("samples", [1, 2, 7, 20, 21, 1000])
def test_percentiles_are_numpys(samples: int) -> None:
    values = torch.randn(5, samples, generator=torch.Generator().manual_seed(samples))
    levels = [0.0, 0.15, 0.5, 0.85, 1.0]
    expected = np.quantile(values.double().numpy(), levels, axis=1)
    np.testing.assert_allclose(percentiles(values, levels).numpy(), expected, rtol=1e-13, atol=1e-15)


def test_percentiles_of_more_values_than_torch_quantile_takes() -> None:
    values = torch.arange(2**24 + 2, dtype=torch.int32)[None]
    last = 2**24 + 1
    assert percentiles(values).flatten().tolist() == pytest.approx(
        [level * last for level in LEVELS], rel=1e-14
    )


def test_percentiles_of_what_is_not_finite() -> None:
    inf, nan = math.inf, math.nan
    values = torch.tensor([[1.0, nan, 2.0], [inf, inf, inf], [-inf, -inf, 5.0], [1.0, 2.0, 3.0]])
    found = percentiles(values, [0.0, 0.5, 1.0]).T.tolist()
    assert all(map(math.isnan, found[0]))
    assert found[1:] == [[inf] * 3, [-inf, -inf, 5.0], [1.0, 2.0, 3.0]]


def test_observe_sees_both_sides_of_a_module_in_train_mode() -> None:
    torch.manual_seed(1)
    model = network().eval()
    x = torch.randn(6, 2, 5)
    with torch.no_grad():
        before = model[0](x)
    # Train mode: normalized with the batch's own statistics
    axes = (0, 2)
    after = (before - before.mean(axes, keepdim=True)) / (
        before.var(axes, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    for side, values in (("input", before), ("output", after)):
        found = observe(model, "1", side, x)
        expected = np.quantile(values.double().numpy(), LEVELS, axis=axes)
        assert found.dtype == torch.float64
        assert found.shape == (3, 3)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_what_follows_in_place_is_not_seen() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    x = torch.tensor([[-3.0], [-2.0], [-1.0]])
    assert observe(model, "0", "output", x)[1].item() == -2
    assert observe(model, "1", "input", x)[1].item() == -2
    assert observe(model, "1", "output", x)[1].item() == 0
    assert observe(model, "", "input", x)[1].item() == -2
    assert x.flatten().tolist() == [-3, -2, -1]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.unused = nn.Linear(2, 2)
        self.pair = nn.LSTM(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.pair(x)
        return self.layer(input=self.layer(x) + 10)


def test_the_first_call_counts() -> None:
    model, x = Twice(), torch.tensor([[1.0, 2.0]])
    for side in ("input", "output"):
        assert observe(model, "layer", side, x).tolist() == [[1, 2]] * 3


@pytest.mark.parametrize(
    ("path", "side", "text"),
    [
        ("nowhere", "input", "'nowhere'"),
        ("unused", "input", "no call of it"),
        ("pair", "output", "a tuple"),
        ("layer", "both", "side"),
    ],
)
def test_places_that_cannot_be_observed(path: str, side: str, text: str) -> None:
    with pytest.raises(BatchNormError, match=text):
        observe(Twice(), path, side, torch.ones(3, 2))


def test_no_channels() -> None:
    with pytest.raises(BatchNormError, match=r"shape \(3,\)"):
        observe(nn.Sequential(nn.Flatten(0), nn.Identity()), "1", "input", torch.ones(3, 1))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
def test_observe_changes_nothing(norm: type[nn.Module]) -> None:
    torch.manual_seed(2)
    model = network()
    model[1] = norm(3)
    model[3].eval()
    x = torch.randn(6, 2, 5)
    kept, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = observe(model, "5", "output", x)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    # Dropout draws the same mask every time, and another one under another seed.
    assert torch.equal(found, observe(model, "5", "output", x))
    assert not torch.equal(found, observe(model, "5", "output", x, seed=1))


def test_recorder_stacks_the_evaluations() -> None:
    model, x = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    recorder = Percentiles("", "output", x)
    assert recorder.curves.shape == (0, 3, 0)
    for weight in (1.0, 2.0):
        nn.init.constant_(model.weight, weight)
        recorder.observe(model)
    expected = [[1.3] * 2, [2.0] * 2, [2.7] * 2], [[2.6] * 2, [4.0] * 2, [5.4] * 2]
    np.testing.assert_allclose(recorder.curves, expected, rtol=1e-6)
    assert recorder.curves.dtype == np.float64


def test_drift_is_the_rms_move_over_the_mean_half_width() -> None:
    # moves 3 and −4: √(25/2); half width 2
    assert drift(curves([0.0], [3.0], [-1.0], width=2.0)) == pytest.approx([math.sqrt(12.5) / 2])
    # half widths 1, 1 and 4, so 2 on average; moves 1 and 7: √(50/2)
    widening = np.concatenate([curves([0.0], [1.0]), curves([8.0], width=4.0)])
    assert drift(widening) == pytest.approx([2.5])


def test_drift_knows_neither_scale_nor_offset_but_only_movement() -> None:
    sequence = np.random.default_rng(3).normal(size=(9, 3, 4))
    sequence.sort(axis=1)
    np.testing.assert_allclose(drift(1e3 * sequence + 7.0), drift(sequence), rtol=1e-10)
    assert drift(curves([5.0, -2.0], [5.0, -2.0])).tolist() == [0, 0]


def test_drift_of_channels_that_have_none() -> None:
    sequence = np.concatenate([curves([0.0, 0.0, 0.0, 0.0]), curves([1.0, 1.0, 1.0, 1.0])])
    sequence[:, :, 1] = sequence[:, 1:2, 1]  # no width, but a move
    sequence[1, 0, 2] = math.nan
    sequence[0, 2, 3] = math.inf
    assert drift(sequence)[0] == 1
    assert np.isnan(drift(sequence)[1:]).all()


def test_one_evaluation_or_none() -> None:
    assert np.isnan(drift(curves([1.0, 2.0]))).tolist() == [True, True]
    assert drift(np.zeros((0, 3, 0))).shape == (0,)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (4, 2, 5), (1, 4, 3, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BatchNormError, match="curves"):
        drift(np.zeros(shape))


@pytest.mark.parametrize(
    ("drifts", "expected"),
    [
        ([5.0], 0),
        ([3.0, 1.0, 2.0], 2),
        ([4.0, 1.0, 3.0, 2.0], 3),  # the lower of the middles 2 and 3
        ([math.nan, 9.0, math.inf, 7.0, math.nan, 8.0], 5),
        ([2.0, 2.0, 2.0], 0),
        ([math.nan, math.inf], None),
        ([], None),
    ],
)
def test_typical_is_the_channel_of_the_median(drifts: list[float], expected: int | None) -> None:
    assert typical(drifts) == expected
