"""How a running benchmark tells what it is doing."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from batchnorm._files import Interrupts

__all__ = ["Progress", "Silent", "carried_out"]

Result = TypeVar("Result")


class Progress(Protocol):
    """What `measure` calls while it works; every method may raise KeyboardInterrupt to stop it."""

    def start(self, effort: float, cases: int, describe: str) -> None:
        """Called once: how much work follows, in units of `effort`, and in how many processes."""

    def case_started(self, label: str) -> None:
        """Called before a case."""

    def case_finished(self, label: str, effort: float, outcome: str) -> None:
        """Called after a case: its share of the work, and what came of it in a few words."""

    def finish(self) -> None:
        """Called once at the end, after an interruption or an error too."""


class Silent:
    """A progress display that shows nothing."""

    def start(self, effort: float, cases: int, describe: str) -> None:
        """Show nothing."""

    def case_started(self, label: str) -> None:
        """Show nothing."""

    def case_finished(self, label: str, effort: float, outcome: str) -> None:
        """Show nothing."""

    def finish(self) -> None:
        """Show nothing."""


def carried_out(
    run: Callable[[], None], shown: Progress, some: Callable[[], bool], result: Callable[[bool], Result]
) -> Result:
    """What `result` makes of a measurement, told whether it was stopped.

    Raises:
        KeyboardInterrupt: stopped when there was not `some` of it yet.
    """
    interrupted = False
    with Interrupts() as interrupts:
        try:
            run()
            interrupts.hold()
        except KeyboardInterrupt:
            interrupts.hold()
            interrupted = True
            if not some():
                raise
        finally:
            shown.finish()
        return result(interrupted or bool(interrupts.pressed))
