import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import only_error
from rich.console import Console
from typer.testing import Result

import batchnorm.cli.explain
from batchnorm.checks.rule import all_rules
from batchnorm.explain.chapters import CHAPTERS

Run = Callable[..., Result]

TABLE = "name, time ,heat\nAnn,81,15\nBen,84,16.5\n\nCid,93,30\n"


def test_the_story_is_told_without_waiting_in_a_pipe(run: Run) -> None:
    result = run("explain")
    assert result.exit_code == 0
    places = [result.stdout.index(f"\n{chapter.title}\n") for chapter in CHAPTERS]
    assert places == sorted(places)
    assert "made up" in result.stdout
    assert "correlation 0.21" in result.stdout
    assert "correlation 0.87" in result.stdout
    assert "σ² = Σ(x − μ)² / n" in result.stdout
    assert "Answers" in result.stdout


@pytest.mark.parametrize("step", range(len(CHAPTERS)))
def test_one_step_is_that_step_alone(run: Run, step: int) -> None:
    result = run("explain", "--step", str(step))
    assert result.exit_code == 0
    shown = [chapter.title for chapter in CHAPTERS if f"\n{chapter.title}\n" in result.stdout]
    assert shown == [CHAPTERS[step].title]


def test_help_names_every_step(run: Run) -> None:
    text = " ".join(run("explain", "--help").stdout.split())
    for number in range(len(CHAPTERS)):
        assert f"{number} " in text
    assert str(batchnorm.cli.explain._LAST) == str(len(CHAPTERS) - 1)


def test_values_are_traced(run: Run) -> None:
    result = run("explain", "--values", "81, 84;93")
    assert result.exit_code == 0
    assert "(81 + 84 + 93) / 3 = 86" in result.stdout
    assert "Step 4: scale and shift" in result.stdout
    one = run("explain", "--values", "81,84,93", "--step", "2")
    assert "Step 2" in one.stdout
    assert "Step 1" not in one.stdout


