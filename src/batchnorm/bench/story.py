"""The report of a benchmark: what is said, in which order."""

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from batchnorm.bench.case import MEMORY, OPERATIONS
from batchnorm.bench.figures import ratios, shares
from batchnorm.bench.machine_words import where
from batchnorm.bench.record import OURS, Record
from batchnorm.bench.suites import SUITES
from batchnorm.bench.summary import ANY, Group
from batchnorm.bench.sums import sums
from batchnorm.bench.wording import (
    FOLLOWED,
    MALLOC,
    NAME,
    OPERATION,
    RIVAL,
    exponent,
    network,
    percent,
    seconds,
    spread,
)
from batchnorm.report.document import Block, Document, Paragraph, Section, Table

if TYPE_CHECKING:
    from batchnorm.bench.result import Benchmark

__all__ = ["headline", "mean_rows", "tell"]

TRAINING = "forward+backward"

SHORT = (
    "Ratio: the other's time over ours, above 1 where ours is faster; geometric mean over the network's batch norms, "
    "and the worst shape. Share: the time that the bytes of an operation take at the speed of a copy, over our time."
)
HOW = (
    "A ratio is the other's time over ours: above 1 ours is faster. A shape's ratio is the median over rounds, in each "
    "of which everyone was timed in turn; a mean is geometric over the network's batch norms, each shape weighted with "
    "how often it occurs.",
    "GB/s counts the bytes that an operation has to move: forward in training reads x twice and writes y, backward "
    "reads x and dy twice and writes dx, inference reads x and writes y; a residual is read once more, and its "
    "gradient written where an activation follows. The share is that speed over the speed of a copy between tensors "
    "that are there already; where a tensor stays in a cache it passes 100 %.",
    "The error is the larger one of max|y − y64| / max|y64| and the same for dx, against float64. Every output and "
    "gradient of ours was checked; a layer that is wrong gets no time.",
)
MEMORY_NOTE = (
    "Each case ran in processes of its own. 'As is': glibc's malloc takes memory for large outputs from the system "
    "anew in each call, and the pages have to be mapped and cleared. 'Raised': the process was started with "
    "MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at 4 GiB, keeps what memory it has once got, and writes into "
    "pages that are there."
)


def headline(result: "Benchmark") -> str:
    """The network's time in a training step, ours and the other's, for each layout; failures first."""
    sentences = []
    if result.failures:
        count = len(result.failures)
        first = result.failures[0]
        sentences.append(
            f"{count} of {len(result.records)} cases failed; the first: {first.case}: {first.failure}."
        )
    best = _headline_groups(result)
    for group in best:
        title = SUITES[group.suite].title
        sentences.append(
            f"{title}, {group.layout}, {group.dtype}: the {group.norms} batch norms of a training step take "
            f"{seconds(group.seconds)}, {RIVAL[group.rival]}'s {seconds(group.rival_seconds)}; ratio {group.ratio:.2f} "
            f"(worst shape {group.worst:.2f})."
        )
    return " ".join(sentences) or "Nothing was timed."


def _headline_groups(result: "Benchmark") -> list[Group]:
    """The first suite's training steps, each layout and type, memory as users have it, against the first rival."""
    found = [group for group in result.groups if group.operation == TRAINING and not group.larger_than]
    if not found:
        return []
    first = found[0]
    found = [g for g in found if (g.suite, g.memory, g.rival) == (first.suite, first.memory, first.rival)]
    whole: dict[tuple[str, str], Group] = {}
    for group in found:
        key = (group.layout, group.dtype)
        if key not in whole or group.norms >= whole[key].norms:
            whole[key] = group
    return list(whole.values())


def tell(result: "Benchmark") -> Document:
    """The document: means first, then large tensors, every shape, and how it was done."""
    first: list[Block] = [Paragraph(_where(result))]
    first += [Paragraph(text, lead="Caution.") for text in result.warnings]
    if result.failures:
        first.append(_failures(result.failures))
    first += [_means(result, kind, rival) for kind, rival in product(_kinds(result), _rivals(result))]
    first.append(Paragraph(SHORT, small=True))
    sections = [Section("Mean ratios", first), *sums(result)]
    if result.groups:
        sections.append(Section("By size", [*ratios(result), *shares(result)]))
    if large := _large(result):
        sections.append(Section("Large tensors", [*large, Paragraph(MEMORY_NOTE, small=True)]))
    sections += _details(result)
    notes = [*HOW, *([MEMORY_NOTE] if result.settings.device == "cpu" else []), _backends(result)]
    sections.append(Section("How to read this", [Paragraph(note, small=True) for note in notes if note]))
    return Document(
        title="Batch norm on this machine",
        verdict=headline(result),
        sections=sections,
        facts=_facts(result),
        incomplete=result.incomplete,
    )


