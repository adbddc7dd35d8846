"""The story, chapter by chapter: the season, the four steps on it, and what comes to light."""

from collections.abc import Callable
from dataclasses import dataclass

from batchnorm.explain import figures
from batchnorm.explain._steps import NAMES, worked
from batchnorm.explain.limits import limits
from batchnorm.explain.network import look_inside
from batchnorm.explain.network_chapters import four_steps_inside, running_statistics
from batchnorm.explain.questions import questions
from batchnorm.explain.runners import BASE, COOL, DAYS, RUNNERS, Season, Settings, season
from batchnorm.report.document import Block, Document, Formula, Paragraph, Section, Slider, Verdict

__all__ = ["CHAPTERS", "TITLE", "WORKED_DAY", "Chapter", "chapter", "document", "lead", "sliders"]

TITLE = "Batch norm, told by runners"
# The first hot day: its times are put into the formulas.
WORKED_DAY = 2


@dataclass(frozen=True)
class Chapter:
    """A chapter's title, and how to build its blocks; some take a second of training."""

    title: str
    build: Callable[[], list[Block]]


def lead() -> str:
    """Return the story's one paragraph."""
    hot, cool = (f"{degrees:.0f}\u00a0°C" for degrees in (COOL + Settings().difference, COOL))
    return (
        f"A coach times {RUNNERS} runners over {DAYS} days. On hot days ({hot}) all are slow, on cool ones ({cool}) "
        "all are fast, and that hides who is improving. Batch norm takes each day's mean and spread away, and it "
        "shows. The runners are made up, so that the truth is known; this library computes every number."
    )


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
    return worked(found.x[WORKED_DAY].tolist(), (mean, var, xhat, y), constants, two_decimals)


def two_decimals(value: float) -> str:
    """Return a number as the page's script writes it.

    Example:
        >>> two_decimals(-1.239)
        '−1.24'
    """
    return f"{value:.2f}".replace("-", "−")


def correlation(value: float | None) -> str:
    """Return a correlation in two digits, or a dash where there is none."""
    return "–" if value is None else two_decimals(value)


def _raw() -> list[Block]:
    found = season()
    return [
        _before(found),
        _after(found),
        figures.raw_picture(found),
        Paragraph(
            f"Time = {BASE:.0f} s + heat + (1 + 0.03·heat)·(form + noise), heat being 1 s for each degree above "
            f"{COOL:.0f} °C. Half of the runners get faster at their own pace, half slower; that is the true form. "
            f"Each day {found.settings.runners} of the {RUNNERS} come.",
            small=True,
        ),
    ]


def _before(found: Season) -> Verdict:
    return Verdict(
        "What raw times tell of each runner's form",
        f"correlation {correlation(found.before)}",
        "1 would be everything, 0 nothing. It is the correlation with the true form, run by run, each runner's own "
        "average taken off, so that only changes of form count.",
        "bad",
    )


def _after(found: Season) -> Verdict:
    return Verdict(
        "And after batch norm",
        f"correlation {correlation(found.after)}",
        "The same runs, the same truth. What is missing to 1 is chance: a runner's good and bad days, and who happened "
        "to come.",
        "good",
    )


def _mean() -> list[Block]:
    return [
        Paragraph(
            "A batch is one day. Add up its times and divide by the number of runners. On a hot day the mean is high "
            "because everyone is slow."
        ),
        _of_the_day(formulas(season())[0]),
        figures.mean_picture(season()),
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
    return [
        Paragraph(
            "Take the day's mean off, divide by the day's spread. Now every day has mean 0 and spread 1, hot or cool, "
            "and a runner's number says how he did against the others that day. ε keeps the division safe where all "
            "times are equal."
        ),
        formulas(season())[2],
        figures.normalized_picture(season()),
    ]


def _scale() -> list[Block]:
    return [
        Paragraph(
            "A scale with mean 0 may not be what is wanted next, so two more numbers stretch and move it. Here the "
            "coach chose γ = 3 and β = 90, which looks like seconds again. A network learns both."
        ),
        formulas(season())[3],
        figures.output_picture(season()),
    ]


def _trend() -> list[Block]:
    found = season()
    return [
        Paragraph(
            "The question was who is improving. Correlation with the true form: raw times "
            f"{correlation(found.before)}, after batch norm {correlation(found.after)}."
        ),
        figures.trend_picture(found),
    ]


def _of_the_day(formula: Formula) -> Formula:
    return Formula(formula.id, f"{formula.text}    (day {WORKED_DAY + 1}, a hot one)", formula.numbers)


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