def test_a_table_is_traced_by_its_columns_of_numbers(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(TABLE)
    content = json.loads(run("explain", "--csv", "runs.csv", "--json", "-").stdout)
    assert content["names"] == ["time", "heat"]
    assert content["mean"] == [86, 20.5]
    chosen = json.loads(run("explain", "--csv", "runs.csv", "--column", "heat", "--json", "-").stdout)
    assert chosen["x"] == [[15], [16.5], [30]]


def table(run: Run, folder: Path, text: str, *options: str) -> tuple[list[str], list[list[float]], str]:
    """What a table is read as: the names, the rows, and what is said of it."""
    (folder / "own.csv").write_text(text)
    result = run("explain", "--csv", "own.csv", "--json", "-", *options)
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    return content["names"], content["x"], result.stderr


def test_a_first_row_of_numbers_is_data(run: Run, tmp_path: Path) -> None:
    names, rows, said = table(run, tmp_path, "1,2\n3,4\n5,9\n")
    assert (names, rows) == (["column 1", "column 2"], [[1, 2], [3, 4], [5, 9]])
    assert "note: own.csv: no line of names: the first line holds numbers and is data" in said
    names, rows, _ = table(run, tmp_path, "1,2\n3,4\n", "--column", "2", "--column", "column 1")
    assert (names, rows) == (["column 2", "column 1"], [[2, 1], [4, 3]])
    assert table(run, tmp_path, "5\n6\n")[:2] == (["column 1"], [[5], [6]])


def test_what_is_left_out_is_named(run: Run, tmp_path: Path) -> None:
    assert "note: own.csv: left out, since they do not hold numbers: name" in table(run, tmp_path, TABLE)[2]
    assert table(run, tmp_path, TABLE, "--column", "time")[2] == ""
    assert "taken for names, although it holds 81" in table(run, tmp_path, "Ann,81\nBen,84\nCid,93\n")[2]


@pytest.mark.parametrize(
    "text",
    ["a;b\n1;2\n3;4\n", "a\tb\n1\t2\n3\t4\n", "a,b\n1,2\n3,4\n", "a,b,\n1,2,\n3,4,\n", '"a";b\n1;"2"\n3;4\n'],
    ids=["semicolons", "tabs", "commas", "a separator at the end", "quotes"],
)
def test_separators_are_recognized(run: Run, tmp_path: Path, text: str) -> None:
    assert table(run, tmp_path, text) == (["a", "b"], [[1, 2], [3, 4]], "")


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("a,b\n1,2\n4,\n6,7\n", [], "line 3, column b: got an empty cell, expected a finite number. Fill it"),
        ("a,b,c\n1,2,3\n4,,6\n", [], "or name columns without such cells: --column 'a'."),
        ("1,2\n,4\n5,6\n", [], "line 2, column 1: got an empty cell"),
        ("a,b\n1,2\n3,four\n\n5,6\n", [], "line 3, column b: got 'four', expected a finite number. Mend it"),
        ("a,b\n1,2\n\n3,nan\n5,6\n", [], "line 4, column b: got 'nan'"),
        (
            "a;b\n1,5;2,5\n3,5;4,5\n",
            ["--column", "a"],
            "got '1,5', expected a finite number. Write decimals with",
        ),
        ("1,5;2,5\n3,5;4,5\n", [], "expected one. Write decimals with a point"),
        (
            "a;b\n1;2\n3;4;5\n",
            [],
            "line 3: got 3 cells, expected 2, as in the first line. The cells were taken to",
        ),
        ("name,q\nAnn,1\nBen,2\n", ["--column", "Q"], "got 'Q', expected one of q"),
        (
            "name,q\nAnn,1\nBen,2\n",
            ["--column", "name"],
            "got 'Ann', expected a finite number. The columns of",
        ),
        ("name,w\nAnn,x\nBen,y\n", ["--column", "q"], "a column of numbers, of which there is none"),
        ("x,x\n1,2\n3,4\n", ["--column", "x"], "got 'x', the name of 2 columns"),
        ("x,y\n1,2\n3,4\n", ["--column", "3"], "got '3', expected one of x, y"),
        ("", [], "got 0 rows of data, expected at least two"),
    ],
)
def test_a_table_that_cannot_be_taken_whole_says_where(
    run: Run, tmp_path: Path, text: str, options: list[str], says: str
) -> None:
    (tmp_path / "own.csv").write_text(text)
    assert says in only_error(run("explain", "--csv", "own.csv", *options))


@pytest.mark.parametrize("code", sorted(all_rules()))
def test_the_page_of_a_rule(run: Run, code: str) -> None:
    rule = all_rules()[code]
    result = run("explain", code.lower())
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{code}: {rule.title}\n{rule.severity}, needs ")
    shown = re.sub(r"\W+", " ", result.stdout)
    for sentence in re.findall(r"^\w[^`*\n]{30,}$", rule.page, re.MULTILINE):
        assert re.sub(r"\W+", " ", sentence).strip() in shown
    assert "What to do" in result.stdout
    assert "##" not in result.stdout


def test_the_page_of_a_rule_as_data(run: Run, tmp_path: Path) -> None:
    content = json.loads(run("explain", "BN101", "--json", "-").stdout)
    assert (content["kind"], content["code"], content["needs"]) == ("rule", "BN101", ["batches", "model"])
    assert content["page"].startswith("In eval mode")
    assert run("explain", "BN101", "--json", "rule.json").stdout.endswith("json: rule.json\n")
    assert json.loads((tmp_path / "rule.json").read_text("utf-8")) == content


