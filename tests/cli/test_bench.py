"""`batchnorm bench` as a user meets it; nothing here depends on how fast anything is."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import only_error
from typer.testing import Result

import batchnorm
from batchnorm.bench import _measure, _rank, _worker, asking, networks, process
from batchnorm.bench.readme import BEGIN, END

Run = Callable[..., Result]
MACHINE = {
    **dict.fromkeys(
        ("batchnorm", "commit", "torch", "python", "system", "libc", "huge_pages", "kernels"), "x"
    ),
    **{"cpu": "A CPU", "device": "A CPU", "cores": 2, "threads": 2, "load": 0.0},
}
QUICK = ("bench", "--suite", "tiny", "--rounds", "1", "--malloc", "as-is")


@pytest.fixture
def after() -> list[int]:
    """After how many cases Ctrl-C is pressed; none where it stays empty."""
    return []


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch, after: list[int]) -> None:
    cases = 0

    def work(job: Mapping[str, Any], memory: str = "as-is") -> Iterator[dict[str, Any]]:
        nonlocal cases
        if job["task"] == "machine":
            yield {"machine": dict(MACHINE), "copy": 30e9}
            return
        if after and cases == after[0]:
            signal.raise_signal(signal.SIGINT)
        cases += 1
        yield from _worker.answers(dict(job))

    monkeypatch.setattr(process, "work", work)


@pytest.fixture
def ctrl_c_is_pythons() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_tables_and_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    result = run(*QUICK, "--json", "b.json", "--html", "b.html", "--markdown", "README.md")
    assert result.exit_code == 0, result.stderr
    assert "Tiny layers, rows, float32" in result.stdout
    assert result.stdout.rstrip().endswith("report: b.html\njson: b.json\ntable: README.md")
    assert json.loads((tmp_path / "b.json").read_text())["kind"] == "benchmark"
    assert (tmp_path / "b.html").stat().st_size > 1_000_000
    assert "| Tiny layers, rows, float32 | fwd + bwd | ReLU |" in (tmp_path / "README.md").read_text()
    assert "[4/4] 32×64 relu, rows, float32, malloc as-is: " in result.stderr


def test_json_on_stdout_is_all_there_is(run: Run) -> None:
    content = json.loads(run(*QUICK, "--json", "-").stdout)
    assert len(content["results"]) == content["planned"] == 4


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--suite", "vgg"], "suite: got 'vgg'"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--html", "b.txt"], "--html: got b.txt"),
        (["--json", "missing/b.json"], "output path: got missing/b.json"),
        (["--json", "b.html", "--html", "b.html"], "got the same file twice"),
        (["--markdown", "none.md"], "Markdown file: got none.md"),
        (["--backend", "cudnn"], "backend: got 'cudnn', expected of cpu, triton, aten, reference, auto"),
        (["--what", "weather"], "--what: got 'weather', expected layers, host or step"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_end_in_one_line_before_any_work(run: Run, arguments: list[str], part: str) -> None:
    assert part in only_error(run(*QUICK, *arguments))


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, after: list[int]) -> None:
    """The first of the processes alone, in this one."""

    def work(jobs: Sequence[Mapping[str, Any]], memory: str = "as-is") -> Iterator[dict[str, Any]]:
        for number, answer in enumerate(_rank.rank_answers({**jobs[0], "processes": 1})):
            if after and number == after[0] + 1:  # the first answer is the machine
                signal.raise_signal(signal.SIGINT)
            yield answer

    monkeypatch.setattr(process, "work_together", work)


TOGETHER = ("bench", "--distributed", "--suite", "tiny", "--rounds", "1")


@pytest.mark.usefixtures("ranks")
def test_synchronized_layers(run: Run, tmp_path: Path) -> None:
    result = run(*TOGETHER, "--processes", "3", "--json", "b.json", "--html", "b.html")
    assert result.exit_code == 0, result.stderr
    assert "Tiny layers, rows, float32: 4 of 4 batch norms" in result.stdout
    assert "torch.nn.SyncBatchNorm runs on GPUs alone" in " ".join(result.stdout.split())
    assert result.stdout.rstrip().endswith("report: b.html\njson: b.json")
    content = json.loads((tmp_path / "b.json").read_text())
    assert (content["kind"], content["processes"], content["planned"]) == ("synchronization", 3, 2)
    assert "[2/2] 4×8 none, rows, float32: " in result.stderr


@pytest.mark.usefixtures("ranks", "ctrl_c_is_pythons")
def test_ctrl_c_between_synchronized_layers(run: Run, after: list[int], tmp_path: Path) -> None:
    after.append(1)
    result = run(*TOGETHER, "--json", "b.json")
    assert result.exit_code == 130
    content = json.loads((tmp_path / "b.json").read_text())
    assert (content["interrupted"], len(content["results"])) == (True, 1)
    assert "Interrupted: 1 of 2 cases are finished." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ["--distributed", "--against", "compile"],
            "--against: got a value, expected it without --distributed alone",
        ),
        (["--distributed", "--markdown", "README.md"], "--markdown: got a value"),
        (["--processes", "3"], "--processes: got a value, expected it with --distributed alone"),
        (["--distributed", "--device", "cuda:1"], "device: got 'cuda:1'"),
        (["--network", "resnet18"], "--network: got a value, expected it with --what step alone"),
        (["--distributed", "--image", "64"], "--image: got a value, expected it with --what step alone"),
        (["--what", "host"], "--suite: got a value, expected it with --what layers alone"),
        (["--what", "step"], "--suite: got a value, expected it with --what layers alone"),
    ],
)
def test_options_that_would_say_nothing(run: Run, arguments: list[str], part: str) -> None:
    assert part in only_error(run("bench", "--suite", "tiny", *arguments))


def test_the_hosts_time(run: Run, tmp_path: Path) -> None:
    options = ("--layout", "contiguous", "--epilogue", "relu", "--rounds", "1", "--backend", "aten")
    result = run("bench", "--what", "host", *options, "--json", "b.json", "--html", "b.html")
    assert result.exit_code == 0, result.stderr
    assert "The host's time for a layer" in result.stdout
    assert "[1/1] relu, contiguous, float32: " in result.stderr
    content = json.loads((tmp_path / "b.json").read_text())
    assert (content["kind"], content["settings"]["backend"]) == ("host-times", "aten")
    assert (tmp_path / "b.html").exists()


def test_training_steps(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(networks.BUILT_IN, "resnet10", ((1, 1, 1, 1), 1))
    options = ("--network", "resnet10", "--batch", "2", "--image", "32", "--rounds", "2")
    result = run("bench", "--what", "step", *options, "--json", "b.json", "--html", "b.html")
    assert result.exit_code == 0, result.stderr
    assert "batch norms fused" in result.stdout
    assert "[2/2] channels-last, float32, launched by the host, round 2: " in result.stderr
    content = json.loads((tmp_path / "b.json").read_text())
    assert (content["kind"], content["settings"]["image"], len(content["results"])) == (
        "training-steps",
        32,
        1,
    )


@pytest.mark.usefixtures("ctrl_c_is_pythons")
def test_ctrl_c_between_rounds(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def work(job: Mapping[str, Any], memory: str = "as-is") -> Iterator[dict[str, Any]]:
        if job["task"] == "machine":
            yield {"machine": dict(MACHINE)}
            return
        yield {"setup": {}}
        yield {"seconds": {"plain": 0.2, "fused": 0.1}}
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(process, "work", work)
    result = run("bench", "--what", "step", "--json", "b.json")
    assert result.exit_code == 130
    content = json.loads((tmp_path / "b.json").read_text())
    assert (content["interrupted"], content["results"][0]["ratio"]) == (True, {"fused": 2.0})
    assert "Interrupted: 1 of 10 rounds are finished." in result.stdout


def test_a_backend_that_is_asked_for(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(job: Mapping[str, Any], memory: str = "as-is") -> Iterator[dict[str, Any]]:
        yield from _worker.answers({**job, "measure_copy": False} if job["task"] == "machine" else dict(job))

    monkeypatch.setattr(process, "work", work)
    monkeypatch.setattr(_measure, "ask_machine", lambda *given: {**asking.ask_machine(*given), "copy": 3e10})
    result = run(*QUICK, "--backend", "reference", "--json", "b.json")
    assert result.exit_code == 0, result.stderr
    assert "backend reference, as asked for" in " ".join(result.stdout.split())
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["settings"]["backend"] == "reference"
    assert content["machine"]["backend"] == "reference, as asked for"
    assert content["results"][0]["backends"] == {"training": "reference", "inference": "reference"}
    assert [total["operation"] for total in content["sums"]] == ["forward", "forward+backward", "inference"]
    result = run(*QUICK, "--json", "b.json")
    assert ", the usual choice" in json.loads((tmp_path / "b.json").read_text())["machine"]["backend"]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refused = run(*QUICK, "--backend", "triton")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "error: --backend triton on cpu: got its kernels run on GPUs" in refused.stderr


def test_a_wrong_layer_is_a_finding(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*arguments: Any) -> Any:
        layer: Any = whole(*arguments)
        layer.eps = 0.1
        return layer

    whole = _worker.our_layer
    monkeypatch.setattr(_worker, "our_layer", broken)
    (tmp_path / "README.md").write_text(f"{BEGIN}\nas it was\n{END}\n")
    result = run(*QUICK, "--json", "b.json", "--markdown", "README.md")
    assert result.exit_code == 1
    assert "4 of 4 cases failed" in result.stdout
    assert all(not case["operations"] for case in json.loads((tmp_path / "b.json").read_text())["results"])
    assert "as it was" in (tmp_path / "README.md").read_text()


@pytest.mark.usefixtures("ctrl_c_is_pythons")
def test_ctrl_c_shows_and_writes_what_is_finished(run: Run, after: list[int], tmp_path: Path) -> None:
    after.append(2)
    (tmp_path / "README.md").write_text(f"{BEGIN}\nas it was\n{END}\n")
    result = run(*QUICK, "--json", "b.json", "--markdown", "README.md")
    assert result.exit_code == 130
    content = json.loads((tmp_path / "b.json").read_text())
    assert (content["interrupted"], len(content["results"]), content["planned"]) == (True, 2, 4)
    assert "Interrupted: 2 of 4 cases are finished." in result.stdout
    assert "as it was" in (tmp_path / "README.md").read_text()
    assert result.stderr.endswith("interrupted: the results are those of the cases that had finished\n")


@pytest.mark.usefixtures("ctrl_c_is_pythons")
def test_ctrl_c_before_the_first_case(run: Run, after: list[int], tmp_path: Path) -> None:
    after.append(0)
    result = run(*QUICK, "--json", "b.json")
    assert (result.exit_code, result.stdout) == (130, "")
    assert "interrupted: nothing was finished, no result was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sigterm_ends_the_worker_and_writes_what_is_finished(tmp_path: Path) -> None:
    source = str(Path(batchnorm.__file__).parents[1])
    command = [
        sys.executable,
        "-m",
        "batchnorm",
        "bench",
        "--suite",
        "densenet121",
        "--batch",
        "2",
        "--rounds",
        "1",
    ]
    with subprocess.Popen(
        [*command, "--json", "b.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as working:
        assert working.stderr is not None
        for line in working.stderr:
            if line.startswith("[2/"):
                working.terminate()
                break
        rest = working.stderr.read()
    assert working.returncode == 143
    assert "Traceback" not in rest
    assert json.loads((tmp_path / "b.json").read_text())["interrupted"] is True


@pytest.mark.slow
def test_the_module_needs_neither_rich_nor_typer(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('rich', 'typer', 'plotly', 'jinja2')))\n"
        "sys.argv[1:] = ['--suite', 'tiny', '--rounds', '1', '--json', 'b.json']\n"
        "from batchnorm.bench.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "tiny rows float32 forward+backward relu malloc as-is: " in done.stdout
    assert json.loads((tmp_path / "b.json").read_text())["planned"] >= 4
