"""Which tensor of a fine-tuned checkpoint belongs to which of its base, and what is to be done about it.

The two are lined up by names and shapes. One prefix for all (`model.`, `bert.`) is seen through where it is the only
one that explains the names; anything else that does not line up is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter import select_names
from loratools.checkpoints import Checkpoint
from loratools.errors import MismatchError, UnsupportedError
from loratools.naming.conv1d import is_conv1d
from loratools.naming.renaming import best_renamings
from loratools.naming.vision import in_memory
from loratools.tensors import FLOAT_DTYPES, LazyTensor

# Modules that look up rows by number: their 2-D weight is a table, not a linear map. The last part of their names, as
# transformers has them; `embedding_hidden_mapping_in` and the like are linear layers, so it must be all of the part.
_EMBEDDING = re.compile(
    r"(.*_)?(embed|embeds|embedding|embeddings|emb)|(tokens|positions)_embed|(embed|emb)_(tokens|positions|in)"
    r"|embed_tokens_(per_layer|extend)|wte|wpe|shared|relative_attention_bias|pos_emb(edding)?s?"
)
# A number between two dots: the layer that a tensor belongs to.
_IN_LAYER = re.compile(r"(^|\.)\d+\.")
_EXCLUDED = "left out by --include or --exclude"


@dataclass(frozen=True)
class Pair:
    """A tensor of the base and what became of it. `linear`: the weight of a linear layer, `transposed`: as (in, out).

    `target`: the module, as an adapter names it. `why` says why it is not extracted, should it have changed; None of
    those that are.
    """

    name: str
    target: str
    base: LazyTensor
    tuned: LazyTensor
    why: str | None
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.tuned.nbytes


@dataclass(frozen=True)
class Alone:
    """A tensor that only one of the two has, and which."""

    name: str
    tensor: LazyTensor
    why: str


@dataclass(frozen=True)
class Pairs:
    """All tensors of both checkpoints: in `pairs`, or in `alone`. Sorted by name, the base's where there are two.

    `linear`: targets of all linear weights of the base, whether or not they are to be extracted.
    """

    pairs: tuple[Pair, ...]
    alone: tuple[Alone, ...]
    linear: frozenset[str]
    warnings: tuple[str, ...]


def line_up(base: Checkpoint, tuned: Checkpoint, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Pairs:
    """Pair the tensors of two checkpoints, from their headers. Globs choose among the linear weights, by target.

    Raises:
        UsageError: a glob matches nothing, or nothing is left.
        UnsupportedError: one of them is quantised.
        MismatchError: names or shapes that do not line up, all of them named.
    """
    for side in (base, tuned):
        if side.quantization is not None:
            raise UnsupportedError(
                f"'{side.name}' is quantised ({side.quantization}): its numbers are packed or scaled, and have no "
                "difference that could be taken",
                hint="extract from unquantised checkpoints",
            )
    ours, theirs = _with_tied(base, tuned), _with_tied(tuned, base)
    renamed, warnings = _renamed(ours, theirs, base, tuned)
    model_type = _model_type(base)
    targets = _targets(base, tuned, ours)
    linear = sorted(targets[n] for n, t in ours.items() if _why_not_linear(n, t) is None)
    chosen = set(select_names(linear, include, exclude) if include or exclude else linear)
    resized = {
        (ours[n].shape[0], renamed[n].shape[0])
        for n in ours.keys() & renamed.keys()
        if is_embedding(n) and ours[n].shape[0] != renamed[n].shape[0]
    }
    pairs: list[Pair] = []
    misfits: list[str] = []
    for name in sorted(ours.keys() & renamed.keys()):
        a, b = ours[name], renamed[name]
        why = _why_not_linear(name, a)
        if not {a.dtype, b.dtype} <= set(FLOAT_DTYPES):
            why = f"values of dtype {a.dtype}"
        elif name in base.tied:
            why = f"tied to {base.tied[name]}"
        elif why is None and targets[name] not in chosen:
            why = _EXCLUDED
        if a.shape != b.shape and why != _EXCLUDED:
            if a.shape[1:] == b.shape[1:] and (a.shape[:1] + b.shape[:1]) in resized:
                why = f"resized vocabulary, {a.shape[0]} rows and {b.shape[0]} in the fine-tuned model"
            else:
                misfits.append(f"{name}   base {_shape(a)}, fine-tuned {_shape(b)}")
        transposed = why is None and is_conv1d(model_type, name.removesuffix(".weight"))
        pairs.append(Pair(name, targets[name], a, b, why, transposed))
    alone = [Alone(n, ours[n], "only in the base") for n in sorted(ours.keys() - renamed.keys())]
    alone += [Alone(n, renamed[n], "only in the fine-tuned model") for n in sorted(renamed.keys() - ours.keys())]
    # A head may come or go. A layer that does makes another architecture.
    misfits += [
        f"{a.name}   {a.why}" for a in alone if _IN_LAYER.search(a.name) and _why_not_linear(a.name, a.tensor) is None
    ]
    if misfits:
        raise MismatchError(
            f"{len(misfits)} tensors of '{base.name}' and '{tuned.name}' do not line up",
            details=sorted(misfits),
            hint="one must be the fine-tune of the other; a head that was replaced is left out with --exclude",
        )
    return Pairs(tuple(pairs), tuple(alone), frozenset(linear), tuple(warnings))


def is_embedding(name: str) -> bool:
    """Whether the tensor `name` is a table of vectors."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None


