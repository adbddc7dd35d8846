"""`batchnorm rules`: what `batchnorm check` looks for."""

from typing import TYPE_CHECKING

import typer

from batchnorm.cli._output import STDOUT, JsonTarget, check_json_target, guarded, stdout, write_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["command"]


def command(context: typer.Context, json: JsonTarget = None) -> None:
    """List the rules of `batchnorm check`: code, severity, what each looks for, and what it needs.

    `batchnorm explain CODE` prints the page of a rule.
    """
    with guarded(context):
        check_json_target(json)

        from batchnorm.checks.telling import rules_as_dicts
        from batchnorm.report.json import to_json

        path = write_json(to_json({"rules": rules_as_dicts()}, kind="rules", schema_version=1), json)
        if json == STDOUT:
            return
        console = stdout()
        console.print(_table())
        if path is not None:
            console.print(f"\njson: {path}", soft_wrap=True, markup=False)


def _table() -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from batchnorm.checks.rule import all_rules
    from batchnorm.checks.telling import needs
    from batchnorm.cli._findings import SEVERITY_STYLES

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in ("rule", "severity", "looks for", "needs"):
        table.add_column(column)
    for code, rule in all_rules().items():
        severity = Text(rule.severity, style=SEVERITY_STYLES[rule.severity])
        table.add_row(Text(code, style="bold"), severity, Text(rule.title), Text(needs(rule), style="dim"))
    return table
