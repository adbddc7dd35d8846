"""The sentences that depend on the settings: one is there for every setting, and what it says is true."""

import re
from itertools import product

import pytest

from batchnorm.explain.runners import Season, Settings, season
from batchnorm.explain.texts import TEXTS
from batchnorm.explain.words import as_text, numbers, say, table

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


# As far as the sliders reach; ε is where it stands when the page opens.
AS_IT_OPENS = [
    Settings(difference=difference, trend=trend, runners=runners)
    for difference, trend, runners in product(
        (0, 1, 3, 5, 8, 15, 25), (0.01, 0.05, 0.15, 0.4), (2, 3, 4, 8, 16, 24)
    )
]


def test_eps_is_not_blamed_where_it_was_not_raised() -> None:
    low = 0
    for settings in AS_IT_OPENS:
        found = season(settings)
        said = {name: say(name, found) for name in TEXTS}
        assert not any("so large" in text or "no longer small" in text for text in said.values()), settings
        if settings.runners == 2:
            assert "With two runners that is −1 and +1" in said["normalize"], settings
            assert "dots lie at −1 and +1" in said["normalize-alt"]
            assert "so few runners leave to chance" in said["missing"]
        # A single day on which two times nearly agree is told, with its number.
        least = (found.var / (found.var + settings.eps)).sqrt().min().item()
        assert (f"as low as {least:.2f}" in said["normalize"]) is (least < 0.975), settings
        low += least < 0.975
    assert low > 5
    assert "ε is so large" in say("lead", season(Settings(eps=1)))


def test_most_days_have_spread_one_wherever_that_is_said() -> None:
    said = 0
    for exponent, runners in product(range(-20, 13), (2, 3, 16)):
        found = season(Settings(eps=10 ** (exponent / 4), runners=runners))
        ones = ((found.var / (found.var + found.settings.eps)).sqrt() >= 0.975).sum().item()
        text = say("normalize", found)
        assert ("not 1 but" in text) is (ones <= 20), (exponent, runners)
        assert ("ε is so large" in say("lead", found)) is (ones <= 20), (exponent, runners)
        if "most days spread 1" in text:
            assert 20 < ones < 40
            said += 1
    assert said > 10


def test_heat_hides_who_improves_only_where_it_does() -> None:
    counted = {"hides": 0, "harder": 0, "neither": 0}
    for settings in AS_IT_OPENS:
        before = season(settings).before
        cool = season(Settings(difference=0, trend=settings.trend, runners=settings.runners)).before
        assert before is not None
        assert cool is not None
        lead = say("lead", season(settings))
        if "that hides who is improving" in lead:
            assert before <= 0.4
            assert cool >= before + 0.3 - 1e-9
            counted["hides"] += 1
        elif "makes it harder to see who is improving" in lead:
            assert cool >= before + 0.1 - 1e-9
            counted["harder"] += 1
        else:
            assert settings.difference == 0 or before > 0.4 or cool < before + 0.3
            counted["neither"] += 1
    assert min(counted.values()) > 10
    blurred = say("lead", season(Settings(difference=8, trend=0.4)))
    assert "makes it harder to see who is improving" in blurred
    assert "which helps here" in blurred


def test_the_lead_says_what_batch_norm_does_to_the_correlation() -> None:
    for settings in AS_IT_OPENS:
        found = season(settings)
        assert found.before is not None
        assert found.after is not None
        gain, lead = found.after - found.before, say("lead", found)
        assert ("and it shows" in lead) is (gain >= 0.3), settings
        assert ("helps here" in lead) is (0.1 <= gain < 0.3), settings
        assert ("helps a little" in lead) is (0.02 <= gain < 0.1), settings
        assert ("changes little" in lead) is (-0.02 <= gain < 0.02), settings
        falls = f"the correlation falls from {as_text(found.before, 2)} to {as_text(found.after, 2)}"
        assert (falls in lead) is (gain < -0.02), settings
        assert "with so few runners" not in lead or settings.runners <= 4
    assert "falls from 0.93 to 0.36" in say("lead", season(Settings(difference=0, runners=2)))


def test_the_form_is_closest_in_the_middle_wherever_that_is_said() -> None:
    said = 0
    for settings in AS_IT_OPENS:
        found = season(settings)
        text = say("missing", found)
        if "smaller in the middle" in text:
            first, middle, last = (part.mean() for part in found.form.var(1, correction=0).tensor_split(3))
            assert middle < min(first, last), settings
            said += 1
        assert settings.difference or "heat" not in text
    assert said > 10


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
