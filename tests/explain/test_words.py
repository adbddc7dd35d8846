"""The sentences that depend on the settings: one is there for every setting, and what it says is true."""

import re
from itertools import product

import pytest

from batchnorm.explain.runners import Season, Settings, season
from batchnorm.explain.texts import TEXTS
from batchnorm.explain.words import numbers, say, table

USUAL = season()
ALL = [
    Settings(difference=difference, trend=trend, runners=runners, eps=eps, gamma=gamma)
    for difference, trend, runners, eps, gamma in product(
        (0, 1, 4, 15, 25), (0, 0.01, 0.15, 0.4), (2, 3, 16, 24), (1e-5, 0.3, 1000), (0, 3)
    )
]


def test_every_setting_has_its_words() -> None:
    for settings in ALL:
        found = season(settings)
        for name in TEXTS:
            text = say(name, found)
            assert text, (name, settings)
            assert not re.search(r"[{}]|nan|  ", text), (name, settings)


def test_the_last_wording_always_holds_and_no_number_is_unknown() -> None:
    known = set(numbers(USUAL))
    for name, sentences in TEXTS.items():
        for wordings in sentences:
            assert not wordings[-1].when, name
            assert all(said.when for said in wordings[:-1]), name
            for said in wordings:
                assert {*said.when, *re.findall(r"{(\w+)", said.text)} <= known, name
    assert table()["lead"][0][0] == {"text": "A coach times 24 runners over 40 days.", "when": {}}


def test_what_moves_is_never_named_by_its_opening_value() -> None:
    found = season(Settings(difference=7, trend=0.22, runners=11, eps=0.5, gamma=1.7, beta=83))
    said = " ".join(say(name, found) for name in TEXTS)
    for stale in (
        "30\u00a0°C",
        "0.15",
        "Each day 16",
        "γ = 3",
        "β = 90",
        "correlation 0.21",
        "after batch norm 0.87",
    ):
        assert stale not in said
    for fresh in (
        "22\u00a0°C",
        "up to 0.22 s a day",
        "Each day 11 of the 24",
        "ε = 0.5",
        "γ = 1.7 and β = 83",
    ):
        assert fresh in said


def cold() -> Season:
    return season(Settings(difference=0))


@pytest.mark.parametrize("word", ["all are slow", "weather", "jump", "drives the field", "is a hot one"])
def test_without_heat_nothing_is_said_of_what_heat_does(word: str) -> None:
    assert any(word in say(name, USUAL) for name in TEXTS)
    assert not any(word in say(name, cold()) for name in TEXTS)


def test_sigma_is_smallest_in_the_middle_wherever_that_is_said() -> None:
    said = 0
    for settings in (*ALL, Settings(runners=8, trend=0.1), Settings(runners=8, trend=0.1, difference=25)):
        found = season(settings)
        if "smallest in the middle" in say("variance-caption", found):
            first, middle, last = (part.mean() for part in found.var.sqrt().tensor_split(3))
            assert middle < min(first, last), settings
            said += 1
    assert said > 10


def test_two_runners_are_plus_and_minus_one() -> None:
    found = season(Settings(runners=2))
    assert "With two runners that is −1 and +1" in say("normalize", found)
    assert "3 runs" in say("raw-caption", found)
    assert say("trend-averages", found).startswith("They came too seldom")
    assert "so few runners leave to chance" in say("missing", found)


def test_a_large_eps_leaves_a_spread_and_says_which() -> None:
    found = season(Settings(eps=1000))
    left = (found.var / (found.var + 1000)).sqrt()
    assert f"not 1 but {left.min():.2f} to {left.max():.2f}" in say("normalize", found)
    assert "spread 1" not in say("normalize", found)
    assert "ε leaves in" in say("missing", found)


def test_a_correlation_that_is_not_there_says_why() -> None:
    assert "every output is the same β" in say("after-card", season(Settings(gamma=0)))
    assert "0.21. After batch norm there is none" in say("trend", season(Settings(gamma=0)))
    for name in ("raw-card", "after-card", "trend"):
        assert "fitness trend is 0" in say(name, season(Settings(trend=0)))
