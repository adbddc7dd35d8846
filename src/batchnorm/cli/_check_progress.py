"""The progress of a check: a bar over the forwards in a terminal, one line in a log."""

from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from batchnorm.cli._display import ConsoleDisplay, TimeLeft

__all__ = ["CheckDisplay"]


class CheckDisplay(ConsoleDisplay):
    """How many times the model was run. Fewer than expected where the data has fewer batches."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.bars = Progress(
            TextColumn("{task.description}", style="dim"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} forwards", style="progress.download"),
            TimeLeft(),
            console=console,
            refresh_per_second=8,
            transient=True,
        )
        self.task = self.bars.add_task("reading batches", total=1.0)

    def start(self, expected: int, batches: int) -> None:
        """Show the bar, or say in a log what follows."""
        self.bars.reset(self.task, total=float(expected))
        if self.console.is_terminal:
            with suppress(OSError):
                self.bars.start()
        elif batches:
            self._print(f"running {batches} batch{'es' if batches != 1 else ''} at most")

    def forward(self, done: int) -> None:
        """Move the bar."""
        self.done = done
        self.bars.update(self.task, completed=done, description="running batches")

    def finish(self) -> None:
        """Take the bar away; harmless when called twice."""
        if self.bars.live.is_started:
            with suppress(OSError):
                self.bars.stop()
