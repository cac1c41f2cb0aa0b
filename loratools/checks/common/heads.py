"""Names of what stands at the end of a model: of its language, a task, or a value."""

from __future__ import annotations

_HEADS = frozenset({"lm_head", "score", "classifier", "qa_outputs", "v_head", "embed_out", "pre_classifier", "cls"})


def is_head(name: str) -> bool:
    """Whether a module or a weight of this name is a head, or a part of one."""
    return not _HEADS.isdisjoint(name.split("."))
