"""`Benchmark`: the result, and its forms as text, JSON, report and file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from batchnorm.bench.plan import Settings
from batchnorm.bench.record import Record
from batchnorm.bench.story import headline, tell
from batchnorm.bench.summary import Group, Total, groups, totals
from batchnorm.report.document import Document
from batchnorm.report.reported import Reported

__all__ = ["Benchmark"]


@dataclass(frozen=True)
class Benchmark(Reported):
    """What our layers and PyTorch's take on this machine, and how far both are from float64.

    Args:
        settings: what was asked for.
        machine: versions, processor, threads, load: what the numbers depend on.
        copy: bytes a second, read and written, of a copy between tensors that are there already.
        copy_after: the same at the end; None when interrupted.
        records: every finished case.
        planned: how many cases there were to be.
        host: on a GPU, the host's seconds for a layer with ReLU, forward and backward, in a chain.
        warnings: why the numbers may mislead, in plain sentences.
        interrupted: the work was stopped; everything here is from the cases finished by then.

    Example:
        >>> from batchnorm.bench import measure
        >>> result = measure(["tiny"], memory=["as-is"], rounds=1)  # doctest: +SKIP
        >>> result.failures, len(result.records)  # doctest: +SKIP
        ((), 4)
    """

    kind: ClassVar[str] = "benchmark"
    schema_version: ClassVar[int] = 1

    settings: Settings
    machine: Mapping[str, Any]
    copy: float
    copy_after: float | None
    records: tuple[Record, ...]
    planned: int
    host: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    interrupted: bool = False

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Mean ratios, worst shapes and shares of the copy's speed."""
        return groups(self.records, self.copy)

    @cached_property
    def totals(self) -> tuple[Total, ...]:
        """What the batch norms of each network take together."""
        return totals(self.records, self.settings.epilogues, self.settings.against)

    @property
    def failures(self) -> tuple[Record, ...]:
        """The cases that got no time, each with its reason."""
        return tuple(record for record in self.records if record.failure)

    @property
    def verdict(self) -> str:
        """The result in a sentence or two."""
        return headline(self)

    @property
    def incomplete(self) -> str:
        """What an interrupted benchmark rests on, in one sentence; empty for a whole one."""
        if not self.interrupted:
            return ""
        return f"Interrupted: {len(self.records)} of {self.planned} cases are finished."

    def document(self) -> Document:
        """The report, ready to be drawn for a terminal or a browser."""
        return tell(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries and lists: seconds, bytes, bytes a second, ratios (above 1: ours faster)."""
        return {
            "verdict": self.verdict,
            "interrupted": self.interrupted,
            "planned": self.planned,
            "settings": asdict(self.settings),
            "machine": dict(self.machine),
            "copy_bytes_per_second": self.copy,
            "copy_bytes_per_second_after": self.copy_after,
            "warnings": list(self.warnings),
            "host_seconds_per_layer": dict(self.host),
            "sums": [asdict(total) for total in self.totals],
            "groups": [asdict(group) for group in self.groups],
            "results": [record.to_dict(self.copy) for record in self.records],
        }

    def __str__(self) -> str:
        return "\n".join([self.verdict, *([self.incomplete] if self.interrupted else []), *self.warnings])
