"""The watched trainings of a comparison: at which learning rate, and what is finished when it is stopped."""

from batchnorm.comparison.dynamics import Course, Dynamics, Watch, place_of, put_together
from batchnorm.comparison.pairs import copied, raised
from batchnorm.comparison.plan import Plan
from batchnorm.comparison.progress import Progress
from batchnorm.comparison.record import Batch
from batchnorm.comparison.told import train_told

__all__ = ["Watched"]


class Watched:
    """The watched trainings of all seeds; after an interruption those of the seeds that were finished.

    Args:
        plan: the comparison.
        lr: the learning rate of both networks.
        test: the test set.
    """

    def __init__(self, plan: Plan, lr: float, test: list[Batch]) -> None:
        self.why_not = ""
        self._plan, self._lr, self._test = plan, lr, test
        self._courses: list[Course] = []
        self._place = ""
        self._layers: tuple[str, ...] = ()

    def run(self, progress: Progress) -> None:
        """Train both networks of every seed once more and watch them."""
        for seed in range(self._plan.seeds):
            try:
                self._courses += self._seed(seed, progress)
            except Exception as error:
                # A model that can be trained but not looked into: the comparison stands, and says what kept it.
                self.why_not = raised(error)
                return

    def result(self) -> Dynamics | None:
        """What was seen; None before the first seed is finished."""
        if not self._courses:
            return None
        return put_together(self._lr, self._place, self._layers, self._courses)

    def _seed(self, seed: int, progress: Progress) -> list[Course]:
        plan, sample = self._plan, self._test[0][0]
        replay = plan.batches(seed)
        pair = plan.pair(seed, replay, self._test)
        places = place_of(copied(pair.normalized), pair.how, sample[:2])
        courses: list[Course] = []
        for normalized, model in ((False, pair.plain), (True, pair.normalized)):
            place = None if places is None else places[normalized]
            watch = Watch(place, sample, plan.task, self._lr, plan.steps, seed)
            run = train_told(
                plan, model, replay, self._test, normalized, self._lr, seed, progress, watch=watch
            )
            courses.append(watch.course(normalized, diverged=run.diverged))
        self._place = "" if places is None else places[True].words
        self._layers = tuple(group.name for group in watch.groups)
        return courses
