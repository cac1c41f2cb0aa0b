"""Whether a format can hold what an extraction will end in, known before anything is decomposed."""

from __future__ import annotations

from collections.abc import Iterable

from loratools.adapter import Adapter, Replacement
from loratools.checkpoints import Checkpoint
from loratools.ops._extract_adapter import adapter_of, update_of
from loratools.ops._extract_work import Settings, embedding_declared, held_all, no_factors
from loratools.ops._pairs import Pair, Pairs
from loratools.updates import Update


def outline(base: Checkpoint, tuned: Checkpoint, pairs: Pairs, changed: Iterable[Pair], settings: Settings) -> Adapter:
    """The adapter that these changed tensors will end in, as far as that is certain: of factors without values.

    An embedding of which values decide whether it becomes factors is not in it.
    """
    factors: dict[Pair, Update] = {}
    replaced: dict[str, Replacement] = {}
    for pair in changed:
        if pair.layer is not None and not no_factors(pair, settings):
            if pair.layer != "embedding" or settings.embeddings == "lora":
                factors[pair] = _without_values(pair)
        elif pair.declared is not None:
            replaced[pair.name] = Replacement(pair.tuned, pair.declared)
        elif pair.layer == "embedding" and settings.embeddings != "skip":
            replaced[pair.name] = Replacement(pair.tuned, embedding_declared(pair))
    for alone in pairs.alone:
        if alone.declared is not None:
            replaced[alone.name] = Replacement(alone.tensor, alone.declared)
    found = adapter_of(base, pairs, factors, replaced)
    return Adapter(found.updates, found.replacements, path=tuned.path, notes=found.notes)


def _without_values(pair: Pair) -> Update:
    import torch

    count, rows, columns = pair.matrices
    left, right = (
        torch.empty(count, rows, 1, device="meta"),
        torch.empty(count, 1, columns, device="meta"),
    )
    return update_of(pair, left, right, held_all)
