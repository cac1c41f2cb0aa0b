"""Which tensor of a fine-tuned checkpoint belongs to which of its base, and what is to be done about it.

The two are lined up by names and shapes; anything that does not line up is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loratools.checkpoints import Checkpoint
from loratools.errors import MismatchError
from loratools.naming.language.conv1d import is_conv1d
from loratools.naming.language.experts import stored_in_out
from loratools.ops.common.vocabulary import vocabulary_size
from loratools.ops.finetune.layer_kinds import Kinds, is_embedding, kind_of
from loratools.ops.finetune.pairs import Pair, Pairs, Unpaired
from loratools.ops.finetune.sides import Sides, sides_of
from loratools.selection import select_names
from loratools.skipped import EXCLUDED
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

# A number between two dots: the layer that a tensor belongs to.
_IN_LAYER = re.compile(r"(^|\.)\d+\.")


def line_up(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    replaced_whole: Sequence[str] = (),
    as_files: bool = False,
) -> Pairs:
    """Pair the tensors of two checkpoints, from their headers.

    Args:
        base: The model before fine-tuning.
        tuned: The fine-tuned model.
        include: Globs over the modules, by target; empty selects all.
        exclude: Globs of names to leave out.
        replaced_whole: Globs of modules that are replaced where they would get factors.
        as_files: By the names, and with the experts, that the files have, and not those of the library that wrote them.

    Raises:
        UsageError: A glob matches nothing, or nothing is left.
        UnsupportedError: One of them is quantised in a way that is not read.
        MismatchError: Names or shapes that do not line up, all of them named.
    """
    for checkpoint in (base, tuned):
        checkpoint.require_readable()
    sides = sides_of(base, tuned, as_files=as_files)
    modules = sorted(set(sides.targets.values()))
    chosen = set(select_names(modules, include, exclude))
    replaced = set(select_names(sorted(chosen), replaced_whole, ())) if replaced_whole else set()
    treatment = _Treatment(
        sides,
        chosen=chosen,
        replaced=replaced,
        kinds=Kinds({**sides.tuned, **sides.base}),
        model_type=_model_type(base),
        followed={base.tied[name] for name in base.tied.keys() & tuned.tied.keys()},
        vocabulary=vocabulary_size(base),
        resized=_resized_vocabularies(sides),
    )
    pairs = [treatment.of_pair(name) for name in sides.in_both]
    unpaired = [
        Unpaired(name, sides.base[name], "only in the base") for name in sorted(sides.base.keys() - sides.tuned.keys())
    ]
    unpaired += [treatment.of_new(name) for name in sorted(sides.tuned.keys() - sides.base.keys())]
    _refuse_misfits(pairs, unpaired, base, tuned)
    enclosing = frozenset(part for name in sides.base for part in _enclosing(sides.targets[name]))
    return Pairs(tuple(pairs), tuple(unpaired), enclosing, sides.warnings)


@dataclass(frozen=True)
class _Treatment:
    """What is to be done about each tensor, and all that this depends on.

    Attributes:
        sides: The tensors of both checkpoints.
        chosen: Modules that the globs leave.
        replaced: Modules that are replaced where they would get factors.
        kinds: What the tensors are.
        model_type: The base's, by its config.
        followed: Names of embeddings that a tied weight follows, on both sides.
        vocabulary: Rows of the input embedding, by the base's config.
        resized: Numbers of rows of embeddings before and after, where they differ or not.
    """

    sides: Sides
    chosen: set[str]
    replaced: set[str]
    kinds: Kinds
    model_type: str | None
    followed: set[str]
    vocabulary: int | None
    resized: set[tuple[int, int]]

    def of_pair(self, name: str) -> Pair:
        """What is to be done about a tensor that both have."""
        before, after = self.sides.base[name], self.sides.tuned[name]
        by_rows = before.shape[:1] == (self.vocabulary,) and _by_rows(name, before, after, self.sides.base)
        pair = Pair(name, self.sides.targets[name], before, after, followed=name in self.followed, by_rows=by_rows)
        if pair.target not in self.chosen:
            return replace(pair, why=EXCLUDED)
        if before.shape != after.shape:
            grown = before.shape[1:] == after.shape[1:] and (*before.shape[:1], *after.shape[:1]) in self.resized
            return replace(pair, declared=_declared_anew(pair), grown=grown)
        if not {before.dtype, after.dtype} <= set(FLOAT_DTYPES):
            return replace(pair, why=f"values of dtype {before.dtype}")
        pair = replace(pair, **self.kinds.treatment(name, before))
        if pair.target in self.replaced and pair.layer not in (None, "experts"):
            pair = replace(pair, layer=None, declared=pair.declared_whole)
        return replace(pair, transposed=self._is_transposed(pair))

    def of_new(self, name: str) -> Unpaired:
        """What is to be done about a tensor that only the fine-tuned model has: a head of its own is declared."""
        tensor = self.sides.tuned[name]
        if self.sides.targets[name] not in self.chosen:
            return Unpaired(name, tensor, EXCLUDED)
        module = name.rpartition(".")[2] in ("weight", "bias") and not _IN_LAYER.search(name)
        declared = "modules_to_save" if module and tensor.dtype in FLOAT_DTYPES else None
        return Unpaired(name, tensor, "only in the fine-tuned model", declared)

    def _is_transposed(self, pair: Pair) -> bool:
        """Whether the model keeps the weight of this layer as (in, out)."""
        if pair.layer == "linear":
            return is_conv1d(self.model_type, pair.name.removesuffix(".weight"))
        return pair.layer == "experts" and stored_in_out(self.model_type)


def _resized_vocabularies(sides: Sides) -> set[tuple[int, int]]:
    """Rows before and after of all embeddings whose vectors kept their width."""
    return {
        (sides.base[name].shape[0], sides.tuned[name].shape[0])
        for name in sides.in_both
        if is_embedding(name) and sides.base[name].shape[1:] == sides.tuned[name].shape[1:]
    }


def _refuse_misfits(pairs: Sequence[Pair], unpaired: Sequence[Unpaired], base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise MismatchError with every tensor that does not line up, if there is any."""
    misfits = [
        f"{pair.name}   base {shape_text(pair.base.shape)}, fine-tuned {shape_text(pair.tuned.shape)}"
        for pair in pairs
        if pair.base.shape != pair.tuned.shape and pair.declared is None and pair.why is None
    ]
    # A head may come or go. A layer that does makes another architecture.
    misfits += [
        f"{tensor.name}   {tensor.why}"
        for tensor in unpaired
        if _IN_LAYER.search(tensor.name) and kind_of(tensor.name, tensor.tensor) in ("linear", "conv", "experts")
    ]
    if misfits:
        raise MismatchError(
            f"{len(misfits)} tensors of '{base.name}' and '{tuned.name}' do not line up",
            details=sorted(misfits),
            hint="one must be the fine-tune of the other; what is not to be compared is left out with --exclude",
        )


