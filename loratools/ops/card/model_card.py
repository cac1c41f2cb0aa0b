"""A model card as values, and as the text of `README.md`.

Equal inputs and options give equal bytes: there is no place of this machine in a card, no name of the output and no
time, but for the date of `SOURCE_DATE_EPOCH` where the environment has it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from loratools._version import __version__
from loratools.ops.card.inputs import CARD, CardInput, common_licence, repository_of, without_folders
from loratools.sources.cache import cached_repository
from loratools.storage.files import machine_error, quoted

# What the hub calls the ways in which a model comes of another.
Relation: TypeAlias = Literal["adapter", "merge", "finetune", "quantized"]
# By these words a card of ours is known, and found on the hub.
_TAG = "loratools"


@dataclass(frozen=True)
class ModelCard:
    """What the card of an output says.

    Attributes:
        title: Its heading.
        base_models: The models that it comes of, by their ids on the hub, or by their names if they have no id.
        relation: How it comes of them.
        library: The library that loads it; None if that is not known.
        tags: Words to find it by.
        inputs: What it was made of.
        command: The command line that makes it again.
        facts: What was measured, in pairs of a word and a text.
        warnings: What a person should know about it.
        programs: Names and versions of the programs that its values depend on.
    """

    title: str
    base_models: tuple[str, ...]
    relation: Relation
    library: str | None
    tags: tuple[str, ...]
    inputs: tuple[CardInput, ...]
    command: str
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the text of the file, which ends with a line break."""
        import yaml  # type: ignore[import-untyped]

        licence = common_licence(self.inputs)
        fields: dict[str, object] = {key: quoted_in_full(value) for key, value in licence.fields.items()}
        if self.base_models:
            bases = list(dict.fromkeys(map(quoted_in_full, self.base_models)))
            fields |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": self.relation}
        if self.library is not None:
            fields["library_name"] = self.library
        fields["tags"] = sorted({_TAG, *self.tags})
        head = yaml.safe_dump(fields, sort_keys=True, allow_unicode=True, default_flow_style=False)
        return f"---\n{head}---\n\n" + "\n".join(self._body(licence.sentence)) + "\n"

    def _body(self, licence: str) -> Iterator[str]:
        yield f"# {_line(self.title)}"
        yield ""
        yield f"Made with loratools from {_listed([_named(source) for source in self.inputs])}."
        yield licence
        yield from ("", "```sh", _line(self.command), "```", "", "## What was measured", "")
        yield from ("| | |", "|---|---|")
        yield from (f"| {_cell(word)} | {_cell(fact)} |" for word, fact in self.facts)
        if self.warnings:
            paths = [source.path for source in self.inputs]
            yield from ("", "## Warnings", "")
            yield from (f"- {_line(without_folders(warning, paths))}" for warning in self.warnings)
        yield ""
        yield f"{', '.join([f'loratools {__version__}', *self.programs])}{_date()}"


def card_of_person(out: Path) -> bool:
    """Whether the folder of the output has a card that loratools did not write, which stays as it is."""
    from loratools.storage.held_inputs import hold_no
    from loratools.storage.ownership import owned_files

    try:
        return (out / CARD).is_file() and CARD not in (owned_files(out) or ())
    except OSError as error:
        raise machine_error(error, "read", out) from error
    finally:
        hold_no(out)  # what is looked at there will be replaced, and is no input


def base_names(named: str | None, path: Path | None = None) -> tuple[str, ...]:
    """Return the id or name of a base model: none where nobody names it.

    Args:
        named: What an adapter calls it: an id of the hub, or a path on the machine that trained it.
        path: Where it lies on this machine.
    """
    name = repository_of(Path(named)) if named else None
    place = repository_of(path) if path is not None else None
    if name is not None and (place is None or name.rpartition("/")[2] == place.rpartition("/")[2]):
        return (name,)
    return (place,) if place is not None else ()


def _date() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return time.strftime(", %Y-%m-%d", time.gmtime(int(epoch))) if epoch.isdecimal() else ""


def _line(text: str) -> str:
    """A text on one line that cannot begin a block or an element of its own."""
    return quoted_in_full(text).replace("<", "&lt;").replace("```", "'''")


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _named(source: CardInput) -> str:
    """The name of an input, with the commit where it is from the hub."""
    cached = cached_repository(source.path) if source.path is not None else None
    commit = f" at commit {_code(cached.commit)}" if cached is not None and cached.commit is not None else ""
    return _code(source.name) + commit


def _code(text: str) -> str:
    return "`" + quoted_in_full(text).replace("`", "'") + "`"


def quoted_in_full(text: str) -> str:
    """Return a text with what is not printable spelled as escapes, however long it is."""
    return "".join(quoted(text[i : i + 100])[1:-1] for i in range(0, len(text), 100))


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
