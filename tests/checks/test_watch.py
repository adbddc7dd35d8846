"""`watch`: which steps it looks at, what it writes, and that it leaves the training and the model alone."""

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from watch_helpers import Writer, conv_net, hooks, pictures, quiet, steps_of, train

import batchnorm

ORDINARY = [pictures(seed=seed) for seed in range(6)]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_training_is_the_same_to_the_last_bit(norm: Any, layout: torch.memory_format) -> None:
    batches = [pictures(seed=seed).contiguous(memory_format=layout) for seed in range(20)]
    plain, watched = (nn.Sequential(conv_net(norm), nn.Dropout()).to(memory_format=layout) for _ in range(2))
    torch.manual_seed(1)
    train(plain, batches)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    with quiet(watched, every=1, writer=Writer()):
        train(watched, batches)
    assert torch.equal(torch.get_rng_state(), after)
    states = plain.state_dict(), watched.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
        assert value.stride() == states[1][key].stride()
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_the_numbers_are_those_of_the_step() -> None:
    model, writer, x = conv_net(), Writer(), ORDINARY[0]
    inputs = model[0](x).detach().double()
    with quiet(model, every=1, writer=writer) as watcher:
        model(x).sum().backward()
    mean, var = inputs.mean((0, 2, 3)), inputs.var((0, 2, 3))
    norm = model[1]
    gap = ((norm.running_mean.double() - mean) / (var + norm.eps).sqrt()).abs()
    ratio = (norm.running_var.double() + norm.eps) / (var + norm.eps)
    found = watcher.numbers["1"]
    assert found["mean_gap"] == pytest.approx(float(gap.median()), rel=1e-4)
    assert found["mean_gap_high"] == pytest.approx(float(gap.quantile(0.9)), rel=1e-4)
    assert found["variance_ratio"] == pytest.approx(float(ratio.median()), rel=1e-4)
    assert (found["values"], found["gamma"], found["gamma_min"]) == (16 * 36, 1, 1)
    assert (found["dead"], found["nonfinite"]) == (0, 0)
    assert writer.scalars["batchnorm/1/mean_gap"] == {1: found["mean_gap"]}
    assert writer.scalars["batchnorm/worst_mean_gap"] == {
        1: max(each["mean_gap"] for each in watcher.numbers.values())
    }
    signed = writer.histograms["batchnorm/1/histogram/mean_gap"][1]
    torch.testing.assert_close(signed.abs(), gap, rtol=1e-4, atol=1e-6)
    assert set(writer.histograms) == {
        f"batchnorm/{layer}/histogram/{key}"
        for layer in ("1", "4")
        for key in ("beta", "gamma", "log10_variance", "mean_gap")
    }


def test_shares_of_dead_and_nonfinite_channels() -> None:
    model = conv_net()
    with torch.no_grad():
        model[1].weight[:3] = 0
        model[4].running_var[0] = math.inf
    with quiet(model, every=1) as watcher:
        train(model, ORDINARY[:1], torch.optim.SGD(model.parameters(), 0.0))
    assert watcher.numbers["1"]["dead"] == 0.5
    assert watcher.numbers["1"]["gamma"] == 0.5
    assert watcher.numbers["1"]["gamma_min"] == 0
    assert watcher.numbers["4"]["nonfinite"] == 0.25


def test_every_and_start() -> None:
    writer = Writer()
    with quiet(conv_net(), every=2, writer=writer, start=101) as watcher:
        train(watcher._model, ORDINARY)
    assert steps_of(writer) == [102, 104, 106]
    assert watcher.step == 107


def test_only_training_forwards_are_steps() -> None:
    model, writer = conv_net(), Writer()
    with quiet(model, every=1, writer=writer) as watcher:
        model(ORDINARY[0])
        with torch.no_grad():
            model(ORDINARY[0])
        model.eval()
        model(ORDINARY[0])
        model.train()
        assert watcher.step == 1
        assert hooks(model) == 2
        model(ORDINARY[1])
    assert steps_of(writer) == [1, 2]


def test_a_model_that_calls_itself_is_one_step() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
            return self(self.norm(x), False) if again else self.norm(x)

    model = Twice()
    with quiet(model, every=1) as watcher:
        model(torch.randn(8, 2)).sum().backward()
        assert hooks(model) == 2
        assert watcher.step == 1
    (seen,) = watcher._judge._looks[0].seen.values()
    assert len(seen.train) == 2


def test_a_forward_that_is_computed_again_is_no_step() -> None:
    from torch.utils.checkpoint import checkpoint

    inner = conv_net()
    with quiet(inner, every=1) as watcher:
        checkpoint(inner, ORDINARY[0].requires_grad_(), use_reentrant=False).sum().backward()
        assert watcher.step == 1
    ORDINARY[0].requires_grad_(False)


def test_steps_of_an_optimizer() -> None:
    model, writer = conv_net(), Writer()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with quiet(model, every=1, writer=writer, optimizer=optimizer) as watcher:
        for _ in range(3):
            for x in ORDINARY[:2]:
                model(x).square().mean().backward()
            optimizer.step()
        assert len(watcher.findings.not_run) > 3
    assert steps_of(writer) == [1, 2, 3]
    assert watcher.step == 3


