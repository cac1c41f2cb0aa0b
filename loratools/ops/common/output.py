"""What an adapter that is made of others is written as: the format of the inputs, and their names where it has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools import formats
from loratools.adapter import Adapter
from loratools.errors import MismatchError, UndecidedError, UnsupportedError
from loratools.storage.files import quoted

_FALLBACK = "peft"
_BEFORE_NUMBER = re.compile(r"\D*(?=\d)")


@dataclass(frozen=True)
class OutputFormat:
    """The format to write, and what a person should know of how it was chosen."""

    name: str
    warnings: tuple[str, ...] = ()


def output_format(sources: Sequence[Adapter], out: str | Path | None, requested: str | None) -> OutputFormat:
    """The format of the inputs where they agree and it is written, PEFT otherwise; what is asked for goes before it.

    A folder is written where `out` has no suffix, and PEFT's is the one that holds the parts of any adapter.
    """
    if requested is not None:
        formats.writer(requested)
        return OutputFormat(requested)
    names = sorted({source.format for source in sources if source.format})
    if not names:
        return OutputFormat(_FALLBACK)  # adapters made in memory, which are of no format
    if len(names) > 1:
        return OutputFormat(_FALLBACK, (f"written as {_FALLBACK}, as the inputs are {' and '.join(names)}",))
    (name,) = names
    writes = formats.written_suffix(name)
    if writes is None:
        return OutputFormat(_FALLBACK, (f"written as {_FALLBACK}, as {name} is read and not written",))
    if writes != formats.FOLDER and out is not None and not Path(out).suffix:
        note = f"written as a folder of {_FALLBACK}; for {name}, as the inputs are: -o {Path(out).name}{writes}"
        return OutputFormat(_FALLBACK, (note,))
    return OutputFormat(name)


def format_that_holds(
    adapter: Adapter, out: Path | None, name: str, *, base: formats.Base | None, requested: bool
) -> OutputFormat:
    """The format of the inputs where it can hold the result, otherwise PEFT, with the reason as a warning.

    No other format takes the place of one that a person asks for, or of one file under the name of a file: writing
    that raises what stands against it.
    """
    if requested or name == _FALLBACK or (out is not None and formats.written_suffix(name) != formats.FOLDER):
        return OutputFormat(name)
    try:
        formats.ensure_writable(adapter, name, base=base)
    except (UndecidedError, UnsupportedError) as error:
        why = f"{error.message}: {error.details[0]}" if error.details else error.message
        return OutputFormat(_FALLBACK, (f"written as {_FALLBACK}, as {name} cannot hold the result: {why}",))
    return OutputFormat(name)


def share_names(sources: Sequence[Adapter]) -> bool:
    """Whether adapters that keep the names of their files use the same names for the same modules.

    False where one calls a module as another calls a part of it, or calls it otherwise.
    """
    if not all(source.stored_names for source in sources):
        return False
    calls: dict[str, str] = {}
    for source in sources:
        for name in source.updates:
            for canonical in source.aliases.get(name, (name,)):
                if calls.setdefault(canonical, name) != name:
                    return False
    return True


def refuse_unrelated(sources: Sequence[Adapter]) -> None:
    """Raise where no two adapters have modules in common and their names hang in different trees.

    Raises:
        UndecidedError: The names of one mean nothing without its model.
        MismatchError: They are for different models, or spell one model in two ways.
    """
    if len(sources) < 2:
        return
    trees = [
        {start[0] for name in (*source.updates, *source.replacements) if (start := _BEFORE_NUMBER.match(name))}
        for source in sources
    ]
    for i, source in enumerate(sources):
        other_trees = [tree for j, tree in enumerate(trees) if j != i]
        # Names without a number say nothing of where they hang.
        if not trees[i] or not all(other_trees) or any(trees[i] & other_tree for other_tree in other_trees):
            continue
        undecided = next((s for s in sources if s.undecided is not None), None)
        kind = UndecidedError if undecided is not None else MismatchError
        raise kind(
            f"{quoted(source.name)} shares no module with the others: it is for another model, or spells one otherwise",
            details=[f"{quoted(s.name)}: {next(iter([*s.updates, *s.replacements]))}" for s in sources],
            hint="name the model they are for, so that their names can be brought together: --base BASE",
        )
