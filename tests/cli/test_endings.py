"""How the process ends: signals, closed pipes, and streams that cannot print everything."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import Result

import batchnorm.comparison
from batchnorm import cli
from batchnorm._files import Interrupts
from batchnorm.cli import _output
from batchnorm.cli._progress import PlainDisplay
from batchnorm.report.document import Document, Section, Verdict

Run = Callable[..., Result]
Process = Callable[..., subprocess.CompletedProcess[str]]

SCRIPT = """
import torch
from torch import nn

def make_net():
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))

def make_data():
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return x[:32], y[:32], x[32:], y[32:]
"""
COMPARE = [
    *("compare", "--model", "nets:make_net", "--data", "nets:make_data", "--lr", "0.1"),
    *("--batch-size", "8", "--out", "r.html"),
]


class Outcome:
    """What a comparison gives; saving it takes long enough to press Ctrl-C."""

    interrupted = False

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.during = during

    def document(self) -> Document:
        return Document(
            "Title", "It learns sooner.", [Section("S", [Verdict("Label", "2× fewer σ", "Text.")])]
        )

    def to_json(self) -> str:
        return '{"kind": "comparison", "data": "σ"}'

    def save(self, path: Path) -> None:
        self.during()
        Path(path).write_text("report")


@pytest.mark.parametrize(("terminated", "code"), [(False, 130), (True, 143)])
def test_ctrl_c_during_the_writing_waits(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ctrl_c: Callable[[], None],
    terminated: bool,
    code: int,
) -> None:
    monkeypatch.setattr(batchnorm.comparison, "compare", lambda *_, **__: Outcome(ctrl_c))
    monkeypatch.setattr(_output.ending, "terminated", terminated)
    result = run("compare", "--out", "r.html", "--json", "r.json")
    assert result.exit_code == code
    assert (tmp_path / "r.html").read_text() == "report"
    assert json.loads((tmp_path / "r.json").read_text())["kind"] == "comparison"
    assert "It learns sooner." in result.stdout


def test_interrupts_are_raised_once_and_then_wait(ctrl_c: Callable[[], None]) -> None:
    with Interrupts() as outer:
        with Interrupts() as inner:
            with pytest.raises(KeyboardInterrupt):
                ctrl_c()
            ctrl_c()
            assert inner.pressed == 2
        assert outer.pressed == 2
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):  # someone who presses four times wants to leave
            ctrl_c()


def test_a_handler_of_the_callers_own_is_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (seen, interrupts.pressed) == ([signal.SIGINT], 0)


def test_json_on_stdout_is_utf_8_whatever_the_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    _output.write_json('{"data": "σ"}', "-")
    assert raw.getvalue() == '{"data": "σ"}\n'.encode()


@pytest.mark.parametrize(("encoding", "printed"), [("ascii", b"2? ?"), ("utf-8", "2× σ".encode())])
def test_what_a_stream_cannot_print_is_replaced(
    monkeypatch: pytest.MonkeyPatch, encoding: str, printed: bytes
) -> None:
    def application(args: object, prog_name: str) -> None:
        print("2× σ", end="", flush=True)

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr("batchnorm.cli.app.app", application)
    before = signal.getsignal(signal.SIGTERM)
    try:
        cli.main([])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert raw.getvalue() == printed


def test_ctrl_c_while_the_program_is_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def application(args: object, prog_name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("batchnorm.cli.app.app", application)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main([])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_log_that_cannot_be_written_falls_silent() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with PlainDisplay(Console(file=Full())) as shown:
        shown.start(1, "mlp", "classification")
        shown.run_started("without batch norm", False, 0.1, 0)
        shown.run_finished("without batch norm", False, 0.1, 0, 0.5, False)
    assert shown.done == 1


def test_sys_exit_in_the_users_code_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    context: Any = typer.Context(typer.main.get_command(typer.Typer(callback=lambda: None)), obj={})

    def leave() -> None:
        with _output.guarded(context):
            raise SystemExit(0)

    with pytest.raises(typer.Exit) as end:
        leave()
    assert end.value.exit_code == 2
    assert "error: SystemExit: 0" in capsys.readouterr().err


def test_pipes_that_no_one_reads_do_not_stop_the_trainings(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(SCRIPT)
    read, write = os.pipe()
    os.close(read)
    source = str(Path(batchnorm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm", *COMPARE, "--seeds", "2", "--steps", "2", "--json", "r.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=write,
        stderr=write,
        check=False,
        timeout=120,
    )
    os.close(write)
    assert done.returncode == 0
    assert len(json.loads((tmp_path / "r.json").read_text())["runs"]) == 4
    assert (tmp_path / "r.html").exists()


@pytest.mark.slow
def test_sigterm_writes_what_is_finished(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(SCRIPT)
    source = str(Path(batchnorm.__file__).parents[1])
    command = [sys.executable, "-m", "batchnorm", *COMPARE, "--steps", "20", "--seeds", "9999"]
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as working:
        assert working.stderr is not None
        for line in working.stderr:
            if line.startswith("[4/"):
                working.terminate()
                break
        rest = working.stderr.read()
    assert working.returncode == 143
    assert "Traceback" not in rest
    assert "Incomplete." in (tmp_path / "r.html").read_text()
