"""`Comparison`: the result, and its forms as text, JSON, report and file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from batchnorm.comparison.dynamics import Dynamics
from batchnorm.comparison.footing import Footing
from batchnorm.comparison.story import tell
from batchnorm.comparison.summary import Summary
from batchnorm.comparison.training import Run
from batchnorm.comparison.verdicts import headline, verdicts
from batchnorm.report.document import Document
from batchnorm.report.reported import Reported

__all__ = ["Comparison", "Setup"]


@dataclass(frozen=True)
class Setup:
    """What was compared, and how it was trained.

    Args:
        model: the network's name.
        task: "classification" or "regression".
        data: the data's name.
        describe: the network in one line.
        samples: training and test samples; None where the loaders do not say.
        how: "insert" where batch norm was put into the network, "remove" where it was taken out of it.
        layers: how many batch norms that were.
        parameters: of the network without and with batch norm.
        optimizer: its name.
        lrs: the sweep, rising.
        seeds: how many seeds were asked for.
        steps: training steps of each run.
        batch_size: samples a batch; None for loaders.
        every: steps from one evaluation to the next.
        device: where it ran.
    """

    model: str
    task: str
    data: str
    describe: str
    samples: tuple[int, int] | None
    how: str
    layers: int
    parameters: tuple[int, int]
    optimizer: str
    lrs: tuple[float, ...]
    seeds: int
    steps: int
    batch_size: int | None
    every: int
    device: str


@dataclass(frozen=True)
class Comparison(Reported):
    """The same network with and without batch norm: all curves, the summary and what may be said about it.

    Args:
        setup: what was compared and how.
        runs: every finished pair of trainings, curves included.
        summary: the numbers that the verdicts rest on.
        footing: batch statistics at a hidden layer; None when interrupted before, or when nothing could be measured.
        dynamics: what happened during training; None when it was not asked for or could not be watched.
        notes: method and caveats, in plain sentences.
        interrupted: the work was stopped; everything here is from the pairs finished by then.
        error: what stopped it, in one line; empty after Ctrl-C.
        facts: versions and machine.

    Example:
        >>> import torch, batchnorm
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> data = (x, (x[:, 0] > 0).long(), x, (x[:, 0] > 0).long())
        >>> result = batchnorm.compare("deep-mlp", data, lrs=[0.1], seeds=1, steps=4, batch_size=16)
        >>> len(result.runs), result.interrupted
        (2, False)
    """

    kind: ClassVar[str] = "comparison"
    schema_version: ClassVar[int] = 2

    setup: Setup
    runs: tuple[Run, ...]
    summary: Summary
    footing: Footing | None
    dynamics: Dynamics | None
    notes: tuple[str, ...]
    interrupted: bool = False
    error: str = ""
    facts: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        return headline(self.summary, self.setup.model, self.setup.data)

    @property
    def incomplete(self) -> str:
        """What an interrupted comparison rests on, in one sentence; empty for a whole one."""
        if not self.interrupted:
            return ""
        why = f"Stopped by an error ({self.error})" if self.error else "Interrupted"
        total = len(self.setup.lrs) * self.setup.seeds
        if len(self.runs) == 2 * total:
            watched = 0 if self.dynamics is None else len(self.dynamics.courses) // 2
            return (
                f"{why} after the last pair of trainings: what happens during training was watched in "
                f"{watched} of {self.setup.seeds} seeds."
            )
        finished = f"{len(self.runs) // 2} of {total} pairs of trainings are finished"
        seeds = len(self.summary.seeds)
        return f"{why}: {finished}; the figures rest on {seeds} seed{'s' if seeds > 1 else ''}."

    def document(self) -> Document:
        """The report, ready to be drawn for a terminal or a browser."""
        return tell(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries and lists; times in seconds, scores from 0 to 1."""
        found = [asdict(verdict) for verdict in verdicts(self.summary, self.footing)]
        return {
            "verdict": self.verdict,
            "verdicts": found,
            "interrupted": self.interrupted,
            "error": self.error,
            "setup": asdict(self.setup),
            "summary": asdict(self.summary),
            "footing": None if self.footing is None else asdict(self.footing),
            "dynamics": None if self.dynamics is None else asdict(self.dynamics),
            "runs": [asdict(run) for run in self.runs],
            "notes": list(self.notes),
            "facts": dict(self.facts),
        }

    def __str__(self) -> str:
        lines = [self.verdict]
        lines += [f"  {item.label} {item.headline}" for item in verdicts(self.summary, self.footing)]
        if self.interrupted:
            lines.append(self.incomplete)
        return "\n".join(lines)