def _why_not_linear(name: str, tensor: LazyTensor) -> str | None:
    """Why a tensor is not the weight of a linear layer; None where it is one."""
    if is_embedding(name):
        return "an embedding"
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return "a bias"
    if len(tensor.shape) == 1:
        return "a vector, as of a norm"
    if len(tensor.shape) == 2 and leaf == "weight":
        return None
    if leaf == "weight":
        return f"a weight of {len(tensor.shape)} axes, as of a convolution"
    return "not the weight of a linear layer"


def _shape(tensor: LazyTensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _model_type(checkpoint: Checkpoint) -> str | None:
    found = checkpoint.config.get("model_type")
    return found if isinstance(found, str) else None


def _targets(base: Checkpoint, tuned: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Name of a weight -> the module as the trainer's library names it, which is what an adapter is loaded by.

    transformers 5 names some modules otherwise in memory than in files; whoever wrote the models is taken for whoever
    will load the adapter.
    """
    versions = [c.config.get("transformers_version") for c in (tuned, base)]
    version = next((v for v in versions if isinstance(v, str)), "")
    major = version.partition(".")[0]
    renamed = in_memory(_model_type(base), names) if major.isdigit() and int(major) >= 5 else {}
    spoken = {stored: name for name, stored in renamed.items()}
    return {name: spoken.get(name, name).removesuffix(".weight") for name in names}


def _with_tied(one: Checkpoint, other: Checkpoint) -> dict[str, LazyTensor]:
    """The weights of `one`, with those that it ties and the other stores: a head may have come loose in training."""
    tied = {name: one.weights[source] for name, source in one.tied.items() if name in other.weights}
    return {**tied, **one.weights}


def _renamed(
    ours: Mapping[str, LazyTensor], theirs: Mapping[str, LazyTensor], base: Checkpoint, tuned: Checkpoint
) -> tuple[dict[str, LazyTensor], list[str]]:
    """The fine-tuned tensors by the base's names."""
    linear = {n: t.shape for n, t in theirs.items() if _why_not_linear(n, t) is None}
    winners, best = best_renamings(linear, {n: t.shape for n, t in ours.items()}, tuple.__eq__)
    if best == 0:
        raise MismatchError(
            f"no linear weight of '{tuned.name}' has the name and shape of one of '{base.name}'",
            details=[f"base: {n}" for n in sorted(ours)[:3]] + [f"fine-tuned: {n}" for n in sorted(theirs)[:3]],
            hint="one must be the fine-tune of the other",
        )
    if not winners[0]:
        return dict(theirs), []
    if len(winners) > 1:
        raise MismatchError(
            f"the names of '{tuned.name}' fit those of '{base.name}' in {len(winners)} ways",
            details=[f"with {winner}: {best} linear weights" for winner in winners],
            hint="rename the tensors of one of them",
        )
    # A head outside of the prefix keeps its name.
    renamed = {(new if (new := winners[0](name)) in ours else name): tensor for name, tensor in theirs.items()}
    return renamed, [f"the names of the fine-tuned model are read with {winners[0]}"]
