"""The page of a rule in the terminal."""

from typing import TYPE_CHECKING

from batchnorm.cli._output import STDOUT, check_json_target, stdout, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from batchnorm.checks.rule import Rule

__all__ = ["explain_rule"]


def explain_rule(code: str, json: str | None) -> None:
    """Print a rule's page, or write it as JSON.

    Raises:
        InputError: there is no such rule.
    """
    check_json_target(json)
    from batchnorm.checks.rule import rule_named
    from batchnorm.checks.telling import rule_as_dict
    from batchnorm.report.json import to_json

    rule = rule_named(code)
    path = write_json(to_json(rule_as_dict(rule), kind="rule", schema_version=1), json)
    if json == STDOUT:
        return
    console = stdout()
    console.print(_page(rule))
    if path is not None:
        console.print(f"\njson: {path}", soft_wrap=True, markup=False)


def _page(rule: "Rule") -> "RenderableType":
    from rich.console import Group
    from rich.markdown import Markdown
    from rich.text import Text

    from batchnorm.checks.telling import needs
    from batchnorm.cli._findings import SEVERITY_STYLES

    head = Text.assemble((rule.code, "bold"), ": ", (rule.title, "bold"))
    kind = Text.assemble((rule.severity, SEVERITY_STYLES[rule.severity]), (f", needs {needs(rule)}", "dim"))
    parts: list[RenderableType] = [head, kind, Text(), Markdown(rule.page)]
    if rule.reference:
        parts += [Text(), Text(rule.reference, style="dim", overflow="fold")]
    return Group(*parts)
