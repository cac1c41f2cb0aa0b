"""Texts of a file's header that a person sets or strips: title, trigger words, training settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loratools import registry
from loratools.adapter import Adapter
from loratools.errors import UsageError
from loratools.formats.common.header_keys import NEVER_SET

_TEXTS = "metadata"


@dataclass(frozen=True)
class EditedMetadata:
    """What a person wants of the texts in the header of the file that is written.

    Attributes:
        texts: Texts by key, which replace those of the source; an empty one takes the key away.
        strip: Whether the texts of the source are left out.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    strip: bool = False

    def of(self, adapter: Adapter) -> Adapter:
        """The adapter with these texts. What the texts said of its family, ranks and scales is known by then."""
        if not self.texts and not self.strip:
            return adapter
        notes = {format: self._edited(note) for format, note in adapter.notes.items()}
        texts = {key: text for key, text in self.texts.items() if text}
        # The last of the notes counts where several have a text.
        return replace(adapter, notes={**notes, "given": {_TEXTS: texts}})

    def check(self, format: str) -> None:
        """Refuse texts that a file of this format cannot have.

        Raises:
            UsageError: The format has no place for texts, or writes a text of that key itself.
        """
        if self.texts and not getattr(registry.load("formats", format), "HAS_TEXTS", True):
            raise UsageError(
                f"a {format} adapter has no place for the text '{next(iter(self.texts))}'",
                hint="write another format, or leave out --set-metadata",
            )
        if refused := sorted(NEVER_SET.intersection(self.texts)):
            raise UsageError(
                f"the text '{refused[0]}' is written from what the file holds, and cannot be set",
                hint="set others, such as modelspec.title=NAME",
            )

    def _edited(self, note: object) -> object:
        if not isinstance(note, Mapping):
            return note
        texts = note.get(_TEXTS)
        if not isinstance(texts, Mapping):
            return note
        remaining = {} if self.strip else {key: text for key, text in texts.items() if key not in self.texts}
        return {**note, _TEXTS: remaining}
