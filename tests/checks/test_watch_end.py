"""What `watch` says at the end of a training, and of loops in which it sees none."""

from typing import Any

import pytest
import torch
from torch import nn
from watch_helpers import Writer, conv_net, pictures, quiet, train

import batchnorm

BATCHES = [pictures(seed=seed) for seed in range(6)]


def watched(model: nn.Module, **options: Any) -> tuple[batchnorm.Watcher, list[tuple[int, str]]]:
    """Looked at in the first of many steps."""
    found: list[tuple[int, str]] = []
    watcher = batchnorm.watch(
        model,
        **{"every": 3, "table": False, **options},
        on_finding=lambda each: found.append((watcher.step, each.code)),
    )
    return watcher, found


def test_nan_behind_the_last_look_is_told_at_the_end() -> None:
    bad = BATCHES[3].clone()
    bad[0, 0, 0, 0] = float("nan")
    model, writer = conv_net(), Writer()
    watcher, found = watched(model, writer=writer)
    train(model, [*BATCHES[:3], bad, BATCHES[4]])
    assert watcher.findings.findings == ()
    assert watcher.numbers["1"]["nonfinite"] == 0
    gap = watcher.numbers["1"]["mean_gap"]
    watcher.close()
    assert (5, "BN001") in found
    assert "BN001" in {each.code for each in watcher.findings}
    # What needs a forward is of the last one that was looked at.
    assert (watcher.numbers["1"]["nonfinite"], watcher.numbers["1"]["mean_gap"]) == (1, gap)
    assert ("batchnorm/findings/BN001", 5) in {(tag, step) for tag, _, step in writer.texts}
    assert writer.scalars["batchnorm/1/nonfinite"] == {3: 0, 5: 1}
    assert (
        set(writer.scalars["batchnorm/1/mean_gap"]) == set(writer.scalars["batchnorm/worst_mean_gap"]) == {3}
    )
    told = list(found)
    watcher.close()
    assert found == told


def test_the_last_look_comes_without_any_other() -> None:
    model = conv_net(momentum=0.99)
    watcher, found = watched(model, every=100)
    train(model, BATCHES)
    assert found == []
    assert watcher.findings.notes == ("no step was looked at: there were 6; give a smaller every=",)
    watcher.close()
    assert found == [(6, "BN004")]
    assert watcher.numbers["1"]["gamma"] == pytest.approx(1, abs=0.2)


def test_the_last_look_confirms_nothing_that_was_measured_on_batches() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    batches = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    watcher, found = watched(model, select="BN103")
    train(model, batches)
    watcher.close()
    assert found == []
    # Told by two looks, it is there at the end, too.
    watcher, found = watched(model, select="BN103", every=1)
    train(model, batches)
    watcher.findings  # noqa: B018
    watcher._pace.step += 1
    watcher.close()
    assert [code for _, code in found] == ["BN103"]
    assert watcher.findings.notes == ()


def test_a_model_that_was_validated_last_is_no_mixture() -> None:
    model = conv_net()
    watcher, found = watched(model)
    train(model, BATCHES[:5])
    model[1].eval()
    watcher.close()
    assert found == []


def test_a_loop_in_eval_mode() -> None:
    model = conv_net().eval()
    with quiet(model) as watcher:
        train(model, BATCHES)
    assert watcher.findings.notes == (
        "no training step was seen: 6 forwards were in eval mode or without gradients; "
        "call model.train() before the loop",
    )
    model.train()
    with quiet(model) as watcher:
        model.eval()(BATCHES[0])
        train(model.train(), BATCHES)
    assert watcher.findings.notes == ()
    with quiet(model) as watcher:
        pass
    assert watcher.findings.notes == (
        "no training step was seen: watch the module that the loop calls, or give optimizer=",
    )


def test_a_model_without_batch_norm() -> None:
    model = nn.Linear(3, 3)
    with quiet(model) as watcher:
        assert "there is no batch norm in it" in watcher.findings.notes
        train(model, torch.randn(2, 8, 3))
    assert watcher.findings.notes == batchnorm.check(model).notes


@pytest.mark.parametrize("table", ["x", 1, object])
def test_a_table_that_is_no_choice(table: Any) -> None:
    with pytest.raises(batchnorm.InputTypeError, match=r"watch: table: .* True, False or None"):
        batchnorm.watch(conv_net(), table=table)


def test_the_table_at_the_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    model = conv_net()
    watcher, _ = watched(model, table=True)
    train(model, BATCHES[:5])
    watcher.close()
    said = capsys.readouterr().err
    assert "ended at step 5 · batches of step 3" in said
    assert f"watching took {100 * watcher.overhead:.0f}"[:-1] in said
    assert "next look" not in said
    watcher, _ = watched(model, table=True, every=2)
    train(model, BATCHES[:4])
    watcher.close()
    said = capsys.readouterr().err
    assert "step 4 · every 2 steps" in said
    assert "next look" not in said
