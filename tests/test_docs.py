"""The pages of the documentation: their sessions run as written, and they read without the site, too."""

import doctest
import re
from dataclasses import fields
from pathlib import Path

import pytest

import batchnorm

DOCS = Path(__file__).resolve().parents[1] / "docs"
API = sorted((DOCS / "api").glob("*.md"))
SESSIONS = [page for page in sorted(DOCS.glob("*.md")) if ">>> " in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", SESSIONS, ids=lambda page: page.stem)
def test_the_sessions_give_what_they_show(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a session may write a file
    text = page.read_text(encoding="utf-8").replace("```", "\n```")
    test = doctest.DocTestParser().get_doctest(text, {}, page.stem, page.name, 0)
    failures: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=failures.append)
    assert result.failed == 0, "".join(failures)


def test_there_are_sessions() -> None:
    assert {"averaging", "changing"} <= {page.stem for page in SESSIONS}


@pytest.mark.parametrize("page", API, ids=lambda page: page.stem)
def test_every_name_has_a_line_of_its_own(page: Path) -> None:
    """`::: batchnorm.fold` is the whole documentation on the site and five words in a repository's browser."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"^::: batchnorm\.(\S+)$", text, flags=re.MULTILINE):
        assert re.search(rf"^\| `{re.escape(name)}[`(].*\| \S.{{10,}} \|$", text, flags=re.MULTILINE), name


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), *API], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("page", "leads_to"),
    [
        ("../README.md", ("docs/checking.md", "docs/watching.md", "docs/api/checks.md#what-fix-mends")),
        ("index.md", ("checking.md", "watching.md")),
        ("rules.md", ("checking.md", "watching.md", "api/checks.md#what-fix-mends")),
        ("checking.md", ("watching.md",)),
        ("api/cli.md", ("../watching.md", "checks.md#what-fix-mends")),
        ("api/checks.md", ("../checking.md", "../watching.md")),
    ],
)
def test_the_pages_of_the_check_lead_to_each_other(page: str, leads_to: tuple[str, ...]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert [link for link in leads_to if f"]({link})" not in text] == []


def test_the_page_of_the_check_names_attributes_that_there_are() -> None:
    row = re.search(r"^\| `Finding` \|(.*)\|$", (DOCS / "api/checks.md").read_text("utf-8"), re.MULTILINE)
    assert row is not None
    named = set(re.findall(r"`(\w+)`", row[1]))
    assert {"code", "module", "also"} <= named <= {each.name for each in fields(batchnorm.Finding)}
