"""BD-LoRA: LoRA with one factor made of blocks, `dW = scale * B @ diag(A1, A2, ...)` or `diag(B1, B2, ...) @ A`.

Wang et al., 2025, https://arxiv.org/abs/2510.23346. The blocks are stored below each
other; which factor has them is said by names of modules in the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from loratools.errors import FormatError, UnsupportedError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates import lora
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.low_rank import LowRank
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats


_SETTINGS = ("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict")


@dataclass(frozen=True)
class BDLoRA(LowRank):
    """A BD-LoRA update: LoRA with one block-diagonal factor.

    Attributes:
        a: The factor A, unread: (rank, in / blocks) where A has the blocks, else (rank, in).
        b: The factor B, unread: (out, rank / blocks) where B has the blocks, else (out, rank).
        blocks: The number of blocks.
        diagonal: Which factor is block-diagonal, A or B.
        alpha: The number that the scale is made of, as stored.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        rslora: Whether the scale is alpha / sqrt(rank) and not alpha / rank.
    """

    kind: ClassVar[str] = "bdlora"

    a: LazyTensor
    b: LazyTensor
    blocks: int
    diagonal: Literal["A", "B"]
    alpha: float
    alpha_source: str
    rslora: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1] * (self.blocks if self.diagonal == "A" else 1)

    @property
    def scale(self) -> float:
        return lora.lora_scale(self.alpha, self.rank, self.rslora)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b}

    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        a, b = read_array(self.a, "F64"), read_array(self.b, "F64")
        if self.diagonal == "A":
            a = _along_diagonal(a, self.blocks)
        else:
            b = _along_diagonal(b, self.blocks)
        return b * self.scale, a


def _along_diagonal(stacked: Floats, blocks: int) -> Floats:
    """(rows, columns) of blocks below each other -> (rows, columns x blocks), each beside the one above it."""
    import numpy as np

    rows, columns = stacked.shape
    spread = np.zeros((blocks, rows // blocks, blocks, columns))
    spread[np.arange(blocks), :, np.arange(blocks)] = stacked.reshape(blocks, -1, columns)
    return spread.reshape(rows, -1)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers; modules that neither list names are LoRA."""
    settings = module.config.get("use_bdlora")
    settings = settings if isinstance(settings, Mapping) else {}
    _check(settings)
    # PEFT looks for the entries in the last part of the name, anywhere.
    last_name = module.name.rpartition(".")[2]
    named = [
        factor
        for factor in ("A", "B")
        if any(str(entry) in last_name for entry in settings.get(f"target_modules_bd_{factor.lower()}") or ())
    ]
    if not named:
        return lora.from_peft(module)
    a, b = module.need("lora_A", "lora_B")
    blocks = settings.get("nblocks", 1)
    if len(named) > 1 or isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise faulty(module.name, f"has block-diagonal {' and '.join(named)} of {blocks!r} blocks")
    wide = blocks if named == ["B"] else 1
    stacked = a if named == ["A"] else b
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] * wide or stacked.shape[0] % blocks:
        raise faulty(
            module.name,
            f"has lora_A {list(a.shape)} and lora_B {list(b.shape)}, which are no product with "
            f"{blocks} blocks in {named[0]}",
        )
    rslora = bool(module.config.get("use_rslora"))
    diagonal: Literal["A", "B"] = "A" if named == ["A"] else "B"
    return {"": BDLoRA(a, b, blocks, diagonal, module.alpha, module.alpha_source, rslora)}


def _check(settings: Mapping[str, object]) -> None:
    """Raises:
    UnsupportedError: settings that are not known, which may change the result.
    FormatError: lists of modules that are none.
    """
    if strange := [name for name, value in settings.items() if value and name not in _SETTINGS]:
        raise UnsupportedError(
            f"use_bdlora in adapter_config.json has settings that are not known here: {', '.join(sorted(strange))}",
            hint="if they are harmless, remove them from adapter_config.json",
        )
    wrong = [
        name
        for name in _SETTINGS[:2]
        if not isinstance(entries := settings.get(name) or [], list) or not all(isinstance(e, str) for e in entries)
    ]
    if wrong:
        raise FormatError(f"{wrong[0]} of use_bdlora in adapter_config.json is no list of names of modules")
