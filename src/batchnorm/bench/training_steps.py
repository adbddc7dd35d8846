"""`TrainingSteps`: what whole training steps take, as text, JSON, report and file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from batchnorm.bench.machine_words import where
from batchnorm.bench.record import FUSED, GRAPH, PLAIN, REMOVED
from batchnorm.bench.statistics import median, percentile
from batchnorm.bench.wording import seconds, spread_of
from batchnorm.report.document import Block, Document, Paragraph, Section, Table
from batchnorm.report.reported import Reported

__all__ = ["StepCase", "StepRecord", "StepSettings", "TrainingSteps"]

_WHO = {PLAIN: "as it is", FUSED: "batch norms fused", REMOVED: "batch norms removed"}
_MODE = {"launched": "launched by the host", GRAPH: "replayed as one CUDA graph"}
HOW = (
    "A step is forward, loss, backward and SGD with momentum on random images and labels; half types mean autocast, "
    "without a scaler of gradients. Everyone is timed in turn, every other round backwards; the ratio is the time of "
    "the network as it is over the other's, the median over rounds, and above 1 the other is faster.",
    "The network without batch norm computes something else. It is there for its time: what is above it is what batch "
    "norm costs, and 'cost left' is how much of that fusing leaves.",
    "A step that the host launches takes as long as the slower of host and GPU; replayed as a CUDA graph it takes the "
    "GPU's time alone. Peak memory, on a GPU, is what a step needs at most beyond parameters, optimizer and data.",
)


@dataclass(frozen=True)
class StepSettings:
    """What was asked for; see `measure_steps`."""

    network: str
    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    device: str
    batch: int
    image: int
    threads: int | None
    rounds: int
    backend: str | None


@dataclass(frozen=True)
class StepCase:
    """A layout, the type of autocast ("float32": none), and how a step gets to the device: "launched", "graph"."""

    layout: str
    dtype: str
    mode: str

    def __str__(self) -> str:
        return f"{self.layout}, {self.dtype}, {_MODE[self.mode]}"


@dataclass
class StepRecord:
    """What is known of a case so far.

    Args:
        case: what is measured.
        failure: why it has no times; empty where all is well.
        backend: what runs the fused layers.
        norms: batch norms of the network that are layers of this package after `fuse`, and how many it `left` alone.
        parameters: numbers that are trained.
        off: max|fused − plain| / max|plain| of the first outputs in training mode.
        memory: bytes that a step needs at most beyond what is there before it; None on a CPU.
        skipped: who could not run, and why.
        rounds: seconds a step by who took it, round by round.
    """

    case: StepCase
    failure: str = ""
    backend: str = ""
    norms: int = 0
    left: int = 0
    parameters: int = 0
    off: float | None = None
    memory: Mapping[str, int | None] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)

    def note(self, setup: Mapping[str, Any]) -> None:
        """What a worker found out before it timed anything."""
        for name, value in setup.items():
            setattr(self, name, value)

    def times(self, who: str) -> list[float]:
        """Seconds a step, round by round."""
        return [taken[who] for taken in self.rounds if who in taken]

    def ratio(self, who: str) -> float | None:
        """The time of the network as it is over another's: the median over rounds."""
        ratios = [taken[PLAIN] / taken[who] for taken in self.rounds if who in taken]
        return median(ratios) if ratios else None

    @property
    def cost_left(self) -> float | None:
        """(fused − removed) / (plain − removed): of what batch norm costs, what is left after fusing.

        None where the network without batch norm was not timed, or not faster in the median.
        """
        pairs = [(t[FUSED] - t[REMOVED], t[PLAIN] - t[REMOVED]) for t in self.rounds if REMOVED in t]
        if not pairs:
            return None
        fused, plain = (median([pair[at] for pair in pairs]) for at in (0, 1))
        return fused / plain if plain > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; seconds and bytes."""
        who = list(self.rounds[0]) if self.rounds else []
        found = {
            name: {f"p{round(100 * share)}": percentile(self.times(name), share) for share in (0.2, 0.5, 0.8)}
            for name in who
        }
        return {
            **asdict(self.case),
            "failure": self.failure,
            "backend": self.backend,
            "batch_norms": self.norms,
            "batch_norms_left_alone": self.left,
            "parameters": self.parameters,
            "first_output_off": self.off,
            "peak_bytes": dict(self.memory),
            "skipped": dict(self.skipped),
            "seconds": {name: {**found[name], "rounds": self.times(name)} for name in who},
            "ratio": {name: self.ratio(name) for name in who if name != PLAIN},
            "cost_left": self.cost_left,
        }


@dataclass(frozen=True)
class TrainingSteps(Reported):
    """What training steps of a network take on this machine.

    Args:
        settings: what was asked for.
        machine: versions, processor, threads: what the numbers depend on.
        records: every case of which a round is finished, or that failed.
        planned: how many cases there were to be.
        interrupted: the work was stopped; everything here is from the rounds finished by then.
    """

    kind: ClassVar[str] = "training-steps"
    schema_version: ClassVar[int] = 1

    settings: StepSettings
    machine: Mapping[str, Any]
    records: tuple[StepRecord, ...]
    planned: int
    interrupted: bool = False

    @property
    def failures(self) -> tuple[StepRecord, ...]:
        """The cases without times."""
        return tuple(record for record in self.records if record.failure)

    @property
    def verdict(self) -> str:
        """The result in a sentence a case."""
        sentences = [f"{record.case}: failed: {record.failure}." for record in self.failures]
        for record in self.records:
            if record.rounds and not record.failure:
                sentences.append(self._sentence(record))
        return " ".join(sentences) or "Nothing was timed."

    def _sentence(self, record: StepRecord) -> str:
        settings = self.settings
        plain, fused = (seconds(median(record.times(name))) for name in (PLAIN, FUSED))
        text = f"{settings.network}, {settings.batch} images of {settings.image}², {record.case}: a training step "
        text += f"takes {plain}, with its batch norms fused {fused} (ratio {record.ratio(FUSED) or 0.0:.2f})"
        without = record.times(REMOVED)
        return f"{text}, without them {seconds(median(without))}." if without else f"{text}."

    @property
    def incomplete(self) -> str:
        """What an interrupted benchmark rests on, in one sentence; empty for a whole one."""
        if not self.interrupted:
            return ""
        done = sum(len(record.rounds) for record in self.records)
        return f"Interrupted: {done} of {self.planned * self.settings.rounds} rounds are finished."

    def document(self) -> Document:
        """The report, ready to be drawn for a terminal or a browser."""
        first: list[Block] = [Paragraph(where(self.machine))]
        first += [
            Paragraph(
                f"{_WHO[name].capitalize()}, {record.case}: no time, because {reason}.", lead="Caution."
            )
            for record in self.records
            for name, reason in record.skipped.items()
        ]
        first += [_table(record, self.settings) for record in self.records if record.rounds]
        return Document(
            title="Training steps on this machine",
            verdict=self.verdict,
            sections=[
                Section("Whole steps", first),
                Section("How to read this", [Paragraph(text, small=True) for text in HOW]),
            ],
            facts=self._facts(),
            incomplete=self.incomplete,
        )

    def _facts(self) -> dict[str, str]:
        settings, machine = self.settings, self.machine
        backends = ", ".join(sorted({record.backend for record in self.records if record.backend}))
        return {
            "network": settings.network,
            "images": f"{settings.batch} of {settings.image}×{settings.image}",
            "device": machine["device"],
            "backend": backends or "none",
            "cores": str(machine["cores"]),
            "threads": str(machine["threads"]),
            "batchnorm": machine["batchnorm"],
            "commit": machine["commit"] or "not in a checkout",
            "torch": machine["torch"],
            "python": machine["python"],
            "system": machine["system"],
            "rounds": str(settings.rounds),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries and lists: seconds, bytes, ratios (above 1: faster than as it is)."""
        return {
            "verdict": self.verdict,
            "interrupted": self.interrupted,
            "planned": self.planned,
            "settings": asdict(self.settings),
            "machine": dict(self.machine),
            "results": [record.to_dict() for record in self.records],
        }

    def __str__(self) -> str:
        return "\n".join([self.verdict, *([self.incomplete] if self.interrupted else [])])


def _table(record: StepRecord, settings: StepSettings) -> Table:
    rows = []
    for name, title in _WHO.items():
        times, memory = record.times(name), record.memory.get(name)
        ratio = record.ratio(name) if name != PLAIN else None
        rows.append(
            [
                title,
                spread_of(times) if times else "–",
                "" if name == PLAIN else "–" if ratio is None else f"{ratio:.2f}",
                f"{record.cost_left:.0%}" if name == FUSED and record.cost_left is not None else "",
                "–" if memory is None else f"{memory / 1e9:.2f} GB",
            ]
        )
    left = f", {record.left} left alone" if record.left else ""
    return Table(
        columns=("network", "median\n(20th–80th %)", "ratio", "cost left", "peak memory"),
        rows=rows,
        caption=f"{settings.network}, {record.case}: {record.norms} batch norms on {record.backend}{left}",
        numeric=(1, 2, 3, 4),
    )
