"""Selection and judgement on invented curves, where the right answer is known."""

import math
from collections.abc import Sequence

import pytest

from batchnorm.comparison.measures import t_interval
from batchnorm.comparison.summary import Summary, summarize
from batchnorm.comparison.training import Run
from batchnorm.comparison.verdicts import accuracy, headline, percent, points, rates, speed

CHANCE, SAMPLES = 0.1, 450


def run(normalized: bool, lr: float, seed: int, curve: Sequence[float], diverged: bool = False) -> Run:
    steps = tuple(10 * i for i in range(len(curve)))
    loss = (math.nan, *(1.0 for _ in curve[1:]))
    seconds = 2.0 if normalized else 1.0
    return Run(normalized, lr, seed, steps, tuple(curve), loss, diverged, 1000, seconds)


def sweep(*, seeds: int = 2) -> list[Run]:
    """Best rates: 0.1 without, 1 with batch norm; without, the rate 1 diverges."""
    found = []
    for seed in range(seeds):
        bump = 0.01 * seed
        found += [
            run(False, 0.01, seed, [0.1, 0.2, 0.3, 0.4, 0.5]),
            run(True, 0.01, seed, [0.1, 0.2, 0.2, 0.3, 0.3]),
            run(False, 0.1, seed, [0.1, 0.3, 0.5, 0.7, 0.8 + bump]),
            run(True, 0.1, seed, [0.1, 0.6, 0.81, 0.82, 0.83]),
            run(False, 1.0, seed, [0.1], diverged=True),
            run(True, 1.0, seed, [0.1, 0.82, 0.85, 0.9 + bump, 0.88 + bump]),
        ]
    return found


def test_each_network_is_judged_at_its_own_best_rate() -> None:
    summary = summarize(sweep(), CHANCE, SAMPLES)
    assert (summary.plain.best_lr, summary.normalized.best_lr) == (0.1, 1.0)
    assert (summary.plain.edge, summary.normalized.edge) == (None, "highest")
    assert summary.plain.best == pytest.approx((0.80, 0.81))
    assert summary.normalized.best == pytest.approx((0.90, 0.91))
    assert summary.normalized.final == pytest.approx((0.88, 0.89))
    assert summary.best_difference.mean == pytest.approx(0.1)
    assert summary.final_difference.mean == pytest.approx(0.08)


def test_steps_and_ratio_to_the_plain_networks_best() -> None:
    target = summarize(sweep(), CHANCE, SAMPLES).targets[-1]
    assert target.accuracy == pytest.approx((0.80, 0.81))
    assert (target.plain_lr, target.plain_steps) == (0.1, (40, 40))
    assert (target.normalized_lr, target.normalized_steps) == (1.0, (10, 10))
    assert target.ratio is not None
    assert target.ratio.mean == pytest.approx(4.0)


def test_lower_targets_have_their_own_fastest_rates() -> None:
    first = summarize(sweep(), CHANCE, SAMPLES).targets[0]
    assert first.share == 0.9
    assert first.plain_steps == (40, 40)  # 0.72 lies above the 0.7 of step 30
    assert first.normalized_steps == (10, 10)


def test_rates_that_train_and_diverged_runs_that_count_as_guessing() -> None:
    summary = summarize(sweep(), CHANCE, SAMPLES)
    # halfway from 0.1 to 0.91 is 0.505
    assert summary.plain.trained_at == (0.1,)
    assert summary.normalized.trained_at == (0.1, 1.0)
    assert summary.plain.rates[2].diverged == 2
    assert summary.plain.rates[2].final.mean == pytest.approx(CHANCE)
    assert rates(summary).headline == "2 of 3, not 1"


def test_a_rate_at_which_batch_norm_ends_lower_is_named() -> None:
    assert (
        "At 0.01 the network without batch norm ends higher."
        in rates(summarize(sweep(), CHANCE, SAMPLES)).text
    )


def test_batch_norm_that_never_reaches_the_goal_is_said_to() -> None:
    runs = [
        item
        for seed in range(2)
        for item in (
            run(False, 0.1, seed, [0.1, 0.5, 0.9]),
            run(True, 0.1, seed, [0.1, 0.6, 0.8 + 0.1 * seed]),
        )
    ]
    summary = summarize(runs, CHANCE, SAMPLES)
    assert summary.targets[-1].normalized_steps == (None, 20)
    assert summary.targets[-1].ratio is None
    verdict = speed(summary)
    assert (verdict.headline, verdict.tone) == ("not reached", "bad")
    assert "1 of 2 seeds" in verdict.text
    assert summary.plain.edge == "only"


def test_a_difference_smaller_than_its_noise_is_no_difference() -> None:
    runs = [
        item
        for seed, (without, with_) in enumerate([(0.8, 0.85), (0.85, 0.8), (0.82, 0.83)])
        for item in (run(False, 0.1, seed, [0.1, without]), run(True, 0.1, seed, [0.1, with_]))
    ]
    summary = summarize(runs, CHANCE, SAMPLES)
    assert accuracy(summary).headline == "no difference seen"
    assert "no difference was seen" in headline(summary, "net", "data")


def test_worse_and_slower_is_said_as_plainly() -> None:
    runs = [
        item
        for seed in range(3)
        for item in (
            run(False, 0.1, seed, [0.1, 0.70, 0.7, 0.7]),
            run(True, 0.1, seed, [0.1, 0.2, 0.5, 0.7 if seed else 0.71]),
            run(False, 0.2, seed, [0.1, 0.90, 0.7, 0.7]),
            run(True, 0.2, seed, [0.1, 0.2, 0.5, 0.90]),
        )
    ]
    verdict = speed(summarize(runs, CHANCE, SAMPLES))
    assert (verdict.headline, verdict.tone) == ("3.0× more steps", "bad")


def test_a_plain_network_that_never_trains_gives_no_factor() -> None:
    runs = [run(False, 0.1, 0, [0.1, 0.1]), run(True, 0.1, 0, [0.1, 0.9])]
    summary = summarize(runs, CHANCE, SAMPLES)
    assert speed(summary).headline == "cannot be said"
    assert "trains at none" in headline(summary, "net", "data")


def test_one_seed_is_never_called_certain() -> None:
    summary = summarize(sweep(seeds=1), CHANCE, SAMPLES)
    assert speed(summary).tone == accuracy(summary).tone == "neutral"
    assert "chance is not excluded" in speed(summary).text
    assert "steps" not in headline(summary, "net", "data")


def only(runs: list[Run], keep: int) -> Summary:
    return summarize(runs[: 2 * keep], CHANCE, SAMPLES)


def test_an_interrupted_later_seed_does_not_count() -> None:
    assert only(sweep(), 5).seeds == (0,)
    assert only(sweep(), 6).seeds == (0, 1)


def test_an_interrupted_first_seed_counts_with_its_finished_rates() -> None:
    summary = only(sweep(), 2)
    assert summary.seeds == (0,)
    assert [rate.lr for rate in summary.plain.rates] == [0.01, 0.1]


def test_a_training_without_its_partner_does_not_count() -> None:
    summary = summarize(sweep()[:3], CHANCE, SAMPLES)
    assert [rate.lr for rate in summary.plain.rates] == [0.01]
    with pytest.raises(ValueError, match="no pair"):
        summarize(sweep()[:1], CHANCE, SAMPLES)


def test_numbers_in_words() -> None:
    assert percent(0.93556) == "93.6 %"
    assert points(-0.0213) == "−2.1 points"
    assert points(t_interval([0.01, 0.03]).mean) == "+2.0 points"
