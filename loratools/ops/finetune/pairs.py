"""Which tensor of a fine-tuned checkpoint belongs to which of its base, and what is to be done about it.

The two are lined up by names and shapes. One prefix for all (`model.`, `bert.`) is seen through where it is the only
one that explains the names; anything else that does not line up is an error that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loratools.adapter import select_names
from loratools.checkpoints import Checkpoint
from loratools.errors import MismatchError
from loratools.naming.language.conv1d import is_conv1d
from loratools.naming.language.experts import stored_in_out
from loratools.naming.renaming import best_renamings
from loratools.ops.common.vocabulary import vocabulary_size
from loratools.ops.finetune.in_memory import Tensors, of_transformers_5, targets_of, with_fused_experts
from loratools.ops.finetune.layer_kinds import Kinds, Layer, is_embedding, kind_of
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

# A number between two dots: the layer that a tensor belongs to.
_IN_LAYER = re.compile(r"(^|\.)\d+\.")
EXCLUDED = "left out by --include or --exclude"


@dataclass(frozen=True)
class Pair:
    """A tensor of the base and what became of it, and what is to be done should it have changed: one of three.

    target    the module, as an adapter names it.
    layer     low-rank factors, as of such a layer; `transposed` where it keeps its weight as (in, out).
    declared  replaced by the fine-tuned tensor, which an adapter declares so (`adapter.Replacement`).
    followed  an embedding that a tied weight follows, on both sides.
    grown     a vocabulary of another number of rows: what both have are the same words.
    by_rows   a table of words, or a head over them without a bias: PEFT can replace some of its rows. Not so of
              positions, whose modules have a forward of their own in some models.
    why       left out, for this reason.
    """

    name: str
    target: str
    base: LazyTensor
    tuned: LazyTensor
    layer: Layer | None = None
    transposed: bool = False
    declared: str | None = None
    followed: bool = False
    grown: bool = False
    by_rows: bool = False
    why: str | None = None

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.tuned.nbytes

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Its delta as (count, rows, columns): one matrix, or one for each expert."""
        shape = self.base.shape
        return shape if self.layer == "experts" else (1, shape[0], math.prod(shape[1:]))  # type: ignore[return-value]


@dataclass(frozen=True)
class Alone:
    """A tensor that only one of the two has, and why it is left out; or how it is declared where it is not."""

    name: str
    tensor: LazyTensor
    why: str
    declared: str | None = None


@dataclass(frozen=True)
class Pairs:
    """All tensors of both checkpoints: in `pairs`, or in `alone`. Sorted by name, the base's where there are two.

    modules: all that the base has, layers and what they are in, by the names of targets.
    """

    pairs: tuple[Pair, ...]
    alone: tuple[Alone, ...]
    modules: frozenset[str]
    warnings: tuple[str, ...]


