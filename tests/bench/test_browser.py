"""The page of a benchmark in headless Chromium."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import Browser, open_browser

from batchnorm.bench import Benchmark

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from open_browser()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_is_drawn_in_silence(
    browser: Browser, result: Benchmark, tmp_path: Path, width: int, scheme: str
) -> None:
    page = result.save(tmp_path / "bench.html")
    browser.look(page, width=width, height=800, scheme=scheme)
    browser.drawn(2)
    assert browser.complaints() == []
    assert browser.requests() == {page.as_uri()}
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    # Ours and the other's stand on two lines of one row.
    lines = "Math.round(cell.clientHeight / parseFloat(getComputedStyle(cell).lineHeight))"
    cell = "[...document.querySelectorAll('td')].find(td => td.textContent === 'ours\\ntorch')"
    assert browser.run(f"(cell => {lines})({cell})") >= 2
