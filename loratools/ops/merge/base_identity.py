"""Whether an adapter belongs to another base model than the one it is merged into, as far as both say what they are."""

from __future__ import annotations

import re

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint
from loratools.matching import Matches
from loratools.storage.files import quoted

# `owner/name`, as the hub names a model. Anything else may be a folder of somebody's machine, which says nothing.
_HUB_NAME = re.compile(r"(?!\.)[\w.-]+/[\w.-]+", re.ASCII)
# The same model in another storage: what packagers append to its name.
_STORAGE_WORDS = frozenset(
    ("bnb", "4bit", "8bit", "int4", "int8", "nf4", "fp8", "fp16", "bf16", "fp32", "gptq", "awq", "gguf", "mlx", "hf")
)


def different_base_warning(adapter: Adapter, base: Checkpoint, matches: Matches) -> str | None:
    """The warning that an adapter seems to be for another model, or None if there is no evidence of that.

    A folder's own name is no evidence, since people call their copies what they like. Evidence is either that the base
    itself names the model that it is (in its config, or as a folder of the hub's cache) and that is another one, or
    that its names differ and modules of the adapter have no place in it.

    Args:
        adapter: The adapter; without a `base_model` there is nothing to compare.
        base: The checkpoint that it is merged into.
        matches: Where the modules of the adapter belong in the base.
    """
    if not adapter.base_model:
        return None
    # A hub cache keeps `owner/name` in .../models--owner--name/snapshots/<revision>.
    of_cache = [
        part.removeprefix("models--").replace("--", "/")
        for part in base.path.absolute().parts
        if part.startswith("models--")
    ]
    in_config = base.config.get("_name_or_path")
    published = [*of_cache, *([in_config] if isinstance(in_config, str) and in_config else [])]
    if _model_name(adapter.base_model) in map(_model_name, [str(base.path.absolute()), *published]):
        return None
    hub_names = [name for name in published if _HUB_NAME.fullmatch(name)]
    if hub_names and _HUB_NAME.fullmatch(adapter.base_model):
        return (
            f"'{adapter.name}' is for '{adapter.base_model}', and {quoted(base.path)} says that it is '{hub_names[0]}'"
        )
    if matches.leftovers:
        return (
            f"'{adapter.name}' is for '{adapter.base_model}', and {len(matches.leftovers)} of its names do not fit "
            f"{quoted(base.path)}, which may be another model"
        )
    return None


def _model_name(path: str) -> tuple[str, ...]:
    """The last part of a path or a hub's name as words in lower case, without those that say how it is stored."""
    last = path.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
    return tuple(word for word in re.split(r"[-_. ]+", last) if word not in _STORAGE_WORDS)
