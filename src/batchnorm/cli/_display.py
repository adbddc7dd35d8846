"""What the progress displays share: the terminal put right whatever happens, lines for a log, and the time left."""

from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

__all__ = ["ConsoleDisplay", "TimeLeft"]


class ConsoleDisplay:
    """A progress display as a context manager, so that the terminal is put right whatever happens."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """Leave the terminal as it was; harmless when called twice."""

    def _print(self, line: str) -> None:
        # A log that no one reads any more, or that cannot be written, is no reason to stop the work.
        with suppress(OSError):
            self.console.print(Text(line), soft_wrap=True)


class TimeLeft(ProgressColumn):
    """Seconds left, from the mean pace so far: pieces of work differ, so the last few tell less."""

    def render(self, task: Task) -> Text:
        if not task.completed or task.elapsed is None or task.total is None:
            return Text("estimating", style="progress.remaining")
        left = task.elapsed / task.completed * (task.total - task.completed)
        return Text(f"{self.words(left)} left", style="progress.remaining")

    def words(self, seconds: float) -> str:
        """The time in words."""
        return f"{seconds:.0f} s"
