"""The story's numbers: what it claims holds, computed by the library."""

import json
import re
from pathlib import Path

import pytest
import torch

from batchnorm import InputError
from batchnorm.explain import chapters
from batchnorm.explain.limits import BETWEEN_DAYS, BIKESHARE, SEEDS
from batchnorm.explain.network import look_inside
from batchnorm.explain.page import story_json
from batchnorm.explain.questions import asked, questions, without_heat
from batchnorm.explain.runners import (
    DAYS,
    LINE_FROM,
    RUNNERS,
    WIDENING,
    Settings,
    draws,
    extremes,
    season,
    visible,
)
from batchnorm.explain.words import as_text
from batchnorm.report.document import Document, Figure, Formula, Paragraph, Question, Slider, Table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "bikeshare.json"


def known(value: float | None) -> float:
    assert value is not None
    return value


def test_form_is_hidden_before_and_plain_after() -> None:
    found = season()
    assert known(found.before) < 0.3
    assert known(found.after) > 0.85


def test_each_day_is_one_batch_of_the_library() -> None:
    found = season(Settings(eps=0.5, gamma=2.0, beta=7.0))
    layer = torch.nn.BatchNorm1d(DAYS, eps=0.5, dtype=torch.float64)
    torch.nn.init.constant_(layer.weight, 2.0)
    torch.nn.init.constant_(layer.bias, 7.0)
    torch.testing.assert_close(found.y, layer(found.x.T).T.detach())
    torch.testing.assert_close(found.mean, found.x.mean(1))
    torch.testing.assert_close(found.var, found.x.var(1, correction=0))


def test_the_correlation_is_that_of_the_changes_of_form() -> None:
    found = season()
    pairs = []
    for runner in range(RUNNERS):
        runs = found.runs_of(runner)
        pairs.append(torch.stack([values[runs] - values[runs].mean() for values in (found.x, found.form)]))
    assert torch.corrcoef(torch.cat(pairs, 1))[0, 1].item() == pytest.approx(known(found.before))


