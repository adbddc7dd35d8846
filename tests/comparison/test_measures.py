"""Every measure against a case worked out by hand."""

import math

import numpy as np
import pytest

from batchnorm.comparison.measures import (
    Interval,
    batch_spread,
    clear_guess,
    first_reach,
    ratio_interval,
    rms,
    t_interval,
    training_bar,
    trains,
)


def test_t_interval_of_three_values_is_mean_and_4_303_standard_errors() -> None:
    interval = t_interval([0.90, 0.92, 0.97])
    # s² = (0.03² + 0.01² + 0.04²)/2 = 0.0013, t(2, 97.5 %) = 4.302653
    half = 4.302653 * math.sqrt(0.0013 / 3)
    assert interval.mean == pytest.approx(0.93)
    assert interval.low == pytest.approx(0.93 - half, rel=1e-6)
    assert interval.high == pytest.approx(0.93 + half, rel=1e-6)
    assert interval.n == 3


def test_t_interval_of_one_value_has_no_bounds_and_excludes_nothing() -> None:
    interval = t_interval([0.5])
    assert interval == Interval(0.5, None, None, 1)
    assert not interval.excludes(0.0)


def test_t_interval_of_equal_values_has_no_width() -> None:
    interval = t_interval([0.5, 0.5])
    assert (interval.low, interval.high) == (0.5, 0.5)
    assert interval.excludes(0.49)
    assert not interval.excludes(0.5)


def test_ratio_interval_is_geometric_and_paired() -> None:
    interval = ratio_interval([100, 400], [100, 100])
    # logs 0 and ln 4: mean ln 2, s = ln 4/√2, half width t(1)·s/√2 = 12.7062·ln 2
    assert interval.mean == pytest.approx(2.0)
    assert interval.low == pytest.approx(2.0 * math.exp(-12.7062047 * math.log(2)), rel=1e-6)
    assert interval.high == pytest.approx(2.0 * math.exp(12.7062047 * math.log(2)), rel=1e-6)


def test_ratio_of_exchanged_sides_is_the_inverse() -> None:
    forward, backward = ratio_interval([30, 50, 20], [10, 20, 10]), ratio_interval([10, 20, 10], [30, 50, 20])
    assert forward.low is not None
    assert backward.high is not None
    assert forward.mean == pytest.approx(1 / backward.mean)
    assert forward.low == pytest.approx(1 / backward.high)


@pytest.mark.parametrize(("target", "step"), [(0.1, 0), (0.5, 20), (0.8, 20), (0.81, None)])
def test_first_reach(target: float, step: int | None) -> None:
    assert first_reach([0, 10, 20, 30], [0.1, 0.3, 0.8, 0.7], target) == step


def test_trains_needs_every_seed_at_least_halfway() -> None:
    assert trains([0.55, 0.9], chance=0.1, best=1.0, clear=0.16)
    assert not trains([0.5499, 0.9], chance=0.1, best=1.0, clear=0.16)


def test_trains_means_more_than_a_lucky_guess() -> None:
    # two standard errors of guessing: 2·√(0.1·0.9/100) = 0.06
    assert not trains([0.159], chance=0.1, best=0.16, clear=0.16)
    assert trains([0.161], chance=0.1, best=0.17, clear=0.16)
    assert not trains([0.1], chance=0.1, best=0.1, clear=0.1)


def test_a_diverged_run_never_trains_and_guessing_is_no_training() -> None:
    assert not trains([0.9, None], chance=0.1, best=0.9, clear=0.16)
    assert not trains([None], chance=1.0, best=1.0, clear=1.0)
    assert not trains([1.0], chance=1.0, best=1.0, clear=1.0)


def test_training_bar_is_halfway_or_clearly_above_guessing() -> None:
    assert training_bar(0.1, 0.9, 0.16) == pytest.approx(0.5)
    assert training_bar(0.945, 0.95, clear_guess(0.945, 200)) == pytest.approx(clear_guess(0.945, 200))
    # 0.945 + 2·√(0.945·0.055/200)
    assert clear_guess(0.945, 200) == pytest.approx(0.977241, abs=1e-6)


def test_clipped_keeps_the_mean_and_unknown_bounds() -> None:
    assert Interval(0.9, 0.7, 1.1, 3).clipped(0, 1) == Interval(0.9, 0.7, 1, 3)
    assert Interval(-0.5, -1.2, 0.2, 3).clipped(-1, 1) == Interval(-0.5, -1, 0.2, 3)
    assert Interval(0.5, None, None, 1).clipped(0, 1) == Interval(0.5, None, None, 1)


def test_batch_spread_in_units_of_the_pooled_sigma() -> None:
    # channel 0: batches {0, 2} and {4, 6}: means 1, 5, variances 1, 1; all of it: mean 3, σ² = 1 + 4 = 5
    # channel 1: batches {−1, 1} and {−3, 3}: means 0, stds 1, 3; σ² = 5, average std 2
    found = batch_spread([[1, 0], [5, 0]], [[1, 1], [1, 9]], [2, 2])
    root = math.sqrt(5)
    np.testing.assert_allclose(found.mean, [[-2 / root, 0], [2 / root, 0]])
    np.testing.assert_allclose(found.spread, [[0, -1 / root], [0, 1 / root]])


def test_batch_spread_weighs_batches_by_their_size() -> None:
    # {0, 0, 0} and {4}: mean 1, σ² = (3·1 + 9)/4 = 3
    found = batch_spread([[0], [4]], [[0], [0]], [3, 1])
    np.testing.assert_allclose(found.mean, [[-1 / math.sqrt(3)], [3 / math.sqrt(3)]])


def test_batch_spread_leaves_dead_channels_out() -> None:
    found = batch_spread([[7, 1], [7, 3]], [[0, 0], [0, 0]], [4, 4])
    np.testing.assert_allclose(found.mean, [[-1], [1]])


def test_batch_spread_does_not_change_with_scale_and_offset() -> None:
    generator = np.random.default_rng(0)
    means, variances = generator.normal(size=(5, 3)), generator.uniform(0.5, 2, size=(5, 3))
    counts = [4, 4, 4, 2, 1]
    here, there = batch_spread(means, variances, counts), batch_spread(3 * means + 7, 9 * variances, counts)
    np.testing.assert_allclose(here.mean, there.mean, atol=1e-12)
    np.testing.assert_allclose(here.spread, there.spread, atol=1e-12)


def test_rms() -> None:
    assert rms([[3.0, 4.0], [0.0, 0.0]]) == pytest.approx(2.5)
