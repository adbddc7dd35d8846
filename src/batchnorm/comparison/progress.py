"""How a running comparison tells what it is doing."""

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """What `batchnorm.compare` calls while it works; every method may raise KeyboardInterrupt to stop it."""

    def start(self, total_runs: int, describe: str, task: str) -> None:
        """Called once: how many trainings follow, of what, in one line, and the task, which says what a score is."""

    def run_started(self, label: str, normalized: bool, lr: float, seed: int) -> None:
        """Called before a training."""

    def step(self, step: int, steps: int, loss: float, score: float | None) -> None:
        """Called after an evaluation: steps done, steps in all, recent training loss, test score (0 to 1)."""

    def run_finished(
        self, label: str, normalized: bool, lr: float, seed: int, final_score: float, diverged: bool
    ) -> None:
        """Called after a training; a diverged one has the score of guessing."""

    def finish(self) -> None:
        """Called once at the end, after an interruption or an error too."""


class Silent:
    """A progress display that shows nothing."""

    def start(self, total_runs: int, describe: str, task: str) -> None:
        """Show nothing."""

    def run_started(self, label: str, normalized: bool, lr: float, seed: int) -> None:
        """Show nothing."""

    def step(self, step: int, steps: int, loss: float, score: float | None) -> None:
        """Show nothing."""

    def run_finished(
        self, label: str, normalized: bool, lr: float, seed: int, final_score: float, diverged: bool
    ) -> None:
        """Show nothing."""

    def finish(self) -> None:
        """Show nothing."""
