"""The README's sessions run as written, and its commands and links exist."""

import doctest
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_sessions_give_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a session writes a report
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(README, {}, "README", "README.md", 0)
    assert len(test.examples) >= 10
    failures: list[str] = []
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=failures.append)
    assert result.failed == 0, "".join(failures)
    assert (tmp_path / "report.html").stat().st_size > 1_000_000


NETS = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, momentum=0.01), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32, momentum=0.01), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for images, labels in make_loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return net

def make_loader():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    return DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=64, shuffle=True)
"""


def test_the_session_of_the_check(tmp_path: Path) -> None:
    """In a process of its own, as a user has it; another machine's rounding may move the numbers."""
    (tmp_path / "my_nets.py").write_text(NETS)
    ((command, shown),) = re.findall(r"^\$ batchnorm (.*)\n((?s:.*?))^```$", README, flags=re.MULTILINE)
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm", *shlex.split(command)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert _without_numbers(done.stdout) == _without_numbers(shown)


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "0", " ".join(text.split()))


def test_every_command_exists() -> None:
    named = set(re.findall(r"^(?:\$ )?batchnorm ([a-z]+)|`batchnorm ([a-z]+)", README, flags=re.MULTILINE))
    commands = {command.name for command in app.registered_commands}
    assert "check" in {a or b for a, b in named} <= commands


def test_every_make_target_exists() -> None:
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, flags=re.MULTILINE))
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    assert {a or b for a, b in named} <= targets


def test_every_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
