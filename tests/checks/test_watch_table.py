"""The live table: what stands in it, and how it lives with what the training prints."""

import io
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from watch_helpers import conv_net, pictures, train

import batchnorm
from batchnorm.checks.finding import Finding
from batchnorm.checks.live.judging import Told
from batchnorm.checks.live.pace import Pace
from batchnorm.checks.live.table import LiveTable, _last, drawn

pytest.importorskip("rich")


def finding(
    code: str = "BN004", severity: Any = "warning", module: str = "a", message: str = "said"
) -> Finding:
    return Finding(code, severity, module, message, "why", "fix")


def text(numbers: dict[str, dict[str, float]], told: list[Told], **options: Any) -> list[str]:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=90, record=True)
    console.print(drawn(numbers, told, Pace(10, 0), "title", **options))
    return [line.rstrip() for line in console.export_text().splitlines() if line.strip()]


def test_rows_and_findings() -> None:
    usual = {
        "mean_gap": 0.1,
        "variance_ratio": 1.25,
        "gamma": 0.98,
        "dead": 0.0,
        "values": 2048.0,
        "nonfinite": 0.0,
    }
    numbers = {
        "a": usual,
        "b": {**usual, "mean_gap": 0.7, "dead": 0.25},
        "c": {"dead": 0.0, "nonfinite": 0.5},
    }
    told = [
        Told(finding("BN001", "error", "c", "NaN"), 3, 5),
        Told(finding(module="a"), 1, 5),
        Told(finding("BN103", "warning", "b", "few"), 2, 3, gone=True),
    ]
    lines = text(numbers, told)
    assert lines[0] == "title"
    assert lines[1].split() == ["layer", "mean", "gap", "variance", "|γ|", "dead", "values", "findings"]
    # The worst first: an error, a warning; what has gone does not count.
    assert [line.split()[0] for line in lines[3:6]] == ["c", "a", "b"]
    assert lines[3].split() == ["c", "NaN", "BN001"]
    assert lines[4].split() == ["a", "0.10", "σ", "×", "1.25", "0.98", "2,048", "BN004"]
    assert lines[5].split() == ["b", "0.70", "σ", "×", "1.25", "0.98", "25", "%", "2,048"]
    assert lines[6:9] == [
        "BN001 error c: NaN",
        "BN004 warning a: said",
        "BN103 warning b: few (not seen since step 3)",
    ]
    assert lines[9] == "watching takes 0.0 % of the training's time · next look at step 10"


def test_a_low_terminal_shows_the_worst() -> None:
    numbers = {f"layer{n}": {"mean_gap": n / 100, "dead": 0.0} for n in range(50)}
    lines = text(
        numbers, [Told(finding(f"BN1{n:02}", module=f"layer{n}"), 1, 1) for n in range(9)], height=24
    )
    assert len(lines) <= 22
    assert lines[3].split()[0] == "layer8"
    assert any("more layers" in line for line in lines)
    assert "and 3 more" in lines


@pytest.mark.parametrize(
    ("written", "left"),
    [
        ("a\rbc\r", "bc"),
        ("plain", "plain"),
        ("\r\x1b[A\x1b[K 10%", " 10%"),
        ("\r", ""),
        ("\x1b[31mred", "\x1b[31mred"),
    ],
)
def test_a_line_that_is_written_over_itself(written: str, left: str) -> None:
    assert _last(written) == left


def test_no_table_where_nobody_looks_on(capsys: pytest.CaptureFixture[str]) -> None:
    with batchnorm.watch(conv_net(), every=1) as watcher:
        train(watcher._model, [pictures()])
    assert watcher._table is None
    assert capsys.readouterr().err == ""


def test_a_table_in_a_file_is_its_last_state(capsys: pytest.CaptureFixture[str]) -> None:
    with batchnorm.watch(conv_net(), every=1, table=True) as watcher:
        train(watcher._model, [pictures(), pictures(seed=1)])
        assert isinstance(watcher._table, LiveTable)
    said = capsys.readouterr().err
    assert said.count("batch norm in Sequential") == 1
    assert "step 2 · every step" in said


_LOOP = """
model = conv_net(momentum=0.99)
with batchnorm.watch(model, every=1):
    for epoch in range(2):
        for step in range(3):
            train(model, [pictures(seed=step)])
            sys.stderr.write(f"\\rprogress {{step}}")
        print(f"epoch {{epoch}}")
    assert type(sys.stdout).__name__ == "_Above"
assert type(sys.stdout).__name__ == "TextIOWrapper"
if {fails}:
    batchnorm.watch(model, every=1)
    train(model, [pictures(), pictures()])
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize("fails", [False, True])
def test_in_a_terminal(fails: bool) -> None:
    """Printed lines are whole, the table is there once, and the cursor comes back, whatever ends the program."""
    said, status = in_terminal(_LOOP.format(fails=fails))
    assert (status != 0) is fails, said
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") > 0
    for epoch in range(2):
        assert f"epoch {epoch}\r\n" in said
    assert "progress 2" in said
    assert said.count("BN004 warning at 1, 4") == 1 + fails


_KEPT = """
import logging
model = conv_net()
watcher = batchnorm.watch(model, every=1)
train(model, [pictures(), pictures()])
log, error, output = logging.StreamHandler(), sys.stderr, sys.stdout
error.write("\\rbar 10%")
output.write("begun ")
watcher.close()
output.write("ended\\n")
error.write("\\rbar 100%\\n")
output.flush(), error.flush()
log.emit(logging.makeLogRecord({"msg": "logged"}))
print("printed")
"""


def test_a_stream_that_was_kept_outlives_the_table() -> None:
    said, status = in_terminal(_KEPT)
    assert status == 0, said
    behind = said[said.rindex("\x1b[?25h") :]
    # A line that was begun is not lost, and goes on where it was.
    assert "begun bar 10%ended\r\n\rbar 100%\r\nlogged\r\nprinted\r\n" in behind


_TWO = """
one, two = conv_net(), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3))
first, second = batchnorm.watch(one, every=1), batchnorm.watch(two, every=1)
for _ in range(3):
    train(one, [pictures()])
    train(two, [pictures()])
first.close()
print("between")
train(two, [pictures(), pictures()])
assert type(sys.stdout).__name__ == "_Above"
second.close()
assert type(sys.stdout).__name__ == "TextIOWrapper"
print("behind")
"""


def test_a_second_table_waits_for_the_first() -> None:
    said, status = in_terminal(_TWO)
    assert status == 0, said
    assert said.count("no table while another is shown") == 1
    _, after = said.split("between\r\n")
    assert "step 5 · every step" in after
    assert "behind\r\n" in after


_HEAD = """
import sys, torch, batchnorm
from torch import nn
sys.path.insert(0, {folder!r})
from watch_helpers import conv_net, pictures, train
"""


def in_terminal(code: str) -> tuple[str, int]:
    """What a program says in a terminal, and its exit status."""
    code = _HEAD.format(folder=str(Path(__file__).resolve().parents[1])) + code
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=theirs,
        stderr=theirs,
        stdin=theirs,
        env=environment,
        close_fds=True,
    ) as process:
        os.close(theirs)
        said = _read(ours)
        status = process.wait(timeout=60)
    os.close(ours)
    return said, status


def _read(descriptor: int) -> str:
    parts = []
    while select.select([descriptor], [], [], 60)[0]:
        try:
            part = os.read(descriptor, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode()
