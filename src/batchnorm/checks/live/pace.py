"""When to look: on round step numbers, and so rarely that looking takes a few percent of the training's time."""

import statistics
import time
from collections import deque

__all__ = ["SHARE", "Pace"]

# Of the training's time. What a look leaves in the caches is not measured and has to fit between this and the 5 % that
# are promised.
SHARE = 0.03
_HOOKS = 1e-5  # seconds a step: the two hooks between looks, measured on a model that does nothing
_LEAST = 0.005  # for looks, where steps are so short that hooks take the rest
_RECENT = 32  # steps whose median is the time of a step
_GLANCES = 8  # between two looks
_LOOKS = 5  # looks the least of which is the price of one
_FIRST = (
    2  # looks that import, compile and allocate: what they take above the price of one is not made up for
)
_SOON = 10  # steps at the end of which there is a look behind those, which shows the price


class Pace:
    """Counts steps, times them and the looks, and says which step is looked at.

    Without `every` the next look is at the first multiple of 1, 2, 5, 10, 20, 50, ... steps at which all looks together
    will have cost at most `SHARE` of the steps' time, the first two of them at the price of a usual one.
    """

    def __init__(self, every: int | None, start: int) -> None:
        self.every, self.start, self.step = every, start, start
        self.interval = every or 1
        self.next = start + 1 if every is None else (start // every + 1) * every
        self.spent = 0.0  # seconds of all looks
        self.time = 0.0  # seconds of all steps, without the looks
        self._begun: float | None = None
        self._spent_before = 0.0
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._prices: deque[float] = deque(maxlen=_LOOKS)
        self._first: list[float] = []  # prices of the first looks
        self._price = 0.0

    def begin(self) -> bool:
        """Another step begins; whether it is to be looked at."""
        now = time.perf_counter()
        if self._begun is not None:
            taken = max(0.0, now - self._begun - (self.spent - self._spent_before))
            self.time += taken
            self._steps.append(taken)
        self._begun, self._spent_before = now, self.spent
        self.step += 1
        return self.step >= self.next

    @property
    def glances(self) -> bool:
        """Whether the model's input of this step is taken down: that is cheap, and a comparison needs many batches."""
        return (self.step - self.start) % max(1, self.interval // _GLANCES) == 0

    def pay(self, since: float) -> None:
        """So much of a look has been done, from `since` until now."""
        taken = time.perf_counter() - since
        self.spent += taken
        self._price += taken

    def looked(self) -> None:
        """A look is over: plan the next."""
        self._prices.append(self._price)
        if len(self._first) < _FIRST:
            self._first.append(self._price)
        self._price = 0.0
        if self.every is None:
            self._plan()
        else:
            self.next = (self.step // self.every + 1) * self.every

    @property
    def overhead(self) -> float:
        """What looking and the hooks have cost so far, as a share of the time of the steps alone."""
        done = max(0, self.step - self.start - 1)
        return (self.spent + _HOOKS * done) / self.time if self.time > 0 else 0.0

    def _plan(self) -> None:
        # The first step is slow as the first look is.
        step = statistics.median_low(self._steps) if self._steps else 0.0
        price = min(self._prices)
        if step <= 0:
            self.next = self.step + 1
            return
        budget = max(_LEAST * step, SHARE * step - _HOOKS)  # of each step
        self.interval = _round_up(price / budget)
        warming = sum(max(0.0, first - price) for first in self._first)
        affordable = self.start + (self.spent - warming + price) / budget
        wanted = max(self.step + 1, affordable)
        self.next = -int(-wanted // self.interval) * self.interval
        if len(self._prices) <= _FIRST:
            self.next = min(self.next, max(self.step + 1, self.start + _SOON))


def _round_up(steps: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    unit = 1
    while True:
        for factor in (1, 2, 5):
            if factor * unit >= steps:
                return factor * unit
        unit *= 10
