"""The page one can play with, and the story's numbers as JSON."""

from pathlib import Path
from typing import Any

from batchnorm.explain.chapters import WORKED_DAY, document
from batchnorm.explain.limits import BIKESHARE
from batchnorm.explain.network import look_inside
from batchnorm.explain.questions import SHOWN
from batchnorm.explain.runners import draws, extremes, season
from batchnorm.explain.words import table
from batchnorm.report.json import to_json

__all__ = ["page", "story_json"]

SCHEMA_VERSION = 1
SCRIPTS = ("play.js", "words.js", "seen.js")


def page() -> str:
    """Return the story as one self-contained HTML page whose sliders recompute everything in the browser.

    Raises:
        MissingDependencyError: plotly or scikit-learn is not installed.
    """
    from batchnorm.report.html import render  # jinja2 is optional; the story in a terminal does without

    folder = Path(__file__).with_name("templates")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return render(document(), {**_numbers(), "texts": table(), "shown": dict(SHOWN)}, script)


def story_json() -> str:
    """Return the story's numbers as strict JSON with `kind` "explain" and `schema_version` 1."""
    return to_json(_numbers(), kind="explain", schema_version=SCHEMA_VERSION)


def _numbers() -> dict[str, Any]:
    faster, slower = extremes(season())
    bikes = [
        {"training": training, "statistics": statistics, "error": error, "deviation": deviation}
        for (training, statistics), (error, deviation) in BIKESHARE.items()
    ]
    return {
        "made_up": True,
        "draws": draws().to_dict(),
        "faster": faster,
        "slower": slower,
        "worked_day": WORKED_DAY,
        "season": season().to_dict(),
        "network": look_inside().to_dict(),
        "bikeshare": bikes,
    }
