import io

import pytest
from rich.console import Console

from batchnorm.cli._bench_progress import BenchDisplay
from batchnorm.cli._check_progress import CheckDisplay
from batchnorm.cli._progress import LiveDisplay, PlainDisplay, display


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)


def written(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def drawn(shown: LiveDisplay) -> str:
    target = console(terminal=True)
    target.print(shown._draw())
    return written(target)


def test_the_display_suits_the_console() -> None:
    assert isinstance(display(console(terminal=True)), LiveDisplay)
    assert isinstance(display(console(terminal=False)), PlainDisplay)


def test_a_log_gets_one_line_for_each_training() -> None:
    target = console(terminal=False)
    with PlainDisplay(target) as shown:
        shown.start(2, "mlp on digits", "classification")
        shown.run_started("without batch norm", False, 0.1, 0)
        shown.step(1, 2, 2.3, 0.1)
        shown.run_finished("without batch norm", False, 0.1, 0, 0.1, True)
        shown.run_started("with batch norm", True, 0.1, 0)
        shown.run_finished("with batch norm", True, 0.1, 0, 0.934, False)
    assert written(target).splitlines() == [
        "mlp on digits: 2 trainings",
        "[1/2] without batch norm, learning rate 0.1, seed 0: diverged",
        "[2/2] with batch norm, learning rate 0.1, seed 0: test accuracy 93.4 %",
    ]


def test_the_live_display_shows_both_losses_of_the_current_pair() -> None:
    with LiveDisplay(console(terminal=True)) as shown:
        shown.start(4, "mlp on digits", "classification")
        shown.run_started("without batch norm", False, 0.1, 0)
        for step, loss in enumerate((2.3, 2.0, float("nan")), start=1):
            shown.step(step, 4, loss, 0.25)
        assert "0/4 trainings" in drawn(shown)
        shown.run_finished("without batch norm", False, 0.1, 0, 0.25, True)
        shown.run_started("with batch norm", True, 0.1, 0)
        shown.step(2, 4, 1.15, None)
        text = drawn(shown)
    assert "learning rate 0.1, seed 0" in text
    assert "1/4 trainings" in text
    assert "s left" in text
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "loss 1.15" in lines["with batch norm"]
    assert "▅" in lines["with batch norm"]
    assert "test 25.0 %" in lines["without batch norm"]
    assert "█▇ " in lines["without batch norm"]


def test_a_diverging_loss_does_not_flatten_the_other() -> None:
    with LiveDisplay(console(terminal=True)) as shown:
        shown.start(2, "mlp on digits", "classification")
        shown.run_started("without batch norm", False, 0.1, 0)
        shown.step(1, 2, 2.0, None)
        shown.step(2, 2, 1e9, None)
        shown.run_finished("without batch norm", False, 0.1, 0, 0.1, True)
        shown.run_started("with batch norm", True, 0.1, 0)
        shown.step(1, 2, 2.0, None)
        shown.step(2, 2, 0.1, None)
        calm, wild = drawn(shown).splitlines()[2:4]
    assert "▅▁" in calm
    assert "▅█" in wild


def test_a_new_pair_starts_with_empty_curves() -> None:
    with LiveDisplay(console(terminal=True)) as shown:
        shown.start(4, "mlp on digits", "classification")
        shown.run_started("without batch norm", False, 0.1, 0)
        shown.step(1, 1, 2.3, 0.25)
        shown.run_finished("without batch norm", False, 0.1, 0, 0.25, False)
        shown.run_started("without batch norm", False, 0.3, 0)
        text = drawn(shown)
    assert "loss 2.3" not in text
    assert "25.0%" not in text
    assert "learning rate 0.3" in text


def test_the_live_display_fits_its_terminal() -> None:
    with LiveDisplay(console(terminal=True)) as shown:
        shown.start(4, "a network with a very long name " * 5, "classification")
        shown.run_started("x", True, 0.1, 0)
        shown.step(1, 100, 1e-12, 0.5)
        assert max(len(line) for line in drawn(shown).splitlines()) <= 80


@pytest.mark.parametrize("kind", [LiveDisplay, PlainDisplay])
def test_finishing_twice_and_after_an_error_is_harmless(kind: type[LiveDisplay] | type[PlainDisplay]) -> None:
    target = console(terminal=kind is LiveDisplay)
    shown = kind(target)

    def fail() -> None:
        with shown:
            shown.start(1, "mlp", "classification")
            shown.finish()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    target.print("after")
    assert written(target).endswith("after\n")


@pytest.mark.parametrize(
    ("elapsed", "expected"),
    [(None, "estimating"), (33.0, "99 s left"), (33.4, "1 min 40 s left"), (1200.0, "60 min 0 s left")],
)
def test_a_benchmark_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, elapsed: float | None, expected: str
) -> None:
    with BenchDisplay(console(terminal=True)) as shown:
        shown.start(4.0, 2, "cases")
        shown.case_finished("a case", 1.0, "fine")
        monkeypatch.setattr(type(shown.bars.tasks[0]), "elapsed", elapsed)
        target = console(terminal=True)
        target.print(shown.bars.get_renderable())
    assert expected in written(target)
    assert "1/2" in written(target)


def test_a_check_shows_a_bar_or_one_line() -> None:
    log, terminal = console(terminal=False), console(terminal=True)
    for target in (log, terminal):
        with CheckDisplay(target) as shown:
            shown.start(21, 8)
            for done in range(1, 8):
                shown.forward(done)
            if target is terminal:
                shown.bars.refresh()
    assert written(log) == "running 8 batches at most\n"
    assert "reading batches" in written(terminal)
    assert "7/21 forwards" in written(terminal)
    assert written(terminal).endswith("\x1b[2K")  # taken away
