"""The rules' pages: what they hold, and the documentation made of them."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.checks._batches import forwards
from batchnorm.checks.rule import all_rules

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hook() -> ModuleType:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("rules_hook", ROOT / "docs" / "rules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(source: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=source))


@pytest.mark.parametrize("code", sorted(all_rules()))
def test_a_page_says_what_it_is_and_what_to_do(code: str) -> None:
    text = all_rules()[code].page
    assert not text.startswith("#")
    assert "## What to do" in text
    assert set(re.findall(r"\bBN\d+", text)) <= set(all_rules())


def test_the_site_gets_a_page_for_each_rule_in_its_menu(hook: ModuleType) -> None:
    nav = [{"Start": "index.md"}, {"Reference": [{"Layers": "layers.md"}, {"Rules": "rules.md"}]}]
    (rules,) = hook.on_config(SimpleNamespace(nav=nav)).nav[1]["Reference"][1].values()
    assert rules == [{"All rules": "rules.md"}, *(f"rules/{code}.md" for code in all_rules())]
    with pytest.raises(ValueError, match="no entry"):
        hook.on_config(SimpleNamespace(nav=[{"Start": "index.md"}]))


def test_pages_link_to_each_other(hook: ModuleType) -> None:
    text = hook._page(all_rules()["BN101"])
    linked = hook.on_page_markdown(text, page=page("rules/BN101.md"))
    assert linked.startswith("# BN101: training and eval disagree\n")
    assert "shuffled** ([BN107](BN107.md))" in linked
    assert "[BN101](" not in linked
    assert "`batchnorm explain BN101`" in linked
    assert (
        hook.on_page_markdown("`BN101`, BN101, [BN101](x)", page=page("math.md"))
        == "`BN101`, BN101, [BN101](x)"
    )


def test_the_list_has_every_rule(hook: ModuleType) -> None:
    text = hook.on_page_markdown((ROOT / "docs/rules.md").read_text("utf-8"), page=page("rules.md"))
    for code, rule in all_rules().items():
        assert f"| [{code}](rules/{code}.md) | {rule.severity} | {rule.title} |" in text


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("number", [1, 3])
def test_the_number_of_forwards_is_known_before(dropout: bool, number: int) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), *([nn.Dropout(0.1)] if dropout else []))
    done: list[int] = []
    batches = [torch.randn(8, 4) for _ in range(number)]
    batchnorm.check(model, batches=batches, select="BN101", progress=done.append)
    assert done[-1] == len(done) == forwards(model, number)
