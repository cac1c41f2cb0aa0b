"""A decomposition that gets its rank only once those of all modules are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratools.ops.extract.adapter import Keep
from loratools.ops.finetune.delta import Decomposed
from loratools.tensors.lazy import LazyTensor


@dataclass(frozen=True, eq=False)
class Pending:
    """A decomposition up to `search_rank`; its vectors are kept as factors are, and not in `decomposition`."""

    decomposition: Decomposed
    vectors: Mapping[str, LazyTensor]
    search_rank: int

    @classmethod
    def keeping(cls, decomposition: Decomposed, search_rank: int, keep: Keep) -> Pending:
        """Put the vectors where factors are kept."""
        parts = {i: part for i, part in enumerate(decomposition.parts) if part is not None}
        vectors = keep({f"u{i}": p.u for i, p in parts.items()} | {f"vt{i}": p.vt for i, p in parts.items()})
        # Not a slice: that would hold all of it.
        bare = tuple(
            replace(part, u=part.u.new_empty(0), vt=part.vt.new_empty(0)) if part is not None else None
            for part in decomposition.parts
        )
        return cls(replace(decomposition, parts=bare), vectors, search_rank)

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
