"""The adapter was trained with another vocabulary than the base has.

Its tables of tokens have more or fewer rows. New tokens were added in the training, so that the base's tokenizer does
not know them; or the base is another version of the model. An adapter that brings its tokenizer along is as it should
be.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.errors import LoraToolsError
from loratools.formats.common.source import counted

SEVERITY = "warning"
NEEDS = "base"
FIX = "use the tokenizer that was saved with the adapter, and make sure that the base is the right one"

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json")


def observe(subject: Subject) -> Iterator[Observation]:
    """Replaced tables with another number of rows, and replaced rows behind the end of a table."""
    fit, base = subject.fit, subject.base
    if subject.adapter is None or base is None or fit is None or isinstance(fit, LoraToolsError):
        return
    if any((subject.folder / name).is_file() for name in _TOKENIZERS):
        return
    differing: list[str] = []
    for name, places in fit.replacements.items():
        replacement = subject.adapter.replacements[name]
        adapter_shape, base_shape = replacement.tensor.shape, base.shapes.get(places[0].weight, ())
        if len(adapter_shape) != 2 or len(base_shape) != 2 or adapter_shape[1] != base_shape[1]:
            continue
        if replacement.rows is not None:
            if max(replacement.rows, default=0) >= base_shape[0]:
                differing.append(f"{name}: row {max(replacement.rows):,} of a table of {base_shape[0]:,}")
        elif adapter_shape[0] != base_shape[0]:
            differing.append(f"{name}: {adapter_shape[0]:,} rows, and {base_shape[0]:,} in the base")
    if differing:
        yield Observation(
            f"the vocabulary is another one than the base's in {counted(len(differing), 'table')}", tuple(differing)
        )
