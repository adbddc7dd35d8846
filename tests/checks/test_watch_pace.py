"""When `watch` looks: how often, and at what price."""

import itertools

import pytest

from batchnorm.checks.live.pace import SHARE, Pace


class Clock:
    """A second is what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("batchnorm.checks.live.pace.time.perf_counter", lambda: self.now)


@pytest.mark.parametrize(("step", "look"), [(1e-3, 5e-3), (0.2, 0.02), (1.0, 0.001)])
def test_looking_stays_below_its_share(step: float, look: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace, looked = Clock(monkeypatch), Pace(None, 0), []
    for number in range(1, 20_001):
        if pace.begin():
            looked.append(number)
            since = clock.now
            clock.now += look
            pace.pay(since)
            pace.looked()
        clock.now += step
    assert looked[0] == 1
    assert pace.overhead <= SHARE
    later = [number for number in looked if number > 2 * pace.interval]
    assert all(number % pace.interval == 0 for number in later)
    assert str(pace.interval).strip("0") in ("1", "2", "5")
    # Round numbers waste at most a factor of 2.5, and of steps of 1 ms the hooks take a third of the share.
    assert len(looked) > 20_000 * SHARE * step / look / 4 or pace.interval == 1


def test_the_price_is_what_the_look_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace(1, 0)
    for _ in range(10):
        assert pace.begin()
        since = clock.now
        clock.now += 1
        pace.pay(since)
        pace.looked()
        clock.now += 4
    pace.begin()
    assert pace.overhead == pytest.approx(0.25, abs=1e-4)


def looked_at(monkeypatch: pytest.MonkeyPatch, prices: list[float], steps: int) -> list[int]:
    """Steps of 10 ms that are looked at; the looks take what `prices` says, and its last behind that."""
    clock, pace, looked = Clock(monkeypatch), Pace(None, 0), []
    for number in range(1, steps + 1):
        if pace.begin():
            since = clock.now
            clock.now += prices[min(len(looked), len(prices) - 1)]
            looked.append(number)
            pace.pay(since)
            pace.looked()
        clock.now += 0.01
    return looked


@pytest.mark.parametrize("slow", [[1.0], [1.0, 0.3], [0.005, 1.0]])
def test_slow_first_looks_do_not_stretch_the_interval(
    slow: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = looked_at(monkeypatch, [0.005], 600)
    assert len(usual) >= 20
    assert len(looked_at(monkeypatch, [*slow, 0.005], 600)) >= len(usual) - 2


def test_a_later_slow_look_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = looked_at(monkeypatch, [0.005] * 5 + [1.0] + [0.005], 6000)
    # 1 s is 3 % of 3,333 steps of 10 ms, a few of them lost to the two hooks.
    assert max(after - before for before, after in itertools.pairwise(looked)) > 3000
