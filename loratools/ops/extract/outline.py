"""Whether a format can hold what an extraction will end in, known before anything is decomposed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint
from loratools.ops.extract.adapter import adapter_of, factor_tensors, update_of
from loratools.ops.extract.outcomes import Outcome, ReplacedTensor, Unchanged
from loratools.ops.extract.replacements import replacements
from loratools.ops.extract.settings import Settings
from loratools.ops.extract.treatment import declared_if_replaced, gets_factors
from loratools.ops.finetune.pairs import Pair, Pairs
from loratools.tensors.lazy import from_torch
from loratools.updates.parts.protocol import Update


def outline(base: Checkpoint, tuned: Checkpoint, pairs: Pairs, changed: Iterable[Pair], settings: Settings) -> Adapter:
    """The adapter that these changed tensors will end in, as far as that is certain: of factors without values.

    An embedding of which values decide whether it becomes factors is not in it.
    """
    factors: dict[Pair, Update] = {}
    results: dict[Pair, Outcome] = dict.fromkeys(pairs.pairs, Unchanged())
    for pair in changed:
        if gets_factors(pair, settings):
            if pair.layer != "embedding" or settings.embeddings == "lora":
                factors[pair] = _without_values(pair)
        elif (declared := declared_if_replaced(pair, settings)) is not None:
            results[pair] = ReplacedTensor(None, declared)
    replaced = {name: replacement for name, (replacement, _) in replacements(pairs, results).items()}
    return replace(adapter_of(base, pairs, factors, replaced), path=tuned.path)


def _without_values(pair: Pair) -> Update:
    import torch

    count, rows, columns = pair.matrices
    left, right = torch.empty(count, rows, 1, device="meta"), torch.empty(count, 1, columns, device="meta")
    tensors = {name: from_torch(values) for name, values in factor_tensors(pair, left, right).items()}
    return update_of(pair, tensors, rank=1)
