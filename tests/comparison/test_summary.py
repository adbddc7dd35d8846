"""Selection and judgement on invented curves, where the right answer is known."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from batchnorm.comparison.measures import Interval, t_interval
from batchnorm.comparison.story import _steps_table
from batchnorm.comparison.summary import Summary, summarize
from batchnorm.comparison.training import Run
from batchnorm.comparison.verdicts import headline, quality, rates, speed, verdicts
from batchnorm.comparison.wording import factor, factors, listed, words
from batchnorm.report.html import first_sentence

CHANCE, SAMPLES = 0.1, 450


def run(
    normalized: bool,
    lr: float,
    seed: int,
    curve: Sequence[float],
    diverged: bool = False,
    loss: Sequence[float] = (),
) -> Run:
    steps = tuple(10 * i for i in range(len(curve)))
    loss = (math.nan, *(loss or (1.0 for _ in curve[1:])))
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
    summary = summarize(sweep(), "classification", CHANCE, SAMPLES)
    assert (summary.plain.best_lr, summary.normalized.best_lr) == (0.1, 1.0)
    assert (summary.plain.edge, summary.normalized.edge) == (None, "highest")
    assert summary.plain.best == pytest.approx((0.80, 0.81))
    assert summary.normalized.best == pytest.approx((0.90, 0.91))
    assert summary.normalized.final == pytest.approx((0.88, 0.89))
    assert summary.best_difference.mean == pytest.approx(0.1)
    assert summary.final_difference.mean == pytest.approx(0.08)


def test_steps_and_ratio_to_the_plain_networks_best() -> None:
    target = summarize(sweep(), "classification", CHANCE, SAMPLES).targets[-1]
    assert target.score == pytest.approx((0.80, 0.81))
    assert (target.plain_lr, target.plain_steps) == (0.1, (40, 40))
    assert (target.normalized_lr, target.normalized_steps) == (1.0, (10, 10))
    assert target.ratio is not None
    assert target.ratio.mean == pytest.approx(4.0)


def test_lower_targets_have_their_own_fastest_rates() -> None:
    first = summarize(sweep(), "classification", CHANCE, SAMPLES).targets[0]
    assert first.share == 0.9
    assert first.plain_steps == (40, 40)  # 0.72 lies above the 0.7 of step 30
    assert first.normalized_steps == (10, 10)


def test_rates_that_train_and_diverged_runs_that_count_as_guessing() -> None:
    summary = summarize(sweep(), "classification", CHANCE, SAMPLES)
    # halfway from 0.1 to 0.91 is 0.505
    assert summary.plain.trained_at == (0.1,)
    assert summary.normalized.trained_at == (0.1, 1.0)
    assert summary.plain.rates[2].diverged == 2
    assert summary.plain.rates[2].final.mean == pytest.approx(CHANCE)
    assert rates(summary).headline == "2 of 3, not 1"


def test_a_rate_at_which_batch_norm_ends_lower_is_named() -> None:
    assert (
        "At 0.01 the network without batch norm ends higher."
        in rates(summarize(sweep(), "classification", CHANCE, SAMPLES)).text
    )


def missing(with_: Sequence[float]) -> Summary:
    """The plain network peaks at 0.9 with every seed, the one with batch norm at `with_`."""
    runs = [
        item
        for seed, best in enumerate(with_)
        for item in (run(False, 0.1, seed, [0.1, 0.5, 0.9]), run(True, 0.1, seed, [0.1, 0.6, best]))
    ]
    return summarize(runs, "classification", CHANCE, SAMPLES)


def test_a_goal_that_one_seed_misses_is_no_finding() -> None:
    summary = missing([0.8, 0.9])
    assert summary.judged.normalized_steps == (None, 20)
    assert summary.judged.ratio is None
    verdict = speed(summary)
    assert (verdict.headline, verdict.tone) == ("not reached by every seed", "neutral")
    assert verdict.text.startswith(
        "89.1 %, 99 % of the plain network's best, is reached with batch norm in 1 of 2"
    )
    assert "no difference seen" in verdict.text
    assert summary.plain.edge == "only"


def test_a_goal_is_missed_only_if_the_best_accuracy_is_lower_by_more_than_chance() -> None:
    summary = missing([0.70, 0.71, 0.72])
    verdict = speed(summary)
    assert (verdict.headline, verdict.tone) == ("not reached", "bad")
    text = headline(summary, "net", "data")
    assert "does not reach 99 % of the plain network's best test accuracy" in text
    assert "peaks 19.0 points lower (−21.5 to −16.5)" in text
    lone = speed(missing([0.7]))
    assert (lone.headline, lone.tone) == ("not reached", "neutral")
    assert "chance is not excluded" in lone.text


def test_one_lucky_evaluation_of_the_plain_network_is_no_finding() -> None:
    """Equal networks: the plain one once touches 0.906 late, the other stays at 0.9, as fast as the plain one."""
    runs = [
        item
        for seed, lucky in enumerate((4, 5, 4))
        for item in (
            run(False, 0.1, seed, [0.1, 0.5, 0.9, 0.9, *(0.906 if at == lucky else 0.9 for at in (4, 5, 6))]),
            run(True, 0.1, seed, [0.1, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9 + 0.004 * (seed == 1)]),
        )
    ]
    summary = summarize(runs, "classification", CHANCE, SAMPLES)
    assert summary.targets[-1].ratio is None
    verdict = speed(summary)
    assert (verdict.headline, verdict.tone) == ("no difference seen", "neutral")
    assert "with batch norm 0 of 3 seeds reach it" in verdict.text


def test_both_targets_are_told_and_the_99_percent_are_judged() -> None:
    runs = [
        item
        for seed in range(3)
        for item in (
            run(False, 0.1, seed, [0.1, 0.3, 0.5, 0.7, 0.798, 0.798, 0.798, 0.8]),
            run(True, 0.1, seed, [0.1, 0.6, 0.794, 0.8, 0.8, 0.8, 0.8, 0.8]),
        )
    ]
    summary = summarize(runs, "classification", CHANCE, SAMPLES)
    assert (summary.judged.share, summary.targets[-1].share) == (0.99, 1.0)
    verdict = speed(summary)
    assert (verdict.headline, verdict.tone) == ("2.0× fewer steps", "good")
    assert first_sentence(verdict.text)[0] == (
        "20 steps instead of 40 to 79.2 %, 99 % of the plain network's best; 95 % interval 2.0× to 2.0×."
    )
    assert "it takes 30 steps instead of 70, a ratio of 2.3 (2.3 to 2.3)" in verdict.text
    assert headline(summary, "net", "data") == (
        "With batch norm, net on data needs 2.0× fewer steps (2.0× to 2.0×) to 99 % of the plain network's best test "
        "accuracy."
    )


def equal_networks(number: int) -> Summary:
    """Two networks that differ by chance alone, three seeds, one learning rate."""
    generator = np.random.default_rng(number)
    rise = 1 - np.exp(-np.arange(41) / 6)
    runs = [
        run(
            normalized,
            0.1,
            seed,
            np.clip(0.1 + (0.8 + 0.01 * generator.normal()) * rise + noise, 0, 1).tolist(),
        )
        for seed in range(3)
        for normalized in (False, True)
        for noise in [0.01 * generator.normal(size=41)]
    ]
    return summarize(runs, "classification", CHANCE, SAMPLES)


def test_equal_networks_are_judged_neutral() -> None:
    summaries = [equal_networks(number) for number in range(60)]
    # 95 % intervals: 3 of 60 are expected to miss; more than 8 would come once in 200 times.
    for judge in (speed, quality, rates):
        coloured = sum(judge(summary).tone != "neutral" for summary in summaries)
        assert coloured <= 8, judge
    claimed = sum("no difference" not in headline(item, "net", "data") for item in summaries)
    assert claimed <= 16
    # The whole of the plain network's best would have been missed in most of them.
    assert sum(item.targets[-1].ratio is None for item in summaries) > 30


def test_a_difference_smaller_than_its_noise_is_no_difference() -> None:
    runs = [
        item
        for seed, (without, with_) in enumerate([(0.8, 0.85), (0.85, 0.8), (0.82, 0.83)])
        for item in (run(False, 0.1, seed, [0.1, without]), run(True, 0.1, seed, [0.1, with_]))
    ]
    summary = summarize(runs, "classification", CHANCE, SAMPLES)
    assert quality(summary).headline == "no difference seen"
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
    verdict = speed(summarize(runs, "classification", CHANCE, SAMPLES))
    assert (verdict.headline, verdict.tone) == ("3.0× more steps", "bad")


def test_a_plain_network_that_never_trains_gives_no_factor() -> None:
    runs = [
        item
        for seed in range(3)
        for item in (run(False, 0.1, seed, [0.1, 0.1, 0.11]), run(True, 0.1, seed, [0.1, 0.85, 0.9]))
    ]
    summary = summarize(runs, "classification", CHANCE, SAMPLES)
    assert (speed(summary).headline, speed(summary).tone) == ("cannot be said", "neutral")
    assert "the initialization; the learning rates tried" in speed(summary).text
    text = headline(summary, "net", "data")
    assert "trains at 1 of 1 learning rates instead of none" in text
    assert "steps" not in text


def test_one_seed_is_never_called_certain() -> None:
    summary = summarize(sweep(seeds=1), "classification", CHANCE, SAMPLES)
    for verdict in (speed(summary), quality(summary), rates(summary)):
        assert verdict.tone == "neutral"
        assert verdict.headline.startswith("one seed: ")
        assert "chance is not excluded" in verdict.text
    assert headline(summary, "net", "data") == (
        "One seed cannot tell a difference from chance; in it net on data reaches a test accuracy of 90.0 % with "
        "batch norm, 80.0 % without."
    )


def test_a_large_difference_within_a_wide_interval_is_undecided() -> None:
    runs = [
        item
        for seed, (without, with_) in enumerate([(0.5, 0.9), (0.9, 0.85), (0.4, 0.86)])
        for item in (run(False, 0.1, seed, [0.1, without]), run(True, 0.1, seed, [0.1, with_]))
    ]
    summary = summarize(runs, "classification", CHANCE, SAMPLES)
    verdict = quality(summary)
    assert (verdict.headline, verdict.tone) == ("too few seeds to tell", "neutral")
    # differences 0.4, −0.05 and 0.46: mean 0.27, s = 0.279, half width 4.303·s/√3 = 0.692
    assert "no difference seen: the interval −42.2 to +96.2 is too wide" in verdict.text
    assert "too few seeds to tell" in headline(summary, "net", "data")


def test_a_rate_is_claimed_only_where_the_accuracies_differ_by_more_than_chance() -> None:
    """At 0.1 the plain network fails with one seed of three: the interval of the difference holds 0."""
    runs = [
        item
        for seed in range(3)
        for item in (
            run(False, 0.1, seed, [0.1, 0.9, 0.2 if seed == 0 else 0.9]),
            run(True, 0.1, seed, [0.1, 0.9, 0.9]),
        )
    ]
    summary = summarize(runs, "classification", CHANCE, SAMPLES)
    assert (summary.plain.trained_at, summary.normalized.trained_at) == ((), (0.1,))
    assert (rates(summary).headline, rates(summary).tone) == ("no difference seen", "neutral")
    assert "learning rates" not in headline(summary, "net", "data")


def test_the_headline_names_losses_beside_gains() -> None:
    runs = [
        item
        for seed in range(3)
        for item in (
            run(False, 0.01, seed, [0.1, 0.4, 0.7]),
            run(True, 0.01, seed, [0.1, 0.15, 0.2 + 0.01 * seed]),
            run(False, 0.1, seed, [0.1, 0.8, 0.8]),
            run(True, 0.1, seed, [0.1, 0.8, 0.75 + 0.01 * seed]),
            run(False, 1.0, seed, [0.1], diverged=True),
            run(True, 1.0, seed, [0.1, 0.9, 0.89]),
        )
    ]
    summary = summarize(runs, "classification", CHANCE, SAMPLES)
    text = headline(summary, "net", "data")
    assert "peaks 10.0 points higher (+10.0 to +10.0) and trains at 1 more of 3 learning rates." in text
    # 0.76 − 0.8 ± 4.303·0.01/√3
    assert text.endswith(
        " But it does not train at the learning rate 0.01 unlike the plain network and ends lower than the plain "
        "network at the learning rate 0.1 (−6.5 to −1.5 points)."
    )
    assert (rates(summary).headline, rates(summary).tone) == ("1 more and 1 fewer of 3", "neutral")


def test_a_rate_at_which_neither_trains_is_no_loss() -> None:
    summary = summarize(sweep(seeds=3), "classification", CHANCE, SAMPLES)
    assert summary.rate_differences[0].excludes(0)
    assert " But it " not in headline(summary, "net", "data")


def never(chance: float, samples: int, plain: Sequence[float], loss: Sequence[float] = ()) -> Summary:
    runs = [run(normalized, 0.1, seed, plain, loss=loss) for seed in range(3) for normalized in (False, True)]
    return summarize(runs, "classification", chance, samples)


def test_a_small_imbalanced_test_set_is_named_as_a_reason() -> None:
    text = headline(never(0.945, 200, [0.945, 0.95, 0.96]), "net", "data")
    # 0.945 + 2·√(0.945·0.055/200) = 0.977
    assert "neither network ended clearly above guessing (97.7 %) with every seed" in text
    assert "on 200 samples less than 97.7 % is not clearly above guessing (94.5 %)" in text
    assert "still falling" not in text


def test_a_network_that_still_improves_may_need_more_steps() -> None:
    falling = [2.3 - 0.01 * i for i in range(1, 21)]
    slow = never(0.1, 450, [0.1] * 20 + [0.12], falling)
    assert slow.plain.improving
    assert "too few steps, as the training loss was still falling" in speed(slow).text
    flat = never(0.1, 450, [0.1] * 20 + [0.12], [2.3] * 20)
    assert not flat.plain.improving
    assert "still falling" not in speed(flat).text


def test_a_diverged_run_never_trains() -> None:
    runs = [
        run(normalized, 0.1, seed, [1.0], diverged=True) for seed in range(2) for normalized in (False, True)
    ]
    summary = summarize(runs, "classification", 1.0, 10)
    assert summary.plain.trained_at == ()
    assert summary.plain.final_loss == (None, None)
    assert "Every training diverged" in headline(summary, "net", "data")


def test_a_far_lower_training_loss_of_the_plain_network_is_said() -> None:
    runs = [
        run(normalized, 0.1, seed, [0.1, 0.9, 0.9], loss=[1.0, 0.04 if normalized else 0.0005])
        for seed in range(2)
        for normalized in (False, True)
    ]
    text = quality(summarize(runs, "classification", CHANCE, SAMPLES)).text
    assert "Training loss at the end: 0.04 with batch norm, 0.0005 without." in text


def test_no_interval_passes_what_is_possible() -> None:
    runs = [
        item
        for seed, (without, with_) in enumerate([(0.1, 1.0), (0.95, 1.0), (0.2, 0.9)])
        for item in (run(False, 0.1, seed, [0.1, without]), run(True, 0.1, seed, [0.1, with_]))
    ]
    summary = summarize(runs, "classification", CHANCE, SAMPLES)
    assert (summary.plain.rates[0].final.low, summary.plain.rates[0].final.high) == (0, 1)
    assert summary.normalized.rates[0].best.high == 1
    assert summary.best_difference.high == 1


def test_cards_show_their_interval_without_unfolding() -> None:
    summary = summarize(sweep(seeds=3), "classification", CHANCE, SAMPLES)
    shown = [first_sentence(verdict.text)[0] for verdict in verdicts(summary, None)]
    assert all(0 < len(text) < 150 for text in shown)
    assert "95 % interval" in shown[0]
    assert "without 81.0 % (+10.0 to +10.0); at the end" in shown[1]
    assert "more than chance (95 %) at 1" in shown[2]


def only(runs: list[Run], keep: int) -> Summary:
    return summarize(runs[: 2 * keep], "classification", CHANCE, SAMPLES)


def test_an_interrupted_later_seed_does_not_count() -> None:
    assert only(sweep(), 5).seeds == (0,)
    assert only(sweep(), 6).seeds == (0, 1)


def test_an_interrupted_first_seed_counts_with_its_finished_rates() -> None:
    summary = only(sweep(), 2)
    assert summary.seeds == (0,)
    assert [rate.lr for rate in summary.plain.rates] == [0.01, 0.1]


def test_a_training_without_its_partner_does_not_count() -> None:
    summary = summarize(sweep()[:3], "classification", CHANCE, SAMPLES)
    assert [rate.lr for rate in summary.plain.rates] == [0.01]
    with pytest.raises(ValueError, match="no pair"):
        summarize(sweep()[:1], "classification", CHANCE, SAMPLES)


def test_numbers_in_words() -> None:
    assert words("classification").score(0.93556) == "93.6 %"
    assert words("classification").difference(-0.0213) == "−2.1 points"
    assert words("classification").difference(t_interval([0.01, 0.03]).mean) == "+2.0 points"
    assert factor(Interval(0.5, 0.25, 0.8, 3)) == "2.0× more steps"
    assert factors(Interval(0.5, 0.25, 0.8, 3)) == "1.2× to 4.0×"
    assert listed([0.1, 0.3, 1.0, 10.0], [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]) == "0.1 to 1 and 10"


def test_the_steps_table_claims_no_verdict_where_the_plain_network_never_trains() -> None:
    captions = [
        _steps_table(summarize(runs, "classification", CHANCE, SAMPLES)).caption
        for runs in (sweep(), [run(False, 0.1, 0, [0.1, 0.1]), run(True, 0.1, 0, [0.1, 0.9])])
    ]
    assert ["verdict rests on the 99 %" in caption for caption in captions] == [True, False]
