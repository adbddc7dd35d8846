"""From the finished trainings to the numbers that are judged."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from batchnorm.comparison.measures import (
    Interval,
    first_reach,
    ratio_interval,
    t_interval,
    training_bar,
    trains,
)
from batchnorm.comparison.tasks import task_named
from batchnorm.comparison.training import Run
from batchnorm.comparison.wording import Words, words

__all__ = ["JUDGED", "TARGETS", "Arm", "Rate", "Summary", "Target", "final_score", "summarize"]

# Shares of the plain network's best score. The whole of it is its luckiest evaluation: an equal network mostly
# misses it with some seed, and where it does not, it seems 1.4 times as fast. 99 % of it is judged: there the ratio of
# equal networks is 1.05 to 1.15, and of comparisons with three seeds 4 % are called a difference.
TARGETS = (0.9, 0.95, 0.99, 1.0)
JUDGED = 0.99

Edge = Literal["lowest", "highest", "only"]


@dataclass(frozen=True)
class Rate:
    """One network at one learning rate, over the seeds."""

    lr: float
    best: Interval
    final: Interval
    diverged: int
    trains: bool


@dataclass(frozen=True)
class Arm:
    """One of the two networks over the whole sweep.

    Args:
        rates: every learning rate, rising.
        best_lr: the rate with the highest mean best test score; of equals the one with the higher final one.
        edge: "lowest" or "highest" when `best_lr` is that rate of the sweep, so that a better one may lie outside;
            "only" when there is no other; None when it lies inside.
        best: best test score of each seed at `best_lr`.
        final: final test score of each seed at `best_lr`.
        final_loss: training loss of each seed at the end, at `best_lr`; None where it diverged.
        improving: at `best_lr` every seed's training loss still fell by more than 0.5 % in the last tenth of the steps.
        bar: the final score that every seed must reach for a rate to count as trained; the same for both networks.
        samples: how many test samples its scores rest on.
    """

    rates: tuple[Rate, ...]
    best_lr: float
    edge: Edge | None
    best: tuple[float, ...]
    final: tuple[float, ...]
    final_loss: tuple[float | None, ...]
    improving: bool
    bar: float
    samples: int

    @property
    def trained_at(self) -> tuple[float, ...]:
        """The learning rates at which every seed trains."""
        return tuple(rate.lr for rate in self.rates if rate.trains)


@dataclass(frozen=True)
class Target:
    """Steps until a share of the plain network's best score is reached, each network at its own fastest rate.

    Args:
        share: the share of the plain network's best score.
        score: the score to reach, for each seed.
        plain_lr: the rate at which the plain network gets there soonest.
        plain_steps: its steps, for each seed.
        normalized_lr: the rate at which the one with batch norm does.
        normalized_steps: its steps, None where it never gets there.
        ratio: plain steps over steps with batch norm, geometric mean over seeds; None unless every seed gets there.
    """

    share: float
    score: tuple[float, ...]
    plain_lr: float
    plain_steps: tuple[int | None, ...]
    normalized_lr: float
    normalized_steps: tuple[int | None, ...]
    ratio: Interval | None


@dataclass(frozen=True)
class Summary:
    """Everything that the verdicts rest on, from the seeds whose trainings are all finished.

    Differences are paired by seed, with batch norm minus without, in scores from 0 to 1.

    Args:
        seeds: the seeds that count.
        task: "classification" or "regression".
        chance: the score of guessing.
        plain: the network without batch norm.
        normalized: the network with it.
        rate_differences: difference of the final scores at each rate of the sweep.
        best_difference: of the best scores, each network at its best rate.
        final_difference: of the final scores, each network at its best rate.
        targets: steps to shares of the plain network's best score, the whole of it last.
        seconds_per_step: median time of a training step, without and with batch norm.
    """

    seeds: tuple[int, ...]
    task: str
    chance: float
    plain: Arm
    normalized: Arm
    rate_differences: tuple[Interval, ...]
    best_difference: Interval
    final_difference: Interval
    targets: tuple[Target, ...]
    seconds_per_step: tuple[float, float] = field(compare=False)

    @property
    def judged(self) -> Target:
        """The target that verdicts rest on: 99 % of the plain network's best."""
        return next(target for target in self.targets if target.share == JUDGED)

    @property
    def words(self) -> Words:
        """How the scores are spoken of."""
        return words(self.task)

    @property
    def bar(self) -> float:
        """The final score that every seed must reach for a network to count as trained."""
        return self.plain.bar

    @property
    def samples(self) -> int:
        """How many test samples the scores rest on."""
        return self.plain.samples

    @property
    def one_seed(self) -> bool:
        """Whether nothing can be told from chance."""
        return len(self.seeds) == 1


Grid = dict[tuple[bool, float, int], Run]


class _Scale(NamedTuple):
    """What scores are judged by: guessing, the best seen, what is clearly above guessing, and the test samples."""

    chance: float
    top: float
    clear: float
    samples: int


def final_score(run: Run, chance: float) -> float:
    """The score at the end; a diverged network is as good as guessing."""
    return chance if run.diverged else run.score[-1]


