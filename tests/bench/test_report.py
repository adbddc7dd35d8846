"""What a benchmark says: options, JSON, tables, the page, the README's table."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from batchnorm._errors import DataError, InputError
from batchnorm.bench import Benchmark, measure
from batchnorm.bench._measure import _warnings, _Work
from batchnorm.bench.plan import cases, checked
from batchnorm.bench.readme import BEGIN, END, refresh
from batchnorm.report import terminal

OPTIONS: dict[str, Any] = {
    "suites": ["tiny"],
    "layouts": ["contiguous", "channels-last"],
    "dtypes": ["float32"],
    "device": "cpu",
    "against": ["eager"],
    "epilogues": [],
    "batch": None,
    "threads": None,
    "rounds": 5,
    "memory": ["as-is"],
}


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("suites", ["resnet"], "suite: got 'resnet', expected of resnet50, mobilenet_v2"),
        ("layouts", ["nhwc"], "layout: got 'nhwc'"),
        ("dtypes", ["int8"], "dtype: got 'int8'"),
        ("device", "abacus", "device: got 'abacus', expected cpu, cuda or cuda:N"),
        ("against", ["jax"], "against: got 'jax'"),
        ("epilogues", ["softmax"], "epilogue: got 'softmax'"),
        ("batch", 1, "batch: got 1, expected at least 2"),
        ("rounds", 0, "rounds: got 0, expected at least 1"),
        ("memory", [], "memory: got none"),
    ],
)
def test_an_option_that_does_not_fit_is_named(option: str, value: object, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        checked(**{**OPTIONS, option: value})


def test_cases_follow_from_the_options() -> None:
    found = cases(checked(**{**OPTIONS, "suites": ["resnet50"], "memory": ["as-is", "raised"]}))
    assert len(found) == 2 * 16 * len({case.memory for case in found})
    assert sum(case.count for case in found if (case.layout, case.memory) == ("contiguous", "as-is")) == 53
    tiny = cases(checked(**OPTIONS))
    assert {case.layout for case in tiny} == {"rows"}  # 2-D input is measured once
    assert {case.threads for case in tiny} == {1}
    on_gpu = cases(
        checked(**{**OPTIONS, "suites": ["resnet50"], "device": "cuda:1", "memory": ["as-is", "raised"]})
    )
    assert {(case.shape[0], case.memory) for case in on_gpu} == {(128, "as-is")}
    everything = cases(checked(**{**OPTIONS, "suites": ["resnet50"], "epilogues": ["all"], "batch": 4}))
    counted = [case for case in everything if case.layout == "contiguous"]
    assert sum(case.count for case in counted) == 3 * 53
    assert {case.epilogue for case in counted} == {"none", "relu", "residual+relu"}
    assert len(cases(checked(**{**OPTIONS, "suites": "all"}))) > 200


def test_json_says_everything(result: Benchmark) -> None:
    content = json.loads(result.to_json())
    assert (content["kind"], content["schema_version"]) == ("benchmark", 1)
    assert {
        "verdict",
        "machine",
        "settings",
        "groups",
        "results",
        "warnings",
        "interrupted",
    } <= content.keys()
    first = content["results"][0]
    assert first["shape"] == [16, 64, 112, 112]
    timed = first["operations"]["forward+backward"]
    assert timed["times"]["eager"].keys() == {"p20", "p50", "p80", "rounds", "faults", "replayed"}
    assert timed["ratio"]["eager"] == pytest.approx(1.125)
    assert timed["counted_bytes"] == 8 * 16 * 64 * 112 * 112 * 4
    assert first["errors"]["batchnorm"]["dx"] == 2e-7
    group = next(g for g in content["groups"] if g["larger_than"] == 32_000_000 and g["memory"] == "as-is")
    assert group["worst_shape"] == "16×64×112²"


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(result: Benchmark, width: int) -> None:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(terminal.render(result.document(), brief=True))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    for part in (
        "A CPU, 2 cores",
        "abc123",
        "add + ReLU",
        "as is:",
        "raised:",
        "16×64×112²",
        "2.0e-7",
        "8.6e-6",
    ):
        assert part in text
    # No word is torn apart.
    assert "operation" in text
    assert "inference" in text


def test_the_headline_speaks_of_every_layout(result: Benchmark) -> None:
    assert result.verdict.startswith(
        "ResNet-50, contiguous, float32: the 12 batch norms of a training step take 62.0 ms, torch.nn's "
    )
    assert "channels-last" in result.verdict


def test_the_page_has_both_figures(result: Benchmark, tmp_path: Path) -> None:
    page = result.save(tmp_path / "bench.html").read_text(encoding="utf-8")
    assert "How many times as fast as torch.nn" in page
    assert "Share of the speed at which this machine copies memory" in page
    assert "<table>" in result._repr_html_()


def test_no_figure_without_times(result: Benchmark, tmp_path: Path) -> None:
    failed = tuple(replace(record, failure="y is off", times={}) for record in result.records)
    broken = replace(result, records=failed)
    assert broken.verdict == "12 of 12 cases failed; the first: " + str(failed[0].case) + ": y is off."
    assert "Failed" in broken.save(tmp_path / "bench.html").read_text(encoding="utf-8")
    assert json.loads(broken.to_json())["results"][0]["operations"] == {}


def test_the_readmes_table_is_renewed_and_nothing_else(result: Benchmark, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"# Title σ\n\n{BEGIN}\nold\n{END}\n\nThe end.\n", encoding="utf-8")
    for _ in range(2):
        refresh(file, result)
    text = file.read_text(encoding="utf-8")
    assert text.startswith(
        f"# Title σ\n\n{BEGIN}\nA CPU, 2 threads, torch 2.13.0, batchnorm 0.1.0 (abc123); memory"
    )
    assert text.endswith(f"|\n{END}\n\nThe end.\n")
    assert "old" not in text
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("| ResNet-50, channels-last, float32 | fwd + bwd |")
    ]
    assert len(rows) == 3
    assert "Batches: 16 for ResNet-50." in text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_markers_that_are_not_there_are_an_error(result: Benchmark, tmp_path: Path, text: str) -> None:
    file = tmp_path / "README.md"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="expected one line <!-- benchmark: begin -->"):
        refresh(file, result)
    assert file.read_text(encoding="utf-8") == text


def test_the_projects_readme_has_the_markers() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert (text.count(BEGIN), text.count(END)) == (1, 1)


def test_a_busy_machine_and_an_unsteady_one_are_pointed_out(
    monkeypatch: pytest.MonkeyPatch, here: list[Mapping[str, Any]]
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1.9, 0.0, 0.0))
    found = measure("tiny", memory=["as-is"], rounds=1)
    assert "a load of 1.9 on 2 cores" in found.warnings[0]
    assert found.warnings[0] in str(found)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert measure("tiny", memory=["as-is"], rounds=1).warnings == ()


def test_who_was_not_captured_as_a_graph_is_named(result: Benchmark) -> None:
    work = _Work(result.settings)
    work.machine = {"cores": 2}
    first = result.records[0]
    times = {task: dict(each) for task, each in first.times.items()}
    times["forward"]["eager"] = replace(times["forward"]["eager"], replayed=False)
    times["inference"]["eager"] = replace(times["inference"]["eager"], replayed=True)
    work.records = [replace(first, times=times), *result.records[1:]]
    work.load = 0.0
    assert _warnings(work) == [
        "Launched by the host, since it could not be captured as a CUDA graph, so that the host's time is in it: "
        "eager in forward."
    ]
