"""The runs behind docs/evidence.md: every case is kept as it finishes, and the page's tables are the results' own."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_scripts import load

import batchnorm

ROOT = Path(__file__).resolve().parents[2]
MARKERS = "".join(
    f"<!-- {name} -->\nold\n<!-- /{name} -->\nbetween\n" for name in ("outcome", "training", "bikes")
)
PAGE = f"Before\n{MARKERS}after\n"

Main = Callable[..., None]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("evidence")


@pytest.fixture
def main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    """The script on small trainings, with its results and its page in a folder of their own."""
    whole = batchnorm.compare

    def short(network: str, data: str, seeds: int) -> batchnorm.Comparison:
        return whole(network, data, lrs=[0.1, 0.3], seeds=seeds, steps=20)

    monkeypatch.setattr(batchnorm, "compare", short)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "evidence.json")
    monkeypatch.setattr(script, "PAGE", tmp_path / "evidence.md")
    monkeypatch.setattr(
        script, "CASES", (script.Case("deep-mlp", "digits", 2), script.Case("mlp", "digits", 1))
    )
    (tmp_path / "evidence.md").write_text(PAGE)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["evidence.py", *arguments])
        script.main()

    return run


def test_every_case_is_kept_and_told(main: Main, tmp_path: Path) -> None:
    main("--only", "mlp/digits")
    first = json.loads((tmp_path / "evidence.json").read_text())["cases"]
    assert list(first) == ["mlp/digits"]
    main("--only", "deep-mlp/digits", "--reports", str(tmp_path), "--docs")
    stored = json.loads((tmp_path / "evidence.json").read_text())
    assert (stored["kind"], stored["schema_version"]) == ("evidence", 1)
    assert stored["cases"]["mlp/digits"] == first["mlp/digits"]
    assert (tmp_path / "deep-mlp-digits.html").stat().st_size > 100_000
    page = (tmp_path / "evidence.md").read_text()
    assert "old" not in page
    for text in ("Before\n", "between\n", "after\n"):
        assert text in page
    rows = [line for line in page.splitlines() if line.startswith("| deep-mlp, digits")]
    assert len(rows) == 2  # in both tables
    best = stored["cases"]["deep-mlp/digits"]["best"]
    assert f"| {100 * best[0]:.1f} %, {100 * best[1]:.1f} % |" in rows[0]
    before = page
    main("--no-run", "--docs")
    assert (tmp_path / "evidence.md").read_text() == before


def test_a_page_without_its_markers_is_left_alone(main: Main, script: ModuleType, tmp_path: Path) -> None:
    main("--only", "mlp/digits")
    (tmp_path / "evidence.md").write_text("no markers")
    with pytest.raises(SystemExit, match="0 places marked outcome"):
        main("--no-run", "--docs")
    assert (tmp_path / "evidence.md").read_text() == "no markers"


def test_the_page_in_the_docs_is_what_the_results_say(script: ModuleType) -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    cases: dict[str, Any] = json.loads(script.RESULTS.read_text(encoding="utf-8"))["cases"]
    assert script.filled(page, cases) == page
    assert set(cases) == {case.name for case in script.CASES}
    assert not any(case["interrupted"] for case in cases.values())
