"""The report of a comparison: what is said, in which order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from batchnorm.comparison.dynamics_report import training_section
from batchnorm.comparison.figures import batch_statistics, learning_rates, loss_curves, score_curves
from batchnorm.comparison.measures import Interval
from batchnorm.comparison.notes import CAUTION
from batchnorm.comparison.summary import Arm, Rate, Summary, Target
from batchnorm.comparison.verdicts import headline, verdicts
from batchnorm.comparison.wording import Words, average
from batchnorm.report.document import Block, Document, Paragraph, Section, Table

if TYPE_CHECKING:
    from batchnorm.comparison.result import Comparison

__all__ = ["tell"]

PRIMER = (
    "What batch norm does: in training it shifts and scales each channel of a layer so that over every batch its mean "
    "is 0 and its standard deviation 1; then a learned weight and bias per channel scale and shift it again. σ is a "
    "channel's standard deviation. A 95 % interval is what chance between seeds leaves open: made anew many times, 19 "
    "of 20 such intervals hold the true value. Where it holds 0 (for a ratio: 1), there may be no difference."
)


def tell(result: "Comparison") -> Document:
    """The document: verdicts, cautions and curves first, then rates, steps, batches, and how it was done."""
    summary, setup = result.summary, result.setup
    cautions = [note for note in result.notes if note.startswith(CAUTION)]
    method = [note for note in result.notes if not note.startswith(CAUTION)]
    first: list[Block] = [
        *verdicts(summary, result.footing),
        *(Paragraph(note) for note in cautions),
        score_curves(summary, result.runs),
        Paragraph(PRIMER, small=True),
    ]
    sections = [
        Section("What batch norm does to this network", first),
        Section("Learning rates", [learning_rates(summary), _rate_table(summary)]),
        Section(f"Steps to a given {summary.words.metric}", [_steps_table(summary), _step_cost(summary)]),
        Section(_titled(summary.words.metric), [_quality_table(summary)]),
    ]
    if result.footing is not None:
        sections.append(Section("Every batch on the same footing", [batch_statistics(result.footing)]))
    if result.dynamics is not None:
        sections.append(training_section(result.dynamics))
    sections.append(Section("Training loss", [loss_curves(summary, result.runs)], folded=True))
    sections.append(Section("How it was done", [Paragraph(note, small=True) for note in method]))
    return Document(
        title=f"{setup.model} on {setup.data}: with and without batch norm",
        verdict=headline(summary, setup.model, setup.data),
        sections=sections,
        facts=result.facts,
        incomplete=result.incomplete,
    )


def _titled(name: str) -> str:
    return name[0].upper() + name[1:]


def _rate_table(summary: Summary) -> Table:
    w = summary.words
    lines = zip(summary.normalized.rates, summary.plain.rates, summary.rate_differences, strict=True)
    return Table(
        columns=("learning rate", "with", "trains", "without", "trains", "paired difference"),
        rows=[
            [
                f"{with_.lr:g}",
                w.score(with_.final.mean),
                _trains(with_),
                w.score(without.final.mean),
                _trains(without),
                _difference(gap, w),
            ]
            for with_, without, gap in lines
        ],
        caption=(
            f"Final test {w.metric}, mean over seeds; the difference with its 95 % interval."
            if len(summary.seeds) > 1
            else f"Final test {w.metric}; one seed, hence no intervals."
        ),
        numeric=(0, 1, 3, 5),
    )


def _steps_table(summary: Summary) -> Table:
    return Table(
        columns=(
            "to reach",
            "with (steps)",
            "at rate",
            "without (steps)",
            "at rate",
            "ratio",
            "95 % interval",
        ),
        rows=[_target_row(target, summary.words) for target in summary.targets],
        caption=(
            "Shares of the best that each seed reaches without batch norm; steps averaged over seeds, "
            "each network at the learning rate that gets there soonest. "
            + (
                "The verdict rests on the 99 %."
                if summary.plain.trained_at
                else "Without batch norm the network trains nowhere here, so no verdict rests on them."
            )
        ),
        numeric=(1, 2, 3, 4, 5, 6),
    )


def _target_row(target: Target, w: Words) -> list[str]:
    goal = average(target.score)
    ratio, interval = "–", "–"
    if target.ratio is not None:
        ratio = f"{target.ratio.mean:.1f}×"
        if target.ratio.low is not None:
            interval = f"{target.ratio.low:.1f} to {target.ratio.high:.1f}"
    return [
        f"{w.score(goal)} ({100 * target.share:.0f} % of the best)",
        _steps(target.normalized_steps),
        f"{target.normalized_lr:g}",
        _steps(target.plain_steps),
        f"{target.plain_lr:g}",
        ratio,
        interval,
    ]


def _step_cost(summary: Summary) -> Paragraph:
    plain, normalized = summary.seconds_per_step
    return Paragraph(
        f"A training step took {_duration(normalized)} with batch norm and {_duration(plain)} without (median over "
        "trainings, on this machine), so fewer steps are not the same factor in time.",
        small=True,
    )


def _quality_table(summary: Summary) -> Table:
    w = summary.words

    def row(name: str, with_: Interval, without: Interval, difference: Interval) -> list[str]:
        return [name, w.interval(with_), w.interval(without), _difference(difference, w)]

    with_, without = (_at_best(arm.rates, arm.best_lr) for arm in (summary.normalized, summary.plain))
    return Table(
        columns=(
            "at the best learning rate",
            f"with, rate {with_.lr:g}",
            f"without, rate {without.lr:g}",
            "paired difference",
        ),
        rows=[
            row(f"best test {w.metric}", with_.best, without.best, summary.best_difference),
            row(f"final test {w.metric}", with_.final, without.final, summary.final_difference),
            _loss_row(summary.normalized, summary.plain),
        ],
        caption=(
            f"Means of {len(summary.seeds)} seeds with 95 % intervals; the training loss, {w.loss}, is a plain mean."
            if len(summary.seeds) > 1
            else f"One seed, hence no intervals. The training loss is {w.loss}."
        ),
        numeric=(1, 2, 3),
    )


def _loss_row(with_: Arm, without: Arm) -> list[str]:
    """The training loss over the last steps: a network may fit its training data better and not know more."""
    values = [None if None in arm.final_loss else average(arm.final_loss) for arm in (with_, without)]
    cells = ["diverged" if value is None else f"{value:.2g}" for value in values]
    gap = "–" if None in values else f"{average(values[:1]) - average(values[1:]):+.2g}".replace("-", "−")
    return ["training loss at the end", *cells, gap]


def _at_best(rates: Sequence[Rate], lr: float) -> Rate:
    return next(rate for rate in rates if rate.lr == lr)


def _trains(rate: Rate) -> str:
    if rate.diverged:
        return f"no, {rate.diverged} of {rate.final.n} diverged" if not rate.trains else "yes"
    return "yes" if rate.trains else "no"


def _difference(value: Interval, w: Words) -> str:
    if value.low is None or value.high is None:
        return w.difference(value.mean)
    seen = "" if value.excludes(0) else ": no difference seen"
    return f"{w.difference(value.mean)} ({w.span(value)}){seen}"


def _steps(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    mean = f"{sum(known) / len(known):.0f}"
    return mean if len(known) == len(values) else f"{mean} ({len(known)} of {len(values)} seeds)"


def _duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
