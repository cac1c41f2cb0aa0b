"""Names of tensors without what training wrapped around the modules: torch.compile, FSDP, DDP, DeepSpeed, ...

A wrapper is a module around a module, and its name a segment in every name below it. It says how the model was trained
and is in no model that the adapter is for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# No model calls its own modules so; torch and fairscale write these wherever they wrap.
_ANYWHERE = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
}
# DataParallel, DistributedDataParallel and DeepSpeed's engine wrap a whole model, and name it with a common word.
_OUTERMOST = "module"
_PEFT = ("base_model", "model")
# In a config the dot after a name may be escaped, as its fields hold regular expressions too.
_IN_CONFIG = re.compile(rf"(?:{'|'.join(_ANYWHERE)})\\?\.")


@dataclass(frozen=True)
class Unwrapped:
    """The names of an adapter without the wrappers of training.

    `names`: name in the file -> name without wrappers. `wrappers`: how many names each tool's were taken out of.
    """

    names: dict[str, str]
    wrappers: dict[str, int]


def unwrapped(names: Iterable[str]) -> Unwrapped:
    """The names without wrappers, those of models that another name is in (`module.`) only where all names have it."""
    names = list(names)
    # All names at once: nearly no adapter has wrappers, and one of every expert has 90,000 names.
    text = "\n".join(names)
    if not any(word in text for word in _ANYWHERE) and _outermost([name.split(".") for name in names[:1]]) is None:
        return Unwrapped(dict(zip(names, names, strict=True)), {})
    removed: Counter[str] = Counter()
    segments: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        removed.update({_ANYWHERE[part] for part in parts[:-1] if part in _ANYWHERE})
        segments[name] = [part for part in parts[:-1] if part not in _ANYWHERE] + parts[-1:]
    while (at := _outermost(segments.values())) is not None:
        segments = {name: parts[:at] + parts[at + 1 :] for name, parts in segments.items()}
        removed["DistributedDataParallel or DeepSpeed"] = len(segments)
    return Unwrapped({name: ".".join(parts) for name, parts in segments.items()}, dict(removed))


def unwrapped_config(config: Mapping[str, object]) -> dict[str, object]:
    """The config with the names of modules in its lists and patterns as `unwrapped` has them."""
    return {key: _unwrapped_value(value) for key, value in config.items()}


def _unwrapped_value(value: object) -> object:
    if isinstance(value, str):
        return _IN_CONFIG.sub("", value)
    if isinstance(value, list):
        return [_IN_CONFIG.sub("", entry) if isinstance(entry, str) else entry for entry in value]
    if isinstance(value, dict):
        return {_IN_CONFIG.sub("", key) if isinstance(key, str) else key: entry for key, entry in value.items()}
    return value


def _outermost(names: Iterable[list[str]]) -> int | None:
    """Where all names have the word for a wrapped model: at their front, or within PEFT's own prefix."""
    names = list(names)
    for at in (0, len(_PEFT)):
        before = list(_PEFT[:at])
        if names and all(parts[:at] == before and parts[at : at + 1] == [_OUTERMOST] for parts in names):
            return at if all(len(parts) > at + 2 for parts in names) else None
    return None