def _where(result: "Benchmark") -> str:
    """The machine in one line."""
    return f"{where(result.machine).removesuffix('.')}; memory is copied at {result.copy / 1e9:.1f} GB/s."


def _kinds(result: "Benchmark") -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((group.suite, group.layout, group.dtype) for group in result.groups))


def _rivals(result: "Benchmark") -> list[str]:
    return list(dict.fromkeys(group.rival for group in result.groups))


def mean_rows(
    result: "Benchmark", kind: tuple[str, str, str], rival: str, operations: Sequence[str] = OPERATIONS
) -> list[list[str]]:
    """A row for each operation and epilogue: mean and worst ratio in each state of the memory, and our share."""
    rows = []
    memory = result.settings.memory
    for operation, epilogue in product(operations, (*[name for name in FOLLOWED if name != ANY], ANY)):
        found = {
            group.memory: group
            for group in result.groups
            if (group.suite, group.layout, group.dtype) == kind
            and (group.operation, group.epilogue, group.rival) == (operation, epilogue, rival)
            and not group.larger_than
        }
        if not found:
            continue
        row = [OPERATION[operation], FOLLOWED[epilogue]]
        for state in memory:
            group = found.get(state)
            row += (
                ["–"] * 3
                if group is None
                else [_ratio(group.ratio), _ratio(group.worst), percent(group.share)]
            )
        rows.append(row)
    return rows


def mean_columns(memory: Sequence[str]) -> list[str]:
    """The columns of `mean_rows`."""
    return _columns(["operation", "then"], ("ratio", "worst", "share"), memory)


def _columns(first: list[str], names: Sequence[str], memory: Sequence[str]) -> list[str]:
    """`first`, and then `names` once for each state of the memory."""
    states = [""] if len(memory) == 1 else [f"{state.replace('-', ' ')}:\n" for state in memory]
    return [*first, *(f"{state}{name}" for state in states for name in names)]


def _means(result: "Benchmark", kind: tuple[str, str, str], rival: str) -> Table:
    columns = mean_columns(result.settings.memory)
    counted = [group for group in result.groups if (group.suite, group.layout, group.dtype) == kind]
    norms, shapes = max((group.norms, group.shapes) for group in counted)
    return Table(
        columns=columns,
        rows=mean_rows(result, kind, rival),
        caption=f"{network(*kind)} against {RIVAL[rival]}: {norms} batch norms of {shapes} shapes",
        numeric=tuple(range(2, len(columns))),
    )


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _large(result: "Benchmark") -> list[Table]:
    """Training steps on tensors that no cache holds, in every state of the memory."""
    return [
        table
        for kind, rival in product(_kinds(result), _rivals(result))
        if (table := _large_of(result, kind, rival)) is not None
    ]


def _large_of(result: "Benchmark", kind: tuple[str, str, str], rival: str) -> Table | None:
    found = {
        (group.larger_than, group.epilogue, group.memory): group
        for group in result.groups
        if (group.suite, group.layout, group.dtype, group.rival) == (*kind, rival)
        and group.larger_than
        and group.epilogue != ANY
    }
    rows = []
    for limit, epilogue in dict.fromkeys(key[:2] for key in found):
        row = [f"{limit / 1e6:.0f} MB", FOLLOWED[epilogue]]
        for state in result.settings.memory:
            group = found.get((limit, epilogue, state))
            if group is None:
                row += ["–"] * 3
                continue
            pages = "–" if group.faults is None else f"{group.faults:,.0f}"
            row += [_ratio(group.ratio), percent(group.share), pages]
        rows.append(row)
    columns = _columns(["over", "then"], ("ratio", "share", "new pages"), result.settings.memory)
    caption = f"{network(*kind)} against {RIVAL[rival]}: fwd + bwd, new pages a call"
    numeric = (0, *range(2, len(columns)))
    return Table(columns=columns, rows=rows, caption=caption, numeric=numeric) if rows else None


