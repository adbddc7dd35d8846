"""What is said about batch statistics, and the report's notes, figures and first section."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.comparison.data import Data, Loaders
from batchnorm.comparison.figures import learning_rates, score_curves
from batchnorm.comparison.footing import Footing, Side, measure_footing
from batchnorm.comparison.measures import rms
from batchnorm.comparison.notes import CAUTION, method
from batchnorm.comparison.pairs import Pair
from batchnorm.comparison.record import Replay
from batchnorm.comparison.result import Comparison, Setup
from batchnorm.comparison.summary import summarize
from batchnorm.comparison.training import Run
from batchnorm.comparison.verdicts import footing
from batchnorm.report.document import Figure, Paragraph, Table, Verdict
from batchnorm.report.html import first_sentence


def side(mean: float, spread: float) -> Side:
    return Side(mean, spread, ((mean, spread),))


FOUND = Footing(
    layer="3",
    place="batch norm 2 of 3 (3)",
    lr=0.1,
    seed=0,
    batches=21,
    channels=100,
    shown=12,
    values=64,
    sampling=0.125,
    before=side(0.021, 0.066),
    after=side(0.0, 0.0004),
    without=side(0.131, 0.093),
)


def test_the_card_compares_the_plain_networks_batches_with_the_normalized_ones() -> None:
    verdict = footing(FOUND)
    assert (verdict.headline, verdict.tone) == ("0.131 → 0.000 σ", "neutral")
    first, rest = first_sentence(verdict.text)
    assert first == (
        "Batch means lie 0.131 σ from the average without batch norm (drawing 64 samples at random: 0.125 σ); after it "
        "0.000 σ, by construction."
    )
    assert "the batch norms below have already evened out this layer's input" in rest


def test_without_a_partner_the_layers_own_input_is_compared() -> None:
    verdict = footing(replace(FOUND, without=None, sampling=None))
    assert verdict.headline == "0.021 → 0.000 σ"
    assert "drawing" not in verdict.text
    assert "evened out" not in verdict.text


def test_batches_that_still_differ_are_not_called_the_same() -> None:
    verdict = footing(replace(FOUND, after=side(0.0, 0.2), tiny=7))
    assert verdict.tone == "neutral"
    assert "by construction" not in verdict.text
    assert "7 of 100 channels have a variance below 10·eps" in verdict.text


def replayed(batches: int, scale: float = 1.0, shift: float = 0.0) -> Replay:
    generator = torch.Generator().manual_seed(0)
    inputs = [shift + scale * torch.randn(16, 4, generator=generator) for _ in range(batches)]
    return Replay(inputs, [torch.zeros(16, dtype=torch.long)] * batches, torch.device("cpu"), batches)


def measured(batches: Replay) -> Footing | None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    return measure_footing(model, None, "remove", batches, lr=0.1, seed=0)


def test_one_batch_has_nothing_to_be_compared_with() -> None:
    assert measured(replayed(1)) is None
    found = measured(replayed(2))
    assert found is not None
    assert found.batches == 2
    assert found.before.mean == pytest.approx(rms([x for x, _ in found.before.points]))


def test_channels_that_vary_less_than_eps_are_counted() -> None:
    tiny, usual = measured(replayed(4, scale=1e-3)), measured(replayed(4))
    assert tiny is not None
    assert usual is not None
    assert (tiny.tiny, usual.tiny) == (4, 0)
    assert "4 of 4 channels have a variance below 10·eps" in footing(tiny).text


def test_inputs_are_measured_over_all_batches() -> None:
    batches = replayed(3, scale=5.0, shift=40.0)
    found = measured(batches)
    assert found is not None
    assert found.inputs is not None
    every = torch.cat([x for x, _ in batches]).double()
    assert found.inputs == pytest.approx((float(every.mean()), float(every.std(correction=0))))


SETUP = Setup(
    model="net",
    data="data",
    describe="a network",
    samples=None,
    task="classification",
    how="insert",
    layers=2,
    parameters=(10, 14),
    optimizer="sgd",
    lrs=(0.03, 0.1, 0.3),
    seeds=2,
    steps=20,
    batch_size=16,
    every=10,
    device="cpu",
)


def runs() -> list[Run]:
    loss = (float("nan"), 1.0, 0.5)
    return [
        Run(
            *(normalized, lr, seed, (0, 10, 20), (0.1, 0.7, 0.8 + (0.1 + 0.01 * seed) * normalized), loss),
            *(False, 20, 1.0),
        )
        for seed in range(2)
        for lr in (0.03, 0.1)
        for normalized in (False, True)
    ]


def noted(data: Any, found: Footing | None = None, skipped: int = 0) -> tuple[str, ...]:
    pair = Pair(nn.Identity(), nn.Identity(), "insert", 2, skipped)
    return method(SETUP, summarize(runs(), "classification", 0.1, 100), data, pair, 0, found, False)


def test_notes_name_the_rates_that_were_run_and_the_luck_of_many_tries() -> None:
    text = " ".join(noted(Loaders([], [])))
    assert "Learning rates tried: 0.03, 0.1. " in text
    assert "a network that trains at more rates has more tries to be lucky" in text


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1 further place got no batch norm"), (2, "2 further places got no batch norm")]
)
def test_skipped_places_are_counted_in_plain_words(count: int, text: str) -> None:
    note = next(note for note in noted(Loaders([], []), skipped=count) if "further" in note)
    assert note.startswith(text)
    assert "`" not in note


def test_unscaled_inputs_are_cautioned_against_for_tensors_and_for_loaders() -> None:
    x, y = 40 + 5 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    given = noted(Data(x, y, x, y))
    loaded = noted(Loaders([], []), replace(FOUND, inputs=(40.0, 5.0)))
    scaled = noted(Loaders([], []), replace(FOUND, inputs=(0.0, 1.0)))
    assert any(note.startswith(f"{CAUTION}the training inputs have mean 40") for note in loaded)
    assert any(note.startswith(f"{CAUTION}the training inputs have mean") for note in given)
    assert not any("training inputs have mean" in note for note in scaled)


def test_cautions_stand_beside_the_verdicts_and_the_method_at_the_end() -> None:
    summary = summarize(runs(), "classification", 0.1, 100)
    notes = noted(Loaders([], []))
    cautions = [note for note in notes if note.startswith(CAUTION)]
    assert any("still improving near the end" in note for note in cautions)
    document = Comparison(SETUP, tuple(runs()), summary, None, None, notes).document()
    first = document.sections[0].blocks
    assert [type(block) for block in first] == [Verdict] * 3 + [Paragraph] * len(cautions) + [
        Figure,
        Paragraph,
    ]
    assert [block.text for block in first[3:-2] if isinstance(block, Paragraph)] == cautions
    primer = first[-1]
    assert isinstance(primer, Paragraph)
    assert "σ is" in primer.text
    assert "95 % interval" in primer.text
    last = [block.text for block in document.sections[-1].blocks if isinstance(block, Paragraph)]
    assert last == [note for note in notes if note not in cautions]


def test_the_accuracy_table_has_the_training_losses() -> None:
    document = Comparison(
        SETUP, tuple(runs()), summarize(runs(), "classification", 0.1, 100), None, None, ()
    ).document()
    table = next(section.blocks[0] for section in document.sections if section.title == "Accuracy")
    assert isinstance(table, Table)
    assert table.rows[-1] == ["training loss at the end", "0.5", "0.5", "+0"]


def test_captions_say_which_rates_are_shown_and_the_axis_has_the_rates_that_were_run() -> None:
    summary = summarize(runs(), "classification", 0.1, 100)
    caption = score_curves(summary, runs()).caption
    assert "at the learning rate where its test score peaks highest" in caption
    assert "counts steps at the learning rate that gets to the goal soonest: 0.03 with" in caption
    axis = learning_rates(summary).layout["xaxis"]
    assert (axis["tickvals"], axis["ticktext"]) == ([0.03, 0.1], ["0.03", "0.1"])
