"""A decomposition that gets its rank only once those of all modules are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratools.ops.finetune.delta import Decomposed
from loratools.tensors.lazy import LazyTensor


@dataclass(frozen=True, eq=False)
class Pending:
    """A decomposition up to `search_rank`; its vectors are set aside as factors are, and not in `decomposition`."""

    decomposition: Decomposed
    vectors: Mapping[str, LazyTensor]
    search_rank: int

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return self.decomposition.norm

    def with_vectors(self) -> Decomposed:
        """The decomposition with its vectors, read back."""
        parts = tuple(
            replace(part, u=self.vectors[f"u{i}"].read(), vt=self.vectors[f"vt{i}"].read())
            if part is not None
            else None
            for i, part in enumerate(self.decomposition.parts)
        )
        return replace(self.decomposition, parts=parts)