def summarize(runs: Sequence[Run], task: str, chance: float, samples: int) -> Summary:
    """Summarize finished pairs.

    Seeds count that have a pair at every rate; when the very first seed was cut short, its finished rates count.

    Args:
        runs: trainings; those without their partner are left out.
        task: what was learned.
        chance: the score of guessing, 0 to 1.
        samples: how many test samples the scores rest on.

    Raises:
        ValueError: there is no finished pair.
    """
    grid: Grid = {(run.normalized, run.lr, run.seed): run for run in runs}
    pairs = [(lr, seed) for normalized, lr, seed in grid if normalized and (False, lr, seed) in grid]
    if not pairs:
        raise ValueError("no pair of trainings is finished")
    lrs = sorted({lr for lr, _ in pairs})
    seeds = tuple(s for s in dict.fromkeys(seed for _, seed in pairs) if all((lr, s) in pairs for lr in lrs))
    if not seeds:
        raise ValueError("no seed has a finished pair at every rate")
    top = max(max(run.score) for run in grid.values() if run.seed in seeds)
    clear = task_named(task).clear(chance, samples)
    scale = _Scale(chance, top, clear, samples)
    plain, normalized = (_arm(grid, side, lrs, seeds, scale) for side in (False, True))
    return Summary(
        seeds=seeds,
        task=task,
        chance=chance,
        plain=plain,
        normalized=normalized,
        rate_differences=tuple(
            _difference(_finals(grid, True, lr, seeds, chance), _finals(grid, False, lr, seeds, chance))
            for lr in lrs
        ),
        best_difference=_difference(normalized.best, plain.best),
        final_difference=_difference(normalized.final, plain.final),
        targets=tuple(_target(grid, lrs, seeds, plain.best, share) for share in TARGETS),
        seconds_per_step=(_seconds(grid, False), _seconds(grid, True)),
    )


def _arm(grid: Grid, normalized: bool, lrs: list[float], seeds: tuple[int, ...], scale: _Scale) -> Arm:
    chance, top, clear, samples = scale
    rates = []
    for lr in lrs:
        runs = [grid[normalized, lr, seed] for seed in seeds]
        finals = _finals(grid, normalized, lr, seeds, chance)
        rates.append(
            Rate(
                lr,
                t_interval([max(run.score) for run in runs]).clipped(0, 1),
                t_interval(finals).clipped(0, 1),
                sum(run.diverged for run in runs),
                trains([None if run.diverged else run.score[-1] for run in runs], chance, top, clear),
            )
        )
    best = max(rates, key=lambda rate: (rate.best.mean, rate.final.mean))
    ends: dict[int, Edge] = {0: "lowest", len(rates) - 1: "highest"} if len(rates) > 1 else {0: "only"}
    runs = [grid[normalized, best.lr, seed] for seed in seeds]
    return Arm(
        tuple(rates),
        best.lr,
        ends.get(rates.index(best)),
        tuple(max(run.score) for run in runs),
        tuple(_finals(grid, normalized, best.lr, seeds, chance)),
        tuple(None if run.diverged else run.loss[-1] for run in runs),
        all(_improving(run) for run in runs),
        training_bar(chance, top, clear),
        samples,
    )


def _improving(run: Run) -> bool:
    """Whether the training loss of the last tenth of the steps is more than 0.5 % below that of the tenth before."""
    end = run.steps[-1]
    points = list(zip(run.steps, run.loss, strict=True))[1:]
    if run.diverged or len(points) < 2:
        return False
    late = [loss for step, loss in points if step > 0.9 * end]
    before = [loss for step, loss in points if 0.8 * end < step <= 0.9 * end] or [points[-2][1]]
    return sum(late) / len(late) < 0.995 * sum(before) / len(before)


def _finals(grid: Grid, normalized: bool, lr: float, seeds: tuple[int, ...], chance: float) -> list[float]:
    return [final_score(grid[normalized, lr, seed], chance) for seed in seeds]


def _difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    return t_interval([a - b for a, b in zip(first, second, strict=True)]).clipped(-1, 1)


def _target(
    grid: Grid, lrs: list[float], seeds: tuple[int, ...], best: tuple[float, ...], share: float
) -> Target:
    goals = tuple(share * value for value in best)
    plain_lr, plain_steps = _fastest(grid, False, lrs, seeds, goals)
    normalized_lr, normalized_steps = _fastest(grid, True, lrs, seeds, goals)
    # A goal that is met before the first step (a network that never learns) has no ratio either.
    reached = [(a, b) for a, b in zip(plain_steps, normalized_steps, strict=True) if a and b]
    complete = len(reached) == len(seeds)
    ratio = ratio_interval([a for a, _ in reached], [b for _, b in reached]) if complete else None
    return Target(share, goals, plain_lr, plain_steps, normalized_lr, normalized_steps, ratio)


def _fastest(
    grid: Grid, normalized: bool, lrs: list[float], seeds: tuple[int, ...], goals: tuple[float, ...]
) -> tuple[float, tuple[int | None, ...]]:
    """The rate at which most seeds reach their goal, and of these the one with the fewest steps on average."""

    def steps_at(lr: float) -> tuple[int | None, ...]:
        runs = [grid[normalized, lr, seed] for seed in seeds]
        return tuple(first_reach(run.steps, run.score, goal) for run, goal in zip(runs, goals, strict=True))

    def slowness(lr: float) -> tuple[int, float]:
        reached = [steps for steps in steps_at(lr) if steps is not None]
        return -len(reached), sum(reached) / max(len(reached), 1)

    lr = min(lrs, key=slowness)
    return lr, steps_at(lr)


def _seconds(grid: Grid, normalized: bool) -> float:
    """Seconds a training step takes: the median over trainings."""
    times = sorted(run.seconds / run.trained_steps for run in grid.values() if run.normalized == normalized)
    return times[len(times) // 2]