def line_up(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    whole: Sequence[str] = (),
    as_files: bool = False,
) -> Pairs:
    """Pair the tensors of two checkpoints, from their headers. Globs choose among the modules, by target; those of
    `whole` are replaced where they would get factors. `as_files`: by the names, and with the experts, that the files
    have, and not those of the library that wrote them.

    Raises:
        UsageError: a glob matches nothing, or nothing is left.
        UnsupportedError: one of them is quantised in a way that is not read.
        MismatchError: names or shapes that do not line up, all of them named.
    """
    for side in (base, tuned):
        side.require_readable()
    ours, theirs = _with_tied(base, tuned), _with_tied(tuned, base)
    renamed, warnings = _renamed(ours, theirs, base, tuned)
    model_type = _model_type(base)
    in_memory = not as_files and of_transformers_5(base, tuned)
    if in_memory:
        ours, renamed = with_fused_experts(base.config, ours, renamed)
    targets = targets_of(base, {**renamed, **ours}, in_memory=in_memory)
    chosen = set(targets.values())
    if include or exclude:
        chosen = set(select_names(sorted(chosen), include, exclude))
    replaced = set(select_names(sorted(chosen), whole, ())) if whole else set()
    kinds = Kinds({**renamed, **ours})
    followed = {base.tied[n] for n in base.tied.keys() & tuned.tied.keys()}
    resized = {
        (ours[n].shape[0], renamed[n].shape[0])
        for n in ours.keys() & renamed.keys()
        if is_embedding(n) and ours[n].shape[1:] == renamed[n].shape[1:]
    }
    vocabulary = vocabulary_size(base)
    pairs: list[Pair] = []
    misfits: list[str] = []
    for name in sorted(ours.keys() & renamed.keys()):
        a, b = ours[name], renamed[name]
        words = a.shape[:1] == (vocabulary,) and _by_rows(name, a, b, ours)
        pair = Pair(name, targets[name], a, b, followed=name in followed, by_rows=words)
        if targets[name] not in chosen:
            pairs.append(replace(pair, why=EXCLUDED))
        elif a.shape != b.shape:
            declared = _declared_anew(pair)
            if declared is None:
                misfits.append(f"{name}   base {shape_text(a.shape)}, fine-tuned {shape_text(b.shape)}")
            grown = a.shape[1:] == b.shape[1:] and (*a.shape[:1], *b.shape[:1]) in resized
            pairs.append(replace(pair, declared=declared, grown=grown))
        elif not {a.dtype, b.dtype} <= set(FLOAT_DTYPES):
            pairs.append(replace(pair, why=f"values of dtype {a.dtype}"))
        else:
            pair = replace(pair, **kinds.treatment(name, a))
            if pair.target in replaced and pair.layer not in (None, "experts"):
                declared = "embedding" if pair.followed else "modules_to_save"
                pair = replace(pair, layer=None, declared=declared)
            transposed = is_conv1d(model_type, name.removesuffix(".weight")) if pair.layer == "linear" else False
            transposed = stored_in_out(model_type) if pair.layer == "experts" else transposed
            pairs.append(replace(pair, transposed=transposed))
    alone = [Alone(n, ours[n], "only in the base") for n in sorted(ours.keys() - renamed.keys())]
    for name in sorted(renamed.keys() - ours.keys()):
        new, why = renamed[name], "only in the fine-tuned model"
        module = name.rpartition(".")[2] in ("weight", "bias") and not _IN_LAYER.search(name)
        alone.append(
            Alone(name, new, EXCLUDED if targets[name] not in chosen else why)
            if not module or new.dtype not in FLOAT_DTYPES or targets[name] not in chosen
            else Alone(name, new, why, "modules_to_save")
        )
    # A head may come or go. A layer that does makes another architecture.
    misfits += [
        f"{a.name}   {a.why}"
        for a in alone
        if _IN_LAYER.search(a.name) and kind_of(a.name, a.tensor) in ("linear", "conv", "experts")
    ]
    if misfits:
        raise MismatchError(
            f"{len(misfits)} tensors of '{base.name}' and '{tuned.name}' do not line up",
            details=sorted(misfits),
            hint="one must be the fine-tune of the other; what is not to be compared is left out with --exclude",
        )
    modules = frozenset(part for n in ours for part in _enclosing(targets[n]))
    return Pairs(tuple(pairs), tuple(alone), modules, tuple(warnings))


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
        if before.shape[1:] != after.shape[1:]:
            return None
        return "embedding" if pair.followed else "modules_to_save"
    leaf = pair.name.rpartition(".")[2]
    own = leaf in ("weight", "bias") and len(before.shape) == len(after.shape) and not _IN_LAYER.search(pair.name)
    return "modules_to_save" if own and {before.dtype, after.dtype} <= set(FLOAT_DTYPES) else None


def _model_type(checkpoint: Checkpoint) -> str | None:
    found = checkpoint.config.get("model_type")
    return found if isinstance(found, str) else None


def _with_tied(one: Checkpoint, other: Checkpoint) -> Tensors:
    """The weights of `one`, with those that it ties and the other stores: a head may have come loose in training."""
    tied = {name: one.weights[source] for name, source in one.tied.items() if name in other.weights}
    return {**tied, **one.weights}


def _renamed(
    ours: Mapping[str, LazyTensor], theirs: Mapping[str, LazyTensor], base: Checkpoint, tuned: Checkpoint
) -> tuple[Tensors, list[str]]:
    """The fine-tuned tensors by the base's names."""
    layers = {n: t.shape for n, t in theirs.items() if kind_of(n, t) in ("linear", "conv", "experts", "embedding")}
    winners, best = best_renamings(layers, {n: t.shape for n, t in ours.items()}, tuple.__eq__)
    if best == 0:
        raise MismatchError(
            f"no weight of a layer of '{tuned.name}' has the name and shape of one of '{base.name}'",
            details=[f"base: {n}" for n in sorted(ours)[:3]] + [f"fine-tuned: {n}" for n in sorted(theirs)[:3]],
            hint="one must be the fine-tune of the other",
        )
    if not winners[0]:
        return dict(theirs), []
    if len(winners) > 1:
        raise MismatchError(
            f"the names of '{tuned.name}' fit those of '{base.name}' in {len(winners)} ways",
            details=[f"with {winner}: {best} weights" for winner in winners],
            hint="rename the tensors of one of them",
        )
    # A head outside of the prefix keeps its name.
    renamed = {(new if (new := winners[0](name)) in ours else name): tensor for name, tensor in theirs.items()}
    return renamed, [f"the names of the fine-tuned model are read with {winners[0]}"]
