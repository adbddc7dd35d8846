"""A document with every kind of block, as a comparison would build it."""

import math

import pytest

from batchnorm.report.document import Document, Figure, Paragraph, Section, Table, Verdict

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def curve(limit: float, pace: float, steps: list[int]) -> list[float]:
    return [limit - (limit - 0.1) * math.exp(-step / pace) for step in steps]


def band(name: str, values: list[float], steps: list[int]) -> dict[str, object]:
    return {
        "type": "scatter",
        "x": [*steps, *reversed(steps)],
        "y": [*(value + 0.015 for value in values), *(value - 0.015 for value in reversed(values))],
        "fill": "toself",
        "fillcolor": f"{name}-band",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def line(colour: str, label: str, x: list[float], y: list[float], **more: object) -> dict[str, object]:
    dash = "solid" if colour == "with" else "dash"
    style = {"color": colour, "dash": dash, "width": 2.5}
    return {"type": "scatter", "mode": "lines", "name": label, "x": x, "y": y, "line": style, **more}


def accuracy_figure() -> Figure:
    steps = list(range(0, 301, 10))
    fast, slow = curve(0.95, 25, steps), curve(0.90, 80, steps)
    return Figure(
        id="accuracy",
        title="Test accuracy while training",
        data=[
            band("with", fast, steps),
            band("without", slow, steps),
            line("with", "with batch norm", steps, fast),
            line("without", "without batch norm", steps, slow),
        ],
        layout={
            "xaxis": {"title": {"text": "training step"}},
            "yaxis": {"title": "test accuracy", "tickformat": ".0%", "range": [0, 1]},
            "hovermode": "x unified",
        },
        alt="With batch norm the test accuracy passes 90 % after 70 steps; without it ends at 88 %.",
        caption="Lines are means over 3 seeds, bands their range. Each network at its own best learning rate.",
    )


def footing_figure() -> Figure:
    batches = list(range(40))
    panels = {
        "before": [0.6 * math.sin(batch) for batch in batches],
        "after": [0.1 * math.sin(batch) for batch in batches],
    }
    return Figure(
        id="footing",
        title="Every batch on the same footing",
        data=[
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": batches,
                "y": values,
                "marker": {"color": colour, "size": 7},
                "xaxis": f"x{axis}",
                "yaxis": f"y{axis}",
            }
            for (name, values), colour, axis in zip(
                panels.items(), ("without", "with"), ("", "2"), strict=True
            )
        ],
        layout={
            "grid": {"rows": 1, "columns": 2, "pattern": "independent"},
            "xaxis": {"title": {"text": "batch"}},
            "xaxis2": {"title": {"text": "batch"}},
            "yaxis": {"title": {"text": "distance of the mean, σ"}, "range": [-1, 1]},
            "yaxis2": {"range": [-1, 1]},
        },
        alt="Before normalization the batch means lie up to 0.6 σ apart, after it 0.1 σ.",
    )


def rates_figure() -> Figure:
    with_norm = [0.55, 0.74, 0.88, 0.93, 0.95, 0.95, 0.93]
    without = [0.35, 0.62, 0.88, 0.90, 0.41, float("nan"), float("nan")]
    return Figure(
        id="rates",
        title="Final test accuracy at each learning rate",
        data=[
            line("with", "with batch norm", list(RATES), with_norm, mode="lines+markers"),
            line("without", "without batch norm", list(RATES), without, mode="lines+markers"),
        ],
        layout={
            "xaxis": {"type": "log", "title": {"text": "learning rate"}},
            "yaxis": {"tickformat": ".0%", "range": [0, 1]},
        },
        alt="With batch norm all seven learning rates train; without, five.",
    )


@pytest.fixture
def document() -> Document:
    verdicts = [
        Verdict(
            "How much sooner does it learn?", "4.1× fewer steps", "70 steps instead of 290 to 90.0 %.", "good"
        ),
        Verdict("How much better does it end?", "+5.1 points", "94.9 % against 89.8 %, [4.2, 6.0].", "good"),
        Verdict(
            "At which rates does it train?", "7 of 7, not 5", "0.003 to 3 with, 0.003 to 0.3 without.", "good"
        ),
        Verdict("Is each batch on the same footing?", "no difference seen", "0.61 σ before, 0.60 σ after."),
    ]
    table = Table(
        columns=["learning rate", "with", "without", "difference", "verdict"],
        rows=[
            [f"{rate:g}", "94.9 % ± 0.4", "89.8 % ± 1.1" if rate < 1 else "diverged", "+5.1", "better with"]
            for rate in RATES
        ],
        caption="Final test accuracy",
        numeric=(0, 1, 2, 3),
    )
    method = Paragraph(
        "Both networks start from the same weights and see the same batches in the same order. "
        "Weights are drawn for the activation, so that the plain network starts as well as it can."
    )
    return Document(
        title="Batch norm in deep-mlp on digits",
        verdict="With batch norm the network reaches the plain network's best accuracy in a quarter of the steps, "
        "ends 5 points better and trains at every learning rate tried.",
        sections=[
            Section("Verdict", [*verdicts, accuracy_figure()]),
            Section("Learning rates", [rates_figure(), table]),
            Section(
                "The distribution of each batch", [footing_figure(), Paragraph("In units of σ.", small=True)]
            ),
            Section("Method", [method, rates_figure()], folded=True),
        ],
        facts={"data": "digits, 1,347 train, 450 test", "seeds": "3", "torch": "2.13.0", "duration": "41 s"},
    )
