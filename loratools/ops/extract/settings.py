"""How to extract: what is asked of every tensor alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loratools.ops.extract.rank_policy import RankPolicy

Embeddings = Literal["auto", "lora", "rows", "full", "skip"]


@dataclass(frozen=True)
class Settings:
    """How to extract; `dtype` of the factors, `device` as it was asked for. See `extract`."""

    policy: RankPolicy
    embeddings: Embeddings
    dtype: str
    tolerance: float | None
    exact: bool
    seed: int
    device: str
