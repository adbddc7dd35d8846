"""The watched trainings of a comparison: at which learning rate, and what is finished when it is stopped."""

from collections.abc import Sequence

from torch import nn

from batchnorm.comparison.dynamics import Course, Dynamics, Watch, place_of, put_together
from batchnorm.comparison.pairs import Pair, copied, raised
from batchnorm.comparison.plan import Plan
from batchnorm.comparison.progress import Progress
from batchnorm.comparison.record import Batch, Replay
from batchnorm.comparison.summary import final_score
from batchnorm.comparison.training import Run, train

__all__ = ["Watched"]


class Watched:
    """The courses of the seeds finished so far; `why_not` says why there are none, or no further ones."""

    def __init__(self) -> None:
        self.courses: list[Course] = []
        self.why_not = ""
        self._lr: float | None = None
        self._place = ""
        self._layers: tuple[str, ...] = ()

    def add(
        self,
        plan: Plan,
        seed: int,
        pair: Pair,
        replay: Replay,
        test: list[Batch],
        runs: Sequence[Run],
        progress: Progress,
    ) -> None:
        """Train both networks of a seed once more and watch them."""
        if self.why_not:
            return
        self._lr = self._lr or _plain_best(runs)
        try:
            self.courses += self._watch(plan, seed, pair, replay, test, self._lr, progress)
        except Exception as error:
            # A model that can be trained but not looked into: the comparison stands, and says what kept it.
            self.why_not = raised(error)

    def result(self) -> Dynamics | None:
        """What was seen in the finished seeds."""
        if self._lr is None or not self.courses:
            return None
        return put_together(self._lr, self._place, self._layers, self.courses)

    def _watch(
        self,
        plan: Plan,
        seed: int,
        pair: Pair,
        replay: Replay,
        test: list[Batch],
        lr: float,
        progress: Progress,
    ) -> list[Course]:
        sample = test[0][0]
        places = place_of(copied(pair.normalized), pair.how, sample[:2])
        courses: list[Course] = []
        for normalized in (False, True):
            model = copied(pair.normalized if normalized else pair.plain)
            place = None if places is None else places[normalized]
            watch = Watch(place, sample, plan.task, lr, plan.steps, seed)
            _train(plan, model, replay, test, watch, normalized, lr, seed, progress)
            courses.append(watch.course(normalized))
        self._place = "" if places is None else places[True].words
        self._layers = tuple(group.name for group in watch.groups)
        return courses


def _train(
    plan: Plan,
    model: nn.Module,
    replay: Replay,
    test: list[Batch],
    watch: Watch,
    normalized: bool,
    lr: float,
    seed: int,
    progress: Progress,
) -> None:
    label = f"{'with' if normalized else 'without'} batch norm, watched"
    progress.run_started(label, normalized, lr, seed)
    run = train(
        model,
        replay,
        test,
        plan.task,
        normalized=normalized,
        lr=lr,
        seed=seed,
        every=plan.every,
        make_optimizer=plan.make_optimizer,
        progress=progress,
        watch=watch,
    )
    progress.run_finished(label, normalized, lr, seed, final_score(run, plan.guess(test)), run.diverged)


def _plain_best(runs: Sequence[Run]) -> float:
    """The rate at which the plain network scores best; one at which it diverges only where it does so at all."""
    plain = [run for run in runs if not run.normalized]
    return max(plain, key=lambda run: (not run.diverged, max(run.score))).lr
