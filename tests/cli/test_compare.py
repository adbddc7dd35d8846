import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import only_error
from typer.testing import Result

import batchnorm.comparison
from batchnorm._errors import BatchNormError, DataError, OutputError
from batchnorm.comparison.networks import RELU_RATES, network
from batchnorm.comparison.plan import BATCH_SIZE, STEPS
from batchnorm.report import html
from batchnorm.report.document import Document, Section, Verdict

Run = Callable[..., Result]

OWN = ("--model", "nets:make_net", "--data", "nets:make_data", "--lr", "0.1", "--batch-size", "8")

NETS = """
import torch
from torch import nn

def make_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))

def make_data():
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return x[:32], y[:32], x[32:], y[32:]

def needs_an_argument(width): ...
calls = []
def works_once():
    calls.append(1)
    if len(calls) > 1: raise RuntimeError("no more")
    return make_net()
def fails(): raise ValueError("no such\\nfile")
def leaves(): raise SystemExit(3)
def prints_net():
    print("building")
    return make_net()
def prints_data():
    print("loading")
    return make_data()
def returns_a_number(): return 3
def returns_none(): return None
a_number = 3
a_model = make_net()
"""


class Outcome:
    """What a comparison gives, without the hours."""

    def __init__(self, interrupted: bool = False) -> None:
        self.interrupted = interrupted

    def document(self) -> Document:
        section = Section("Verdict", [Verdict("How much sooner?", "2× fewer steps", "Text.")])
        return Document("Title", "It learns sooner.", [section])

    def to_json(self) -> str:
        return '{"kind": "comparison", "schema_version": 1}'

    def save(self, path: Path) -> None:
        Path(path).write_text("report")


