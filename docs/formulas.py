"""A hook of MkDocs: formulas become MathML while the site is built, so a page needs no script for them."""

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.formulas")

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Replace each formula that pymdownx.arithmatex has marked; `--strict` fails on one that cannot be."""

    def mathml(match: re.Match[str]) -> str:
        tag, latex = match[1], html.unescape(match[2]).strip()
        # An equation number is not a part of MathML: it stands behind the formula.
        latex = latex.replace("{aligned}", "{align*}")  # the converter knows it by this name alone
        latex = re.sub(r"\\tag\{(.*?)\}", r"\\qquad (\1)", latex)
        try:
            result = convert(latex, display="block" if tag == "div" else "inline")
        except Exception as error:  # the library raises an exception of its own for each kind of mistake
            log.warning("%s: the formula %s does not convert: %r", page.file.src_uri, latex, error)
            return match[0]
        # An unknown command comes out as its own name, an unknown environment with the & between its columns.
        if re.search(r">(\\\w|&<)", result):
            log.warning("%s: the formula %s has a part that MathML cannot show", page.file.src_uri, latex)
        return f'<{tag} class="formula">{result}</{tag}>'

    return _FORMULA.sub(mathml, content)
