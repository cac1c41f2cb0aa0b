"""The options of a merge as one value, made from the public keyword arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from loratools.arguments import Globs, Size, byte_size
from loratools.errors import UsageError
from loratools.ops.common.arguments import AdapterSource, RankFrom
from loratools.ops.merge.rounding import RoundingMode
from loratools.ops.merge.trained_on import TrainingScheme
from loratools.storage.casting import stored_dtype
from loratools.updates.lora_experts import Orientation, Packing

# The types of a GGUF file that values are quantised to with new scales.
GgmlType: TypeAlias = Literal["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


@dataclass(frozen=True)
class MergeOptions:
    """What a caller chose about the result of a merge, and about how its adapters are read.

    The fields are keyword arguments of `loratools.merge`, and are described there. How the work runs (threads,
    progress, verification) is not among them, since it does not change the result.
    """

    dtype: str | None = None
    max_shard_size: Size | None = None
    dequantize: bool = False
    requantize: bool | GgmlType = False
    trained_on: str | Path | TrainingScheme | None = None
    rounding: RoundingMode = "nearest"
    seed: int = 0
    penalty: float | None = None
    moments: str | Path | None = None
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
        if self.trained_on is not None and (self.dequantize or self.requantize):
            raise UsageError(
                "--trained-on is for a full-precision base, --dequantize and --requantize for a quantised one",
                hint="the values of a quantised base are what training saw, if it is the same scheme",
            )
        if self.dequantize and self.requantize:
            raise UsageError(
                "--dequantize and --requantize exclude each other",
                hint="--dequantize writes all quantised weights as floats, --requantize keeps the base's scheme",
            )
        if self.penalty is not None and self.rounding not in ("adapter", "calibrated"):
            raise UsageError(
                f"a penalty (--lambda) means nothing with rounding '{self.rounding}'",
                hint="it belongs to --rounding adapter and --rounding calibrated",
            )
        if self.penalty is not None and not 0 <= self.penalty < math.inf:
            raise UsageError(f"the penalty (--lambda) is {self.penalty:g}", hint="give a number of at least 0")
        if (self.moments is not None) != (self.rounding == "calibrated"):
            raise UsageError(
                "--rounding calibrated needs second moments of inputs" if self.moments is None
                else f"second moments (--moments) mean nothing with rounding '{self.rounding}'",
                hint="give both --rounding calibrated and --moments FILE",
            )  # fmt: skip

    @property
    def retype(self) -> str | None:
        """The ggml type that changed weights of a GGUF file get, by its name there; None if they keep their own."""
        return self.requantize.upper() if isinstance(self.requantize, str) else None

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that floats are stored in, as safetensors spells it; None if the base's are kept.

        Raises:
            UsageError: `dtype` is no dtype that weights are stored in.
        """
        return stored_dtype(self.dtype) if self.dtype is not None else None

    @property
    def max_shard_bytes(self) -> int | None:
        """The largest size of a weight file in bytes; None if the base's own files are kept.

        Raises:
            UsageError: `max_shard_size` is no size.
        """
        return byte_size(self.max_shard_size) if self.max_shard_size is not None else None
