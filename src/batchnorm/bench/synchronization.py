"""`Synchronization`: what synchronized layers take, as text, JSON, report and file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, ClassVar

from batchnorm.bench.case import Case
from batchnorm.bench.plan import Settings
from batchnorm.bench.record import OURS, Record, Timing
from batchnorm.bench.statistics import median
from batchnorm.bench.suites import SUITES
from batchnorm.bench.wording import FOLLOWED, NAME, RIVAL, exponent, network, seconds, spread
from batchnorm.report.document import Block, Document, Paragraph, Section, Table
from batchnorm.report.reported import Reported

__all__ = ["Exchange", "Synchronization", "took"]

TRAINING = "forward+backward"
PLAIN = "plain"

ON_A_CPU = (
    "torch.nn.SyncBatchNorm runs on GPUs alone, so there is no time of PyTorch's here. Ours is timed against our layer "
    "without synchronization on the same part of the batch: the difference is what synchronizing costs."
)
HOW = (
    "One training step through a layer, forward and backward, in every process at once: each sample begins with all of "
    "them, and its time is the slowest one's. The ratio is the other's time over ours, the median over rounds, in each "
    "of which everyone was timed in turn; our layer without synchronization does less, so against it the ratio is "
    "below 1. All processes share this machine: between machines an exchange takes longer.",
    "Sent: the bytes that a process puts into the collectives of one step through the layer, and how many collectives "
    "those are. The error is the larger one of y's and dx's against float64 on the whole batch, relative to the "
    "largest value. Every output and gradient of ours was checked; a layer that is wrong gets no time.",
)


@dataclass(frozen=True)
class Exchange:
    """A shape that is finished: times and errors, and of each layer how many "collectives" and "bytes" it sends."""

    record: Record
    exchanged: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def times(self) -> Mapping[str, Timing]:
        """Of a training step, by who took them."""
        return self.record.times.get(TRAINING, {})

    @property
    def cost(self) -> float | None:
        """Seconds that synchronizing adds to a step through the layer."""
        if OURS not in self.times:
            return None
        pairs = zip(self.times[OURS].rounds, self.times[PLAIN].rounds, strict=True)
        return median([ours - plain for ours, plain in pairs])

    def to_dict(self) -> dict[str, Any]:
        """Plain data; seconds and bytes."""
        record = self.record
        return {
            **asdict(record.case),
            "failure": record.failure,
            "backends": dict(record.backends),
            "errors": {name: dict(found) for name, found in record.errors.items()},
            "times": {name: asdict(timing) for name, timing in self.times.items()},
            "ratio": {name: record.ratio(TRAINING, name) for name in self.times if name != OURS},
            "synchronizing_seconds": self.cost,
            "exchanged": {name: dict(numbers) for name, numbers in self.exchanged.items()},
        }


@dataclass(frozen=True)
class Synchronization(Reported):
    """What synchronized batch norm takes between processes of this machine, and how far it is from float64.

    Args:
        settings: what was asked for; `batch` is that of a process.
        processes: how many shared a batch.
        machine: versions, processor, threads: what the numbers depend on.
        exchanges: every finished case.
        planned: how many cases there were to be.
        interrupted: the work was stopped; everything here is from the cases finished by then.
    """

    kind: ClassVar[str] = "synchronization"
    schema_version: ClassVar[int] = 1

    settings: Settings
    processes: int
    machine: Mapping[str, Any]
    exchanges: tuple[Exchange, ...]
    planned: int
    interrupted: bool = False

    @property
    def failures(self) -> tuple[Record, ...]:
        """The cases that got no time, each with its reason."""
        return tuple(each.record for each in self.exchanges if each.record.failure)

    @property
    def verdict(self) -> str:
        """What synchronizing costs a layer, for each network; failures first."""
        sentences = []
        if self.failures:
            first = self.failures[0]
            sentences.append(
                f"{len(self.failures)} of {len(self.exchanges)} cases failed; the first: {first.case}: {first.failure}."
            )
        for kind, exchanges in self._kinds():
            costs = [each.cost for each in exchanges if each.cost is not None]
            if costs:
                sentence = f"{network(*kind)}: synchronizing {self.processes} processes costs a layer "
                sentence += f"{seconds(max(median(costs), 0.0))} a training step"
                sentences.append(f"{sentence}{_against_torch(exchanges)}.")
        return " ".join(sentences) or "Nothing was timed."

    @property
    def incomplete(self) -> str:
        """What an interrupted benchmark rests on, in one sentence; empty for a whole one."""
        if not self.interrupted:
            return ""
        return f"Interrupted: {len(self.exchanges)} of {self.planned} cases are finished."

    def _kinds(self) -> list[tuple[tuple[str, str, str], list[Exchange]]]:
        """Suite, layout and type, with what is finished of each."""
        return [
            (kind, list(each)) for kind, each in groupby(self.exchanges, lambda each: _kind(each.record.case))
        ]

    def document(self) -> Document:
        """The report, ready to be drawn for a terminal or a browser."""
        first: list[Block] = [Paragraph(_where(self))]
        if self.settings.device == "cpu":
            first.append(Paragraph(ON_A_CPU))
        if self.failures:
            rows = [[str(record.case), record.failure] for record in self.failures]
            first.append(Table(columns=("case", "why it has no time"), rows=rows, caption="Failed"))
        first += [
            _table(kind, exchanges)
            for kind, exchanges in self._kinds()
            if any(each.times for each in exchanges)
        ]
        return Document(
            title="Synchronized batch norm on this machine",
            verdict=self.verdict,
            sections=[
                Section("Training steps, shape by shape", first),
                Section("How to read this", [Paragraph(text, small=True) for text in HOW]),
            ],
            facts=_facts(self),
            incomplete=self.incomplete,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries and lists: seconds, bytes, ratios (above 1: ours faster)."""
        settings = asdict(self.settings)
        for name in ("against", "epilogues", "memory"):  # of the benchmark in one process
            del settings[name]
        return {
            "verdict": self.verdict,
            "interrupted": self.interrupted,
            "planned": self.planned,
            "processes": self.processes,
            "settings": settings,
            "machine": dict(self.machine),
            "results": [each.to_dict() for each in self.exchanges],
        }

    def __str__(self) -> str:
        return "\n".join([self.verdict, *([self.incomplete] if self.interrupted else [])])


