"""The progress of a benchmark: a bar with the time left in a terminal, plain lines in a log."""

from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

__all__ = ["BenchDisplay"]


class BenchDisplay:
    """A progress display as a context manager, so that the terminal is put right whatever happens."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.done = 0
        self.cases = 0
        self.bars = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", style="progress.download"),
            _Left(),
            TextColumn("{task.fields[label]}", style="dim"),
            console=console,
            refresh_per_second=4,
            transient=True,
        )
        self.task = self.bars.add_task("cases", total=1.0, count="", label="")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()

    def start(self, effort: float, cases: int, describe: str) -> None:
        """Show the bar, or say in a log what follows."""
        self.cases = cases
        self.bars.reset(self.task, total=effort, count=f"0/{cases}", label=describe)
        if self.console.is_terminal:
            with suppress(OSError):
                self.bars.start()
        else:
            self._print(f"{describe}: {cases} cases")

    def case_started(self, label: str) -> None:
        """Show what is measured now."""
        self.bars.update(self.task, label=label)

    def case_finished(self, label: str, effort: float, outcome: str) -> None:
        """Move the bar; a log gets a line, and a terminal one for a failure."""
        self.done += 1
        self.bars.update(self.task, advance=effort, count=f"{self.done}/{self.cases}")
        if not self.console.is_terminal or outcome.startswith("failed"):
            self._print(f"[{self.done}/{self.cases}] {label}: {outcome}")

    def finish(self) -> None:
        """Take the bar away; harmless when called twice."""
        if self.bars.live.is_started:
            with suppress(OSError):
                self.bars.stop()

    def _print(self, line: str) -> None:
        # A log that no one reads any more, or that cannot be written, is no reason to stop the work.
        with suppress(OSError):
            self.console.print(Text(line), soft_wrap=True)


class _Left(ProgressColumn):
    """Seconds left, from the mean pace so far."""

    def render(self, task: Task) -> Text:
        if not task.completed or task.elapsed is None or task.total is None:
            return Text("estimating", style="progress.remaining")
        left = round(task.elapsed / task.completed * (task.total - task.completed))
        text = f"{left} s left" if left < 100 else f"{left // 60} min {left % 60} s left"
        return Text(text, style="progress.remaining")
