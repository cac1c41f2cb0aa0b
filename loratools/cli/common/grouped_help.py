"""The help of a verb: what it does, examples, the explanation, and its options in groups.

An option is written once, as one call of `option`. Its name is that of a parameter of the verb's Python function, so
that a command passes the values on as they are, without a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import cleandoc
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])

INPUT = "Input"
SELECTION = "Selection"
RANK = "Rank"
OUTPUT = "Output"
EXECUTION = "Execution"
PRINTING = "Printing"
GROUPS = (INPUT, SELECTION, RANK, OUTPUT, EXECUTION, PRINTING)


class GroupedOption(click.Option):
    """An option with the heading under which the help of a verb lists it."""

    def __init__(self, *args: Any, group: str = PRINTING, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class ChoiceOrAlone(GroupedOption):
    """An option with one of a few values, or given alone: then `True`. `False` if it is not given.

    Whatever stands after it and is none of its values belongs to the command line, as after a flag.
    """

    def __init__(self, *args: Any, choices: Sequence[str], **attributes: Any) -> None:
        values = click.Choice([*choices, _WITHOUT_VALUE], case_sensitive=False)
        super().__init__(*args, type=values, default=None, callback=_chosen, **attributes)
        self.choices = tuple(choices)

    def joined(self, args: Sequence[str]) -> list[str]:
        """The arguments with the option and its value as one: `--option=value`."""
        out: list[str] = []
        remaining = iter(args)
        for arg in remaining:
            if arg == "--":
                return [*out, arg, *remaining]
            if out and out[-1] in self.opts:
                is_choice = arg.lower() in self.choices
                out[-1] += f"={arg.lower() if is_choice else _WITHOUT_VALUE}"
                if is_choice:
                    continue
            out.append(arg)
        if out and out[-1] in self.opts:
            out[-1] += f"={_WITHOUT_VALUE}"
        return out


_WITHOUT_VALUE = "scheme"


def _chosen(_: click.Context, __: click.Parameter, value: str | None) -> str | bool:
    return value is not None if value in (None, _WITHOUT_VALUE) else value


def option(group: str, *names: str, **attributes: Any) -> Callable[[_Command], _Command]:
    """Make a `click.option` that the help lists under the heading `group`, one of `GROUPS`."""
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


class Verb(click.Command):
    """A verb of the command line, whose help shows the examples before the explanation and groups the options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; an option that may stand alone takes the next one only where that is a value of it."""
        for parameter in self.params:
            if isinstance(parameter, ChoiceOrAlone):
                args = parameter.joined(args)
        return super().parse_args(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first paragraph, the examples, then the other paragraphs."""
        if self.help is None:
            return
        summary, *paragraphs = cleandoc(self.help).split("\n\n")
        examples = [text for text in paragraphs if text.startswith("\b\nExample")]
        explanation = [text for text in paragraphs if text not in examples]
        for text in (summary, *examples, *explanation):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(text)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group that the verb has options of."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            # The usage line names the arguments; click 8.2 and later would list them here too.
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                # `--help` is click's own, and has no group.
                rows[getattr(parameter, "group", PRINTING)].append(record)
        for group, records in rows.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


def verb(name: str, **attributes: Any) -> Callable[[Callable[..., Any]], Verb]:
    """The decorator that makes a function the verb `name`."""
    return click.command(name, cls=Verb, **attributes)
