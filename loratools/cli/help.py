"""help: how a verb is used."""

from __future__ import annotations

import click

from loratools.cli.common.grouped_help import verb as define_verb
from loratools.cli.common.options import VERB, common
from loratools.cli.common.output import Output


@define_verb("help", short_help="Show the help of a verb.")
@click.argument("verb", required=False, type=VERB)
@common
def command(verb: str | None, *, output: Output) -> None:
    """Show the help of VERB, or the list of the verbs.

    \b
    Examples:
      loratools help
      loratools help merge
    """
    parent = click.get_current_context().parent
    assert parent is not None
    assert isinstance(parent.command, click.Group)
    if verb is None:
        text = parent.get_help()
    else:
        _, described, _ = parent.command.resolve_command(parent, [verb])
        assert described is not None
        with described.make_context(verb, [], parent=parent, resilient_parsing=True) as context:
            text = described.get_help(context)
    if output.json:
        output.document({"help": text})
    else:
        output.text(text)
