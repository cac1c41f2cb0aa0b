"""A source as rules look at it: opened as far as it can be, with the reason where it cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from loratools import formats
from loratools.checks.common.subject import Subject
from loratools.errors import LoraToolsError
from loratools.formats import Base
from loratools.formats.common.source import open_source
from loratools.ops.common.unreadable import as_ours
from loratools.ops.inspect.sources import FoundSource

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint


class GivenContext(NamedTuple):
    """What a person has given beside the sources.

    `base`: what is known of the model that they are for. `checkpoint`: the same, opened, where it has values.
    `program`: what is to load them. `format`: the format that they are read as.
    """

    base: Base | None = None
    program: str | None = None
    format: str | None = None
    checkpoint: Checkpoint | None = None


def read_subject(found_source: FoundSource, context: GivenContext) -> Subject:
    """Open one source. Headers only; what cannot be opened is a subject too."""
    subject = Subject(found_source.path, base=context.base, program=context.program)
    if found_source.error is not None:
        return replace(subject, error=as_ours(found_source.error))
    try:
        if not found_source.is_adapter:
            from loratools.checkpoints import open_checkpoint

            return replace(subject, checkpoint=open_checkpoint(found_source.path))
        subject = replace(subject, source=open_source(found_source.path, base=context.base))
        assert subject.source is not None
        return replace(subject, adapter=formats.load_source(subject.source, format=context.format))
    except (LoraToolsError, OSError) as error:
        return replace(subject, error=as_ours(error))
