"""A bar in a terminal while batches pass, where rich is installed."""

import sys
from collections.abc import Sized
from contextlib import suppress
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

__all__ = ["Bar"]


class Bar:
    """A context manager that shows samples as they pass; silent where nobody looks on."""

    def __init__(self, label: str, loader: object, visible: bool = True) -> None:
        self.label = label
        self.batches = len(loader) if isinstance(loader, Sized) else None
        self.visible = (
            visible and sys.stderr is not None and sys.stderr.isatty() and find_spec("rich") is not None
        )
        self.samples = 0
        self._bars: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self.visible:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description}", style="dim"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bars.add_task(self.label, total=self.batches, count="")
            with suppress(OSError):
                self._bars.start()
        return self

    def begin(self, number: int) -> None:
        """Another pass over the loader begins."""
        self.samples = 0
        if self._bars is not None:
            label = self.label if number == 1 else f"{self.label}, pass {number}"
            self._bars.reset(self._task, total=self.batches, description=label, count="")

    def shown(self, samples: int) -> None:
        """One more batch on every process, `samples` in all."""
        self.samples += samples
        if self._bars is not None:
            self._bars.update(self._task, advance=1, count=f"{self.samples:,} samples")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            with suppress(OSError):
                self._bars.stop()
