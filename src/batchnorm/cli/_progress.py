"""The progress of a comparison: a live display in a terminal, plain lines in a log."""

import math
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from batchnorm.cli._display import ConsoleDisplay, TimeLeft
from batchnorm.comparison.wording import words
from batchnorm.report.terminal import sparkline

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "display"]

_CURVE = 28
_STYLES = {True: "blue", False: "dark_orange"}
_NAMES = {True: "with batch norm", False: "without batch norm"}


def display(console: Console) -> "Display":
    """Return the display that suits the console."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class Display(ConsoleDisplay):
    """The progress of a comparison, counted."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.runs = 0
        self.words = words("classification")

    def start(self, total_runs: int, describe: str, task: str) -> None:
        """Take note of how many trainings follow."""
        self.runs = total_runs
        self.words = words(task)

    def run_started(self, label: str, normalized: bool, lr: float, seed: int) -> None:
        """Take note of a training that begins."""

    def step(self, step: int, steps: int, loss: float, score: float | None) -> None:
        """Take note of a training's progress."""

    def run_finished(
        self, label: str, normalized: bool, lr: float, seed: int, final_score: float, diverged: bool
    ) -> None:
        """Take note of a training that has ended."""
        self.done += 1


class PlainDisplay(Display):
    """One line for each finished training."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.heading = ""

    def start(self, total_runs: int, describe: str, task: str) -> None:
        """Take note of what is going to happen."""
        super().start(total_runs, describe, task)
        self.heading = f"{describe}: {total_runs} trainings"

    def run_started(self, label: str, normalized: bool, lr: float, seed: int) -> None:
        """Print what is happening, once: not before the first training, as building the model may fail."""
        if self.heading:
            self._print(self.heading)
            self.heading = ""

    def run_finished(
        self, label: str, normalized: bool, lr: float, seed: int, final_score: float, diverged: bool
    ) -> None:
        """Print how a training ended."""
        super().run_finished(label, normalized, lr, seed, final_score, diverged)
        outcome = "diverged" if diverged else f"test {self.words.metric} {self.words.score(final_score)}"
        self._print(f"[{self.done}/{self.runs}] {label}, learning rate {lr:g}, seed {seed}: {outcome}")


class LiveDisplay(Display):
    """A bar over all trainings with the time left, and the losses of the current pair as they fall."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.describe = ""
        self.pair: tuple[float, int] | None = None
        self.normalized = True
        self.curves: dict[bool, list[float]] = {True: [], False: []}
        self.scores: dict[bool, float | None] = {True: None, False: None}
        self.bars = Bars(
            BarColumn(bar_width=None), _Runs(), _Elapsed(), TimeLeft(), console=console, expand=True
        )
        self.task = self.bars.add_task("runs", total=1.0)
        self.live = Live(console=console, get_renderable=self._draw, refresh_per_second=8, transient=True)

    def start(self, total_runs: int, describe: str, task: str) -> None:
        """Show the display."""
        super().start(total_runs, describe, task)
        self.describe = describe
        self.bars.reset(self.task, total=float(total_runs))
        with suppress(OSError):
            self.live.start()

    def run_started(self, label: str, normalized: bool, lr: float, seed: int) -> None:
        """Show another training; a new pair clears the curves."""
        if self.pair != (lr, seed):
            self.pair = (lr, seed)
            self.curves = {True: [], False: []}
            self.scores = {True: None, False: None}
        self.normalized = normalized

    def step(self, step: int, steps: int, loss: float, score: float | None) -> None:
        """Move the bar and extend the curve."""
        self.curves[self.normalized].append(loss)
        if score is not None:
            self.scores[self.normalized] = score
        self.bars.update(self.task, completed=self.done + step / max(steps, 1))

    def run_finished(
        self, label: str, normalized: bool, lr: float, seed: int, final_score: float, diverged: bool
    ) -> None:
        """Move the bar to the end of the training."""
        super().run_finished(label, normalized, lr, seed, final_score, diverged)
        self.scores[normalized] = final_score
        self.bars.update(self.task, completed=float(self.done))

    def finish(self) -> None:
        """Take the display away."""
        with suppress(OSError):
            self.live.stop()

    def _draw(self) -> RenderableType:
        title = Text(self.describe, style="bold")
        if self.pair is not None:
            lr, seed = self.pair
            title.append(f"   learning rate {lr:g}, seed {seed}", style="not bold dim")
        title.no_wrap, title.overflow = True, "ellipsis"
        # A diverging loss would flatten the other curve, so it may leave the scale.
        tops = [max(known) for curve in self.curves.values() if (known := _finite(curve))]
        low, high = 0.0, min(max(tops), 2 * min(tops)) if tops else 1.0
        grid = Table.grid(padding=(0, 2))
        for _ in range(4):
            grid.add_column(no_wrap=True)
        for normalized in (True, False):
            curve, score = self.curves[normalized], self.scores[normalized]
            grid.add_row(
                Text(_NAMES[normalized], style=_STYLES[normalized]),
                Text(f"loss {curve[-1]:.3g}" if curve else "loss -"),
                Text(sparkline(curve, low, high, _CURVE).ljust(_CURVE), style=_STYLES[normalized]),
                Text("" if score is None else f"test {self.words.score(score)}"),
            )
        return Group(title, self.bars, grid)


def _finite(values: list[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


class _Runs(ProgressColumn):
    """Whole trainings done, of all."""

    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed)}/{int(task.total or 0)} trainings", style="progress.download")


class _Elapsed(ProgressColumn):
    """Seconds since the start."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.elapsed or 0.0:.0f} s", style="progress.elapsed")
