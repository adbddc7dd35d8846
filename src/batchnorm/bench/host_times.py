"""`HostTimes`: what the host needs for a layer, as text, JSON, report and file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from batchnorm.bench.machine_words import where
from batchnorm.bench.plan import Settings
from batchnorm.bench.record import OURS, Record
from batchnorm.bench.wording import FOLLOWED, NAME, OPERATION, seconds, spread
from batchnorm.report.document import Document, Paragraph, Section, Table
from batchnorm.report.reported import Reported

__all__ = ["HostTimes"]

TRAINING = "forward+backward"
HOW = (
    "50 layers one after another on a tensor of 512 values: the time of the process that launches them, for one layer. "
    "The ratio is PyTorch's time over ours, the median over rounds, in each of which both were timed in turn. "
    "PyTorch's layer is torch.nn.BatchNorm2d with + and torch.relu behind it; ours does both itself.",
    "On a GPU nobody waits for the device, which is idle when a sample begins: it is the time that a training loop "
    "spends on a layer, whatever the GPU does meanwhile. A step that is replayed as a CUDA graph has none of it.",
)


@dataclass(frozen=True)
class HostTimes(Reported):
    """Seconds of the host for a layer with what follows it.

    Args:
        settings: what was asked for.
        machine: versions, processor, threads: what the numbers depend on.
        records: every finished case, with the times of "forward" and of "forward+backward".
        planned: how many cases there were to be.
        interrupted: the work was stopped; everything here is from the cases finished by then.
    """

    kind: ClassVar[str] = "host-times"
    schema_version: ClassVar[int] = 1

    settings: Settings
    machine: Mapping[str, Any]
    records: tuple[Record, ...]
    planned: int
    interrupted: bool = False
    failures: ClassVar[tuple[Record, ...]] = ()

    @property
    def verdict(self) -> str:
        """The result in a sentence a case."""
        sentences = []
        for record in self.records:
            case, times = record.case, record.times[TRAINING]
            ours, theirs = (seconds(times[name].p50) for name in (OURS, "eager"))
            sentences.append(
                f"Batch norm ({FOLLOWED[case.epilogue]}), {case.layout}, {case.dtype}: the host needs {ours} a layer, "
                f"forward and backward, for torch.nn's {theirs} (ratio {record.ratio(TRAINING, 'eager') or 0.0:.2f})."
            )
        return " ".join(sentences) or "Nothing was timed."

    @property
    def incomplete(self) -> str:
        """What an interrupted benchmark rests on, in one sentence; empty for a whole one."""
        if not self.interrupted:
            return ""
        return f"Interrupted: {len(self.records)} of {self.planned} cases are finished."

    def document(self) -> Document:
        """The report, ready to be drawn for a terminal or a browser."""
        table = Table(
            columns=("layout", "type", "and then", "operation", "who", "median\n(20th–80th %)", "ratio"),
            rows=[_row(record, task) for record in self.records for task in record.times],
            caption="The host's time for a layer",
            numeric=(5, 6),
        )
        machine = self.machine
        return Document(
            title="The host's time for a layer",
            verdict=self.verdict,
            sections=[
                Section("A layer in a chain of 50", [Paragraph(where(machine)), table]),
                Section("How to read this", [Paragraph(text, small=True) for text in HOW]),
            ],
            facts={
                "device": machine["device"],
                "cpu": machine["cpu"],
                "threads": str(machine["threads"]),
                "backend": ", ".join(sorted({each.backends["training"] for each in self.records})) or "none",
                "batchnorm": machine["batchnorm"],
                "commit": machine["commit"] or "not in a checkout",
                "torch": machine["torch"],
                "python": machine["python"],
                "system": machine["system"],
                "rounds": str(self.settings.rounds),
            },
            incomplete=self.incomplete,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries and lists: seconds a layer, ratios (above 1: ours faster)."""
        settings = asdict(self.settings)
        for name in ("suites", "against", "batch", "memory"):  # of the layers' benchmark
            del settings[name]
        return {
            "verdict": self.verdict,
            "interrupted": self.interrupted,
            "planned": self.planned,
            "settings": settings,
            "machine": dict(self.machine),
            "results": [_plain(record) for record in self.records],
        }

    def __str__(self) -> str:
        return "\n".join([self.verdict, *([self.incomplete] if self.interrupted else [])])


def _row(record: Record, task: str) -> list[str]:
    case, times = record.case, record.times[task]
    return [
        case.layout,
        case.dtype,
        FOLLOWED[case.epilogue],
        OPERATION[task],
        "\n".join(NAME[name] for name in times),
        "\n".join(spread(timing) for timing in times.values()),
        f"{record.ratio(task, 'eager') or 0.0:.2f}",
    ]


def _plain(record: Record) -> dict[str, Any]:
    case = record.case
    return {
        "layout": case.layout,
        "dtype": case.dtype,
        "epilogue": case.epilogue,
        "shape": list(case.shape),
        "backend": record.backends["training"],
        "seconds_per_layer": {
            task: {name: asdict(timing) for name, timing in times.items()}
            for task, times in record.times.items()
        },
        "ratio": {task: record.ratio(task, "eager") for task in record.times},
    }