def took(exchange: Exchange) -> str:
    """A case's outcome in a few words."""
    if exchange.record.failure:
        return f"failed: {exchange.record.failure}"
    return ", ".join(f"{seconds(timing.p50)} {NAME[name]}" for name, timing in exchange.times.items())


def _kind(case: Case) -> tuple[str, str, str]:
    return case.suite, case.layout, case.dtype


def _against_torch(exchanges: list[Exchange]) -> str:
    ratios = [each.record.ratio(TRAINING, "torch-sync") for each in exchanges]
    found = [ratio for ratio in ratios if ratio is not None]
    return f", and {RIVAL['torch-sync']} takes {median(found):.2f} times as long as ours" if found else ""


def _where(result: Synchronization) -> str:
    """The machine in one line."""
    machine = result.machine
    commit = f", {machine['commit']}" if machine["commit"] else ""
    return (
        f"{result.processes} processes on {machine['device']}, {machine['cores']} cores, {machine['threads']} threads "
        f"each; torch {machine['torch']}; batchnorm {machine['batchnorm']}{commit}."
    )


def _table(kind: tuple[str, str, str], exchanges: list[Exchange]) -> Table:
    return Table(
        columns=(
            "shape of each\nand then",
            "×",
            "who",
            "median\n(20th–80th %)",
            "ratio",
            "sent a step",
            "error",
        ),
        rows=[_row(each) for each in exchanges if each.times],
        caption=f"{network(*kind)}: {sum(each.record.case.count for each in exchanges)} of "
        f"{SUITES[kind[0]].count} batch norms, forward and backward",
        numeric=(1, 3, 4, 5, 6),
    )


def _row(exchange: Exchange) -> list[str]:
    """A line for each contender, ours first."""
    record, who = exchange.record, list(exchange.times)
    ratios = [record.ratio(TRAINING, name) for name in who]
    return [
        f"{record.case.label}\n{FOLLOWED[record.case.epilogue]}",
        str(record.case.count),
        "\n".join(NAME[name] for name in who),
        "\n".join(spread(exchange.times[name]) for name in who),
        "\n".join("" if name == OURS else f"{ratio:.2f}" for name, ratio in zip(who, ratios, strict=True)),
        "\n".join(_sent(exchange.exchanged.get(name)) for name in who),
        "\n".join(exponent(record.error(name)) for name in who),
    ]


def _sent(numbers: Mapping[str, int] | None) -> str:
    """As "20.5 kB in 2"; a dash for who exchanges nothing."""
    if numbers is None:
        return "–"
    size = numbers["bytes"]
    text = f"{size / 1e3:.1f} kB" if size >= 1000 else f"{size} B"
    return f"{text} in {numbers['collectives']}"


def _facts(result: Synchronization) -> dict[str, str]:
    machine = result.machine
    backends = sorted({name for each in result.exchanges for name in each.record.backends.values()})
    return {
        "device": machine["device"],
        "processes": str(result.processes),
        "exchange": "gloo" if result.settings.device == "cpu" else "NCCL",
        "backend": ", ".join(backends) or "none",
        "cores": str(machine["cores"]),
        "threads of each": str(machine["threads"]),
        "batchnorm": machine["batchnorm"],
        "commit": machine["commit"] or "not in a checkout",
        "torch": machine["torch"],
        "python": machine["python"],
        "system": machine["system"],
        "compiled kernels": machine["kernels"],
        "rounds": str(result.settings.rounds),
    }