class Recorder:
    """Stands in for `compare` and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.outcome: Outcome | BaseException = Outcome()

    def __call__(self, make_model: Any, data: Any, **options: Any) -> Outcome:
        self.calls.append({"make_model": make_model, "data": data, **options})
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    stand_in = Recorder()
    monkeypatch.setattr(batchnorm.comparison, "compare", stand_in)
    return stand_in


@pytest.fixture
def nets(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    (tmp_path / "unfinished.py").write_text("def make(:")
    (tmp_path / "leaving.py").write_text("import sys; sys.exit(0)")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in {".html", ".json"})


def test_the_options_reach_the_library(run: Run, recorder: Recorder) -> None:
    options = "--network cnn --data mnist5k --task classification --lr 0.1 --lr 1 --seeds 2 --steps 7"
    more = "--batch-size 9 --optimizer adam --device cpu --no-dynamics"
    assert run("compare", *options.split(), *more.split()).exit_code == 0
    (call,) = recorder.calls
    assert call.pop("progress") is not None
    assert call == {
        "make_model": "cnn",
        "data": "mnist5k",
        "task": "classification",
        "lrs": [0.1, 1.0],
        "seeds": 2,
        "steps": 7,
        "batch_size": 9,
        "optimizer": "adam",
        "device": "cpu",
        "dynamics": False,
    }


def test_the_defaults_leave_the_choice_to_the_library(run: Run, recorder: Recorder, tmp_path: Path) -> None:
    result = run("compare")
    assert result.exit_code == 0
    (call,) = recorder.calls
    assert (call["make_model"], call["data"], call["seeds"]) == ("deep-mlp", "digits", 3)
    assert (call["lrs"], call["steps"], call["batch_size"]) == (None, None, None)
    assert files(tmp_path) == ["batchnorm-report.html"]
    assert "It learns sooner." in result.stdout
    assert "2× fewer steps" in result.stdout
    assert result.stdout.splitlines()[-1] == "report: batchnorm-report.html"


def test_json_on_stdout_is_all_there_is(run: Run, recorder: Recorder, tmp_path: Path) -> None:
    result = run("compare", "--json", "-", "--out", "r.html")
    assert json.loads(result.stdout) == {"kind": "comparison", "schema_version": 1}
    assert "report: r.html" in result.stderr
    assert files(tmp_path) == ["r.html"]


def test_json_in_a_file(run: Run, recorder: Recorder, tmp_path: Path) -> None:
    result = run("compare", "--json", "r.json", "--out", "r.html")
    assert json.loads((tmp_path / "r.json").read_text())["kind"] == "comparison"
    assert result.stdout.splitlines()[-2:] == ["report: r.html", "json: r.json"]


def test_an_interrupted_comparison_is_written_and_ends_with_130(
    run: Run, recorder: Recorder, tmp_path: Path
) -> None:
    recorder.outcome = Outcome(interrupted=True)
    result = run("compare")
    assert result.exit_code == 130
    assert files(tmp_path) == ["batchnorm-report.html"]
    assert "interrupted" in result.stderr


@pytest.mark.parametrize("unwritable", [False, True])
def test_an_error_with_finished_trainings_writes_them_and_ends_with_2(
    run: Run, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unwritable: bool
) -> None:
    def full(self: Outcome, path: Path) -> None:
        raise OutputError("disk full")

    if unwritable:
        monkeypatch.setattr(Outcome, "save", full)
    recorder.outcome = DataError("image 7 is missing")
    recorder.outcome.comparison = Outcome(interrupted=True)
    result = run("compare", "--json", "r.json")
    assert result.exit_code == 2
    assert files(tmp_path) == (["r.json"] if unwritable else ["batchnorm-report.html", "r.json"])
    assert "It learns sooner." in result.stdout
    told = "stopped by an error: the results are those of the trainings that had finished"
    errors = ["error: disk full"] * unwritable + ["error: image 7 is missing"]
    assert result.stderr.splitlines() == [told, *errors]


@pytest.mark.usefixtures("nets")
def test_a_model_that_fails_at_the_second_seed_leaves_the_first(run: Run, tmp_path: Path) -> None:
    result = run("compare", *OWN, "--model", "nets:works_once", "--steps", "2", "--json", "r.json")
    assert result.exit_code == 2
    error = result.stderr.splitlines()[-1].removeprefix("error: ")
    assert error.startswith("--model nets:works_once raised RuntimeError: no more")
    content = json.loads((tmp_path / "r.json").read_text())
    assert (content["interrupted"], len(content["runs"])) == (True, 2)
    assert content["error"] == f"ModelError: {error}"
    page = (tmp_path / "batchnorm-report.html").read_text()
    assert "Stopped by an error (ModelError: --model nets:works_once raised RuntimeError: no more" in page


def test_an_interruption_before_anything_is_finished_writes_nothing(
    run: Run, recorder: Recorder, tmp_path: Path
) -> None:
    recorder.outcome = KeyboardInterrupt()
    result = run("compare")
    assert (result.exit_code, result.stdout, result.stderr) == (
        130,
        "",
        "interrupted: nothing was finished, no report was written\n",
    )
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "missing/r.html"], "mkdir -p missing"),
        (["--out", "folder.html"], "Add a file name"),
        (["--out", "r.pdf"], "a file that ends in .html"),
        (["--json", "missing/r.json"], "mkdir -p missing"),
        (["--out", "r.html", "--json", "./r.html"], "the same file as --out"),
        (["--network", "mlp", "--model", "nets:make_net"], "--network and --model: got both"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(
    run: Run, recorder: Recorder, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    assert words in only_error(run("compare", *arguments))
    assert recorder.calls == []


def test_a_report_without_plotly_is_refused_before_the_work(
    run: Run, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "pip install plotly" in only_error(run("compare"))
    assert recorder.calls == []


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize("option", ["--model", "--data"])
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("missing_module:make", "ModuleNotFoundError on importing missing_module"),
        ("broken:make", "No module named 'nothing_of_that_name'"),
        ("unfinished:make", "SyntaxError on importing unfinished"),
        ("leaving:make", "SystemExit on importing leaving (0)"),
        ("nets.py:make_net", "Give the module, not the file: nets:make_net."),
        ("nets:make_nett", "no 'make_nett' in nets"),
        ("nets:", "expected MODULE:FACTORY"),
        (":make", "expected MODULE:FACTORY"),
        ("nets:a_number", "an object of type int, expected a function or a class"),
    ],
)
def test_a_factory_that_leads_nowhere(
    run: Run, recorder: Recorder, option: str, spec: str, words: str
) -> None:
    error = only_error(run("compare", option, spec))
    assert words in error
    assert option in error
    assert recorder.calls == []


@pytest.mark.usefixtures("nets")
def test_a_wrong_name_is_answered_with_the_right_ones(run: Run, recorder: Recorder) -> None:
    assert "It has: fails, leaves, make_data, make_net" in only_error(
        run("compare", "--model", "nets:nothing")
    )


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nets:needs_an_argument"], "a function that needs width"),
        (["--model", "nets:fails"], "--model nets:fails raised ValueError: no such file; batchnorm --debug"),
        (["--model", "nets:leaves"], "--model nets:leaves raised SystemExit: 3"),
        (["--model", "nets:returns_a_number"], "expected a function that returns a torch.nn.Module"),
        (["--model", "nets:a_model"], "got a model, expected a function"),
        (["--data", "nets:fails"], "--data nets:fails raised ValueError: no such file; batchnorm --debug"),
        (["--data", "nets:returns_none"], "NoneType"),
        (["--network", "nonsense"], "'nonsense', expected one of mlp, deep-mlp, cnn"),
        (["--data", "nonsense"], "'nonsense', expected one of digits, mnist5k"),
        (["--lr", "-1"], "lrs"),
        (
            ["--device", "gpu"],
            "'gpu', expected auto, cpu, cuda, cuda:1, mps or xpu. An NVIDIA GPU is called cuda",
        ),
    ],
)
def test_what_the_library_refuses_is_one_line(
    run: Run, tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert words in only_error(run("compare", "--steps", "2", "--seeds", "1", *arguments))
    assert files(tmp_path) == []


def test_an_unexpected_error_is_one_line_that_says_how_to_see_more(run: Run, recorder: Recorder) -> None:
    recorder.outcome = ZeroDivisionError("of the\nuser's")
    assert "ZeroDivisionError: of the user's (batchnorm --debug" in only_error(run("compare"))


@pytest.mark.parametrize("error", [DataError("known"), ZeroDivisionError("unknown")])
def test_debug_shows_the_traceback(run: Run, recorder: Recorder, error: Exception) -> None:
    recorder.outcome = error
    result = run("--debug", "compare")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert str(error) in result.stderr.splitlines()[-1]


def test_an_error_is_not_taken_for_markup(run: Run, recorder: Recorder) -> None:
    recorder.outcome = BatchNormError("shape [3] and [/x], " + "long " * 60)
    assert "[3] and [/x]" in only_error(run("compare"))


@pytest.mark.usefixtures("nets")
def test_a_real_comparison_of_ones_own_network(run: Run, tmp_path: Path) -> None:
    result = run("compare", *OWN, "--steps", "4", "--seeds", "2", "--json", "r.json", "--out", "r.html")
    assert result.exit_code == 0
    assert "[8/8]" in result.stderr
    assert "make_net" in result.stdout
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["kind"] == "comparison"
    assert len(content["runs"]) == 4
    page = (tmp_path / "r.html").read_text()
    assert html._plotly() in page


@pytest.mark.slow
@pytest.mark.usefixtures("nets")
def test_ctrl_c_writes_what_is_finished(tmp_path: Path) -> None:
    arguments = [*OWN, "--steps", "20", "--seeds", "9999", "--out", "r.html", "--json", "r.json"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(batchnorm.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "batchnorm", "compare", *arguments]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as working:
        assert working.stderr is not None
        for line in working.stderr:
            if line.startswith("[6/"):  # the third pair: two are finished for certain
                working.send_signal(signal.SIGINT)
                break
        rest = working.stderr.read()
    assert working.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["interrupted"] is True
    assert 4 <= len(content["runs"]) < 9999
    assert "Incomplete." in (tmp_path / "r.html").read_text()


def test_several_rates_in_one_option_are_answered_with_how_to_give_them(run: Run, recorder: Recorder) -> None:
    result = run("compare", "--lr", "0.1,0.3")
    assert result.exit_code == 2
    assert "--lr 0.1 --lr 0.3" in " ".join(result.stderr.replace("│", " ").split())
    assert recorder.calls == []


@pytest.mark.usefixtures("nets")
def test_what_the_users_code_prints_does_not_reach_stdout(run: Run) -> None:
    own = ("--model", "nets:prints_net", "--data", "nets:prints_data", "--lr", "0.1", "--batch-size", "8")
    result = run("compare", *own, "--steps", "1", "--seeds", "1", "--json", "-")
    assert json.loads(result.stdout)["kind"] == "comparison"
    assert "building" in result.stderr
    assert "loading" in result.stderr


def test_a_path_is_not_taken_for_markup(run: Run, recorder: Recorder, tmp_path: Path) -> None:
    result = run("compare", "--out", "[red]r[x].html")
    assert result.stdout.splitlines()[-1] == "report: [red]r[x].html"


def test_a_report_that_cannot_be_written_leaves_the_rest(
    run: Run, recorder: Recorder, tmp_path: Path
) -> None:
    class Unwritable(Outcome):
        def save(self, path: Path) -> None:
            raise OutputError(f"cannot write {path}: disk full")

    recorder.outcome = Unwritable()
    result = run("compare", "--json", "r.json")
    assert result.exit_code == 2
    assert json.loads((tmp_path / "r.json").read_text())["kind"] == "comparison"
    assert "2× fewer steps" in result.stdout
    assert "report:" not in result.stdout
    assert result.stderr == "error: cannot write batchnorm-report.html: disk full\n"


def test_help_tells_the_defaults(run: Run) -> None:
    text = " ".join(run("compare", "--help").stdout.split())
    assert "0.003 to 3 for deep-mlp" in text
    assert (RELU_RATES[0], RELU_RATES[-1]) == (0.003, 3.0)
    assert f"{STEPS}; {network('mlp').steps} for mlp, {network('cnn').steps} for cnn" in text
    assert f"[default: {BATCH_SIZE}, or all" in text
