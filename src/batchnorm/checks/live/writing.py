"""Where numbers go: TensorBoard's writers and those like them, or any function."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from batchnorm._errors import InputError, InputTypeError, message
from batchnorm.checks.finding import Finding
from batchnorm.checks.live.looking import Look
from batchnorm.checks.live.numbers import histograms_of
from batchnorm.checks.telling import places

__all__ = ["Writing", "told_in_text"]

# Of the looks, one in so many has histograms: TensorBoard takes 0.2 ms for each, ten times as long as for a number.
_HISTOGRAMS = 5
_EXPECTED = (
    "an object with add_scalar(tag, value, step), as TensorBoard's SummaryWriter, or writer(tag, value, step)"
)


class Writing:
    """A writer of either kind, and what it is given.

    Raises:
        InputTypeError: it is neither.
        InputError: histograms are asked of a writer that has no `add_histogram`.
    """

    def __init__(self, writer: object, histograms: bool | None) -> None:
        self._scalar: Callable[[str, float, int], Any] | None = None
        self._histogram: Callable[[str, Tensor, int], Any] | None = None
        self._text: Callable[[str, str, int], Any] | None = None
        self._looks = 0
        if writer is None:
            return
        own = None if isinstance(writer, type) else getattr(writer, "add_scalar", None)
        if callable(own):
            self._scalar = own
            self._text = _method(writer, "add_text")
            self._histogram = _method(writer, "add_histogram")
            if histograms and self._histogram is None:
                raise InputError(
                    message(
                        "watch: histograms",
                        got="True, and a writer without add_histogram",
                        expected="a writer that has it",
                        fix="Leave histograms out.",
                    )
                )
        elif callable(writer) and not isinstance(writer, type):
            self._scalar = writer
            self._histogram = writer if histograms else None
        else:
            got = f"the class {writer.__name__}" if isinstance(writer, type) else type(writer).__name__
            raise InputTypeError(message("watch: writer", got=got, expected=_EXPECTED, fix=_fix(writer)))
        if histograms is False:
            self._histogram = None

    def write(self, look: Look, numbers: dict[str, dict[str, float]], summary: dict[str, float]) -> None:
        """Scalars of every layer and of the model; now and then histograms."""
        if self._scalar is None:
            return
        for name, found in numbers.items():
            for key, value in found.items():
                self._scalar(f"{_folder(name)}/{key}", value, look.step)
        for key, value in summary.items():
            self._scalar(f"batchnorm/{key}", value, look.step)
        if self._histogram is not None and self._looks % _HISTOGRAMS == 0:
            for layer in look.layers:
                for key, values in histograms_of(layer, look.calls(layer.name)).items():
                    self._histogram(f"{_folder(layer.name)}/histogram/{key}", values, look.step)
        self._looks += 1

    def tell(self, finding: Finding, step: int) -> None:
        """A finding as text, where the writer takes text."""
        if self._text is not None:
            self._text(
                f"batchnorm/findings/{finding.code}", told_in_text(finding).replace("\n", "\n\n"), step
            )


def told_in_text(finding: Finding) -> str:
    """A finding in three lines, with the layers by name."""
    return (
        f"{places(finding)}: {finding.code} {finding.severity}: {finding.message}\n"
        f"why: {finding.cause}\nfix: {finding.fix}"
    )


def _folder(layer: str) -> str:
    return f"batchnorm/{layer or 'model'}"


def _method(writer: object, name: str) -> Any:
    found = getattr(writer, name, None)
    return found if callable(found) else None


def _fix(writer: object) -> str:
    if isinstance(writer, type):
        return f"Make one: {writer.__name__}(...)."
    if callable(getattr(getattr(writer, "experiment", None), "add_scalar", None)):
        return "Pass its experiment: logger.experiment."
    if callable(getattr(writer, "log", None)):
        return "Pass a function: lambda tag, value, step: run.log({tag: value}, step=step)."
    return "Pass torch.utils.tensorboard.SummaryWriter(), or a function."
