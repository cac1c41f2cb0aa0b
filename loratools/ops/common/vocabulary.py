"""The size of a model's vocabulary, from its config."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.checkpoints import Checkpoint


def vocabulary_size(base: Checkpoint) -> int | None:
    """Rows of the input embedding, by the base's config."""
    config = vocabulary_config(base.config)
    size = config.get("vocab_size") if config is not None else None
    return size if isinstance(size, int) else None


def vocabulary_config(config: Mapping[str, object]) -> Mapping[str, object] | None:
    """The part of a config that has the vocabulary's size: the top, or the text part of a model of several parts."""
    text = config.get("text_config")
    parts = (config, text if isinstance(text, Mapping) else {})
    return next((part for part in parts if isinstance(part.get("vocab_size"), int)), None)
