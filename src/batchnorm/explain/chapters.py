"""The story, chapter by chapter: the season, the four steps on it, and what comes to light."""

from collections.abc import Callable
from dataclasses import dataclass

from batchnorm.explain import figures
from batchnorm.explain._steps import NAMES, worked
from batchnorm.explain.limits import limits
from batchnorm.explain.network import look_inside
from batchnorm.explain.network_chapters import four_steps_inside, running_statistics
from batchnorm.explain.questions import questions
from batchnorm.explain.runners import RUNNERS, Season, Settings, season
from batchnorm.explain.texts import DAY
from batchnorm.explain.words import as_text, say
from batchnorm.report.document import Block, Document, Formula, Paragraph, Section, Slider, Verdict

__all__ = ["CHAPTERS", "TITLE", "WORKED_DAY", "Chapter", "chapter", "document", "lead", "sliders"]

TITLE = "Batch norm, told by runners"
WORKED_DAY = DAY - 1  # its times are put into the formulas


@dataclass(frozen=True)
class Chapter:
    """A chapter's title, and how to build its blocks; some take a second of training."""

    title: str
    build: Callable[[], list[Block]]


def lead() -> str:
    """Return the story's one paragraph."""
    return say("lead", season())


def sliders(settings: Settings | None = None) -> list[Slider]:
    """Return what the reader of the page may move."""
    at = settings or Settings()
    return [
        Slider("difference", "Temperature difference", 0, 25, 1, at.difference, "°C"),
        Slider("trend", "Fitness trend", 0, 0.4, 0.01, at.trend, "s a day", digits=2),
        Slider("runners", "Runners a day (batch size)", 2, RUNNERS, 1, at.runners),
        Slider("eps", "ε, the safeguard", -5, 3, 0.25, -5, "s²", log=True),
        Slider("gamma", "γ, the scale", 0, 6, 0.1, at.gamma, digits=1),
        Slider("beta", "β, the shift", 80, 100, 1, at.beta),
    ]


def formulas(found: Season) -> tuple[Formula, Formula, Formula, Formula]:
    """Return the four formulas with the numbers of one day."""
    at = found.settings
    results = tuple(
        float(value)
        for value in (
            found.mean[WORKED_DAY],
            found.var[WORKED_DAY],
            found.xhat[WORKED_DAY, 0],
            found.y[WORKED_DAY, 0],
        )
    )
    mean, var, xhat, y = results
    constants = (at.eps, at.gamma, at.beta)
    return worked(found.x[WORKED_DAY].tolist(), (mean, var, xhat, y), constants, two_decimals, eps_digits=2)


def two_decimals(value: float) -> str:
    """Return a number as the page's script writes it.

    Example:
        >>> two_decimals(-1.239)
        '−1.24'
    """
    return as_text(value, 2)


def correlation(value: float | None) -> str:
    """Return a correlation in two digits, or that there is none."""
    return "no correlation" if value is None else f"correlation {two_decimals(value)}"


def _raw() -> list[Block]:
    found = season()
    return [
        Verdict(
            "What raw times tell of each runner's form",
            correlation(found.before),
            f"{say('raw-card', found)} It is the correlation with the true form, run by run, each runner's own "
            "average taken off, so that only changes of form count.",
            "bad",
        ),
        Verdict(
            "And after batch norm",
            correlation(found.after),
            f"{say('after-card', found)} {say('missing', found)}",
            "good",
        ),
        figures.raw_picture(found),
        Paragraph(say("season", found), small=True),
    ]


def _mean() -> list[Block]:
    found = season()
    return [
        Paragraph(say("mean", found)),
        _of_the_day(formulas(found)[0]),
        figures.mean_picture(found),
    ]


def _variance() -> list[Block]:
    return [
        Paragraph(
            "How far do the runners of a day lie from their mean? Square the distances and average them. The root of "
            "that is σ, in seconds again."
        ),
        formulas(season())[1],
        figures.variance_picture(season()),
    ]


def _normalize() -> list[Block]:
    found = season()
    return [Paragraph(say("normalize", found)), formulas(found)[2], figures.normalized_picture(found)]


def _scale() -> list[Block]:
    found = season()
    return [Paragraph(say("scale", found)), formulas(found)[3], figures.output_picture(found)]


def _trend() -> list[Block]:
    found = season()
    return [
        Paragraph(say("trend", found)),
        figures.trend_picture(found),
        Paragraph(say("trend-averages", found), small=True),
    ]


def _of_the_day(formula: Formula) -> Formula:
    return Formula(formula.id, f"{formula.text}    (day {DAY})", formula.numbers)


def _inside() -> list[Block]:
    return four_steps_inside(look_inside())


def _running() -> list[Block]:
    return running_statistics(look_inside())


def _limits() -> list[Block]:
    return limits(look_inside())


CHAPTERS = (
    Chapter("Raw times", _raw),
    Chapter(f"Step 1: {NAMES[0].lower()}", _mean),
    Chapter(f"Step 2: {NAMES[1].lower()}", _variance),
    Chapter(f"Step 3: {NAMES[2].lower()}", _normalize),
    Chapter(f"Step 4: {NAMES[3].lower()}", _scale),
    Chapter("Who is improving?", _trend),
    Chapter("The same four steps inside a network", _inside),
    Chapter("Running statistics: what happens at inference", _running),
    Chapter("What the story leaves out", _limits),
    Chapter("Predict, then see", lambda: list(questions())),
)


def chapter(number: int) -> Section:
    """Return one chapter; 0 is the raw times, 1 to 4 the four steps.

    Example:
        >>> chapter(1).title
        'Step 1: the mean'
    """
    found = CHAPTERS[number]
    return Section(found.title, found.build())


def document() -> Document:
    """Return the whole story as the page shows it, sliders included. Trains a small network, about a second."""
    first, *rest = (chapter(number) for number in range(len(CHAPTERS)))
    return Document(TITLE, lead(), [first, Section("Sliders", sliders()), *rest], facts=look_inside().facts())
