"""The progress of a benchmark: a bar with the time left in a terminal, plain lines in a log."""

from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from batchnorm.cli._display import ConsoleDisplay, TimeLeft

__all__ = ["BenchDisplay"]


class BenchDisplay(ConsoleDisplay):
    """A bar over all cases in a terminal, a line for each in a log."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
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


class _Left(TimeLeft):
    """In minutes and seconds."""

    def words(self, seconds: float) -> str:
        left = round(seconds)
        return f"{left} s" if left < 100 else f"{left // 60} min {left % 60} s"