def test_the_draws_are_a_fair_season() -> None:
    drawn = draws()
    assert sum(pace < 0 for pace in drawn.pace) == RUNNERS // 2
    assert sum(drawn.hot) == DAYS // 2
    assert abs(sum(drawn.hot[: DAYS // 2]) - DAYS // 4) <= 1
    assert all(sorted(order) == list(range(RUNNERS)) for order in drawn.order)


def test_nothing_to_see_is_none() -> None:
    assert season(Settings(trend=0)).after is None
    assert season(Settings(gamma=0)).after is None


@pytest.mark.parametrize("wrong", [{"runners": 1}, {"runners": 25}, {"eps": 0.0}], ids=str)
def test_settings_outside_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected"):
        Settings(**wrong)  # type: ignore[arg-type]


def test_the_questions_come_out_as_they_say() -> None:
    cool, heat, pair, eps, scale, weather = (asked(question.id) for question in questions())
    usual = season()
    assert known(cool.before) > 0.9
    assert known(cool.after) < known(cool.before)
    torch.testing.assert_close(heat.xhat, usual.xhat, rtol=0, atol=1e-4)
    torch.testing.assert_close(pair.xhat.abs(), torch.ones_like(pair.xhat), rtol=0, atol=0.05)
    assert known(pair.after) < 0.5
    assert eps.xhat.abs().max() < 0.3 < usual.xhat.abs().max()
    assert eps.xhat.mean(1).abs().max() < 1e-12
    assert known(scale.after) == pytest.approx(known(usual.after))
    assert weather.xhat.mean(1).abs().max() < 1e-12
    torch.testing.assert_close(
        weather.xhat.square().mean(1), torch.ones(DAYS, dtype=torch.float64), rtol=1e-4, atol=0
    )


def test_the_answers_name_the_numbers_they_rest_on() -> None:
    why = {question.id: question.why for question in questions()}
    usual = season()
    assert f"{asked('cool').before:.2f} instead of {usual.before:.2f}" in why["cool"]
    assert (asked("heat").xhat - usual.xhat).abs().max() < 1e-4
    assert f"from {usual.after:.2f} to {asked('pair').after:.2f}" in why["pair"]
    assert f"from {usual.after:.2f} to {asked('eps').after:.2f}" in why["eps"]
    assert f"it would be {without_heat(usual):.2f}" in why["eps"]
    assert "115 s and cool ones at 90 s" in why["weather"]


def test_a_huge_eps_helps_because_sigma_holds_true_spread_not_because_it_is_noisy() -> None:
    found, all_run = season(), season(Settings(runners=RUNNERS))

    def told(values: torch.Tensor) -> float:
        return known(visible(values, found.form, found.members))

    centred = found.x - found.mean[:, None]
    heat = (1 + WIDENING * found.settings.difference * found.hot)[:, None]
    truth = all_run.form.std(1, correction=0)[:, None]
    chance = found.var.sqrt()[:, None] / (heat * truth)  # what of σ is neither heat nor true spread
    # Only the mean is taken off.
    assert known(asked("eps").after) == pytest.approx(told(centred), abs=1e-3)
    # Heat in σ is worth dividing by, the true spread is not, and the noise of σ hardly matters.
    assert told(centred / heat) > told(centred) > known(found.after)
    assert told(centred / heat) - told(centred / heat / chance) < 0.005
    assert told(centred / heat) - told(centred / heat / truth) > 0.05
    middle = truth[DAYS // 3 : -(DAYS // 3)]
    assert middle.max() < min(truth[0], truth[-1])


def test_the_two_runners_are_those_of_the_pictures_and_came_often_enough() -> None:
    pace = draws().pace
    assert extremes(season()) == (pace.index(min(pace)), pace.index(max(pace)))
    for runners in range(2, RUNNERS + 1):
        found = season(Settings(runners=runners))
        assert all(len(found.runs_of(runner)[0]) >= LINE_FROM for runner in extremes(found))


def test_the_terminal_tells_the_two_runners_apart_by_numbers() -> None:
    figure, paragraph = chapters.chapter(5).blocks[1:]
    assert isinstance(figure, Figure)
    assert isinstance(paragraph, Paragraph)
    assert "told apart" not in figure.alt
    found = season()
    for runner in extremes(found):
        days, places = found.runs_of(runner)
        for values in (found.x, found.y, found.form):
            early, late = (
                values[days[chosen], places[chosen]].mean().item() for chosen in (days < 13, days >= 27)
            )
            assert f"{as_text(early, 1)} → {as_text(late, 1)}" in paragraph.text
    assert "seems to stand still" in paragraph.text


def test_every_step_has_a_formula_numbers_and_a_picture() -> None:
    for number in range(1, 5):
        section = chapters.chapter(number)
        assert section.title.startswith(f"Step {number}")
        assert {Formula, Figure} <= {type(block) for block in section.blocks}
    numbers = next(block for block in chapters.chapter(1).blocks if isinstance(block, Formula)).numbers
    assert f"{season().mean[chapters.WORKED_DAY]:.2f}" in numbers
    assert draws().hot[chapters.WORKED_DAY] == 1


def test_the_sliders_start_where_the_season_does() -> None:
    values = {slider.id: 10**slider.value if slider.log else slider.value for slider in chapters.sliders()}
    assert Settings(**values) == Settings()  # type: ignore[arg-type]
    within = {slider.id: (slider.low, slider.high) for slider in chapters.sliders()}
    for question in questions():
        for name, value in question.settings.items():
            assert within[name][0] <= value <= within[name][1]


def test_the_bikes_are_as_measured() -> None:
    report = json.loads(RESULTS.read_text("utf-8"))
    measured = {
        (row["training"], row["statistics"]): (round(row["mean"], 3), round(row["spread"], 3))
        for row in report["results"]
    }
    assert measured == dict(BIKESHARE)
    assert {len(row["errors"]) for row in report["results"]} == {SEEDS}
    assert round(report["setup"]["temperature_variance_between_days"], 3) == BETWEEN_DAYS
    assert {"torch", "processor", "python"} <= set(report["machine"])
    # What the text says about them.
    error = {key: value[0] for key, value in measured.items()}
    assert error["by day", "running"] > error["by day", "recalibrated"] > 2 * error["shuffled", "running"]
    (table,) = (block for block in chapters.chapter(8).blocks if isinstance(block, Table))
    assert f"{error['by day', 'running']:.3f}" in table.rows[0][2]


def test_inside_a_network_the_steps_are_the_layers() -> None:
    inside = look_inside()
    assert inside.accuracy > 0.85
    torch.testing.assert_close(
        inside.batch.xhat.mean(), torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert min(inside.companies) < inside.alone < max(inside.companies)
    assert len(set(inside.companies)) > 30


def test_the_networks_numbers_are_short_and_its_words_true_in_a_kept_file() -> None:
    blocks = [*chapters.chapter(6).blocks, *chapters.chapter(7).blocks]
    words = " ".join(str(getattr(block, "text", "")) + str(getattr(block, "numbers", "")) for block in blocks)
    assert "just now" not in words
    assert "When this text was made, it was trained for 150 steps" in words
    assert not re.search(r"\d\.0*[1-9]\d{4}", words)
    assert "trained when this page was made" in look_inside().facts()["network"]


def test_the_whole_document_says_what_it_must() -> None:
    document: Document = chapters.document()
    titles = [section.title for section in document.sections]
    assert titles == [chapters.CHAPTERS[0].title, "Sliders", *(item.title for item in chapters.CHAPTERS[1:])]
    assert all(isinstance(block, Slider) for block in document.sections[1].blocks)
    assert "made up" in document.verdict
    left_out = " ".join(getattr(block, "text", "") for block in chapters.chapter(8).blocks)
    assert "1805.11604" in left_out
    assert "disputed" in left_out
    assert sum(isinstance(block, Question) for block in document.sections[-1].blocks) == 6


def test_json_carries_the_draws_and_the_season() -> None:
    content = json.loads(story_json())
    assert (content["kind"], content["schema_version"], content["made_up"]) == ("explain", 1, True)
    assert content["season"]["after"] == season().after
    assert len(content["draws"]["noise"]) == DAYS
    assert content["network"]["batch"]["count"] == 64
