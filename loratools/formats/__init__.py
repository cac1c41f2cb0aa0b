"""How adapters are stored: one file per format, found by content, read to an `Adapter` and written from one.

A format has `detect(source) -> bool`, `read(source, *, rank_from) -> Adapter` and
`write(adapter, folder, *, dtype) -> warnings`. Reading looks at headers only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from loratools import registry
from loratools.adapter import Adapter
from loratools.errors import FormatError, UndecidedError, UsageError
from loratools.formats._source import AdapterSource, find_adapters, open_source, shown
from loratools.storage.files import quoted

__all__ = ["RankFrom", "detect", "find_adapters", "load", "save"]

# Which rank makes the scale, where the config and the tensors disagree.
RankFrom = Literal["tensors", "config"]


def load(path: str | Path, *, format: str | None = None, rank_from: RankFrom | None = None) -> Adapter:
    """Read an adapter from a file or a folder. No values are read.

    format: one of `loratools formats`; found from the content where it is None.
    rank_from: which rank makes the scale where the config and the tensors disagree. Without it the adapter has doubts.

    Raises:
        UsageError: nothing is there, or there is no such format.
        UndecidedError: more than one format claims it.
        FormatError: it is no adapter, or not a sound one.
        UnsupportedError: it needs what is not supported, all of it named.
    """
    if rank_from not in (None, "tensors", "config"):
        raise UsageError(f"no rank to take from '{rank_from}'; there are: config, tensors")
    if format is not None:
        registry.load("formats", format)
    source = open_source(path)
    adapter: Adapter = registry.load("formats", format or _only_claim(source)).read(source, rank_from=rank_from)
    return replace(adapter, warnings=(*source.warnings, *adapter.warnings))


def detect(path: str | Path) -> list[str]:
    """Names of the formats that claim what is at `path`."""
    return _claims(open_source(path))


def save(
    adapter: Adapter,
    out: str | Path,
    *,
    format: str = "peft",
    dtype: str | None = None,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
) -> tuple[str, ...]:
    """Write an adapter, complete or not at all, and return what a person should know about it.

    dtype: of the floating tensors; each keeps its own where it is None.
    inputs: paths that must not be written over.

    Raises:
        UsageError: `out` exists and is not to be overwritten, is an input, or there is no such format or dtype.
        UnsupportedError: the format cannot hold it, or its scale is uncertain.
    """
    from loratools.storage.commit import staged_folder
    from loratools.tensors import parse_float_dtype

    module = registry.load("formats", format)
    stored = None if dtype is None else parse_float_dtype(dtype)
    if dtype is not None and stored is None:
        raise UsageError(f"no dtype named '{dtype}'; there are: float64, float32, float16, bfloat16")
    # Every format stores the scale in one way or another, so that a doubt would be written as a fact.
    adapter.require_scale()
    with staged_folder(Path(out), overwrite=overwrite, inputs=[Path(p) for p in inputs]) as folder:
        warnings: tuple[str, ...] = module.write(adapter, folder, dtype=stored)
    return warnings


def _claims(source: AdapterSource) -> list[str]:
    return [name for name in registry.names("formats") if registry.load("formats", name).detect(source)]


def _only_claim(source: AdapterSource) -> str:
    claims = _claims(source)
    if len(claims) == 1:
        return claims[0]
    if claims:
        raise UndecidedError(
            f"{quoted(source.path)} could be {' or '.join(claims)}",
            hint=f"say which: --from {claims[0]}, or --from {claims[1]}",
        )
    count = len(source.tensors)
    if not count:
        raise FormatError(f"{quoted(source.file)} holds no tensors")
    adapted = any("lora" in name.lower() for name in source.tensors)
    model = "a whole model is given as the base: to take an adapter out of a fine-tuned one, use loratools extract"
    raise FormatError(
        f"{quoted(source.path)} is no adapter of a format known here: none of its {count} tensors is a part of one",
        details=shown([quoted(name)[1:-1] for name in source.tensors]),
        hint="its names speak of LoRA, in a spelling that is not read" if adapted else model,
    )
