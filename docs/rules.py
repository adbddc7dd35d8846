"""A hook of MkDocs: a page for each rule of `batchnorm.check`, from the docstring that is its page in the terminal.

The page `rules.md` gets the list of them, and wherever one of these pages names a rule there is a link.
"""

import re
from typing import Any

from mkdocs.structure.files import File

from batchnorm.checks.rule import Rule, all_rules
from batchnorm.checks.telling import needs

_LIST = "<!-- the rules -->"
_INDEX = "rules.md"
_FOLDER = "rules"
# A rule's code, or what stays as it is: what stands in backticks, and links.
_CODE = re.compile(r"(`[^`]*`|\[[^\]]*\]\([^)]*\))|\b(BN\d{3})\b")


def on_config(config: Any, **_: Any) -> Any:
    """Put the rules' pages below their list in the menu."""
    pages = [f"{_FOLDER}/{code}.md" for code in all_rules()]
    lists = [entries for part in config.nav for entries in part.values() if isinstance(entries, list)]
    for entries in lists:
        if {"Rules": _INDEX} in entries:
            entries[entries.index({"Rules": _INDEX})] = {"Rules": [{"All rules": _INDEX}, *pages]}
            return config
    raise ValueError(f"mkdocs.yml has no entry 'Rules: {_INDEX}' in its nav")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages."""
    for code, rule in all_rules().items():
        files.append(File.generated(config, f"{_FOLDER}/{code}.md", content=_page(rule)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in the list, and link every code."""
    source = page.file.src_uri
    if source == _INDEX:
        return _linked(markdown.replace(_LIST, _table()), f"{_FOLDER}/")
    if source.startswith(f"{_FOLDER}/"):
        title, _, rest = markdown.partition("\n")
        return f"{title}\n{_linked(rest, '', own=title.split()[1].rstrip(':'))}"
    return markdown


def _page(rule: Rule) -> str:
    kind = f"*{rule.severity}; needs {needs(rule)}. In the terminal:* `batchnorm explain {rule.code}`"
    parts = [f"# {rule.code}: {rule.title}", kind, rule.page]
    if rule.reference:
        parts.append(f"## Read more\n\n<{rule.reference}>")
    return "\n\n".join(parts) + "\n"


def _table() -> str:
    rows = [
        f"| {code} | {rule.severity} | {rule.title} | {needs(rule)} |" for code, rule in all_rules().items()
    ]
    return "\n".join(["| rule | severity | looks for | needs |", "|---|---|---|---|", *rows])


def _linked(text: str, folder: str, own: str = "") -> str:
    def link(match: re.Match[str]) -> str:
        code = match[2]
        if code is None or code == own or code not in all_rules():
            return match[0]
        return f"[{code}]({folder}{code}.md)"

    return _CODE.sub(link, text)
