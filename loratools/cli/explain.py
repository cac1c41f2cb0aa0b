"""explain: what a rule of `check` looks for, why that matters, and what to do."""

from __future__ import annotations

import click

from loratools.cli.common.grouped_help import verb
from loratools.cli.common.options import CHECK_RULE, common
from loratools.cli.common.output import Output


@verb("explain", short_help="Explain a rule of check.")
@click.argument("id", type=CHECK_RULE)
@common
def command(id: str, *, output: Output) -> None:
    """Explain rule ID of the verb check: what it looks for, why that matters, and what to do about it.

    For an unknown id, the nearest ones are listed.

    \b
    Examples:
      loratools explain container-truncated
      loratools explain keys-half-pair --json
    """
    from loratools.ops.check.rules import rule_named

    rule = rule_named(id)
    if output.json:
        output.document({"rules": [rule.to_dict()]})
        return
    from loratools.report.rule import rule_page

    output.text(rule_page(rule))
