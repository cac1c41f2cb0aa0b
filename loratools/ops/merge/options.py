"""The options of a merge as one value, from the public keyword arguments to whoever needs one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratools.arguments import Globs, Size, byte_size
from loratools.ops.common.arguments import AdapterSource, RankFrom, stored_dtype
from loratools.updates.lora_experts import Orientation, Packing


@dataclass(frozen=True)
class MergeOptions:
    """What a caller chose about the result of a merge, and about how its adapters are read.

    The fields are keyword arguments of `loratools.merge`, and are described there. How the work runs (threads,
    progress, verification) is not among them, since it does not change the result.
    """

    dtype: str | None = None
    max_shard_size: Size | None = None
    dequantize: bool = False
    allow_partial: bool = False
    include: Globs = ()
    exclude: Globs = ()
    rank_from: RankFrom = None
    from_format: str | None = None
    initial: Sequence[AdapterSource] = ()
    expert_packing: Packing | None = None
    expert_orientation: Orientation | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant before any input is opened."""
        _ = self.stored_dtype, self.max_shard_bytes

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that floats are stored in, as safetensors spells it; None where the base's are kept.

        Raises:
            UsageError: `dtype` is no dtype that weights are stored in.
        """
        return stored_dtype(self.dtype) if self.dtype is not None else None

    @property
    def max_shard_bytes(self) -> int | None:
        """The largest size of a weight file in bytes; None where the base's own files are kept.

        Raises:
            UsageError: `max_shard_size` is no size.
        """
        return byte_size(self.max_shard_size) if self.max_shard_size is not None else None
