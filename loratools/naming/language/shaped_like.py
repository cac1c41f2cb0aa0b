"""Which published language models have the names and sizes of an adapter's modules.

A guess and no more: a model of one's own may have the sizes of a published one. Models that the adapter's modules
cannot tell apart are all named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from loratools.naming.language.published_sizes import PUBLISHED, ModelSizes

# The number of a block, and what follows it: `model.layers.3.self_attn.q_proj`, `transformer.h.3.mlp.dense_h_to_4h`.
_IN_BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)")
# Tables with a row for each token.
_VOCABULARIES = frozenset({"embed_tokens", "lm_head", "embed_in", "embed_out", "word_embeddings"})
_EXPERT = re.compile(r"\.experts\.\d+\.")
# Of more models than these a line is too short.
_NAMED = 5


class ModuleShape(NamedTuple):
    """A module's name, and the outputs and inputs of its weight; None where a kind does not tell."""

    name: str
    outputs: int | None
    inputs: int | None


class _Sizes(NamedTuple):
    """What modules say of the model that they belong to.

    shapes         (outputs, inputs) of each name within a block
    depth          how many blocks there are at least
    vocabularies   rows of embeddings and heads
    """

    shapes: frozenset[tuple[str, int | None, int | None]]
    depth: int
    vocabularies: frozenset[int]


def shaped_like(modules: Iterable[ModuleShape]) -> str | None:
    """The published models that an adapter may be for by its sizes; None where none has them.

    One is said as `Llama-3.2-1B-shaped`, several that cannot be told apart as `shaped like Llama-3-8B or Llama-3.1-8B`.

    Args:
        modules: Every module that the adapter changes.

    Example:
        >>> shapes = [ModuleShape(f"model.layers.{i}.self_attn.k_proj", 512, 2048) for i in range(16)]
        >>> shaped_like(shapes)
        'Llama-3.2-1B-shaped'
    """
    sizes = _sizes(modules)
    if sizes is None:
        return None
    names = [name for model in _fitting(sizes) for name in model.names]
    if not names:
        return None
    if len(names) == 1:
        return f"{names[0]}-shaped"
    if len(names) > _NAMED + 1:
        names = [*names[:_NAMED], f"{len(names) - _NAMED} others"]
    return f"shaped like {', '.join(names[:-1])} or {names[-1]}"


def _sizes(modules: Iterable[ModuleShape]) -> _Sizes | None:
    shapes: set[tuple[str, int | None, int | None]] = set()
    vocabularies: set[int] = set()
    depth = 0
    for module in modules:
        in_block = _IN_BLOCK.search(module.name)
        if in_block is not None:
            depth = max(depth, int(in_block[1]) + 1)
            shapes.add((_EXPERT.sub(".experts.*.", in_block[2]), module.outputs, module.inputs))
        elif module.name.rpartition(".")[2] in _VOCABULARIES:
            # Larger than any width, on whichever side a kind has it.
            vocabularies.add(max(module.outputs or 0, module.inputs or 0))
        else:
            return None
    return _Sizes(frozenset(shapes), depth, frozenset(vocabularies)) if shapes else None


def _fitting(sizes: _Sizes) -> list[ModelSizes]:
    fitting = [model for model in PUBLISHED if _fits(sizes, model)]
    # Most adapters change every block, or the last ones; one that changes the first ones alone has no such model.
    fitting = [model for model in fitting if model.layers == sizes.depth] or fitting
    # A vocabulary that tokens were added to is nobody's, and tells nothing.
    return [model for model in fitting if {model.vocabulary} == sizes.vocabularies] or fitting


def _fits(sizes: _Sizes, model: ModelSizes) -> bool:
    if sizes.depth > model.layers:
        return False
    modules = model.modules()
    return all(name in modules and all(_agree((out, inner), modules[name])) for name, out, inner in sizes.shapes)


def _agree(known: tuple[int | None, int | None], published: tuple[int, int]) -> Iterator[bool]:
    return (size is None or size == of_model for size, of_model in zip(known, published, strict=True))
