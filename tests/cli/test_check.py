import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets_to_check import NETS
from torch import nn
from typer.testing import Result

import batchnorm
from batchnorm.checks.rule import all_rules

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def nets(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)


def broken_state() -> dict[str, torch.Tensor]:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net[1].running_mean[2] = math.inf
    return net.state_dict()


def test_findings_are_told_the_worst_first(run: Run) -> None:
    result = run("check", "nets:poisoned")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert result.stdout.startswith(
        "error BN001: running statistics are not finite\n"
        "  at    bn\n"
        "  seen  1 of 4 channels have a running mean or variance that is NaN or infinite\n"
        "  why   one batch with NaN or overflowed activations stays in the running statistics for good\n"
        "  fix   batchnorm.recalibrate(model, loader)\n"
        "\n"
        "warning BN004: momentum in the other framework's convention\n"
    )
    assert "1 error, 1 warning: 1 batch norm looked at by" in result.stdout
    assert (
        "not looked at: 13 rules that need batches (--data), 3 rules that need --averaged," in result.stdout
    )
    assert not [line for line in result.stdout.splitlines() if line != line.rstrip()]


def test_what_fix_would_mend_is_told(run: Run) -> None:
    text = run("check", "nets:poisoned").stdout
    assert (
        "  fix   layer.momentum = 0.01, then batchnorm.recalibrate(model, loader)\n"
        "        (safe, by findings.fix(); recalibrate is left to you)\n"
    ) in text
    assert text.count("(safe, by findings.fix(); recalibrate is left to you)") == 1  # and not for BN001
    assert "1 of 2 can be mended by batchnorm.check(...).fix() in Python: BN004\n" in text
    told = json.loads(run("check", "nets:poisoned", "--json", "-").stdout)
    assert [each["mendable"] for each in told["findings"]] == [False, True]
    assert "mended" not in run("check", "nets:healthy").stdout


def test_findings_are_those_of_the_function(run: Run) -> None:
    run("check", "nets:healthy")  # makes the folder's modules importable
    import nets  # type: ignore[import-not-found]

    told = json.loads(
        run("check", "nets:stale", "--data", "nets:same", "--ignore", "BN109", "--json", "-").stdout
    )
    found = batchnorm.check(nets.stale(), batches=nets.same(), ignore="BN109")
    assert told == json.loads(found.to_json())
    assert "BN101" in {each["code"] for each in told["findings"]}