def test_files_appear_and_are_named(run: Run, tmp_path: Path) -> None:
    result = run("explain", "--html", "story.html", "--json", "story.json")
    assert result.exit_code == 0
    assert result.stdout == "page: story.html\njson: story.json\n"
    assert 'type="range"' in (tmp_path / "story.html").read_text("utf-8")
    content = json.loads((tmp_path / "story.json").read_text("utf-8"))
    assert (content["kind"], content["schema_version"]) == ("explain", 1)
    own = run("explain", "--values", "1,2,6", "--html", "own.html", "--json", "-")
    assert json.loads(own.stdout)["kind"] == "trace"
    assert own.stderr == "page: own.html\n"
    assert 'type="range"' not in (tmp_path / "own.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["BN11"], "got 'BN11', expected one of BN110, BN111, BN112, BN113. `batchnorm rules`"),
        (["BN999"], "expected one of BN"),
        (["nonsense"], "expected the code of a rule, such as BN101"),
        (["BN001", "--step", "1"], "--step: got the code of a rule as well"),
        (["BN001", "--html", "a.html"], "--html: got the code of a rule as well"),
        (["BN001", "--values", "1,2"], "--values: got the code of a rule as well"),
        (["BN001", "--json", "no/rule.json"], "mkdir -p no"),
        (["--values", "1,two,3"], "got 'two', expected finite numbers"),
        (["--values", "1,nan"], "got 'nan'"),
        (["--values", "7"], "at least two numbers"),
        (["--values", ""], "at least two numbers"),
        (["--values", "1,2", "--csv", "runs.csv"], "got both"),
        (["--values", "1,2", "--step", "5"], "expected 1 to 4"),
        (["--values", "1,2", "--column", "time"], "expected --csv"),
        (["--csv", "no.csv"], "--csv no.csv: got No such file or directory"),
        (["--csv", "."], "Is a directory"),
        (["--csv", "runs.csv", "--column", "pace"], "got 'pace', expected one of time, heat"),
        (["--csv", "runs.csv", "--column", "name"], "line 2, column name: got 'Ann'"),
        (["--csv", "words.csv"], "no column that holds numbers alone"),
        (["--csv", "ragged.csv"], "line 3: got 1 cell, expected 2"),
        (["--csv", "short.csv"], "at least two rows"),
        (["--csv", "binary.csv"], "no text in UTF-8"),
        (["--html", "story.txt"], "ends in .html"),
        (["--html", "no/story.html"], "mkdir -p no"),
        (["--json", "no/story.json"], "mkdir -p no"),
        (["--html", "a.html", "--json", "a.html"], "the same file"),
        (["--step", "1", "--json", "-"], "Files hold all steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_no_file(
    run: Run, tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "runs.csv").write_text(TABLE)
    (tmp_path / "words.csv").write_text("a,b\nx,y\nz,w\n")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "short.csv").write_text("a,b\n1,2\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    before = sorted(tmp_path.iterdir())
    assert says in only_error(run("explain", *arguments))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("step", ["10", "-1", "two"])
def test_an_unknown_step_is_wrong_usage(run: Run, step: str) -> None:
    result = run("explain", "--step", step)
    assert result.exit_code == 2
    assert "--step" in result.stderr


@pytest.mark.parametrize("options", [[], ["--no-pause"]], ids=["pause", "no pause"])
def test_a_terminal_waits_for_enter_between_steps(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    waits: list[str] = []

    class Terminal(Console):
        is_terminal = True  # type: ignore[assignment]

        def input(self, prompt: object = "", **_: object) -> str:  # type: ignore[override]
            waits.append(str(prompt))
            return ""

    monkeypatch.setattr(batchnorm.cli.explain, "stdout", Terminal)
    monkeypatch.setattr(batchnorm.cli.explain, "_someone_sits_there", lambda: True)
    assert run("explain", "--values", "1,2,6", *options).exit_code == 0
    assert len(waits) == (0 if options else 4)


def test_ctrl_c_ends_it_quietly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(batchnorm.cli.explain, "_show", interrupt)
    result = run("explain", "--values", "1,2")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_help_is_quick(process: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import sys\nfrom batchnorm.cli import main\n"
        "try: main(['explain', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'rich.table'} & set(sys.modules)\n"
    )
    result = process("-c", code)
    assert result.returncode == 0, result.stderr
    assert "made-up runners" in " ".join(result.stdout.lower().split())