def _by_rows(name: str, before: LazyTensor, after: LazyTensor, names: Mapping[str, LazyTensor]) -> bool:
    """Whether rows of it alone can be replaced, given that it has one for each word."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or f"{module}.bias" in names or not {before.dtype, after.dtype} <= set(FLOAT_DTYPES):
        return False
    return len(before.shape) == 2 and before.shape[1:] == after.shape[1:] and before.shape[0] <= after.shape[0]


def _enclosing(module: str) -> list[str]:
    """`a.b.c` -> a, a.b, a.b.c"""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _declared_anew(pair: Pair) -> str | None:
    """How a tensor of another shape is declared: a vocabulary may grow, and a head may have other labels."""
    before, after = pair.base, pair.tuned
    if is_embedding(pair.name):
        return pair.declared_whole if before.shape[1:] == after.shape[1:] else None
    leaf = pair.name.rpartition(".")[2]
    is_head = leaf in ("weight", "bias") and len(before.shape) == len(after.shape) and not _IN_LAYER.search(pair.name)
    return "modules_to_save" if is_head and {before.dtype, after.dtype} <= set(FLOAT_DTYPES) else None


def _model_type(checkpoint: Checkpoint) -> str | None:
    model_type = checkpoint.config.get("model_type")
    return model_type if isinstance(model_type, str) else None