def _details(result: "Benchmark") -> list[Section]:
    """Every shape: training steps in sight, forward alone and inference folded."""
    sections = []
    for operation in (TRAINING, *(name for name in OPERATIONS if name != TRAINING)):
        tables = [
            _shapes(result, kind, operation, memory, rival)
            for kind, memory, rival in product(_kinds(result), MEMORY, _rivals(result))
        ]
        title = f"{OPERATION[operation].capitalize()}, shape by shape"
        blocks: list[Block] = [table for table in tables if table is not None]
        if blocks:
            sections.append(Section(title, blocks, folded=operation != TRAINING))
    return sections


def _shapes(
    result: "Benchmark", kind: tuple[str, str, str], operation: str, memory: str, rival: str
) -> Table | None:
    records = [
        record
        for record in result.records
        if (record.case.suite, record.case.layout, record.case.dtype, record.case.memory) == (*kind, memory)
        and operation in record.times
    ]
    if not any(record.ratio(operation, rival) for record in records):
        return None
    suffix = f", {MALLOC[memory]}" if len(result.settings.memory) > 1 else ""
    return Table(
        columns=(
            "shape\nand then",
            "×",
            "who",
            "median\n(20th–80th %)",
            "GB/s",
            "share",
            "error",
            "ratio",
        ),
        rows=[_shape_row(record, operation, rival, result.copy) for record in records],
        caption=f"{network(*kind)}{suffix}",
        numeric=(1, 3, 4, 5, 6, 7),
    )


def _shape_row(record: Record, operation: str, rival: str, copy: float) -> list[str]:
    """Two lines: ours, and the other's below, dashes where it has no time."""
    both, times = (OURS, rival), record.times[operation]
    speeds = [record.speed(operation, name) for name in both]
    return [
        f"{record.case.label}\n{FOLLOWED[record.case.epilogue]}",
        str(record.case.count),
        "\n".join(NAME[name] for name in both),
        "\n".join(spread(times[name]) if name in times else "–" for name in both),
        "\n".join("–" if speed is None else f"{speed / 1e9:.1f}" for speed in speeds),
        "\n".join(percent(None if speed is None else speed / copy) for speed in speeds),
        "\n".join(exponent(record.error(name)) for name in both),
        _ratio(record.ratio(operation, rival)),
    ]


def _failures(records: Sequence[Record]) -> Table:
    return Table(
        columns=("case", "why it has no time"),
        rows=[[str(record.case), record.failure] for record in records],
        caption="Failed",
    )


def _backends(result: "Benchmark") -> str:
    """Who ran our layer."""
    used = {
        mode: sorted({record.backends[mode] for record in result.records if record.backends})
        for mode in ("training", "inference")
    }
    if not used["training"]:
        return ""
    text = f"Our layer ran on {' and '.join(used['training'])} in training and {' and '.join(used['inference'])} in "
    text += "inference."
    if "aten" in used["training"]:
        text += (
            " The backend aten is PyTorch's own kernel, so there a ratio of 1 is all that can be expected; "
            "batchnorm.explain_backend says why it was chosen."
        )
    return text


def _facts(result: "Benchmark") -> dict[str, str]:
    machine = result.machine
    facts = {
        "device": machine["device"],
        "cpu": machine["cpu"],
        "cores": str(machine["cores"]),
        "threads": str(machine["threads"]),
        "batchnorm": machine["batchnorm"],
        "commit": machine["commit"] or "not in a checkout",
        "torch": machine["torch"],
        "python": machine["python"],
        "system": machine["system"],
        "libc": machine["libc"] or "unknown",
        "backend": machine.get("backend") or "unknown",
        "huge pages": machine["huge_pages"] or "unknown",
        "compiled kernels": machine["kernels"],
        "load at the start": "unknown" if machine["load"] is None else f"{machine['load']:.2f}",
        "copy": f"{result.copy / 1e9:.1f} GB/s, read and written",
        "rounds": str(result.settings.rounds),
    }
    if result.host:
        facts["host per layer"] = ", ".join(
            f"{seconds(value)} {'ours' if name == OURS else RIVAL[name]}"
            for name, value in result.host.items()
        )
    if machine["device"] == machine["cpu"]:
        del facts["device"]
    return facts
