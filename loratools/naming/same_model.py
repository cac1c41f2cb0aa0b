"""Whether two names are of one model: what a model says itself that it is called, beside what an adapter calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from loratools.naming.hub_names import is_hub_name
from loratools.sources.cache import cached_repository

# The same model in another storage: what packagers append to its name.
_STORAGE_WORDS = frozenset(
    ("bnb", "4bit", "8bit", "int4", "int8", "nf4", "fp8", "fp16", "bf16", "fp32", "gptq", "awq", "gguf", "mlx", "hf")
)


def other_model(name: str, path: Path, config: Mapping[str, object]) -> str | None:
    """The name on the hub that a model says it has, where that is another model than `name` is; None otherwise.

    A folder's own name is no evidence, since people call their copies what they like, and neither is a path of
    somebody's machine. A model says what it is in its config, or as a folder of the hub's cache.

    Args:
        name: What something else calls the model that it is for.
        path: Where the model is.
        config: Its config.
    """
    hub_names = [published for published in _published_names(path, config) if is_hub_name(published)]
    if not is_hub_name(name) or not hub_names or is_named(name, path, config):
        return None
    return hub_names[0]


def is_named(name: str, path: Path, config: Mapping[str, object]) -> bool:
    """Whether a model is called so by its path, by the hub's cache or by its config, storage aside."""
    return _words(name) in map(_words, [str(path.absolute()), *_published_names(path, config)])


def _published_names(path: Path, config: Mapping[str, object]) -> list[str]:
    cached, in_config = cached_repository(path), config.get("_name_or_path")
    return [
        *([cached.repository] if cached is not None else []),
        *([in_config] if isinstance(in_config, str) and in_config else []),
    ]


def _words(path: str) -> tuple[str, ...]:
    """The last part of a path or a hub's name as words in lower case, without those that say how it is stored."""
    last = path.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
    return tuple(word for word in re.split(r"[-_. ]+", last) if word not in _STORAGE_WORDS)