def test_a_healthy_model_is_fine(run: Run) -> None:
    result = run("check", "nets:healthy", "--data", "nets:same", "--ignore", "BN109")
    assert result.exit_code == 0, result.stdout
    assert result.stdout.startswith("nothing found: 1 batch norm looked at by")
    assert "explain" not in result.stdout
    assert result.stderr == "making\nrunning 3 batches at most\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nets:keras"], 1),
        (["nets:keras", "--fail-on", "error"], 0),
        (["nets:poisoned", "--fail-on", "error"], 1),
        (["nets:poisoned", "--fail-on", "never"], 0),
        (["nets:keras", "--ignore", "BN004"], 0),
        (["nets:keras", "--select", "BN001, bn002"], 0),
        (["nets:keras", "--select", "BN001", "--select", "BN004"], 1),
        (["nets:without"], 0),
        (["nets:healthy", "--weights", "stale.pt", "--fail-on", "info"], 1),
        (["nets:healthy", "--fail-on", "info"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_exit_code_is_that_of_the_severity(
    run: Run, tmp_path: Path, arguments: list[str], code: int
) -> None:
    state: dict[str, torch.Tensor] = {"conv.weight": torch.zeros(4, 3, 3, 3)}
    state |= {f"bn.{name}": value for name, value in nn.BatchNorm2d(4).state_dict().items()}
    state["bn.running_mean"] = torch.full((4,), 1e6)  # BN008, an info
    state["bn.num_batches_tracked"] = torch.tensor(7)
    torch.save(state, tmp_path / "stale.pt")
    result = run("check", *arguments)
    assert result.exit_code == code, result.output


@pytest.mark.parametrize("batches", ["1", "5", "20"])
def test_batches_are_as_many_as_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch, batches: str) -> None:
    given: dict[str, Any] = {}
    done: list[int] = []
    check = batchnorm.check

    def spy(model: object, **options: Any) -> object:
        given.update(options)
        told = options.pop("progress")
        return check(model, **options, progress=lambda number: (done.append(number), told(number)))  # type: ignore[arg-type]

    monkeypatch.setattr(batchnorm, "check", spy)
    result = run("check", "nets:healthy", "--data", "nets:loader", "--batches", batches, "--fail-on", "never")
    assert result.exit_code == 0
    assert given["max_batches"] == int(batches)
    few = min(int(batches), 12)
    assert f"running {few} batch{'es' if few > 1 else ''} at most\n" in result.stderr
    assert done == list(range(1, 2 * few + 6))
    assert "loading" not in result.stdout


def test_a_stream_without_a_length(run: Run) -> None:
    result = run("check", "nets:healthy", "--data", "nets:stream", "--fail-on", "never")
    assert result.exit_code == 0
    assert "running 8 batches at most\n" in result.stderr


def test_of_two_loaders_the_first_is_the_training_s(run: Run) -> None:
    result = run("check", "nets:healthy", "--data", "nets:loaders", "--fail-on", "never")
    assert result.exit_code == 0
    assert (
        "note: nets:loaders gives 2 loaders: the first is used\nrunning 3 batches at most\n" in result.stderr
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "step": torch.tensor(4)},
        lambda state: {"model_state_dict": state, "optimizer": {"state": {0: torch.ones(2)}}},
        lambda state: {"epoch": 1, "model": state},
        lambda state: {"optimizer": {"lr": torch.ones(1)}, "net": state},
        lambda state: {**state, "extra": "words", 3: torch.ones(1)},
    ],
    ids=["plain", "state_dict", "model_state_dict", "model", "another name", "with more in it"],
)
def test_a_checkpoint_is_looked_at(run: Run, tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    torch.save(wrap(broken_state()), tmp_path / "net.ckpt")
    result = run("check", "net.ckpt")
    assert result.exit_code == 1, result.output
    assert "error BN001" in result.stdout
    assert "\n  at    1\n" in result.stdout
    assert (
        f"not looked at: {sum('model' in rule.needs for rule in all_rules().values())} rules that need a model "
        in (result.stdout)
    )


def test_a_safetensors_file_is_looked_at(run: Run, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(broken_state(), tmp_path / "net.safetensors")
    result = run("check", "net.safetensors", "--select", "BN001")
    assert result.exit_code == 1
    assert "1 error: 1 batch norm looked at by 1 rule\n" in result.stdout


def test_weights_without_a_batch_norm_are_said_to_have_none(run: Run, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "net.pt")
    result = run("check", "net.pt")
    assert result.exit_code == 0
    assert "note: there is no batch norm with running statistics in it" in result.stdout


def test_json_is_all_that_stdout_gets(run: Run, tmp_path: Path) -> None:
    for option in (["--format", "json"], ["--json", "-"], ["--format", "json", "--json", "-"]):
        result = run("check", "nets:keras", *option)
        assert result.exit_code == 1
        stored = json.loads(result.stdout)
        assert (stored["kind"], stored["findings"][0]["code"]) == ("check", "BN004")
    beside = run("check", "nets:keras", "--json", "r.json", "-o", "again.json")
    assert beside.stdout.endswith("json: again.json\njson: r.json\n")
    assert "warning BN004" in beside.stdout
    assert json.loads((tmp_path / "r.json").read_text()) == stored
    assert json.loads((tmp_path / "again.json").read_text()) == stored


def test_github_annotations(run: Run, tmp_path: Path) -> None:
    result = run("check", "nets:poisoned", "--format", "github")
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert lines[0].startswith("::error title=BN001 running statistics are not finite::bn: 1 of 4 channels ")
    assert lines[1] == (
        "::warning title=BN004 momentum in the other framework's convention::bn: momentum is 0.99: each batch "
        "replaces 99 %25 of the running statistics. Why: in PyTorch momentum is the weight of the new batch, "
        "elsewhere that of the old average. Fix (safe, by findings.fix(); recalibrate is left to you): "
        "layer.momentum = 0.01, then batchnorm.recalibrate(model, loader)"
    )
    assert len(lines) == 2
    assert "1 error, 1 warning" in result.stderr
    run("check", "nets:poisoned", "--format", "github", "--out", "log")
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_what_is_worth_knowing_is_a_notice(run: Run) -> None:
    result = run("check", "nets:biased", "--format", "github")
    assert result.exit_code == 0
    assert result.stdout.startswith("::notice title=BN012 bias that batch norm subtracts again::1: ")


def test_github_codes_for_signs_that_mean_something() -> None:
    from batchnorm.cli._findings import _IN_TEXT, _IN_TITLE, _escaped

    assert _escaped("50 %, a:b\r\n", _IN_TITLE) == "50 %25%2C a%3Ab%0D%0A"
    assert _escaped("50 %, a:b\n", _IN_TEXT) == "50 %25, a:b%0A"


@pytest.mark.parametrize("options", [["-o", "r.html"], ["--format", "html", "--out", "r.html"]])
def test_a_page(run: Run, tmp_path: Path, options: list[str]) -> None:
    result = run("check", "nets:keras", *options)
    assert result.exit_code == 1
    assert result.stdout.endswith("html: r.html\n")
    assert "warning BN004" in result.stdout
    page = (tmp_path / "r.html").read_text("utf-8")
    assert '<p class="label">Warning BN004</p>' in page
    assert "<strong>Seen:</strong> momentum is 0.99: each batch replaces 99 %" in page
    assert "layer.momentum = 0.01, then batchnorm.recalibrate(model, loader)" in page


def test_text_in_a_file_is_what_the_terminal_shows(run: Run, tmp_path: Path) -> None:
    result = run("check", "nets:poisoned", "-o", "r.txt")
    assert result.stdout == (tmp_path / "r.txt").read_text("utf-8") + "text: r.txt\n"


def test_the_optimizer_the_average_and_the_number_of_processes(run: Run, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(NETS, namespace)
    average = torch.optim.swa_utils.AveragedModel(namespace["Net"]())  # its statistics are 0 and 1 still
    torch.save(average.state_dict(), tmp_path / "average.pt")
    given = [
        "--optimizer",
        "nets:decay",
        "--averaged",
        "average.pt",
        "--world-size",
        "4",
        "--data",
        "nets:few",
    ]
    result = run("check", "nets:healthy", *given, "--select", "BN014,BN016,BN017", "--json", "-")
    found = {each["code"]: each for each in json.loads(result.stdout)["findings"]}
    assert set(found) == {"BN014", "BN016", "BN017"}
    assert found["BN014"]["evidence"]["decay"] == {"γ": 0.01, "β": 0.01}
    assert found["BN016"]["evidence"] == {"samples": 8, "world_size": 4, "together": 32, "to": "sync"}
    assert found["BN017"]["evidence"]["layers"] == ["bn"]
    assert result.exit_code == 1


def test_what_it_did_not_look_at_is_told_by_the_options(run: Run) -> None:
    told = run("check", "nets:healthy", "--data", "nets:same").stdout
    assert "not looked at: 4 rules that need --averaged, --optimizer, --world-size" in told.replace("\n", " ")


def test_wrong_usage(run: Run) -> None:
    for arguments in ([], ["nets:keras", "--batches", "0"], ["nets:keras", "--fail-on", "x"], ["a", "b"]):
        result = run("check", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")


def test_ctrl_c_ends_it_quietly(run: Run) -> None:
    result = run("check", "nets:interrupting", "--data", "nets:same", "--json", "-")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == "running 3 batches at most\ninterrupted\n"


def test_what_cannot_be_written_does_not_keep_the_findings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise batchnorm.OutputError("cannot write r.txt: disk full. Choose another path.")

    monkeypatch.setattr("batchnorm.cli.check.write_whole", full)
    result = run("check", "nets:keras", "-o", "r.txt")
    assert result.exit_code == 2
    assert "warning BN004" in result.stdout
    assert result.stderr == "error: cannot write r.txt: disk full. Choose another path.\n"


def test_the_rules_are_listed(run: Run, tmp_path: Path) -> None:
    result = run("rules", "--json", "rules.json")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for code, rule in all_rules().items():
        (line,) = [line for line in lines if line.startswith(code)]
        assert line.split()[1] == rule.severity
        assert " ".join(rule.title.split()[:2]) in line
    stored = json.loads((tmp_path / "rules.json").read_text("utf-8"))
    assert [each["code"] for each in stored["rules"]] == list(all_rules())
    assert stored == json.loads(run("rules", "--json", "-").stdout)
