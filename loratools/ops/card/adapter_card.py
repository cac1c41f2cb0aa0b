"""The model card of an adapter that a verb has made of others, or of two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools.ops.card.command import command_line
from loratools.ops.card.inputs import CARD, CardInput
from loratools.ops.card.model_card import ModelCard, base_names, card_of_person
from loratools.storage.json_file import write_new

# The library that loads a folder of this format.
_LIBRARIES = {"peft": "peft", "mlx": "mlx"}


@dataclass(frozen=True)
class AdapterCard:
    """What the card of an adapter says, but for its format, which is known when it is written.

    Attributes:
        verb: The verb that makes it.
        title: Its heading.
        base_model: What the adapter calls its base; None if it names none.
        inputs: What it was made of.
        arguments: The same as the command line has them, with their weights.
        settings: Values of parameters of the verb's function.
        function: The verb's function.
        facts: What was measured, in pairs of a word and a text.
        warnings: What a person should know about it.
        renamed: Options of the verb that are not called as their parameters.
        with_torch: Whether its values were computed with torch.
    """

    verb: str
    title: str
    base_model: str | None
    inputs: Sequence[CardInput]
    arguments: Sequence[str]
    settings: Mapping[str, object]
    function: Callable[..., object]
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str] = ()
    renamed: Mapping[str, str] | None = None
    with_torch: bool = True

    def write(self, folder: Path, out: Path, format: str, kinds: Sequence[str]) -> None:
        """Write the card into a folder that is going to be `out`, unless a person's card is there.

        Args:
            folder: The folder; nothing is written where it is a file.
            out: The output.
            format: The format of the adapter.
            kinds: The kinds of its updates.
        """
        if not folder.is_dir() or card_of_person(out):
            return
        programs: tuple[str, ...] = ()
        if self.with_torch:
            import torch

            programs = (f"torch {torch.__version__}",)
        card = ModelCard(
            title=self.title,
            base_models=base_names(self.base_model),
            relation="adapter",
            library=_LIBRARIES.get(format),
            tags=("adapter", *kinds),
            inputs=tuple(self.inputs),
            command=command_line(
                self.verb, self.arguments, self.settings, function=self.function, renamed=self.renamed
            ),
            facts=tuple(self.facts),
            warnings=tuple(self.warnings),
            programs=programs,
        )
        write_new(folder / CARD, card.text().encode("utf-8"))


def rank_text(ranks: Sequence[int | None]) -> str:
    """Return ranks in words: `8`, or `2 to 16`."""
    known = sorted({rank for rank in ranks if rank is not None})
    return "none" if not known else str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"