def test_no_hook_stays() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for given in ({}, {"optimizer": optimizer}):
        with quiet(model, every=1, **given) as watcher:
            train(model, ORDINARY[:1], optimizer)
            assert hooks(model) == 2
        assert hooks(model) == 0
        assert not optimizer._optimizer_step_post_hooks
        watcher.close()


def test_what_a_writer_raises_is_heard() -> None:
    def full(tag: str, value: float, step: int) -> None:
        raise OSError("No space left on device")

    model = conv_net()
    quiet(model, every=1, writer=full)
    model(ORDINARY[0])
    with pytest.raises(OSError, match="No space left"):
        model(ORDINARY[1])
    assert hooks(model) == 0
    model(ORDINARY[1])


def test_a_function_gets_histograms_if_it_asks() -> None:
    seen: dict[str, Any] = {}
    for histograms in (None, True):
        model = conv_net()
        seen.clear()
        with quiet(
            model, every=1, histograms=histograms, writer=lambda tag, value, step: seen.update({tag: value})
        ):
            train(model, ORDINARY[:1])
        tensors = [tag for tag, value in seen.items() if isinstance(value, torch.Tensor)]
        assert len(tensors) == (8 if histograms else 0)
    writer = Writer()
    with quiet(conv_net(), every=1, histograms=False, writer=writer) as watcher:
        train(watcher._model, ORDINARY[:1])
    assert writer.scalars
    assert not writer.histograms


def test_findings_reach_the_writer_as_text() -> None:
    writer = Writer()
    with quiet(conv_net(momentum=0.99), every=1, writer=writer) as watcher:
        train(watcher._model, ORDINARY[:2])
    ((tag, text, step),) = writer.texts
    assert (tag, step) == ("batchnorm/findings/BN004", 1)
    assert text.startswith("1, 4: BN004 warning: momentum is 0.99")
    assert writer.scalars["batchnorm/findings"] == {1: 1.0, 2: 1.0}


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its own, of protobuf and distutils
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        with (
            SummaryWriter(tmp_path) as writer,
            quiet(conv_net(momentum=0.99), every=2, writer=writer) as watcher,
        ):
            train(watcher._model, ORDINARY)
        events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert [each.step for each in events.Scalars("batchnorm/1/mean_gap")] == [2, 4, 6]
    assert events.Scalars("batchnorm/4/values")[0].value == 16 * 16
    assert "batchnorm/1/histogram/gamma" in tags["histograms"]
    assert any(tag.startswith("batchnorm/findings/BN004") for tag in tags["tensors"])


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"writer": 3}, batchnorm.InputTypeError, "watch: writer: got int"),
        ({"writer": Writer}, batchnorm.InputTypeError, r"Make one: Writer\(\.\.\.\)"),
        ({"writer": print, "every": 0}, batchnorm.InputError, "watch: every: got 0"),
        ({"every": True}, batchnorm.InputError, "watch: every: got True"),
        ({"start": -1}, batchnorm.InputError, "watch: start: got -1"),
        ({"optimizer": 1}, batchnorm.InputTypeError, "watch: optimizer"),
        ({"on_finding": 1}, batchnorm.InputTypeError, "watch: on_finding"),
        ({"select": "BN9"}, batchnorm.InputError, "select"),
    ],
)
def test_arguments(given: dict[str, Any], error: type[Exception], said: str) -> None:
    model = conv_net()
    with pytest.raises(error, match=said):
        batchnorm.watch(model, **given)
    assert hooks(model) == 0


def test_a_model_is_asked_for() -> None:
    with pytest.raises(batchnorm.InputTypeError, match="watch: model: got dict"):
        batchnorm.watch({})


def test_layers_that_come_later_are_seen() -> None:
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.Conv2d(1, 6, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    with quiet(lazy, every=1) as watcher:
        lazy(ORDINARY[0])
        train(lazy, ORDINARY[:2])
        assert set(watcher.findings.ran) >= {"BN001"}
        assert set(watcher.numbers) == {"1"}
        batchnorm.convert(lazy, "ghost", ghost_size=8, inplace=True)
        train(lazy, ORDINARY[:2])
    assert watcher.numbers["1"]["values"] == 16 * 16


def test_layers_in_eval_mode_and_without_statistics() -> None:
    model = nn.Sequential(conv_net(), nn.BatchNorm1d(3, track_running_stats=False))
    model[0][4].eval()
    found: list[str] = []
    with quiet(model, every=1, on_finding=lambda finding: found.append(finding.code)) as watcher:
        train(model, ORDINARY[:3])
    assert "mean_gap" not in watcher.numbers["1"]
    assert watcher.numbers["1"]["values"] == 16
    assert watcher.numbers["0.4"]["mean_gap"] > 0
    assert {"BN009", "BN011"} <= set(found)


def test_importing_it_takes_no_writer_and_no_rich() -> None:
    import subprocess

    code = (
        "import sys, torch, batchnorm; m = torch.nn.BatchNorm1d(2)\n"
        "with batchnorm.watch(m): m(torch.randn(4, 2)).sum().backward()\n"
        "assert not {'rich', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stderr=subprocess.PIPE)
