"""What is known of a pair before its values are: factors, replaced as a whole, or left out, should it have changed."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.ops.extract.settings import Settings
from loratools.ops.finetune.pairs import Pair
from loratools.tensors.dtypes import DTYPE_BITS

SKIPPED = "left out by --embeddings skip"


def gets_factors(pair: Pair, settings: Settings) -> bool:
    """Whether it is decomposed, should it have changed."""
    return pair.layer is not None and not no_factors(pair, settings)


def declared_if_replaced(pair: Pair, settings: Settings) -> str | None:
    """How it is declared, where it is known beforehand to be taken whole, should it have changed; None elsewhere."""
    is_replaced = no_factors(pair, settings) and settings.embeddings != "skip"
    return pair.declared or (pair.declared_whole if is_replaced else None)


def no_factors(pair: Pair, settings: Settings) -> bool:
    """Whether a layer is known beforehand not to become factors: an embedding that is skipped, or taken whole.

    An embedding that a head is tied to is always whole: PEFT adds factors of it to the embedding alone, or, asked to
    tie them (`ensure_weight_tying`), merges them into the one weight twice.
    """
    if pair.layer != "embedding":
        return False
    if settings.embeddings in ("rows", "full", "skip") or pair.followed:
        return True
    rank = settings.policy.planned(min(pair.base.shape)) if settings.embeddings == "auto" else None
    return rank is not None and factor_bytes(pair, rank, settings.dtype) >= pair.tuned.nbytes


def factor_bytes(pair: Pair, rank: int, dtype: str) -> int:
    """Bytes of factors of this rank."""
    count, rows, columns = pair.matrices
    return rank * count * (rows + columns) * DTYPE_BITS[dtype] // 8


def rows_bytes(pair: Pair, rows: Sequence[int]) -> int:
    """Bytes of these rows, and of their numbers in the config."""
    return len(rows) * (pair.tuned.nbytes // max(1, pair.tuned.shape[0]) + len(str(pair.tuned.shape[0])) + 2)
